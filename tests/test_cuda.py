# SPDX-License-Identifier: Apache-2.0
"""CUDA tensors. There is no GPU kernel yet: they run on the reference, with the one warning."""

import pytest
import torch
from delta_rule_cases import call, random_inputs

import fla_ops
from fla_ops import _backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.no_poison,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_the_delta_rule_runs_on_cuda_tensors_and_says_how(monkeypatch):
    monkeypatch.setattr(_backend, "_warned", set())
    inputs = random_inputs(T=20, state=torch.float32)
    on_gpu = {name: x.cuda() for name, x in inputs.items()}
    with pytest.warns(fla_ops.FallbackWarning, match="no triton kernel.*cpu tensors, not cuda"):
        o, final = call(fla_ops.delta_rule, on_gpu, output_final_state=True)
    assert o.is_cuda and final.is_cuda
    expected = call(fla_ops.delta_rule, inputs, output_final_state=True, backend="reference")
    torch.testing.assert_close(o.cpu(), expected.o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final.cpu(), expected.final_state, rtol=1e-4, atol=1e-5)


def test_cu_seqlens_may_be_on_the_other_device():
    inputs = random_inputs(T=20)
    on_gpu = {name: None if x is None else x.cuda() for name, x in inputs.items()}
    boundaries = torch.tensor([0, 7, 7, 20])
    o = call(fla_ops.delta_rule, on_gpu, cu_seqlens=boundaries, backend="reference").o
    expected = call(fla_ops.delta_rule, inputs, cu_seqlens=boundaries.cuda(), backend="reference").o
    torch.testing.assert_close(o.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_mixed_devices_are_named():
    inputs = random_inputs(T=4)
    inputs["k"] = inputs["k"].cuda()
    with pytest.raises(ValueError, match=r"one device, got q: cpu, k: cuda:0"):
        call(fla_ops.delta_rule, inputs)
    with pytest.raises(RuntimeError, match="native.*cpu tensors, not cuda"):
        call(fla_ops.delta_rule, {n: None if x is None else x.cuda() for n, x in inputs.items()}, backend="native")
