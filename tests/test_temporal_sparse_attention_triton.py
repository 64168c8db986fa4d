# SPDX-License-Identifier: Apache-2.0
"""What only the Triton kernels of temporal-sparse attention have: launch rows, launches, promises to torch.compile.

Without a GPU they run in Triton's interpreter, with the rows of the launch tables that GPUs get; the other tests take
the interpreter's own.
"""

import pytest
import torch
from delta_rule_cases import bounds
from temporal_sparse_attention_cases import TENSORS, check, random_cotangent, random_inputs, thresholds

from fla_ops import _backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = _backend.why_not("temporal_sparse_attention", "triton", DEVICE, torch.float32, ())
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(autouse=True)
def rows_of_a_gpu(interpreters_rows):
    interpreters_rows(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("D", [16, 64, 100, 256])
def test_every_row(D, dtype):
    """Tiles whose keys are sinks, far, near to some queries, and near to all."""
    T = 150 if dtype.itemsize == 2 else 90
    x = random_inputs(1, T, 1, 1, D, 16, dtype=dtype)
    check("triton", x, device=DEVICE, threshold=0.4, window=20, sink=3)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_every_architecture(arch, monkeypatch):
    from fla_ops.kernels import _sparse, temporal_sparse_attention_backward

    for module in (_sparse, temporal_sparse_attention_backward):
        monkeypatch.setattr(module, "arch", lambda: arch)
    x = random_inputs(1, 150, 2, 1, 70, 40, dtype=torch.bfloat16)
    check("triton", x, device=DEVICE, threshold=0.4, window=20, window_mode="block")


@pytest.mark.parametrize("mode", ["band", "block"])
@pytest.mark.parametrize(("window", "sink"), [(1, 0), (1, 1), (16, 17), (33, 64), (60, 0), (3, 100), (99, 5)])
def test_borders(window, sink, mode):
    x = random_inputs(1, 100, 1, 1, dtype=torch.float64, Tq=90)
    check("triton", x, device=DEVICE, threshold=0.4, window=window, sink=sink, window_mode=mode)


@pytest.mark.parametrize("dense", [False, True], ids=["", "dense"])
def test_results_are_what_is_promised_to_torch_compile(dense):
    from fla_ops.kernels import temporal_sparse_attention as op
    from fla_ops.kernels.temporal_sparse_attention_backward import _gradients

    x = random_inputs(1, 30, 2, 1, 5, 3)
    given = [x[name].to(DEVICE) for name in TENSORS] + [thresholds(x, 0.3).to(DEVICE), bounds([10, 20]).to(DEVICE)]
    options = {"window": 4, "sink": 0, "window_mode": "band", "scale": 1.0, "dense": dense}
    found = op.forward(*given, **options, count_fired=False)
    promised = list(op._results(*given, **options, count_fired=False))
    do = random_cotangent(x).to(DEVICE)
    for needs in ((True, True, True), (False, True, False), (True, False, False), (False, False, True)):
        grads = op.backward(*given, found[0], found[1], do, **options, needs=needs)
        expected = _gradients(*given, found[0], found[1], do, **options, needs=needs)
        assert [g is None for g in grads] == [g is None for g in expected] == [not need for need in needs]
        found = [*found, *(g for g in grads if g is not None)]
        promised += [g for g in expected if g is not None]
    for a, b in zip(found, promised, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_launches():
    """Holding is one each way; attention one, its gradients two, and giving held keys' gradients back another."""
    from recorded_launches import recorded

    options = {"D": 64, "T": 300}
    sparse, dense = recorded(
        ("temporal_sparse_attention", "bfloat16", options),
        ("temporal_sparse_attention", "bfloat16", options | {"dense": True}),
    )
    assert [len(sparse[name]) for name in ("forward", "backward")] == [2, 4]
    assert [len(dense[name]) for name in ("forward", "backward")] == [1, 2]
