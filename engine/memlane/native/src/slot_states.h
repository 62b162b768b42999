// Whether the row of a slot is there yet.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace memlane {

// One byte a slot; copies share the states. The reader sets it to `reading` before it starts and to `ready` or `failed` when it is done with
// the row's bytes; whoever sums rows may use a slot's bytes once it reads `ready`.
class SlotStates {
 public:
  enum State : std::uint8_t { ready = 0, reading = 1, failed = 2 };

  explicit SlotStates(std::size_t slots) : size_(slots), state_(new std::atomic<std::uint8_t>[slots]()) {}

  std::size_t size() const { return size_; }
  std::shared_ptr<const void> lease() const { return state_; }  // the states stay while this lives
  State operator[](std::size_t slot) const {
    return static_cast<State>(state_[slot].load(std::memory_order_acquire));
  }
  void set(std::size_t slot, State state) { state_[slot].store(state, std::memory_order_release); }

 private:
  std::size_t size_;
  std::shared_ptr<std::atomic<std::uint8_t>[]> state_;
};

}  // namespace memlane
