# SPDX-License-Identifier: Apache-2.0
"""DeltaProduct's values: the reference against its equation, then every backend against the reference.

Each comparison covers the output, the final state and all six gradients. Sequences, steps and memory:
test_delta_product_sequences.py.
"""

import pytest
import torch
from delta_product_cases import MICRO, check, interleaved, random_inputs
from delta_rule_cases import TENSORS, assert_same_bits, call, one_thread, random_cotangents, results
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fla_ops
from fla_ops.reference.delta_product import delta_product as reference
from fla_ops.reference.delta_rule import delta_rule as reference_delta_rule

OP = "delta_product"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
gates = pytest.mark.parametrize("gate", [None, "normal"], ids=["plain", "gated"])
every_n = pytest.mark.parametrize("n", range(1, 9))


# The reference itself.


@gates
@every_n
@pytest.mark.parametrize("initial", [False, True])
def test_the_reference_is_the_products_of_transition_matrices(n, gate, initial):
    """S_t = A_t S_{t-1} + B_t with the products of Householder matrices written out: the paper's closed form."""
    x = random_inputs(n, T=5, H=1, HV=1, K=5, V=3, dtype=torch.float64, gate=gate, state=torch.float64)
    q, k, v, beta = (x[name][0, :, 0] for name in ("q", "k", "v", "beta"))
    S = x["initial_state"][0, 0] if initial else torch.zeros(5, 3, dtype=torch.float64)
    expected = []
    for t in range(5):
        A, B = torch.eye(5, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64)
        for i in range(t * n, (t + 1) * n):
            householder = torch.eye(5) - beta[i] * torch.outer(k[i], k[i])
            A, B = householder @ A, householder @ B + beta[i] * torch.outer(k[i], v[i])
        decay = 1.0 if gate is None else x["g"][0, t, 0].exp()
        S = decay * A @ S + B
        expected.append(0.7 * S.T @ q[t])
    state = x["initial_state"] if initial else None
    options = {"num_householder": n, "scale": 0.7, "output_final_state": True}
    o, final = call(reference, x | {"initial_state": state}, **options)
    torch.testing.assert_close(o[0, :, 0], torch.stack(expected))
    torch.testing.assert_close(final[0, 0], S)


@gates
@every_n
def test_the_reference_is_the_delta_rule_on_the_interleaved_sequence(n, gate):
    """Outputs, states and gradients; heads in groups."""
    x = random_inputs(n, B=2, T=7, HV=4, K=6, V=5, dtype=torch.float64, gate=gate, state=torch.float64)
    do, ds = random_cotangents(x)

    def expanded(q, k, v, beta, g, initial_state, **options):
        wide = interleaved({"q": q, "k": k, "v": v, "beta": beta, "g": g, "initial_state": initial_state}, n)
        o, final = call(reference_delta_rule, wide, **options)
        return o[:, n - 1 :: n], final

    expected = results(expanded, x, do, ds, qk_l2norm=True)
    found = results(reference, x, do, ds, qk_l2norm=True, num_householder=n)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=lambda m, name=name: f"{name}: {m}")


def test_the_reference_passes_gradcheck_twice():
    x = random_inputs(2, T=2, H=1, HV=2, K=3, V=2, dtype=torch.float64, state=torch.float64)
    leaves = [t.requires_grad_() for t in x.values()]

    def op(q, k, v, beta, g, state):
        options = {"initial_state": state, "output_final_state": True, "qk_l2norm": True, "backend": "reference"}
        return tuple(fla_ops.delta_product(q, k, v, beta, g, num_householder=2, **options))

    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)


@every_n
def test_transitions_do_not_expand(n):
    """|A_t| <= 1 for unit keys and beta in [0, 2], whatever n: read off with values of zero, which leave A_t S."""
    for seed in range(20):
        x = random_inputs(n, T=8, H=1, HV=1, K=6, V=6, dtype=torch.float64, gate=None, seed=seed)
        x["beta"] = 2 * torch.rand_like(x["beta"])
        x["beta"][:, ::5] = 2.0
        x["v"].zero_()
        x["initial_state"] = torch.eye(6, dtype=torch.float64)[None, None]
        for t in range(8):
            one = {name: x[name][:, t * n : (t + 1) * n] for name in ("k", "v", "beta")}
            one |= {"q": x["q"][:, t : t + 1], "g": None, "initial_state": x["initial_state"]}
            A = call(reference, one, num_householder=n, output_final_state=True)[1][0, 0]
            assert torch.linalg.matrix_norm(A, 2) <= 1 + 1e-12


