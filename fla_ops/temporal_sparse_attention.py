# SPDX-License-Identifier: Apache-2.0
"""DeltaLLM's temporal-sparse attention: the public function and its autograd boundary."""

from typing import NamedTuple

import torch

from . import _checks, _sparse_options
from ._autograd import first_order_only
from ._backend import Backend, resolve
from .reference.temporal_sparse_attention import statistics

_BACKENDS = (
    Backend(
        "triton", "fla_ops.kernels.temporal_sparse_attention", ("cuda",), on_request=("cpu",), switch="TRITON_INTERPRET"
    ),
    Backend("native", "fla_ops._native.temporal_sparse_attention", devices=("cpu", "cuda")),
    Backend("reference", "fla_ops.reference.temporal_sparse_attention"),
)


class TemporalSparseStats(NamedTuple):
    zeros: torch.Tensor
    skipped: torch.Tensor


class TemporalSparseAttentionOutput(NamedTuple):
    o: torch.Tensor
    stats: TemporalSparseStats | None


class _TemporalSparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, threshold, cu_seqlens, options, count_fired, backend, grad_mode):
        impl = resolve("temporal_sparse_attention", backend, q.device.type, q.dtype, q.shape[-1], v.shape[-1])
        o, norms, fired = impl.forward(q, k, v, threshold, cu_seqlens, **options, count_fired=count_fired)
        if grad_mode and any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v, threshold, cu_seqlens, o, norms)
            ctx.options, ctx.impl = options, impl
        ctx.mark_non_differentiable(fired)
        return o, fired

    @staticmethod
    @first_order_only("temporal_sparse_attention")
    def backward(ctx, do, _):
        grads = ctx.impl.backward(*ctx.saved_tensors, do, **ctx.options, needs=ctx.needs_input_grad[:3])
        return *grads, None, None, None, None, None, None


