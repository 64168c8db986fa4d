# SPDX-License-Identifier: Apache-2.0
"""What the layers of the delta families share: the op between the projections; sizes and decay of the gated ones."""

import math

import torch
from torch import nn

from .. import _checks
from ._gates import decay_gate, reset_decay_
from ._qkv import QKVMixer
from ._state import LayerState


class DeltaMixer(QKVMixer):
    """Runs a family's op between the projections; a family says which, and what beta, g and the options are."""

    qk_l2norm = True

    def _op(self, q, k, v, beta, g, **options) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(o, final state) of whole sequences; the tensors are `[B, T, heads, head dim]` and `[B, T, heads]`."""
        raise NotImplementedError

    def _op_step(self, q, k, v, beta, g, **options) -> torch.Tensor:
        """o of one token; the tensors have no time axis."""
        raise NotImplementedError

    def _gates(self, x: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(beta, g) `[..., HV]`, g None without decay."""
        raise NotImplementedError

    def _sequence(self, x, cu_seqlens, state, return_state):
        (q, k, v), conv = self._qkv(x, None if state is None else state.conv, cu_seqlens, return_state)
        q, k = self._normalise(q, k)
        o, recurrent = self._op(
            q,
            k,
            v,
            *self._gates(x, q),
            initial_state=None if state is None else state.recurrent,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            qk_l2norm=self.qk_l2norm,
            backend=self.backend,
        )
        return self._output(o, x), LayerState(conv, recurrent) if return_state else None

    def _token(self, x, state):
        (q, k, v), _ = self._qkv(x, state.conv)
        q, k = self._normalise(q, k)
        options = {"qk_l2norm": self.qk_l2norm, "backend": self.backend}
        o = self._op_step(q, k, v, *self._gates(x, q), state=state.recurrent, **options)
        return self._output(o, x)

    def _normalise(self, q, k):
        """q and k as they enter the op, which does the l2 norm itself."""
        return q, k

    def _state_sizes(self):
        sizes = {"HV": self.num_v_heads, "K": self.head_k_dim, "V": self.head_v_dim}
        return self._conv_sizes(), sizes


class GatedDeltaMixer(DeltaMixer):
    """Sizes by head, value heads in groups, beta = sigmoid(W_b x), and the decay, where there is one."""

    undecayed = ("A_log", "dt_bias")

    def _build_gated(
        self,
        *,
        hidden_size: int,
        expand_v: float,
        head_dim: int,
        num_heads: int,
        num_v_heads: int | None,
        use_forget_gate: bool,
        allow_neg_eigval: bool,
        writes: int = 1,
        device: torch.device | None,
        dtype: torch.dtype | None,
        **options,
    ) -> None:
        """`writes` is how many k, v and beta a token has; their projections hold them one behind another. `options` are
        those of `_build`."""
        op = type(self).__name__
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        if num_heads < 1 or num_v_heads < 1 or num_v_heads % num_heads:
            raise _checks.bad(ValueError, op, "num_v_heads", f"a multiple of num_heads={num_heads}", num_v_heads)
        head_v_dim = whole(op, "expand_v", head_dim * expand_v, "head_dim * expand_v")
        key_dim, value_dim = num_heads * head_dim, num_v_heads * head_v_dim
        self.num_heads, self.num_v_heads = num_heads, num_v_heads
        self.use_forget_gate, self.allow_neg_eigval = use_forget_gate, allow_neg_eigval
        where = {"device": device, "dtype": dtype}
        self._build(
            hidden_size=hidden_size,
            qkv_dims=(key_dim, writes * key_dim, writes * value_dim),
            head_k_dim=head_dim,
            head_v_dim=head_v_dim,
            value_dim=value_dim,
            qk_activation="silu",
            **options,
            **where,
        )
        if use_forget_gate:
            self.a_proj = nn.Linear(hidden_size, num_v_heads, bias=False, **where)
        self.b_proj = nn.Linear(hidden_size, writes * num_v_heads, bias=False, **where)
        if use_forget_gate:
            self.A_log = nn.Parameter(torch.empty(num_v_heads, **where))
            self.dt_bias = nn.Parameter(torch.empty(num_v_heads, **where))
            reset_decay_(self.A_log, self.dt_bias)

    def reset_parameters(self) -> None:
        """Initialise every parameter, as the constructor does; also after `to_empty`.

        Linears and convolutions as torch's own; rates exp(A_log) uniform in (0, 16); softplus(dt_bias) log-uniform in
        (0.001, 0.1).
        """
        super().reset_parameters()
        if self.use_forget_gate:
            reset_decay_(self.A_log, self.dt_bias)

    def _gates(self, x, q):
        beta = self.b_proj(x).sigmoid()
        g = decay_gate(self.a_proj(x), self.A_log, self.dt_bias) if self.use_forget_gate else None
        return (beta * 2 if self.allow_neg_eigval else beta), g


def whole(op: str, name: str, size: float, what: str) -> int:
    """`size` as an integer if it is one, up to rounding."""
    if round(size) < 1 or not math.isclose(size, round(size), rel_tol=1e-5):
        raise _checks.bad(ValueError, op, name, f"such that {what} is a positive integer", size)
    return round(size)
