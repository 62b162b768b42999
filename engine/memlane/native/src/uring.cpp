#include "uring.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
#define MEMLANE_HAS_URING 1
#endif

namespace memlane {

#if defined(MEMLANE_HAS_URING)

namespace {

constexpr std::chrono::microseconds kLook{150};
constexpr unsigned kKernelThreads = 64;   // that may block in reads at once
constexpr unsigned kRegisterWorkers = 19;  // IORING_REGISTER_IOWQ_MAX_WORKERS, Linux 5.15; older headers lack it

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int setup(unsigned entries, io_uring_params& params) {
  return static_cast<int>(syscall(__NR_io_uring_setup, entries, &params));
}

int enter(int ring, unsigned submit, unsigned wait_for, unsigned flags, void* argument, std::size_t size) {
  return static_cast<int>(syscall(__NR_io_uring_enter, ring, submit, wait_for, flags, argument, size));
}

std::uint32_t* word(void* memory, std::uint32_t offset) {
  return reinterpret_cast<std::uint32_t*>(static_cast<char*>(memory) + offset);
}

}  // namespace

bool Uring::open(unsigned entries, std::string& reason) {
  io_uring_params params{};
  // Not IORING_SETUP_COOP_TASKRUN: with it, completions would stay unseen until the next system call, and a wait
  // could not look for them from here.
  const int ring = setup(entries, params);
  if (ring < 0) {
    reason = std::string("io_uring_setup: ") + std::strerror(errno);
    return false;
  }
  ring_ = ring;
  // Where reads cannot be begun without blocking (network file systems, FUSE), threads of the kernel carry them out, of
  // which there are 4 a processor unless asked for: so few hang together that one bad disk stops all reads, and they
  // keep too few reads in flight. An older kernel refuses: then it is so.
  unsigned workers[2] = {std::min(entries, kKernelThreads), 0};
  syscall(__NR_io_uring_register, ring, kRegisterWorkers, workers, 2);
  if ((params.features & IORING_FEAT_EXT_ARG) == 0) {
    reason = "io_uring: this kernel cannot wait with a time limit";
    close();
    return false;
  }
  const auto map = [ring](std::size_t bytes, off_t what) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, what);
    return memory == MAP_FAILED ? nullptr : memory;
  };
  ring_bytes_ = params.sq_off.array + params.sq_entries * sizeof(std::uint32_t);
  completion_bytes_ = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
  const bool shared = (params.features & IORING_FEAT_SINGLE_MMAP) != 0;
  if (shared) ring_bytes_ = ring_bytes_ > completion_bytes_ ? ring_bytes_ : completion_bytes_;
  entry_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
  ring_memory_ = map(ring_bytes_, IORING_OFF_SQ_RING);
  completion_memory_ = shared ? nullptr : map(completion_bytes_, IORING_OFF_CQ_RING);
  entry_memory_ = map(entry_bytes_, IORING_OFF_SQES);
  if (ring_memory_ == nullptr || entry_memory_ == nullptr || (!shared && completion_memory_ == nullptr)) {
    reason = std::string("io_uring mmap: ") + std::strerror(errno);
    close();
    return false;
  }
  void* completion_ring = shared ? ring_memory_ : completion_memory_;
  submit_tail_ = word(ring_memory_, params.sq_off.tail);
  submit_array_ = word(ring_memory_, params.sq_off.array);
  submit_mask_ = *word(ring_memory_, params.sq_off.ring_mask);
  complete_head_ = word(completion_ring, params.cq_off.head);
  complete_tail_ = word(completion_ring, params.cq_off.tail);
  complete_mask_ = *word(completion_ring, params.cq_off.ring_mask);
  completions_ = word(completion_ring, params.cq_off.cqes);
  entries_ = params.sq_entries;
  return true;
}

