// SPDX-License-Identifier: Apache-2.0
//
// The delta rule and DeltaProduct on the CPU, torch side: internal asserts (argument checks live in Python), tensors
// to plain views, the parallel loop. A call takes the kernels of its op and the number n of steps a token: 1 for the
// delta rule. The ops are registered in {delta_rule,delta_product}_cpu.cpp.
//
// Both passes are parallel over sequences x value heads, the forward also over blocks of V's columns
// when that alone leaves threads idle. Tasks are independent and handed out one at a time, so neither the number
// of threads nor uneven sequence lengths change any result's bits.
// The kernels are in delta_rule_cpu_{forward,backward,step}.inc, built once per instruction level.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu_tasks.h"
#include "delta_rule_checks.h"
#include "delta_rule_cpu.h"
#include "torch_view.h"

namespace fla_ops::delta_rule_cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::vector<CheckpointedSequence> checkpointed(const std::vector<Sequence>& all) {
  std::vector<CheckpointedSequence> result;
  int64_t checkpoint = 0;
  for (const Sequence& s : all) {
    result.push_back({s, checkpoint});
    checkpoint += ceil_div(s.length, kCheckpointTokens);
  }
  return result;
}

// Zeroes the rows of a contiguous [1, T n, ...] tensor that no packed sequence covers.
void zero_uncovered(Tensor& x, const std::vector<CheckpointedSequence>& packed, int64_t n) {
  if (x.numel() == 0) return;
  const int64_t T = x.size(1) / n, row = x.numel() / T * x.element_size();
  const int64_t first = packed.empty() ? T : packed.front().start;
  const int64_t last = packed.empty() ? T : packed.back().start + packed.back().length;
  char* data = static_cast<char*>(x.data_ptr());
  std::memset(data, 0, first * row);
  std::memset(data + last * row, 0, (T - last) * row);
}

constexpr int64_t kSerialWork = 1 << 17;  // multiply-adds below which a second thread costs more

DeltaRuleForward inputs(int n, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                        const std::optional<Tensor>& g, double scale,
                        const std::optional<Tensor>& initial_state, const Tensor& states,
                        bool qk_l2norm) {
  DeltaRuleForward x{};
  x.q = view(q, 3);
  x.k = view(k, 3);
  x.v = view(v, 3);
  x.beta = view(beta, 3);
  x.g = view(g, 3);
  x.initial_state = view(initial_state, 3);
  x.states = states.dim() == 4 ? static_cast<char*>(states.data_ptr()) : nullptr;
  x.H = q.size(2);
  x.HV = v.size(2);
  x.K = int(q.size(3));
  x.V = int(v.size(3));
  x.n = n;
  x.scale = scale;
  x.qk_l2norm = qk_l2norm;
  return x;
}

