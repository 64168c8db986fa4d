# SPDX-License-Identifier: Apache-2.0
"""Sequence lengths do not compile kernels: 30 of them make at most two variants of each."""

import pytest
from recorded_launches import recorded

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 255, 256, 300, 511, 512, 777)
LENGTHS += (1000, 1024, 1025, 2048, 3000, 4096)

# "split" is what users have: long sequences over an empty card are cut into segments. The others forbid that.
CASES = {
    "batch": ("delta_rule", "bfloat16", {"K": 64, "V": 64, "g": True, "H": 2, "B": 2}),
    "odd sizes": ("delta_rule", "float32", {"K": 20, "V": 12, "g": True, "H": 3, "B": 1}),
    "packed": ("delta_rule", "bfloat16", {"K": 64, "V": 64, "g": True, "H": 2, "packed": True}),
    "split": ("delta_rule", "bfloat16", {"K": 64, "V": 64, "g": True, "H": 2, "split": True}),
    "packed, split": ("delta_rule", "bfloat16", {"K": 64, "V": 64, "H": 2, "packed": True, "split": True}),
    "DeltaProduct": ("delta_product", "bfloat16", {"K": 64, "V": 64, "n": 3, "g": True, "H": 2, "B": 2}),
    "packed DeltaProduct": ("delta_product", "bfloat16", {"K": 64, "V": 64, "n": 2, "g": True, "H": 2, "packed": True}),
    "channels last": ("causal_conv1d", "bfloat16", {"W": 4, "D": 64, "B": 2}),
    "channels first": ("causal_conv1d", "bfloat16", {"W": 4, "D": 64, "B": 2, "time_last": True}),
    "odd channels first": ("causal_conv1d", "float32", {"W": 4, "D": 7, "B": 1, "time_last": True}),
    "scan": ("selective_scan", "bfloat16", {"N": 16, "softplus": True, "Di": 64, "B": 2}),
    "scan, channels first": ("selective_scan", "bfloat16", {"N": 16, "Di": 64, "B": 2, "time_last": True}),
    "packed scan": ("selective_scan", "float32", {"N": 5, "Di": 30, "G": 2, "packed": True}),
    "scan, split": ("selective_scan", "bfloat16", {"N": 16, "Di": 64, "B": 1, "split": True}),
    "sparse attention": ("temporal_sparse_attention", "bfloat16", {"D": 64, "B": 2}),
    "packed sparse attention": ("temporal_sparse_attention", "float32", {"D": 20, "H": 3, "packed": True}),
    "packed convolution": ("causal_conv1d", "bfloat16", {"W": 4, "D": 64, "packed": True, "bias": True}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_thirty_lengths_compile_at_most_two_variants(case):
    assert len(LENGTHS) == len(set(LENGTHS)) == 30
    op, dtype, options = case
    variants = {}
    for T, passes in zip(LENGTHS, recorded(*((op, dtype, options | {"T": T}) for T in LENGTHS)), strict=True):
        for name, launches in passes.items():
            for launch in launches:
                variants.setdefault((name, launch["kernel"]), {}).setdefault(launch["key"], T)
    assert variants
    for (name, kernel), keys in variants.items():
        lengths = list(keys.values())
        assert len(keys) <= 2, f"{name}: {kernel} is compiled {len(keys)} times, first for lengths {lengths}"
