# SPDX-License-Identifier: Apache-2.0
"""The instruction-set levels of the native CPU kernels: the best is chosen at load; tests and benchmarks force one."""

import contextlib
from collections.abc import Iterator

import torch

from . import load

NAMES = ("portable", "AVX2", "AVX-512")


def current() -> str | None:
    """The level in use, or None without the native library."""
    return None if load() else NAMES[torch.ops.fla_ops._cpu_level()]


def available() -> tuple[str, ...]:
    """Every level that this machine can run, lowest first; empty without the native library."""
    if load():
        return ()
    before = torch.ops.fla_ops._cpu_level()
    found = []
    for level, name in enumerate(NAMES):
        try:
            torch.ops.fla_ops._set_cpu_level(level)
        except RuntimeError:  # the machine lacks it, and so every higher one
            break
        found.append(name)
    torch.ops.fla_ops._set_cpu_level(before)
    return tuple(found)


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Run every native kernel of the process at this level."""
    before = torch.ops.fla_ops._cpu_level()
    torch.ops.fla_ops._set_cpu_level(NAMES.index(name))
    try:
        yield
    finally:
        torch.ops.fla_ops._set_cpu_level(before)


@contextlib.contextmanager
def without_extensions() -> Iterator[None]:
    """Run the AVX-512 kernels as on a processor without AVX512_BF16 and AVX512_VBMI2."""
    before = torch.ops.fla_ops._avx512_extensions()
    torch.ops.fla_ops._set_avx512_extensions(False)
    try:
        yield
    finally:
        torch.ops.fla_ops._set_avx512_extensions(before)
