// Bindings of the arena, the row kernels and product-key selection.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>

#include "arena.h"
#include "as_ready.h"
#include "bindings.h"
#include "kernels.h"
#include "product_keys.h"
#include "thread_pool.h"

using namespace memlane;
using namespace nb::literals;

namespace {

// Below this many bytes of rows a second thread costs more to wake than it saves.
constexpr std::size_t kBytesPerThread = 256 << 10;
constexpr std::size_t kMatrixBytesPerThread = 8 << 20;  // one reads in order nearly as fast as two

// A view of `rows` rows in an arena, from byte `offset` on.
struct RowView {
  Rows rows;
  std::size_t count;

  RowView(const Arena& arena, std::size_t offset, std::size_t count_, int format, std::size_t width)
      : rows{arena.data() + offset, 0, width, static_cast<RowFormat>(format)}, count(count_) {
    require(format >= 0 && format <= static_cast<int>(RowFormat::fp8), "unknown row format");
    require(width > 0 && (format != 4 || width % 2 == 0), "width must be positive, and even for int4 rows");
    rows.stride = row_stride(rows.format, width);
    require(count <= arena.size() / rows.stride && arena.contains(offset, count * rows.stride),
            "the rows do not lie inside the arena");
  }
};

template <class T>
Indices checked_indices(const T* index, std::size_t n, std::size_t count) {
  using U = std::make_unsigned_t<T>;
  U largest = 0;
  for (std::size_t i = 0; i < n; ++i) largest = std::max(largest, static_cast<U>(index[i]));  // negative: huge
  if (n > 0 && largest >= count) {
    for (std::size_t i = 0; i < n; ++i) {
      if (static_cast<U>(index[i]) >= count) {
        const auto text = "row id " + std::to_string(index[i]) + " is outside [0, " + std::to_string(count) + ")";
        throw nb::index_error(text.c_str());
      }
    }
  }
  Indices indices;
  if constexpr (sizeof(T) == 4)
    indices.i32 = index;
  else
    indices.i64 = index;
  return indices;
}

std::size_t min_rows(const RowView& view) { return std::max<std::size_t>(1, kBytesPerThread / view.rows.stride); }

template <class T>
void weighted_sum(const RowView& view, Vector<const T> index, Matrix<const float> weights, Matrix<float> out,
                  std::size_t begin) {
  const std::size_t k = weights.shape(1);
  const std::size_t n = index.shape(0);
  require(out.shape(0) == weights.shape(0) && out.shape(1) == view.rows.width, "out must be [tokens, width]");
  require(begin <= weights.size() && n <= weights.size() - begin, "index reaches past the last token");
  nb::gil_scoped_release release;
  const Indices rows = checked_indices(index.data(), n, view.count);
  if (n == 0) return;
  // Cut at token borders only, so that no two threads add to one sum.
  const std::size_t first = begin / k;
  const std::size_t last = (begin + n - 1) / k + 1;
  const auto& kernel = kernels();
  parallel_ranges(last - first, (min_rows(view) + k - 1) / k, [&](std::size_t from, std::size_t to) {
    const std::size_t start = std::max(begin, (first + from) * k);
    const std::size_t stop = std::min(begin + n, (first + to) * k);
    Indices shifted = rows;  // the kernel counts from the batch's first row
    if (shifted.i32 != nullptr) shifted.i32 -= begin;
    if (shifted.i64 != nullptr) shifted.i64 -= begin;
    kernel.weighted_sum(view.rows, shifted, weights.data(), out.data(), k, start, stop);
  });
}

template <class T>
void dot(const RowView& view, Vector<const T> index, Matrix<const float> x, Matrix<float> out, std::size_t begin) {
  const std::size_t k = out.shape(1);
  const std::size_t n = index.shape(0);
  require(x.shape(0) == out.shape(0) && x.shape(1) == view.rows.width, "x must be [tokens, width]");
  require(begin <= out.size() && n <= out.size() - begin, "index reaches past the last token");
  nb::gil_scoped_release release;
  const Indices rows = checked_indices(index.data(), n, view.count);
  const auto& kernel = kernels();
  parallel_ranges(n, min_rows(view), [&](std::size_t from, std::size_t to) {
    Indices shifted = rows;
    if (shifted.i32 != nullptr) shifted.i32 -= begin;
    if (shifted.i64 != nullptr) shifted.i64 -= begin;
    kernel.dot(view.rows, shifted, x.data(), out.data(), k, begin + from, begin + to);
  });
}

template <class T>
void gather(const RowView& view, Vector<const T> index, Matrix<float> out) {
  const std::size_t n = index.shape(0);
  require(out.shape(0) == n && out.shape(1) == view.rows.width, "out must be [len(index), width]");
  nb::gil_scoped_release release;
  const Indices rows = checked_indices(index.data(), n, view.count);
  const auto& kernel = kernels();
  parallel_ranges(n, min_rows(view), [&](std::size_t from, std::size_t to) {
    kernel.gather(view.rows, rows, out.data(), from, to);
  });
}

std::uint64_t touch(const RowView& view, Vector<const std::int64_t> index) {
  nb::gil_scoped_release release;
  const std::size_t n = index.shape(0);
  const Indices rows = checked_indices(index.data(), n, view.count);
  std::atomic<std::uint64_t> total{0};
  parallel_ranges(n, min_rows(view), [&](std::size_t from, std::size_t to) {
    total += kernels().touch(view.rows, rows, from, to);
  });
  return total;
}

// Runs kernel(rows, from, to) over a [tokens, k] batch while rows are still being read: `index` holds slots, whose states
// say which rows are there. Returns (seconds in which nothing could be done, whether a row turned out unreadable).
template <class Kernel>
nb::tuple as_ready(const RowView& view, const Vector<const std::int32_t>& index, std::size_t k, std::size_t begin,
                   const SlotStates& states, RowReader& reader, ReadRequest* request, const Kernel& kernel) {
  require(states.size() >= view.count, "every row needs a state");
  const std::size_t n = index.shape(0);
  const std::size_t min_tokens = (min_rows(view) + k - 1) / std::max<std::size_t>(k, 1);
  Waited waited;
  {
    nb::gil_scoped_release release;
    Indices rows = checked_indices(index.data(), n, view.count);
    rows.i32 -= begin;  // kernels count from the batch's first row
    waited = run_as_ready(index.data(), k, begin, n, states, reader, request, min_tokens,
                          [&](std::size_t from, std::size_t to) { kernel(rows, from, to); });
  }
  return nb::make_tuple(waited.stall_seconds, waited.failed);
}

nb::tuple weighted_sum_as_ready(const RowView& view, Vector<const std::int32_t> index, Matrix<const float> weights,
                                Matrix<float> out, std::size_t begin, const SlotStates& states, RowReader& reader,
                                ReadRequest* request) {
  const std::size_t k = weights.shape(1);
  require(out.shape(0) == weights.shape(0) && out.shape(1) == view.rows.width, "out must be [tokens, width]");
  require(begin <= weights.size() && index.shape(0) <= weights.size() - begin, "index reaches past the last token");
  return as_ready(view, index, k, begin, states, reader, request, [&](Indices rows, std::size_t from, std::size_t to) {
    kernels().weighted_sum(view.rows, rows, weights.data(), out.data(), k, from, to);
  });
}

nb::tuple dot_as_ready(const RowView& view, Vector<const std::int32_t> index, Matrix<const float> x, Matrix<float> out,
                       std::size_t begin, const SlotStates& states, RowReader& reader, ReadRequest* request) {
  const std::size_t k = out.shape(1);
  require(x.shape(0) == out.shape(0) && x.shape(1) == view.rows.width, "x must be [tokens, width]");
  require(begin <= out.size() && index.shape(0) <= out.size() - begin, "index reaches past the last token");
  return as_ready(view, index, k, begin, states, reader, request, [&](Indices rows, std::size_t from, std::size_t to) {
    kernels().dot(view.rows, rows, x.data(), out.data(), k, from, to);
  });
}

template <class T>
void check(const RowView& view, Vector<const T> index) {
  nb::gil_scoped_release release;
  checked_indices(index.data(), index.shape(0), view.count);
}

template <class T>
void bind_for(nb::class_<RowView>& view) {
  view.def("check", &check<T>, "index"_a.noconvert());
  view.def("weighted_sum", &weighted_sum<T>, "index"_a.noconvert(), "weights"_a.noconvert(), "out"_a.noconvert(),
           "begin"_a = 0);
  view.def("dot", &dot<T>, "index"_a.noconvert(), "x"_a.noconvert(), "out"_a.noconvert(), "begin"_a = 0);
  view.def("gather", &gather<T>, "index"_a.noconvert(), "out"_a.noconvert());
}

// One vector by a matrix. Both threads only where there is enough to read to pay for waking one.
void matvec(Matrix<const float> weight, Vector<const float> x, Vector<float> out) {
  const std::size_t n = weight.shape(0);
  const std::size_t width = weight.shape(1);
  require(x.shape(0) == width && out.shape(0) == n, "x must be [columns] and out [rows] of the matrix");
  require(n >= 4, "a matrix has at least 4 rows here");
  nb::gil_scoped_release release;
  const auto& kernel = kernels();
  const std::size_t rows_a_thread = std::max<std::size_t>(4, kMatrixBytesPerThread / (sizeof(float) * std::max<std::size_t>(width, 1)));
  parallel_ranges(n, rows_a_thread, [&](std::size_t from, std::size_t to) {
    kernel.scores(x.data(), width, 1, weight.data() + from * width, to - from, width, out.data() + from, n);
  });
}

void select_into(Cube<const float> scores, Matrix<std::int64_t> ids, Matrix<float> sums) {
  const std::size_t n = scores.shape(2);
  const std::size_t k = ids.shape(1);
  require(scores.shape(1) == 2, "scores must be [m, 2, keys]");
  require(n <= static_cast<std::size_t>(kMostKeys), "at most 65,536 keys a half");
  require(k >= 1 && k <= n, "k must be between 1 and the number of keys");
  require(ids.shape(0) == scores.shape(0) && sums.shape(0) == scores.shape(0) && sums.shape(1) == k,
          "ids and sums must be [m, k]");
  nb::gil_scoped_release release;
  select_product_keys(scores.data(), scores.shape(0), static_cast<int>(n), static_cast<int>(k), ids.data(),
                      sums.data());
}

void search_into(nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu> query,
                 nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu> keys, Cube<std::int64_t> ids,
                 Cube<float> sums) {
  const std::size_t n = keys.shape(2);
  const std::size_t k = ids.shape(2);
  require(query.shape(2) == 2 && keys.shape(1) == 2, "query must be [tokens, heads, 2, width], keys [heads, 2, n, width]");
  require(query.shape(1) == keys.shape(0) && query.shape(3) == keys.shape(3), "query and keys must agree in heads and width");
  require(query.shape(3) > 0, "width must be positive");
  require(n >= 4 && n <= static_cast<std::size_t>(kMostKeys), "between 4 and 65,536 keys a half");
  require(k >= 1 && k <= n, "k must be between 1 and the number of keys");
  require(ids.shape(0) == query.shape(0) && ids.shape(1) == query.shape(1) && sums.shape(0) == query.shape(0) &&
              sums.shape(1) == query.shape(1) && sums.shape(2) == k,
          "ids and sums must be [tokens, heads, k]");
  nb::gil_scoped_release release;
  search_product_keys({query.data(), keys.data(), query.shape(0), query.shape(1), query.shape(3), static_cast<int>(n),
                       static_cast<int>(k)},
                      ids.data(), sums.data());
}

}  // namespace

