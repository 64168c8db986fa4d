# SPDX-License-Identifier: Apache-2.0
"""Temporal-sparse attention over a prompt, packing included, beside exact attention: our own and torch's."""


def bench_temporal_sparse_attention(case, variant, record):
    record(case, variant)
