#include "arena.h"

#include <sys/mman.h>

#include <new>

namespace memlane {

namespace {
constexpr std::size_t kHugePage = std::size_t{2} << 20;
}

Arena::Arena(std::size_t bytes) : size_(bytes) {
  // One huge page of slack lets the rows start on a huge-page boundary whatever mmap returns.
  const bool huge = bytes >= kHugePage;
  mapped_ = (bytes == 0 ? 1 : bytes) + (huge ? kHugePage : 0);
  mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) {
    mapping_ = nullptr;
    throw std::bad_alloc();
  }
  auto address = reinterpret_cast<std::uintptr_t>(mapping_);
  if (huge) {
    address = (address + kHugePage - 1) & ~static_cast<std::uintptr_t>(kHugePage - 1);
    madvise(reinterpret_cast<void*>(address), bytes, MADV_HUGEPAGE);  // refused: plain pages, only slower
  }
  data_ = reinterpret_cast<std::uint8_t*>(address);
}

Arena::~Arena() {
  if (mapping_ != nullptr) munmap(mapping_, mapped_);
}

}  // namespace memlane
