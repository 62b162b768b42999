// CPU kernels over rows in memory, compiled once per instruction set and chosen at run time.
//
// Every variant gives the same bits: sums run over k = 0..K-1 with one fused multiply-add per element, in fp32,
// whatever the vector length. So a model's output does not depend on the machine's instruction set, the thread
// count, or how a batch was cut.
#pragma once

#include <cstddef>
#include <cstdint>

namespace memlane {

// How the numbers of a row are stored. Values are part of the Python interface.
//   float32, bfloat16, float16   width numbers
//   int8                         width codes, then the fp16 scale: value = code * scale
//   int4                         width/2 bytes, low nibble = column k, high nibble = column k + width/2,
//                                then the signed fp16 scale: value = (nibble - 8) * scale
//   fp8                          width e4m3 codes, then the fp16 scale: value = e4m3(code) * scale. The codes 0x7F
//                                and 0xFF, which e4m3 keeps for NaN and nobody writes, are read as 480 and -480
enum class RowFormat : int { float32 = 0, bfloat16 = 1, float16 = 2, int8 = 3, int4 = 4, fp8 = 5 };

std::size_t row_stride(RowFormat format, std::size_t width);

struct Rows {
  const std::uint8_t* base;
  std::size_t stride;
  std::size_t width;
  RowFormat format;
};

// Where the i-th requested row lies: base + index[i] * stride. One of the two pointers is set.
struct Indices {
  const std::int32_t* i32 = nullptr;
  const std::int64_t* i64 = nullptr;
  std::int64_t operator[](std::size_t i) const { return i32 != nullptr ? i32[i] : i64[i]; }
};

struct KernelSet {
  const char* name;
  // Requested rows [begin, end) of a [tokens, k] batch, flat. A range that starts inside a token adds to the sum
  // already in `out`; one that starts at a token's first row overwrites it.
  void (*weighted_sum)(const Rows&, Indices, const float* weights, float* out, std::size_t k, std::size_t begin,
                       std::size_t end);
  // out[i] = row i . x[i / k], as 16 interleaved partial sums added in a fixed tree.
  void (*dot)(const Rows&, Indices, const float* x, float* out, std::size_t k, std::size_t begin, std::size_t end);
  // out[i] = row i widened to fp32.
  void (*gather)(const Rows&, Indices, float* out, std::size_t begin, std::size_t end);
  // Adds up the words of the rows: reads every byte and does nothing else. The benchmarks' ceiling.
  std::uint64_t (*touch)(const Rows&, Indices, std::size_t begin, std::size_t end);
  // out[i * out_step + j] = query i . key j: queries lie query_step floats apart, the n >= 4 keys one after another.
  // A score's bits depend on its query and key alone, not on the batch.
  void (*scores)(const float* query, std::size_t query_step, std::size_t queries, const float* keys, std::size_t n,
                 std::size_t width, float* out, std::size_t out_step);
  // The k largest of scores[0..n), largest first, ties to the smaller index. scratch: n + 64 ints.
  void (*top_k)(const float* scores, int n, int k, float* values, std::int32_t* ids, std::int32_t* scratch);
  // rank[i] = number of keys larger than key i, i < n. keys and rank are padded to a multiple of 16 (padding of
  // keys: INT32_MIN).
  void (*count_larger)(const std::int32_t* keys, int n, std::int32_t* rank);
};

const KernelSet* scalar_kernels();
const KernelSet* avx2_kernels();    // null where the processor lacks AVX2, FMA or F16C
const KernelSet* avx512_kernels();  // null where the processor lacks AVX-512 F, BW, DQ or VL

// The fastest set of this machine, or the one forced by name ("scalar", "avx2", "avx512"; "" undoes it).
const KernelSet& kernels();
bool force_kernels(const char* name);  // false: unknown or not available here; nothing changed

// top_k where many scores tie with the last one: exact, any n. Shared by all variants.
void top_k_of_candidates(const float* scores, const std::int32_t* candidates, int count, int k, float* values,
                         std::int32_t* ids);

}  // namespace memlane
