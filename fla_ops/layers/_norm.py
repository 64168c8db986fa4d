# SPDX-License-Identifier: Apache-2.0
"""RMS normalisation of each head's output, with an optional gate."""

import torch
from torch import nn
from torch.nn import functional as F

GATES = {"swish": F.silu, "silu": F.silu, "sigmoid": torch.sigmoid}


class GatedRMSNorm(nn.Module):
    """`x / sqrt(mean x^2 + eps) * weight`, times `activation(gate)` if a gate is given.

    Computed in float32 or better, returned in x's dtype.

    Args:
        size: the size of the last dimension.
        eps: added to the mean square.
        activation: "swish" (or "silu") or "sigmoid", applied to the gate.
    """

    def __init__(self, size: int, eps: float = 1e-5, activation: str = "swish", device=None, dtype=None):
        super().__init__()
        self.eps, self.activation = eps, activation
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """x and gate `[..., size]`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)
        if gate is not None:
            y = y * GATES[self.activation](gate.to(dtype))
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, activation={self.activation}"
