# SPDX-License-Identifier: Apache-2.0
"""The selective scan: one long sequence, its pieces, packed sequences and single steps are the same computation.

And what it reads, writes and keeps: stray values, strides, memory, the same bits every time.
"""

import contextlib
import functools

import pytest
import torch
from delta_rule_cases import assert_same_bits, bounds, leaves, one_thread
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from selective_scan_cases import LAYOUTS, TENSORS, call, check, random_cotangents, random_inputs, references, results

import fla_ops
from fla_ops.reference.selective_scan import selective_scan as reference
from fla_ops.reference.selective_scan import selective_scan_step as reference_step
from fla_ops.testing import assert_matches_reference

OP = "selective_scan"
PARAMETERS = ("A", "D", "delta_bias")  # B and C too where they are constant
# The fixtures (a backend's name, poisoned allocations) do not change between examples.
few = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LENGTHS = st.sampled_from([0, 1, 2, 3, 15, 16, 17, 64, 65])
constants = st.sampled_from(["", "B", "C", "BC"])


def op_of(backend):
    return functools.partial(fla_ops.selective_scan, delta_softplus=True, backend=backend)


def in_time(inputs):
    """The names of the tensors that have a time axis, which is the last."""
    return [n for n in ("u", "delta", "B", "C", "z") if inputs[n] is not None and inputs[n].dim() > 2]


def piece(x, part: slice, sequence=None):
    """The steps `part` of every tensor, and the state of one packed sequence."""
    cut = x | {name: x[name][..., part] for name in in_time(x)}
    state = x["initial_state"]
    return cut if state is None or sequence is None else cut | {"initial_state": state[sequence : sequence + 1]}


def step_inputs(x, t):
    """The tensors of step t by name, as `selective_scan_step` takes them."""
    return {name: x[name][..., t] if name in in_time(x) else x[name] for name in TENSORS[:8]}


def step(op, tensors, **options):
    named = {name: tensors[name] for name in ("z", "delta_bias")}
    return op(*(tensors[name] for name in TENSORS[:6]), **named, delta_softplus=True, **options)


def all_steps(x, state, backend):
    """y of all steps, one by one; the state is written in place."""
    run = functools.partial(step, fla_ops.selective_scan_step, state=state, backend=backend)
    return torch.stack([run(step_inputs(x, t)) for t in range(x["u"].shape[-1])], -1)


def assert_same(actual, expected, name):
    """Equal to 1e-12 of the largest element: what float64 leaves of two orders of summation."""
    limit = 1e-12 * max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit, msg=lambda m: f"{name}: {m}")


