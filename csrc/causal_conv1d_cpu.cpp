// SPDX-License-Identifier: Apache-2.0
//
// The causal convolution on the CPU, torch side: internal asserts (argument checks live in Python),
// tensors to plain views, the parallel loop, registration.
//
// Unit stride over time: a task is a channel of a batch entry. Unit stride over channels: a task is
// up to kConvChunk tokens of a sequence, cut into groups of channels when there are few of them.
// The backward's parameter sums are kept by part, a fixed set of tasks that one thread does in order,
// and the parts are added in order: the number of threads changes no result's bits.
// The kernels are in causal_conv1d_cpu.inc, built once per instruction level.
#include "causal_conv1d_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "causal_conv1d_layout.h"
#include "cpu_level.h"
#include "torch_view.h"

namespace fla_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSerialElements = 1 << 14;  // below this a second thread costs more than it does
constexpr int64_t kChannelGroup = 256;        // channels of a task where chunks are few; a multiple of 64
constexpr int64_t kFewChunks = 16;
constexpr int64_t kMaxParts = 64;

const CausalConv1dKernels& kernels() {
#if FLA_OPS_X86
  if (cpu_level() == kAvx512) return avx512::causal_conv1d;
  if (cpu_level() == kAvx2) return avx2::causal_conv1d;
#endif
  return base::causal_conv1d;
}

bool covers(const std::vector<Sequence>& all, int64_t L) {
  return all.empty() ? L == 0 : all.front().start == 0 && all.back().start + all.back().length == L;
}

// At least one chunk a sequence: an empty one has states too.
std::vector<ConvChunk> chunks(const std::vector<Sequence>& all) {
  std::vector<ConvChunk> result;
  for (const Sequence& s : all)
    for (int64_t begin = 0; begin == 0 || begin < s.length; begin += kConvChunk)
      result.push_back({s, begin, std::min(begin + kConvChunk, s.length)});
  return result;
}

// Calls task(i) for i in [0, tasks), in parallel if there is enough work.
template <class F> void parallel_tasks(int64_t tasks, int64_t elements, const F& task) {
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) task(i);
  };
  if (elements < kSerialElements || tasks <= 1) return range(0, tasks);
  torch::stable::parallel_for(0, tasks, 1, range);
}

// What forward and backward share: the sequences, x and the taps.
struct Problem {
  CausalConv1d c{};
  int64_t B, D, L, N, elements;
  bool last, is_double;
  std::vector<Sequence> all;
  Tensor taps;
  const CausalConv1dKernels& run = kernels();

