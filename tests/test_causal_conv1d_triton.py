# SPDX-License-Identifier: Apache-2.0
"""What only the Triton kernels of the causal convolution can get wrong: edges of tiles and runs, reads outside, bounds.

Without a GPU they run in Triton's interpreter, where a program takes a good part of a second: few and small cases.
"""

import pytest
import torch

from fla_ops import _backend, causal_conv1d
from fla_ops.reference.causal_conv1d import causal_conv1d as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = _backend.why_not("causal_conv1d", "triton", DEVICE, torch.float32, ())
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(autouse=True)
def tiles_of_a_gpu(interpreters_rows):
    """The interpreter's own row of the launch table, wider for its speed, is what the other tests run."""
    interpreters_rows(False)


LAYOUTS = {
    "channel-first": lambda x: x,
    "channel-last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}


def run(op, inputs, dy, dfinal, layout, **options):
    """y, final_state and the gradients of every input."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    x, weight, bias, state = leaves
    y, final = op(layout(x), weight, bias, initial_state=state, output_final_state=True, activation="silu", **options)
    return y, final, *torch.autograd.grad((y, final), leaves, (layout(dy), dfinal))


def make(W, L, D, N, dtype=torch.float64):
    sizes = ((1, D, L), (D, W), (D,), (N, D, W - 1), (1, D, L), (N, D, W - 1))
    *inputs, dy, dfinal = (torch.randn(size, dtype=dtype, device=DEVICE) for size in sizes)
    return inputs, dy, dfinal


def check(W, L, D, layout, bounds=None):
    bounds = bounds if bounds is None else torch.tensor(bounds, device=DEVICE)
    problem = make(W, L, D, 1 if bounds is None else len(bounds) - 1)
    wanted = run(reference, *problem, LAYOUTS[layout], cu_seqlens=bounds)
    actual = run(causal_conv1d, *problem, LAYOUTS[layout], cu_seqlens=bounds, backend="triton")
    for name, a, b in zip(
        ("y", "final_state", "dx", "dweight", "dbias", "dinitial_state"), actual, wanted, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


# In float64 a channel-first tile has 64 tokens (256 where L is odd) of 4 channels; a
# channel-last tile hundreds of tokens of few channels, 32 tokens of 64 channels or more.
@pytest.mark.parametrize(
    ("layout", "W", "L", "D"),
    [
        ("channel-first", 4, 62, 65),  # the last run of a tile is empty, a channel is left over
        ("channel-first", 4, 66, 1),  # one run in the second tile
        ("channel-first", 8, 192, 1),  # a tile without masks, and a state longer than a run
        ("channel-first", 3, 257, 1),  # token by token, one in the second tile
        ("channel-last", 4, 33, 65),  # one token, one channel over
        ("channel-last", 2, 96, 64),  # tiles without masks, neighbours on both sides
        ("channel-last", 8, 6, 3),  # shorter than the state
    ],
)
def test_edges_of_tiles(layout, W, L, D):
    check(W, L, D, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_boundaries_at_edges_of_tiles(layout):
    """Sequences that end on, one before and one behind the edge of a tile, and empty ones there."""
    check(4, 130, 2 if layout == "channel-first" else 64, layout, [0, 31, 32, 32, 33, 63, 64, 64, 65, 127, 130, 130])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_uncovered_and_bad_bounds(layout):
    """Bounds that only the device knows: tokens of no sequence are 0, whatever they hold; every result is written."""
    from fla_ops.kernels import causal_conv1d as kernels

    (x, weight, bias, state), dy, dfinal = make(4, 70, 2, 2)
    x[:, :, :3] = torch.nan
    x, dy = LAYOUTS[layout](x), LAYOUTS[layout](dy)
    bounds = torch.tensor([3, 40, 66], device=DEVICE)
    y, _ = kernels.forward(x, weight, bias, state, bounds, activation="silu")
    grads = kernels.backward(x, weight, bias, state, bounds, dy, dfinal, activation="silu", needs=(True,) * 4)
    for result in (y, grads[0]):
        assert (result[:, :, :3] == 0).all() and (result[:, :, 66:] == 0).all()
    inside = (x[:, :, 3:66], weight, bias, state), dy[:, :, 3:66], dfinal
    wanted = run(reference, *inside, LAYOUTS[layout], cu_seqlens=bounds - 3)
    torch.testing.assert_close(y[:, :, 3:66], wanted[0], rtol=1e-12, atol=1e-12)
    for got, want in zip((grads[0][:, :, 3:66], *grads[1:]), wanted[2:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)

    x = x.nan_to_num()
    for garbage in ([-5, 50, 20], [70, 0, 1000], [2**40, -(2**40), 3]):
        bounds = torch.tensor(garbage, device=DEVICE)
        results = [*kernels.forward(x, weight, bias, state, bounds, activation="silu")]
        results += kernels.backward(x, weight, bias, state, bounds, dy, dfinal, activation="silu", needs=(True,) * 4)
        assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_nothing_outside(layout):
    """Inputs between guard bands of NaN: no tap, no neighbouring run and no padding lane reads them."""

    def guarded(t):
        t = t.transpose(1, 2) if layout == "channel-last" and t.dim() == 3 else t
        wide = torch.full((t.numel() + 4096,), torch.nan, dtype=t.dtype, device=t.device)
        inside = wide[2048 : 2048 + t.numel()].view(t.shape)
        inside.copy_(t)
        return inside.transpose(1, 2) if layout == "channel-last" and t.dim() == 3 else inside

    for L in (66, 67):
        inputs, dy, dfinal = make(4, L, 3, 1)
        wanted = run(reference, inputs, dy, dfinal, LAYOUTS[layout])
        given = [guarded(t).requires_grad_() for t in inputs]
        x, weight, bias, state = given
        options = {"initial_state": state, "output_final_state": True, "activation": "silu", "backend": "triton"}
        outputs = causal_conv1d(x, weight, bias, **options)
        actual = (*outputs, *torch.autograd.grad(outputs, given, (guarded(dy), guarded(dfinal))))
        for got, want in zip(actual, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
def test_not_finite_stays_in_its_window(layout):
    """NaN and infinity in the last tokens: every result is finite exactly where the reference's is."""
    for value in (torch.nan, torch.inf):
        (x, *others), dy, dfinal = make(4, 37, 3, 1)
        x[0, 1, 36] = x[0, 2, 20] = value
        problem = (x, *others), dy, dfinal, LAYOUTS[layout]
        for got, want in zip(run(causal_conv1d, *problem, backend="triton"), run(reference, *problem), strict=True):
            assert torch.equal(got.isfinite(), want.isfinite())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout):
    (x, weight, bias, state), _, _ = make(3, 8, 2, 3)
    leaves = [t.requires_grad_() for t in (x, weight, bias, state)]
    bounds = torch.tensor([0, 1, 1, 8], device=DEVICE)

    def f(x, weight, bias, state):
        options = {"activation": "silu", "cu_seqlens": bounds, "output_final_state": True, "backend": "triton"}
        return tuple(causal_conv1d(LAYOUTS[layout](x), weight, bias, initial_state=state, **options))

    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_partial_sums_and_layout(layout, monkeypatch):
    """Several tiles a program leave the sums right and the bits the same from run to run; outputs keep the layout."""
    from fla_ops.kernels import causal_conv1d as kernels

    monkeypatch.setattr(kernels, "FILL", 1)
    monkeypatch.setattr(kernels, "multiprocessors", lambda x: 1)
    D = 64 if layout == "channel-last" else 1
    check(4, 100 if layout == "channel-last" else 200, D, layout)
    inputs, dy, dfinal = make(4, 100, D, 1)
    first, second = (run(causal_conv1d, inputs, dy, dfinal, LAYOUTS[layout], backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    x = LAYOUTS[layout](inputs[0])
    assert causal_conv1d(x, *inputs[1:3], backend="triton").y.stride() == x.stride()
