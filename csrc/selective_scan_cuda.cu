// SPDX-License-Identifier: Apache-2.0
//
// Mamba's selective scan on CUDA, the fallback where Triton is not: forward and step. The gradients are in
// selective_scan_backward_cuda.cu.
//
//   step_t = softplus(delta_t + delta_bias)
//   h_t = exp(step_t A) h_{t-1} + step_t u_t B_t,   y_t = (C_t . h_t + D u_t) silu(z_t)
//
// Parallel over sequences x channels; a few lanes of a warp share a channel, R of its states in the registers of each,
// and walk its sequence step by step. y_t is summed over the lanes by shuffles; nothing else passes between threads. A
// step is the same walk over one token, from and to a slot of the caller's states.
//
// To check first when a result is wrong: which states a lane holds, n = lane + lanes * r.
#include <tuple>

#include "selective_scan_cuda.h"

namespace fla_ops {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 128;

struct ScanWalk {
  ScanInputs in;
  View y;              // [B, Di, L]
  View final_state;    // [sequences or slots, Di, N]; may be in.initial_state
  View checkpoints;    // [rows, Di, N]: the state before every 64th step; data may be null
  Integers slots;      // [B] or absent: the state of sequence i is number slots[i]
  int64_t slot_count;  // a slot outside of [0, slot_count) skips the sequence
  int lanes;           // of a channel
};

template <class A, int R> __global__ void __launch_bounds__(kThreads) walk_kernel(ScanWalk x) {
  const ScanInputs& in = x.in;
  const int channels = kThreads / x.lanes, lane = threadIdx.x % x.lanes, N = in.N;
  const int64_t tiles = (in.Di + channels - 1) / channels;
  const int64_t d = blockIdx.x % tiles * channels + threadIdx.x / x.lanes;
  if (d >= in.Di) return;  // all lanes of a channel together
  const Span span = in.sequences[blockIdx.x / tiles];
  const int64_t b = span.batch, index = x.slots.data ? x.slots[span.index] : span.index;
  if (index < 0 || index >= x.slot_count) {
    for (int64_t t = span.start; t < span.end; t++)
      if (lane == 0) store(x.y, offset_of(x.y, b, d, t), A(0));
    return;
  }

  A h[R], a[R];
  int64_t of_b[R], of_c[R];  // where B and C of time 0 are
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int n = lane + x.lanes * r;
    h[r] = a[r] = 0;
    of_b[r] = of_c[r] = 0;
    if (n >= N) continue;
    a[r] = load<A>(in.A, offset_of(in.A, d, n));
    of_b[r] = in.B.first(b, d, n);
    of_c[r] = in.C.first(b, d, n);
    if (in.initial_state.data) h[r] = load<A>(in.initial_state, offset_of(in.initial_state, index, d, n));
  }
  const auto save = [&](const View& to, int64_t row) {
#pragma unroll
    for (int r = 0; r < R; r++)
      if (lane + x.lanes * r < N) store(to, offset_of(to, row, d, lane + x.lanes * r), h[r]);
  };
  const A skip = in.D.data ? load<A>(in.D, offset_of(in.D, d)) : A(0);
  const int64_t checkpoint = first_checkpoint(in.sequences, span);

  for (int64_t t = span.start; t < span.end; t++) {
    const int64_t done = t - span.start;
    if (x.checkpoints.data && done % kBlockSteps == 0) save(x.checkpoints, checkpoint + done / kBlockSteps);
    const A step = step_size<A>(in, b, d, t), u = load<A>(in.u, offset_of(in.u, b, d, t));
    A y = 0;
#pragma unroll
    for (int r = 0; r < R; r++)
      if (lane + x.lanes * r < N) {
        h[r] = decayed(h[r], step * a[r]) + step * u * load<A>(in.B.at, of_b[r] + t * in.B.time_stride);
        y += h[r] * load<A>(in.C.at, of_c[r] + t * in.C.time_stride);
      }
    y = sum_lanes(y, x.lanes);
    if (lane > 0) continue;
    if (in.D.data) y += skip * u;
    if (in.z.data) {
      const A z = load<A>(in.z, offset_of(in.z, b, d, t));
      y *= z * sigmoid(z);
    }
    store(x.y, offset_of(x.y, b, d, t), y);
  }
  save(x.final_state, index);
}

