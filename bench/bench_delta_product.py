# SPDX-License-Identifier: Apache-2.0
"""DeltaProduct, l2norm and decay included, beside our delta rule and transformers' on the interleaved sequence."""


def bench_delta_product(case, variant, record):
    record(case, variant)
