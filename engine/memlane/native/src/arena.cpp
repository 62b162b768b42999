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
  const std::size_t mapped = (bytes == 0 ? 1 : bytes) + (huge ? kHugePage : 0);
  void* mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = std::shared_ptr<void>(mapping, [mapped](void* memory) { munmap(memory, mapped); });
  auto address = reinterpret_cast<std::uintptr_t>(mapping);
  if (huge) {
    address = (address + kHugePage - 1) & ~static_cast<std::uintptr_t>(kHugePage - 1);
    madvise(reinterpret_cast<void*>(address), bytes, MADV_HUGEPAGE);  // refused: plain pages, only slower
  }
  data_ = reinterpret_cast<std::uint8_t*>(address);
}

Arena::Arena(int file, std::size_t bytes) : size_(bytes) {
  const std::size_t mapped = bytes == 0 ? 1 : bytes;
  void* mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = std::shared_ptr<void>(mapping, [mapped](void* memory) { munmap(memory, mapped); });
  madvise(mapping, mapped, MADV_HUGEPAGE);
  data_ = static_cast<std::uint8_t*>(mapping);
}

}  // namespace memlane
