# SPDX-License-Identifier: Apache-2.0
"""What only the Triton kernels of the delta rule have: launch rows, descriptors, segments, chunks of fewer live rows.

Without a GPU they run in Triton's interpreter, with the rows of the launch tables that GPUs get; the other tests take
the interpreter's own, which are fast there.
"""

import pytest
import torch
from delta_rule_cases import bounds, check, random_cotangents, random_inputs, references

import fla_ops
from fla_ops import _backend
from fla_ops.testing import assert_matches_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = _backend.why_not("delta_rule", "triton", DEVICE, torch.float32, ())
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(autouse=True)
def rows_of_a_gpu(interpreters_rows):
    interpreters_rows(False)


def taking(arch, monkeypatch):
    """The launch rows of another architecture."""
    from fla_ops.kernels import delta_rule, delta_rule_backward, delta_rule_prepare

    for module in (delta_rule, delta_rule_backward, delta_rule_prepare):
        monkeypatch.setattr(module, "arch", lambda: arch)


# sm_90 loads by descriptors, sm_80 by pointers; so do heads whose rows are no multiples of 16 bytes.
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120", "gfx942"])
@pytest.mark.parametrize("K, V", [(64, 64), (128, 128), (256, 64), (20, 36)])
def test_every_row_in_bfloat16(arch, K, V, monkeypatch):
    taking(arch, monkeypatch)
    inputs = random_inputs(T=70, H=1, HV=2, K=K, V=V, dtype=torch.bfloat16, side=torch.float32, state=torch.float32)
    check("triton", inputs, device=DEVICE, qk_l2norm=True)


@pytest.mark.parametrize("K, V", [(32, 32), (128, 16), (256, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_row_in_other_dtypes(dtype, K, V, monkeypatch):
    check("triton", random_inputs(T=40, H=1, HV=2, K=K, V=V, dtype=dtype, state=torch.float32), device=DEVICE)


@pytest.mark.parametrize("K, V", [(128, 64), (256, 64)])
def test_rows_of_ungrouped_heads(K, V):
    """Their gradients of queries and keys take other sums side by side than those of groups do."""
    inputs = random_inputs(T=70, H=1, HV=1, K=K, V=V, dtype=torch.bfloat16, side=torch.float32, state=torch.float32)
    check("triton", inputs, device=DEVICE, qk_l2norm=True)


@pytest.mark.parametrize("lengths", [[70, 0, 1, 64], [3, 130]], ids=str)
def test_packed_through_descriptors(lengths):
    """A descriptor ends with its sequence: what lies behind it is read as 0, and not written."""
    inputs = random_inputs(
        T=sum(lengths), H=1, HV=1, K=64, V=64, dtype=torch.bfloat16, state=torch.float32, sequences=len(lengths)
    )
    check("triton", inputs, device=DEVICE, cu_seqlens=bounds(lengths))


# Long sequences, cut into segments.


@pytest.fixture
def segments(monkeypatch):
    """Cut every sequence into segments of CHECKPOINT chunks, as on an empty card."""
    from fla_ops.kernels import _config, delta_rule

    monkeypatch.setattr(delta_rule, "_segment_chunks", lambda *_: _config.CHECKPOINT)
    return _config.CHECKPOINT


@pytest.mark.parametrize("gate", [None, "normal", "resets"])
@pytest.mark.parametrize("lengths", [None, [300, 0, 1, 150]], ids=["one", "packed"])
def test_segments_are_exact(segments, gate, lengths):
    """In float64 the cut sequence is the whole one but for rounding; with gradients, from the same saved states."""
    options = {"cu_seqlens": None if lengths is None else bounds(lengths)}
    inputs = random_inputs(
        T=451, H=1, HV=2, K=20, V=24, dtype=torch.float64, gate=gate, state=torch.float64,
        sequences=None if lengths is None else len(lengths),
    )  # fmt: skip
    check("triton", inputs, device=DEVICE, qk_l2norm=True, **options)


def test_segments_in_bfloat16(segments):
    check("triton", random_inputs(T=1100, H=1, HV=1, K=64, V=64, dtype=torch.bfloat16, state=torch.float32))


def test_segments_are_cut_on_an_empty_card_only():
    """A function of shapes; under deterministic algorithms a row's bits do not depend on the batch around it."""
    from fla_ops.kernels import delta_rule

    x = torch.empty(0)
    torch.use_deterministic_algorithms(False)
    assert delta_rule._segment_chunks(4096, 4, 1, x) is not None
    assert delta_rule._segment_chunks(4096, 400, 1, x) is None
    assert delta_rule._segment_chunks(8, 4, 1, x) is None
    torch.use_deterministic_algorithms(True)
    assert delta_rule._segment_chunks(4096, 4, 1, x) is None


# Chunks that take fewer tokens than a tile has rows.


@pytest.mark.parametrize("rows", [63, 60, 15])
@pytest.mark.parametrize("lengths", [None, [64, 0, 66]], ids=["one", "packed"])
def test_live_rows(rows, lengths, interpreters_rows):
    """Straight to the launchers: no public function asks for it yet."""
    from fla_ops.kernels import delta_rule

    interpreters_rows(DEVICE == "cpu")  # float64 tiles of 64 rows
    inputs = random_inputs(
        T=130, H=1, HV=2, K=20, V=24, dtype=torch.float64, state=torch.float64,
        sequences=None if lengths is None else len(lengths),
    )  # fmt: skip
    cu_seqlens = None if lengths is None else bounds(lengths)
    do, ds = random_cotangents(inputs, None if lengths is None else len(lengths))
    ref64, ref_low = references(inputs, do, ds, cu_seqlens=cu_seqlens)
    there = [x.to(DEVICE) for x in inputs.values()] + [None if cu_seqlens is None else cu_seqlens.to(DEVICE)]
    options = {"scale": 20**-0.5, "qk_l2norm": False, "rows": rows}
    o, final, states = delta_rule.forward(*there, save_states=True, **options)
    grads = delta_rule.backward(*there, states, do.to(DEVICE), ds.to(DEVICE), needs=(True,) * 6, **options)
    names = ("o", "final_state", "dq", "dk", "dv", "dbeta", "dg", "dinitial_state")
    for name, x in zip(names, (o, final, *grads), strict=True):
        assert_matches_reference(x, ref64[name], ref_low[name], name, gradient=name.startswith("d"))


@pytest.mark.slow
@pytest.mark.parametrize("gate", [None, "normal"], ids=["plain", "gated"])
@pytest.mark.parametrize("lengths", [None, [17, 0, 18]], ids=["one", "packed"])
def test_gradcheck_over_chunks(gate, lengths):
    """Numerical differences in float64 through the real kernels: three chunks of 16 or more tokens, grouped heads."""
    inputs = random_inputs(
        T=35, H=1, HV=2, K=9, V=3, dtype=torch.float64, gate=gate, state=torch.float64,
        sequences=None if lengths is None else len(lengths),
    )  # fmt: skip
    given = {name: x.to(DEVICE).requires_grad_() for name, x in inputs.items() if x is not None}
    options = {"output_final_state": True, "qk_l2norm": True, "backend": "triton"}
    options["cu_seqlens"] = None if lengths is None else bounds(lengths).to(DEVICE)

    def op(*tensors):
        return tuple(fla_ops.delta_rule(**dict(zip(given, tensors, strict=True)), **options))

    assert torch.autograd.gradcheck(op, tuple(given.values()), fast_mode=True)