# Packed sequences.


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("constant", ["", "BC"], ids=["", "constant"])
def test_packed_against_the_reference(backend, index, constant):
    """Empty sequences at both ends and in the middle, single steps, whole blocks and tails."""
    lengths = [0, 64, 1, 0, 65, 3, 1, 0]
    x = random_inputs(1, L=sum(lengths), G=2, constant=constant, sequences=8, state=torch.float32)
    check(backend, x, cu_seqlens=bounds(lengths, index), delta_softplus=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_packed_dtypes(backend, dtype):
    lengths = [70, 0, 33]
    x = random_inputs(1, L=sum(lengths), dtype=dtype, sequences=3, state=torch.float32)
    check(backend, x, cu_seqlens=bounds(lengths), delta_softplus=True)


def test_packed_without_a_state(backend):
    lengths = [70, 0, 33]
    x = random_inputs(1, L=sum(lengths), N=40, sequences=3)
    check(backend, x, cu_seqlens=bounds(lengths), delta_softplus=True)


@few
@given(lengths=st.lists(LENGTHS, min_size=1, max_size=4), constant=constants, state=st.booleans())
def test_packed_is_separate(backend, lengths, constant, state):
    """Outputs, final states and all gradients of a pack are those of its sequences, run one by one."""
    S = len(lengths)
    options = {"constant": constant, "dtype": torch.float64, "state": torch.float64 if state else None}
    x = random_inputs(1, 4, sum(lengths), 5, G=2, sequences=S, **options)
    dy, ds = random_cotangents(x, S)
    with one_thread():
        packed = results(op_of(backend), x, dy, ds, cu_seqlens=bounds(lengths))
        timed = {"y", *(f"d{name}" for name in in_time(x))}
        sums = {name: torch.zeros_like(t) for name, t in packed.items()}
        at = 0
        for i, length in enumerate(lengths):
            part = slice(at, at + length)
            one = results(op_of(backend), piece(x, part, i), dy[..., part], ds[i : i + 1])
            for name, found in one.items():
                if name in timed:
                    assert_same(found, packed[name][..., part], f"{name} of sequence {i}")
                elif name in ("final_state", "dinitial_state"):
                    assert_same(found, packed[name][i : i + 1], f"{name} of sequence {i}")
                else:
                    sums[name] += found
            at += length
    for name in set(packed) - timed - {"final_state", "dinitial_state"}:
        assert_same(sums[name], packed[name], name)


def test_a_sequence_does_not_see_its_neighbours(backend):
    """Changing one sequence of a pack changes not one bit of the others, gradients included; NaN is such a change."""
    lengths = [40, 70, 33]
    x = random_inputs(1, 8, 143, 5, sequences=3, state=torch.float32)
    dy, ds = random_cotangents(x, 3)
    op = functools.partial(op_of(backend), cu_seqlens=bounds(lengths))
    before = results(op, x, dy, ds)
    for factor in (0.5, torch.nan):
        changed = {name: t.clone() for name, t in x.items()}
        for name in in_time(x):
            changed[name][..., 40:110] *= factor
        changed["initial_state"][1] *= factor
        after = results(op, changed, dy, ds)
        for name in ("y", *(f"d{n}" for n in in_time(x))):
            for others in (slice(40), slice(110, 143)):
                assert torch.equal(before[name][..., others], after[name][..., others]), name
            assert not torch.equal(before[name][..., 40:110], after[name][..., 40:110]), name
        for name in ("final_state", "dinitial_state"):
            assert torch.equal(before[name][[0, 2]], after[name][[0, 2]]), name


def test_an_empty_sequence_keeps_its_state(backend):
    x = random_inputs(1, L=10, sequences=3, state=torch.float32)
    leaf = leaves(x, wanted=TENSORS)
    options = {"cu_seqlens": bounds([4, 0, 6]), "output_final_state": True}
    final = call(op_of(backend), leaf, **options).final_state
    assert torch.equal(final[1], x["initial_state"][1])
    final[1].sum().backward()
    assert torch.equal(leaf["initial_state"].grad[1], torch.ones_like(final[1]))
    assert not leaf["initial_state"].grad[[0, 2]].any()
    assert not leaf["u"].grad.any() and not leaf["A"].grad.any()
    final = call(op_of(backend), x | {"initial_state": None}, **options).final_state
    assert not final[1].any()


@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch, L", [(2, 0), (0, 5), (0, 0)])
def test_nothing_to_do(backend, batch, L, state):
    """L = 0 and B = 0: empty results of the right shape and dtype, a copy of the state, gradients to match."""
    x = leaves(random_inputs(batch, 8, L, 5, state=state), wanted=TENSORS)
    y, final = call(op_of(backend), x, output_final_state=True)
    assert y.shape == (batch, 8, L) and y.dtype == torch.float32
    assert final.shape == (batch, 8, 5) and final.dtype == torch.float32
    if state is None:
        assert not final.any()
    else:
        assert torch.equal(final, x["initial_state"].float())
        assert not batch or final.data_ptr() != x["initial_state"].data_ptr()
    if y.requires_grad or final.requires_grad:
        (y.sum() + final.sum()).backward()
    if state is not None:
        assert torch.equal(x["initial_state"].grad, torch.ones_like(x["initial_state"]))
    for name in TENSORS[:8]:
        grad = x[name].grad
        assert grad is None or grad.shape == x[name].shape and not grad.any(), name


def test_no_sequences(backend):
    """S = 0: a pack of nothing."""
    x = leaves(random_inputs(1, 8, 0, 5, sequences=0, state=torch.float32), wanted=TENSORS)
    y, final = call(op_of(backend), x, cu_seqlens=bounds([]), output_final_state=True)
    assert y.shape == (1, 8, 0) and final.shape == (0, 8, 5)
    (y.sum() + final.sum()).backward()
    assert all(t.grad is None or not t.grad.any() for t in x.values())


@pytest.mark.parametrize("ends", [[0, 40, 60], [0, 40, 900], [5, 40, 70], [33, 40, 70], [0, 0, 0]], ids=str)
def test_boundaries_that_could_not_be_checked_touch_nothing_outside(backend, monkeypatch, ends):
    """On a device, values are not read: they are clamped, and steps that no sequence covers are 0, gradients too."""
    monkeypatch.setattr(fla_ops._checks, "_can_read", lambda x: False)
    x = random_inputs(1, 8, 70, 5, sequences=2, state=torch.float32)
    dy, ds = random_cotangents(x, 2)
    found = results(op_of(backend), x, dy, ds, cu_seqlens=torch.tensor(ends))
    part = slice(ends[0], min(ends[-1], 70))
    cu = torch.tensor(ends).clamp(max=70) - part.start
    right = results(op_of(backend), piece(x, part), dy[..., part], ds, cu_seqlens=cu)
    for name, t in right.items():
        if name == "y" or name.removeprefix("d") in in_time(x):
            torch.testing.assert_close(found[name][..., part], t, msg=name)
            assert not found[name][..., : part.start].any() and not found[name][..., part.stop :].any(), name
        else:
            torch.testing.assert_close(found[name], t, msg=name)


def test_boundaries_that_run_backwards_stay_inside(backend, monkeypatch):
    """Each becomes the largest so far, so that sequences never overlap. (Triton's kernels may clamp each by itself.)"""
    monkeypatch.setattr(fla_ops._checks, "_can_read", lambda x: False)
    x = random_inputs(1, 8, 70, 5, sequences=4, state=torch.float32)
    dy, ds = random_cotangents(x, 4)
    found = results(op_of(backend), x, dy, ds, cu_seqlens=torch.tensor([-3, 50, 20, 30, 65]))
    assert all(t.isfinite().all() for t in found.values())
    if backend != "triton":
        right = results(op_of(backend), x, dy, ds, cu_seqlens=torch.tensor([0, 50, 50, 50, 65]))
        assert_same_bits(found, right)


def test_steps_outside_of_every_sequence_may_hold_anything(backend, monkeypatch):
    """The tail of a buffer that is longer than its sequences: its NaN are read by nobody, its gradients are 0."""
    if backend == "reference":
        pytest.skip("it differentiates through all steps, and 0 times NaN is NaN")
    monkeypatch.setattr(fla_ops._checks, "_can_read", lambda x: False)
    x = random_inputs(1, 8, 70, 5, sequences=2, state=torch.float32)
    dy, ds = random_cotangents(x, 2)
    op = functools.partial(op_of(backend), cu_seqlens=torch.tensor([5, 40, 60]))
    right = results(op, x, dy, ds)
    for t in (dy, *(x[name] for name in in_time(x))):
        t[..., :5] = t[..., 60:] = torch.nan
    found = results(op, x, dy, ds)
    assert_same_bits(found, right)
    assert all(t.isfinite().all() for t in found.values())


# Splits in time.


@few
@given(cuts=st.lists(st.integers(0, 100), min_size=1, max_size=3), constant=constants)
def test_any_split_in_time_is_the_whole(backend, cuts, constant):
    """Prefill in pieces, the state handed on: same outputs, same final state, same gradients through the state."""
    x = random_inputs(2, 4, 100, 5, G=2, constant=constant, dtype=torch.float64, state=torch.float64)
    dy, ds = random_cotangents(x)

    def in_pieces(u, delta, A, B, C, D, z, delta_bias, initial_state, output_final_state):
        given = dict(zip(TENSORS, (u, delta, A, B, C, D, z, delta_bias, None), strict=True))
        outputs, state = [], initial_state
        edges = [0, *sorted(cuts), 100]
        for a, b in zip(edges, edges[1:], strict=False):
            part = piece(given, slice(a, b)) | {"initial_state": state}
            y, state = call(op_of(backend), part, output_final_state=True)
            outputs.append(y)
        return torch.cat(outputs, -1), state

    with one_thread():
        whole = results(op_of(backend), x, dy, ds)
        pieces = results(in_pieces, x, dy, ds)
    for name in whole:
        assert_same(pieces[name], whole[name], name)


# Single steps.


@pytest.mark.parametrize("constant", ["", "B", "C", "BC"])
@pytest.mark.parametrize("G", [0, 1, 4])
def test_steps_are_the_whole(backend, G, constant):
    """Prefill half, step the rest; and step by step from the start."""
    x = random_inputs(2, 8, 40, 17, G=G, constant=constant, dtype=torch.float64, state=torch.float64)
    whole = call(op_of(backend), x, output_final_state=True)
    for start in (0, 20):
        first, state = call(op_of(backend), piece(x, slice(0, start)), output_final_state=True)
        rest = all_steps(piece(x, slice(start, 40)), state, backend)
        assert_same(torch.cat([first, rest], -1), whole.y, "y")
        assert_same(state, whole.final_state, "state")


@pytest.mark.parametrize("given", ["", "D", "z", "delta_bias"])
def test_steps_without_the_optional_tensors(backend, given):
    x = random_inputs(2, 8, 6, 5, dtype=torch.float64, state=torch.float64)
    x |= {name: None for name in ("D", "z", "delta_bias") if name != given}
    whole = call(op_of(backend), x, output_final_state=True)
    state = x["initial_state"].clone()
    assert_same(all_steps(x, state, backend), whole.y, "y")
    assert_same(state, whole.final_state, "state")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_in_low_precision(backend, dtype):
    """float32 state, inputs in `dtype`: within the budget of the full sequence."""
    x = random_inputs(L=20, dtype=dtype, state=torch.float32)
    ref64, low = references(x, *random_cotangents(x), delta_softplus=True)
    state = x["initial_state"].clone()
    y = all_steps(x, state, backend)
    assert_matches_reference(y, ref64["y"], low["y"], "y")
    assert_matches_reference(state, ref64["final_state"], low["final_state"], "state")


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_state_dtypes(backend, state_dtype, dtype):
    """The state keeps its dtype: read, computed in float32, rounded once when written."""
    x = random_inputs(2, L=1, dtype=dtype, state=state_dtype)
    state = x["initial_state"].clone()
    y = all_steps(x, state, backend)
    expected = call(reference, x, delta_softplus=True, output_final_state=True)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected[0], rtol=max(eps, 1e-5), atol=max(eps / 4, 1e-6))
    eps = torch.finfo(state_dtype).eps
    right = expected[1].to(state_dtype)
    torch.testing.assert_close(state, right, rtol=max(eps, 1e-5), atol=max(eps / 4, 1e-6))


