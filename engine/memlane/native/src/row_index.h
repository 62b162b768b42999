// Which row lies in which slot: the index of a row cache with exact LRU, and its integrity check.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "arena.h"

namespace memlane {

// Slots [0, slots) keep rows between batches; slots [slots, slots + scratch) hold rows of the running batch only.
//
//   row_slot_:  row id -> slot + 1, 0 = not here     4 bytes a row, zero pages until touched
//   nodes_:     slot   -> row, neighbours, mark      16 bytes a slot
//
//      recency list (a ring through `head_`):   head_ -> newest ... oldest -> head_
//      free list (through Node::next):          free_ -> slot -> slot -> end
//      scratch slots:                           in neither; [slots, slots + scratch_used_) are taken
//
// A batch is: begin_batch, then lookup / commit until all its ids are served, then end_batch. Rows touched since
// begin_batch are locked: they cannot be evicted, since the kernels are about to read them. When every slot is
// locked the rest of the batch goes through the scratch slots, and when those are used up lookup stops short; the
// caller uses what it has, calls release_scratch and goes on. So a batch of any size fits any cache.
//
// Recency within a batch: its misses are newer than its hits, each in the order of first occurrence. Not
// thread-safe: one owner at a time.
class RowIndex {
 public:
  struct Counters {
    std::uint64_t requested = 0;      // ids looked up
    std::uint64_t unique = 0;         // different rows among them, per batch (a row read twice into scratch: twice)
    std::uint64_t hits = 0;           // ids whose row was in a slot when the batch began
    std::uint64_t misses = 0;         // ids whose row was not
    std::uint64_t unique_misses = 0;  // rows that had to be read
    std::uint64_t evictions = 0;
    std::uint64_t scratch_rows = 0;   // rows read into scratch slots
  };

  // A row to be read into a slot before the slot may be used.
  struct Miss {
    std::uint32_t row;
    std::int32_t slot;
  };

  RowIndex(std::size_t rows, std::size_t slots, std::size_t scratch);

  void begin_batch();
  // Writes the slot of each id, until ids or slots run out; returns how many ids were served (slots_out beyond them
  // is undefined). The rows to read are in misses(), sorted by row, until commit or abort. Ids must be inside
  // [0, rows); the first lookup of a batch must be given all of them, later ones those not yet served.
  template <class Id>
  std::size_t lookup(const Id* ids, std::size_t count, std::int32_t* slots_out);
  const std::vector<Miss>& misses() const { return misses_; }
  // The misses have been read, except those at the given positions (ascending): they leave the index.
  void commit(const std::int64_t* failed, std::size_t count);
  void abort() noexcept;  // nothing was read: all misses leave the index
  void release_scratch();
  void end_batch();

  bool contains(std::size_t row) const { return row_slot_[row] != 0; }
  void clear();

  std::size_t rows() const { return rows_; }
  std::size_t slots() const { return slots_; }
  std::size_t scratch() const { return scratch_; }
  std::size_t used() const { return used_; }
  std::size_t bytes() const { return row_slots_.size() + nodes_.size() * sizeof(Node); }
  const Counters& counters() const { return counters_; }

  // Rows from the most to the least recently used.
  std::vector<std::int64_t> recency() const;
  // Empty, or the first broken invariant in words.
  std::string check() const;

 private:
  struct Node {
    std::int32_t previous;
    std::int32_t next;
    std::uint32_t row;
    std::uint32_t mark;  // batch * 2 + 1 where the row was a miss of that batch, batch * 2 where it was a hit
  };

  template <class Id>
  void touch_hits(const Id* ids, std::size_t count, std::int32_t* slots_out);
  std::int32_t add_miss(std::uint32_t row);  // its slot, or -1
  std::int32_t take_slot();  // a free slot, the oldest one, a scratch slot, or -1
  void drop(const Miss& miss) noexcept;
  void unlink(std::int32_t slot) noexcept;
  void push_front(std::int32_t slot) noexcept;
  bool is_scratch(std::int32_t slot) const { return static_cast<std::size_t>(slot) >= slots_; }

  std::size_t rows_;
  std::size_t slots_;
  std::size_t scratch_;
  std::size_t used_ = 0;
  std::size_t scratch_used_ = 0;
  std::uint32_t batch_ = 0;
  std::int32_t head_;
  std::int32_t free_ = -1;
  Arena row_slots_;
  std::uint32_t* row_slot_;
  std::vector<Node> nodes_;
  std::vector<Miss> misses_;
  std::vector<std::size_t> missed_;  // positions in the batch, of the running lookup
  bool hits_touched_ = false;        // by the first lookup of the batch
  Counters counters_;
};

}  // namespace memlane
