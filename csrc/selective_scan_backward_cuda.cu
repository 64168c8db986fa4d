// SPDX-License-Identifier: Apache-2.0
//
// Mamba's selective scan on CUDA: gradients. With g_t = dy_t silu(z_t) and dh_t the gradient of h_t through y_t and all
// that follows,
//   dh_t = g_t C_t + exp(step_{t+1} A) dh_{t+1}
//   du_t = step_t (dh_t . B_t) + D g_t              dstep_t = dh_t . (A exp(step_t A) h_{t-1} + u_t B_t)
//   dA += step_t dh_t exp(step_t A) h_{t-1}         dB_t = step_t u_t dh_t,  dC_t = g_t h_t, summed over channels
//
// 1. `prepare_kernel` computes step_t and g_t once, for all states of a channel.
// 2. `reverse_kernel`, a thread for each state of each sequence, walks from the end and saves the dh that comes from
//    behind every block of 64 steps, as the forward saved the h that goes into it.
// 3. `window_kernel` then takes the blocks of 64 steps in parallel. A thread owns one state of one channel: it walks the
//    block forwards to keep its h of every step in shared memory, then backwards. du, dstep and dz are sums over the
//    states, taken by shuffles; dB and dC are sums over channels: each thread adds up the channels it takes in turn,
//    the rows of a block are added through shared memory.
// 4. `add_windows` and `add_ranges` add what the blocks have found, in order, in double.
//
// N > 32 is done in slices of 32 states; the sums over states then pass from slice to slice through memory.
// Workspace, in values of the arithmetic type: 2 B Di L for step and g, 3 more for N > 32; for each of dB and dC
// B L N for every 2 N channels, so B Di L / 2; one state a block of steps for dh, dA, and constant B and C.
//
// To check first when a result is wrong: `window_at`, which steps a block has, and `Ranges`, which channels.
#include <numeric>
#include <tuple>

#include "selective_scan_cuda.h"

namespace fla_ops {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 128;
template <class A> constexpr int kWindowThreads = sizeof(A) == 8 ? 64 : 128;  // for 96 KB of shared memory at most
constexpr int kSliceStates = 32;

// Channels in ranges, each within one group of B and one of C: a block's share in dB and dC.
struct Ranges {
  int64_t unit;      // channels that share a group in B and in C
  int64_t length;    // channels of a range; the last of a unit may be shorter
  int64_t per_unit, total;

