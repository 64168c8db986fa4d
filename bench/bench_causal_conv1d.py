# SPDX-License-Identifier: Apache-2.0
"""The causal depthwise convolution with SiLU, beside F.conv1d followed by SiLU."""


def bench_causal_conv1d(case, variant, record):
    record(case, variant)
