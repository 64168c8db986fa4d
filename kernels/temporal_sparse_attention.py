# SPDX-License-Identifier: Apache-2.0
"""DeltaLLM's temporal-sparse attention (arXiv 2507.19608) on GPUs: forward pass; temporal_sparse_attention_backward.py
has the gradients.

    k_hat_t = k_t where not |k_t - k_hat_{t-1}| <= threshold, else k_hat_{t-1}      a channel by itself
    o_i = sum over j <= i of softmax_j(scale q_i . (k_j if near, else k_hat_j)) v_j

One launch writes k_hat by holding values, without arithmetic: a program a sequence and key head. The other is flash
attention over tiles: it reads k_hat where all keys of a tile are far from all queries, k where all are near or sinks,
and both in between. Element-wise zeros are of no use to tensor cores, so nothing is skipped: on a GPU this is the op's
meaning at dense attention's price. Scores, the softmax and sums are float32 (float64 for float64).
"""

import torch
import triton
import triton.language as tl

from ._launch import chunk_slots, constexprs, launch, on_device
from ._launch import why_not as _why_not_here
from ._operators import operator
from ._sparse import (
    LENGTHS,
    borders,
    hold,
    load_rows,
    new,
    rows_of,
    shared_constants,
    store_rows,
    tile_scores,
)
from ._tiles import cast, dot, segment_of_slot, softmax_step
from .temporal_sparse_attention_backward import backward  # noqa: F401 - this module offers it

MAX_HEAD_DIM = 256

# ------------------------------------------------------------------------------------------------- kernels


