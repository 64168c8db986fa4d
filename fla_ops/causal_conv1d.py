# SPDX-License-Identifier: Apache-2.0
"""The short causal depthwise convolution in front of the mixers: the public functions and their autograd boundary."""

from typing import NamedTuple

import torch

from . import _checks
from ._autograd import first_order_only
from ._backend import Backend, resolve

_BACKENDS = (
    Backend("triton", "fla_ops.kernels.causal_conv1d", ("cuda",), on_request=("cpu",), switch="TRITON_INTERPRET"),
    Backend("native", "fla_ops._native.causal_conv1d", devices=("cpu", "cuda")),
    Backend("reference", "fla_ops.reference.causal_conv1d"),
)

MAX_WIDTH = 8


class CausalConv1dOutput(NamedTuple):
    y: torch.Tensor
    final_state: torch.Tensor | None


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, cu_seqlens, activation, backend):
        impl = resolve("causal_conv1d", backend, x.device.type, x.dtype, weight.shape[1])
        inputs = (x, weight, bias, initial_state, cu_seqlens)
        y, final_state = impl.forward(*inputs, activation=activation)
        if any(ctx.needs_input_grad):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs)
            ctx.activation, ctx.impl = activation, impl
        return y, final_state

    @staticmethod
    @first_order_only("causal_conv1d")
    def backward(ctx, dy, dfinal_state):
        needs = ctx.needs_input_grad[:4]
        if dy is None:  # only the final state was used
            dy = torch.zeros_like(ctx.saved_tensors[0])
        grads = ctx.impl.backward(*ctx.saved_tensors, dy, dfinal_state, activation=ctx.activation, needs=needs)
        return *grads, None, None, None


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> CausalConv1dOutput:
    r"""Causal depthwise convolution over whole sequences, differentiable in every tensor.

        z_t = bias + sum_{w=0}^{W-1} weight_w x_{t-(W-1)+w},   y_t = z_t, or silu(z_t) with an activation

    per channel; inputs before a sequence's start are `initial_state` or zero. It is the convolution in front of Mamba
    (arXiv 2312.00752, section 3.4) and of the delta-rule layers (arXiv 2406.06484, section 3.3).

    Args:
        x: `[B, D, L]` of float32, bfloat16, float16 or float64. Channel-first memory and channel-last memory
            (`y.transpose(1, 2)` of a `[B, L, D]` tensor) are equally fast; the output keeps the layout.
        weight: `[D, W]`, W from 1 to 8, x's dtype or float32. The last column meets the present input.
        bias: `[D]`, x's dtype or float32, or None.
        activation: None, "silu" or "swish" (the same).
        initial_state: `[N, D, W-1]`, the inputs before the first, oldest first; any float dtype, never modified; N is
            B, or the number of packed sequences.
        output_final_state: also return the last W-1 inputs of each sequence (of state and x together where a sequence
            is shorter).
        cu_seqlens: int32 or int64 `[N + 1]`, the boundaries of N packed sequences from 0 to L; needs B = 1.
            Sequences may be empty.
        backend: "auto", "triton", "native" or "reference"; a named one runs or raises.

    Returns:
        `(y, final_state)`: y `[B, D, L]` in x's dtype; final_state `[N, D, W-1]` in float32 (float64 for float64), or
        None.

    Raises:
        ValueError, TypeError: a wrong shape, value, dtype or type; the message names the argument.
        RuntimeError: the named backend cannot run; the message says why.
    """
    op = "causal_conv1d"
    (x,) = _checks.autocast(x)
    W = _check(op, x, weight, bias, activation, "L")
    _checks.flag(op, "output_final_state", output_final_state)
    B, D, L = x.shape
    cu_seqlens = _checks.cu_seqlens(op, cu_seqlens, B, L, x.device, "L")
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _checks.initial_state(op, initial_state, {"N": N, "D": D, "W-1": W - 1}, x.device)
    impl = resolve(op, backend, x.device.type, x.dtype, W)
    if hasattr(impl, "causal_conv1d"):  # the reference: plain torch, differentiable as it is
        y, final_state = impl.causal_conv1d(
            x,
            weight,
            bias,
            activation=activation,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
    else:
        y, final_state = _CausalConv1d.apply(x, weight, bias, initial_state, cu_seqlens, activation, backend)
    return CausalConv1dOutput(y, final_state if output_final_state else None)


def causal_conv1d_step(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    state: torch.Tensor,
    activation: str | None = None,
    state_indices: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """One token of `causal_conv1d` for inference, no time axis; the state is shifted in place.

    Args:
        x: `[B, D]`. weight, bias, activation, backend: as in `causal_conv1d`.
        state: `[B or slots, D, W-1]`, any float dtype, written in place.
        state_indices: int32 or int64 `[B]`, the slot of each row; -1 skips the row: its state stays, its output is 0.

    Returns:
        y `[B, D]` in x's dtype.

    Raises:
        RuntimeError: an input requires a gradient while grad mode is on. Otherwise as `causal_conv1d`.
    """
    op = "causal_conv1d_step"
    _checks.no_grad_needed(op, x, weight, bias, state, time="L")
    (x,) = _checks.autocast(x)
    W = _check(op, x, weight, bias, activation, None)
    _checks.step_state(op, state, {"slots": None, "D": x.shape[1], "W-1": W - 1}, x.device)
    state_indices = _checks.state_indices(op, state_indices, x.shape[0], state.shape[0], x.device)
    impl = resolve("causal_conv1d", backend, x.device.type, x.dtype, W)
    run = impl.causal_conv1d_step if hasattr(impl, "causal_conv1d_step") else impl.step
    return run(x, weight, bias, state=state, activation=activation, state_indices=state_indices)


def _check(op, x, weight, bias, activation, time: str | None) -> int:
    """Shapes and dtypes of everything but the states; `time` is the letter of the time axis, None for a step.

    Returns the width W.
    """
    if activation not in (None, "silu", "swish"):
        raise _checks.bad(ValueError, op, "activation", 'None, "silu" or "swish"', repr(activation))
    _checks.main_tensors(op, "x", x=x)
    letters = ("B", "D", time) if time else ("B", "D")
    if x.dim() != len(letters):
        raise _checks.bad(ValueError, op, "x", f"of shape [{', '.join(letters)}]", list(x.shape))
    D = x.shape[1]
    if D == 0:
        raise _checks.bad(ValueError, op, "x", "of at least one channel", list(x.shape))
    _checks.side_tensor(op, "weight", weight, x.dtype)
    hint = ""
    if weight.dim() == 3 and weight.shape[1] == 1:
        hint = "It looks like nn.Conv1d's [D, 1, W]: squeeze(1)."
    elif time and weight.dim() == 2 and weight.shape[0] == x.shape[2]:
        hint = "x looks like [B, L, D]: transpose(1, 2)."
    _checks.shape(op, "weight", weight, {"D": D, "W": None}, hint)
    W = weight.shape[1]
    if not 1 <= W <= MAX_WIDTH:
        raise _checks.bad(ValueError, op, "weight", f"of width 1 to {MAX_WIDTH}", W)
    if bias is not None:
        _checks.side_tensor(op, "bias", bias, x.dtype)
        _checks.shape(op, "bias", bias, {"D": D})
    _checks.same_device(op, "x", x=x, weight=weight, bias=bias)
    return W
