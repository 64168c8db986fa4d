# SPDX-License-Identifier: Apache-2.0
"""Activations as changes: summed up they are the quantised activations, to the last bit, and a linear layer of them is
the dense layer of those."""

import math

import pytest
import torch
from torch.nn import functional as F

from fla_ops.layers import DeltaActivation, DeltaLinear
from fla_ops.layers import delta_linear as module

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
sizes = pytest.mark.parametrize("per_channel", [False, True], ids=["one step", "a step a channel"])


def exact(dtype):
    return torch.promote_types(dtype, torch.float32)


def slow_inputs(B=2, T=50, size=12, dtype=torch.float32):
    """Activations that move by about a quarter of their size from token to token."""
    return (torch.randn(B, T, size, dtype=torch.float64).cumsum(1) / 4).to(dtype)


def make(size, per_channel, dtype=torch.float32):
    layer = DeltaActivation(size if per_channel else None, init=0.3, dtype=dtype)
    with torch.no_grad():
        layer.threshold.copy_(torch.rand(layer.threshold.shape) + 0.05)
    return layer


def short(q, bits):
    """q to so many bits, a number by itself."""
    mantissa, exponent = math.frexp(q)
    return math.ldexp(round(mantissa * 2**bits), exponent - bits)


@dtypes
@sizes
def test_quantize_is_its_formula(dtype, per_channel):
    x, layer = slow_inputs(dtype=dtype), make(12, per_channel, dtype)
    q = layer.threshold.detach().to(exact(dtype)).expand(12)
    o = layer.quantize(x)
    assert o.dtype == exact(dtype)
    for c in range(12):
        step = torch.tensor(short(q[c].item(), 26 if dtype == torch.float64 else 11), dtype=exact(dtype))
        assert abs(step - q[c]) <= q[c] * 2.0**-11
        codes = o[..., c] / step
        assert torch.equal(codes, codes.round()) and torch.equal(codes * step, o[..., c])
        assert ((o[..., c] - x[..., c].to(o.dtype)).abs() <= step / 2 * (1 + 1e-5)).all()


def test_a_threshold_counts_by_its_size_and_zero_is_the_least():
    x = slow_inputs()
    assert torch.equal(with_threshold(-0.3).quantize(x), with_threshold(0.3).quantize(x))
    assert torch.equal(with_threshold(0.0).quantize(x), with_threshold(2.0**-20).quantize(x))
    assert with_threshold(0.0).quantize(x).isfinite().all()


def with_threshold(value):
    layer = DeltaActivation()
    torch.nn.init.constant_(layer.threshold, value)
    return layer


@dtypes
@sizes
@pytest.mark.parametrize("seed", range(3))
def test_changes_add_up_to_the_activation_exactly(dtype, per_channel, seed):
    torch.manual_seed(seed)
    x, layer = slow_inputs(T=300, dtype=dtype), make(12, per_channel, dtype)
    y, o = layer(x), layer.quantize(x)
    assert y.dtype == o.dtype == exact(dtype)
    held = torch.zeros_like(o[:, 0])
    for t in range(300):
        held = held + y[:, t]
        assert torch.equal(held, o[:, t])


def test_changes_are_exact_up_to_4096_steps():
    layer = with_threshold(0.123)
    x = (torch.rand(1, 2000, 50) * 2 - 1) * 4095 * 0.123
    assert torch.equal(layer(x).double().cumsum(1), layer.quantize(x).double())


@dtypes
@sizes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_delta_inference_is_quantised_dense_inference(dtype, per_channel, bias, seed):
    """Before the last rounding they differ by float64's roundings."""
    torch.manual_seed(seed)
    x, quantize = slow_inputs(T=200, dtype=dtype), make(12, per_channel, dtype)
    linear = DeltaLinear(12, 7, bias=bias, dtype=dtype)
    with torch.no_grad():
        y, z = linear(quantize(x), return_state=True)
        dense = F.linear(quantize.quantize(x).double(), linear.weight.double())
    assert z.dtype == torch.float64 and y.dtype == dtype
    torch.testing.assert_close(z, dense[:, -1], rtol=1e-12, atol=1e-12)
    if bias:
        dense = dense + linear.bias.double()
    torch.testing.assert_close(y.double(), dense, rtol=torch.finfo(dtype).eps, atol=1e-12)


def test_nothing_drifts_over_100_000_tokens():
    quantize, linear = with_threshold(0.1), DeltaLinear(3, 2, bias=False)
    x = torch.randn(1, 100_000, 3)
    with torch.no_grad():
        y, z = linear(quantize(x), return_state=True)
        dense = F.linear(quantize.quantize(x).double(), linear.weight.double())
    torch.testing.assert_close(z, dense[:, -1], rtol=0, atol=1e-10)
    torch.testing.assert_close(y.double(), dense, rtol=2.0**-23, atol=1e-10)


