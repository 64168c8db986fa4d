# SPDX-License-Identifier: Apache-2.0
"""DeltaProduct: one long sequence, its pieces, packed sequences and single steps are the same computation."""

import functools

import pytest
import torch
from delta_product_cases import MICRO, check, random_inputs
from delta_rule_cases import TENSORS, bounds, call, leaves, one_thread, random_cotangents, references, results
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fla_ops
from fla_ops.reference.delta_product import delta_product as reference
from fla_ops.testing import assert_matches_reference

OP = "delta_product"
# The fixtures (a backend's name, poisoned allocations) do not change between examples.
few = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
steps = pytest.mark.parametrize("n", [2, 3, 8])


def op_of(backend, n):
    return functools.partial(fla_ops.delta_product, num_householder=n, backend=backend)


def of_tokens(name, t, part: slice, n):
    """The rows of the tokens `part` in the tensor `t` of this name."""
    return t[:, part.start * n : part.stop * n] if name.removeprefix("d") in MICRO else t[:, part]


def rows(x, n, part: slice, sequence=None):
    """The tokens `part` of every tensor, and the state of one packed sequence."""
    piece = {name: None if x[name] is None else of_tokens(name, x[name], part, n) for name in TENSORS[:5]}
    state = x["initial_state"]
    return piece | {"initial_state": state if state is None or sequence is None else state[sequence : sequence + 1]}


def token(x, n, t):
    """The arguments of a step for token t."""
    piece = rows(x, n, slice(t, t + 1))
    return [piece[name] if piece[name] is None or name in MICRO else piece[name][:, 0] for name in TENSORS[:5]]


def assert_same(actual, expected, name):
    """Equal to 1e-12 of the largest element: what float64 leaves of two orders of summation."""
    limit = 1e-12 * max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit, msg=lambda m: f"{name}: {m}")


# Packed sequences: cu_seqlens counts tokens.


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@steps
def test_packed_against_the_reference(backend, n, index):
    """Empty sequences at both ends and in the middle, one-token sequences, whole chunks and tails."""
    lengths = [0, 16, 1, 0, 9, 3, 1, 0]
    inputs = random_inputs(n, T=sum(lengths), HV=4, K=24, V=40, sequences=8, state=torch.float32)
    check(backend, n, inputs, cu_seqlens=bounds(lengths, index))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_packed_dtypes(backend, dtype):
    lengths = [20, 0, 66]
    inputs = random_inputs(2, T=sum(lengths), K=32, V=32, dtype=dtype, sequences=3)
    check(backend, 2, inputs, cu_seqlens=bounds(lengths), qk_l2norm=True)


@few
@given(
    n=st.integers(2, 8),
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 9, 64, 65]), min_size=1, max_size=4),
    gate=st.sampled_from([None, "normal"]),
    state=st.booleans(),
)
def test_packed_is_separate(backend, n, lengths, gate, state):
    """Outputs, final states and all gradients of a pack are those of its sequences, run one by one."""
    N = len(lengths)
    options = {"gate": gate, "dtype": torch.float64, "state": torch.float64 if state else None}
    inputs = random_inputs(n, T=sum(lengths), H=1, HV=2, K=9, V=12, sequences=N, **options)
    do, ds = random_cotangents(inputs, N)
    op = op_of(backend, n)
    with one_thread():
        packed = results(op, inputs, do, ds, cu_seqlens=bounds(lengths))
        at = 0
        for i, length in enumerate(lengths):
            part = slice(at, at + length)
            one = results(op, rows(inputs, n, part, i), do[:, part], ds[i : i + 1])
            for name, found in one.items():
                per_sequence = name in ("final_state", "dinitial_state")
                expected = packed[name][i : i + 1] if per_sequence else of_tokens(name, packed[name], part, n)
                assert_same(found, expected, f"{name} of sequence {i}")
            at += length


@steps
def test_an_empty_sequence_keeps_its_state(backend, n):
    inputs = random_inputs(n, T=10, sequences=3, state=torch.float32)
    x = leaves(inputs)
    options = {"num_householder": n, "cu_seqlens": bounds([4, 0, 6]), "output_final_state": True, "backend": backend}
    o, final = call(fla_ops.delta_product, x, **options)
    assert torch.equal(final[1], inputs["initial_state"][1])
    final[1].sum().backward()
    assert torch.equal(x["initial_state"].grad[1], torch.ones_like(final[1]))
    assert not x["initial_state"].grad[[0, 2]].any()
    assert not x["k"].grad.any()
    final = call(fla_ops.delta_product, inputs | {"initial_state": None}, **options).final_state
    assert not final[1].any()