  __device__ __forceinline__ int64_t first(int64_t r) const { return r / per_unit * unit + r % per_unit * length; }
  __device__ __forceinline__ int64_t last(int64_t r) const {
    return min(first(r) + length, (r / per_unit + 1) * unit);
  }
};

// Results that are not needed have null data.
struct ScanReverse {
  ScanInputs in;
  View states;             // [windows, Di, N]: the state before each block of steps
  View dy;                 // [B, Di, L]
  View d_final_state;      // [sequences, Di, N]; data may be null
  View d_initial_state;    // [sequences, Di, N]
  View du, ddelta, dz;     // [B, Di, L]
  // In the arithmetic type:
  void *steps, *gates;     // [B, L, Di]: step_t, g_t
  void* d_states;          // [windows, Di, N]: dh from behind each block of steps
  void* unfinished;        // [3, B, L, Di]: sums over the slices so far; null where one slice is all
  void *dA, *dB, *dC;      // [windows, Di, N]; dB and dC: of constants
  void *dD, *ddelta_bias;  // [windows, Di]
  void *b_parts, *c_parts; // [ranges, B, L, N]
  Ranges ranges;
  int64_t B, L, windows;
};

template <class A> __device__ __forceinline__ A* array(void* data) { return static_cast<A*>(data); }

__device__ __forceinline__ int64_t this_thread() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// A thread is one step of one channel.
template <class A> __global__ void __launch_bounds__(kThreads) prepare_kernel(ScanReverse x) {
  const int64_t i = this_thread();
  if (i >= x.B * x.L * x.in.Di) return;
  const int64_t d = i % x.in.Di, t = i / x.in.Di % x.L, b = i / x.in.Di / x.L;
  A g = load<A>(x.dy, offset_of(x.dy, b, d, t));
  if (x.in.z.data) {
    const A z = load<A>(x.in.z, offset_of(x.in.z, b, d, t));
    g *= z * sigmoid(z);
  }
  array<A>(x.steps)[i] = step_size<A>(x.in, b, d, t);
  array<A>(x.gates)[i] = g;
}

template <class A> __global__ void __launch_bounds__(kThreads) reverse_kernel(ScanReverse x) {
  const ScanInputs& in = x.in;
  const int64_t i = this_thread();
  if (i >= in.sequences.count * in.Di * in.N) return;
  const int64_t n = i % in.N, d = i / in.N % in.Di;
  const Span span = in.sequences[i / in.N / in.Di];
  const A a = load<A>(in.A, offset_of(in.A, d, n));
  const int64_t of_c = in.C.first(span.batch, d, n), first = first_checkpoint(in.sequences, span);
  A dh = x.d_final_state.data ? load<A>(x.d_final_state, offset_of(x.d_final_state, span.index, d, n)) : A(0);
  for (int64_t t = span.end - 1; t >= span.start; t--) {
    const int64_t done = t - span.start, at = (span.batch * x.L + t) * in.Di + d;
    if (t == span.end - 1 || done % kBlockSteps == kBlockSteps - 1)
      array<A>(x.d_states)[((first + done / kBlockSteps) * in.Di + d) * in.N + n] = dh;
    dh += array<A>(x.gates)[at] * load<A>(in.C.at, of_c + t * in.C.time_stride);
    dh = decayed(dh, array<A>(x.steps)[at] * a);
  }
  if (x.d_initial_state.data) store(x.d_initial_state, offset_of(x.d_initial_state, span.index, d, n), dh);
}

// The steps [start, start + count) of a batch row; count is 0 where packed sequences left a saved state unused.
struct Window {
  int64_t batch, start;
  int count;
};

__device__ inline Window window_at(const Sequences& sequences, int64_t index) {
  if (!sequences.cu_seqlens.data) {
    const int64_t a_row = (sequences.length + kBlockSteps - 1) / kBlockSteps, start = index % a_row * kBlockSteps;
    return {index / a_row, start, int(min(sequences.length - start, int64_t(kBlockSteps)))};
  }
  int64_t low = 0, high = sequences.count;  // the window belongs to a sequence in [low, high)
  if (high == 0) return {0, 0, 0};
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first_checkpoint(sequences, sequences[middle]) <= index) low = middle;
    else high = middle;
  }
  const Span span = sequences[low];
  const int64_t block = index - first_checkpoint(sequences, span), start = span.start + block * kBlockSteps;
  if (block < 0 || start >= span.end) return {0, 0, 0};
  return {0, start, int(min(span.end - start, int64_t(kBlockSteps)))};
}

// What the sums over the states of one channel make: du, ddelta and dz of step t.
template <class A> struct StateSums {
  A b, step, y;  // dh . B, dstep, C . h

  // Returns ddelta. `at` is the step's place in [B, L, Di].
  __device__ __forceinline__ A finish(const ScanReverse& x, const Window& window, int64_t d, int64_t t, int64_t at,
                                      A u) const {
    const ScanInputs& in = x.in;
    const A size = array<A>(x.steps)[at], g = array<A>(x.gates)[at];
    const A skip = in.D.data ? load<A>(in.D, offset_of(in.D, d)) : A(0);
    if (x.du.data) store(x.du, offset_of(x.du, window.batch, d, t), in.D.data ? size * b + skip * g : size * b);
    A ddelta = step;
    if (in.delta_softplus) ddelta *= sigmoid(raw_step<A>(in, window.batch, d, t));
    if (x.ddelta.data) store(x.ddelta, offset_of(x.ddelta, window.batch, d, t), ddelta);
    if (x.dz.data) {
      const A z = load<A>(in.z, offset_of(in.z, window.batch, d, t)), s = sigmoid(z);
      const A dy = load<A>(x.dy, offset_of(x.dy, window.batch, d, t)), out = in.D.data ? y + skip * u : y;
      store(x.dz, offset_of(x.dz, window.batch, d, t), dy * out * (s * (A(1) + z * (A(1) - s))));
    }
    return ddelta;
  }
};

