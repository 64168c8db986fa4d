# SPDX-License-Identifier: Apache-2.0
"""The delta rule on GPUs: forward and one-token step. The backward is in delta_rule_backward.py.

    S_t = e^{g_t} S_{t-1} + k_t u_t^T
    u_t = beta_t (v_t - (e^{g_t} S_{t-1})^T k_t)
    o_t = scale S_t^T q_t

The state is held transposed, [V, K]: on Hopper each product then takes from registers what the last one left there, and
only tiles that were loaded pass through shared memory.

Two launches. `prepare` makes, for all chunks at once, what no state enters (delta_rule_prepare.py): M, P, a, b, c and
decay. Then one program a (sequence, value head, block of value columns) walks the chunks with the state in registers,

    R = beta (V - a (K S))        X = R + M R        O = b (Q S) + P X        S <- decay S + K^T (c X)

five products a chunk; neither new values nor states pass through memory, except one state in CHECKPOINT chunks when a
backward will follow. Layout: q, k [B, T, H, K], v and o [B, T, HV, V], beta, g [B, T, HV], states [N, HV, K, V]. The
state, sums and factors are float32 (float64 for float64); products take operands of the input dtype.

With fewer programs than multiprocessors, sequences are cut into segments. What a segment does to its entry state is an
affine map, S -> transition S + from_zero, found by the same walk from the identity with V = 0 and from zero with V; the
maps are chained in float32, and the segments then run side by side: exact, with other rounding.

Papers: arXiv 2406.06484 (the rule and its chunked form), arXiv 2412.06464 (gates).
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._config import CHECKPOINT, delta_rule_forward_config, delta_rule_step_config
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
    load_state,
    load_tile,
    load_vector,
    not_finite,
    offset_of,
    segment_of_slot,
    sequence_bounds,
    store_state,
    store_tile,
    tile_source,
    vector_source,
    zero_rows,
)
from .delta_rule_backward import backward  # noqa: F401 - this module offers it
from .delta_rule_prepare import alignment, in_rows, padded, padded_sizes, power_of_two, prepare, query_rows, wider

MAX_HEAD_DIM = 256


@triton.jit
def _walk(
    S,  # [BV, BK]: the state entering chunk `first`, transposed
    q,  # sources, row 0 being the sequence's first token
    k,
    v,
    M,  # sources, row 0 being the sequence's first chunk; from chunk to chunk it is HV * BT rows
    P,
    factors,  # the same, a chunk's four vectors being HV * 4 * BT elements behind those of the chunk before
    query_factors,  # the same for the second of them, BQ elements
    decay,  # pointers to the sequence's first chunk or token
    o,
    states,
    first,  # chunks [first, last)
    last,
    length,
    q_t,
    k_t,
    v_t,
    HV,
    columns,  # live value columns of this block
    values,  # whether v is read: V = 0 where not
    DTYPE: tl.constexpr,  # of the products' operands
    K: tl.constexpr,
    V: tl.constexpr,
    STEPS: tl.constexpr,  # rows of k and v for one of q and o
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    BQ: tl.constexpr,  # rows of a tile of q and o
    BK: tl.constexpr,
    BV: tl.constexpr,
    OUTPUT: tl.constexpr,  # whether o is written
    CHECKPOINT: tl.constexpr,  # save the state that enters every so many chunks; 0 saves none
    CAREFUL: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,  # load inputs by descriptors
    OWN_TMA: tl.constexpr,  # load what `prepare` made by descriptors
    PRECISION: tl.constexpr,
):
    """The state after the chunks.

    A product spreads a NaN of one row to all rows, the earlier ones too, since 0 * NaN is NaN. It cannot go unseen: a
    column of new values that is not finite leaves its column of the state not finite for good. So callers look at the
    final state, and walk again with CAREFUL where it is not finite: this keeps such rows out of the products and
    writes NaN from the first of them on.
    """
    for chunk in tl.range(first, last, num_stages=STAGES, disable_licm=CAREFUL):
        token = chunk * ROWS
        k_tile = load_tile(k, token, length, k_t, K, BT, BK, TMA)
        matrix = offset_of(chunk, HV * BT, OWN_TMA)
        M_tile = load_tile(M, matrix, last * HV * BT, BT, BT, BT, BT, OWN_TMA)
        line = offset_of(chunk, HV * (4 * BT), OWN_TMA)
        whole = tl.load(decay + tl.cast(chunk, tl.int64) * HV)
        if CHECKPOINT:
            if chunk % CHECKPOINT == 0:
                at = tl.cast(chunk // CHECKPOINT, tl.int64) * HV * (K * V)
                store_state(states + at, S, V, K, columns, BK, BV)

        low = cast(S, DTYPE)
        R = dot(low, tl.trans(k_tile), None, PRECISION) * load_vector(factors, line, BT, OWN_TMA)[None, :]
        v_tile = tl.trans(load_tile(v, token, length, v_t, columns, BT, BV, TMA))
        R = (tl.where(values, v_tile, 0.0) - R) * load_vector(factors, line + 3 * BT, BT, OWN_TMA)[None, :]
        rounded = cast(R, DTYPE)
        if CAREFUL:
            lost = not_finite(rounded)
            X = dot(tl.where(lost, 0.0, rounded), M_tile, tl.where(lost, float("nan"), R), PRECISION)
            row = token + tl.arange(0, BT)  # numbers that change with the chunk: others would wait in registers
            first_bad = first_not_finite(cast(X, DTYPE), row)[:, None]
            good = row[None, :] < first_bad
            fine = cast(tl.where(good, X, 0.0), DTYPE)
            X = tl.where(good, X, float("nan"))
        else:
            X = dot(rounded, M_tile, R, PRECISION)
            fine = cast(X, DTYPE)
        if OUTPUT:
            first_query = chunk * (ROWS // STEPS)
            queries = length // STEPS
            q_tile = load_tile(q, first_query, queries, q_t, K, BQ, BK, TMA)
            P_tile = load_tile(P, matrix, last * HV * BT, BQ, BQ, BT, BQ, OWN_TMA)
            b = load_vector(query_factors, line + BT, BQ, OWN_TMA)
            O = dot(low, tl.trans(q_tile), None, PRECISION) * b[None, :]
            O = dot(fine, P_tile, O, PRECISION)
            if CAREFUL:
                row = token + tl.arange(0, BQ) * STEPS + (STEPS - 1)
                O = tl.where(row[None, :] < first_bad, O, float("nan"))
            O = tl.trans(cast(O, DTYPE))
            live = tl.minimum(queries - first_query, ROWS // STEPS)
            store_tile(o, O, first_query, live, HV * V, columns, BQ, BV, TMA and ROWS == BQ * STEPS)
        c = load_vector(factors, line + 2 * BT, BT, OWN_TMA)
        S = dot(cast(X * c[None, :], DTYPE), k_tile, S * whole, PRECISION)
    return S


@triton.jit
def _entering(entry, row_stride, K, columns, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr):
    """The state that enters, transposed: zero if `entry` is None."""
    S = tl.zeros((BV, BK), DTYPE)
    if entry is not None:
        S += load_state(entry, row_stride, K, columns, BK, BV).to(DTYPE)
    return S


_RUN_TIME = ["T", "N", "SEGMENT", "q_b", "k_b", "v_b"]


@triton.jit(do_not_specialize=_RUN_TIME)
def forward_kernel(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, HV, V]
    M,  # [slots, HV, BT, BT]
    P,  # [slots, HV, BT, BQ]
    factors,  # [slots, HV, 4, BT]: a, b, c, beta
    decay,  # [slots, HV]
    o,  # [B, T, HV, V]
    entry,  # [N, or slots of segments, HV, K, V]: the states that enter them, or None
    final,  # [N, HV, K, V]
    states,  # [slots of checkpoints, HV, K, V] or None
    cu_seqlens,  # [N + 1] or None
    T,
    N,
    SEGMENT,  # chunks of a segment
    group,  # HV // H
    q_b,  # strides
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    entry_n,
    entry_h,
    entry_k,
    K: tl.constexpr,
    V: tl.constexpr,
    STEPS: tl.constexpr,  # rows of k and v for one of q and o: T and cu_seqlens count the former
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ALIGN: tl.constexpr,  # batch strides are multiples of this
    SPLIT: tl.constexpr,  # whether sequences are cut into segments
    CHECKPOINT: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,  # load inputs by descriptors
    OWN_TMA: tl.constexpr,  # load what `prepare` made by descriptors
    PRECISION: tl.constexpr,
):
    blocks: tl.constexpr = (V + BV - 1) // BV
    slot = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    head = tl.program_id(1).to(tl.int64)
    HV = tl.num_programs(1)
    n, batch, start, length, segment = segment_of_slot(slot, cu_seqlens, N, T, SEGMENT * ROWS, SPLIT)
    chunks = tl.cdiv(length, ROWS)
    first = segment * SEGMENT
    last = tl.minimum(first + SEGMENT, chunks)
    if (segment < 0) | ((first >= chunks) & (segment > 0)):
        return

    columns = V - block * BV
    o += (batch * (T // STEPS) * HV + head) * V + block * BV
    if cu_seqlens is not None:  # rows that no sequence covers
        if (n == 0) & (segment == 0):
            zero_rows(o, 0, start // STEPS, HV * V, columns, BT, BV)
        if (n == N - 1) & (last == chunks):
            zero_rows(o, (start + length) // STEPS, T // STEPS, HV * V, columns, BT, BV)
    whole: tl.constexpr = TMA and ROWS == BQ * STEPS
    o_target = tile_source(o + start // STEPS * (HV * V), length // STEPS, HV * V, columns, BQ, BV, whole)
    q += tl.multiple_of(batch * q_b, ALIGN) + start // STEPS * q_t + (head // group) * q_h
    k += tl.multiple_of(batch * k_b, ALIGN) + start * k_t + (head // group) * k_h
    v += tl.multiple_of(batch * v_b, ALIGN) + start * v_t + head * v_h + block * BV
    at = first_of(cu_seqlens, n, start, T, ROWS) * HV + head
    decay += at
    q_source = tile_source(q, length // STEPS, q_t, K, BQ, BK, TMA)
    k_source = tile_source(k, length, k_t, K, BT, BK, TMA)
    v_source = tile_source(v, length, v_t, columns, BT, BV, TMA)
    factor_source = vector_source(factors + at * (4 * BT), chunks * HV * (4 * BT), BT, OWN_TMA)
    M_source = tile_source(M + at * (BT * BT), chunks * HV * BT, BT, BT, BT, BT, OWN_TMA)
    P_source = tile_source(P + at * (BT * BQ), chunks * HV * BT, BQ, BQ, BT, BQ, OWN_TMA)
    query_factors = factor_source
    if BQ < BT:
        query_factors = vector_source(factors + at * (4 * BT), chunks * HV * (4 * BT), BQ, OWN_TMA)
    if CHECKPOINT:
        states += (first_of(cu_seqlens, n, start, T, ROWS * CHECKPOINT) * HV + head) * (K * V) + block * BV
    if entry is not None:
        entry += (slot.to(tl.int64) if SPLIT else n) * entry_n + head * entry_h + block * BV

    S = _entering(entry, entry_k, K, columns, BK, BV, factors.dtype.element_ty)
    S = _walk(
        S,
        q_source,
        k_source,
        v_source,
        M_source,
        P_source,
        factor_source,
        query_factors,
        decay,
        o_target,
        states,
        first,
        last,
        length,
        q_t,
        k_t,
        v_t,
        HV,
        columns,
        True,
        M.dtype.element_ty,
        K,
        V,
        STEPS,
        ROWS,
        BT,
        BQ,
        BK,
        BV,
        OUTPUT=True,
        CHECKPOINT=CHECKPOINT,
        CAREFUL=False,
        STAGES=STAGES,
        TMA=TMA,
        OWN_TMA=OWN_TMA,
        PRECISION=PRECISION,
    )
    if last == chunks:
        store_state(final + (n * HV + head) * (K * V) + block * BV, S, V, K, columns, BK, BV)
    if tl.sum(not_finite(S).to(tl.int32)) > 0:
        S = _entering(entry, entry_k, K, columns, BK, BV, factors.dtype.element_ty)
        _walk(
            S,
            q_source,
            k_source,
            v_source,
            M_source,
            P_source,
            factor_source,
            query_factors,
            decay,
            o_target,
            states,
            first,
            last,
            length,
            q_t,
            k_t,
            v_t,
            HV,
            columns,
            True,
            M.dtype.element_ty,
            K,
            V,
            STEPS,
            ROWS,
            BT,
            BQ,
            BK,
            BV,
            OUTPUT=True,
            CHECKPOINT=0,
            CAREFUL=True,
            STAGES=1,
            TMA=TMA,
            OWN_TMA=OWN_TMA,
            PRECISION=PRECISION,
        )


@triton.jit(do_not_specialize=_RUN_TIME)
def map_kernel(
    k,  # [B, T, H, K]
    v,  # [B, T, HV, V]
    M,  # [slots, HV, BT, BT]
    factors,  # [slots, HV, 4, BT]: a, b, c, beta
    decay,  # [slots, HV]
    maps,  # [slots of segments, HV, K, K + V]: transition and the state from zero
    cu_seqlens,  # [N + 1] or None
    T,
    N,
    SEGMENT,  # chunks of a segment
    group,  # HV // H
    k_b,  # strides
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    K: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,  # load inputs by descriptors
    OWN_TMA: tl.constexpr,  # load what `prepare` made by descriptors
    PRECISION: tl.constexpr,
):
    """What each segment but the last does to the state that enters it: one program a block of columns of the map."""
    key_blocks: tl.constexpr = (K + BV - 1) // BV
    blocks: tl.constexpr = key_blocks + (V + BV - 1) // BV
    slot = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    head = tl.program_id(1).to(tl.int64)
    HV = tl.num_programs(1)
    n, batch, start, length, segment = segment_of_slot(slot, cu_seqlens, N, T, SEGMENT * ROWS, True)
    chunks = tl.cdiv(length, ROWS)
    first = segment * SEGMENT
    last = first + SEGMENT
    if (segment < 0) | (last >= chunks):
        return

    values = block >= key_blocks
    first_column = tl.where(values, block - key_blocks, block) * BV
    columns = tl.where(values, V, K) - first_column
    k += tl.multiple_of(batch * k_b, ALIGN) + start * k_t + (head // group) * k_h
    v += tl.multiple_of(batch * v_b, ALIGN) + start * v_t + head * v_h + tl.where(values, first_column, 0)
    at = first_of(cu_seqlens, n, start, T, ROWS) * HV + head
    decay += at
    k_source = tile_source(k, length, k_t, K, BT, BK, TMA)
    v_source = tile_source(v, length, v_t, tl.where(values, columns, V), BT, BV, TMA)
    factor_source = vector_source(factors + at * (4 * BT), chunks * HV * (4 * BT), BT, OWN_TMA)
    M_source = tile_source(M + at * (BT * BT), chunks * HV * BT, BT, BT, BT, BT, OWN_TMA)
    identity = (tl.arange(0, BK)[None, :] == first_column + tl.arange(0, BV)[:, None]) & (block < key_blocks)
    S = identity.to(factors.dtype.element_ty)
    S = _walk(
        S,
        None,
        k_source,
        v_source,
        M_source,
        None,
        factor_source,
        None,
        decay,
        None,
        None,
        first,
        last,
        length,
        0,
        k_t,
        v_t,
        HV,
        columns,
        values,
        M.dtype.element_ty,
        K,
        V,
        1,
        ROWS,
        BT,
        BT,
        BK,
        BV,
        OUTPUT=False,
        CHECKPOINT=0,
        CAREFUL=False,
        STAGES=STAGES,
        TMA=TMA,
        OWN_TMA=OWN_TMA,
        PRECISION=PRECISION,
    )
    maps += (slot.to(tl.int64) * HV + head) * (K * (K + V)) + tl.where(values, K, 0) + first_column
    store_state(maps, S, K + V, K, columns, BK, BV)


@triton.jit(do_not_specialize=["T", "N", "SEGMENT"])
def chain_kernel(
    maps,  # [slots of segments, HV, K, K + V]
    initial,  # [N, HV, K, V] or None
    entry,  # [slots of segments, HV, K, V]: the states that enter them
    cu_seqlens,  # [N + 1] or None
    T,
    N,
    SEGMENT,  # chunks of a segment
    initial_n,  # strides
    initial_h,
    initial_k,
    K: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    STEP: tl.constexpr,  # columns of a transition read at a time
):
    """The states that enter the segments of one sequence, one after the other, in full precision."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    n = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    head = tl.program_id(1).to(tl.int64)
    HV = tl.num_programs(1)
    if cu_seqlens is None:
        start = tl.cast(0, tl.int64)
        length = tl.cast(T, tl.int64)
    else:
        start, length = sequence_bounds(cu_seqlens, n, T)
    slot = first_of(cu_seqlens, n, start, tl.maximum(T, 1), SEGMENT * ROWS)
    columns = V - block * BV
    key = tl.arange(0, BK)
    column = tl.arange(0, BV)
    maps += (slot * HV + head) * (K * (K + V))
    entry += (slot * HV + head) * (K * V) + block * BV
    if initial is not None:
        initial += n * initial_n + head * initial_h + block * BV
    S = _entering(initial, initial_k, K, columns, BK, BV, entry.dtype.element_ty)
    store_state(entry, S, V, K, columns, BK, BV)
    for _ in range(1, tl.cdiv(length, SEGMENT * ROWS)):
        tl.debug_barrier()  # the state is read by other threads than wrote it
        S = load_state(maps + K + block * BV, K + V, K, columns, BK, BV)
        for first in range(0, K, STEP):
            inner = first + tl.arange(0, STEP)
            transition = tl.load(
                maps + key[None, :] * (K + V) + inner[:, None],
                mask=(key < K)[None, :] & (inner < K)[:, None],
                other=0.0,
            )
            before = tl.load(
                entry + inner[None, :] * V + column[:, None],
                mask=(inner < K)[None, :] & (column < columns)[:, None],
                other=0.0,
            )
            S = dot(before, transition, S, "ieee")
        maps += HV * (K * (K + V))
        entry += HV * (K * V)
        store_state(entry, S, V, K, columns, BK, BV)


