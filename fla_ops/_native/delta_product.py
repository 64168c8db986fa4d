# SPDX-License-Identifier: Apache-2.0
"""The native backend of DeltaProduct: `csrc/delta_product_{cpu.cpp,cuda.cu}` behind `torch.ops.fla_ops`."""

import torch

from fla_ops import _native

from . import delta_rule
from .delta_rule import BLOCK

_OPS = ("delta_product_forward", "delta_product_backward", "delta_product_step")
_load_error = _native.load(*_OPS)


def why_not(device: str, dtype: torch.dtype, *sizes: int) -> str | None:
    """The reason why this backend cannot run head dimensions `sizes`, or None."""
    missing = _native.load_cuda(*_OPS) if device == "cuda" else _load_error
    return missing or delta_rule.why_not(device, dtype, *sizes)


def forward(q, k, v, beta, g, initial_state, cu_seqlens, *, num_householder, scale, qk_l2norm, save_states):
    """(o, final_state, states): `states` are the checkpoints that `backward` starts from, empty unless asked for."""
    narrow = delta_rule._widened(q, v)
    if narrow:
        q, k, v = q.double(), k.double(), v.double()
    q, k, v, initial_state = delta_rule._rows(q, k, v, initial_state)
    o, final_state, states = _native.ops.delta_product_forward(
        q, k, v, beta, g, num_householder, scale, initial_state, cu_seqlens, qk_l2norm, save_states
    )
    return (o.float(), final_state.float(), states) if narrow else (o, final_state, states)


def backward(
    q,
    k,
    v,
    beta,
    g,
    initial_state,
    cu_seqlens,
    states,
    do,
    dfinal_state,
    *,
    num_householder,
    scale,
    qk_l2norm,
    needs,
):
    """Gradients of q, k, v, beta, g and initial_state, None where `needs` is False."""
    narrow = delta_rule._widened(q, v)
    if narrow:
        q, k, v, do = q.double(), k.double(), v.double(), do.double()
    q, k, v, do, initial_state, dfinal_state = delta_rule._rows(q, k, v, do, initial_state, dfinal_state)
    mask = sum(bit << i for i, bit in enumerate(needs))
    grads = _native.ops.delta_product_backward(
        q,
        k,
        v,
        beta,
        g,
        num_householder,
        scale,
        initial_state,
        cu_seqlens,
        qk_l2norm,
        states,
        do,
        dfinal_state,
        mask,
    )
    grads = [d if need else None for d, need in zip(grads, needs, strict=True)]
    if narrow:
        grads[:3] = (None if d is None else d.float() for d in grads[:3])
    if grads[5] is not None:
        grads[5] = grads[5].to(initial_state.dtype)
    return grads


def step(q, k, v, beta, g, *, state, scale, qk_l2norm, state_indices):
    """o; `state` is written in place."""
    q, k, v, rows = delta_rule._rows(q, k, v, state)
    o = _native.ops.delta_product_step(q, k, v, beta, g, rows, scale, qk_l2norm, state_indices)
    if rows is not state:  # a transposed view: the kernel wrote a copy
        state.copy_(rows)
    return o


def register_fakes(namespace: str = "fla_ops") -> None:
    """Shapes and dtypes for torch.compile and FakeTensor."""

    def accumulator(q):
        return torch.promote_types(q.dtype, torch.float32)

    @torch.library.register_fake(f"{namespace}::delta_product_forward")
    def _(q, k, v, beta, g, num_householder, scale, initial_state, cu_seqlens, qk_l2norm, save_states):
        B, T, _, K = q.shape
        HV, V = v.shape[2:]
        N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        per_row = (T + BLOCK - 1) // BLOCK
        blocks = B * per_row if cu_seqlens is None else per_row + N
        o = v.new_empty(B, T, HV, V)
        final = v.new_empty(N, HV, K, V, dtype=accumulator(q))
        saved = (blocks, HV, K, V) if save_states else (0,)
        return o, final, v.new_empty(saved, dtype=accumulator(q))

    @torch.library.register_fake(f"{namespace}::delta_product_backward")
    def _(q, k, v, beta, g, num_householder, scale, initial_state, cu_seqlens, qk_l2norm, states, do, dfinal, needs):
        N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = v.new_empty(N, v.shape[2], q.shape[3], v.shape[3], dtype=accumulator(q))
        shapes = (q, k, v, beta, q.new_empty(0) if g is None else g, state)
        return tuple(x.new_empty(x.shape if needs >> i & 1 else (0,)) for i, x in enumerate(shapes))

    @torch.library.register_fake(f"{namespace}::delta_product_step")
    def _(q, k, v, beta, g, state, scale, qk_l2norm, state_indices):
        return v.new_empty(v.shape[0], *v.shape[2:])


if _load_error is None:
    register_fakes()
