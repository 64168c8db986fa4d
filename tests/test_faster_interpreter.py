# SPDX-License-Identifier: Apache-2.0
"""The tests' faster interpreter gives Triton's own bits."""

import os
import subprocess
import sys

import pytest
import torch
from causal_conv1d_cases import LAYOUTS
from causal_conv1d_cases import gradients_for as conv_gradients
from causal_conv1d_cases import make as conv_inputs
from causal_conv1d_cases import run as conv_results
from delta_rule_cases import assert_same_bits, bounds, random_cotangents, random_inputs, results

import fla_ops

DELTA_RULE = [
    (torch.float32, {"K": 17, "V": 60, "T": 70, "gate": "normal"}, {}),
    (torch.bfloat16, {"K": 32, "V": 32, "T": 70, "gate": None}, {"qk_l2norm": True}),
    (torch.float16, {"K": 32, "V": 16, "T": 70, "gate": "normal"}, {}),
    (torch.float64, {"K": 9, "V": 12, "T": 100, "gate": "resets"}, {}),
    (torch.float32, {"K": 16, "V": 16, "T": 80, "sequences": 3}, {"cu_seqlens": bounds([10, 0, 70])}),
]
CONVOLUTION = [
    (4, torch.float32, "channel-first"),
    (3, torch.bfloat16, "channel-last"),
    (8, torch.float16, "every second"),
]


def found() -> list[dict[str, torch.Tensor]]:
    """Results and gradients of the Triton kernels. Twice each: operations are new first, repeated then."""
    torch.manual_seed(0)
    every = []
    for _ in range(2):
        for dtype, sizes, options in DELTA_RULE:
            inputs = random_inputs(H=1, HV=2, dtype=dtype, state=torch.float32, **sizes)
            cotangents = random_cotangents(inputs, sizes.get("sequences"))

            def op(*args, **more):
                return fla_ops.delta_rule(*args, **more, backend="triton")

            every.append(results(op, inputs, *cotangents, **options))
        for W, dtype, layout in CONVOLUTION:
            generator = torch.get_rng_state()
            inputs = conv_inputs(W, 40, dtype, D=5)
            options = {"layout": LAYOUTS[layout], "activation": "silu", "backend": "triton"}
            every.append(conv_results(fla_ops.causal_conv1d, inputs, *conv_gradients(inputs), **options))
            torch.set_rng_state(generator)
    return every


@pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="kernels are compiled here")
def test_same_bits_as_tritons_interpreter(tmp_path):
    pytest.importorskip("triton")
    slow = tmp_path / "slow.pt"
    folders = [os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    run = subprocess.run([sys.executable, __file__, slow], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for a, b in zip(found(), torch.load(slow), strict=True):
        assert_same_bits(a, b)


if __name__ == "__main__":
    torch.save(found(), sys.argv[1])