// A block of threads is lanes x rows: lanes are states, rows are channels.
template <class A> __global__ void __launch_bounds__(kWindowThreads<A>) window_kernel(ScanReverse x) {
  constexpr int threads = kWindowThreads<A>;
  FLA_DYN_SHARED(A, columns);  // of kBlockSteps x threads; a thread walks down its own column
  const ScanInputs& in = x.in;
  const int lane = threadIdx.x, lanes = blockDim.x, rows = blockDim.y, column = threadIdx.y * lanes + lane, N = in.N;
  A* const before = columns + column;  // the state before each step
  A* const b_sums = x.b_parts ? before + kBlockSteps * threads : nullptr;
  A* const c_sums = x.c_parts ? before + kBlockSteps * threads * (b_sums ? 2 : 1) : nullptr;
  const int64_t index = blockIdx.x / x.ranges.total, range = blockIdx.x % x.ranges.total;
  const Window window = window_at(in.sequences, index);
  const int64_t first_step = window.batch * x.L + window.start;
  const int64_t plane = x.B * x.L * in.Di;  // of `unfinished`
  const int64_t last = x.ranges.last(range);

  for (int slice = 0; slice < N; slice += lanes) {
    const int n = slice + lane;
    const bool final_slice = slice + lanes >= N;
    for (int i = 0; i < kBlockSteps; i++) {
      if (b_sums) b_sums[i * threads] = 0;
      if (c_sums) c_sums[i * threads] = 0;
    }
    for (int64_t first = x.ranges.first(range); first < last; first += rows) {
      const int64_t d = first + threadIdx.y, place = (index * in.Di + d) * N + n;
      const bool live = d < last && n < N;
      A a = 0, dh = 0;
      int64_t of_b = 0, of_c = 0;
      if (live) {
        a = load<A>(in.A, offset_of(in.A, d, n));
        of_b = in.B.first(window.batch, d, n) + window.start * in.B.time_stride;
        of_c = in.C.first(window.batch, d, n) + window.start * in.C.time_stride;
      }
      if (live && window.count) {
        dh = array<A>(x.d_states)[place];
        A h = load<A>(x.states, place);
        for (int i = 0; i < window.count; i++) {
          before[i * threads] = h;
          const A step = array<A>(x.steps)[(first_step + i) * in.Di + d];
          const A u = load<A>(in.u, offset_of(in.u, window.batch, d, window.start + i));
          h = decayed(h, step * a) + step * u * load<A>(in.B.at, of_b + i * in.B.time_stride);
        }
      }

      A da = 0, db = 0, dc = 0, dbias = 0;
      double dskip = 0;  // one number a channel: exact for little
      for (int i = window.count - 1; i >= 0; i--) {
        const int64_t at = (first_step + i) * in.Di + d;
        A u = 0, g = 0, b_term = 0, c_term = 0;
        StateSums<A> sums{};
        if (live) {
          const A step = array<A>(x.steps)[at];
          u = load<A>(in.u, offset_of(in.u, window.batch, d, window.start + i));
          g = array<A>(x.gates)[at];
          const A b = load<A>(in.B.at, of_b + i * in.B.time_stride), c = load<A>(in.C.at, of_c + i * in.C.time_stride);
          const A kept = decayed(before[i * threads], step * a), h = kept + step * u * b;
          dh += g * c;
          sums = {dh * b, dh * (a * kept + u * b), c * h};
          da += dh * step * kept;
          b_term = dh * (step * u);
          c_term = g * h;
          dh = decayed(dh, step * a);
        }
        sums.b = sum_lanes(sums.b, lanes);
        sums.step = sum_lanes(sums.step, lanes);
        if (x.dz.data) sums.y = sum_lanes(sums.y, lanes);
        db += b_term;
        dc += c_term;
        if (b_sums) b_sums[i * threads] += b_term;
        if (c_sums) c_sums[i * threads] += c_term;
        if (lane > 0 || d >= last) continue;
        A* const unfinished = array<A>(x.unfinished);
        if (slice > 0) {
          sums.b += unfinished[at];
          sums.step += unfinished[plane + at];
          sums.y += unfinished[2 * plane + at];
        }
        if (final_slice) {
          dbias += sums.finish(x, window, d, window.start + i, at, u);
          dskip += double(g) * u;
        } else {
          unfinished[at] = sums.b;
          unfinished[plane + at] = sums.step;
          unfinished[2 * plane + at] = sums.y;
        }
      }
      if (live && x.dA) array<A>(x.dA)[place] = da;
      if (live && x.dB) array<A>(x.dB)[place] = db;
      if (live && x.dC) array<A>(x.dC)[place] = dc;
      if (lane > 0 || d >= last || !final_slice) continue;
      if (x.dD) array<A>(x.dD)[index * in.Di + d] = dskip;
      if (x.ddelta_bias) array<A>(x.ddelta_bias)[index * in.Di + d] = dbias;
    }
    if (!b_sums && !c_sums) continue;

    __syncthreads();
    const int states = min(lanes, N - slice);
    for (int i = column; i < window.count * states; i += threads) {
      const int64_t to = ((range * x.B * x.L) + first_step + i / states) * N + slice + i % states;
      const auto add_rows = [&](const A* sums) {
        const A* const column_of_state = sums - column + i / states * threads + i % states;
        A sum = 0;
        for (int row = 0; row < rows; row++) sum += column_of_state[row * lanes];
        return sum;
      };
      if (b_sums) array<A>(x.b_parts)[to] = add_rows(b_sums);
      if (c_sums) array<A>(x.c_parts)[to] = add_rows(c_sums);
    }
    __syncthreads();
  }
}

