# SPDX-License-Identifier: Apache-2.0
"""The comparator must see planted errors, and must let honest rounding pass."""

import functools

import pytest
import torch
from delta_rule_cases import SEED, random_cotangents, random_inputs
from delta_rule_cases import references as references_of

from fla_ops.testing import assert_matches_reference

PLANTED = {torch.float32: 0.01, torch.float64: 0.01, torch.bfloat16: 0.03, torch.float16: 0.03}
dtypes = pytest.mark.parametrize("dtype", PLANTED, ids=str)


@functools.cache
def computed(dtype):
    inputs = random_inputs(B=2, T=130, K=32, V=48, dtype=dtype)
    do, ds = random_cotangents(inputs)
    return [found["o"] for found in references_of(inputs, do, ds)]


def references(dtype):
    """The float64 output, and the low-precision loop's: two honest results of one problem."""
    return [x.clone() for x in computed(dtype)]


@dtypes
@pytest.mark.parametrize("gradient", [False, True])
def test_an_honest_result_passes(dtype, gradient):
    ref64, low = references(dtype)
    assert_matches_reference(low, ref64, low, "o", gradient=gradient, seed=SEED)
    assert_matches_reference(ref64.to(dtype), ref64, low, "o", gradient=gradient, seed=SEED)


@dtypes
@pytest.mark.parametrize("gradient", [False, True])
def test_a_planted_scale_error_is_caught(dtype, gradient):
    ref64, low = references(dtype)
    wrong = (ref64 * (1 + PLANTED[dtype])).to(dtype)
    with pytest.raises(AssertionError, match=r"o \(.*max error .* allowed .* rms error .* worst at .*seed 0"):
        assert_matches_reference(wrong, ref64, low, "o", gradient=gradient, seed=SEED)


@dtypes
def test_a_dropped_block_is_caught(dtype):
    ref64, low = references(dtype)
    wrong = low.clone()
    wrong[1, 64:80, 0, :16] = 0  # one 16 x 16 tile that a kernel forgot
    with pytest.raises(AssertionError, match="max error"):
        assert_matches_reference(wrong, ref64, low, "o")


@dtypes
def test_the_worst_element_is_named(dtype):
    ref64, low = references(dtype)
    wrong = low.clone()
    wrong[1, 77, 0, 5] += 100
    with pytest.raises(AssertionError, match=r"worst at \[1, 77, 0, 5\]"):
        assert_matches_reference(wrong, ref64, low, "o")


@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_nan_or_an_infinity_at_a_wrong_place_is_caught(dtype, value):
    ref64, low = references(dtype)
    wrong = low.clone()
    wrong[0, 3, 1, 2] = value
    with pytest.raises(AssertionError, match=r"at other places than in the reference, first at \[0, 3, 1, 2\]"):
        assert_matches_reference(wrong, ref64, low, "o")
    ref64[0, 3, 1, 2] = value
    assert_matches_reference(wrong, ref64, wrong, "o")
    with pytest.raises(AssertionError, match="at other places"):
        assert_matches_reference(low, ref64, wrong, "o")


def test_a_finite_error_beside_infinities_is_still_caught():
    ref64, low = references(torch.float32)
    for x in (ref64, low):
        x[0, 0] = torch.inf
    wrong = low.clone()
    wrong[1] *= 1.01
    with pytest.raises(AssertionError, match="max error"):
        assert_matches_reference(wrong, ref64, low, "o")


def test_wrong_dtypes_and_shapes_are_caught():
    ref64, low = references(torch.float32)
    with pytest.raises(AssertionError, match="dtype"):
        assert_matches_reference(low.double(), ref64, low, "o")
    with pytest.raises(AssertionError, match="float64"):
        assert_matches_reference(low, ref64.float(), low, "o")
    with pytest.raises(AssertionError, match="shapes"):
        assert_matches_reference(low[:, :-1], ref64, low, "o")
    with pytest.raises(AssertionError, match="shapes"):
        assert_matches_reference(low[..., :1], ref64, low, "o")


def test_zeros_must_be_zeros():
    """A gradient that is exactly zero leaves no budget at all."""
    zero = torch.zeros(4, 4)
    assert_matches_reference(zero, zero.double(), zero, "dg", gradient=True)
    with pytest.raises(AssertionError):
        assert_matches_reference(zero + 1e-30, zero.double(), zero, "dg", gradient=True)


def test_empty_results_pass():
    empty = torch.zeros(0, 4)
    assert_matches_reference(empty, empty.double(), empty, "o")
