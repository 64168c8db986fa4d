# SPDX-License-Identifier: Apache-2.0
"""One long sequence, its pieces, packed sequences and single steps are the same computation."""

import functools

import pytest
import torch
from delta_rule_cases import (
    TENSORS,
    bounds,
    call,
    check,
    leaves,
    one_thread,
    random_cotangents,
    random_inputs,
    references,
    results,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fla_ops
from fla_ops.testing import assert_matches_reference

# The fixtures (a backend's name, poisoned allocations) do not change between examples.
few = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LENGTHS = st.sampled_from([0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 100])
gates = pytest.mark.parametrize("gate", [None, "normal"], ids=["plain", "gated"])


def rows(x, part: slice, sequence=None):
    """The tokens `part` of every tensor, and the state of one packed sequence."""
    piece = {n: None if x[n] is None else x[n][:, part] for n in TENSORS[:5]}
    state = x["initial_state"]
    return piece | {"initial_state": state if state is None or sequence is None else state[sequence : sequence + 1]}


def assert_same(actual, expected, name):
    """Equal to 1e-12 of the largest element: what float64 leaves of two orders of summation."""
    limit = 1e-12 * max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit, msg=lambda m: f"{name}: {m}")


# Packed sequences.


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@gates
def test_packed_against_the_reference(backend, index, gate):
    """Empty sequences at both ends and in the middle, one-token sequences, whole chunks and tails."""
    lengths = [0, 64, 1, 0, 65, 3, 1, 0]
    inputs = random_inputs(T=sum(lengths), HV=4, K=24, V=40, gate=gate, sequences=8, state=torch.float32)
    check(backend, inputs, cu_seqlens=bounds(lengths, index))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_packed_dtypes(backend, dtype):
    lengths = [70, 0, 33]
    inputs = random_inputs(T=sum(lengths), K=32, V=32, dtype=dtype, sequences=3, state=torch.float32)
    check(backend, inputs, cu_seqlens=bounds(lengths), qk_l2norm=True)


def test_packed_without_a_state(backend):
    lengths = [70, 0, 33]
    check(backend, random_inputs(T=sum(lengths), K=32, V=32, sequences=3), cu_seqlens=bounds(lengths))


@few
@given(lengths=st.lists(LENGTHS, min_size=1, max_size=5), gate=st.sampled_from([None, "normal"]), state=st.booleans())
def test_packed_is_separate(backend, lengths, gate, state):
    """Outputs, final states and all gradients of a pack are those of its sequences, run one by one."""
    N = len(lengths)
    options = {"gate": gate, "dtype": torch.float64, "state": torch.float64 if state else None}
    inputs = random_inputs(T=sum(lengths), H=1, HV=2, K=9, V=12, sequences=N, **options)
    do, ds = random_cotangents(inputs, N)
    op = functools.partial(fla_ops.delta_rule, backend=backend)
    with one_thread():
        packed = results(op, inputs, do, ds, cu_seqlens=bounds(lengths))
        at = 0
        for n, length in enumerate(lengths):
            part = slice(at, at + length)
            one = results(op, rows(inputs, part, n), do[:, part], ds[n : n + 1])
            for name, found in one.items():
                per_sequence = name in ("final_state", "dinitial_state")
                expected = packed[name][n : n + 1] if per_sequence else packed[name][:, part]
                assert_same(found, expected, f"{name} of sequence {n}")
            at += length


def test_a_sequence_does_not_see_its_neighbours(backend):
    """Changing one sequence of a pack changes not one bit of the others, gradients included."""
    lengths = [40, 70, 33]
    cu = bounds(lengths)
    inputs = random_inputs(T=143, K=32, V=24, sequences=3, state=torch.float32)
    do, ds = random_cotangents(inputs, 3)
    op = functools.partial(fla_ops.delta_rule, backend=backend)
    before = results(op, inputs, do, ds, cu_seqlens=cu)
    changed = {n: x.clone() for n, x in inputs.items()}
    for name in TENSORS[:5]:
        changed[name][:, 40:110] *= 0.5
    changed["initial_state"][1] += 1
    after = results(op, changed, do, ds, cu_seqlens=cu)
    for name in before:
        keep = [0, 2] if name in ("final_state", "dinitial_state") else [*range(40), *range(110, 143)]
        axis = 0 if name in ("final_state", "dinitial_state") else 1
        index = torch.tensor(keep)
        assert torch.equal(before[name].index_select(axis, index), after[name].index_select(axis, index)), name
        assert not torch.equal(before[name], after[name]), name


