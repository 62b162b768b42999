// Exact least recently used: one ring, most recent first. Within a batch, misses are more recent than hits, each in
// the order of first occurrence.
#pragma once

#include <string>
#include <vector>

#include "policy.h"

namespace memlane {

class LruPolicy {
 public:
  static constexpr const char* kName = "lru";
  static constexpr std::size_t kSentinels = 1;

  LruPolicy(Node* nodes, std::size_t, std::size_t, std::int32_t first_sentinel)
      : nodes_(nodes), ring_(nodes, first_sentinel) {}

  void clear() { ring_.clear(); }
  void prefetch(std::int32_t slot) const {
    __builtin_prefetch(nodes_ + nodes_[slot].previous, 1);
    __builtin_prefetch(nodes_ + nodes_[slot].next, 1);
  }
  void hit(std::int32_t slot) {
    if (slot == ring_.first()) return;
    ring_.unlink(slot);
    ring_.push_front(slot);
  }
  void insert(std::int32_t slot) { ring_.push_front(slot); }
  void remove(std::int32_t slot) { ring_.unlink(slot); }
  // Touched rows move to the front, so if the oldest is locked, all are.
  std::int32_t victim(const Locks& locks) {
    const std::int32_t oldest = ring_.last();
    if (oldest == ring_.sentinel() || locks.holds(oldest)) return -1;
    ring_.unlink(oldest);
    return oldest;
  }
  void rank_last(std::int32_t slot) {
    ring_.unlink(slot);
    ring_.push_back(slot);
  }
  std::size_t bytes() const { return 0; }
  void list(std::vector<std::int32_t>& out) const {
    for (std::int32_t slot = ring_.first(); slot != ring_.sentinel(); slot = nodes_[slot].next) out.push_back(slot);
  }
  std::string check() const { return ""; }

 private:
  Node* nodes_;
  Ring ring_;
};

}  // namespace memlane
