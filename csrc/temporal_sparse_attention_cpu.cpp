// SPDX-License-Identifier: Apache-2.0
//
// Temporal-sparse attention on the CPU, torch side: internal asserts (argument checks live in Python), tensors to plain
// views, the parallel loops, registration.
//
// First the held keys are packed, a key head of a sequence a task; then blocks of queries run, a query head a task and
// the longest first. Nothing depends on the number of threads.
// The kernels are in temporal_sparse_attention_cpu_*.inc, built once per instruction level.
#include "temporal_sparse_attention_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu_level.h"
#include "cpu_tasks.h"
#include "torch_view.h"

namespace fla_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Multiply-adds; below this a second thread costs more than it does.
constexpr int64_t kSerialWork = 1 << 16;

const TemporalSparseAttentionKernels& kernels() {
#if FLA_OPS_X86
  if (cpu_level() == kAvx512) return avx512::temporal_sparse_attention;
  if (cpu_level() == kAvx2) return avx2::temporal_sparse_attention;
#endif
  return base::temporal_sparse_attention;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Queries at positions [begin, end) of a sequence, of every head.
struct QueryBlock {
  const SegmentedSequence* sequence;
  int64_t begin, end;
};

// What forward and backward share: the checked shapes, the sequences, their blocks of queries.
struct Problem {
  TemporalSparseAttention c{};
  int64_t B;
  bool is_double, serial;
  std::vector<SegmentedSequence> all;
  std::vector<QueryBlock> blocks;
  const TemporalSparseAttentionKernels& run = kernels();

  Problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& threshold, const Optional& cu_seqlens,
          double scale, int64_t window, bool window_blocks, int64_t sink, bool holds)
      : B(q.size(0)) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && k.size(0) == B && v.size(0) == B &&
                        v.size(1) == k.size(1) && v.size(2) == k.size(2) && k.size(3) == q.size(3) &&
                        q.size(1) <= k.size(1) && k.size(2) > 0 && q.size(2) % k.size(2) == 0 &&
                        k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() &&
                        std::max(q.size(3), v.size(3)) <= kSparseMaxHeadDim,
                    "temporal_sparse_attention: q must be [B, Tq, HQ, D], k [B, T, HK, D], v [B, T, HK, DV] of one "
                    "dtype, with Tq <= T, HQ a multiple of HK, D and DV up to 256");
    STD_TORCH_CHECK(threshold.dim() == 2 && threshold.size(0) == k.size(2) && threshold.size(1) == k.size(3) &&
                        threshold.is_contiguous() && threshold.scalar_type() == accumulator(q) && window >= 1 &&
                        sink >= 0 && (!cu_seqlens || q.size(1) == k.size(1)),
                    "temporal_sparse_attention: threshold must be a contiguous [HK, D] of the arithmetic type, "
                    "window >= 1, sink >= 0, and Tq = T with cu_seqlens");
    is_double = q.scalar_type() == ScalarType::Double;
    c.q = view(q, 3);
    c.k = view(k, 3);
    c.v = view(v, 3);
    c.threshold = static_cast<const char*>(threshold.data_ptr());
    c.Tq = q.size(1);
    c.T = k.size(1);
    c.HQ = int(q.size(2));
    c.HK = int(k.size(2));
    c.D = int(q.size(3));
    c.DV = int(v.size(3));
    c.scale = scale;
    c.window = window;
    c.blocks = window_blocks;
    c.sink = sink;
    c.holds = holds;
    int64_t segments = 0;
    for (const Sequence& s : sequences(B, c.T, cu_seqlens)) {
      all.push_back({s, segments});
      segments += ceil_div(s.length, kSegment);
    }
    c.segments_total = segments;
    int64_t pairs = 0;
    for (const SegmentedSequence& s : all)
      for (int64_t begin = c.first_query(); begin < s.length; begin += kQueryBlock) {
        const int64_t end = std::min(begin + kQueryBlock, s.length);
        blocks.push_back({&s, begin, end});
        pairs += (end - begin) * end;
      }
    std::stable_sort(blocks.begin(), blocks.end(), [](const auto& a, const auto& b) { return a.end > b.end; });
    serial = pairs * c.HQ * (c.D + c.DV) < kSerialWork;
  }

  // Memory for what `pack` makes, filled by it; the tensors live as long as the problem.
  std::vector<Segment> segments;
  std::vector<Tensor> packed;
  void reserve(const Tensor& q, bool keep_rows) {
    const int64_t keys = B * c.HK * c.T, width = c.holds ? c.held_pitch() : c.D;
    const auto take = [&](int64_t count, ScalarType type) {
      packed.push_back(torch::stable::new_empty(q, {count}, type));
      return static_cast<char*>(packed.back().data_ptr());
    };
    c.packed = take(keys * width, accumulator(q));
    c.values = take(keys * c.value_pitch(), accumulator(q));
    segments.resize(c.holds ? c.HK * c.segments_total : 0);
    c.segments = segments.data();
    if (!c.holds) return;
    c.packed_rows = reinterpret_cast<uint16_t*>(take(keys * width, ScalarType::Short));
    if (!keep_rows) return;
    c.held = take(keys * c.key_pitch(), accumulator(q));
    c.fired = reinterpret_cast<int32_t*>(take(keys, ScalarType::Int));
  }

  bool covered() const {
    return all.empty() ? c.T == 0 : all.front().start == 0 && all.back().start + all.back().length == c.T;
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& threshold,
                                           const Optional& cu_seqlens, double scale, int64_t window,
                                           bool window_blocks, int64_t sink, bool holds, bool count_fired) {
  Problem p(q, k, v, threshold, cu_seqlens, scale, window, window_blocks, sink, holds);
  TemporalSparseAttention& c = p.c;
  Tensor o = torch::stable::new_empty(q, {p.B, c.Tq, c.HQ, c.DV});
  Tensor norms = torch::stable::new_empty(q, {p.B, c.HQ, c.Tq, 2}, accumulator(q));
  std::vector<int64_t> counts{0};
  if (holds || count_fired) counts = {p.B, c.HK, c.T};
  Tensor fired = torch::stable::new_empty(q, counts, ScalarType::Int);
  p.reserve(q, false);
  if (!p.covered()) {
    torch::stable::zero_(o);
    torch::stable::zero_(norms);
    torch::stable::zero_(fired);
  }
  c.o = view(o, 3);
  c.norms = static_cast<char*>(norms.data_ptr());
  if (holds || count_fired) c.fired = static_cast<int32_t*>(fired.data_ptr());
  parallel_tasks(q, int64_t(p.all.size()) * c.HK, p.serial, p.run.pack_scratch(p.is_double),
                 [&](int64_t task, void* scratch) { p.run.pack(c, p.all[task / c.HK], task % c.HK, scratch); });
  const int64_t count = int64_t(p.blocks.size());
  parallel_tasks(q, count * c.HQ, p.serial, p.run.forward_scratch(c.D, c.value_pitch(), p.is_double),
                 [&](int64_t task, void* scratch) {
                   const QueryBlock& b = p.blocks[task % count];
                   p.run.forward(c, *b.sequence, task / count, b.begin, b.end, scratch);
                 });
  return {o, norms, fired};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& threshold,
                                            const Optional& cu_seqlens, double scale, int64_t window,
                                            bool window_blocks, int64_t sink, bool holds, const Tensor& o,
                                            const Tensor& norms, const Tensor& dout, int64_t needs) {
  Problem p(q, k, v, threshold, cu_seqlens, scale, window, window_blocks, sink, holds);
  TemporalSparseAttention& c = p.c;
  const auto like_o = [&](const Tensor& x) {
    return x.dim() == 4 && x.size(0) == p.B && x.size(1) == c.Tq && x.size(2) == c.HQ && x.size(3) == c.DV &&
           x.scalar_type() == q.scalar_type();
  };
  STD_TORCH_CHECK(like_o(o) && like_o(dout) && norms.is_contiguous() && norms.numel() == 2 * p.B * c.HQ * c.Tq &&
                      norms.scalar_type() == accumulator(q),
                  "temporal_sparse_attention: o and its gradient must be [B, Tq, HQ, DV], norms as saved");
  const auto gradient = [&](int i, const Tensor& x, View& to) {
    if (!(needs >> i & 1)) return torch::stable::new_empty(q, {0});
    Tensor grad = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
    if (!p.covered()) torch::stable::zero_(grad);
    to = view(grad, 3);
    return grad;
  };
  const auto buffer = [&](bool wanted, int64_t heads, int pitch) {
    return torch::stable::new_empty(q, {wanted ? p.B * heads * c.T * pitch : 0}, accumulator(q));
  };
  const auto data = [](const Tensor& x) { return x.numel() ? static_cast<char*>(x.data_ptr()) : nullptr; };

  TemporalSparseBackward g{};
  Tensor dq = gradient(0, q, g.dq), dk = gradient(1, k, g.dk), dv = gradient(2, v, g.dv);
  Tensor keys = buffer(true, c.HK, c.key_pitch());
  Tensor dkeys = buffer(needs & 2, c.HQ, c.key_pitch()), dheld = buffer(holds && needs & 2, c.HQ, c.key_pitch());
  Tensor dvalues = buffer(needs & 4, c.HQ, c.value_pitch());
  for (Tensor* sums : {&dkeys, &dheld, &dvalues}) torch::stable::zero_(*sums);
  c.o = view(o, 3);
  c.norms = static_cast<char*>(norms.data_ptr());
  p.reserve(q, true);
  g.c = c;
  g.dout = view(dout, 3);
  g.keys = data(keys);
  g.dkeys = data(dkeys);
  g.dheld = data(dheld);
  g.dvalues = data(dvalues);

  const int64_t count = int64_t(p.all.size());
  parallel_tasks(q, count * c.HK, p.serial, p.run.pack_scratch(p.is_double), [&](int64_t task, void* scratch) {
    p.run.pack_keys(g, p.all[task / c.HK], task % c.HK, scratch);
  });
  parallel_tasks(q, count * c.HQ, p.serial, p.run.backward_scratch(c.D, c.DV, p.is_double),
                 [&](int64_t task, void* scratch) { p.run.backward(g, p.all[task / c.HQ], task % c.HQ, scratch); });
  if (needs & 6)
    parallel_tasks(q, count * c.HK, p.serial, 0,
                   [&](int64_t task, void*) { p.run.finish(g, p.all[task / c.HK], task % c.HK); });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace fla_ops

STABLE_TORCH_LIBRARY_IMPL(fla_ops, CPU, m) {
  m.impl("temporal_sparse_attention_forward", TORCH_BOX(&fla_ops::forward));
  m.impl("temporal_sparse_attention_backward", TORCH_BOX(&fla_ops::backward));
}
