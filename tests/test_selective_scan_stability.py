# SPDX-License-Identifier: Apache-2.0
"""What makes the selective scan stable, as properties: A < 0 and steps > 0 give decays in (0, 1].

Halloran et al. 2025, arXiv 2406.00209, show that Mamba's largest Lyapunov exponent is not positive. With the inputs
held, the recurrence is affine in the state, so that the statement is exact and can be tested as an equation.
"""

import functools

import pytest
import torch
from delta_rule_cases import one_thread
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from selective_scan_cases import call, random_inputs

import fla_ops
from fla_ops.reference.selective_scan import selective_scan as reference
from fla_ops.reference.selective_scan import step_sizes

OP = "selective_scan"
# The fixtures (a backend's name, poisoned allocations) do not change between examples.
few = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
largest = {torch.float16: 6e4}  # elsewhere the range of float32 is no limit for what follows


def op_of(backend):
    return functools.partial(fla_ops.selective_scan, output_final_state=True, backend=backend)


@few
@given(
    delta=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5),
    decay=st.floats(-1e6, -1e-6),
    dtype=DTYPES,
)
def test_a_state_left_alone_never_grows_and_keeps_its_sign(backend, delta, decay, dtype):
    """0 < exp(step A) <= 1 and finite for any delta: with u = 0 the state after each step tells the decay.

    Where step A is too negative for the state's dtype, the decay is 0, as the true value rounds to.
    """
    L = len(delta)
    x = random_inputs(1, 4, L, 3, dtype=dtype, decay=decay, bias=False, state=torch.float64)
    x["u"].zero_()
    x["delta"][:] = torch.tensor(delta).clamp(-largest.get(dtype, 1e6), largest.get(dtype, 1e6))
    x["initial_state"] = x["initial_state"].to(torch.promote_types(dtype, torch.float32))
    before = x["initial_state"]
    step = step_sizes(x["delta"], None, True)
    for t in range(L):
        now = x | {name: x[name][..., t : t + 1] for name in ("u", "delta", "B", "C", "z")}
        y, after = call(op_of(backend), now | {"initial_state": before}, delta_softplus=True)
        assert after.isfinite().all() and y.isfinite().all()
        assert (after.abs() <= before.abs()).all()
        assert (after * before >= 0).all()
        exponent = step[..., t, None] * x["A"].to(step.dtype)
        kept = (exponent > -40) & (before.abs() > 1e-12)
        assert (after[kept] != 0).all()
        before = after


@few
@given(length=st.integers(1, 80), softplus=st.booleans(), seed=st.integers(0, 100))
def test_two_states_stay_apart_by_the_product_of_the_decays(backend, length, softplus, seed):
    """h_L - h'_L = exp(A sum step) (h_0 - h'_0), element by element: the recurrence is affine in the state."""
    delta = "normal" if softplus else "positive"
    x = random_inputs(1, 4, length, 5, dtype=torch.float64, delta=delta, state=torch.float64, seed=seed)
    x["A"] /= 50  # something is left after 80 steps
    r = torch.Generator().manual_seed(seed)
    apart = torch.randn(x["initial_state"].shape, generator=r, dtype=torch.float64)
    op = functools.partial(op_of(backend), delta_softplus=softplus)
    with one_thread():
        one = call(op, x).final_state
        two = call(op, x | {"initial_state": x["initial_state"] + apart}).final_state
    total = step_sizes(x["delta"], x["delta_bias"], softplus).sum(-1)
    expected = (total[..., None] * x["A"]).exp() * apart
    size = max(one.abs().max().item(), two.abs().max().item(), 1.0)
    torch.testing.assert_close(two - one, expected, rtol=0, atol=1e-12 * size)


@few
@given(seed=st.integers(0, 100))
def test_a_gap_between_two_inputs_closes(backend, seed):
    """A perturbation of the first inputs alone fades: later outputs differ by no more than the decays leave."""
    x = random_inputs(1, 4, 100, 5, dtype=torch.float64, skip=False, gate=False, seed=seed)
    other = x | {"u": x["u"].clone()}
    other["u"][..., :10] += 1
    op = functools.partial(op_of(backend), delta_softplus=True)
    with one_thread():
        at_10 = [call(op, {n: _until(n, t, 10) for n, t in i.items()}).final_state for i in (x, other)]
        end = [call(op, i).final_state for i in (x, other)]
    left = (step_sizes(x["delta"], x["delta_bias"], True)[..., 10:].sum(-1)[..., None] * x["A"]).exp()
    torch.testing.assert_close(end[1] - end[0], left * (at_10[1] - at_10[0]), rtol=0, atol=1e-12)


def _until(name, t, end):
    return t[..., :end] if name in ("u", "delta", "B", "C", "z") and t is not None else t


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gap_to_float64_does_not_grow_with_the_length(backend, dtype):
    """The gap is made anew at each step and fades like the state.

    The statistic: the RMS over channels and time of (y in low precision from rounded inputs) - (y in float64 from the
    inputs before rounding), in the first window of 64 steps after 64 for a start, and in the last of 768. Their ratio
    is 1 up to the scatter of 8 x 64 samples. An error that adds up over the sequence would make it sqrt(768 / 128) =
    2.4 as a random walk, and more if its parts had one sign.
    """
    L, window = 768, 64
    exact = random_inputs(1, 8, L, 16, dtype=torch.float64)
    low = {n: t if t is None or n in ("A", "D", "delta_bias") else t.to(dtype) for n, t in exact.items()}
    low |= {n: exact[n].float() for n in ("A", "D", "delta_bias")}
    with one_thread():
        right = call(reference, exact, delta_softplus=True)[0]
        found = call(op_of(backend), low, delta_softplus=True).y
    error = (found.double() - right).square()
    early, late = (error[..., part].mean().sqrt().item() for part in (slice(window, 2 * window), slice(-window, None)))
    print(f"{backend}, {dtype}: RMS gap {early:.2e} in steps 64-127, {late:.2e} in steps {L - window}-{L - 1}")
    assert late < 1.5 * early
