// SPDX-License-Identifier: Apache-2.0
//
// Temporal-sparse attention for CUDA: gradients. Weights are computed again from the forward's maxima and sums, P =
// exp(s - m) / l, and with d_i = dO_i . O_i
//
//   dV = P^T dO,   dS = P (dO V^T - d),   dQ = scale dS (K or K_hat),   dK = scale dS^T Q where exact, dK_hat elsewhere
//
// 1. `queries_kernel`: a block has a tile of queries and walks over keys for dQ; it also writes d. A row of dS sums to 0;
//    what it misses that by, e_i, stems from d_i, and counts where keys are alike: dQ is put right by -scale e_i (P K)_i.
// 2. `keys_kernel`: a block has a tile of keys and walks over the queries of all heads of its group, first for those
//    that see the keys exactly, then for those that see them as they are held: no sum is left to atomics.
// 3. `give_back_kernel` gives the gradient of a held element to the key that transmitted it, from the last token to the
//    first.
//
// To check first when a result is wrong: `Window::sees`, and which rows a tile has (`tile_at`).
#include <tuple>

#include "temporal_sparse_attention_cuda.h"

namespace fla_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Need { kNeedQ = 1, kNeedK = 2, kNeedV = 4 };

// Pointers without a type are of the arithmetic's dtype. Gradients that are not needed have null data.
struct SparseBackward {
  SparseInputs in;
  View o, d_o;         // [B, Tq, HQ, DV]
  const void* norms;   // [B, HQ, Tq, 2]: m, 1 / l
  void* d;             // [B, HQ, Tq]
  View dq;             // [B, Tq, HQ, D]
  View dk_exact;       // [B, T, HK, D], contiguous: of pairs that see a key exactly. dk itself if no key is held
  View dk_held;        // [B, T, HK, D], contiguous: of the other pairs
  View dv;             // [B, T, HK, DV]

  __device__ __forceinline__ int64_t first_row(int64_t batch, int64_t head) const {  // of norms and d
    return (batch * in.HQ + head) * (in.sequences.length - in.offset);
  }
};

template <class T> __device__ __forceinline__ const T* rows_of(const View& x, int64_t batch, int64_t token, int64_t head) {
  return reinterpret_cast<const T*>(x.data) + offset_of(x, batch, token, head);
}

