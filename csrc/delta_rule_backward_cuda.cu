// SPDX-License-Identifier: Apache-2.0
//
// The delta rule for CUDA: gradients. delta_rule_cuda.h says how a warp holds its columns of S and dS.
//
// `reverse_kernel`, parallel as the forward: a warp walks its sequence from the end. With S' = e^g S_{t-1},
// r = v - S'^T k, u = beta r, S = S' + k u^T and dS the gradient of S, a token does
//   dS <- dS + scale q dO^T      du = dS^T k      dv = beta du      dbeta = r . du      dq = scale S dO
//   dk = dS u - S' dv            dS <- dS - k dv^T                  dg = e^g <dS, S_{t-1}>    dS <- e^g dS
// S_{t-1} is not recovered from S, for which e^g may be too small. Blocks of 64 tokens are replayed from the state
// saved at their start: once to keep a state every 8 tokens, then 8 tokens at a time to keep them all, in `scratch`.
// dq, dk, dbeta and dg are sums over the columns of V: over a warp's columns in registers, over a block's warps in
// shared memory, over blocks and a head group in `finish_kernel`.
// Workspace: 16 states a sequence and value head; 2 K + 2 values a token, value head and block of 64 columns (at most;
// 32 for K > 128), half as many columns for float64.
#include <tuple>

#include "delta_rule_backward_cuda.h"

namespace fla_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kGroup = 8;                                                 // tokens whose states are kept at a time
constexpr int kScratchStates = kCheckpointTokens / kGroup + kGroup;       // a warp keeps

struct DeltaRuleReverse {
  DeltaRuleInputs in;      // in.checkpoints: what the forward saved
  View d_o;                // [B, T, HV, V]
  View d_final_state;      // [N, HV, K, V]; data may be null
  View dv;                 // [B, T, HV, V]
  View d_initial_state;    // [N, HV, K, V]
  // A block's sums over its columns, [tiles, B, T, HV, K] and [tiles, B, T, HV], in the arithmetic's dtype.
  void *dq_parts, *dk_parts, *dbeta_parts, *dg_parts;
  void* scratch;           // [warps, kScratchStates, R, C, 32]
  int64_t B, T;
  int needs;               // only these gradients are computed
};

// state: from before token `first` to after `count` tokens. `keep` saves what the way back needs: the state before each
// token, in slots 0 to count - 1, and each token's v - S'^T k.
template <class T, class A, int R, int C>
__device__ __forceinline__ void replay(A (&state)[R][C], const DeltaRuleInputs& in, const Place& p, int64_t first,
                                       int count, bool keep, const Scratch<A, R, C>& scratch, A* residuals) {
  RawToken<T, R, C> next;
  next.read(in, in.v, p, first);
  for (int i = 0; i < count; i++) {
    const Token<A, R, C> token(next, in);
    if (i + 1 < count) next.read(in, in.v, p, first + i + 1);
    if (keep) scratch.save(state, i);
    A residual[C];
    decay_and_compare(state, residual, token, p, in.K);
    if (keep && p.lane < C) residuals[i * C + p.lane] = own_element(residual, p.lane);
    FLA_UNROLL for (int j = 0; j < R; j++)
      if (p.row(j) < in.K) {
        FLA_UNROLL for (int c = 0; c < C; c++) state[j][c] += token.k[j] * (token.beta * residual[c]);
      }
  }
}