@dtypes
def test_any_split_gives_the_same(dtype):
    """Chunks, empty ones too, and steps."""
    x, quantize, linear = slow_inputs(T=20, dtype=dtype), make(12, True, dtype), DeltaLinear(12, 7, dtype=dtype)
    with torch.no_grad():
        changes, o = quantize(x, return_state=True)
        y, z = linear(changes, return_state=True)
        for lengths in ([20], [1] * 20, [0, 7, 0, 13, 0], [19, 1]):
            held = summed = None
            parts = []
            for part in x.split(lengths, 1):
                before = None if held is None else (held.clone(), summed.clone())
                given = held, summed
                found, held = quantize(part, state=held, return_state=True)
                out, summed = linear(found, state=summed, return_state=True)
                assert before is None or all(map(torch.equal, before, given))
                parts.append((found, out))
            assert torch.equal(torch.cat([found for found, _ in parts], 1), changes) and torch.equal(held, o)
            torch.testing.assert_close(torch.cat([out for _, out in parts], 1), y)
            torch.testing.assert_close(summed, z, rtol=1e-12, atol=1e-12)
        held, summed = torch.zeros_like(o), torch.zeros_like(z)
        for t in range(20):
            found = quantize.step(x[:, t], held)
            assert torch.equal(found, changes[:, t])
            torch.testing.assert_close(linear.step(found, summed), y[:, t])
        assert torch.equal(held, o)
        torch.testing.assert_close(summed, z, rtol=1e-12, atol=1e-12)


def by_autograd(x, threshold):
    """o whose derivatives torch finds: straight through to x, minus the codes to the step."""
    step = threshold.abs()
    codes = (x / step).round().detach()
    return x + (codes * step - x).detach() - codes * (threshold - threshold.detach())


@sizes
def test_gradients(per_channel):
    """Of changes and of both layers together: by hand, and by torch through the definition."""
    x = slow_inputs(T=30, dtype=torch.float64).requires_grad_()
    layer = make(12, per_channel, torch.float64)
    with torch.no_grad():
        layer.threshold.copy_((layer.threshold * 1024).round() / 1024)  # the bits that the layer keeps
    dy = torch.randn(2, 30, 12, dtype=torch.float64)
    dx, dthreshold = torch.autograd.grad(layer(x), (x, layer.threshold), dy)
    do = dy - F.pad(dy[:, 1:], (0, 0, 0, 1))
    assert torch.equal(dx, do)
    codes = (x / layer.threshold).round()
    by_hand = -(do * codes).sum((0, 1) if per_channel else None)
    torch.testing.assert_close(dthreshold, by_hand)
    o = by_autograd(x, layer.threshold)
    torch.testing.assert_close(o, layer.quantize(x))
    expected = torch.autograd.grad(torch.diff(o, dim=1, prepend=o.new_zeros(2, 1, 12)), (x, layer.threshold), dy)
    torch.testing.assert_close((dx, dthreshold), expected)

    linear = DeltaLinear(12, 7, dtype=torch.float64)
    leaves = (x, layer.threshold, linear.weight, linear.bias)
    dz = torch.randn(2, 30, 7, dtype=torch.float64)
    found = torch.autograd.grad(linear(layer(x)), leaves, dz)
    expected = torch.autograd.grad(F.linear(by_autograd(x, layer.threshold), linear.weight, linear.bias), leaves, dz)
    torch.testing.assert_close(found, expected)


