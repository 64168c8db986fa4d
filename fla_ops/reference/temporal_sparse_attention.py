# SPDX-License-Identifier: Apache-2.0
"""DeltaLLM's temporal-sparse attention, by its definition, with the T x T matrices.

    k_hat_t = k_t where not |k_t - k_hat_{t-1}| <= threshold, else k_hat_{t-1}      a channel by itself; k_hat_0 = k_0
    s_ij = scale q_i . (k_j if j is in the window of i or a sink, else k_hat_j)
    o_i = sum over j <= i of softmax_j(s_ij) v_j

Qi, Gao, Ren and Chen 2025, arXiv 2507.19608. `temporal_sparse_attention.md` beside this file derives the form that the
kernels use.
"""

import torch

from ._loops import compute_dtype, rounding, sequences, without_autocast


@without_autocast
def temporal_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    threshold: torch.Tensor,
    window: int,
    sink: int = 0,
    window_mode: str = "band",
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    operand_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, fired): as `fla_ops.temporal_sparse_attention`, with a threshold `[HK, D]` and a window in tokens.

    `fired`, int32 `[B, HK, T]`, counts the channels that each key transmits. Differentiable any number of times.
    `operand_dtype` rounds the operands of the matrix products to that dtype while sums and the softmax stay in the
    compute dtype: the yardstick that `fla_ops.testing` measures a low-precision kernel with.
    """
    batch, Tq, heads, D = q.shape
    T, group = k.shape[1], heads // k.shape[2]
    result, dtype = q.dtype, compute_dtype(q.dtype)
    low = rounding(operand_dtype)
    scale = D**-0.5 if scale is None else scale
    dense = window >= T or not bool((threshold > 0).any())
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    i, j = torch.arange(T - Tq, T, device=q.device)[:, None], torch.arange(T, device=q.device)

    o, fired = q.new_zeros(batch, Tq, heads, v.shape[3]), k.new_zeros(batch, T, k.shape[2], dtype=torch.int32)
    for rows, steps in sequences(cu_seqlens, batch, T):
        now = steps if cu_seqlens is not None else slice(0, Tq)  # the rows of q
        last, fired[rows, steps] = last_transmitted(k[rows, steps], threshold.to(dtype))
        keys = k[rows, steps].repeat_interleave(group, 2)
        scores = _products(low(q[rows, now]), low(keys))
        i_, j_ = i[now] - steps.start, j[steps] - steps.start
        if not dense:
            held = k[rows, steps].gather(1, last).repeat_interleave(group, 2)
            exact = in_window(i_, j_, window, window_mode) | (j_ < sink)
            scores = torch.where(exact, scores, _products(low(q[rows, now]), low(held)))
        weights = (scale * scores).masked_fill(j_ > i_, -torch.inf).softmax(-1)
        values = v[rows, steps].repeat_interleave(group, 2)
        o[rows, now] = torch.einsum("bhij,bjhd->bihd", low(weights), low(values))
    return o.to(result), fired.transpose(1, 2)


def _products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bihd,bjhd->bhij", q, k)


def in_window(i: torch.Tensor, j: torch.Tensor, window: int, window_mode: str) -> torch.Tensor:
    """Whether query i sees key j <= i exactly for its window: the last `window` tokens, or its block of so many."""
    return i // window == j // window if window_mode == "block" else i - j < window


@torch.no_grad()
def last_transmitted(k: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The step at which each channel last fired, `[B, T, HK, D]`, and how many fire at each step, `[B, T, HK]`.

    All channels of the first key do. A channel whose change is NaN fires.
    """
    last = torch.zeros(k.shape, dtype=torch.int64, device=k.device)
    fired = torch.ones(k.shape, dtype=torch.bool, device=k.device)
    for t in range(1, k.shape[1]):
        held = k.gather(1, last[:, t - 1 : t])[:, 0]
        fired[:, t] = ~((k[:, t] - held).abs() <= threshold)
        last[:, t] = torch.where(fired[:, t], t, last[:, t - 1])
    return last, fired.sum(-1, dtype=torch.int32)


def statistics(
    fired: torch.Tensor,
    head_dim: int,
    query_length: int,
    *,
    window: int,
    sink: int,
    window_mode: str,
    dense: bool,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(zeros, skipped), float64 `[N, HK]`, from what fired: the share of deltas that are zero, the first key's among
    them, and of the multiply-adds of causal scores that nobody makes.

    A score of a held key costs one for each channel that fired there, any other score D.
    """
    batch, _, T = fired.shape
    zeros, skipped = [], []
    for rows, steps in sequences(cu_seqlens, batch, T):
        length = steps.stop - steps.start
        first = length - query_length if cu_seqlens is None else 0
        j = torch.arange(length, device=fired.device)
        end = (j // window + 1) * window if window_mode == "block" else j + window  # of the queries that see j exactly
        held = (length - end.clamp(min=first)).clamp(min=0)
        held[:sink] = 0
        pairs = (length - j.clamp(min=first)).sum() * head_dim
        idle = head_dim - fired[rows, :, steps].to(torch.float64)
        zeros.append(idle.sum(-1) / max(length * head_dim, 1))
        saved = (idle * held).sum(-1) if not dense else torch.zeros_like(zeros[-1])
        skipped.append(saved / pairs.clamp(min=1))
    if not zeros:
        return (fired.new_zeros(0, fired.shape[1], dtype=torch.float64),) * 2
    return torch.cat(zeros), torch.cat(skipped)
