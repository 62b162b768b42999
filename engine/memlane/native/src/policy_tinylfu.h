// TinyLFU (Einziger, Friedman, Manes, "TinyLFU: a highly efficient cache admission policy", ACM ToS 2017): a small window
// in order of arrival, and a main part ruled by how often rows were asked for, whether they were cached or not.
//
//   new row ---> [ window: 1 % of the slots ] --oldest--> which was asked for more often? <--weakest-- [ main ]
//                                                         the other one makes way
//
// The weakest row of the main part is found by sampling, as Redis and Ristretto do: a few slots further on each time,
// and the weakest one so far stays in the sample until it is gone. So slots need no order, and a hit is one counter
// raised. Where W-TinyLFU has a segmented LRU in this place, the order of recency can only break ties.
//
// Rows that arrive in one batch are all locked. Once they fill the window it has no candidate, and the main part must
// give up a slot unasked: a larger sample then keeps it from being a good one (0.4 points of hit rate on such batches).
//
// A row is counted once for each batch that asks for it, not once for each of its tokens.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "policy.h"
#include "row_counts.h"

namespace memlane {

class TinyLfuPolicy {
 public:
  static constexpr const char* kName = "tinylfu";
  static constexpr std::size_t kSentinels = 1;

  TinyLfuPolicy(Node* nodes, std::size_t rows, std::size_t slots, std::int32_t first_sentinel)
      : nodes_(nodes), window_(nodes, first_sentinel), window_share_(std::max<std::size_t>(slots / 100, 1)),
        counts_(rows, slots), place_(slots, kNowhere) {}

  void clear() {
    window_.clear();
    window_size_ = main_size_ = 0;
    hand_ = 0;
    weakest_ = -1;
    counts_.clear();
    std::fill(place_.begin(), place_.end(), kNowhere);
    all_locked_.clear();
  }
  void prefetch(std::int32_t slot) const { counts_.prefetch(nodes_[slot].row); }
  void hit(std::int32_t slot) { counts_.add(nodes_[slot].row); }
  void insert(std::int32_t slot) {
    counts_.add(nodes_[slot].row);
    window_.push_front(slot);
    place(slot) = kWindow;
    all_locked_.added(nodes_[slot]);
    if (++window_size_ > window_share_) move_to_main(window_.last());  // nothing had to make way for it
  }
  void remove(std::int32_t slot) {
    counts_.forget(nodes_[slot].row);
    give_up(slot);
  }
  std::int32_t victim(const Locks& locks) {
    if (all_locked_.known(locks)) return -1;
    std::int32_t candidate = -1;
    if (window_size_ >= window_share_ && !locks.holds(window_.last())) candidate = window_.last();
    const std::int32_t weakest = weakest_of_main(locks, candidate >= 0);
    std::int32_t victim = weakest;
    if (candidate >= 0) {
      if (weakest >= 0 && count(weakest) <= count(candidate)) {
        move_to_main(candidate);
      } else {
        victim = candidate;
      }
    } else if (weakest < 0) {
      victim = unlocked_of_window(locks);
    }
    if (victim < 0) {
      all_locked_.found(locks);
    } else {
      give_up(victim);
    }
    return victim;
  }
  void rank_last(std::int32_t slot) { counts_.forget(nodes_[slot].row); }
  std::size_t bytes() const { return place_.size() + counts_.bytes(); }
  // The main part, then the window; the most often asked for first.
  void list(std::vector<std::int32_t>& out) const {
    for (const Place part : {kMain, kWindow}) {
      const auto begin = static_cast<std::ptrdiff_t>(out.size());
      for (std::size_t slot = 0; slot < place_.size(); ++slot)
        if (place_[slot] == part) out.push_back(static_cast<std::int32_t>(slot));
      std::stable_sort(out.begin() + begin, out.end(),
                       [&](std::int32_t a, std::int32_t b) { return count(a) > count(b); });
    }
  }
  std::string check() const {
    std::size_t in_window = 0;
    for (std::int32_t slot = window_.first(); slot != window_.sentinel(); slot = nodes_[slot].next) {
      if (++in_window > window_size_) return "tinylfu: the window holds more slots than were counted";
      if (place_[static_cast<std::size_t>(slot)] != kWindow) return "tinylfu: a slot of the window is said to be elsewhere";
      if (nodes_[nodes_[slot].next].previous != slot) return "tinylfu: the links of the window disagree";
    }
    const auto in = [&](Place part) { return static_cast<std::size_t>(std::count(place_.begin(), place_.end(), part)); };
    if (in_window != window_size_ || in(kWindow) != window_size_) return "tinylfu: the size of the window is wrong";
    if (window_size_ > window_share_) return "tinylfu: the window is too large";
    if (in(kMain) != main_size_) return "tinylfu: the size of the main part is wrong";
    if (weakest_ >= 0 && place_[static_cast<std::size_t>(weakest_)] != kMain)
      return "tinylfu: the weakest slot is not in the main part";
    return "";
  }

