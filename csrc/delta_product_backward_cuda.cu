// SPDX-License-Identifier: Apache-2.0
//
// DeltaProduct for CUDA: gradients. delta_rule_cuda.h says how a warp holds its columns of S and dS.
//
// `product_reverse_kernel` is the delta rule's (delta_rule_backward_cuda.cu) over micro-steps: with S' the state before
// a step, decayed by e^g if it is its token's first, r = v - S'^T k, u = beta r and S = S' + k u^T,
//   the last step of a token:   dS <- dS + scale q dO^T      dq = scale S dO
//   every step:                 du = dS^T k      dv = beta du      dbeta = r . du      dk = dS u - S' dv
//                               dS <- dS - k dv^T
//   the first step of a token:  dg = e^g <dS, S_{t-1}>       dS <- e^g dS
// so that a query's products are made once a token. Blocks of 64 tokens are replayed from the state saved at their
// start: once to keep a state every 16 steps, then 16 steps at a time to keep them all, in `scratch`.
// Workspace: 16 + 4 n states a sequence and value head; K + 1 values a token and K + 1 a step, for each value head and
// block of 64 columns (at most; 32 for K > 128), half as many columns for float64.
#include <tuple>

#include "delta_product_cuda.h"
#include "delta_rule_backward_cuda.h"

namespace fla_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kGroup = 16;  // steps whose states are kept at a time
__host__ __device__ constexpr int scratch_states(int n) { return kGroup + kCheckpointTokens * n / kGroup; }  // a warp

struct DeltaProductReverse {
  DeltaProductInputs x;    // x.in.checkpoints: what the forward saved
  View d_o;                // [B, T, HV, V]
  View d_final_state;      // [N, HV, K, V]; data may be null
  View dv;                 // [B, T n, HV, V]
  View d_initial_state;    // [N, HV, K, V]
  // A block's sums over its columns: [tiles, B, T, HV, K], [tiles, B, T n, HV, K], [tiles, B, T n, HV],
  // [tiles, B, T, HV], in the arithmetic's dtype.
  void *dq_parts, *dk_parts, *dbeta_parts, *dg_parts;
  void* scratch;           // [warps, scratch_states(n), R, C, 32]
  int64_t B, T;
  int needs;               // only these gradients are computed
};

// state: from before step `begin` of the tokens from `first` on to after `count` steps. `keep` saves what the way back
// needs: the state before each step, in slots 0 to count - 1, and each step's v - S'^T k.
template <class A, int R, int C>
__device__ __forceinline__ void replay_steps(A (&state)[R][C], const DeltaProductInputs& x, const Place& p,
                                             int64_t first, int begin, int count, bool keep,
                                             const Scratch<A, R, C>& scratch, A* residuals) {
  for (int i = 0; i < count; i++) {
    const int64_t t = first + (begin + i) / x.n;
    const int j = (begin + i) % x.n;
    Token<A, R, C> token;
    read_step(token, x, t, j, p);
    read_columns(token.y, x.in.v, t * x.n + j, p);
    if (keep) scratch.save(state, i);
    A residual[C];
    decay_and_compare(state, residual, token, p, x.in.K);
    if (keep && p.lane < C) residuals[i * C + p.lane] = own_element(residual, p.lane);
    FLA_UNROLL for (int row = 0; row < R; row++)
      if (p.row(row) < x.in.K) {
        FLA_UNROLL for (int c = 0; c < C; c++) state[row][c] += token.k[row] * (token.beta * residual[c]);
      }
  }
}

