// SIEVE (Zhang et al., "SIEVE is simpler than LRU", NSDI 2024): a queue in order of arrival, a bit for each slot that
// was hit, and a hand that moves from the oldest to the newest. The hand takes the first slot without the bit and
// clears the bit of those it passes; slots never move, so a hit is one byte written.
//
//   newest  [ ] [v] [ ] [v] [v] [ ]  oldest
//                    ^ hand: clears v, v, then takes the next without
//
// A visit is a batch that asked for the row after the one that brought it in: a row that one prompt reads a hundred
// times is as new to the next as any other. The hand passes locked slots and leaves their bits alone, so that what
// the running batch uses keeps the credit for it.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "policy.h"

namespace memlane {

class SievePolicy {
 public:
  static constexpr const char* kName = "sieve";
  static constexpr std::size_t kSentinels = 1;

  SievePolicy(Node* nodes, std::size_t, std::size_t slots, std::int32_t first_sentinel)
      : nodes_(nodes), ring_(nodes, first_sentinel), hand_(first_sentinel), visited_(slots, 0) {}

  void clear() {
    ring_.clear();
    hand_ = ring_.sentinel();
    kept_ = 0;
    all_locked_.clear();
  }
  void prefetch(std::int32_t slot) const { __builtin_prefetch(visited_.data() + slot, 1); }
  void hit(std::int32_t slot) { visited_[static_cast<std::size_t>(slot)] = 1; }
  void insert(std::int32_t slot) {
    visited_[static_cast<std::size_t>(slot)] = 0;
    ring_.push_front(slot);
    ++kept_;
    all_locked_.added(nodes_[slot]);
  }
  void remove(std::int32_t slot) {
    if (hand_ == slot) hand_ = nodes_[slot].previous;
    ring_.unlink(slot);
    --kept_;
  }
  std::int32_t victim(const Locks& locks) {
    if (all_locked_.known(locks)) return -1;
    for (std::size_t locked = 0; locked < kept_;) {
      if (hand_ == ring_.sentinel()) hand_ = ring_.last();
      const std::int32_t slot = hand_;
      if (locks.holds(slot)) {
        ++locked;
      } else if (visited_[static_cast<std::size_t>(slot)] != 0) {
        visited_[static_cast<std::size_t>(slot)] = 0;
        locked = 0;
      } else {
        remove(slot);
        return slot;
      }
      hand_ = nodes_[slot].previous;
    }
    all_locked_.found(locks);
    return -1;
  }
  void rank_last(std::int32_t slot) {
    remove(slot);
    ring_.push_back(slot);
    ++kept_;
  }
  std::size_t bytes() const { return visited_.size(); }
  // The order in which the hand would take them if nothing were hit any more, reversed.
  void list(std::vector<std::int32_t>& out) const {
    const auto begin = static_cast<std::ptrdiff_t>(out.size());
    for (const int bit : {0, 1}) {
      std::int32_t slot = hand_;
      for (std::size_t i = 0; i < kept_; ++i, slot = nodes_[slot].previous) {
        if (slot == ring_.sentinel()) slot = ring_.last();
        if (visited_[static_cast<std::size_t>(slot)] == bit) out.push_back(slot);
      }
    }
    std::reverse(out.begin() + begin, out.end());
  }
  std::string check() const {
    std::size_t count = 0;
    bool hand_found = hand_ == ring_.sentinel();
    for (std::int32_t slot = ring_.first(); slot != ring_.sentinel(); slot = nodes_[slot].next) {
      if (++count > kept_) return "sieve: the queue holds more slots than were counted";
      if (nodes_[nodes_[slot].next].previous != slot) return "sieve: the links of the queue disagree";
      hand_found = hand_found || slot == hand_;
    }
    if (count != kept_) return "sieve: the queue holds fewer slots than were counted";
    return hand_found ? "" : "sieve: the hand is not in the queue";
  }

 private:
  Node* nodes_;
  Ring ring_;          // newest first
  std::int32_t hand_;  // the next slot to look at; the sentinel: start with the oldest
  std::size_t kept_ = 0;
  std::vector<std::uint8_t> visited_;
  AllLocked all_locked_;
};

}  // namespace memlane