template <class T, int C> __global__ void __launch_bounds__(kThreads) queries_kernel(SparseBackward x) {
  using A = Arithmetic<T>;
  constexpr int R = kRows<A, C>, rows = kWarps * R, slices = C / kSliceColumns<A>;
  // [rows, padded(D)], [rows, padded(DV)], then a slice of keys or values, then the weights of each warp twice: P, dS.
  FLA_DYN_SHARED(A, queries);
  const SparseInputs& in = x.in;
  const int q_pitch = padded<A>(in.D), v_pitch = padded<A>(in.DV), lane = threadIdx.x % 32, own = threadIdx.x / 32 * R;
  A* const douts = queries + rows * q_pitch;
  A* const slice = douts + rows * v_pitch;
  A* const weights = slice + kTile * kPitch<A> + 2 * own * kTile;
  A* const gradients = weights + R * kTile;

  const int64_t index = gridDim.x - 1 - blockIdx.x;  // of one sequence the longest walks come first
  const int64_t head = index % in.HQ, key_head = head / (in.HQ / in.HK);
  const Tile tile = tile_at(in.sequences, index / in.HQ, rows, in.offset);
  if (tile.count <= 0) return;
  const int64_t row = tile.start + tile.first;  // of q, o and dO
  const int position = tile.first + in.offset, last = position + tile.count;
  const auto stage_slice = [&](const View& of, int64_t token, int64_t of_head, int c, int count, int channels) {
    __syncthreads();
    const T* const from = rows_of<T>(of, tile.batch, token, of_head);
    stage<kTile>(slice, kPitch<A>, from + c, of.stride[1], count, channels - c);
    __syncthreads();
  };

  // d_i = dO_i . O_i, as below dO_i . v_j: where all weight is one key's they cancel to the last bit. A lane gets the
  // products of its row of O with all of the warp's; its own is of use.
  stage_rows<rows>(douts, rows_of<T>(x.d_o, tile.batch, row, head), x.d_o.stride[1], tile.count, in.DV);
  A d[R] = {};
  for (int c = 0; c < in.DV; c += kSlice<A>) {
    stage_slice(x.o, row, head, c, tile.count, in.DV);
    add_products(d, douts + own * v_pitch + c, v_pitch, slice, in.DV - c);
  }
  FLA_UNROLL for (int r = 0; r < R; r++) {
    d[r] = __shfl_sync(kWarp, d[r], own + r);
    if (lane == 0 && own + r < tile.count)
      static_cast<A*>(x.d)[x.first_row(tile.batch, head) + row + own + r] = d[r];
  }
  if (!x.dq.data) return;

  stage_rows<rows>(queries, rows_of<T>(in.q, tile.batch, row, head), in.q.stride[1], tile.count, in.D);
  int begin[R];
  A largest[R], inverse[R], rest[R];  // rest: the lane's share of the sum of dS
  FLA_UNROLL for (int r = 0; r < R; r++) {
    const int64_t norm = (x.first_row(tile.batch, head) + row + min(own + r, tile.count - 1)) * 2;
    begin[r] = in.window.start(position + own + r);
    largest[r] = static_cast<const A*>(x.norms)[norm];
    inverse[r] = static_cast<const A*>(x.norms)[norm + 1];
    rest[r] = 0;
  }
  A dq[R][C] = {}, mean[R][C] = {};  // sums over keys of dS K, P K
  for (int key = 0; key < last; key += kTile) {
    const int keys = min(last - key, kTile);
    for (const bool exactly : {true, false}) {
      if (!in.window.any(position, tile.count, key, keys, exactly)) continue;
      const View& seen = exactly ? in.k : in.held;
      const int64_t token = tile.start + key;
      A scores[R] = {}, dp[R] = {};
      for (int c = 0; c < in.DV; c += kSlice<A>) {
        stage_slice(in.v, token, key_head, c, keys, in.DV);
        add_products(dp, douts + own * v_pitch + c, v_pitch, slice, in.DV - c);
      }
      for (int c = 0; c < in.D; c += kSlice<A>) {
        stage_slice(seen, token, key_head, c, keys, in.D);
        add_products(scores, queries + own * q_pitch + c, q_pitch, slice, in.D - c);
      }
      FLA_UNROLL for (int r = 0; r < R; r++) {
        const bool sees = in.window.sees(position + own + r, begin[r], key + lane, exactly);
        const A p = sees ? std::exp(A(in.scale) * scores[r] - largest[r]) * inverse[r] : A(0);
        const A ds = sees ? p * (dp[r] - d[r]) : A(0);
        weights[r * kTile + lane] = p;
        gradients[r * kTile + lane] = ds;
        rest[r] += ds;
      }
      __syncwarp(kWarp);
      // The last slice of keys is still there.
      FLA_UNROLL for (int n = slices - 1; n >= 0; n--) {
        if (n * kSlice<A> >= in.D) continue;
        if ((n + 1) * kSlice<A> < in.D) stage_slice(seen, token, key_head, n * kSlice<A>, keys, in.D);
        const auto everywhere = [](int, int) { return true; };
        add_weighted(dq, n, gradients, slice, keys, everywhere);
        add_weighted(mean, n, weights, slice, keys, everywhere);
      }
    }
  }
  FLA_UNROLL for (int r = 0; r < R; r++) {
    const A error = sum_lanes(rest[r]);
    FLA_UNROLL for (int c = 0; c < C; c++) dq[r][c] -= error * mean[r][c];
  }
  store_rows(x.dq, offset_of(x.dq, tile.batch, row + own, head), x.dq.stride[1], dq, A(in.scale), tile.count - own,
             in.D);
}