def test_two_reflections_are_a_rotation():
    """What one step a token cannot do: a transition of determinant 1 with no real eigenvalue."""
    angle = torch.tensor(0.4, dtype=torch.float64)
    keys = torch.stack([torch.tensor([1.0, 0.0]).double(), torch.stack([angle.cos(), angle.sin()])])
    k = keys[None, :, None]
    beta = torch.full((1, 2, 1), 2.0, dtype=torch.float64)
    v = torch.zeros(1, 2, 1, 2, dtype=torch.float64)
    state = torch.eye(2, dtype=torch.float64)[None, None]
    q = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    options = {"num_householder": 2, "initial_state": state, "output_final_state": True}
    A = reference(q, k, v, beta, **options)[1][0, 0]
    c, s = (2 * angle).cos(), (2 * angle).sin()
    torch.testing.assert_close(A, torch.stack([torch.stack([c, -s]), torch.stack([s, c])]))


# Every backend against the reference.


# Each point of the grid is there for a reason, given beside it. What a chunk of the delta rule does with one row a
# token is tested there; here n moves the edges: 16 rows hold 8, 5, 4, 3, 2, 2 or 2 whole tokens.


@gates
@every_n
def test_every_number_of_steps(backend, n, gate):
    """Over chunk edges and, from 64 tokens on, past a saved state."""
    check(backend, n, random_inputs(n, B=1, T=70, HV=4, K=24, V=40, gate=gate, state=torch.float32))


@every_n
@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 9, 64, 65])
def test_lengths(backend, n, T):
    check(backend, n, random_inputs(n, B=2, T=T, K=24, V=40, state=torch.float32))


@dtypes
@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_dtypes(backend, n, dtype):
    check(backend, n, random_inputs(n, T=40, K=64, V=64, dtype=dtype, state=torch.float32), qk_l2norm=True)


@dtypes
def test_gates_and_rates_may_be_float32(backend, dtype):
    check(backend, 2, random_inputs(2, dtype=dtype, side=torch.float32))


HEAD_DIMS = [(64, 64), (128, 128), (17, 60), (100, 96), (256, 32), (32, 256), (3, 5)]


@pytest.mark.parametrize("K, V", HEAD_DIMS)
@pytest.mark.parametrize("n", [2, 3, 7])
def test_head_dimensions(backend, n, K, V):
    check(backend, n, random_inputs(n, T=25, K=K, V=V, state=torch.float32))


@pytest.mark.parametrize("K, V", [(1, 1), (1, 9), (9, 1), (4, 4)])
def test_tiny_head_dimensions(backend, K, V):
    check(backend, 3, random_inputs(3, B=2, T=30, H=3, HV=6, K=K, V=V, state=torch.float32))


@pytest.mark.parametrize("H, HV", [(2, 4), (1, 3), (1, 1), (3, 6)])
@pytest.mark.parametrize("n", [2, 5])
def test_grouped_value_heads(backend, n, H, HV):
    check(backend, n, random_inputs(n, B=2, T=20, H=H, HV=HV, K=32, V=16, state=torch.float32))


@pytest.mark.parametrize(
    "gate", [None, "normal", "resets", -1e-6, -20.0, -87.0, -120.0, -1e4, -float("inf"), 0.0, 0.01], ids=str
)
@pytest.mark.parametrize("n", [2, 3])
def test_gates(backend, n, gate):
    """Finite wherever the float64 reference is, down to a reset at every token; steps after the first do not decay."""
    check(backend, n, random_inputs(n, T=40, K=32, V=32, gate=gate, state=torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("gate", ["resets", -20.0])
def test_gates_in_other_dtypes(backend, gate, dtype):
    check(backend, 2, random_inputs(2, T=40, K=32, V=32, gate=gate, dtype=dtype, state=torch.float32))


@pytest.mark.parametrize("gate", [None, "normal", "resets"])
@pytest.mark.parametrize("beta", [0, 1, 2])
@pytest.mark.parametrize("n", [2, 4])
def test_rates(backend, n, beta, gate):
    check(backend, n, random_inputs(n, T=40, K=32, V=32, beta=beta, gate=gate, state=torch.float32))


@dtypes
@pytest.mark.parametrize("keys", ["unit", "zeros", "raw"])
def test_l2norm(backend, keys, dtype):
    inputs = random_inputs(3, T=34, K=48, V=32, keys=keys, dtype=dtype, state=torch.float32)
    check(backend, 3, inputs, qk_l2norm=True)


@pytest.mark.parametrize("beta", ["normal", 1])
def test_nearly_parallel_keys(backend, beta):
    """The chunk's triangular system at its worst conditioning."""
    check(backend, 4, random_inputs(4, T=50, K=64, V=64, keys="parallel", beta=beta, gate=None))


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.5])
def test_scale(backend, scale):
    check(backend, 2, random_inputs(2, K=32, V=32), scale=scale)


