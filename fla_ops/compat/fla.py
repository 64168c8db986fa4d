# SPDX-License-Identifier: Apache-2.0
"""fla-core 0.6 (`fla.ops.{delta_rule,gated_delta_rule,gated_delta_product}`, `fla.modules.causal_conv1d`) on fla_ops.

    from fla.ops.gated_delta_rule import chunk_gated_delta_rule    # before
    from fla_ops.compat.fla import chunk_gated_delta_rule          # after

Names, order and defaults of the arguments are fla's. What differs: CPU tensors, float32 and float64 work everywhere;
every function has a backward; value heads may be grouped in the plain rule and in DeltaProduct too; the chunk size is
ours whatever is asked for; an unknown keyword is a TypeError where fla ignores it.
"""

import warnings

import torch
from torch.nn import functional as F

from .. import _checks
from .._backend import warn_reference
from ..causal_conv1d import causal_conv1d as _causal_conv1d
from ..delta_product import delta_product
from ..delta_rule import check_tokens, delta_rule
from ..layers._gates import decay_gate
from ..reference.delta_rule_general import delta_rule_general
from . import _conv_cache

CHUNK_SIZES = (16, 32, 64)


def chunk_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The delta rule (`fla_ops.delta_rule`): (o `[B, T, H, V]`, final state `[N, H, K, V]` in float32, or None).

    q, k `[B, T, H, K]`, v `[B, T, H, V]`, beta `[B, T, H]`. `cu_seqlens_cpu` is not needed and ignored; `chunk_size`
    must be 16, 32 or 64 and is ignored.
    """
    _check_chunk_size("chunk_delta_rule", chunk_size)
    return tuple(
        delta_rule(
            q,
            k,
            v,
            _side(beta, q),
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            qk_l2norm=use_qk_l2norm_in_kernel,
        )
    )


def fused_recurrent_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `chunk_delta_rule`; beta may also be `[B, T, H, V]`, one strength a value channel (on the reference), or None
    for ones.
    """
    return _run(
        "fused_recurrent_delta_rule",
        q,
        k,
        v,
        beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        qk_l2norm=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
    )


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    cp_context: object = None,
    *,
    chunk_size: int = 64,
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    transpose_state_layout: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule: (o `[B, T, HV, V]`, final state in float32, or None).

    q, k `[B, T, H, K]`, v `[B, T, HV, V]`, g (natural-log decay) and beta `[B, T, HV]`.

    Args:
        use_beta_sigmoid_in_kernel: beta holds logits: sigmoid(beta) is used, 2 sigmoid(beta) with `allow_neg_eigval`.
        use_gate_in_kernel: g holds the gate's input: -exp(A_log) softplus(g + dt_bias) is used, A_log, dt_bias `[HV]`.
        state_v_first: states are `[N, HV, V, K]` instead of `[N, HV, K, V]`, in and out, as transposed views.
        transpose_state_layout: old name of `state_v_first` (DeprecationWarning).
        cu_seqlens_cpu, chunk_indices: not needed and ignored. chunk_size: 16, 32 or 64, ignored.
        cp_context: context parallelism is not supported: NotImplementedError unless None.
    """
    op = "chunk_gated_delta_rule"
    _check_chunk_size(op, chunk_size)
    _refuse_context_parallel(op, cp_context)
    return _run(
        op,
        q,
        k,
        v,
        _beta(op, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval),
        _gate(op, g, use_gate_in_kernel, A_log, dt_bias),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        qk_l2norm=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
        state_v_first=_state_v_first(op, state_v_first, transpose_state_layout),
    )


def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    gk: torch.Tensor | None = None,
    gv: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    transpose_state_layout: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `chunk_gated_delta_rule`, and differentiable (fla's has no backward). Mind the order: beta comes after gv.

    gk `[B, T, HV, K]` and gv `[B, T, HV, V]` are natural-log decays per key and per value channel, beta may be
    `[B, T, HV, V]`; these three run on the reference. beta None stands for ones.
    """
    op = "fused_recurrent_gated_delta_rule"
    return _run(
        op,
        q,
        k,
        v,
        _beta(op, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval),
        _gate(op, g, use_gate_in_kernel, A_log, dt_bias),
        gk,
        gv,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        qk_l2norm=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
        state_v_first=_state_v_first(op, state_v_first, transpose_state_layout),
    )


