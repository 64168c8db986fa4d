// SPDX-License-Identifier: Apache-2.0
//
// What DeltaProduct's CUDA kernels share: how a micro-step's row of k, v and beta, and a token's row of q and g, are
// read into the Token of delta_rule_cuda.h. A warp holds its columns of the state as there.
#pragma once

#include "delta_rule_cuda.h"

namespace fla_ops {
namespace {

struct DeltaProductInputs {
  DeltaRuleInputs in;  // k, v and beta have n rows a token; sequences, q and g count tokens
  int n;
};

// Sequences [B, T, ...], or a step, whose q and g have no T axis and whose k, v and beta are those of one token.
inline DeltaProductInputs product_inputs(const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                                         const torch::stable::Tensor& v, const torch::stable::Tensor& beta,
                                         const std::optional<torch::stable::Tensor>& g, int64_t n, double scale,
                                         bool qk_l2norm) {
  STD_TORCH_CHECK(n >= 1 && n <= kMaxHouseholder, "delta_product: n must be 1 to ", kMaxHouseholder);
  const int outer = int(q.dim()) - 2;
  DeltaProductInputs x{};
  x.n = int(n);
  x.in.q = token_view(q, outer);
  x.in.k = view(k, 3);
  x.in.v = view(v, 3);
  x.in.beta = view(beta, 3);
  if (g) x.in.g = token_view(*g, outer);
  x.in.H = q.size(outer);
  x.in.HV = v.size(2);
  x.in.K = int(q.size(outer + 1));
  x.in.V = int(v.size(3));
  x.in.scale = scale;
  x.in.qk_l2norm = qk_l2norm;
  return x;
}

// Calls f.operator()<A, R>() for the arithmetic of q's dtype and the fewest rows a lane that hold K. Tensors are read
// and written through their views, so kernels need not know the dtype.
template <class F> void with_arithmetic(const torch::stable::Tensor& q, int K, const F& f) {
  const auto rows = [&]<class A>() {
    if (K <= 64) f.template operator()<A, 2>();
    else if (K <= 128) f.template operator()<A, 4>();
    else f.template operator()<A, 8>();
  };
  if (type_of(q) == Type::float64) rows.template operator()<double>();
  else rows.template operator()<float>();
}

// The lane's rows of one row of q or k.
template <class A, int R>
__device__ __forceinline__ void read_row(A (&x)[R], const View& from, int64_t t, const DeltaRuleInputs& in,
                                         const Place& p) {
  with_pointer(from, offset_of(from, p.span.batch, t, p.key_head) + p.lane, [&](const auto* first) {
    FLA_UNROLL for (int j = 0; j < R; j++) x[j] = p.row(j) < in.K ? widen<A>(first[32 * j]) : A(0);
  });
  if (!in.qk_l2norm) return;
  const A factor = inverse_norm(x);
  FLA_UNROLL for (int j = 0; j < R; j++) x[j] *= factor;
}

// The warp's columns of one row of v or of the gradient of o.
template <class A, int C>
__device__ __forceinline__ void read_columns(A (&y)[C], const View& from, int64_t t, const Place& p) {
  with_pointer(from, offset_of(from, p.span.batch, t, p.head) + p.column, [&](const auto* first) {
    FLA_UNROLL for (int c = 0; c < C; c++) y[c] = c < p.columns ? widen<A>(first[c]) : A(0);
  });
}

// k, beta and the decay of micro-step j of token t: the token's first step decays, the others do not.
template <class A, int R, int C>
__device__ __forceinline__ void read_step(Token<A, R, C>& token, const DeltaProductInputs& x, int64_t t, int j,
                                          const Place& p) {
  const DeltaRuleInputs& in = x.in;
  const int64_t row = t * x.n + j;
  read_row(token.k, in.k, row, in, p);
  token.beta = load<A>(in.beta, offset_of(in.beta, p.span.batch, row, p.head));
  token.decay = 1;
  if (j == 0 && in.g.data) token.decay = std::exp(load<A>(in.g, offset_of(in.g, p.span.batch, t, p.head)));
}

}  // namespace
}  // namespace fla_ops