void run(ScanWalk x, const Tensor& u, Stream stream) {
  with_arithmetic(u, [&]<class A>() {
    const auto launch_with = [&]<int R>() {
      x.lanes = lanes_for(int(ceil_div(x.in.N, R)));
      const int64_t tiles = ceil_div(x.in.Di, kThreads / x.lanes);
      FLA_LAUNCH((walk_kernel<A, R>), grid(x.in.sequences.count * tiles), kThreads, 0, stream, x);
    };
    if (x.in.N <= 4 * 32) launch_with.template operator()<4>();
    else launch_with.template operator()<8>();
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                           const Tensor& C, const std::optional<Tensor>& D,
                                           const std::optional<Tensor>& z, const std::optional<Tensor>& delta_bias,
                                           const std::optional<Tensor>& initial_state,
                                           const std::optional<Tensor>& cu_seqlens, bool delta_softplus,
                                           bool save_states) {
  const OnDevice on(u);
  ScanWalk x{};
  x.in = inputs_on_device(u, delta, A, B, C, D, z, delta_bias, delta_softplus, false);
  const auto [sequences, bounds] = monotone_sequences(u, u.size(0), u.size(2), cu_seqlens, on.stream);
  x.in.sequences = sequences;
  check_state(x.in, initial_state);

  const int64_t count = x.slot_count = sequences.count, Di = x.in.Di, N = x.in.N;
  Tensor y = empty_or_zeros(u, cu_seqlens.has_value());
  Tensor final_state = torch::stable::new_empty(u, {count, Di, N}, accumulator(u));
  Tensor states = save_states ? torch::stable::new_empty(u, {checkpoint_rows(u.size(0), u.size(2), cu_seqlens), Di, N},
                                                         accumulator(u))
                              : torch::stable::new_empty(u, {0}, accumulator(u));
  x.in.initial_state = view(initial_state, 3);
  if (save_states) x.checkpoints = view(states, 3);
  x.y = view(y, 3);
  x.final_state = view(final_state, 3);
  run(x, u, on.stream);
  return {y, final_state, states};
}

Tensor step(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
            const std::optional<Tensor>& D, const std::optional<Tensor>& z, const std::optional<Tensor>& delta_bias,
            Tensor state, bool delta_softplus, const std::optional<Tensor>& state_indices) {
  const OnDevice on(u);
  ScanWalk x{};
  x.in = inputs_on_device(u, delta, A, B, C, D, z, delta_bias, delta_softplus, true);
  x.in.sequences = sequences_on_device(u.size(0), 1, std::nullopt);
  x.slot_count = state.size(0);
  STD_TORCH_CHECK(state.dim() == 3 && state.size(1) == x.in.Di && state.size(2) == x.in.N &&
                      (state_indices || state.size(0) >= u.size(0)) &&
                      (!state_indices || (state_indices->dim() == 1 && state_indices->size(0) == u.size(0))),
                  "selective_scan_step: state must be [slots, Di, N], state_indices [B]");
  Tensor y = torch::stable::empty_like(u);
  x.in.initial_state = x.final_state = view(state, 3);
  x.y = view(y, 2);
  x.slots = integers(state_indices);
  run(x, u, on.stream);
  return y;
}

}  // namespace
}  // namespace fla_ops

FLA_OPS_CUDA_IMPL(m) {
  m.impl("selective_scan_forward", TORCH_BOX(&fla_ops::forward));
  m.impl("selective_scan_step", TORCH_BOX(&fla_ops::step));
}
