# SPDX-License-Identifier: Apache-2.0
"""The native backend of temporal-sparse attention: `csrc/temporal_sparse_attention_{cpu.cpp,cuda.cu}` behind
`torch.ops.fla_ops`.

The threshold is a contiguous `[HK, D]` in float32 (float64 for float64).
"""

import torch

from fla_ops import _native

_OPS = ("temporal_sparse_attention_forward", "temporal_sparse_attention_backward")
_load_error = _native.load(*_OPS)
MAX_HEAD_DIM = 256


def why_not(device: str, dtype: torch.dtype, *sizes: int) -> str | None:
    """The reason why this backend cannot run head dimensions `sizes`, or None."""
    missing = _native.load_cuda(*_OPS) if device == "cuda" else _load_error
    if missing:
        return missing
    if any(s > MAX_HEAD_DIM for s in sizes):
        return f"head dimensions go up to {MAX_HEAD_DIM}, got {max(sizes)}"
    return None


def _rows(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The kernels take any outer strides and need each row contiguous."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def forward(q, k, v, threshold, cu_seqlens, *, window, sink, window_mode, scale, dense, count_fired):
    """(o, norms, fired): `backward` takes `norms`, each softmax's maximum and the inverse of its sum; `fired`
    `[B, HK, T]` is empty where neither asked for nor needed."""
    q, k, v = _rows(q, k, v)
    blocks = window_mode == "block"
    return _native.ops.temporal_sparse_attention_forward(
        q, k, v, threshold, cu_seqlens, scale, window, blocks, sink, not dense, count_fired
    )


def backward(
    q, k, v, threshold, cu_seqlens, o, norms, do, *, window, sink, window_mode, scale, dense, needs
):  # fmt: skip
    """Gradients of q, k and v, None where `needs` is False."""
    q, k, v, do = _rows(q, k, v, do)
    mask = sum(bit << i for i, bit in enumerate(needs))
    blocks = window_mode == "block"
    grads = _native.ops.temporal_sparse_attention_backward(
        q, k, v, threshold, cu_seqlens, scale, window, blocks, sink, not dense, o, norms, do, mask
    )
    return [d if need else None for d, need in zip(grads, needs, strict=True)]


def register_fakes(namespace: str = "fla_ops") -> None:
    """Shapes and dtypes for torch.compile and FakeTensor."""

    def exact(q):
        return torch.promote_types(q.dtype, torch.float32)

    @torch.library.register_fake(f"{namespace}::temporal_sparse_attention_forward")
    def _(q, k, v, threshold, cu_seqlens, scale, window, blocks, sink, holds, count_fired):
        B, Tq, HQ = q.shape[:3]
        counts = (B, k.shape[2], k.shape[1]) if holds or count_fired else (0,)
        norms = q.new_empty(B, HQ, Tq, 2, dtype=exact(q))
        return q.new_empty(B, Tq, HQ, v.shape[3]), norms, q.new_empty(counts, dtype=torch.int32)

    @torch.library.register_fake(f"{namespace}::temporal_sparse_attention_backward")
    def _(q, k, v, threshold, cu_seqlens, scale, window, blocks, sink, holds, o, norms, do, needs):
        return tuple(x.new_empty(x.shape if needs >> i & 1 else 0) for i, x in enumerate((q, k, v)))


if _load_error is None:
    register_fakes()
