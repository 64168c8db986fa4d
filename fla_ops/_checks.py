# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by every op: O(1) host work before any launch, one form of message.

`op: argument 'name' must be X, got Y. Hint.` A wrong shape or value is a ValueError, a wrong dtype or type a TypeError.
"""

import math
import operator
from collections.abc import Callable

import torch

from .reference._loops import has_autocast

MAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)

_values_checked = False


def check_values(on: bool) -> None:
    """Check the values inside device tensors too (`cu_seqlens`, `state_indices`), at the price of a device sync a call.

    CPU tensors are always checked. Off by default: kernels clamp what they read, so that bad values never touch memory
    outside of the tensors.
    """
    global _values_checked
    _values_checked = bool(on)


def bad(error: type[Exception], op: str, name: str, expected: str, got: object, hint: str = ""):
    """The one form of an argument error."""
    return error(f"{op}: argument '{name}' must be {expected}, got {got}.{' ' + hint if hint else ''}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(op: str, name: str, x: object) -> None:
    if not isinstance(x, torch.Tensor):
        raise bad(TypeError, op, name, "a tensor", type(x).__name__)


def main_tensors(op: str, first: str, **tensors: torch.Tensor) -> None:
    """All main tensors share one supported dtype and one device, those of the tensor named `first`."""
    lead = tensors[first]
    tensor(op, first, lead)
    if lead.dtype not in MAIN_DTYPES:
        raise bad(TypeError, op, first, f"one of {_names(MAIN_DTYPES)}", lead.dtype)
    for name, x in tensors.items():
        tensor(op, name, x)
        if x.dtype != lead.dtype:
            raise bad(
                TypeError,
                op,
                name,
                f"{lead.dtype} to match '{first}'",
                x.dtype,
                "Cast one, or run under autocast.",
            )
    same_device(op, first, **tensors)


def same_device(op: str, first: str, **tensors: torch.Tensor | None) -> None:
    lead = tensors[first].device
    for x in tensors.values():
        if x is not None and x.device != lead:
            found = ", ".join(f"{n}: {t.device}" for n, t in tensors.items() if t is not None)
            raise ValueError(f"{op}: all tensors must be on one device, got {found}.")


def side_tensor(op: str, name: str, x: object, main: torch.dtype) -> None:
    """A gate, weight or bias: the main dtype or float32."""
    tensor(op, name, x)
    if x.dtype not in (main, torch.float32):
        legal = f"{main} or torch.float32" if main != torch.float32 else "torch.float32"
        raise bad(TypeError, op, name, legal, x.dtype)


def shape(
    op: str, name: str, x: torch.Tensor, expected: dict[str, int | None], hint: str | Callable[[], str] = ""
) -> None:
    """`expected` maps each dimension's letter to its size, None for any.

    A hint that compares sizes is a function, called on failure alone: what traced code compares becomes a guard.
    """
    sizes, found = tuple(expected.values()), x.shape
    if found == sizes:  # the common case, and far cheaper than looking for None
        return
    if len(found) == len(sizes) and all(e is None or e == s for e, s in zip(sizes, found, strict=True)):
        return
    want = ", ".join(k if v is None else f"{k}={v}" for k, v in expected.items())
    raise bad(ValueError, op, name, f"of shape [{want}]", list(x.shape), hint() if callable(hint) else hint)


def flag(op: str, name: str, x: object) -> None:
    if not isinstance(x, bool):
        raise bad(TypeError, op, name, "True or False", repr(x))


def scale_or_default(op: str, scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5 if head_dim else 1.0
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise bad(TypeError, op, "scale", "a float or None", repr(scale))
    if not math.isfinite(scale):
        raise bad(ValueError, op, "scale", "finite", scale)
    return float(scale)


def count(op: str, name: str, x: object, least: int, most: int | None = None) -> int:
    if isinstance(x, bool) or not isinstance(x, int):
        raise bad(TypeError, op, name, "an int", repr(x))
    if x < least or (most is not None and x > most):
        raise bad(ValueError, op, name, f"at least {least}" if most is None else f"in {least}..{most}", x)
    return x


def threshold(op: str, x: float | torch.Tensor, name: str = "threshold") -> float | torch.Tensor:
    """A key channel's least change, not negative; a tensor's shape is checked where the heads are known."""
    want = "a float or a float tensor"
    if isinstance(x, torch.Tensor):
        if not x.dtype.is_floating_point:
            raise bad(TypeError, op, name, want, x.dtype)
        if _can_read(x) and not bool((x >= 0).all()):
            raise bad(ValueError, op, name, "free of negative values and NaN", f"a minimum of {x.min().item()}")
        return x
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise bad(TypeError, op, name, want, repr(x))
    if not x >= 0:
        raise bad(ValueError, op, name, "at least 0", x)
    return float(x)


def window(op: str, x: int | float) -> int | float:
    """Tokens, or a part of the sequence."""
    name = "window"
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise bad(TypeError, op, name, "an int or a float in (0, 1]", repr(x))
    if isinstance(x, int) and x < 1:
        raise bad(ValueError, op, name, "at least 1 token", x)
    if isinstance(x, float) and not 0 < x <= 1:
        raise bad(ValueError, op, name, "an int, or a float in (0, 1]", x)
    return x


def _can_read(x: torch.Tensor) -> bool:
    """Whether looking at values is allowed: never while tracing, on a device only if asked for."""
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or (_values_checked and x.device.type != "meta")


def non_negative(op: str, name: str, x: torch.Tensor) -> bool:
    """Check the values of a tensor where they can be read; whether all of them are known to be 0."""
    if not _can_read(x):
        return False
    if not bool((x >= 0).all()):
        raise bad(ValueError, op, name, ">= 0 everywhere", x[~(x >= 0)][0].item())
    return not bool(x.any())


def cu_seqlens(
    op: str, x: torch.Tensor | None, batch: int, length: int, device: torch.device, time: str = "T", count: str = "N"
):
    """Check packed-sequence boundaries and return them on `device` (None stays None).

    `time` is the letter of the packed axis, `count` that of the number of sequences.
    """
    if x is None:
        return None
    name = "cu_seqlens"
    tensor(op, name, x)
    if x.dtype not in INDEX_DTYPES:
        raise bad(TypeError, op, name, "an int32 or int64 tensor", x.dtype)
    if x.dim() != 1 or x.shape[0] < 1:
        raise bad(ValueError, op, name, f"of shape [{count}+1]", list(x.shape))
    if batch != 1:
        raise bad(
            ValueError,
            op,
            name,
            "given with B=1 only",
            f"B={batch}",
            f"Put the sequences behind one another along {time} first.",
        )
    if _can_read(x):
        bounds = x.tolist()
        steps = zip(bounds, bounds[1:], strict=False)
        if bounds[0] != 0 or any(b < a for a, b in steps) or bounds[-1] != length:
            shown = bounds if len(bounds) <= 8 else f"[{bounds[0]}, {bounds[1]}, ..., {bounds[-1]}]"
            raise bad(ValueError, op, name, f"non-decreasing from 0 to {time}={length}", shown)
    return x if x.device == device else x.to(device)


def initial_state(
    op: str, x: torch.Tensor | None, expected: dict[str, int], device: torch.device, count: str = "N"
) -> None:
    """`count` is the letter of the number of sequences."""
    if x is None:
        return
    name = "initial_state"
    tensor(op, name, x)
    if not x.dtype.is_floating_point or x.dtype not in MAIN_DTYPES:
        raise bad(TypeError, op, name, f"one of {_names(MAIN_DTYPES)}", x.dtype)
    sizes = tuple(expected.values())
    hint = f"{count} is the number of sequences."
    if tuple(x.shape) == sizes[:-2] + (sizes[-1], sizes[-2]) and sizes[-1] != sizes[-2]:
        hint = "Its last two dimensions look swapped: transpose(-1, -2)."
    shape(op, name, x, expected, hint)
    if x.device != device:
        raise ValueError(f"{op}: all tensors must be on one device, got initial_state: {x.device}, others: {device}.")


def step_state(op: str, x: torch.Tensor, expected: dict[str, int | None], device: torch.device) -> None:
    """A step's state: written in place, `[B or slots, ...]`."""
    tensor(op, "state", x)
    if x.dtype not in MAIN_DTYPES:
        raise bad(TypeError, op, "state", f"one of {_names(MAIN_DTYPES)}", x.dtype)
    shape(op, "state", x, expected)
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        strides = f"strides {list(x.stride())}"
        raise bad(ValueError, op, "state", "free of overlapping memory", strides, "It is written in place: clone it.")
    if x.device != device:
        raise ValueError(f"{op}: all tensors must be on one device, got state: {x.device}, others: {device}.")


