# SPDX-License-Identifier: Apache-2.0
"""One token's attention to a dense cache, beside torch's and a plain read of the same memory."""


def bench_decode_attention(case, variant, record):
    record(case, variant)
