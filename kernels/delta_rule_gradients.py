# SPDX-License-Identifier: Apache-2.0
"""Gradients of queries and keys, of beta and g: two kernels, parallel over chunks.

They read what the walks of delta_rule_backward.py left, whose docstring has the equations and names. Products with
matrices that lie transposed in memory, [V, K] or [V, BT], need no transposing.
"""

import triton
import triton.language as tl

from ._tiles import cast, dot, not_finite, segment_of_slot, spread, store_tile


@triton.jit
def _chunk(slot, cu_seqlens, N, T, ROWS: tl.constexpr):
    """(batch row, first token, live rows) of a chunk's slot; live rows <= 0 where no chunk uses the slot."""
    _, batch, start, length, chunk = segment_of_slot(slot, cu_seqlens, N, T, ROWS, True)
    return batch, start + chunk * ROWS, tl.minimum(length - chunk * ROWS, ROWS)


@triton.jit
def _zero_uncovered(
    x, slot, cu_seqlens, N, T, row_stride, columns, ROWS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    """Zeros in the rows that no sequence covers: every slot looks after ROWS rows of [0, T)."""
    row = slot * ROWS + tl.arange(0, BT)
    before = row < tl.load(cu_seqlens).to(tl.int64)
    behind = row >= tl.load(cu_seqlens + N).to(tl.int64)
    mask = (before | behind) & (row < tl.minimum(slot * ROWS + ROWS, T))
    column = tl.arange(0, BD)
    at = row.to(tl.int64)[:, None] * row_stride + column[None, :]
    tl.store(x + at, tl.zeros((BT, BD), x.dtype.element_ty), mask=mask[:, None] & (column < columns)[None, :])


@triton.jit
def _rows_of(x, stride, rows, columns, BT: tl.constexpr, BD: tl.constexpr):
    """A tile [BT, BD] from its first element on, zeros outside of [0, rows) x [0, columns); 32-bit offsets."""
    row = tl.arange(0, BT)
    column = tl.arange(0, BD)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(x + ((row * stride)[:, None] + column[None, :]), mask=mask, other=0.0)


@triton.jit
def _rolled(V: tl.constexpr, BV: tl.constexpr):
    """V, the end of a loop in steps of BV. From five steps on the compiler is not to know it: it would write them out.

    All at once they spill (sm_80, K = V = 256: 17 KB a thread). The grid's third extent is 1.
    """
    return V if V <= 4 * BV else V * tl.num_programs(2)


@triton.jit
def _sums_from(x, BT: tl.constexpr, PARTS: tl.constexpr):
    """[j, m]: the sum of x over i >= m in row j, as a product with a triangle of ones.

    On tensor cores with x in two bfloat16 PARTS, 16 bits together; in IEEE arithmetic where PARTS is 1. The product
    multiplies by the zeros of the triangle too, so what is not finite is kept out of it, and put where it belongs.
    """
    row = tl.arange(0, BT)
    triangle = tl.where(row[:, None] >= row[None, :], 1.0, tl.zeros_like(x))
    bad = not_finite(x)
    any_bad = tl.sum(bad.to(tl.int32)) > 0
    if any_bad:
        x = tl.where(bad, 0.0, x)
    if PARTS == 1:
        sums = dot(x, triangle, None, "ieee")
    else:
        ones = cast(triangle, tl.bfloat16)
        high = cast(x, tl.bfloat16)
        sums = dot(high, ones, None, "ieee")
        sums = dot(cast(x - high.to(x.dtype), tl.bfloat16), ones, sums, "ieee")
    if any_bad:
        counted: tl.constexpr = x.dtype if PARTS == 1 else tl.bfloat16
        sums = tl.where(spread(bad, counted, False, "ieee"), float("nan"), sums)
    return sums


@triton.jit
def _through_norm(dx, x):
    """The gradient of rows x from r times that of r x, where r is one over the norm of a row."""
    x = x.to(dx.dtype)
    return dx - x * (tl.sum(dx * x, 1) / (tl.sum(x * x, 1) + 1e-6))[:, None]


@triton.jit(do_not_specialize=["T", "N", "q_b", "k_b", "do_b", "scale"])
def query_gradients_kernel(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    do,  # [B, T, HV, V]
    gamma,  # [slots, HV, BT, BT] or None
    norms,  # [slots, HV, 2, BT] or None: r_k, r_q
    factors,  # [slots, HV, 4, BT]: a, b, c, beta
    S0,  # [slots, HV, V, K]
    X,  # [slots, HV, V, BT]
    dq,  # [B, T, H, K] or None
    dg_start,  # [slots, HV, BT] or None: each token's own part of the sums from the chunk's start
    cu_seqlens,  # [N + 1] or None
    scale,
    T,
    N,
    group,  # HV // H
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
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
    PRECISION: tl.constexpr,
):
    slot = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    H = tl.num_programs(1)
    HV = H * group
    compute = factors.dtype.element_ty
    narrow = q.dtype.element_ty
    batch, token, live = _chunk(slot, cu_seqlens, N, T, ROWS)
    if dq is not None:
        dq += (batch * T * H + head) * K
        if cu_seqlens is not None:
            _zero_uncovered(dq, slot, cu_seqlens, N, T, H * K, K, ROWS, BT, BK)
    if live <= 0:
        return
    row = tl.arange(0, BT)
    last = _rolled(V, BV)
    q += tl.multiple_of(batch * q_b, ALIGN) + token * q_t + head * q_h
    k += tl.multiple_of(batch * k_b, ALIGN) + token * k_t + head * k_h
    grad = tl.zeros((BT, BK), compute)
    for member in tl.range(group, num_stages=1, disable_licm=True):
        hv = head * group + member
        at = tl.cast(slot, tl.int64) * HV + hv
        do_at = do + tl.multiple_of(batch * do_b, ALIGN) + token * do_t + hv * do_h
        state = tl.zeros((BT, BK), compute)
        scores = tl.zeros((BT, BT), compute)
        for first in tl.range(0, last, BV, num_stages=STAGES):
            columns = V - first
            do_tile = _rows_of(do_at + first, do_t, live, columns, BT, BV)
            S_tile = _rows_of(S0 + at * (K * V) + first * K, K, columns, K, BV, BK)
            X_tile = _rows_of(X + at * (BT * V) + first * BT, BT, columns, BT, BV, BT)
            state = dot(do_tile, S_tile, state, PRECISION)
            scores = dot(do_tile, X_tile, scores, PRECISION)
        line = at * BT + row
        b = tl.load(factors + at * (4 * BT) + BT + row)
        if norms is not None:  # r_q stays outside of the products until the end: float16 would overflow
            r_k = tl.load(norms + at * (2 * BT) + row)
            r_q = tl.load(norms + at * (2 * BT) + BT + row)
            b = b / r_q
        state = state * b[:, None]
        if dg_start is not None:
            own = tl.sum(state * _rows_of(q, q_t, live, K, BT, BK), 1)
            if norms is not None:
                own *= r_q
            tl.store(dg_start + line, own, mask=row < live)
        if dq is not None:
            grad += state
            k_tile = _rows_of(k, k_t, live, K, BT, BK)
            if gamma is not None:
                scores = scores * tl.load(gamma + at * (BT * BT) + row[:, None] * BT + row[None, :])
            if norms is not None:
                scores = scores * r_k[None, :]
            scores = tl.where(row[:, None] >= row[None, :], scores * scale, 0.0)
            grad = dot(cast(scores, narrow), k_tile, grad, PRECISION)
    if dq is not None:
        if norms is not None:  # a group's heads share r_q
            r_q = tl.load(norms + (tl.cast(slot, tl.int64) * HV + head * group) * (2 * BT) + BT + row)
            grad = _through_norm(grad * r_q[:, None], _rows_of(q, q_t, live, K, BT, BK))
        store_tile(dq, cast(grad, narrow), token, live, H * K, K, BT, BK, False)


@triton.jit(do_not_specialize=["T", "N", "q_b", "k_b", "v_b", "do_b", "scale"])
def key_gradients_kernel(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, HV, V]
    do,  # [B, T, HV, V]
    P,  # [slots, HV, BT, BT]
    gamma,  # [slots, HV, BT, BT] or None
    norms,  # [slots, HV, 2, BT] or None: r_k, r_q
    factors,  # [slots, HV, 4, BT]: a, b, c, beta
    decay,  # [slots, HV]
    S0,  # [slots, HV, V, K]
    X,  # [slots, HV, V, BT]
    dR,  # [slots, HV, V, BT]
    dS,  # [slots, HV, V, K]
    dg_start,  # [slots, HV, BT] or None, as the queries left it
    dk,  # [B, T, H, K] or None
    dbeta,  # [B, T, HV] or None
    dg,  # [B, T, HV] or None
    cu_seqlens,  # [N + 1] or None
    scale,
    T,
    N,
    group,  # HV // H
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    do_b,
    do_t,
    do_h,
    K: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ALIGN: tl.constexpr,  # the batch strides of q, k, v and do are multiples of this
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,  # of `_sums_from`
):
    """Score matrices are [key's row, query's or later row] here: their product with rows needs no transposing."""
    slot = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    H = tl.num_programs(1)
    HV = H * group
    compute = factors.dtype.element_ty
    narrow = q.dtype.element_ty
    batch, token, live = _chunk(slot, cu_seqlens, N, T, ROWS)
    if dk is not None:
        dk += (batch * T * H + head) * K
    if dbeta is not None:
        dbeta += batch * T * HV
    if dg is not None:
        dg += batch * T * HV
    if cu_seqlens is not None:
        if dk is not None:
            _zero_uncovered(dk, slot, cu_seqlens, N, T, H * K, K, ROWS, BT, BK)
        for hv in range(head * group, head * group + group):
            if dbeta is not None:
                _zero_uncovered(dbeta + hv, slot, cu_seqlens, N, T, HV, 1, ROWS, BT, 1)
            if dg is not None:
                _zero_uncovered(dg + hv, slot, cu_seqlens, N, T, HV, 1, ROWS, BT, 1)
    if live <= 0:
        return
    row = tl.arange(0, BT)
    last = _rolled(V, BV)
    alive = row < live
    upper = row[:, None] < row[None, :]
    lower = row[:, None] > row[None, :]
    q += tl.multiple_of(batch * q_b, ALIGN) + token * q_t + head * q_h
    k += tl.multiple_of(batch * k_b, ALIGN) + token * k_t + head * k_h
    grad = tl.zeros((BT, BK), compute)
    for member in tl.range(group, num_stages=1, disable_licm=True):
        hv = head * group + member
        at = tl.cast(slot, tl.int64) * HV + hv
        do_at = do + tl.multiple_of(batch * do_b, ALIGN) + token * do_t + hv * do_h
        v_at = v + tl.multiple_of(batch * v_b, ALIGN) + token * v_t + hv * v_h
        entry = tl.load(factors + at * (4 * BT) + row)
        exit = tl.load(factors + at * (4 * BT) + 2 * BT + row)
        rate = tl.load(factors + at * (4 * BT) + 3 * BT + row)
        if norms is not None:  # r_k of a row stays outside of the products until the end: float16 would overflow
            r_k = tl.load(norms + at * (2 * BT) + row)
            r_q = tl.load(norms + at * (2 * BT) + BT + row)
            entry = entry / r_k
            exit = exit / r_k

        # Inside the chunk: through P, and through the inverse.
        scores = tl.zeros((BT, BT), compute)  # X dO^T
        over = tl.zeros((BT, BT), compute)  # X dR^T
        under = tl.zeros((BT, BT), compute)  # its transpose
        dots = tl.zeros((BT,), compute)
        for first in tl.range(0, last, BV, num_stages=STAGES):
            columns = V - first
            X_tile = _rows_of(X + at * (BT * V) + first * BT, BT, columns, BT, BV, BT)
            dR_tile = _rows_of(dR + at * (BT * V) + first * BT, BT, columns, BT, BV, BT)
            do_tile = _rows_of(do_at + first, do_t, live, columns, BT, BV)
            scores = dot(tl.trans(X_tile), tl.trans(do_tile), scores, PRECISION)
            over = dot(tl.trans(X_tile), dR_tile, over, PRECISION)
            under = dot(tl.trans(dR_tile), X_tile, under, PRECISION)
            if dbeta is not None:
                v_tile = _rows_of(v_at + first, v_t, live, columns, BT, BV)
                dots += tl.sum(dR_tile.to(compute) * tl.trans(v_tile), 0)
        k_tile = _rows_of(k, k_t, live, K, BT, BK)
        paths = scores
        if dg is not None:
            paths *= tl.load(P + at * (BT * BT) + row[:, None] * BT + row[None, :])
        if gamma is not None:
            between = tl.load(gamma + at * (BT * BT) + row[:, None] * BT + row[None, :]).to(compute)
            scores *= between
            over *= between
            under *= between
        if norms is not None:
            scores *= r_q[None, :]
            over *= r_k[None, :]
            under *= r_k[None, :]
        scores = cast(tl.where(lower, 0.0, scores * scale), narrow)
        over = tl.where(upper, over * rate[None, :], 0.0)
        under = tl.where(lower, under, 0.0)
        if (dbeta is not None) or (dg is not None):
            kk = dot(k_tile, tl.trans(k_tile), None, PRECISION)
            if norms is not None:
                kk *= r_k[:, None]
        if dbeta is not None:
            dots -= tl.sum(under * kk, 1)
        if dg is not None:
            # [j, m]: the paths over m from j to m or later, by way of P or of the inverse.
            paths = _sums_from(tl.where(upper, paths - over * kk, 0.0), BT, PARTS)
            gate = tl.sum(tl.where(upper, paths, 0.0), 0)
        under = cast(-under * rate[:, None] - over, narrow)

        # Through the chunk's exit state, and through its entry state.
        to_end = tl.zeros((BT, BK), compute)
        from_start = tl.zeros((BT, BK), compute)
        # <dS1, S0>: on tensor cores the trace of a product; in IEEE arithmetic a sum of short sums, which rounds less.
        whole = tl.zeros((BK,), compute) if PARTS == 1 else tl.zeros((BV, BV), compute)
        for first in tl.range(0, last, BV, num_stages=STAGES):
            columns = V - first
            X_tile = _rows_of(X + at * (BT * V) + first * BT, BT, columns, BT, BV, BT)
            dR_tile = _rows_of(dR + at * (BT * V) + first * BT, BT, columns, BT, BV, BT)
            S_tile = _rows_of(S0 + at * (K * V) + first * K, K, columns, K, BV, BK)
            dS_tile = _rows_of(dS + at * (K * V) + first * K, K, columns, K, BV, BK)
            to_end = dot(tl.trans(X_tile), dS_tile, to_end, PRECISION)
            from_start = dot(tl.trans(dR_tile), S_tile, from_start, PRECISION)
            if dg is not None:
                if PARTS == 1:
                    whole += tl.sum(S_tile.to(compute) * dS_tile, 0)
                else:
                    whole = dot(S_tile, tl.trans(dS_tile), whole, PRECISION)
        to_end *= exit[:, None]
        from_start *= entry[:, None]
        own = tl.sum(from_start * k_tile, 1)
        if norms is not None:
            own *= r_k
        if dbeta is not None:
            tl.store(dbeta + (token + row) * HV + hv, cast(dots - own, dbeta.dtype.element_ty), mask=alive)
        if dg is not None:
            # Over m to the exit state from before it, and from the entry state to m or later; over the whole chunk.
            own = tl.load(dg_start + at * BT + row, mask=alive, other=0.0) - rate * own
            later = tl.sum(to_end * k_tile, 1)
            if norms is not None:
                later *= r_k
            ends = tl.where(upper, later[:, None], own[:, None])
            if PARTS == 2:
                column = tl.arange(0, BV)
                whole = tl.where(column[:, None] == column[None, :], whole, 0.0)
            whole = tl.sum(whole)
            total = tl.load(decay + at)
            gate += tl.sum(ends, 0) + tl.where(total == 0, 0.0, total * whole)
            tl.store(dg + (token + row) * HV + hv, cast(gate, dg.dtype.element_ty), mask=alive)
        if dk is not None:
            grad += to_end - from_start * rate[:, None]
            grad = dot(scores, _rows_of(q, q_t, live, K, BT, BK), grad, PRECISION)
            grad = dot(under, k_tile, grad, PRECISION)
    if dk is not None:
        if norms is not None:  # a group's heads share r_k
            r_k = tl.load(norms + (tl.cast(slot, tl.int64) * HV + head * group) * (2 * BT) + row)
            grad = _through_norm(grad * r_k[:, None], _rows_of(k, k_t, live, K, BT, BK))
        store_tile(dk, cast(grad, narrow), token, live, H * K, K, BT, BK, False)
