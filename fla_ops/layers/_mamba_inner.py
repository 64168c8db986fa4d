# SPDX-License-Identifier: Apache-2.0
"""What lies between Mamba's in_proj and out_proj as one autograd node that keeps its input alone.

Run one by one, the convolution, x_proj, dt_proj and the scan keep u and delta for their backward, as large as x and z
each. Here the backward makes u and delta anew from x: a short convolution and two thin products. The scan itself is
not run again; it starts from the states that it saved.
"""

from collections.abc import Iterable
from types import ModuleType
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .. import _checks
from .._autograd import first_order_only
from .._backend import resolve
from ..causal_conv1d import causal_conv1d


class InnerWeights(NamedTuple):
    conv_weight: torch.Tensor  # [Di, W]
    conv_bias: torch.Tensor | None  # [Di]
    x_weight: torch.Tensor  # [R + 2N, Di]: the rows of delta, B and C
    dt_weight: torch.Tensor  # [Di, R]
    dt_bias: torch.Tensor | None  # [Di]
    A: torch.Tensor  # [Di, N]
    D: torch.Tensor | None  # [Di]


class InnerStates(NamedTuple):
    conv: torch.Tensor | None  # [S, Di, W - 1]
    recurrent: torch.Tensor | None  # [S, Di, N]


class _Options(NamedTuple):
    scan: ModuleType  # the scan's backend module
    backend: str
    delta_softplus: bool
    return_state: bool


def recomputing_scan(
    xz: torch.Tensor, tensors: Iterable[torch.Tensor | None], d_state: int, backend: str
) -> ModuleType | None:
    """The scan's backend module if `mamba_inner` on these `tensors` pays, else None.

    It does if there will be a backward. The reference has none of its own, and torch.compile chooses for itself what
    to recompute.
    """
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not needed or torch.compiler.is_compiling():
        return None
    (low,) = _checks.autocast(xz)
    scan = resolve("selective_scan", backend, xz.device.type, low.dtype, d_state)
    return scan if hasattr(scan, "backward") else None


def mamba_inner(
    xz: torch.Tensor,
    weights: InnerWeights,
    states: InnerStates,
    scan: ModuleType,
    *,
    cu_seqlens: torch.Tensor | None = None,
    delta_softplus: bool = True,
    return_state: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, InnerStates]:
    """xz `[B, L, 2 Di]` -> (y `[B, L, Di]`, the states after the last token, None unless asked for).

    `scan` comes from `recomputing_scan`. The weights' shapes are the caller's care.
    """
    count = xz.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sizes = {"S": count, "Di": weights.A.shape[0], "N": weights.A.shape[1]}
    _checks.initial_state("Mamba", states.recurrent, sizes, xz.device, "S")
    # The casts that autocast would make are made here, outside of the node, which then never meets autocast.
    xz, x_weight, dt_weight = _checks.autocast(xz, weights.x_weight, weights.dt_weight)
    weights = weights._replace(x_weight=x_weight, dt_weight=dt_weight)
    options = _Options(scan, backend, delta_softplus, return_state)
    y, conv, recurrent = _MambaInner.apply(xz, *weights, *states, cu_seqlens, options)
    return y.transpose(1, 2), InnerStates(conv, recurrent if return_state else None)


def _front(x, weights: InnerWeights, conv_state, cu_seqlens, options: _Options):
    """x `[B, L, Di]` -> (u, delta `[B, Di, L]`, B, C `[B, 1, N, L]`, conv's final state or None)."""
    u, conv_final = causal_conv1d(
        x.transpose(1, 2),
        weights.conv_weight,
        weights.conv_bias,
        activation="silu",
        initial_state=conv_state,
        output_final_state=options.return_state,
        cu_seqlens=cu_seqlens,
        backend=options.backend,
    )
    N = weights.A.shape[1]
    dt, B, C = F.linear(u.transpose(1, 2), weights.x_weight).split((weights.dt_weight.shape[1], N, N), -1)
    delta = F.linear(dt, weights.dt_weight).transpose(1, 2)
    return u, delta, B.transpose(1, 2)[:, None], C.transpose(1, 2)[:, None], conv_final


class _MambaInner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, xz, *arguments):
        *tensors, cu_seqlens, options = arguments
        weights, states = InnerWeights(*tensors[:7]), InnerStates(*tensors[7:])
        x, z = xz.chunk(2, -1)
        u, delta, B, C, conv_final = _front(x, weights, states.conv, cu_seqlens, options)
        y, final, checkpoints = options.scan.forward(
            u,
            delta,
            weights.A,
            B,
            C,
            weights.D,
            z.transpose(1, 2),
            weights.dt_bias,
            states.recurrent,
            cu_seqlens,
            delta_softplus=options.delta_softplus,
            save_states=True,
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(xz, *tensors, cu_seqlens, checkpoints)
        ctx.options = options
        return y, conv_final, final

    @staticmethod
    @first_order_only("Mamba")
    def backward(ctx, dy, dconv_final, dfinal):
        xz, *tensors, cu_seqlens, checkpoints = ctx.saved_tensors
        needs_xz, *needs = ctx.needs_input_grad[:-2]
        x, z = xz.chunk(2, -1)
        # Leaves for the front, which torch differentiates; the scan's own tensors are differentiated by its backend.
        x = x.detach().requires_grad_(needs_xz)
        leaves = [
            None if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)
        ]
        weights, states = InnerWeights(*leaves[:7]), InnerStates(*leaves[7:])
        with torch.enable_grad(), torch.autocast(xz.device.type, enabled=False):
            u, delta, B, C, conv_final = _front(x, weights, states.conv, cu_seqlens, ctx.options)
        scanned = (u, delta, weights.A, B, C, weights.D, z.transpose(1, 2), weights.dt_bias, states.recurrent)
        wanted = [t is not None and t.requires_grad for t in scanned]
        wanted[6] = needs_xz
        if dy is None:  # only a state was used
            dy = torch.zeros_like(u)
        du, ddelta, dA, dB, dC, dD, dz, ddt_bias, drecurrent = ctx.options.scan.backward(
            *(None if t is None else t.detach() for t in scanned),
            cu_seqlens,
            checkpoints,
            dy,
            dfinal,
            delta_softplus=ctx.options.delta_softplus,
            needs=wanted,
        )
        ends = ((u, du), (delta, ddelta), (B, dB), (C, dC), (conv_final, dconv_final))
        ends = [(end, grad) for end, grad in ends if grad is not None and end.requires_grad]
        front = (x, weights.conv_weight, weights.conv_bias, weights.x_weight, weights.dt_weight, states.conv)
        dx, dconv_weight, dconv_bias, dx_weight, ddt_weight, dconv = _gradients(ends, front)
        dxz = torch.cat((dx, dz.transpose(1, 2)), -1) if needs_xz else None
        grads = (dconv_weight, dconv_bias, dx_weight, ddt_weight, ddt_bias, dA, dD, dconv, drecurrent)
        return dxz, *grads, None, None


def _gradients(ends: list[tuple[torch.Tensor, torch.Tensor]], leaves: tuple[torch.Tensor | None, ...]) -> list:
    """The gradient of each leaf that needs one, None for the others; `ends` are outputs with their gradients."""
    needed = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    found = [None] * len(needed)
    if needed and ends:
        outputs, cotangents = zip(*ends, strict=True)
        found = torch.autograd.grad(outputs, needed, cotangents, allow_unused=True)
    grads = iter(found)
    return [next(grads) if leaf is not None and leaf.requires_grad else None for leaf in leaves]
