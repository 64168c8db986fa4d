// SPDX-License-Identifier: Apache-2.0
//
// What the delta rule's CUDA kernels share: how a warp holds a state, and how it reads tokens.
//
// One warp owns C columns of one value head's state S [K, V]: lane i holds rows i, i + 32, ... of them in registers, R
// rows at most. Columns do not depend on each other, so a pass over a sequence needs no shared memory and no barrier:
//   S^T x    (u, o, du)  is summed over the lanes by shuffles, C sums at once;
//   S x      (dq, dk)    is summed over the C columns in registers, over warps by whoever needs it.
// Rows from K on and columns from V on do not exist: no arithmetic touches them, so that an infinite v or decay makes
// no NaN of them that the sums would see.
//
// This is the step loop itself, in float32 (float64 for float64): whatever the decays and however parallel the keys,
// no sum here is larger than those of the reference.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>
#include <utility>

#include "cuda_op.h"
#include "delta_rule_checks.h"
#include "device_view.h"

namespace fla_ops {

// Columns a warp: R x C elements make 32 registers a lane at most. More would spill in the backward pass.
template <class A, int R> constexpr int kColumns = (R == 8 ? 4 : 8) / int(sizeof(A) / sizeof(float));

// The inputs of the sequences and of the step, which is a sequence of one token with its T axis left out.
struct DeltaRuleInputs {
  View q, k;           // [B, T, H, K]
  View v;              // [B, T, HV, V]
  View beta, g;        // [B, T, HV], in the dtype of q or float32; g.data may be null
  View initial_state;  // [N or slots, HV, K, V]; data may be null
  View checkpoints;    // [rows, HV, K, V]: the state before every 64th token; data may be null
  Sequences sequences;
  int64_t H, HV;
  int K, V;
  int tiles;  // blocks that share the columns of one value head
  double scale;
  bool qk_l2norm;
};

// Strides of batch, token and head; `outer` is 2 for sequences [B, T, ...], 1 for a step [B, ...].
inline View token_view(const torch::stable::Tensor& x, int outer) {
  View result = view(x, outer + 1);
  if (outer == 1) result.stride[2] = std::exchange(result.stride[1], 0);
  return result;
}

inline DeltaRuleInputs inputs_on_device(const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                                        const torch::stable::Tensor& v, const torch::stable::Tensor& beta,
                                        const std::optional<torch::stable::Tensor>& g, double scale, bool qk_l2norm) {
  const int outer = int(q.dim()) - 2;
  DeltaRuleInputs x{};
  x.q = token_view(q, outer);
  x.k = token_view(k, outer);
  x.v = token_view(v, outer);
  x.beta = token_view(beta, outer);
  if (g) x.g = token_view(*g, outer);
  x.H = q.size(outer);
  x.HV = v.size(outer);
  x.K = int(q.size(outer + 1));
  x.V = int(v.size(outer + 1));
  x.scale = scale;
  x.qk_l2norm = qk_l2norm;
  return x;
}

// How the columns of V are spread over warps and blocks.
struct Columns {
  int warps, tiles;  // warps a block, blocks a value head

  Columns(int V, int columns_a_warp, int most_warps) {
    const int wanted = (V + columns_a_warp - 1) / columns_a_warp;
    warps = std::min(wanted, most_warps);
    tiles = (wanted + warps - 1) / warps;
  }
  unsigned blocks(int64_t heads) const {
    STD_TORCH_CHECK(heads * tiles < int64_t(1) << 31, "delta_rule: more sequences and heads than one launch takes");
    return unsigned(heads * tiles);
  }
};

// Calls f.operator()<T, R>() for the dtype of q and the fewest rows a lane that hold K.
template <class F> void with_rows(const torch::stable::Tensor& q, int K, const F& f) {
  with_dtype(q, [&]<class T>() {
    if (K <= 64) f.template operator()<T, 2>();
    else if (K <= 128) f.template operator()<T, 4>();
    else f.template operator()<T, 8>();
  });
}

// The part of the work that this warp does: columns [column, column + columns) of one value head of one sequence.
struct Place {
  Span span;
  int64_t head, key_head, first_checkpoint;
  int lane, warp, tile;
  int column, columns;  // columns is at most C, and 0 or less in a warp that has none

