// Bindings of what is computed from recorded rows.
#include <algorithm>

#include "bindings.h"
#include "stack_distance.h"

using namespace memlane;
using namespace nb::literals;

namespace {

void add(StackDistances& distances, Vector<const std::uint32_t> ids, bool counted) {
  const std::size_t count = ids.shape(0);
  const std::uint32_t* data = ids.data();
  if (std::any_of(data, data + count, [&](std::uint32_t id) { return id >= distances.rows(); }))
    throw nb::index_error("a row id is outside the table");
  nb::gil_scoped_release release;
  distances.add(data, count, counted);
}

nb::ndarray<nb::numpy, std::uint64_t, nb::ndim<1>> histogram(const StackDistances& distances) {
  auto* data = new std::vector<std::uint64_t>(distances.histogram());
  nb::capsule owner(data, [](void* p) noexcept { delete static_cast<std::vector<std::uint64_t>*>(p); });
  return {data->data(), {data->size()}, owner};
}

}  // namespace

void bind_trace(nb::module_& module) {
  nb::class_<StackDistances>(module, "StackDistances")
      .def(nb::init<std::size_t>(), "rows"_a)
      .def("add", &add, "ids"_a.noconvert(), "counted"_a = true)
      .def("histogram", &histogram)
      .def_prop_ro("rows", &StackDistances::rows)
      .def_prop_ro("different", &StackDistances::different)
      .def_prop_ro("counted", &StackDistances::counted)
      .def_prop_ro("first_uses", &StackDistances::first_uses)
      .def_prop_ro("nbytes", &StackDistances::bytes);
}
