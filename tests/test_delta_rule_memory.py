# SPDX-License-Identifier: Apache-2.0
"""What the delta rule reads, writes and keeps: strides, stray values, saved bytes, and the same bits every time."""

import contextlib
import functools
import importlib
import itertools

import pytest
import torch
from delta_rule_cases import (
    TENSORS,
    assert_same_bits,
    bounds,
    call,
    leaves,
    one_thread,
    random_cotangents,
    random_inputs,
    references,
    results,
)

import fla_ops
from fla_ops.testing import assert_matches_reference

TOKENS = TENSORS[:5]


def op_of(backend):
    return functools.partial(fla_ops.delta_rule, backend=backend)


# Strides: each disguise returns a tensor equal to x that lies in memory in another way.

DISGUISES = {
    "transposed": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "head first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "cut from a wider row": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]],
    "cut from between heads": lambda x: torch.stack([torch.full_like(x, torch.nan), x], 2)[:, :, 1],
    "every second token": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 2).flatten(1, 2)[:, ::2],
    "every second column": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2],
    "odd storage offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(backend, disguise, dtype):
    """Inputs and incoming gradients in any layout give the same result, and from our kernels the same bits."""
    x = random_inputs(B=2, T=70, HV=4, K=20, V=12, dtype=dtype, state=torch.float32)
    do, ds = random_cotangents(x)
    expected = results(op_of(backend), x, do, ds)
    leaf = leaves(x)
    seen = {n: disguise(t) for n, t in leaf.items()}
    assert all(torch.equal(seen[n], leaf[n]) for n in TENSORS)
    o, final = call(fla_ops.delta_rule, seen, output_final_state=True, backend=backend)
    torch.autograd.backward([o, final], [disguise(do), disguise(ds)])
    actual = {"o": o.detach(), "final_state": final.detach()} | {f"d{n}": leaf[n].grad for n in TENSORS}
    limit = 0 if backend == "native" else 8 * torch.finfo(dtype).eps  # einsum sums other strides in another order
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=limit, atol=limit, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_expanded_inputs(backend, axis):
    """Stride 0 along any axis: one value read many times, its gradient the sum."""
    x = random_inputs(B=2, T=20, H=2, HV=2, K=8, V=8, state=torch.float32)
    small = {n: t.select(axis, 0).unsqueeze(axis) if t.dim() > axis else t for n, t in x.items()}
    do, ds = random_cotangents(x)

    def expanded(*tokens, initial_state, **options):
        tokens = [t.expand(x[n].shape) for n, t in zip(TOKENS, tokens, strict=True)]
        return op_of(backend)(*tokens, initial_state=initial_state.expand(x["initial_state"].shape), **options)

    def repeated(*tokens, initial_state, **options):
        tokens = [t.expand(x[n].shape).contiguous() for n, t in zip(TOKENS, tokens, strict=True)]
        state = initial_state.expand(x["initial_state"].shape).contiguous()
        return op_of(backend)(*tokens, initial_state=state, **options)

    assert_same_bits(results(expanded, small, do, ds), results(repeated, small, do, ds))


def test_gradients_through_split_and_expand(backend):
    """`cat` and `split` upstream and `sum` downstream make non-contiguous and stride-0 gradients by themselves."""
    x = random_inputs(T=33, K=16, V=16, state=torch.float32)
    joined = torch.cat([x["q"], x["k"], x["v"]], -1).requires_grad_()
    q, k, v = joined.split(16, -1)
    o, final = fla_ops.delta_rule(q, k, v, x["beta"], x["g"], output_final_state=True, backend=backend)
    (o.sum() + final.sum()).backward()
    ones = torch.ones_like(o), torch.ones_like(final)
    expected = results(op_of(backend), x | {"initial_state": None}, *ones)
    for name, grad in zip(("dq", "dk", "dv"), joined.grad.split(16, -1), strict=True):
        assert torch.equal(grad, expected[name]), name


def test_one_tensor_in_several_roles(backend):
    x = random_inputs(T=33, state=torch.float32)
    same = x["k"].clone().requires_grad_()
    o = fla_ops.delta_rule(same, same, same, x["beta"], x["g"], backend=backend).o
    o.sum().backward()
    apart = {"q": x["k"], "k": x["k"], "v": x["k"], "beta": x["beta"], "g": x["g"], "initial_state": None}
    expected = results(op_of(backend), apart, torch.ones_like(o), torch.zeros(1, 2, 16, 16))
    torch.testing.assert_close(same.grad, expected["dq"] + expected["dk"] + expected["dv"])


