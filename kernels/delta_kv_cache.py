# SPDX-License-Identifier: Apache-2.0
"""DeltaLLM's cache of keys and values (arXiv 2507.19608) on GPUs.

    k_hat_t = k_t where not |k_t - k_hat_{t-1}| <= threshold, else k_hat_{t-1}      a channel by itself
    o_i     = sum over j <= i of softmax_j(scale q_i . (k_j if near, else k_hat_j)) v_j

Keys that are near to no query any more are records (`_records.py`); of the others there are the exact keys and, of
those that have left the window, the held ones. Flash decoding over all of them, as in `decode_attention.py`: a product
with tensor cores reads all channels, so the zeros save memory traffic and nothing else, which is what decoding waits
for. Which keys are where is counted on the host.
"""

import torch
import triton
import triton.language as tl

from ._config import delta_cache_attend_config, delta_cache_copy_config, temporal_sparse_hold_config
from ._decode import channels_of, combine, load_queries, new_parts, rows_of_queries, scores, split_keys, store_outputs
from ._launch import arch, cdiv, constexprs, launch, on_device, precision
from ._launch import why_not as _why_not_here
from ._records import RECORD, WORD, WORDS, held_columns, places, word_of
from ._scan import first_of_segment, load_run, when
from ._sparse import LOG2_E, block_of, is_near, load_rows, rows_of, window_start
from ._tiles import cast, dot, softmax_step

MAX_HEAD_DIM = 256
SPARE = 32  # room for recent keys beyond the need: they move to the front once in so many tokens
NUMBERS = tl.constexpr(4)  # of a row: slot of its first key that is not sealed, that key, held keys before and after

