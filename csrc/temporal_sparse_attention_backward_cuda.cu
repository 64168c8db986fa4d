// SPDX-License-Identifier: Apache-2.0
//
// Temporal-sparse attention for CUDA: gradients. Weights are computed again from the forward's maxima and sums,
// P = exp(s - m) / l, and with d_i = dO_i . O_i
//
//   dV = P^T dO,   dS = P (dO V^T - d),   dQ = scale dS (K or K_hat),   dK = scale dS^T Q where exact, dK_hat elsewhere
//
// 1. `queries_kernel`: a block has a tile of queries and walks over keys for dQ; it also writes d. A row of dS sums to
//    0; what it misses that by, e_i, stems from d_i, and counts where keys are alike: dQ is put right by
//    -scale e_i (P K)_i.
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

// A block's shared memory.
template <class A, int R> struct Shared {
  int own, qk_pitch, vo_pitch;  // own: the warp's first row
  A *qk, *vo;                   // the block's rows of q and dO, or of k or k_hat and v
  A* slice;                     // of the other side
  A *p, *ds;                    // the warp's, [R, kTile]; where `both` is false in the same place

  __device__ __forceinline__ Shared(A* memory, const SparseInputs& in, bool both)
      : own(threadIdx.x / 32 * R), qk_pitch(padded<A>(in.D)), vo_pitch(padded<A>(in.DV)) {
    qk = memory;
    vo = qk + kWarps * R * qk_pitch;
    slice = vo + kWarps * R * vo_pitch;
    p = slice + kTile * kPitch<A> + own * kTile;
    ds = both ? p + kWarps * R * kTile : p;
  }
  static size_t bytes(const SparseInputs& in, bool both) {
    constexpr int rows = kWarps * R;
    const int channels = padded<A>(in.D) + padded<A>(in.DV);
    return sizeof(A) * (rows * channels + kTile * kPitch<A> + (both ? 2 : 1) * rows * kTile);
  }
  __device__ __forceinline__ const A* own_qk(int c) const { return qk + own * qk_pitch + c; }
  __device__ __forceinline__ const A* own_vo(int c) const { return vo + own * vo_pitch + c; }
};

// Pairs that are not seen have weight 0 everywhere.
struct Everywhere {
  __device__ __forceinline__ bool operator()(int, int) const { return true; }
};

// ------------------------------------------------------------------------------------------- queries

// The rows of a warp, and what their sums over keys have come to.
template <class A, int R, int C> struct QuerySums {
  int begin[R];
  A largest[R], inverse[R], d[R];
  A dq[R][C], mean[R][C], rest[R];  // of dS K, P K and dS; the last is the lane's share

  __device__ __forceinline__ QuerySums() {
    FLA_UNROLL for (int r = 0; r < R; r++) {
      d[r] = rest[r] = 0;
      FLA_UNROLL for (int c = 0; c < C; c++) dq[r][c] = mean[r][c] = 0;
    }
  }
};

// d_i = dO_i . O_i, taken as below dO_i . v_j is: where all weight is one key's they cancel to the last bit. A lane
// gets the products of its row of O with all of the warp's; its own is of use.
template <class T, class A, int R, int C>
__device__ __forceinline__ void find_d(QuerySums<A, R, C>& sums, const SparseBackward& x, const Tile& tile,
                                       int64_t head, const Shared<A, R>& shared) {
  const int lane = threadIdx.x % 32;
  const int64_t row = tile.start + tile.first;
  for (int c = 0; c < x.in.DV; c += kSlice<A>) {
    stage_slice<T>(shared.slice, x.o, tile.batch, row, head, c, tile.count, x.in.DV);
    add_products(sums.d, shared.own_vo(c), shared.vo_pitch, shared.slice, x.in.DV - c);
  }
  FLA_UNROLL for (int r = 0; r < R; r++) {
    sums.d[r] = __shfl_sync(kWarp, sums.d[r], shared.own + r);
    if (lane == 0 && shared.own + r < tile.count)
      static_cast<A*>(x.d)[x.first_row(tile.batch, head) + row + shared.own + r] = sums.d[r];
  }
}

