# SPDX-License-Identifier: Apache-2.0
"""DeltaProduct's values: the reference against its equation, then every backend against the reference.

Each comparison covers the output, the final state and all six gradients. Sequences, steps and memory:
test_delta_product_sequences.py.
"""

import pytest
import torch
from delta_product_cases import check, interleaved, random_inputs
from delta_rule_cases import call, random_cotangents, results

import fla_ops
from fla_ops.reference.delta_product import delta_product as reference
from fla_ops.reference.delta_rule import delta_rule as reference_delta_rule

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


@pytest.fixture
def backend(backend):
    """Each backend that has DeltaProduct."""
    missing = fla_ops._backend.why_not("delta_product", backend, "cpu", torch.float32, ())
    if missing:
        pytest.skip(missing)
    return backend


@gates
@every_n
def test_every_number_of_steps(backend, n, gate):
    check(backend, n, random_inputs(n, B=2, T=40, HV=4, K=24, V=40, gate=gate, state=torch.float32))
