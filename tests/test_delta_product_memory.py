# SPDX-License-Identifier: Apache-2.0
"""What DeltaProduct reads, writes and keeps: what grows with n, strides, stray values, the same bits every time."""

import contextlib
import functools

import pytest
import torch
from delta_product_cases import MICRO, random_inputs
from delta_rule_cases import TENSORS, assert_same_bits, bounds, call, leaves, one_thread, random_cotangents, results
from test_delta_rule_memory import DISGUISES, saved_bytes, uninitialised_memory_is_nan

import fla_ops

OP = "delta_product"
TOKENS = TENSORS[:5]


def op_of(backend, n):
    return functools.partial(fla_ops.delta_product, num_householder=n, backend=backend)


# What grows with n.

SIZES = {"H": 2, "HV": 6, "K": 64, "V": 80}


def allocations(backend, n, T, wanted):
    """Bytes of each piece of memory that one forward and backward takes, largest first."""
    x = leaves(random_inputs(n, T=T, **SIZES, state=torch.float32), wanted=wanted)
    do, ds = random_cotangents(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        o, final = call(op_of(backend, n), x, output_final_state=True)
        torch.autograd.backward([o, final], [do, ds])
    events = profile.profiler.kineto_results.events()
    return sorted((e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0), reverse=True)


@pytest.mark.parametrize("T", [512, 1024])
def test_no_query_row_is_made_for_a_micro_step(native, threads, T):
    """Without gradients for k, v and beta nothing of T * n rows is ever taken, and one call takes the same for any n,
    up to each thread's scratch, which does not depend on T."""
    threads(1)
    taken = {n: allocations(native, n, T, ("q", "g", "initial_state")) for n in (2, 4, 8)}
    for n, sizes in taken.items():
        rows = {4 * T * n * heads * columns for heads in (2, 6) for columns in (64, 80)}
        assert not rows & set(sizes), f"n = {n}: {sizes}"
    rest = {n: sum(sizes) - max(sizes) for n, sizes in taken.items()}  # the scratch is the largest
    assert rest[2] == rest[4] == rest[8], rest


def test_memory_grows_with_n_through_k_v_and_beta_alone(native, threads):
    """Bytes per token of a forward and backward: an n more costs a row more of dk, dv and dbeta, and of dk's parts of
    each value head, which are summed afterwards."""
    threads(1)
    per_token = {}
    for n in (2, 3, 4, 8):
        few, many = (sum(allocations(native, n, T, TENSORS)) for T in (512, 1024))
        per_token[n] = (many - few) / 512
    row = 4 * (2 * 64 + 6 * 64 + 6 * 80 + 6)
    for n, bytes_per_token in per_token.items():
        assert abs(bytes_per_token - per_token[2] - (n - 2) * row) < 1, per_token


@pytest.mark.parametrize("lengths", [None, [0, 1, 64, 65, 500, 370]], ids=["batch", "packed"])
@pytest.mark.parametrize("n", [2, 3, 8])
def test_training_saves_its_inputs_and_a_state_every_64_tokens(native, n, lengths):
    N = None if lengths is None else len(lengths)
    x = leaves(random_inputs(n, T=1000, **SIZES, sequences=N, state=torch.float32))
    cu = None if lengths is None else bounds(lengths)
    o, saved = saved_bytes(lambda: call(op_of(native, n), x, cu_seqlens=cu).o)
    inputs = sum(t.numel() * t.element_size() for t in [*x.values()] + [cu] * (cu is not None))
    states = 16 + (len(lengths) if lengths else 0)  # an upper bound for packed sequences
    assert saved == inputs + states * 6 * 64 * 80 * 4


def test_a_step_allocates_only_its_output(native):
    x = random_inputs(4, B=4, T=1, H=4, HV=8, K=128, V=128, dtype=torch.bfloat16)
    tokens = [x[name] if name in MICRO else x[name][:, 0] for name in TOKENS]
    state = torch.zeros(4, 8, 128, 128)
    fla_ops.delta_product_step(*tokens, state=state, backend=native)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        o = fla_ops.delta_product_step(*tokens, state=state, backend=native)
    taken = sum(e.self_cpu_memory_usage for e in profile.key_averages() if e.self_cpu_memory_usage > 0)
    assert 0 < taken <= -(-o.numel() * o.element_size() // 64) * 64


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_without_autograd(backend, mode):
    x = leaves(random_inputs(2, state=torch.float32))
    with mode():
        (o, final), saved = saved_bytes(lambda: call(op_of(backend, 2), x, output_final_state=True))
    assert saved == 0
    assert o.grad_fn is None and final.grad_fn is None and not o.requires_grad


@pytest.mark.parametrize("wanted", [("q",), ("k",), ("v", "g"), ("beta",), ("initial_state",)], ids="-".join)
def test_only_the_wanted_gradients(backend, wanted):
    x = random_inputs(3, T=25, HV=4, K=20, V=12, state=torch.float32)
    do, ds = random_cotangents(x)
    expected = results(op_of(backend, 3), x, do, ds)
    found = results(op_of(backend, 3), x, do, ds, wanted=wanted)
    assert {name for name in found if name.startswith("d")} == {f"d{name}" for name in wanted}
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


# Strides.


@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES)
def test_strides(backend, disguise):
    """Inputs and incoming gradients in any layout give the same result, and from our kernels the same bits."""
    x = random_inputs(3, B=2, T=25, HV=4, K=20, V=12, state=torch.float32)
    do, ds = random_cotangents(x)
    expected = results(op_of(backend, 3), x, do, ds)
    leaf = leaves(x)
    o, final = call(op_of(backend, 3), {name: disguise(t) for name, t in leaf.items()}, output_final_state=True)
    torch.autograd.backward([o, final], [disguise(do), disguise(ds)])
    actual = {"o": o.detach(), "final_state": final.detach()} | {f"d{name}": leaf[name].grad for name in TENSORS}
    limit = (
        0 if backend == "native" else 16 * torch.finfo(torch.float32).eps
    )  # einsum sums other strides in another order
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=limit, atol=limit)


