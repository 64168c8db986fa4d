# SPDX-License-Identifier: Apache-2.0
"""What only the Triton kernels of the selective scan have: launch rows, segments, checkpoints.

Without a GPU they run in Triton's interpreter, with the rows of the launch tables that GPUs get; the other tests take
the interpreter's own.
"""

import pytest
import torch
from delta_rule_cases import bounds
from selective_scan_cases import TENSORS, check, random_inputs

import fla_ops
from fla_ops import _backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = _backend.why_not("selective_scan", "triton", DEVICE, torch.float32, ())
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(autouse=True)
def rows_of_a_gpu(interpreters_rows):
    interpreters_rows(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("N", [1, 5, 16, 40, 256])
def test_every_row(N, dtype):
    """N decides how many threads share a channel and how many steps the backward keeps. Blocks of channels that the
    last of a group does not fill; three checkpoints."""
    x = random_inputs(Di=72, L=70, N=N, G=2, batch=1, dtype=dtype, state=torch.float32)
    check("triton", x, device=DEVICE, delta_softplus=True)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_every_architecture(arch, monkeypatch):
    from fla_ops.kernels import selective_scan, selective_scan_backward

    for module in (selective_scan, selective_scan_backward):
        monkeypatch.setattr(module, "arch", lambda: arch)
    check("triton", random_inputs(Di=40, state=torch.float32), device=DEVICE, delta_softplus=True)


@pytest.mark.parametrize("length", [31, 32, 33, 63, 65, 96])
def test_edges_of_checkpoints(length):
    check("triton", random_inputs(Di=40, L=length, state=torch.float32), device=DEVICE, delta_softplus=True)


@pytest.mark.parametrize("options", [{}, {"constant": "BC", "G": 2}], ids=["", "constants"])
def test_results_have_the_strides_that_are_promised_to_torch_compile(options):
    from fla_ops.kernels import selective_scan, selective_scan_backward

    x = random_inputs(2, 6, 5, 3, state=torch.float32, **options)
    given = [x[name].to(DEVICE) for name in TENSORS] + [None]
    y, final, states = selective_scan.forward(*given, delta_softplus=True, save_states=True)
    found = [y, final, states]
    promised = selective_scan._results(*given, delta_softplus=True, save_states=True)
    found += selective_scan.backward(*given, states, y, final, delta_softplus=True, needs=(True,) * 9)
    promised = [*promised, *selective_scan_backward._gradients(*given, needs=(True,) * 9)]
    for a, b in zip(found, promised, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


# Long sequences, cut into segments.


@pytest.fixture
def segments(monkeypatch):
    """Cut every sequence into segments of two checkpoints, as on an empty card."""
    from fla_ops.kernels import _config, selective_scan, selective_scan_backward

    for module in (selective_scan, selective_scan_backward):
        monkeypatch.setattr(module, "segment_steps", lambda *_: 2 * _config.SCAN_CHECKPOINT)


@pytest.mark.parametrize("options", [{}, {"constant": "BC", "gate": False}, {"G": 2, "bias": False}], ids=str)
@pytest.mark.parametrize("lengths", [None, [100, 0, 1, 64, 15]], ids=["one", "packed"])
def test_segments_are_exact(segments, lengths, options):
    """In float64 the cut sequence is the whole one but for rounding, and so are all gradients."""
    sequences = None if lengths is None else len(lengths)
    batch = 2 if lengths is None else 1
    x = random_inputs(batch, 24, 180, dtype=torch.float64, state=torch.float64, sequences=sequences, **options)
    cu_seqlens = None if lengths is None else bounds(lengths)
    check("triton", x, device=DEVICE, delta_softplus=True, cu_seqlens=cu_seqlens)


def test_segments_without_an_initial_state(segments):
    check("triton", random_inputs(L=150, dtype=torch.bfloat16), device=DEVICE, delta_softplus=True)


def test_segments_are_cut_on_an_empty_card_only():
    """A function of shapes; under deterministic algorithms a row's bits do not depend on the batch around it."""
    from fla_ops.kernels import _scan

    x = torch.empty(1, 1, 32768)
    torch.use_deterministic_algorithms(False)
    assert _scan.segment_steps(32, 1, 1, x) is not None
    assert _scan.segment_steps(1024, 1, 1, x) is None
    assert _scan.segment_steps(32, 1, 1, x[..., :200]) is None
    torch.use_deterministic_algorithms(True)
    assert _scan.segment_steps(32, 1, 1, x) is None


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [None, [17, 0, 18]], ids=["one", "packed"])
def test_gradcheck(lengths):
    """Numerical differences in float64 through the real kernels: two checkpoints, two groups."""
    sequences = None if lengths is None else len(lengths)
    x = random_inputs(1, 4, 35, 3, G=2, dtype=torch.float64, state=torch.float64, sequences=sequences)
    given = {name: t.to(DEVICE).requires_grad_() for name, t in x.items()}
    options = {"output_final_state": True, "delta_softplus": True, "backend": "triton"}
    options["cu_seqlens"] = None if lengths is None else bounds(lengths).to(DEVICE)

    def op(*tensors):
        return tuple(fla_ops.selective_scan(**dict(zip(given, tensors, strict=True)), **options))

    assert torch.autograd.gradcheck(op, tuple(given.values()), fast_mode=True)
