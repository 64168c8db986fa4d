// SPDX-License-Identifier: Apache-2.0
//
// The .cu files as ops on CPU tensors, for the tests: fla_ops_simt::*, with the schemas of fla_ops::*.
#include <torch/csrc/stable/library.h>

#include "cuda_op.h"
#include "schemas.h"

// One more step, so that the namespace is replaced by its value.
#define FLA_OPS_LIBRARY(space, m) STABLE_TORCH_LIBRARY(space, m)

FLA_OPS_LIBRARY(FLA_SIMT_NAMESPACE, m) {
  fla_ops::define_ops(m);
  m.def("_set_lane_order(bool reversed) -> ()");
}

FLA_OPS_IMPL_IN(FLA_SIMT_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("_set_lane_order", TORCH_BOX(&fla_ops::simt::set_reversed));
}
