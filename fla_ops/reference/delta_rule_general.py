# SPDX-License-Identifier: Apache-2.0
"""The delta rule with a decay for every entry of the state and a writing strength for every value channel.

    S_t = D_t o S_{t-1} + k_t u_t^T,    u_t = b_t o (v_t - (D_t o S_{t-1})^T k_t),    o_t = scale S_t^T q_t

with D_t[i, j] = exp(g_t + gk_t[i] + gv_t[j]). It serves options of `fla_ops.compat.fla` that have no kernel.
"""

import torch

from ._loops import compute_dtype, sequences
from .delta_rule import l2norm


def delta_rule_general(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    gk: torch.Tensor | None = None,
    gv: torch.Tensor | None = None,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    qk_l2norm: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, final state). As `fla_ops.delta_rule`, and gk `[B, T, HV, K]`, gv `[B, T, HV, V]`, beta `[B, T, HV]` or
    `[B, T, HV, V]`."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    dtype = compute_dtype(q.dtype)
    q, k, value, rate = (x.to(dtype) for x in (q, k, v, beta))
    if qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    q, k = (x.repeat_interleave(HV // H, 2) for x in (q, k))
    if rate.dim() == 3:
        rate = rate[..., None]
    # Each gate as [B, T, HV, K or 1, V or 1].
    gates = [
        x.to(dtype).reshape(*x.shape[:3], *tail)
        for x, tail in ((g, (1, 1)), (gk, (K, 1)), (gv, (1, V)))
        if x is not None
    ]

    outputs, states = [], []
    for n, (rows, steps) in enumerate(sequences(cu_seqlens, B, T)):
        count = rows.stop - rows.start
        if initial_state is None:
            S = q.new_zeros(count, HV, K, V)
        else:
            first = n if cu_seqlens is not None else 0
            S = initial_state[first : first + count].to(dtype)
        for t in range(steps.start, steps.stop):
            for gate in gates:
                S = S * gate[rows, t].exp()
            held = torch.einsum("bhkv,bhk->bhv", S, k[rows, t])
            u = rate[rows, t] * (value[rows, t] - held)
            S = S + torch.einsum("bhk,bhv->bhkv", k[rows, t], u)
            outputs.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[rows, t]))
        states.append(S)
    # Rows past the last packed sequence stay zero.
    o = torch.stack(outputs, 1) if outputs else q.new_zeros(B, 0, HV, V)
    if o.shape[1] < T:
        o = torch.cat([o, o.new_zeros(B, T - o.shape[1], HV, V)], 1)
    final = torch.cat(states) if states else q.new_zeros(0, HV, K, V)
    return o.to(v.dtype), final.clone() if T == 0 else final