def test_many_steps_in_a_bfloat16_state(backend):
    """The reference's steps with the same state; a rounding that falls the other way makes half a unit of bfloat16."""
    x = random_inputs(2, 8, 40, 5, dtype=torch.bfloat16, state=torch.bfloat16)
    found, right = x["initial_state"].clone(), x["initial_state"].clone()
    y = all_steps(x, found, backend)
    expected = torch.stack([step(reference_step, step_inputs(x, t), state=right) for t in range(40)], -1)
    eps = torch.finfo(torch.bfloat16).eps
    for actual, wanted in ((y, expected), (found, right)):
        torch.testing.assert_close(actual, wanted, rtol=2 * eps, atol=2 * eps * wanted.abs().max().item())


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_step_state_indices(backend, index):
    """Rows find their slot, in any order; -1 skips: output 0; other slots keep every bit, NaN included."""
    x = random_inputs(4, 8, 1, 5, state=torch.float32)
    pool = torch.full((7, 8, 5), torch.nan)
    slots = torch.tensor([5, -1, 0, 3], dtype=index)
    live = [0, 2, 3]
    pool[slots[live].long()] = x["initial_state"][live]
    run = functools.partial(step, fla_ops.selective_scan_step, step_inputs(x, 0), backend=backend)
    y = run(state=pool, state_indices=slots)
    state = x["initial_state"].clone()
    expected = run(state=state)
    assert torch.equal(y[live], expected[live])
    assert not y[1].any()
    assert torch.equal(pool[slots[live].long()], state[live])
    assert pool[[1, 2, 4, 6]].isnan().all()


