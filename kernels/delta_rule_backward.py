# SPDX-License-Identifier: Apache-2.0
"""Gradients of the delta rule: four launches, of which one walks the sequence.

Names as in `delta_rule_prepare.py`, M with the ones of its diagonal. For a chunk with entry state S0, new values X
and the gradient dS1 of its exit state (reference/delta_rule.md derives it, gamma_ij = e^{G_i - G_j}):

    prepare   M, P, a, b, c and decay again, and gamma                                       parallel over chunks
    walks     reverse: dX = P^T dO + c (K dS1)    dR = M^T dX    dV = beta dR                along the sequence
                       dS0 = decay dS1 + Q^T (b dO) - K^T (a dV)
              replay:  S0 and X = M (beta (V - a (K S0))), from the saved states             parallel over saved states
    scores    W = scale r_q r_k gamma o tril(dO X^T)                                         parallel over chunks
              B = -beta D, D = r_k r_k gamma o strictLower(dR X^T)
    rows      dQ = b (dO S0^T) + W K                                                         parallel over chunks
              dK = c (X dS1^T) + W^T Q - beta a (dR S0^T) + (B + B^T) K
              dbeta = rowsum(dR o V) - a k . (dR S0^T) - rowsum(D o K K^T)
              dg_m = sum over i >= m > j of (dO X^T o P + B o K K^T)_ij                      paths inside the chunk
                   + sum over i >= m of (b q . (dO S0^T) - beta a k . (dR S0^T))_i           from its start
                   + sum over j < m of (c k . (X dS1^T))_j + decay <dS1, S0>                 to its end

The replays run beside the reverse walks, which leave most of a GPU idle. dg adds path by path: no large terms cancel,
and a path over a token with g = -inf carries a factor 0; `scores` adds those inside of chunks. With qk_l2norm a row x
of q or k ends with dx -= x (x . dx) / |x|^2. One program of `rows` adds a group's value heads, in order.

States, sums and row factors are float32 (float64 for float64); what goes from launch to launch has the input dtype.
Workspace a token and value head, in elements of it: 2 K V / BT (S0, dS1), 2 V (X, dR), 5 BT (M, P, gamma, W, B), and
25 float32 (a, b, c, beta, two norms, parts of dbeta and dg, 17 of `prepare`): 2,276 bytes at K = V = 128, BT = 64 in
bfloat16. For groups, or beyond K = 128, `rows` takes queries before keys, for want of registers: it reads S0 twice, and
one more float32, a part of dg, waits in memory. The kernels of scores and rows are in delta_rule_gradients.py.
"""

import torch
import triton
import triton.language as tl

from ._config import CHECKPOINT, delta_rule_backward_config, delta_rule_gradients_config
from ._launch import (
    allow_descriptors,
    arch,
    cdiv,
    chunk_slots,
    constexprs,
    launch,
    multiprocessors,
    on_device,
    precision,
)
from ._operators import operator
from ._tiles import (
    cast,
    dot,
    first_not_finite,
    first_of,
    last_not_finite,
    load_state,
    load_tile,
    load_vector,
    not_finite,
    offset_of,
    segment_of_slot,
    store_state,
    store_tile,
    tile_source,
    vector_source,
    zero_rows,
)
from .delta_rule_gradients import row_gradients_kernel, score_gradients_kernel
from .delta_rule_prepare import alignment, in_rows, padded, padded_sizes, power_of_two, prepare, query_rows, wider


