// The Python module `memlane.native._core`: bindings only. Typed and documented in memlane/native/__init__.py.
#include <nanobind/nanobind.h>

#include "bindings.h"

NB_MODULE(_core, module) {
  bind_index(module);
  bind_reader(module);
  bind_kernels(module);
  bind_checksums(module);
  bind_trace(module);
}
