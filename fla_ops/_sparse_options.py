# SPDX-License-Identifier: Apache-2.0
"""The options that DeltaLLM's attention and its cache share: which keys are held, and which are exact."""

import math

import torch

from . import _checks


def threshold(op: str, x: float | torch.Tensor, name: str = "threshold") -> tuple[float | torch.Tensor, bool]:
    """A key channel's least change, checked but for its shape, and whether all of it is known to be 0."""
    if isinstance(x, torch.Tensor):
        if x.dtype not in _checks.MAIN_DTYPES:
            raise _checks.bad(TypeError, op, name, "a floating tensor", x.dtype)
        x = x.detach()
        return x, _checks.non_negative(op, name, x)
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise _checks.bad(TypeError, op, name, "a number or a tensor", repr(x))
    if math.isnan(x) or x < 0:
        raise _checks.bad(ValueError, op, name, ">= 0", x)
    return float(x), x == 0


def check_shape(op: str, x: torch.Tensor, heads: int, D: int, name: str = "threshold") -> None:
    sizes = tuple(x.shape)
    padded = (1,) * (2 - len(sizes)) + sizes
    if len(padded) != 2 or any(size not in (1, full) for size, full in zip(padded, (heads, D), strict=True)):
        hint = "It looks like [D, HK]: transpose(0, 1)." if sizes == (D, heads) else ""
        raise _checks.bad(ValueError, op, name, f"broadcastable to [HK={heads}, D={D}]", list(sizes), hint)


def per_channel(op: str, x: float | torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The threshold for keys `[B, T, HK, D]`: `[HK, D]`, contiguous, in the dtype of the comparison."""
    dtype, shape = torch.promote_types(k.dtype, torch.float32), tuple(k.shape[2:])
    if not isinstance(x, torch.Tensor):
        return torch.full(shape, x, dtype=dtype, device=k.device)
    check_shape(op, x, *shape)
    return x.to(dtype).expand(shape).contiguous()


def window(op: str, x: int | float) -> int | float:
    """Tokens, or a share of the sequence."""
    name = "window"
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise _checks.bad(TypeError, op, name, "an int or a float in (0, 1]", repr(x))
    if isinstance(x, int):
        return _checks.count(op, name, x, 1)
    if not 0 < x <= 1:
        hint = "A float is a share of T; give an int for tokens."
        raise _checks.bad(ValueError, op, name, "an int >= 1 or a float in (0, 1]", x, hint)
    return x


def in_tokens(window: int | float, length: int) -> int:
    return max(1, round(window * length)) if isinstance(window, float) else window


def window_mode(op: str, x: str) -> str:
    if x not in ("band", "block"):
        raise _checks.bad(ValueError, op, "window_mode", '"band" or "block"', repr(x))
    return x
