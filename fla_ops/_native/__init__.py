# SPDX-License-Identifier: Apache-2.0
"""The native library: loaded on first use, with the reason kept when it cannot be."""

import functools
import importlib
import logging

import torch

_log = logging.getLogger("fla_ops")


@functools.cache
def load(*ops: str) -> str | None:
    """Load `fla_ops._C`, which registers `torch.ops.fla_ops`; the caller needs the operators `ops` of it.

    Returns the reason if that fails, else None.
    """
    try:
        importlib.import_module("fla_ops._C")
    except ModuleNotFoundError:
        return "the native library is not built (run `fla-ops build`)"
    except ImportError as error:  # an undefined symbol, a missing libtorch: the loader's own words
        _log.warning("fla_ops._C does not load: %s", error)
        return f"the native library does not load ({error}); run `fla-ops build` to rebuild it"
    if not all(hasattr(torch.ops.fla_ops, op) for op in ops):
        return "the native library is older than this package; run `fla-ops build` to rebuild it"
    return None
