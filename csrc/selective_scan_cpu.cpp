// SPDX-License-Identifier: Apache-2.0
//
// The selective scan on the CPU, torch side: internal asserts (argument checks live in Python), tensors to plain
// views, the parallel loop, registration.
//
// A task takes a part of the channels through a batch entry's sequences. How channels and sequences are cut, and in
// which order sums are added, follows from the shapes alone: the number of threads changes no result's bits.
// The kernels are in selective_scan_cpu_{forward,backward,step}.inc, built once per instruction level.
#include "selective_scan_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu_level.h"
#include "cpu_tasks.h"
#include "huge_pages.h"
#include "torch_view.h"

namespace fla_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// States updated; below this a second thread costs more than it does. A step has nothing else to set up.
constexpr int64_t kSerialWork = 1 << 15, kSerialStep = 1 << 13;

const SelectiveScanKernels& kernels() {
#if FLA_OPS_X86
  if (cpu_level() == kAvx512) return avx512::selective_scan;
  if (cpu_level() == kAvx2) return avx2::selective_scan;
#endif
  return base::selective_scan;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// [Di, N] as [1, Di, N].
View matrix(const Tensor& x) {
  View result = view(x);
  result.stride[2] = result.stride[1];
  result.stride[1] = result.stride[0];
  result.stride[0] = 0;
  return result;
}

ScanProjection projection(const Tensor& w, int64_t Di) {
  ScanProjection result;
  result.data = static_cast<char*>(w.data_ptr());
  result.type = type_of(w);
  result.constant = w.dim() == 2;
  if (result.constant) {
    result.stride[1] = w.stride(0);
    result.stride[2] = w.stride(1);
  } else {
    for (int i = 0; i < 4; i++) result.stride[i] = w.stride(i);
    result.group_size = Di / w.size(1);
  }
  return result;
}

// What forward and backward share: the checked shapes, the sequences, packed B and C.
struct Problem {
  SelectiveScan c{};
  int64_t B, Di, L, N, S;
  bool is_double, serial;
  bool per_lane;  // B or C differ within a block
  int64_t lanes;  // channels of a block
  std::vector<ScanSequence> all;
  int64_t checkpoints = 0;
  Tensor packed_B, packed_C;
  const SelectiveScanKernels& run = kernels();

  Problem(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& wB, const Tensor& wC,
          const Optional& D, const Optional& z, const Optional& delta_bias, const Optional& initial_state,
          const Optional& cu_seqlens, bool softplus)
      : B(u.size(0)), Di(u.size(1)), L(u.size(2)), N(A.size(1)), packed_B(u), packed_C(u) {
    STD_TORCH_CHECK(u.dim() == 3 && like_u(delta, u) && (!z || like_u(*z, u)) && A.dim() == 2 && A.size(0) == Di &&
                        N >= 1 && N <= kScanMaxState && (!D || is_vector(*D)) &&
                        (!delta_bias || is_vector(*delta_bias)) && is_projection(wB) && is_projection(wC),
                    "selective_scan: u, delta, z must be [B, Di, L], A [Di, N], D, delta_bias [Di], B, C [B, G, N, L] "
                    "or [Di, N], with N from 1 to 256");
    for (const Sequence& s : sequences(B, L, cu_seqlens)) {
      all.push_back({s, checkpoints});
      checkpoints += ceil_div(s.length, kScanTile);
    }
    S = int64_t(all.size());
    // The number of rows follows from the shapes, so that it is known without the bounds' values.
    checkpoints = cu_seqlens ? ceil_div(L, kScanTile) + S : checkpoints;
    STD_TORCH_CHECK(!initial_state || is_state(*initial_state), "selective_scan: initial_state must be [S, Di, N]");
    is_double = u.scalar_type() == ScalarType::Double;
    serial = B * Di * L * N < kSerialWork;

    c.u = view(u);
    c.delta = view(delta);
    c.z = view(z);
    c.A = matrix(A);
    c.D = view(D);
    c.delta_bias = view(delta_bias);
    c.B = projection(wB, Di);
    c.C = projection(wC, Di);
    c.initial_state = view(initial_state);
    c.Di = Di;
    c.N = int(N);
    c.softplus = softplus;

    lanes = kScanBlockBytes / (is_double ? 8 : 4);
    const int64_t unit = std::gcd(c.B.group_size, c.C.group_size);
    per_lane = c.B.constant || c.C.constant || (unit != Di && unit % lanes != 0);
    if (!per_lane) {
      packed_B = pack(c.B, u, wB.size(1));
      packed_C = pack(c.C, u, wC.size(1));
    }
  }

  bool like_u(const Tensor& x, const Tensor& u) const {
    return x.dim() == 3 && x.size(0) == B && x.size(1) == Di && x.size(2) == L && x.scalar_type() == u.scalar_type();
  }
  bool is_vector(const Tensor& x) const { return x.dim() == 1 && x.size(0) == Di; }
  bool is_projection(const Tensor& w) const {
    if (w.dim() == 2) return w.size(0) == Di && w.size(1) == N;
    return w.dim() == 4 && w.size(0) == B && w.size(1) > 0 && Di % w.size(1) == 0 && w.size(2) == N && w.size(3) == L;
  }
  bool is_state(const Tensor& s) const {
    return s.dim() == 3 && s.size(0) == S && s.size(1) == Di && s.size(2) == N;
  }
  bool covered() const {
    return all.empty() ? L == 0 : all.front().start == 0 && all.back().start + all.back().length == L;
  }

  Tensor pack(ScanProjection& w, const Tensor& u, int64_t groups) {
    const int64_t rows = B * groups * ceil_div(N, kScanGroup);
    w.pitch = L + 16;  // rows of a power of two would meet in the cache
    Tensor packed = torch::stable::new_empty(u, {rows, w.pitch, kScanGroup}, accumulator(u));
    w.packed = static_cast<char*>(packed.data_ptr());
    const auto range = [&](int64_t begin, int64_t end) { run.pack(w, groups, int(N), L, begin, end, is_double); };
    if (serial) range(0, rows);
    else torch::stable::parallel_for(0, rows, 1, range);
    return packed;
  }

  // The sequences of batch entry b: all of a packed row, else one.
  const ScanSequence* first(int64_t b) const { return all.data() + (S == B ? b : 0); }
  int64_t count(int64_t b) const { return S == B ? 1 : S; }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& wB,
                                           const Tensor& wC, const Optional& D, const Optional& z,
                                           const Optional& delta_bias, const Optional& initial_state,
                                           const Optional& cu_seqlens, bool softplus, bool save_states) {
  Problem p(u, delta, A, wB, wC, D, z, delta_bias, initial_state, cu_seqlens, softplus);
  Tensor y = in_huge_pages(torch::stable::empty_like(u));
  Tensor final_state = torch::stable::new_empty(u, {p.S, p.Di, p.N}, accumulator(u));
  std::vector<int64_t> saved{0};
  if (save_states) saved = {p.checkpoints, p.Di, p.N};
  Tensor states = in_huge_pages(torch::stable::new_empty(u, saved, accumulator(u)));
  if (!p.covered()) torch::stable::zero_(y);
  p.c.y = view(y);
  p.c.final_state = static_cast<char*>(final_state.data_ptr());
  if (save_states) p.c.states = static_cast<char*>(states.data_ptr());

  const int64_t blocks = ceil_div(p.Di, p.lanes);
  parallel_tasks(u, p.B * blocks, p.serial, p.run.forward_scratch(int(p.N), p.per_lane, p.is_double),
                 [&](int64_t task, void* scratch) {
                   const int64_t b = task / blocks, begin = task % blocks * p.lanes;
                   const ScanPart part{begin, std::min(begin + p.lanes, p.Di), 0};
                   p.run.forward(p.c, part, p.first(b), p.count(b), scratch);
                 });
  return {y, final_state, states};
}

constexpr int64_t kMostParts = 16;

// The backward's parts of the channels: whole blocks, and at most kMostParts, so that sums over channels stay small.
std::vector<ScanPart> parts(const Problem& p) {
  const int64_t blocks = ceil_div(p.Di, p.lanes), count = std::min(blocks, kMostParts);
  std::vector<ScanPart> result;
  for (int64_t i = 0; i < count; i++)
    result.push_back({i * blocks / count * p.lanes, std::min(p.Di, (i + 1) * blocks / count * p.lanes), i});
  return result;
}

// How a group's channels fall on parts: by group its first part, and the most parts of any.
struct Slots {
  std::vector<int64_t> first;
  int64_t most = 1;

  Slots(const std::vector<ScanPart>& all, const ScanProjection& w, int64_t Di) {
    if (w.constant) return;
    const auto part_of = [&](int64_t channel) {
      return std::find_if(all.begin(), all.end(), [&](const ScanPart& p) { return channel < p.end; })->index;
    };
    for (int64_t channel = 0; channel < Di; channel += w.group_size) {
      first.push_back(part_of(channel));
      most = std::max(most, part_of(channel + w.group_size - 1) - first.back() + 1);
    }
  }
};

// The order of the results, and the bits of `needs`.
enum Gradient { kU, kDelta, kA, kB, kC, kD, kZ, kDeltaBias, kInitialState, kGradients };

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& wB, const Tensor& wC, const Optional& D,
    const Optional& z, const Optional& delta_bias, const Optional& initial_state, const Optional& cu_seqlens,
    bool softplus, const Tensor& states, const Tensor& dy, const Optional& dfinal_state, int64_t needs) {
  Problem p(u, delta, A, wB, wC, D, z, delta_bias, initial_state, cu_seqlens, softplus);
  STD_TORCH_CHECK(p.like_u(dy, u) && (!dfinal_state || p.is_state(*dfinal_state)) && states.dim() == 3 &&
                      states.size(0) == p.checkpoints && states.size(1) == p.Di && states.size(2) == p.N &&
                      states.is_contiguous() && states.scalar_type() == accumulator(u),
                  "selective_scan: dy must be like u, dfinal_state [S, Di, N], states as the forward saved them");
  const ScalarType exact = accumulator(u);
  const auto needed = [&](int i) { return (needs >> i & 1) != 0; };
  const auto like = [&](int i, const Tensor* x) {
    if (!x || !needed(i)) return torch::stable::new_empty(u, {0});
    Tensor grad = in_huge_pages(torch::stable::empty_like(*x));
    const bool along_time = i == kU || i == kDelta || i == kZ;
    if (along_time ? !p.covered() : p.B == 0) torch::stable::zero_(grad);  // nobody else writes it then
    return grad;
  };
  const auto optional = [](const Optional& x) { return x ? &*x : nullptr; };
  Tensor du = like(kU, &u), ddelta = like(kDelta, &delta), dz = like(kZ, optional(z));
  Tensor dA = like(kA, &A), dB = like(kB, &wB), dC = like(kC, &wC);
  Tensor dD = like(kD, optional(D)), dbias = like(kDeltaBias, optional(delta_bias));
  Tensor dinitial = torch::stable::new_empty(u, {0});
  if (needed(kInitialState)) dinitial = torch::stable::new_empty(u, {p.S, p.Di, p.N}, exact);

  const std::vector<ScanPart> all = parts(p);
  const Slots slots_B(all, p.c.B, p.Di), slots_C(all, p.c.C, p.Di);
  SelectiveScanBackward g{};
  g.scan = p.c;
  g.scan.states = static_cast<char*>(states.data_ptr());
  g.B = p.B;
  g.L = p.L;
  g.dy = view(dy);
  g.dfinal_state = view(dfinal_state);
  if (needed(kU)) g.du = view(du);
  if (needed(kDelta)) g.ddelta = view(ddelta);
  if (needed(kZ) && z) g.dz = view(dz);
  g.first_part_B = slots_B.first.data();
  g.first_part_C = slots_C.first.data();
  g.slots_B = slots_B.most;
  g.slots_C = slots_C.most;
  if (needed(kInitialState)) g.dinitial_state = static_cast<char*>(dinitial.data_ptr());

  // The sums, as they come from the tasks.
  std::vector<Tensor> kept;
  const auto sums = [&](bool wanted, std::vector<int64_t> size) -> char* {
    if (!wanted) return nullptr;
    kept.push_back(torch::stable::new_zeros(u, size, exact));
    return static_cast<char*>(kept.back().data_ptr());
  };
  const auto projection_sums = [&](int i, const Tensor& w, int64_t slots) {
    return w.dim() == 2 ? sums(needed(i), {p.B, p.Di, p.N}) : sums(needed(i), {p.B, w.size(1), slots, p.N, p.L});
  };
  g.dA = sums(needed(kA), {p.B, p.Di, p.N});
  g.dD = sums(needed(kD) && D, {p.B, p.Di});
  g.dbias = sums(needed(kDeltaBias) && delta_bias, {p.B, p.Di});
  g.dB = projection_sums(kB, wB, g.slots_B);
  g.dC = projection_sums(kC, wC, g.slots_C);

  const int64_t tasks = int64_t(all.size());
  parallel_tasks(u, p.B * tasks, p.serial, p.run.backward_scratch(int(p.N), p.per_lane, p.is_double),
                 [&](int64_t task, void* scratch) {
                   const int64_t b = task / tasks;
                   p.run.backward(g, all[task % tasks], p.first(b), p.count(b), scratch);
                 });

  const auto add = [&](const ScanSum& s, int64_t rows) {
    const auto range = [&](int64_t begin, int64_t end) { p.run.add_terms(s, begin, end, p.is_double); };
    if (p.serial) range(0, rows);
    else torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kSerialWork / (s.count * s.length + 1)), range);
  };
  // [B, Di, columns] over the batch.
  const auto add_batch = [&](const char* from, const Tensor& out, int64_t columns) {
    if (!from) return;
    ScanSum s{from, p.B, p.Di * columns, 0, 1, p.Di, columns, static_cast<char*>(out.data_ptr()), type_of(out), {}};
    s.out_stride[2] = out.stride(0);
    s.out_stride[3] = out.dim() == 2 ? out.stride(1) : 0;
    add(s, p.Di);
  };
  const auto add_parts = [&](const char* from, const Tensor& out, int64_t slots) {
    if (out.dim() == 2) return add_batch(from, out, p.N);
    if (!from) return;
    const int64_t G = out.size(1), row = p.N * p.L;
    ScanSum s{from, slots, row, slots * row, G, p.N, p.L, static_cast<char*>(out.data_ptr()), type_of(out), {}};
    for (int i = 0; i < 4; i++) s.out_stride[i] = out.stride(i);
    add(s, p.B * G * p.N);
  };
  add_batch(g.dA, dA, p.N);
  add_batch(g.dD, dD, 1);
  add_batch(g.dbias, dbias, 1);
  add_parts(g.dB, dB, g.slots_B);
  add_parts(g.dC, dC, g.slots_C);
  return {du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial};
}

