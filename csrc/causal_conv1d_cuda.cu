// SPDX-License-Identifier: Apache-2.0
//
// The causal depthwise convolution on CUDA, for machines without Triton: forward, backward, one-token step.
//
//   z_t = bias + sum_k w_k x_{t-(W-1)+k},   y_t = z_t or silu(z_t)
//
// A thread owns one channel and walks a strip of tokens, the batch's rows end to end, with the last 8 inputs in
// registers: each input is loaded once. Neighbouring threads own neighbouring channels, so that a channel-last x is read
// in whole lines; a channel-first x is read line by line through the cache. A strip does not stop at a sequence's end:
// there the window is filled afresh, from the initial state. Taps and window have 8 places, the last W of which are used,
// so that every index is known to the compiler.
//
// The backward walks time backwards, from W-1 tokens behind its strip: with g_t = dy_t silu'(z_t), z computed again,
// input p needs g_p .. g_{p+W-1}. A strip's parameter sums are kept in double, a run of 32 tokens in the arithmetic type
// before that, and `add_parts` adds the strips in a fixed order. The arithmetic type A is double for double, else float.
//
// To check first when a result is wrong: `Walk::move_to`, which decides what a token's window holds.
#include <algorithm>
#include <tuple>

#include "causal_conv1d_layout.h"
#include "cuda_op.h"
#include "device_view.h"