@triton.jit
def _replay(
    S,  # [BV, BK]: the state entering chunk `first`, transposed
    k,  # sources, row 0 being the sequence's first token
    v,
    M,  # sources, row 0 being the sequence's first chunk; from chunk to chunk it is HV * BT rows
    factors,  # the same, a chunk's four vectors being HV * 4 * BT elements behind those of the chunk before
    decay,  # a pointer to the sequence's first chunk
    S0,
    X,
    first,  # chunks [first, last)
    last,
    length,
    k_t,
    v_t,
    HV,
    columns,  # live value columns of this block
    K: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DTYPE: tl.constexpr,  # of the products' operands
    CAREFUL: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,  # load inputs by descriptors
    OWN_TMA: tl.constexpr,  # load what `prepare` made by descriptors
    OUT_TMA: tl.constexpr,  # store what the next launches read by descriptors
    PRECISION: tl.constexpr,
):
    """The state behind the chunks; writes every chunk's entry state and new values. CAREFUL as in `_walk_back`."""
    # Registers are short: what is the same for all chunks is not to wait in them.
    for chunk in tl.range(first, last, num_stages=STAGES, disable_licm=True):
        token = chunk * ROWS
        end = tl.minimum(length, token + ROWS)
        k_tile = load_tile(k, token, end, k_t, K, BT, BK, TMA)
        v_tile = load_tile(v, token, end, v_t, columns, BT, BV, TMA)
        matrix = offset_of(chunk, HV * BT, OWN_TMA)
        M_tile = load_tile(M, matrix, last * HV * BT, BT, BT, BT, BT, OWN_TMA)
        line = offset_of(chunk, HV * (4 * BT), OWN_TMA)
        total = tl.load(decay + tl.cast(chunk, tl.int64) * HV)

        low = cast(S, DTYPE)
        store_tile(S0, low, offset_of(chunk, HV * V, OUT_TMA), columns, K, K, BV, BK, OUT_TMA)
        x = dot(low, tl.trans(k_tile), None, PRECISION) * load_vector(factors, line, BT, OWN_TMA)[None, :]
        x = (tl.trans(v_tile) - x) * load_vector(factors, line + 3 * BT, BT, OWN_TMA)[None, :]
        R = cast(x, DTYPE)
        if CAREFUL:
            lost = not_finite(R)
            x = dot(tl.where(lost, 0.0, R), M_tile, tl.where(lost, float("nan"), x), PRECISION)
            row = token + tl.arange(0, BT)
            x = tl.where(row[None, :] < first_not_finite(cast(x, DTYPE), row)[:, None], x, float("nan"))
        else:
            x = dot(R, M_tile, x, PRECISION)
        store_tile(X, cast(x, DTYPE), offset_of(chunk, HV * V, OUT_TMA), columns, BT, BT, BV, BT, OUT_TMA)
        c = load_vector(factors, line + 2 * BT, BT, OWN_TMA)
        S = dot(cast(x * c[None, :], DTYPE), k_tile, S * total, PRECISION)
    return S