def test_slots_that_could_not_be_checked_touch_nothing_outside(backend, monkeypatch):
    monkeypatch.setattr(fla_ops._checks, "_can_read", lambda x: False)
    x = random_inputs(3, 8, 1, 5)
    pool = torch.zeros(4, 8, 5)  # slots 0 and 3 are not ours
    options = {"state": pool[1:3], "state_indices": torch.tensor([1, 2, -7]), "backend": backend}
    y = step(fla_ops.selective_scan_step, step_inputs(x, 0), **options)
    assert y[0].any() and not y[1:].any()
    assert pool[2].any() and not pool[[0, 1, 3]].any()


def test_step_of_no_rows(backend):
    x = step_inputs(random_inputs(0, 8, 1, 5), 0)
    y = step(fla_ops.selective_scan_step, x, state=torch.zeros(0, 8, 5), backend=backend)
    assert y.shape == (0, 8)
    skip = {"state": torch.ones(3, 8, 5), "state_indices": torch.zeros(0, dtype=torch.int64)}
    assert step(fla_ops.selective_scan_step, x, **skip, backend=backend).shape == (0, 8)


@pytest.mark.parametrize("name", ["transposed", "every second slot", "every second state"])
def test_step_writes_a_state_of_any_strides(backend, name):
    """And reads tokens cut from a wider projection."""
    x = random_inputs(2, 8, 3, 5, state=torch.float32)
    token = step_inputs(x, 1)
    state = x["initial_state"].clone()
    run = functools.partial(step, fla_ops.selective_scan_step, backend=backend)
    dense = {n: t.contiguous() for n, t in token.items()}
    expected = run(dense, state=state)
    start = x["initial_state"]
    seen = {
        "transposed": lambda: start.transpose(-1, -2).contiguous().transpose(-1, -2),
        "every second slot": lambda: torch.stack([start, start], 1)[:, 0],
        "every second state": lambda: torch.stack([start, start], -1)[..., 0],
    }[name]()
    assert not seen.is_contiguous()
    y = run(token, state=seen)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(seen, state)