def test_offsets_beyond_32_bits(native):
    """Two tokens 2^31 elements apart: 4 GB of address space, of which two pages are used."""
    x = random_inputs(T=2, H=1, HV=1, K=16, V=16, dtype=torch.bfloat16)
    far = dict(x)
    for name in ("q", "k", "v"):
        try:
            storage = torch.UntypedStorage(2 * (2**31 + 64))
        except RuntimeError:
            pytest.skip("this machine does not grant 4 GB of address space")
        far[name] = torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (1, 2, 1, 16), (2**31 + 64, 2**31, 16, 1))
        far[name].copy_(x[name])
    expected = call(fla_ops.delta_rule, x, backend=native).o
    assert torch.equal(call(fla_ops.delta_rule, far, backend=native).o, expected)


def test_inputs_are_never_modified(backend):
    x = random_inputs(B=1, T=70, HV=4, sequences=2, state=torch.float32)
    cu = bounds([30, 40])
    do, ds = random_cotangents(x, 2)
    given = [*x.values(), cu, do, ds]
    before = [t.clone() for t in given]
    leaf = {n: t.detach().requires_grad_() for n, t in x.items()}  # the same memory
    o, final = call(fla_ops.delta_rule, leaf, cu_seqlens=cu, output_final_state=True, qk_l2norm=True, backend=backend)
    torch.autograd.backward([o, final], [do, ds])
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert final.data_ptr() != x["initial_state"].data_ptr()


# Canaries: a NaN goes where the equation sends it and nowhere else.


@pytest.mark.parametrize("at", [0, 5, 63, 64, 100, 129])
@pytest.mark.parametrize("name", TOKENS)
def test_a_nan_token_does_not_reach_the_past_or_other_heads(backend, name, at):
    x = random_inputs(B=2, T=130, H=2, HV=4, K=20, V=12, state=torch.float32)
    clean = call(fla_ops.delta_rule, x, output_final_state=True, backend=backend)
    x[name][1, at, 1] = torch.nan
    o, final = call(fla_ops.delta_rule, x, output_final_state=True, backend=backend)
    touched = [2, 3] if name in ("q", "k") else [1]  # value heads that read head 1
    others = [h for h in range(4) if h not in touched]
    assert o[1, at, touched].isnan().all()
    assert torch.equal(o[1, :at], clean.o[1, :at]), "the past"
    assert torch.equal(o[:, :, others], clean.o[:, :, others]), "other heads"
    assert torch.equal(o[0], clean.o[0]), "other rows"
    assert torch.equal(final[0], clean.final_state[0])
    assert torch.equal(final[:, others], clean.final_state[:, others])


@pytest.mark.parametrize("name", [*TOKENS, "initial_state"])
def test_a_nan_sequence_does_not_reach_its_neighbours(backend, name):
    """Outputs, states and gradients of the other sequences keep every bit, chunk edges or not."""
    lengths = [30, 40, 60]
    x = random_inputs(T=130, K=20, V=12, sequences=3, state=torch.float32)
    do, ds = random_cotangents(x, 3)
    clean = results(op_of(backend), x, do, ds, cu_seqlens=bounds(lengths))
    if name == "initial_state":
        x[name][1] = torch.nan
    else:
        x[name][:, 30:70] = torch.nan
    found = results(op_of(backend), x, do, ds, cu_seqlens=bounds(lengths))
    for result in clean:
        if result in ("final_state", "dinitial_state"):
            assert torch.equal(found[result][[0, 2]], clean[result][[0, 2]]), result
        else:
            assert torch.equal(found[result][:, :30], clean[result][:, :30]), result
            assert torch.equal(found[result][:, 70:], clean[result][:, 70:]), result


@pytest.mark.parametrize("at", [5, 63, 64, 100])
def test_a_nan_gradient_does_not_reach_the_future(backend, at):
    """A NaN in the gradient of token t makes NaN of gradients up to t at most."""
    x = random_inputs(T=130, K=20, V=12, state=torch.float32)
    do, ds = random_cotangents(x)
    clean = results(op_of(backend), x, do, ds)
    do[0, at, 1] = torch.nan
    found = results(op_of(backend), x, do, ds)
    for name in (f"d{n}" for n in TOKENS):
        later, head = found[name][0, at + 1 :], found[name][0, :, 0]
        assert torch.equal(later, clean[name][0, at + 1 :]), name
        assert torch.equal(head, clean[name][0, :, 0]), name
        assert found[name][0, at, 1].isnan().any() or name == "dg", name


