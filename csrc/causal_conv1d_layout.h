// SPDX-License-Identifier: Apache-2.0
//
// The causal convolution's memory layouts, [B, D, L] with unit stride over channels or over time: what the torch sides
// for CPU and CUDA share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace fla_ops {

inline bool unit_stride(const torch::stable::Tensor& x, int dim) { return x.size(dim) <= 1 || x.stride(dim) == 1; }

// Both fit where L or D is 1.
inline bool channels_last(const torch::stable::Tensor& x) {
  return unit_stride(x, 1) && !(unit_stride(x, 2) && x.size(2) > 1);
}

inline torch::stable::Tensor empty_with_layout(const torch::stable::Tensor& x, bool last) {
  if (!last) return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  torch::stable::Tensor rows = torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(1)});
  return torch::stable::transpose(rows, 1, 2);
}

}  // namespace fla_ops
