# SPDX-License-Identifier: Apache-2.0
"""The selective scan's values: the reference against its equation, then every backend against the reference.

Each comparison covers y, the final state and all nine gradients. Sequences, steps and memory:
test_selective_scan_sequences.py.
"""

import itertools
import sys
from functools import partial

import pytest
import torch
from delta_rule_cases import assert_same_bits
from selective_scan_cases import LAYOUTS, TENSORS, call, check, random_cotangents, random_inputs, references, results

import fla_ops
from fla_ops.reference.selective_scan import selective_scan as reference
from fla_ops.testing import assert_matches_reference

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


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=["bfloat16", "float16"])
def test_parameters_in_the_main_dtype(backend, dtype):
    check(backend, random_inputs(dtype=dtype, side=dtype, constant="B"), delta_softplus=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, ways, layout):
    x = random_inputs(state=torch.float32, G=2)
    for name in ("u", "delta", "z", "B", "C"):
        x[name] = LAYOUTS[layout](x[name])
    for _ in ways():
        check(backend, x, delta_softplus=True)


@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
def test_results_have_the_layout_of_their_inputs(backend, layout):
    if backend != "native":
        pytest.skip("the native kernels' promise: Triton's results have channels innermost")
    x = random_inputs()
    for name in ("u", "delta", "z"):
        x[name] = LAYOUTS[layout](x[name])
    found = results(partial(fla_ops.selective_scan, backend=backend), x, *random_cotangents(x), delta_softplus=True)
    for result, source in (("y", "u"), ("du", "u"), ("ddelta", "delta"), ("dz", "z")):
        assert found[result].stride() == x[source].stride(), result


@pytest.mark.parametrize("N", [1, 2, 3, 4, 5, 7, 8, 17, 31, 64, 256])
def test_state_sizes(backend, ways, N):
    x = random_inputs(1, 20 if N < 64 else 3, 66 if N < 256 else 9, N, state=torch.float32)
    for _ in ways():
        check(backend, x, delta_softplus=True)


@pytest.mark.parametrize("L", [0, 1, 2, 15, 16, 17, 63, 64, 65, 128, 200])
def test_lengths(backend, ways, L):
    x = random_inputs(2, 17, L, 5, state=torch.float32)
    for _ in ways():
        check(backend, x, delta_softplus=True)


@pytest.mark.parametrize(
    ("Di", "G"), [(1, 0), (7, 1), (8, 8), (24, 3), (33, 1), (40, 5), (48, 3), (64, 2), (96, 2), (150, 1), (300, 1)]
)
def test_channels_and_groups(backend, ways, Di, G):
    """Blocks of channels that are whole, cut short, and split between groups; few and many tasks."""
    x = random_inputs(1 if Di > 100 else 2, Di, 20, 6, G)
    for _ in ways():
        check(backend, x, delta_softplus=True)


@pytest.mark.parametrize("constant", ["B", "C", "BC"])
@dtypes
def test_constant_projections(backend, ways, dtype, constant):
    x = random_inputs(2, 20, 70, 5, 4, dtype=dtype, constant=constant, state=torch.float32)
    for _ in ways():
        check(backend, x, delta_softplus=True)


@pytest.mark.parametrize("missing", ["skip", "gate", "bias", "skip gate bias"])
def test_optional_tensors(backend, missing):
    x = random_inputs(1, 20, 70, 5, **dict.fromkeys(missing.split(), False))
    check(backend, x, delta_softplus=True)


