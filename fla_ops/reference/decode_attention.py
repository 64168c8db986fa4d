# SPDX-License-Identifier: Apache-2.0
"""Dense attention of the last tokens over a cache of keys and values, with the whole matrix of scores.

    s_ij = scale q_i . k_j  for every key j up to token i's own
    o_i  = sum_j softmax(s_i)_j v_j

Vaswani et al. 2017, arXiv 1706.03762, equation 1; query head h reads key head h // (HQ / HK).
"""

import torch

from ._loops import compute_dtype, rounding, without_autocast


@without_autocast
def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    scale: float,
    operand_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Shapes and meaning as `fla_ops.exact_decode_attention`, q always `[B, Tq, HQ, D]`.

    `operand_dtype` rounds the operands of both products to that dtype: the yardstick that `fla_ops.testing` measures a
    low-precision kernel with.
    """
    tokens, heads, length = q.shape[1], q.shape[2], k.shape[1]
    dtype = compute_dtype(q.dtype)
    low = rounding(operand_dtype)
    q, keys, values = (low(x.to(dtype)) for x in (q, k, v))
    keys, values = (x.repeat_interleave(heads // x.shape[2], 2) for x in (keys, values))
    scores = torch.einsum("bihd,bjhd->bhij", q, keys) * scale
    weights, seen = softmax_over(scores, visible(lengths, k.shape[0], tokens, length, k.device))
    # What no query sees has no part in a product: it may be NaN.
    values = torch.where(seen.any(-2)[:, 0, :, None, None], values, 0)
    return torch.einsum("bhij,bjhd->bihd", low(weights), values).to(v.dtype)


def visible(lengths: torch.Tensor | None, batch: int, tokens: int, length: int, device: torch.device) -> torch.Tensor:
    """`[B, 1, Tq, T]`: which keys each of the last tokens sees. Lengths are clamped to what is there."""
    if lengths is None:
        lengths = torch.full((batch,), length, device=device)
    last = lengths.to(torch.int64).clamp(0, length)[:, None] - tokens + torch.arange(tokens, device=device) + 1
    return (torch.arange(length, device=device) < last[..., None])[:, None]


def softmax_over(scores: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax over the keys that are seen, 0 for a query that sees none; and `seen`."""
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
    return weights.masked_fill(~seen, 0), seen