def test_step_refuses_gradients(backend):
    x = step_inputs(random_inputs(1, 8, 1, 5), 0)
    state = torch.zeros(1, 8, 5)
    for leaf in (*x.values(), state):
        leaf.requires_grad_()
        run = functools.partial(step, fla_ops.selective_scan_step, x, backend=backend)
        with pytest.raises(RuntimeError, match=r"selective_scan_step: .*torch\.no_grad\(\).*selective_scan with L=1"):
            run(state=state)
        with torch.no_grad():
            run(state=state)
        with torch.inference_mode():
            run(state=state.detach().clone())
        leaf.requires_grad_(False)


# Autograd.


def test_a_second_derivative_is_refused_with_its_cure(backend):
    """The reference has one; the rest say so, whether the incoming gradient needs a gradient or not."""
    x = leaves(random_inputs(1, 4, 6, 3), wanted=TENSORS)
    y = call(op_of(backend), x).y
    (grad,) = torch.autograd.grad(y.sum(), x["u"], create_graph=True)
    if backend == "reference":
        grad.square().sum().backward()
        assert x["B"].grad.isfinite().all()
    else:
        with pytest.raises(RuntimeError, match=r'selective_scan: .*second derivative.*backend="reference"'):
            grad.square().sum().backward()


@pytest.mark.parametrize("used", ["y", "final_state"])
def test_one_result_used_alone(backend, used):
    x = random_inputs(2, 8, 70, 5, state=torch.float32)
    dy, ds = random_cotangents(x)
    zero = {"y": (dy, torch.zeros_like(ds)), "final_state": (torch.zeros_like(dy), ds)}[used]
    expected = results(op_of(backend), x, *zero)
    leaf = leaves(x, wanted=TENSORS)
    out = call(op_of(backend), leaf, output_final_state=True)
    getattr(out, used).backward(dy if used == "y" else ds)
    for name in TENSORS:
        grad = leaf[name].grad
        grad = torch.zeros_like(leaf[name]) if grad is None else grad
        torch.testing.assert_close(grad, expected[f"d{name}"], msg=name)