template <class T, int C> __global__ void __launch_bounds__(kThreads) keys_kernel(SparseBackward x) {
  using A = Arithmetic<T>;
  constexpr int R = kRows<A, C>, rows = kWarps * R, slices = C / kSliceColumns<A>;
  // [rows, padded(D)], [rows, padded(DV)], then a slice of queries or dO, then the weights of each warp.
  FLA_DYN_SHARED(A, keys);
  const SparseInputs& in = x.in;
  const int q_pitch = padded<A>(in.D), v_pitch = padded<A>(in.DV), lane = threadIdx.x % 32, own = threadIdx.x / 32 * R;
  A* const values = keys + rows * q_pitch;
  A* const slice = values + rows * v_pitch;
  A* const weights = slice + kTile * kPitch<A> + own * kTile;

  const int64_t head = blockIdx.x % in.HK, group = in.HQ / in.HK;
  const Tile tile = tile_at(in.sequences, blockIdx.x / in.HK, rows, 0);
  if (tile.count <= 0) return;
  const int64_t row = tile.start + tile.first;  // of k and v
  const int queries = tile.length - in.offset;
  const int first_query = max(tile.first - in.offset, 0) / kTile * kTile;
  stage_rows<rows>(values, rows_of<T>(in.v, tile.batch, row, head), in.v.stride[1], tile.count, in.DV);

  A dvalues[R][C] = {};
  for (const bool exactly : {true, false}) {
    const View& seen = exactly ? in.k : in.held;
    if (!seen.data) continue;
    // All are done with the keys of the first round: there are barriers behind their last use.
    stage_rows<rows>(keys, rows_of<T>(seen, tile.batch, row, head), seen.stride[1], tile.count, in.D);
    A dkeys[R][C] = {};
    for (int64_t query_head = head * group; query_head < (head + 1) * group; query_head++) {
      for (int query = first_query; query < queries; query += kTile) {
        const int count = min(queries - query, kTile), position = query + in.offset;
        if (!in.window.any(position, count, tile.first, tile.count, exactly)) continue;
        const int64_t token = tile.start + query;
        const auto stage_slice = [&](const View& of, int c, int channels) {
          __syncthreads();
          const T* const from = rows_of<T>(of, tile.batch, token, query_head);
          stage<kTile>(slice, kPitch<A>, from + c, of.stride[1], count, channels - c);
          __syncthreads();
        };
        A scores[R] = {}, dp[R] = {}, p[R];
        for (int c = 0; c < in.D; c += kSlice<A>) {
          stage_slice(in.q, c, in.D);
          add_products(scores, keys + own * q_pitch + c, q_pitch, slice, in.D - c);
        }
        // The lane's query.
        const int64_t norm = x.first_row(tile.batch, query_head) + token + min(lane, count - 1);
        const A largest = static_cast<const A*>(x.norms)[norm * 2], inverse = static_cast<const A*>(x.norms)[norm * 2 + 1];
        const int i = position + lane, begin = in.window.start(i);
        FLA_UNROLL for (int r = 0; r < R; r++) {
          const bool sees = lane < count && in.window.sees(i, begin, tile.first + own + r, exactly);
          p[r] = sees ? std::exp(A(in.scale) * scores[r] - largest) * inverse : A(0);
          weights[r * kTile + lane] = p[r];
        }
        const auto everywhere = [](int, int) { return true; };
        FLA_UNROLL for (int n = 0; n < slices; n++) {
          if (n * kSlice<A> >= in.DV) continue;
          stage_slice(x.d_o, n * kSlice<A>, in.DV);
          add_products(dp, values + own * v_pitch + n * kSlice<A>, v_pitch, slice, in.DV - n * kSlice<A>);
          add_weighted(dvalues, n, weights, slice, count, everywhere);
        }
        if (!x.dk_exact.data) continue;
        const A d = static_cast<const A*>(x.d)[norm];
        __syncwarp(kWarp);  // all are done with P
        FLA_UNROLL for (int r = 0; r < R; r++) {
          const bool sees = lane < count && in.window.sees(i, begin, tile.first + own + r, exactly);
          weights[r * kTile + lane] = sees ? p[r] * (dp[r] - d) : A(0);
        }
        FLA_UNROLL for (int n = 0; n < slices; n++) {
          if (n * kSlice<A> >= in.D) continue;
          stage_slice(in.q, n * kSlice<A>, in.D);
          add_weighted(dkeys, n, weights, slice, count, everywhere);
        }
      }
    }
    const View& to = exactly ? x.dk_exact : x.dk_held;
    if (to.data)
      store_rows(to, offset_of(to, tile.batch, row + own, head), to.stride[1], dkeys, A(in.scale), tile.count - own,
                 in.D);
  }
  if (x.dv.data)
    store_rows(x.dv, offset_of(x.dv, tile.batch, row + own, head), x.dv.stride[1], dvalues, A(1), tile.count - own,
               in.DV);
}