template <class A, int R>
__global__ void __launch_bounds__(32 * kReverseWarps<A>) product_reverse_kernel(DeltaProductReverse reverse) {
  constexpr int C = kColumns<A, R>, W = kReverseWarps<A>, rows = 32 * R;
  // Two of each: while some warps still add up one step's sums, others write the next step's.
  FLA_SHARED(A, dq_sums, 2 * W * rows);
  FLA_SHARED(A, dk_sums, 2 * W * rows);
  FLA_SHARED(A, scalar_sums, 2 * W * 2);     // dbeta, dg
  FLA_SHARED(A, residuals, W * kGroup * C);  // of the steps of a group

  const DeltaProductInputs& x = reverse.x;
  const DeltaRuleInputs& in = x.in;
  const int K = in.K, n = x.n, warps = blockDim.x / 32, needs = reverse.needs;
  const Place p = find_place<C>(in);
  const Scratch<A, R, C> scratch(reverse.scratch, scratch_states(n));
  A* const my_residuals = residuals + p.warp * kGroup * C;
  const bool sums = needs & (kNeedQ | kNeedK | kNeedBeta | kNeedG);  // dv and the states need no S
  const A scale = A(in.scale);

  A ds[R][C];
  load_state(ds, reverse.d_final_state, p.span.index, p, K);
  const int64_t length = p.span.end - p.span.start;
  int buffer = 0;
  for (int64_t block = (length + kCheckpointTokens - 1) / kCheckpointTokens - 1; block >= 0; block--) {
    const int64_t first = p.span.start + block * kCheckpointTokens;
    const int steps = n * int(min(p.span.end - first, int64_t(kCheckpointTokens)));
    const int groups = (steps + kGroup - 1) / kGroup;
    if (sums) {
      A state[R][C];
      load_state(state, in.checkpoints, p.first_checkpoint + block, p, K);
      scratch.save(state, kGroup);
      for (int group = 1; group < groups; group++) {
        replay_steps(state, x, p, first, (group - 1) * kGroup, kGroup, false, scratch, my_residuals);
        scratch.save(state, kGroup + group);
      }
    }
    for (int group = groups - 1; group >= 0; group--) {
      const int begin = group * kGroup, count = min(steps - begin, kGroup);
      if (sums) {
        A state[R][C];
        scratch.restore(state, kGroup + group);
        replay_steps(state, x, p, first, begin, count, true, scratch, my_residuals);
        __syncwarp(kWarp);
      }
      for (int i = count - 1; i >= 0; i--) {
        const int64_t t = first + (begin + i) / n;
        const int j = (begin + i) % n;
        const bool opens = j == 0, closes = j == n - 1;
        Token<A, R, C> token;
        read_step(token, x, t, j, p);
        if (closes) {
          read_row(token.q, in.q, t, in, p);
          read_columns(token.y, reverse.d_o, t, p);
        }

        A du[C], dv[C];
        FLA_UNROLL for (int c = 0; c < C; c++) du[c] = 0;
        FLA_UNROLL for (int row = 0; row < R; row++)
          if (p.row(row) < K) {
            FLA_UNROLL for (int c = 0; c < C; c++) {
              if (closes) ds[row][c] += scale * token.q[row] * token.y[c];
              du[c] += ds[row][c] * token.k[row];
            }
          }
        sum_columns_for_all(du, p.lane);
        FLA_UNROLL for (int c = 0; c < C; c++) dv[c] = token.beta * du[c];
        if (needs & kNeedV && p.lane < p.columns)
          store(reverse.dv, offset_of(reverse.dv, p.span.batch, t * n + j, p.head) + p.column + p.lane,
                own_element(dv, p.lane));

        A residual[C], dbeta = 0, dg = 0;
        if (sums) {
          FLA_UNROLL for (int c = 0; c < C; c++) {
            residual[c] = my_residuals[i * C + c];
            if (c < p.columns) dbeta += residual[c] * du[c];
          }
        }
        FLA_UNROLL for (int row = 0; row < R; row++)
          if (p.row(row) < K) {
            A dq = 0, dk = 0;
            FLA_UNROLL for (int c = 0; c < C; c++)
              if (c < p.columns) {
                const A d = ds[row][c], d_decayed = d - token.k[row] * dv[c];
                if (sums) {
                  const A u = token.beta * residual[c], before = scratch.at(i, row, c), decayed = token.decay * before;
                  if (closes) dq += (decayed + token.k[row] * u) * token.y[c];
                  dk += d * u - decayed * dv[c];
                  if (opens) dg += d_decayed * before;
                }
                ds[row][c] = token.decay * d_decayed;
              }
            if (sums) {
              const int at = (buffer * W + p.warp) * rows + p.row(row);
              dq_sums[at] = dq;
              dk_sums[at] = dk;
            }
          }
        if (!sums) continue;

        if (opens && needs & kNeedG) dg = token.decay * sum_lanes(dg);
        A* const scalars = scalar_sums + buffer * W * 2;
        if (p.lane == 0) {
          scalars[p.warp * 2] = dbeta;
          scalars[p.warp * 2 + 1] = dg;
        }
        __syncthreads();
        const int64_t batch = p.tile * reverse.B + p.span.batch;
        const int64_t token_head = (batch * reverse.T + t) * in.HV + p.head;
        const int64_t step_head = ((batch * reverse.T + t) * n + j) * in.HV + p.head;
        const auto add_warps = [&](const A* from, int stride) {
          A sum = from[0];
          for (int w = 1; w < warps; w++) sum += from[w * stride];
          return sum;
        };
        for (int row = threadIdx.x; row < K; row += blockDim.x) {
          const int at = buffer * W * rows + row;
          if (closes && needs & kNeedQ)
            static_cast<A*>(reverse.dq_parts)[token_head * K + row] = scale * add_warps(dq_sums + at, rows);
          if (needs & kNeedK) static_cast<A*>(reverse.dk_parts)[step_head * K + row] = add_warps(dk_sums + at, rows);
        }
        if (threadIdx.x == 0) {
          if (needs & kNeedBeta) static_cast<A*>(reverse.dbeta_parts)[step_head] = add_warps(scalars, 2);
          if (opens && needs & kNeedG) static_cast<A*>(reverse.dg_parts)[token_head] = add_warps(scalars + 1, 2);
        }
        buffer ^= 1;
      }
    }
  }
  if (needs & kNeedState) store_state(ds, reverse.d_initial_state, p.span.index, p, K);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta, const std::optional<Tensor>& g, int64_t n,
    double scale, const std::optional<Tensor>& initial_state, const std::optional<Tensor>& cu_seqlens, bool qk_l2norm,
    const Tensor& states, const Tensor& d_o, const std::optional<Tensor>& d_final_state, int64_t needs) {
  check_shapes(q, k, v, beta, g, 2, n);
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2), K = q.size(3), HV = v.size(2), V = v.size(3);
  DeltaProductReverse reverse{};
  reverse.x = product_inputs(q, k, v, beta, g, n, scale, qk_l2norm);
  DeltaRuleInputs& in = reverse.x.in;
  in.sequences = sequences_on_device(B, T, cu_seqlens);
  const int64_t N = in.sequences.count;
  check_gradients(v, states, checkpoint_rows(B, T, cu_seqlens), K, d_o, n);
  check_state(d_final_state, N, HV, K, V);
  if (!g) needs &= ~kNeedG;
  if (!initial_state) needs &= ~kNeedState;

  const ScalarType type = q.scalar_type(), exact = accumulator(q);
  const auto make = [&](int bit, std::vector<int64_t> size, ScalarType dtype) {
    if (!(needs & bit)) return torch::stable::new_empty(q, {0}, dtype);
    // Rows that no packed sequence covers stay 0.
    return cu_seqlens ? torch::stable::new_zeros(q, size, dtype) : torch::stable::new_empty(q, size, dtype);
  };
  Tensor dq = make(kNeedQ, {B, T, H, K}, type), dk = make(kNeedK, {B, T * n, H, K}, type);
  Tensor dv = make(kNeedV, {B, T * n, HV, V}, type);
  Tensor dbeta = make(kNeedBeta, {B, T * n, HV}, beta.scalar_type());
  Tensor dg = make(kNeedG, {B, T, HV}, g ? g->scalar_type() : type);
  Tensor d_initial = make(kNeedState, {N, HV, K, V}, exact);

  in.checkpoints = view(states, 3);
  reverse.d_o = view(d_o, 3);
  reverse.d_final_state = view(d_final_state, 3);
  reverse.B = B;
  reverse.T = T;
  reverse.needs = int(needs);
  if (needs & kNeedV) reverse.dv = view(dv, 3);
  if (needs & kNeedState) reverse.d_initial_state = view(d_initial, 3);

  // Of the tokens, q and g; of the steps, k and beta.
  DeltaRuleFinish tokens{};
  tokens.B = B;
  tokens.T = T;
  tokens.H = H;
  tokens.HV = HV;
  tokens.K = int(K);
  tokens.qk_l2norm = qk_l2norm;
  DeltaRuleFinish steps = tokens;
  steps.T = T * n;
  tokens.q = in.q;
  steps.k = in.k;
  if (needs & kNeedQ) tokens.dq = view(dq, 3);
  if (needs & kNeedG) tokens.dg = view(dg, 3);
  if (needs & kNeedK) steps.dk = view(dk, 3);
  if (needs & kNeedBeta) steps.dbeta = view(dbeta, 3);

  const OnDevice on(q);
  with_rows(q, int(K), [&]<class Q, int R>() {
    using A = Arithmetic<Q>;
    constexpr int C = kColumns<A, R>;
    const Columns columns(int(V), C, kReverseWarps<A>);
    const unsigned blocks = columns.blocks(N * HV), threads = 32 * columns.warps;
    in.tiles = tokens.tiles = steps.tiles = columns.tiles;
    // The workspace, gone when the op returns.
    const Tensor dq_parts = make(kNeedQ, {columns.tiles, B, T, HV, K}, exact);
    const Tensor dk_parts = make(kNeedK, {columns.tiles, B, T * n, HV, K}, exact);
    const Tensor dbeta_parts = make(kNeedBeta, {columns.tiles, B, T * n, HV}, exact);
    const Tensor dg_parts = make(kNeedG, {columns.tiles, B, T, HV}, exact);
    const Tensor scratch =
        torch::stable::new_empty(q, {int64_t(blocks) * threads * scratch_states(int(n)) * R * C}, exact);
    tokens.dq_parts = reverse.dq_parts = dq_parts.data_ptr();
    steps.dk_parts = reverse.dk_parts = dk_parts.data_ptr();
    steps.dbeta_parts = reverse.dbeta_parts = dbeta_parts.data_ptr();
    tokens.dg_parts = reverse.dg_parts = dg_parts.data_ptr();
    reverse.scratch = scratch.data_ptr();
    FLA_LAUNCH((product_reverse_kernel<A, R>), blocks, threads, 0, on.stream, reverse);
    finish<Q, R>(tokens, on.stream);
    finish<Q, R>(steps, on.stream);
  });
  return {dq, dk, dv, dbeta, dg, d_initial};
}

}  // namespace
}  // namespace fla_ops

FLA_OPS_CUDA_IMPL(m) { m.impl("delta_product_backward", TORCH_BOX(&fla_ops::backward)); }
