# SPDX-License-Identifier: Apache-2.0
"""DeltaProduct, micro-step by micro-step. `delta_product.md` beside this file derives the form that the kernels use.

    S_{t,0} = e^{g_t} S_{t-1}
    S_{t,j} = S_{t,j-1} + k_{t,j} u_{t,j}^T,    u_{t,j} = beta_{t,j} (v_{t,j} - S_{t,j-1}^T k_{t,j}),    j = 1..n
    S_t = S_{t,n},    o_t = scale S_t^T q_t

Siems et al. 2025, arXiv 2502.10297: token t's transition is a product of n generalised Householder matrices.
"""

import torch

from ._loops import compute_dtype, rounding, sequences, without_autocast
from .delta_rule import l2norm


@without_autocast
def delta_product(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    num_householder: int,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    qk_l2norm: bool = False,
    operand_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Shapes and meaning as `fla_ops.delta_product`; differentiable any number of times.

    `operand_dtype` rounds every product's operands to that dtype while the state and the sums stay in the compute
    dtype: the yardstick that `fla_ops.testing` measures a low-precision kernel with.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    n = num_householder
    dtype = compute_dtype(q.dtype)
    low = rounding(operand_dtype)
    scale = K**-0.5 if scale is None else scale
    q, k = (x.to(dtype) for x in (q, k))
    if qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    # Value head hv reads query and key head hv // (HV // H).
    q, k = (low(x).repeat_interleave(HV // H, 2) if HV != H else low(x) for x in (q, k))
    k, value, rate = (x.unflatten(1, (T, n)) for x in (k, v.to(dtype), beta.to(dtype)))
    decay = None if g is None else g.to(dtype).exp()

    parts = sequences(cu_seqlens, B, T)
    outputs, states = [], []
    for i, (rows, steps) in enumerate(parts):
        count = rows.stop - rows.start
        if initial_state is None:
            S = q.new_zeros(count, HV, K, V)
        else:
            first = i if cu_seqlens is not None else 0
            S = initial_state[first : first + count].to(dtype)
        for t in range(steps.start, steps.stop):
            if decay is not None:
                S = S * decay[rows, t, :, None, None]
            for j in range(n):
                held = torch.einsum("bhkv,bhk->bhv", low(S), k[rows, t, j])
                u = rate[rows, t, j, :, None] * (value[rows, t, j] - held)
                S = S + torch.einsum("bhk,bhv->bhkv", k[rows, t, j], low(u))
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


def delta_product_step(
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
    """One token: shapes and meaning as `fla_ops.delta_product_step`; `state` is written in place."""
    rows = torch.arange(q.shape[0], device=q.device)
    slots = rows if state_indices is None else state_indices.to(torch.int64)
    live = (slots >= 0) & (slots < state.shape[0])
    picked = slots.clamp(0, max(state.shape[0] - 1, 0))
    o, final = delta_product(
        q[:, None],
        k,
        v,
        beta,
        None if g is None else g[:, None],
        num_householder=k.shape[1],
        scale=scale,
        initial_state=state[picked],
        output_final_state=True,
        qk_l2norm=qk_l2norm,
    )
    state[slots[live]] = final[live].to(state.dtype)
    return torch.where(live[:, None, None], o[:, 0], 0)
