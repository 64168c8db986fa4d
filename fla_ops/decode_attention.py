# SPDX-License-Identifier: Apache-2.0
"""Dense attention of the newest tokens over a cache of keys and values: the baseline of DeltaLLM's sparse cache."""

import torch

from . import _checks
from ._backend import Backend, resolve

_BACKENDS = (
    Backend("triton", "fla_ops.kernels.decode_attention", ("cuda",), on_request=("cpu",), switch="TRITON_INTERPRET"),
    Backend("native", "fla_ops._native.decode_attention", devices=("cpu",)),
    Backend("reference", "fla_ops.reference.decode_attention"),
)


def exact_decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Causal softmax attention of the newest tokens over a whole cache, for inference.

    o_i = softmax(scale q_i K^T) V over the keys up to token i's own (arXiv 1706.03762, equation 1). The queries are
    the last Tq positions, causal among themselves; query head h reads key head h // (HQ / HK). The cost is one read of
    the cache.

    Args:
        q: queries, `[B, Tq, HQ, D]`, or one step's `[B, HQ, D]`. HQ is a multiple of HK.
        k: keys, `[B, T, HK, D]`; v: values, `[B, T, HK, DV]`. Caches may be slices of larger buffers, in any layout;
            they are not copied while their last dimension has unit stride. q, k, v share one of float32, bfloat16,
            float16, float64.
        lengths: int32 or int64 `[B]`, the valid keys of each row, the newest token's among them. None: all of T. What
            lies behind is never read. A query before the row's first key, where a length is below Tq, gives 0.
        scale: of the scores, default D**-0.5.
        backend: "auto", "triton", "native" or "reference"; a named one runs or raises.

    Returns:
        o `[B, Tq, HQ, DV]`, or `[B, HQ, DV]` for a step, in q's dtype; the arithmetic is float32 (float64 for float64).

    Raises:
        ValueError, TypeError: a wrong shape, value, dtype or type; the message names the argument.
        RuntimeError: an input requires a gradient while grad mode is on; or the named backend cannot run.
    """
    op = "exact_decode_attention"
    _checks.inference_only(op, "Use torch.nn.functional.scaled_dot_product_attention to train.", q, k, v)
    q, k, v = _checks.autocast(q, k, v)
    _checks.main_tensors(op, "q", q=q, k=k, v=v)
    step = q.dim() == 3
    if step:
        q = q.unsqueeze(1)
    _check_shapes(op, q, k, v)
    scale = _checks.scale_or_default(op, scale, q.shape[3])
    lengths = _checks.lengths(op, lengths, q.shape[0], k.shape[1], q.device)
    impl = resolve("decode_attention", backend, q.device.type, q.dtype, q.shape[3], v.shape[3])
    run = impl.decode_attention if hasattr(impl, "decode_attention") else impl.forward
    o = run(q, k, v, lengths=lengths, scale=scale)
    return o.squeeze(1) if step else o


def _check_shapes(op, q, k, v) -> None:
    if q.dim() != 4:
        raise _checks.bad(ValueError, op, "q", "of shape [B, Tq, HQ, D] or [B, HQ, D]", list(q.shape))
    batch, tokens, heads, D = q.shape
    _checks.shape(op, "k", k, {"B": batch, "T": None, "HK": None, "D": D}, lambda: _hint(k, heads))
    _checks.shape(op, "v", v, {"B": batch, "T": k.shape[1], "HK": k.shape[2], "DV": None})
    if D == 0 or v.shape[3] == 0:
        raise _checks.bad(ValueError, op, "v" if D else "q", "of a head dimension >= 1", 0)
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise _checks.bad(ValueError, op, "q", f"of a head count that is a multiple of HK={k.shape[2]}", heads)
    if k.shape[1] < tokens:
        hint = "The cache holds the new tokens too: append their keys first."
        raise _checks.bad(ValueError, op, "k", f"of at least Tq={tokens} keys", f"T={k.shape[1]}", hint)


def _hint(k, heads) -> str:
    """What is likely meant by a wrong shape."""
    if k.dim() == 4 and 0 < k.shape[1] <= heads < k.shape[2]:
        return "It looks like [B, HK, T, D]: transpose(1, 2)."
    return ""
