// SPDX-License-Identifier: Apache-2.0
//
// The schemas of every native op. CPU and CUDA kernels share them, told apart by their dispatch key.
#pragma once

#include <torch/csrc/stable/library.h>

namespace fla_ops {

inline void define_ops(torch::stable::detail::StableLibrary& m) {
  m.def(
      "causal_conv1d_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, "
      "Tensor? cu_seqlens, bool silu) -> (Tensor y, Tensor final_state)");
  m.def(
      "causal_conv1d_backward(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, "
      "Tensor? cu_seqlens, bool silu, Tensor dy, Tensor? dfinal_state, int needs) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)");
  m.def(
      "causal_conv1d_step(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, bool silu, "
      "Tensor? state_indices) -> Tensor");
  m.def("decode_attention(Tensor q, Tensor k, Tensor v, Tensor? lengths, float scale) -> Tensor");
  m.def("delta_kv_cache_room(Tensor like, int[] size) -> Tensor");
  // state: [B, 3], where the recent keys start, how many keys are sealed, how many there are. A record's place is where
  // it starts and its bytes. See delta_kv_cache_cpu.h.
  m.def(
      "delta_kv_cache_seal(Tensor recent, Tensor state, int[] blocks, Tensor threshold, Tensor(a!) hold) "
      "-> (Tensor records, Tensor places)");
  m.def(
      "delta_kv_cache_attend(Tensor q, Tensor records, Tensor places, Tensor recent, Tensor values, Tensor sinks, "
      "Tensor hold, Tensor threshold, Tensor state, Tensor positions, int window, bool blocks, float scale) -> Tensor");
  m.def(
      "delta_kv_cache_held(Tensor records, Tensor places, Tensor recent, Tensor hold, Tensor threshold, Tensor state) "
      "-> Tensor");
  m.def(
      "delta_product_forward(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, int num_householder, float scale, "
      "Tensor? initial_state, Tensor? cu_seqlens, bool qk_l2norm, bool save_states) "
      "-> (Tensor o, Tensor final_state, Tensor states)");
  // needs: as for delta_rule_backward.
  m.def(
      "delta_product_backward(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, int num_householder, float scale, "
      "Tensor? initial_state, Tensor? cu_seqlens, bool qk_l2norm, Tensor states, Tensor do, "
      "Tensor? dfinal_state, int needs) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbeta, "
      "Tensor dg, Tensor dinitial_state)");
  m.def(
      "delta_product_step(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor(a!) state, "
      "float scale, bool qk_l2norm, Tensor? state_indices) -> Tensor");
  m.def(
      "delta_rule_forward(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, float scale, "
      "Tensor? initial_state, Tensor? cu_seqlens, bool qk_l2norm, bool save_states) "
      "-> (Tensor o, Tensor final_state, Tensor states)");
  // needs: which gradients to compute, 1 q, 2 k, 4 v, 8 beta, 16 g, 32 initial_state.
  m.def(
      "delta_rule_backward(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, float scale, "
      "Tensor? initial_state, Tensor? cu_seqlens, bool qk_l2norm, Tensor states, Tensor do, "
      "Tensor? dfinal_state, int needs) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbeta, "
      "Tensor dg, Tensor dinitial_state)");
  m.def(
      "delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor(a!) state, "
      "float scale, bool qk_l2norm, Tensor? state_indices) -> Tensor");
  m.def(
      "selective_scan_forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, bool delta_softplus, bool save_states) "
      "-> (Tensor y, Tensor final_state, Tensor states)");
  // needs: which gradients to compute, bit i for the i-th of the results.
  m.def(
      "selective_scan_backward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, bool delta_softplus, Tensor states, Tensor dy, "
      "Tensor? dfinal_state, int needs) -> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, "
      "Tensor dz, Tensor ddelta_bias, Tensor dinitial_state)");
  m.def(
      "selective_scan_step(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, Tensor(a!) state, bool delta_softplus, Tensor? state_indices) -> Tensor");
  // holds: whether any score takes a held key. fired [B, HK, T] is empty unless it does, or count_fired.
  m.def(
      "temporal_sparse_attention_forward(Tensor q, Tensor k, Tensor v, Tensor threshold, Tensor? cu_seqlens, "
      "float scale, int window, bool window_blocks, int sink, bool holds, bool count_fired) "
      "-> (Tensor o, Tensor norms, Tensor fired)");
  // needs: 1 q, 2 k, 4 v.
  m.def(
      "temporal_sparse_attention_backward(Tensor q, Tensor k, Tensor v, Tensor threshold, Tensor? cu_seqlens, "
      "float scale, int window, bool window_blocks, int sink, bool holds, Tensor o, Tensor norms, Tensor do, int needs) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");
}

}  // namespace fla_ops
