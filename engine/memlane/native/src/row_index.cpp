#include "row_index.h"

#include <algorithm>
#include <stdexcept>

namespace memlane {

namespace {

// Ids are looked at this far ahead of their turn: the index entry first, then its node, then the node's
// neighbours, so that each memory access overlaps the ones before it.
constexpr std::size_t kFetchEntry = 24;
constexpr std::size_t kFetchNode = 16;
constexpr std::size_t kFetchNeighbours = 8;

constexpr std::uint32_t kMostBatches = 0x7FFFFFFE;  // a mark holds batch * 2 + 1

}  // namespace

RowIndex::RowIndex(std::size_t rows, std::size_t slots, std::size_t scratch)
    : rows_(rows), slots_(slots), scratch_(scratch), head_(static_cast<std::int32_t>(slots + scratch)),
      row_slots_(rows * sizeof(std::uint32_t)), row_slot_(reinterpret_cast<std::uint32_t*>(row_slots_.data())) {
  if (rows > INT32_MAX || slots > INT32_MAX || scratch > INT32_MAX || slots + scratch >= INT32_MAX)
    throw std::invalid_argument("rows, slots and scratch must each fit 31 bits");
  nodes_.resize(slots + scratch + 1);
  clear();
}

void RowIndex::clear() {
  for (std::size_t slot = 0; slot < slots_ + scratch_; ++slot) {
    if (nodes_[slot].mark != 0) row_slot_[nodes_[slot].row] = 0;
    nodes_[slot] = {-1, -1, 0, 0};
  }
  nodes_[static_cast<std::size_t>(head_)] = {head_, head_, 0, 0};
  free_ = -1;
  for (std::size_t slot = slots_; slot-- > 0;) {
    nodes_[slot].next = free_;
    free_ = static_cast<std::int32_t>(slot);
  }
  used_ = 0;
  scratch_used_ = 0;
  batch_ = 0;
  misses_.clear();
}

void RowIndex::unlink(std::int32_t slot) noexcept {
  const Node& node = nodes_[static_cast<std::size_t>(slot)];
  nodes_[static_cast<std::size_t>(node.previous)].next = node.next;
  nodes_[static_cast<std::size_t>(node.next)].previous = node.previous;
}

void RowIndex::push_front(std::int32_t slot) noexcept {
  Node& head = nodes_[static_cast<std::size_t>(head_)];
  Node& node = nodes_[static_cast<std::size_t>(slot)];
  node.previous = head_;
  node.next = head.next;
  nodes_[static_cast<std::size_t>(head.next)].previous = slot;
  head.next = slot;
}

void RowIndex::begin_batch() {
  if (!misses_.empty()) throw std::logic_error("begin_batch: the last lookup was neither committed nor aborted");
  if (batch_ == kMostBatches) {  // marks would wrap: forget who was touched when, the order of recency stays
    for (auto& node : nodes_) node.mark = node.mark == 0 ? 0 : 2;
    batch_ = 1;
  }
  ++batch_;
  hits_touched_ = false;
}

std::int32_t RowIndex::take_slot() {
  if (free_ >= 0) {
    const std::int32_t slot = free_;
    free_ = nodes_[static_cast<std::size_t>(slot)].next;
    ++used_;
    push_front(slot);
    return slot;
  }
  // Touched rows move to the front, so if the oldest row belongs to this batch, all do.
  const std::int32_t oldest = nodes_[static_cast<std::size_t>(head_)].previous;
  if (oldest != head_ && nodes_[static_cast<std::size_t>(oldest)].mark / 2 != batch_) {
    row_slot_[nodes_[static_cast<std::size_t>(oldest)].row] = 0;
    unlink(oldest);
    push_front(oldest);
    ++counters_.evictions;
    return oldest;
  }
  if (scratch_used_ < scratch_) {
    ++counters_.scratch_rows;
    return static_cast<std::int32_t>(slots_ + scratch_used_++);
  }
  return -1;
}

std::int32_t RowIndex::add_miss(std::uint32_t row) {
  const std::int32_t slot = take_slot();
  if (slot < 0) return slot;
  nodes_[static_cast<std::size_t>(slot)].row = row;
  nodes_[static_cast<std::size_t>(slot)].mark = batch_ * 2 + 1;
  row_slot_[row] = static_cast<std::uint32_t>(slot) + 1;
  misses_.push_back({row, slot});
  return slot;
}

// All hits of the batch are touched before the first miss takes a slot, so that no miss evicts a row that the
// batch itself is about to use.
template <class Id>
void RowIndex::touch_hits(const Id* ids, std::size_t count, std::int32_t* slots_out) {
  Node* const nodes = nodes_.data();  // locals: the compiler cannot know that stores to nodes leave members alone
  Node& head = nodes[head_];
  const std::uint32_t* const row_slot = row_slot_;
  const std::uint32_t batch = batch_;
  std::uint64_t touched = 0;
  missed_.clear();
  for (std::size_t i = 0; i < count; ++i) {
    if (i + kFetchEntry < count) __builtin_prefetch(row_slot + ids[i + kFetchEntry]);
    if (i + kFetchNode < count) {
      const std::uint32_t entry = row_slot[ids[i + kFetchNode]];
      if (entry != 0) __builtin_prefetch(nodes + (entry - 1), 1);
    }
    if (i + kFetchNeighbours < count) {
      const std::uint32_t entry = row_slot[ids[i + kFetchNeighbours]];
      if (entry != 0) {
        __builtin_prefetch(nodes + nodes[entry - 1].previous, 1);
        __builtin_prefetch(nodes + nodes[entry - 1].next, 1);
      }
    }
    const std::uint32_t entry = row_slot[ids[i]];
    if (entry == 0) {
      missed_.push_back(i);
      continue;
    }
    const auto slot = static_cast<std::int32_t>(entry - 1);
    slots_out[i] = slot;
    Node& node = nodes[slot];
    if (node.mark / 2 == batch) continue;
    node.mark = batch * 2;
    ++touched;
    if (head.next == slot) continue;
    nodes[node.previous].next = node.next;
    nodes[node.next].previous = node.previous;
    node.previous = head_;
    node.next = head.next;
    nodes[head.next].previous = slot;
    head.next = slot;
  }
  counters_.unique += touched;
}

template <class Id>
std::size_t RowIndex::lookup(const Id* ids, std::size_t count, std::int32_t* slots_out) {
  if (!misses_.empty()) throw std::logic_error("lookup: the last lookup was neither committed nor aborted");
  std::size_t served = count;
  std::size_t missed = 0;
  if (!hits_touched_) {
    hits_touched_ = true;
    touch_hits(ids, count, slots_out);
    for (; missed < missed_.size(); ++missed) {
      const std::size_t i = missed_[missed];
      const std::uint32_t entry = row_slot_[ids[i]];  // not 0 where an earlier miss was the same row
      slots_out[i] = entry != 0 ? static_cast<std::int32_t>(entry - 1) : add_miss(static_cast<std::uint32_t>(ids[i]));
      if (slots_out[i] < 0) {
        served = i;
        break;
      }
    }
  } else {  // a later part of a batch too large for the slots
    for (std::size_t i = 0; i < count; ++i) {
      const std::uint32_t entry = row_slot_[ids[i]];
      const auto slot = static_cast<std::int32_t>(entry) - 1;
      const bool hit = entry != 0 && nodes_[static_cast<std::size_t>(slot)].mark == batch_ * 2;
      missed += hit ? 0 : 1;
      slots_out[i] = entry != 0 ? slot : add_miss(static_cast<std::uint32_t>(ids[i]));
      if (slots_out[i] < 0) {
        --missed;
        served = i;
        break;
      }
    }
  }
  counters_.requested += served;
  counters_.misses += missed;
  counters_.hits += served - missed;
  counters_.unique += misses_.size();
  counters_.unique_misses += misses_.size();
  std::sort(misses_.begin(), misses_.end(), [](const Miss& a, const Miss& b) { return a.row < b.row; });
  return served;
}

template std::size_t RowIndex::lookup(const std::int32_t*, std::size_t, std::int32_t*);
template std::size_t RowIndex::lookup(const std::int64_t*, std::size_t, std::int32_t*);

void RowIndex::drop(const Miss& miss) noexcept {
  Node& node = nodes_[static_cast<std::size_t>(miss.slot)];
  row_slot_[miss.row] = 0;
  node.mark = 0;
  if (is_scratch(miss.slot)) return;  // its place is given back by release_scratch
  unlink(miss.slot);
  node.next = free_;
  free_ = miss.slot;
  --used_;
}

void RowIndex::commit(const std::int64_t* failed, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    if (failed[i] < 0 || static_cast<std::size_t>(failed[i]) >= misses_.size())
      throw std::out_of_range("commit: not a position among the misses");
  }
  for (std::size_t i = 0; i < count; ++i) drop(misses_[static_cast<std::size_t>(failed[i])]);
  misses_.clear();
}

