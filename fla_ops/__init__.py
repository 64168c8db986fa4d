# SPDX-License-Identifier: Apache-2.0
"""Compiled linear-time and sparse sequence mixers for PyTorch. Start with `delta_rule` or `layers.GatedDeltaNet`."""

import torch as _torch

from ._version import __version__

if tuple(int(part) for part in _torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise ImportError(
        f"fla_ops {__version__} needs torch >= 2.11, found {_torch.__version__}. Upgrade with: pip install -U torch"
    )

from . import layers
from ._backend import FallbackWarning, backends, use_backend
from ._checks import check_values
from ._param_groups import param_groups
from .causal_conv1d import CausalConv1dOutput, causal_conv1d, causal_conv1d_step
from .decode_attention import exact_decode_attention
from .delta_kv_cache import DeltaKVCache, DenseKV
from .delta_product import DeltaProductOutput, delta_product, delta_product_step
from .delta_rule import DeltaRuleOutput, delta_rule, delta_rule_step
from .selective_scan import SelectiveScanOutput, selective_scan, selective_scan_step
from .temporal_sparse_attention import (
    TemporalSparseAttentionOutput,
    TemporalSparseStats,
    temporal_sparse_attention,
)

__all__ = [
    "CausalConv1dOutput",
    "DeltaKVCache",
    "DeltaProductOutput",
    "DeltaRuleOutput",
    "DenseKV",
    "FallbackWarning",
    "SelectiveScanOutput",
    "TemporalSparseAttentionOutput",
    "TemporalSparseStats",
    "__version__",
    "backends",
    "causal_conv1d",
    "causal_conv1d_step",
    "check_values",
    "delta_product",
    "delta_product_step",
    "delta_rule",
    "delta_rule_step",
    "exact_decode_attention",
    "layers",
    "param_groups",
    "selective_scan",
    "selective_scan_step",
    "temporal_sparse_attention",
    "use_backend",
]
