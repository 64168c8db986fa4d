# SPDX-License-Identifier: Apache-2.0
"""The gradients of temporal-sparse attention on GPUs.

Weights are computed again, P = 2^(log2(e) scale s - m) / l, and with d_i = dO_i . O_i

    dV = P^T dO,   dS = P (dO V^T - d),   dQ = scale dS (K or K_hat),   dK = scale dS^T Q where near, dK_hat elsewhere

A program has a block of queries and walks over keys for dQ, and writes d; then one has a block of keys and walks over
the queries of its head group for the rest: no atomics. The last launch gives the gradient of a held element to the one
that it is a copy of, from the last token to the first. No result of a product is transposed: what is loaded is.
"""

import torch
import triton
import triton.language as tl

from ._config import temporal_sparse_hold_config
from ._launch import arch, chunk_slots, constexprs, launch, on_device
from ._operators import operator
from ._scan import when
from ._sparse import (
    LENGTHS,
    block_of,
    borders,
    hold,
    is_near,
    load_columns,
    load_rows,
    new,
    rows_of,
    shared_constants,
    store_rows,
    tile_scores,
)
from ._tiles import cast, dot, segment_of_slot


@triton.jit
def walk(
    acc, mean, rest,  # [BM, BD] twice, [BM]: sums over keys of dS K, P K and dS
    queries, douts, m, inverse, sums, k, held, v, i, begin, end, last, window, sink, k_t, held_t, v_t,
    FACTOR: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    NEAR: tl.constexpr, FAR: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """The keys [begin, end), as in the forward's `attend`."""
    low: tl.constexpr = queries.dtype
    for key in range(begin, end, BN):
        j = key + tl.arange(0, BN)
        s = tile_scores(
            queries, k, held, i, j, key, last, window, sink, k_t, held_t, D, BD, BN, NEAR, FAR, BLOCKS, PRECISION
        )
        p = tl.where(j[None, :] <= i[:, None], tl.exp2(s * FACTOR - m[:, None]) * inverse[:, None], 0.0)
        dp = dot(douts, load_columns(v, v_t, key, last, DV, BV, BN), None, PRECISION)
        ds = tl.where(j[None, :] <= i[:, None], p * (dp - sums[:, None]), 0.0)
        if MEAN:
            rest += tl.sum(ds, 1)
        if NEAR:
            keys = load_rows(k, k_t, key, last, D, BD, BN)
            near = is_near(i[:, None], j[None, :], window, sink, BLOCKS) if FAR else ds == ds
            acc = dot(cast(tl.where(near, ds, 0.0) if FAR else ds, low), keys, acc, PRECISION)
            if MEAN:
                mean = dot(cast(tl.where(near, p, 0.0) if FAR else p, low), keys, mean, PRECISION)
        if FAR:
            keys = load_rows(held, held_t, key, last, D, BD, BN)
            acc = dot(cast(tl.where(near, 0.0, ds) if NEAR else ds, low), keys, acc, PRECISION)
            if MEAN:
                mean = dot(cast(tl.where(near, 0.0, p) if NEAR else p, low), keys, mean, PRECISION)
    return acc, mean, rest


@triton.jit(do_not_specialize=LENGTHS)
def queries_kernel(
    q,  # [B, Tq, HQ, D]
    k,  # [B, T, HK, D]
    held,  # [B, T, HK, D], contiguous, or None
    v,  # [B, T, HK, DV]
    o,  # [B, Tq, HQ, DV], contiguous
    norms,  # [B, HQ, Tq, 2]
    do,  # [B, Tq, HQ, DV]
    d,  # [B, HQ, Tq]; written
    dq,  # [B, Tq, HQ, D], contiguous; written unless None
    cu_seqlens,  # [N + 1] or None
    N, Tq, T, window, sink, HQ, HK,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
    SCALE: tl.constexpr, FACTOR: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HOLDS: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
    MEAN: tl.constexpr,  # whether to put right what a row of dS misses 0 by, for dtypes in which it counts
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    slot = tl.program_id(0) // HQ
    head = (tl.program_id(0) % HQ).to(tl.int64)
    key_head = head // (HQ // HK)
    _, batch, start, length, block = segment_of_slot(slot, cu_seqlens, N, Tq, BM, True)
    first = block * BM
    if (block < 0) | (first >= length):
        return
    offset = T - Tq if cu_seqlens is None else 0
    q += batch * q_b + start * q_t + head * q_h
    k += batch * k_b + start * k_t + key_head * k_h
    v += batch * v_b + start * v_t + key_head * v_h
    do += batch * do_b + start * do_t + head * do_h
    out_row = (batch * Tq + start) * HQ + head
    o += out_row * DV
    norms += ((batch * HQ + head) * Tq + start) * 2
    d += (batch * HQ + head) * Tq + start
    held_row = tl.cast(HK, tl.int64) * D
    if HOLDS:
        held += (batch * T + start) * held_row + key_head * D

    row = first + tl.arange(0, BM)
    live = row < length
    i = row + offset
    last = tl.minimum(first + BM, length) + offset
    douts = load_rows(do, do_t, first, length, DV, BV, BM)
    outs = load_rows(o, tl.cast(HQ, tl.int64) * DV, first, length, DV, BV, BM)
    sums = tl.sum(douts.to(dtype) * outs.to(dtype), 1)
    tl.store(d + row, sums, mask=live)
    if dq is not None:
        queries = load_rows(q, q_t, first, length, D, BD, BM)
        place = norms + row.to(tl.int64) * 2
        m = tl.load(place, mask=live, other=0)
        inverse = tl.load(place + 1, mask=live, other=0)
        acc = tl.zeros([BM, BD], dtype)
        mean = tl.zeros([BM, BD], dtype)
        rest = tl.zeros([BM], dtype)
        if HOLDS:
            sinks, far, mixed = borders(first + offset, last, window, sink, BN, BLOCKS)
            acc, mean, rest = walk(
                acc, mean, rest, queries, douts, m, inverse, sums, k, held, v, i, 0, sinks, last, window, sink, k_t,
                held_row, v_t, FACTOR, D, DV, BD, BV, BN, True, True, BLOCKS, PRECISION, MEAN,
            )  # fmt: skip
            acc, mean, rest = walk(
                acc, mean, rest, queries, douts, m, inverse, sums, k, held, v, i, sinks, far, last, window, sink, k_t,
                held_row, v_t, FACTOR, D, DV, BD, BV, BN, False, True, BLOCKS, PRECISION, MEAN,
            )  # fmt: skip
            acc, mean, rest = walk(
                acc, mean, rest, queries, douts, m, inverse, sums, k, held, v, i, far, mixed, last, window, sink, k_t,
                held_row, v_t, FACTOR, D, DV, BD, BV, BN, True, True, BLOCKS, PRECISION, MEAN,
            )  # fmt: skip
        else:
            mixed = 0
        acc, mean, rest = walk(
            acc, mean, rest, queries, douts, m, inverse, sums, k, held, v, i, mixed, last, last, window, sink, k_t,
            held_row, v_t, FACTOR, D, DV, BD, BV, BN, True, False, BLOCKS, PRECISION, MEAN,
        )  # fmt: skip
        if MEAN:
            acc -= rest[:, None] * mean
        store_rows(dq + out_row * D, acc * SCALE, tl.cast(HQ, tl.int64) * D, first, length, D, BD, BM)


@triton.jit
def query_borders(
    key, begin, count, offset, window, sink, BM: tl.constexpr, BN: tl.constexpr, HOLDS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Where whole tiles of queries from `begin` on end that see all of a tile of keys exactly, and that see some so."""
    if HOLDS:
        if BLOCKS:
            near = (key // window + 1) * window
            far = (key + BN + window - 1) // window * window
        else:
            near = key + window
            far = key + BN + window - 1
        near = tl.where(sink > key, tl.where(sink >= key + BN, count, 0), near - offset)
        far = tl.where(sink > key, count, far - offset)
        near = tl.maximum(tl.minimum(near, count), begin)
        near_end = begin + (near - begin) // BM * BM
        near_end = tl.where(near >= count, count, near_end)
        far = tl.maximum(tl.minimum(far, count), near_end)
        mixed_end = tl.minimum(near_end + (far - near_end + BM - 1) // BM * BM, count)
        return near_end, mixed_end
    else:
        return count, count


@triton.jit
def collect(
    dkeys, dheld, dvalues,  # [BN, BD] twice, [BN, BV]: sums over queries
    keys, held_keys, values, q, do, norms, d, j, begin, end, count, offset, window, sink, q_t, do_t,
    FACTOR: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
    NEAR: tl.constexpr, FAR: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries [begin, end) of one head, whole tiles of BM, of which those before `count` exist."""
    low: tl.constexpr = keys.dtype
    for first in range(begin, end, BM):
        r = first + tl.arange(0, BM)
        i = r + offset
        live = r < count
        queries = load_rows(q, q_t, first, count, D, BD, BM)
        douts = load_rows(do, do_t, first, count, DV, BV, BM)
        place = norms + r.to(tl.int64) * 2
        m = tl.load(place, mask=live, other=0)
        inverse = tl.load(place + 1, mask=live, other=0)
        sums = tl.load(d + r, mask=live, other=0)
        near = is_near(i[None, :], j[:, None], window, sink, BLOCKS)
        if NEAR:
            s = dot(keys, tl.trans(queries), None, PRECISION)
            if FAR:
                s = tl.where(near, s, dot(held_keys, tl.trans(queries), None, PRECISION))
        else:
            s = dot(held_keys, tl.trans(queries), None, PRECISION)
        seen = (i[None, :] >= j[:, None]) & live[None, :]
        p = tl.where(seen, tl.exp2(s * FACTOR - m[None, :]) * inverse[None, :], 0.0)
        dvalues = dot(cast(p, low), douts, dvalues, PRECISION)
        dp = dot(values, tl.trans(douts), None, PRECISION)
        ds = tl.where(seen, p * (dp - sums[None, :]), 0.0)
        if NEAR:
            dkeys = dot(cast(tl.where(near, ds, 0.0) if FAR else ds, low), queries, dkeys, PRECISION)
        if FAR:
            dheld = dot(cast(tl.where(near, 0.0, ds) if NEAR else ds, low), queries, dheld, PRECISION)
    return dkeys, dheld, dvalues


@triton.jit(do_not_specialize=LENGTHS)
def keys_kernel(
    q,  # [B, Tq, HQ, D]
    k,  # [B, T, HK, D]
    held,  # [B, T, HK, D], contiguous, or None
    v,  # [B, T, HK, DV]
    norms,  # [B, HQ, Tq, 2]
    do,  # [B, Tq, HQ, DV]
    d,  # [B, HQ, Tq]
    dk,  # [B, T, HK, D], contiguous: of keys that are near; written
    dheld,  # the same of keys as they are held; written unless None
    dv,  # [B, T, HK, DV], contiguous; written
    cu_seqlens,  # [N + 1] or None
    N, Tq, T, window, sink, HQ, HK,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
    SCALE: tl.constexpr, FACTOR: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HOLDS: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    slot = tl.program_id(0) // HK
    head = (tl.program_id(0) % HK).to(tl.int64)
    group = HQ // HK
    _, batch, start, length, block = segment_of_slot(slot, cu_seqlens, N, T, BN, True)
    key = block * BN
    if (block < 0) | (key >= length):
        return
    offset = T - Tq if cu_seqlens is None else 0
    count = length - offset  # queries
    q += batch * q_b + start * q_t
    do += batch * do_b + start * do_t
    k += batch * k_b + start * k_t + head * k_h
    v += batch * v_b + start * v_t + head * v_h
    norms += (batch * HQ * Tq + start) * 2
    d += batch * HQ * Tq + start
    own = (batch * T + start) * HK + head
    row = tl.cast(HK, tl.int64) * D

    j = key + tl.arange(0, BN)
    keys = load_rows(k, k_t, key, length, D, BD, BN)
    held_keys = keys
    if HOLDS:
        held_keys = load_rows(held + own * D, row, key, length, D, BD, BN)
    values = load_rows(v, v_t, key, length, DV, BV, BN)
    dkeys = tl.zeros([BN, BD], dtype)
    dheld_keys = tl.zeros([BN, BD], dtype)
    dvalues = tl.zeros([BN, BV], dtype)
    begin = tl.maximum(key - offset, 0) // BM * BM
    near_end, mixed_end = query_borders(key, begin, count, offset, window, sink, BM, BN, HOLDS, BLOCKS)
    for h in range(group):
        own_head = head * group + h
        own_q = q + own_head * q_h
        own_do = do + own_head * do_h
        own_norms = norms + own_head * Tq * 2
        own_d = d + own_head * Tq
        dkeys, dheld_keys, dvalues = collect(
            dkeys, dheld_keys, dvalues, keys, held_keys, values, own_q, own_do, own_norms, own_d, j, begin, near_end,
            count, offset, window, sink, q_t, do_t, FACTOR, D, DV, BD, BV, BM, True, False, BLOCKS, PRECISION,
        )  # fmt: skip
        if HOLDS:
            dkeys, dheld_keys, dvalues = collect(
                dkeys, dheld_keys, dvalues, keys, held_keys, values, own_q, own_do, own_norms, own_d, j, near_end,
                mixed_end, count, offset, window, sink, q_t, do_t, FACTOR, D, DV, BD, BV, BM, True, True, BLOCKS,
                PRECISION,
            )  # fmt: skip
            dkeys, dheld_keys, dvalues = collect(
                dkeys, dheld_keys, dvalues, keys, held_keys, values, own_q, own_do, own_norms, own_d, j, mixed_end,
                count, count, offset, window, sink, q_t, do_t, FACTOR, D, DV, BD, BV, BM, False, True, BLOCKS,
                PRECISION,
            )  # fmt: skip
    store_rows(dv + own * DV, dvalues, tl.cast(HK, tl.int64) * DV, key, length, DV, BV, BN)
    store_rows(dk + own * D, dkeys * SCALE, row, key, length, D, BD, BN)
    if HOLDS:
        store_rows(dheld + own * D, dheld_keys * SCALE, row, key, length, D, BD, BN)


@triton.jit(do_not_specialize=["N", "T"])
def give_back_kernel(
    held,  # [B, T, HK, D], as all of these contiguous
    dnear,  # [B, T, HK, D]
    dheld,  # [B, T, HK, D]
    dk,  # [B, T, HK, D]; written
    cu_seqlens,  # [N + 1] or None
    N, T, HK,
    D: tl.constexpr, BD: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """dk = dnear + the sum of dheld over the steps from each one at which a channel fired to before the next."""
    slot = tl.program_id(0) // HK
    head = tl.program_id(0) % HK
    _, batch, start, length, _ = segment_of_slot(slot, cu_seqlens, N, T, 1, False)
    column = tl.arange(0, BD)
    live = column < D
    row = tl.cast(HK, tl.int64) * D
    own = (batch * T + start) * row + tl.cast(head, tl.int64) * D + column
    held += own
    dnear += own
    dheld += own
    dk += own
    later = tl.zeros([BD], dheld.dtype.element_ty)
    for back in range(0, length, RUN):
        first = length - RUN - back  # of the run, which may begin before the sequence
        for n in tl.static_range(RUN):
            t = first + RUN - 1 - n
            place = tl.cast(t, tl.int64) * row
            inside = when(t >= 0, live)
            now = tl.load(held + place, mask=inside, other=0)
            before = tl.load(held + place - row, mask=when(t > 0, live), other=0)
            later += tl.load(dheld + place, mask=inside, other=0)
            stays = tl.where(t > 0, now == before, False)  # a channel that fires has another value
            total = tl.load(dnear + place, mask=inside, other=0) + tl.where(stays, 0.0, later)
            tl.store(dk + place, cast(total, dk.dtype.element_ty), mask=inside)
            later = tl.where(stays, later, 0.0)


def _gradients(
    q, k, v, threshold, cu_seqlens, o, norms, do, *, window, sink, window_mode, scale, dense, needs
):  # fmt: skip
    """What `backward` returns, not written."""
    packed = cu_seqlens is not None
    return [
        new(packed, *x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in zip((q, k, v), needs, strict=True)
    ]


@operator(
    "temporal_sparse_attention_backward(Tensor q, Tensor k, Tensor v, Tensor threshold, Tensor? cu_seqlens, Tensor o, "
    "Tensor norms, Tensor do, *, int window, int sink, str window_mode, float scale, bool dense, bool[3] needs) "
    "-> Tensor[]",
    _gradients,
)
def backward(
    q, k, v, threshold, cu_seqlens, o, norms, do, *, window, sink, window_mode, scale, dense, needs
):  # fmt: skip
    """Gradients of q, k and v, None where `needs` is False."""
    options = {"window_mode": window_mode, "scale": scale, "dense": dense}
    grads = _gradients(q, k, v, threshold, cu_seqlens, o, norms, do, window=window, sink=sink, needs=needs, **options)
    dq, dk, dv = grads
    q, k, v, do = rows_of(q, k, v, do)
    B, Tq, HQ, _ = q.shape
    T, HK, D = k.shape[1:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if N * T == 0:
        return grads
    packed, kind = cu_seqlens is not None, {"dtype": norms.dtype, "device": q.device}
    held = dheld = None
    strides = [stride for x in (q, k, v, do) for stride in x.stride()[:3]]
    with on_device(q):
        if not dense:
            held, _ = hold(k, threshold, cu_seqlens)
        sums = torch.empty(B, HQ, Tq, **kind)
        sizes = (N, Tq, T, window, sink, HQ, HK, *strides)
        if Tq:
            config, constants = shared_constants("queries", q, v, **options)
            constants |= {"SCALE": scale, "MEAN": q.dtype.itemsize > 2}
            args = (q, k, held, v, o, norms, do, sums, dq, cu_seqlens, *sizes)
            grid = (chunk_slots(B, Tq, cu_seqlens, config.BT) * HQ,)
            launch(queries_kernel, grid, args, constexprs(**constants, **config.options))
        if not needs[1] and not needs[2]:
            return grads
        # What nobody needs is still a by-product of the same tiles.
        dvalues = torch.empty(v.shape, **kind) if dv is None else dv
        near = new(packed, *k.shape, **kind) if dk is None or not dense else dk
        if not dense:
            dheld = torch.empty(k.shape, **kind)
        config, constants = shared_constants("keys", q, v, **options)
        args = (q, k, held, v, norms, do, sums, near, dheld, dvalues, cu_seqlens, *sizes)
        grid = (chunk_slots(B, T, cu_seqlens, config.BK) * HK,)
        launch(keys_kernel, grid, args, constexprs(**constants, SCALE=scale, **config.options))
        if dk is not None and not dense:
            config = temporal_sparse_hold_config(arch())
            constants = constexprs(D=D, BD=block_of(D), RUN=config.BT, **config.options)
            launch(give_back_kernel, (N * HK,), (held, near, dheld, dk, cu_seqlens, N, T, HK), constants)
    return grads
