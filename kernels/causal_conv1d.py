# SPDX-License-Identifier: Apache-2.0
"""The short causal depthwise convolution (arXiv 2312.00752, section 3.4) on GPUs.

    z_t = bias + sum_{s=0}^{W-1} weight_{W-1-s} x_{t-s},      y_t = z_t or silu(z_t)
    dx_p = sum_{s=0}^{W-1} weight_{W-1-s} dz_{p+s}            (z is computed again from x; nothing else is saved)

per channel; x before a sequence is its initial state, oldest first, or zero. Products and sums are float32 (float64
for float64).

A tile is BT tokens x BD channels. Each lane of it holds RUN tokens behind one another as RUN separate registers
("columns" below), so that a shift in time is a choice of registers: it reads its RUN tokens and the W-1 before them,
and nothing W times. Channel-last memory: neighbouring lanes are neighbouring channels, a load is one token of them.
Channel-first memory: neighbouring lanes are neighbouring runs, a load is a whole run (VECTORS; where rows do not begin
at multiples of a run, one token at a time). That is the way of tiles that reach neither another sequence nor a state;
the others ("mixed") walk through their runs in a loop that finds each token's sequence and its distance from both ends.

Each launch has further programs behind those of the tiles, one a sequence and block of channels, for what belongs to
the states: the final state in the forward pass, the initial state's gradient in the backward pass. The parameters'
gradients are partial sums, one a program, that a second launch adds in a fixed order.
"""

import torch
import triton
import triton.language as tl

from . import _config
from ._launch import arch, cdiv, constexprs, launch, multiprocessors, on_device
from ._launch import why_not as _why_not_here
from ._operators import operator
from ._tiles import cast, sequence_bounds

RUN = 8  # tokens of a lane that loads them one at a time
VECTOR_BYTES = 16  # of a lane that loads its run at once
STATE_CHANNELS = 128  # channels of a program that works on states
MAX_STEPS = 16  # tiles of one program of the backward pass
FILL = 16  # programs a multiprocessor that the backward pass keeps before it gives them several tiles

# Arguments that follow from the length of the sequences: no kernel is compiled for what divides them.
SIZES = ("N", "L", "tiles", "time_blocks", "channel_blocks")
OUTER_STRIDES = tuple(f"{x}_stride_{axis}" for x in ("x", "y", "dy", "dx") for axis in ("b", "slow"))

# ------------------------------------------------------------------------------------------- runs of tokens


@triton.jit
def _split_run(x, RUN: tl.constexpr):
    """[A, B, RUN] -> RUN tensors [A, B]. A lane has its run to itself: nothing moves."""
    A: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1]
    parts = (x,)
    for level in tl.static_range(3):
        if RUN >> level > 1:
            halves = ()
            for i in tl.static_range(1 << level):
                pair = tl.permute(tl.reshape(parts[i], [A, B, 2, RUN >> (level + 1)]), [0, 1, 3, 2])
                halves = halves + tl.split(pair)
            parts = halves
    columns = ()
    for i in tl.static_range(RUN):
        columns = columns + (tl.reshape(parts[i], [A, B]),)
    return columns


@triton.jit
def _join_run(columns, RUN: tl.constexpr):
    """The inverse of _split_run."""
    A: tl.constexpr = columns[0].shape[0]
    B: tl.constexpr = columns[0].shape[1]
    parts = ()
    for i in tl.static_range(RUN):
        parts = parts + (tl.reshape(columns[i], [A, B, 1]),)
    for level in tl.static_range(3):
        if 1 << level < RUN:
            pairs = ()
            for i in tl.static_range(RUN >> (level + 1)):
                pair = tl.permute(tl.join(parts[2 * i], parts[2 * i + 1]), [0, 1, 3, 2])
                pairs = pairs + (tl.reshape(pair, [A, B, 2 << level]),)
            parts = pairs
    return parts[0]