void RowIndex::abort() noexcept {
  for (const Miss& miss : misses_) drop(miss);
  misses_.clear();
}

void RowIndex::release_scratch() {
  for (std::size_t slot = slots_; slot < slots_ + scratch_used_; ++slot) {
    Node& node = nodes_[slot];
    if (node.mark != 0) row_slot_[node.row] = 0;
    node.mark = 0;
  }
  scratch_used_ = 0;
}

void RowIndex::end_batch() {
  abort();
  release_scratch();
}

std::vector<std::int64_t> RowIndex::recency() const {
  std::vector<std::int64_t> rows;
  for (std::int32_t slot = nodes_[static_cast<std::size_t>(head_)].next; slot != head_;
       slot = nodes_[static_cast<std::size_t>(slot)].next)
    rows.push_back(nodes_[static_cast<std::size_t>(slot)].row);
  return rows;
}

std::string RowIndex::check() const {
  const auto at = [this](std::int32_t slot) -> const Node& { return nodes_[static_cast<std::size_t>(slot)]; };
  std::vector<bool> seen(slots_ + scratch_, false);
  std::size_t listed = 0;
  for (std::int32_t slot = at(head_).next, before = head_; slot != head_; before = slot, slot = at(slot).next) {
    if (slot < 0 || is_scratch(slot)) return "the recency list leaves the cache's slots";
    if (seen[static_cast<std::size_t>(slot)]) return "the recency list has a loop";
    seen[static_cast<std::size_t>(slot)] = true;
    if (at(slot).previous != before) return "the recency list's links disagree";
    if (at(slot).mark == 0 || at(slot).row >= rows_) return "a listed slot holds no row";
    if (row_slot_[at(slot).row] != static_cast<std::uint32_t>(slot) + 1) return "a cached row's entry points elsewhere";
    ++listed;
  }
  if (listed != used_) return "the number of cached rows is wrong";
  std::size_t free = 0;
  for (std::int32_t slot = free_; slot >= 0; slot = at(slot).next) {
    if (is_scratch(slot) || seen[static_cast<std::size_t>(slot)]) return "the free list holds a slot in use";
    seen[static_cast<std::size_t>(slot)] = true;
    ++free;
  }
  if (free + used_ != slots_) return "free + used slots are not all slots";
  std::size_t scratch_rows = 0;
  for (std::size_t slot = slots_; slot < slots_ + scratch_; ++slot) {
    if (nodes_[slot].mark == 0) continue;
    if (slot >= slots_ + scratch_used_) return "a scratch slot outside the used ones holds a row";
    if (row_slot_[nodes_[slot].row] != slot + 1) return "a scratch row's entry points elsewhere";
    ++scratch_rows;
  }
  std::size_t entries = 0;
  for (std::size_t row = 0; row < rows_; ++row) entries += row_slot_[row] != 0 ? 1 : 0;
  if (entries != used_ + scratch_rows) return "rows with an entry and rows in slots differ in number";
  return "";
}

}  // namespace memlane
