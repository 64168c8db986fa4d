# SPDX-License-Identifier: Apache-2.0
"""Decoding into a peer's convolution cache, which may keep more columns than the W - 1 that the convolution reads."""

import torch

from ..causal_conv1d import causal_conv1d_step


def weight_for(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor | None:
    """A weight or bias in a dtype that the op takes beside x: x's own or float32."""
    if weight is None or weight.dtype in (x.dtype, torch.float32):
        return weight
    return weight.to(torch.promote_types(x.dtype, torch.float32))


def step(
    x: torch.Tensor,
    cache: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token x `[B, D]` through `cache` `[B or slots, D, S]`, S >= W - 1: all S columns shift left, x enters last.

    `indices` `[B]` picks the slots; a negative one is skipped: output 0, cache untouched.
    """
    weight, bias = weight_for(x, weight), weight_for(x, bias)
    extra = cache.shape[-1] - (weight.shape[-1] - 1)
    if extra:
        # The step shifts the view of the last W - 1 columns; the ones before it take their right neighbours first.
        rows = slice(None) if indices is None else indices[indices >= 0].long()
        inputs = x if indices is None else x[indices >= 0]
        older = torch.cat([cache[rows], inputs[:, :, None].to(cache.dtype)], 2)[:, :, 1 : extra + 1]
    y = causal_conv1d_step(
        x,
        weight,
        bias,
        state=cache[:, :, extra:],
        activation=activation,
        state_indices=None if indices is None else indices.clamp(min=-1),
    )
    if extra:
        cache[rows, :, :extra] = older
    return y