def test_inputs_are_never_modified(backend):
    x = random_inputs(2, T=30, HV=4, sequences=2, state=torch.float32)
    cu = bounds([12, 18])
    do, ds = random_cotangents(x, 2)
    given = [*x.values(), cu, do, ds]
    before = [t.clone() for t in given]
    leaf = {name: t.detach().requires_grad_() for name, t in x.items()}  # the same memory
    o, final = call(op_of(backend, 2), leaf, cu_seqlens=cu, output_final_state=True, qk_l2norm=True)
    torch.autograd.backward([o, final], [do, ds])
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


# Canaries: a NaN goes where the equation sends it and nowhere else.


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("name", TOKENS)
def test_a_nan_token_does_not_reach_the_past_or_other_heads(backend, n, name):
    x = random_inputs(n, B=2, T=40, H=2, HV=4, K=20, V=12, state=torch.float32)
    clean = call(op_of(backend, n), x, output_final_state=True)
    for at in (0, 3, 7, 8, 33):
        for micro in (0, n - 1) if name in MICRO else (0,):
            row = at * n + micro if name in MICRO else at
            bad = {key: t.clone() for key, t in x.items()}
            bad[name][1, row, 1] = torch.nan
            o, final = call(op_of(backend, n), bad, output_final_state=True)
            touched = [2, 3] if name in ("q", "k") else [1]  # value heads that read head 1
            others = [h for h in range(4) if h not in touched]
            assert o[1, at, touched].isnan().all()
            assert torch.equal(o[1, :at], clean.o[1, :at]), "the past"
            assert torch.equal(o[:, :, others], clean.o[:, :, others]), "other heads"
            assert torch.equal(o[0], clean.o[0]), "other rows"
            assert torch.equal(final[:, others], clean.final_state[:, others])


@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_nan_gradient_does_not_reach_the_future(backend, n):
    """A NaN in the gradient of token t makes NaN of gradients up to t at most."""
    x = random_inputs(n, T=40, K=20, V=12, state=torch.float32)
    do, ds = random_cotangents(x)
    clean = results(op_of(backend, n), x, do, ds)
    for at in (1, 7, 8, 33):
        bad = do.clone()
        bad[0, at, 1] = torch.nan
        found = results(op_of(backend, n), x, bad, ds)
        for name in TOKENS:
            after = (at + 1) * (n if name in MICRO else 1)
            assert torch.equal(found[f"d{name}"][0, after:], clean[f"d{name}"][0, after:]), name
            assert torch.equal(found[f"d{name}"][0, :, 0], clean[f"d{name}"][0, :, 0]), name