  Problem(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
          const std::optional<Tensor>& initial_state, const std::optional<Tensor>& cu_seqlens, bool silu)
      : B(x.size(0)), D(x.size(1)), L(x.size(2)), taps(x) {
    const int W = int(weight.size(1));
    STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2 && weight.size(0) == D && W >= 1 && W <= kMaxConvWidth &&
                        (!bias || (bias->dim() == 1 && bias->size(0) == D)),
                    "causal_conv1d: x must be [B, D, L], weight [D, W] with W from 1 to 8, bias [D]");
    elements = B * D * L;
    STD_TORCH_CHECK(elements == 0 || unit_stride(x, 1) || unit_stride(x, 2),
                    "causal_conv1d: x needs unit stride over D or L");
    all = sequences(B, L, cu_seqlens);
    N = int64_t(all.size());
    STD_TORCH_CHECK(!initial_state || is_state(*initial_state, W), "causal_conv1d: initial_state must be [N, D, W-1]");
    last = channels_last(x);
    is_double = x.scalar_type() == ScalarType::Double;
    c.x = view(x);
    c.initial_state = view(initial_state);
    c.D = D;
    c.W = W;
    c.silu = silu;
    c.tap_pitch = (D + 15) / 16 * 16;
    taps = torch::stable::new_empty(x, {W + 1, c.tap_pitch}, accumulator(x));
    c.taps = taps.data_ptr();
    run.pack_taps(taps.data_ptr(), c.tap_pitch, view(weight), view(bias), D, W, is_double);
  }

  bool is_state(const Tensor& s, int64_t W) const {
    return s.dim() == 3 && s.size(0) == N && s.size(1) == D && s.size(2) == W - 1;
  }
  // The sequences of batch entry b: all of a packed row, else one.
  std::pair<int64_t, int64_t> of_batch(int64_t b) const {
    return N == B && B != 1 ? std::pair{b, b + 1} : std::pair{int64_t(0), N};
  }
  int64_t channel_groups(int64_t chunk_count) const {
    return chunk_count >= kFewChunks ? 1 : (D + kChannelGroup - 1) / kChannelGroup;
  }
  // Calls f(begin, end) for group `i` of `groups`, which are multiples of kChannelGroup wide.
  template <class F> void group(int64_t i, int64_t groups, const F& f) const {
    const int64_t width = groups == 1 ? D : kChannelGroup;
    f(i * width, std::min(D, (i + 1) * width));
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                   const std::optional<Tensor>& initial_state,
                                   const std::optional<Tensor>& cu_seqlens, bool silu) {
  Problem p(x, weight, bias, initial_state, cu_seqlens, silu);
  Tensor y = empty_with_layout(x, p.last);
  Tensor final_state = torch::stable::new_empty(x, {p.N, p.D, p.c.W - 1}, accumulator(x));
  if (!covers(p.all, p.L)) torch::stable::zero_(y);
  p.c.y = view(y);
  p.c.final_state = view(final_state);

  if (!p.last) {
    parallel_tasks(p.B * p.D, p.elements, [&](int64_t i) {
      const auto [first, end] = p.of_batch(i / p.D);
      for (int64_t n = first; n < end; n++) p.run.forward_channel(p.c, p.all[n], i % p.D);
    });
  } else {
    const std::vector<ConvChunk> tasks = chunks(p.all);
    const int64_t groups = p.channel_groups(int64_t(tasks.size()));
    parallel_tasks(int64_t(tasks.size()) * groups, p.elements, [&](int64_t i) {
      p.group(i % groups, groups, [&](int64_t begin, int64_t end) {
        p.run.forward_chunk(p.c, tasks[i / groups], begin, end);
      });
    });
  }
  return {y, final_state};
}

