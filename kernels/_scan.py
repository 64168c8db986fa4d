# SPDX-License-Identifier: Apache-2.0
"""What the kernels of the selective scan share: tiles of channels and states, layouts, and where sequences are cut."""

import torch
import triton
import triton.language as tl

from ._config import SCAN_CHECKPOINT
from ._launch import cdiv, chunk_slots, constexprs, launch, multiprocessors
from ._tiles import INTERPRET, first_of, segment_of_slot

FILL = 8  # warps a multiprocessor that a launch should have
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def step_sizes(x, SOFTPLUS: tl.constexpr):
    """softplus(x), or x.

    With e = exp(-|x|) and s = e / (2 + e), log(1 + e) = 2 artanh(s) = e + s (2 (s^2/3 + s^4/5 + ...) - e): what is
    added to e is small, so its digits are kept.
    """
    if SOFTPLUS:
        TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 7
        e = tl.exp(-tl.abs(x))
        s = e / (2 + e)
        square = s * s
        series = square * 0 + 1 / (2 * TERMS + 1)
        for i in tl.static_range(TERMS - 1):
            series = series * square + 1 / (2 * (TERMS - i) - 1)
        return tl.where(x > 0, x, 0) + (e + s * (2 * (series * square) - e))
    else:
        return x


@triton.jit
def when(condition, mask):
    """mask where a scalar condition holds. As `mask & condition` Triton 3.9's interpreter takes no mask."""
    return tl.where(condition, mask, False)


@triton.jit
def load_run(at, stride, first, last, live, COUNT: tl.constexpr):
    """Steps first .. first + COUNT - 1 of [BD] channels as they are in memory; zeros from `last` on."""
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles = tiles + (
            tl.load(at + tl.cast(first + i, tl.int64) * stride, mask=when(first + i < last, live), other=0),
        )
    return tiles


@triton.jit
def load_projections(at, stride, first, last, N: tl.constexpr, BN: tl.constexpr, COUNT: tl.constexpr):
    """The same for B or C, [BN] a step."""
    n = tl.arange(0, BN)
    tiles = ()
    for i in tl.static_range(COUNT):
        mask = when(first + i < last, n < N)
        tiles = tiles + (tl.load(at + tl.cast(first + i, tl.int64) * stride, mask=mask, other=0),)
    return tiles


@triton.jit
def load_states(at, stride_d, stride_n, channel, live, N: tl.constexpr, BN: tl.constexpr, dtype: tl.constexpr):
    """[BN, BD] of an array that has a row of n for each channel.

    No kernel is compiled for a stride_n of 1: Triton would spread n over lanes, and every sum over n would cross them.
    Triton 3.6 does it for strides that it does not know, too, where it loads a tile: so all elements come in a row.
    """
    BD: tl.constexpr = channel.shape[0]
    n = tl.arange(0, BN)
    mask = tl.reshape((n < N)[:, None] & live[None, :], [BN * BD])
    place = tl.reshape(channel[None, :] * stride_d + n.to(tl.int64)[:, None] * stride_n, [BN * BD])
    return tl.reshape(tl.load(at + place, mask=mask, other=0), [BN, BD]).to(dtype)


