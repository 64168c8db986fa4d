# SPDX-License-Identifier: Apache-2.0
"""The delta rule's values: the reference against its equation, then every backend against the reference.

Each comparison covers the output, the final state and all six gradients. Sequences: test_delta_rule_sequences.py;
memory, strides and reproducibility: test_delta_rule_memory.py.
"""

import functools

import pytest
import torch
from delta_rule_cases import bounds, call, check, one_thread, random_cotangents, random_inputs, results
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fla_ops
from fla_ops.reference.delta_rule import delta_rule as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


# The reference itself.


@pytest.mark.parametrize("gate", [None, "normal"])
@pytest.mark.parametrize("initial", [False, True])
def test_the_reference_is_the_products_of_transition_matrices(gate, initial):
    """S_t = e^g (I - beta k k^T) S_{t-1} + beta k v^T, written with matrices for one head: the papers' form."""
    x = random_inputs(T=9, H=1, HV=1, K=5, V=3, dtype=torch.float64, gate=gate, state=torch.float64)
    q, k, v, beta = (x[n][0, :, 0] for n in ("q", "k", "v", "beta"))
    S = x["initial_state"][0, 0] if initial else torch.zeros(5, 3, dtype=torch.float64)
    expected = []
    for t in range(9):
        decay = 1.0 if gate is None else x["g"][0, t, 0].exp()
        S = decay * (torch.eye(5) - beta[t] * torch.outer(k[t], k[t])) @ S + beta[t] * torch.outer(k[t], v[t])
        expected.append(0.7 * S.T @ q[t])
    state = x["initial_state"] if initial else None
    o, final = call(reference, x | {"initial_state": state}, scale=0.7, output_final_state=True)
    torch.testing.assert_close(o[0, :, 0], torch.stack(expected))
    torch.testing.assert_close(final[0, 0], S)


def test_the_reference_recalls_what_it_stored():
    """With beta = 1 and orthonormal keys the state is a dictionary: the newest value of a key comes back exactly."""
    keys = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 0]][None, :, None]
    values = torch.randn(1, 4, 1, 6, dtype=torch.float64)
    beta = torch.ones(1, 4, 1, dtype=torch.float64)
    o, state = reference(keys, keys, values, beta, scale=1.0, output_final_state=True)
    torch.testing.assert_close(o, values)
    torch.testing.assert_close(
        state[0, 0], torch.stack([values[0, i, 0] for i in (3, 1, 2)] + [torch.zeros(6)]).double()
    )


def test_the_reference_groups_heads_in_order():
    """Value head hv reads query and key head hv // (HV // H)."""
    x = random_inputs(T=6, H=2, HV=6, K=4, V=3, dtype=torch.float64)
    o = call(reference, x)[0]
    for hv in range(6):
        one = {n: x[n][:, :, hv // 3 : hv // 3 + 1] for n in ("q", "k")}
        one |= {n: x[n][:, :, hv : hv + 1] for n in ("v", "beta", "g")} | {"initial_state": None}
        torch.testing.assert_close(o[:, :, hv : hv + 1], call(reference, one)[0])


def test_the_reference_passes_gradcheck_twice():
    x = random_inputs(T=3, H=1, HV=2, K=3, V=2, dtype=torch.float64, state=torch.float64)
    leaves = [t.requires_grad_() for t in x.values()]

    def op(q, k, v, beta, g, state):
        options = {"initial_state": state, "output_final_state": True, "qk_l2norm": True, "backend": "reference"}
        return tuple(fla_ops.delta_rule(q, k, v, beta, g, **options))

    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)


# Every backend against the reference. Each point of the grid is there for a reason, given beside it.

HEAD_DIMS = [
    (64, 64),  # the common sizes
    (128, 128),
    (17, 60),  # no multiple of any vector width
    (96, 100),
    (100, 96),
    (256, 32),  # K != V, both ways, up to the limit
    (32, 256),
    (3, 5),
]
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 128, 200]  # around every likely tile and chunk edge
GATES = [
    None,
    "normal",
    "resets",
    -1e-6,
    -1.0,
    -20.0,
    -87.0,  # exp is the smallest normal float32
    -120.0,  # exp is 0 in float32, not in float64
    -1e4,
    -float("inf"),
    0.0,
    0.01,  # growth: allowed
]


@pytest.mark.parametrize("K, V", HEAD_DIMS)
@pytest.mark.parametrize("gate", [None, "normal"], ids=["plain", "gated"])
def test_head_dimensions(backend, K, V, gate):
    check(backend, random_inputs(T=70, HV=2, K=K, V=V, gate=gate, state=torch.float32))


