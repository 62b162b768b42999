// Bindings of the row index.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "row_index.h"

using namespace memlane;
using namespace nb::literals;

namespace {

template <class Id>
std::size_t lookup(RowIndex& index, std::uint32_t batch, Vector<const Id> ids, Vector<std::int32_t> slots) {
  using U = std::make_unsigned_t<Id>;
  require(slots.shape(0) >= ids.shape(0), "slots must hold one entry for each id");
  const std::size_t count = ids.shape(0);
  const Id* data = ids.data();
  for (std::size_t i = 0; i < count; ++i) {
    if (static_cast<U>(data[i]) >= index.rows()) {  // negative ids are huge
      const auto text = "row id " + std::to_string(data[i]) + " is outside [0, " + std::to_string(index.rows()) + ")";
      throw nb::index_error(text.c_str());
    }
  }
  nb::gil_scoped_release release;
  return index.lookup(batch, data, count, slots.data());
}

nb::tuple misses(const RowIndex& index) {
  std::vector<std::int64_t> rows;
  std::vector<std::int32_t> slots;
  rows.reserve(index.misses().size());
  slots.reserve(index.misses().size());
  for (const auto& miss : index.misses()) {
    rows.push_back(miss.row);
    slots.push_back(miss.slot);
  }
  return nb::make_tuple(to_numpy(std::move(rows)), to_numpy(std::move(slots)));
}

nb::dict counters(const RowIndex& index) {
  const auto& c = index.counters();
  nb::dict d;
  d["requested_rows"] = c.requested;
  d["unique_rows"] = c.unique;
  d["hits"] = c.hits;
  d["misses"] = c.misses;
  d["unique_misses"] = c.unique_misses;
  d["evictions"] = c.evictions;
  d["scratch_rows"] = c.scratch_rows;
  return d;
}

std::size_t adopt(RowIndex& index, Vector<const std::int64_t> rows, Vector<const std::int32_t> slots, bool pinned) {
  require(rows.shape(0) == slots.shape(0), "rows and slots must be of equal length");
  for (std::size_t i = 0; i < rows.shape(0); ++i)
    require(static_cast<std::uint64_t>(rows.data()[i]) < index.rows(), "a row id is outside the table");
  return index.adopt(rows.data(), slots.data(), rows.shape(0), pinned);
}

void rank_last(RowIndex& index, Vector<const std::int64_t> rows) {
  for (std::size_t i = 0; i < rows.shape(0); ++i)
    require(static_cast<std::uint64_t>(rows.data()[i]) < index.rows(), "a row id is outside the table");
  index.rank_last(rows.data(), rows.shape(0));
}

}  // namespace

void bind_index(nb::module_& module) {
  module.def("cache_policies", &RowIndex::policies);
  module.def("row_index_bytes", &RowIndex::bytes_for, "rows"_a, "slots"_a, "scratch"_a);
  nb::class_<RowIndex>(module, "RowIndex")
      .def(nb::new_([](std::size_t rows, std::size_t slots, std::size_t scratch, const std::string& policy) {
             return RowIndex::make(rows, slots, scratch, policy).release();
           }),
           "rows"_a, "slots"_a, "scratch"_a, "policy"_a = "lru")
      .def("begin", &RowIndex::begin)
      .def("lookup", &lookup<std::int32_t>, "batch"_a, "ids"_a.noconvert(), "slots"_a.noconvert())
      .def("lookup", &lookup<std::int64_t>, "batch"_a, "ids"_a.noconvert(), "slots"_a.noconvert())
      .def("miss_count", [](const RowIndex& index) { return index.misses().size(); })
      .def("misses", &misses)
      .def("drop", [](RowIndex& index, Vector<const std::int32_t> slots) { index.drop(slots.data(), slots.shape(0)); },
           "slots"_a.noconvert())
      .def("release_scratch", &RowIndex::release_scratch, "batch"_a)
      .def("end", &RowIndex::end, "batch"_a)
      .def("reserve", [](RowIndex& index, std::size_t count) { return to_numpy(index.reserve(count)); }, "count"_a)
      .def("adopt", &adopt, "rows"_a.noconvert(), "slots"_a.noconvert(), "pinned"_a = false)
      .def("give_back",
           [](RowIndex& index, Vector<const std::int32_t> slots) { index.give_back(slots.data(), slots.shape(0)); },
           "slots"_a.noconvert())
      .def("contains", [](const RowIndex& index, std::size_t row) {
        if (row >= index.rows()) throw nb::index_error("row id is outside the table");
        return index.contains(row);
      }, "row"_a)
      .def("clear", &RowIndex::clear)
      .def("ranking", [](const RowIndex& index) { return to_numpy(index.ranking()); })
      .def("rank_last", &rank_last, "rows"_a.noconvert())
      .def("check", &RowIndex::check)
      .def("counters", &counters)
      .def_prop_ro("rows", &RowIndex::rows)
      .def_prop_ro("slots", &RowIndex::slots)
      .def_prop_ro("scratch", &RowIndex::scratch)
      .def_prop_ro("used", &RowIndex::used)
      .def_prop_ro("pinned", &RowIndex::pinned)
      .def_prop_ro("open", &RowIndex::open)
      .def_prop_ro("nbytes", &RowIndex::bytes)
      .def_prop_ro("policy", &RowIndex::policy)
      .def_prop_ro("map", &RowIndex::map);
}
