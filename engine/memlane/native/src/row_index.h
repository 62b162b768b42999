// Which row lies in which slot: the index of a row cache, under any eviction policy, and its integrity check.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace memlane {

// Slots [0, slots) keep rows between batches; slots [slots, slots + scratch) hold rows of a running batch only.
//
//   map:     row id -> slot             4 bytes a row, or 12 to 24 a slot where that is far less (row_map.h)
//   nodes:   slot   -> row, links, mark 16 bytes a slot
//   policy:  which slot to give up      policy_*.h
//
//      each slot is one of:  kept by the policy | pinned | free | reserved | dropped (free once no batch is open)
//      each scratch slot:    free, or taken by the one batch that owns the scratch region
//
// A batch is: begin, then lookup until all its ids are served, then end. Rows touched by an open batch are locked:
// they cannot be evicted, since the kernels are about to read them. When no slot can be had the rest of the batch goes
// through the scratch slots, and when those are used up lookup stops short; the caller uses what it has, calls
// release_scratch and goes on. So a batch of any size fits any cache.
//
// Several batches may be open at once; they end in the order in which they began. While one of them is served only in
// part, later ones are served nothing until it has ended: what they locked could be what it waits for.
//
// A miss has its slot at once, before its row is read: a later batch that asks for the row finds it there, on its way.
// A row that turns out unreadable is dropped; its slot is not used again before the open batches have ended.
//
// Not thread-safe: one owner at a time.
class RowIndex {
 public:
  struct Counters {
    std::uint64_t requested = 0;      // ids looked up
    std::uint64_t unique = 0;         // different rows among them, per batch (a row read twice into scratch: twice)
    std::uint64_t hits = 0;           // ids whose row had a slot when the batch began
    std::uint64_t misses = 0;         // ids whose row had none
    std::uint64_t unique_misses = 0;  // rows that had to be read
    std::uint64_t evictions = 0;
    std::uint64_t scratch_rows = 0;   // rows read into scratch slots
  };

  // A row to be read into a slot before the slot may be used.
  struct Miss {
    std::uint32_t row;
    std::int32_t slot;
  };

  // Throws std::invalid_argument: sizes beyond 31 bits, or an unknown policy.
  static std::unique_ptr<RowIndex> make(std::size_t rows, std::size_t slots, std::size_t scratch,
                                        const std::string& policy);
  static std::vector<std::string> policies();  // names for make(), the default first
  // What make() would take in memory, but for what the policy keeps beside the slots' nodes.
  static std::size_t bytes_for(std::size_t rows, std::size_t slots, std::size_t scratch);
  virtual ~RowIndex() = default;

  virtual std::uint32_t begin() = 0;  // the batch's name for the calls below
  // Writes the slot of each id, until ids or slots run out; returns how many ids were served (slots_out beyond them
  // is undefined). The rows to read are in misses(), ascending, until the next lookup or begin. Ids must be inside [0, rows);
  // the first lookup of a batch must be given all of them, later ones those not yet served.
  virtual std::size_t lookup(std::uint32_t batch, const std::int32_t* ids, std::size_t count,
                             std::int32_t* slots_out) = 0;
  virtual std::size_t lookup(std::uint32_t batch, const std::int64_t* ids, std::size_t count,
                             std::int32_t* slots_out) = 0;
  virtual const std::vector<Miss>& misses() const = 0;
  virtual void drop(const std::int32_t* slots, std::size_t count) = 0;  // their rows could not be read
  virtual void release_scratch(std::uint32_t batch) = 0;
  virtual void end(std::uint32_t batch) = 0;  // std::logic_error unless it is the oldest open one

  // Rows brought in beside the batches, to warm the cache: reserve free slots, read rows into them, then adopt (rows
  // that a batch brought in meanwhile are left out) or give the slots back.
  virtual std::vector<std::int32_t> reserve(std::size_t count) = 0;
  virtual std::size_t adopt(const std::int64_t* rows, const std::int32_t* slots, std::size_t count, bool pinned) = 0;
  virtual void give_back(const std::int32_t* slots, std::size_t count) = 0;

  virtual bool contains(std::size_t row) const = 0;
  virtual void clear() = 0;  // std::logic_error while a batch is open

  virtual std::size_t rows() const = 0;
  virtual std::size_t slots() const = 0;
  virtual std::size_t scratch() const = 0;
  virtual std::size_t used() const = 0;    // slots that hold a row, pinned ones included
  virtual std::size_t pinned() const = 0;
  virtual std::size_t open() const = 0;    // batches begun and not ended
  virtual std::size_t bytes() const = 0;
  virtual const char* policy() const = 0;
  virtual const char* map() const = 0;     // "direct" or "hash"
  virtual const Counters& counters() const = 0;

  // Cached rows, the one that the policy would keep longest first; pinned ones before all others.
  virtual std::vector<std::int64_t> ranking() const = 0;
  // Makes the given rows the first to go, the last of them first of all, where they have not been used since they
  // were adopted. Policies without an order of recency ignore it.
  virtual void rank_last(const std::int64_t* rows, std::size_t count) = 0;
  // Empty, or the first broken invariant in words.
  virtual std::string check() const = 0;
};

}  // namespace memlane