def test_gradients_through_states():
    x, quantize, linear = slow_inputs(T=9, dtype=torch.float64), make(12, True), DeltaLinear(12, 7, dtype=torch.float64)
    leaves = [*quantize.parameters(), *linear.parameters()]
    whole = torch.autograd.grad(linear(quantize(x)).square().sum(), leaves)
    held = summed = None
    parts = []
    for part in x.split([4, 5], 1):
        changes, held = quantize(part, state=held, return_state=True)
        y, summed = linear(changes, state=summed, return_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.autograd.grad(torch.cat(parts, 1).square().sum(), leaves), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bits_have_their_dtype(dtype):
    x = slow_inputs(dtype=dtype).requires_grad_()
    layer = make(12, True, dtype)
    layer(x).sum().backward()
    assert x.grad.dtype == layer.threshold.grad.dtype == dtype


def test_only_what_fired_is_multiplied(monkeypatch):
    multiplied = []
    plain = F.linear
    monkeypatch.setattr(module.F, "linear", lambda x, w: multiplied.append(w.shape[1]) or plain(x, w))
    layer = DeltaLinear(6, 4)
    x = torch.zeros(1, 5, 6)
    x[0, 1, 2] = x[0, 3, 5] = 1.0
    with torch.no_grad():
        layer(x)
        state = torch.zeros(1, 4, dtype=torch.float64)
        for t in range(5):
            layer.step(x[:, t], state)
        layer(torch.ones(1, 5, 6))
    layer(x)
    assert multiplied == [2, 0, 1, 0, 1, 0, 6, 6]


def test_the_penalty():
    y = torch.randn(3, 7, 5)
    layer = DeltaActivation()
    torch.testing.assert_close(layer.penalty(y), 5 * y[:, 1:].abs().sum() / (3 * 6 * 5))
    assert layer.penalty(y[:, :1]) == 0


def test_nan_is_not_swallowed():
    x = torch.zeros(1, 4, 2)
    x[0, 1, 0] = torch.nan
    y = DeltaActivation()(x)
    assert y.isnan().nonzero().tolist() == [[0, 1, 0], [0, 2, 0]]


def test_parameters():
    """Those of torch's own Linear; reset after to_empty."""
    torch.manual_seed(3)
    ours = DeltaLinear(5, 3)
    torch.manual_seed(3)
    plain = torch.nn.Linear(5, 3)
    assert torch.equal(ours.weight, plain.weight)
    ours.load_state_dict(plain.state_dict())
    layer = DeltaActivation(4, init=0.7, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer.threshold.detach(), torch.full((4,), 0.7))


@pytest.mark.no_poison
def test_compiles_whole():
    x, quantize, linear = slow_inputs(), make(12, True), DeltaLinear(12, 7)
    compiled = torch.compile(lambda x: linear(quantize(x)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), linear(quantize(x)))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), linear(quantize(x)))


X = torch.zeros(2, 3, 4)
BAD = [
    (ValueError, r"DeltaActivation: argument 'size' must be at least 1, got 0", lambda: DeltaActivation(0)),
    (TypeError, r"argument 'size' must be an int, got 1\.5", lambda: DeltaActivation(1.5)),
    (ValueError, r"argument 'init' must be above 0 and finite, got -0\.1", lambda: DeltaActivation(init=-0.1)),
    (ValueError, r"argument 'init' must be above 0 and finite, got nan", lambda: DeltaActivation(init=math.nan)),
    (TypeError, r"argument 'init' must be a number, got '0'", lambda: DeltaActivation(init="0")),
    (TypeError, r"argument 'x' must be a tensor, got list", lambda: DeltaActivation()([1.0])),
    (TypeError, r"argument 'x' must be a floating tensor, got torch.int64", lambda: DeltaActivation()(X.long())),
    (ValueError, r"'x' must be of shape \[B, T, size=5\], got \[2, 3, 4\]", lambda: DeltaActivation(5)(X)),
    (ValueError, r"'x' must be of shape \[B, T, size\], got \[3, 4\]", lambda: DeltaActivation()(X[0])),
    (ValueError, r"quantize: argument 'x' must be .*size=5\]", lambda: DeltaActivation(5).quantize(X)),
    (ValueError, r"step: argument 'x' must be of shape \[B, size\]", lambda: DeltaActivation().step(X, X[:, 0])),
    (TypeError, r"argument 'return_state' must be True", lambda: DeltaActivation()(X, return_state=1)),
    (TypeError, r"argument 'state' must be a tensor", lambda: DeltaActivation()(X, state=0)),
    (TypeError, r"'state' must be torch.float32, as", lambda: DeltaActivation()(X, state=X[:, 0].double())),
    (ValueError, r"'state' must be of shape \[B=2, size=4\]", lambda: DeltaActivation()(X, state=X[:, 0, :3])),
    (RuntimeError, r"step: something requires a gradient", lambda: DeltaActivation().step(X[:, 0], X[:, 0].clone())),
    (ValueError, r"penalty: argument 'y' must be of shape", lambda: DeltaActivation().penalty(X[0])),
    (ValueError, r"DeltaLinear: argument 'x' must be of shape \[B, T, in_features=5\]", lambda: DeltaLinear(5, 2)(X)),
    (TypeError, r"argument 'x' must be a floating tensor", lambda: DeltaLinear(4, 2)(X.int())),
    (TypeError, r"argument 'return_state' must be True", lambda: DeltaLinear(4, 2)(X, return_state=None)),
    (TypeError, r"'state' must be torch.float64", lambda: DeltaLinear(4, 2)(X, state=torch.zeros(2, 2))),
    (ValueError, r"'state' must be of", lambda: DeltaLinear(4, 2)(X, state=torch.zeros(3, 2).double())),
    (RuntimeError, r"step: something", lambda: DeltaLinear(4, 2).step(X[:, 0], torch.zeros(2, 2).double())),
]


@pytest.mark.parametrize(("error", "said", "call"), BAD)
def test_bad_inputs(error, said, call):
    with pytest.raises(error, match=said):
        call()
