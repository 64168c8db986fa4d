# SPDX-License-Identifier: Apache-2.0
"""Gradients of queries and keys, of beta and g: two kernels, parallel over chunks.

They read what the walks of delta_rule_backward.py left, whose docstring has the equations and names. The first works
inside a chunk, on scores of rows with rows; the second multiplies them by rows, and adds what went through the states.
In one kernel both would need more registers than there are. Products with matrices that lie transposed in memory,
[V, K] or [V, BT], need no transposing.
"""

import triton
import triton.language as tl

from ._tiles import cast, dot, last_not_finite, segment_of_slot


@triton.jit
def _chunk(slot, cu_seqlens, N, T, ROWS: tl.constexpr):
    """(batch row, first token, live rows) of a chunk's slot; live rows <= 0 where no chunk uses the slot."""
    _, batch, start, length, chunk = segment_of_slot(slot, cu_seqlens, N, T, ROWS, True)
    return batch, start + chunk * ROWS, tl.where(chunk < 0, 0, tl.minimum(length - chunk * ROWS, ROWS))


@triton.jit
def _zero_uncovered(
    x, slot, cu_seqlens, N, T, row_stride, columns, ROWS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    """Zeros in the rows that no sequence covers: every slot looks after ROWS rows of [0, T)."""
    _zero_uncovered_tokens(x, slot, cu_seqlens, N, T, row_stride, columns, 1, ROWS, BT, BD)


@triton.jit
def _zero_uncovered_tokens(
    x, slot, cu_seqlens, N, T, row_stride, columns, STEPS: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """The same for a tensor with one row for STEPS of those that T and cu_seqlens count."""
    TOKENS: tl.constexpr = ROWS // STEPS
    row = slot * TOKENS + tl.arange(0, BT)
    before = row < tl.load(cu_seqlens).to(tl.int64) // STEPS
    behind = row >= tl.load(cu_seqlens + N).to(tl.int64) // STEPS
    mask = (before | behind) & (row < tl.minimum(slot * TOKENS + TOKENS, T // STEPS))
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
def _tokens_of(x, stride, rows, columns, BT: tl.constexpr, BD: tl.constexpr, STEPS: tl.constexpr):
    """The same of a tensor whose row t is that of the last of token t's STEPS rows, zeros in the others."""
    row = tl.arange(0, BT)
    column = tl.arange(0, BD)
    mask = ((row < rows) & (row % STEPS == STEPS - 1))[:, None] & (column < columns)[None, :]
    return tl.load(x + ((row // STEPS * stride)[:, None] + column[None, :]), mask=mask, other=0.0)


@triton.jit
def _store_tokens(to, x, first, rows, stride, columns, STEPS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Write the rows that `_tokens_of` reads of x [BT, BD], row 0 being row `first` of the tensor times STEPS."""
    row = tl.arange(0, BT)
    column = tl.arange(0, BD)
    at = ((first + row) // STEPS).to(tl.int64)[:, None] * stride + column[None, :]
    mask = ((row < rows) & (row % STEPS == STEPS - 1))[:, None] & (column < columns)[None, :]
    tl.store(to + at, x, mask=mask)


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
    lost = row[None, :] <= last_not_finite(x, row)[:, None]
    x = tl.where(lost, 0.0, x)
    if PARTS == 1:
        sums = dot(x, triangle, None, "ieee")
    else:
        ones = cast(triangle, tl.bfloat16)
        high = cast(x, tl.bfloat16)
        sums = dot(high, ones, None, "ieee")
        sums = dot(cast(x - high.to(x.dtype), tl.bfloat16), ones, sums, "ieee")
    return tl.where(lost, float("nan"), sums)


@triton.jit
def _row_products(sums, rows, PRECISION: tl.constexpr):
    """The scalar products of the rows of `sums`, in float32, with `rows`.

    In bfloat16 as the diagonal of a product, whose operands are rounded as every product's are: element by element,
    `rows` would have to be brought into the layout of the sums, as many registers again. float16 has not the range.
    """
    if rows.dtype == tl.bfloat16:
        BT: tl.constexpr = rows.shape[0]
        products = dot(cast(sums, tl.bfloat16), tl.trans(rows), None, PRECISION)
        row = tl.arange(0, BT)
        return tl.sum(tl.where(row[:, None] == row[None, :], products, 0.0), 1)
    else:
        return tl.sum(sums * rows, 1)


@triton.jit
def _store_rows(
    dx, grad, x, row_stride, norm, token, live, K: tl.constexpr, STEPS: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """The gradient of rows x; `grad` is that of x, or where norms are taken that of x times its norm's inverse r."""
    if norm is not None:
        x = x.to(grad.dtype)
        r = tl.load(norm + tl.arange(0, BT))
        grad *= r[:, None]
        grad -= x * (tl.sum(grad * x, 1) * r * r)[:, None]
    _store_tokens(dx, cast(grad, dx.dtype.element_ty), token, live, row_stride, K, STEPS, BT, BK)


@triton.jit
def _square(x, BT: tl.constexpr):
    """Where the elements of a matrix [BT, BT] lie."""
    row = tl.arange(0, BT)
    return x + row[:, None] * BT + row[None, :]


@triton.jit
def _spread_queries(P, STEPS: tl.constexpr, BT: tl.constexpr, BQ: tl.constexpr):
    """P [BT, BQ] as a matrix [BT, BT], whose columns between those of queries are zero."""
    row = tl.arange(0, BT)
    at = row[:, None] * BQ + row[None, :] // STEPS
    return tl.load(P + at, mask=(row % STEPS == STEPS - 1)[None, :], other=0.0)


@triton.jit(do_not_specialize=["T", "N", "k_b", "v_b", "do_b", "scale"])
def score_gradients_kernel(
    k,  # [B, T, H, K]
    v,  # [B, T, HV, V]
    do,  # [B, T, HV, V]
    P,  # [slots, HV, BT, BQ]
    gamma,  # [slots, HV, BT, BT] or None
    norms,  # [slots, HV, 2, BT] or None: r_k, r_q
    factors,  # [slots, HV, 4, BT]: a, b, c, beta
    X,  # [slots, HV, V, BT]
    dR,  # [slots, HV, V, BT] or None
    inner,  # [slots, HV, 1 or 2, BT, BT]: W^T; B^T unless dR is None
    sums,  # [slots, HV, 2, BT] or None: parts of dbeta and dg
    cu_seqlens,  # [N + 1] or None
    scale,
    T,
    N,
    group,  # HV // H
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
    STEPS: tl.constexpr,  # rows of k and v for one of q, do and g: T and cu_seqlens count the former
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ALIGN: tl.constexpr,  # the batch strides of k, v and do are multiples of this
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,  # of `_sums_from`
):
    """Score matrices are [key's row, query's or later row], W^T and B^T: half of their products need no transposing.

    They leave without norms, which float16 has not the range for.
    """
    slot = tl.program_id(0)
    hv = tl.program_id(1).to(tl.int64)
    HV = tl.num_programs(1)
    compute = factors.dtype.element_ty
    narrow = k.dtype.element_ty
    batch, token, live = _chunk(slot, cu_seqlens, N, T, ROWS)
    if live <= 0:
        return
    row = tl.arange(0, BT)
    last = _rolled(V, BV)
    upper = row[:, None] < row[None, :]
    at = tl.cast(slot, tl.int64) * HV + hv
    k += tl.multiple_of(batch * k_b, ALIGN) + token * k_t + (hv // group) * k_h
    v += tl.multiple_of(batch * v_b, ALIGN) + token * v_t + hv * v_h
    do += tl.multiple_of(batch * do_b, ALIGN) + token // STEPS * do_t + hv * do_h
    X += at * (BT * V)
    inner += at * ((BT * BT) * (1 if dR is None else 2))

    scores = tl.zeros((BT, BT), compute)  # X dO^T
    over = tl.zeros((BT, BT), compute)  # X dR^T
    dots = tl.zeros((BT,), compute)
    for first in tl.range(0, last, BV, num_stages=STAGES):
        columns = V - first
        X_tile = _rows_of(X + first * BT, BT, columns, BT, BV, BT)
        do_tile = _tokens_of(do + first, do_t, live, columns, BT, BV, STEPS)
        scores = dot(tl.trans(X_tile), tl.trans(do_tile), scores, PRECISION)
        if dR is not None:
            dR_tile = _rows_of(dR + at * (BT * V) + first * BT, BT, columns, BT, BV, BT)
            over = dot(tl.trans(X_tile), dR_tile, over, PRECISION)
            if sums is not None:
                v_tile = _rows_of(v + first, v_t, live, columns, BT, BV)
                dots += tl.sum(dR_tile.to(compute) * tl.trans(v_tile), 0)
    if sums is not None:
        paths = scores * _spread_queries(P + at * (BT * BQ), STEPS, BT, BQ)
    if gamma is not None:
        between = tl.load(_square(gamma + at * (BT * BT), BT)).to(compute)
        scores *= between
        over *= between
    tl.store(_square(inner, BT), cast(tl.where(row[:, None] <= row[None, :], scores * scale, 0.0), narrow))
    if dR is not None:
        rate = tl.load(factors + at * (4 * BT) + 3 * BT + row)
        over = tl.where(upper, over, 0.0)
        tl.store(_square(inner + BT * BT, BT), cast(over * -rate[None, :], narrow))
    if sums is not None:
        k_tile = _rows_of(k, k_t, live, K, BT, BK)
        over *= dot(k_tile, tl.trans(k_tile), None, PRECISION)
        if norms is not None:
            r_k = tl.load(norms + at * (2 * BT) + row)
            over *= r_k[:, None] * r_k[None, :]
        over = tl.where(upper, over, 0.0)
        sums += at * (2 * BT) + row
        tl.store(sums, dots - tl.sum(over, 0))
        # [j, m]: the paths over m from j to m or later, by way of P or of the inverse.
        paths = _sums_from(tl.where(upper, paths - over * rate[None, :], 0.0), BT, PARTS)
        tl.store(sums + BT, tl.sum(tl.where(upper, paths, 0.0), 0))


@triton.jit
def _times(x, r, TRANSPOSED: tl.constexpr):
    """A matrix of scores for its product with rows whose norms have the inverses r; x where r is None."""
    if r is not None:
        r = tl.load(r + tl.arange(0, x.shape[0]))
        x = cast(x * (r[:, None] if TRANSPOSED else r[None, :]), x.dtype)
    return tl.trans(x) if TRANSPOSED else x


@triton.jit
def _through_states(
    do,  # from here on, pointers to the chunk's first element
    S0,
    X,
    dR,
    dS,
    do_t,
    live,
    compute: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    STEPS: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    QUERIES: tl.constexpr,  # which of the sums are wanted
    KEYS: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """dO S0^T, X dS1^T, dR S0^T, and <dS1, S0> for `_trace`; zeros where they are not wanted.

    All in one loop read the states once: they are most of what is read.
    """
    last = _rolled(V, BV)
    through = tl.zeros((BT, BK), compute)
    to_end = tl.zeros((BT, BK), compute)
    from_start = tl.zeros((BT, BK), compute)
    # <dS1, S0>: on tensor cores the trace of a product; in IEEE arithmetic a sum of short sums, which rounds less.
    whole = tl.zeros((BK,), compute) if PARTS == 1 else tl.zeros((BV, BV), compute)
    for first in tl.range(0, last, BV, num_stages=STAGES):
        columns = V - first
        S_tile = _rows_of(S0 + first * K, K, columns, K, BV, BK)
        if QUERIES:
            do_tile = _tokens_of(do + first, do_t, live, columns, BT, BV, STEPS)
            through = dot(do_tile, S_tile, through, PRECISION)
        if KEYS:
            X_tile = _rows_of(X + first * BT, BT, columns, BT, BV, BT)
            dR_tile = _rows_of(dR + first * BT, BT, columns, BT, BV, BT)
            dS_tile = _rows_of(dS + first * K, K, columns, K, BV, BK)
            to_end = dot(tl.trans(X_tile), dS_tile, to_end, PRECISION)
            from_start = dot(tl.trans(dR_tile), S_tile, from_start, PRECISION)
            if PRODUCT:
                if PARTS == 1:
                    whole += tl.sum(S_tile.to(compute) * dS_tile, 0)
                else:
                    whole = dot(S_tile, tl.trans(dS_tile), whole, PRECISION)
    return through, to_end, from_start, whole


@triton.jit
def _trace(whole, PARTS: tl.constexpr):
    """<dS1, S0> of what `_through_states` added up."""
    if PARTS == 2:
        column = tl.arange(0, whole.shape[0])
        whole = tl.where(column[:, None] == column[None, :], whole, 0.0)
    return tl.sum(whole)


@triton.jit(do_not_specialize=["T", "N", "q_b", "k_b", "do_b"])
def row_gradients_kernel(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    do,  # [B, T, HV, V]
    inner,  # [slots, HV, 1 or 2, BT, BT], as score_gradients_kernel left it
    sums,  # [slots, HV, 2, BT] or None, likewise
    own,  # [slots, HV, BT] or None: keeps a part of dg from queries to keys where these are APART
    norms,  # [slots, HV, 2, BT] or None: r_k, r_q
    factors,  # [slots, HV, 4, BT]: a, b, c, beta
    decay,  # [slots, HV]
    S0,  # [slots, HV, V, K]
    X,  # [slots, HV, V, BT]
    dR,  # [slots, HV, V, BT] or None
    dS,  # [slots, HV, V, K] or None
    dq,  # [B, T, H, K] or None
    dk,  # [B, T, H, K] or None
    dbeta,  # [B, T, HV] or None
    dg,  # [B, T, HV] or None
    cu_seqlens,  # [N + 1] or None
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
    STEPS: tl.constexpr,  # rows of k and v for one of q, do and g: T and cu_seqlens count the former
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ALIGN: tl.constexpr,  # the batch strides of q, k and do are multiples of this
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,  # 1: add products of states in IEEE arithmetic
    APART: tl.constexpr,  # queries before keys, not side by side: fewer registers, and the entry state is read twice
):
    """Through the entry state for queries, through the exit and the entry state for keys.

    The norm of a row stays outside of the products until the end: float16 would overflow.
    """
    QUERIES: tl.constexpr = dq is not None
    KEYS: tl.constexpr = (dk is not None) or (sums is not None)
    slot = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    H = tl.num_programs(1)
    HV = H * group
    compute = factors.dtype.element_ty
    batch, token, live = _chunk(slot, cu_seqlens, N, T, ROWS)
    if dq is not None:
        dq += (batch * (T // STEPS) * H + head) * K
    if dk is not None:
        dk += (batch * T * H + head) * K
    if dbeta is not None:
        dbeta += batch * T * HV
    if dg is not None:
        dg += batch * (T // STEPS) * HV
    if cu_seqlens is not None:
        if dq is not None:
            _zero_uncovered_tokens(dq, slot, cu_seqlens, N, T, H * K, K, STEPS, ROWS, BT, BK)
        if dk is not None:
            _zero_uncovered(dk, slot, cu_seqlens, N, T, H * K, K, ROWS, BT, BK)
        for hv in range(head * group, head * group + group):
            if dbeta is not None:
                _zero_uncovered(dbeta + hv, slot, cu_seqlens, N, T, HV, 1, ROWS, BT, 1)
            if dg is not None:
                _zero_uncovered_tokens(dg + hv, slot, cu_seqlens, N, T, HV, 1, STEPS, ROWS, BT, 1)
    if live <= 0:
        return
    row = tl.arange(0, BT)
    alive = row < live
    upper = row[:, None] < row[None, :]
    q += tl.multiple_of(batch * q_b, ALIGN) + token // STEPS * q_t + head * q_h
    k += tl.multiple_of(batch * k_b, ALIGN) + token * k_t + head * k_h
    # A group's heads share norms.
    norm_k = norms + (tl.cast(slot, tl.int64) * HV + head * group) * (2 * BT) if norms is not None else None
    norm_q = norm_k + BT if norms is not None else None
    for part in tl.static_range(2 if APART else 1):  # APART: queries first, then keys
        grad_q = tl.zeros((BT, BK), compute)
        grad_k = tl.zeros((BT, BK), compute)
        for member in tl.range(group, num_stages=1, disable_licm=True):
            hv = head * group + member
            at = tl.cast(slot, tl.int64) * HV + hv
            inner_at = _square(inner + at * ((BT * BT) * (1 if dR is None else 2)), BT)
            through, to_end, from_start, whole = _through_states(
                do + tl.multiple_of(batch * do_b, ALIGN) + token // STEPS * do_t + hv * do_h,
                S0 + at * (K * V),
                X + at * (BT * V),
                dR + at * (BT * V) if KEYS else None,
                dS + at * (K * V) if KEYS else None,
                do_t,
                live,
                compute,
                K,
                V,
                STEPS,
                BT,
                BK,
                BV,
                STAGES,
                PRECISION,
                PARTS,
                QUERIES=(QUERIES or (dg is not None)) and part == 0,
                KEYS=KEYS and part == (1 if APART else 0),
                PRODUCT=dg is not None,
            )
            if APART and part == 1 and (dg is not None):
                whole = _trace(whole, PARTS)
            q_tile = _tokens_of(q, q_t, live, K, BT, BK, STEPS)
            k_tile = _rows_of(k, k_t, live, K, BT, BK)

            if (QUERIES or (dg is not None)) and part == 0:
                b = tl.load(factors + at * (4 * BT) + BT + row // STEPS)
                if norms is not None:
                    b = b / tl.load(norm_q + row)
                through *= b[:, None]
                if dg is not None:  # over m, from the entry state to m or later
                    from_entry = _row_products(through, q_tile, PRECISION)
                    if norms is not None:
                        from_entry *= tl.load(norm_q + row)
                    if APART:
                        tl.store(own + at * BT + row, from_entry)
                if QUERIES:
                    grad_q += through
                    grad_q = dot(_times(tl.load(inner_at), norm_k, True), k_tile, grad_q, PRECISION)
                    if group == 1:  # now, not behind the loop: sums fill the registers
                        _store_rows(dq, grad_q, q_tile, H * K, norm_q, token, live, K, STEPS, BT, BK)
            if KEYS and part == (1 if APART else 0):
                exit = tl.load(factors + at * (4 * BT) + 2 * BT + row)
                entry = tl.load(factors + at * (4 * BT) + row)
                rate = tl.load(factors + at * (4 * BT) + 3 * BT + row)
                if norms is not None:
                    exit = exit / tl.load(norm_k + row)
                    entry = entry / tl.load(norm_k + row)
                from_start *= entry[:, None]
                if sums is not None:
                    read = _row_products(from_start, k_tile, PRECISION)
                    if norms is not None:
                        read *= tl.load(norm_k + row)
                if dbeta is not None:
                    inside = tl.load(sums + at * (2 * BT) + row)
                    tl.store(dbeta + (token + row) * HV + hv, cast(inside - read, dbeta.dtype.element_ty), mask=alive)
                to_end *= exit[:, None]
                if dg is not None:
                    later = _row_products(to_end, k_tile, PRECISION)  # over m, to the exit state from before it
                    if norms is not None:
                        later *= tl.load(norm_k + row)
                    if APART:
                        from_entry = tl.load(own + at * BT + row)
                    start = tl.where(alive, from_entry - rate * read, 0.0)
                    if not APART:
                        whole = _trace(whole, PARTS)
                    total = tl.load(decay + at)
                    gate = tl.where(total == 0, 0.0, total * whole) + tl.load(sums + at * (2 * BT) + BT + row)
                    gate += tl.sum(tl.where(upper, later[:, None], start[:, None]), 0)
                    opens = alive & (row % STEPS == 0)  # a token's gate is that of its first row
                    tl.store(dg + (token + row) // STEPS * HV + hv, cast(gate, dg.dtype.element_ty), mask=opens)
                if dk is not None:
                    grad_k += to_end - from_start * rate[:, None]
                    grad_k = dot(_times(tl.load(inner_at), norm_q, False), q_tile, grad_k, PRECISION)
                    B_tile = tl.load(inner_at + BT * BT)
                    grad_k = dot(_times(B_tile, norm_k, False), k_tile, grad_k, PRECISION)
                    grad_k = dot(_times(B_tile, norm_k, True), k_tile, grad_k, PRECISION)
        if QUERIES and group > 1 and part == 0:
            q_tile = _tokens_of(q, q_t, live, K, BT, BK, STEPS)
            _store_rows(dq, grad_q, q_tile, H * K, norm_q, token, live, K, STEPS, BT, BK)
        if (dk is not None) and part == (1 if APART else 0):
            _store_rows(dk, grad_k, _rows_of(k, k_t, live, K, BT, BK), H * K, norm_k, token, live, K, 1, BT, BK)
        if APART and part == 0 and (dg is not None):
            tl.debug_barrier()  # `own` is read by other threads than wrote it