// needs: bits of x, weight, bias, initial_state. A gradient that is not needed comes back empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& x, const Tensor& weight,
                                                    const std::optional<Tensor>& bias,
                                                    const std::optional<Tensor>& initial_state,
                                                    const std::optional<Tensor>& cu_seqlens, bool silu,
                                                    const Tensor& dy, const std::optional<Tensor>& dfinal_state,
                                                    int64_t needs) {
  Problem p(x, weight, bias, initial_state, cu_seqlens, silu);
  const int64_t D = p.D, W = p.c.W;
  STD_TORCH_CHECK(dy.dim() == 3 && dy.size(0) == p.B && dy.size(1) == D && dy.size(2) == p.L &&
                      dy.scalar_type() == x.scalar_type() &&
                      (p.elements == 0 || unit_stride(dy, p.last ? 1 : 2)),
                  "causal_conv1d: dy must have x's shape, dtype and layout");
  STD_TORCH_CHECK(!dfinal_state || p.is_state(*dfinal_state, W), "causal_conv1d: dfinal_state must be [N, D, W-1]");
  const bool need_x = needs & 1, need_weight = needs & 2, need_bias = (needs & 4) && bias, need_state = needs & 8;
  const auto none = [&] { return torch::stable::new_empty(x, {0}); };
  Tensor dx = need_x ? empty_with_layout(x, p.last) : none();
  Tensor dweight = need_weight ? torch::stable::new_empty(weight, {D, W}) : none();
  Tensor dbias = need_bias ? torch::stable::new_empty(*bias, {D}) : none();
  Tensor dinitial = need_state ? torch::stable::new_empty(x, {p.N, D, W - 1}, accumulator(x)) : none();
  if (need_x && !covers(p.all, p.L)) torch::stable::zero_(dx);
  p.c.dy = view(dy);
  p.c.dfinal_state = view(dfinal_state);
  if (need_x) p.c.dx = view(dx);
  if (need_state) p.c.dinitial_state = view(dinitial);

  const std::vector<ConvChunk> tasks = p.last ? chunks(p.all) : std::vector<ConvChunk>{};
  // Work of one part: batch entries, or chunks. Chosen from shapes alone.
  const int64_t units = p.last ? int64_t(tasks.size()) : p.B;
  const int64_t parts = std::min(units, p.last ? kMaxParts : 1 + 255 / D);
  Tensor sums = torch::stable::new_zeros(x, {need_weight || need_bias ? parts : 0, W + 1, D}, ScalarType::Double);
  if (need_weight || need_bias) p.c.sums = static_cast<double*>(sums.data_ptr());

  if (!p.last) {
    parallel_tasks(parts * D, p.elements, [&](int64_t i) {
      const int64_t part = i / D;
      for (int64_t b = part * units / parts; b < (part + 1) * units / parts; b++) {
        const auto [first, end] = p.of_batch(b);
        for (int64_t n = first; n < end; n++) p.run.backward_channel(p.c, p.all[n], i % D, part);
      }
    });
  } else if (parts > 0) {
    const int64_t groups = p.channel_groups(parts);
    parallel_tasks(parts * groups, p.elements, [&](int64_t i) {
      const int64_t part = i / groups;
      std::vector<double> scratch(2 * W * p.c.tap_pitch);
      p.group(i % groups, groups, [&](int64_t begin, int64_t end) {
        for (int64_t n = part * units / parts; n < (part + 1) * units / parts; n++)
          p.run.backward_chunk(p.c, tasks[n], begin, end, part, scratch.data());
      });
    });
  }
  if (need_weight || need_bias)
    p.run.reduce(p.c.sums, parts, D, int(W), need_weight ? view(dweight) : View{}, need_bias ? view(dbias) : View{});
  return {dx, dweight, dbias, dinitial};
}

Tensor step(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Tensor state, bool silu,
            const std::optional<Tensor>& state_indices) {
  const int64_t B = x.size(0), D = x.size(1), W = weight.size(1), slots = state.size(0);
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && weight.size(0) == D && W >= 1 && W <= kMaxConvWidth &&
                      (!bias || (bias->dim() == 1 && bias->size(0) == D)) && state.dim() == 3 &&
                      state.size(1) == D && state.size(2) == W - 1 && (state_indices || slots >= B) &&
                      (!state_indices || (state_indices->dim() == 1 && state_indices->size(0) == B)),
                  "causal_conv1d_step: x must be [B, D], weight [D, W], bias [D], state [slots, D, W-1]");
  Tensor y = torch::stable::new_empty(x, {B, D});
  CausalConv1dStep c{view(x), view(y), view(weight), view(bias), view(state), D, int(W), silu};
  const CausalConv1dKernels& run = kernels();
  const int64_t groups = (D + kChannelGroup - 1) / kChannelGroup;
  parallel_tasks(B * groups, B * D, [&](int64_t i) {
    const int64_t b = i / groups, begin = i % groups * kChannelGroup;
    const int64_t slot = state_indices ? integer_at(*state_indices, b) : b;
    run.step(c, b, slot >= 0 && slot < slots ? slot : -1, begin, std::min(D, begin + kChannelGroup));
  });
  return y;
}

}  // namespace
}  // namespace fla_ops

STABLE_TORCH_LIBRARY_IMPL(fla_ops, CPU, m) {
  m.impl("causal_conv1d_forward", TORCH_BOX(&fla_ops::forward));
  m.impl("causal_conv1d_backward", TORCH_BOX(&fla_ops::backward));
  m.impl("causal_conv1d_step", TORCH_BOX(&fla_ops::step));
}
