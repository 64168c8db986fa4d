// SPDX-License-Identifier: Apache-2.0
//
// DeltaProduct for CUDA, the fallback where Triton is not: forward and step. delta_rule_cuda.h says how a warp holds its
// columns of the state; the gradients are in delta_product_backward_cuda.cu.
//
// Parallel over sequences x value heads x groups of columns; a warp walks its sequence token by token:
//   S <- e^g S,  n times: u = beta (v - S^T k), S <- S + k u^T;  o = scale S^T q
// A step is the same walk over one token, from and to a slot of the caller's states.
#include <tuple>

#include "delta_product_cuda.h"

namespace fla_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWarps = 4;  // a block; they do not meet

struct DeltaProductWalk {
  DeltaProductInputs x;
  View o;              // [B, T, HV, V]
  View final_state;    // [N or slots, HV, K, V]; may be the initial state
  Integers slots;      // [N] or absent: the state of sequence n is number slots[n]
  int64_t slot_count;  // a slot outside of [0, slot_count) skips the sequence
};

template <class A, int R> __global__ void __launch_bounds__(32 * kWarps) product_walk_kernel(DeltaProductWalk walk) {
  constexpr int C = kColumns<A, R>;
  const DeltaRuleInputs& in = walk.x.in;
  const int n = walk.x.n;
  const Place p = find_place<C>(in);
  const int64_t first = offset_of(walk.o, p.span.batch, 0, p.head) + p.column;

  const int64_t index = walk.slots.data ? walk.slots[p.span.index] : p.span.index;
  if (index < 0 || index >= walk.slot_count) {
    for (int64_t t = p.span.start; t < p.span.end; t++)
      if (p.lane < p.columns) store(walk.o, first + t * walk.o.stride[1] + p.lane, A(0));
    return;
  }
  A state[R][C];
  load_state(state, in.initial_state, index, p, in.K);
  for (int64_t t = p.span.start; t < p.span.end; t++) {
    const int64_t done = t - p.span.start;
    if (in.checkpoints.data && done % kCheckpointTokens == 0)
      store_state(state, in.checkpoints, p.first_checkpoint + done / kCheckpointTokens, p, in.K);
    Token<A, R, C> token;
    for (int j = 0; j < n; j++) {
      read_step(token, walk.x, t, j, p);
      read_columns(token.y, in.v, t * n + j, p);
      A u[C];
      decay_and_compare(state, u, token, p, in.K);
      FLA_UNROLL for (int c = 0; c < C; c++) u[c] *= token.beta;
      FLA_UNROLL for (int i = 0; i < R; i++)
        if (p.row(i) < in.K) {
          FLA_UNROLL for (int c = 0; c < C; c++) state[i][c] += token.k[i] * u[c];
        }
    }
    read_row(token.q, in.q, t, in, p);
    A sums[C];
    FLA_UNROLL for (int c = 0; c < C; c++) sums[c] = 0;
    FLA_UNROLL for (int i = 0; i < R; i++)
      if (p.row(i) < in.K) {
        FLA_UNROLL for (int c = 0; c < C; c++) sums[c] += state[i][c] * token.q[i];
      }
    const A sum = sum_columns(sums, p.lane);
    const int c = owned_column<C>(p.lane);
    if (is_owner<C>(p.lane) && c < p.columns) store(walk.o, first + t * walk.o.stride[1] + c, A(in.scale) * sum);
  }
  store_state(state, walk.final_state, index, p, in.K);
}

void run(const DeltaProductWalk& walk, const Tensor& q) {
  const OnDevice on(q);
  with_arithmetic(q, walk.x.in.K, [&]<class A, int R>() {
    const Columns columns(walk.x.in.V, kColumns<A, R>, kWarps);
    DeltaProductWalk here = walk;
    here.x.in.tiles = columns.tiles;
    const unsigned blocks = columns.blocks(here.x.in.sequences.count * here.x.in.HV), threads = 32 * columns.warps;
    FLA_LAUNCH((product_walk_kernel<A, R>), blocks, threads, 0, on.stream, here);
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                                           const std::optional<Tensor>& g, int64_t num_householder, double scale,
                                           const std::optional<Tensor>& initial_state,
                                           const std::optional<Tensor>& cu_seqlens, bool qk_l2norm, bool save_states) {
  check_shapes(q, k, v, beta, g, 2, num_householder);
  const int64_t B = q.size(0), T = q.size(1), K = q.size(3), HV = v.size(2), V = v.size(3);
  DeltaProductWalk walk{};
  walk.x = product_inputs(q, k, v, beta, g, num_householder, scale, qk_l2norm);
  DeltaRuleInputs& in = walk.x.in;
  in.sequences = sequences_on_device(B, T, cu_seqlens);
  const int64_t N = walk.slot_count = in.sequences.count;
  check_state(initial_state, N, HV, K, V);

  const ScalarType exact = accumulator(q);
  // Rows that no packed sequence covers stay 0.
  Tensor o = cu_seqlens ? torch::stable::new_zeros(q, {B, T, HV, V}) : torch::stable::new_empty(q, {B, T, HV, V});
  Tensor final_state = torch::stable::new_empty(q, {N, HV, K, V}, exact);
  Tensor states = save_states ? torch::stable::new_empty(q, {checkpoint_rows(B, T, cu_seqlens), HV, K, V}, exact)
                              : torch::stable::new_empty(q, {0}, exact);
  in.initial_state = view(initial_state, 3);
  if (save_states) in.checkpoints = view(states, 3);
  walk.o = view(o, 3);
  walk.final_state = view(final_state, 3);
  run(walk, q);
  return {o, final_state, states};
}

Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta, const std::optional<Tensor>& g,
            Tensor state, double scale, bool qk_l2norm, const std::optional<Tensor>& state_indices) {
  check_step_shapes(q, k, v, beta, g, true);
  check_slots(q, v.size(2), v.size(3), state, state_indices);
  Tensor o = torch::stable::new_empty(q, {v.size(0), v.size(2), v.size(3)});
  DeltaProductWalk walk{};
  walk.x = product_inputs(q, k, v, beta, g, k.size(1), scale, qk_l2norm);
  walk.x.in.sequences = sequences_on_device(q.size(0), 1, std::nullopt);
  walk.x.in.initial_state = walk.final_state = view(state, 3);
  walk.o = token_view(o, 1);
  walk.slots = integers(state_indices);
  walk.slot_count = state.size(0);
  run(walk, q);
  return o;
}

}  // namespace
}  // namespace fla_ops

FLA_OPS_CUDA_IMPL(m) {
  m.impl("delta_product_forward", TORCH_BOX(&fla_ops::forward));
  m.impl("delta_product_step", TORCH_BOX(&fla_ops::step));
}