# Extreme values: finite wherever the reference is.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("decay", [0.0, -1e-4, -30.0, -1e4, -1e30, 0.05])
def test_decays(backend, ways, decay, dtype):
    """From no decay at all, over a state that is forgotten at once, to one that grows."""
    x = random_inputs(1, 20, 70, 5, dtype=dtype, delta="positive", decay=decay, state=torch.float32)
    for _ in ways():
        check(backend, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("delta", [-torch.inf, -200.0, -80.0, -20.0, 0.0, 19.9, 20.1, 60.0, 1e4])
def test_step_sizes(backend, ways, delta, dtype):
    """The softplus over its whole range: no step at all, e^x, and x itself."""
    x = random_inputs(1, 20, 70, 5, dtype=dtype, delta=delta, bias=False, state=torch.float32)
    for _ in ways():
        check(backend, x, delta_softplus=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_wide_range_of_step_sizes(backend, ways, dtype):
    x = random_inputs(2, 20, 70, 5, dtype=dtype)
    x["delta"] = 20 * x["delta"]
    for _ in ways():
        check(backend, x, delta_softplus=True)


def test_decays_stay_between_zero_and_one(backend, ways):
    """With u = 0 the state after one step is the decay itself: for any step size, and exact where it is near 1."""
    sizes = torch.cat([torch.logspace(-30, 30, 601), torch.linspace(0, 130, 1300), torch.zeros(1)])
    nothing = torch.zeros(1, 1, len(sizes))
    A, state = torch.full((len(sizes), 1), -1.0), torch.ones(1, len(sizes), 1)
    for way in ways():
        options = {"initial_state": state, "output_final_state": True, "backend": backend}
        u = torch.zeros(1, len(sizes), 1)
        _, h = fla_ops.selective_scan(u, sizes[None, :, None], A, nothing[..., :1], nothing[..., :1], **options)
        h, exact = h[0, :, 0].double(), torch.exp(-sizes.double())
        assert ((h >= 0) & (h <= 1)).all(), way
        assert (h[sizes > 104] == 0).all(), way
        error = (h - exact).abs()
        assert (error <= 6e-7 * exact * (1 + sizes) + 1.2e-38).all(), (way, sizes[error.argmax()])
        assert (error[sizes < 1e-3] <= 6e-8).all(), way


def test_nan_stays_in_its_channel_and_row(backend, ways):
    x = random_inputs(2, 20, 70, 5)
    x["u"][0, 3, 10] = torch.nan
    x["delta"][1, 7, 20] = torch.nan
    for _ in ways():
        with torch.no_grad():
            y, final = call(fla_ops.selective_scan, x, delta_softplus=True, output_final_state=True, backend=backend)
        expected = torch.zeros(2, 20, 70, dtype=torch.bool)
        expected[0, 3, 10:] = expected[1, 7, 20:] = True
        assert torch.equal(y.isnan(), expected)
        assert torch.equal(final.isnan(), expected[..., -1:].expand_as(final))


# Gradients.


def test_only_needed_gradients(backend):
    """Each alone, and each left out, with the bits that all together have."""
    x = random_inputs(2, 20, 40, 5, dtype=torch.float64, state=torch.float64)
    dy, ds = random_cotangents(x)
    op = partial(fla_ops.selective_scan, backend=backend)
    ref64, ref_low = references(x, dy, ds, delta_softplus=True)
    for name in TENSORS:
        for wanted in ((name,), tuple(n for n in TENSORS if n != name)):
            found = results(op, x, dy, ds, wanted=wanted, delta_softplus=True)
            for key, value in found.items():
                gradient = key.startswith("d")
                assert_matches_reference(value, ref64[key], ref_low[key], key, gradient=gradient)


@pytest.mark.parametrize("end", ["y", "final_state"])
def test_a_gradient_into_one_result_alone(backend, end):
    x = {n: t.requires_grad_() for n, t in random_inputs(1, 6, 20, 3, dtype=torch.float64, state=torch.float64).items()}
    grads = []
    for which in (backend, "reference"):
        out = call(fla_ops.selective_scan, x, delta_softplus=True, output_final_state=True, backend=which)
        grads.append(torch.autograd.grad(getattr(out, end).square().sum(), list(x.values()), allow_unused=True))
    for name, *pair in zip(x, *grads, strict=True):
        actual, expected = (torch.zeros_like(x[name]) if grad is None else grad for grad in pair)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
@pytest.mark.parametrize("case", ["plain", "constant B", "groups"])
def test_the_kernels_pass_gradcheck(native, layout, case):
    G, constant = (3 if case == "groups" else 1), ("B" if case == "constant B" else "")
    x = random_inputs(1, 3, 9, 2, G, constant=constant, dtype=torch.float64, state=torch.float64, sequences=3)
    bounds = torch.tensor([0, 4, 4, 9])

    def op(u, delta, A, B, C, D, z, delta_bias, initial_state):
        u, delta, z = map(LAYOUTS[layout], (u, delta, z))
        options = {"z": z, "delta_bias": delta_bias, "delta_softplus": True, "initial_state": initial_state}
        options |= {"cu_seqlens": bounds, "output_final_state": True, "backend": native}
        return tuple(fla_ops.selective_scan(u, delta, A, B, C, D, **options))

    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in x.values()])


