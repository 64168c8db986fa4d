// SPDX-License-Identifier: Apache-2.0
//
// What the selective scan's CUDA kernels share: how they see the inputs, and the arithmetic of one step.
//
// Kernels are templates on the arithmetic type A alone, double for float64 and float for the rest: every load looks at
// its tensor's dtype, a branch that a whole warp takes together.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include "cuda_op.h"
#include "device_view.h"
#include "monotone_sequences.h"

namespace fla_ops {

constexpr int kMaxState = 256;          // N
constexpr int kBlockSteps = 64;         // steps per saved state

// B or C: [B, G, N, L] with a group for each `channels` consecutive channels, [B, G, N] in a step, or the constant
// [Di, N], which has one channel a group and no strides of batch and time.
struct Projection {
  View at;  // strides of batch row, group and state
  int64_t time_stride = 0, channels = 1;

  // Element (b, channel d, n) of time 0.
  __device__ __forceinline__ int64_t first(int64_t b, int64_t d, int64_t n) const {
    return offset_of(at, b, d / channels, n);
  }
};

struct ScanInputs {
  View u, delta, z;        // [B, Di, L], or in a step [B, Di]; z.data may be null
  View A;                  // [Di, N]
  Projection B, C;
  View D, delta_bias;      // [Di]; data may be null
  View initial_state;      // [sequences or slots, Di, N]; data may be null
  Sequences sequences;
  int64_t Di;
  int N;
  bool delta_softplus;
};

// ------------------------------------------------------------------------------------------- one step

// log(1 + e^x), exact and finite for every x.
template <class A> __device__ __forceinline__ A softplus(A x) {
  return max(x, A(0)) + std::log1p(std::exp(x > 0 ? -x : x));
}
template <class A> __device__ __forceinline__ A sigmoid(A x) { return A(1) / (A(1) + std::exp(-x)); }

// e^exponent h. Where A is positive, e^exponent alone may overflow; a state of 0 stays 0 then too.
template <class A> __device__ __forceinline__ A decayed(A h, A exponent) {
  constexpr A most = sizeof(A) == 8 ? 700 : 80;
  if (!(exponent > most)) return std::exp(exponent) * h;
  const A rest = exponent - most;
  return std::exp(most) * h * std::exp(rest > most ? most : rest);
}

// delta + delta_bias, and the step size that it becomes.
template <class A> __device__ __forceinline__ A raw_step(const ScanInputs& x, int64_t b, int64_t d, int64_t t) {
  const A raw = load<A>(x.delta, offset_of(x.delta, b, d, t));
  return x.delta_bias.data ? raw + load<A>(x.delta_bias, offset_of(x.delta_bias, d)) : raw;
}
template <class A> __device__ __forceinline__ A step_size(const ScanInputs& x, int64_t b, int64_t d, int64_t t) {
  const A raw = raw_step<A>(x, b, d, t);
  return x.delta_softplus ? softplus(raw) : raw;
}

// The sum over the `lanes` neighbouring lanes, a power of two, that share a channel.
template <class A> __device__ __forceinline__ A sum_lanes(A x, int lanes) {
  for (int bit = lanes / 2; bit > 0; bit /= 2) x += __shfl_xor_sync(kWarp, x, bit);
  return x;
}

// The saved state at the start of a sequence. start / 64 + index leaves room for the rounding up of all before.
__device__ __forceinline__ int64_t first_checkpoint(const Sequences& sequences, const Span& span) {
  if (sequences.cu_seqlens.data) return span.start / kBlockSteps + span.index;
  return span.index * ((sequences.length + kBlockSteps - 1) / kBlockSteps);
}

// ------------------------------------------------------------------------------------------- the torch side

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of the saved states, an upper bound for packed sequences.
inline int64_t checkpoint_rows(int64_t B, int64_t L, const std::optional<torch::stable::Tensor>& cu_seqlens) {
  if (!cu_seqlens) return B * ceil_div(L, kBlockSteps);
  return ceil_div(L, kBlockSteps) + cu_seqlens->size(0) - 1;
}

// The power of two lanes that share `n` states.
inline int lanes_for(int n) {
  int lanes = 1;
  while (lanes < n) lanes *= 2;
  return lanes;
}

inline unsigned grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= INT32_MAX, "selective_scan: too large for one launch");
  return unsigned(blocks);
}

