# SPDX-License-Identifier: Apache-2.0
"""Gradients of the delta rule: five launches, of which one walks the sequence.

Names of `delta_rule_prepare.py` (M without beta on its columns here) and of the forward; for a chunk with entry state S0,
X the new values, dS1 the gradient of its exit state (reference/delta_rule.md derives it):

    prepare   M, P and the row factors a, b, c again                                           parallel over chunks
    replay    S0 and X = M (beta (V - a (K S0))) from the saved states                         parallel over saved states
    reverse   dX = P^T dO + c (K dS1)    dR = M^T dX    dV = beta dR                           walks the sequence
              dS0 = decay dS1 + Q^T (b dO) - K^T (a dV)
    queries   dQ = b (dO S0^T) + W K            W = scale r_q r_k Gamma o (dO X^T)             parallel over chunks
    keys      dK = c (X dS1^T) + W^T Q - beta a (dR S0^T) + (B + B^T) K                        parallel over chunks
              B = -r_k r_k beta_i Gamma o strictLower(dR X^T)
              dbeta = rowsum(dR o V) - a k . (dR S0^T) + rowsum(B o K K^T) / beta
              dg_m = sum over i >= m > j of (dO X^T o P + B o K K^T)_ij                        paths inside the chunk
                   + sum over i >= m of (b q . (dO S0^T) - beta a k . (dR S0^T))_i             from its start
                   + sum over j < m of (c k . (X dS1^T))_j + decay <dS1, S0>                   to its end

dg adds path by path: no large terms cancel, and every path over a token with g = -inf carries a factor 0. With qk_l2norm
the row factors hold the norms and a row x of q or k ends with dx -= x (x . dx) / |x|^2. K is never cut inside the last two
kernels; a group's value heads are added in float32 by one program, in order.

States, sums and row factors are float32 (float64 for float64); S0, X, dR and dS1 go between the launches in the input
dtype. Workspace a token and value head, in elements of that dtype: 2 K V / BT (S0, dS1) + 2 V (X, dR) + 2 BT (M, P), and 4
float32 (a, b, c and the queries' part of dg): 1,808 bytes at K = V = 128, BT = 64 in bfloat16.
"""

import triton
import triton.language as tl

from ._tiles import cast, dot, first_slot, load_tile, sequence_bounds, sequence_of_slot, tile_source
from .delta_rule_prepare import not_finite


@triton.jit
def _spread_up(x, source, PRECISION: tl.constexpr):
    """x with NaN in every row at or before one in which `source` is not finite, column by column."""
    row = tl.arange(0, x.shape[0])
    later = tl.where(row[:, None] <= row[None, :], 1.0, 0.0).to(source.dtype)
    bad = tl.where(not_finite(source), 1.0, 0.0).to(source.dtype)
    return tl.where(dot(later, bad, None, PRECISION) > 0, float("nan"), x)


