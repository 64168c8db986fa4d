# SPDX-License-Identifier: Apache-2.0
"""What the kernels that attend a few queries to a long cache share: rows of queries, and keys split over programs.

All queries that read one key head are rows of a tile, token after token and query head after query head, so that the
cache is read once for all of them. Its keys are split over programs, each of which keeps its rows' maximum, sum of
weights and weighted values; a second launch puts them together, which is exact.
"""

import torch
import triton
import triton.language as tl

from ._config import decode_combine_config
from ._launch import arch, cdiv, constexprs, launch, multiprocessors
from ._sparse import load_columns
from ._tiles import cast, dot

FILL = 4  # programs a multiprocessor that a launch should have
SPAN = 1024  # keys of a program where they must not depend on the rest of the batch
SHORTEST = 128  # keys that are worth a program


@triton.jit
def rows_of_queries(block, key_head, Tq, GROUP, BM: tl.constexpr):
    """(token, query head, whether there is such a row) of each row [BM] of a tile."""
    row = block * BM + tl.arange(0, BM)
    return row // GROUP, key_head * GROUP + row % GROUP, row < Tq * GROUP


@triton.jit
def load_queries(q, token, head, live, q_t, q_h, D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr):
    """Tiles [BM, BC] of BC channels each."""
    tiles = ()
    for i in tl.static_range(BD // BC):
        column = i * BC + tl.arange(0, BC)
        place = token.to(tl.int64)[:, None] * q_t + head[:, None] * q_h + column[None, :]
        tiles = tiles + (tl.load(q + place, mask=live[:, None] & (column < D)[None, :], other=0),)
    return tiles


@triton.jit
def scores(
    queries, k, k_t, first, last,
    D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BM, BN] products with the keys from `first` on; those from `last` on are zero."""
    s = dot(queries[0], load_columns(k, k_t, first, last, D, BC, BN), None, PRECISION)
    for i in tl.static_range(1, BD // BC):
        s += dot(queries[i], load_columns(k + i * BC, k_t, first, last, D - i * BC, BC, BN), None, PRECISION)
    return s


@triton.jit
def store_outputs(
    o,  # [B, Tq, HQ, DV]; written where keys are not split
    parts,  # [B, Tq, HQ, S, DV], weighted values of each split; written where they are
    norms,  # [B, Tq, HQ, S, 2]: log2(e) times the largest score, the sum of weights, -1 where a row sees no key
    m, l, acc,  # [BM], [BM], [BM, BV]
    seen,  # [BM], whether the row sees any key here
    batch, token, head, live, split, Tq, HQ, S,
    DV: tl.constexpr, BV: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BV)
    row = (batch * Tq + token) * HQ + head
    if SPLIT:
        place = row * S + split
        mask = (live & seen)[:, None] & (column < DV)[None, :]
        tl.store(parts + place[:, None] * DV + column[None, :], acc, mask=mask)
        tl.store(norms + place * 2, m, mask=live)
        tl.store(norms + place * 2 + 1, tl.where(seen, l, -1), mask=live)
    else:
        x = tl.where(seen[:, None], acc / l[:, None], 0)
        mask = live[:, None] & (column < DV)[None, :]
        tl.store(o + row[:, None] * DV + column[None, :], cast(x, o.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["S"])
def combine_kernel(
    parts, norms, o,  # as `store_outputs` has them; o is written
    S,
    DV: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = parts.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    parts += row * S * DV
    norms += row * S * 2
    column = tl.arange(0, BV)
    live = column < DV
    m = tl.full([], float("-inf"), dtype)
    l = tl.zeros([], dtype)
    splits = tl.zeros([], tl.int32)
    acc = tl.zeros([BV], dtype)
    for first in range(0, S, BS):
        s = first + tl.arange(0, BS)
        weight = tl.load(norms + s * 2 + 1, mask=s < S, other=-1)
        there = (weight < 0) == 0  # a NaN is
        peak = tl.load(norms + s * 2, mask=there, other=float("-inf"))
        mask = there[:, None] & live[None, :]
        values = tl.load(parts + s[:, None] * DV + column[None, :], mask=mask, other=0)
        largest = tl.maximum(m, tl.max(peak, 0))
        safe = tl.where(largest == float("-inf"), 0.0, largest)
        p = tl.where(there, tl.exp2(peak - safe), 0.0)
        alpha = tl.exp2(m - safe)
        l = l * alpha + tl.sum(tl.where(there, weight, 0.0) * p, 0)
        acc = acc * alpha + tl.sum(values * p[:, None], 0)
        splits += tl.sum(there.to(tl.int32), 0)
        m = largest
    x = tl.where(splits > 0, acc / l, 0)
    tl.store(o + row * DV + column, cast(x, o.dtype.element_ty), mask=live)


# ----------------------------------------------------------------------------------------------- launchers


def split_keys(programs: int, keys: int, multiple: int, q: torch.Tensor, longest: int = 1 << 30) -> tuple[int, int]:
    """(keys of a split, a multiple of `multiple`; splits) for a launch that would have so many programs without.

    It follows from shapes alone. Under `torch.use_deterministic_algorithms(True)` not from those of the batch.
    """
    span = SPAN
    if not torch.are_deterministic_algorithms_enabled():
        span = min(longest, max(SHORTEST, cdiv(keys * programs, FILL * multiprocessors(q))))
    span = cdiv(span, multiple) * multiple
    return span, max(1, cdiv(keys, span))


def channels_of(BD: int, dtype: torch.dtype) -> int:
    """Channels of a product. A chain of 256 float32 additions is less exact than the reference's sums: 64 at a time."""
    return min(BD, {torch.float32: 64, torch.float64: 16}.get(dtype, BD))


def new_parts(q: torch.Tensor, DV: int, splits: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(parts, norms), or None where nothing is split."""
    if splits == 1:
        return None, None
    kind = {"dtype": torch.promote_types(q.dtype, torch.float32), "device": q.device}
    return torch.empty(*q.shape[:3], splits, DV, **kind), torch.empty(*q.shape[:3], splits, 2, **kind)


def combine(parts: torch.Tensor | None, norms: torch.Tensor | None, o: torch.Tensor, DV: int, BV: int) -> None:
    """Put the splits together, if there are any."""
    if parts is not None:
        config = decode_combine_config(arch())
        constants = constexprs(DV=DV, BV=BV, BS=config.BT, **config.options)
        launch(combine_kernel, (o.numel() // DV,), (parts, norms, o, parts.shape[3]), constants)
