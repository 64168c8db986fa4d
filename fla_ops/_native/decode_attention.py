# SPDX-License-Identifier: Apache-2.0
"""The native backend of decode attention: `csrc/decode_attention_cpu.cpp` behind `torch.ops.fla_ops`."""

import torch

from fla_ops import _native

_OPS = ("decode_attention",)
_load_error = _native.load(*_OPS)


def why_not(device: str, dtype: torch.dtype, *sizes: int) -> str | None:
    """The reason why this backend cannot run, or None."""
    return _load_error


def forward(q, k, v, *, lengths, scale):
    """o; q is `[B, Tq, HQ, D]`. The kernels take any strides but that of the last dimension, which is copied."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _native.ops.decode_attention(q, k, v, lengths, scale)


def register_fakes(namespace: str = "fla_ops") -> None:
    """Shapes and dtypes for torch.compile and FakeTensor."""

    @torch.library.register_fake(f"{namespace}::decode_attention")
    def _(q, k, v, lengths, scale):
        return q.new_empty(*q.shape[:3], v.shape[3])


if _load_error is None:
    register_fakes()
