# SPDX-License-Identifier: Apache-2.0
"""Inputs of the convolution's tests, and the one comparison of a backend with the reference."""

import torch

from fla_ops.reference.causal_conv1d import causal_conv1d as reference
from fla_ops.testing import assert_matches_reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CHANNELS = 39  # no multiple of any vector
LAYOUTS = {
    "channel-first": lambda x: x,
    "channel-last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slice of wider rows": lambda x: torch.cat([x, x, x], 2)[:, :, x.shape[2] : 2 * x.shape[2]],
    "slice of more channels": lambda x: (
        torch.cat([x, x, x], 1)
        .transpose(1, 2)
        .contiguous()
        .transpose(1, 2)[:, 1:-1][:, x.shape[1] - 1 : 2 * x.shape[1] - 1]
    ),
    "every second": lambda x: torch.stack([x, x], -1)[..., 0],
    "batch innermost": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
}


def accumulator(dtype):
    return torch.promote_types(dtype, torch.float32)


def make(W, L, dtype, *, B=2, D=CHANNELS, N=None, bias=True, state=True, side=None):
    """x, weight, bias, initial_state of a problem."""
    side = side or dtype
    return (
        torch.randn(B, D, L).to(dtype),
        torch.randn(D, W).to(side),
        torch.randn(D).to(side) if bias else None,
        torch.randn(B if N is None else N, D, W - 1).to(accumulator(dtype)) if state else None,
    )


def leaves(tensors, dtype=None):
    return [None if t is None else t.to(dtype or t.dtype).detach().clone().requires_grad_() for t in tensors]


def run(op, inputs, dy, dfinal, *, layout=lambda x: x, dtype=None, **options):
    """Outputs and all gradients of one call, named."""
    x, weight, bias, state = leaves(inputs, dtype)
    y, final = op(layout(x), weight, bias, initial_state=state, output_final_state=True, **options)
    wanted = {"dx": x, "dweight": weight, "dbias": bias, "dinitial_state": state}
    wanted = {name: t for name, t in wanted.items() if t is not None}
    grads = torch.autograd.grad((y, final), wanted.values(), (layout(dy.to(y.dtype)), dfinal.to(final.dtype)))
    return {"y": y, "final_state": final, **dict(zip(wanted, grads, strict=True))}


def gradients_for(inputs, N=None):
    x, weight = inputs[:2]
    sizes = (x.shape[0] if N is None else N, x.shape[1], weight.shape[1] - 1)
    return torch.randn(x.shape).to(x.dtype), torch.randn(sizes, dtype=accumulator(x.dtype))


def check(actual, inputs, dy, dfinal, label, **options):
    """Every entry of `actual` against the reference in float64 and in the tested dtype."""
    dtype = inputs[0].dtype
    ref64 = run(reference, inputs, dy, dfinal, dtype=torch.float64, **options)
    low = None if dtype == torch.float64 else dtype
    ref_low = run(reference, inputs, dy, dfinal, operand_dtype=low, **options)
    for name, value in actual.items():
        assert_matches_reference(
            value, ref64[name], ref_low[name], f"{label}: {name}", gradient=name.startswith("d"), seed=0
        )