def state_indices(op: str, x: torch.Tensor | None, batch: int, slots: int, device: torch.device):
    """Check the slots of a step and return them on `device`. -1 skips a row; no slot may appear twice."""
    name = "state_indices"
    if x is None:
        if slots != batch:
            raise bad(
                ValueError,
                op,
                "state",
                f"of {batch} rows (B)",
                f"{slots} rows",
                "Or give state_indices.",
            )
        return None
    tensor(op, name, x)
    if x.dtype not in INDEX_DTYPES:
        raise bad(TypeError, op, name, "an int32 or int64 tensor", x.dtype)
    shape(op, name, x, {"B": batch})
    if _can_read(x):
        used = [i for i in x.tolist() if i != -1]
        if any(i < 0 or i >= slots for i in used):
            raise bad(ValueError, op, name, f"-1 or in 0..{slots - 1}", x.tolist())
        if len(set(used)) != len(used):
            raise bad(ValueError, op, name, "free of duplicates", x.tolist())
    return x if x.device == device else x.to(device)


def no_grad_needed(op: str, *tensors: torch.Tensor | None, time: str = "T") -> None:
    """Steps are for inference. `time` is the letter of the full op's time axis."""
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors):
        full = op.removesuffix("_step")
        raise RuntimeError(
            f"{op}: an input requires a gradient, and a step has no backward. Wrap the call in torch.no_grad(), or "
            f"call {full} with {time}=1, which is differentiable."
        )


