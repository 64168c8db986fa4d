// SPDX-License-Identifier: Apache-2.0
//
// The delta rule for CUDA, the fallback where Triton is not: forward and step. delta_rule_cuda.h says how a warp holds
// its columns of the state; the gradients are in delta_rule_backward_cuda.cu.
//
// Parallel over sequences x value heads x groups of columns; a warp walks its sequence token by token:
//   S <- e^g S,  u = beta (v - S^T k),  S <- S + k u^T,  o = scale S^T q
// A step is the same walk over one token, from and to a slot of the caller's states.
#include <tuple>

#include "delta_rule_cuda.h"

namespace fla_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWarps = 4;  // a block; they do not meet

struct DeltaRuleWalk {
  DeltaRuleInputs in;
  View o;              // [B, T, HV, V]
  View final_state;    // [N or slots, HV, K, V]; may be in.initial_state
  Integers slots;      // [N] or absent: the state of sequence n is number slots[n]
  int64_t slot_count;  // a slot outside of [0, slot_count) skips the sequence
};

template <class T, int R> __global__ void __launch_bounds__(32 * kWarps) walk_kernel(DeltaRuleWalk x) {
  using A = Arithmetic<T>;
  constexpr int C = kColumns<A, R>;
  const DeltaRuleInputs& in = x.in;
  const Place p = find_place<C>(in);
  T* const o = reinterpret_cast<T*>(x.o.data) + offset_of(x.o, p.span.batch, 0, p.head) + p.column;

  const int64_t index = x.slots.data ? x.slots[p.span.index] : p.span.index;
  if (index < 0 || index >= x.slot_count) {
    for (int64_t t = p.span.start; t < p.span.end; t++)
      if (p.lane < p.columns) o[t * x.o.stride[1] + p.lane] = T(0);
    return;
  }
  A state[R][C];
  load_state(state, in.initial_state, index, p, in.K);
  RawToken<T, R, C> next;
  if (p.span.start < p.span.end) next.read(in, in.v, p, p.span.start);
  for (int64_t t = p.span.start; t < p.span.end; t++) {
    const int64_t done = t - p.span.start;
    if (in.checkpoints.data && done % kCheckpointTokens == 0)
      store_state(state, in.checkpoints, p.first_checkpoint + done / kCheckpointTokens, p, in.K);
    const Token<A, R, C> token(next, in);
    if (t + 1 < p.span.end) next.read(in, in.v, p, t + 1);

    A u[C], sums[C];
    decay_and_compare(state, u, token, p, in.K);
    FLA_UNROLL for (int c = 0; c < C; c++) {
      u[c] *= token.beta;
      sums[c] = 0;
    }
    FLA_UNROLL for (int j = 0; j < R; j++)
      if (p.row(j) < in.K) {
        FLA_UNROLL for (int c = 0; c < C; c++) {
          state[j][c] += token.k[j] * u[c];
          sums[c] += state[j][c] * token.q[j];
        }
      }
    const A sum = sum_columns(sums, p.lane);
    const int c = owned_column<C>(p.lane);
    if (is_owner<C>(p.lane) && c < p.columns) o[t * x.o.stride[1] + c] = narrow<T>(A(in.scale) * sum);
  }
  store_state(state, x.final_state, index, p, in.K);
}

void run(const DeltaRuleWalk& walk, const Tensor& q) {
  const OnDevice on(q);
  with_rows(q, walk.in.K, [&]<class T, int R>() {
    const Columns columns(walk.in.V, kColumns<Arithmetic<T>, R>, kWarps);
    DeltaRuleWalk x = walk;
    x.in.tiles = columns.tiles;
    const unsigned blocks = columns.blocks(x.in.sequences.count * x.in.HV), threads = 32 * columns.warps;
    FLA_LAUNCH((walk_kernel<T, R>), blocks, threads, 0, on.stream, x);
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                                           const std::optional<Tensor>& g, double scale,
                                           const std::optional<Tensor>& initial_state,
                                           const std::optional<Tensor>& cu_seqlens, bool qk_l2norm, bool save_states) {
  check_shapes(q, k, v, beta, g, 2);
  const int64_t B = q.size(0), T = q.size(1), K = q.size(3), HV = v.size(2), V = v.size(3);
  DeltaRuleWalk x{};
  x.in = inputs_on_device(q, k, v, beta, g, scale, qk_l2norm);
  x.in.sequences = sequences_on_device(B, T, cu_seqlens);
  const int64_t N = x.slot_count = x.in.sequences.count;
  check_state(initial_state, N, HV, K, V);

  const ScalarType exact = accumulator(q);
  // Rows that no packed sequence covers stay 0.
  Tensor o = cu_seqlens ? torch::stable::new_zeros(q, {B, T, HV, V}) : torch::stable::new_empty(q, {B, T, HV, V});
  Tensor final_state = torch::stable::new_empty(q, {N, HV, K, V}, exact);
  Tensor states = save_states ? torch::stable::new_empty(q, {checkpoint_rows(B, T, cu_seqlens), HV, K, V}, exact)
                              : torch::stable::new_empty(q, {0}, exact);
  x.in.initial_state = view(initial_state, 3);
  if (save_states) x.in.checkpoints = view(states, 3);
  x.o = view(o, 3);
  x.final_state = view(final_state, 3);
  run(x, q);
  return {o, final_state, states};
}

Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta, const std::optional<Tensor>& g,
            Tensor state, double scale, bool qk_l2norm, const std::optional<Tensor>& state_indices) {
  check_shapes(q, k, v, beta, g, 1);
  check_slots(q, v.size(1), v.size(2), state, state_indices);
  Tensor o = torch::stable::new_empty(q, {v.size(0), v.size(1), v.size(2)});
  DeltaRuleWalk x{};
  x.in = inputs_on_device(q, k, v, beta, g, scale, qk_l2norm);
  x.in.sequences = sequences_on_device(q.size(0), 1, std::nullopt);
  x.in.initial_state = x.final_state = view(state, 3);
  x.o = token_view(o, 1);
  x.slots = integers(state_indices);
  x.slot_count = state.size(0);
  run(x, q);
  return o;
}

}  // namespace
}  // namespace fla_ops

FLA_OPS_CUDA_IMPL(m) {
  m.impl("delta_rule_forward", TORCH_BOX(&fla_ops::forward));
  m.impl("delta_rule_step", TORCH_BOX(&fla_ops::step));
}
