# SPDX-License-Identifier: Apache-2.0
"""The causal convolution against its float64 reference, and what its states, packing and layouts promise."""

import itertools

import pytest
import torch
from causal_conv1d_cases import CHANNELS, DTYPES, LAYOUTS, check, gradients_for, leaves, make, run

import fla_ops
from fla_ops import causal_conv1d, causal_conv1d_step
from fla_ops.reference.causal_conv1d import causal_conv1d as reference

LENGTHS = [0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 200]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_round_as_torch_rounds(dtype, all_levels):
    """One tap: a single product a result, so its rounding shows, bit for bit. Subnormal numbers may become zero."""
    x = (torch.randn(1, 64, 500) * torch.exp2(torch.randint(-12, 12, (1, 64, 500)))).to(dtype)
    x[0, :4, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    weight = torch.randn(64, 1)
    expected = (x.float() * weight).to(dtype)
    normal = ~(expected.abs() < torch.finfo(dtype).tiny) | (expected == 0)
    for level in all_levels():
        for layout in ("channel-first", "channel-last"):
            y = causal_conv1d(LAYOUTS[layout](x), weight, backend="native").y
            same = (y == expected) | (y.isnan() & expected.isnan())
            assert same[normal].all(), (level, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(dtype, layout, backend, ways):
    """Every width and length, at every level of the CPU kernels, with a state and gradients through both results."""
    if backend == "reference":
        pytest.skip("it is what the others are compared with")
    # Triton's interpreter takes a second a case; the edges of its tiles are in test_causal_conv1d_triton.py.
    widths, lengths = ((1, 2, 4, 8), (0, 3, 17, 65, 200)) if backend == "triton" else (range(1, 9), LENGTHS)
    for W, L in itertools.product(widths, lengths):
        activation = "silu" if (W + L) % 2 else None
        inputs = make(W, L, dtype, bias=L != 3, state=L != 17)
        dy, dfinal = gradients_for(inputs)
        options = {"layout": LAYOUTS[layout], "activation": activation, "backend": backend}
        actual = {way: run(causal_conv1d, inputs, dy, dfinal, **options) for way in ways()}
        for way, results in actual.items():
            check(results, inputs, dy, dfinal, f"{way}, W={W}, L={L}", activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backend_matches_reference(dtype, backend):
    inputs = make(4, 65, dtype)
    dy, dfinal = gradients_for(inputs)
    actual = run(causal_conv1d, inputs, dy, dfinal, activation="silu", backend=backend)
    check(actual, inputs, dy, dfinal, backend, activation="silu")


@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_blocks_and_parts(dtype, layout, backend, ways):
    """Rows longer than a block, more chunks than parts, few channels, and channels in groups."""
    for B, D, L in ((1, 3, 1500), (70, 20, 70), (1, 600, 90)):
        inputs = make(4, L, dtype, B=B, D=D)
        dy, dfinal = gradients_for(inputs)
        options = {"layout": LAYOUTS[layout], "activation": "silu", "backend": backend}
        actual = {way: run(causal_conv1d, inputs, dy, dfinal, **options) for way in ways()}
        for way, results in actual.items():
            check(results, inputs, dy, dfinal, f"{way}: {B}, {D}, {L}", activation="silu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weights_with_low_precision_inputs(dtype, backend):
    inputs = make(4, 65, dtype, side=torch.float32)
    dy, dfinal = gradients_for(inputs)
    actual = run(causal_conv1d, inputs, dy, dfinal, activation="silu", backend=backend)
    assert actual["dweight"].dtype == actual["dbias"].dtype == torch.float32
    check(actual, inputs, dy, dfinal, backend, activation="silu")


@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
def test_gradcheck(layout, native):
    x, weight, bias, state = leaves(make(3, 11, torch.float64, B=1, D=3, N=4))
    cu_seqlens = torch.tensor([0, 4, 4, 5, 11])

    def f(x, weight, bias, state):
        x = LAYOUTS[layout](x)
        options = {"activation": "silu", "cu_seqlens": cu_seqlens, "output_final_state": True, "backend": native}
        return tuple(causal_conv1d(x, weight, bias, initial_state=state, **options))

    assert torch.autograd.gradcheck(f, (x, weight, bias, state))


@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
def test_keeps_the_layout(layout, native):
    x, weight, _, _ = make(4, 10, torch.float32)
    x = LAYOUTS[layout](x)
    assert causal_conv1d(x, weight, backend=native).y.stride() == x.stride()


@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
def test_any_incoming_gradient(layout, backend):
    """Gradients that arrive expanded, transposed, sliced or through cat and split."""
    inputs = make(4, 20, torch.float64)
    dfinal = torch.zeros_like(inputs[3])
    for disguise in (*LAYOUTS.values(), lambda g: g.sum((1, 2), keepdim=True).expand(g.shape)):
        dy = disguise(torch.randn(inputs[0].shape, dtype=torch.float64))
        x, weight, bias, state = leaves(inputs)
        y = causal_conv1d(LAYOUTS[layout](x), weight, bias, initial_state=state, activation="silu", backend=backend).y
        grads = torch.autograd.grad(y, (x, weight, bias, state), dy)
        wanted = run(reference, inputs, dy, dfinal, activation="silu")
        for got, name in zip(grads, ("dx", "dweight", "dbias", "dinitial_state"), strict=True):
            torch.testing.assert_close(got, wanted[name], rtol=1e-12, atol=1e-12)


def test_only_needed_gradients(backend):
    inputs = make(4, 20, torch.float64)
    dy, dfinal = gradients_for(inputs)
    wanted = list(run(reference, inputs, dy, dfinal, activation="silu").values())[2:]
    for count in range(1, 5):
        for needed in itertools.combinations(range(4), count):
            given = [t.clone().requires_grad_(i in needed) for i, t in enumerate(inputs)]
            y, final = causal_conv1d(
                *given[:3], activation="silu", initial_state=given[3], output_final_state=True, backend=backend
            )
            loss = (y * dy).sum() + (final * dfinal).sum()
            grads = torch.autograd.grad(loss, [given[i] for i in needed])
            for i, grad in zip(needed, grads, strict=True):
                torch.testing.assert_close(grad, wanted[i], rtol=1e-12, atol=1e-12)


def test_saves_nothing_without_gradients(native):
    x, weight, _, _ = make(4, 20, torch.float32)
    with torch.inference_mode():
        assert causal_conv1d(x, weight, backend=native).y.is_inference()
    weight.requires_grad_()
    with torch.no_grad():
        assert causal_conv1d(x, weight, backend=native).y.grad_fn is None


def test_saves_only_the_inputs(native):
    saved = []
    inputs = leaves(make(4, 20, torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        causal_conv1d(*inputs[:3], initial_state=inputs[3], activation="silu", backend=native)
    assert set(saved) <= {t.data_ptr() for t in inputs}


def test_double_backward_is_refused(native):
    x, weight, _, _ = leaves(make(4, 20, torch.float32))
    y = causal_conv1d(x, weight, backend=native).y
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


# ------------------------------------------------------------------------------- sequences and states


@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
def test_packed_is_separate(layout, backend):
    """Random splits, with empty and short sequences: outputs, states and all gradients."""
    generator = torch.Generator().manual_seed(1)
    for W in (1, 2, 4, 8):
        lengths = torch.randint(0, 7, (9,), generator=generator).tolist() + [0, 63, 64, 65, 1, 130, 0]
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        N, L = len(lengths), sum(lengths)
        inputs = make(W, L, torch.float64, B=1, N=N)
        dy, dfinal = gradients_for(inputs, N)
        packed = run(
            causal_conv1d,
            inputs,
            dy,
            dfinal,
            layout=LAYOUTS[layout],
            activation="silu",
            cu_seqlens=bounds,
            backend=backend,
        )
        x, weight, bias, state = inputs
        parts = [
            run(
                causal_conv1d,
                (x[:, :, a:b], weight, bias, state[n : n + 1]),
                dy[:, :, a:b],
                dfinal[n : n + 1],
                layout=LAYOUTS[layout],
                activation="silu",
                backend=backend,
            )
            for n, (a, b) in enumerate(itertools.pairwise(bounds.tolist()))
        ]
        for name, value in packed.items():
            pieces = [p[name] for p in parts]
            if name in ("y", "dx"):
                wanted = torch.cat(pieces, 2)
            elif name in ("dweight", "dbias"):
                wanted = sum(pieces)
            else:
                wanted = torch.cat(pieces)
            torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12, msg=f"W={W}: {name}")


@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
def test_packed_sequences_do_not_touch(layout, backend):
    """Nothing of a sequence, NaN included, reaches another one."""
    x, weight, bias, _ = make(4, 30, torch.float32, B=1)
    bounds = torch.tensor([0, 11, 13, 30])
    clean = causal_conv1d(LAYOUTS[layout](x), weight, bias, cu_seqlens=bounds, activation="silu", backend=backend).y
    x[:, :, 11:13] = torch.nan
    dirty = causal_conv1d(LAYOUTS[layout](x), weight, bias, cu_seqlens=bounds, activation="silu", backend=backend).y
    assert dirty[:, :, 11:13].isnan().all()
    assert torch.equal(clean[:, :, :11], dirty[:, :, :11])
    assert torch.equal(clean[:, :, 13:], dirty[:, :, 13:])


@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite_stays_in_its_window(layout, value, all_levels):
    """At the last token and at a vector's edge: y and every gradient are not finite exactly where the reference is."""
    inputs = make(4, 37, torch.float32)
    inputs[0][0, 3, 36] = inputs[0][1, 5, 15] = value
    inputs[0][0, 7, 20], inputs[0][0, 8, 20] = -1e30, 1e30  # far outside of the exponential's range
    dy, dfinal = gradients_for(inputs)
    for activation in (None, "silu"):
        wanted = run(reference, inputs, dy, dfinal, activation=activation)
        for _ in all_levels():
            options = {"layout": LAYOUTS[layout], "activation": activation, "backend": "native"}
            actual = run(causal_conv1d, inputs, dy, dfinal, **options)
            for name in wanted:
                assert torch.equal(actual[name].isfinite(), wanted[name].isfinite()), name


def test_uncovered_columns_are_zero(native):
    """Bounds that only the device knows: columns outside of every sequence are 0, bounds are clamped."""
    x, weight, bias, _ = make(4, 12, torch.float32, B=1)
    forward, backward = torch.ops.fla_ops.causal_conv1d_forward, torch.ops.fla_ops.causal_conv1d_backward
    for layout in ("channel-first", "channel-last"):
        z = LAYOUTS[layout](x)
        y, _ = forward(z, weight, bias, None, torch.tensor([2, 5, 9]), True)
        dx = backward(z, weight, bias, None, torch.tensor([2, 5, 9]), True, z, None, 1)[0]
        for result in (y, dx):
            assert (result[:, :, :2] == 0).all() and (result[:, :, 9:] == 0).all() and result.isfinite().all()
        y, final = forward(z, weight, bias, None, torch.tensor([-3, 7, 4, 99]), True)
        assert torch.equal(y, forward(z, weight, bias, None, torch.tensor([0, 7, 7, 12]), True)[0])
        assert final.shape[0] == 3


@pytest.mark.parametrize("W", [1, 2, 4, 8])
def test_any_split_is_exact(W, backend):
    """Chunked prefill, with pieces shorter than the state, forward and backward through the states."""
    inputs = make(W, 40, torch.float64)
    dy, dfinal = gradients_for(inputs)
    wanted = run(causal_conv1d, inputs, dy, dfinal, activation="silu", backend=backend)
    x, weight, bias, initial = leaves(inputs)
    state, pieces = initial, []
    for piece in x.split([1, 2, 0, 3, 1, 17, 16], 2):
        y, state = causal_conv1d(
            piece, weight, bias, activation="silu", initial_state=state, output_final_state=True, backend=backend
        )
        pieces.append(y)
    y = torch.cat(pieces, 2)
    grads = torch.autograd.grad((y, state), (x, weight, bias, initial), (dy, dfinal))
    for got, name in zip((y, state, *grads), wanted, strict=True):
        torch.testing.assert_close(got, wanted[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_initial_state_of_any_dtype_is_left_alone(dtype, backend):
    x, weight, bias, state = make(4, 2, torch.float32)
    state = state.to(dtype)
    before = state.clone()
    final = causal_conv1d(
        x, weight, bias, initial_state=state, output_final_state=True, activation="silu", backend=backend
    ).final_state
    assert torch.equal(state, before)
    assert final.dtype == torch.float32
    assert torch.equal(final, torch.cat([state.float()[:, :, 2:], x], 2))


def test_empty_inputs(backend):
    for B, L, N in ((0, 5, None), (2, 0, None), (1, 0, 0), (1, 0, 2)):
        x, weight, bias, state = leaves(make(4, L, torch.float32, B=B, N=N))
        bounds = None if N is None else torch.zeros(N + 1, dtype=torch.int64)
        y, final = causal_conv1d(
            x, weight, bias, initial_state=state, output_final_state=True, cu_seqlens=bounds, backend=backend
        )
        assert y.shape == x.shape and final.shape == state.shape
        assert torch.equal(final, state) or L > 0
        (y.sum() + final.sum()).backward()
        assert x.grad.shape == x.shape
        assert all(p.grad is None or (p.grad == 0).all() for p in (weight, bias))
        assert N == 0 or L > 0 or (state.grad == 1).all()


# ---------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_is_the_full_op(dtype, backend):
    for W, D in itertools.product((1, 2, 4, 8), (1, CHANNELS, 700)):
        x, weight, bias, state = make(W, 6, dtype, D=D)
        y, final = causal_conv1d(
            x, weight, bias, activation="silu", initial_state=state, output_final_state=True, backend=backend
        )
        for t in range(6):
            now = causal_conv1d_step(x[:, :, t], weight, bias, state=state, activation="swish", backend=backend)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(now, y[:, :, t], rtol=4 * eps, atol=4 * eps)
        assert torch.equal(state, final)


def test_step_at_every_level(all_levels):
    x, weight, bias, state = make(4, 1, torch.float32)
    wanted = reference(x, weight, bias, activation="silu", initial_state=state)[0]
    for _ in all_levels():
        got = causal_conv1d_step(x[:, :, 0], weight, bias, state=state.clone(), activation="silu", backend="native")
        torch.testing.assert_close(got, wanted[:, :, 0])


@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
def test_step_with_slots(state_dtype, backend):
    """State rows picked by index, -1 skipped, in a pool that is a transposed view."""
    x, weight, bias, _ = make(4, 1, torch.float32, B=4)
    pool = torch.randn(7, 3, CHANNELS).to(state_dtype).transpose(1, 2)
    before = pool.clone()
    indices = torch.tensor([5, -1, 0, 3], dtype=torch.int32)
    y = causal_conv1d_step(x[:, :, 0], weight, bias, state=pool, state_indices=indices, backend=backend)
    live = indices != -1
    wanted, final = reference(
        x[live], weight, bias, initial_state=before[indices[live].long()], output_final_state=True
    )
    torch.testing.assert_close(y[live], wanted[:, :, 0])
    assert (y[1] == 0).all()
    assert torch.equal(pool[indices[live].long()], final.to(state_dtype))
    assert torch.equal(pool[[1, 2, 4, 6]], before[[1, 2, 4, 6]])


def test_step_needs_no_gradient(backend):
    x, weight, bias, state = make(4, 1, torch.float32)
    with pytest.raises(RuntimeError, match="a step has no backward"):
        causal_conv1d_step(x[:, :, 0], weight.requires_grad_(), bias, state=state, backend=backend)


# --------------------------------------------------------------------------------------- with torch


@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(dtype, layout, native, threads):
    bounds = torch.tensor([0, 3, 3, 180, 181, 700])
    for B, D, N, cu_seqlens in ((2, 300, None, None), (1, 100, 5, bounds), (3, 20, None, None)):
        inputs = make(4, 700, dtype, B=B, D=D, N=N)
        dy, dfinal = gradients_for(inputs, N)
        options = {"layout": LAYOUTS[layout], "activation": "silu", "cu_seqlens": cu_seqlens, "backend": native}
        results = []
        for count in (1, 2):
            threads(count)
            results.append(run(causal_conv1d, inputs, dy, dfinal, **options))
        for name in results[0]:
            assert torch.equal(results[0][name], results[1][name]), name


def test_autocast(backend):
    x, weight, bias, state = make(4, 9, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, final = causal_conv1d(x, weight, bias, initial_state=state, output_final_state=True, backend=backend)
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert torch.equal(y, causal_conv1d(x.bfloat16(), weight, bias, initial_state=state, backend=backend).y)


@pytest.mark.no_poison
@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
def test_opcheck(layout, native):
    x, weight, bias, state = make(4, 9, torch.bfloat16, B=1, side=torch.float32, N=2)
    x, bounds = LAYOUTS[layout](x), torch.tensor([0, 4, 9])
    utils = ("test_schema", "test_faketensor")
    ops = torch.ops.fla_ops
    torch.library.opcheck(ops.causal_conv1d_forward, (x, weight, bias, state, bounds, True), test_utils=utils)
    for needs in (0, 1, 6, 15):
        args = (x, weight, bias, state, bounds, True, x, state, needs)
        torch.library.opcheck(ops.causal_conv1d_backward, args, test_utils=utils)
    step = (x[:, :, 0], weight, bias, state[:1], True, None)
    torch.library.opcheck(ops.causal_conv1d_step, step, test_utils=utils)


@pytest.mark.no_poison
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # by Dynamo itself
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
def test_compile(layout, native):
    inputs = make(4, 9, torch.float32)
    dy, dfinal = gradients_for(inputs)

    def f(x, weight, bias, initial_state, **_):
        x = LAYOUTS[layout](x)
        return causal_conv1d(
            x, weight, bias, initial_state=initial_state, output_final_state=True, activation="silu", backend=native
        )

    wanted = run(f, inputs, dy, dfinal)
    actual = run(torch.compile(f, fullgraph=True, backend="aot_eager"), inputs, dy, dfinal)
    for name in wanted:
        torch.testing.assert_close(actual[name], wanted[name])


# ----------------------------------------------------------------------------------------- bad inputs

BAD = {
    "activation": (ValueError, {"activation": "relu"}),
    "activation True": (ValueError, {"activation": True}),
    "x of 2 dimensions": (ValueError, {"x": torch.zeros(5, 10)}),
    "x without channels": (ValueError, {"x": torch.zeros(1, 0, 10), "weight": torch.zeros(0, 4)}),
    "x of integers": (TypeError, {"x": torch.zeros(1, 5, 10, dtype=torch.int64)}),
    "x not a tensor": (TypeError, {"x": [1.0]}),
    "weight as nn.Conv1d's": (ValueError, {"weight": torch.zeros(5, 1, 4)}),
    "weight for other channels": (ValueError, {"weight": torch.zeros(6, 4)}),
    "weight of width 0": (ValueError, {"weight": torch.zeros(5, 0)}),
    "weight of width 9": (ValueError, {"weight": torch.zeros(5, 9)}),
    "weight dtype": (TypeError, {"weight": torch.zeros(5, 4, dtype=torch.bfloat16)}),
    "bias shape": (ValueError, {"bias": torch.zeros(5, 1)}),
    "bias dtype": (TypeError, {"bias": torch.zeros(5, dtype=torch.float64)}),
    "bias a number": (TypeError, {"bias": 0.0}),
    "initial_state of W columns": (ValueError, {"initial_state": torch.zeros(1, 5, 4)}),
    "initial_state transposed": (ValueError, {"initial_state": torch.zeros(1, 3, 5)}),
    "initial_state of integers": (TypeError, {"initial_state": torch.zeros(1, 5, 3, dtype=torch.int32)}),
    "output_final_state": (TypeError, {"output_final_state": 1}),
    "cu_seqlens too short": (ValueError, {"cu_seqlens": torch.tensor([0, 9])}),
    "cu_seqlens decreasing": (ValueError, {"cu_seqlens": torch.tensor([0, 7, 5, 10])}),
    "cu_seqlens of floats": (TypeError, {"cu_seqlens": torch.tensor([0.0, 10.0])}),
    "cu_seqlens with a batch": (ValueError, {"x": torch.zeros(2, 5, 10), "cu_seqlens": torch.tensor([0, 10])}),
    "state for B instead of N": (
        ValueError,
        {"cu_seqlens": torch.tensor([0, 4, 10]), "initial_state": torch.zeros(1, 5, 3)},
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, backend):
    error, changed = BAD[case]
    given = {"x": torch.zeros(1, 5, 10), "weight": torch.zeros(5, 4), "bias": torch.zeros(5)} | changed
    blamed = next(name for name in reversed(changed) if name != "x" or len(changed) == 1 or "x without" in case)
    if case == "x without channels":
        blamed = "x"
    with pytest.raises(error, match=f"^causal_conv1d: argument '{blamed}' must be .*, got "):
        causal_conv1d(given.pop("x"), given.pop("weight"), given.pop("bias"), backend=backend, **given)


BAD_STEPS = {
    "state of W columns": (ValueError, "state", {"state": torch.zeros(2, 5, 4)}),
    "state of other rows": (ValueError, "state", {"state": torch.zeros(3, 5, 3)}),
    "x with a time axis": (ValueError, "x", {"x": torch.zeros(2, 5, 1)}),
    "slot out of range": (ValueError, "state_indices", {"state_indices": torch.tensor([0, 2])}),
    "slot below -1": (ValueError, "state_indices", {"state_indices": torch.tensor([0, -2])}),
    "slot given twice": (ValueError, "state_indices", {"state_indices": torch.tensor([1, 1])}),
    "state_indices of floats": (TypeError, "state_indices", {"state_indices": torch.tensor([0.0, 1.0])}),
}


@pytest.mark.parametrize("case", BAD_STEPS)
def test_bad_step(case, backend):
    error, blamed, changed = BAD_STEPS[case]
    given = {"x": torch.zeros(2, 5), "weight": torch.zeros(5, 4), "state": torch.zeros(2, 5, 3)} | changed
    with pytest.raises(error, match=f"^causal_conv1d_step: argument '{blamed}' must be .*, got "):
        causal_conv1d_step(given.pop("x"), given.pop("weight"), backend=backend, **given)


def test_unknown_keyword():
    with pytest.raises(TypeError):
        causal_conv1d(torch.zeros(1, 5, 10), torch.zeros(5, 4), intial_state=None)
    assert fla_ops.causal_conv1d is causal_conv1d
