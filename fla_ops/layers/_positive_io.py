# SPDX-License-Identifier: Apache-2.0
"""Mamba's x_proj, re-parametrised so that tokens cannot all converge to zero (arXiv 2410.03292, refinement 1)."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .. import _checks


class PositiveIOProjection(nn.Module):
    r"""A Linear without bias whose rows `[S_delta; S_B; S_C]` keep S_C^T S_B positive semi-definite.

        S_C = P,   S_B = diag(softplus(lambda) + 0.7) P,   P in R^{N x Di} unit upper triangular

    so that S_C^T S_B = P^T diag(softplus(lambda) + 0.7) P. The sign of its eigenvalues decides where the tokens of a
    deep model go: all negative, and they shrink to zero; the paper finds that case the worst.

    Args:
        channels: the input's size Di.
        dt_rank: rows R of S_delta, which are free.
        d_state: rows N of S_B and of S_C, at most Di.

    Parameters: `dt_weight` `[R, Di]`; `shared_weight` `[N, Di]`, of which the part above the diagonal is P's; `scale`
    `[N]`, lambda.
    """

    def __init__(self, channels: int, dt_rank: int, d_state: int, device=None, dtype=None):
        super().__init__()
        if d_state > channels:
            raise _checks.bad(ValueError, "Mamba", "d_state", f"at most Di={channels} with positive_io", d_state)
        where = {"device": device, "dtype": dtype}
        self.dt_weight = nn.Parameter(torch.empty(dt_rank, channels, **where))
        self.shared_weight = nn.Parameter(torch.empty(d_state, channels, **where))
        self.scale = nn.Parameter(torch.empty(d_state, **where))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The free weights as `nn.Linear`'s, lambda = 0."""
        bound = 1 / math.sqrt(self.dt_weight.shape[1])
        nn.init.uniform_(self.dt_weight, -bound, bound)
        nn.init.uniform_(self.shared_weight, -bound, bound)
        nn.init.zeros_(self.scale)

    @property
    def weight(self) -> torch.Tensor:
        """`[R + 2N, Di]`, as x_proj's."""
        where = {"device": self.scale.device, "dtype": self.scale.dtype}
        P = self.shared_weight.triu(1) + torch.eye(*self.shared_weight.shape, **where)
        return torch.cat((self.dt_weight, (F.softplus(self.scale) + 0.7)[:, None] * P, P))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., Di]` -> `[..., R + 2N]`: what delta, B and C are made of."""
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        (rank, channels), (states, _) = self.dt_weight.shape, self.shared_weight.shape
        return f"{channels}, dt_rank={rank}, d_state={states}"
