// S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023): three queues in order of arrival.
//
//   new row ---> [ small: a tenth of the slots ] -- hit in between --> [ main: the rest ]
//                      | not hit                                        | hit: once more round, one hit less
//                      v                                                v not hit
//               [ ghosts: ids only ] -- asked for again -> main        gone
//
// Most rows that are new to the cache are not asked for again soon; the small queue lets them go before they cost a
// place in the main one, and the ghosts bring back those that went too early. Slots move only when the policy looks for
// a victim; a hit is one byte written. Hits are counted up to 3, once a batch.
//
// A locked slot that is looked at goes to the front of its queue: it is in use. Rows that arrive in one batch are all
// locked, so a batch with more of them than the small queue has room for takes from the main one meanwhile, and what
// is too much in the small one goes first when the next batch looks for slots.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "ghost_queue.h"
#include "policy.h"

namespace memlane {

class S3FifoPolicy {
 public:
  static constexpr const char* kName = "s3fifo";
  static constexpr std::size_t kSentinels = 2;

  S3FifoPolicy(Node* nodes, std::size_t, std::size_t slots, std::int32_t first_sentinel)
      : nodes_(nodes), small_(nodes, first_sentinel), main_(nodes, first_sentinel + 1),
        small_share_(std::max<std::size_t>(slots / 10, 1)), ghosts_(slots - std::min(slots, small_share_)),
        state_(slots, 0) {}

  void clear() {
    small_.clear();
    main_.clear();
    ghosts_.clear();
  }
  void prefetch(std::int32_t slot) const { __builtin_prefetch(state_.data() + slot, 1); }
  void hit(std::int32_t slot) {
    std::uint8_t& state = state_[static_cast<std::size_t>(slot)];
    state = static_cast<std::uint8_t>(state + ((state & kHits) < kHits ? 1 : 0));
  }
  void insert(std::int32_t slot) {
    if (ghosts_.take(nodes_[slot].row)) {
      put_in_main(slot);
    } else {
      state_[static_cast<std::size_t>(slot)] = 0;
      small_.add(slot);
    }
  }
  void remove(std::int32_t slot) { (in_main(slot) ? main_ : small_).unlink(slot); }
  std::int32_t victim(const Locks& locks) {
    const bool small_first = small_.size > small_share_;
    std::int32_t slot = small_first ? victim_of_small(locks) : victim_of_main(locks);
    if (slot < 0) slot = small_first ? victim_of_main(locks) : victim_of_small(locks);
    return slot >= 0 ? slot : victim_of_main(locks);  // where the small queue has just moved unlocked slots
  }
  void rank_last(std::int32_t slot) {
    remove(slot);
    state_[static_cast<std::size_t>(slot)] = 0;
    small_.ring.push_back(slot);
    ++small_.size;
    small_.all_locked.added(nodes_[slot]);
  }
  std::size_t bytes() const { return state_.size() + ghosts_.bytes(); }
  // The main queue by hits, then the small one; the newest first among equals.
  void list(std::vector<std::int32_t>& out) const {
    const auto begin = static_cast<std::ptrdiff_t>(out.size());
    main_.list(out);
    std::stable_sort(out.begin() + begin, out.end(), [&](std::int32_t a, std::int32_t b) { return hits(a) > hits(b); });
    small_.list(out);
  }
  std::string check() const {
    for (const Queue* queue : {&small_, &main_}) {
      std::size_t count = 0;
      for (std::int32_t slot = queue->ring.first(); slot != queue->ring.sentinel(); slot = nodes_[slot].next) {
        if (++count > queue->size) return "s3fifo: a queue holds more slots than were counted";
        if (in_main(slot) != (queue == &main_)) return "s3fifo: a slot is in the other queue";
        if (nodes_[nodes_[slot].next].previous != slot) return "s3fifo: the links of a queue disagree";
      }
      if (count != queue->size) return "s3fifo: a queue holds fewer slots than were counted";
    }
    return ghosts_.check();
  }

 private:
  static constexpr std::uint8_t kHits = 3;  // the bits that count hits, and the most they count
  static constexpr std::uint8_t kInMain = 4;
  static constexpr std::uint8_t kEnough = 1;  // hits in the small queue that lead to the main one; 2 gains nothing here

  struct Queue {
    Queue(Node* nodes, std::int32_t sentinel) : nodes(nodes), ring(nodes, sentinel) {}
    void clear() {
      ring.clear();
      size = 0;
      all_locked.clear();
    }
    void add(std::int32_t slot) {
      ring.push_front(slot);
      ++size;
      all_locked.added(nodes[slot]);
    }
    void unlink(std::int32_t slot) {
      ring.unlink(slot);
      --size;
    }
    void to_front(std::int32_t slot) {
      ring.unlink(slot);
      ring.push_front(slot);
    }
    void list(std::vector<std::int32_t>& out) const {
      for (std::int32_t slot = ring.first(); slot != ring.sentinel(); slot = nodes[slot].next) out.push_back(slot);
    }

    Node* nodes;
    Ring ring;  // newest first
    std::size_t size = 0;
    AllLocked all_locked;
  };

  std::uint8_t hits(std::int32_t slot) const { return state_[static_cast<std::size_t>(slot)] & kHits; }
  bool in_main(std::int32_t slot) const { return (state_[static_cast<std::size_t>(slot)] & kInMain) != 0; }
  void put_in_main(std::int32_t slot) {
    state_[static_cast<std::size_t>(slot)] = kInMain;
    main_.add(slot);
  }

  std::int32_t victim_of_small(const Locks& locks) {
    if (small_.all_locked.known(locks)) return -1;
    for (std::size_t locked = 0; locked < small_.size;) {
      const std::int32_t slot = small_.ring.last();
      if (hits(slot) >= kEnough) {
        small_.unlink(slot);
        put_in_main(slot);
      } else if (locks.holds(slot)) {
        small_.to_front(slot);
        ++locked;
      } else {
        small_.unlink(slot);
        ghosts_.add(nodes_[slot].row);
        return slot;
      }
    }
    small_.all_locked.found(locks);
    return -1;
  }

  std::int32_t victim_of_main(const Locks& locks) {
    if (main_.all_locked.known(locks)) return -1;
    for (std::size_t locked = 0; locked < main_.size;) {
      const std::int32_t slot = main_.ring.last();
      if (locks.holds(slot)) {
        main_.to_front(slot);
        ++locked;
      } else if (hits(slot) > 0) {
        --state_[static_cast<std::size_t>(slot)];
        main_.to_front(slot);
        locked = 0;
      } else {
        main_.unlink(slot);
        return slot;
      }
    }
    main_.all_locked.found(locks);
    return -1;
  }

  Node* nodes_;
  Queue small_;
  Queue main_;
  std::size_t small_share_;
  GhostQueue ghosts_;
  std::vector<std::uint8_t> state_;
};

}  // namespace memlane