@triton.jit
def _walk_back(
    ds,  # [BK, BV]: the gradient of the state behind chunk last - 1
    q,  # sources, row 0 being the sequence's first token
    k,
    do,
    M,  # sources, row 0 being the sequence's first chunk; from chunk to chunk it is HV * BT rows
    P,
    beta,  # pointers to the sequence's first token or chunk
    factors,
    decay,
    dv,
    dR,
    dS,
    first,  # chunks [first, last)
    last,
    length,
    q_t,
    k_t,
    do_t,
    beta_t,
    factor_step,
    HV,
    columns,  # live value columns of this block
    K: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    CAREFUL: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of the state entering chunk `first`.

    A product multiplies by the zeros of a triangle too, which carries what is not finite to later tokens of its chunk.
    It cannot go unseen, since it stays in the gradient of the state: callers look at the result, and walk again with
    CAREFUL where it is not finite. This keeps such rows out of the products.
    """
    narrow: tl.constexpr = M.dtype if TMA else M.dtype.element_ty
    row = tl.arange(0, BT)
    key = tl.arange(0, BK)
    column = tl.arange(0, BV)
    live_columns = (column < columns)[None, :]
    for back in tl.range(0, last - first, num_stages=STAGES):
        chunk = last - 1 - back
        token = chunk * ROWS
        slot = tl.cast(chunk, tl.int64) * HV
        live = row < tl.minimum(length - token, ROWS)
        end = tl.minimum(length, token + ROWS)
        q_tile = load_tile(q, token, end, q_t, K, BT, BK, TMA)
        k_tile = load_tile(k, token, end, k_t, K, BT, BK, TMA)
        do_tile = load_tile(do, token, end, do_t, columns, BT, BV, TMA)
        M_tile = load_tile(M, chunk * HV * BT, last * HV * BT, BT, BT, BT, BT, TMA)
        P_tile = load_tile(P, chunk * HV * BT, last * HV * BT, BT, BT, BT, BT, TMA)
        a = tl.load(factors + token + row, mask=live, other=0.0)
        b = tl.load(factors + token + row + factor_step, mask=live, other=0.0)
        c = tl.load(factors + token + row + 2 * factor_step, mask=live, other=0.0)
        rate = tl.load(beta + (token + row).to(tl.int64) * beta_t, mask=live, other=0.0).to(ds.dtype)
        total = tl.load(decay + slot)

        low = cast(ds, narrow)
        if dS is not None:
            at = slot * (K * V) + key[:, None] * V + column[None, :]
            tl.store(dS + at, low, mask=(key < K)[:, None] & live_columns)
        dx = dot(k_tile, low, None, PRECISION) * c[:, None]
        if CAREFUL:
            dx = dot(tl.trans(P_tile), tl.where(not_finite(do_tile), 0.0, do_tile), dx, PRECISION)
            dx = cast(_spread_up(dx, do_tile, PRECISION), narrow)
            dr = dot(tl.trans(M_tile), tl.where(not_finite(dx), 0.0, dx), None, PRECISION)
            dr = _spread_up(dr, dx, PRECISION)
        else:
            dx = dot(tl.trans(P_tile), do_tile, dx, PRECISION)
            dr = dot(tl.trans(M_tile), cast(dx, narrow), None, PRECISION)
        if dR is not None:
            at = slot * (BT * V) + row[:, None] * V + column[None, :]
            tl.store(dR + at, cast(dr, narrow), mask=(row < BT)[:, None] & live_columns)
        dr = dr * rate[:, None]
        if dv is not None:
            at = (token + row).to(tl.int64)[:, None] * (HV * V) + column[None, :]
            tl.store(dv + at, cast(dr, narrow), mask=live[:, None] & live_columns)
        ds = dot(tl.trans(q_tile), cast(do_tile * b[:, None], narrow), ds * total, PRECISION)
        ds = dot(tl.trans(k_tile), cast(dr * -a[:, None], narrow), ds, PRECISION)
    return ds


@triton.jit(do_not_specialize=["T", "N", "factor_step", "q_b", "k_b", "beta_b", "do_b"])
def reverse_kernel(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    beta,  # [B, T, HV]
    do,  # [B, T, HV, V]
    M,  # [slots, HV, BT, BT], without beta
    P,  # [slots, HV, BT, BT]
    factors,  # [3, B, HV, T]: a, b, c
    decay,  # [slots, HV]
    dfinal_state,  # [N, HV, K, V] or None
    dv,  # [B, T, HV, V] or None
    dR,  # [slots, HV, BT, V] or None
    dS,  # [slots, HV, K, V] or None: the gradient of the state behind each chunk
    dinitial_state,  # [N, HV, K, V] or None
    cu_seqlens,  # [N + 1] or None
    T,
    N,
    HV,
    group,  # HV // H
    factor_step,  # B * HV * T
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    beta_b,
    beta_t,
    beta_h,
    do_b,
    do_t,
    do_h,
    K: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ALIGN: tl.constexpr,  # the batch strides of q, k and do are multiples of this
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks: tl.constexpr = (V + BV - 1) // BV
    block = tl.program_id(0) % blocks
    n = tl.program_id(0) // blocks // HV
    hv = tl.program_id(0) // blocks % HV
    head = (hv // group).to(tl.int64)
    if cu_seqlens is None:
        batch = n.to(tl.int64)
        start = tl.cast(0, tl.int64)
        length = T
        slot = n.to(tl.int64) * tl.cdiv(T, ROWS)
    else:
        batch = tl.cast(0, tl.int64)
        start, length = sequence_bounds(cu_seqlens, n, T)
        slot = first_slot(start, n, ROWS)
    length = length.to(tl.int32)
    chunks = tl.cdiv(length, ROWS)
    columns = V - block * BV
    hv = hv.to(tl.int64)
    at = slot * HV + hv
    q += tl.multiple_of(batch * q_b, ALIGN) + start * q_t + head * q_h
    k += tl.multiple_of(batch * k_b, ALIGN) + start * k_t + head * k_h
    do += tl.multiple_of(batch * do_b, ALIGN) + start * do_t + hv * do_h + block * BV
    q = tile_source(q, length, q_t, K, BT, BK, TMA)
    k = tile_source(k, length, k_t, K, BT, BK, TMA)
    do = tile_source(do, length, do_t, columns, BT, BV, TMA)
    M = tile_source(M + at * (BT * BT), chunks * HV * BT, BT, BT, BT, BT, TMA)
    P = tile_source(P + at * (BT * BT), chunks * HV * BT, BT, BT, BT, BT, TMA)
    beta += batch * beta_b + start * beta_t + hv * beta_h
    factors += (batch * HV + hv) * T + start
    decay += at
    if dv is not None:
        dv += ((batch * T + start) * HV + hv) * V + block * BV
    if dR is not None:
        dR += at * (BT * V) + block * BV
    if dS is not None:
        dS += at * (K * V) + block * BV

    key = tl.arange(0, BK)
    column = tl.arange(0, BV)
    state = (n.to(tl.int64) * HV + hv) * (K * V) + block * BV + key[:, None] * V + column[None, :]
    mask = (key < K)[:, None] & (column < columns)[None, :]
    ds = tl.zeros((BK, BV), factors.dtype.element_ty)
    if dfinal_state is not None:
        ds += tl.load(dfinal_state + state, mask=mask, other=0.0)
    ds = _walk_back(
        ds, q, k, do, M, P, beta, factors, decay, dv, dR, dS, 0, chunks, length, q_t, k_t, do_t, beta_t, factor_step,
        HV, columns, K, V, ROWS, BT, BK, BV, False, STAGES, TMA, PRECISION,
    )  # fmt: skip
    if tl.max(tl.max(not_finite(ds).to(tl.int32), 1), 0) != 0:
        ds = tl.zeros((BK, BV), factors.dtype.element_ty)
        if dfinal_state is not None:
            ds += tl.load(dfinal_state + state, mask=mask, other=0.0)
        ds = _walk_back(
            ds, q, k, do, M, P, beta, factors, decay, dv, dR, dS, 0, chunks, length, q_t, k_t, do_t, beta_t,
            factor_step, HV, columns, K, V, ROWS, BT, BK, BV, True, 1, TMA, PRECISION,
        )  # fmt: skip
    if dinitial_state is not None:
        tl.store(dinitial_state + state, ds, mask=mask)
