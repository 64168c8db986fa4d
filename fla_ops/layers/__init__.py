# SPDX-License-Identifier: Apache-2.0
"""The families as `nn.Module`s."""

from ._state import LayerOutput, LayerState
from .delta_activation import DeltaActivation, DeltaOutput
from .delta_linear import DeltaLinear
from .delta_product import GatedDeltaProduct
from .delta_rule import DeltaNet, GatedDeltaNet
from .selective_scan import Mamba

__all__ = [
    "DeltaActivation",
    "DeltaLinear",
    "DeltaNet",
    "DeltaOutput",
    "GatedDeltaNet",
    "GatedDeltaProduct",
    "LayerOutput",
    "LayerState",
    "Mamba",
]
