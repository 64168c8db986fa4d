# SPDX-License-Identifier: Apache-2.0
"""What every layer shares: its arguments and their checks, masks, states, steps, and weight-decay marks."""

import torch
from torch import nn

from .. import _checks
from ._packing import kept_tokens, pack, unpack
from ._state import LayerOutput, LayerState


class SequenceMixer(nn.Module):
    """A layer `[B, T, d] -> [B, T, d]` with a recurrent state.

    A family implements `_sequence`, `_token` and `_state_sizes`, and names in `undecayed` the parameters that weight
    decay must leave alone, those of a submodule as "name.parameter".
    """

    undecayed: tuple[str, ...] = ()
    width_name = "hidden_size"  # what the family calls d
    hidden_size: int

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_mark_again)

    def forward(
        self,
        x: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        state: LayerState | None = None,
        return_state: bool = False,
    ) -> torch.Tensor | LayerOutput:
        """Mix whole sequences.

        Args:
            x: `[B, T, hidden_size]`, in the parameters' dtype (any float dtype under autocast).
            attention_mask: `[B, T]`, bool or integer, 1 = keep. Masked tokens may lie anywhere and hold anything, NaN
                too: neither the convolution nor the state sees them, and their outputs are zero. A row without kept
                tokens keeps its state. Covers this call's tokens only.
            cu_seqlens: int32 or int64 `[N + 1]`, the boundaries of N sequences packed into B = 1, from 0 to T. Not
                together with attention_mask.
            state: a `LayerState` of N sequences to continue from (N = B, or the number of packed sequences); never
                modified. Gradients flow into it.
            return_state: also return the state after the last token.

        Returns:
            y `[B, T, hidden_size]`, or `LayerOutput(y, state)` with `return_state=True`.

        Raises:
            ValueError, TypeError: a wrong shape, value, dtype or type; the message names the argument.
        """
        op = type(self).__name__
        self._check_input(op, "x", x, ("B", "T"))
        batch, length = x.shape[:2]
        _checks.flag(op, "return_state", return_state)
        if attention_mask is not None and cu_seqlens is not None:
            raise ValueError(
                f"{op}: give either argument 'attention_mask' or argument 'cu_seqlens', not both. "
                "Packed sequences have no padding to mask."
            )
        indices = None
        if attention_mask is not None:
            indices, boundaries = kept_tokens(op, attention_mask, batch, length, x.device)
            if indices.shape[0] == batch * length:
                indices = None  # nothing is masked: the dense path
            else:
                x, cu_seqlens = pack(x, indices), boundaries
        else:
            cu_seqlens = _checks.cu_seqlens(op, cu_seqlens, batch, length, x.device)
        if state is not None:
            self._check_state(op, state, batch if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        y, new_state = self._sequence(x, cu_seqlens, state, return_state)
        if indices is not None:
            y = unpack(y, indices, batch, length)
        return LayerOutput(y, new_state) if return_state else y

    def step(self, x: torch.Tensor, state: LayerState) -> torch.Tensor:
        """One token a sequence, for inference: x `[B, hidden_size]` -> y `[B, hidden_size]`.

        `state` (from `init_state` or `return_state=True`) is updated in place.

        Raises:
            RuntimeError: grad mode is on and x, the state or a parameter requires a gradient.
        """
        op = f"{type(self).__name__}.step"
        self._check_input(op, "x", x, ("B",))
        self._check_state(op, state, x.shape[0])
        _checks.no_gradient_in_layer_step(op, x, state.recurrent, *self.parameters())
        return self._token(x, state)

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LayerState:
        """The state before the first token of `batch_size` sequences: zeros.

        Args:
            batch_size: number of sequences N.
            device: default: the parameters' device.
            dtype: default: float32, or float64 for a float64 layer. Arithmetic stays float32 or better.
        """
        parameter = next(self.parameters())
        device = parameter.device if device is None else device
        dtype = torch.promote_types(parameter.dtype, torch.float32) if dtype is None else dtype
        conv, recurrent = (
            None if sizes is None else torch.zeros(batch_size, *sizes.values(), device=device, dtype=dtype)
            for sizes in self._state_sizes()
        )
        return LayerState(conv, recurrent)

    def reset_parameters(self) -> None:
        """Initialise every parameter, as the constructor does; also after `to_empty`."""
        for module in self.children():
            module.reset_parameters()

    # What a family implements.

    def _sequence(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, state: LayerState | None, return_state: bool
    ) -> tuple[torch.Tensor, LayerState | None]:
        """x `[B, T, d]` -> y `[B, T, d]` and the new state if asked for."""
        raise NotImplementedError

    def _token(self, x: torch.Tensor, state: LayerState) -> torch.Tensor:
        """x `[B, d]` -> y `[B, d]`; writes `state` in place."""
        raise NotImplementedError

    def _state_sizes(self) -> tuple[dict[str, int] | None, dict[str, int]]:
        """The named sizes of one sequence's conv (None without one) and recurrent state."""
        raise NotImplementedError

    # Checks.

    def _check_input(self, op: str, name: str, x: torch.Tensor, lead: tuple[str, ...]) -> None:
        _checks.tensor(op, name, x)
        _checks.shape(op, name, x, dict.fromkeys(lead) | {self.width_name: self.hidden_size})

    def _check_state(self, op: str, state: LayerState, count: int) -> None:
        if not isinstance(state, LayerState):
            raise _checks.bad(
                TypeError, op, "state", "a LayerState", type(state).__name__, "Start with layer.init_state(B)."
            )
        conv, recurrent = self._state_sizes()
        hint = "N is the number of sequences."
        _checks.shape(op, "state.recurrent", state.recurrent, {"N": count} | recurrent, hint)
        if (conv is None) != (state.conv is None):
            expected = "None, there is no short convolution" if conv is None else f"of shape {[count, *conv.values()]}"
            raise _checks.bad(ValueError, op, "state.conv", expected, "None" if state.conv is None else "a tensor")
        if conv is not None:
            _checks.shape(op, "state.conv", state.conv, {"N": count} | conv, hint)

    # Marks. They sit on Parameter objects, which `to_empty`, `load_state_dict(assign=True)`, deepcopy and unpickling
    # replace; so each of those ways ends by marking again.

    def _mark(self) -> None:
        for name in self.undecayed:
            owner, _, name = name.rpartition(".")
            module = self._modules.get(owner) if owner else self
            parameter = None if module is None else module._parameters.get(name)
            if parameter is not None:
                parameter._no_weight_decay = True

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self._mark()

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self._mark()
        return self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._mark()


def _mark_again(layer: SequenceMixer, _) -> None:
    layer._mark()
