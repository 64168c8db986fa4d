# SPDX-License-Identifier: Apache-2.0
"""A linear layer whose input comes as sparse changes (arXiv 2107.07305)."""

import torch
from torch import nn
from torch.nn import functional as F

from .. import _checks
from .delta_activation import DeltaOutput, check_delta_state


class DeltaLinear(nn.Linear):
    r"""The linear layer of an input of which only the changes are known, as `DeltaActivation` gives them.

        z_t = z_{t-1} + W x_t,   z_{-1} = 0
        y_t = z_t + b

    With x_t = o_t - o_{t-1} this is W o_t + b. Sums over channels and over tokens are taken in float64: behind a
    `DeltaActivation`, whose changes are exact, y is the dense layer's to within float64's rounding after any number of
    tokens, and only then rounded.

    Where it saves work: without grad mode, channels that do not change in a call are not multiplied. `step` of one
    sequence thus makes out_features multiply-adds for each channel that fired, and none for others; a batch or a chunk
    of tokens makes them for the channels that fired anywhere in it. (Choosing the channels waits for a GPU.) With grad
    mode on, and under torch.compile, all are multiplied.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`, whose parameters and state_dict it has.

    Example:
        >>> import torch
        >>> from fla_ops.layers import DeltaLinear
        >>> layer = DeltaLinear(8, 4)
        >>> o = torch.randn(2, 10, 8)
        >>> y, state = layer(torch.diff(o, dim=1, prepend=torch.zeros(2, 1, 8)), return_state=True)
        >>> torch.allclose(y, torch.nn.functional.linear(o, layer.weight, layer.bias), atol=1e-5)
        True
    """

    def forward(
        self, x: torch.Tensor, *, state: torch.Tensor | None = None, return_state: bool = False
    ) -> torch.Tensor | DeltaOutput:
        """Whole sequences.

        Args:
            x: changes, `[B, T, in_features]`, of any float dtype.
            state: z of the token before, float64 `[B, out_features]`; never modified. Gradients flow into it. None:
                zeros.
            return_state: also return z of the last token.

        Returns:
            y `[B, T, out_features]` in the parameters' dtype, or `DeltaOutput(y, state)`.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or type; the message names the argument.
        """
        op = type(self).__name__
        self._check(op, x, ("B", "T"))
        _checks.flag(op, "return_state", return_state)
        if state is None:
            state = x.new_zeros(x.shape[0], self.out_features, dtype=torch.float64)
        else:
            check_delta_state(op, state, x.shape[0], self.out_features, torch.float64)
        z = state[:, None] + self._products(x).cumsum(1)
        y = self._output(z)
        if not return_state:
            return y
        return DeltaOutput(y, z[:, -1] if x.shape[1] else state.clone())

    def step(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """One token a sequence, for inference: changes `[B, in_features]` -> y `[B, out_features]`; `state` is updated
        in place.

        Raises:
            RuntimeError: grad mode is on and x, the state or a parameter requires a gradient.
        """
        op = f"{type(self).__name__}.step"
        self._check(op, x, ("B",))
        check_delta_state(op, state, x.shape[0], self.out_features, torch.float64)
        _checks.no_gradient_in_layer_step(op, x, state, *self.parameters())
        return self._output(state.add_(self._products(x)))

    def _products(self, x: torch.Tensor) -> torch.Tensor:
        """W x in float64, of the channels that are not zero everywhere."""
        weight = self.weight
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            fired = (x != 0).flatten(0, -2).any(0).nonzero()[:, 0]
            if fired.shape[0] < x.shape[-1]:
                x, weight = x.index_select(-1, fired), weight.index_select(1, fired)
        return F.linear(x.double(), weight.double())

    def _output(self, z: torch.Tensor) -> torch.Tensor:
        return (z if self.bias is None else z + self.bias).to(self.weight.dtype)

    def _check(self, op: str, x: torch.Tensor, lead: tuple[str, ...]) -> None:
        _checks.tensor(op, "x", x)
        if x.dtype not in _checks.MAIN_DTYPES:
            raise _checks.bad(TypeError, op, "x", "a floating tensor", x.dtype)
        _checks.shape(op, "x", x, dict.fromkeys(lead) | {"in_features": self.in_features})