def test_only_the_wanted_gradients(backend):
    """Each alone, and two together: those get their gradient, no other is made."""
    x = random_inputs(2, 8, 20, 5, state=torch.float32)
    dy, ds = random_cotangents(x)
    expected = results(op_of(backend), x, dy, ds)
    for wanted in (*((name,) for name in TENSORS), ("A", "z"), ("B", "initial_state")):
        found = results(op_of(backend), x, dy, ds, wanted=wanted)
        assert {name for name in found if name.startswith("d")} == {f"d{name}" for name in wanted}
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=f"{name} of {wanted}")


# Strides.

STRIDED = LAYOUTS | {
    "odd storage offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "beside NaN": lambda x: torch.stack([torch.full_like(x, torch.nan), x], 1)[:, 1],
}


@pytest.mark.parametrize("layout", STRIDED)
def test_strides(backend, layout):
    """Inputs and incoming gradients in any layout give the same result."""
    x = random_inputs(2, 8, 70, 5, G=2, state=torch.float32)
    dy, ds = random_cotangents(x)
    expected = results(op_of(backend), x, dy, ds)
    leaf = leaves(x, wanted=TENSORS)
    disguise = STRIDED[layout]
    seen = {name: disguise(t) if t.dim() > 1 else t for name, t in leaf.items()}
    y, final = call(op_of(backend), seen, output_final_state=True)
    torch.autograd.backward([y, final], [disguise(dy), disguise(ds)])
    actual = {"y": y.detach(), "final_state": final.detach()} | {f"d{n}": leaf[n].grad for n in TENSORS}
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)


EXPANDED = {
    "u": (2, 1, 70),
    "delta": (1, 8, 70),
    "A": (1, 5),
    "B": (2, 1, 5, 70),
    "C": (2, 2, 1, 70),
    "D": (1,),
    "z": (2, 8, 1),
    "delta_bias": (1,),
    "initial_state": (1, 8, 5),
}


@pytest.mark.parametrize("name", EXPANDED)
def test_expanded_inputs(backend, name):
    """One memory for many elements: the values of the copy, gradients that autograd adds up."""
    x = random_inputs(2, 8, 70, 5, G=2, state=torch.float32)
    dy, ds = random_cotangents(x)
    start = x[name][tuple(slice(0, size) for size in EXPANDED[name])]
    expected = results(op_of(backend), x | {name: start.expand(x[name].shape).contiguous()}, dy, ds)
    leaf = leaves(x, wanted=TENSORS)
    small = start.clone().requires_grad_()
    y, final = call(op_of(backend), leaf | {name: small.expand(x[name].shape)}, output_final_state=True)
    torch.autograd.backward([y, final], [dy, ds])
    torch.testing.assert_close(y, expected["y"])
    torch.testing.assert_close(final, expected["final_state"])
    right = expected[f"d{name}"].sum_to_size(small.shape)
    torch.testing.assert_close(small.grad, right, rtol=1e-4, atol=1e-4)