// Calls f.operator()<A>() for the arithmetic type of u.
template <class F> void with_arithmetic(const torch::stable::Tensor& u, const F& f) {
  if (type_of(u) == Type::float64) f.template operator()<double>();
  else f.template operator()<float>();
}

// `varying`: not the constant [Di, N].
inline Projection projection(const torch::stable::Tensor& w, int64_t Di, bool varying) {
  Projection p;
  p.at.data = static_cast<char*>(w.data_ptr());
  p.at.type = type_of(w);
  for (int i = varying ? 0 : 1; i < 3; i++) p.at.stride[i] = w.stride(varying ? i : i - 1);
  if (varying) {
    p.channels = Di / std::max<int64_t>(w.size(1), 1);
    if (w.dim() == 4) p.time_stride = w.stride(3);
  }
  return p;
}

// `step`: the tensors have no time axis, and B and C are always [B, G, N].
inline ScanInputs inputs_on_device(const torch::stable::Tensor& u, const torch::stable::Tensor& delta,
                                   const torch::stable::Tensor& A, const torch::stable::Tensor& B,
                                   const torch::stable::Tensor& C, const std::optional<torch::stable::Tensor>& D,
                                   const std::optional<torch::stable::Tensor>& z,
                                   const std::optional<torch::stable::Tensor>& delta_bias, bool delta_softplus,
                                   bool step) {
  const int dims = step ? 2 : 3;
  const auto as_u = [&](const torch::stable::Tensor& x) {
    if (x.dim() != dims || x.scalar_type() != u.scalar_type()) return false;
    for (int i = 0; i < dims; i++)
      if (x.size(i) != u.size(i)) return false;
    return true;
  };
  STD_TORCH_CHECK(as_u(u) && as_u(delta) && (!z || as_u(*z)), "selective_scan: u, delta and z must be alike");
  const int64_t Di = u.size(1);
  STD_TORCH_CHECK(A.dim() == 2 && A.size(0) == Di && A.size(1) >= 1 && A.size(1) <= kMaxState,
                  "selective_scan: A must be [Di, N] with N from 1 to ", kMaxState);
  const int64_t N = A.size(1);
  for (const auto* w : {&B, &C}) {
    const bool varying = step || w->dim() != 2;
    STD_TORCH_CHECK(varying ? w->dim() == dims + 1 && w->size(0) == u.size(0) && w->size(1) >= 1 &&
                                  Di % w->size(1) == 0 && w->size(2) == N && (step || w->size(3) == u.size(2))
                            : w->size(0) == Di && w->size(1) == N,
                    "selective_scan: B and C must be [B, G, N, L] or [Di, N], in a step [B, G, N]");
  }
  for (const auto* x : {&D, &delta_bias})
    STD_TORCH_CHECK(!*x || ((*x)->dim() == 1 && (*x)->size(0) == Di), "selective_scan: D and delta_bias must be [Di]");
  ScanInputs x{};
  x.u = view(u, dims);
  x.delta = view(delta, dims);
  x.z = view(z, dims);
  x.A = view(A, 2);
  x.B = projection(B, Di, step || B.dim() != 2);
  x.C = projection(C, Di, step || C.dim() != 2);
  x.D = view(D, 1);
  x.delta_bias = view(delta_bias, 1);
  x.Di = Di;
  x.N = int(N);
  x.delta_softplus = delta_softplus;
  return x;
}

inline void check_state(const ScanInputs& x, const std::optional<torch::stable::Tensor>& state) {
  STD_TORCH_CHECK(!state || (state->dim() == 3 && state->size(0) == x.sequences.count && state->size(1) == x.Di &&
                             state->size(2) == x.N),
                  "selective_scan: states must be [S, Di, N]");
}

namespace {

// Like x in dtype and, where x has no gaps, in strides; zeros if packed sequences may leave some of it out.
torch::stable::Tensor empty_or_zeros(const torch::stable::Tensor& x, bool packed) {
  torch::stable::Tensor result = torch::stable::empty_like(x);
  return packed ? torch::stable::zero_(result) : result;
}

}  // namespace
}  // namespace fla_ops