@triton.jit
def attend(
    m, l, acc,  # [BM], [BM], [BM, BV]: the running maximum, sum of weights, and weighted values
    queries, k, held, v, i, begin, end, last, window, sink, k_t, held_t, v_t,
    FACTOR: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    NEAR: tl.constexpr, FAR: tl.constexpr,  # whether keys of these tiles are seen exactly, and as they are held
    BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys [begin, end), whole tiles of BN, of which those before `last` exist."""
    for key in range(begin, end, BN):
        j = key + tl.arange(0, BN)
        s = tile_scores(
            queries, k, held, i, j, key, last, window, sink, k_t, held_t, D, BD, BN, NEAR, FAR, BLOCKS, PRECISION
        )
        s = tl.where(j[None, :] <= i[:, None], s * FACTOR, float("-inf"))
        m, l, p, alpha = softmax_step(m, l, s)
        values = load_rows(v, v_t, key, last, DV, BV, BN)
        acc = dot(cast(p, v.dtype.element_ty), values, acc * alpha[:, None], PRECISION)
    return m, l, acc


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    q,  # [B, Tq, HQ, D]
    k,  # [B, T, HK, D]
    held,  # [B, T, HK, D], contiguous, or None
    v,  # [B, T, HK, DV]
    o,  # [B, Tq, HQ, DV], contiguous; written
    norms,  # [B, HQ, Tq, 2]: log2(e) times the largest score, 1 / the sum of weights; written
    cu_seqlens,  # [N + 1] or None
    N, Tq, T, window, sink, HQ, HK, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    FACTOR: tl.constexpr,  # scale log2(e)
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HOLDS: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    slot = tl.program_id(0) // HQ
    head = (tl.program_id(0) % HQ).to(tl.int64)
    key_head = head // (HQ // HK)
    _, batch, start, length, block = segment_of_slot(slot, cu_seqlens, N, Tq, BM, True)
    first = block * BM
    if (block < 0) | (first >= length):
        return
    offset = T - Tq if cu_seqlens is None else 0  # the position of the first query
    q += batch * q_b + start * q_t + head * q_h
    k += batch * k_b + start * k_t + key_head * k_h
    v += batch * v_b + start * v_t + key_head * v_h
    o += ((batch * Tq + start) * HQ + head) * DV
    norms += ((batch * HQ + head) * Tq + start) * 2
    held_row = tl.cast(HK, tl.int64) * D
    if HOLDS:
        held += (batch * T + start) * held_row + key_head * D

    row = first + tl.arange(0, BM)
    i = row + offset
    last = tl.minimum(first + BM, length) + offset  # behind the last key that a query sees
    queries = load_rows(q, q_t, first, length, D, BD, BM)
    m = tl.full([BM], float("-inf"), dtype)
    l = tl.zeros([BM], dtype)
    acc = tl.zeros([BM, BV], dtype)
    if HOLDS:
        # Sinks; keys that are far from all queries; some near; all near. Loads that depend on nothing are pipelined.
        sinks, far, mixed = borders(first + offset, last, window, sink, BN, BLOCKS)
        m, l, acc = attend(
            m, l, acc, queries, k, held, v, i, 0, sinks, last, window, sink, k_t, held_row, v_t, FACTOR, D, DV, BD, BV,
            BN, True, True, BLOCKS, PRECISION,
        )  # fmt: skip
        m, l, acc = attend(
            m, l, acc, queries, k, held, v, i, sinks, far, last, window, sink, k_t, held_row, v_t, FACTOR, D, DV, BD,
            BV, BN, False, True, BLOCKS, PRECISION,
        )  # fmt: skip
        m, l, acc = attend(
            m, l, acc, queries, k, held, v, i, far, mixed, last, window, sink, k_t, held_row, v_t, FACTOR, D, DV, BD,
            BV, BN, True, True, BLOCKS, PRECISION,
        )  # fmt: skip
    else:
        mixed = 0
    m, l, acc = attend(
        m, l, acc, queries, k, held, v, i, mixed, last, last, window, sink, k_t, held_row, v_t, FACTOR, D, DV, BD, BV,
        BN, True, False, BLOCKS, PRECISION,
    )  # fmt: skip
    inverse = 1 / l
    store_rows(o, acc * inverse[:, None], tl.cast(HQ, tl.int64) * DV, first, length, DV, BV, BM)
    place = norms + row.to(tl.int64) * 2
    tl.store(place, m, mask=row < length)
    tl.store(place + 1, inverse, mask=row < length)


# ----------------------------------------------------------------------------------------------- launchers


def why_not(device: str, dtype: torch.dtype, *sizes: int) -> str | None:
    """The reason why this backend cannot run head dimensions `sizes`, or None."""
    missing = _why_not_here(device)
    if missing is None and any(s > MAX_HEAD_DIM for s in sizes):
        return f"head dimensions go up to {MAX_HEAD_DIM}, got {max(sizes)}"
    return missing


def _results(
    q, k, v, threshold, cu_seqlens, *, window, sink, window_mode, scale, dense, count_fired
):  # fmt: skip
    """What `forward` returns, not written."""
    B, Tq, HQ = q.shape[:3]
    packed, device = cu_seqlens is not None, q.device
    o = new(packed, B, Tq, HQ, v.shape[3], dtype=q.dtype, device=device)
    norms = new(packed, B, HQ, Tq, 2, dtype=torch.promote_types(q.dtype, torch.float32), device=device)
    counts = (0,) if dense and not count_fired else (B, k.shape[2], k.shape[1])
    return o, norms, torch.empty(counts, dtype=torch.int32, device=device)


@operator(
    "temporal_sparse_attention_forward(Tensor q, Tensor k, Tensor v, Tensor threshold, Tensor? cu_seqlens, *, "
    "int window, int sink, str window_mode, float scale, bool dense, bool count_fired) -> Tensor[]",
    _results,
)
def forward(q, k, v, threshold, cu_seqlens, *, window, sink, window_mode, scale, dense, count_fired):
    """(o, norms, fired): `norms` are each softmax's maximum and the inverse of its sum, for `backward`; `fired` is
    empty where neither asked for nor needed."""
    options = {"window_mode": window_mode, "scale": scale, "dense": dense}
    o, norms, fired = _results(
        q, k, v, threshold, cu_seqlens, window=window, sink=sink, count_fired=count_fired, **options
    )
    q, k, v = rows_of(q, k, v)
    B, Tq, HQ, _ = q.shape
    T, HK = k.shape[1:3]
    held = None
    with on_device(q):
        if not dense or count_fired:
            held, fired = hold(k, threshold, cu_seqlens)
        config, constants = shared_constants("forward", q, v, **options)
        N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        slots = chunk_slots(B, Tq, cu_seqlens, config.BT) if N * Tq else 0
        if slots:
            args = (
                q, k, None if dense else held, v, o, norms, cu_seqlens, N, Tq, T, window, sink, HQ, HK,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            )  # fmt: skip
            launch(forward_kernel, (slots * HQ,), args, constexprs(**constants, **config.options))
    return o, norms, fired
