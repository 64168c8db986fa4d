# SPDX-License-Identifier: Apache-2.0
"""Tokens sorted by a learned importance, softly (arXiv 2410.03292, refinement 2)."""

import math

import torch
from torch import nn


def soft_sort(scores: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The matrix `[..., L, L]` that nearly sorts by increasing score (SoftSort, arXiv 2006.16038, with p = 1).

        P_ij = softmax_j(-|sorted(scores)_i - scores_j| / temperature)

    Each row sums to 1. As the temperature goes to zero P becomes the permutation that sorts.
    """
    ordered = scores.sort(-1).values
    return (-(ordered[..., :, None] - scores[..., None, :]).abs() / temperature).softmax(-1)


class TokenReorder(nn.Module):
    """x <- P x, where P softly sorts a sequence by increasing score kappa . delta, and delta is dt_proj's output.

    Every output depends on every token, so this is not causal. Time and memory grow as L^2.

    Args:
        channels: the size Di of tokens and deltas.

    Parameters: `weight` `[Di]`, kappa.
    """

    def __init__(self, channels: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the weight of an `nn.Linear` with one output."""
        bound = 1 / math.sqrt(self.weight.shape[0])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """x, delta `[B, L, Di]` -> `[B, L, Di]`. delta's bias is of no effect: it shifts all scores alike."""
        dtype = torch.promote_types(delta.dtype, torch.float32)
        # A product and a sum instead of a matrix product, which autocast would run in low precision.
        scores = (delta.to(dtype) * self.weight.to(dtype)).sum(-1)
        return soft_sort(scores).to(x.dtype) @ x

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}"
