# SPDX-License-Identifier: Apache-2.0
"""Mamba's selective scan, step by step. `selective_scan.md` beside this file derives the form that the kernels use.

    step_t = softplus(delta_t + delta_bias)                        one a channel; the softplus is optional
    h_t = exp(step_t A) h_{t-1} + step_t u_t B_t                   h in R^{Di x N}
    y_t = (h_t C_t + D u_t) silu(z_t)                              the gate z is optional

Gu and Dao 2023, arXiv 2312.00752, in the form of the released code: the input enters by Euler's rule, step_t B_t.
"""

import torch

from ._loops import compute_dtype, rounding, sequences, without_autocast


@without_autocast
def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    operand_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Shapes and meaning as `fla_ops.selective_scan`; differentiable any number of times.

    `operand_dtype` rounds the operands of the products with B and C to that dtype while the state and the sums stay in
    the compute dtype: the yardstick that `fla_ops.testing` measures a low-precision kernel with.
    """
    batch, Di, L = u.shape
    N = A.shape[1]
    dtype = compute_dtype(u.dtype)
    low = rounding(operand_dtype)
    A = A.to(dtype)
    x = u.to(dtype)
    step = step_sizes(delta, delta_bias, delta_softplus)
    written = low(step * x)
    B, C = (_per_channel(low(w.to(dtype)), Di, L) for w in (B, C))

    parts = sequences(cu_seqlens, batch, L)
    outputs, states = [], []
    for i, (rows, steps) in enumerate(parts):
        count = rows.stop - rows.start
        if initial_state is None:
            h = x.new_zeros(count, Di, N)
        else:
            first = i if cu_seqlens is not None else 0
            h = initial_state[first : first + count].to(dtype)
        for t in range(steps.start, steps.stop):
            decay = (step[rows, :, t, None] * A).exp()
            h = decay * h + written[rows, :, t, None] * B[rows, ..., t]
            outputs.append((low(h) * C[rows, ..., t]).sum(-1))
        states.append(h)
    y = torch.stack(outputs, -1) if outputs else x.new_zeros(batch, Di, 0)
    start = parts[0][1].start if parts else 0
    covered = slice(start, start + y.shape[2])
    if D is not None:
        y = y + D.to(dtype)[:, None] * x[..., covered]
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(dtype)[..., covered])
    if y.shape[2] < L:  # steps that no packed sequence covers are zero
        y = torch.nn.functional.pad(y, (start, L - covered.stop))
    final = None
    if output_final_state:
        final = torch.cat(states) if states else x.new_zeros(0, Di, N)
        if initial_state is not None and L == 0:
            final = final.clone()
    return y.to(u.dtype), final


def step_sizes(delta: torch.Tensor, delta_bias: torch.Tensor | None, delta_softplus: bool) -> torch.Tensor:
    """softplus(delta + delta_bias), `[B, Di, L]` in the compute dtype.

    Exact for every argument, where the released kernel takes x itself for x > 20: 2e-9 apart, which float64 sees.
    """
    step = delta.to(compute_dtype(delta.dtype))
    if delta_bias is not None:
        step = step + delta_bias.to(step.dtype)[:, None]
    return torch.logaddexp(step, step.new_zeros(())) if delta_softplus else step


def _per_channel(w: torch.Tensor, channels: int, length: int) -> torch.Tensor:
    """B or C as `[B or 1, Di or 1, N, L]`: constant in time, one for all channels, or one a group of channels."""
    if w.dim() == 2:
        return w[None, :, :, None].expand(-1, -1, -1, length)
    if w.dim() == 3:
        return w[:, None]
    return w.repeat_interleave(channels // w.shape[1], 1)


def selective_scan_step(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    state: torch.Tensor,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """One step: as `fla_ops.selective_scan_step`, with B and C always `[B, G, N]`; `state` is written in place."""
    rows = torch.arange(u.shape[0], device=u.device)
    slots = rows if state_indices is None else state_indices.to(torch.int64)
    live = (slots >= 0) & (slots < state.shape[0])
    picked = slots.clamp(0, max(state.shape[0] - 1, 0))
    y, final = selective_scan(
        u[..., None],
        delta[..., None],
        A,
        B[..., None],
        C[..., None],
        D,
        z=None if z is None else z[..., None],
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        initial_state=state[picked],
        output_final_state=True,
    )
    state[slots[live]] = final[live].to(state.dtype)
    return torch.where(live[:, None], y[..., 0], 0)