 private:
  enum Place : std::uint8_t { kNowhere, kWindow, kMain };
  static constexpr std::size_t kSample = 8;        // slots that join the weakest one so far
  static constexpr std::size_t kLargeSample = 32;  // the same, where the window has no candidate
  static constexpr std::size_t kLook = 64;         // slots to look at for them, where fewer will do

  Place& place(std::int32_t slot) { return place_[static_cast<std::size_t>(slot)]; }
  std::uint8_t count(std::int32_t slot) const { return counts_.of(nodes_[slot].row); }

  void give_up(std::int32_t slot) {
    if (place(slot) == kWindow) {
      window_.unlink(slot);
      --window_size_;
    } else {
      --main_size_;
      if (slot == weakest_) weakest_ = -1;
    }
    place(slot) = kNowhere;
  }
  void move_to_main(std::int32_t slot) {
    window_.unlink(slot);
    --window_size_;
    nodes_[slot].previous = -1;
    place(slot) = kMain;
    ++main_size_;
  }

  // The weakest unlocked slot of a sample of the main part; -1 if the part has none, or none was found soon and the
  // window has a candidate to take instead. Slots are passed at most once, plus those of one sample.
  std::int32_t weakest_of_main(const Locks& locks, bool can_do_without) {
    if (main_size_ == 0) return -1;
    std::int32_t best = weakest_ >= 0 && !locks.holds(weakest_) ? weakest_ : -1;
    int best_count = best >= 0 ? count(best) : 256;
    const std::size_t wanted = can_do_without ? kSample : kLargeSample;
    std::size_t sampled = 0;
    for (std::size_t looked = 0; looked < place_.size() && sampled < wanted; ++looked) {
      if (looked >= kLook && (best >= 0 || can_do_without)) break;
      const auto slot = static_cast<std::int32_t>(hand_);
      hand_ = hand_ + 1 == place_.size() ? 0 : hand_ + 1;
      if (place(slot) != kMain || locks.holds(slot)) continue;
      ++sampled;
      if (count(slot) >= best_count) continue;
      best = slot;
      best_count = count(slot);
    }
    if (best >= 0) weakest_ = best;
    return best;
  }

  std::int32_t unlocked_of_window(const Locks& locks) const {
    for (std::int32_t slot = window_.last(); slot != window_.sentinel(); slot = nodes_[slot].previous)
      if (!locks.holds(slot)) return slot;
    return -1;
  }

  Node* nodes_;
  Ring window_;  // newest first
  std::size_t window_size_ = 0;
  std::size_t window_share_;
  std::size_t main_size_ = 0;
  std::size_t hand_ = 0;        // the next slot to sample
  std::int32_t weakest_ = -1;   // of the samples so far
  RowCounts counts_;
  std::vector<Place> place_;
  AllLocked all_locked_;
};

}  // namespace memlane