@pytest.mark.parametrize("layout", ["channel-first", "channel-last", "every second"])
def test_any_incoming_gradient(backend, layout):
    x = random_inputs(2, 20, 30, 5, dtype=torch.float64)
    dy, ds = random_cotangents(x)
    ref64, ref_low = references(x, dy, ds, delta_softplus=True)
    found = results(partial(fla_ops.selective_scan, backend=backend), x, LAYOUTS[layout](dy), ds, delta_softplus=True)
    for name, value in found.items():
        assert_matches_reference(value, ref64[name], ref_low[name], name, gradient=name.startswith("d"))


# The CPU kernels.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["plain", "groups", "constant", "packed"])
def test_threads_change_no_bit(native, threads, all_levels, dtype, case):
    G, constant = (5 if case == "groups" else 1), ("C" if case == "constant" else "")
    batch, bounds = 2, None
    if case == "packed":
        batch, bounds = 1, torch.tensor([0, 60, 60, 61, 190])
    count = None if bounds is None else len(bounds) - 1
    x = random_inputs(batch, 200, 190, 5, G, constant=constant, dtype=dtype, state=torch.float32, sequences=count)
    dy, ds = random_cotangents(x, count)
    op = partial(fla_ops.selective_scan, backend=native, cu_seqlens=bounds, delta_softplus=True)
    for _ in all_levels():
        found = []
        for n in (1, 2, 3, 2):
            threads(n)
            found.append(results(op, x, dy, ds))
        for other in found[1:]:
            assert_same_bits(other, found[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_the_step_is_the_scan_of_one_token(native, all_levels, dtype):
    """Every state size's last lanes, groups, states of other strides and dtypes; a skipped row."""
    shapes = itertools.product((1, 3, 8, 16, 21), ((1, 70), (2, 6), (35, 70)))
    for (N, (G, Di)), state_dtype in zip(shapes, itertools.cycle((torch.float32, dtype)), strict=False):
        x = random_inputs(3, Di, 1, N, G, dtype=dtype, state=state_dtype)
        first = {n: x[n][..., 0] for n in ("u", "delta", "z", "B", "C")} | {n: x[n] for n in ("A", "D", "delta_bias")}
        exact = {n: t.double() for n, t in first.items()}
        slots = torch.tensor([2, -1, 0])
        for strided, level in itertools.product((False, True), all_levels()):
            state = x["initial_state"].clone()
            state = state.transpose(1, 2).contiguous().transpose(1, 2) if strided else state
            wide = x["initial_state"].double()
            options = {"delta_softplus": True, "state_indices": slots}
            y = fla_ops.selective_scan_step(**first, state=state, backend=native, **options)
            wanted = fla_ops.selective_scan_step(**exact, state=wide, backend="reference", **options)
            tolerance = max(torch.finfo(dtype).eps, torch.finfo(state_dtype).eps) * 8
            for name, actual, expected in (("y", y, wanted), ("state", state, wide)):
                error = (actual.double() - expected).abs().max()
                assert error <= tolerance * (1 + expected.abs().max()), (name, level, N, G, Di, strided)
            assert (y[1] == 0).all() and torch.equal(state[1], x["initial_state"][1])


def _step_inputs(dtype=torch.float32):
    x = random_inputs(2, 6, 1, 3, dtype=dtype, state=torch.float32)
    first = {n: x[n][..., 0] for n in ("u", "delta", "z")} | {n: x[n][:, 0, :, 0] for n in ("B", "C")}
    return first | {n: x[n] for n in ("A", "D", "delta_bias")} | {"state": x["initial_state"]}


def test_the_step_chosen_by_itself_is_the_native_one(native, monkeypatch):
    x = _step_inputs()
    expected = fla_ops.selective_scan_step(**x | {"state": x["state"].clone()}, backend=native)
    with monkeypatch.context() as patch:  # no check runs for it
        patch.setattr(sys.modules["fla_ops.selective_scan"], "_check_step", None)
        patch.setattr(sys.modules["fla_ops.selective_scan"], "_checked_steps", set())
        assert torch.equal(fla_ops.selective_scan_step(**x | {"state": x["state"].clone()}), expected)
        with fla_ops.use_backend("reference"), pytest.raises(TypeError):
            fla_ops.selective_scan_step(**x)
    with torch.autocast("cpu", torch.bfloat16):
        assert fla_ops.selective_scan_step(**x).dtype == torch.bfloat16


WRONG = {
    "two dtypes": ("bfloat16", "delta", lambda t: t.float()),
    "a wide projection": ("bfloat16", "B", lambda t: t.float()),
    "a narrow weight": ("float32", "A", lambda t: t.bfloat16()),
    "another narrow weight": ("float16", "D", lambda t: t.bfloat16()),
    "a wide weight": ("float32", "delta_bias", lambda t: t.double()),
    "an integer state": ("float32", "state", lambda t: t.long()),
    "one state for all": ("float32", "state", lambda t: t[:1].expand(2, -1, -1)),
    "too many states": ("float32", "state", lambda t: torch.cat([t, t])),
    "too few states": ("float32", "state", lambda t: t[:1]),
    "a time axis": ("float32", "u", lambda t: t[..., None]),
    "fewer rows": ("float32", "z", lambda t: t[:1]),
    "a scalar": ("float32", "D", lambda t: t[0]),
    "a projection of other rows": ("float32", "C", lambda t: t[:1]),
    "a projection of other width": ("float32", "C", lambda t: t[:, :2]),
    "no tensor": ("float32", "C", lambda t: t.tolist()),
    "a number for a flag": ("float32", "delta_softplus", lambda t: 1),
}


@pytest.mark.parametrize("dtype, name, spoil", WRONG.values(), ids=WRONG)
def test_the_native_step_refuses_what_the_checks_refuse(native, dtype, name, spoil):
    """The one that runs without them, so that they can say what is wrong."""
    x = _step_inputs(getattr(torch, dtype))
    x[name] = spoil(x.get(name))
    said = []
    for backend in ("auto", "reference"):
        with pytest.raises((ValueError, TypeError), match=f"selective_scan_step: .*{name}") as error:
            fla_ops.selective_scan_step(**x, backend=backend)
        said.append(str(error.value))
    assert said[0] == said[1]


@pytest.mark.no_poison
def test_opcheck(native):
    bounds = torch.tensor([0, 3, 9])
    x = random_inputs(1, 6, 9, 3, dtype=torch.bfloat16, state=torch.float32, sequences=2)
    dy, ds = random_cotangents(x, 2)
    utils = ("test_schema", "test_faketensor")
    ops = torch.ops.fla_ops
    for layout in ("channel-first", "channel-last"):
        for name in ("u", "delta", "z"):
            x[name] = LAYOUTS[layout](x[name])
        args = (*x.values(), bounds, True)
        for save in (False, True):
            torch.library.opcheck(ops.selective_scan_forward, (*args, save), test_utils=utils)
        states = ops.selective_scan_forward(*args, True)[2]
        for needs in (0, 1, 0b111111111, 0b000011000):
            torch.library.opcheck(ops.selective_scan_backward, (*args, states, dy, ds, needs), test_utils=utils)
    step = [None if t is None else t[..., 0] for t in (x["u"], x["delta"])] + [x["A"], x["B"][..., 0], x["C"][..., 0]]
    step += [x["D"], x["z"][..., 0], x["delta_bias"], x["initial_state"][:1].clone(), True, None]
    torch.library.opcheck(ops.selective_scan_step, tuple(step), test_utils=utils)
