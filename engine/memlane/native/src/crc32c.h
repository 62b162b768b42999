// CRC32C, the checksum of table blocks: Castagnoli's polynomial, reflected (0x82F63B78), initial value and final xor
// 0xFFFFFFFF, as iSCSI (RFC 3720, appendix B.4), ext4 and NVMe have it. The processor computes it 8 bytes at a time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace memlane {

// By the processor's own instruction where it has one, else by tables. The same values either way, on any alignment;
// no bytes give 0. Reads `size` bytes and allocates nothing: fit to be called for every block of a read.
std::uint32_t crc32c(const std::uint8_t* data, std::size_t size);

// By tables alone, 8 bytes a step: what machines without the instruction use, and the twin that tests compare with.
std::uint32_t crc32c_tables(const std::uint8_t* data, std::size_t size);

// How crc32c() computes here: "sse4.2", "armv8" or "tables".
const char* crc32c_variant();

}  // namespace memlane