@triton.jit
def _load_run(
    at, stride_t, time, live, before, after, FIRST: tl.constexpr, COUNT: tl.constexpr, RUN: tl.constexpr,
    VECTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The columns of tokens time+FIRST .. time+FIRST+COUNT-1; `at` points at token `time` of the tile.

    MASKED: 0 for tokens outside of [-before, after) of the tile; VECTORS: a whole run is inside or outside.
    """
    dtype: tl.constexpr = tl.float64 if at.dtype.element_ty == tl.float64 else tl.float32
    columns = ()
    if VECTORS:
        FIRST_RUN: tl.constexpr = FIRST // RUN
        SKIP: tl.constexpr = FIRST - FIRST_RUN * RUN
        runs = ()
        for r in tl.static_range((SKIP + COUNT + RUN - 1) // RUN):
            ahead = (FIRST_RUN + r) * RUN
            mask = live
            if MASKED:
                mask = mask & (time + ahead >= -before) & (time + ahead < after)
            run_at = at[:, :, None] + (ahead + tl.arange(0, RUN))[None, None, :] * stride_t
            runs = runs + _split_run(tl.load(run_at, mask=mask[:, :, None], other=0).to(dtype), RUN)
        for i in tl.static_range(COUNT):
            columns = columns + (runs[SKIP + i],)
    else:
        at += FIRST * stride_t
        for i in tl.static_range(COUNT):
            mask = live
            if MASKED:
                mask = mask & (time + (FIRST + i) >= -before) & (time + (FIRST + i) < after)
            columns = columns + (tl.load(at, mask=mask, other=0).to(dtype),)
            at += stride_t  # step by step: a product for each token would wait in a register
    return columns


@triton.jit
def _store_run(
    at, stride_t, columns, time, live, after, RUN: tl.constexpr, VECTORS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    dtype: tl.constexpr = at.dtype.element_ty
    if VECTORS:
        mask = live
        if MASKED:
            mask = mask & (time < after)
        run_at = at[:, :, None] + tl.arange(0, RUN)[None, None, :] * stride_t
        tl.store(run_at, cast(_join_run(columns, RUN), dtype), mask=mask[:, :, None])
    else:
        for i in tl.static_range(RUN):
            mask = live
            if MASKED:
                mask = mask & (time + i < after)
            tl.store(at, cast(columns[i], dtype), mask=mask)
            at += stride_t


@triton.jit
def _without_first(columns, COUNT: tl.constexpr):
    rest = ()
    for i in tl.static_range(1, COUNT):
        rest = rest + (columns[i],)
    return rest


# ----------------------------------------------------------------------------- sequences, taps, activation


@triton.jit
def _sequence_of(cu_seqlens, time, low, high):
    """The last packed sequence of low .. high that does not begin behind token `time`, element by element."""
    first = low + tl.zeros_like(time)
    last = high + tl.zeros_like(time)
    span = high - low
    while span > 0:
        middle = (first + last + 1) // 2
        begun = tl.load(cu_seqlens + middle).to(tl.int64) <= time
        first = tl.where(begun, middle, first)
        last = tl.where(begun, last, middle - 1)
        span = span // 2
    return first


@triton.jit
def _neighbourhood(cu_seqlens, t0, b, N, L, AHEAD: tl.constexpr):
    """(low, high, start, end): the sequences that tokens t0 .. t0+AHEAD-1 can belong to, the first one's bounds."""
    low, high, start, end = b, b, t0 * 0, t0 * 0 + L
    if cu_seqlens is not None:
        low = _sequence_of(cu_seqlens, t0, b, b + N - 1)
        high = _sequence_of(cu_seqlens, t0 + AHEAD - 1, b, b + N - 1)
        start, length = sequence_bounds(cu_seqlens, low, L)
        end = start + length
    return low, high, start, end


@triton.jit
def _place(cu_seqlens, time, low, high, L):
    """(n, age, left) of each token: its sequence, the tokens of it before, and those from it to the end.

    A token of no sequence has age -1 and nothing left.
    """
    n, start, end = low, time * 0, L
    if cu_seqlens is not None:
        n = _sequence_of(cu_seqlens, time, low, high)
        start, length = sequence_bounds(cu_seqlens, n, L)
        end = start + length
    live = (time >= start) & (time < end)
    return n, tl.where(live, time - start, -1), tl.where(live, end - time, 0)


@triton.jit
def _taps(columns, AT: tl.constexpr, W: tl.constexpr):
    """The W inputs that the token of columns[AT] sees, the latest first."""
    taps = ()
    for s in tl.static_range(W):
        taps = taps + (columns[AT - s],)
    return taps


@triton.jit
def _mixed_taps(columns, n, age, state_at, state_stride_n, state_stride_w, live, W: tl.constexpr):
    """The W inputs that the token of columns[W-1] sees, the latest first, from before its sequence those of its state.

    `state_at` points at its channels' states.
    """
    taps = ()
    for s in tl.static_range(W):
        tap = tl.where(age >= s, columns[W - 1 - s], 0)
        if state_at is not None and s > 0:
            at = state_at + n * state_stride_n + (W - 1 + age - s) * state_stride_w
            tap += tl.load(at, mask=live & (age >= 0) & (age < s), other=0).to(tap.dtype)
        taps = taps + (tap,)
    return taps


@triton.jit
def _load_weight(weight, stride_d, stride_w, bias, stride_bias, channel, D, W: tl.constexpr, dtype: tl.constexpr):
    """(W tensors, the tap of the latest input first; the bias or 0)."""
    taps = ()
    for s in tl.static_range(W):
        at = weight + channel.to(tl.int64) * stride_d + (W - 1 - s) * stride_w
        taps = taps + (tl.load(at, mask=channel < D, other=0).to(dtype),)
    b = tl.zeros_like(taps[0])
    if bias is not None:
        b = tl.load(bias + channel.to(tl.int64) * stride_bias, mask=channel < D, other=0).to(dtype)
    return taps, b


@triton.jit
def _convolve(taps, weight, bias, W: tl.constexpr):
    z = bias + weight[0] * taps[0]
    for s in tl.static_range(1, W):
        z += weight[s] * taps[s]
    return z


@triton.jit
def _activate(z, SILU: tl.constexpr):
    if SILU:
        z = z / (1 + tl.exp(-z))
    return z


@triton.jit
def _through_activation(dy, z, SILU: tl.constexpr):
    """dz"""
    if SILU:
        sigmoid = 1 / (1 + tl.exp(-z))
        dy = dy * (sigmoid * (1 + z * (1 - sigmoid)))
    return dy


@triton.jit
def _lanes(T_AXIS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, RUN: tl.constexpr):
    """(first token, channel) of each lane: broadcastable to [BT // RUN, BD], or its transpose for T_AXIS=1."""
    time = tl.expand_dims(tl.arange(0, BT // RUN) * RUN, 1 - T_AXIS)
    channel = tl.expand_dims(tl.arange(0, BD), T_AXIS)
    return time, channel


@triton.jit
def _program(pid, time_blocks, channel_blocks, T_AXIS: tl.constexpr):
    """(batch entry, block of time, block of channels): neighbouring programs are neighbours in memory."""
    programs = time_blocks * channel_blocks
    b = pid // programs
    pid = pid % programs
    if T_AXIS == 1:
        return b, pid % time_blocks, pid // time_blocks
    else:
        return b, pid // channel_blocks, pid % channel_blocks


@triton.jit
def _by_axis(stride_b, slow, fast, T_AXIS: tl.constexpr, ALIGN: tl.constexpr):
    """(stride_b, stride_d, stride_t) of what `_tile_strides` passes."""
    stride_b = tl.cast(stride_b, tl.int64) * ALIGN
    slow = tl.cast(slow, tl.int64) * ALIGN
    if T_AXIS == 1:
        return stride_b, slow, fast
    else:
        return stride_b, fast, slow


# ---------------------------------------------------------------------------------------------- forward


@triton.jit
def _forward_tile(
    x_at, x_stride_t, y_at, y_stride_t, weight, bias, time, live, before, after,
    W: tl.constexpr, RUN: tl.constexpr, VECTORS: tl.constexpr, SILU: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    columns = _load_run(
        x_at, x_stride_t, time, live, before, after, 1 - W, W - 1 + (RUN if VECTORS else 0), RUN, VECTORS, MASKED
    )
    results = ()
    for i in tl.static_range(RUN):
        if not VECTORS:  # token by token, which needs fewer registers
            columns = columns + _load_run(
                x_at, x_stride_t, time + i, live, before, after, 0, 1, RUN, VECTORS, MASKED
            )  # fmt: skip
            x_at += x_stride_t
        results = results + (_activate(_convolve(_taps(columns, W - 1 + i, W), weight, bias, W), SILU),)
    _store_run(y_at, y_stride_t, results, time, live, after, RUN, VECTORS, MASKED)


@triton.jit
def _forward_mixed_tile(
    x_at, x_stride_t, y_at, y_stride_t, weight, bias, state_at, state_stride_n, state_stride_w, cu_seqlens,
    time, live, before, after, t0, low, high, L,
    W: tl.constexpr, RUN: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    window = _load_run(x_at, x_stride_t, time, live, before, after, 1 - W, W - 1, RUN, False, True)
    for i in range(RUN):
        n, age, left = _place(cu_seqlens, t0 + time + i, low, high, L)
        inside = live & (time + i < after)
        columns = window + (tl.load(x_at, mask=inside, other=0).to(bias.dtype),)
        taps = _mixed_taps(columns, n, age, state_at, state_stride_n, state_stride_w, live, W)
        y = tl.where(left > 0, _activate(_convolve(taps, weight, bias, W), SILU), 0)
        tl.store(y_at, cast(y, y_at.dtype.element_ty), mask=inside)
        if W > 1:
            window = _without_first(columns, W)
        x_at += x_stride_t
        y_at += y_stride_t


@triton.jit
def _final_state(
    x, x_stride_d, x_stride_t, state, state_stride_d, state_stride_w, final_state, d0, D, start, end,
    W: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The last W-1 inputs of a sequence; x, state and final_state point at its batch entry and its rows."""
    BW: tl.constexpr = triton.next_power_of_2(W - 1)
    channel = (d0 + tl.arange(0, BD)).to(tl.int64)[:, None]
    j = tl.arange(0, BW)[None, :]
    p = end - (W - 1) + j
    live = (channel < D) & (j < W - 1)
    value = tl.load(x + channel * x_stride_d + p * x_stride_t, mask=live & (p >= start), other=0)
    value = value.to(final_state.dtype.element_ty)
    if state is not None:
        at = state + channel * state_stride_d + (p - start + W - 1) * state_stride_w
        value += tl.load(at, mask=live & (p < start), other=0).to(value.dtype)
    tl.store(final_state + channel * (W - 1) + j, value, mask=live)


@triton.jit(do_not_specialize=[*SIZES, *OUTER_STRIDES])
def _forward_kernel(
    x,  # [B, D, L]
    x_stride_b, x_stride_slow, x_stride_fast,  # see _tile_strides
    weight,  # [D, W]
    weight_stride_d, weight_stride_w,
    bias,  # [D] or None
    bias_stride,
    state,  # [N, D, W-1] or None
    state_stride_n, state_stride_d, state_stride_w,
    cu_seqlens,  # [N + 1] or None
    y,  # [B, D, L]
    y_stride_b, y_stride_slow, y_stride_fast,
    final_state,  # [N, D, W-1], contiguous
    N, D, L,
    tiles,  # programs that work on tiles; the others work on states
    time_blocks, channel_blocks,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, RUN: tl.constexpr, BS: tl.constexpr,
    T_AXIS: tl.constexpr, VECTORS: tl.constexpr, ALIGN: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    x_stride_b, x_stride_d, x_stride_t = _by_axis(x_stride_b, x_stride_slow, x_stride_fast, T_AXIS, ALIGN)
    y_stride_b, y_stride_d, y_stride_t = _by_axis(y_stride_b, y_stride_slow, y_stride_fast, T_AXIS, ALIGN)
    pid = tl.program_id(0)
    if pid < tiles:
        b, block, channel_block = _program(pid, time_blocks, channel_blocks, T_AXIS)
        b = b.to(tl.int64)
        t0 = block.to(tl.int64) * BT
        time, channel = _lanes(T_AXIS, BT, BD, RUN)
        channel = channel_block * BD + channel
        taps, offset = _load_weight(weight, weight_stride_d, weight_stride_w, bias, bias_stride, channel, D, W, dtype)
        live = tl.broadcast(channel < D, time >= 0)[0]
        channel = channel.to(tl.int64)
        x_at = x + b * x_stride_b + channel * x_stride_d + (t0 + time) * x_stride_t
        y_at = y + b * y_stride_b + channel * y_stride_d + (t0 + time) * y_stride_t
        HALO: tl.constexpr = (W - 1 + RUN - 1) // RUN * RUN if VECTORS else W - 1
        before = tl.minimum(t0, HALO).to(tl.int32)
        after = tl.minimum(L - t0, BT).to(tl.int32)
        if cu_seqlens is None and state is None:
            _forward_tile(x_at, x_stride_t, y_at, y_stride_t, taps, offset, time, live, before, after,
                          W, RUN, VECTORS, SILU, True)  # fmt: skip
        else:
            state_at = state
            if state is not None:
                state_at = state + channel * state_stride_d
            low, high, start, end = _neighbourhood(cu_seqlens, t0, b, N, L, BT)
            if (t0 - HALO >= start) & (t0 + BT <= end):
                _forward_tile(x_at, x_stride_t, y_at, y_stride_t, taps, offset, time, live, before, after,
                              W, RUN, VECTORS, SILU, False)  # fmt: skip
            else:
                _forward_mixed_tile(x_at, x_stride_t, y_at, y_stride_t, taps, offset,
                                    state_at, state_stride_n, state_stride_w, cu_seqlens,
                                    time, live, before, after, t0, low, high, L, W, RUN, SILU)  # fmt: skip
    elif W > 1:
        state_blocks = tl.cdiv(D, BS)
        n = ((pid - tiles) // state_blocks).to(tl.int64)
        d0 = (pid - tiles) % state_blocks * BS
        start = n * 0
        end = start + L
        batch = n
        if cu_seqlens is not None:
            start, length = sequence_bounds(cu_seqlens, n, L)
            end = start + length
            batch = n * 0
        states = state
        if state is not None:
            states = state + n * state_stride_n
        _final_state(x + batch * x_stride_b, x_stride_d, x_stride_t, states, state_stride_d, state_stride_w,
                     final_state + n * D * (W - 1), d0, D, start, end, W, BS)  # fmt: skip


# --------------------------------------------------------------------------------------------- backward


@triton.jit
def _backward_tile(
    x_at, x_stride_t, dy_at, dy_stride_t, dx_at, dx_stride_t, weight, bias, time, live, before, after, sums,
    W: tl.constexpr, RUN: tl.constexpr, VECTORS: tl.constexpr, SILU: tl.constexpr, NEED_SUMS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Writes dx (unless dx_at is None); returns `sums`, W of dweight and one of dbias, with this tile's added.

    The tile and W-1 tokens behind it are inside of a sequence; MASKED: the W-1 tokens before it need not be.
    """
    # Token p's gradient needs dz of p .. p+W-1, and z needs the W-1 inputs before each of them.
    AHEAD: tl.constexpr = 0 if dx_at is None else W - 1
    X_AHEAD: tl.constexpr = AHEAD if SILU else 0
    dy, columns = (), ()
    if VECTORS:
        dy = _load_run(dy_at, dy_stride_t, time, live, before, after, 0, RUN + AHEAD, RUN, VECTORS, False)
    if SILU or NEED_SUMS:
        COUNT: tl.constexpr = W - 1 + (RUN + X_AHEAD if VECTORS else 0)
        columns = _load_run(x_at, x_stride_t, time, live, before, after, 1 - W, COUNT, RUN, VECTORS, MASKED)
    dz, results = (), ()
    for i in tl.static_range(RUN + AHEAD):
        if not VECTORS:  # token by token, which needs fewer registers
            dy = dy + _load_run(dy_at, dy_stride_t, time, live, before, after, 0, 1, RUN, VECTORS, False)
            dy_at += dy_stride_t
        d = dy[i]
        if SILU or (NEED_SUMS and i < RUN):
            if not VECTORS:
                columns = columns + _load_run(x_at, x_stride_t, time, live, before, after, 0, 1, RUN, VECTORS, False)
                x_at += x_stride_t
            taps = _taps(columns, W - 1 + i, W)
        if SILU:
            d = _through_activation(d, _convolve(taps, weight, bias, W), SILU)
        if NEED_SUMS and i < RUN:
            sums = _add_to_sums(sums, d, taps, W)
        dz = dz + (d,)
        if dx_at is not None and i >= W - 1:  # all that token p reaches is there
            dx = weight[0] * dz[i - (W - 1)]
            for s in tl.static_range(1, W):
                dx += weight[s] * dz[i - (W - 1) + s]
            results = results + (dx,)
    if dx_at is not None:
        _store_run(dx_at, dx_stride_t, results, time, live, after, RUN, VECTORS, False)
    return sums


@triton.jit
def _add_to_sums(sums, d, taps, W: tl.constexpr):
    added = ()
    for s in tl.static_range(W):
        added = added + (sums[s] + d * taps[s],)
    return added + (sums[W] + d,)


@triton.jit
def _backward_mixed_tile(
    x_at, x_stride_t, dy_at, dy_stride_t, dx_at, dx_stride_t, weight, bias,
    state_at, state_stride_n, state_stride_w, dfinal_at, dfinal_stride_n, dfinal_stride_w, cu_seqlens,
    time, live, before, after, t0, low, high, L, sums,
    W: tl.constexpr, RUN: tl.constexpr, SILU: tl.constexpr, NEED_SUMS: tl.constexpr,
):  # fmt: skip
    """As `_backward_tile`, wherever sequences begin and end. Each token's dz is added to the dx that it reaches."""
    AHEAD: tl.constexpr = 0 if dx_at is None else W - 1
    window, pending = (), ()  # the W-1 inputs, and the W-1 unfinished dx, of the tokens before the present one
    if SILU or NEED_SUMS:
        window = _load_run(x_at, x_stride_t, time, live, before, after, 1 - W, W - 1, RUN, False, True)
    if dx_at is not None:
        dx_at -= (W - 1) * dx_stride_t
        for _ in tl.static_range(W - 1):
            pending = pending + (tl.zeros(live.shape, bias.dtype),)
    for i in range(RUN + AHEAD):
        n, age, left = _place(cu_seqlens, t0 + time + i, low, high, L)
        inside = live & (time + i < after)
        own = time + i < time + RUN  # the other tokens are added where they belong
        d = tl.load(dy_at, mask=inside, other=0).to(bias.dtype)
        dy_at += dy_stride_t
        if SILU or NEED_SUMS:
            columns = window + (tl.load(x_at, mask=inside, other=0).to(bias.dtype),)
            x_at += x_stride_t
            taps = _mixed_taps(columns, n, age, state_at, state_stride_n, state_stride_w, live, W)
            if W > 1:
                window = _without_first(columns, W)
        if SILU:
            d = _through_activation(d, _convolve(taps, weight, bias, W), SILU)
        d = tl.where(left > 0, d, 0)
        if NEED_SUMS:
            mine = ()
            for s in tl.static_range(W):
                mine = mine + (tl.where(own, taps[s], 0),)
            sums = _add_to_sums(sums, tl.where(own, d, 0), mine, W)
        if dx_at is not None:
            reached = ()
            for s in tl.static_range(W - 1, 0, -1):
                reached = reached + (pending[W - 1 - s] + weight[s] * tl.where(age >= s, d, 0),)
            dx = weight[0] * d
            if dfinal_at is not None:
                at = dfinal_at + n * dfinal_stride_n + (W - 1 - left) * dfinal_stride_w
                dx += tl.load(at, mask=live & (left > 0) & (left < W), other=0).to(dx.dtype)
            reached = reached + (dx,)
            last = time + i - (W - 1)  # no later token reaches this one
            done = live & (last >= time) & (last < after)
            tl.store(dx_at, cast(reached[0], dx_at.dtype.element_ty), mask=done)
            dx_at += dx_stride_t
            if W > 1:
                pending = _without_first(reached, W)
    return sums


@triton.jit
def _initial_state_gradient(
    x, x_stride_d, x_stride_t, dy, dy_stride_d, dy_stride_t,
    weight, weight_stride_d, weight_stride_w, bias, bias_stride,
    state, state_stride_d, state_stride_w, dfinal_state, dfinal_stride_d, dfinal_stride_w, dstate, d0, D, start, length,
    W: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """From the first W-1 tokens of a sequence. The tensors point at its batch entry and its rows."""
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    channel = d0 + tl.arange(0, BD)
    taps, offset = _load_weight(weight, weight_stride_d, weight_stride_w, bias, bias_stride, channel, D, W, dtype)
    live = channel < D
    channel = channel.to(tl.int64)
    length += tl.zeros_like(channel)
    columns = ()  # the state and the tokens
    if SILU:
        state_at = state + channel * state_stride_d
        for j in tl.static_range(W - 1):
            columns = columns + (tl.load(state_at + j * state_stride_w, mask=live, other=0).to(dtype),)
    x_at = x + channel * x_stride_d + start * x_stride_t
    dy_at = dy + channel * dy_stride_d + start * dy_stride_t
    dz = ()
    for i in tl.static_range(W - 1):
        inside = live & (i < length)
        d = tl.load(dy_at + i * dy_stride_t, mask=inside, other=0).to(dtype)
        if SILU:
            columns = columns + (tl.load(x_at + i * x_stride_t, mask=inside, other=0).to(dtype),)
            d = _through_activation(d, _convolve(_taps(columns, W - 1 + i, W), taps, offset, W), SILU)
        dz = dz + (tl.where(i < length, d, 0),)
    for j in tl.static_range(W - 1):
        gradient = tl.zeros_like(offset)
        for i in tl.static_range(j + 1):  # token i sees column j of the state W-1+i-j steps back
            gradient += taps[W - 1 + i - j] * dz[i]
        if dfinal_state is not None:  # the column is still in the final state of a short sequence
            at = dfinal_state + channel * dfinal_stride_d + (j - length) * dfinal_stride_w
            gradient += tl.load(at, mask=live & (length <= j), other=0).to(gradient.dtype)
        tl.store(dstate + channel * (W - 1) + j, cast(gradient, dstate.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=[*SIZES, "steps", *OUTER_STRIDES])
def _backward_kernel(
    x,  # [B, D, L]
    x_stride_b, x_stride_slow, x_stride_fast,  # see _tile_strides
    weight,  # [D, W]
    weight_stride_d, weight_stride_w,
    bias,  # [D] or None
    bias_stride,
    state,  # [N, D, W-1] or None
    state_stride_n, state_stride_d, state_stride_w,
    cu_seqlens,  # [N + 1] or None
    dy,  # [B, D, L]
    dy_stride_b, dy_stride_slow, dy_stride_fast,
    dfinal_state,  # [N, D, W-1] or None
    dfinal_stride_n, dfinal_stride_d, dfinal_stride_w,
    dx,  # [B, D, L] or None
    dx_stride_b, dx_stride_slow, dx_stride_fast,
    partial,  # [B * time_blocks, W + 1, D]: sums of dweight, the latest input's tap first, and of dbias; or None
    dstate,  # [N, D, W-1], contiguous, or None
    N, D, L,
    tiles,  # programs that work on tiles; the others work on states
    time_blocks, channel_blocks,
    steps,  # tiles behind one another that one program works on
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, RUN: tl.constexpr, BS: tl.constexpr,
    T_AXIS: tl.constexpr, VECTORS: tl.constexpr, ALIGN: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    x_stride_b, x_stride_d, x_stride_t = _by_axis(x_stride_b, x_stride_slow, x_stride_fast, T_AXIS, ALIGN)
    dy_stride_b, dy_stride_d, dy_stride_t = _by_axis(dy_stride_b, dy_stride_slow, dy_stride_fast, T_AXIS, ALIGN)
    dx_stride_b, dx_stride_d, dx_stride_t = _by_axis(dx_stride_b, dx_stride_slow, dx_stride_fast, T_AXIS, ALIGN)
    pid = tl.program_id(0)
    if pid < tiles:
        b, block, channel_block = _program(pid, time_blocks, channel_blocks, T_AXIS)
        b = b.to(tl.int64)
        row = b * time_blocks + block
        time, channel = _lanes(T_AXIS, BT, BD, RUN)
        channel = channel_block * BD + channel
        taps, offset = _load_weight(weight, weight_stride_d, weight_stride_w, bias, bias_stride, channel, D, W, dtype)
        live = tl.broadcast(channel < D, time >= 0)[0]
        channel = channel.to(tl.int64)
        state_at = state
        if state is not None:
            state_at = state + channel * state_stride_d
        dfinal_at = dfinal_state
        if dfinal_state is not None:
            dfinal_at = dfinal_state + channel * dfinal_stride_d
        HALO: tl.constexpr = (W - 1 + RUN - 1) // RUN * RUN if VECTORS else W - 1
        sums = ()
        for _ in tl.static_range(W + 1):
            sums = sums + (tl.zeros(live.shape, dtype),)
        first = block.to(tl.int64) * steps
        for tile in range(first, tl.minimum(first + steps, tl.cdiv(L, BT))):
            t0 = tl.cast(tile, tl.int64) * BT
            x_at = x + b * x_stride_b + channel * x_stride_d + (t0 + time) * x_stride_t
            dy_at = dy + b * dy_stride_b + channel * dy_stride_d + (t0 + time) * dy_stride_t
            dx_at = dx
            if dx is not None:
                dx_at = dx + b * dx_stride_b + channel * dx_stride_d + (t0 + time) * dx_stride_t
            before = tl.minimum(t0, HALO).to(tl.int32)
            after = tl.minimum(L - t0, BT + HALO).to(tl.int32)
            low, high, start, end = _neighbourhood(cu_seqlens, t0, b, N, L, BT + HALO)
            ZEROS_BEFORE: tl.constexpr = cu_seqlens is None and state is None
            inside = t0 + BT + HALO <= end
            if not ZEROS_BEFORE:
                inside = inside & (t0 - HALO >= start)
            if inside:
                sums = _backward_tile(
                    x_at, x_stride_t, dy_at, dy_stride_t, dx_at, dx_stride_t, taps, offset,
                    time, live, before, after, sums, W, RUN, VECTORS, SILU, partial is not None, ZEROS_BEFORE,
                )  # fmt: skip
            else:
                sums = _backward_mixed_tile(
                    x_at, x_stride_t, dy_at, dy_stride_t, dx_at, dx_stride_t, taps, offset,
                    state_at, state_stride_n, state_stride_w, dfinal_at, dfinal_stride_n, dfinal_stride_w, cu_seqlens,
                    time, live, before, after, t0, low, high, L, sums, W, RUN, SILU, partial is not None,
                )  # fmt: skip
        if partial is not None:
            at = partial + row * (W + 1) * D + channel_block * BD + tl.arange(0, BD)
            for s in tl.static_range(W + 1):
                tl.store(at + s * D, tl.sum(sums[s], T_AXIS), mask=channel_block * BD + tl.arange(0, BD) < D)
    elif dstate is not None:
        state_blocks = tl.cdiv(D, BS)
        n = ((pid - tiles) // state_blocks).to(tl.int64)
        d0 = (pid - tiles) % state_blocks * BS
        start = n * 0
        length = start + L
        batch = n
        if cu_seqlens is not None:
            start, length = sequence_bounds(cu_seqlens, n, L)
            batch = n * 0
        dfinals = dfinal_state
        if dfinal_state is not None:
            dfinals = dfinal_state + n * dfinal_stride_n
        _initial_state_gradient(
            x + batch * x_stride_b, x_stride_d, x_stride_t, dy + batch * dy_stride_b, dy_stride_d, dy_stride_t,
            weight, weight_stride_d, weight_stride_w, bias, bias_stride,
            state + n * state_stride_n, state_stride_d, state_stride_w, dfinals, dfinal_stride_d, dfinal_stride_w,
            dstate + n * D * (W - 1), d0, D, start, length, W, BS, SILU,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _reduce_kernel(
    partial,  # [rows, W + 1, D], see _backward_kernel
    dweight,  # [D, W], contiguous, or None
    dbias,  # [D] or None
    rows, D,
    W: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dweight and dbias: the sum of the partial sums, BR lanes of rows added in order, then the lanes."""
    s = tl.program_id(1)  # steps back, W for the bias
    channel = tl.program_id(0) * BD + tl.arange(0, BD)
    sums = tl.zeros([BR, BD], partial.dtype.element_ty)
    for first in range(0, rows, BR):
        row = (first + tl.arange(0, BR)).to(tl.int64)[:, None]
        at = partial + (row * (W + 1) + s) * D + channel[None, :]
        sums += tl.load(at, mask=(row < rows) & (channel[None, :] < D), other=0)
    total = tl.sum(sums, 0)
    if s < W:
        if dweight is not None:
            at = dweight + channel.to(tl.int64) * W + (W - 1 - s)
            tl.store(at, cast(total, dweight.dtype.element_ty), mask=channel < D)
    elif dbias is not None:
        tl.store(dbias + channel, cast(total, dbias.dtype.element_ty), mask=channel < D)


# ------------------------------------------------------------------------------------------------- step


@triton.jit(do_not_specialize=["x_stride_b"])
def _step_kernel(
    x,  # [B, D]
    x_stride_b, x_stride_d,
    weight,  # [D, W]
    weight_stride_d, weight_stride_w,
    bias,  # [D] or None
    bias_stride,
    state,  # [slots, D, W-1], shifted in place
    state_stride_n, state_stride_d, state_stride_w,
    state_indices,  # [B] or None
    state_indices_stride,
    y,  # [B, D], contiguous
    D, slots,
    W: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(D, BD)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks * BD + tl.arange(0, BD)).to(tl.int64)
    live = channel < D
    slot = b
    if state_indices is not None:
        slot = tl.load(state_indices + b * state_indices_stride).to(tl.int64)
    y_at = y + b * D + channel
    if (slot >= 0) & (slot < slots):
        dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
        taps, z = _load_weight(weight, weight_stride_d, weight_stride_w, bias, bias_stride, channel, D, W, dtype)
        now = tl.load(x + b * x_stride_b + channel * x_stride_d, mask=live, other=0).to(dtype)
        z += taps[0] * now
        at = state + slot * state_stride_n + channel * state_stride_d
        inputs = ()
        for j in tl.static_range(W - 1):
            inputs = inputs + (tl.load(at + j * state_stride_w, mask=live, other=0),)
        for s in tl.static_range(1, W):  # in the order of the whole op
            z += taps[s] * inputs[W - 1 - s].to(dtype)
        inputs = inputs + (cast(now, state.dtype.element_ty),)
        tl.debug_barrier()  # a column is overwritten only when every thread has read it
        for j in tl.static_range(W - 1):
            tl.store(at + j * state_stride_w, inputs[j + 1], mask=live)
        tl.store(y_at, cast(_activate(z, SILU), y.dtype.element_ty), mask=live)
    else:
        tl.store(y_at, tl.zeros([BD], y.dtype.element_ty), mask=live)


# -------------------------------------------------------------------------------------------- launchers


def why_not(device: str, dtype: torch.dtype, *sizes: int) -> str | None:
    """The reason why this backend cannot run, or None."""
    return _why_not_here(device)


def _time_is_fast(x: torch.Tensor) -> bool:
    """Whether neighbours in memory are neighbours in time; else they are neighbouring channels."""
    return x.stride(1) != 1 or x.stride(2) == 1


def _empty_with_layout(x: torch.Tensor) -> torch.Tensor:
    B, D, L = x.shape
    return x.new_empty(B, D, L) if _time_is_fast(x) else x.new_empty(B, L, D).transpose(1, 2)


def _strides(x: torch.Tensor | None, count: int) -> tuple[int, ...]:
    """Strides, 0 where a dimension has one element: kernels are compiled for what divides a stride."""
    return (0,) * count if x is None else tuple(s if n > 1 else 0 for s, n in zip(x.stride(), x.shape, strict=True))


def _tile_strides(x: torch.Tensor | None, constants: dict) -> tuple[int, ...]:
    """(batch entry, slow axis, fast axis), the first two in units of ALIGN elements.

    Lengths decide what divides these two, so kernels are not compiled for that, but for ALIGN.
    """
    if x is None:
        return 0, 0, 0
    batch, slow, fast = x.stride() if constants["T_AXIS"] else (x.stride(0), x.stride(2), x.stride(1))
    return batch // constants["ALIGN"], slow // constants["ALIGN"], fast


def _config_for(kind: str, W: int, x: torch.Tensor, *others: torch.Tensor | None) -> tuple[_config.LaunchConfig, dict]:
    """The row of the table, and the constants of the kernel that follow from the layout of x and of `others`."""
    time_is_fast = _time_is_fast(x)
    run = VECTOR_BYTES // x.element_size()
    fast = 2 if time_is_fast else 1
    tensors = [t for t in (x, *others) if t is not None]
    aligned = all(t.stride(axis) % run == 0 for t in tensors for axis in (0, 3 - fast))
    vectors = time_is_fast and aligned and x.shape[2] % run == 0 and all(t.stride(2) == 1 for t in tensors)
    config = _config.causal_conv1d(kind, time_is_fast, vectors, x.shape[1], W, x.dtype, arch())
    return config, {
        "W": W,
        "BT": config.BT,
        "BD": config.BD,
        "RUN": run if vectors else RUN,
        "BS": STATE_CHANNELS,
        "T_AXIS": int(time_is_fast),
        "VECTORS": vectors,
        "ALIGN": run if aligned and (vectors or not time_is_fast) else 1,
    }


def _results(x, weight, bias, initial_state, cu_seqlens, *, activation):
    """What `forward` returns, not written."""
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    accumulator = torch.promote_types(x.dtype, torch.float32)
    return _empty_with_layout(x), x.new_empty(N, x.shape[1], weight.shape[1] - 1, dtype=accumulator)


@operator(
    "causal_conv1d_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, *, "
    "str? activation) -> Tensor[]",
    _results,
)
def forward(x, weight, bias, initial_state, cu_seqlens, *, activation):
    """(y, final_state)."""
    B, D, L = x.shape
    W = weight.shape[1]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y, final_state = _results(x, weight, bias, initial_state, cu_seqlens, activation=activation)
    if N == 0:
        return y.zero_(), final_state
    config, constants = _config_for("forward", W, x, y)
    time_blocks, channel_blocks = cdiv(L, config.BT), cdiv(D, config.BD)
    tiles = B * time_blocks * channel_blocks
    programs = tiles + (N * cdiv(D, STATE_CHANNELS) if W > 1 else 0)
    if programs:
        with on_device(x):
            args = (
                x, *_tile_strides(x, constants), weight, *_strides(weight, 2), bias, *_strides(bias, 1),
                initial_state, *_strides(initial_state, 3), cu_seqlens, y, *_tile_strides(y, constants), final_state,
                N, D, L, tiles, time_blocks, channel_blocks,
            )  # fmt: skip
            options = constexprs(**constants, SILU=activation is not None, **config.options)
            launch(_forward_kernel, (programs,), args, options)
    return y, final_state


def _gradients(x, weight, bias, initial_state, *_, needs, **__):
    """What `backward` returns, not written."""
    rest = zip((weight, bias, initial_state), needs[1:], strict=True)
    return [_empty_with_layout(x) if needs[0] else None, *(t.new_empty(t.shape) if need else None for t, need in rest)]


@operator(
    "causal_conv1d_backward(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, "
    "Tensor dy, Tensor? dfinal_state, *, str? activation, bool[4] needs) -> Tensor[]",
    _gradients,
)
def backward(x, weight, bias, initial_state, cu_seqlens, dy, dfinal_state, *, activation, needs):
    """Gradients of x, weight, bias and initial_state, None where `needs` is False."""
    B, D, L = x.shape
    W = weight.shape[1]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    need_x, need_weight, need_bias, need_state = needs
    grads = dx, dweight, dbias, dstate = _gradients(x, weight, bias, initial_state, needs=needs)
    if N == 0:
        return [d if d is None else d.zero_() for d in grads]

    config, constants = _config_for("backward", W, x, dy, dx)
    channel_blocks = cdiv(D, config.BD)
    time_tiles = cdiv(L, config.BT) if need_x or need_weight or need_bias else 0
    # Programs that go through many tiles leave few partial sums; enough of them are left to fill the device.
    steps = max(1, min(MAX_STEPS, B * time_tiles * channel_blocks // (FILL * multiprocessors(x))))
    time_blocks = cdiv(time_tiles, steps)
    partial = None
    if need_weight or need_bias:
        accumulator = torch.promote_types(x.dtype, torch.float32)
        partial = x.new_empty(B * time_blocks, W + 1, D, dtype=accumulator)
    tiles = B * time_blocks * channel_blocks
    programs = tiles + (N * cdiv(D, STATE_CHANNELS) if need_state and W > 1 else 0)
    with on_device(x):
        if programs:
            args = (
                x, *_tile_strides(x, constants), weight, *_strides(weight, 2), bias, *_strides(bias, 1),
                initial_state, *_strides(initial_state, 3), cu_seqlens, dy, *_tile_strides(dy, constants),
                dfinal_state, *_strides(dfinal_state, 3), dx, *_tile_strides(dx, constants), partial, dstate,
                N, D, L, tiles, time_blocks, channel_blocks, steps,
            )  # fmt: skip
            options = constexprs(**constants, SILU=activation is not None, **config.options)
            launch(_backward_kernel, (programs,), args, options)
        if partial is not None:
            config = _config.causal_conv1d_reduce(arch())
            args = (partial, dweight, dbias, partial.shape[0], D)
            options = constexprs(W=W, BR=config.BT, BD=config.BD, **config.options)
            launch(_reduce_kernel, (cdiv(D, config.BD), W + 1), args, options)
    return grads


@operator(
    "causal_conv1d_step(Tensor x, Tensor weight, Tensor? bias, *, Tensor(a!) state, str? activation, "
    "Tensor? state_indices) -> Tensor",
    lambda x, *_, **__: x.new_empty(x.shape),
)
def step(x, weight, bias, *, state, activation, state_indices):
    """y; `state` is written in place."""
    B, D = x.shape
    y = x.new_empty(B, D)
    if B == 0:
        return y
    config = _config.causal_conv1d_step(D, arch())
    with on_device(x):
        args = (
            x, *_strides(x, 2), weight, *_strides(weight, 2), bias, *_strides(bias, 1), state, *_strides(state, 3),
            state_indices, *_strides(state_indices, 1), y, D, state.shape[0],
        )  # fmt: skip
        options = constexprs(W=weight.shape[1], BD=config.BD, SILU=activation is not None, **config.options)
        launch(_step_kernel, (B * cdiv(D, config.BD),), args, options)
    return y
