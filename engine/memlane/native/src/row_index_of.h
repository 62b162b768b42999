// The row index, written once over its map and its policy; see row_index.h for what it promises.
#pragma once

#include <algorithm>
#include <array>
#include <stdexcept>

#include "policy.h"
#include "row_index.h"
#include "row_map.h"

namespace memlane {

template <class Map, class Policy>
class RowIndexOf final : public RowIndex {
 public:
  RowIndexOf(std::size_t rows, std::size_t slots, std::size_t scratch)
      : rows_(rows), slots_(slots), scratch_(scratch), map_(rows, slots + scratch),
        nodes_(slots + scratch + Policy::kSentinels),
        policy_(nodes_.data(), rows, slots, static_cast<std::int32_t>(slots + scratch)) {
    forget_all();
  }

  std::uint32_t begin() override {
    if (batch_ >= kMostBatches && open_.empty()) {  // marks would wrap: forget when rows were touched
      for (Node& node : nodes_) node.mark = node.mark == 0 ? 0 : 2;
      batch_ = 1;
    }
    misses_.clear();
    open_.push_back({++batch_, false, false});
    return batch_;
  }

  std::size_t lookup(std::uint32_t batch, const std::int32_t* ids, std::size_t count,
                     std::int32_t* slots_out) override {
    return serve(batch, ids, count, slots_out);
  }
  std::size_t lookup(std::uint32_t batch, const std::int64_t* ids, std::size_t count,
                     std::int32_t* slots_out) override {
    return serve(batch, ids, count, slots_out);
  }
  const std::vector<Miss>& misses() const override { return misses_; }

  void drop(const std::int32_t* slots, std::size_t count) override {
    for (std::size_t i = 0; i < count; ++i) {
      const std::int32_t slot = slots[i];
      if (slot < 0 || static_cast<std::size_t>(slot) >= slots_ + scratch_) throw std::out_of_range("drop: no such slot");
      if (node(slot).mark == 0) continue;  // dropped already, by another batch that needed the row
      map_.erase(node(slot).row);
      node(slot).mark = 0;
      if (is_scratch(slot)) continue;  // its place is given back by release_scratch
      policy_.remove(slot);
      --used_;
      dropped_.push_back(slot);
    }
    recycle();
  }

  void release_scratch(std::uint32_t batch) override {
    if (scratch_owner_ != batch) return;
    for (std::size_t slot = slots_; slot < slots_ + scratch_used_; ++slot) {
      Node& scratch = nodes_[slot];
      if (scratch.mark != 0) map_.erase(scratch.row);
      scratch.mark = 0;
    }
    scratch_used_ = 0;
    scratch_owner_ = 0;
  }

  void end(std::uint32_t batch) override {
    if (open_.empty() || open_.front().batch != batch) throw std::logic_error("end: not the oldest open batch");
    open_.erase(open_.begin());
    // A later batch may have found rows in the scratch slots: they are its own then.
    if (scratch_owner_ == batch && !open_.empty()) scratch_owner_ = open_.front().batch;
    release_scratch(batch);
    recycle();
  }

  std::vector<std::int32_t> reserve(std::size_t count) override {
    std::vector<std::int32_t> taken;
    for (; taken.size() < count && free_ >= 0; ++reserved_) taken.push_back(take_free());
    return taken;
  }

  std::size_t adopt(const std::int64_t* rows, const std::int32_t* slots, std::size_t count, bool pinned) override {
    std::size_t adopted = 0;
    for (std::size_t i = 0; i < count; ++i) {
      require_reserved(slots[i]);
      const auto row = static_cast<std::uint32_t>(rows[i]);
      if (map_.find(row) >= 0) {
        free_slot(slots[i]);
      } else {
        node(slots[i]) = {-1, -1, row, kAdopted};
        map_.insert(row, slots[i]);
        ++used_;
        ++adopted;
        if (pinned) {
          node(slots[i]).previous = kPinned;
          ++pinned_;
        } else {
          policy_.insert(slots[i]);
        }
      }
      --reserved_;
    }
    return adopted;
  }

  void give_back(const std::int32_t* slots, std::size_t count) override {
    for (std::size_t i = 0; i < count; ++i) {
      require_reserved(slots[i]);
      free_slot(slots[i]);
      --reserved_;
    }
  }