def temporal_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    threshold: float | torch.Tensor,
    window: int | float,
    sink: int = 0,
    window_mode: str = "band",
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_stats: bool = False,
    backend: str = "auto",
) -> TemporalSparseAttentionOutput:
    r"""Causal softmax attention whose keys, far from a query, are held until they move. Differentiable in q, k and v.

    Each channel of each key head holds the last key that it transmitted,

        k_hat_t = k_t where not |k_t - k_hat_{t-1}| <= threshold, else k_hat_{t-1};   k_hat_0 = k_0
        s_ij = scale q_i . (k_j if j is in the window of i or j < sink, else k_hat_j)
        o_i = sum over j <= i of softmax_j(s_ij) v_j

    (DeltaLLM, arXiv 2507.19608). A score is off by at most scale sum_c threshold_c |q_c|; with a threshold of 0, or a
    window of T, this is exact attention. The gradient of a held key goes to the key that was transmitted; what fires is
    taken as given.

    Args:
        q: queries, `[B, Tq, HQ, D]`, the last Tq positions of the keys'. D from 1 to 256 (larger runs on the
            reference).
        k: keys, after any rotary embedding, `[B, T, HK, D]`, T >= Tq; HQ a multiple of HK. Query head h reads key and
            value head `h // (HQ // HK)`.
        v: values, `[B, T, HK, DV]`, DV from 1 to 256. q, k and v share one of float32, bfloat16, float16, float64.
        threshold: a number >= 0, or a floating tensor that broadcasts to `[HK, D]`. It is compared in float32 (float64
            for float64), and has no gradient.
        window: how many tokens a query sees exactly, itself among them: an int >= 1, or a float in (0, 1], the share of
            T, rounded to at least one token. With cu_seqlens an int.
        sink: how many of the first keys are always exact. They move the hold like any others.
        window_mode: "band", query i sees keys j > i - window exactly, or "block", those with i // window == j //
            window, as the authors' code.
        scale: multiplies the scores; default `D ** -0.5`.
        cu_seqlens: int32 or int64 `[N + 1]`, the boundaries of N packed sequences from 0 to T; needs B = 1 and Tq = T.
            Sequences may be empty.
        return_stats: also return the statistics.
        backend: "auto", "triton", "native" or "reference"; a named one runs or raises.

    Returns:
        `(o, stats)`: o `[B, Tq, HQ, DV]` in q's dtype. stats, or None, is `(zeros, skipped)`, float64 `[N, HK]` each
        (N = B without cu_seqlens): the share of k_hat's changes that are zero, all of k_hat_0 counting as changed; and
        the share of the multiply-adds of q k^T, against dense causal attention, that the zeros save. A score in the
        window or of a sink saves none.

    Raises:
        ValueError, TypeError: a wrong shape, value, dtype or type; the message names the argument.
        RuntimeError: the named backend cannot run; the message says why.
    """
    op = "temporal_sparse_attention"
    q, k, v = _checks.autocast(q, k, v)
    _check_tensors(op, q, k, v)
    B, Tq, HQ, D = q.shape
    T, HK = k.shape[1:3]
    scale = _checks.scale_or_default(op, scale, D)
    _checks.flag(op, "return_stats", return_stats)
    cu_seqlens = _checks.cu_seqlens(op, cu_seqlens, B, T, q.device)
    if cu_seqlens is not None and Tq != T:
        raise _checks.bad(ValueError, op, "q", f"of T={T} tokens with cu_seqlens", Tq)
    window = _sparse_options.window(op, window)
    if isinstance(window, float) and cu_seqlens is not None:
        hint = "A share of which sequence would depend on what is packed with it."
        raise _checks.bad(ValueError, op, "window", "an int with cu_seqlens", window, hint)
    window = _sparse_options.in_tokens(window, T)
    _checks.count(op, "sink", sink, 0)
    _sparse_options.window_mode(op, window_mode)
    threshold, all_zero = _sparse_options.threshold(op, threshold)
    if isinstance(threshold, torch.Tensor):
        _checks.same_device(op, "q", q=q, threshold=threshold)
    threshold = _sparse_options.per_channel(op, threshold, k)
    dense = all_zero or window >= T
    options = {"window": window, "sink": sink, "window_mode": window_mode, "scale": scale}
    impl = resolve(op, backend, q.device.type, q.dtype, D, v.shape[3])
    if hasattr(impl, op):  # the reference: plain torch, differentiable as it is
        o, fired = impl.temporal_sparse_attention(q, k, v, threshold=threshold, cu_seqlens=cu_seqlens, **options)
    else:
        grad_mode = torch.is_grad_enabled()  # always off inside of a Function's forward
        options["dense"] = dense
        o, fired = _TemporalSparseAttention.apply(
            q, k, v, threshold, cu_seqlens, options, return_stats, backend, grad_mode
        )
    stats = None
    if return_stats:
        geometry = {"window": window, "sink": sink, "window_mode": window_mode, "dense": dense}
        stats = TemporalSparseStats(*statistics(fired, D, Tq, **geometry, cu_seqlens=cu_seqlens))
    return TemporalSparseAttentionOutput(o, stats)


def _check_tensors(op, q, k, v) -> None:
    _checks.main_tensors(op, "q", q=q, k=k, v=v)
    _checks.shape(op, "q", q, {"B": None, "Tq": None, "HQ": None, "D": None})
    B, Tq, HQ, D = q.shape
    _checks.shape(op, "k", k, {"B": B, "T": None, "HK": None, "D": D})
    T, HK = k.shape[1:3]
    _checks.shape(op, "v", v, {"B": B, "T": T, "HK": HK, "DV": None}, "Its leading sizes are those of k.")
    if HK == 0 or HQ == 0 or HQ % HK:
        raise _checks.bad(ValueError, op, "q", f"of a head count that is a multiple of HK={HK}", f"HQ={HQ}")
    if D == 0 or v.shape[3] == 0:
        raise _checks.bad(ValueError, op, "q" if D == 0 else "v", "of a head dimension >= 1", 0)
    if Tq > T:
        hint = "Queries are the last Tq positions of the keys'."
        raise _checks.bad(ValueError, op, "q", f"of at most T={T} tokens, as k has", f"Tq={Tq}", hint)
