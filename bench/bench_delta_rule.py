# SPDX-License-Identifier: Apache-2.0
"""The delta rule, l2norm and decay included, beside transformers' torch paths; fla-core and flash-qla on a GPU."""


def bench_delta_rule(case, variant, record):
    record(case, variant)
