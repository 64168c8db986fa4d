// SPDX-License-Identifier: Apache-2.0
//
// What the gradients of the delta rule and of DeltaProduct share on CUDA: the states that a warp keeps in memory, and
// the sums over what blocks and heads have found.
#pragma once

#include "delta_rule_cuda.h"

namespace fla_ops {
namespace {

template <class A> constexpr int kReverseWarps = sizeof(A) == 8 ? 4 : 8;  // a block, at most

// The states that a warp keeps in scratch; a lane reads what it wrote itself.
template <class A, int R, int C> struct Scratch {
  A* mine;

  __device__ Scratch(void* data, int states)  // `states` a warp
      : mine(static_cast<A*>(data) + threadIdx.x % 32 +
             (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32 * (states * R * C * 32)) {}
  __device__ __forceinline__ A& at(int slot, int j, int c) const { return mine[((slot * R + j) * C + c) * 32]; }
  __device__ __forceinline__ void save(const A (&state)[R][C], int slot) const {
    FLA_UNROLL for (int j = 0; j < R; j++)
      FLA_UNROLL for (int c = 0; c < C; c++) at(slot, j, c) = state[j][c];
  }
  __device__ __forceinline__ void restore(A (&state)[R][C], int slot) const {
    FLA_UNROLL for (int j = 0; j < R; j++)
      FLA_UNROLL for (int c = 0; c < C; c++) state[j][c] = at(slot, j, c);
  }
};

struct DeltaRuleFinish {
  View q, k;                                                 // [B, T, H, K], as they came
  View dq, dk;                                               // [B, T, H, K]; data null where not needed
  View dbeta, dg;                                            // [B, T, HV]
  const void *dq_parts, *dk_parts, *dbeta_parts, *dg_parts;  // [tiles, B, T, HV, K] and [tiles, B, T, HV]
  int64_t B, T, H, HV;
  int K, tiles;
  bool qk_l2norm;
};

// One warp: one token of one query head. It adds a block's parts and those of a head group in order, and undoes the
// norm of q and k.
template <class T, int R> __global__ void __launch_bounds__(128) finish_kernel(DeltaRuleFinish x) {
  using A = Arithmetic<T>;
  const int lane = threadIdx.x % 32;
  const int64_t warp = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (warp >= x.B * x.T * x.H) return;
  const int64_t h = warp % x.H, t = warp / x.H % x.T, b = warp / x.H / x.T, group = x.HV / x.H;
  const int64_t first = (b * x.T + t) * x.HV + h * group, tile = x.B * x.T * x.HV;

  // The gradient of x / |x| taken back to x: (d - x^ (x^ . d)) / |x|.
  const auto rows = [&](const View& input, const View& out, const void* parts) {
    if (!out.data) return;
    const T* const source = reinterpret_cast<const T*>(input.data) + offset_of(input, b, t, h);
    T* const target = reinterpret_cast<T*>(out.data) + offset_of(out, b, t, h);
    A d[R], raw[R], dot = 0;
    bool any = false;
    FLA_UNROLL for (int j = 0; j < R; j++) {
      const int row = lane + 32 * j;
      d[j] = raw[j] = 0;
      if (row >= x.K) continue;
      for (int64_t head = first; head < first + group; head++)
        for (int i = 0; i < x.tiles; i++) d[j] += static_cast<const A*>(parts)[(i * tile + head) * x.K + row];
      any = any || d[j] != 0;
      raw[j] = widen<A>(source[row]);
    }
    // No gradient stays none: rows that no packed sequence covers may hold NaN.
    if (x.qk_l2norm && __any_sync(kWarp, any)) {
      const A factor = inverse_norm(raw);
      FLA_UNROLL for (int j = 0; j < R; j++) {
        raw[j] *= factor;
        dot += raw[j] * d[j];
      }
      dot = sum_lanes(dot);
      FLA_UNROLL for (int j = 0; j < R; j++) d[j] = factor * (d[j] - raw[j] * dot);
    }
    FLA_UNROLL for (int j = 0; j < R; j++)
      if (lane + 32 * j < x.K) target[lane + 32 * j] = narrow<T>(d[j]);
  };
  rows(x.q, x.dq, x.dq_parts);
  rows(x.k, x.dk, x.dk_parts);

  const auto scalars = [&](const View& out, const void* parts) {
    if (!out.data) return;
    for (int64_t head = lane; head < group; head += 32) {
      A sum = 0;
      for (int i = 0; i < x.tiles; i++) sum += static_cast<const A*>(parts)[i * tile + first + head];
      store(out, offset_of(out, b, t, h * group + head), sum);
    }
  };
  scalars(x.dbeta, x.dbeta_parts);
  scalars(x.dg, x.dg_parts);
}

template <class Q, int R> void finish(const DeltaRuleFinish& x, Stream stream) {
  const int64_t blocks = ceil_div(x.B * x.T * x.H, 4);
  STD_TORCH_CHECK(blocks < int64_t(1) << 31, "delta_rule: more tokens and heads than one launch takes");
  FLA_LAUNCH((finish_kernel<Q, R>), unsigned(blocks), 128, 0, stream, x);
}

}  // namespace
}  // namespace fla_ops
