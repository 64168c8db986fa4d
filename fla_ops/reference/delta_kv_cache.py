# SPDX-License-Identifier: Apache-2.0
"""DeltaLLM's cache by its definition, every key kept: the held keys, which keys are exact, and both matrices of scores.

    K_hat[t, c] = K[t, c] if not |K[t, c] - K_hat[t - 1, c]| <= theta[c], else K_hat[t - 1, c]
    s_ij = scale q_i . (K[j] where query i sees key j exactly, else K_hat[j])

Qi, Gao, Ren and Chen 2025, arXiv 2507.19608. Query i sees key j exactly for i - j < window (mode "band"), or for
i // window == j // window ("block", the authors' code), and for the first `sink` keys.
"""

import torch

from ._loops import compute_dtype, rounding, without_autocast
from .decode_attention import softmax_over


def hold(k: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """K_hat of keys `[B, T, HK, D]` for a threshold that broadcasts to `[HK, D]`; the first key is its own."""
    dtype = compute_dtype(k.dtype)
    threshold = threshold.to(dtype)
    held, last = [], None
    for key in k.unbind(1):
        if last is not None:
            change = (key.to(dtype) - last.to(dtype)).abs()
            key = torch.where(change <= threshold, last, key)
        held.append(key)
        last = key
    return torch.stack(held, 1) if held else k.clone()


def first_exact(position: int, window: int, window_mode: str) -> int:
    """The first key that a query at this position sees exactly, sinks aside."""
    return position // window * window if window_mode == "block" else max(0, position - window + 1)


@without_autocast
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    k_hat: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    *,
    window: int,
    window_mode: str,
    sink: int,
    scale: float,
    operand_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Attention of queries `[B, Tq, HQ, D]` at `positions` `[B, Tq]` (-1: none, the output is 0) over all keys."""
    dtype = compute_dtype(q.dtype)
    low = rounding(operand_dtype)
    heads, j = q.shape[2], torch.arange(k.shape[1], device=k.device)
    i = positions[..., None]
    near = i // window == j // window if window_mode == "block" else i - j < window
    exact, seen = (near | (j < sink))[:, None], (j <= i)[:, None]
    q, keys, held, values = (low(x.to(dtype)) for x in (q, k, k_hat, v))
    keys, held, values = (x.repeat_interleave(heads // x.shape[2], 2) for x in (keys, held, values))
    scores = (torch.einsum("bihd,bjhd->bhij", q, x) * scale for x in (keys, held))
    weights, seen = softmax_over(torch.where(exact, *scores), seen)
    values = torch.where(seen.any(-2)[:, 0, :, None, None], values, 0)
    return torch.einsum("bhij,bjhd->bihd", low(weights), values).to(v.dtype)


class Store:
    """What `fla_ops.DeltaKVCache` keeps, as `fla_ops._native.delta_kv_cache.Store` does, but dense."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, threshold: torch.Tensor, sink: int, max_len: int | None):
        batch = k.shape[0]
        self.threshold, self.sink = threshold, sink
        self.keys = [k.new_empty(0, *k.shape[2:]) for _ in range(batch)]
        self.values = [v.new_empty(0, *v.shape[2:]) for _ in range(batch)]
        self.sealed = [0] * batch  # keys that no query may see exactly any more

    @property
    def lengths(self) -> list[int]:
        return [x.shape[0] for x in self.keys]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.keys, *self.values, self.threshold))

    def append(self, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None) -> None:
        for b in range(k.shape[0]):
            rows = slice(None) if keep is None else keep[b]
            self.keys[b] = torch.cat([self.keys[b], k[b, rows]])
            self.values[b] = torch.cat([self.values[b], v[b, rows]])

    def seal(self, exact_from: list[int]) -> None:
        self.sealed = [max(old, new) for old, new in zip(self.sealed, exact_from, strict=True)]

    def attend(self, q, positions, *, window, window_mode, scale):
        rows, positions = [], positions.to(q.device)
        for b in range(q.shape[0]):
            k, v = self.keys[b][None], self.values[b][None]
            options = {"window": window, "window_mode": window_mode, "sink": self.sink, "scale": scale}
            rows.append(attention(q[b : b + 1], k, hold(k, self.threshold), v, positions[b : b + 1], **options))
        return torch.cat(rows) if rows else q.new_empty(*q.shape[:3], self.values[0].shape[-1])

    def crop(self, lengths: list[int]) -> None:
        self.keys = [x[:n] for x, n in zip(self.keys, lengths, strict=True)]
        self.values = [x[:n] for x, n in zip(self.values, lengths, strict=True)]

    def reorder(self, indices: list[int]) -> None:
        self.keys, self.values, self.sealed = ([x[i] for i in indices] for x in (self.keys, self.values, self.sealed))

    def to_dense(self, exact_from: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, rows padded with zeros; the keys before `exact_from` held, sinks exact."""
        keys = []
        for k, first in zip(self.keys, exact_from, strict=True):
            held = hold(k[None], self.threshold)[0]
            held[first:], held[: self.sink] = k[first:], k[: self.sink]
            keys.append(held)
        return tuple(torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (keys, self.values))
