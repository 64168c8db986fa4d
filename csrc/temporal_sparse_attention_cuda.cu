// SPDX-License-Identifier: Apache-2.0
//
// DeltaLLM's temporal-sparse attention for CUDA, the fallback where Triton is not: forward. The gradients are in
// temporal_sparse_attention_backward_cuda.cu.
//
//   k_hat_t = k_t where not |k_t - k_hat_{t-1}| <= threshold, else k_hat_{t-1}      a channel by itself
//   o_i = sum over j <= i of softmax_j(scale q_i . (k_j if i sees it exactly, else k_hat_j)) v_j
//
// `hold_kernel` writes k_hat. Then a block has a tile of queries of one head and walks over the keys with a running
// maximum and running sums (temporal_sparse_attention_cuda.h says how a block holds its rows). Zeros of k_hat's changes
// are not skipped.
//
// To check first when a result is wrong: `Window`, and which rows a tile has (`tile_at`).
#include <tuple>

#include "temporal_sparse_attention_cuda.h"

namespace fla_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct SparseForward {
  SparseInputs in;
  View o;       // [B, Tq, HQ, DV]
  void* norms;  // [B, HQ, Tq, 2] in the arithmetic's dtype: the largest score, 1 / the sum of weights
};

// What the softmax of a warp's rows has found so far.
template <class A, int R, int C> struct RunningSoftmax {
  A largest[R], sum[R];  // sum: the lane's share
  A o[R][C];

  __device__ __forceinline__ RunningSoftmax() {
    FLA_UNROLL for (int r = 0; r < R; r++) {
      largest[r] = -A(INFINITY);
      sum[r] = 0;
      FLA_UNROLL for (int c = 0; c < C; c++) o[r][c] = 0;
    }
  }
  // Row r's score of the lane's key; returns its weight.
  __device__ __forceinline__ A add(int r, A score) {
    const A before = largest[r];
    largest[r] = max(before, max_lanes(score));
    const A base = largest[r] == -A(INFINITY) ? A(0) : largest[r];  // no key has had a weight yet
    const A kept = std::exp(before - base), weight = std::exp(score - base);
    sum[r] = sum[r] * kept + weight;
    FLA_UNROLL for (int c = 0; c < C; c++) o[r][c] *= kept;
    return weight;
  }
};