// out [Di, N], or [Di] if N is 1, from parts [windows, Di, N].
template <class A>
__global__ void __launch_bounds__(kThreads) add_windows(const A* parts, int64_t windows, int64_t Di, int N, View out) {
  const int64_t i = this_thread();
  if (i >= Di * N) return;
  double sum = 0;
  for (int64_t window = 0; window < windows; window++) sum += double(parts[window * Di * N + i]);
  store(out, offset_of(out, i / N, i % N), sum);
}

// out [B, G, N, L] from parts [ranges, B, L, N]; a group has `ranges` of them.
template <class A>
__global__ void __launch_bounds__(kThreads)
    add_ranges(const A* parts, int64_t ranges, int64_t B, int64_t G, int64_t L, int N, Projection out) {
  const int64_t i = this_thread();
  if (i >= B * G * L * N) return;
  const int64_t n = i % N, t = i / N % L, g = i / N / L % G, b = i / N / L / G;
  double sum = 0;
  for (int64_t range = g * ranges; range < (g + 1) * ranges; range++)
    sum += double(parts[((range * B + b) * L + t) * N + n]);
  store(out.at, offset_of(out.at, b, g, n) + t * out.time_stride, sum);
}

// In the order of the results, and of the bits of `needs`.
enum Result { kU, kDelta, kA, kB, kC, kD, kZ, kDeltaBias, kInitialState, kResults };

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const std::optional<Tensor>& D, const std::optional<Tensor>& z, const std::optional<Tensor>& delta_bias,
    const std::optional<Tensor>& initial_state, const std::optional<Tensor>& cu_seqlens, bool delta_softplus,
    const Tensor& states, const Tensor& dy, const std::optional<Tensor>& d_final_state, int64_t needs) {
  const OnDevice on(u);
  ScanReverse x{};
  x.in = inputs_on_device(u, delta, A, B, C, D, z, delta_bias, delta_softplus, false);
  const auto [sequences, bounds] = monotone_sequences(u, u.size(0), u.size(2), cu_seqlens, on.stream);
  x.in.sequences = sequences;
  check_state(x.in, d_final_state);
  x.B = u.size(0);
  x.L = u.size(2);
  x.windows = checkpoint_rows(x.B, x.L, cu_seqlens);
  const int64_t Di = x.in.Di, N = x.in.N;
  STD_TORCH_CHECK(states.dim() == 3 && states.size(0) == x.windows && states.size(1) == Di && states.size(2) == N &&
                      states.scalar_type() == accumulator(u) && states.is_contiguous(),
                  "selective_scan: states must be what the forward saved");
  STD_TORCH_CHECK(dy.dim() == 3 && dy.size(0) == x.B && dy.size(1) == Di && dy.size(2) == x.L &&
                      dy.scalar_type() == u.scalar_type(),
                  "selective_scan: dy must have u's shape and dtype");

  const bool packed = cu_seqlens.has_value();
  const auto need = [&](Result which) { return bool(needs >> which & 1); };
  const auto result = [&](Result which, const std::optional<Tensor>& like, bool in_time) {
    return need(which) && like ? empty_or_zeros(*like, packed && in_time) : torch::stable::new_empty(u, {0});
  };
  const bool b_varies = B.dim() != 2, c_varies = C.dim() != 2;
  Tensor du = result(kU, u, true), ddelta = result(kDelta, delta, true), dA = result(kA, A, false);
  Tensor dB = result(kB, B, false), dC = result(kC, C, false), dD = result(kD, D, false), dz = result(kZ, z, true);
  Tensor ddelta_bias = result(kDeltaBias, delta_bias, false);
  Tensor d_initial = need(kInitialState) && initial_state
                         ? torch::stable::new_empty(u, {sequences.count, Di, N}, accumulator(u))
                         : torch::stable::new_empty(u, {0});
  const auto given = [](const Tensor& y, int dims) { return y.dim() == dims ? view(y, dims) : View{}; };
  x.states = view(states, 3);
  x.dy = view(dy, 3);
  x.d_final_state = view(d_final_state, 3);
  x.d_initial_state = given(d_initial, 3);
  x.du = given(du, 3);
  x.ddelta = given(ddelta, 3);
  x.dz = given(dz, 3);

  with_arithmetic(u, [&]<class R>() {
    constexpr int threads = kWindowThreads<R>;
    const int lanes = lanes_for(int(std::min<int64_t>(N, kSliceStates))), rows = threads / lanes;
    // The workspace, gone when the op returns. Steps that no packed sequence covers stay 0 in dB and dC.
    std::vector<Tensor> workspace;
    const auto take = [&](bool needed, std::vector<int64_t> size, bool zeros = false) -> void* {
      if (!needed) return nullptr;
      workspace.push_back(zeros ? torch::stable::new_zeros(u, size, accumulator(u))
                                : torch::stable::new_empty(u, size, accumulator(u)));
      return workspace.back().data_ptr();
    };
    const auto unit_of = [&](bool varies, const Projection& w) { return varies ? w.channels : Di; };
    Ranges& ranges = x.ranges;
    ranges.unit = std::max<int64_t>(std::gcd(unit_of(b_varies, x.in.B), unit_of(c_varies, x.in.C)), 1);
    ranges.length = std::min(ceil_div(2 * N, rows) * rows, ranges.unit);
    ranges.per_unit = ceil_div(ranges.unit, ranges.length);
    ranges.total = Di / ranges.unit * ranges.per_unit;

    x.steps = take(true, {x.B, x.L, Di});
    x.gates = take(true, {x.B, x.L, Di});
    x.d_states = take(true, {x.windows, Di, N});
    x.unfinished = take(N > lanes, {3, x.B, x.L, Di});
    x.dA = take(need(kA), {x.windows, Di, N});
    x.dB = take(need(kB) && !b_varies, {x.windows, Di, N});
    x.dC = take(need(kC) && !c_varies, {x.windows, Di, N});
    x.dD = take(need(kD) && D, {x.windows, Di});
    x.ddelta_bias = take(need(kDeltaBias) && delta_bias, {x.windows, Di});
    x.b_parts = take(need(kB) && b_varies, {ranges.total, x.B, x.L, N}, packed);
    x.c_parts = take(need(kC) && c_varies, {ranges.total, x.B, x.L, N}, packed);

    FLA_LAUNCH(prepare_kernel<R>, grid(ceil_div(x.B * x.L * Di, kThreads)), kThreads, 0, on.stream, x);
    FLA_LAUNCH(reverse_kernel<R>, grid(ceil_div(sequences.count * Di * N, kThreads)), kThreads, 0, on.stream, x);
    if (!(needs & ((1 << kInitialState) - 1))) return;
    const size_t shared = sizeof(R) * kBlockSteps * threads * (1 + bool(x.b_parts) + bool(x.c_parts));
    FLA_LAUNCH(window_kernel<R>, grid(x.windows * ranges.total), dim3(lanes, rows), shared, on.stream, x);

    // A result that is not needed is empty. One of no windows is not, though its parts are.
    const auto add_up = [&](void* parts, int64_t n, const Tensor& to) {
      if (to.numel() == 0) return;
      FLA_LAUNCH(add_windows<R>, grid(ceil_div(Di * n, kThreads)), kThreads, 0, on.stream, array<R>(parts), x.windows,
                 Di, int(n), view(to));
    };
    add_up(x.dA, N, dA);
    if (!b_varies) add_up(x.dB, N, dB);
    if (!c_varies) add_up(x.dC, N, dC);
    add_up(x.dD, 1, dD);
    add_up(x.ddelta_bias, 1, ddelta_bias);
    const auto add_groups = [&](void* parts, const Tensor& to) {
      if (to.numel() == 0) return;
      const int64_t G = to.size(1);
      FLA_LAUNCH(add_ranges<R>, grid(ceil_div(x.B * G * x.L * N, kThreads)), kThreads, 0, on.stream, array<R>(parts),
                 ranges.total / G, x.B, G, x.L, int(N), projection(to, Di, true));
    };
    if (b_varies) add_groups(x.b_parts, dB);
    if (c_varies) add_groups(x.c_parts, dC);
  });
  return {du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, d_initial};
}

}  // namespace
}  // namespace fla_ops

FLA_OPS_CUDA_IMPL(m) { m.impl("selective_scan_backward", TORCH_BOX(&fla_ops::backward)); }