// A thread is one channel of one key head of one sequence.
template <class T> __global__ void __launch_bounds__(kThreads) give_back_kernel(SparseBackward x, T* dk) {
  using A = Arithmetic<T>;
  const int64_t row = int64_t(x.in.HK) * x.in.D, i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= x.in.sequences.count * row) return;
  const Span span = x.in.sequences[i / row];
  const int64_t place = span.batch * x.in.sequences.length * row + i % row;
  const T* const held = reinterpret_cast<const T*>(x.in.held.data) + place;
  const A* const exact = reinterpret_cast<const A*>(x.dk_exact.data) + place;
  const A* const of_held = reinterpret_cast<const A*>(x.dk_held.data) + place;
  A later = 0;
  for (int64_t t = span.end - 1; t >= span.start; t--) {
    later += of_held[t * row];
    // A channel that fires takes another value, or was infinite before.
    const bool stays = t > span.start && widen<A>(held[t * row]) - widen<A>(held[(t - 1) * row]) == 0;
    dk[place + t * row] = narrow<T>(stays ? exact[t * row] : exact[t * row] + later);
    if (!stays) later = 0;
  }
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& threshold,
                                            const std::optional<Tensor>& cu_seqlens, double scale, int64_t window,
                                            bool window_blocks, int64_t sink, bool holds, const Tensor& o,
                                            const Tensor& norms, const Tensor& d_o, int64_t needs) {
  const OnDevice on(q);
  SparseBackward x{};
  x.in = inputs_on_device(q, k, v, threshold, cu_seqlens, scale, window, window_blocks, sink, holds);
  const int64_t B = q.size(0), Tq = q.size(1), T = k.size(1), HQ = q.size(2), HK = k.size(2), D = k.size(3);
  const int64_t DV = v.size(3);
  const auto like_o = [&](const Tensor& y) {
    return y.dim() == 4 && y.size(0) == B && y.size(1) == Tq && y.size(2) == HQ && y.size(3) == DV &&
           y.scalar_type() == q.scalar_type();
  };
  STD_TORCH_CHECK(like_o(o) && like_o(d_o) && norms.is_contiguous() && norms.numel() == 2 * B * HQ * Tq &&
                      norms.scalar_type() == accumulator(q),
                  "temporal_sparse_attention: o and its gradient must be [B, Tq, HQ, DV], norms as saved");
  const auto [sequences, bounds] = monotone_sequences(q, B, T, cu_seqlens, on.stream);
  x.in.sequences = sequences;

  const auto gradient = [&](int bit, const Tensor& of) {
    if (!(needs & bit)) return torch::stable::new_empty(q, {0});
    const std::vector<int64_t> size{of.size(0), of.size(1), of.size(2), of.size(3)};
    // Rows that no packed sequence covers stay 0.
    return cu_seqlens ? torch::stable::new_zeros(q, size) : torch::stable::new_empty(q, size);
  };
  Tensor dq = gradient(kNeedQ, q), dk = gradient(kNeedK, k), dv = gradient(kNeedV, v);
  // The workspace, gone when the op returns.
  std::vector<Tensor> workspace;
  const auto take = [&](std::vector<int64_t> size, ScalarType dtype) {
    workspace.push_back(torch::stable::new_empty(q, size, dtype));
    return workspace.back();
  };
  std::optional<Tensor> held;
  if (holds) held = take({B, T, HK, D}, q.scalar_type());
  x.in.held = view(held, 3);
  x.o = view(o, 3);
  x.d_o = view(d_o, 3);
  x.norms = norms.data_ptr();
  x.d = take({B, HQ, Tq}, accumulator(q)).data_ptr();
  if (needs & kNeedQ) x.dq = view(dq, 3);
  if (needs & kNeedV) x.dv = view(dv, 3);
  if (needs & kNeedK) {
    x.dk_exact = view(holds ? take({B, T, HK, D}, accumulator(q)) : dk, 3);
    if (holds) x.dk_held = view(take({B, T, HK, D}, accumulator(q)), 3);
  }

  with_columns(q, int(std::max(D, DV)), [&]<class E, int C>() {
    using A = Arithmetic<E>;
    constexpr int rows = kWarps * kRows<A, C>;
    if (holds) hold<E>(x.in, held, nullptr, on.stream);
    const size_t shared = sizeof(A) * (rows * (padded<A>(int(D)) + padded<A>(int(DV))) + kTile * kPitch<A>);
    const size_t weights = sizeof(A) * rows * kTile;
    const int64_t query_tiles = Tq ? tile_count(sequences, Tq, rows) : 0, key_tiles = tile_count(sequences, T, rows);
    FLA_LAUNCH((queries_kernel<E, C>), grid(query_tiles * HQ), kThreads, shared + 2 * weights, on.stream, x);
    if (!(needs & (kNeedK | kNeedV))) return;
    FLA_LAUNCH((keys_kernel<E, C>), grid(key_tiles * HK), kThreads, shared + weights, on.stream, x);
    if (!holds || !(needs & kNeedK)) return;
    const unsigned blocks = grid(ceil_div(sequences.count * HK * D, kThreads));
    FLA_LAUNCH(give_back_kernel<E>, blocks, kThreads, 0, on.stream, x, static_cast<E*>(dk.data_ptr()));
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace fla_ops

FLA_OPS_CUDA_IMPL(m) { m.impl("temporal_sparse_attention_backward", TORCH_BOX(&fla_ops::backward)); }