@dtypes
@pytest.mark.parametrize("K, V", [(1, 1), (1, 9), (9, 1), (2, 2), (4, 4)])
def test_tiny_head_dimensions(backend, K, V, dtype):
    """With so few channels keys are parallel: products of (1 - beta) cancel below the rounding of a chunk's sums."""
    check(backend, random_inputs(B=2, T=70, H=3, HV=6, K=K, V=V, dtype=dtype, state=torch.float32))


@dtypes
@pytest.mark.parametrize("K, V", [(64, 64), (128, 128), (17, 60)])
def test_dtypes(backend, dtype, K, V):
    check(backend, random_inputs(B=2, T=130, K=K, V=V, dtype=dtype, state=torch.float32))


@dtypes
def test_gates_and_rates_may_be_float32(backend, dtype):
    check(backend, random_inputs(T=70, dtype=dtype, side=torch.float32))


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("gate", [None, "normal"], ids=["plain", "gated"])
def test_lengths(backend, T, gate):
    check(backend, random_inputs(B=2, T=T, K=24, V=40, gate=gate, state=torch.float32))


@pytest.mark.parametrize("H, HV", [(2, 4), (1, 3), (2, 2), (1, 1), (3, 6)])
@pytest.mark.parametrize("gate", [None, "normal"], ids=["plain", "gated"])
def test_grouped_value_heads(backend, H, HV, gate):
    check(backend, random_inputs(B=2, T=70, H=H, HV=HV, K=32, V=16, gate=gate, state=torch.float32))


@pytest.mark.parametrize("gate", GATES, ids=str)
@dtypes
def test_gates(backend, gate, dtype):
    """Finite wherever the float64 reference is, down to a reset at every token."""
    check(backend, random_inputs(T=100, K=32, V=32, gate=gate, dtype=dtype, state=torch.float32))


@pytest.mark.parametrize("gate", [None, "normal", "resets"])
@pytest.mark.parametrize("beta", [0, 1, 2])
def test_rates(backend, beta, gate):
    check(backend, random_inputs(T=100, K=32, V=32, beta=beta, gate=gate, state=torch.float32))


@dtypes
@pytest.mark.parametrize("keys", ["unit", "parallel", "zeros", "raw"])
def test_l2norm(backend, keys, dtype):
    """Zero rows have finite gradients; raw keys are ten times too long for an unnormalised delta rule."""
    inputs = random_inputs(T=100, K=48, V=32, keys=keys, dtype=dtype, state=torch.float32)
    check(backend, inputs, qk_l2norm=True)


@pytest.mark.parametrize("beta", ["normal", 1])
def test_nearly_parallel_keys(backend, beta):
    """The chunk's triangular system at its worst conditioning."""
    check(backend, random_inputs(T=200, K=64, V=64, keys="parallel", beta=beta, gate=None))


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.5])
def test_scale(backend, scale):
    check(backend, random_inputs(T=70, K=32, V=32), scale=scale)


@pytest.mark.parametrize("size", [1e-4, 3e4])
def test_the_range_of_float16(backend, size):
    """Values near either end of float16: nothing inside is rounded to it."""
    inputs = random_inputs(T=100, K=32, V=32, dtype=torch.float16)
    inputs["v"] = (inputs["v"].float() * size / inputs["v"].abs().max()).half()
    check(backend, inputs, names=["o", "final_state"])


@dtypes
@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_initial_state_dtypes(backend, dtype, state):
    check(backend, random_inputs(B=2, T=66, K=24, V=20, dtype=dtype, state=state))


@pytest.mark.parametrize("through", ["o", "final_state"])
def test_gradients_through_one_result_only(backend, through):
    inputs = random_inputs(B=2, T=130, K=32, V=24, state=torch.float32)
    do, ds = random_cotangents(inputs)
    do, ds = (do, torch.zeros_like(ds)) if through == "o" else (torch.zeros_like(do), ds)
    with one_thread():
        expected = results(reference, inputs, do, ds, dtype=torch.float64)

    def loss(op, x):
        o, final = call(op, x, output_final_state=through == "final_state")
        return (o * do.to(o.dtype)).sum() if through == "o" else (final * ds).sum()

    x = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    with one_thread():
        loss(functools.partial(fla_ops.delta_rule, backend=backend), x).backward()
    for name, leaf in x.items():
        if through == "final_state" and name == "q":  # the state does not depend on queries
            assert leaf.grad is None or not leaf.grad.any()
            continue
        torch.testing.assert_close(leaf.grad.double(), expected[f"d{name}"], rtol=1e-4, atol=1e-5)


def test_final_state_is_returned_when_asked_for(backend):
    inputs = random_inputs(T=5)
    assert call(fla_ops.delta_rule, inputs, backend=backend).final_state is None
    for dtype in DTYPES:
        o, final = call(fla_ops.delta_rule, random_inputs(T=5, dtype=dtype), backend=backend, output_final_state=True)
        assert o.dtype == dtype
        assert final.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert final.shape == (1, 2, 16, 16)