@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, T", [(2, 0), (0, 5), (0, 0)])
def test_nothing_to_do(backend, B, T, state):
    """T = 0 and B = 0: empty results of the right shape and dtype, a copy of the state, gradients to match."""
    x = leaves(random_inputs(3, B=B, T=T, state=state))
    o, final = call(fla_ops.delta_product, x, num_householder=3, output_final_state=True, backend=backend)
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
    x = random_inputs(2, T=0, sequences=0, state=torch.float32)
    options = {"num_householder": 2, "cu_seqlens": bounds([]), "output_final_state": True, "backend": backend}
    o, final = call(fla_ops.delta_product, x, **options)
    assert o.shape == (1, 0, 2, 16) and final.shape == (0, 2, 16, 16)


# Splits in time.


@few
@given(
    n=st.integers(2, 8),
    cuts=st.lists(st.integers(0, 80), min_size=1, max_size=4),
    gate=st.sampled_from([None, "normal", "resets"]),
)
def test_any_split_in_time_is_the_whole(backend, n, cuts, gate):
    """Prefill in pieces, the state handed on: same outputs, same final state, same gradients through the state."""
    inputs = random_inputs(n, T=80, H=1, HV=2, K=9, V=12, gate=gate, dtype=torch.float64, state=torch.float64)
    do, ds = random_cotangents(inputs)
    op = op_of(backend, n)

    def in_pieces(q, k, v, beta, g, initial_state, output_final_state):
        x = dict(zip(TENSORS, (q, k, v, beta, g, None), strict=True))
        outputs, state = [], initial_state
        edges = [0, *sorted(cuts), 80]
        for a, b in zip(edges, edges[1:], strict=False):
            piece = rows(x, n, slice(a, b)) | {"initial_state": state}
            o, state = call(op, piece, output_final_state=True)
            outputs.append(o)
        return torch.cat(outputs, 1), state

    with one_thread():
        whole = results(op, inputs, do, ds)
        pieces = results(in_pieces, inputs, do, ds)
    for name in whole:
        assert_same(pieces[name], whole[name], name)


# Single steps.


@pytest.mark.parametrize("qk_l2norm", [False, True], ids=["", "l2norm"])
@pytest.mark.parametrize("gate", [None, "normal"], ids=["plain", "gated"])
@pytest.mark.parametrize("n", range(1, 9))
def test_steps_are_the_whole(backend, n, gate, qk_l2norm):
    x = random_inputs(n, B=2, T=20, HV=4, K=17, V=20, gate=gate, dtype=torch.float64, state=torch.float64)
    whole = call(op_of(backend, n), x, qk_l2norm=qk_l2norm, output_final_state=True)
    state = x["initial_state"].clone()
    options = {"qk_l2norm": qk_l2norm, "state": state, "backend": backend}
    o = torch.stack([fla_ops.delta_product_step(*token(x, n, t), **options) for t in range(20)], 1)
    assert_same(o, whole.o, "o")
    assert_same(state, whole.final_state, "state")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_in_low_precision(backend, dtype):
    """float32 state, tokens in `dtype`: within the budget of the full sequence."""
    n = 3
    x = random_inputs(n, T=20, K=32, V=24, dtype=dtype, state=torch.float32)
    ref64, low = references(x, *random_cotangents(x), reference=reference, num_householder=n)
    state = x["initial_state"].clone()
    with torch.no_grad():
        found = [fla_ops.delta_product_step(*token(x, n, t), state=state, backend=backend) for t in range(20)]
    assert_matches_reference(torch.stack(found, 1), ref64["o"], low["o"], "o")
    assert_matches_reference(state, ref64["final_state"], low["final_state"], "state")


