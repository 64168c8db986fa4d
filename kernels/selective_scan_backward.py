# SPDX-License-Identifier: Apache-2.0
"""Gradients of the selective scan on GPUs.

With a_t = exp(step_t A), x_t = step_t u_t and g_t the gradient of C_t . h_t + D u_t, per channel, from the end:

    G_t = a_{t+1} G_{t+1} + g_t C_t                      dC_t = sum over channels of g_t h_t
    dB_t = sum over channels of x_t G_t                  dA += step_t E_t,   E_t = G_t a_t h_{t-1}
    du_t = step_t (G_t . B_t) + D g_t                    dstep_t = u_t (G_t . B_t) + A . E_t

A program owns BD channels of a sequence, as in the forward pass, and walks it from its end, a block of CHECKPOINT steps
at a time: from the state that the forward pass saved it finds the states before each run of RUN steps and leaves them
in its scratch memory; then, from the last run to the first, it computes the run's states again and keeps them, with
their decays, in registers. Nothing is divided by a decay.

Where a saved state is read, neighbouring channels lie side by side: Triton gives a thread four of them and spreads
n over four lanes. Sums over n cost some shuffles that way, and sums over channels, two for each n, are far cheaper.

Sums over channels are left as one part a program, which are added in a fixed order afterwards; so are the sums over
sequences and segments for A, D and delta_bias. There are no atomics.
"""

import torch
import triton
import triton.language as tl

from ._config import SCAN_CHECKPOINT, selective_scan_config
from ._launch import arch, cdiv, constexprs, launch, on_device
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

LN_2 = tl.constexpr(0.6931471805599453)

# As in the forward pass.
_RUN_TIME = [
    "L", "S", "SEGMENT", "u_b", "u_t", "delta_b", "delta_t", "z_b", "z_t", "dy_b", "dy_t", "B_b", "C_b", "A_d", "A_n",
    "exit_s", "exit_d", "exit_n", "dinitial_d", "dinitial_n", "sums_s",
]  # fmt: skip


@triton.jit
def _gated(dy, z, dtype: tl.constexpr):
    """(g, gate, sigmoid(gate)): the gradient before the gate, silu(z); without a gate the last two are ones."""
    g = dy.to(dtype)
    if z is None:
        gate = g * 0 + 1
        sigmoid = gate
    else:  # a compiler goes on behind a branch that returns
        gate = z.to(dtype)
        sigmoid = 1 / (1 + tl.exp(-gate))
        g = g * gate * sigmoid
    return g, gate, sigmoid


@triton.jit
def _add(total, lost, x):
    """(total + x, what rounding has lost): Kahan's sum, for one number a channel over all steps."""
    y = x - lost
    more = total + y
    return more, (more - total) - y


@triton.jit
def _as_read_from(memory, x):
    """x in the layout in which Triton reads this memory: in another one it would compute every decay twice, once for
    the states and once for their gradient."""
    tl.store(memory, x)
    tl.debug_barrier()
    x = tl.load(memory)
    tl.debug_barrier()
    return x