def test_inputs_are_never_modified(backend):
    x = random_inputs(1, 8, 70, 5, sequences=2, state=torch.float32)
    cu = bounds([30, 40])
    dy, ds = random_cotangents(x, 2)
    given = [*x.values(), cu, dy, ds]
    before = [t.clone() for t in given]
    leaf = {name: t.detach().requires_grad_() for name, t in x.items()}  # the same memory
    y, final = call(op_of(backend), leaf, cu_seqlens=cu, output_final_state=True)
    torch.autograd.backward([y, final], [dy, ds])
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


# Canaries: a NaN goes where the equation sends it and nowhere else.


@pytest.mark.parametrize("at", [0, 5, 63, 64, 69])
@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z"])
def test_a_nan_step_does_not_reach_the_past_or_other_channels(backend, name, at):
    x = random_inputs(2, 8, 70, 5, G=2, state=torch.float32)
    clean = call(op_of(backend), x, output_final_state=True)
    x[name][1, 1, ..., at] = torch.nan  # of channel 1, or of the second group: channels 4 to 7
    touched = [4, 5, 6, 7] if name in "BC" else [1]
    others = [d for d in range(8) if d not in touched]
    y, final = call(op_of(backend), x, output_final_state=True)
    assert y[1, touched, at].isnan().all()
    assert torch.equal(y[1, :, :at], clean.y[1, :, :at]), "the past"
    assert torch.equal(y[:, others], clean.y[:, others]), "other channels"
    assert torch.equal(y[0], clean.y[0]) and torch.equal(final[0], clean.final_state[0]), "other rows"
    assert torch.equal(final[:, others], clean.final_state[:, others])


@pytest.mark.parametrize("at", [5, 63, 64])
def test_a_nan_gradient_does_not_reach_the_future(backend, at):
    """A NaN in the gradient of step t makes NaN of gradients up to t at most."""
    x = random_inputs(1, 8, 70, 5, G=2, state=torch.float32)
    dy, ds = random_cotangents(x)
    clean = results(op_of(backend), x, dy, ds)
    dy[0, 1, at] = torch.nan
    found = results(op_of(backend), x, dy, ds)
    for name in in_time(x):
        assert torch.equal(found[f"d{name}"][..., at + 1 :], clean[f"d{name}"][..., at + 1 :]), name
        other = 1 if name in "BC" else 0  # the second group, another channel
        assert torch.equal(found[f"d{name}"][0, other], clean[f"d{name}"][0, other]), name


@pytest.mark.parametrize("lengths", [None, [0, 3, 64, 0, 63, 0]], ids=["batch", "packed"])
@pytest.mark.parametrize("N", [5, 40])
def test_every_element_is_written(backend, lengths, N):
    """Every test runs with NaN in all fresh memory; here all of a result is looked at."""
    options, S = ({}, None) if lengths is None else ({"cu_seqlens": bounds(lengths)}, len(lengths))
    x = random_inputs(1, 8, 130, N, G=2, sequences=S, state=torch.float32)
    dy, ds = random_cotangents(x, S)
    found = results(functools.partial(op_of(backend), **options), x, dy, ds)
    assert all(t.isfinite().all() for t in found.values())


# Memory, and the same bits.


