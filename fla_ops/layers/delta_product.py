# SPDX-License-Identifier: Apache-2.0
"""DeltaProduct and Gated DeltaProduct as one drop-in layer, named and shaped as flash-linear-attention's."""

import torch

from ..delta_product import check_householder, delta_product, delta_product_step
from ._delta import GatedDeltaMixer


class GatedDeltaProduct(GatedDeltaMixer):
    r"""Gated DeltaProduct (arXiv 2502.10297): several delta-rule corrections of the state in each token.

    Per value head, with q = l2norm(silu(conv(W x))) and, for each micro-step j = 1..n, k_j = l2norm(silu(conv(W_j x)))
    and v_j = silu(conv(W_j x)):

        S_{t,0} = e^{g_t} S_{t-1}
        S_{t,j} = S_{t,j-1} + beta_{t,j} k_{t,j} (v_{t,j} - S_{t,j-1}^T k_{t,j})^T
        S_t = S_{t,n},   o_t = K^-1/2 S_t^T q_t
        g_t = -exp(A_log) softplus(W_a x_t + dt_bias),   beta_{t,j} = c sigmoid(W_{b,j} x_t)

    and y = W_o norm(o), with norm(o) silu(W_g x) if gated. The transition of a token is a product of n generalised
    Householder matrices: with c = 2 (`allow_neg_eigval`) each can reflect, and two make a rotation, which a single one
    of `GatedDeltaNet` cannot be. The gate g is computed in float32 (float64 for float64) whatever A_log and dt_bias are
    stored in.

    Args:
        hidden_size: width d of the input and output.
        expand_v: V = expand_v * head_dim.
        head_dim: K, the size of each query and key head.
        num_heads: number of query and key heads H.
        num_v_heads: number of value heads HV, a multiple of H: value head hv reads query and key head hv // (HV // H).
            Default: H.
        use_output_gate: multiply the normalised output by silu(W_g x).
        use_short_conv: put a causal depthwise convolution behind each of the projections.
        conv_size: the convolutions' number of taps W, 1 to 8.
        conv_bias: give them a bias.
        norm_eps: epsilon of the output norm.
        use_forget_gate: let the state decay; without it this is DeltaProduct, g = 0.
        allow_neg_eigval: c = 2, so that eigenvalues of a token's transition reach -1 (arXiv 2411.12537); else c = 1.
        num_householder: number n of micro-steps a token, 1 to 8; with 1 this is a (gated) DeltaNet.
        backend: as in `fla_ops.delta_product`, for every op of the layer.
        device, dtype: of all parameters.

    Parameters: `q_proj.weight` `[H K, d]`; `k_proj.weight` `[n H K, d]`, `v_proj.weight` `[n HV V, d]` and
    `b_proj.weight` `[n HV, d]`, whose rows are ordered (micro-step, head, channel); `a_proj.weight`, `A_log` and
    `dt_bias` `[HV]` (use_forget_gate; the latter two marked `_no_weight_decay`, see `fla_ops.param_groups`);
    `{q,k,v}_conv1d.weight` `[dim, 1, W]` and `.bias` (use_short_conv, conv_bias); `g_proj.weight` (use_output_gate);
    `o_norm.weight` `[V]`; `o_proj.weight`. Linears have no bias.

    The state is `LayerState(conv [N, H K + n H K + n HV V, W - 1], recurrent [N, HV, K, V])`.

    Raises:
        ValueError, TypeError: a wrong argument; the message names it.

    Example:
        >>> import torch
        >>> from fla_ops.layers import GatedDeltaProduct
        >>> layer = GatedDeltaProduct(hidden_size=64, head_dim=16, num_heads=2, num_householder=3, backend="reference")
        >>> x = torch.randn(1, 10, 64)
        >>> y = layer(x)                                               # train
        >>> with torch.no_grad():                                      # generate
        ...     _, state = layer(x[:, :9], return_state=True)
        ...     last = layer.step(x[:, 9], state)
        >>> torch.allclose(last, y[:, 9], atol=1e-5)
        True
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        use_output_gate: bool = True,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        norm_eps: float = 1e-5,
        use_forget_gate: bool = True,
        allow_neg_eigval: bool = True,
        num_householder: int = 2,
        *,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_householder = check_householder(type(self).__name__, num_householder)
        self._build_gated(
            hidden_size=hidden_size,
            expand_v=expand_v,
            head_dim=head_dim,
            num_heads=num_heads,
            num_v_heads=num_v_heads,
            use_forget_gate=use_forget_gate,
            allow_neg_eigval=allow_neg_eigval,
            writes=num_householder,
            use_gate=use_output_gate,
            use_short_conv=use_short_conv,
            conv_size=conv_size,
            conv_bias=conv_bias,
            norm_eps=norm_eps,
            gate_activation="swish",
            backend=backend,
            device=device,
            dtype=dtype,
        )

    def _micro_steps(self, k, v, beta):
        """The projections' order (n h d) with an axis n of its own, in front of the heads."""
        n = self.num_householder
        return k.unflatten(-2, (n, -1)), v.unflatten(-2, (n, -1)), beta.unflatten(-1, (n, -1))

    def _op(self, q, k, v, beta, g, **options):
        k, v, beta = (u.flatten(1, 2) for u in self._micro_steps(k, v, beta))  # time [T * n], j fastest
        return delta_product(q, k, v, beta, g, num_householder=self.num_householder, **options)

    def _op_step(self, q, k, v, beta, g, **options):
        return delta_product_step(q, *self._micro_steps(k, v, beta), g, **options)
