# SPDX-License-Identifier: Apache-2.0
"""Mamba's selective scan (arXiv 2312.00752, equation 2) on GPUs: forward pass and step; selective_scan_backward.py has
the gradients.

    h_t = exp(step_t A) h_{t-1} + step_t u_t B_t,   step_t = softplus(delta_t + delta_bias)
    y_t = (C_t . h_t + D u_t) silu(z_t)             for each channel, h in R^N

A program walks through a sequence with BD channels and their N states in registers, a channel a lane: sums over n stay
inside of a thread, B_t and C_t are the same for all lanes, and no state but a checkpoint every CHECKPOINT steps is
written. Everything is float32 (float64 for float64). u, delta and z are read with channels innermost, and B and C with
n innermost; other layouts are copied first.

With fewer programs than the card has room for, sequences are cut into segments. A segment multiplies the state that
enters it by exp(A sum of its steps) and adds what it makes from zero: a first launch finds the two for each segment, a
second chains them, and then the segments run side by side: exact, with other rounding.
"""

import torch
import triton
import triton.language as tl

from ._config import SCAN_CHECKPOINT, selective_scan_config, selective_scan_step_config
from ._launch import arch, cdiv, chunk_slots, constexprs, launch, on_device
from ._launch import why_not as _why_not_here
from ._operators import operator
from ._scan import (
    LOG2_E,
    chain,
    channels_last,
    empty_channels_last,
    first_of_segment,
    load_channels,
    load_projections,
    load_run,
    load_states,
    own_states,
    place_of,
    power_of_two,
    projection,
    projection_strides,
    scan_constants,
    segment_slots,
    segment_steps,
    step_sizes,
    strides,
    sum_over_states,
    when,
    zero_steps,
)
from ._tiles import cast, first_of, segment_of_slot
from .selective_scan_backward import backward  # noqa: F401 - this module offers it

MAX_STATE = 256

# ------------------------------------------------------------------------------------------------- forward

# Arguments that follow from lengths or decide nothing: no kernel is compiled for what divides them, or for a 1.
_RUN_TIME = [
    "L", "S", "SEGMENT", "one", "u_b", "u_t", "delta_b", "delta_t", "z_b", "z_t", "B_b", "C_b", "A_d", "A_n", "entry_s",
    "entry_d", "entry_n", "final_d", "final_n",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUN_TIME)
