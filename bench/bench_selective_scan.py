# SPDX-License-Identifier: Apache-2.0
"""Mamba's selective scan, softplus, D and z included, beside what transformers, mambapy and mamba-ssm run."""


def bench_selective_scan(case, variant, record):
    record(case, variant)
