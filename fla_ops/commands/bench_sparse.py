# SPDX-License-Identifier: Apache-2.0
"""Temporal-sparse attention's part of what is timed: its inputs, how much work a pass is, and what people run today.

`sizes` are B, T, H and D of `fla_ops.temporal_sparse_attention` (as many key heads, DV = D), `W` its window in tokens,
and `zeros` the share of zero deltas in percent.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

import fla_ops

Sizes = dict[str, int]
KEEP = 0.999  # of each key in the next: channels of unit variance that move this slowly have, at a threshold of
THRESHOLDS = {60: 0.040, 80: 0.071, 90: 0.114}  # so many percent zeros


def inputs(sizes: Sizes, dtype: torch.dtype, T: int) -> dict[str, torch.Tensor]:
    """q and v are noise; keys walk, pulled back to the origin, as slowly as a rotary embedding leaves them."""
    shape = (sizes["B"], T, sizes["H"], sizes["D"])
    noise = torch.randn(shape) * (1 - KEEP**2) ** 0.5
    keys = [torch.randn(shape[0], *shape[2:])]
    for t in range(1, T):
        keys.append(KEEP * keys[-1] + noise[:, t])
    return {"q": torch.randn(shape).to(dtype), "k": torch.stack(keys, 1).to(dtype), "v": torch.randn(shape).to(dtype)}


def options(sizes: Sizes) -> dict[str, object]:
    where = "cuda" if torch.cuda.is_available() else "cpu"
    threshold = torch.full((sizes["H"], sizes["D"]), THRESHOLDS[sizes["zeros"]], device=where)
    return {"threshold": threshold, "window": sizes["W"]}


def work(sizes: Sizes, size: int, backward: bool) -> tuple[float, float]:
    """(floating-point operations, bytes) of a pass on elements of `size` bytes: those of dense causal attention, which
    the zeros save a part of; backward has five products where the forward has two. Bytes are each tensor once."""
    B, T, H, D = (sizes[name] for name in ("B", "T", "H", "D"))
    flops = 2 * 2 * B * H * D * T * (T + 1) / 2
    moved = 4 * B * T * H * D * size
    return flops * (3.5 if backward else 1), moved * (3 if backward else 1)


def baselines() -> dict[str, Callable[..., torch.Tensor]]:
    """Exact attention: our own kernel, and torch's. Their results differ from the sparse ones', as they must."""

    def exact(q, k, v):
        return fla_ops.temporal_sparse_attention(q, k, v, threshold=0.0, window=1).o

    def sdpa(q, k, v):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    return {"fla_ops exact (threshold 0)": exact, "torch SDPA (exact)": sdpa}
