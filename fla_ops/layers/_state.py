# SPDX-License-Identifier: Apache-2.0
"""What a layer remembers between calls."""

from typing import NamedTuple

import torch


class LayerState(NamedTuple):
    """The state of one layer for N sequences; the same in prefill, chunked prefill and steps.

    Attributes:
        conv: the last W - 1 inputs of the short convolutions, oldest first, `[N, channels, W - 1]`, channels in
            projection order (q, k, v). None for a layer without short convolution.
        recurrent: the recurrence's state, `[N, HV, K, V]` for the delta rule and DeltaProduct.

    Both are float32 (float64 for a float64 layer) unless converted. `layer.step` writes them in place;
    `layer(..., return_state=True)` returns new ones and never modifies those it was given.
    """

    conv: torch.Tensor | None
    recurrent: torch.Tensor

    def clone(self) -> "LayerState":
        """A copy that shares no memory: a snapshot to come back to."""
        return self._map(torch.Tensor.clone)

    def detach(self) -> "LayerState":
        """The same memory without the gradient history, as truncated backpropagation through time needs it."""
        return self._map(torch.Tensor.detach)

    def to(self, *args, **kwargs) -> "LayerState":
        """Move or convert both tensors; arguments as in `torch.Tensor.to`."""
        return self._map(lambda x: x.to(*args, **kwargs))

    def select(self, indices: torch.Tensor) -> "LayerState":
        """The states of the sequences `indices` (int64 `[M]`), in that order, repeats allowed: a copy."""
        return self._map(lambda x: x.index_select(0, indices.to(x.device)))

    def _map(self, change) -> "LayerState":
        return LayerState(None if self.conv is None else change(self.conv), change(self.recurrent))


class LayerOutput(NamedTuple):
    y: torch.Tensor
    state: LayerState
