// Bindings of CRC32C: of some bytes, and of all blocks of a piece of a table.
#include <nanobind/stl/string.h>

#include <algorithm>

#include "bindings.h"
#include "crc32c.h"

using namespace memlane;
using namespace nb::literals;

namespace {

using Bytes = Vector<const std::uint8_t>;
using Checksums = nb::ndarray<nb::numpy, std::uint32_t, nb::ndim<1>>;

// The last block may be shorter than the others.
Checksums crc32c_blocks(Bytes data, std::size_t block) {
  require(block > 0, "block must be positive");
  const std::size_t size = data.shape(0);
  const std::size_t count = size / block + (size % block != 0);
  auto* sums = new std::uint32_t[count];
  nb::capsule owner(sums, [](void* p) noexcept { delete[] static_cast<std::uint32_t*>(p); });
  {
    nb::gil_scoped_release release;
    for (std::size_t i = 0; i < count; ++i)
      sums[i] = crc32c(data.data() + i * block, std::min(block, size - i * block));
  }
  return {sums, {count}, owner};
}

}  // namespace

void bind_checksums(nb::module_& module) {
  module.def("crc32c_blocks", &crc32c_blocks, "data"_a.noconvert(), "block"_a);
  const auto bind = [&](const char* name, auto checksum) {
    module.def(
        name, [checksum](Bytes data) { return checksum(data.data(), data.shape(0)); }, "data"_a.noconvert(),
        nb::call_guard<nb::gil_scoped_release>());
  };
  bind("crc32c", &crc32c);
  bind("crc32c_tables", &crc32c_tables);
  module.def("crc32c_variant", [] { return std::string(crc32c_variant()); });
}