@triton.jit(do_not_specialize=["scale", "slots", "q_b", "k_b", "v_b", "beta_b", "g_b"])
def step_kernel(
    q,  # [B, H, K]
    k,  # [B, STEPS, H, K]
    v,  # [B, STEPS, HV, V]
    beta,  # [B, STEPS, HV]
    g,  # [B, HV] or None
    o,  # [B, HV, V]
    state,  # [slots, HV, K, V], written in place
    state_indices,  # [B] or None
    scale,
    slots,
    group,  # HV // H
    q_b,  # strides
    q_h,
    q_d,
    k_b,
    k_n,
    k_h,
    k_d,
    v_b,
    v_n,
    v_h,
    v_d,
    beta_b,
    beta_n,
    beta_h,
    g_b,
    g_h,
    state_n,
    state_h,
    state_k,
    state_v,
    K: tl.constexpr,
    V: tl.constexpr,
    STEPS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    QK_L2NORM: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    HV = tl.num_programs(1)
    key = tl.arange(0, BK)
    column = tl.program_id(2) * BV + tl.arange(0, BV)
    o += (batch * HV + head) * V + column
    slot = batch
    if state_indices is not None:
        slot = tl.load(state_indices + batch).to(tl.int64)
        if (slot < 0) | (slot >= slots):
            tl.store(o, tl.zeros((BV,), o.dtype.element_ty), mask=column < V)
            return
    compute: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    at = slot * state_n + head * state_h + key.to(tl.int64)[:, None] * state_k + column.to(tl.int64)[None, :] * state_v
    mask = (key < K)[:, None] & (column < V)[None, :]
    S = tl.load(state + at, mask=mask, other=0.0).to(compute)
    q_row = tl.load(q + batch * q_b + (head // group) * q_h + key * q_d, mask=key < K, other=0.0).to(compute)
    if QK_L2NORM:
        q_row = q_row / tl.sqrt(tl.sum(q_row * q_row, 0) + 1e-6)
    if g is not None:
        S = S * tl.exp(tl.load(g + batch * g_b + head * g_h).to(compute))
    k += batch * k_b + (head // group) * k_h + key * k_d
    v += batch * v_b + head * v_h + column * v_d
    beta += batch * beta_b + head * beta_h
    for step in tl.static_range(STEPS):
        k_row = tl.load(k + step * k_n, mask=key < K, other=0.0).to(compute)
        v_row = tl.load(v + step * v_n, mask=column < V, other=0.0).to(compute)
        rate = tl.load(beta + step * beta_n).to(compute)
        if QK_L2NORM:
            k_row = k_row / tl.sqrt(tl.sum(k_row * k_row, 0) + 1e-6)
        u = rate * (v_row - tl.sum(S * k_row[:, None], 0))
        S = S + k_row[:, None] * u[None, :]
    tl.store(o, cast(scale * tl.sum(S * q_row[:, None], 0), o.dtype.element_ty), mask=column < V)
    tl.store(state + at, cast(S, state.dtype.element_ty), mask=mask)


def why_not(device: str, dtype: torch.dtype, *sizes: int) -> str | None:
    """The reason why these kernels cannot run head dimensions `sizes`, or None."""
    reason = _launch.why_not(device)
    if reason:
        return reason
    if dtype == torch.float64 and device == "cuda":
        return "float64 is for Triton's interpreter: tensor cores and shared memory are laid out for smaller types"
    if any(s > MAX_HEAD_DIM for s in sizes):
        return f"head dimensions go up to {MAX_HEAD_DIM}, got {max(sizes)}"
    return None


def _rows(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The kernels take any outer strides and need unit stride along the last dimension."""
    return tuple(t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _segment_chunks(chunks: int, programs: int, N: int, x: torch.Tensor) -> int | None:
    """The chunks of a segment, or None where cutting is not worth it.

    `chunks` are those of all N sequences together, `programs` those that walk side by side in each. The maps take about
    as long as the walk, with twice the programs, two of which share a multiprocessor: below four segments a sequence
    nothing is won.
    """
    if torch.are_deterministic_algorithms_enabled():
        return None
    segments = multiprocessors(x) // programs
    length = max(16, cdiv(chunks, max(segments, 1)))
    return cdiv(length, CHECKPOINT) * CHECKPOINT if 4 * length * N <= chunks else None


def _results(q, k, v, beta, g, initial_state, cu_seqlens, *, scale, qk_l2norm, save_states, rows=None, steps=1):
    """What `forward` returns, not written."""
    B, T, _, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    compute = torch.promote_types(q.dtype, torch.float32)
    wide = wider(q, v)
    rows = rows or delta_rule_forward_config(K, V, wide or q.dtype, arch()).BT // steps * steps
    o = torch.empty(B, T, HV, V, dtype=v.dtype, device=v.device)
    final = torch.empty(N, HV, K, V, dtype=compute, device=v.device)
    saved = chunk_slots(B, T * steps, cu_seqlens, rows * CHECKPOINT)
    sizes = (K, V) if wide else padded_sizes(q, v)
    states = torch.empty((saved, HV, *sizes) if save_states else 0, dtype=wide or compute, device=v.device)
    return o, final, states


@operator(
    "delta_rule_forward(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? initial_state, "
    "Tensor? cu_seqlens, *, float scale, bool qk_l2norm, bool save_states, int? rows=None, int steps=1) -> Tensor[]",
    _results,
)
def forward(q, k, v, beta, g, initial_state, cu_seqlens, *, scale, qk_l2norm, save_states, rows=None, steps=1):
    """(o, final_state, states): `states` enter every CHECKPOINT-th chunk, for `backward`; empty unless asked for.

    `rows`: the live rows of a chunk, by default as many whole tokens as it holds. `steps`: DeltaProduct's rows of k, v
    and beta for one of q and g, which is what cu_seqlens counts.
    """
    options = {"scale": scale, "qk_l2norm": qk_l2norm, "save_states": save_states, "rows": rows, "steps": steps}
    wide = wider(q, v)
    if wide:
        inputs = (q.to(wide), k.to(wide), v.to(wide), beta, g, initial_state, cu_seqlens)
        o, final, states = forward(
            *inputs, scale=scale, qk_l2norm=qk_l2norm, save_states=save_states, rows=rows, steps=steps
        )
        return o.to(v.dtype), final.float(), states
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    sizes = padded_sizes(q, v)
    if sizes != (K, V):
        Kp, Vp = sizes
        inputs = (padded(q, Kp), padded(k, Kp), padded(v, Vp), beta, g, padded(initial_state, Kp, Vp), cu_seqlens)
        o, final, states = forward(
            *inputs, scale=scale, qk_l2norm=qk_l2norm, save_states=save_states, rows=rows, steps=steps
        )
        return o[..., :V].contiguous(), final[..., :K, :V].contiguous(), states
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    config = delta_rule_forward_config(K, V, q.dtype, arch())
    BT, BV, rows = config.BT, config.BV, rows or config.BT // steps * steps
    options["rows"] = rows
    o, final, states = _results(q, k, v, beta, g, initial_state, cu_seqlens, **options)
    q, k, v, initial_state = _rows(q, k, v, initial_state)
    compute = final.dtype
    if N == 0:
        return o.zero_(), final, states

    T *= steps
    cu_seqlens = in_rows(cu_seqlens, steps)
    options = {"scale": scale, "qk_l2norm": qk_l2norm, "forward": True, "BT": BT, "rows": rows, "steps": steps}
    M, P, factors, decay, *_ = prepare(q, k, beta, g, cu_seqlens, **options)
    align = alignment(q, k, v)
    tma = config.tma and align > 1 and all(x.data_ptr() % 16 == 0 for x in (q, k, v))
    if config.tma:
        allow_descriptors()
    chunks = B * cdiv(T, rows)
    blocks = cdiv(V, BV)
    segment = _segment_chunks(chunks, HV * blocks, N, q)
    sizes = {"K": K, "V": V, "ROWS": rows, "BT": BT, "BK": power_of_two(K), "BV": BV, "ALIGN": align}
    # With more programs than multiprocessors, two that share one are faster than a third stage, which leaves no room.
    # Loads through registers have none for it either.
    few = N * HV * blocks <= multiprocessors(q) and segment is None
    stages = config.num_stages if few and tma else min(config.num_stages, 2)
    walk = {"STAGES": stages, "TMA": tma, "OWN_TMA": config.tma, "PRECISION": precision(q.dtype)} | config.options
    lengths = (cu_seqlens, T, N, segment or chunks + 1)
    slots = chunk_slots(B, max(T, 1), cu_seqlens, rows * segment) if segment else N
    with on_device(q):
        entry = initial_state
        if segment:
            entry = _entries(k, v, M, factors, decay, initial_state, lengths, slots, sizes, walk, compute)
        args = (
            q, k, v, M, P, factors, decay, o, entry, final, states if save_states else None, *lengths, HV // H,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *((0, 0, 0) if entry is None else entry.stride()[:3]),
        )  # fmt: skip
        saved = CHECKPOINT if save_states else 0
        constants = constexprs(
            **sizes, BQ=query_rows(BT, steps), STEPS=steps, SPLIT=segment is not None, CHECKPOINT=saved, **walk
        )
        launch(forward_kernel, (slots * blocks, HV), args, constants)
    return o, final, states


def _entries(k, v, M, factors, decay, initial_state, lengths, slots, sizes, walk, compute):
    """The states that enter the segments: their maps side by side, then the chain."""
    HV, K, V, BV = v.shape[2], sizes["K"], sizes["V"], sizes["BV"]
    cu_seqlens, T, N, segment = lengths
    maps = torch.empty(slots, HV, K, K + V, dtype=compute, device=v.device)
    entry = torch.empty(slots, HV, K, V, dtype=compute, device=v.device)
    args = (
        k, v, M, factors, decay, maps, *lengths, HV // k.shape[2], *k.stride()[:3], *v.stride()[:3],
    )  # fmt: skip
    constants = constexprs(**sizes, **walk)
    launch(map_kernel, (slots * (cdiv(K, BV) + cdiv(V, BV)), HV), args, constants)
    args = (
        maps, initial_state, entry, *lengths, *((0, 0, 0) if initial_state is None else initial_state.stride()[:3]),
    )  # fmt: skip
    constants = constexprs(
        K=K, V=V, ROWS=sizes["ROWS"], BK=sizes["BK"], BV=16, STEP=16, num_warps=4, enable_fp_fusion=True
    )
    launch(chain_kernel, (N * cdiv(V, 16), HV), args, constants)
    return entry


def _step_result(q, k, v, *_, **__):
    return torch.empty(v.shape[0], *v.shape[-2:], dtype=v.dtype, device=v.device)


@operator(
    "delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, *, Tensor(a!) state, float scale, "
    "bool qk_l2norm, Tensor? state_indices) -> Tensor",
    _step_result,
)
def step(q, k, v, beta, g, *, state, scale, qk_l2norm, state_indices):
    """o; `state` is written in place. DeltaProduct's k, v and beta have a second axis, of their rows for one of q."""
    B, H, K = q.shape
    steps = k.shape[1] if k.dim() == 4 else 1
    if k.dim() == 3:
        k, v, beta = k[:, None], v[:, None], beta[:, None]
    HV, V = v.shape[2:]
    config = delta_rule_step_config(K, V, q.dtype, arch())
    o = _step_result(q, k, v)
    if B:
        with on_device(q):
            args = (
                q, k, v, beta, g, o, state, state_indices, scale, state.shape[0], HV // H, *q.stride(), *k.stride(),
                *v.stride(), *beta.stride(), *((0, 0) if g is None else g.stride()), *state.stride(),
            )  # fmt: skip
            constants = constexprs(
                K=K, V=V, STEPS=steps, BK=power_of_two(K), BV=config.BV, QK_L2NORM=qk_l2norm, **config.options
            )
            launch(step_kernel, (B, HV, cdiv(V, config.BV)), args, constants)
    return o