template <class T, int R>
__global__ void __launch_bounds__(32 * kReverseWarps<Arithmetic<T>>) reverse_kernel(DeltaRuleReverse x) {
  using A = Arithmetic<T>;
  constexpr int C = kColumns<A, R>, W = kReverseWarps<A>, rows = 32 * R;
  // Two of each: while some warps still add up one token's sums, others write the next token's.
  FLA_SHARED(A, dq_sums, 2 * W * rows);
  FLA_SHARED(A, dk_sums, 2 * W * rows);
  FLA_SHARED(A, scalar_sums, 2 * W * 2);     // dbeta, dg
  FLA_SHARED(A, residuals, W * kGroup * C);  // of the tokens of a group

  const DeltaRuleInputs& in = x.in;
  const int K = in.K, warps = blockDim.x / 32;
  const Place p = find_place<C>(in);
  const Scratch<A, R, C> scratch(x.scratch, kScratchStates);
  A* const my_residuals = residuals + p.warp * kGroup * C;
  const bool sums = x.needs & (kNeedQ | kNeedK | kNeedBeta | kNeedG);  // dv and the states need no S
  const A scale = A(in.scale);

  A ds[R][C];
  load_state(ds, x.d_final_state, p.span.index, p, K);
  const int64_t length = p.span.end - p.span.start;
  int buffer = 0;
  for (int64_t block = (length + kCheckpointTokens - 1) / kCheckpointTokens - 1; block >= 0; block--) {
    const int64_t first = p.span.start + block * kCheckpointTokens;
    const int tokens = int(min(p.span.end - first, int64_t(kCheckpointTokens)));
    const int groups = (tokens + kGroup - 1) / kGroup;
    if (sums) {
      A state[R][C];
      load_state(state, in.checkpoints, p.first_checkpoint + block, p, K);
      scratch.save(state, kGroup);
      for (int n = 1; n < groups; n++) {
        replay<T>(state, in, p, first + (n - 1) * kGroup, kGroup, false, scratch, my_residuals);
        scratch.save(state, kGroup + n);
      }
    }
    for (int n = groups - 1; n >= 0; n--) {
      const int64_t begin = first + n * kGroup;
      const int count = min(tokens - n * kGroup, kGroup);
      if (sums) {
        A state[R][C];
        scratch.restore(state, kGroup + n);
        replay<T>(state, in, p, begin, count, true, scratch, my_residuals);
        __syncwarp(kWarp);
      }
      RawToken<T, R, C> next;
      next.read(in, x.d_o, p, begin + count - 1);
      for (int i = count - 1; i >= 0; i--) {
        const int64_t t = begin + i;
        const Token<A, R, C> token(next, in);
        if (i > 0) next.read(in, x.d_o, p, t - 1);

        A du[C], dv[C];
        FLA_UNROLL for (int c = 0; c < C; c++) du[c] = 0;
        FLA_UNROLL for (int j = 0; j < R; j++)
          if (p.row(j) < K) {
            const A q = scale * token.q[j];
            FLA_UNROLL for (int c = 0; c < C; c++) {
              ds[j][c] += q * token.y[c];
              du[c] += ds[j][c] * token.k[j];
            }
          }
        sum_columns_for_all(du, p.lane);
        FLA_UNROLL for (int c = 0; c < C; c++) dv[c] = token.beta * du[c];
        if (x.needs & kNeedV && p.lane < p.columns)
          reinterpret_cast<T*>(x.dv.data)[offset_of(x.dv, p.span.batch, t, p.head) + p.column + p.lane] =
              narrow<T>(own_element(dv, p.lane));

        A residual[C], dbeta = 0, dg = 0;
        if (sums) {
          FLA_UNROLL for (int c = 0; c < C; c++) {
            residual[c] = my_residuals[i * C + c];
            if (c < p.columns) dbeta += residual[c] * du[c];
          }
        }
        FLA_UNROLL for (int j = 0; j < R; j++)
          if (p.row(j) < K) {
            A dq = 0, dk = 0;
            FLA_UNROLL for (int c = 0; c < C; c++)
              if (c < p.columns) {
                const A d = ds[j][c], d_decayed = d - token.k[j] * dv[c];
                if (sums) {
                  const A u = token.beta * residual[c], before = scratch.at(i, j, c), decayed = token.decay * before;
                  dq += (decayed + token.k[j] * u) * token.y[c];
                  dk += d * u - decayed * dv[c];
                  dg += d_decayed * before;
                }
                ds[j][c] = token.decay * d_decayed;
              }
            if (sums) {
              const int at = (buffer * W + p.warp) * rows + p.row(j);
              dq_sums[at] = dq;
              dk_sums[at] = dk;
            }
          }
        if (!sums) continue;

        if (x.needs & kNeedG) dg = token.decay * sum_lanes(dg);
        A* const scalars = scalar_sums + buffer * W * 2;
        if (p.lane == 0) {
          scalars[p.warp * 2] = dbeta;
          scalars[p.warp * 2 + 1] = dg;
        }
        __syncthreads();
        const int64_t token_head = ((p.tile * x.B + p.span.batch) * x.T + t) * in.HV + p.head;
        const auto add_warps = [&](const A* from, int stride) {
          A sum = from[0];
          for (int w = 1; w < warps; w++) sum += from[w * stride];
          return sum;
        };
        for (int row = threadIdx.x; row < K; row += blockDim.x) {
          const int at = buffer * W * rows + row;
          if (x.needs & kNeedQ)
            static_cast<A*>(x.dq_parts)[token_head * K + row] = scale * add_warps(dq_sums + at, rows);
          if (x.needs & kNeedK) static_cast<A*>(x.dk_parts)[token_head * K + row] = add_warps(dk_sums + at, rows);
        }
        if (threadIdx.x == 0) {
          if (x.needs & kNeedBeta) static_cast<A*>(x.dbeta_parts)[token_head] = add_warps(scalars, 2);
          if (x.needs & kNeedG) static_cast<A*>(x.dg_parts)[token_head] = add_warps(scalars + 1, 2);
        }
        buffer ^= 1;
      }
    }
  }
  if (x.needs & kNeedState) store_state(ds, x.d_initial_state, p.span.index, p, K);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta, const std::optional<Tensor>& g, double scale,
    const std::optional<Tensor>& initial_state, const std::optional<Tensor>& cu_seqlens, bool qk_l2norm,
    const Tensor& states, const Tensor& d_o, const std::optional<Tensor>& d_final_state, int64_t needs) {
  check_shapes(q, k, v, beta, g, 2);
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2), K = q.size(3), HV = v.size(2), V = v.size(3);
  DeltaRuleReverse x{};
  x.in = inputs_on_device(q, k, v, beta, g, scale, qk_l2norm);
  x.in.sequences = sequences_on_device(B, T, cu_seqlens);
  const int64_t N = x.in.sequences.count;
  check_gradients(v, states, checkpoint_rows(B, T, cu_seqlens), K, d_o);
  check_state(d_final_state, N, HV, K, V);
  if (!g) needs &= ~kNeedG;
  if (!initial_state) needs &= ~kNeedState;

  const ScalarType type = q.scalar_type(), exact = accumulator(q);
  const auto make = [&](int bit, std::vector<int64_t> size, ScalarType dtype) {
    if (!(needs & bit)) return torch::stable::new_empty(q, {0}, dtype);
    // Rows that no packed sequence covers stay 0.
    return cu_seqlens ? torch::stable::new_zeros(q, size, dtype) : torch::stable::new_empty(q, size, dtype);
  };
  Tensor dq = make(kNeedQ, {B, T, H, K}, type), dk = make(kNeedK, {B, T, H, K}, type);
  Tensor dv = make(kNeedV, {B, T, HV, V}, type);
  Tensor dbeta = make(kNeedBeta, {B, T, HV}, beta.scalar_type());
  Tensor dg = make(kNeedG, {B, T, HV}, g ? g->scalar_type() : type);
  Tensor d_initial = make(kNeedState, {N, HV, K, V}, exact);

  x.in.checkpoints = view(states, 3);
  x.d_o = view(d_o, 3);
  x.d_final_state = view(d_final_state, 3);
  x.B = B;
  x.T = T;
  x.needs = int(needs);
  if (needs & kNeedV) x.dv = view(dv, 3);
  if (needs & kNeedState) x.d_initial_state = view(d_initial, 3);

  DeltaRuleFinish y{};
  y.q = x.in.q;
  y.k = x.in.k;
  if (needs & kNeedQ) y.dq = view(dq, 3);
  if (needs & kNeedK) y.dk = view(dk, 3);
  if (needs & kNeedBeta) y.dbeta = view(dbeta, 3);
  if (needs & kNeedG) y.dg = view(dg, 3);
  y.B = B;
  y.T = T;
  y.H = H;
  y.HV = HV;
  y.K = int(K);
  y.qk_l2norm = qk_l2norm;

  const OnDevice on(q);
  with_rows(q, int(K), [&]<class Q, int R>() {
    using A = Arithmetic<Q>;
    constexpr int C = kColumns<A, R>;
    const Columns columns(int(V), C, kReverseWarps<A>);
    const unsigned blocks = columns.blocks(N * HV), threads = 32 * columns.warps;
    x.in.tiles = y.tiles = columns.tiles;
    // The workspace, gone when the op returns.
    const Tensor dq_parts = make(kNeedQ, {columns.tiles, B, T, HV, K}, exact);
    const Tensor dk_parts = make(kNeedK, {columns.tiles, B, T, HV, K}, exact);
    const Tensor dbeta_parts = make(kNeedBeta, {columns.tiles, B, T, HV}, exact);
    const Tensor dg_parts = make(kNeedG, {columns.tiles, B, T, HV}, exact);
    const Tensor scratch = torch::stable::new_empty(q, {int64_t(blocks) * threads * kScratchStates * R * C}, exact);
    y.dq_parts = x.dq_parts = dq_parts.data_ptr();
    y.dk_parts = x.dk_parts = dk_parts.data_ptr();
    y.dbeta_parts = x.dbeta_parts = dbeta_parts.data_ptr();
    y.dg_parts = x.dg_parts = dg_parts.data_ptr();
    x.scratch = scratch.data_ptr();
    FLA_LAUNCH((reverse_kernel<Q, R>), blocks, threads, 0, on.stream, x);
    finish<Q, R>(y, on.stream);
  });
  return {dq, dk, dv, dbeta, dg, d_initial};
}

}  // namespace
}  // namespace fla_ops

FLA_OPS_CUDA_IMPL(m) { m.impl("delta_rule_backward", TORCH_BOX(&fla_ops::backward)); }