std::tuple<Tensor, Tensor, Tensor> forward(const DeltaRuleKernels& run, int n, const Tensor& q,
                                           const Tensor& k, const Tensor& v, const Tensor& beta,
                                           const std::optional<Tensor>& g, double scale,
                                           const std::optional<Tensor>& initial_state,
                                           const std::optional<Tensor>& cu_seqlens, bool qk_l2norm,
                                           bool save_states) {
  check_shapes(q, k, v, beta, g, 2, n);
  const int64_t B = q.size(0), T = q.size(1), K = q.size(3);
  const int64_t HV = v.size(2), V = v.size(3);
  const std::vector<CheckpointedSequence> all = checkpointed(sequences(B, T, cu_seqlens));
  const int64_t N = int64_t(all.size());
  check_state(initial_state, N, HV, K, V);

  const ScalarType state_dtype = accumulator(q);
  Tensor o = torch::stable::new_empty(q, {B, T, HV, V});
  Tensor final_state = torch::stable::new_empty(q, {N, HV, K, V}, state_dtype);
  Tensor states =
      save_states
          ? torch::stable::new_empty(q, {checkpoint_rows(B, T, cu_seqlens), HV, K, V}, state_dtype)
          : torch::stable::new_empty(q, {0}, state_dtype);
  if (cu_seqlens) zero_uncovered(o, all, 1);

  DeltaRuleForward x = inputs(n, q, k, v, beta, g, scale, initial_state, states, qk_l2norm);
  x.o = view(o, 3);
  x.final_state = static_cast<char*>(final_state.data_ptr());

  const bool is_double = state_dtype == ScalarType::Double;
  const int64_t unit = run.value_block(is_double), units = ceil_div(V, unit), heads = N * HV;
  const bool serial = B * T * n * HV * K * V < kSerialWork;
  const int64_t wanted =
      serial || heads == 0 ? 1 : ceil_div(int64_t(torch::stable::get_num_threads()), heads);
  const int64_t width = ceil_div(units, std::min(wanted, units)) * unit;
  const int64_t blocks = ceil_div(V, width);
  parallel_tasks(q, heads * blocks, serial, run.forward_scratch(is_double),
                 [&](int64_t task, void* scratch) {
                   const int64_t head = task / blocks, begin = task % blocks * width;
                   run.forward(x, all[head / HV], head % HV, int(begin),
                               int(std::min(begin + width, V)), scratch);
                 });
  return {o, final_state, states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const DeltaRuleKernels& run, int n, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
    const std::optional<Tensor>& g, double scale, const std::optional<Tensor>& initial_state,
    const std::optional<Tensor>& cu_seqlens, bool qk_l2norm, const Tensor& states,
    const Tensor& d_o, const std::optional<Tensor>& d_final_state, int64_t needs) {
  check_shapes(q, k, v, beta, g, 2, n);
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2), K = q.size(3);
  const int64_t HV = v.size(2), V = v.size(3);
  const std::vector<CheckpointedSequence> all = checkpointed(sequences(B, T, cu_seqlens));
  const int64_t N = int64_t(all.size());
  const ScalarType exact = accumulator(q);
  check_gradients(v, states, checkpoint_rows(B, T, cu_seqlens), K, d_o, n);
  check_state(d_final_state, N, HV, K, V);
  if (!g) needs &= ~kNeedG;
  if (!initial_state) needs &= ~kNeedState;

  const auto make = [&](int bit, std::vector<int64_t> size, ScalarType type) {
    if (!(needs & bit)) size = {0};
    Tensor x = torch::stable::new_empty(q, size, type);
    if (cu_seqlens && (needs & bit) && bit != kNeedState)
      zero_uncovered(x, all, T ? size[1] / T : 1);
    return x;
  };
  const ScalarType type = q.scalar_type();
  Tensor dq = make(kNeedQ, {B, T, H, K}, type), dk = make(kNeedK, {B, T * n, H, K}, type);
  Tensor dv = make(kNeedV, {B, T * n, HV, V}, type);
  Tensor dbeta = make(kNeedBeta, {B, T * n, HV}, beta.scalar_type());
  Tensor dg = make(kNeedG, {B, T, HV}, g ? g->scalar_type() : type);
  Tensor d_initial = make(kNeedState, {N, HV, K, V}, exact);
  // A head group's parts of dq and dk, summed afterwards.
  const bool grouped = HV != H;
  Tensor q_parts = dq, k_parts = dk;
  if (grouped) {
    q_parts = make(kNeedQ, {B, T, HV, K}, exact);
    k_parts = make(kNeedK, {B, T * n, HV, K}, exact);
  }

  DeltaRuleBackward x{};
  x.inputs = inputs(n, q, k, v, beta, g, scale, initial_state, states, qk_l2norm);
  x.d_o = view(d_o, 3);
  x.d_final_state = view(d_final_state, 3);
  x.needs = int(needs);
  if (needs & kNeedQ) x.dq = view(q_parts, 3);
  if (needs & kNeedK) x.dk = view(k_parts, 3);
  if (needs & kNeedV) x.dv = view(dv, 3);
  if (needs & kNeedBeta) x.dbeta = view(dbeta, 3);
  if (needs & kNeedG) x.dg = view(dg, 3);
  if (needs & kNeedState) x.d_initial_state = static_cast<char*>(d_initial.data_ptr());

  const bool is_double = exact == ScalarType::Double;
  const bool serial = B * T * n * HV * K * V < kSerialWork;
  parallel_tasks(q, N * HV, serial, run.backward_scratch(is_double, n, int(K), int(V)),
                 [&](int64_t task, void* scratch) {
                   run.backward(x, all[task / HV], task % HV, scratch);
                 });
  const auto sum_group = [&](int bit, const Tensor& parts, Tensor& out) {
    if (!grouped || !(needs & bit)) return;
    const HeadSum sum{static_cast<const char*>(parts.data_ptr()),
                      static_cast<char*>(out.data_ptr()), type_of(out), H, HV / H, int(K)};
    const auto range = [&](int64_t begin, int64_t end) { run.sum_heads(sum, begin, end); };
    const int64_t rows = out.size(0) * out.size(1);
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kSerialWork / (HV * K)), range);
  };
  sum_group(kNeedQ, q_parts, dq);
  sum_group(kNeedK, k_parts, dk);
  return {dq, dk, dv, dbeta, dg, d_initial};
}

// k, v and beta are [B, n, heads, ...] if `micro`, else [B, heads, ...].
Tensor step(const DeltaRuleKernels& run, bool micro, const Tensor& q, const Tensor& k,
            const Tensor& v, const Tensor& beta, const std::optional<Tensor>& g, Tensor state,
            double scale, bool qk_l2norm, const std::optional<Tensor>& state_indices) {
  const int n = micro ? int(k.size(1)) : 1, heads = micro ? 2 : 1;
  check_step_shapes(q, k, v, beta, g, micro);
  const int64_t B = q.size(0), H = q.size(1), K = q.size(2), HV = v.size(heads);
  const int64_t V = v.size(heads + 1);
  check_slots(q, HV, V, state, state_indices);
  Tensor o = torch::stable::new_empty(q, {B, HV, V});

  // The strides of B and heads, that of n apart.
  const auto tokens = [&](const Tensor& x, int64_t& stride) {
    View result = view(x, heads + 1);
    stride = micro ? result.stride[1] : 0;
    result.stride[1] = result.stride[heads];
    return result;
  };
  DeltaRuleStep x{};
  x.q = view(q, 2);
  x.k = tokens(k, x.k_micro);
  x.v = tokens(v, x.v_micro);
  x.beta = tokens(beta, x.beta_micro);
  x.g = view(g, 2);
  x.state = view(state, 3);
  x.o = view(o, 2);
  x.H = H;
  x.HV = HV;
  x.K = int(K);
  x.V = int(V);
  x.n = n;
  x.scale = scale;
  x.qk_l2norm = qk_l2norm;

  const int64_t slots = state.size(0), grain = std::max<int64_t>(1, kSerialWork / (n * K * V));
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t batch = i / HV;
      const int64_t slot = state_indices ? integer_at(*state_indices, batch) : batch;
      run.step(x, batch, slot >= 0 && slot < slots ? slot : -1, i % HV);
    }
  };
  if (B * HV <= grain) range(0, B * HV);
  else torch::stable::parallel_for(0, B * HV, grain, range);
  return o;
}

}  // namespace
}  // namespace fla_ops::delta_rule_cpu
