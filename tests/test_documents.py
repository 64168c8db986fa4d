# SPDX-License-Identifier: Apache-2.0
"""What the documents show, runs; what they promise, holds."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import fla_ops

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[-1][:40])
def test_readme_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_readme_has_blocks():
    assert BLOCKS


@pytest.mark.parametrize(
    "name",
    [
        "fla_ops.layers.delta_rule",
        "fla_ops.layers.delta_activation",
        "fla_ops.layers.delta_linear",
        "fla_ops.layers.delta_product",
        "fla_ops.layers.selective_scan",
        "fla_ops._param_groups",
    ],
)
def test_docstring_examples_run(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed


def test_every_file_that_the_readme_names_exists():
    for path in re.findall(r"`((?:fla_ops|csrc|tests|bench|kernels)/[\w./-]*)`", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / path).exists(), path


def test_every_public_name_has_a_docstring():
    for name in fla_ops.__all__:
        value = getattr(fla_ops, name)
        if callable(value) and not hasattr(value, "_fields"):
            assert value.__doc__, name
