# SPDX-License-Identifier: Apache-2.0
"""causal-conv1d 1.7 on fla_ops.

    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update                         # before
    from fla_ops.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update          # after

Names, order and defaults of the arguments are theirs. What differs: CPU tensors and float64 work, widths go from 1 to
8, and no option asks for a memory layout or a multiple of 8 channels.
"""

import torch

from .. import _checks
from ..causal_conv1d import causal_conv1d
from . import _conv_cache


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal depthwise convolution: out `[B, D, L]`, or (out, final states) with `return_final_states`.

    Args:
        x: `[B, D, L]`. weight: `[D, W]`. bias: `[D]`.
        seq_idx: int `[B, L]`: each run of equal values in a row is a sequence of its own; negative ones are padding,
            with output 0. Reads the number of runs back from the device. Not with `return_final_states`.
        initial_states: `[B, D, W - 1]`; with seq_idx it belongs to the first run of each row.
        return_final_states: also return the last W - 1 inputs, `[B, D, W - 1]` in x's dtype.
        final_states_out: written with the final states and returned.
        activation: None, "silu" or "swish".
    """
    op = "causal_conv1d_fn"
    _check_activation(op, activation)
    _checks.tensor(op, "x", x)
    weight, bias = _conv_cache.weight_for(x, weight), _conv_cache.weight_for(x, bias)
    if seq_idx is not None:
        if return_final_states:
            raise _checks.bad(ValueError, op, "return_final_states", "False with seq_idx", True)
        return _separate_runs(op, x, weight, bias, seq_idx, initial_states, activation)
    out, final_states = causal_conv1d(
        x,
        weight,
        bias,
        activation=activation,
        initial_state=initial_states,
        output_final_state=return_final_states,
    )
    if not return_final_states:
        return out
    if final_states_out is None:
        return out, final_states.to(x.dtype)
    _checks.tensor(op, "final_states_out", final_states_out)
    _checks.shape(op, "final_states_out", final_states_out, dict(zip("BDW", final_states.shape, strict=True)))
    return out, final_states_out.copy_(final_states)


@torch.no_grad()
def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decoding: out as x, `[B, D]` or `[B, D, L]`. As theirs it has no backward, and records no gradient.

    Args:
        x: the new inputs, `[B, D]` or `[B, D, L]`.
        conv_state: `[B or slots, D, S]`, S >= W - 1, the last S inputs; updated in place.
        cache_seqlens: int `[B]`: `conv_state` is a ring, the inputs so far being this many; new ones enter at column
            `cache_seqlens % S` and on.
        conv_state_indices: int `[B]`: the slot of each row; a negative one is padding: output 0, nothing written.
    """
    op = "causal_conv1d_update"
    _check_activation(op, activation)
    for name, value in (("x", x), ("conv_state", conv_state), ("weight", weight)):
        _checks.tensor(op, name, value)
    if x.dim() not in (2, 3):
        raise _checks.bad(ValueError, op, "x", "of shape [B, D] or [B, D, L]", list(x.shape))
    _checks.shape(op, "weight", weight, {"D": x.shape[1], "W": None})
    rows = x.shape[0] if conv_state_indices is None else None
    _checks.shape(op, "conv_state", conv_state, {"slots": rows, "D": x.shape[1], "S": None})
    if conv_state.shape[2] < weight.shape[1] - 1:
        raise _checks.bad(ValueError, op, "conv_state", "at least W - 1 columns wide", list(conv_state.shape))
    for name, index in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if index is not None:
            _checks.shape(op, name, index, {"B": x.shape[0]})
    if x.dim() == 2 and cache_seqlens is None:
        return _conv_cache.step(x, conv_state, weight, bias, activation, conv_state_indices)
    inputs = x[:, :, None] if x.dim() == 2 else x
    out = _update_several(inputs, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
    return out[:, :, 0] if x.dim() == 2 else out


def _update_several(x, conv_state, weight, bias, activation, cache_seqlens, indices):
    """Several tokens, or a ring: read the last W - 1 inputs, convolve, write the new inputs back."""
    live = torch.arange(x.shape[0], device=x.device)
    if indices is not None:
        live = live[indices.to(x.device) >= 0]
        slots = indices.to(x.device)[live].long()
    else:
        slots = live
    new, state = x[live], conv_state[slots]
    S, L, W = conv_state.shape[2], x.shape[2], weight.shape[1]
    if cache_seqlens is None:
        window = state[:, :, S - (W - 1) :]
        state = torch.cat([state, new.to(state.dtype)], 2)[:, :, L:]
    else:
        count = cache_seqlens.to(x.device)[live].long()[:, None]

        def columns(first: int, last: int) -> torch.Tensor:
            """The ring's columns of inputs count + first up to count + last."""
            places = count + torch.arange(first, last, device=x.device)
            return places.remainder(S)[:, None].expand(-1, x.shape[1], -1)

        window = state.gather(2, columns(1 - W, 0))
        kept = min(L, S)  # an input that the same call overwrites is not written
        state.scatter_(2, columns(L - kept, L), new[:, :, L - kept :].to(state.dtype))
    options = {"activation": activation, "initial_state": window}
    weight, bias = _conv_cache.weight_for(x, weight), _conv_cache.weight_for(x, bias)
    out = torch.zeros_like(x)
    out[live] = causal_conv1d(new, weight, bias, **options).y
    conv_state[slots] = state
    return out


def _separate_runs(op, x, weight, bias, seq_idx, initial_states, activation):
    """Every run of equal seq_idx as a packed sequence of its own."""
    B, D, L = x.shape
    _checks.tensor(op, "seq_idx", seq_idx)
    _checks.shape(op, "seq_idx", seq_idx, {"B": B, "L": L})
    starts = torch.ones(B, L, dtype=torch.bool, device=x.device)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    first = starts.flatten().nonzero().squeeze(1)
    state = None
    if initial_states is not None:
        _checks.initial_state(op, initial_states, {"N": B, "D": D, "W-1": weight.shape[1] - 1}, x.device)
        zeros = initial_states.new_zeros(first.shape[0], *initial_states.shape[1:])
        row_starts = (first % L == 0).nonzero().squeeze(1)
        state = zeros.index_copy(0, row_starts, initial_states)
    padding = (seq_idx < 0)[:, None]
    out, _ = causal_conv1d(
        x.masked_fill(padding, 0).transpose(1, 2).reshape(1, B * L, D).transpose(1, 2),
        weight,
        bias,
        activation=activation,
        initial_state=state,
        cu_seqlens=torch.cat([first, first.new_tensor([B * L])]),
    )
    return out[0].T.unflatten(0, (B, L)).transpose(1, 2).masked_fill(padding, 0)


def _check_activation(op, activation):
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(f"{op}: argument 'activation' must be None, 'silu' or 'swish', got {activation!r}.")