@dtypes
@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_initial_state_dtypes(backend, dtype, state):
    check(backend, 2, random_inputs(2, B=2, T=33, K=24, V=20, dtype=dtype, state=state))


@pytest.mark.parametrize("gate", ["normal", None])
@pytest.mark.parametrize("n", [2, 3])
def test_gradcheck(backend, n, gate):
    """Numerical differences in float64, with grouped heads."""
    x = random_inputs(n, T=3, H=1, HV=2, K=3, V=2, dtype=torch.float64, gate=gate, state=torch.float64)
    names = [name for name, t in x.items() if t is not None]
    leaves = [x[name].requires_grad_() for name in names]
    options = {"num_householder": n, "output_final_state": True, "qk_l2norm": True, "backend": backend}

    def op(*tensors):
        return tuple(call(fla_ops.delta_product, dict.fromkeys(x) | dict(zip(names, tensors, strict=True)), **options))

    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("n", [2, 5])
def test_gradcheck_over_a_chunk_edge(backend, n):
    x = random_inputs(n, T=20, H=1, HV=2, K=4, V=3, dtype=torch.float64, state=torch.float64)
    leaves = [t.requires_grad_() for t in x.values()]

    def op(*tensors):
        given = dict(zip(x, tensors, strict=True))
        return tuple(call(fla_ops.delta_product, given, num_householder=n, output_final_state=True, backend=backend))

    with one_thread():
        assert torch.autograd.gradcheck(op, leaves, fast_mode=True)


def test_one_step_is_the_delta_rule(backend):
    """Bit for bit, gradients too."""
    x = random_inputs(1, B=2, T=70, HV=4, K=20, V=12, state=torch.float32)
    do, ds = random_cotangents(x)
    found = results(fla_ops.delta_product, x, do, ds, num_householder=1, qk_l2norm=True, backend=backend)
    expected = results(fla_ops.delta_rule, x, do, ds, qk_l2norm=True, backend=backend)
    assert_same_bits(found, expected)
    tokens = [x[name][:, 0] for name in TENSORS[:5]]
    micro = [t[:, None] if name in MICRO else t for name, t in zip(TENSORS, tokens, strict=False)]
    states = [x["initial_state"].clone() for _ in range(2)]
    o = fla_ops.delta_product_step(*micro, state=states[0], backend=backend)
    assert torch.equal(o, fla_ops.delta_rule_step(*tokens, state=states[1], backend=backend))
    assert torch.equal(*states)


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
    n, H, group = draw(st.integers(2, 8)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    qk_l2norm = draw(st.booleans())
    inputs = random_inputs(
        n,
        B=draw(st.integers(1, 3)),
        T=draw(st.integers(least, 70)),
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
    check(native, n, inputs, qk_l2norm=qk_l2norm)


def test_head_dimensions_above_the_limit_fall_to_the_reference(native, monkeypatch):
    monkeypatch.setattr(fla_ops._backend, "_warned", set())
    inputs = random_inputs(2, T=4, K=33, V=257)
    with pytest.warns(fla_ops.FallbackWarning, match="head dimensions go up to 256, got 257"):
        o = call(fla_ops.delta_product, inputs, num_householder=2).o
    torch.testing.assert_close(o, call(reference, inputs, num_householder=2)[0])
    with pytest.raises(RuntimeError, match="delta_product: .*native.*up to 256, got 257"):
        call(fla_ops.delta_product, inputs, num_householder=2, backend="native")


# Every instruction-set level of the native library.


@dtypes
@pytest.mark.parametrize("n", [2, 3, 4, 7])
@pytest.mark.parametrize("case", [{"T": 70, "K": 64, "V": 64}, {"T": 20, "K": 17, "V": 60, "gate": "resets", "HV": 4}])
def test_levels(cpu_level, n, case, dtype):
    check("native", n, random_inputs(n, **case, dtype=dtype, state=torch.float32), qk_l2norm=True)


@dtypes
def test_levels_of_the_step(cpu_level, dtype):
    for n, K, V in ((2, 64, 64), (3, 17, 60), (8, 5, 3)):
        x = random_inputs(n, B=3, T=1, H=2, HV=4, K=K, V=V, dtype=dtype, state=torch.float32)
        tokens = [x[name] if name in MICRO else x[name][:, 0] for name in TENSORS[:5]]
        states = {b: x["initial_state"].clone() for b in ("native", "reference")}
        options = {"qk_l2norm": True}
        o = {b: fla_ops.delta_product_step(*tokens, state=s, backend=b, **options) for b, s in states.items()}
        tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
        torch.testing.assert_close(o["native"], o["reference"], **tolerance)
        torch.testing.assert_close(states["native"], states["reference"], rtol=1e-5, atol=1e-5)
