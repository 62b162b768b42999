// CRC32C three ways. All work on the register's bits, without the xor at both ends.
//
// One instruction takes 8 bytes but waits 3 cycles for the one before it, so long inputs run as three lanes at once:
//
//   | lane a | lane b | lane c |      register(abc) = shift(shift(register(a)) ^ register(b)) ^ register(c)
//
// where shift() carries a register over the zero bytes of one lane. It is linear, so four table look-ups do it.
#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

namespace memlane {
namespace {

constexpr std::uint32_t kPolynomial = 0x82F63B78;

using Table = std::array<std::uint32_t, 256>;

// kByte[k][b]: byte b followed by k zero bytes.
constexpr std::array<Table, 8> kByte = [] {
  std::array<Table, 8> tables{};
  for (std::uint32_t b = 0; b < 256; ++b) {
    std::uint32_t bits = b;
    for (int i = 0; i < 8; ++i) bits = (bits >> 1) ^ ((bits & 1) != 0 ? kPolynomial : 0);
    tables[0][b] = bits;
  }
  for (std::size_t k = 1; k < 8; ++k)
    for (std::size_t b = 0; b < 256; ++b)
      tables[k][b] = (tables[k - 1][b] >> 8) ^ tables[0][tables[k - 1][b] & 255];
  return tables;
}();

constexpr std::uint32_t look_up(const Table& byte0, const Table& byte1, const Table& byte2, const Table& byte3,
                                std::uint32_t bits) {
  return byte0[bits & 255] ^ byte1[bits >> 8 & 255] ^ byte2[bits >> 16 & 255] ^ byte3[bits >> 24];
}

constexpr std::uint32_t add_word(std::uint32_t bits, std::uint64_t word) {
  word ^= bits;
  return look_up(kByte[7], kByte[6], kByte[5], kByte[4], static_cast<std::uint32_t>(word)) ^
         look_up(kByte[3], kByte[2], kByte[1], kByte[0], static_cast<std::uint32_t>(word >> 32));
}

std::uint32_t add_byte(std::uint32_t bits, std::uint8_t byte) { return (bits >> 8) ^ kByte[0][(bits ^ byte) & 255]; }

std::uint64_t load_word(const std::uint8_t* data) {
  std::uint64_t word;
  std::memcpy(&word, data, sizeof word);
  if constexpr (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__) word = __builtin_bswap64(word);
  return word;
}

// Carries a register over `bytes` zero bytes, a multiple of 8.
template <std::size_t bytes>
struct Shift {
  static constexpr std::array<Table, 4> kTables = [] {
    std::array<std::uint32_t, 32> of_bit{};
    for (std::size_t i = 0; i < 32; ++i) {
      of_bit[i] = 1u << i;
      for (std::size_t k = 0; k < bytes; k += 8) of_bit[i] = add_word(of_bit[i], 0);
    }
    std::array<Table, 4> tables{};
    for (std::size_t t = 0; t < 4; ++t)
      for (std::size_t b = 0; b < 256; ++b)
        for (std::size_t i = 0; i < 8; ++i)
          if ((b >> i & 1) != 0) tables[t][b] ^= of_bit[8 * t + i];
    return tables;
  }();

  static std::uint32_t apply(std::uint32_t bits) {
    return look_up(kTables[0], kTables[1], kTables[2], kTables[3], bits);
  }
};

// Three long lanes fill a block of 4,096 bytes but for 16; short ones serve what is left of other sizes.
constexpr std::size_t kLongLane = 1360;
constexpr std::size_t kShortLane = 128;

}  // namespace

std::uint32_t crc32c_tables(const std::uint8_t* data, std::size_t size) {
  std::uint32_t bits = ~0u;
  for (; size >= 8; data += 8, size -= 8) bits = add_word(bits, load_word(data));
  for (; size > 0; ++data, --size) bits = add_byte(bits, *data);
  return ~bits;
}

}  // namespace memlane

#if defined(__x86_64__) || defined(__aarch64__)

#if defined(__clang__) && defined(__x86_64__)
#pragma clang attribute push(__attribute__((target("sse4.2,crc32"))), apply_to = function)
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("crc"))), apply_to = function)
#elif defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("sse4.2")
#else
#pragma GCC push_options
#pragma GCC target("+crc")
#endif

namespace memlane {
namespace {

#if defined(__x86_64__)
constexpr const char* kInstruction = "sse4.2";
std::uint64_t step(std::uint64_t bits, std::uint64_t word) { return _mm_crc32_u64(bits, word); }
std::uint32_t step_byte(std::uint32_t bits, std::uint8_t byte) { return _mm_crc32_u8(bits, byte); }
#else
constexpr const char* kInstruction = "armv8";
std::uint64_t step(std::uint64_t bits, std::uint64_t word) {
  return __crc32cd(static_cast<std::uint32_t>(bits), word);
}
std::uint32_t step_byte(std::uint32_t bits, std::uint8_t byte) { return __crc32cb(bits, byte); }
#endif

template <std::size_t lane>
std::uint32_t three_lanes(std::uint32_t bits, const std::uint8_t* data) {
  std::uint64_t a = bits, b = 0, c = 0;
  for (const std::uint8_t* end = data + lane; data < end; data += 8) {
    a = step(a, load_word(data));
    b = step(b, load_word(data + lane));
    c = step(c, load_word(data + 2 * lane));
  }
  const std::uint32_t ab = Shift<lane>::apply(static_cast<std::uint32_t>(a)) ^ static_cast<std::uint32_t>(b);
  return Shift<lane>::apply(ab) ^ static_cast<std::uint32_t>(c);
}

std::uint32_t by_instruction(const std::uint8_t* data, std::size_t size) {
  std::uint32_t bits = ~0u;
  for (; size >= 3 * kLongLane; data += 3 * kLongLane, size -= 3 * kLongLane)
    bits = three_lanes<kLongLane>(bits, data);
  for (; size >= 3 * kShortLane; data += 3 * kShortLane, size -= 3 * kShortLane)
    bits = three_lanes<kShortLane>(bits, data);
  for (; size >= 8; data += 8, size -= 8) bits = static_cast<std::uint32_t>(step(bits, load_word(data)));
  for (; size > 0; ++data, --size) bits = step_byte(bits, *data);
  return ~bits;
}

}  // namespace
}  // namespace memlane

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace memlane {
namespace {

bool has_instruction() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("sse4.2");
#elif defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
#elif defined(__ARM_FEATURE_CRC32)
  return true;
#else
  return false;
#endif
}

}  // namespace
}  // namespace memlane

#else

namespace memlane {
namespace {

constexpr const char* kInstruction = "";
constexpr auto by_instruction = crc32c_tables;
bool has_instruction() { return false; }

}  // namespace
}  // namespace memlane

#endif

namespace memlane {
namespace {

struct Variant {
  const char* name;
  std::uint32_t (*checksum)(const std::uint8_t*, std::size_t);
};

const Variant& variant() {
  static const Variant chosen =
      has_instruction() ? Variant{kInstruction, by_instruction} : Variant{"tables", crc32c_tables};
  return chosen;
}

}  // namespace

std::uint32_t crc32c(const std::uint8_t* data, std::size_t size) { return variant().checksum(data, size); }

const char* crc32c_variant() { return variant().name; }

}  // namespace memlane
