// SPDX-License-Identifier: Apache-2.0
//
// The schemas of every native op, and the empty Python module whose import registers them.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu_level.h"

namespace {

int64_t get_level() { return fla_ops::cpu_level(); }

void set_level(int64_t level) {
  STD_TORCH_CHECK(fla_ops::set_cpu_level(int(level)), "_set_cpu_level: argument 'level' must be 0 to ",
                  fla_ops::best_cpu_level(), " on this machine, got ", level, ".");
}

}  // namespace

STABLE_TORCH_LIBRARY(fla_ops, m) {
  m.def("_cpu_level() -> int");
  m.def("_set_cpu_level(int level) -> ()");
  m.def(
      "causal_conv1d_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, "
      "Tensor? cu_seqlens, bool silu) -> (Tensor y, Tensor final_state)");
  m.def(
      "causal_conv1d_backward(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, "
      "Tensor? cu_seqlens, bool silu, Tensor dy, Tensor? dfinal_state, int needs) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)");
  m.def(
      "causal_conv1d_step(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, bool silu, "
      "Tensor? state_indices) -> Tensor");
  m.def(
      "delta_rule_forward(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, float scale, "
      "Tensor? initial_state, Tensor? cu_seqlens, bool qk_l2norm, bool save_states) "
      "-> (Tensor o, Tensor final_state, Tensor states)");
  // needs: which gradients to compute, 1 q, 2 k, 4 v, 8 beta, 16 g, 32 initial_state.
  m.def(
      "delta_rule_backward(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, float scale, "
      "Tensor? initial_state, Tensor? cu_seqlens, bool qk_l2norm, Tensor states, Tensor do, "
      "Tensor? dfinal_state, int needs) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbeta, "
      "Tensor dg, Tensor dinitial_state)");
  m.def(
      "delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor(a!) state, "
      "float scale, bool qk_l2norm, Tensor? state_indices) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fla_ops, CompositeExplicitAutograd, m) {
  m.impl("_cpu_level", TORCH_BOX(&get_level));
  m.impl("_set_cpu_level", TORCH_BOX(&set_level));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                               nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