void Uring::close() {
  if (ring_memory_ != nullptr) munmap(ring_memory_, ring_bytes_);
  if (completion_memory_ != nullptr) munmap(completion_memory_, completion_bytes_);
  if (entry_memory_ != nullptr) munmap(entry_memory_, entry_bytes_);
  if (ring_ >= 0) ::close(ring_);
  ring_memory_ = completion_memory_ = entry_memory_ = nullptr;
  ring_ = -1;
}

void Uring::queue_read(int file, void* buffer, std::uint32_t bytes, std::uint64_t offset, std::uint64_t tag,
                       bool fixed) {
  const std::uint32_t tail = *submit_tail_;  // only this side writes it
  const std::uint32_t place = tail & submit_mask_;
  auto* entry = static_cast<io_uring_sqe*>(entry_memory_) + place;
  std::memset(entry, 0, sizeof(*entry));
  entry->opcode = fixed ? IORING_OP_READ_FIXED : IORING_OP_READ;  // the only registered buffer has index 0
  entry->fd = file;
  entry->addr = reinterpret_cast<std::uint64_t>(buffer);
  entry->len = bytes;
  entry->off = offset;
  entry->user_data = tag;
  submit_array_[place] = place;
  __atomic_store_n(submit_tail_, tail + 1, __ATOMIC_RELEASE);
  ++queued_;
}

bool Uring::register_buffer(void* memory, std::size_t bytes) {
  iovec whole{memory, bytes};
  return syscall(__NR_io_uring_register, ring_, IORING_REGISTER_BUFFERS, &whole, 1) == 0;
}

int Uring::submit() {
  while (queued_ > 0) {
    const int taken = enter(ring_, queued_, 0, 0, nullptr, 0);
    if (taken >= 0)
      queued_ -= static_cast<unsigned>(taken);
    else if (errno == EAGAIN || errno == EBUSY)
      return 0;  // it wants completions to be taken first
    else if (errno != EINTR)
      return errno;
  }
  return 0;
}

int Uring::wait(std::chrono::nanoseconds patience, bool look_first) {
  if (look_first && completed_soon()) return 0;
  __kernel_timespec limit{patience.count() / 1'000'000'000, patience.count() % 1'000'000'000};
  io_uring_getevents_arg argument{};
  argument.ts = reinterpret_cast<std::uint64_t>(&limit);
  const int result = enter(ring_, 0, 1, IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG, &argument, sizeof(argument));
  if (result >= 0 || errno == ETIME || errno == EINTR || errno == EAGAIN || errno == EBUSY) return 0;
  return errno;
}

// A processor that goes to sleep for one read wakes up tens of microseconds late, about as long as the read itself
// takes. So look for the completion for a while, never long enough to matter to whoever else wants the processor.
bool Uring::completed_soon() const {
  const auto until = std::chrono::steady_clock::now() + kLook;
  do {
    for (int i = 0; i < 64; ++i) {
      if (*complete_head_ != __atomic_load_n(complete_tail_, __ATOMIC_ACQUIRE)) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < until);
  return false;
}

bool Uring::next_completion(Completion& completion) {
  const std::uint32_t head = *complete_head_;
  if (head == __atomic_load_n(complete_tail_, __ATOMIC_ACQUIRE)) return false;
  const auto& entry = static_cast<const io_uring_cqe*>(completions_)[head & complete_mask_];
  completion = {entry.user_data, entry.res};
  __atomic_store_n(complete_head_, head + 1, __ATOMIC_RELEASE);
  return true;
}

Uring::~Uring() { close(); }

#else

bool Uring::open(unsigned, std::string& reason) {
  reason = "built without io_uring";
  return false;
}
void Uring::close() {}
bool Uring::register_buffer(void*, std::size_t) { return false; }
void Uring::queue_read(int, void*, std::uint32_t, std::uint64_t, std::uint64_t, bool) {}
int Uring::submit() { return ENOSYS; }
int Uring::wait(std::chrono::nanoseconds, bool) { return ENOSYS; }
bool Uring::completed_soon() const { return false; }
bool Uring::next_completion(Completion&) { return false; }
Uring::~Uring() = default;

#endif

}  // namespace memlane
