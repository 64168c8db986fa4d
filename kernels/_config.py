# SPDX-License-Identifier: Apache-2.0
"""The launch tables: (kernel, sizes, dtype, architecture) -> LaunchConfig. Every row is tested for correctness.

There is no autotuning: the first call is as fast as the second, and the same inputs give the same bits on every run.
Rows are chosen by the ahead-of-time report (registers, spills, shared memory) and by measurement where a GPU is at hand.
"""

import torch

from ._launch import LaunchConfig


def delta_rule_prepare_config(K: int, BT: int, dtype: torch.dtype, arch: str) -> LaunchConfig:
    """One program a chunk and query head; BK channels of q and k at a time."""
    BK = min(64 if dtype.itemsize == 2 else 32, max(16, 1 << (K - 1).bit_length()))
    return LaunchConfig(BT=BT, BK=BK, num_warps=8 if BT == 64 else 4, num_stages=1)
