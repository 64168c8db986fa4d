# SPDX-License-Identifier: Apache-2.0
"""DeltaNet and Gated DeltaNet as drop-in layers; parameters are named and shaped as flash-linear-attention's."""

import torch
from torch import nn
from torch.nn import functional as F

from .. import _checks
from ..delta_rule import delta_rule, delta_rule_step
from ._delta import DeltaMixer, GatedDeltaMixer, whole


class _DeltaRuleMixer(DeltaMixer):
    """The op is the delta rule."""

    def _op(self, q, k, v, beta, g, **options):
        return delta_rule(q, k, v, beta, g, **options)

    def _op_step(self, q, k, v, beta, g, **options):
        return delta_rule_step(q, k, v, beta, g, **options)


class DeltaNet(_DeltaRuleMixer):
    r"""DeltaNet (arXiv 2406.06484): linear attention whose state is corrected, not only added to, by each token.

    Per head, with q, k = act(conv(W x)) normalised and v = silu(conv(W x)):

        S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T,   beta_t = sigmoid(b_t),   o_t = K^-1/2 S_t^T q_t

    and y = W_o norm(o), with norm(o) silu(W_g x) if gated.

    Args:
        hidden_size: width d of the input and output.
        expand_k, expand_v: widths of q and k, and of v, as multiples of hidden_size.
        num_heads: number of heads H; K = expand_k * hidden_size / H and V = expand_v * hidden_size / H.
        use_beta: learn the writing strength; else it is 1.
        use_gate: multiply the normalised output by silu(W_g x).
        use_short_conv: put a causal depthwise convolution behind each of the projections.
        conv_size: its number of taps W, 1 to 8.
        conv_bias: give it a bias.
        allow_neg_eigval: beta = 2 sigmoid(b), so that eigenvalues of the transition reach -1 (arXiv 2411.12537).
        qk_activation: "silu", "relu", "elu" (elu(x) + 1) or "identity", for q and k.
        qk_norm: "l2": x / sqrt(sum x^2 + 1e-6); "sum": x / max(sum |x|, 1e-6).
        norm_eps: epsilon of the output norm.
        backend: as in `fla_ops.delta_rule`, for every op of the layer.
        device, dtype: of all parameters.

    Parameters: `{q,k,v,o}_proj.weight`, `b_proj.weight` (use_beta), `{q,k,v}_conv1d.weight` `[dim, 1, W]` and `.bias`
    (use_short_conv, conv_bias), `g_proj.weight` (use_gate), `o_norm.weight` `[V]`. Linears have no bias.

    The state is `LayerState(conv [N, 2 H K + H V, W - 1], recurrent [N, H, K, V])`.

    Example:
        >>> import torch
        >>> from fla_ops.layers import DeltaNet
        >>> layer = DeltaNet(hidden_size=64, num_heads=2, backend="reference")
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
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 4,
        use_beta: bool = True,
        use_gate: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        norm_eps: float = 1e-5,
        *,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        op = type(self).__name__
        if qk_norm not in ("l2", "sum"):
            raise _checks.bad(ValueError, op, "qk_norm", "'l2' or 'sum'", repr(qk_norm))
        key_dim = whole(op, "expand_k", hidden_size * expand_k, "hidden_size * expand_k")
        value_dim = whole(op, "expand_v", hidden_size * expand_v, "hidden_size * expand_v")
        for name, dim in (("key", key_dim), ("value", value_dim)):
            if num_heads < 1 or dim % num_heads:
                raise _checks.bad(ValueError, op, "num_heads", f"a divisor of the {name} width {dim}", num_heads)
        self.num_heads = self.num_v_heads = num_heads
        self.use_beta, self.allow_neg_eigval, self.qk_norm = use_beta, allow_neg_eigval, qk_norm
        self.qk_l2norm = qk_norm == "l2"
        self._build(
            hidden_size=hidden_size,
            qkv_dims=(key_dim, key_dim, value_dim),
            head_k_dim=key_dim // num_heads,
            head_v_dim=value_dim // num_heads,
            value_dim=value_dim,
            use_gate=use_gate,
            use_short_conv=use_short_conv,
            conv_size=conv_size,
            conv_bias=conv_bias,
            qk_activation=qk_activation,
            norm_eps=norm_eps,
            gate_activation="swish",
            backend=backend,
            device=device,
            dtype=dtype,
        )
        if use_beta:
            self.b_proj = nn.Linear(hidden_size, num_heads, bias=False, device=device, dtype=dtype)

    def _gates(self, x, q):
        beta = self.b_proj(x).sigmoid() if self.use_beta else q.new_ones(q.shape[:-1])
        return (beta * 2 if self.allow_neg_eigval else beta), None

    def _normalise(self, q, k):
        if self.qk_norm == "sum":
            q, k = (F.normalize(u, p=1, dim=-1, eps=1e-6) for u in (q, k))
        return q, k


class GatedDeltaNet(_DeltaRuleMixer, GatedDeltaMixer):
    r"""Gated DeltaNet (arXiv 2412.06464): the delta rule on a state that decays first.

    Per value head, with q, k = l2norm(silu(conv(W x))) and v = silu(conv(W x)):

        S_t = e^{g_t} S_{t-1} + beta_t k_t (v_t - e^{g_t} S_{t-1}^T k_t)^T,   o_t = K^-1/2 S_t^T q_t
        g_t = -exp(A_log) softplus(W_a x_t + dt_bias),   beta_t = sigmoid(W_b x_t)

    and y = W_o norm(o), with norm(o) act(W_g x) if gated. The gate g is computed in float32 (float64 for float64)
    whatever A_log and dt_bias are stored in.

    Args:
        hidden_size: width d of the input and output.
        expand_v: V = expand_v * head_dim.
        head_dim: K, the size of each query and key head.
        num_heads: number of query and key heads H.
        num_v_heads: number of value heads HV, a multiple of H: value head hv reads query and key head hv // (HV // H).
            Default: H.
        use_gate: multiply the normalised output by act(W_g x).
        use_short_conv: put a causal depthwise convolution behind each of the projections.
        allow_neg_eigval: beta = 2 sigmoid(W_b x), so that eigenvalues of the transition reach -1 (arXiv 2411.12537).
        conv_size: the convolutions' number of taps W, 1 to 8.
        conv_bias: give them a bias.
        norm_eps: epsilon of the output norm.
        output_gate_activation: "swish" (or "silu") or "sigmoid".
        backend: as in `fla_ops.delta_rule`, for every op of the layer.
        device, dtype: of all parameters.

    Parameters: `{q,k,v,a,b,o}_proj.weight`, `A_log` and `dt_bias` `[HV]` (marked `_no_weight_decay`, see
    `fla_ops.param_groups`), `{q,k,v}_conv1d.weight` `[dim, 1, W]` and `.bias` (use_short_conv, conv_bias),
    `g_proj.weight` (use_gate), `o_norm.weight` `[V]`. Linears have no bias.

    The state is `LayerState(conv [N, 2 H K + HV V, W - 1], recurrent [N, HV, K, V])`.

    Example:
        >>> import torch
        >>> from fla_ops.layers import GatedDeltaNet
        >>> layer = GatedDeltaNet(hidden_size=64, head_dim=16, num_heads=2, num_v_heads=4, backend="reference")
        >>> x = torch.randn(2, 10, 64)
        >>> mask = torch.ones(2, 10, dtype=torch.bool)
        >>> mask[0, :4] = False                                        # row 0 is padded on the left
        >>> y, state = layer(x, attention_mask=mask, return_state=True)
        >>> torch.allclose(y[0, 4:], layer(x[:1, 4:])[0], atol=1e-5)
        True
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        norm_eps: float = 1e-5,
        output_gate_activation: str = "swish",
        *,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self._build_gated(
            hidden_size=hidden_size,
            expand_v=expand_v,
            head_dim=head_dim,
            num_heads=num_heads,
            num_v_heads=num_v_heads,
            use_forget_gate=True,
            allow_neg_eigval=allow_neg_eigval,
            use_gate=use_gate,
            use_short_conv=use_short_conv,
            conv_size=conv_size,
            conv_bias=conv_bias,
            norm_eps=norm_eps,
            gate_activation=output_gate_activation,
            backend=backend,
            device=device,
            dtype=dtype,
        )
