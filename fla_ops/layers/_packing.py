# SPDX-License-Identifier: Apache-2.0
"""Masked batches as packed sequences: masked tokens leave before anything sees them and come back as zeros."""

import torch

from .. import _checks


def kept_tokens(op: str, mask: torch.Tensor, batch: int, length: int, device: torch.device):
    """(indices, cu_seqlens): where the kept tokens lie in the flattened batch, and the boundaries of its rows."""
    _checks.tensor(op, "attention_mask", mask)
    if mask.is_floating_point() or mask.is_complex():
        raise _checks.bad(TypeError, op, "attention_mask", "a bool or integer tensor, 1 = keep", mask.dtype)
    hint = "It covers the tokens of this call, not those already in the state."
    _checks.shape(op, "attention_mask", mask, {"B": batch, "T": length}, hint)
    keep = mask.to(device) != 0
    indices = keep.flatten().nonzero().squeeze(1)
    counts = keep.sum(1, dtype=torch.int32)
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=cu_seqlens[1:])
    return indices, cu_seqlens


def pack(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """x `[B, T, d]` -> `[1, kept, d]`."""
    return x.flatten(0, 1).index_select(0, indices)[None]


def unpack(y: torch.Tensor, indices: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """y `[1, kept, d]` -> `[B, T, d]`, zero where masked."""
    out = y.new_zeros(batch * length, y.shape[-1])
    return out.index_copy(0, indices, y[0]).unflatten(0, (batch, length))