@pytest.mark.parametrize("ends", [[0, 20, 30], [0, 20, 900], [5, 20, 35], [0, 0, 0]], ids=str)
def test_boundaries_that_could_not_be_checked_touch_nothing_outside(backend, monkeypatch, ends):
    """On a device, values are not read: they are clamped, and rows that no sequence covers are 0, gradients too."""
    monkeypatch.setattr(fla_ops._checks, "_can_read", lambda x: False)
    n = 3
    x = random_inputs(n, T=35, K=20, V=12, sequences=2, state=torch.float32)
    do, ds = random_cotangents(x, 2)
    found = results(op_of(backend, n), x, do, ds, cu_seqlens=torch.tensor(ends))
    first, last = ends[0], min(ends[-1], 35)

    def part(name, t):
        scale = n if name.removeprefix("d") in MICRO else 1
        return slice(first * scale, last * scale), t

    inside = {name: t if name == "initial_state" else t[:, part(name, t)[0]] for name, t in x.items()}
    cu = torch.tensor(ends).clamp(max=35) - first
    right = results(op_of(backend, n), inside, do[:, first:last], ds, cu_seqlens=cu)
    for name, t in right.items():
        if name in ("final_state", "dinitial_state"):
            torch.testing.assert_close(found[name], t)
            continue
        rows = part(name, t)[0]
        torch.testing.assert_close(found[name][:, rows], t)
        assert not found[name][:, : rows.start].any() and not found[name][:, rows.stop :].any(), name


@pytest.mark.parametrize("lengths", [None, [0, 3, 17, 0, 20, 0]], ids=["batch", "packed"])
@pytest.mark.parametrize("n", [2, 5])
def test_every_element_is_written(backend, n, lengths):
    options, N = ({}, None) if lengths is None else ({"cu_seqlens": bounds(lengths)}, len(lengths))
    x = random_inputs(n, T=40, HV=4, K=17, V=20, sequences=N, state=torch.float32)
    do, ds = random_cotangents(x, N)
    with uninitialised_memory_is_nan():
        found = results(op_of(backend, n), x, do, ds, **options)
    assert all(t.isfinite().all() for t in found.values())


# The same bits.


@pytest.mark.parametrize("shape", [{"B": 1, "T": 150, "H": 1, "HV": 1}, {"B": 2, "T": 70, "H": 2, "HV": 4}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [2, 3])
def test_threads_and_runs_change_no_bit(native, threads, n, shape, dtype):
    x = random_inputs(n, **shape, K=64, V=96, dtype=dtype, state=torch.float32)
    do, ds = random_cotangents(x)
    threads(1)
    alone = results(op_of(native, n), x, do, ds)
    for count in (2, 3, 2, 1):
        threads(count)
        assert_same_bits(results(op_of(native, n), x, do, ds), alone)


def test_threads_change_no_bit_of_a_step(native, threads):
    x = random_inputs(4, B=3, T=1, H=2, HV=4, K=64, V=96, state=torch.float32)
    tokens = [x[name] if name in MICRO else x[name][:, 0] for name in TOKENS]
    found = []
    for count in (1, 2):
        threads(count)
        state = x["initial_state"].clone()
        found.append((fla_ops.delta_product_step(*tokens, state=state, backend=native), state))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_row_does_not_depend_on_its_batch(native):
    """Under deterministic algorithms, which every test runs under, the bits of a row are its own."""
    x = random_inputs(2, B=5, T=70, K=32, V=48, state=torch.float32)
    do, ds = random_cotangents(x)
    batch = results(op_of(native, 2), x, do, ds)
    alone = results(op_of(native, 2), {name: t[2:3] for name, t in x.items()}, do[2:3], ds[2:3])
    assert_same_bits(alone, {name: t[2:3] for name, t in batch.items()})


def test_repeated_calls_of_every_backend_give_the_same_bits(backend):
    x = random_inputs(3, B=2, T=40, K=20, V=12, state=torch.float32)
    do, ds = random_cotangents(x)
    with one_thread() if backend == "reference" else contextlib.nullcontext():
        assert_same_bits(results(op_of(backend, 3), x, do, ds), results(op_of(backend, 3), x, do, ds))
