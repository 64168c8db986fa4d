# SPDX-License-Identifier: Apache-2.0
"""The native libraries: loaded on first use, with the reason kept when they cannot be.

`fla_ops._C` registers `torch.ops.fla_ops` and its CPU kernels, `_C_cuda` the CUDA kernels of the same ops.
"""

import functools
import importlib
import logging
from pathlib import Path

import torch

_log = logging.getLogger("fla_ops")

# Where the modules of this folder take their operators from. Tests put another build of the kernels in its place.
ops = torch.ops.fla_ops


@functools.cache
def load(*names: str) -> str | None:
    """Load `fla_ops._C`; the caller needs the operators `names` of it.

    Returns the reason if that fails, else None.
    """
    try:
        importlib.import_module("fla_ops._C")
    except ModuleNotFoundError:
        return "the native library is not built (run `fla-ops build`)"
    except ImportError as error:  # an undefined symbol, a missing libtorch: the loader's own words
        _log.warning("fla_ops._C does not load: %s", error)
        return f"the native library does not load ({error}); run `fla-ops build` to rebuild it"
    if not all(hasattr(torch.ops.fla_ops, name) for name in names):
        return "the native library is older than this package; run `fla-ops build` to rebuild it"
    return None


@functools.cache
def load_cuda(*names: str) -> str | None:
    """Load `_C_cuda` as well, for CUDA tensors; the caller needs the kernels of the operators `names`.

    Returns the reason if that fails, else None.
    """
    library = Path(__file__).parent.parent / "_C_cuda.abi3.so"
    if not library.exists():
        return "the native CUDA library is not built (run `fla-ops build` where nvcc and a CUDA build of torch are)"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    missing = load(*names)
    if missing:
        return missing
    try:
        torch.ops.load_library(library)
    except OSError as error:
        _log.warning("%s does not load: %s", library, error)
        return f"the native CUDA library does not load ({error}); run `fla-ops build` to rebuild it"
    if not all(torch._C._dispatch_has_kernel_for_dispatch_key(f"fla_ops::{name}", "CUDA") for name in names):
        return "the native CUDA library is older than this package; run `fla-ops build` to rebuild it"
    return None
