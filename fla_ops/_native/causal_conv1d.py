# SPDX-License-Identifier: Apache-2.0
"""The native backend of the causal convolution: `csrc/causal_conv1d_{cpu.cpp,cuda.cu}` behind `torch.ops.fla_ops`."""

import torch

from fla_ops import _native

_OPS = ("causal_conv1d_forward", "causal_conv1d_backward", "causal_conv1d_step")
_load_error = _native.load(*_OPS)


def why_not(device: str, dtype: torch.dtype, *sizes: int) -> str | None:
    """The reason why this backend cannot run, or None."""
    return _native.load_cuda(*_OPS) if device == "cuda" else _load_error


def _unit_stride(x: torch.Tensor, dim: int) -> bool:
    return x.shape[dim] <= 1 or x.stride(dim) == 1


def _channels_last(x: torch.Tensor) -> bool:
    """The memory layout the kernels take x for; where both fit, they agree with this choice."""
    return _unit_stride(x, 1) and not (_unit_stride(x, 2) and x.shape[2] > 1)


def _with_layout(x: torch.Tensor) -> torch.Tensor:
    """The kernels take unit stride over time or over channels, and any other strides."""
    return x if _unit_stride(x, 1) or _unit_stride(x, 2) else x.contiguous()


def _with_layout_of(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """An incoming gradient has any strides; the kernels need it laid out as x."""
    if _channels_last(x):
        return dy if _unit_stride(dy, 1) else dy.transpose(1, 2).contiguous().transpose(1, 2)
    return dy if _unit_stride(dy, 2) else dy.contiguous()


def forward(x, weight, bias, initial_state, cu_seqlens, *, activation):
    """(y, final_state)."""
    x = _with_layout(x)
    return _native.ops.causal_conv1d_forward(x, weight, bias, initial_state, cu_seqlens, activation is not None)


def backward(x, weight, bias, initial_state, cu_seqlens, dy, dfinal_state, *, activation, needs):
    """Gradients of x, weight, bias and initial_state, None where `needs` is False."""
    x = _with_layout(x)
    dy = _with_layout_of(x, dy)
    mask = sum(bit << i for i, bit in enumerate(needs))
    silu = activation is not None
    grads = _native.ops.causal_conv1d_backward(x, weight, bias, initial_state, cu_seqlens, silu, dy, dfinal_state, mask)
    grads = [d if need else None for d, need in zip(grads, needs, strict=True)]
    if grads[3] is not None:
        grads[3] = grads[3].to(initial_state.dtype)
    return grads


def step(x, weight, bias, *, state, activation, state_indices):
    """y; `state` is written in place."""
    return _native.ops.causal_conv1d_step(x, weight, bias, state, activation is not None, state_indices)


def register_fakes(namespace: str = "fla_ops") -> None:
    """Shapes, dtypes and layouts for torch.compile and FakeTensor."""

    def empty_with_layout(x):
        B, D, L = x.shape
        return x.new_empty(B, L, D).transpose(1, 2) if _channels_last(x) else x.new_empty(B, D, L)

    def empty_state(x, weight, cu_seqlens):
        N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        accumulator = torch.promote_types(x.dtype, torch.float32)
        return x.new_empty(N, x.shape[1], weight.shape[1] - 1, dtype=accumulator)

    @torch.library.register_fake(f"{namespace}::causal_conv1d_forward")
    def _(x, weight, bias, initial_state, cu_seqlens, silu):
        return empty_with_layout(x), empty_state(x, weight, cu_seqlens)

    @torch.library.register_fake(f"{namespace}::causal_conv1d_backward")
    def _(x, weight, bias, initial_state, cu_seqlens, silu, dy, dfinal_state, needs):
        return (
            empty_with_layout(x) if needs & 1 else x.new_empty(0),
            weight.new_empty(weight.shape) if needs & 2 else x.new_empty(0),
            bias.new_empty(bias.shape) if needs & 4 and bias is not None else x.new_empty(0),
            empty_state(x, weight, cu_seqlens) if needs & 8 else x.new_empty(0),
        )

    @torch.library.register_fake(f"{namespace}::causal_conv1d_step")
    def _(x, weight, bias, state, silu, state_indices):
        return x.new_empty(x.shape)


if _load_error is None:
    register_fakes()
