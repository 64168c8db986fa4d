# SPDX-License-Identifier: Apache-2.0
"""The short causal depthwise convolution, tap by tap. `causal_conv1d.md` beside this file has its gradient.

    z_t = b + sum_{w=0}^{W-1} weight_w x_{t-(W-1)+w},    y_t = z_t or silu(z_t)

x before a sequence's start is the initial state, oldest first, or zero.
"""

import torch

from ._loops import compute_dtype, rounding, sequences


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    operand_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Shapes and meaning as `fla_ops.causal_conv1d`; differentiable any number of times.

    `operand_dtype` rounds every product's operands to that dtype while the state and the sums stay in the compute
    dtype: the yardstick that `fla_ops.testing` measures a low-precision kernel with.
    """
    B, D, L = x.shape
    W = weight.shape[1]
    dtype = compute_dtype(x.dtype)
    low = rounding(operand_dtype)
    tap, signal = low(weight.to(dtype)), x.to(dtype)

    parts = sequences(cu_seqlens, B, L)
    outputs, states = [], []
    for n, (rows, steps) in enumerate(parts):
        count, length = rows.stop - rows.start, steps.stop - steps.start
        if initial_state is None:
            state = signal.new_zeros(count, D, W - 1)
        else:
            first = n if cu_seqlens is not None else 0
            state = initial_state[first : first + count].to(dtype)
        # The state is the W-1 inputs before the first: with it in front, output t reads inputs t .. t+W-1, and the
        # last W-1 inputs are the next state, however short the sequence.
        inputs = torch.cat([state, signal[rows, :, steps]], 2)
        z = signal.new_zeros(count, D, length)
        if bias is not None:
            z = z + bias.to(dtype)[:, None]
        for w in range(W):
            z = z + tap[:, w, None] * low(inputs)[:, :, w : w + length]
        outputs.append(z if activation is None else z * torch.sigmoid(z))
        states.append(inputs[:, :, length:])
    y = torch.cat(outputs, 2) if outputs else signal[:, :, :0]
    if y.shape[2] < L:  # columns that no packed sequence covers are zero
        before = parts[0][1].start if parts else 0
        y = torch.nn.functional.pad(y, (before, L - before - y.shape[2]))
    final = None
    if output_final_state:
        final = torch.cat(states) if states else signal.new_zeros(0, D, W - 1)
    return y.to(x.dtype), final


def causal_conv1d_step(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    state: torch.Tensor,
    activation: str | None = None,
    state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token: shapes and meaning as `fla_ops.causal_conv1d_step`; `state` is written in place."""
    rows = torch.arange(x.shape[0], device=x.device)
    slots = rows if state_indices is None else state_indices.to(torch.int64)
    live = (slots >= 0) & (slots < state.shape[0])
    y = x.new_zeros(x.shape)
    y[live], final = _one_token(x[live], weight, bias, activation, state[slots[live]])
    state[slots[live]] = final.to(state.dtype)
    return y


def _one_token(x, weight, bias, activation, state):
    y, final = causal_conv1d(
        x[:, :, None], weight, bias, activation=activation, initial_state=state, output_final_state=True
    )
    return y[:, :, 0], final
