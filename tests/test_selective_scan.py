# SPDX-License-Identifier: Apache-2.0
"""The selective scan's values: the reference against its equation, then every backend against the reference.

Each comparison covers y, the final state and all nine gradients. Sequences, steps and memory:
test_selective_scan_sequences.py.
"""

import pytest
import torch
from selective_scan_cases import LAYOUTS, call, check, random_inputs

import fla_ops
from fla_ops.reference.selective_scan import selective_scan as reference

OP = "selective_scan"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


# The reference itself.


def test_the_reference_is_the_equation_element_by_element():
    x = random_inputs(1, 4, 6, 3, G=2, dtype=torch.float64, state=torch.float64)
    y, final = call(reference, x, delta_softplus=True, output_final_state=True)
    for d in range(4):
        h = x["initial_state"][0, d]
        for t in range(6):
            step = torch.nn.functional.softplus(x["delta"][0, d, t] + x["delta_bias"][d])
            h = (step * x["A"][d]).exp() * h + step * x["u"][0, d, t] * x["B"][0, d // 2, :, t]
            out = h @ x["C"][0, d // 2, :, t] + x["D"][d] * x["u"][0, d, t]
            torch.testing.assert_close(y[0, d, t], out * torch.nn.functional.silu(x["z"][0, d, t]))
        torch.testing.assert_close(final[0, d], h)


def test_the_reference_passes_gradcheck_twice():
    x = random_inputs(1, 2, 2, 2, constant="C", dtype=torch.float64, state=torch.float64)
    leaves = [t.requires_grad_() for t in x.values()]

    def op(u, delta, A, B, C, D, z, delta_bias, state):
        options = {"z": z, "delta_bias": delta_bias, "delta_softplus": True, "initial_state": state}
        return tuple(
            fla_ops.selective_scan(u, delta, A, B, C, D, **options, output_final_state=True, backend="reference")
        )

    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)


# Every backend against the reference.


@pytest.mark.parametrize("softplus", [False, True], ids=["", "softplus"])
@dtypes
def test_dtypes(backend, dtype, softplus):
    delta = "normal" if softplus else "positive"
    check(backend, random_inputs(dtype=dtype, delta=delta, state=torch.float32), delta_softplus=softplus)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    x = random_inputs(state=torch.float32, G=2)
    for name in ("u", "delta", "z", "B", "C"):
        x[name] = LAYOUTS[layout](x[name])
    check(backend, x, delta_softplus=True)
