// io_uring through the kernel's own interface: enough of it to keep many reads in flight from one thread.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

namespace memlane {

// Not thread-safe but for wait(). Usable only where open() returned true; elsewhere the caller reads in another way.
class Uring {
 public:
  struct Completion {
    std::uint64_t tag;
    std::int32_t result;  // bytes read, or -errno
  };

  Uring() = default;
  ~Uring();
  Uring(const Uring&) = delete;
  Uring& operator=(const Uring&) = delete;

  // False, with the reason in words, where the kernel lacks io_uring or a sandbox refuses it.
  bool open(unsigned entries, std::string& reason);
  unsigned entries() const { return entries_; }

  // Lets the kernel map this memory once and for all, for reads with `fixed`. False where it will not.
  bool register_buffer(void* memory, std::size_t bytes);
  // Queues a read; at most entries() may be queued or in flight at once. `buffer` must live until its completion.
  void queue_read(int file, void* buffer, std::uint32_t bytes, std::uint64_t offset, std::uint64_t tag, bool fixed);
  int submit();  // hands the queued reads to the kernel; 0 or an errno
  // Waits for a completion, for `patience` at most; `look_first`: without sleeping if one comes soon. 0 or an errno.
  // May be called while another thread queues and submits, but not while another takes completions.
  int wait(std::chrono::nanoseconds patience, bool look_first);
  bool next_completion(Completion& completion);

 private:
  void close();
  bool completed_soon() const;

  int ring_ = -1;
  unsigned entries_ = 0;
  unsigned queued_ = 0;
  void* ring_memory_ = nullptr;
  std::size_t ring_bytes_ = 0;
  void* completion_memory_ = nullptr;  // null where both rings share one mapping
  std::size_t completion_bytes_ = 0;
  void* entry_memory_ = nullptr;
  std::size_t entry_bytes_ = 0;
  std::uint32_t* submit_tail_ = nullptr;
  std::uint32_t* submit_array_ = nullptr;
  std::uint32_t submit_mask_ = 0;
  std::uint32_t* complete_head_ = nullptr;
  std::uint32_t* complete_tail_ = nullptr;
  std::uint32_t complete_mask_ = 0;
  void* completions_ = nullptr;
};

}  // namespace memlane