  __device__ __forceinline__ int row(int j) const { return lane + 32 * j; }
};

// Sequence n with its bounds made monotone: whatever cu_seqlens holds, sequences do not overlap.
__device__ inline Span monotone(const Sequences& sequences, int64_t n, int lane) {
  if (!sequences.cu_seqlens.data) return sequences[n];
  int64_t start = 0;
  for (int64_t i = lane; i <= n; i += 32) start = max(start, min(sequences.cu_seqlens[i], sequences.length));
  for (int bit = 16; bit > 0; bit /= 2) start = max(start, __shfl_xor_sync(kWarp, start, bit));
  return {0, n, start, max(start, min(sequences.cu_seqlens[n + 1], sequences.length))};
}

template <int C> __device__ Place find_place(const DeltaRuleInputs& x) {
  Place p;
  p.lane = threadIdx.x % 32;
  p.warp = threadIdx.x / 32;
  p.tile = blockIdx.x % x.tiles;
  p.head = blockIdx.x / x.tiles % x.HV;
  p.key_head = p.head / (x.HV / x.H);
  const int64_t n = blockIdx.x / x.tiles / x.HV;
  p.span = monotone(x.sequences, n, p.lane);
  // start / 64 + n leaves room for the rounding up of every sequence before.
  constexpr int block = kCheckpointTokens;
  p.first_checkpoint =
      x.sequences.cu_seqlens.data ? p.span.start / block + n : n * ((x.sequences.length + block - 1) / block);
  p.column = (p.tile * int(blockDim.x / 32) + p.warp) * C;
  p.columns = min(x.V - p.column, C);
  return p;
}

// Calls f with a pointer of the view's dtype to element `offset`.
template <class F> __device__ __forceinline__ void with_pointer(const View& x, int64_t offset, const F& f) {
  switch (x.type) {
    case Type::float64: f(reinterpret_cast<double*>(x.data) + offset); break;
    case Type::float32: f(reinterpret_cast<float*>(x.data) + offset); break;
    case Type::bfloat16: f(reinterpret_cast<bf16*>(x.data) + offset); break;
    default: f(reinterpret_cast<fp16*>(x.data) + offset); break;
  }
}

// The warp's part of state `index`; zeros where there is none.
template <class A, int R, int C>
__device__ void load_state(A (&state)[R][C], const View& from, int64_t index, const Place& p, int K) {
  FLA_UNROLL for (int j = 0; j < R; j++)
    FLA_UNROLL for (int c = 0; c < C; c++) state[j][c] = 0;
  if (!from.data) return;
  with_pointer(from, offset_of(from, index, p.head, p.lane) + p.column, [&](const auto* first) {
    FLA_UNROLL for (int j = 0; j < R; j++)
      FLA_UNROLL for (int c = 0; c < C; c++)
        if (p.row(j) < K && c < p.columns) state[j][c] = widen<A>(first[32 * j * from.stride[2] + c]);
  });
}

template <class A, int R, int C>
__device__ void store_state(const A (&state)[R][C], const View& to, int64_t index, const Place& p, int K) {
  with_pointer(to, offset_of(to, index, p.head, p.lane) + p.column, [&](auto* first) {
    using S = std::remove_reference_t<decltype(*first)>;
    FLA_UNROLL for (int j = 0; j < R; j++)
      FLA_UNROLL for (int c = 0; c < C; c++)
        if (p.row(j) < K && c < p.columns) first[32 * j * to.stride[2] + c] = narrow<S>(state[j][c]);
  });
}

// x[c] summed over the lanes, for all c at once: in each round a lane hands half of its sums to a partner and takes
// over the partner's share of the other half. Returns the sum of column owned_column(lane).
template <class A, int C> __device__ __forceinline__ A sum_columns(A (&x)[C], int lane) {
  FLA_UNROLL for (int n = C / 2, bit = 16; n > 0; n /= 2, bit /= 2)
    FLA_UNROLL for (int i = 0; i < n; i++) {
      const bool upper = lane & bit;
      const A given = upper ? x[i] : x[i + n], kept = upper ? x[i + n] : x[i];
      x[i] = kept + __shfl_xor_sync(kWarp, given, bit);
    }
  FLA_UNROLL for (int bit = 16 / C; bit > 0; bit /= 2) x[0] += __shfl_xor_sync(kWarp, x[0], bit);
  return x[0];
}
template <int C> __device__ __forceinline__ int owned_column(int lane) { return lane / (32 / C); }
template <int C> __device__ __forceinline__ bool is_owner(int lane) { return lane % (32 / C) == 0; }

// The same, and every lane gets every sum.
template <class A, int C> __device__ __forceinline__ void sum_columns_for_all(A (&x)[C], int lane) {
  const A own = sum_columns(x, lane);
  FLA_UNROLL for (int c = 0; c < C; c++) x[c] = __shfl_sync(kWarp, own, c * (32 / C));
}

// x[lane] in lane 0 to C - 1, without indexing registers.
template <class A, int C> __device__ __forceinline__ A own_element(const A (&x)[C], int lane) {
  A own = x[0];
  FLA_UNROLL for (int c = 1; c < C; c++) own = lane == c ? x[c] : own;
  return own;
}

template <class A> __device__ __forceinline__ A sum_lanes(A x) {
  FLA_UNROLL for (int bit = 16; bit > 0; bit /= 2) x += __shfl_xor_sync(kWarp, x, bit);
  return x;
}

// 1 / |x| as qk_l2norm defines it.
template <class A, int R> __device__ __forceinline__ A inverse_norm(const A (&x)[R]) {
  A sum = 0;
  FLA_UNROLL for (int j = 0; j < R; j++) sum += x[j] * x[j];
  return 1 / std::sqrt(sum_lanes(sum) + A(1e-6));
}

// A token's inputs as they lie in memory: read one token ahead, and converted when their turn has come, so that
// nothing waits for the load. Rows and columns that do not exist are 0.
template <class T, int R, int C> struct RawToken {
  T q[R], k[R];
  T y[C];  // the warp's columns of v or of dO
  T beta{}, g{};
  float beta32 = 0, g32 = 0;  // instead, where these are float32

  __device__ __forceinline__ void read(const DeltaRuleInputs& x, const View& columns, const Place& p, int64_t t) {
    const T* q_row = row(x.q, p, t, p.key_head) + p.lane;
    const T* k_row = row(x.k, p, t, p.key_head) + p.lane;
    FLA_UNROLL for (int j = 0; j < R; j++) {
      const bool live = p.row(j) < x.K;
      q[j] = live ? q_row[32 * j] : T(0);
      k[j] = live ? k_row[32 * j] : T(0);
    }
    const T* y_row = row(columns, p, t, p.head) + p.column;
    FLA_UNROLL for (int c = 0; c < C; c++) y[c] = c < p.columns ? y_row[c] : T(0);
    read_side(beta, beta32, x.beta, p, t);
    if (x.g.data) read_side(g, g32, x.g, p, t);
  }

 private:
  static __device__ __forceinline__ const T* row(const View& x, const Place& p, int64_t t, int64_t head) {
    return reinterpret_cast<const T*>(x.data) + offset_of(x, p.span.batch, t, head);
  }
  static __device__ __forceinline__ void read_side(T& same, float& wide, const View& x, const Place& p, int64_t t) {
    const int64_t offset = offset_of(x, p.span.batch, t, p.head);
    if (x.type == Type::float32) wide = reinterpret_cast<const float*>(x.data)[offset];
    else same = reinterpret_cast<const T*>(x.data)[offset];
  }
};

// The same ready for use: q and k normalised if asked for, e^g. q does not carry the scale.
template <class A, int R, int C> struct Token {
  A q[R], k[R], y[C], beta, decay;

  Token() = default;
  template <class T> __device__ __forceinline__ Token(const RawToken<T, R, C>& raw, const DeltaRuleInputs& x) {
    FLA_UNROLL for (int j = 0; j < R; j++) {
      q[j] = widen<A>(raw.q[j]);
      k[j] = widen<A>(raw.k[j]);
    }
    FLA_UNROLL for (int c = 0; c < C; c++) y[c] = widen<A>(raw.y[c]);
    beta = x.beta.type == Type::float32 ? A(raw.beta32) : widen<A>(raw.beta);
    decay = 1;
    if (x.g.data) decay = std::exp(x.g.type == Type::float32 ? A(raw.g32) : widen<A>(raw.g));
    if (x.qk_l2norm) {
      const A q_factor = inverse_norm(q), k_factor = inverse_norm(k);
      FLA_UNROLL for (int j = 0; j < R; j++) {
        q[j] *= q_factor;
        k[j] *= k_factor;
      }
    }
  }
};

// state <- e^g state, then residual = v - state^T k, in every lane.
template <class A, int R, int C>
__device__ __forceinline__ void decay_and_compare(A (&state)[R][C], A (&residual)[C], const Token<A, R, C>& token,
                                               const Place& p, int K) {
  FLA_UNROLL for (int c = 0; c < C; c++) residual[c] = 0;
  FLA_UNROLL for (int j = 0; j < R; j++)
    if (p.row(j) < K) {
      FLA_UNROLL for (int c = 0; c < C; c++) {
        state[j][c] *= token.decay;
        residual[c] += state[j][c] * token.k[j];
      }
    }
  sum_columns_for_all(residual, p.lane);
  FLA_UNROLL for (int c = 0; c < C; c++) residual[c] = token.y[c] - residual[c];
}

}  // namespace fla_ops