Tensor step(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& wB, const Tensor& wC,
            const Optional& D, const Optional& z, const Optional& delta_bias, Tensor state, bool softplus,
            const Optional& state_indices) {
  // For B and C of two dimensions whatever is wrong about shapes, types and memory is refused here: Python says what it
  // is, and only then.
  STD_TORCH_CHECK(u.dim() == 2 && A.dim() == 2 && state.dim() == 3, "selective_scan_step: wrong dimensions");
  const int64_t B = u.size(0), Di = u.size(1), N = A.size(1), slots = state.size(0);
  const ScalarType dtype = u.scalar_type();
  const auto like_u = [&](const Tensor& x) {
    return x.dim() == 2 && x.size(0) == B && x.size(1) == Di && x.scalar_type() == dtype;
  };
  const auto is_side = [&](const Tensor& x) {
    return x.scalar_type() == dtype || x.scalar_type() == ScalarType::Float;
  };
  const auto is_vector = [&](const Optional& x) { return !x || (x->dim() == 1 && x->size(0) == Di && is_side(*x)); };
  const auto groups = [](const Tensor& w) { return w.dim() == 2 ? 1 : w.size(1); };
  const auto is_projection = [&](const Tensor& w) {
    return (w.dim() == 2 || w.dim() == 3) && w.size(0) == B && w.size(w.dim() - 1) == N && groups(w) > 0 &&
           Di % groups(w) == 0 && (w.scalar_type() == dtype || (w.dim() == 3 && is_side(w)));
  };
  bool overlaps = false;
  for (int i = 0; i < 3; i++) overlaps |= state.stride(i) == 0 && state.size(i) > 1;
  STD_TORCH_CHECK(like_u(delta) && (!z || like_u(*z)) && A.size(0) == Di && N >= 1 && N <= kScanMaxState &&
                      is_side(A) && is_vector(D) && is_vector(delta_bias) && is_projection(wB) && is_projection(wC) &&
                      groups(wB) == groups(wC) && state.size(1) == Di && state.size(2) == N && !overlaps &&
                      (state_indices ? state_indices->dim() == 1 && state_indices->size(0) == B : slots == B),
                  "selective_scan_step: u, delta, z must be [B, Di], A [Di, N], D, delta_bias [Di], "
                  "B, C [B, N] or [B, G, N], state [slots, Di, N]");
  Tensor y = torch::stable::empty_like(u);
  const auto vector = [](const Optional& x) {
    View result = view(x);
    result.stride[1] = result.stride[0];
    result.stride[0] = 0;
    return result;
  };
  const auto projection = [](const Tensor& w) {
    View result = view(w);
    if (w.dim() == 2) {
      result.stride[2] = result.stride[1];
      result.stride[1] = 0;
    }
    return result;
  };
  SelectiveScanStep c{view(u), view(delta), view(z), view(y), matrix(A), vector(D), vector(delta_bias),
                      projection(wB), projection(wC), view(state), Di, Di / groups(wB), Di / groups(wC), int(N),
                      softplus};
  const SelectiveScanKernels& run = kernels();
  constexpr int64_t kChannels = 256;
  const int64_t pieces = ceil_div(Di, kChannels);
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / pieces, first = i % pieces * kChannels;
      const int64_t slot = state_indices ? integer_at(*state_indices, b) : b;
      run.step(c, b, slot >= 0 && slot < slots ? slot : -1, first, std::min(Di, first + kChannels));
    }
  };
  const int64_t grain = std::max<int64_t>(1, kSerialStep / (N * kChannels));
  if (B * pieces <= grain) range(0, B * pieces);
  else torch::stable::parallel_for(0, B * pieces, grain, range);
  return y;
}

}  // namespace
}  // namespace fla_ops

STABLE_TORCH_LIBRARY_IMPL(fla_ops, CPU, m) {
  m.impl("selective_scan_forward", TORCH_BOX(&fla_ops::forward));
  m.impl("selective_scan_backward", TORCH_BOX(&fla_ops::backward));
  m.impl("selective_scan_step", TORCH_BOX(&fla_ops::step));
}