  bool contains(std::size_t row) const override { return map_.find(static_cast<std::uint32_t>(row)) >= 0; }

  void clear() override {
    if (!open_.empty() || reserved_ > 0) throw std::logic_error("clear: slots are in use");
    for (std::size_t slot = 0; slot < slots_; ++slot)
      if (nodes_[slot].mark != 0) map_.erase(nodes_[slot].row);
    policy_.clear();
    forget_all();
  }

  std::size_t rows() const override { return rows_; }
  std::size_t slots() const override { return slots_; }
  std::size_t scratch() const override { return scratch_; }
  std::size_t used() const override { return used_; }
  std::size_t pinned() const override { return pinned_; }
  std::size_t open() const override { return open_.size(); }
  std::size_t bytes() const override { return map_.bytes() + nodes_.size() * sizeof(Node) + policy_.bytes(); }
  const char* policy() const override { return Policy::kName; }
  const char* map() const override { return Map::kName; }
  const Counters& counters() const override { return counters_; }

  std::vector<std::int64_t> ranking() const override {
    std::vector<std::int32_t> slots;
    for (std::size_t slot = 0; slot < slots_; ++slot)
      if (nodes_[slot].mark != 0 && nodes_[slot].previous == kPinned) slots.push_back(static_cast<std::int32_t>(slot));
    policy_.list(slots);
    std::vector<std::int64_t> rows;
    rows.reserve(slots.size());
    for (const std::int32_t slot : slots) rows.push_back(node(slot).row);
    return rows;
  }

  void rank_last(const std::int64_t* rows, std::size_t count) override {
    for (std::size_t i = 0; i < count; ++i) {
      const std::int32_t slot = map_.find(static_cast<std::uint32_t>(rows[i]));
      if (slot >= 0 && !is_scratch(slot) && node(slot).mark == kAdopted && node(slot).previous != kPinned)
        policy_.rank_last(slot);
    }
  }

  std::string check() const override {
    std::vector<bool> seen(slots_ + scratch_, false);
    std::vector<std::int32_t> kept;
    policy_.list(kept);
    for (const std::int32_t slot : kept) {
      if (slot < 0 || static_cast<std::size_t>(slot) >= slots_) return "the policy keeps what is not a cache slot";
      if (seen[static_cast<std::size_t>(slot)]) return "the policy keeps a slot twice";
      seen[static_cast<std::size_t>(slot)] = true;
      if (node(slot).mark == 0 || node(slot).row >= rows_) return "a kept slot holds no row";
      if (map_.find(node(slot).row) != slot) return "a cached row's entry points elsewhere";
    }
    std::size_t pinned = 0;
    for (std::size_t slot = 0; slot < slots_; ++slot) {
      if (seen[slot] || nodes_[slot].mark == 0) continue;
      if (nodes_[slot].previous != kPinned) return "a slot holds a row, but neither policy nor pins know it";
      if (map_.find(nodes_[slot].row) != static_cast<std::int32_t>(slot)) return "a pinned row's entry points elsewhere";
      seen[slot] = true;
      ++pinned;
    }
    if (pinned != pinned_) return "the number of pinned rows is wrong";
    if (kept.size() + pinned != used_) return "the number of cached rows is wrong";
    std::size_t free = 0;
    for (std::int32_t slot = free_; slot >= 0; slot = node(slot).next) {
      if (is_scratch(slot) || seen[static_cast<std::size_t>(slot)]) return "the free list holds a slot in use";
      seen[static_cast<std::size_t>(slot)] = true;
      ++free;
    }
    if (free + used_ + dropped_.size() + reserved_ != slots_) return "free + used + dropped + reserved are not all slots";
    for (std::size_t slot = slots_; slot < slots_ + scratch_; ++slot) {
      if (nodes_[slot].mark == 0) continue;
      if (slot >= slots_ + scratch_used_) return "a scratch slot outside the used ones holds a row";
      if (map_.find(nodes_[slot].row) != static_cast<std::int32_t>(slot)) return "a scratch row's entry points elsewhere";
    }
    if (scratch_used_ > 0 && scratch_owner_ == 0) return "scratch slots are taken by no batch";
    return policy_.check();
  }