namespace fla_ops {
namespace {

using torch::stable::Tensor;

constexpr int kPlaces = 8;      // the widest convolution
constexpr int kThreads = 128;   // channels of a block
constexpr int kStrip = 32;      // tokens of a thread, at least; also the run of a sum that is not yet in double
constexpr int kMaxParts = 256;  // strips of the backward, which bound its workspace
constexpr int kRows = 8;        // add_parts: strips added at a time

struct Conv {
  View x;                 // [B, D, L]
  View weight, bias;      // [D, W], [D] or null
  View initial_state;     // [N, D, W-1] or null
  View y, final_state;    // forward: [B, D, L], [N, D, W-1]
  View dy, dfinal_state;  // backward: [B, D, L], [N, D, W-1] or null
  View dx;                // [B, D, L] or null
  View dinitial_state;    // [N, D, W-1]
  double* parts;          // [strips, W+1, D]: dweight transposed, then dbias; or null
  Sequences sequences;
  int64_t D, tokens;      // tokens = B L
  int64_t strip;          // tokens of a thread
  int W;
  bool silu;
};

// ------------------------------------------------------------------------------------------- kernels

template <class A> __device__ A sigmoid(A z) { return A(1) / (A(1) + exp(-z)); }

// Element t of a row of x or y.
template <class T> __device__ __forceinline__ T& at(const View& x, int64_t b, int64_t channel, int64_t t) {
  return reinterpret_cast<T*>(x.data)[offset_of(x, b, channel, t)];
}

// One channel's way through the tokens, one at a time, forwards or backwards.
template <class T> struct Walk {
  using A = Arithmetic<T>;
  const Conv& c;
  const int64_t channel;
  Span span = {0, -1, 0, 0};
  int64_t time = -2;  // the present token, in its batch row
  A tap[kPlaces], bias = 0, window[kPlaces];

  __device__ Walk(const Conv& conv, int64_t d) : c(conv), channel(d) {
#pragma unroll
    for (int k = 0; k < kPlaces; k++) {
      const int place = k - (kPlaces - c.W);
      tap[k] = place >= 0 ? load<A>(c.weight, offset_of(c.weight, channel, place)) : A(0);
      window[k] = 0;
    }
    if (c.bias.data) bias = load<A>(c.bias, offset_of(c.bias, channel));
  }

  // x_t of the present sequence, also from before its start.
  __device__ A input(int64_t t) const {
    if (t >= span.start) return widen<A>(at<T>(c.x, span.batch, channel, t));
    if (!c.initial_state.data) return 0;
    return load<A>(c.initial_state, offset_of(c.initial_state, span.index, channel, t - span.start + c.W - 1));
  }

  // To a token of the batch's rows laid end to end. True if that starts a new sequence, or tokens that lie in none.
  __device__ bool move_to(int64_t token) {
    const int64_t b = token / c.sequences.length, t = token - b * c.sequences.length, before = time;
    time = t;
    const bool fresh = b != span.batch || t < span.start || t >= span.end;
    if (fresh) span = c.sequences.cu_seqlens.data ? c.sequences.holding(t) : c.sequences[b];
    if (!covered()) return fresh;
    const int oldest = kPlaces - c.W;
    if (!fresh && t == before + 1) {
#pragma unroll
      for (int k = 0; k + 1 < kPlaces; k++) window[k] = window[k + 1];
      window[kPlaces - 1] = input(t);
    } else if (!fresh && t == before - 1) {
#pragma unroll
      for (int k = kPlaces - 1; k > 0; k--) window[k] = window[k - 1];
      const A arrived = input(t - (c.W - 1));
#pragma unroll
      for (int k = 0; k < kPlaces; k++)
        if (k == oldest) window[k] = arrived;
    } else {
#pragma unroll
      for (int k = 0; k < kPlaces; k++)
        if (k >= oldest) window[k] = input(t - (kPlaces - 1) + k);
    }
    return fresh;
  }

  __device__ bool covered() const { return span.index >= 0; }

  __device__ A filter() const {
    A z = bias;
#pragma unroll
    for (int k = 0; k < kPlaces; k++)
      if (k >= kPlaces - c.W) z += tap[k] * window[k];
    return z;
  }

  // g of the present token: the gradient of z.
  __device__ A gradient() const {
    const A dy = widen<A>(at<T>(c.dy, span.batch, channel, time));
    if (!c.silu) return dy;
    const A z = filter(), s = sigmoid(z);
    return dy * (s * (A(1) + z * (A(1) - s)));
  }

  // The gradient of input p from g[j] = g_{p+j}. Where the final state holds the input, its gradient joins.
  __device__ A input_gradient(const A* g, int64_t p) const {
    A dx = 0;
#pragma unroll
    for (int j = 0; j < kPlaces; j++)
      if (j < c.W) dx += tap[kPlaces - 1 - j] * g[j];
    const int64_t place = p - (span.end - (c.W - 1));
    if (place >= 0 && c.dfinal_state.data)
      dx += load<A>(c.dfinal_state, offset_of(c.dfinal_state, span.index, channel, place));
    return dx;
  }
};

// The channel and strip of this thread: blocks count groups of channels first.
struct Place {
  int64_t channel, strip;
  __device__ explicit Place(int64_t D) {
    const int64_t groups = (D + kThreads - 1) / kThreads;
    channel = blockIdx.x % groups * kThreads + threadIdx.x;
    strip = blockIdx.x / groups;
  }
};

template <class T> __global__ void conv_forward(Conv c) {
  using A = Arithmetic<T>;
  const Place place(c.D);
  if (place.channel >= c.D) return;
  Walk<T> walk(c, place.channel);
  const int64_t begin = place.strip * c.strip, end = min(begin + c.strip, c.tokens);
  for (int64_t token = begin; token < end; token++) {
    walk.move_to(token);
    A y = 0;
    if (walk.covered()) {
      y = walk.filter();
      if (c.silu) y *= sigmoid(y);
    }
    at<T>(c.y, walk.span.batch, place.channel, walk.time) = narrow<T>(y);
  }
}

// The last W-1 inputs of a sequence. A thread is a channel of a sequence.
template <class T> __global__ void conv_final_state(Conv c) {
  using A = Arithmetic<T>;
  const Place place(c.D);
  if (place.channel >= c.D) return;
  Walk<T> walk(c, place.channel);
  walk.span = c.sequences[place.strip];
  for (int k = 0; k < c.W - 1; k++) {
    const A x = walk.input(walk.span.end - (c.W - 1) + k);
    store<A>(c.final_state, offset_of(c.final_state, place.strip, place.channel, k), x);
  }
}

template <class T> __global__ void conv_backward(Conv c) {
  using A = Arithmetic<T>;
  const Place place(c.D);
  if (place.channel >= c.D) return;
  Walk<T> walk(c, place.channel);
  A g[kPlaces] = {}, run[kPlaces + 1] = {};     // g[j] is g_{t+j}; run: sums over dweight's places and dbias
  double sum[kPlaces + 1] = {};
  const int64_t begin = place.strip * c.strip, end = min(begin + c.strip, c.tokens);
  for (int64_t token = min(end + c.W - 1, c.tokens) - 1; token >= begin; token--) {
    const bool fresh = walk.move_to(token);
#pragma unroll
    for (int j = kPlaces - 1; j > 0; j--) g[j] = fresh ? A(0) : g[j - 1];
    g[0] = walk.covered() ? walk.gradient() : A(0);
    if (token >= end) continue;
    if (walk.covered()) {
#pragma unroll
      for (int k = 0; k < kPlaces; k++)
        if (k >= kPlaces - c.W) run[k] += g[0] * walk.window[k];
      run[kPlaces] += g[0];
    }
    if ((token - begin) % kStrip == 0) {
#pragma unroll
      for (int k = 0; k <= kPlaces; k++) {
        sum[k] += double(run[k]);
        run[k] = 0;
      }
    }
    if (c.dx.data) {
      const A dx = walk.covered() ? walk.input_gradient(g, walk.time) : A(0);
      at<T>(c.dx, walk.span.batch, place.channel, walk.time) = narrow<T>(dx);
    }
  }
  if (!c.parts) return;
#pragma unroll
  for (int k = 0; k <= kPlaces; k++) {
    const int row = k - (kPlaces - c.W);
    if (row >= 0) c.parts[(place.strip * (c.W + 1) + row) * c.D + place.channel] = sum[k];
  }
}

// The gradient of the W-1 inputs before a sequence. A thread is a channel of a sequence.
template <class T> __global__ void conv_initial_gradient(Conv c) {
  using A = Arithmetic<T>;
  const Place place(c.D);
  if (place.channel >= c.D) return;
  Walk<T> walk(c, place.channel);
  const Span span = c.sequences[place.strip];
  A g[kPlaces] = {};
  // At the end, g[j] is the g of time j - (W-1): those of the first W-1 tokens, behind as many zeros as come before them.
  for (int j = kPlaces - 1; j > 0; j--) {
    const int64_t t = j - 1;
    A gradient = 0;
    if (t < c.W - 1 && t < span.end - span.start) {
      walk.move_to(span.batch * c.sequences.length + span.start + t);
      gradient = walk.gradient();
    }
    g[j] = gradient;
  }
  walk.span = span;
  for (int64_t p = -1; p >= -(c.W - 1); p--) {
    // g[j] is g_{p+j}.
    const A dinitial = walk.input_gradient(g, span.start + p);
    store<A>(c.dinitial_state, offset_of(c.dinitial_state, place.strip, place.channel, p + c.W - 1), dinitial);
    for (int j = kPlaces - 1; j > 0; j--) g[j] = g[j - 1];
  }
}

// dweight [D, W] and dbias [D], either may be null, from `strips` parts [W+1, D]. A block is 32 channels of one tap, or
// of the bias: row r of its threads adds parts r, r + kRows, ..., and the first row adds the rows.
__global__ void add_parts(const double* parts, int64_t strips, int64_t D, int W, View dweight, View dbias) {
  FLA_SHARED(double, row_sum, kRows * 32);
  const int64_t channel = int64_t(blockIdx.x) * 32 + threadIdx.x;
  const int k = blockIdx.y;
  double sum = 0;
  if (channel < D)
    for (int64_t s = threadIdx.y; s < strips; s += kRows) sum += parts[(s * (W + 1) + k) * D + channel];
  row_sum[threadIdx.y * 32 + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || channel >= D) return;
  for (int row = 1; row < kRows; row++) sum += row_sum[row * 32 + threadIdx.x];
  if (k < W && dweight.data) store(dweight, offset_of(dweight, channel, k), sum);
  if (k == W && dbias.data) store(dbias, offset_of(dbias, channel), sum);
}

struct Step {
  View x, y;               // [B, D]
  View weight, bias;       // [D, W], [D] or null
  View state;              // [slots, D, W-1]
  Integers state_indices;  // [B] or null
  int64_t D, slots;
  int W;
  bool silu;
};

// A thread is a channel of a batch entry. Slots outside of the state are skipped: output 0.
template <class T> __global__ void conv_step(Step c) {
  using A = Arithmetic<T>;
  const Place place(c.D);
  if (place.channel >= c.D) return;
  const int64_t b = place.strip, d = place.channel, slot = c.state_indices.data ? c.state_indices[b] : b;
  A z = 0;
  if (slot >= 0 && slot < c.slots) {
    if (c.bias.data) z = load<A>(c.bias, offset_of(c.bias, d));
    const A present = widen<A>(at<T>(c.x, b, d, 0));
    for (int k = 0; k < c.W; k++) {
      const A x = k < c.W - 1 ? load<A>(c.state, offset_of(c.state, slot, d, k)) : present;
      if (k > 0) store<A>(c.state, offset_of(c.state, slot, d, k - 1), x);
      z += load<A>(c.weight, offset_of(c.weight, d, k)) * x;
    }
    if (c.silu) z *= sigmoid(z);
  }
  at<T>(c.y, b, d, 0) = narrow<T>(z);
}

// ------------------------------------------------------------------------------------------ launches

// The grid for `count` strips, or other units, of D channels each.
dim3 blocks(int64_t count, int64_t D) {
  const int64_t all = count * ((D + kThreads - 1) / kThreads);
  STD_TORCH_CHECK(all <= INT32_MAX, "causal_conv1d: too large for one launch");
  return dim3(unsigned(all));
}

Conv problem(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
             const std::optional<Tensor>& initial_state, const std::optional<Tensor>& cu_seqlens, bool silu) {
  const int64_t B = x.size(0), D = x.size(1), L = x.size(2);
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2 && weight.size(0) == D && weight.size(1) >= 1 &&
                      weight.size(1) <= kPlaces && (!bias || (bias->dim() == 1 && bias->size(0) == D)),
                  "causal_conv1d: x must be [B, D, L], weight [D, W] with W from 1 to 8, bias [D]");
  Conv c{};
  c.x = view(x, 3);
  c.weight = view(weight, 2);
  c.bias = view(bias, 1);
  c.initial_state = view(initial_state, 3);
  c.sequences = sequences_on_device(B, L, cu_seqlens);
  c.D = D;
  c.tokens = B * L;
  c.strip = kStrip;
  c.W = int(weight.size(1));
  c.silu = silu;
  return c;
}

void check_state(const Conv& c, const std::optional<Tensor>& state) {
  STD_TORCH_CHECK(!state || (state->dim() == 3 && state->size(0) == c.sequences.count && state->size(1) == c.D &&
                             state->size(2) == c.W - 1),
                  "causal_conv1d: states must be [N, D, W-1]");
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                   const std::optional<Tensor>& initial_state,
                                   const std::optional<Tensor>& cu_seqlens, bool silu) {
  const OnDevice on(x);
  Conv c = problem(x, weight, bias, initial_state, cu_seqlens, silu);
  check_state(c, initial_state);
  Tensor y = empty_with_layout(x, channels_last(x));
  Tensor final_state = torch::stable::new_empty(x, {c.sequences.count, c.D, c.W - 1}, accumulator(x));
  c.y = view(y, 3);
  c.final_state = view(final_state, 3);
  with_dtype(x, [&]<class T>() {
    FLA_LAUNCH(conv_forward<T>, blocks((c.tokens + c.strip - 1) / c.strip, c.D), kThreads, 0, on.stream, c);
    if (c.W > 1) FLA_LAUNCH(conv_final_state<T>, blocks(c.sequences.count, c.D), kThreads, 0, on.stream, c);
  });
  return {y, final_state};
}

// needs: bits of x, weight, bias, initial_state. A gradient that is not needed comes back empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& x, const Tensor& weight,
                                                    const std::optional<Tensor>& bias,
                                                    const std::optional<Tensor>& initial_state,
                                                    const std::optional<Tensor>& cu_seqlens, bool silu,
                                                    const Tensor& dy, const std::optional<Tensor>& dfinal_state,
                                                    int64_t needs) {
  const OnDevice on(x);
  Conv c = problem(x, weight, bias, initial_state, cu_seqlens, silu);
  check_state(c, initial_state);
  check_state(c, dfinal_state);
  STD_TORCH_CHECK(dy.dim() == 3 && dy.size(0) == x.size(0) && dy.size(1) == c.D && dy.size(2) == x.size(2) &&
                      dy.scalar_type() == x.scalar_type(),
                  "causal_conv1d: dy must have x's shape and dtype");
  const bool need_x = needs & 1, need_weight = needs & 2, need_bias = (needs & 4) && bias, need_state = needs & 8;
  const auto none = [&] { return torch::stable::new_empty(x, {0}); };
  Tensor dx = need_x ? empty_with_layout(x, channels_last(x)) : none();
  Tensor dweight = need_weight ? torch::stable::new_empty(weight, {c.D, c.W}) : none();
  Tensor dbias = need_bias ? torch::stable::new_empty(*bias, {c.D}) : none();
  Tensor dinitial =
      need_state ? torch::stable::new_empty(x, {c.sequences.count, c.D, c.W - 1}, accumulator(x)) : none();
  c.dy = view(dy, 3);
  c.dfinal_state = view(dfinal_state, 3);
  if (need_x) c.dx = view(dx, 3);

  c.strip = std::max<int64_t>(kStrip, (c.tokens + kMaxParts - 1) / kMaxParts);
  const int64_t strips = (c.tokens + c.strip - 1) / c.strip;
  const bool need_sums = need_weight || need_bias;
  Tensor parts = torch::stable::new_empty(x, {need_sums ? strips : 0, c.W + 1, c.D},
                                          torch::headeronly::ScalarType::Double);
  if (need_sums) c.parts = static_cast<double*>(parts.data_ptr());
  with_dtype(x, [&]<class T>() {
    if (need_x || need_sums) FLA_LAUNCH(conv_backward<T>, blocks(strips, c.D), kThreads, 0, on.stream, c);
    if (need_state && c.W > 1) {
      c.dinitial_state = view(dinitial, 3);
      FLA_LAUNCH(conv_initial_gradient<T>, blocks(c.sequences.count, c.D), kThreads, 0, on.stream, c);
    }
  });
  if (need_sums)
    FLA_LAUNCH(add_parts, dim3(unsigned((c.D + 31) / 32), c.W + 1), dim3(32, kRows), 0, on.stream, c.parts, strips,
               c.D, c.W, need_weight ? view(dweight, 2) : View{}, need_bias ? view(dbias, 1) : View{});
  return {dx, dweight, dbias, dinitial};
}

