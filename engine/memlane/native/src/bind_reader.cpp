// Bindings of the row reader and the states of slots.
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cerrno>
#include <system_error>

#include "bindings.h"
#include "row_reader.h"

using namespace memlane;
using namespace nb::literals;

namespace {

std::shared_ptr<ReadRequest> start(RowReader& reader, Vector<const std::int64_t> rows, Vector<const std::int32_t> slots,
                                   const Arena& arena, const SlotStates& states, bool background) {
  const std::size_t count = rows.shape(0);
  const auto& table = reader.queue().options();
  require(slots.shape(0) == count, "rows and slots must be of equal length");
  const std::size_t capacity = std::min(arena.size() / table.stride, states.size());
  for (std::size_t i = 0; i < count; ++i) {
    require(static_cast<std::uint64_t>(rows.data()[i]) < table.rows, "a row id is outside the table");
    require(i == 0 || rows.data()[i - 1] < rows.data()[i], "rows must be ascending and unique");
    require(static_cast<std::uint32_t>(slots.data()[i]) < capacity, "a slot lies outside the arena");
  }
  nb::gil_scoped_release release;
  return reader.start({rows.data(), rows.data() + count}, {slots.data(), slots.data() + count}, arena, states, background);
}

nb::tuple finish(RowReader& reader, ReadRequest& request) {
  std::vector<ReadFailure> failures;
  {
    nb::gil_scoped_release release;
    failures = reader.finish(request);
  }
  std::vector<std::int64_t> positions;
  std::vector<std::int32_t> errors;
  for (const auto& failure : failures) {
    positions.push_back(failure.position);
    errors.push_back(failure.error);
  }
  return nb::make_tuple(to_numpy(std::move(positions)), to_numpy(std::move(errors)));
}

RowReader* open_reader(const std::string& path, std::uint64_t offset, std::size_t stride, std::size_t rows,
                       nb::object checksums, bool allow_uring, bool allow_direct, unsigned depth, std::size_t merge_gap,
                       double deadline, bool fixed_buffers) {
  RowReader::Options options;
  options.path = path;
  options.queue.offset = offset;
  options.queue.stride = stride;
  options.queue.rows = rows;
  options.queue.merge_gap = merge_gap;
  options.queue.deadline = deadline;
  if (!checksums.is_none()) {
    const auto given = nb::cast<Vector<const std::uint32_t>>(checksums);
    options.queue.checksums.assign(given.data(), given.data() + given.shape(0));
  }
  options.allow_uring = allow_uring;
  options.allow_direct = allow_direct;
  options.depth = depth;
  options.fixed_buffers = fixed_buffers;
  try {
    nb::gil_scoped_release release;
    return new RowReader(options);
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
    throw nb::python_error();
  }
}

}  // namespace

void bind_reader(nb::module_& module) {
  nb::class_<SlotStates>(module, "SlotStates")
      .def(nb::init<std::size_t>(), "slots"_a)
      .def("__len__", &SlotStates::size)
      .def(
          "failed",
          [](const SlotStates& states, Vector<const std::int32_t> slots) {
            std::vector<std::int64_t> positions;
            for (std::size_t i = 0; i < slots.shape(0); ++i) {
              require(static_cast<std::uint32_t>(slots.data()[i]) < states.size(), "no such slot");
              if (states[static_cast<std::size_t>(slots.data()[i])] == SlotStates::failed)
                positions.push_back(static_cast<std::int64_t>(i));
            }
            return to_numpy(std::move(positions));
          },
          "slots"_a.noconvert());

  nb::class_<ReadRequest>(module, "ReadRequest")
      .def("__len__", [](const ReadRequest& request) { return request.rows.size(); })
      .def_prop_ro("settled", [](const ReadRequest& request) { return request.settled.load(); })
      .def_prop_ro("seconds", &ReadRequest::seconds);

  nb::class_<RowReader>(module, "RowReader")
      .def(nb::new_(&open_reader), "path"_a, "offset"_a, "stride"_a, "rows"_a, "checksums"_a = nb::none(),
           "allow_uring"_a = true, "allow_direct"_a = true, "depth"_a = 256, "merge_gap"_a = 4096, "deadline"_a = 30.0,
           "fixed_buffers"_a = true)
      .def("start", &start, "rows"_a.noconvert(), "slots"_a.noconvert(), "arena"_a, "states"_a,
           "background"_a = false)
      .def("drain", &RowReader::drain, nb::call_guard<nb::gil_scoped_release>())
      .def("finish", &finish, "request"_a)
      .def(
          "wait",
          [](RowReader& reader, ReadRequest& request, double patience) {
            nb::gil_scoped_release release;
            const auto until = ReadQueue::Clock::now() + std::chrono::duration_cast<ReadQueue::Clock::duration>(
                                                             std::chrono::duration<double>(patience));
            do {
              reader.wait(request, request.settled, until);
            } while (request.settled < request.rows.size() && ReadQueue::Clock::now() < until);
            return request.settled == request.rows.size();
          },
          "request"_a, "patience"_a)
      .def("plan",
           [](const RowReader& reader, Vector<const std::int64_t> rows) {
             return reader.queue().plan({rows.data(), rows.data() + rows.shape(0)}).size();
           },
           "rows"_a.noconvert())
      .def("inject_fault",
           [](RowReader& reader, std::int64_t first, std::int64_t last, int error, int times) {
             reader.queue().inject_fault(first, last, error, times);
           },
           "first"_a, "last"_a, "error"_a, "times"_a)
      .def_prop_ro("backend", &RowReader::backend)
      .def_prop_ro("reason", &RowReader::reason)
      .def_prop_ro("direct", &RowReader::direct)
      .def_prop_ro("rows", [](const RowReader& reader) { return reader.queue().options().rows; })
      .def_prop_ro("stride", [](const RowReader& reader) { return reader.queue().options().stride; })
      .def_prop_ro("merge_gap", [](const RowReader& reader) { return reader.queue().options().merge_gap; })
      .def_prop_ro("buffer_bytes", &RowReader::buffer_bytes)
      .def_prop_ro("page_cache_bytes", &RowReader::page_cache_bytes)
      .def_prop_ro("bytes_read", [](const RowReader& reader) { return reader.queue().bytes_read.load(); })
      .def_prop_ro("reads", [](const RowReader& reader) { return reader.queue().reads.load(); })
      .def_prop_ro("retries", [](const RowReader& reader) { return reader.queue().retries.load(); })
      .def_prop_ro("corrupt_pages", [](const RowReader& reader) { return reader.queue().corrupt_pages.load(); })
      .def_prop_ro("in_flight", [](const RowReader& reader) { return reader.queue().in_flight.load(); });
}
