# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on CPU tensors: `csrc/*_cuda.cu` compiled for the host behind the shim of `csrc/simt_shim.h`."""

import contextlib
import fcntl
import functools
import hashlib
from pathlib import Path

import torch

from fla_ops import _build, _native
from fla_ops._native import causal_conv1d, delta_product, delta_rule, selective_scan, temporal_sparse_attention

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "simt"
LANE_ORDERS = ("ascending", "descending")


def why_not() -> str | None:
    """The reason why the kernels cannot be compiled for the host here, or None."""
    return _build.why_not()


def has(op: str) -> bool:
    """Whether there are CUDA kernels of this op."""
    return (CSRC / f"{op}_cuda.cu").exists()


@functools.cache
def load() -> None:
    """Register `torch.ops.fla_ops_simt`, compiled anew if a source has changed since the last time."""
    library = CACHE / f"_C_simt-{_fingerprint()}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed: tests run in several processes
        if not library.exists():
            for old in CACHE.glob("_C_simt-*.so"):
                old.unlink()
            _build.build_simt(CSRC, library)
    torch.ops.load_library(library)
    for family in (causal_conv1d, delta_product, delta_rule, selective_scan, temporal_sparse_attention):
        family.register_fakes("fla_ops_simt")


def _fingerprint() -> str:
    """Of everything the library is made from: sources, headers, flags, compiler, torch."""
    seen = hashlib.sha256(f"{_build.compiler()} {torch.__version__}".encode())
    for path in [
        *sorted(CSRC.glob("*.h")),
        *sorted(CSRC.glob("*.cuh")),
        *_build.simt_sources(CSRC),
        Path(_build.__file__),
    ]:
        seen.update(path.name.encode() + b"\0" + path.read_bytes())
    return seen.hexdigest()[:16]


@contextlib.contextmanager
def lane_order(order: str, ops=None):
    """Threads of a block, and blocks of a grid, run in ascending or in descending order."""
    ops = ops or torch.ops.fla_ops_simt
    ops._set_lane_order(order == "descending")
    try:
        yield
    finally:
        ops._set_lane_order(False)


@contextlib.contextmanager
def as_native(order: str):
    """Inside, backend="native" runs the CUDA kernels on CPU tensors, its lanes in this order."""
    load()
    before = _native.ops, delta_rule._widened
    _native.ops = torch.ops.fla_ops_simt
    delta_rule._widened = lambda q, v: False  # as for CUDA tensors
    try:
        with lane_order(order):
            yield
    finally:
        _native.ops, delta_rule._widened = before
