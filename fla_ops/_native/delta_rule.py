# SPDX-License-Identifier: Apache-2.0
"""The native backend of the delta rule: `csrc/delta_rule_{cpu.cpp,cuda.cu}` behind `torch.ops.fla_ops`."""

import torch

from fla_ops import _native

_OPS = ("delta_rule_forward", "delta_rule_backward", "delta_rule_step")
_load_error = _native.load(*_OPS)
MAX_HEAD_DIM = 256
BLOCK = 64  # tokens per saved state


def why_not(device: str, dtype: torch.dtype, *sizes: int) -> str | None:
    """The reason why this backend cannot run head dimensions `sizes`, or None."""
    missing = _native.load_cuda(*_OPS) if device == "cuda" else _load_error
    if missing:
        return missing
    if any(s > MAX_HEAD_DIM for s in sizes):
        return f"head dimensions go up to {MAX_HEAD_DIM}, got {max(sizes)}"
    return None


def _rows(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The kernels take any outer strides and need each row contiguous."""
    return tuple(t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _widened(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether to compute float32 tensors in float64.

    With a handful of channels many keys of a chunk are parallel, and a product of (1 - beta) cancels to less than the
    rounding of the chunk's sums; the step loop, which sums nothing, keeps it. For such heads float64 costs little.
    The CUDA kernels are that loop.
    """
    return q.device.type == "cpu" and q.dtype == torch.float32 and min(q.shape[-1], v.shape[-1]) <= 8


def forward(q, k, v, beta, g, initial_state, cu_seqlens, *, scale, qk_l2norm, save_states):
    """(o, final_state, states): `states` are the checkpoints that `backward` starts from, empty unless asked for."""
    narrow = _widened(q, v)
    if narrow:
        q, k, v = q.double(), k.double(), v.double()
    q, k, v, initial_state = _rows(q, k, v, initial_state)
    o, final_state, states = _native.ops.delta_rule_forward(
        q, k, v, beta, g, scale, initial_state, cu_seqlens, qk_l2norm, save_states
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
    scale,
    qk_l2norm,
    needs,
):
    """Gradients of q, k, v, beta, g and initial_state, None where `needs` is False."""
    narrow = _widened(q, v)
    if narrow:
        q, k, v, do = q.double(), k.double(), v.double(), do.double()
    q, k, v, do, initial_state, dfinal_state = _rows(q, k, v, do, initial_state, dfinal_state)
    mask = sum(bit << i for i, bit in enumerate(needs))
    grads = _native.ops.delta_rule_backward(
        q,
        k,
        v,
        beta,
        g,
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
    q, k, v, rows = _rows(q, k, v, state)
    o = _native.ops.delta_rule_step(q, k, v, beta, g, rows, scale, qk_l2norm, state_indices)
    if rows is not state:  # a transposed view: the kernel wrote a copy
        state.copy_(rows)
    return o


def register_fakes(namespace: str = "fla_ops") -> None:
    """Shapes and dtypes for torch.compile and FakeTensor."""

    def accumulator(q):
        return torch.promote_types(q.dtype, torch.float32)

    @torch.library.register_fake(f"{namespace}::delta_rule_forward")
    def _(q, k, v, beta, g, scale, initial_state, cu_seqlens, qk_l2norm, save_states):
        B, T, _, K = q.shape
        HV, V = v.shape[2:]
        N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        per_row = (T + BLOCK - 1) // BLOCK
        blocks = B * per_row if cu_seqlens is None else per_row + N
        o = v.new_empty(B, T, HV, V)
        final = v.new_empty(N, HV, K, V, dtype=accumulator(q))
        saved = (blocks, HV, K, V) if save_states else (0,)
        return o, final, v.new_empty(saved, dtype=accumulator(q))

    @torch.library.register_fake(f"{namespace}::delta_rule_backward")
    def _(q, k, v, beta, g, scale, initial_state, cu_seqlens, qk_l2norm, states, do, dfinal, needs):
        N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = v.new_empty(N, v.shape[2], q.shape[3], v.shape[3], dtype=accumulator(q))
        shapes = (q, k, v, beta, q.new_empty(0) if g is None else g, state)
        return tuple(x.new_empty(x.shape if needs >> i & 1 else (0,)) for i, x in enumerate(shapes))

    @torch.library.register_fake(f"{namespace}::delta_rule_step")
    def _(q, k, v, beta, g, state, scale, qk_l2norm, state_indices):
        return v.new_empty(v.shape)


if _load_error is None:
    register_fakes()