@pytest.mark.parametrize("n", [2, 4])
def test_4096_steps_drift_no_further_than_one_prefill(native, n):
    """4,096 decode steps in float32 against one prefill in float64; the prefill in float32 beside them."""
    T = 4096
    x = random_inputs(n, T=T, H=1, HV=2, K=32, V=32, dtype=torch.float64, state=torch.float64)
    x["beta"] *= 2  # reflections, which forget nothing
    exact = call(op_of(native, n), x, output_final_state=True)
    narrow = {name: t.float() for name, t in x.items()}
    prefill = call(op_of(native, n), narrow, output_final_state=True)
    state = narrow["initial_state"].clone()
    o = torch.stack(
        [fla_ops.delta_product_step(*token(narrow, n, t), state=state, backend=native) for t in range(T)], 1
    )

    def drift(found, right):
        return ((found.double() - right).abs().max() / right.abs().max()).item()

    found = {"steps": (o, state), "prefill": (prefill.o, prefill.final_state)}
    errors = {who: (drift(a, exact.o), drift(b, exact.final_state)) for who, (a, b) in found.items()}
    for who, (of_o, of_state) in errors.items():
        print(f"n = {n}, {T} tokens, {who}: o {of_o:.1e}, state {of_state:.1e} of the largest element")
    assert max(errors["steps"]) < 1e-5
    assert drift(o, prefill.o.double()) < 2e-5 and drift(state, prefill.final_state.double()) < 2e-5


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_step_state_dtypes(backend, state_dtype):
    """The state keeps its dtype: read, computed in float32, rounded once when written, whatever n is."""
    n = 4
    x = random_inputs(n, B=2, T=1, V=20, state=state_dtype)
    state = x["initial_state"].clone()
    o = fla_ops.delta_product_step(*token(x, n, 0), state=state, backend=backend)
    expected = call(reference, x, num_householder=n, output_final_state=True)
    torch.testing.assert_close(o, expected[0][:, 0], rtol=1e-5, atol=1e-6)
    eps = torch.finfo(state_dtype).eps
    right = expected[1].to(state_dtype)
    torch.testing.assert_close(state, right, rtol=max(eps, 1e-5), atol=max(eps / 4, 1e-6))


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_step_state_indices(backend, index):
    """Rows find their slot; -1 skips: output 0, and slots that no row names keep every bit, NaN included."""
    x = random_inputs(2, B=4, T=1, K=17, V=20, state=torch.float32)
    pool = torch.full((7, 2, 17, 20), torch.nan)
    slots = torch.tensor([5, -1, 0, 3], dtype=index)
    live = [0, 2, 3]
    pool[slots[live].long()] = x["initial_state"][live]
    o = fla_ops.delta_product_step(*token(x, 2, 0), state=pool, state_indices=slots, backend=backend)
    state = x["initial_state"].clone()
    expected = fla_ops.delta_product_step(*token(x, 2, 0), state=state, backend=backend)
    assert torch.equal(o[live], expected[live])
    assert not o[1].any()
    assert torch.equal(pool[slots[live].long()], state[live])
    assert pool[[1, 2, 4, 6]].isnan().all()


def test_step_of_no_rows(backend):
    x = random_inputs(2, B=0, T=1)
    o = fla_ops.delta_product_step(*token(x, 2, 0), state=torch.zeros(0, 2, 16, 16), backend=backend)
    assert o.shape == (0, 2, 16)


def test_step_takes_any_strides(backend):
    """A value-first cache seen through a transpose, and tokens cut from a wider projection."""
    x = random_inputs(2, B=2, T=3, K=17, V=20, state=torch.float32)
    state = x["initial_state"].clone()
    given = token(x, 2, 1)
    expected = fla_ops.delta_product_step(*(t.contiguous() for t in given), state=state, backend=backend)
    value_first = x["initial_state"].transpose(-1, -2).contiguous()
    o = fla_ops.delta_product_step(*given, state=value_first.transpose(-1, -2), backend=backend)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(value_first.transpose(-1, -2), state)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 4 else t for t in given]
    state = x["initial_state"].clone()
    torch.testing.assert_close(fla_ops.delta_product_step(*heads_first, state=state, backend=backend), expected)


def test_step_refuses_gradients(backend):
    tokens, state = token(random_inputs(2, T=1), 2, 0), torch.zeros(1, 2, 16, 16)
    for leaf in (*tokens, state):
        leaf.requires_grad_()
        with pytest.raises(RuntimeError, match=r"delta_product_step: .*torch\.no_grad\(\).*delta_product with T=1"):
            fla_ops.delta_product_step(*tokens, state=state, backend=backend)
        with torch.no_grad():
            fla_ops.delta_product_step(*tokens, state=state, backend=backend)
        leaf.requires_grad_(False)
