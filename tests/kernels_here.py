# SPDX-License-Identifier: Apache-2.0
"""Tests that run on every backend, of an op that does not yet have a kernel on each."""

import pytest
import torch

from fla_ops import _backend, _native


def skip_without_kernel(op: str, backend: str, dtype: torch.dtype = torch.float64) -> None:
    """Skip the test if `backend` has no kernel of `op`, with the reason; it runs once there is one."""
    missing = _backend.why_not(op, backend, "cpu", dtype, ())
    name = f"{_native.ops.name}::{op}_step"  # inside of `simt.as_native`, the CUDA kernel's
    if missing is None and backend == "native" and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
        missing = f"{name} is not there: {op} has no CUDA kernel"
    if missing:
        pytest.skip(missing)