Tensor step(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Tensor state, bool silu,
            const std::optional<Tensor>& state_indices) {
  const OnDevice on(x);
  const int64_t B = x.size(0), D = x.size(1), W = weight.size(1), slots = state.size(0);
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && weight.size(0) == D && W >= 1 && W <= kPlaces &&
                      (!bias || (bias->dim() == 1 && bias->size(0) == D)) && state.dim() == 3 &&
                      state.size(1) == D && state.size(2) == W - 1 && (state_indices || slots >= B) &&
                      (!state_indices || (state_indices->dim() == 1 && state_indices->size(0) == B)),
                  "causal_conv1d_step: x must be [B, D], weight [D, W], bias [D], state [slots, D, W-1]");
  Tensor y = torch::stable::new_empty(x, {B, D});
  const Step c{view(x, 2),    view(y, 2),    view(weight, 2), view(bias, 1), view(state, 3), integers(state_indices),
               D,             slots,         int(W),          silu};
  with_dtype(x, [&]<class T>() { FLA_LAUNCH(conv_step<T>, blocks(B, D), kThreads, 0, on.stream, c); });
  return y;
}

}  // namespace
}  // namespace fla_ops

FLA_OPS_CUDA_IMPL(m) {
  m.impl("causal_conv1d_forward", TORCH_BOX(&fla_ops::forward));
  m.impl("causal_conv1d_backward", TORCH_BOX(&fla_ops::backward));
  m.impl("causal_conv1d_step", TORCH_BOX(&fla_ops::step));
}
