// SPDX-License-Identifier: Apache-2.0
//
// Tensors as CUDA kernels see them: elements of any floating-point dtype through a View, the boundaries of packed
// sequences, and the arithmetic type A of a dtype T (double for double, else float).
//
// Kernels are templates on the dtype of their main tensors, which `with_dtype` finds; weights, gates, states and
// integers have a dtype of their own, looked at in every load: a branch that a whole warp takes together.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <type_traits>

#include "launch.h"
#include "torch_view.h"

namespace fla_ops {

using bf16 = c10::BFloat16;
using fp16 = c10::Half;

template <class T> using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A, class T> __device__ __forceinline__ A widen(T x) {
  if constexpr (std::is_same_v<T, double>) return A(x);
  else return A(static_cast<float>(x));
}
template <class T, class A> __device__ __forceinline__ T narrow(A x) {
  if constexpr (std::is_same_v<T, double>) return double(x);
  else return T(static_cast<float>(x));
}

// Element `offset` of a tensor of any dtype.
template <class A> __device__ __forceinline__ A load(const View& x, int64_t offset) {
  switch (x.type) {
    case Type::float64: return widen<A>(reinterpret_cast<const double*>(x.data)[offset]);
    case Type::float32: return widen<A>(reinterpret_cast<const float*>(x.data)[offset]);
    case Type::bfloat16: return widen<A>(reinterpret_cast<const bf16*>(x.data)[offset]);
    default: return widen<A>(reinterpret_cast<const fp16*>(x.data)[offset]);
  }
}
template <class A> __device__ __forceinline__ void store(const View& x, int64_t offset, A value) {
  switch (x.type) {
    case Type::float64: reinterpret_cast<double*>(x.data)[offset] = narrow<double>(value); break;
    case Type::float32: reinterpret_cast<float*>(x.data)[offset] = narrow<float>(value); break;
    case Type::bfloat16: reinterpret_cast<bf16*>(x.data)[offset] = narrow<bf16>(value); break;
    default: reinterpret_cast<fp16*>(x.data)[offset] = narrow<fp16>(value); break;
  }
}

__device__ __forceinline__ int64_t offset_of(const View& x, int64_t i, int64_t j = 0, int64_t k = 0) {
  return i * x.stride[0] + j * x.stride[1] + k * x.stride[2];
}

// int32 or int64, or absent.
struct Integers {
  const void* data = nullptr;
  bool wide = false;
  int64_t stride = 1;

  __device__ __forceinline__ int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i * stride] : static_cast<const int32_t*>(data)[i * stride];
  }
};

inline Integers integers(const std::optional<torch::stable::Tensor>& x) {
  using torch::headeronly::ScalarType;
  if (!x) return {};
  STD_TORCH_CHECK(x->dim() == 1 && (x->scalar_type() == ScalarType::Int || x->scalar_type() == ScalarType::Long),
                  "fla_ops: indices must be int32 or int64 and have one dimension");
  return {x->data_ptr(), x->scalar_type() == ScalarType::Long, x->stride(0)};
}

// The tokens [start, end) of batch row `batch`; sequence `index` of the states.
struct Span {
  int64_t batch, index, start, end;
};

// All sequences of a call: batch rows of `length` tokens, or with cu_seqlens the `count` packed sequences of one row.
struct Sequences {
  Integers cu_seqlens;
  int64_t count, length;

  // Bad values of cu_seqlens give other tokens of the row, never others.
  __device__ __forceinline__ Span operator[](int64_t n) const {
    if (!cu_seqlens.data) return {n, n, 0, length};
    const int64_t start = min(max(cu_seqlens[n], int64_t(0)), length);
    const int64_t end = min(max(cu_seqlens[n + 1], start), length);
    return {0, n, start, end};
  }

  // The packed sequence that token t of the row belongs to, by binary search; if t lies in none, an empty span at t
  // whose index is -1. Every t in the row gets one answer, whatever the values are.
  __device__ __forceinline__ Span holding(int64_t t) const {
    int64_t low = 0, high = count;  // cu_seqlens[low] <= t < cu_seqlens[high]
    if (count == 0 || cu_seqlens[low] > t || cu_seqlens[high] <= t) return {0, -1, t, t};
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (cu_seqlens[middle] <= t) low = middle;
      else high = middle;
    }
    return (*this)[low];
  }
};

inline Sequences sequences_on_device(int64_t batch, int64_t length,
                                     const std::optional<torch::stable::Tensor>& cu_seqlens) {
  if (!cu_seqlens) return {{}, batch, length};
  STD_TORCH_CHECK(batch == 1 && cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1,
                  "fla_ops: cu_seqlens needs B = 1 and at least one bound");
  return {integers(cu_seqlens), cu_seqlens->size(0) - 1, length};
}

// Calls f.operator()<T>() for the dtype of x.
template <class F> void with_dtype(const torch::stable::Tensor& x, const F& f) {
  switch (type_of(x)) {
    case Type::float64: return f.template operator()<double>();
    case Type::float32: return f.template operator()<float>();
    case Type::bfloat16: return f.template operator()<bf16>();
    case Type::float16: return f.template operator()<fp16>();
  }
}

}  // namespace fla_ops
