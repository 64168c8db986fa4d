# SPDX-License-Identifier: Apache-2.0
"""What the step loops share: the compute dtype, operand rounding, and the walk over packed sequences."""

import functools
import itertools
from collections.abc import Callable

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else computes in float32."""
    return torch.promote_types(dtype, torch.float32)


def rounding(operand_dtype: torch.dtype | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Round a product's operand to `operand_dtype` and back; the identity for None."""
    if operand_dtype is None:
        return lambda x: x
    return lambda x: x.to(operand_dtype).to(x.dtype)


def sequences(cu_seqlens: torch.Tensor | None, batch: int, length: int) -> list[tuple[slice, slice]]:
    """(batch rows, time steps) of what can run in one loop: the whole batch, or each packed sequence.

    Boundaries that could not be checked are clamped to rise from 0 to `length` at most.
    """
    if cu_seqlens is None:
        return [(slice(0, batch), slice(0, length))]
    bounds = list(itertools.accumulate((min(max(b, 0), length) for b in cu_seqlens.tolist()), max))
    return [(slice(0, 1), slice(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]


def has_autocast(device: str) -> bool:
    """Whether a device type knows autocast."""
    return torch.amp.is_autocast_available(device)


# Traced code sees the answer as a constant: Dynamo of torch 2.11 does not know the question.
has_autocast._dynamo_marked_constant = True


def without_autocast(op: Callable) -> Callable:
    """Decorates an op on tensors of one device: autocast would run its matrix products in low precision.

    The public functions have cast the main tensors by then; the arithmetic inside stays in the compute dtype.
    """

    @functools.wraps(op)
    def run(*args, **options):
        device = next(x.device.type for x in (*args, *options.values()) if isinstance(x, torch.Tensor))
        if not has_autocast(device) or not torch.is_autocast_enabled(device):
            return op(*args, **options)
        with torch.autocast(device, enabled=False):
            return op(*args, **options)

    return run
