# SPDX-License-Identifier: Apache-2.0
"""What the kernels of temporal-sparse attention share: held keys, tiles of rows, and which keys are near."""

import torch
import triton
import triton.language as tl

from ._config import temporal_sparse_attention_config, temporal_sparse_hold_config
from ._launch import arch, constexprs, launch, precision
from ._scan import load_run, when
from ._tiles import cast, dot, segment_of_slot

LOG2_E = 1.4426950408889634
# Arguments for whose values no kernel over tiles is compiled; what divides strides decides how rows are loaded.
LENGTHS = ["N", "Tq", "T", "window", "sink"]


@triton.jit
def window_start(i, window, BLOCKS: tl.constexpr):
    """The first key that position i sees exactly for its window."""
    if BLOCKS:
        return i // window * window
    else:
        return i - window + 1


@triton.jit
def load_rows(at, stride, first, last, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, BD] from row `first` on; zeros from row `last` on."""
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, BD)
    place = row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(at + place, mask=(row < last)[:, None] & (column < D)[None, :], other=0)


@triton.jit
def load_columns(at, stride, first, last, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """`load_rows`, transposed on the way: [BD, ROWS]."""
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, BD)
    place = row.to(tl.int64)[None, :] * stride + column[:, None]
    return tl.load(at + place, mask=(row < last)[None, :] & (column < D)[:, None], other=0)


@triton.jit
def store_rows(at, x, stride, first, last, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, BD)
    place = row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at + place, cast(x, at.dtype.element_ty), mask=(row < last)[:, None] & (column < D)[None, :])


@triton.jit
def borders(first_position, last, window, sink, BN: tl.constexpr, BLOCKS: tl.constexpr):
    """Where whole tiles of keys before `last` end that hold sinks; that are far from all queries, the first of which is
    at first_position; and that are far from some."""
    sinks = tl.minimum(sink + BN - 1, last) // BN * BN
    far = tl.maximum(window_start(first_position, window, BLOCKS), 0) // BN * BN
    far = tl.minimum(tl.maximum(far, sinks), last)
    mixed = (tl.maximum(window_start(last - 1, window, BLOCKS), 0) + BN - 1) // BN * BN
    return sinks, far, tl.maximum(mixed, far)


@triton.jit
def tile_scores(
    queries, k, held, i, j, key, last, window, sink, k_t, held_t,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr, BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[BM, BN] products of queries at positions i and keys j from `key` on, each as its query sees it."""
    if NEAR:
        s = dot(queries, load_columns(k, k_t, key, last, D, BD, BN), None, PRECISION)
        if FAR:
            far = dot(queries, load_columns(held, held_t, key, last, D, BD, BN), None, PRECISION)
            s = tl.where(is_near(i[:, None], j[None, :], window, sink, BLOCKS), s, far)
    else:
        s = dot(queries, load_columns(held, held_t, key, last, D, BD, BN), None, PRECISION)
    return s


@triton.jit
def is_near(i, j, window, sink, BLOCKS: tl.constexpr):
    return (j >= window_start(i, window, BLOCKS)) | (j < sink)


@triton.jit(do_not_specialize=["N", "T"])
def hold_kernel(
    k,  # [B, T, HK, D]
    threshold,  # [HK, D]
    held,  # [B, T, HK, D], contiguous; written
    fired,  # [B, HK, T]; written
    cu_seqlens,  # [N + 1] or None
    N, T, HK, k_b, k_t, k_h,
    D: tl.constexpr, BD: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) // HK
    head = (tl.program_id(0) % HK).to(tl.int64)
    _, batch, start, length, _ = segment_of_slot(slot, cu_seqlens, N, T, 1, False)
    column = tl.arange(0, BD)
    live = column < D
    limit = tl.load(threshold + head * D + column, mask=live, other=0)
    k += batch * k_b + start * k_t + head * k_h + column
    held += ((batch * T + start) * HK + head) * D + column
    fired += (batch * HK + head) * T + start
    row = tl.cast(HK, tl.int64) * D
    now = tl.zeros([BD], limit.dtype)
    rows = load_run(k, k_t, 0, length, live, RUN)
    for t in range(0, length, RUN):
        following = load_run(k, k_t, t + RUN, length, live, RUN)
        for i in tl.static_range(RUN):
            x = rows[i].to(limit.dtype)
            stays = tl.where(t + i > 0, tl.abs(x - now) <= limit, False)  # a NaN fires
            now = tl.where(stays, now, x)
            place = held + tl.cast(t + i, tl.int64) * row
            tl.store(place, cast(now, held.dtype.element_ty), mask=when(t + i < length, live))
            count = tl.sum(tl.where(stays, 0, 1) * tl.where(live, 1, 0))
            tl.store(fired + t + i, count, mask=t + i < length)
        rows = following


def rows_of(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The kernels take any outer strides and need each row contiguous."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def new(packed: bool, *shape: int, **kind) -> torch.Tensor:
    """An output: zeros where packed sequences may leave tokens out."""
    return torch.zeros(shape, **kind) if packed else torch.empty(shape, **kind)


def block_of(n: int) -> int:
    """Columns of a tile that holds n."""
    return max(16, 1 << (n - 1).bit_length())


def hold(k: torch.Tensor, threshold: torch.Tensor, cu_seqlens: torch.Tensor | None):
    """(held keys like k, contiguous; how many channels fired at each key, int32 `[B, HK, T]`)."""
    B, T, HK, D = k.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    held = torch.empty(B, T, HK, D, dtype=k.dtype, device=k.device)
    fired = new(cu_seqlens is not None, B, HK, T, dtype=torch.int32, device=k.device)
    if N * T:
        config = temporal_sparse_hold_config(arch())
        constants = constexprs(D=D, BD=block_of(D), RUN=config.BT, **config.options)
        args = (k, threshold, held, fired, cu_seqlens, N, T, HK, *k.stride()[:3])
        launch(hold_kernel, (N * HK,), args, constants)
    return held, fired


def shared_constants(kind, q, v, *, window_mode, scale, dense):
    """(config, the constexpr arguments that all kernels over tiles share)."""
    D, DV = q.shape[3], v.shape[3]
    config = temporal_sparse_attention_config(kind, max(block_of(D), block_of(DV)), q.dtype, arch())
    return config, {
        "D": D, "DV": DV, "BD": block_of(D), "BV": block_of(DV), "BM": config.BT, "BN": config.BK,
        "FACTOR": scale * LOG2_E, "HOLDS": not dense, "BLOCKS": window_mode == "block",
        "PRECISION": precision(q.dtype),
    }  # fmt: skip