// The keys [key, key + keys) of the sequence.
template <class T, class A, int R, int C>
__device__ __forceinline__ void add_keys(QuerySums<A, R, C>& sums, const SparseInputs& in, const Tile& tile,
                                         int64_t key_head, int key, int keys, bool exactly,
                                         const Shared<A, R>& shared) {
  const int lane = threadIdx.x % 32, position = tile.first + in.offset + shared.own;
  const View& seen = exactly ? in.k : in.held;
  const int64_t token = tile.start + key;
  A scores[R] = {}, dp[R] = {};
  for (int c = 0; c < in.DV; c += kSlice<A>) {
    stage_slice<T>(shared.slice, in.v, tile.batch, token, key_head, c, keys, in.DV);
    add_products(dp, shared.own_vo(c), shared.vo_pitch, shared.slice, in.DV - c);
  }
  for (int c = 0; c < in.D; c += kSlice<A>) {
    stage_slice<T>(shared.slice, seen, tile.batch, token, key_head, c, keys, in.D);
    add_products(scores, shared.own_qk(c), shared.qk_pitch, shared.slice, in.D - c);
  }
  FLA_UNROLL for (int r = 0; r < R; r++) {
    const bool sees = in.window.sees(position + r, sums.begin[r], key + lane, exactly);
    const A p = sees ? std::exp(A(in.scale) * scores[r] - sums.largest[r]) * sums.inverse[r] : A(0);
    const A ds = sees ? p * (dp[r] - sums.d[r]) : A(0);
    shared.p[r * kTile + lane] = p;
    shared.ds[r * kTile + lane] = ds;
    sums.rest[r] += ds;
  }
  __syncwarp(kWarp);
  // The last slice of keys is still there.
  FLA_UNROLL for (int n = C / kSliceColumns<A> - 1; n >= 0; n--) {
    if (n * kSlice<A> >= in.D) continue;
    if ((n + 1) * kSlice<A> < in.D)
      stage_slice<T>(shared.slice, seen, tile.batch, token, key_head, n * kSlice<A>, keys, in.D);
    add_weighted(sums.dq, n, shared.ds, shared.slice, keys, Everywhere());
    add_weighted(sums.mean, n, shared.p, shared.slice, keys, Everywhere());
  }
}

template <class T, int C> __global__ void __launch_bounds__(kThreads) queries_kernel(SparseBackward x) {
  using A = Arithmetic<T>;
  constexpr int R = kRows<A, C>, rows = kWarps * R;
  FLA_DYN_SHARED(A, memory);
  const SparseInputs& in = x.in;
  const Shared<A, R> shared(memory, in, true);
  const int64_t index = gridDim.x - 1 - blockIdx.x;  // of one sequence the longest walks come first
  const int64_t head = index % in.HQ, key_head = head / (in.HQ / in.HK);
  const Tile tile = tile_at(in.sequences, index / in.HQ, rows, in.offset);
  if (tile.count <= 0) return;
  const int64_t row = tile.start + tile.first;
  const int own = shared.own, position = tile.first + in.offset, last = position + tile.count;

  QuerySums<A, R, C> sums;
  stage_rows<rows>(shared.vo, rows_of<T>(x.d_o, tile.batch, row, head), x.d_o.stride[1], tile.count, in.DV);
  find_d<T>(sums, x, tile, head, shared);
  if (!x.dq.data) return;
  stage_rows<rows>(shared.qk, rows_of<T>(in.q, tile.batch, row, head), in.q.stride[1], tile.count, in.D);
  FLA_UNROLL for (int r = 0; r < R; r++) {
    const int64_t norm = (x.first_row(tile.batch, head) + row + min(own + r, tile.count - 1)) * 2;
    sums.begin[r] = in.window.start(position + own + r);
    sums.largest[r] = static_cast<const A*>(x.norms)[norm];
    sums.inverse[r] = static_cast<const A*>(x.norms)[norm + 1];
  }
  for (int key = 0; key < last; key += kTile) {
    const int keys = min(last - key, kTile);
    for (int way = 0; way < 2; way++)
      if (in.window.any(position, tile.count, key, keys, way == 0))
        add_keys<T>(sums, in, tile, key_head, key, keys, way == 0, shared);
  }
  FLA_UNROLL for (int r = 0; r < R; r++) {
    const A error = sum_lanes(sums.rest[r]);
    FLA_UNROLL for (int c = 0; c < C; c++) sums.dq[r][c] -= error * sums.mean[r][c];
  }
  store_rows(x.dq, offset_of(x.dq, tile.batch, row + own, head), x.dq.stride[1], sums.dq, A(in.scale),
             tile.count - own, in.D);
}

// ------------------------------------------------------------------------------------------- keys and values

