// SPDX-License-Identifier: Apache-2.0
//
// What temporal-sparse attention's CUDA kernels share: how they see the inputs, which keys a query sees how, a block's
// rows in shared memory and the two products taken of them, and the held keys.
//
// A block of four warps owns some rows of one head, queries or in the gradients of keys and values keys, R for each
// warp, and walks over the other side in tiles of 32 rows, one for each lane. Of products that make scores a lane has
// its own row with each of the warp's; of those that make outputs and gradients it has columns lane, lane + 32, ..., C
// of them, of each of the warp's rows. The other side passes through shared memory in slices of a row's channels.
//
// A pair of a query and a key is seen in one of two ways, exactly or as the key is held. A walk takes each way by
// itself: a tile that has pairs of both is walked over twice, with other keys and the other pairs left out.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "cuda_op.h"
#include "device_view.h"
#include "monotone_sequences.h"

namespace fla_ops {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kTile = 32;  // rows of the other side: one a lane
constexpr int kMaxHeadDim = 256;

// R x C accumulators of a lane, 32 at most.
template <class A, int C> constexpr int kRows = sizeof(A) == 8 || C == 8 ? 4 : 8;
template <class A> constexpr int kSlice = 256 / int(sizeof(A));  // channels of a slice
template <class A> constexpr int kSliceColumns = kSlice<A> / 32;
template <class A> constexpr int kPitch = kSlice<A> + 4;  // of a slice's rows: lanes that read their own do not collide

// Which keys of its sequence a query at position i sees exactly: of those up to i, from start(i) on and sinks.
struct Window {
  int tokens, sink;
  bool blocks;

  __device__ __forceinline__ int start(int i) const { return blocks ? i / tokens * tokens : i - tokens + 1; }
  // `begin` is start(i).
  __device__ __forceinline__ bool sees(int i, int begin, int j, bool exactly) const {
    return j <= i && (j >= begin || j < sink) == exactly;
  }
  // False if none of the queries [i, i + queries) sees one of the keys [j, j + keys) in this way.
  __device__ __forceinline__ bool any(int i, int queries, int j, int keys, bool exactly) const {
    if (exactly) return j + keys > start(i) || j < sink;
    return max(j, sink) < min(start(i + queries - 1), j + keys);
  }
};

struct SparseInputs {
  View q, k, v;              // [B, Tq, HQ, D], [B, T, HK, D], [B, T, HK, DV]
  View held;                 // [B, T, HK, D], contiguous, in k's dtype; data null if no score takes a held key
  const void* threshold;     // [HK, D] in the arithmetic's dtype
  Sequences sequences;       // of keys
  Window window;
  int offset;                // T - Tq, the position of the first query
  int HQ, HK, D, DV;
  double scale;
};

// Rows [first, first + count) of a sequence of `length` keys that starts at token `start`; count may be 0 or less.
struct Tile {
  int64_t batch, start;
  int length, first, count;
};

// Number `index` of the tiles of `rows` rows, of which each sequence has its length less `offset`. start / rows + n
// leaves room for the rounding up of all sequences before.
__device__ inline Tile tile_at(const Sequences& sequences, int64_t index, int rows, int offset) {
  int64_t n, first;
  if (!sequences.cu_seqlens.data) {
    const int64_t tiles = (sequences.length - offset + rows - 1) / rows;
    n = index / tiles;
    first = index % tiles * rows;
  } else {
    int64_t low = 0, high = sequences.count;  // the tile belongs to a sequence in [low, high)
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (sequences[middle].start / rows + middle <= index) low = middle;
      else high = middle;
    }
    n = low;
    first = (index - sequences[n].start / rows - n) * rows;
  }
  const Span span = sequences[n];
  const int64_t length = span.end - span.start, left = first < 0 ? 0 : length - offset - first;
  return {span.batch, span.start, int(length), int(first), int(min(left, int64_t(rows)))};
}

// ------------------------------------------------------------------------------------------- rows and products