def allocations(op, x):
    """Bytes of each piece of memory that one forward and backward takes, largest first."""
    leaf = leaves(x, wanted=TENSORS)
    dy, ds = random_cotangents(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        y, final = call(op, leaf, output_final_state=True)
        torch.autograd.backward([y, final], [dy, ds])
    events = profile.profiler.kineto_results.events()
    return sorted((e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0), reverse=True)


@pytest.mark.parametrize("N", [16, 64])
def test_the_states_of_all_steps_are_never_written(backend, N):
    """Not one piece of memory of B Di L N values, nor of a quarter of it.

    What each thread of a CPU keeps for a block of steps is as large as the states of about 120 steps here, for any L.
    """
    if backend == "reference":
        pytest.skip("it keeps every state")
    batch, Di, L = 2, 16, 768
    largest = allocations(op_of(backend), random_inputs(batch, Di, L, N, state=torch.float32))[0]
    print(f"{backend}, N = {N}: the largest piece has {largest / (4 * batch * Di * L):.2f} B Di L values")
    assert largest < batch * Di * L * N * 4 / 4


def saved_bytes(op):
    """(result, bytes that autograd keeps for the backward pass); a tensor that is saved twice counts once."""
    sizes = {}

    def pack(t):
        sizes[t.data_ptr(), t.shape, t.stride()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = op()
    return result, sum(sizes.values())


@pytest.mark.parametrize("lengths", [None, [0, 1, 64, 65, 60]], ids=["batch", "packed"])
def test_training_saves_its_inputs_and_a_state_every_64_steps(backend, lengths):
    if backend != "native":
        pytest.skip("a promise of the native kernels")
    x = leaves(random_inputs(1, 8, 190, 5, sequences=lengths and len(lengths), state=torch.float32), wanted=TENSORS)
    cu = None if lengths is None else bounds(lengths)
    _, saved = saved_bytes(lambda: call(op_of(backend), x, cu_seqlens=cu).y)
    inputs = sum(t.numel() * t.element_size() for t in [*x.values()] + [cu] * (cu is not None))
    states = 3 + (len(lengths) if lengths else 0)  # an upper bound for packed sequences
    assert saved == inputs + states * 8 * 5 * 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_without_autograd(backend, mode):
    x = leaves(random_inputs(1, 8, 70, 5, state=torch.float32), wanted=TENSORS)
    with mode():
        (y, final), saved = saved_bytes(lambda: call(op_of(backend), x, output_final_state=True))
    assert saved == 0
    assert y.grad_fn is None and final.grad_fn is None and not y.requires_grad


def test_a_step_allocates_only_its_output(backend):
    if backend != "native":
        pytest.skip("a promise of the native kernels")
    x = step_inputs(random_inputs(4, 64, 1, 16, dtype=torch.bfloat16), 0)
    run = functools.partial(step, fla_ops.selective_scan_step, x, state=torch.zeros(4, 64, 16), backend=backend)
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        y = run()
    taken = sum(e.self_cpu_memory_usage for e in profile.key_averages() if e.self_cpu_memory_usage > 0)
    assert 0 < taken <= -(-y.numel() * y.element_size() // 64) * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [None, [30, 0, 100]], ids=["batch", "packed"])
def test_repeated_calls_give_the_same_bits(backend, dtype, lengths):
    """Forward and backward: no sum depends on what else runs."""
    S = lengths and len(lengths)
    Di = 6 if backend == "triton" else 40  # the interpreter runs one program after another
    x = random_inputs(1 if lengths else 2, Di, 130, 16, G=2, dtype=dtype, sequences=S, state=torch.float32)
    dy, ds = random_cotangents(x, S)
    options = {} if lengths is None else {"cu_seqlens": bounds(lengths)}
    op = functools.partial(op_of(backend), **options)
    with one_thread() if backend == "reference" else contextlib.nullcontext():
        assert_same_bits(results(op, x, dy, ds), results(op, x, dy, ds))


def test_a_row_does_not_depend_on_its_batch(backend):
    """Under deterministic algorithms, which every test runs under, the bits of a row are its own."""
    if backend != "native":
        pytest.skip("a promise of the native kernels")
    x = random_inputs(4, 24, 70, 5, constant="C", state=torch.float32)
    batch = call(op_of(backend), x, output_final_state=True)
    row = {n: t[2:3] if n in ("u", "delta", "B", "z", "initial_state") else t for n, t in x.items()}
    alone = call(op_of(backend), row, output_final_state=True)
    assert torch.equal(alone.y, batch.y[2:3]) and torch.equal(alone.final_state, batch.final_state[2:3])
