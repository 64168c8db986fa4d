# SPDX-License-Identifier: Apache-2.0
"""The learned decay that Mamba-2 and the gated delta rule share."""

import torch
from torch.nn import functional as F

# e^80 is near the end of float32. A larger rate times any softplus(a) above 1e-33 is a decay of exactly zero anyway,
# and infinity times softplus(a) = 0, or times a zero gradient, would be NaN.
MAX_LOG_RATE = 80.0


def decay_gate(a: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor | None = None) -> torch.Tensor:
    """The natural-log decay `g = -exp(A_log) * softplus(a + dt_bias)` <= 0 of arXiv 2412.06464.

    a `[..., HV]`, A_log and dt_bias `[HV]`, in any float dtypes; computed and returned in float32 (float64 for a
    float64 `a`).
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    a = a.to(dtype)
    if dt_bias is not None:
        a = a + dt_bias.to(dtype)
    return -A_log.to(dtype).clamp(max=MAX_LOG_RATE).exp() * F.softplus(a)


def reset_decay_(A_log: torch.Tensor, dt_bias: torch.Tensor) -> None:
    """Rates uniform in (0, 16); step sizes log-uniform in (0.001, 0.1), stored through the inverse of softplus."""
    with torch.no_grad():
        rate = torch.empty_like(A_log, dtype=torch.float32).uniform_(0, 16)
        A_log.copy_(rate.clamp(min=1e-4).log())  # a rate of exactly 0 can be drawn; its logarithm is no parameter
        step = torch.empty_like(dt_bias, dtype=torch.float32).uniform_(-3, -1)
        step = (10.0**step).clamp(min=1e-4)
        dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