// Four elements that are read at once.
template <class A> struct alignas(16) Four {
  A x[4];
};
template <class A> __device__ __forceinline__ Four<A> four(const A* at) {
  return *reinterpret_cast<const Four<A>*>(at);
}

// Channels in shared memory for rows of `n`: whole slices.
template <class A> __host__ __device__ __forceinline__ int padded(int n) {
  return (n + kSlice<A> - 1) / kSlice<A> * kSlice<A>;
}

// One slice of `rows` rows from global to shared memory, by all threads; of it `live_rows` and `channels` exist, the
// rest is 0.
template <int rows, class A, class T>
__device__ __forceinline__ void stage(A* to, int pitch, const T* from, int64_t stride, int live_rows, int channels) {
  const int lane = threadIdx.x % 32;
  FLA_UNROLL for (int n = 0; n < rows / kWarps; n++) {
    const int row = threadIdx.x / 32 + kWarps * n;
    FLA_UNROLL for (int c = lane; c < kSlice<A>; c += 32) {
      const bool live = row < live_rows && c < channels;
      to[row * pitch + c] = live ? widen<A>(from[row * stride + c]) : A(0);
    }
  }
}

// All channels of a block's own rows.
template <int rows, class A, class T>
__device__ void stage_rows(A* to, const T* from, int64_t stride, int live_rows, int channels) {
  for (int c = 0; c < channels; c += kSlice<A>)
    stage<rows>(to + c, padded<A>(channels), from + c, stride, live_rows, channels - c);
}

template <class T>
__device__ __forceinline__ const T* rows_of(const View& x, int64_t batch, int64_t token, int64_t head) {
  return reinterpret_cast<const T*>(x.data) + offset_of(x, batch, token, head);
}

// The slice from channel c on of the other side's rows of a tile, `token` being the first: before, all threads are done
// with the last slice, and after they see this one.
template <class T, class A>
__device__ __forceinline__ void stage_slice(A* slice, const View& of, int64_t batch, int64_t token, int64_t head, int c,
                                            int live_rows, int channels) {
  __syncthreads();
  stage<kTile>(slice, kPitch<A>, rows_of<T>(of, batch, token, head) + c, of.stride[1], live_rows, channels - c);
  __syncthreads();
}

// products[r] += row r of the warp times the lane's row, over `channels` channels of a slice.
template <class A, int R>
__device__ __forceinline__ void add_products(A (&products)[R], const A* rows, int pitch, const A* slice, int channels) {
  const A* const mine = slice + threadIdx.x % 32 * kPitch<A>;
  A sums[R] = {};
  for (int c = 0; c < min(channels, kSlice<A>); c += 4) {
    const Four<A> x = four(mine + c);
    FLA_UNROLL for (int r = 0; r < R; r++) {
      const Four<A> y = four(rows + r * pitch + c);
      FLA_UNROLL for (int i = 0; i < 4; i++) sums[r] += y.x[i] * x.x[i];
    }
  }
  FLA_UNROLL for (int r = 0; r < R; r++) products[r] += sums[r];
}

// sums[r][c] += weights[r][j] times column c of row j < `rows` of slice n, where has(r, j): elsewhere the weight is 0,
// which NaN would survive.
template <class A, int R, int C, class Has>
__device__ __forceinline__ void add_weighted(A (&sums)[R][C], int n, const A* weights, const A* slice, int rows,
                                             const Has& has) {
  const int lane = threadIdx.x % 32;
  for (int j = 0; j < rows; j += 4) {
    Four<A> w[R];
    FLA_UNROLL for (int r = 0; r < R; r++) w[r] = four(weights + r * kTile + j);
    FLA_UNROLL for (int i = 0; i < 4; i++)
      FLA_UNROLL for (int c = 0; c < kSliceColumns<A>; c++) {
        const A x = slice[(j + i) * kPitch<A> + lane + 32 * c];
        FLA_UNROLL for (int r = 0; r < R; r++)
          if (has(r, j + i)) sums[r][n * kSliceColumns<A> + c] += w[r].x[i] * x;
      }
  }
}