def inference_only(op: str, hint: str, *tensors: torch.Tensor | None) -> None:
    """For an op that has no backward at all."""
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{op}: an input requires a gradient, and this op has no backward. Wrap the call in torch.no_grad(). {hint}"
        )


def lengths(op: str, x: torch.Tensor | None, batch: int, most: int, device: torch.device):
    """Check the number of valid keys of each row and return it on `device` (None stays None)."""
    if x is None:
        return None
    name = "lengths"
    tensor(op, name, x)
    if x.dtype not in INDEX_DTYPES:
        raise bad(TypeError, op, name, "an int32 or int64 tensor", x.dtype)
    shape(op, name, x, {"B": batch})
    if _can_read(x) and any(n < 0 or n > most for n in x.tolist()):
        raise bad(ValueError, op, name, f"in 0..{most} (T)", x.tolist())
    return x if x.device == device else x.to(device)


_described = operator.attrgetter("shape", "dtype", "device", "layout")


def signature(*tensors: torch.Tensor | None, written: torch.Tensor) -> tuple | None:
    """What checks that look at no value depend on, as a key to skip them by; the strides only of what is `written`.

    None where there is no such key: for what is no tensor, and while tracing, where sizes are symbols.
    """
    if torch.compiler.is_compiling():
        return None
    try:
        key = [None if x is None else _described(x) for x in tensors]
        return (*key, _described(written), written.stride())
    except (AttributeError, RuntimeError):  # not a tensor; a sparse one, which has no strides
        return None


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The main tensors, cast if autocast is on. Like torch's own rule, float64 is left alone."""
    first = tensors[0]
    device = first.device.type if isinstance(first, torch.Tensor) else "cpu"
    if not has_autocast(device) or not torch.is_autocast_enabled(device):
        return tensors
    low = torch.get_autocast_dtype(device)
    return tuple(
        t.to(low) if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )
