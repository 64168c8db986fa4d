# SPDX-License-Identifier: Apache-2.0
"""The launch tables: (kernel, sizes, dtype, architecture) -> LaunchConfig. Every row is tested for correctness.

There is no autotuning: the first call is as fast as the second, and the same inputs give the same bits every time.
Rows are chosen by the ahead-of-time report (registers, spills, shared memory) and by measurement where a GPU is at
hand. Triton's interpreter has rows of its own: its time goes by programs, whatever their size.
"""

import functools
from dataclasses import replace

import torch

from ._launch import INTERPRET, LaunchConfig

CHECKPOINT = 8  # the delta rule's forward saves one state in so many chunks for its backward
SCAN_CHECKPOINT = 32  # the selective scan's one in so many steps


def _power_of_two(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _has_tma(arch: str) -> bool:
    return arch.startswith("sm_") and int(arch[3:]) >= 90


def _roomy(arch: str) -> bool:
    """Whether programs have 227 KB of shared memory, and products that read operands from there."""
    return arch.startswith(("sm_90", "sm_100", "sm_103"))


def _warps(threads: int, arch: str) -> int:
    return max(1, threads // (64 if arch.startswith("gfx") else 32))


@functools.cache
def delta_rule_prepare_config(K: int, BT: int, dtype: torch.dtype, arch: str) -> LaunchConfig:
    """One program a chunk and value head; BK channels of q and k at a time.

    One stage: pipelined, the loop over K races on Hopper (Triton 3.6, seen as results that change from run to run).
    """
    BK = min(128 if dtype.itemsize == 2 else 32, _power_of_two(K))
    registers = 168 if dtype.itemsize == 2 and arch.startswith("sm_") else None
    return LaunchConfig(BT=BT, BK=BK, num_warps=4, num_stages=1, max_registers=registers)


@functools.cache
def delta_rule_forward_config(K: int, V: int, dtype: torch.dtype, arch: str) -> LaunchConfig:
    """One program a sequence, value head and BV value columns; the state [K, BV] lives in registers."""
    if INTERPRET:
        return LaunchConfig(BT=16 if dtype == torch.float32 else 64, BV=_power_of_two(V))
    if dtype.itemsize == 2:
        # Hopper takes operands from shared memory; elsewhere they share the registers with the state: half the columns.
        # Beyond K = 128 wider states spill: of 32 columns on Triton 3.9, in the walks on 3.6 and 3.7 too.
        BV = 16 if K > 128 else 64 if _roomy(arch) else 32
        stages = 1 if arch.startswith("gfx") else 3 if _roomy(arch) and K <= 128 else 2  # AMD: 64 KB of shared memory
        warps = 4 if K <= 128 or not _roomy(arch) else 8
        return LaunchConfig(BT=64, BV=min(_power_of_two(V), BV), num_warps=warps, num_stages=stages, tma=_has_tma(arch))
    # Products without tensor cores take their operands through registers: with 32 rows they spill by the thousand.
    return LaunchConfig(BT=16, BV=16, num_warps=_warps(256 if K <= 128 else 512, arch), num_stages=1)


@functools.cache
def delta_rule_backward_config(K: int, V: int, dtype: torch.dtype, arch: str) -> LaunchConfig:
    """The backward's walks, over the forward's chunks and blocks. Two stages of five tiles need 100 KB and more."""
    config = delta_rule_forward_config(K, V, dtype, arch)
    if dtype.itemsize == 2:
        if _roomy(arch):
            return config if K <= 128 else replace(config, num_stages=1)
        return replace(config, num_warps=_warps(256, arch), num_stages=1)
    return config


@functools.cache
def delta_rule_gradients_config(kernel: str, K: int, V: int, dtype: torch.dtype, arch: str) -> LaunchConfig:
    """One program a chunk and value head for the "scores", a chunk and query head for the "rows"; BV value columns of
    states and values at a time."""
    if INTERPRET:
        return LaunchConfig(BT=16 if dtype == torch.float32 else 64, BV=_power_of_two(V))
    BT = delta_rule_forward_config(K, V, dtype, arch).BT
    if dtype.itemsize > 2:
        return LaunchConfig(BT=BT, BV=16, num_warps=_warps(128 if K <= 128 else 256, arch), num_stages=1)
    BV = min(_power_of_two(V), 64 if _roomy(arch) else 32)
    stages = 1 if arch.startswith("gfx") else 2
    if kernel == "scores":  # three programs a multiprocessor: 181 us where two take 212 (H200, T = 8192, 32 heads)
        registers = 168 if arch == "sm_90" and K <= 128 else None
        return LaunchConfig(BT=BT, BV=BV, num_warps=_warps(128, arch), num_stages=stages, max_registers=registers)
    if arch == "sm_120" or (K > 128 and arch != "sm_90"):
        stages = 1
    return LaunchConfig(BT=BT, BV=BV, num_warps=_warps(256 if K > 64 else 128, arch), num_stages=stages)


@functools.cache
def delta_rule_step_config(K: int, V: int, dtype: torch.dtype, arch: str) -> LaunchConfig:
    """One program a row, value head and BV value columns."""
    return LaunchConfig(BT=1, BV=min(_power_of_two(V), max(16, 4096 // _power_of_two(K))), num_warps=4, num_stages=1)


@functools.cache
def causal_conv1d(
    kind: str, time_is_fast: bool, vectors: bool, D: int, W: int, dtype: torch.dtype, arch: str
) -> LaunchConfig:
    """The tiles of the causal convolution: 128 threads, each with a run of tokens of one channel or a few."""
    warps = _warps(128, arch)
    BT = 32 * (16 // dtype.itemsize if vectors else 8)
    if INTERPRET:
        return LaunchConfig(BT=BT, BD=64, num_warps=warps)
    if time_is_fast:  # 32 runs of each of 4 channels
        return LaunchConfig(BT=BT, BD=4, num_warps=warps)
    # A thread keeps W weights and W inputs a channel, in the backward pass W + 1 sums besides: more would spill.
    short = W <= 4
    vector = min(16 // dtype.itemsize, 8 if short else 4) if kind == "forward" else 2 if short else 1
    BD = min(32 * vector, 1 << (D - 1).bit_length())
    return LaunchConfig(BT=8 * 128 * vector // BD, BD=BD, num_warps=warps)


@functools.cache
def causal_conv1d_reduce(arch: str) -> LaunchConfig:
    """Sums over partial sums: BT rows of them at a time, BD channels."""
    return LaunchConfig(BT=16, BD=64, num_warps=_warps(128, arch))


@functools.cache
def causal_conv1d_step(D: int, arch: str) -> LaunchConfig:
    return LaunchConfig(BT=1, BD=min(256, 1 << (D - 1).bit_length()), num_warps=_warps(128, arch))


@functools.cache
def selective_scan_config(kind: str, N: int, constants: int, arch: str) -> LaunchConfig:
    """One program a sequence and a warp's lanes of channels, BT steps at a time; `kind` is "forward" or "backward".

    A thread holds 16 states of a channel, in the backward pass those before each of BT steps, their decays and three
    sums besides, and another for each of the `constants` among B and C. Beyond 16 states more warps share a channel.
    """
    states = 1 << (N - 1).bit_length()
    warps = 1 if states <= 16 else min(states // 8, 8)
    if kind == "backward" and constants and states > 8:
        warps = max(warps, 2)
    BT = 4 if kind == "forward" else 2 if states <= 64 and not constants else 1
    return LaunchConfig(BT=BT, BD=64 if INTERPRET or arch.startswith("gfx") else 32, num_warps=warps)


@functools.cache
def selective_scan_step_config(N: int, channels: int, arch: str) -> LaunchConfig:
    """One program a row and BD of a group's channels."""
    states = 1 << (N - 1).bit_length()
    BD = max(1, min(2048 // states, 1 << (channels - 1).bit_length()))
    return LaunchConfig(BT=1, BD=64 if INTERPRET else BD, num_warps=_warps(128, arch))


@functools.cache
def temporal_sparse_hold_config(arch: str) -> LaunchConfig:
    """One program a sequence and key head, a channel a lane; BT tokens on their way while BT are worked on."""
    return LaunchConfig(BT=8, num_warps=_warps(32, arch))


@functools.cache
def temporal_sparse_attention_config(kind: str, D: int, dtype: torch.dtype, arch: str) -> LaunchConfig:
    """One program a head and BT queries, over BK keys at a time; for the "keys" BK keys, over BT queries at a time.

    D is the wider of the head dimensions, rounded up. The forward and "queries" hold two tiles of BT rows, the "keys"
    four of BK rows.
    """
    if INTERPRET:
        return LaunchConfig(BT=64, BK=64)
    if dtype.itemsize > 2:
        return LaunchConfig(BT=16, BK=16, num_warps=4, num_stages=1)
    stages = 2 if _roomy(arch) else 1
    if D > 128:  # wider sums: fewer rows, more threads
        BT, BK = {"forward": (32, 32), "queries": (16, 32), "keys": (16, 32 if _roomy(arch) else 16)}[kind]
        return LaunchConfig(BT=BT, BK=BK, num_warps=8, num_stages=stages)
    if kind == "forward":
        BT = 128 if _roomy(arch) else 64
        return LaunchConfig(BT=BT, BK=64, num_warps=BT // 16, num_stages=stages)
    if kind == "keys" or D > 64:
        return LaunchConfig(BT=32, BK=32, num_warps=8 if D > 64 else 4, num_stages=stages)
    return LaunchConfig(BT=64, BK=64, num_warps=4, num_stages=stages)


@functools.cache
def decode_attention_config(rows: int, D: int, dtype: torch.dtype, arch: str) -> LaunchConfig:
    """One program a key head, BT of its rows of queries and a split of its keys, BK of them at a time.

    D is the wider of the head dimensions, rounded up; `rows` are a key head's query heads times the tokens. Few rows
    are the time that the cache takes to read: three programs a multiprocessor, two tiles each on their way.
    """
    if INTERPRET:
        return LaunchConfig(BT=16 if rows <= 16 else 64, BK=64)
    if dtype.itemsize > 2:
        return LaunchConfig(BT=16, BK=16, num_warps=4, num_stages=1)
    BT = 16 if rows <= 16 else 32 if rows <= 32 or D > 128 else 64
    BK = 64 if _roomy(arch) and D <= 128 else 32
    return LaunchConfig(BT=BT, BK=BK, num_warps=4, num_stages=1 if arch.startswith("gfx") else 2)


@functools.cache
def decode_combine_config(arch: str) -> LaunchConfig:
    """One program a row, BT splits at a time."""
    return LaunchConfig(BT=16, num_warps=_warps(128, arch), num_stages=1)


@functools.cache
def delta_cache_attend_config(rows: int, D: int, dtype: torch.dtype, arch: str) -> LaunchConfig:
    """As `decode_attention_config`: BK recent keys at a time; records come in words of 32.

    A thread unpacks 32 elements of a tile, each by itself. With 168 registers three programs share a multiprocessor.
    """
    if INTERPRET:
        return LaunchConfig(BT=16 if rows <= 16 else 64, BK=64)
    if dtype.itemsize > 2:
        return LaunchConfig(BT=16, BK=16, num_warps=8, num_stages=1)
    BT = 16 if rows <= 16 else 32 if rows <= 32 or D > 128 else 64
    warps = 4 if BT == 16 and D <= 128 else 8
    registers = 168 if warps == 4 and arch.startswith("sm_") else None
    stages = 1 if arch.startswith("gfx") else 2
    return LaunchConfig(BT=BT, BK=32, num_warps=warps, num_stages=stages, max_registers=registers)


@functools.cache
def delta_cache_copy_config(D: int, arch: str) -> LaunchConfig:
    """One program a key head and BT new tokens, or a record."""
    return LaunchConfig(BT=64 if INTERPRET else max(1, 4096 // D), num_warps=_warps(128, arch), num_stages=1)