@triton.jit
def sum_over_states(x):
    """[BN, BD] -> [BD]. NumPy, in the interpreter, adds rows one by one, which 256 of them feel: groups of 16 there."""
    if INTERPRET:
        if x.shape[0] > 16:
            x = tl.sum(tl.reshape(x, [x.shape[0] // 16, 16, x.shape[1]]), 1)
    return tl.sum(x, 0)


@triton.jit
def own_states(at, slot, channel, one, Di, N: tl.constexpr, BN: tl.constexpr):
    """Where the states [BN, BD] of a slot of our own arrays [slots, N, Di] are.

    `one` is 1. Where Triton knows, it gives a thread four channels that lie side by side, and spreads n over lanes.
    """
    n = tl.arange(0, BN)
    return at + (tl.cast(slot, tl.int64) * N + n.to(tl.int64)[:, None]) * Di + channel[None, :] * one


@triton.jit
def load_channels(at, stride, channel, live, dtype: tl.constexpr):
    """[BD] of D or delta_bias, zeros without."""
    if at is None:
        return tl.zeros([channel.shape[0]], dtype)
    else:
        return tl.load(at + channel * stride, mask=live, other=0).to(dtype)


@triton.jit
def place_of(program, group_channels, groups, BD: tl.constexpr):
    """(slot, group, channels, which of them exist) of a program: blocks of BD channels never reach over a group."""
    blocks = tl.cdiv(group_channels, BD)
    within = program % blocks * BD + tl.arange(0, BD)
    group = tl.cast(program // blocks % groups, tl.int64)
    return program // (blocks * groups), group, group * group_channels + within, within < group_channels


@triton.jit
def first_of_segment(segment, SEGMENT):
    """The first step of a segment, in its sequence: below 2^31, as lengths are."""
    return tl.cast(tl.cast(segment, tl.int64) * SEGMENT, tl.int32)


@triton.jit
def zero_steps(at, stride, first, last, live):
    """Steps that no sequence covers are zero."""
    for t in range(first, last):
        tl.store(at + tl.cast(t, tl.int64) * stride, tl.zeros(live.shape, at.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["L", "S", "SEGMENT", "A_d", "A_n", "state_s", "state_d", "state_n"])
def chain_kernel(
    made,  # [slots of segments, N, Di]: what segments make from zero
    sums,  # [slots of segments, Di]
    A,  # [Di, N]
    state,  # [S, Di, N] or None: what enters the first segment, or with REVERSE the last
    entry,  # [slots of segments, Di, N]: what enters each; written
    cu_seqlens,  # [S + 1] or None
    L, S, SEGMENT, Di, A_d, A_n, state_s, state_d, state_n,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The states that enter the segments of one sequence, one after the other."""
    dtype: tl.constexpr = made.dtype.element_ty
    s, _, channel, live = place_of(tl.program_id(0), Di, 1, BD)
    _, _, start, length, _ = segment_of_slot(s, cu_seqlens, S, L, SEGMENT, False)
    slot = first_of(cu_seqlens, s, start, L, SEGMENT)
    if cu_seqlens is None:
        slot = tl.cast(s, tl.int64) * tl.maximum(tl.cdiv(L, SEGMENT), 1)
    segments = tl.maximum(tl.cdiv(length, SEGMENT), 1)
    a = load_states(A, A_d, A_n, channel, live, N, BN, dtype) * LOG2_E
    h = tl.zeros([BN, BD], dtype)
    if state is not None:
        h += load_states(state + tl.cast(s, tl.int64) * state_s, state_d, state_n, channel, live, N, BN, dtype)
    mask = (tl.arange(0, BN) < N)[:, None] & live[None, :]
    for i in range(segments):
        here = slot + (segments - 1 - i if REVERSE else i)
        tl.store(own_states(entry, here, channel, 1, Di, N, BN), h, mask=mask)
        total = tl.load(sums + here * Di + channel, mask=live, other=0)
        h = tl.exp2(total[None, :] * a) * h + tl.load(own_states(made, here, channel, 1, Di, N, BN), mask=mask, other=0)


# -------------------------------------------------------------------------------------------- launchers


def strides(x: torch.Tensor | None, *axes: int) -> tuple[int, ...]:
    return (0,) * len(axes) if x is None else tuple(x.stride(axis) for axis in axes)


def channels_last(x: torch.Tensor | None) -> torch.Tensor | None:
    """`[B, Di, L]` with neighbouring channels behind one another in memory: x itself if it is so."""
    if x is None or x.stride(1) == 1:
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def projection(w: torch.Tensor) -> torch.Tensor:
    """B or C with n innermost; constants stay."""
    if w.dim() == 2 or w.stride(2) == 1:
        return w
    return w.transpose(2, 3).contiguous().transpose(2, 3)


def projection_strides(w: torch.Tensor) -> tuple[int, ...]:
    """(batch, group, step); of a constant (0, channel, n)."""
    return (0, *w.stride()) if w.dim() == 2 else strides(w, 0, 1, 3)


def projection_alignment(*projections: torch.Tensor) -> int:
    """What divides the outer strides of B and C, so that kernels may load 16 bytes at once."""
    outer = [w.stride(axis) for w in projections if w.dim() == 4 for axis in (0, 1, 3) if w.shape[axis] > 1]
    return 8 if all(s % 8 == 0 for s in outer) else 1


def empty_channels_last(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape[0], x.shape[2], x.shape[1], dtype=x.dtype, device=x.device).transpose(1, 2)


def segment_steps(programs: int, warps: int, sequences: int, x: torch.Tensor) -> int | None:
    """The steps of a segment, or None where cutting is not worth it: every exponential is computed twice then.

    `programs` would run without it, each of so many warps, for so many sequences.
    """
    if torch.are_deterministic_algorithms_enabled():
        return None
    room = FILL * multiprocessors(x) // warps
    steps = x.shape[0] * x.shape[2]  # of all sequences together
    length = max(4 * SCAN_CHECKPOINT, cdiv(steps * programs, max(sequences * room, 1)))
    length = cdiv(length, SCAN_CHECKPOINT) * SCAN_CHECKPOINT
    return length if 4 * length * sequences <= steps and 4 * programs <= room else None


def segment_slots(batch: int, L: int, cu_seqlens: torch.Tensor | None, segment: int | None) -> int:
    if segment is None:
        return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return chunk_slots(batch, max(L, 1), cu_seqlens, segment)


def scan_constants(config, N, B, C, delta_softplus) -> dict:
    return {
        "N": N,
        "BN": power_of_two(N),
        "BD": config.BD,
        "RUN": config.BT,
        "ALIGN": projection_alignment(B, C),
        "CONSTANT_B": B.dim() == 2,
        "CONSTANT_C": C.dim() == 2,
        "SOFTPLUS": delta_softplus,
    }


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def chain(made, sums, A, state, entry, lengths, config, *, reverse: bool) -> None:
    """Write what enters each segment to `entry`, from what the segments make from zero."""
    N, Di = made.shape[1:]
    cu_seqlens, L, S, segment = lengths
    args = (made, sums, A, state, entry, *lengths, Di, *A.stride(), *strides(state, 0, 1, 2))
    constants = constexprs(N=N, BN=power_of_two(N), BD=config.BD, REVERSE=reverse, **config.options)
    launch(chain_kernel, (S * cdiv(Di, config.BD),), args, constants)
