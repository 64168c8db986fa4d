# SPDX-License-Identifier: Apache-2.0
"""DeltaProduct on GPUs: the delta rule's kernels with n rows of k, v and beta for one of q, g and o.

    S_{t,0} = e^{g_t} S_{t-1}
    S_{t,j} = S_{t,j-1} + k_{t,j} u_{t,j}^T,   u_{t,j} = beta_{t,j} (v_{t,j} - S_{t,j-1}^T k_{t,j}),   j = 1..n
    o_t = scale S_{t,n}^T q_t

(arXiv 2502.10297). A chunk of the delta rule's, of 64 rows of k (16 in float32), holds floor(64 / n) whole tokens;
where n does not divide 64 the rows left over write nothing. A token's gate stands at its first row, its query, output
and their gradients at its last: those rows are read from and written to tensors that have a row a token, and between
them are zeros that exist in registers and shared memory only. reference/delta_product.md derives that this is the same.
"""

import torch

from . import delta_rule
from .delta_rule import why_not  # noqa: F401 - the limits are the same


def forward(q, k, v, beta, g, initial_state, cu_seqlens, *, num_householder, scale, qk_l2norm, save_states):
    """(o, final_state, states), as `delta_rule.forward`."""
    inputs = (q, k, v, beta, g, initial_state, cu_seqlens)
    options = {"scale": scale, "qk_l2norm": qk_l2norm, "save_states": save_states, "steps": num_householder}
    return delta_rule.forward(*inputs, **options)


def backward(
    q, k, v, beta, g, initial_state, cu_seqlens, states, do, dfinal_state, *, num_householder, scale, qk_l2norm, needs
):
    """Gradients of q, k, v, beta, g and initial_state, None where `needs` is False."""
    inputs = (q, k, v, beta, g, initial_state, cu_seqlens, states, do, dfinal_state)
    return delta_rule.backward(*inputs, scale=scale, qk_l2norm=qk_l2norm, needs=needs, steps=num_householder)


def step(q, k, v, beta, g, *, state, scale, qk_l2norm, state_indices) -> torch.Tensor:
    """o; `state` is written in place."""
    options = {"scale": scale, "qk_l2norm": qk_l2norm, "state_indices": state_indices}
    return delta_rule.step(q, k, v, beta, g, state=state, **options)
