# SPDX-License-Identifier: Apache-2.0
"""The short depthwise convolution in front of a mixer, on sequences with time before channels."""

import math

import torch
from torch import nn

from ..causal_conv1d import causal_conv1d, causal_conv1d_step


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time; parameters are named and shaped as those of a depthwise `nn.Conv1d`.

    Args:
        channels: number of channels D.
        width: number of taps W.
        bias: learn a bias per channel.
        activation: None or "silu", applied to the result.
        backend: as in `fla_ops.causal_conv1d`.
    """

    def __init__(self, channels, width, bias=False, activation=None, backend="auto", device=None, dtype=None):
        super().__init__()
        self.activation, self.backend = activation, backend
        self.weight = nn.Parameter(torch.empty(channels, 1, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Conv1d`: uniform within W ** -0.5, the fan-in of a depthwise filter being W."""
        bound = math.sqrt(1 / self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self,
        x: torch.Tensor,
        *,
        state: torch.Tensor | None = None,
        return_state: bool = False,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sequences x `[B, T, D]`, from state `[N, D, W - 1]`: (y, the new state if asked for, else None).

        One token x `[B, D]`: (y `[B, D]`, None); then `state` is required and updated in place.
        """
        weight = self.weight[:, 0]
        if x.dim() == 2:
            options = {"activation": self.activation, "backend": self.backend}
            return causal_conv1d_step(x, weight, self.bias, state=state, **options), None
        y, final_state = causal_conv1d(
            x.transpose(1, 2),
            weight,
            self.bias,
            activation=self.activation,
            initial_state=state,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        return y.transpose(1, 2), final_state

    def extra_repr(self) -> str:
        channels, _, width = self.weight.shape
        return f"{channels}, width={width}, bias={self.bias is not None}, activation={self.activation}"