@triton.jit
def _replay_part(
    item, head, HV, k, v, M, factors, decay, states, S0, X, cu_seqlens, T, N, group, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ALIGN: tl.constexpr, CHECKPOINT: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, OWN_TMA: tl.constexpr,
    OUT_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The chunks behind one saved state, for a block of value columns. Arguments as in `walks_kernel`."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    slot = item // blocks
    block = item % blocks
    n, batch, start, length, part = segment_of_slot(slot, cu_seqlens, N, T, CHECKPOINT * ROWS, True)
    chunks = tl.cdiv(length, ROWS)
    first = part * CHECKPOINT
    last = tl.minimum(first + CHECKPOINT, chunks)
    if (part >= 0) & (first < chunks):
        columns = V - block * BV
        own = tl.cast(block * BV, tl.int64)  # its first column
        at = first_of(cu_seqlens, n, start, T, ROWS) * HV + head
        k += tl.multiple_of(batch * k_b, ALIGN) + start * k_t + (head // group) * k_h
        v += tl.multiple_of(batch * v_b, ALIGN) + start * v_t + head * v_h + block * BV
        decay += at
        k_source = tile_source(k, length, k_t, K, BT, BK, TMA)
        v_source = tile_source(v, length, v_t, columns, BT, BV, TMA)
        factor_source = vector_source(factors + at * (4 * BT), chunks * HV * (4 * BT), BT, OWN_TMA)
        M_source = tile_source(M + at * (BT * BT), chunks * HV * BT, BT, BT, BT, BT, OWN_TMA)
        S0_target = tile_source(S0 + at * (K * V) + own * K, chunks * HV * V, K, K, BV, BK, OUT_TMA)
        X_target = tile_source(X + at * (BT * V) + own * BT, chunks * HV * V, BT, BT, BV, BT, OUT_TMA)
        states += (tl.cast(slot, tl.int64) * HV + head) * (K * V) + block * BV

        S = load_state(states, V, K, columns, BK, BV)
        S = _replay(
            S, k_source, v_source, M_source, factor_source, decay, S0_target, X_target, first, last, length, k_t, v_t,
            HV, columns, K, V, ROWS, BT, BK, BV, k.dtype.element_ty, False, STAGES, TMA, OWN_TMA, OUT_TMA, PRECISION,
        )  # fmt: skip
        if tl.sum(not_finite(S).to(tl.int32)) > 0:
            S = load_state(states, V, K, columns, BK, BV)
            _replay(
                S, k_source, v_source, M_source, factor_source, decay, S0_target, X_target, first, last, length, k_t,
                v_t, HV, columns, K, V, ROWS, BT, BK, BV, k.dtype.element_ty, True, 1, TMA, OWN_TMA, OUT_TMA, PRECISION,
            )  # fmt: skip


@triton.jit
def _walk_back(
    ds,  # [BV, BK]: the gradient of the state behind chunk last - 1, transposed
    q,  # sources, row 0 being the sequence's first token
    k,
    do,
    M,  # sources, row 0 being the sequence's first chunk; from chunk to chunk it is HV * BT rows
    P,
    factors,  # the same, a chunk's four vectors being HV * 4 * BT elements behind those of the chunk before
    query_factors,  # the same for the second of them, BQ elements
    decay,  # pointers to the sequence's first chunk
    largest,
    dv,
    dR,
    dS,
    first,  # chunks [first, last)
    last,
    length,
    q_t,
    k_t,
    do_t,
    HV,
    columns,  # live value columns of this block
    K: tl.constexpr,
    V: tl.constexpr,
    STEPS: tl.constexpr,  # rows of k and v for one of q and do
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    BQ: tl.constexpr,  # rows of a tile of q and do
    BK: tl.constexpr,
    BV: tl.constexpr,
    DTYPE: tl.constexpr,  # of the products' operands
    CAREFUL: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,  # load inputs by descriptors
    OWN_TMA: tl.constexpr,  # load what `prepare` made by descriptors
    OUT_TMA: tl.constexpr,  # store what the next launches read by descriptors
    PRECISION: tl.constexpr,
):
    """The gradient of the state entering chunk `first`.

    A product multiplies by the zeros of a triangle too, which carries what is not finite to later tokens of its chunk.
    It cannot go unseen, since it stays in the gradient of the state: callers look at the result, and walk again with
    CAREFUL where it is not finite. This keeps such rows out of the products.
    """
    # As in `_replay`.
    for back in tl.range(0, last - first, num_stages=STAGES, disable_licm=True):
        chunk = last - 1 - back
        token = chunk * ROWS
        end = tl.minimum(length, token + ROWS)
        q_tile = load_tile(q, chunk * (ROWS // STEPS), end // STEPS, q_t, K, BQ, BK, TMA)
        k_tile = load_tile(k, token, end, k_t, K, BT, BK, TMA)
        do_tile = load_tile(do, chunk * (ROWS // STEPS), end // STEPS, do_t, columns, BQ, BV, TMA)
        matrix = offset_of(chunk, HV * BT, OWN_TMA)
        M_tile = load_tile(M, matrix, last * HV * BT, BT, BT, BT, BT, OWN_TMA)
        P_tile = load_tile(P, matrix, last * HV * BT, BQ, BQ, BT, BQ, OWN_TMA)
        line = offset_of(chunk, HV * (4 * BT), OWN_TMA)
        total = tl.load(decay + tl.cast(chunk, tl.int64) * HV)

        low = cast(ds, DTYPE)
        if dS is not None:
            store_tile(dS, low, offset_of(chunk, HV * V, OUT_TMA), columns, K, K, BV, BK, OUT_TMA)
        dx = dot(low, tl.trans(k_tile), None, PRECISION) * load_vector(factors, line + 2 * BT, BT, OWN_TMA)[None, :]
        do_tile = tl.trans(do_tile)
        if CAREFUL:
            lost = not_finite(do_tile)
            dx = dot(tl.where(lost, 0.0, do_tile), tl.trans(P_tile), dx, PRECISION)
            rounded = cast(dx, DTYPE)
            row = token + tl.arange(0, BT)
            last_lost = last_not_finite(do_tile, token + tl.arange(0, BQ) * STEPS + (STEPS - 1))
            last_lost = tl.maximum(last_lost, last_not_finite(rounded, row))
            lost = row[None, :] <= last_lost[:, None]
            dr = dot(tl.where(lost, 0.0, rounded), tl.trans(M_tile), tl.where(lost, float("nan"), dx), PRECISION)
        else:
            dx = dot(do_tile, tl.trans(P_tile), dx, PRECISION)
            dr = dot(cast(dx, DTYPE), tl.trans(M_tile), dx, PRECISION)
        if dR is not None:
            store_tile(dR, cast(dr, DTYPE), offset_of(chunk, HV * V, OUT_TMA), columns, BT, BT, BV, BT, OUT_TMA)
        dr = dr * load_vector(factors, line + 3 * BT, BT, OWN_TMA)[None, :]
        if dv is not None:
            store_tile(dv, tl.trans(cast(dr, DTYPE)), token, end - token, HV * V, columns, BT, BV, TMA)
        a = load_vector(factors, line, BT, OWN_TMA)
        b = load_vector(query_factors, line + BT, BQ, OWN_TMA)
        if largest is not None:  # float16's smallest number is 6e-8: the largest factor stays outside of the products
            factor = tl.load(largest + tl.cast(chunk, tl.int64) * HV)
            inverse = 1 / factor
            a = a * inverse
            b = b * inverse
            total = total * inverse
        ds = dot(cast(dr * -a[None, :], DTYPE), k_tile, ds * total, PRECISION)
        ds = dot(cast(do_tile * b[None, :], DTYPE), q_tile, ds, PRECISION)
        if largest is not None:
            ds = ds * factor
    return ds


@triton.jit
def _zero_or(
    states, n, head, HV, block, columns, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """A block of columns of the state of sequence n and this head, transposed; zero if `states` is None."""
    S = tl.zeros((BV, BK), DTYPE)
    if states is not None:
        S += load_state(states + (n * HV + head) * (K * V) + block * BV, V, K, columns, BK, BV).to(DTYPE)
    return S


@triton.jit
def _reverse(
    item, head, HV, q, k, do, M, P, factors, decay, largest, dfinal_state, dv, dR, dS, dinitial_state, cu_seqlens, T,
    N, group, q_b, q_t, q_h, k_b, k_t, k_h, do_b, do_t, do_h, K: tl.constexpr, V: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr, BT: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, ALIGN: tl.constexpr,
    STAGES: tl.constexpr, TMA: tl.constexpr, OWN_TMA: tl.constexpr, OUT_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One sequence, for a block of value columns. Arguments as in `walks_kernel`."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    block = item % blocks
    n, batch, start, length, _ = segment_of_slot(item // blocks, cu_seqlens, N, T, ROWS, False)
    chunks = tl.cdiv(length, ROWS)
    columns = V - block * BV
    own = tl.cast(block * BV, tl.int64)  # its first column
    at = first_of(cu_seqlens, n, start, T, ROWS) * HV + head
    q += tl.multiple_of(batch * q_b, ALIGN) + start // STEPS * q_t + (head // group) * q_h
    k += tl.multiple_of(batch * k_b, ALIGN) + start * k_t + (head // group) * k_h
    do += tl.multiple_of(batch * do_b, ALIGN) + start // STEPS * do_t + head * do_h + block * BV
    decay += at
    if largest is not None:
        largest += at
    q_source = tile_source(q, length // STEPS, q_t, K, BQ, BK, TMA)
    k_source = tile_source(k, length, k_t, K, BT, BK, TMA)
    do_source = tile_source(do, length // STEPS, do_t, columns, BQ, BV, TMA)
    factor_source = vector_source(factors + at * (4 * BT), chunks * HV * (4 * BT), BT, OWN_TMA)
    M_source = tile_source(M + at * (BT * BT), chunks * HV * BT, BT, BT, BT, BT, OWN_TMA)
    P_source = tile_source(P + at * (BT * BQ), chunks * HV * BT, BQ, BQ, BT, BQ, OWN_TMA)
    query_factors = factor_source
    if BQ < BT:
        query_factors = vector_source(factors + at * (4 * BT), chunks * HV * (4 * BT), BQ, OWN_TMA)
    if dv is not None:
        dv += (batch * T * HV + head) * V + block * BV
        if cu_seqlens is not None:  # rows that no sequence covers
            if n == 0:
                zero_rows(dv, 0, start, HV * V, columns, BT, BV)
            if n == N - 1:
                zero_rows(dv, start + length, T, HV * V, columns, BT, BV)
        dv = tile_source(dv + start * (HV * V), length, HV * V, columns, BT, BV, TMA)
    if dR is not None:
        dR = tile_source(dR + at * (BT * V) + own * BT, chunks * HV * V, BT, BT, BV, BT, OUT_TMA)
    if dS is not None:
        dS = tile_source(dS + at * (K * V) + own * K, chunks * HV * V, K, K, BV, BK, OUT_TMA)

    ds = _zero_or(dfinal_state, n, head, HV, block, columns, K, V, BK, BV, factors.dtype.element_ty)
    ds = _walk_back(
        ds, q_source, k_source, do_source, M_source, P_source, factor_source, query_factors, decay, largest, dv, dR, dS,
        0, chunks, length, q_t, k_t, do_t, HV, columns, K, V, STEPS, ROWS, BT, BQ, BK, BV, k.dtype.element_ty, False,
        STAGES, TMA, OWN_TMA, OUT_TMA, PRECISION,
    )  # fmt: skip
    if tl.sum(not_finite(ds).to(tl.int32)) > 0:
        ds = _zero_or(dfinal_state, n, head, HV, block, columns, K, V, BK, BV, factors.dtype.element_ty)
        ds = _walk_back(
            ds, q_source, k_source, do_source, M_source, P_source, factor_source, query_factors, decay, largest, dv, dR,
            dS, 0, chunks, length, q_t, k_t, do_t, HV, columns, K, V, STEPS, ROWS, BT, BQ, BK, BV, k.dtype.element_ty,
            True, 1, TMA, OWN_TMA, OUT_TMA, PRECISION,
        )  # fmt: skip
    if dinitial_state is not None:
        ds = cast(ds, dinitial_state.dtype.element_ty)
        store_state(dinitial_state + (n * HV + head) * (K * V) + block * BV, ds, V, K, columns, BK, BV)


@triton.jit(do_not_specialize=["T", "N", "HV", "q_b", "k_b", "v_b", "do_b"])
def walks_kernel(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, HV, V]
    do,  # [B, T, HV, V]
    M,  # [slots, HV, BT, BT]
    P,  # [slots, HV, BT, BQ]
    factors,  # [slots, HV, 4, BT]: a, b, c, beta
    decay,  # [slots, HV]
    largest,  # [slots, HV] or None: about the largest of a and b
    states,  # [checkpoint slots, HV, K, V]
    dfinal_state,  # [N, HV, K, V] or None
    S0,  # [slots, HV, V, K] or None: the state entering each chunk
    X,  # [slots, HV, V, BT] or None: new values
    dv,  # [B, T, HV, V] or None
    dR,  # [slots, HV, V, BT] or None
    dS,  # [slots, HV, V, K] or None: the gradient of the state behind each chunk
    dinitial_state,  # [N, HV, K, V] or None
    cu_seqlens,  # [N + 1] or None
    T,
    N,
    HV,
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
    STEPS: tl.constexpr,  # rows of k and v for one of q and do: T and cu_seqlens count the former
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ALIGN: tl.constexpr,  # the batch strides of q, k, v and do are multiples of this
    CHECKPOINT: tl.constexpr,  # chunks from one saved state to the next
    REVERSE: tl.constexpr,  # walk back
    REPLAY: tl.constexpr,
    REVERSE_STAGES: tl.constexpr,
    REPLAY_STAGES: tl.constexpr,
    TMA: tl.constexpr,  # load inputs by descriptors
    OWN_TMA: tl.constexpr,  # load what `prepare` made by descriptors
    OUT_TMA: tl.constexpr,  # store what the next launches read by descriptors
    PRECISION: tl.constexpr,
):
    """The reverse walks, which are few and long, in the first programs; the replays run beside them."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    item = tl.program_id(0) // HV
    head = (tl.program_id(0) % HV).to(tl.int64)
    walks = N * blocks if REVERSE else 0
    if REVERSE:
        if item < walks:
            _reverse(
                item, head, HV, q, k, do, M, P, factors, decay, largest, dfinal_state, dv, dR, dS, dinitial_state,
                cu_seqlens, T, N, group, q_b, q_t, q_h, k_b, k_t, k_h, do_b, do_t, do_h, K, V, STEPS, ROWS, BT, BQ, BK,
                BV, ALIGN, REVERSE_STAGES, TMA, OWN_TMA, OUT_TMA, PRECISION,
            )  # fmt: skip
    if REPLAY:
        if item >= walks:
            _replay_part(
                item - walks, head, HV, k, v, M, factors, decay, states, S0, X, cu_seqlens, T, N, group, k_b, k_t,
                k_h, v_b, v_t, v_h, K, V, ROWS, BT, BK, BV, ALIGN, CHECKPOINT, REPLAY_STAGES, TMA, OWN_TMA, OUT_TMA,
                PRECISION,
            )  # fmt: skip


def _rows(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The kernels take any outer strides below 2^24 and need unit stride along the last dimension."""
    return tuple(t if t.stride(-1) == 1 and t.stride(1) < 2**24 else t.contiguous() for t in tensors)


def _results(q, k, v, beta, g, initial_state, *_, needs, **__):
    """What `backward` returns, not written."""
    inputs = (q, k, v, beta, g, initial_state)
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if n else None for x, n in zip(inputs, needs, strict=True)
    ]


@operator(
    "delta_rule_backward(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? initial_state, "
    "Tensor? cu_seqlens, Tensor states, Tensor do, Tensor? dfinal_state, *, float scale, bool qk_l2norm, "
    "bool[6] needs, int? rows=None, int steps=1) -> Tensor[]",
    _results,
)
def backward(
    q,
    k,
    v,
    beta,
    g,
    initial_state,
    cu_seqlens,
    states,
    do,
    dfinal_state,
    *,
    scale,
    qk_l2norm,
    needs,
    rows=None,
    steps=1,
):
    """Gradients of q, k, v, beta, g, initial_state, None where `needs` is False. `rows` and `steps` as in `forward`."""
    wide = wider(q, v)
    if wide:
        inputs = (q.to(wide), k.to(wide), v.to(wide), beta, g, initial_state, cu_seqlens, states, do.to(wide))
        grads = backward(*inputs, dfinal_state, scale=scale, qk_l2norm=qk_l2norm, needs=needs, rows=rows, steps=steps)
        return [x if x is None else x.to(q.dtype) for x in grads[:3]] + list(grads[3:])
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    sizes = padded_sizes(q, v)
    if sizes != (K, V):
        Kp, Vp = sizes
        inputs = (padded(q, Kp), padded(k, Kp), padded(v, Vp), beta, g, padded(initial_state, Kp, Vp), cu_seqlens)
        ends = (states, padded(do, Vp), padded(dfinal_state, Kp, Vp))
        grads = backward(*inputs, *ends, scale=scale, qk_l2norm=qk_l2norm, needs=needs, rows=rows, steps=steps)
        cuts = ((..., slice(K)), (..., slice(K)), (..., slice(V)), ..., ..., (..., slice(K), slice(V)))
        return [x if x is None else x[cut].contiguous() for x, cut in zip(grads, cuts, strict=True)]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    need_q, need_k, need_v, need_beta, need_g, need_state = needs
    compute = torch.promote_types(q.dtype, torch.float32)

    grads = _results(q, k, v, beta, g, initial_state, needs=needs)
    dq, dk, dv, dbeta, dg, dinitial_state = grads
    if N == 0:
        return [x if x is None else x.zero_() for x in grads]

    config = delta_rule_backward_config(K, V, q.dtype, arch())
    BT, BV, rows = config.BT, config.BV, rows or config.BT // steps * steps
    T *= steps
    cu_seqlens = in_rows(cu_seqlens, steps)
    q, k, v, do = _rows(q, k, v, do)
    if dfinal_state is not None:
        dfinal_state = dfinal_state.contiguous()
    options = {"scale": scale, "qk_l2norm": qk_l2norm, "forward": False, "BT": BT, "rows": rows, "steps": steps}
    M, P, factors, decay, gamma, norms, largest = prepare(q, k, beta, g, cu_seqlens, **options)
    slots = chunk_slots(B, T, cu_seqlens, rows)
    keys = need_k or need_beta or need_g
    rows_too = need_q or keys
    S0 = q.new_empty(slots, HV, V, K) if rows_too else None
    X = q.new_empty(slots, HV, V, BT) if rows_too else None
    dS = torch.empty_like(S0) if keys else None
    dR = torch.empty_like(X) if keys else None
    inner = q.new_empty(slots, HV, 1 + keys, BT, BT) if rows_too else None
    sums = torch.empty(slots, HV, 2, BT, dtype=compute, device=q.device) if need_beta or need_g else None

    # Three sums over all channels of the rows, and two more where value heads are added, do not fit into registers.
    apart = HV > H or K > 128
    own = torch.empty(slots, HV, BT, dtype=compute, device=q.device) if apart and need_g else None

    align = alignment(q, k, v, do)
    BQ = query_rows(BT, steps)
    out_tma = config.tma and power_of_two(K) == K and V % BV == 0
    tma = out_tma and align > 1 and rows == BT == BQ * steps and all(x.data_ptr() % 16 == 0 for x in (q, k, v, do))
    if config.tma:
        allow_descriptors()
    blocks = cdiv(V, BV)
    lengths = (cu_seqlens, T, N)
    sizes = {"K": K, "V": V, "STEPS": steps, "ROWS": rows, "BT": BT, "BK": power_of_two(K), "BV": BV, "ALIGN": align}
    walk = {"TMA": tma, "OWN_TMA": config.tma, "OUT_TMA": out_tma, "PRECISION": precision(q.dtype)} | config.options
    two = min(config.num_stages, 2)
    stages = config.num_stages if N * HV * blocks <= multiprocessors(q) and tma else two  # as in the forward

    def by_chunk(kernel: str) -> dict:
        row = delta_rule_gradients_config(kernel, K, V, q.dtype, arch())
        given = {"BV": row.BV, "STAGES": row.num_stages, "PRECISION": precision(q.dtype)}
        return sizes | given | {"PARTS": 2 if q.dtype.itemsize == 2 else 1} | row.options

    with on_device(q):
        reverse = keys or need_v or need_state
        replay = bool(T) and rows_too
        if reverse or replay:
            programs = (reverse * N + replay * states.shape[0]) * blocks * HV
            args = (
                q, k, v, do, M, P, factors, decay, largest, states, dfinal_state, S0, X, dv, dR, dS, dinitial_state,
                *lengths, HV, HV // H, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
            )  # fmt: skip
            constants = constexprs(
                **sizes,
                BQ=BQ,
                CHECKPOINT=CHECKPOINT,
                REVERSE=reverse,
                REPLAY=replay,
                REVERSE_STAGES=stages,
                REPLAY_STAGES=two,
                **walk,
            )
            launch(walks_kernel, (programs,), args, constants)
        if T and rows_too:
            args = (
                k, v, do, P, gamma, norms, factors, X, dR, inner, sums, cu_seqlens, scale, T, N, HV // H,
                *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
            )  # fmt: skip
            constants = constexprs(**by_chunk("scores"), BQ=BQ)
            launch(score_gradients_kernel, (slots, HV), args, constants)
            args = (
                q, k, do, inner, sums, own, norms, factors, decay, S0, X, dR, dS, dq, dk, dbeta, dg, cu_seqlens, T, N,
                HV // H, *q.stride()[:3], *k.stride()[:3], *do.stride()[:3],
            )  # fmt: skip
            constants = constexprs(**by_chunk("rows"), APART=apart)
            launch(row_gradients_kernel, (slots, H), args, constants)
    return grads