template <class A> __device__ __forceinline__ A max_lanes(A x) {
  FLA_UNROLL for (int bit = 16; bit > 0; bit /= 2) x = max(x, __shfl_xor_sync(kWarp, x, bit));
  return x;
}
template <class A> __device__ __forceinline__ A sum_lanes(A x) {
  FLA_UNROLL for (int bit = 16; bit > 0; bit /= 2) x += __shfl_xor_sync(kWarp, x, bit);
  return x;
}

// factor times the warp's rows to `to`, whose rows are `stride` apart; `live_rows` of them and `channels` exist.
template <class A, int R, int C>
__device__ void store_rows(const View& to, int64_t at, int64_t stride, const A (&rows)[R][C], A factor, int live_rows,
                           int channels) {
  const int lane = threadIdx.x % 32;
  FLA_UNROLL for (int r = 0; r < R; r++)
    FLA_UNROLL for (int c = 0; c < C; c++)
      if (r < live_rows && lane + 32 * c < channels) store(to, at + r * stride + lane + 32 * c, factor * rows[r][c]);
}

// ------------------------------------------------------------------------------------------- held keys

constexpr int kHoldRun = 32;   // tokens whose counts are added up together
constexpr int kHoldAhead = 8;  // tokens that are read ahead: nothing that is read depends on what fires

// A block is one key head of one sequence, a thread one channel: it walks over the tokens. `held`, like in.held, and
// `fired` [B, HK, T] may be null.
template <class T> __global__ void __launch_bounds__(kMaxHeadDim) hold_kernel(SparseInputs x, T* held, int32_t* fired) {
  using A = Arithmetic<T>;
  // Of each warp and token of a run. Two of them: while some warps still add up one run's, others write the next one's.
  constexpr int set = kMaxHeadDim / 32 * kHoldRun;
  FLA_SHARED(int, counts, 2 * set);
  const int channel = threadIdx.x, warps = blockDim.x / 32, warp = channel / 32;
  const int64_t head = blockIdx.x % x.HK, pitch = int64_t(x.HK) * x.D;
  const Span span = x.sequences[blockIdx.x / x.HK];
  const bool live = channel < x.D;
  const A limit = live ? static_cast<const A*>(x.threshold)[head * x.D + channel] : A(0);
  const T* const keys = reinterpret_cast<const T*>(x.k.data) + offset_of(x.k, span.batch, 0, head) + channel;
  if (held) held += span.batch * x.sequences.length * pitch + head * x.D + channel;
  if (fired) fired += (span.batch * x.HK + head) * x.sequences.length;

  T now(0);
  for (int64_t first = span.start; first < span.end; first += kHoldRun) {
    const int run = int(min(span.end - first, int64_t(kHoldRun)));
    int* const of_run = counts + (first - span.start) / kHoldRun % 2 * set;
    for (int ahead = 0; ahead < run; ahead += kHoldAhead) {
      T next[kHoldAhead];
      FLA_UNROLL for (int i = 0; i < kHoldAhead; i++)
        next[i] = live && ahead + i < run ? keys[(first + ahead + i) * x.k.stride[1]] : T(0);
      FLA_UNROLL for (int i = 0; i < kHoldAhead; i++) {
        const int64_t t = first + ahead + i;
        if (t >= span.end) break;
        const A change = widen<A>(next[i]) - widen<A>(now);
        const bool fires = live && (t == span.start || !(std::fabs(change) <= limit));  // a NaN does
        if (fires) now = next[i];
        if (live && held) held[t * pitch] = now;
        if (!fired) continue;
        const unsigned all = __ballot_sync(kWarp, fires);
        if (channel % 32 == 0) of_run[warp * kHoldRun + ahead + i] = __popc(all);
      }
    }
    if (!fired) continue;
    __syncthreads();
    for (int i = channel; i < run; i += blockDim.x) {
      int total = 0;
      for (int w = 0; w < warps; w++) total += of_run[w * kHoldRun + i];
      fired[first + i] = total;
    }
  }
}