def test_an_empty_sequence_keeps_its_state(backend):
    inputs = random_inputs(T=10, sequences=3, state=torch.float32)
    x = leaves(inputs)
    cu = bounds([4, 0, 6])
    o, final = call(fla_ops.delta_rule, x, cu_seqlens=cu, output_final_state=True, backend=backend)
    assert torch.equal(final[1], inputs["initial_state"][1])
    final[1].sum().backward()
    assert torch.equal(x["initial_state"].grad[1], torch.ones_like(final[1]))
    assert not x["initial_state"].grad[[0, 2]].any()
    assert not x["k"].grad.any()
    stateless = inputs | {"initial_state": None}
    final = call(fla_ops.delta_rule, stateless, cu_seqlens=cu, output_final_state=True, backend=backend).final_state
    assert not final[1].any()


@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, T", [(2, 0), (0, 5), (0, 0)])
def test_nothing_to_do(backend, B, T, state):
    """T = 0 and B = 0: empty results of the right shape and dtype, a copy of the state, gradients to match."""
    x = leaves(random_inputs(B=B, T=T, state=state))
    o, final = call(fla_ops.delta_rule, x, output_final_state=True, backend=backend)
    assert o.shape == (B, T, 2, 16) and o.dtype == torch.float32
    assert final.shape == (B, 2, 16, 16) and final.dtype == torch.float32
    if state is None:
        assert not final.any()
    else:
        assert torch.equal(final, x["initial_state"].float())
        assert not B or final.data_ptr() != x["initial_state"].data_ptr()
        (o.sum() + final.sum()).backward()
        assert torch.equal(x["initial_state"].grad, torch.ones_like(x["initial_state"]))
        for name in TENSORS[:5]:
            assert x[name].grad is None or x[name].grad.shape == x[name].shape


def test_no_sequences(backend):
    """N = 0: a pack of nothing."""
    x = random_inputs(T=0, sequences=0, state=torch.float32)
    o, final = call(fla_ops.delta_rule, x, cu_seqlens=bounds([]), output_final_state=True, backend=backend)
    assert o.shape == (1, 0, 2, 16) and final.shape == (0, 2, 16, 16)


# Splits in time.


@few
@given(cuts=st.lists(st.integers(0, 150), min_size=1, max_size=4), gate=st.sampled_from([None, "normal", "resets"]))
def test_any_split_in_time_is_the_whole(backend, cuts, gate):
    """Prefill in pieces, the state handed on: same outputs, same final state, same gradients through the state."""
    inputs = random_inputs(T=150, H=1, HV=2, K=9, V=12, gate=gate, dtype=torch.float64, state=torch.float64)
    do, ds = random_cotangents(inputs)
    op = functools.partial(fla_ops.delta_rule, backend=backend)

    def in_pieces(q, k, v, beta, g, initial_state, output_final_state):
        x = dict(zip(TENSORS, (q, k, v, beta, g, None), strict=True))
        outputs, state = [], initial_state
        edges = [0, *sorted(cuts), 150]
        for a, b in zip(edges, edges[1:], strict=False):
            piece = rows(x, slice(a, b)) | {"initial_state": state}
            o, state = call(op, piece, output_final_state=True)
            outputs.append(o)
        return torch.cat(outputs, 1), state

    with one_thread():
        whole = results(op, inputs, do, ds)
        pieces = results(in_pieces, inputs, do, ds)
    for name in whole:
        assert_same(pieces[name], whole[name], name)


# Single steps.


def step_inputs(x, t):
    return [None if x[n] is None else x[n][:, t] for n in TENSORS[:5]]