# ------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["T", "sink"])
def append_kernel(
    k,  # [B, T, HK, D]
    v,  # [B, T, HK, DV]
    positions,  # [B, T], where tokens come to lie in their rows, -1 for those dropped; None: behind `length`
    state,  # [B, 2]: the recent slot of a row's key 0, if it had one; the row's length
    recent,  # [B, HK, slots, D]; written
    values,  # [B, HK, room, DV]; written
    sinks,  # [B, HK, sink, D] or None; written
    T, HK, slots, room, sink, k_b, k_t, k_h, v_b, v_t, v_h,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BT)
    first = tl.program_id(0) % tiles * BT
    head = (tl.program_id(0) // tiles % HK).to(tl.int64)
    batch = (tl.program_id(0) // (tiles * HK)).to(tl.int64)
    slot = tl.load(state + batch * 2)
    token = first + tl.arange(0, BT)
    if positions is None:
        position = tl.load(state + batch * 2 + 1) + token
        live = token < T
    else:
        position = tl.load(positions + batch * T + token, mask=token < T, other=-1)
        live = position >= 0
    row = batch * HK + head
    column = tl.arange(0, BD)
    mask = live[:, None] & (column < D)[None, :]
    keys = tl.load(
        k + batch * k_b + head * k_h + token.to(tl.int64)[:, None] * k_t + column[None, :], mask=mask, other=0
    )
    tl.store(recent + (row * slots + slot + position)[:, None] * D + column[None, :], keys, mask=mask)
    if sinks is not None:
        tl.store(
            sinks + (row * sink + position)[:, None] * D + column[None, :], keys, mask=mask & (position < sink)[:, None]
        )
    column = tl.arange(0, BV)
    mask = live[:, None] & (column < DV)[None, :]
    x = tl.load(v + batch * v_b + head * v_h + token.to(tl.int64)[:, None] * v_t + column[None, :], mask=mask, other=0)
    tl.store(values + (row * room + position)[:, None] * DV + column[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["width"])
def hold_kernel(
    recent,  # [B, HK, slots, D]
    held,  # [B, HK, held_slots, D], each key a slot behind its place in `recent`; written
    threshold,  # [HK, D]
    state,  # [B, width], NUMBERS first
    HK, slots, held_slots, width,
    D: tl.constexpr, BD: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Hold the keys that have left the window since the last time. One channel a lane, one token after the other."""
    batch = (tl.program_id(0) // HK).to(tl.int64)
    head = (tl.program_id(0) % HK).to(tl.int64)
    shift = tl.load(state + batch * width) - tl.load(state + batch * width + 1)
    begin = tl.load(state + batch * width + 2).to(tl.int32)
    end = tl.load(state + batch * width + 3).to(tl.int32)
    column = tl.arange(0, BD)
    live = column < D
    limit = tl.load(threshold + head * D + column, mask=live, other=0)
    recent += ((batch * HK + head) * slots + shift) * D + column
    held += ((batch * HK + head) * held_slots + shift + 1) * D + column
    now = tl.load(held + (tl.cast(begin, tl.int64) - 1) * D, mask=live, other=0)
    rows = load_run(recent, D, begin, end, live, RUN)
    for t in range(begin, end, RUN):
        following = load_run(recent, D, t + RUN, end, live, RUN)
        for i in tl.static_range(RUN):
            x = rows[i]
            stays = tl.abs(x.to(limit.dtype) - now.to(limit.dtype)) <= limit  # a NaN fires
            now = tl.where(stays, now, x)
            tl.store(held + tl.cast(t + i, tl.int64) * D, now, mask=when(t + i < end, live))
        rows = following


@triton.jit
def record_of(state, HK, most):
    """(row of a head, slot of its first held key, record) of a program; the record is -1 where there is none.

    `state` is [B, 3]: that slot, the record that is the first to be made, and how many are.
    """
    number = tl.program_id(0) % most
    row = (tl.program_id(0) // most).to(tl.int64)
    batch = row // HK
    slot = tl.load(state + batch * 3)
    count = tl.load(state + batch * 3 + 2)
    record = tl.load(state + batch * 3 + 1) + number
    return row, slot + tl.cast(number, tl.int64) * RECORD, tl.where(number < count, record, -1)


@triton.jit(do_not_specialize=["most"])
def mark_kernel(
    held,  # [B, HK, held_slots, D] as integers
    bits,  # [B, HK, blocks, D, 4]; written
    starts,  # [B, HK, blocks, D]; written
    sizes,  # [B, HK, most], zeros; written
    state,  # as `record_of` has it
    HK, most, held_slots, blocks,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Where the channels of new records fire, where their lists begin, and how many values there are."""
    row, slot, record = record_of(state, HK, most)
    if record >= 0:
        column = tl.arange(0, BD)
        live = column < D
        keys = held + (row * held_slots + slot) * D + column[None, :]
        record += row * blocks
        size = tl.where(live, 1, 0)
        for w in tl.static_range(WORDS):
            t = w * WORD + tl.arange(0, WORD)
            mask = (t > 0)[:, None] & live[None, :]
            now = tl.load(keys + t.to(tl.int64)[:, None] * D, mask=mask, other=0)
            before = tl.load(keys + (t.to(tl.int64) - 1)[:, None] * D, mask=mask, other=0)
            fired = tl.where(now != before, 1, 0)
            word = tl.sum(fired.to(tl.uint32) << (t - w * WORD).to(tl.uint32)[:, None], 0)
            tl.store(bits + (record * D + column) * WORDS + w, word.to(tl.int32, bitcast=True), mask=live)
            size += tl.sum(fired, 0)
        tl.store(starts + record * D + column, (tl.cumsum(size, 0) - size).to(tl.int16), mask=live)
        tl.store(sizes + tl.program_id(0), tl.sum(size, 0))


@triton.jit(do_not_specialize=["most"])
def pack_kernel(
    held, bits, starts,  # as `mark_kernel` has them
    sizes,  # [B, HK, most]
    ends,  # [B, HK, most], of records in the pool
    pool,  # integers; written
    where,  # [B, HK, blocks, 2]: start and size of each record; written
    state,  # as `record_of` has it
    HK, most, held_slots, blocks,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row, slot, record = record_of(state, HK, most)
    if record >= 0:
        record += row * blocks
        size = tl.load(sizes + tl.program_id(0))
        begin = tl.load(ends + tl.program_id(0)) - size
        tl.store(where + record * 2, begin)
        tl.store(where + record * 2 + 1, size)
        column = tl.arange(0, BD)
        live = column < D
        keys = held + (row * held_slots + slot) * D + column[:, None]
        t = tl.arange(0, WORD)
        for w in tl.static_range(WORDS):
            words = word_of(bits, starts, record, w, column, D)
            fired = (words[:, None] >> t.to(tl.int64)[None, :]) & 1
            mask = ((fired != 0) | (t + w * WORD == 0)[None, :]) & live[:, None]
            x = tl.load(keys + (t + w * WORD).to(tl.int64)[None, :] * D, mask=mask, other=0)
            tl.store(pool + begin + places(words, 0), x, mask=mask)


@triton.jit
def held_keys(pool, bits, starts, where, key, D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr):
    """Tiles [BC, 32]: the 32 held keys from `key` on."""
    number = key // RECORD
    w = key // WORD - number * WORDS
    record = tl.cast(number, tl.int64)
    values = pool + tl.load(where + record * 2)
    tiles = ()
    for i in tl.static_range(BD // BC):
        tiles = tiles + (held_columns(values, bits, starts, record, w, key, i * BC, D, BC),)
    return tiles


@triton.jit
def products(queries, x, PRECISION: tl.constexpr):
    """[BM, 32] products of queries [BM, BC] with held keys. Triton fails to make a matrix product of float64 elements
    whose place depends on narrower ones."""
    if x.dtype == tl.float64:
        return tl.sum(queries[:, :, None] * x[None, :, :], 1)
    else:
        return dot(queries, x, None, PRECISION)


@triton.jit
def attend_records(
    m, l, acc, queries, pool, bits, starts, where, v, sinks, sink, begin, end,
    FACTOR: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
    SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The records of the keys [begin, end), which all rows see; the first `sink` keys as they came."""
    if begin < end:
        keys = held_keys(pool, bits, starts, where, begin, D, BD, BC)
        for key in range(begin, end, WORD):
            # On their way while these are worked on: what their places depend on has to arrive before they can leave.
            next_key = tl.minimum(key + WORD, end - WORD)
            following = held_keys(pool, bits, starts, where, next_key, D, BD, BC)
            s = tl.zeros([m.shape[0], WORD], m.dtype)
            for i in tl.static_range(BD // BC):
                x = keys[i]
                if SINKS:
                    j = key + tl.arange(0, WORD)
                    column = i * BC + tl.arange(0, BC)
                    mask = (column < D)[:, None] & (j < sink)[None, :]
                    exact = tl.load(sinks + j.to(tl.int64)[None, :] * D + column[:, None], mask=mask, other=0)
                    x = tl.where((j < sink)[None, :], exact, x)
                s += products(queries[i], x, PRECISION)
            keys = following
            m, l, p, alpha = softmax_step(m, l, s * FACTOR)
            values = load_rows(v, DV, key, end, DV, BV, WORD)
            acc = dot(cast(p, v.dtype.element_ty), values, acc * alpha[:, None], PRECISION)
    return m, l, acc


@triton.jit
def attend_recent(
    m, l, acc, queries, recent, held, v, i, begin, end, held_end, window, sink,
    FACTOR: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
    BN: tl.constexpr, FAR: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys [begin, end) that are not sealed; with FAR, some rows see some of them as they are held."""
    for key in range(begin, end, BN):
        j = key + tl.arange(0, BN)
        s = scores(queries, recent, D, key, end, D, BD, BC, BN, PRECISION)
        if FAR:
            far = scores(queries, held, D, key, tl.minimum(end, held_end), D, BD, BC, BN, PRECISION)
            s = tl.where(is_near(i[:, None], j[None, :], window, sink, BLOCKS), s, far)
        s = tl.where(j[None, :] <= i[:, None], s * FACTOR, float("-inf"))
        m, l, p, alpha = softmax_step(m, l, s)
        values = load_rows(v, DV, key, end, DV, BV, BN)
        acc = dot(cast(p, v.dtype.element_ty), values, acc * alpha[:, None], PRECISION)
    return m, l, acc


@triton.jit(do_not_specialize=["Tq", "S", "SPAN", "window", "sink", "width"])
def attend_kernel(
    q,  # [B, Tq, HQ, D]
    pool, bits, starts, where,  # the records, as `pack_kernel` has them
    recent, held,  # as `hold_kernel` has them
    values,  # [B, HK, room, DV]
    sinks,  # [B, HK, sink, D] or None
    state,  # [B, width]: NUMBERS, then the positions of the Tq queries, -1 for none
    o,  # [B, Tq, HQ, DV], contiguous; written where keys are not split
    parts, norms,  # as `store_outputs` has them, or None
    Tq, HQ, HK, S, SPAN, window, sink, width, blocks, slots, held_slots, room, q_b, q_t, q_h,
    FACTOR: tl.constexpr,  # scale log2(e)
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BLOCKS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    GROUP = HQ // HK
    tiles = tl.cdiv(Tq * GROUP, BM)
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles % S
    key_head = (tl.program_id(0) // (tiles * S) % HK).to(tl.int64)
    batch = (tl.program_id(0) // (tiles * S * HK)).to(tl.int64)
    state += batch * width
    shift = tl.load(state) - tl.load(state + 1)
    sealed = tl.load(state + 1).to(tl.int32)
    held_end = tl.load(state + 3).to(tl.int32)
    row = batch * HK + key_head
    recent += (row * slots + shift) * D
    held += (row * held_slots + shift + 1) * D
    v = values + row * room * DV
    bits += row * blocks * (WORDS * D)
    starts += row * blocks * D
    where += row * blocks * 2

    token, head, live = rows_of_queries(tile, key_head, Tq, GROUP, BM)
    i = tl.load(state + NUMBERS + token, mask=live, other=-1).to(tl.int32)
    newest = tl.max(i, 0)
    begin = first_of_segment(split, SPAN)
    end = tl.minimum(begin + SPAN, newest + 1)
    sealed_end = tl.minimum(end, sealed)
    queries = load_queries(q + batch * q_b, token, head, live, q_t, q_h, D, BD, BC)
    m = tl.full([BM], float("-inf"), dtype)
    l = tl.zeros([BM], dtype)
    acc = tl.zeros([BM, BV], dtype)
    # No query is older than a sealed key, so that every row sees all of them.
    after_sinks = begin
    if sinks is not None:
        after_sinks = tl.minimum(tl.maximum(tl.cdiv(sink, RECORD) * RECORD, begin), sealed_end)
        m, l, acc = attend_records(
            m, l, acc, queries, pool, bits, starts, where, v, sinks + row * sink * D, sink, begin, after_sinks, FACTOR,
            D, DV, BD, BV, BC, True, PRECISION,
        )  # fmt: skip
    m, l, acc = attend_records(
        m, l, acc, queries, pool, bits, starts, where, v, sinks, sink, after_sinks, sealed_end, FACTOR, D, DV, BD, BV,
        BC, False, PRECISION,
    )  # fmt: skip
    first = tl.maximum(begin, sealed)
    near = tl.cdiv(tl.maximum(window_start(newest, window, BLOCKS), 0), BN) * BN
    near = tl.minimum(tl.maximum(near, first), tl.maximum(end, first))
    m, l, acc = attend_recent(
        m, l, acc, queries, recent, held, v, i, first, near, held_end, window, sink, FACTOR, D, DV, BD, BV, BC, BN,
        True, BLOCKS, PRECISION,
    )  # fmt: skip
    m, l, acc = attend_recent(
        m, l, acc, queries, recent, held, v, i, near, end, held_end, window, sink, FACTOR, D, DV, BD, BV, BC, BN,
        False, BLOCKS, PRECISION,
    )  # fmt: skip
    store_outputs(o, parts, norms, m, l, acc, i >= begin, batch, token, head, live, split, Tq, HQ, S, DV, BV, SPLIT)


@triton.jit(do_not_specialize=["most", "T"])
def unpack_kernel(
    pool, bits, starts, where,  # as `pack_kernel` has them
    k,  # [B, HK, T, D]; written where keys are in records
    state,  # as `record_of` has it
    HK, most, blocks, T,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row, slot, record = record_of(state, HK, most)
    if record >= 0:
        record += row * blocks
        column = tl.arange(0, BD)
        values = pool + tl.load(where + record * 2)
        for w in tl.static_range(WORDS):
            x = held_columns(values, bits, starts, record, w, 0, 0, D, BD)
            t = slot + w * WORD + tl.arange(0, WORD)
            tl.store(k + (row * T + t)[None, :] * D + column[:, None], x, mask=(column < D)[:, None])


# ----------------------------------------------------------------------------------------------- launchers


def why_not(device: str, dtype: torch.dtype, *sizes: int) -> str | None:
    """The reason why this backend cannot run head dimensions `sizes`, or None."""
    missing = _why_not_here(device)
    if missing is None and any(s > MAX_HEAD_DIM for s in sizes):
        return f"head dimensions go up to {MAX_HEAD_DIM}, got {max(sizes)}"
    return missing


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Store:
    """Keys and values of one layer: all values, records of the keys that are sealed, the others as they came.

    `recent` holds the keys of row b that are not sealed from slot `first[b]` on, `held` the held ones of those before
    key `held_to[b]`, each a slot further on: what is before the first is the last sealed key. Sealing moves nothing.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, threshold: torch.Tensor, sink: int, max_len: int | None):
        batch, _, heads, D = k.shape
        self.threshold, self.max_len = threshold.contiguous(), max_len
        self.first, self.sealed, self.held_to, self.lengths = ([0] * batch for _ in range(4))
        self.recent = k.new_empty(batch, heads, 0, D)
        self.held = k.new_full((batch, heads, 1, D), torch.nan)  # the first key fires
        self.values = v.new_empty(batch, heads, 0, v.shape[3])
        self.sinks = k.new_zeros(batch, heads, sink, D) if sink else None
        self.pool = k.new_empty(0)
        self.used = 0  # elements of `pool`
        self.bits = torch.empty(batch, heads, 0, D, WORDS.value, dtype=torch.int32, device=k.device)
        self.starts = torch.empty(batch, heads, 0, D, dtype=torch.int16, device=k.device)
        self.where = torch.empty(batch, heads, 0, 2, dtype=torch.int64, device=k.device)

    @property
    def nbytes(self) -> int:
        kept = (self.recent, self.held, self.values, self.pool, self.bits, self.starts, self.where)
        return sum(x.nbytes for x in (*kept, self.threshold, self.sinks) if x is not None)

    def append(self, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None) -> None:
        batch, tokens, heads, D = k.shape
        counts = [tokens] * batch if keep is None else keep.sum(1).tolist()
        ends = [n + count for n, count in zip(self.lengths, counts, strict=True)]
        self._make_room(ends)
        if batch * tokens:
            state = self._on_device(zip(self._shifts(), self.lengths, strict=True))
            positions = None if keep is None else torch.where(keep, state[:, 1:] + keep.cumsum(1) - 1, -1)
            k, v = rows_of(k, v)
            with on_device(k):
                config = delta_cache_copy_config(block_of(max(D, v.shape[3])), arch())
                constants = constexprs(
                    D=D, DV=v.shape[3], BD=block_of(D), BV=block_of(v.shape[3]), BT=config.BT, **config.options
                )
                args = (
                    k, v, positions, state, self.recent, self.values, self.sinks, tokens, heads, self.recent.shape[2],
                    self.values.shape[2], self._sink(), *k.stride()[:3], *v.stride()[:3],
                )  # fmt: skip
                launch(append_kernel, (batch * heads * cdiv(tokens, config.BT),), args, constants)
        self.lengths = ends

    def seal(self, exact_from: list[int]) -> None:
        """Make records of the whole blocks before these keys, one for each row, which no query will see exactly any
        more."""
        known = zip(exact_from, self.lengths, self.sealed, strict=True)
        counts = [max(0, min(first, length) - sealed) // RECORD.value for first, length, sealed in known]
        if not any(counts):
            return
        ends = [n + count * RECORD.value for n, count in zip(self.sealed, counts, strict=True)]
        self._hold(ends)
        self._pack(counts, max(ends) // RECORD.value)
        self.first = [n + end - sealed for n, end, sealed in zip(self.first, ends, self.sealed, strict=True)]
        self.sealed = ends
        recent, held = self._needs(self.lengths, self.held_to)
        if self.recent.shape[2] > 2 * (recent + SPARE) or self.held.shape[2] > 2 * (held + SPARE):
            self._move(recent + SPARE, held + SPARE)  # after a long append

    def attend(self, q, positions, *, window, window_mode, scale):
        o = q.new_empty(*q.shape[:3], self.values.shape[3])
        if o.numel() == 0:
            return o
        (q,) = rows_of(q)
        B, Tq, HQ, D = q.shape
        HK, DV = self.values.shape[1], self.values.shape[3]
        blocks = window_mode == "block"
        # The keys that have left the newest query's window.
        far = [max(n - 1, 0) // window * window if blocks else max(0, n - window) for n in self.lengths]
        known = self._before_holding(far)
        state = self._on_device(torch.cat([torch.tensor(known), positions], 1))
        self._hold_by(state, known)
        rows = Tq * (HQ // HK)
        BD, BV = block_of(D), block_of(DV)
        with on_device(q):
            config = delta_cache_attend_config(rows, max(BD, BV), q.dtype, arch())
            programs = B * HK * cdiv(rows, config.BT)
            span, splits = split_keys(programs, max(self.lengths), RECORD.value, q)
            parts, norms = new_parts(q, DV, splits)
            constants = constexprs(
                FACTOR=scale * LOG2_E, D=D, DV=DV, BD=BD, BV=BV, BC=channels_of(BD, q.dtype), BM=config.BT,
                BN=config.BK, BLOCKS=blocks, SPLIT=splits > 1, PRECISION=precision(q.dtype), **config.options,
            )  # fmt: skip
            args = (
                q, self.pool, self.bits, self.starts, self.where, self.recent, self.held, self.values, self.sinks,
                state, o, parts, norms, Tq, HQ, HK, splits, span, window, self._sink(), state.shape[1],
                self.where.shape[2], self.recent.shape[2], self.held.shape[2], self.values.shape[2], *q.stride()[:3],
            )  # fmt: skip
            launch(attend_kernel, (programs * splits,), args, constants)
            combine(parts, norms, o, DV, BV)
        return o

    def crop(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.held_to = [min(pair) for pair in zip(self.held_to, lengths, strict=True)]

    def reorder(self, indices: list[int]) -> None:
        """Rows of the batch share records that they have in common: those are never written again."""
        index = torch.tensor(indices, dtype=torch.int64).to(self.values.device)
        for name in ("recent", "held", "values", "sinks", "bits", "starts", "where"):
            x = getattr(self, name)
            setattr(self, name, None if x is None else x.index_select(0, index))
        for name in ("first", "sealed", "held_to", "lengths"):
            kept = getattr(self, name)
            setattr(self, name, [kept[i] for i in indices])
        self._drop_records()

    def to_dense(self, exact_from: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, rows padded with zeros; the keys before `exact_from` held, sinks exact."""
        self._hold(exact_from)
        batch, heads, _, D = self.recent.shape
        T = max(self.lengths, default=0)
        k = self.recent.new_zeros(batch, heads, T, D)
        counts = [n // RECORD.value for n in self.sealed]
        most = max(counts, default=0)
        if most:
            state = self._on_device((0, 0, count) for count in counts)
            args = (self.pool, self.bits, self.starts, self.where, k, state, heads, most, self.where.shape[2], T)
            self._launch(unpack_kernel, batch * heads * most, args)
        v = self.values[:, :, :T].clone()
        for b, (exact, length) in enumerate(zip(exact_from, self.lengths, strict=True)):
            sealed, first = self.sealed[b], self.first[b]
            k[b, :, sealed:exact] = self.held[b, :, first + 1 : first + 1 + exact - sealed]
            k[b, :, exact:length] = self.recent[b, :, first + exact - sealed : first + length - sealed]
            sinks = min(length, self._sink())
            if sinks:
                k[b, :, :sinks] = self.sinks[b, :, :sinks]
            v[b, :, length:] = 0
        return k.transpose(1, 2), v.transpose(1, 2)

    def _sink(self) -> int:
        return 0 if self.sinks is None else self.sinks.shape[2]

    def _shifts(self) -> list[int]:
        """The slot in `recent` of each row's key 0, if it had one."""
        return [first - sealed for first, sealed in zip(self.first, self.sealed, strict=True)]

    def _on_device(self, rows) -> torch.Tensor:
        """Numbers of rows, int64, where kernels read them. Nothing waits for the copy."""
        numbers = rows if isinstance(rows, torch.Tensor) else torch.tensor(list(rows), dtype=torch.int64)
        device = self.values.device
        return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers

    def _launch(self, kernel, programs: int, args: tuple) -> None:
        """One of the kernels that make or read records."""
        D = self.recent.shape[3]
        with on_device(self.recent):
            config = delta_cache_copy_config(block_of(D), arch())
            launch(kernel, (programs,), args, constexprs(D=D, BD=block_of(D), **config.options))

    # Held keys.

    def _hold(self, targets: list[int]) -> None:
        """Hold each row's keys before its target, as far as they are not yet."""
        known = self._before_holding(targets)
        self._hold_by(None, known)

    def _before_holding(self, targets: list[int]) -> list[tuple[int, int, int, int]]:
        """The NUMBERS of each row, with room in `held` for the keys before its target."""
        after = [max(pair) for pair in zip(targets, self.held_to, strict=True)]
        needs = [first + 1 + n - sealed for first, n, sealed in zip(self.first, after, self.sealed, strict=True)]
        if max(needs, default=0) > self.held.shape[2]:
            recent, held = self._needs(self.lengths, after)
            if any(self.first):
                self._move(recent + SPARE, held + SPARE)
            else:
                self.held = _grown(self.held, held + SPARE, 2)
        return list(zip(self.first, self.sealed, self.held_to, after, strict=True))

    def _hold_by(self, state: torch.Tensor | None, known: list[tuple[int, int, int, int]]) -> None:
        """Hold what the NUMBERS `known` say, which `state` begins with."""
        after = [row[3] for row in known]
        if after == self.held_to:
            return
        state = self._on_device(known) if state is None else state
        batch, heads, slots, D = self.recent.shape
        with on_device(self.recent):
            config = temporal_sparse_hold_config(arch())
            constants = constexprs(D=D, BD=block_of(D), RUN=config.BT, **config.options)
            args = (
                self.recent, self.held, self.threshold, state, heads, slots, self.held.shape[2], state.shape[1],
            )  # fmt: skip
            launch(hold_kernel, (batch * heads,), args, constants)
        self.held_to = after

    # Records.

    def _pack(self, counts: list[int], blocks: int) -> None:
        """Make so many records of each row, the longest of which will have `blocks`."""
        batch, heads, slots, D = self.held.shape
        have = self.where.shape[2]
        if blocks > have:
            room = max(_more(have, blocks), (self.max_len or 0) // RECORD.value)
            self.bits, self.starts, self.where = (_grown(x, room, 2) for x in (self.bits, self.starts, self.where))
        most = max(counts)
        # The first held key of a row is a slot behind its place among the recent ones.
        rows = zip(self.first, self.sealed, counts, strict=True)
        state = self._on_device((first + 1, sealed // RECORD.value, count) for first, sealed, count in rows)
        sizes = torch.zeros(batch, heads, most, dtype=torch.int64, device=self.where.device)
        held = self.held.view(_INTEGERS[self.held.dtype.itemsize])
        shape = (heads, most, slots, self.where.shape[2])
        self._launch(mark_kernel, sizes.numel(), (held, self.bits, self.starts, sizes, state, *shape))
        ends = sizes.flatten().cumsum(0)
        need = self.used + int(ends[-1])  # the host waits here, once in 128 tokens
        if need > self.pool.shape[0]:
            self.pool = _grown(self.pool, _more(self.used, need), 0)
        ends += self.used
        args = (held, self.bits, self.starts, sizes, ends, self.pool.view(held.dtype), self.where, state, *shape)
        self._launch(pack_kernel, sizes.numel(), args)
        self.used = need

    def _drop_records(self) -> None:
        """Copy the records that rows still use, once a third of the pool is of records that none does."""
        sealed = self._on_device((n // RECORD.value,) for n in self.sealed)
        used = torch.arange(self.where.shape[2], device=sealed.device) < sealed.reshape(-1, 1)
        used = used[:, None].expand(self.where.shape[:3])
        kept, which = torch.unique(self.where[used], dim=0, return_inverse=True)
        total = int(kept[:, 1].sum())
        if 3 * total > 2 * self.used:
            return
        starts = kept[:, 1].cumsum(0) - kept[:, 1]
        at = torch.arange(total, device=kept.device)
        self.pool = self.pool[at + torch.repeat_interleave(kept[:, 0] - starts, kept[:, 1], output_size=total)]
        self.used = total
        self.where[used] = torch.stack([starts, kept[:, 1]], 1)[which]

    # Room.

    def _needs(self, lengths: list[int], held_to: list[int]) -> tuple[int, int]:
        """The slots that recent and held keys of the longest row take."""
        sealed = self.sealed
        recent = max((n - s for n, s in zip(lengths, sealed, strict=True)), default=0)
        return recent, max((n - s + 1 for n, s in zip(held_to, sealed, strict=True)), default=1)

    def _make_room(self, ends: list[int]) -> None:
        """Room for rows that grow to these lengths."""
        longest, have = max(ends, default=0), self.values.shape[2]
        if longest > have:
            self.values = _grown(self.values, self.max_len or _more(have, longest), 2)
        last = max((n + shift for n, shift in zip(ends, self._shifts(), strict=True)), default=0)
        if last > self.recent.shape[2]:
            recent, held = self._needs(ends, self.held_to)
            self._move(recent + SPARE, held + SPARE)

    def _move(self, slots: int, held_slots: int) -> None:
        """Bring recent and held keys to the front of buffers of so many slots."""
        recent, held = self._needs(self.lengths, self.held_to)
        first = self._on_device((n,) for n in self.first).reshape(-1, 1)
        self.recent = _moved(self.recent, first, recent, slots)
        self.held = _moved(self.held, first, held, held_slots)
        self.first = [0] * len(self.first)


def _more(have: int, need: int) -> int:
    """The size to grow to: what is there is copied, so by a fair part of it; what is spare is wasted, so by no more."""
    return need if have == 0 else max(need, have + have // 16)


def _grown(x: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """A copy with `size` entries along `dim`, those beyond the old ones not set."""
    shape = list(x.shape)
    shape[dim] = size
    grown = x.new_empty(shape)
    grown.narrow(dim, 0, x.shape[dim]).copy_(x)
    return grown


def _moved(x: torch.Tensor, first: torch.Tensor, live: int, slots: int) -> torch.Tensor:
    """A copy with `slots` slots [B, H, slots, D], of which `live` are those of x from each row's first one on."""
    moved = x.new_empty(*x.shape[:2], slots, x.shape[3])
    if live and x.shape[2]:
        at = (first + torch.arange(live, device=x.device)).clamp(max=x.shape[2] - 1)
        moved[:, :, :live] = x.gather(2, at[:, None, :, None].expand(*x.shape[:2], live, x.shape[3]))
    return moved
