# SPDX-License-Identifier: Apache-2.0
"""The native backend of DeltaLLM's cache: `csrc/delta_kv_cache_cpu.cpp` behind `torch.ops.fla_ops`.

`csrc/delta_kv_cache_cpu.h` has the format of a record.
"""

import torch

from fla_ops import _native

_OPS = ("delta_kv_cache_room", "delta_kv_cache_seal", "delta_kv_cache_attend", "delta_kv_cache_held")
_load_error = _native.load(*_OPS)
BLOCK = 64  # keys of a record
SLACK = 64  # bytes that a kernel may read behind a record
SPARE = 64  # room for recent keys beyond the need: they move to the front once in so many tokens


def why_not(device: str, dtype: torch.dtype, *sizes: int) -> str | None:
    """The reason why this backend cannot run, or None."""
    return _load_error


def _more(have: int, need: int) -> int:
    """The size to grow to: what is there is copied, so by a fair part of it; what is spare is wasted, so by no more."""
    return need if have == 0 else max(need, have + have // 16)


class Store:
    """Keys and values of one layer: all values, packed records of the keys that are sealed, the others as they came.

    `recent` holds the keys of row b that are not sealed from slot `first[b]` on; sealing one moves nothing.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, threshold: torch.Tensor, sink: int, max_len: int | None):
        batch, _, heads, D = k.shape
        self.threshold, self.max_len = threshold.contiguous(), max_len
        self.first, self.sealed, self.lengths = [0] * batch, [0] * batch, [0] * batch
        self.recent = k.new_empty(batch, heads, 0, D)
        self.values = v.new_empty(batch, heads, 0, v.shape[3])
        self.sinks = k.new_zeros(batch, heads, sink, D)
        self.hold = k.new_full((batch, heads, D), torch.nan)
        self.records = torch.empty(SLACK, dtype=torch.uint8)
        self.used = 0  # bytes of `records`
        self.places = torch.empty(batch, heads, 0, 2, dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        kept = (self.recent, self.values, self.sinks, self.hold, self.records, self.places, self.threshold)
        return sum(x.nbytes for x in kept)

    def append(self, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None) -> None:
        batch, tokens = k.shape[:2]
        counts = [tokens] * batch if keep is None else keep.sum(1).tolist()
        ends = [n + count for n, count in zip(self.lengths, counts, strict=True)]
        self._make_room(ends)
        slots = [f + n - s for f, n, s in zip(self.first, self.lengths, self.sealed, strict=True)]
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if keep is None and len(set(zip(slots, self.lengths, strict=True))) == 1:  # the rows in one go
            slot, start = slots[0], self.lengths[0]
            self.recent[:, :, slot : slot + tokens] = k
            self.values[:, :, start : start + tokens] = v
            if start < self.sinks.shape[2]:
                sinks = self.sinks[:, :, start : start + tokens]
                sinks.copy_(k[:, :, : sinks.shape[2]])
        else:
            for b in range(batch):
                rows = slice(None) if keep is None else keep[b]
                slot, start, end = slots[b], self.lengths[b], ends[b]
                kept = k[b][:, rows]
                self.recent[b, :, slot : slot + counts[b]] = kept
                self.values[b, :, start:end] = v[b][:, rows]
                if start < self.sinks.shape[2]:
                    sinks = self.sinks[b, :, start:end]
                    sinks.copy_(kept[:, : sinks.shape[1]])
        self.lengths = ends

    def _make_room(self, ends: list[int]) -> None:
        """Room for rows that grow to these lengths."""
        longest, have = max(ends, default=0), self.values.shape[2]
        if longest > have:
            self.values = _grown(self.values, self.max_len or _more(have, longest), 2)
        last = max((f + n - s for f, n, s in zip(self.first, ends, self.sealed, strict=True)), default=0)
        if last > self.recent.shape[2]:
            need = max(n - s for n, s in zip(ends, self.sealed, strict=True))
            self._move_recent(need + SPARE)

    def _move_recent(self, slots: int) -> None:
        """Bring the recent keys to the front of a buffer of so many slots."""
        batch, heads, have, D = self.recent.shape
        moved = self.recent if slots == have else self.recent.new_empty(batch, heads, slots, D)
        for b in range(batch):
            live = self.lengths[b] - self.sealed[b]
            kept = self.recent[b, :, self.first[b] : self.first[b] + live]
            moved[b, :, :live] = kept.clone() if moved is self.recent else kept
        self.recent, self.first = moved, [0] * batch

    def seal(self, exact_from: list[int]) -> None:
        """Pack the whole blocks before these keys, one for each row, which no query will see exactly any more."""
        known = zip(exact_from, self.lengths, self.sealed, strict=True)
        blocks = [max(0, min(first, length) - sealed) // BLOCK for first, length, sealed in known]
        if not any(blocks):
            return
        records, places = _native.ops.delta_kv_cache_seal(self.recent, self._state(), blocks, self.threshold, self.hold)
        need = self.used + records.shape[0] + SLACK
        if need > self.records.shape[0]:
            self.records = _grown(self.records, _more(self.used, need), 0)
        self.records[self.used : need - SLACK] = records
        places[..., 0] += self.used
        self.used = need - SLACK
        ends = [sealed // BLOCK + count for sealed, count in zip(self.sealed, blocks, strict=True)]
        have = self.places.shape[2]
        if max(ends) > have:
            self.places = _grown(self.places, max(_more(have, max(ends)), (self.max_len or 0) // BLOCK), 2)
        for b, new in enumerate(places.split(blocks)):
            self.places[b, :, ends[b] - blocks[b] : ends[b]] = new.transpose(0, 1)
            self.sealed[b] += blocks[b] * BLOCK
            self.first[b] += blocks[b] * BLOCK
        need = max(n - s for n, s in zip(self.lengths, self.sealed, strict=True)) + SPARE
        if self.recent.shape[2] > 2 * need:  # after a long append
            self._move_recent(need)

    def _state(self) -> torch.Tensor:
        rows = zip(self.first, self.sealed, self.lengths, strict=True)
        return torch.tensor(list(rows), dtype=torch.int64).reshape(-1, 3)

    def attend(self, q, positions, *, window, window_mode, scale):
        q = q if q.stride(-1) == 1 else q.contiguous()
        keys = (self.records, self.places, self.recent, self.values, self.sinks, self.hold, self.threshold)
        return _native.ops.delta_kv_cache_attend(
            q, *keys, self._state(), positions, window, window_mode == "block", scale
        )

    def crop(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def reorder(self, indices: list[int]) -> None:
        """Rows of the batch share records that they have in common: those are never written again."""
        index = torch.tensor(indices, dtype=torch.int64)
        for name in ("recent", "values", "sinks", "hold", "places"):
            setattr(self, name, getattr(self, name).index_select(0, index))
        for name in ("first", "sealed", "lengths"):
            kept = getattr(self, name)
            setattr(self, name, [kept[i] for i in indices])
        self._drop_records()

    def _drop_records(self) -> None:
        """Copy the records that rows still use, once a third of all bytes is of records that none does."""
        used = [self.places[b, :, : n // BLOCK].reshape(-1, 2) for b, n in enumerate(self.sealed)]
        kept, where = torch.unique(torch.cat(used) if used else self.places.reshape(-1, 2), dim=0, return_inverse=True)
        if 3 * int(kept[:, 1].sum()) > 2 * self.used:
            return
        parts = [self.records[start : start + size] for start, size in kept.tolist()]
        self.records = torch.cat([*parts, self.records.new_zeros(SLACK)])
        self.used = self.records.shape[0] - SLACK
        kept[:, 0] = kept[:, 1].cumsum(0) - kept[:, 1]
        counts = [x.shape[0] for x in used]
        for b, part in enumerate(where.split(counts)):
            self.places[b, :, : self.sealed[b] // BLOCK] = kept[part].unflatten(0, (self.places.shape[1], -1))

    def to_dense(self, exact_from: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, rows padded with zeros; the keys before `exact_from` held, sinks exact."""
        keys = (self.records, self.places, self.recent, self.hold, self.threshold, self._state())
        k = _native.ops.delta_kv_cache_held(*keys)
        v = self.values[:, :, : k.shape[2]].clone()
        for b, (first, length) in enumerate(zip(exact_from, self.lengths, strict=True)):
            slot = self.first[b] + first - self.sealed[b]
            k[b, :, first:length] = self.recent[b, :, slot : slot + length - first]
            sinks = k[b, :, : min(length, self.sinks.shape[2])]
            sinks.copy_(self.sinks[b, :, : sinks.shape[1]])
            v[b, :, length:] = 0
        return k.transpose(1, 2), v.transpose(1, 2)


def _grown(x: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """A copy with `size` entries along `dim`, those beyond the old ones not set."""
    shape = list(x.shape)
    shape[dim] = size
    grown = _native.ops.delta_kv_cache_room(x, shape)
    grown.narrow(dim, 0, x.shape[dim]).copy_(x)
    return grown