template <class T, int C> __global__ void __launch_bounds__(kThreads) forward_kernel(SparseForward x) {
  using A = Arithmetic<T>;
  constexpr int R = kRows<A, C>, slices = C / kSliceColumns<A>;
  FLA_DYN_SHARED(A, queries);  // [kWarps R, padded(D)], then a slice of keys or values, then the weights of each warp
  const SparseInputs& in = x.in;
  const int pitch = padded<A>(in.D), lane = threadIdx.x % 32, own = threadIdx.x / 32 * R;
  A* const slice = queries + kWarps * R * pitch;
  A* const weights = slice + kTile * kPitch<A> + own * kTile;

  const int64_t index = gridDim.x - 1 - blockIdx.x;  // of one sequence the longest walks come first
  const int64_t head = index % in.HQ, key_head = head / (in.HQ / in.HK);
  const Tile tile = tile_at(in.sequences, index / in.HQ, kWarps * R, in.offset);
  if (tile.count <= 0) return;
  const int64_t row = tile.start + tile.first;  // of q and o
  const int position = tile.first + in.offset, last = position + tile.count;
  stage_rows<kWarps * R>(queries, rows_of<T>(in.q, tile.batch, row, head), in.q.stride[1], tile.count, in.D);

  int begin[R];
  FLA_UNROLL for (int r = 0; r < R; r++) begin[r] = in.window.start(position + own + r);
  RunningSoftmax<A, R, C> found;
  for (int key = 0; key < last; key += kTile) {
    const int keys = min(last - key, kTile);
    for (int way = 0; way < 2; way++) {
      const bool exactly = way == 0;
      if (!in.window.any(position, tile.count, key, keys, exactly)) continue;
      A scores[R] = {};
      for (int c = 0; c < in.D; c += kSlice<A>) {
        stage_slice<T>(slice, exactly ? in.k : in.held, tile.batch, tile.start + key, key_head, c, keys, in.D);
        add_products(scores, queries + own * pitch + c, pitch, slice, in.D - c);
      }
      FLA_UNROLL for (int r = 0; r < R; r++) {
        const bool sees = in.window.sees(position + own + r, begin[r], key + lane, exactly);
        weights[r * kTile + lane] = found.add(r, sees ? A(in.scale) * scores[r] : -A(INFINITY));
      }
      FLA_UNROLL for (int n = 0; n < slices; n++) {
        if (n * kSlice<A> >= in.DV) continue;
        stage_slice<T>(slice, in.v, tile.batch, tile.start + key, key_head, n * kSlice<A>, keys, in.DV);
        const auto add = [&](const auto& has) { add_weighted(found.o, n, weights, slice, keys, has); };
        if (key + keys <= position + own + 1) add([](int, int) { return true; });
        else add([&](int r, int j) { return key + j <= position + own + r; });
      }
    }
  }

  const int64_t norm_row = (tile.batch * in.HQ + head) * (in.sequences.length - in.offset) + row + own;
  FLA_UNROLL for (int r = 0; r < R; r++) {
    const A inverse = 1 / sum_lanes(found.sum[r]);
    FLA_UNROLL for (int c = 0; c < C; c++) found.o[r][c] *= inverse;
    if (own + r < tile.count && lane < 2)
      static_cast<A*>(x.norms)[(norm_row + r) * 2 + lane] = lane == 0 ? found.largest[r] : inverse;
  }
  store_rows(x.o, offset_of(x.o, tile.batch, row + own, head), x.o.stride[1], found.o, A(1), tile.count - own, in.DV);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& threshold,
                                           const std::optional<Tensor>& cu_seqlens, double scale, int64_t window,
                                           bool window_blocks, int64_t sink, bool holds, bool count_fired) {
  const OnDevice on(q);
  SparseForward x{};
  x.in = inputs_on_device(q, k, v, threshold, cu_seqlens, scale, window, window_blocks, sink, holds);
  const int64_t B = q.size(0), Tq = q.size(1), T = k.size(1), HQ = q.size(2), HK = k.size(2), DV = v.size(3);
  const auto [sequences, bounds] = monotone_sequences(q, B, T, cu_seqlens, on.stream);
  x.in.sequences = sequences;

  const auto make = [&](std::vector<int64_t> size, ScalarType dtype) {
    // Rows that no packed sequence covers stay 0.
    return cu_seqlens ? torch::stable::new_zeros(q, size, dtype) : torch::stable::new_empty(q, size, dtype);
  };
  Tensor o = make({B, Tq, HQ, DV}, q.scalar_type());
  Tensor norms = make({B, HQ, Tq, 2}, accumulator(q));
  std::vector<int64_t> counts{0};
  if (holds || count_fired) counts = {B, HK, T};
  Tensor fired = make(counts, ScalarType::Int);
  std::optional<Tensor> held;  // gone when the op returns
  if (holds) held = torch::stable::new_empty(k, {B, T, HK, k.size(3)});
  x.in.held = view(held, 3);
  x.o = view(o, 3);
  x.norms = norms.data_ptr();

  with_columns(v, int(DV), [&]<class E, int C>() {
    using A = Arithmetic<E>;
    constexpr int rows = kWarps * kRows<A, C>;
    if (holds || count_fired) hold<E>(x.in, held, static_cast<int32_t*>(fired.data_ptr()), on.stream);
    const size_t shared = sizeof(A) * (rows * padded<A>(x.in.D) + kTile * kPitch<A> + rows * kTile);
    const int64_t blocks = Tq ? tile_count(sequences, Tq, rows) * HQ : 0;
    FLA_LAUNCH((forward_kernel<E, C>), grid(blocks), kThreads, shared, on.stream, x);
  });
  return {o, norms, fired};
}

}  // namespace
}  // namespace fla_ops

FLA_OPS_CUDA_IMPL(m) { m.impl("temporal_sparse_attention_forward", TORCH_BOX(&fla_ops::forward)); }