 private:
  static constexpr std::int32_t kPinned = -2;            // in Node::previous: the policy does not keep this slot
  static constexpr std::uint32_t kAdopted = 1;           // mark of a row that no batch has touched yet
  static constexpr std::uint32_t kMostBatches = 0x7FFFFF00;  // a mark holds batch * 2 + 1
  static constexpr std::size_t kBlock = 32;              // ids whose memory accesses are in flight together

  struct Open {
    std::uint32_t batch;
    bool touched;  // its hits have been touched: a later lookup serves the rest of a batch too large for the slots
    bool partial;  // not all of its ids have been served
  };

  Node& node(std::int32_t slot) { return nodes_[static_cast<std::size_t>(slot)]; }
  const Node& node(std::int32_t slot) const { return nodes_[static_cast<std::size_t>(slot)]; }
  bool is_scratch(std::int32_t slot) const { return static_cast<std::size_t>(slot) >= slots_; }

  void forget_all() {
    for (std::size_t slot = 0; slot < slots_ + scratch_; ++slot) nodes_[slot] = {-1, -1, 0, 0};
    free_ = -1;
    for (std::size_t slot = slots_; slot-- > 0;) free_slot(static_cast<std::int32_t>(slot));
    used_ = pinned_ = 0;
  }

  void require_reserved(std::int32_t slot) const {
    if (slot < 0 || is_scratch(slot) || node(slot).mark != 0 || reserved_ == 0)
      throw std::out_of_range("not a reserved slot");
  }

  std::int32_t take_free() {
    const std::int32_t slot = free_;
    free_ = node(slot).next;
    return slot;
  }

  void free_slot(std::int32_t slot) {
    node(slot).next = free_;
    free_ = slot;
  }

  // An open batch may still hold the number of a dropped slot: only later may another row lie there.
  void recycle() {
    if (!open_.empty()) return;
    for (const std::int32_t slot : dropped_) free_slot(slot);
    dropped_.clear();
  }

  // A slot for a missed row: a free one, else what the policy gives up, else a scratch slot, else -1.
  [[gnu::always_inline]] inline std::int32_t take_slot(std::uint32_t batch) {
    if (free_ >= 0) {
      ++used_;
      return take_free();
    }
    const std::int32_t victim = policy_.victim(Locks(nodes_.data(), open_.front().batch));
    if (victim >= 0) {
      map_.erase(node(victim).row);
      ++counters_.evictions;
      return victim;
    }
    if (scratch_used_ == scratch_ || (scratch_owner_ != 0 && scratch_owner_ != batch)) return -1;
    scratch_owner_ = batch;
    ++counters_.scratch_rows;
    return static_cast<std::int32_t>(slots_ + scratch_used_++);
  }

  // Forced, as take_slot: with several policies in one unit gcc stops inlining them, and a prompt takes 4 % longer.
  [[gnu::always_inline]] inline std::int32_t add_miss(std::uint32_t batch, std::uint32_t row) {
    const std::int32_t slot = take_slot(batch);
    if (slot < 0) return slot;
    node(slot).row = row;
    node(slot).mark = batch * 2 + 1;
    map_.insert(row, slot);
    if (!is_scratch(slot)) policy_.insert(slot);
    misses_.push_back({row, slot});
    return slot;
  }

  // All hits of the batch are touched before the first miss takes a slot, so that no miss evicts a row that the
  // batch itself is about to use. Ids go by in blocks: the map entries of the next block are fetched while this
  // block's nodes are, and those before its rows are touched.
  template <class Id>
  void touch_hits(std::uint32_t batch, const Id* ids, std::size_t count, std::int32_t* slots_out) {
    Node* const nodes = nodes_.data();
    std::uint64_t touched = 0;
    missed_.clear();
    for (std::size_t i = 0; i < std::min(count, kBlock); ++i) map_.prefetch(static_cast<std::uint32_t>(ids[i]));
    for (std::size_t begin = 0; begin < count; begin += kBlock) {
      const std::size_t end = std::min(begin + kBlock, count);
      for (std::size_t i = end; i < std::min(end + kBlock, count); ++i)
        map_.prefetch(static_cast<std::uint32_t>(ids[i]));
      for (std::size_t i = begin; i < end; ++i) {
        slots_out[i] = map_.find(static_cast<std::uint32_t>(ids[i]));
        __builtin_prefetch(nodes + slots_out[i], 1);  // of -1 too: a fetch harms nothing
      }
      for (std::size_t i = begin; i < end; ++i)
        if (slots_out[i] >= 0) policy_.prefetch(slots_out[i]);
      for (std::size_t i = begin; i < end; ++i) {
        const std::int32_t slot = slots_out[i];
        if (slot < 0) {
          missed_.push_back(i);
          continue;
        }
        Node& hit = nodes[slot];
        if (hit.mark / 2 == batch) continue;
        hit.mark = batch * 2;
        ++touched;
        if (hit.previous != kPinned && !is_scratch(slot)) policy_.hit(slot);
      }
    }
    counters_.unique += touched;
  }

