# SPDX-License-Identifier: Apache-2.0
"""The delta rule, step by step. `delta_rule.md` beside this file derives the chunked form that the kernels use.

    S_t = e^{g_t} S_{t-1} + k_t u_t^T,    u_t = beta_t (v_t - (e^{g_t} S_{t-1})^T k_t),    o_t = scale S_t^T q_t

Yang et al. 2024, arXiv 2406.06484 (g = 0) and arXiv 2412.06464 (gated).
"""

import torch

from ._loops import compute_dtype, rounding, sequences, without_autocast


def l2norm(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension: finite, with a finite gradient, at zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


@without_autocast
def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    qk_l2norm: bool = False,
    operand_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Shapes and meaning as `fla_ops.delta_rule`; differentiable any number of times.

    `operand_dtype` rounds every product's operands to that dtype while the state and the sums stay in the compute
    dtype: the yardstick that `fla_ops.testing` measures a low-precision kernel with.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    dtype = compute_dtype(q.dtype)
    low = rounding(operand_dtype)
    scale = K**-0.5 if scale is None else scale
    k, q = (x.to(dtype) for x in (k, q))
    if qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    # Value head hv reads query and key head hv // (HV // H).
    q, k = (low(x).repeat_interleave(HV // H, 2) if HV != H else low(x) for x in (q, k))
    value, rate = v.to(dtype), beta.to(dtype)
    decay = None if g is None else g.to(dtype).exp()

    parts = sequences(cu_seqlens, B, T)
    outputs, states = [], []
    for n, (rows, steps) in enumerate(parts):
        count = rows.stop - rows.start
        if initial_state is None:
            S = q.new_zeros(count, HV, K, V)
        else:
            first = n if cu_seqlens is not None else 0
            S = initial_state[first : first + count].to(dtype)
        for t in range(steps.start, steps.stop):
            if decay is not None:
                S = S * decay[rows, t, :, None, None]
            held = torch.einsum("bhkv,bhk->bhv", low(S), k[rows, t])
            u = rate[rows, t, :, None] * (value[rows, t] - held)
            S = S + torch.einsum("bhk,bhv->bhkv", k[rows, t], low(u))
            outputs.append(scale * torch.einsum("bhkv,bhk->bhv", low(S), q[rows, t]))
        states.append(S)
    o = torch.stack(outputs, 1) if outputs else q.new_zeros(B, 0, HV, V)
    if o.shape[1] < T:  # rows that no packed sequence covers are zero
        before = parts[0][1].start if parts else 0
        o = torch.nn.functional.pad(o, (0, 0, 0, 0, before, T - before - o.shape[1]))
    final = None
    if output_final_state:
        final = torch.cat(states) if states else q.new_zeros(0, HV, K, V)
        if initial_state is not None and T == 0:
            final = final.clone()
    return o.to(v.dtype), final


def delta_rule_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    state: torch.Tensor,
    scale: float | None = None,
    qk_l2norm: bool = False,
    state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token: shapes and meaning as `fla_ops.delta_rule_step`; `state` is written in place."""
    rows = torch.arange(q.shape[0], device=q.device)
    slots = rows if state_indices is None else state_indices.to(torch.int64)
    live = (slots >= 0) & (slots < state.shape[0])
    picked = slots.clamp(0, max(state.shape[0] - 1, 0))
    o, final = delta_rule(
        *(x[:, None] for x in (q, k, v, beta)),
        None if g is None else g[:, None],
        scale=scale,
        initial_state=state[picked],
        output_final_state=True,
        qk_l2norm=qk_l2norm,
    )
    state[slots[live]] = final[live].to(state.dtype)
    return torch.where(live[:, None, None], o[:, 0], 0)
