# SPDX-License-Identifier: Apache-2.0
"""The front and the end of a delta-family layer: q, k, v out of x, and y out of the heads."""

import torch
from torch import nn
from torch.nn import functional as F

from .. import _checks
from ._conv import ShortConvolution
from ._mixer import SequenceMixer
from ._norm import GATES, GatedRMSNorm

ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "elu": lambda x: F.elu(x) + 1,
    "identity": lambda x: x,
}


class QKVMixer(SequenceMixer):
    """Projections, short convolutions and activations of q, k and v; output norm, gate and projection.

    Submodules are always called, never bypassed: wrapped Linears and hooks take effect.
    """

    def _build(
        self,
        *,
        hidden_size: int,
        qkv_dims: tuple[int, int, int],
        head_k_dim: int,
        head_v_dim: int,
        value_dim: int,
        use_gate: bool,
        use_short_conv: bool,
        conv_size: int,
        conv_bias: bool,
        qk_activation: str,
        norm_eps: float,
        gate_activation: str,
        backend: str,
        device: torch.device | None,
        dtype: torch.dtype | None,
    ) -> None:
        """`qkv_dims` are the widths of the three projections, `value_dim` = HV * V that of the output."""
        op, where = type(self).__name__, {"device": device, "dtype": dtype}
        if qk_activation not in ACTIVATIONS:
            raise _checks.bad(ValueError, op, "qk_activation", f"one of {', '.join(ACTIVATIONS)}", qk_activation)
        if gate_activation not in GATES:
            expected = f"one of {', '.join(GATES)}"
            raise _checks.bad(ValueError, op, "output_gate_activation", expected, gate_activation)
        self.hidden_size, self.backend = hidden_size, backend
        self.head_k_dim, self.head_v_dim = head_k_dim, head_v_dim
        self.use_gate, self.use_short_conv, self.conv_size = use_gate, use_short_conv, conv_size
        self.qk_activation, self.qkv_dims = qk_activation, qkv_dims

        def linear(outputs: int) -> nn.Linear:
            return nn.Linear(hidden_size, outputs, bias=False, **where)

        self.q_proj, self.k_proj, self.v_proj = (linear(dim) for dim in qkv_dims)
        if use_short_conv:
            # SiLU runs inside the convolution; any other activation of q and k follows it.
            inside = "silu" if qk_activation == "silu" else None
            self.q_conv1d, self.k_conv1d, self.v_conv1d = (
                ShortConvolution(dim, conv_size, conv_bias, activation, backend, **where)
                for dim, activation in zip(qkv_dims, (inside, inside, "silu"), strict=True)
            )
        if use_gate:
            self.g_proj = linear(value_dim)
        self.o_norm = GatedRMSNorm(head_v_dim, norm_eps, gate_activation, **where)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False, **where)

    def _qkv(
        self,
        x: torch.Tensor,
        conv_state: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """((q, k, v) as `[..., heads, head dim]`, the new conv state if asked for).

        x `[B, T, d]`; or one token `[B, d]`, when `conv_state` is updated in place.
        """
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        new_state = None
        if self.use_short_conv:
            convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            states = (None,) * 3 if conv_state is None else conv_state.split(self.qkv_dims, 1)
            results = [
                conv(u, state=state, return_state=return_state, cu_seqlens=cu_seqlens)
                for conv, u, state in zip(convs, (q, k, v), states, strict=True)
            ]
            (q, k, v), states = zip(*results, strict=True)
            if return_state:
                new_state = torch.cat(states, 1)
        else:
            v = F.silu(v)
        if self.qk_activation != "silu" or not self.use_short_conv:
            activation = ACTIVATIONS[self.qk_activation]
            q, k = activation(q), activation(k)
        q, k = (u.unflatten(-1, (-1, self.head_k_dim)) for u in (q, k))
        return (q, k, v.unflatten(-1, (-1, self.head_v_dim))), new_state

    def _output(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Heads `[..., HV, V]` -> y `[..., d]`; the gate is a function of the layer's input x."""
        gate = self.g_proj(x).unflatten(-1, (-1, self.head_v_dim)) if self.use_gate else None
        return self.o_proj(self.o_norm(o, gate).flatten(-2))

    def _conv_sizes(self) -> dict[str, int] | None:
        return {"channels": sum(self.qkv_dims), "W-1": self.conv_size - 1} if self.use_short_conv else None