def test_a_nan_has_the_places_of_the_reference(backend):
    """beta = NaN and infinite values are data like any other: no clamp, no check, the equation's result."""
    for name, value in itertools.product(("beta", "v", "q"), (torch.nan, torch.inf)):
        x = random_inputs(T=70, K=8, V=12)
        x[name][0, 20, 1] = value
        do, ds = random_cotangents(x)
        with torch.no_grad():
            o = call(fla_ops.delta_rule, x, backend=backend).o
        ref64, low = references(x, do, ds)
        nonfinite = ~torch.isfinite(ref64["o"])
        assert torch.equal(~torch.isfinite(o), nonfinite), f"{name} = {value}"
        kept = ~nonfinite
        assert_matches_reference(o[kept], ref64["o"][kept], low["o"][kept], f"o beside {name} = {value}")


@pytest.mark.parametrize("ends", [[0, 40, 60], [0, 40, 900], [5, 40, 70], [33, 40, 70], [0, 0, 0]], ids=str)
def test_boundaries_that_could_not_be_checked_touch_nothing_outside(backend, monkeypatch, ends):
    """On a device, values are not read: they are clamped, and rows that no sequence covers are 0, gradients too."""
    monkeypatch.setattr(fla_ops._checks, "_can_read", lambda x: False)
    x = random_inputs(T=70, K=20, V=12, sequences=2, state=torch.float32)
    do, ds = random_cotangents(x, 2)
    found = results(op_of(backend), x, do, ds, cu_seqlens=torch.tensor(ends))
    first, last = ends[0], min(ends[-1], 70)
    inside = {n: t if n == "initial_state" else t[:, first:last] for n, t in x.items()}
    cu = torch.tensor(ends).clamp(max=70) - first
    right = results(op_of(backend), inside, do[:, first:last], ds, cu_seqlens=cu)
    for name, t in right.items():
        if name in ("final_state", "dinitial_state"):
            torch.testing.assert_close(found[name], t)
        else:
            torch.testing.assert_close(found[name][:, first:last], t)
            assert not found[name][:, :first].any() and not found[name][:, last:].any(), name


def test_boundaries_that_run_backwards_are_made_monotone(backend, monkeypatch):
    """Each becomes the largest so far: sequences never overlap. (Triton's kernels clamp each bound by itself: in place
    of a running maximum of bounds that are wrong anyway, theirs overlap, and stay inside of the tensors.)"""
    if backend == "triton":
        pytest.skip("no promise of the Triton kernels")
    monkeypatch.setattr(fla_ops._checks, "_can_read", lambda x: False)
    x = random_inputs(T=70, K=20, V=12, sequences=4, state=torch.float32)
    do, ds = random_cotangents(x, 4)
    found = results(op_of(backend), x, do, ds, cu_seqlens=torch.tensor([-3, 50, 20, 30, 65]))
    right = results(op_of(backend), x, do, ds, cu_seqlens=torch.tensor([0, 50, 50, 50, 65]))
    assert_same_bits(found, right)
    assert not any(right[name][:, 65:].any() for name in ("o", "dq", "dk", "dv", "dbeta", "dg"))


def test_rows_outside_of_every_sequence_may_hold_anything(backend, monkeypatch):
    """The tail of a buffer that is longer than its sequences: its NaN are read by nobody, its gradients are 0."""
    if backend == "reference":
        pytest.skip("it differentiates through all rows, and 0 times NaN is NaN")
    monkeypatch.setattr(fla_ops._checks, "_can_read", lambda x: False)
    x = random_inputs(T=70, K=20, V=12, sequences=2, state=torch.float32)
    do, ds = random_cotangents(x, 2)
    options = {"cu_seqlens": torch.tensor([5, 40, 60]), "qk_l2norm": True}
    right = results(op_of(backend), x, do, ds, **options)
    for t in (do, *(x[name] for name in TOKENS)):
        t[:, :5] = t[:, 60:] = torch.nan
    found = results(op_of(backend), x, do, ds, **options)
    assert_same_bits(found, right)
    assert all(t.isfinite().all() for t in found.values())