// ------------------------------------------------------------------------------------------- the torch side

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline unsigned grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= INT32_MAX, "temporal_sparse_attention: too large for one launch");
  return unsigned(blocks);
}

// Tiles of `rows` of the L tokens of each batch row; an upper bound for packed sequences.
inline int64_t tile_count(const Sequences& sequences, int64_t L, int rows) {
  if (!sequences.cu_seqlens.data) return sequences.count * ceil_div(L, rows);
  return sequences.count == 0 ? 0 : ceil_div(L, rows) + sequences.count - 1;
}

inline SparseInputs inputs_on_device(const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                                     const torch::stable::Tensor& v, const torch::stable::Tensor& threshold,
                                     const std::optional<torch::stable::Tensor>& cu_seqlens, double scale,
                                     int64_t window, bool window_blocks, int64_t sink, bool holds) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && k.size(0) == q.size(0) && v.size(0) == q.size(0) &&
                      v.size(1) == k.size(1) && v.size(2) == k.size(2) && k.size(3) == q.size(3) &&
                      q.size(1) <= k.size(1) && k.size(2) > 0 && q.size(2) % k.size(2) == 0 &&
                      k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() &&
                      std::max(q.size(3), v.size(3)) <= kMaxHeadDim && k.size(1) <= INT32_MAX,
                  "temporal_sparse_attention: q must be [B, Tq, HQ, D], k [B, T, HK, D], v [B, T, HK, DV] of one "
                  "dtype, with Tq <= T < 2^31, HQ a multiple of HK, D and DV up to 256");
  STD_TORCH_CHECK(threshold.dim() == 2 && threshold.size(0) == k.size(2) && threshold.size(1) == k.size(3) &&
                      threshold.is_contiguous() && threshold.scalar_type() == accumulator(q) && window >= 1 &&
                      sink >= 0 && (!cu_seqlens || q.size(1) == k.size(1)),
                  "temporal_sparse_attention: threshold must be a contiguous [HK, D] of the arithmetic type, "
                  "window >= 1, sink >= 0, and Tq = T with cu_seqlens");
  const int64_t T = k.size(1), most = std::max<int64_t>(T, 1);
  SparseInputs x{};
  x.q = view(q, 3);
  x.k = view(k, 3);
  x.v = view(v, 3);
  x.threshold = threshold.data_ptr();
  x.window = {int(holds ? std::min(window, most) : most), int(std::min(sink, T)), holds && window_blocks};
  x.offset = int(T - q.size(1));
  x.HQ = int(q.size(2));
  x.HK = int(k.size(2));
  x.D = int(q.size(3));
  x.DV = int(v.size(3));
  x.scale = scale;
  return x;
}

namespace {

// Held keys like k, contiguous; and into `fired`, unless it is null, how many channels fired at each key.
template <class T>
void hold(const SparseInputs& x, const std::optional<torch::stable::Tensor>& held, int32_t* fired, Stream stream) {
  const unsigned threads = unsigned(ceil_div(x.D, 32)) * 32;
  T* const to = held ? static_cast<T*>(held->data_ptr()) : nullptr;
  FLA_LAUNCH(hold_kernel<T>, grid(x.sequences.count * x.HK), threads, 0, stream, x, to, fired);
}

// Calls f.operator()<T, C>() for the dtype of q and the fewest columns a lane that hold `channels`.
template <class F> void with_columns(const torch::stable::Tensor& q, int channels, const F& f) {
  with_dtype(q, [&]<class T>() {
    if (channels <= 64) f.template operator()<T, 2>();
    else if (channels <= 128) f.template operator()<T, 4>();
    else f.template operator()<T, 8>();
  });
}

}  // namespace
}  // namespace fla_ops
