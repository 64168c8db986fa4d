// SPDX-License-Identifier: Apache-2.0
//
// Registers the native ops, and is the empty Python module whose import does so.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu_level.h"
#include "schemas.h"

namespace {

int64_t get_level() { return fla_ops::cpu_level(); }

void set_level(int64_t level) {
  STD_TORCH_CHECK(fla_ops::set_cpu_level(int(level)), "_set_cpu_level: argument 'level' must be 0 to ",
                  fla_ops::best_cpu_level(), " on this machine, got ", level, ".");
}

bool get_extensions() { return fla_ops::avx512_extensions(); }

void set_extensions(bool used) {
  STD_TORCH_CHECK(fla_ops::set_avx512_extensions(used),
                  "_set_avx512_extensions: this machine has no AVX512_BF16 and AVX512_VBMI2.");
}

}  // namespace

STABLE_TORCH_LIBRARY(fla_ops, m) {
  m.def("_cpu_level() -> int");
  m.def("_set_cpu_level(int level) -> ()");
  m.def("_avx512_extensions() -> bool");
  m.def("_set_avx512_extensions(bool used) -> ()");
  fla_ops::define_ops(m);
}

STABLE_TORCH_LIBRARY_IMPL(fla_ops, CompositeExplicitAutograd, m) {
  m.impl("_cpu_level", TORCH_BOX(&get_level));
  m.impl("_set_cpu_level", TORCH_BOX(&set_level));
  m.impl("_avx512_extensions", TORCH_BOX(&get_extensions));
  m.impl("_set_avx512_extensions", TORCH_BOX(&set_extensions));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                               nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
