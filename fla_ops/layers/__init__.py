# SPDX-License-Identifier: Apache-2.0
"""The families as `nn.Module`s."""

from ._state import LayerOutput, LayerState
from .delta_product import GatedDeltaProduct
from .delta_rule import DeltaNet, GatedDeltaNet

__all__ = ["DeltaNet", "GatedDeltaNet", "GatedDeltaProduct", "LayerOutput", "LayerState"]
