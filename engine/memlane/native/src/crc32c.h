// CRC32C (Castagnoli).
#pragma once
#include <cstddef>
#include <cstdint>
namespace memlane {
inline std::uint32_t crc32c(const std::uint8_t* data, std::size_t size) {
  std::uint32_t crc = 0xFFFFFFFFU;
  for (std::size_t i = 0; i < size; ++i) {
    crc ^= data[i];
    for (int b = 0; b < 8; ++b) crc = (crc >> 1) ^ (0x82F63B78U & (0U - (crc & 1U)));
  }
  return crc ^ 0xFFFFFFFFU;
}
}
