// SPDX-License-Identifier: Apache-2.0
//
// From torch's tensors to what the CPU kernels take. For the torch side of an op only.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "view.h"

namespace fla_ops {

inline Type type_of(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Double: return Type::float64;
    case ScalarType::Float: return Type::float32;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: STD_TORCH_CHECK(false, "fla_ops: unsupported dtype");
  }
}

// The outer `dims` strides; the kernels take the dimension after them, if any, as contiguous.
inline View view(const torch::stable::Tensor& x, int dims) {
  View result;
  result.data = static_cast<char*>(x.data_ptr());
  result.type = type_of(x);
  for (int i = 0; i < dims; i++) result.stride[i] = x.stride(i);
  STD_TORCH_CHECK(x.dim() == dims || x.size(dims) <= 1 || x.stride(dims) == 1 || x.numel() == 0,
                  "fla_ops: the last dimension must have unit stride");
  return result;
}
inline View view(const torch::stable::Tensor& x) { return view(x, int(x.dim())); }
inline View view(const std::optional<torch::stable::Tensor>& x, int dims) { return x ? view(*x, dims) : View{}; }
inline View view(const std::optional<torch::stable::Tensor>& x) { return x ? view(*x) : View{}; }

// The dtype of the arithmetic and of states.
inline torch::headeronly::ScalarType accumulator(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int64_t integer_at(const torch::stable::Tensor& x, int64_t i) {
  using torch::headeronly::ScalarType;
  const void* p = x.data_ptr();
  const int64_t offset = i * x.stride(0);
  if (x.scalar_type() == ScalarType::Int) return static_cast<const int32_t*>(p)[offset];
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long, "fla_ops: indices must be int32 or int64");
  return static_cast<const int64_t*>(p)[offset];
}

// One entry per batch row, or per packed sequence with bounds made monotone within [0, length].
inline std::vector<Sequence> sequences(int64_t batch, int64_t length,
                                       const std::optional<torch::stable::Tensor>& cu_seqlens) {
  std::vector<Sequence> result;
  if (!cu_seqlens) {
    for (int64_t b = 0; b < batch; b++) result.push_back({b, 0, length, b});
    return result;
  }
  STD_TORCH_CHECK(batch == 1 && cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1,
                  "fla_ops: cu_seqlens needs B = 1 and at least one bound");
  int64_t start = std::clamp<int64_t>(integer_at(*cu_seqlens, 0), 0, length);
  for (int64_t n = 1; n < cu_seqlens->size(0); n++) {
    const int64_t end = std::clamp<int64_t>(integer_at(*cu_seqlens, n), start, length);
    result.push_back({0, start, end - start, n - 1});
    start = end;
  }
  return result;
}

}  // namespace fla_ops
