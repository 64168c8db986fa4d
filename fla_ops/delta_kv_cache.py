# SPDX-License-Identifier: Apache-2.0
"""DeltaLLM's key and value cache for decoding: keys outside of a window are held, and stored by what changed."""

from typing import NamedTuple

import torch

from . import _checks, _sparse_options
from ._backend import Backend, resolve

_BACKENDS = (
    Backend("triton", "fla_ops.kernels.delta_kv_cache", ("cuda",), on_request=("cpu",), switch="TRITON_INTERPRET"),
    Backend("native", "fla_ops._native.delta_kv_cache", devices=("cpu",)),
    Backend("reference", "fla_ops.reference.delta_kv_cache"),
)


class DenseKV(NamedTuple):
    """A cache written out: k `[B, T, HK, D]`, v `[B, T, HK, DV]`, T the longest row's tokens, zeros behind others."""

    k: torch.Tensor
    v: torch.Tensor


class DeltaKVCache:
    r"""The keys and values of one attention layer, for inference, with temporally sparse keys.

    A key channel is held until it moves by more than a threshold (arXiv 2507.19608):

        K_hat[t, c] = K[t, c] if not |K[t, c] - K_hat[t-1, c]| <= theta[c], else K_hat[t-1, c]

    A query reads the keys of its window, and the first `sink` keys, exactly; of the others it reads K_hat. Softmax and
    values are those of plain attention. Keys that no query sees exactly any more are stored as a bitmap and the values
    that fired, in the model's dtype: K_hat comes back bit for bit, and nothing drifts. Every 64th held key (on a
    GPU every 128th) is stored whole, so that a decode step can be split over the sequence. The newest keys are kept as
    they are: what the window of the next attention needs, and up to 63 (127) more.

    Any interleaving of prefill, appends of many tokens and of one gives the same answer.

    Args:
        threshold: theta, a float or a float tensor that broadcasts to `[HK, D]`; not negative. 0 is exact attention.
        window: tokens of the exact window, the newest included; or a float in (0, 1], that part of the first append's
            tokens, from then on fixed: max(1, round(window * T)).
        sink: how many first keys stay exact.
        window_mode: "band", the exact keys j of query i are those with i - j < window; or "block", those with
            j // window == i // window.
        max_len: tokens a row may come to. Memory for their values is taken at once. None: no limit, it grows.
        rollback: how many of the last tokens `crop` can always take back. That many keys more are kept as they are.
        backend: "auto", "triton", "native" or "reference" (which keeps every key); a named one runs or raises.

    Raises:
        ValueError, TypeError: a wrong value or type; the message names the argument.
    """

    def __init__(
        self,
        *,
        threshold: float | torch.Tensor,
        window: int | float,
        sink: int = 0,
        window_mode: str = "band",
        max_len: int | None = None,
        rollback: int = 0,
        backend: str = "auto",
    ):
        op = "DeltaKVCache"
        self.threshold, _ = _sparse_options.threshold(op, threshold)
        self._asked_window = _sparse_options.window(op, window)
        self.sink = _checks.count(op, "sink", sink, 0)
        self.window_mode = _sparse_options.window_mode(op, window_mode)
        self.max_len = None if max_len is None else _checks.count(op, "max_len", max_len, 1)
        self.rollback = _checks.count(op, "rollback", rollback, 0)
        self.backend = backend
        self.reset()

    def reset(self) -> None:
        """Forget everything, the window that the first append fixed included."""
        self.window: int | None = None  # in tokens, known from the first append on
        self.length = 0  # tokens appended, masked ones included
        self._store = None
        self._positions: torch.Tensor | None = None  # of the queries that may come, `[B, queries]`, on the host
        self._kept: torch.Tensor | None = None  # which of `length` tokens were not masked, `[B, length]`; None: all

    @property
    def lengths(self) -> torch.Tensor:
        """The tokens that each row holds, int64 `[B]`; empty before the first append."""
        return torch.tensor(self._store.lengths if self._store else [], dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """The bytes of all memory that the cache holds, room to grow included."""
        return self._store.nbytes if self._store else 0

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        queries: int | None = None,
    ) -> None:
        """Add the keys and values of new tokens. They are copied.

        Args:
            k: keys as attention uses them (after RoPE), `[B, T, HK, D]`, or one token's `[B, HK, D]`. The first append
                fixes all sizes, the dtype (float32, bfloat16, float16 or float64) and the device.
            v: values, `[B, T, HK, DV]` or `[B, HK, DV]`.
            mask: bool or integer `[B, T]`, 0 for padding, which is dropped: a row is as it would be alone.
            queries: how many of the last tokens `attend` will be asked for, T by default. A prefill whose attention is
                computed elsewhere says 1, and is packed at once.

        Raises:
            ValueError, TypeError: a wrong shape, value, dtype or type; a row would exceed max_len.
            RuntimeError: an input requires a gradient while grad mode is on; or the named backend cannot run.
        """
        op = "DeltaKVCache.append"
        _checks.inference_only(op, "temporal_sparse_attention is differentiable.", k, v)
        _checks.main_tensors(op, "k", k=k, v=v)
        if k.dim() == 3 and v.dim() == 3:
            k, v = k.unsqueeze(1), v.unsqueeze(1)
        self._check_tokens(op, k, v)
        batch, tokens = k.shape[:2]
        keep = self._check_mask(op, mask, k)
        queries = tokens if queries is None else _checks.count(op, "queries", queries, 0, tokens)
        before = self._store.lengths if self._store else [0] * batch
        counts = [tokens] * batch if keep is None else keep.sum(1).tolist()
        if self.max_len and any(n + count > self.max_len for n, count in zip(before, counts, strict=True)):
            most = max(n + count for n, count in zip(before, counts, strict=True))
            hint = f"A row would hold {most}."
            raise _checks.bad(
                ValueError, op, "k", f"of no more tokens than max_len={self.max_len} allows", tokens, hint
            )
        if self._store is None:
            self._start(k, v)
        self._store.append(k, v, keep)
        self._remember(keep, batch, tokens)
        self._positions = _positions(before, keep, tokens)[:, tokens - queries :].contiguous()
        known = zip(self._first_queries(), self._store.lengths, strict=True)
        self._store.seal(self._exact_from([max(0, min(first, n - self.rollback)) for first, n in known]))

    def attend(self, q: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
        """Attention of the newest tokens, whose keys were appended before.

        Args:
            q: `[B, Tq, HQ, D]`, the last Tq tokens of the last append, or one token's `[B, HQ, D]`. HQ is a multiple of
                HK; query head h reads key head h // (HQ / HK).
            scale: of the scores, default D**-0.5.

        Returns:
            o `[B, Tq, HQ, DV]` or `[B, HQ, DV]`, 0 for masked tokens; float32 arithmetic (float64 for float64).

        Raises:
            ValueError, TypeError: a wrong shape, value, dtype or type.
            RuntimeError: nothing was appended; or q requires a gradient while grad mode is on.
        """
        op = "DeltaKVCache.attend"
        _checks.inference_only(op, "temporal_sparse_attention is differentiable.", q)
        if self._store is None or self._positions is None:
            raise RuntimeError(f"{op}: there are no new tokens. Append their keys and values first.")
        step = isinstance(q, torch.Tensor) and q.dim() == 3
        q = q.unsqueeze(1) if step else q
        self._check_queries(op, q)
        scale = _checks.scale_or_default(op, scale, q.shape[3])
        positions = self._positions[:, self._positions.shape[1] - q.shape[1] :].contiguous()
        options = {"window": self.window, "window_mode": self.window_mode, "scale": scale}
        o = self._store.attend(q, positions, **options)
        return o.squeeze(1) if step else o

    def to_dense(self) -> DenseKV:
        """The keys as the next token's query will see them, held outside of its window, and the values."""
        if self._store is None:
            raise RuntimeError("DeltaKVCache.to_dense: the cache is empty. Append keys and values first.")
        return DenseKV(*self._store.to_dense(self._exact_from(self._store.lengths)))

    def crop(self, length: int) -> None:
        """Take back the last tokens: keep the first `length`, or drop -`length` where it is negative.

        Masked tokens count. All of the last append can be taken back, if `queries` was not given, and the last
        `rollback` tokens; further only while the window of the next token has not been packed. 0 drops everything.
        """
        op = "DeltaKVCache.crop"
        if isinstance(length, bool) or not isinstance(length, int):
            raise _checks.bad(TypeError, op, "length", "an int", repr(length))
        asked, length = length, length + self.length if length < 0 else length
        if not 0 <= length <= self.length:
            raise _checks.bad(ValueError, op, "length", f"in {-self.length}..{self.length}", asked)
        if self._store is None or length == self.length:
            return
        dropped = [self.length - length] * len(self._store.lengths)
        if self._kept is not None:
            dropped = self._kept[:, length:].sum(1).tolist()
        lengths = [n - count for n, count in zip(self._store.lengths, dropped, strict=True)]
        if length == 0:
            self._store, self._positions, self._kept, self.length = None, None, None, 0
            return
        known = zip(self._exact_from(lengths), self._store.sealed, lengths, strict=True)
        if any(first < sealed or n < sealed for first, sealed, n in known):
            hint = "The exact keys before the tokens to keep have been packed."
            raise _checks.bad(ValueError, op, "length", f"nearer to {self.length}, or 0", asked, hint)
        self._store.crop(lengths)
        self._positions, self.length = None, length
        self._kept = None if self._kept is None else self._kept[:, :length]

    def reorder(self, indices: torch.Tensor) -> None:
        """Make row i what row indices[i] was: int32 or int64 `[M]`, repeats allowed, as beam search needs it."""
        op = "DeltaKVCache.reorder"
        _checks.tensor(op, "indices", indices)
        if indices.dtype not in _checks.INDEX_DTYPES:
            raise _checks.bad(TypeError, op, "indices", "an int32 or int64 tensor", indices.dtype)
        _checks.shape(op, "indices", indices, {"M": None})
        if self._store is None:
            return
        rows, batch = indices.tolist(), len(self._store.lengths)
        if any(not 0 <= i < batch for i in rows):
            raise _checks.bad(ValueError, op, "indices", f"in 0..{batch - 1}", rows)
        self._store.reorder(rows)
        for name in ("_positions", "_kept"):
            x = getattr(self, name)
            setattr(self, name, None if x is None else x[rows])
        self._sizes = (len(rows), *self._sizes[1:])

    def _start(self, k, v) -> None:
        """What the first append fixes."""
        heads, D = k.shape[2:]
        if self.window is None:
            self.window = _sparse_options.in_tokens(self._asked_window, k.shape[1])
        threshold = _sparse_options.per_channel("DeltaKVCache", self.threshold, k).to(k.device)
        impl = resolve("delta_kv_cache", self.backend, k.device.type, k.dtype, D, v.shape[3])
        self._store = impl.Store(k, v, threshold, self.sink, self.max_len)
        self._sizes = (k.shape[0], heads, D, v.shape[3])
        self._dtype, self._device = k.dtype, k.device

    def _check_tokens(self, op, k, v) -> None:
        if k.dim() != 4:
            raise _checks.bad(ValueError, op, "k", "of shape [B, T, HK, D] or [B, HK, D]", list(k.shape))
        known = dict(zip(("B", "HK", "D", "DV"), self._sizes if self._store else (None,) * 4, strict=True))
        _checks.shape(op, "k", k, {"B": known["B"], "T": None, "HK": known["HK"], "D": known["D"]})
        expected = dict(zip(("B", "T", "HK"), k.shape, strict=False))
        _checks.shape(op, "v", v, expected | {"DV": known["DV"]})
        for name, x in (("k", k), ("v", v)):
            if x.shape[2] == 0 or x.shape[3] == 0:
                raise _checks.bad(ValueError, op, name, "of a head count and dimension >= 1", list(x.shape))
        if self._store:
            self._check_like(op, "k", k)
        else:
            _sparse_options.per_channel("DeltaKVCache", self.threshold, k)

    def _check_like(self, op, name, x) -> None:
        if x.dtype != self._dtype:
            raise _checks.bad(TypeError, op, name, f"{self._dtype} as the first append", x.dtype)
        if x.device != self._device:
            raise ValueError(f"{op}: all tensors must be on one device, got {name}: {x.device}, cache: {self._device}.")

    def _check_mask(self, op, mask, k):
        """The mask as bool, None where nothing is masked."""
        if mask is None:
            return None
        _checks.tensor(op, "mask", mask)
        if mask.dtype.is_floating_point or mask.dtype.is_complex:
            raise _checks.bad(TypeError, op, "mask", "of bool or an integer dtype", mask.dtype)
        _checks.shape(op, "mask", mask, {"B": k.shape[0], "T": k.shape[1]})
        _checks.same_device(op, "k", k=k, mask=mask)
        keep = mask != 0
        return None if bool(keep.all()) else keep

    def _check_queries(self, op, q) -> None:
        _checks.main_tensors(op, "q", q=q)
        self._check_like(op, "q", q)
        if q.dim() != 4:
            raise _checks.bad(ValueError, op, "q", "of shape [B, Tq, HQ, D] or [B, HQ, D]", list(q.shape))
        batch, heads, D, _ = self._sizes
        _checks.shape(op, "q", q, {"B": batch, "Tq": None, "HQ": None, "D": D})
        if q.shape[2] % heads or q.shape[2] == 0:
            raise _checks.bad(ValueError, op, "q", f"of a head count that is a multiple of HK={heads}", q.shape[2])
        if q.shape[1] > self._positions.shape[1]:
            hint = "They are the last append's tokens, or the `queries` that it promised."
            raise _checks.bad(ValueError, op, "q", f"of at most {self._positions.shape[1]} tokens", q.shape[1], hint)

    def _remember(self, keep, batch: int, tokens: int) -> None:
        """Which tokens were masked, kept from the first masked one on: `crop` counts them."""
        if keep is not None and self._kept is None:
            self._kept = torch.ones(batch, self.length, dtype=torch.bool, device=keep.device)
        if self._kept is not None:
            new = self._kept.new_ones(batch, tokens) if keep is None else keep
            self._kept = torch.cat([self._kept, new], 1)
        self.length += tokens

    def _first_queries(self) -> list[int]:
        """The position of each row's first query that may come; that of the next token where none may."""
        firsts = torch.where(self._positions < 0, torch.iinfo(torch.int64).max, self._positions)
        if firsts.shape[1] == 0:
            return self._store.lengths
        return [min(a, b) for a, b in zip(firsts.amin(1).tolist(), self._store.lengths, strict=True)]

    def _exact_from(self, positions: list[int]) -> list[int]:
        """The first key that a query at these positions sees exactly, sinks aside."""
        w = self.window
        if self.window_mode == "block":
            return [i // w * w for i in positions]
        return [max(0, i - w + 1) for i in positions]

    def __repr__(self) -> str:
        size = f"{self.length} tokens, {self.nbytes:,} bytes"
        return f"DeltaKVCache({size}, window={self.window or self._asked_window}, sink={self.sink})"


def _positions(before: list[int], keep: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """`[B, T]`: where in their rows the tokens came to lie, -1 for those dropped."""
    start = torch.tensor(before, dtype=torch.int64)[:, None]
    if keep is None:
        return start + torch.arange(tokens)
    keep = keep.cpu()
    return torch.where(keep, start + keep.cumsum(1) - 1, -1)