def test_head_dimensions_above_the_limit_fall_to_the_reference(native, monkeypatch):
    monkeypatch.setattr(fla_ops._backend, "_warned", set())
    inputs = random_inputs(T=4, K=33, V=257)
    with pytest.warns(fla_ops.FallbackWarning, match="head dimensions go up to 256, got 257") as seen:
        o = call(fla_ops.delta_rule, inputs).o
        call(fla_ops.delta_rule, inputs)
    assert len(seen) == 1
    torch.testing.assert_close(o, call(reference, inputs)[0])
    with pytest.raises(RuntimeError, match="native.*up to 256, got 257"):
        call(fla_ops.delta_rule, inputs, backend="native")


@pytest.mark.parametrize("gate", ["normal", None])
def test_gradcheck(backend, gate):
    """Numerical differences in float64, across a chunk edge of the native kernels and with grouped heads."""
    x = random_inputs(T=4, H=1, HV=2, K=3, V=2, dtype=torch.float64, gate=gate, state=torch.float64)
    names = [n for n, t in x.items() if t is not None]
    leaves = [x[n].requires_grad_() for n in names]

    def op(*tensors):
        given = dict.fromkeys(x) | dict(zip(names, tensors, strict=True))
        return tuple(call(fla_ops.delta_rule, given, output_final_state=True, qk_l2norm=True, backend=backend))

    assert torch.autograd.gradcheck(op, leaves)


def test_gradcheck_over_a_chunk_edge(backend):
    x = random_inputs(T=67, H=1, HV=2, K=4, V=3, dtype=torch.float64, state=torch.float64)
    leaves = [t.requires_grad_() for t in x.values()]

    def op(*tensors):
        given = dict(zip(x, tensors, strict=True))
        return tuple(call(fla_ops.delta_rule, given, output_final_state=True, backend=backend))

    with one_thread():
        assert torch.autograd.gradcheck(op, leaves, fast_mode=True)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # a backend's name does not change
)
@given(data=st.data())
def test_any_shape(native, data):
    """Shapes nobody thought of, through every option at once."""
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    least = 1 if dtype == torch.float64 else 8  # an RMS over a handful of elements is luck
    H, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    qk_l2norm = draw(st.booleans())
    inputs = random_inputs(
        B=draw(st.integers(1, 3)),
        T=draw(st.integers(least, 140)),
        H=H,
        HV=H * group,
        K=draw(st.integers(max(least, 2), 70)),
        V=draw(st.integers(least, 70)),
        dtype=dtype,
        gate=draw(st.sampled_from([None, "normal", "resets"])),
        keys="zeros" if qk_l2norm else "unit",
        state=draw(st.sampled_from([None, torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 10**6)),
    )
    check(native, inputs, qk_l2norm=qk_l2norm)


# Every instruction-set level of the native library: the shapes that reach each kernel's main loop and its tails.


@dtypes
@pytest.mark.parametrize(
    "case",
    [
        {"T": 130, "K": 64, "V": 64},
        {"T": 66, "K": 128, "V": 128, "HV": 4},
        {"T": 33, "K": 17, "V": 60, "gate": "resets"},
        {"T": 65, "K": 96, "V": 100, "gate": None},
        {"T": 3, "H": 3, "HV": 6, "K": 3, "V": 5},
    ],
    ids=lambda c: "-".join(f"{k}{v}" for k, v in c.items()),
)
@pytest.mark.parametrize("qk_l2norm", [False, True], ids=["", "l2norm"])
def test_levels(cpu_level, case, dtype, qk_l2norm):
    check("native", random_inputs(**case, dtype=dtype, state=torch.float32), qk_l2norm=qk_l2norm)


def test_levels_on_packed_sequences(cpu_level):
    lengths = [5, 0, 64, 1, 70]
    inputs = random_inputs(T=140, K=40, V=24, sequences=5, state=torch.float32)
    check("native", inputs, cu_seqlens=bounds(lengths))


def test_levels_of_the_step(cpu_level):
    for dtype in DTYPES:
        for K, V in ((64, 64), (17, 60)):
            x = random_inputs(B=3, T=1, H=2, HV=4, K=K, V=V, dtype=dtype, state=torch.float32)
            tokens = [x[n][:, 0] for n in ("q", "k", "v", "beta", "g")]
            states = {b: x["initial_state"].clone() for b in ("native", "reference")}
            o = {b: fla_ops.delta_rule_step(*tokens, state=s, qk_l2norm=True, backend=b) for b, s in states.items()}
            tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
            torch.testing.assert_close(o["native"], o["reference"], **tolerance)
            torch.testing.assert_close(states["native"], states["reference"], rtol=1e-5, atol=1e-5)
