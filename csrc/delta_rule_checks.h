// SPDX-License-Identifier: Apache-2.0
//
// Internal asserts of the delta rule's ops; what users get wrong is checked in Python. For the torch side of an op.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "delta_rule.h"
#include "torch_view.h"

namespace fla_ops {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of the saved states, an upper bound for packed sequences.
inline int64_t checkpoint_rows(int64_t B, int64_t T, const std::optional<torch::stable::Tensor>& cu_seqlens) {
  if (!cu_seqlens) return B * ceil_div(T, kCheckpointTokens);
  return ceil_div(T, kCheckpointTokens) + cu_seqlens->size(0) - 1;
}

// `outer` is 2 for sequences [B, T, ...], 1 for a step [B, ...]. k, v and beta have `n` times as many rows.
inline void check_shapes(const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                         const torch::stable::Tensor& beta, const std::optional<torch::stable::Tensor>& g, int outer,
                         int64_t n = 1) {
  STD_TORCH_CHECK(q.dim() == outer + 2 && k.dim() == outer + 2 && v.dim() == outer + 2 && beta.dim() == outer + 1 &&
                      (!g || g->dim() == outer + 1),
                  "delta_rule: wrong number of dimensions");
  for (int i = 0; i < outer; i++) {
    const int64_t rows = q.size(i) * (i == 1 ? n : 1);
    STD_TORCH_CHECK(rows == k.size(i) && rows == v.size(i) && rows == beta.size(i) && (!g || q.size(i) == g->size(i)),
                    "delta_rule: batch or time sizes differ");
  }
  const int64_t H = q.size(outer), HV = v.size(outer), K = q.size(outer + 1), V = v.size(outer + 1);
  STD_TORCH_CHECK(k.size(outer) == H && k.size(outer + 1) == K && beta.size(outer) == HV &&
                      (!g || g->size(outer) == HV) && H > 0 && HV % H == 0,
                  "delta_rule: head counts or dimensions differ");
  STD_TORCH_CHECK(K >= 1 && K <= kMaxHeadDim && V >= 1 && V <= kMaxHeadDim, "delta_rule: K and V must be 1 to ",
                  kMaxHeadDim);
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                  "delta_rule: q, k and v must share a dtype");
}

// A step: k, v and beta are [B, n, ...] if `micro`.
inline void check_step_shapes(const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                              const torch::stable::Tensor& v, const torch::stable::Tensor& beta,
                              const std::optional<torch::stable::Tensor>& g, bool micro) {
  if (!micro) return check_shapes(q, k, v, beta, g, 1);
  STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4 && beta.dim() == 3 && k.size(1) == v.size(1) && k.size(1) == beta.size(1),
                  "delta_product_step: k, v and beta must be [B, n, heads, ...]");
  const auto first = [](const torch::stable::Tensor& x) { return torch::stable::select(x, 1, 0); };
  check_shapes(q, first(k), first(v), first(beta), g, 1);
}

// A state, or the gradient of one.
inline void check_state(const std::optional<torch::stable::Tensor>& x, int64_t N, int64_t HV, int64_t K, int64_t V) {
  STD_TORCH_CHECK(!x || (x->dim() == 4 && x->size(0) == N && x->size(1) == HV && x->size(2) == K && x->size(3) == V),
                  "delta_rule: a state must be [N, HV, K, V]");
}

// What the backward gets beside the forward's inputs.
inline void check_gradients(const torch::stable::Tensor& v, const torch::stable::Tensor& states, int64_t rows,
                            int64_t K, const torch::stable::Tensor& d_o, int64_t n = 1) {
  STD_TORCH_CHECK(states.dim() == 4 && states.size(0) == rows && states.size(1) == v.size(2) && states.size(2) == K &&
                      states.size(3) == v.size(3) && states.scalar_type() == accumulator(v) && states.is_contiguous(),
                  "delta_rule: states must be what the forward saved");
  STD_TORCH_CHECK(d_o.dim() == 4 && d_o.size(0) == v.size(0) && d_o.size(1) * n == v.size(1) && d_o.size(2) == v.size(2) &&
                      d_o.size(3) == v.size(3) && d_o.scalar_type() == v.scalar_type(),
                  "delta_rule: the gradient of o must have its shape and dtype");
}

// The state that a step writes.
inline void check_slots(const torch::stable::Tensor& q, int64_t HV, int64_t V, const torch::stable::Tensor& state,
                        const std::optional<torch::stable::Tensor>& indices) {
  STD_TORCH_CHECK(state.dim() == 4 && state.size(1) == HV && state.size(2) == q.size(2) &&
                      state.size(3) == V && (indices || state.size(0) >= q.size(0)),
                  "delta_rule_step: state must be [slots, HV, K, V]");
  STD_TORCH_CHECK(!indices || (indices->dim() == 1 && indices->size(0) == q.size(0)),
                  "delta_rule_step: state_indices must be [B]");
}

}  // namespace fla_ops
