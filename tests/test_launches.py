# SPDX-License-Identifier: Apache-2.0
"""How many launches a call costs on a GPU, and how many bytes move: promises of the design, counted."""

import pytest
from recorded_launches import recorded

pytest.importorskip("triton")


DELTA = {"K": 128, "V": 128, "g": True}


def names(launches):
    return [launch["kernel"] for launch in launches]


def test_launches():
    """The delta rule: two in inference, three at training at most; the peer's five to seven. The convolution: one, and
    in the backward a second that adds the parameters' partial sums. A step: one."""
    options = {"T": 1024, "l2norm": True}
    delta, packed, conv = recorded(
        ("delta_rule", "bfloat16", DELTA | options),
        ("delta_rule", "bfloat16", DELTA | options | {"packed": True, "GVA": True}),
        ("causal_conv1d", "bfloat16", {"W": 4, "silu": True, "bias": True}),
    )
    for passes in (delta, packed):
        assert len(passes["forward"]) <= 2, names(passes["forward"])
        assert len(passes["training"]) <= 3, names(passes["training"])
        assert len(passes["backward"]) <= 5, names(passes["backward"])
        assert len(passes["step"]) == 1, names(passes["step"])
    assert len(conv["forward"]) == 1, names(conv["forward"])
    assert len(conv["backward"]) <= 2, names(conv["backward"])
    assert len(conv["step"]) == 1, names(conv["step"])


def test_no_grid_is_empty_or_too_wide():
    """A launch of no program is an error on a GPU, and the second and third axes of a grid end at 65,535."""
    shapes = (
        {"T": 0},
        {"B": 0},
        {"B": 70_000, "T": 1, "K": 16, "V": 16, "H": 1},
        {"H": 70_000, "B": 1, "T": 1, "K": 16, "V": 16},
    )
    for passes in recorded(*(("delta_rule", "bfloat16", DELTA | shape) for shape in shapes)):
        for launches in passes.values():
            for launch in launches:
                grid = [*launch["grid"], 1, 1]
                assert all(n > 0 for n in grid), launch
                assert grid[1] <= 65_535 and grid[2] <= 65_535, launch