def test_slots_that_could_not_be_checked_touch_nothing_outside(backend, monkeypatch):
    monkeypatch.setattr(fla_ops._checks, "_can_read", lambda x: False)
    x = random_inputs(B=3, T=1, state=torch.float32)
    tokens, pool = [x[n][:, 0] for n in TOKENS], torch.zeros(4, 2, 16, 16)
    guarded = pool[1:3]  # slots 0 and 3 of the pool are not ours
    slots = torch.tensor([1, 2, -7])
    o = fla_ops.delta_rule_step(*tokens, state=guarded, state_indices=slots, backend=backend)
    assert o[0].any() and not o[1:].any()
    assert pool[2].any() and not pool[[0, 1, 3]].any()


@contextlib.contextmanager
def uninitialised_memory_is_nan():
    """torch's own poison, which reaches allocations made in C++ too."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.ops.aten.empty([4], dtype=torch.float32, device="cpu").isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize("lengths", [None, [0, 3, 64, 0, 63, 0]], ids=["batch", "packed"])
@pytest.mark.parametrize("K, V", [(16, 16), (17, 60)])
def test_every_element_is_written(backend, lengths, K, V):
    options, N = ({}, None) if lengths is None else ({"cu_seqlens": bounds(lengths)}, len(lengths))
    x = random_inputs(T=130, HV=4, K=K, V=V, sequences=N, state=torch.float32)
    do, ds = random_cotangents(x, N)
    plain = results(op_of(backend), x, do, ds, **options)
    with uninitialised_memory_is_nan():
        found = results(op_of(backend), x, do, ds, **options)
    assert all(t.isfinite().all() for t in found.values())
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-4, atol=1e-5)


# What autograd keeps.


def saved_bytes(op):
    """(result, bytes that autograd keeps for the backward pass); a tensor that is saved twice counts once."""
    sizes = {}

    def pack(t):
        sizes[t.data_ptr(), t.shape, t.stride()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = op()
    return result, sum(sizes.values())


@pytest.mark.parametrize("lengths", [None, [0, 1, 64, 65, 500, 370]], ids=["batch", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("qk_l2norm", [False, True], ids=["", "l2norm"])
def test_training_saves_what_the_readme_says(native, lengths, dtype, qk_l2norm):
    """The inputs, 64 values a token and value head, and one float32 state per 64 tokens of a sequence."""
    N = None if lengths is None else len(lengths)
    x = leaves(random_inputs(T=1000, H=2, HV=4, K=64, V=96, dtype=dtype, sequences=N, state=torch.float32))
    cu = None if lengths is None else bounds(lengths)
    options = {"cu_seqlens": cu, "qk_l2norm": qk_l2norm, "backend": native}
    o, saved = saved_bytes(lambda: call(fla_ops.delta_rule, x, **options).o)
    given = [*x.values()] + [cu] * (cu is not None)
    inputs = sum(t.numel() * t.element_size() for t in given)
    blocks = sum(-(-length // 64) for length in lengths or [1000])
    allowed = inputs + 64 * o.element_size() * 1000 * 4 + blocks * 4 * 64 * 96 * 4
    assert 0 < saved <= allowed, f"{saved} bytes saved, {allowed} allowed, {inputs} of them inputs"


def test_only_what_is_needed_is_computed(native, monkeypatch):
    """Every choice of tensors that need a gradient: those get the right one, the kernel is asked for no other."""
    module = importlib.import_module("fla_ops._native.delta_rule")
    asked, backward = [], module.backward

    def recorded(*args, needs, **options):
        grads = backward(*args, needs=needs, **options)
        asked.append((tuple(needs), tuple(grad is not None for grad in grads)))
        return grads

    monkeypatch.setattr(module, "backward", recorded)
    x = random_inputs(T=66, HV=4, K=20, V=12, state=torch.float32)
    do, ds = random_cotangents(x)
    expected = results(op_of(native), x, do, ds)
    subsets = [s for n in (1, 2, 5) for s in itertools.combinations(TENSORS, n)]
    for wanted in subsets:
        asked.clear()
        found = results(op_of(native), x, do, ds, wanted=wanted)
        needs = tuple(name in wanted for name in TENSORS)
        assert asked == [(needs, needs)], wanted
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", [("q",), ("v", "g"), ("initial_state",)], ids="-".join)
def test_other_tensors_get_no_gradient(backend, wanted):
    x = leaves(random_inputs(T=20, state=torch.float32), wanted=wanted)
    call(fla_ops.delta_rule, x, backend=backend).o.sum().backward()
    assert {n for n in TENSORS if x[n].grad is not None} == set(wanted)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_without_autograd(backend, mode):
    x = leaves(random_inputs(T=130, state=torch.float32))
    with mode():
        (o, final), saved = saved_bytes(lambda: call(fla_ops.delta_rule, x, output_final_state=True, backend=backend))
    assert saved == 0
    assert o.grad_fn is None and final.grad_fn is None and not o.requires_grad


def states_asked_for(monkeypatch, run) -> list[bool]:
    """Whether the native forward was asked for the checkpoints of the backward, for each call that `run` makes."""
    module = importlib.import_module("fla_ops._native.delta_rule")
    asked, forward = [], module.forward

    def recorded(*args, save_states, **options):
        asked.append(save_states)
        return forward(*args, save_states=save_states, **options)

    monkeypatch.setattr(module, "forward", recorded)
    run()
    return asked


def test_checkpoints_are_made_for_a_backward_only(native, monkeypatch):
    """Weights that require gradients, evaluated under no_grad, must not pay for a backward that never comes."""
    x = random_inputs(T=130, state=torch.float32)
    learnt = leaves(x)

    def run():
        call(fla_ops.delta_rule, x, backend=native)
        with torch.no_grad():
            call(fla_ops.delta_rule, learnt, backend=native)
        with torch.inference_mode():
            call(fla_ops.delta_rule, learnt, backend=native)
        call(fla_ops.delta_rule, learnt, backend=native)

    assert states_asked_for(monkeypatch, run) == [False, False, False, True]


def test_a_step_allocates_only_its_output(native):
    x = random_inputs(B=4, T=1, H=4, HV=8, K=128, V=128, dtype=torch.bfloat16)
    tokens, state = [x[n][:, 0] for n in TOKENS], torch.zeros(4, 8, 128, 128)
    fla_ops.delta_rule_step(*tokens, state=state, backend=native)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        o = fla_ops.delta_rule_step(*tokens, state=state, backend=native)
    taken = sum(e.self_cpu_memory_usage for e in profile.key_averages() if e.self_cpu_memory_usage > 0)
    assert 0 < taken <= -(-o.numel() * o.element_size() // 64) * 64


# The same bits.


@pytest.mark.parametrize("shape", [{"B": 1, "T": 300, "H": 1, "HV": 1}, {"B": 2, "T": 130, "H": 2, "HV": 4}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_and_runs_change_no_bit(native, threads, shape, dtype):
    x = random_inputs(**shape, K=64, V=96, dtype=dtype, state=torch.float32)
    do, ds = random_cotangents(x)
    threads(1)
    alone = results(op_of(native), x, do, ds)
    for n in (2, 3, 2, 1):
        threads(n)
        assert_same_bits(results(op_of(native), x, do, ds), alone)


def test_threads_change_no_bit_of_packed_sequences(native, threads):
    lengths = [3, 0, 200, 64, 33]
    x = random_inputs(T=300, H=1, HV=2, K=32, V=40, sequences=5, state=torch.float32)
    do, ds = random_cotangents(x, 5)
    threads(1)
    alone = results(op_of(native), x, do, ds, cu_seqlens=bounds(lengths))
    threads(2)
    assert_same_bits(results(op_of(native), x, do, ds, cu_seqlens=bounds(lengths)), alone)


def test_threads_change_no_bit_of_a_step(native, threads):
    x = random_inputs(B=3, T=1, H=2, HV=4, K=64, V=96, state=torch.float32)
    tokens = [x[n][:, 0] for n in TOKENS]
    found = []
    for n in (1, 2):
        threads(n)
        state = x["initial_state"].clone()
        found.append((fla_ops.delta_rule_step(*tokens, state=state, backend=native), state))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_row_does_not_depend_on_its_batch(native):
    """Under deterministic algorithms the bits of a row are its own."""
    x = random_inputs(B=5, T=200, K=32, V=48, state=torch.float32)
    do, ds = random_cotangents(x)
    torch.use_deterministic_algorithms(True)
    try:
        batch = results(op_of(native), x, do, ds)
        row = {n: t[2:3] for n, t in x.items()}
        alone = results(op_of(native), row, do[2:3], ds[2:3])
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(alone, {n: t[2:3] for n, t in batch.items()})


def test_repeated_calls_of_every_backend_give_the_same_bits(backend):
    x = random_inputs(B=2, T=130, K=20, V=12, state=torch.float32)
    do, ds = random_cotangents(x)
    with one_thread() if backend == "reference" else contextlib.nullcontext():
        assert_same_bits(results(op_of(backend), x, do, ds), results(op_of(backend), x, do, ds))