// The queries [query, query + count) of one head of the sequence, which is `tile`'s.
template <class T, class A, int R, int C>
__device__ __forceinline__ void add_queries(A (&dkeys)[R][C], A (&dvalues)[R][C], const SparseBackward& x,
                                            const Tile& tile, int64_t head, int query, int count, bool exactly,
                                            const Shared<A, R>& shared) {
  constexpr int slices = C / kSliceColumns<A>;
  const SparseInputs& in = x.in;
  const int lane = threadIdx.x % 32, key = tile.first + shared.own;
  const int64_t token = tile.start + query;
  A scores[R] = {}, dp[R] = {}, p[R];
  for (int c = 0; c < in.D; c += kSlice<A>) {
    stage_slice<T>(shared.slice, in.q, tile.batch, token, head, c, count, in.D);
    add_products(scores, shared.own_qk(c), shared.qk_pitch, shared.slice, in.D - c);
  }
  // The lane's query.
  const int64_t row = x.first_row(tile.batch, head) + token + min(lane, count - 1);
  const A largest = static_cast<const A*>(x.norms)[row * 2], inverse = static_cast<const A*>(x.norms)[row * 2 + 1];
  const A d = static_cast<const A*>(x.d)[row];
  const int i = query + in.offset + lane, begin = in.window.start(i);
  const auto sees = [&](int r) { return lane < count && in.window.sees(i, begin, key + r, exactly); };
  FLA_UNROLL for (int r = 0; r < R; r++) {
    p[r] = sees(r) ? std::exp(A(in.scale) * scores[r] - largest) * inverse : A(0);
    shared.p[r * kTile + lane] = p[r];
  }
  FLA_UNROLL for (int n = 0; n < slices; n++) {
    const int c = n * kSlice<A>;
    if (c >= in.DV) continue;
    stage_slice<T>(shared.slice, x.d_o, tile.batch, token, head, c, count, in.DV);
    add_products(dp, shared.own_vo(c), shared.vo_pitch, shared.slice, in.DV - c);
    add_weighted(dvalues, n, shared.p, shared.slice, count, Everywhere());
  }
  if (!x.dk_exact.data) return;
  __syncwarp(kWarp);  // all are done with P, in whose place dS is
  FLA_UNROLL for (int r = 0; r < R; r++) shared.ds[r * kTile + lane] = sees(r) ? p[r] * (dp[r] - d) : A(0);
  FLA_UNROLL for (int n = 0; n < slices; n++) {
    if (n * kSlice<A> >= in.D) continue;
    stage_slice<T>(shared.slice, in.q, tile.batch, token, head, n * kSlice<A>, count, in.D);
    add_weighted(dkeys, n, shared.ds, shared.slice, count, Everywhere());
  }
}

template <class T, int C> __global__ void __launch_bounds__(kThreads) keys_kernel(SparseBackward x) {
  using A = Arithmetic<T>;
  constexpr int R = kRows<A, C>, rows = kWarps * R;
  FLA_DYN_SHARED(A, memory);
  const SparseInputs& in = x.in;
  const Shared<A, R> shared(memory, in, false);
  const int64_t head = blockIdx.x % in.HK, group = in.HQ / in.HK;
  const Tile tile = tile_at(in.sequences, blockIdx.x / in.HK, rows, 0);
  if (tile.count <= 0) return;
  const int64_t row = tile.start + tile.first;
  const int queries = tile.length - in.offset, first = max(tile.first - in.offset, 0) / kTile * kTile;
  const auto store_own = [&](const View& to, const A(&sums)[R][C], A factor, int channels) {
    if (to.data)
      store_rows(to, offset_of(to, tile.batch, row + shared.own, head), to.stride[1], sums, factor,
                 tile.count - shared.own, channels);
  };

  stage_rows<rows>(shared.vo, rows_of<T>(in.v, tile.batch, row, head), in.v.stride[1], tile.count, in.DV);
  A dvalues[R][C] = {};
  for (int way = 0; way < 2; way++) {
    const bool exactly = way == 0;
    const View& seen = exactly ? in.k : in.held;
    if (!seen.data) continue;
    // All are done with the keys of the first round: there are barriers behind their last use.
    stage_rows<rows>(shared.qk, rows_of<T>(seen, tile.batch, row, head), seen.stride[1], tile.count, in.D);
    A dkeys[R][C] = {};
    for (int64_t query_head = head * group; query_head < (head + 1) * group; query_head++)
      for (int query = first; query < queries; query += kTile) {
        const int count = min(queries - query, kTile);
        if (in.window.any(query + in.offset, count, tile.first, tile.count, exactly))
          add_queries<T>(dkeys, dvalues, x, tile, query_head, query, count, exactly, shared);
      }
    store_own(exactly ? x.dk_exact : x.dk_held, dkeys, A(in.scale), in.D);
  }
  store_own(x.dv, dvalues, A(1), in.DV);
}

// ------------------------------------------------------------------------------------------- held keys

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
    constexpr int R = kRows<A, C>, rows = kWarps * R;
    if (holds) hold<E>(x.in, held, nullptr, on.stream);
    const int64_t query_blocks = Tq ? tile_count(sequences, Tq, rows) * HQ : 0;
    FLA_LAUNCH((queries_kernel<E, C>), grid(query_blocks), kThreads, Shared<A, R>::bytes(x.in, true), on.stream, x);
    if (!(needs & (kNeedK | kNeedV))) return;
    const int64_t key_blocks = tile_count(sequences, T, rows) * HK;
    FLA_LAUNCH((keys_kernel<E, C>), grid(key_blocks), kThreads, Shared<A, R>::bytes(x.in, false), on.stream, x);
    if (!holds || !(needs & kNeedK)) return;
    const unsigned blocks = grid(ceil_div(sequences.count * HK * D, kThreads));
    FLA_LAUNCH(give_back_kernel<E>, blocks, kThreads, 0, on.stream, x, static_cast<E*>(dk.data_ptr()));
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace fla_ops

FLA_OPS_CUDA_IMPL(m) { m.impl("temporal_sparse_attention_backward", TORCH_BOX(&fla_ops::backward)); }
