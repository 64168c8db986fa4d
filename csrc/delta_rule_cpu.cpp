// SPDX-License-Identifier: Apache-2.0
//
// The delta rule on the CPU: the ops of delta_rule_cpu_calls.h with one step a token, registered.
#include <torch/csrc/stable/library.h>

#include "cpu_level.h"
#include "delta_rule_cpu_calls.h"

namespace fla_ops {
namespace {

using torch::stable::Tensor;

const DeltaRuleKernels& kernels() {
#if FLA_OPS_X86
  if (cpu_level() == kAvx512) return avx512::delta_rule;
  if (cpu_level() == kAvx2) return avx2::delta_rule;
#endif
  return base::delta_rule;
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
    const std::optional<Tensor>& g, double scale, const std::optional<Tensor>& initial_state,
    const std::optional<Tensor>& cu_seqlens, bool qk_l2norm, bool save_states) {
  return delta_rule_cpu::forward(kernels(), 1, q, k, v, beta, g, scale, initial_state, cu_seqlens,
                                 qk_l2norm, save_states);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
    const std::optional<Tensor>& g, double scale, const std::optional<Tensor>& initial_state,
    const std::optional<Tensor>& cu_seqlens, bool qk_l2norm, const Tensor& states,
    const Tensor& d_o, const std::optional<Tensor>& d_final_state, int64_t needs) {
  return delta_rule_cpu::backward(kernels(), 1, q, k, v, beta, g, scale, initial_state, cu_seqlens,
                                  qk_l2norm, states, d_o, d_final_state, needs);
}

Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
            const std::optional<Tensor>& g, Tensor state, double scale, bool qk_l2norm,
            const std::optional<Tensor>& state_indices) {
  return delta_rule_cpu::step(kernels(), false, q, k, v, beta, g, state, scale, qk_l2norm,
                              state_indices);
}

}  // namespace
}  // namespace fla_ops

STABLE_TORCH_LIBRARY_IMPL(fla_ops, CPU, m) {
  m.impl("delta_rule_forward", TORCH_BOX(&fla_ops::forward));
  m.impl("delta_rule_backward", TORCH_BOX(&fla_ops::backward));
  m.impl("delta_rule_step", TORCH_BOX(&fla_ops::step));
}
