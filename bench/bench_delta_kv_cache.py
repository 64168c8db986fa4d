# SPDX-License-Identifier: Apache-2.0
"""One token's attention to a temporally sparse cache, beside exact attention to a dense one: our own and torch's."""


def bench_delta_kv_cache(case, variant, record):
    record(case, variant)
