# SPDX-License-Identifier: Apache-2.0
"""Activations as sparse changes between tokens: the Delta Activation Layer (arXiv 2107.07305)."""

import math
from typing import NamedTuple

import torch
from torch import nn

from .. import _checks

LEAST_STEP = 2.0**-20


class DeltaOutput(NamedTuple):
    y: torch.Tensor
    state: torch.Tensor


class _Quantize(torch.autograd.Function):
    """x [..., size] to whole multiples of |threshold|, as if it were x; see `DeltaActivation` for the gradients."""

    @staticmethod
    def forward(ctx, x, threshold):
        dtype = torch.promote_types(x.dtype, torch.float32)
        step = _short_step(threshold.to(dtype))
        codes = (x.to(dtype) / step).round()
        ctx.save_for_backward(codes)
        ctx.kinds = x.dtype, threshold.dtype, threshold.shape
        return codes * step

    @staticmethod
    def backward(ctx, do):
        (codes,) = ctx.saved_tensors
        x_dtype, dtype, shape = ctx.kinds
        dx = do.to(x_dtype) if ctx.needs_input_grad[0] else None
        dthreshold = -(do * codes).sum_to_size(shape).to(dtype) if ctx.needs_input_grad[1] else None
        return dx, dthreshold


def _short_step(threshold: torch.Tensor) -> torch.Tensor:
    """|threshold|, at least `LEAST_STEP`, to so few bits that multiples of it and their differences are exact."""
    bits = 11 if threshold.dtype == torch.float32 else 26
    mantissa, exponent = torch.frexp(threshold.abs().clamp(min=LEAST_STEP))
    return torch.ldexp((mantissa * 2**bits).round(), exponent - bits)


class DeltaActivation(nn.Module):
    r"""Quantise activations and pass on how they change from token to token (Yousefzadeh and Sifalakis 2021, arXiv
    2107.07305).

        o_t = q round(x_t / q),   q = |threshold|
        y_t = o_t - o_{t-1},      o_{-1} = 0

    Where x moves by less than a step from token to token, y is zero. `DeltaLinear` behind it adds up W y_t, and with it
    a token costs multiply-adds for what changed alone. There is no threshold of change and so no drift: summed changes
    are o_t itself. To make that true to the last bit, q keeps 11 bits (26 in float64): o and y are exact in float32
    while |x| < 4096 q.

    Gradients are those of the authors: straight through to x (d o / d x = 1), and to the step -round(x / q), of the
    opposite sign than the derivative, so that a loss that wants less noise gets a smaller step. The difference passes
    gradients as any difference. To train for sparsity add a multiple of `penalty(y)` to the loss.

    Args:
        size: channels of a step of their own; None for one step that all channels share.
        init: the threshold at first.
        device, dtype: of the threshold.

    Parameters: `threshold`, `[size]` or `[]`, used by its absolute value, which is taken to be at least 2^-20.

    Raises:
        ValueError, TypeError: a wrong argument; the message names it.

    Example:
        >>> import torch
        >>> from fla_ops.layers import DeltaActivation, DeltaLinear
        >>> quantize, linear = DeltaActivation(init=0.25), DeltaLinear(8, 4)
        >>> x = torch.randn(2, 100, 8).cumsum(1) / 10
        >>> y = quantize(x)
        >>> dense = torch.nn.functional.linear(quantize.quantize(x), linear.weight, linear.bias)
        >>> torch.allclose(linear(y), dense, atol=1e-6), bool((y == 0).float().mean() > 0.5)
        (True, True)
    """

    def __init__(
        self,
        size: int | None = None,
        init: float = 0.1,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        op = type(self).__name__
        if size is not None:
            _checks.count(op, "size", size, 1)
        if isinstance(init, bool) or not isinstance(init, (int, float)):
            raise _checks.bad(TypeError, op, "init", "a number", repr(init))
        if not (0 < init < math.inf):
            raise _checks.bad(ValueError, op, "init", "above 0 and finite", init)
        self.size, self.init = size, float(init)
        self.threshold = nn.Parameter(torch.empty(() if size is None else (size,), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.threshold, self.init)

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """o, of x `[..., size]`: the dense quantised activation, in float32 (float64 for a float64 x)."""
        op = f"{type(self).__name__}.quantize"
        _checks.tensor(op, "x", x)
        self._check(op, x, x.dim())
        return _Quantize.apply(x, self.threshold)

    def forward(
        self, x: torch.Tensor, *, state: torch.Tensor | None = None, return_state: bool = False
    ) -> torch.Tensor | DeltaOutput:
        """Changes of whole sequences.

        Args:
            x: `[B, T, size]`, float32, bfloat16, float16 or float64.
            state: o of the token before, `[B, size]`; never modified. Gradients flow into it. None: zeros.
            return_state: also return o of the last token.

        Returns:
            y `[B, T, size]` in float32 (float64 for a float64 x), or `DeltaOutput(y, state)`.
        """
        op = type(self).__name__
        self._check(op, x, 3)
        _checks.flag(op, "return_state", return_state)
        o = _Quantize.apply(x, self.threshold)
        if state is None:
            state = o.new_zeros(o.shape[0], o.shape[2])
        else:
            check_delta_state(op, state, x.shape[0], x.shape[2], o.dtype)
        y = torch.diff(o, dim=1, prepend=state[:, None])
        if not return_state:
            return y
        return DeltaOutput(y, o[:, -1] if o.shape[1] else state.clone())

    def step(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """One token a sequence, for inference: x `[B, size]` -> y `[B, size]`; `state` is updated in place.

        Raises:
            RuntimeError: grad mode is on and x, the state or the threshold requires a gradient.
        """
        op = f"{type(self).__name__}.step"
        self._check(op, x, 2)
        check_delta_state(op, state, *x.shape, torch.promote_types(x.dtype, torch.float32))
        _checks.no_gradient_in_layer_step(op, x, state, self.threshold)
        o = _Quantize.apply(x, self.threshold)
        y = o - state
        state.copy_(o)
        return y

    def penalty(self, y: torch.Tensor) -> torch.Tensor:
        """The size of changes, to be added to a loss with a weight: channels times the mean of |y| without the first
        token, which changes from nothing. y `[B, T, size]` as this layer returns it; 0 for T < 2."""
        _checks.shape(f"{type(self).__name__}.penalty", "y", y, {"B": None, "T": None, "size": self.size})
        if y.shape[1] < 2:
            return y.new_zeros(())
        return y.shape[2] * y[:, 1:].abs().mean()

    def _check(self, op: str, x: torch.Tensor, dims: int) -> None:
        _checks.tensor(op, "x", x)
        if x.dtype not in _checks.MAIN_DTYPES:
            raise _checks.bad(TypeError, op, "x", "a floating tensor", x.dtype)
        lead = {3: ("B", "T"), 2: ("B",)}.get(dims, tuple(f"d{i}" for i in range(dims - 1)))
        _checks.shape(op, "x", x, dict.fromkeys(lead) | {"size": self.size})

    def extra_repr(self) -> str:
        return f"size={self.size}, init={self.init}"


def check_delta_state(op: str, state: object, batch: int, size: int, dtype: torch.dtype) -> None:
    _checks.tensor(op, "state", state)
    if state.dtype != dtype:
        raise _checks.bad(TypeError, op, "state", f"{dtype}, as return_state gives it", state.dtype)
    _checks.shape(op, "state", state, {"B": batch, "size": size})