def forward_kernel(
    u,  # [B, Di, L]
    delta,  # [B, Di, L]
    A,  # [Di, N]
    B,  # [B, G, N, L], n innermost; constant: [Di, N]
    C,  # as B
    D,  # [Di] or None
    z,  # [B, Di, L] or None
    delta_bias,  # [Di] or None
    y,  # [B, Di, L], channels innermost
    entry,  # [S, or slots of segments, Di, N]: the states that enter, or None
    final,  # [S, Di, N]
    states,  # [slots of checkpoints, N, Di] or None
    cu_seqlens,  # [S + 1] or None
    L, S,
    SEGMENT,  # steps of a segment
    one,  # 1, see own_states
    group_channels, groups,
    u_b, u_t, delta_b, delta_t, z_b, z_t,  # strides
    A_d, A_n, B_b, B_g, B_t, C_b, C_g, C_t, D_d, bias_d, entry_s, entry_d, entry_n, final_d, final_n,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, RUN: tl.constexpr,
    ALIGN: tl.constexpr,  # batch strides of B and C are multiples of this
    CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, SOFTPLUS: tl.constexpr,
    SPLIT: tl.constexpr,  # whether sequences are cut into segments
    CHECKPOINT: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if u.dtype.element_ty == tl.float64 else tl.float32
    slot, group, channel, live = place_of(tl.program_id(0), group_channels, groups, BD)
    Di = tl.cast(group_channels, tl.int64) * groups
    s, batch, start, length, segment = segment_of_slot(slot, cu_seqlens, S, L, SEGMENT, SPLIT)
    first = first_of_segment(segment, SEGMENT)
    last = tl.minimum(first + SEGMENT, length) if SPLIT else length
    if (segment < 0) | ((first >= length) & (segment > 0)):
        return

    u += batch * u_b + start * u_t + channel
    delta += batch * delta_b + start * delta_t + channel
    a = load_states(A, A_d, A_n, channel, live, N, BN, dtype) * LOG2_E
    skip = load_channels(D, D_d, channel, live, dtype)
    bias = load_channels(delta_bias, bias_d, channel, live, dtype)
    h = tl.zeros([BN, BD], dtype)
    if entry is not None:
        entry += (tl.cast(slot, tl.int64) if SPLIT else s) * entry_s
        h += load_states(entry, entry_d, entry_n, channel, live, N, BN, dtype)
    if cu_seqlens is not None:
        if (s == 0) & (segment == 0):
            zero_steps(y + channel, Di, 0, start, live)
        if (s == S - 1) & (last == length):
            zero_steps(y + channel, Di, start + length, L, live)
    y += (batch * L + start) * Di + channel
    if z is not None:
        z += batch * z_b + start * z_t + channel
    if CONSTANT_B:
        b = load_states(B, B_g, B_t, channel, live, N, BN, dtype)
    else:
        B += tl.multiple_of(batch * B_b, ALIGN) + group * B_g + start * B_t + tl.arange(0, BN)
    if CONSTANT_C:
        c = load_states(C, C_g, C_t, channel, live, N, BN, dtype)
    else:
        C += tl.multiple_of(batch * C_b, ALIGN) + group * C_g + start * C_t + tl.arange(0, BN)
    mask = (tl.arange(0, BN) < N)[:, None] & live[None, :]
    saved = first_of(cu_seqlens, s, start, L, CHECKPOINT)

    # The next run is on its way while this one is worked on.
    us = load_run(u, u_t, first, last, live, RUN)
    deltas = load_run(delta, delta_t, first, last, live, RUN)
    for t in range(first, last, RUN):
        if not CONSTANT_B:
            bs = load_projections(B, B_t, t, last, N, BN, RUN)
        if not CONSTANT_C:
            cs = load_projections(C, C_t, t, last, N, BN, RUN)
        if z is not None:
            zs = load_run(z, z_t, t, last, live, RUN)
        next_us = load_run(u, u_t, t + RUN, last, live, RUN)
        next_deltas = load_run(delta, delta_t, t + RUN, last, live, RUN)
        if states is not None:
            if t % CHECKPOINT == 0:
                tl.store(own_states(states, saved + t // CHECKPOINT, channel, one, Di, N, BN), h, mask=mask)
        for i in tl.static_range(RUN):
            size = step_sizes(deltas[i].to(dtype) + bias, SOFTPLUS)
            size = tl.where(t + i < last, size, 0)  # steps behind the end change nothing
            x = us[i].to(dtype)
            if not CONSTANT_B:
                b = bs[i].to(dtype)[:, None]
            if not CONSTANT_C:
                c = cs[i].to(dtype)[:, None]
            h = tl.exp2(size[None, :] * a) * h + (size * x)[None, :] * b
            out = sum_over_states(h * c) + skip * x
            if z is not None:
                gate = zs[i].to(dtype)
                out *= gate / (1 + tl.exp(-gate))
            place = y + tl.cast(t + i, tl.int64) * Di
            tl.store(place, cast(out, y.dtype.element_ty), mask=when(t + i < last, live))
        us = next_us
        deltas = next_deltas
    if last == length:
        place = channel[None, :] * final_d + tl.arange(0, BN).to(tl.int64)[:, None] * final_n
        tl.store(final + s * Di * N + place, h, mask=mask)


@triton.jit(do_not_specialize=[name for name in _RUN_TIME if name != "one"])
def segment_kernel(
    u,  # [B, Di, L]
    delta,  # [B, Di, L]
    A,  # [Di, N]
    B,  # [B, G, N, L], n innermost; constant: [Di, N]
    delta_bias,  # [Di] or None
    made,  # [slots of segments, N, Di]: what a segment makes from zero; written
    sums,  # [slots of segments, Di]: the sum of its step sizes; written
    cu_seqlens,  # [S + 1] or None
    L, S, SEGMENT, group_channels, groups,
    u_b, u_t, delta_b, delta_t, A_d, A_n, B_b, B_g, B_t, bias_d,  # strides
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr,
    CONSTANT_B: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """What each segment does to the state that enters it."""
    dtype: tl.constexpr = made.dtype.element_ty
    slot, group, channel, live = place_of(tl.program_id(0), group_channels, groups, BD)
    Di = tl.cast(group_channels, tl.int64) * groups
    _, batch, start, length, segment = segment_of_slot(slot, cu_seqlens, S, L, SEGMENT, True)
    first = first_of_segment(segment, SEGMENT)
    last = tl.minimum(first + SEGMENT, length)
    if (segment < 0) | ((first >= length) & (segment > 0)):
        return
    u += batch * u_b + start * u_t + channel
    delta += batch * delta_b + start * delta_t + channel
    a = load_states(A, A_d, A_n, channel, live, N, BN, dtype) * LOG2_E
    bias = load_channels(delta_bias, bias_d, channel, live, dtype)
    if CONSTANT_B:
        b = load_states(B, B_g, B_t, channel, live, N, BN, dtype)
    else:
        B += tl.multiple_of(batch * B_b, ALIGN) + group * B_g + start * B_t + tl.arange(0, BN)
    h = tl.zeros([BN, BD], dtype)
    total = tl.zeros([BD], dtype)
    us = load_run(u, u_t, first, last, live, RUN)
    deltas = load_run(delta, delta_t, first, last, live, RUN)
    for t in range(first, last, RUN):
        if not CONSTANT_B:
            bs = load_projections(B, B_t, t, last, N, BN, RUN)
        next_us = load_run(u, u_t, t + RUN, last, live, RUN)
        next_deltas = load_run(delta, delta_t, t + RUN, last, live, RUN)
        for i in tl.static_range(RUN):
            size = step_sizes(deltas[i].to(dtype) + bias, SOFTPLUS)
            size = tl.where(t + i < last, size, 0)
            if not CONSTANT_B:
                b = bs[i].to(dtype)[:, None]
            h = tl.exp2(size[None, :] * a) * h + (size * us[i].to(dtype))[None, :] * b
            total += size
        us = next_us
        deltas = next_deltas
    mask = (tl.arange(0, BN) < N)[:, None] & live[None, :]
    tl.store(own_states(made, slot, channel, 1, Di, N, BN), h, mask=mask)
    tl.store(sums + tl.cast(slot, tl.int64) * Di + channel, total, mask=live)


# ---------------------------------------------------------------------------------------------------- step


@triton.jit(do_not_specialize=["u_b", "delta_b", "z_b", "B_b", "C_b", "slots"])
def step_kernel(
    u,  # [B, Di]
    delta,  # [B, Di]
    A,  # [Di, N]
    B,  # [B, G, N]
    C,  # [B, G, N]
    D,  # [Di] or None
    z,  # [B, Di] or None
    delta_bias,  # [Di] or None
    y,  # [B, Di], contiguous
    state,  # [slots, Di, N], written in place
    state_indices,  # [B] or None
    slots, group_channels, groups,
    u_b, u_d, delta_b, delta_d, z_b, z_d,  # strides
    A_d, A_n, B_b, B_g, B_n, C_b, C_g, C_n, D_d, bias_d, state_s, state_d, state_n, indices_b,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if u.dtype.element_ty == tl.float64 else tl.float32
    row, group, channel, live = place_of(tl.program_id(0), group_channels, groups, BD)
    row = row.to(tl.int64)
    n = tl.arange(0, BN).to(tl.int64)
    slot = row
    if state_indices is not None:
        slot = tl.load(state_indices + row * indices_b).to(tl.int64)
    y += row * (tl.cast(group_channels, tl.int64) * groups) + channel
    if (slot < 0) | (slot >= slots):
        tl.store(y, tl.zeros([BD], y.dtype.element_ty), mask=live)
        return
    x = tl.load(u + row * u_b + channel * u_d, mask=live, other=0).to(dtype)
    bias = load_channels(delta_bias, bias_d, channel, live, dtype)
    size = step_sizes(tl.load(delta + row * delta_b + channel * delta_d, mask=live, other=0).to(dtype) + bias, SOFTPLUS)
    mask = live[:, None] & (n < N)[None, :]
    a = tl.load(A + channel[:, None] * A_d + n[None, :] * A_n, mask=mask, other=0).to(dtype) * LOG2_E
    b = tl.load(B + row * B_b + group * B_g + n * B_n, mask=n < N, other=0).to(dtype)
    c = tl.load(C + row * C_b + group * C_g + n * C_n, mask=n < N, other=0).to(dtype)
    state += slot * state_s + channel[:, None] * state_d + n[None, :] * state_n
    h = tl.load(state, mask=mask, other=0).to(dtype)
    h = tl.exp2(size[:, None] * a) * h + (size * x)[:, None] * b[None, :]
    out = tl.sum(h * c[None, :], 1) + load_channels(D, D_d, channel, live, dtype) * x
    if z is not None:
        gate = tl.load(z + row * z_b + channel * z_d, mask=live, other=0).to(dtype)
        out *= gate / (1 + tl.exp(-gate))
    tl.store(state, cast(h, state.dtype.element_ty), mask=mask)
    tl.store(y, cast(out, y.dtype.element_ty), mask=live)


# -------------------------------------------------------------------------------------------- launchers


def why_not(device: str, dtype: torch.dtype, *sizes: int) -> str | None:
    """The reason why this backend cannot run states of these sizes, or None."""
    missing = _why_not_here(device)
    if missing is None and any(s > MAX_STATE for s in sizes):
        return f"state sizes go up to {MAX_STATE}, got {max(sizes)}"
    return missing


def _results(
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, *, delta_softplus, save_states
):  # fmt: skip
    """What `forward` returns, not written."""
    batch, Di, L = u.shape
    N = A.shape[1]
    S = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    compute = torch.promote_types(u.dtype, torch.float32)
    final = torch.empty(S, Di, N, dtype=compute, device=u.device)
    saved = (chunk_slots(batch, L, cu_seqlens, SCAN_CHECKPOINT), N, Di) if save_states else (0,)
    return empty_channels_last(u), final, torch.empty(saved, dtype=compute, device=u.device)


@operator(
    "selective_scan_forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, *, bool delta_softplus, bool save_states) "
    "-> Tensor[]",
    _results,
)
def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, *, delta_softplus, save_states):
    """(y, final_state, states): `states` enter every CHECKPOINT-th step, for `backward`; empty unless asked for."""
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    y, final, states = _results(*inputs, delta_softplus=delta_softplus, save_states=save_states)
    batch, Di, L = u.shape
    N, S = A.shape[1], final.shape[0]
    if S == 0 or Di == 0:
        return y.zero_(), final, states
    u, delta, z, B, C = channels_last(u), channels_last(delta), channels_last(z), projection(B), projection(C)
    groups = next((w.shape[1] for w in (B, C) if w.dim() == 4), 1)
    config = selective_scan_config("forward", N, (B.dim() == 2) + (C.dim() == 2), arch())
    options = scan_constants(config, N, B, C, delta_softplus)
    blocks = groups * cdiv(Di // groups, config.BD)
    segment = segment_steps(S * blocks, config.num_warps, S, u)
    slots = segment_slots(batch, L, cu_seqlens, segment)
    lengths = (cu_seqlens, L, S, segment or L)
    with on_device(u):
        entry = initial_state
        if segment:
            made, entry = (torch.empty(slots, N, Di, dtype=final.dtype, device=u.device) for _ in range(2))
            sums = torch.empty(slots, Di, dtype=final.dtype, device=u.device)
            args = (
                u, delta, A, B, delta_bias, made, sums, *lengths, Di // groups, groups, *strides(u, 0, 2),
                *strides(delta, 0, 2), *A.stride(), *projection_strides(B), *strides(delta_bias, 0),
            )  # fmt: skip
            constants = {name: value for name, value in options.items() if name != "CONSTANT_C"}
            launch(segment_kernel, (slots * blocks,), args, constexprs(**constants, **config.options))
            chain(made, sums, A, initial_state, entry, lengths, config, reverse=False)
            entry = entry.transpose(1, 2)
        args = (
            u, delta, A, B, C, D, z, delta_bias, y, entry, final, states if save_states else None, *lengths, 1,
            Di // groups, groups, *strides(u, 0, 2), *strides(delta, 0, 2), *strides(z, 0, 2), *A.stride(),
            *projection_strides(B), *projection_strides(C), *strides(D, 0), *strides(delta_bias, 0),
            *strides(entry, 0, 1, 2), *final.stride()[1:],
        )  # fmt: skip
        constants = constexprs(**options, SPLIT=segment is not None, CHECKPOINT=SCAN_CHECKPOINT, **config.options)
        launch(forward_kernel, (slots * blocks,), args, constants)
    return y, final, states


@operator(
    "selective_scan_step(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, *, Tensor(a!) state, "
    "Tensor? z, Tensor? delta_bias, bool delta_softplus, Tensor? state_indices) -> Tensor",
    lambda u, *_, **__: u.new_empty(u.shape),
)
def step(u, delta, A, B, C, D, *, state, z, delta_bias, delta_softplus, state_indices):
    """y; `state` is written in place."""
    batch, Di = u.shape
    N, groups = A.shape[1], B.shape[1]
    y = u.new_empty(batch, Di)
    if y.numel() == 0:
        return y
    config = selective_scan_step_config(N, Di // groups, arch())
    with on_device(u):
        args = (
            u, delta, A, B, C, D, z, delta_bias, y, state, state_indices, state.shape[0], Di // groups, groups,
            *u.stride(), *delta.stride(), *strides(z, 0, 1), *A.stride(), *B.stride(), *C.stride(), *strides(D, 0),
            *strides(delta_bias, 0), *state.stride(), *strides(state_indices, 0),
        )  # fmt: skip
        constants = constexprs(N=N, BN=power_of_two(N), BD=config.BD, SOFTPLUS=delta_softplus, **config.options)
        launch(step_kernel, (batch * groups * cdiv(Di // groups, config.BD),), args, constants)
    return y
