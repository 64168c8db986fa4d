// SPDX-License-Identifier: Apache-2.0
//
// From torch's tensors to what the CPU kernels take. For the torch side of an op only.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

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

// All strides of a tensor of at most three dimensions.
inline View view(const torch::stable::Tensor& x) {
  View result;
  result.data = static_cast<char*>(x.data_ptr());
  result.type = type_of(x);
  for (int i = 0; i < x.dim(); i++) result.stride[i] = x.stride(i);
  return result;
}
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

}  // namespace fla_ops
