# SPDX-License-Identifier: Apache-2.0
"""The native backend of the selective scan: `csrc/selective_scan_{cpu.cpp,cuda.cu}` behind `torch.ops.fla_ops`.

B and C are `[B, G, N, L]` or `[Di, N]`, in the main dtype or float32; in a step `[B, G, N]`, or on the CPU `[B, N]`.
"""

import torch

from fla_ops import _native

_OPS = ("selective_scan_forward", "selective_scan_backward", "selective_scan_step")
_load_error = _native.load(*_OPS)
MAX_STATE = 256
BLOCK = 64  # steps per saved state


def why_not(device: str, dtype: torch.dtype, *sizes: int) -> str | None:
    """The reason why this backend cannot run a state of `sizes`, or None."""
    missing = _native.load_cuda(*_OPS) if device == "cuda" else _load_error
    if missing:
        return missing
    if any(s > MAX_STATE for s in sizes):
        return f"state sizes go up to {MAX_STATE}, got {max(sizes)}"
    return None


def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, *, delta_softplus, save_states):
    """(y, final_state, states): `states` are the checkpoints that `backward` starts from, empty unless asked for."""
    return _native.ops.selective_scan_forward(
        u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, save_states
    )


def backward(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    initial_state,
    cu_seqlens,
    states,
    dy,
    dfinal_state,
    *,
    delta_softplus,
    needs,
):
    """Gradients of the nine tensors before `cu_seqlens`, None where `needs` is False."""
    mask = sum(bit << i for i, bit in enumerate(needs))
    grads = _native.ops.selective_scan_backward(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        initial_state,
        cu_seqlens,
        delta_softplus,
        states,
        dy,
        dfinal_state,
        mask,
    )
    grads = [d if need else None for d, need in zip(grads, needs, strict=True)]
    if grads[8] is not None:
        grads[8] = grads[8].to(initial_state.dtype)
    return grads


def step(u, delta, A, B, C, D, *, state, z, delta_bias, delta_softplus, state_indices):
    """y; `state` is written in place."""
    return _native.ops.selective_scan_step(u, delta, A, B, C, D, z, delta_bias, state, delta_softplus, state_indices)


def unchecked_step(u, delta, A, B, C, D, *, state, z, delta_bias, delta_softplus):
    """`step` on a CPU, all slots in order, with B and C `[B, N]`. RuntimeError: something about the arguments is wrong,
    or this library has no such step."""
    return _native.ops.selective_scan_step(u, delta, A, B, C, D, z, delta_bias, state, delta_softplus, None)


def register_fakes(namespace: str = "fla_ops") -> None:
    """Shapes and dtypes for torch.compile and FakeTensor."""

    def accumulator(u):
        return torch.promote_types(u.dtype, torch.float32)

    @torch.library.register_fake(f"{namespace}::selective_scan_forward")
    def _(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, save_states):
        batch, Di, L = u.shape
        count = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        per_row = (L + BLOCK - 1) // BLOCK
        blocks = batch * per_row if cu_seqlens is None else per_row + count
        final = u.new_empty(count, Di, A.shape[1], dtype=accumulator(u))
        saved = (blocks, Di, A.shape[1]) if save_states else (0,)
        return torch.empty_like(u), final, u.new_empty(saved, dtype=accumulator(u))

    @torch.library.register_fake(f"{namespace}::selective_scan_backward")
    def _(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, states, dy, dfinal, needs):
        count = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = u.new_empty(count, u.shape[1], A.shape[1], dtype=accumulator(u))
        tensors = (u, delta, A, B, C, D, z, delta_bias, state)
        return tuple(
            torch.empty_like(x) if x is not None and needs >> i & 1 else u.new_empty(0) for i, x in enumerate(tensors)
        )

    @torch.library.register_fake(f"{namespace}::selective_scan_step")
    def _(u, delta, A, B, C, D, z, delta_bias, state, delta_softplus, state_indices):
        return torch.empty_like(u)


if _load_error is None:
    register_fakes()