def chunk_gated_delta_product(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    num_householder: int,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    cp_context: object = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """DeltaProduct (`fla_ops.delta_product`): (o `[B, T, HV, V]`, final state `[N, HV, K, V]` in float32, or None).

    q `[B, T, H, K]`, k `[B, T * n, H, K]`, v `[B, T * n, HV, V]`, beta `[B, T * n, HV]`, with the n = num_householder
    micro-steps of a token behind one another. g `[B, T, HV]` is the natural-log decay; None stands for none. cu_seqlens
    counts tokens. `cu_seqlens_cpu` is not needed and ignored; context parallelism is not supported:
    NotImplementedError unless `cp_context` is None.
    """
    _refuse_context_parallel("chunk_gated_delta_product", cp_context)
    return tuple(
        delta_product(
            q,
            k,
            v,
            _side(beta, q),
            _side(g, q),
            num_householder=num_householder,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            qk_l2norm=use_qk_l2norm_in_kernel,
        )
    )


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool | None = False,
    activation: str | None = None,
    backend: str | None = "triton",
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    cp_context: object = None,
    *,
    seq_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal depthwise convolution: (activation(conv(x)) + residual, final state `[N, D, W]` in x's dtype, or None).

    x and residual `[B, T, D]` or `[B, T, H, d]` with H d = D, weight `[D, W]`, bias `[D]`, states `[N, D, W]`: the last
    W inputs, of which the convolution reads W - 1. `backend` must be one of fla's names and is ignored, as are
    `cu_seqlens_cpu`, `chunk_indices` and `seq_idx`, which fla derives from cu_seqlens and needs beside it.
    """
    op = "causal_conv1d"
    _refuse_context_parallel(op, cp_context)
    if backend not in ("triton", "cuda", "mix"):
        raise _checks.bad(ValueError, op, "backend", '"triton", "cuda" or "mix"', repr(backend))
    if seq_idx is not None and cu_seqlens is None:
        raise _checks.bad(ValueError, op, "seq_idx", "given together with cu_seqlens", "seq_idx alone")
    _checks.tensor(op, "weight", weight)
    _checks.tensor(op, "x", x)
    if x.dim() not in (3, 4):
        raise _checks.bad(ValueError, op, "x", "of shape [B, T, D] or [B, T, H, d]", list(x.shape))
    tokens = x.flatten(2)
    cu_seqlens = _checks.cu_seqlens(op, cu_seqlens, *tokens.shape[:2], x.device)
    if initial_state is not None:
        N = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _checks.initial_state(op, initial_state, {"N": N, "D": tokens.shape[2], "W": weight.shape[-1]}, x.device)
    y, _ = _causal_conv1d(
        tokens.transpose(1, 2),
        _conv_cache.weight_for(x, weight),
        _conv_cache.weight_for(x, bias),
        activation=activation,
        initial_state=None if initial_state is None else initial_state[:, :, 1:],
        cu_seqlens=cu_seqlens,
    )
    y = y.transpose(1, 2).reshape(x.shape)
    if residual is not None:
        y = y + residual.reshape(x.shape)
    final_state = None
    if output_final_state:
        final_state = _last_columns(tokens, initial_state, weight.shape[1], cu_seqlens)
    return y, final_state


@torch.no_grad()
def causal_conv1d_update(
    x: torch.Tensor,
    cache: torch.Tensor,
    residual: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a sequence: (activation(conv) + residual, cache). All W columns of `cache` `[N, D, W]` are updated in
    place. x and residual `[N, D]`, `[N, 1, D]`, `[1, N, D]`, the last dimension possibly split in two. As fla's it has
    no backward, and records no gradient.
    """
    op = "causal_conv1d_update"
    for name, value in (("x", x), ("cache", cache), ("weight", weight)):
        _checks.tensor(op, name, value)
    _checks.shape(op, "weight", weight, {"D": None, "W": None})
    D, W = weight.shape
    if x.numel() % D:
        raise _checks.bad(ValueError, op, "x", f"of shape [N, D={D}]", list(x.shape))
    tokens = x.reshape(-1, D)
    _checks.shape(op, "cache", cache, {"N": tokens.shape[0], "D": D, "W": W})
    y = _conv_cache.step(tokens, cache, weight, bias, activation).reshape(x.shape)
    return (y if residual is None else y + residual.reshape(x.shape)), cache


def _run(
    op,
    q,
    k,
    v,
    beta,
    g=None,
    gk=None,
    gv=None,
    *,
    scale,
    initial_state,
    output_final_state,
    qk_l2norm,
    cu_seqlens,
    state_v_first=False,
):
    """`delta_rule`, or the reference's general loop where an option needs it."""
    if beta is None:
        beta = v.new_ones(v.shape[:3])
    beta, g, gk, gv = (None if t is None else _side(t, q) for t in (beta, g, gk, gv))
    if state_v_first and initial_state is not None:
        initial_state = initial_state.transpose(-1, -2)
    options = {"initial_state": initial_state, "cu_seqlens": cu_seqlens, "qk_l2norm": qk_l2norm}
    if gk is None and gv is None and beta.dim() == 3:
        options["output_final_state"] = output_final_state
        o, final_state = delta_rule(q, k, v, beta, g, scale=scale, **options)
    else:
        q, k, v = _checks.autocast(q, k, v)
        B, T, H, K = q.shape
        HV, V = v.shape[2:]
        vector = beta.dim() == 4
        if vector:
            _checks.shape(op, "beta", beta, {"B": B, "T": T, "HV": HV, "V": V})
        check_tokens(op, q, k, v, beta[..., 0] if vector else beta, g, "T")
        for name, gate, size in (("gk", gk, {"K": K}), ("gv", gv, {"V": V})):
            if gate is not None:
                _checks.shape(op, name, gate, {"B": B, "T": T, "HV": HV} | size)
        _checks.same_device(op, "q", q=q, beta=beta, gk=gk, gv=gv)
        cu_seqlens = options["cu_seqlens"] = _checks.cu_seqlens(op, cu_seqlens, B, T, q.device)
        N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _checks.initial_state(op, initial_state, {"N": N, "HV": HV, "K": K, "V": V}, q.device)
        warn_reference(op, "gk, gv and a beta per value channel have no kernel")
        scale = _checks.scale_or_default(op, scale, K)
        o, final_state = delta_rule_general(q, k, v, beta, g, gk, gv, scale=scale, **options)
    if not output_final_state:
        return o, None
    return o, final_state.transpose(-1, -2) if state_v_first else final_state


def _side(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """A gate in a dtype that the op takes beside q: q's own or float32."""
    low = isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16, torch.float64)
    return x.to(torch.promote_types(q.dtype, torch.float32)) if low and x.dtype != q.dtype else x


def _beta(op, beta, use_sigmoid, allow_neg_eigval):
    if allow_neg_eigval and not use_sigmoid:
        expected = "given together with use_beta_sigmoid_in_kernel=True"
        raise _checks.bad(ValueError, op, "allow_neg_eigval", expected, "use_beta_sigmoid_in_kernel=False")
    if not use_sigmoid or beta is None:
        return beta
    beta = beta.to(torch.promote_types(beta.dtype, torch.float32)).sigmoid()
    return 2 * beta if allow_neg_eigval else beta


def _gate(op, g, use_gate, A_log, dt_bias):
    if not use_gate:
        return g
    for name, value in (("A_log", A_log), ("g", g)):
        if value is None:
            raise _checks.bad(ValueError, op, name, "given with use_gate_in_kernel=True", None)
    return decay_gate(g, A_log, dt_bias)


def _state_v_first(op, state_v_first, transpose_state_layout):
    if transpose_state_layout is None:
        return state_v_first
    if state_v_first:
        raise ValueError(f"{op}: give argument 'state_v_first' only; 'transpose_state_layout' is its old name.")
    message = f"{op}: argument 'transpose_state_layout' is now called 'state_v_first'."
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return transpose_state_layout


def _check_chunk_size(op, chunk_size):
    if chunk_size not in CHUNK_SIZES:
        raise _checks.bad(ValueError, op, "chunk_size", "16, 32 or 64", chunk_size)


def _refuse_context_parallel(op, cp_context):
    if cp_context is not None:
        raise NotImplementedError(f"{op}: argument 'cp_context' must be None, context parallelism is not supported.")


def _last_columns(tokens, initial_state, W, cu_seqlens):
    """The last W inputs of each sequence `[N, D, W]`, those before its start from the initial state or zero."""
    if cu_seqlens is None:
        front = tokens.new_zeros(tokens.shape[0], tokens.shape[2], W)
        front = front if initial_state is None else initial_state.to(tokens.dtype)
        return torch.cat([front, tokens[:, -W:].transpose(1, 2)], 2)[:, :, -W:]
    # Packed: column w of sequence n is token end - W + w if that is not before its start.
    start, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    place = end - W + torch.arange(W, device=tokens.device)
    padded = F.pad(tokens[0], (0, 0, 0, 1))  # one more row: something to read when there are no tokens
    columns = padded[place.clamp(min=0)].transpose(1, 2)
    if initial_state is None:
        return torch.where((place >= start)[:, None], columns, 0)
    shifted = (place - start + W).clamp(0, W - 1)[:, None].expand_as(initial_state)
    front = initial_state.to(tokens.dtype).gather(2, shifted.long())
    return torch.where((place >= start)[:, None], columns, front)