  // By row. A prompt misses a hundred thousand rows at once: then by their digits, lowest first, several times quicker.
  void sort_misses() {
    if (misses_.size() < 256) {
      std::sort(misses_.begin(), misses_.end(), [](const Miss& a, const Miss& b) { return a.row < b.row; });
      return;
    }
    constexpr unsigned kBits = 11;
    constexpr std::uint32_t kMask = (1U << kBits) - 1;
    sorted_.resize(misses_.size());
    for (unsigned shift = 0; shift < 32 && (rows_ - 1) >> shift != 0; shift += kBits) {
      std::array<std::uint32_t, kMask + 2> begin{};
      for (const Miss& miss : misses_) ++begin[((miss.row >> shift) & kMask) + 1];
      for (std::size_t digit = 1; digit < begin.size(); ++digit) begin[digit] += begin[digit - 1];
      for (const Miss& miss : misses_) sorted_[begin[(miss.row >> shift) & kMask]++] = miss;
      misses_.swap(sorted_);
    }
  }

  template <class Id>
  std::size_t serve(std::uint32_t batch, const Id* ids, std::size_t count, std::int32_t* slots_out) {
    misses_.clear();
    const auto open = std::find_if(open_.begin(), open_.end(), [&](const Open& o) { return o.batch == batch; });
    if (open == open_.end()) throw std::logic_error("lookup: the batch is not open");
    const bool waits = std::any_of(open_.begin(), open, [](const Open& o) { return o.partial; });
    open->partial = true;
    if (waits) return 0;
    std::size_t served = count;
    std::size_t missed = 0;
    if (!open->touched) {
      open->touched = true;
      touch_hits(batch, ids, count, slots_out);
      for (; missed < missed_.size(); ++missed) {
        const std::size_t i = missed_[missed];
        const auto row = static_cast<std::uint32_t>(ids[i]);
        const std::int32_t slot = map_.find(row);  // there, where an earlier miss was the same row
        slots_out[i] = slot >= 0 ? slot : add_miss(batch, row);
        if (slots_out[i] < 0) {
          served = i;
          break;
        }
      }
    } else {
      for (std::size_t i = 0; i < count; ++i) {
        const auto row = static_cast<std::uint32_t>(ids[i]);
        const std::int32_t slot = map_.find(row);
        const bool hit = slot >= 0 && node(slot).mark == batch * 2;
        slots_out[i] = slot >= 0 ? slot : add_miss(batch, row);
        if (slots_out[i] < 0) {
          served = i;
          break;
        }
        missed += hit ? 0 : 1;
      }
    }
    open->partial = served < count;
    counters_.requested += served;
    counters_.misses += missed;
    counters_.hits += served - missed;
    counters_.unique += misses_.size();
    counters_.unique_misses += misses_.size();
    sort_misses();
    return served;
  }

  std::size_t rows_;
  std::size_t slots_;
  std::size_t scratch_;
  std::size_t used_ = 0;
  std::size_t pinned_ = 0;
  std::size_t reserved_ = 0;
  std::size_t scratch_used_ = 0;
  std::uint32_t scratch_owner_ = 0;  // batch, 0 = nobody
  std::uint32_t batch_ = 0;
  std::int32_t free_ = -1;           // a list through Node::next
  Map map_;
  std::vector<Node> nodes_;
  Policy policy_;
  std::vector<Open> open_;           // oldest first: one or two
  std::vector<std::int32_t> dropped_;
  std::vector<Miss> misses_;
  std::vector<Miss> sorted_;         // room to sort them
  std::vector<std::size_t> missed_;  // positions in the batch, of the running lookup
  Counters counters_;
};

}  // namespace memlane
