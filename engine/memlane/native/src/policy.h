// What an eviction policy is, and what all of them share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace memlane {

// A slot, as index and policy see it. The links belong to the policy while it keeps the slot.
struct Node {
  std::int32_t previous;
  std::int32_t next;
  std::uint32_t row;
  std::uint32_t mark;  // batch * 2 + 1 where the row was a miss of that batch, batch * 2 where a hit, 0 = no row
};

// A ring of slots through a sentinel node: sentinel -> first ... last -> sentinel.
class Ring {
 public:
  Ring(Node* nodes, std::int32_t sentinel) : nodes_(nodes), sentinel_(sentinel) { clear(); }
  void clear() { nodes_[sentinel_].previous = nodes_[sentinel_].next = sentinel_; }
  bool empty() const { return nodes_[sentinel_].next == sentinel_; }
  std::int32_t first() const { return nodes_[sentinel_].next; }  // the sentinel itself when empty
  std::int32_t last() const { return nodes_[sentinel_].previous; }
  std::int32_t sentinel() const { return sentinel_; }
  void unlink(std::int32_t slot) {
    nodes_[nodes_[slot].previous].next = nodes_[slot].next;
    nodes_[nodes_[slot].next].previous = nodes_[slot].previous;
  }
  void push_front(std::int32_t slot) { link(slot, sentinel_, first()); }
  void push_back(std::int32_t slot) { link(slot, last(), sentinel_); }

 private:
  void link(std::int32_t slot, std::int32_t before, std::int32_t after) {
    nodes_[slot].previous = before;
    nodes_[slot].next = after;
    nodes_[before].next = slot;
    nodes_[after].previous = slot;
  }

  Node* nodes_;
  std::int32_t sentinel_;
};

// A policy decides which of the slots it keeps makes way. It is a class with these members, called by the index:
//
//   static constexpr const char* kName;
//   static constexpr std::size_t kSentinels;          nodes beyond the slots that it uses for its rings
//   Policy(Node* nodes, std::size_t rows, std::size_t slots, std::int32_t first_sentinel);
//   void clear();                                     it keeps nothing any more
//   void hit(std::int32_t slot);                      the slot's row is used; at most once a batch, before any miss
//   void prefetch(std::int32_t slot) const;           hit(slot) comes soon: fetch what it will touch beside the node
//   void insert(std::int32_t slot);                   keep this slot from now on; nodes[slot].row is set
//   void remove(std::int32_t slot);                   stop keeping it, and remember nothing of its row
//   std::int32_t victim(const Locks& locks);          stop keeping the slot it returns; -1 if all kept are locked
//   void rank_last(std::int32_t slot);                make it the first to go, if there is such an order
//   std::size_t bytes() const;                        memory beyond the nodes
//   void list(std::vector<std::int32_t>& out) const;  kept slots, the one to be kept longest first
//   std::string check() const;                        empty, or the first broken invariant of its own books
//
// A row is locked while a batch that touched it is open.
class Locks {
 public:
  Locks(const Node* nodes, std::uint32_t oldest_open) : nodes_(nodes), oldest_open_(oldest_open) {}
  bool holds(std::int32_t slot) const { return nodes_[slot].mark / 2 >= oldest_open_; }
  std::uint32_t oldest_open() const { return oldest_open_; }

 private:
  const Node* nodes_;
  std::uint32_t oldest_open_;  // greater than any mark / 2 while no batch is open
};

// Where a search found all slots of a queue locked, the next one would find the same, until the oldest batch ends or a
// slot comes in that is not locked. Without this memory, each miss of a batch that locks almost everything would go
// through all slots.
class AllLocked {
 public:
  bool known(const Locks& locks) const { return since_ == locks.oldest_open(); }
  void found(const Locks& locks) { since_ = locks.oldest_open(); }
  void added(const Node& node) {
    if (node.mark / 2 < since_) since_ = 0;
  }
  void clear() { since_ = 0; }

 private:
  std::uint32_t since_ = 0;  // the oldest open batch of that time, 0 = not known
};

}  // namespace memlane