void bind_kernels(nb::module_& module) {
  nb::class_<Arena>(module, "Arena")
      .def(nb::init<std::size_t>(), "nbytes"_a)
      .def_static("of_file", [](int file, std::size_t nbytes) { return new Arena(file, nbytes); }, "file"_a, "nbytes"_a)
      .def_prop_ro("nbytes", &Arena::size)
      .def(
          "array",
          [](Arena& arena) {
            return nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>(arena.data(), {arena.size()}, nb::find(arena));
          },
          nb::rv_policy::reference_internal);

  nb::class_<RowView> view(module, "RowView");
  view.def(nb::init<const Arena&, std::size_t, std::size_t, int, std::size_t>(), "arena"_a, "offset"_a, "count"_a,
           "row_format"_a, "width"_a, nb::keep_alive<1, 2>());
  view.def_prop_ro("stride", [](const RowView& v) { return v.rows.stride; });
  view.def("touch", &touch, "index"_a.noconvert());
  view.def("weighted_sum_as_ready", &weighted_sum_as_ready, "index"_a.noconvert(), "weights"_a.noconvert(),
           "out"_a.noconvert(), "begin"_a, "states"_a, "reader"_a, "request"_a.none());
  view.def("dot_as_ready", &dot_as_ready, "index"_a.noconvert(), "x"_a.noconvert(), "out"_a.noconvert(), "begin"_a,
           "states"_a, "reader"_a, "request"_a.none());
  bind_for<std::int32_t>(view);
  bind_for<std::int64_t>(view);

  module.def("matvec", &matvec, "weight"_a.noconvert(), "x"_a.noconvert(), "out"_a.noconvert());
  module.def("select_product_keys", &select_into, "scores"_a.noconvert(), "ids"_a.noconvert(), "sums"_a.noconvert());
  module.def("search_product_keys", &search_into, "query"_a.noconvert(), "keys"_a.noconvert(), "ids"_a.noconvert(),
             "sums"_a.noconvert());
  module.def("set_threads", &set_threads, "threads"_a);
  module.def("get_threads", &get_threads);
  module.def("kernel_variant", [] { return std::string(kernels().name); });
  module.def("force_kernel_variant", [](const std::string& name) {
    require(force_kernels(name.c_str()), "unknown kernel variant, or not one this processor can run");
  });
  module.def("kernel_variants", [] {
    std::vector<std::string> names;
    for (const auto* set : {scalar_kernels(), avx2_kernels(), avx512_kernels()})
      if (set != nullptr) names.emplace_back(set->name);
    return names;
  });
}