@pytest.mark.parametrize("qk_l2norm", [False, True], ids=["", "l2norm"])
@gates
def test_steps_are_the_whole(backend, gate, qk_l2norm):
    x = random_inputs(B=2, T=70, HV=4, K=17, V=20, gate=gate, dtype=torch.float64, state=torch.float64)
    whole = call(fla_ops.delta_rule, x, qk_l2norm=qk_l2norm, output_final_state=True, backend=backend)
    state = x["initial_state"].clone()
    options = {"qk_l2norm": qk_l2norm, "state": state, "backend": backend}
    o = torch.stack([fla_ops.delta_rule_step(*step_inputs(x, t), **options) for t in range(70)], 1)
    assert_same(o, whole.o, "o")
    assert_same(state, whole.final_state, "state")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_in_low_precision(backend, dtype):
    """float32 state, tokens in `dtype`: within the budget of the full sequence."""
    x = random_inputs(T=40, K=32, V=24, dtype=dtype, state=torch.float32)

    def steps(q, k, v, beta, g, initial_state, output_final_state):
        tokens = dict(zip(TENSORS, (q, k, v, beta, g, None), strict=True))
        state = initial_state.clone()
        found = [fla_ops.delta_rule_step(*step_inputs(tokens, t), state=state, backend=backend) for t in range(40)]
        return torch.stack(found, 1), state

    ref64, low = references(x, *random_cotangents(x))
    with torch.no_grad():
        o, state = call(steps, x, output_final_state=True)
    assert_matches_reference(o, ref64["o"], low["o"], "o")
    assert_matches_reference(state, ref64["final_state"], low["final_state"], "state")


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_step_state_dtypes(backend, state_dtype):
    """The state keeps its dtype: read, computed in float32, rounded once when written."""
    x = random_inputs(B=2, T=1, state=state_dtype)
    state = x["initial_state"].clone()
    o = fla_ops.delta_rule_step(*step_inputs(x, 0), state=state, backend=backend)
    expected = call(fla_ops.delta_rule, x, output_final_state=True, backend="reference")
    torch.testing.assert_close(o, expected.o[:, 0], rtol=1e-5, atol=1e-6)
    eps = torch.finfo(state_dtype).eps
    torch.testing.assert_close(
        state, expected.final_state.to(state_dtype), rtol=max(eps, 1e-5), atol=max(eps / 4, 1e-6)
    )


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_step_state_indices(backend, index):
    """Rows find their slot; -1 skips: output 0, and slots that no row names keep every bit, NaN included."""
    x = random_inputs(B=4, T=1, K=17, V=20, state=torch.float32)
    pool = torch.full((7, 2, 17, 20), torch.nan)
    slots = torch.tensor([5, -1, 0, 3], dtype=index)
    live = [0, 2, 3]
    pool[slots[live].long()] = x["initial_state"][live]
    o = fla_ops.delta_rule_step(*step_inputs(x, 0), state=pool, state_indices=slots, backend=backend)
    state = x["initial_state"].clone()
    expected = fla_ops.delta_rule_step(*step_inputs(x, 0), state=state, backend=backend)
    assert torch.equal(o[live], expected[live])
    assert not o[1].any()
    assert torch.equal(pool[slots[live].long()], state[live])
    assert pool[[1, 2, 4, 6]].isnan().all()


def test_step_skips_every_row(backend):
    x = random_inputs(B=2, T=1)
    state = torch.randn(3, 2, 16, 16)
    before = state.clone()
    skip = torch.full((2,), -1)
    o = fla_ops.delta_rule_step(*step_inputs(x, 0), state=state, state_indices=skip, backend=backend)
    assert not o.any() and torch.equal(state, before)


def test_step_of_no_rows(backend):
    x = random_inputs(B=0, T=1)
    o = fla_ops.delta_rule_step(*step_inputs(x, 0), state=torch.zeros(0, 2, 16, 16), backend=backend)
    assert o.shape == (0, 2, 16)
    none = torch.zeros(0, dtype=torch.int64)
    options = {"state": torch.ones(3, 2, 16, 16), "state_indices": none, "backend": backend}
    assert fla_ops.delta_rule_step(*step_inputs(x, 0), **options).shape == (0, 2, 16)


def test_step_takes_any_strides(backend):
    """A value-first cache seen through a transpose, and tokens cut from a wider projection."""
    x = random_inputs(B=2, T=3, K=17, V=20, state=torch.float32)
    state = x["initial_state"].clone()
    expected = fla_ops.delta_rule_step(*(t.contiguous() for t in step_inputs(x, 1)), state=state, backend=backend)
    value_first = x["initial_state"].transpose(-1, -2).contiguous()
    o = fla_ops.delta_rule_step(*step_inputs(x, 1), state=value_first.transpose(-1, -2), backend=backend)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(value_first.transpose(-1, -2), state)


def test_step_refuses_gradients(backend):
    x = random_inputs(T=1)
    tokens, state = step_inputs(x, 0), torch.zeros(1, 2, 16, 16)
    for leaf in (*tokens, state):
        leaf.requires_grad_()
        with pytest.raises(RuntimeError, match=r"delta_rule_step: .*torch\.no_grad\(\).*delta_rule with T=1"):
            fla_ops.delta_rule_step(*tokens, state=state, backend=backend)
        with torch.no_grad():
            fla_ops.delta_rule_step(*tokens, state=state, backend=backend)
        with torch.inference_mode():
            fla_ops.delta_rule_step(*tokens, state=state.detach().clone(), backend=backend)
        leaf.requires_grad_(False)