@triton.jit(do_not_specialize=_RUN_TIME)
def reverse_kernel(
    delta,  # [B, Di, L]
    A,  # [Di, N]
    C,  # [B, G, N, L], n innermost; constant: [Di, N]
    z,  # [B, Di, L] or None
    delta_bias,  # [Di] or None
    dy,  # [B, Di, L]
    made,  # [slots of segments, N, Di]: the gradient of the state that enters, from zero at the end; written
    sums,  # [slots of segments, Di]: the sum of a segment's step sizes; written
    cu_seqlens,  # [S + 1] or None
    L, S, SEGMENT, group_channels, groups,
    delta_b, delta_t, z_b, z_t, dy_b, dy_t, A_d, A_n, C_b, C_g, C_t, bias_d,  # strides
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr,
    CONSTANT_C: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """What each segment does to the gradient of the state at its end."""
    dtype: tl.constexpr = tl.float64 if dy.dtype.element_ty == tl.float64 else tl.float32
    slot, group, channel, live = place_of(tl.program_id(0), group_channels, groups, BD)
    _, batch, start, length, segment = segment_of_slot(slot, cu_seqlens, S, L, SEGMENT, True)
    first = first_of_segment(segment, SEGMENT)
    last = tl.minimum(first + SEGMENT, length)
    if (segment < 0) | ((first >= length) & (segment > 0)):
        return
    delta += batch * delta_b + start * delta_t + channel
    dy += batch * dy_b + start * dy_t + channel
    if z is not None:
        z += batch * z_b + start * z_t + channel
    a = load_states(A, A_d, A_n, channel, live, N, BN, dtype) * LOG2_E
    bias = load_channels(delta_bias, bias_d, channel, live, dtype)
    if CONSTANT_C:
        c = load_states(C, C_g, C_t, channel, live, N, BN, dtype)
    else:
        C += tl.multiple_of(batch * C_b, ALIGN) + group * C_g + start * C_t + tl.arange(0, BN)
    G = tl.zeros([BN, BD], dtype)
    total = tl.zeros([BD], dtype)
    runs = tl.cdiv(last - first, RUN)
    for r in range(0, runs):
        t = first + (runs - 1 - r) * RUN
        deltas = load_run(delta, delta_t, t, last, live, RUN)
        dys = load_run(dy, dy_t, t, last, live, RUN)
        if z is not None:
            zs = load_run(z, z_t, t, last, live, RUN)
        if not CONSTANT_C:
            cs = load_projections(C, C_t, t, last, N, BN, RUN)
        for i in tl.static_range(RUN - 1, -1, -1):
            size = step_sizes(deltas[i].to(dtype) + bias, SOFTPLUS)
            size = tl.where(t + i < last, size, 0)
            if z is not None:
                g, gate, sigmoid = _gated(dys[i], zs[i], dtype)
            else:
                g, gate, sigmoid = _gated(dys[i], None, dtype)
            if not CONSTANT_C:
                c = cs[i].to(dtype)[:, None]
            G = (G + g[None, :] * c) * tl.exp2(size[None, :] * a)
            total += size
    mask = (tl.arange(0, BN) < N)[:, None] & live[None, :]
    Di = tl.cast(group_channels, tl.int64) * groups
    tl.store(own_states(made, slot, channel, 1, Di, N, BN), G, mask=mask)
    tl.store(sums + tl.cast(slot, tl.int64) * Di + channel, total, mask=live)


@triton.jit(do_not_specialize=_RUN_TIME)
def gradients_kernel(
    u,  # [B, Di, L]
    delta,  # [B, Di, L]
    A,  # [Di, N]
    B,  # [B, G, N, L], n innermost; constant: [Di, N]
    C,  # as B
    D,  # [Di] or None
    z,  # [B, Di, L] or None
    delta_bias,  # [Di] or None
    states,  # [slots of checkpoints, N, Di]: the states that enter every CHECKPOINT-th step
    dy,  # [B, Di, L]
    exit,  # [S, or slots of segments, Di, N]: the gradients of the states at the ends, or None
    scratch,  # [programs, CHECKPOINT / RUN, BN, BD]
    du,  # [B, Di, L], channels innermost
    ddelta,  # as du
    dz,  # as du, or None
    dB,  # [B, G, blocks, L, N], a part for each block of channels; None if not needed; constant: [slots, N, Di]
    dC,  # as dB
    dA,  # [slots, N, Di] or None
    dD,  # [slots, Di] or None
    ddelta_bias,  # [slots, Di] or None
    dinitial,  # [S, Di, N] or None
    cu_seqlens,  # [S + 1] or None
    L, S,
    SEGMENT,  # steps of a segment
    group_channels, groups,
    u_b, u_t, delta_b, delta_t, z_b, z_t, dy_b, dy_t,  # strides
    A_d, A_n, B_b, B_g, B_t, C_b, C_g, C_t, D_d, bias_d, exit_s, exit_d, exit_n, dinitial_d, dinitial_n,
    sums_s,  # stride of the slots of dA, dD, ddelta_bias and of the constants' parts
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr,
    CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, SOFTPLUS: tl.constexpr, SPLIT: tl.constexpr,
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

    n = tl.arange(0, BN)
    mask = (n < N)[:, None] & live[None, :]
    blocks = tl.cdiv(group_channels, BD)
    part = ((batch * groups + group) * blocks + tl.program_id(0) % blocks) * L
    if not CONSTANT_B:
        B += tl.multiple_of(batch * B_b, ALIGN) + group * B_g + start * B_t + n
        if dB is not None:
            dB += part * N + n
    if not CONSTANT_C:
        C += tl.multiple_of(batch * C_b, ALIGN) + group * C_g + start * C_t + n
        if dC is not None:
            dC += part * N + n
    du += batch * L * Di + channel
    ddelta += batch * L * Di + channel
    if z is not None:
        z += batch * z_b + start * z_t + channel
        dz += batch * L * Di + channel
    if cu_seqlens is not None:
        for side in tl.static_range(2):  # before the first sequence, behind the last
            low = start * 0 if side == 0 else start + length
            high = start if side == 0 else start * 0 + L
            here = (s == 0) & (segment == 0) if side == 0 else (s == S - 1) & (last == length)
            if here:
                zero_steps(du, Di, low, high, live)
                zero_steps(ddelta, Di, low, high, live)
                if z is not None:
                    zero_steps(dz, Di, low, high, live)
                if not CONSTANT_B:
                    if dB is not None:
                        zero_steps(dB, N, low, high, n < N)
                if not CONSTANT_C:
                    if dC is not None:
                        zero_steps(dC, N, low, high, n < N)
    u += batch * u_b + start * u_t + channel
    delta += batch * delta_b + start * delta_t + channel
    dy += batch * dy_b + start * dy_t + channel
    RUNS: tl.constexpr = CHECKPOINT // RUN
    scratch += tl.program_id(0).to(tl.int64) * (RUNS * BN * BD) + n[:, None] * BD + tl.arange(0, BD)[None, :]
    a = _as_read_from(scratch, load_states(A, A_d, A_n, channel, live, N, BN, dtype) * LOG2_E)
    skip = load_channels(D, D_d, channel, live, dtype)
    bias = load_channels(delta_bias, bias_d, channel, live, dtype)
    G = tl.zeros([BN, BD], dtype)
    if exit is not None:
        exit += (tl.cast(slot, tl.int64) if SPLIT else s) * exit_s
        G = _as_read_from(scratch, load_states(exit, exit_d, exit_n, channel, live, N, BN, dtype))
    if CONSTANT_B:
        b = load_states(B, B_g, B_t, channel, live, N, BN, dtype)
        sum_B = tl.zeros([BN, BD], dtype)
    if CONSTANT_C:
        c = load_states(C, C_g, C_t, channel, live, N, BN, dtype)
        sum_C = tl.zeros([BN, BD], dtype)
    sum_A = tl.zeros([BN, BD], dtype)
    sum_D, lost_D = tl.zeros([BD], dtype), tl.zeros([BD], dtype)
    sum_bias, lost_bias = tl.zeros([BD], dtype), tl.zeros([BD], dtype)
    saved = first_of(cu_seqlens, s, start, L, CHECKPOINT)

    checkpoints = tl.cdiv(last - first, CHECKPOINT)
    for j in range(0, checkpoints):
        begin = first + (checkpoints - 1 - j) * CHECKPOINT
        runs = tl.cdiv(tl.minimum(CHECKPOINT, last - begin), RUN)
        h = tl.load(own_states(states, saved + begin // CHECKPOINT, channel, 1, Di, N, BN), mask=mask, other=0)
        # The states before each run.
        tl.store(scratch, h)
        for r in range(0, runs - 1):
            t = begin + r * RUN
            us = load_run(u, u_t, t, last, live, RUN)
            deltas = load_run(delta, delta_t, t, last, live, RUN)
            if not CONSTANT_B:
                bs = load_projections(B, B_t, t, last, N, BN, RUN)
            for i in tl.static_range(RUN):  # none of these steps is behind the end
                size = step_sizes(deltas[i].to(dtype) + bias, SOFTPLUS)
                if not CONSTANT_B:
                    b = bs[i].to(dtype)[:, None]
                h = tl.exp2(size[None, :] * a) * h + (size * us[i].to(dtype))[None, :] * b
            tl.store(scratch + tl.cast(r + 1, tl.int64) * (BN * BD), h)
        tl.debug_barrier()

        for r in range(0, runs):
            run = runs - 1 - r
            t = begin + run * RUN
            us = load_run(u, u_t, t, last, live, RUN)
            deltas = load_run(delta, delta_t, t, last, live, RUN)
            dys = load_run(dy, dy_t, t, last, live, RUN)
            if z is not None:
                zs = load_run(z, z_t, t, last, live, RUN)
            h = tl.load(scratch + tl.cast(run, tl.int64) * (BN * BD))
            sizes, kept = (), ()  # kept: the state before each step, and its decay
            for i in tl.static_range(RUN):
                size = step_sizes(deltas[i].to(dtype) + bias, SOFTPLUS)
                size = tl.where(t + i < last, size, 0)
                if not CONSTANT_B:
                    b = load_projections(B, B_t, t + i, last, N, BN, 1)[0].to(dtype)[:, None]
                decay = tl.exp2(size[None, :] * a)
                sizes = sizes + (size,)
                kept = kept + (h, decay)
                if i < RUN - 1:
                    h = decay * h + (size * us[i].to(dtype))[None, :] * b

            for i in tl.static_range(RUN - 1, -1, -1):
                inside = t + i < last
                place = start + t + i
                x = us[i].to(dtype)
                written = sizes[i] * x
                # Read again: they are in the first cache, and registers are short.
                if not CONSTANT_B:
                    b = load_projections(B, B_t, t + i, last, N, BN, 1)[0].to(dtype)[:, None]
                if not CONSTANT_C:
                    c = load_projections(C, C_t, t + i, last, N, BN, 1)[0].to(dtype)[:, None]
                decayed = kept[2 * i + 1] * kept[2 * i]
                h = decayed + written[None, :] * b
                if z is not None:
                    g, gate, sigmoid = _gated(dys[i], zs[i], dtype)
                    core = sum_over_states(h * c) + skip * x
                    slope = sigmoid * (1 + gate * (1 - sigmoid))
                    dgate = dys[i].to(dtype) * core * slope
                    tl.store(dz + place * Di, cast(dgate, dz.dtype.element_ty), mask=when(inside, live))
                else:
                    g, gate, sigmoid = _gated(dys[i], None, dtype)
                sum_D, lost_D = _add(sum_D, lost_D, g * x)
                if CONSTANT_C:
                    sum_C += g[None, :] * h
                elif dC is not None:
                    # Lanes beyond the last channel hold zeros: g is.
                    tl.store(dC + place * N, tl.sum(g[None, :] * h, 1), mask=when(inside, n < N))
                G += g[None, :] * c
                if CONSTANT_B:
                    sum_B += written[None, :] * G
                elif dB is not None:
                    tl.store(dB + place * N, tl.sum(written[None, :] * G, 1), mask=when(inside, n < N))
                along = sum_over_states(G * b)
                E = G * decayed
                sum_A += sizes[i][None, :] * E
                tl.store(
                    du + place * Di, cast(sizes[i] * along + skip * g, du.dtype.element_ty), mask=when(inside, live)
                )
                dsize = x * along + sum_over_states(a * E) * LN_2
                if SOFTPLUS:
                    dsize *= 1 / (1 + tl.exp(-(deltas[i].to(dtype) + bias)))
                dsize = tl.where(inside, dsize, 0)
                sum_bias, lost_bias = _add(sum_bias, lost_bias, dsize)
                tl.store(ddelta + place * Di, cast(dsize, ddelta.dtype.element_ty), mask=when(inside, live))
                G *= kept[2 * i + 1]
        tl.debug_barrier()

    row = tl.cast(slot, tl.int64) * sums_s
    own = n.to(tl.int64)[:, None] * Di + channel[None, :]
    if dA is not None:
        tl.store(dA + row + own, sum_A, mask=mask)
    if CONSTANT_B:
        if dB is not None:
            tl.store(dB + row + own, sum_B, mask=mask)
    if CONSTANT_C:
        if dC is not None:
            tl.store(dC + row + own, sum_C, mask=mask)
    if dD is not None:
        tl.store(dD + row + channel, sum_D, mask=live)
    if ddelta_bias is not None:
        tl.store(ddelta_bias + row + channel, sum_bias, mask=live)
    if dinitial is not None:
        if segment == 0:
            where = channel[None, :] * dinitial_d + n.to(tl.int64)[:, None] * dinitial_n
            tl.store(dinitial + s * Di * N + where, G, mask=mask)


# --------------------------------------------------------------------------------------------- launcher


def _gradients(u, delta, A, B, C, D, z, delta_bias, initial_state, *_, needs, **__):
    """What `backward` returns, not written: the strides too, which torch.compile relies on."""

    def like(x):
        if x.dim() == 2:  # A, and constants: sums [N, Di]
            return x.new_empty(x.shape[1], x.shape[0]).t()
        if x.dim() == 4:
            return x.new_empty(*x.shape[:2], x.shape[3], x.shape[2]).transpose(2, 3)
        return x.new_empty(x.shape)

    rows, sums = (u, delta, z), (A, B, C, D, delta_bias, initial_state)
    du, ddelta, dz = (None if x is None else empty_channels_last(x) for x in rows)
    dA, dB, dC, dD, dbias, dinitial = (None if x is None else like(x) for x in sums)
    grads = (du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial)
    return [g if need else None for g, need in zip(grads, needs, strict=True)]


@operator(
    "selective_scan_backward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, Tensor states, Tensor dy, Tensor? dfinal_state, *, "
    "bool delta_softplus, bool[9] needs) -> Tensor[]",
    _gradients,
)
def backward(
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, states, dy, dfinal_state, *, delta_softplus, needs
):  # fmt: skip
    """Gradients of the nine tensors before `cu_seqlens`, None where `needs` is False."""
    dtypes = [None if x is None else x.dtype for x in (u, delta, A, B, C, D, z, delta_bias, initial_state)]
    batch, Di, L = u.shape
    N = A.shape[1]
    S = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if S == 0 or Di == 0:
        grads = _gradients(u, delta, A, B, C, D, z, delta_bias, initial_state, needs=needs)
        return [g if g is None else g.zero_() for g in grads]
    u, delta, z, dy = channels_last(u), channels_last(delta), channels_last(z), channels_last(dy)
    B, C = projection(B), projection(C)
    groups = next((w.shape[1] for w in (B, C) if w.dim() == 4), 1)
    config = selective_scan_config("backward", N, (B.dim() == 2) + (C.dim() == 2), arch())
    options = scan_constants(config, N, B, C, delta_softplus)
    BD, RUN = config.BD, config.BT
    per_group = cdiv(Di // groups, BD)
    blocks = groups * per_group
    segment = segment_steps(S * blocks, config.num_warps, S, u)
    slots = segment_slots(batch, L, cu_seqlens, segment)
    lengths = (cu_seqlens, L, S, segment or L)

    compute = states.dtype
    new = {"dtype": compute, "device": u.device}
    du, ddelta = empty_channels_last(u), empty_channels_last(u)
    dz = None if z is None else empty_channels_last(u)
    parts = [None, None]
    for i, w in enumerate((B, C)):
        if w.dim() == 4 and needs[3 + i]:
            parts[i] = torch.empty(batch, groups, per_group, L, N, **new)
    # The sums over all steps, a row of `sums` for each slot: (name, how many values a channel).
    wanted = [("A", N)] * needs[2] + [("B", N)] * (needs[3] and B.dim() == 2) + [("C", N)] * (needs[4] and C.dim() == 2)
    wanted += [("D", 1)] * (D is not None and needs[5]) + [("bias", 1)] * (delta_bias is not None and needs[7])
    ends, size = {}, 0
    for name, count in wanted:
        ends[name] = slice(size, size + count)
        size += count
    # Slots that no segment takes are not written.
    sums = (torch.zeros if segment else torch.empty)(slots, size, Di, **new)
    views = {name: sums[:, end] for name, end in ends.items()}
    dinitial = torch.empty(S, Di, N, **new) if initial_state is not None and needs[8] else None

    with on_device(u):
        exit = dfinal_state
        if segment:
            made, exit = torch.empty(slots, N, Di, **new), torch.empty(slots, N, Di, **new)
            totals = torch.empty(slots, Di, **new)
            args = (
                delta, A, C, z, delta_bias, dy, made, totals, *lengths, Di // groups, groups, *strides(delta, 0, 2),
                *strides(z, 0, 2), *strides(dy, 0, 2), *A.stride(), *projection_strides(C), *strides(delta_bias, 0),
            )  # fmt: skip
            constants = {name: value for name, value in options.items() if name != "CONSTANT_B"}
            launch(reverse_kernel, (slots * blocks,), args, constexprs(**constants, **config.options))
            chain(made, totals, A, dfinal_state, exit, lengths, config, reverse=True)
            exit = exit.transpose(1, 2)
        scratch = torch.empty(slots * blocks, SCAN_CHECKPOINT // RUN, power_of_two(N), BD, **new)
        args = (
            u, delta, A, B, C, D, z, delta_bias, states, dy, exit, scratch, du, ddelta, dz,
            parts[0] if B.dim() == 4 else views.get("B"), parts[1] if C.dim() == 4 else views.get("C"),
            views.get("A"), views.get("D"), views.get("bias"), dinitial, *lengths, Di // groups, groups,
            *strides(u, 0, 2), *strides(delta, 0, 2), *strides(z, 0, 2), *strides(dy, 0, 2), *A.stride(),
            *projection_strides(B), *projection_strides(C), *strides(D, 0), *strides(delta_bias, 0),
            *strides(exit, 0, 1, 2), *strides(dinitial, 1, 2), sums.stride(0),
        )  # fmt: skip
        constants = constexprs(**options, SPLIT=segment is not None, CHECKPOINT=SCAN_CHECKPOINT, **config.options)
        launch(gradients_kernel, (slots * blocks,), args, constants)

    totals = sums.sum(0)
    found = {name: totals[end] for name, end in ends.items()}
    grads = [du, ddelta, *(found[x].t() if x in found else None for x in "ABC")]
    for i, part in enumerate(parts):
        if part is not None:
            grads[3 + i] = part.sum(2).transpose(2, 3)
    grads += [found["D"][0] if "D" in found else None, dz, found["bias"][0] if "bias" in found else None, dinitial]
    return [None if g is None or not need else g.to(dtype) for g, dtype, need in zip(grads, dtypes, needs, strict=True)]
