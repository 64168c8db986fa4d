# SPDX-License-Identifier: Apache-2.0
"""Mamba as a drop-in layer; parameters are named and shaped as those of mamba-ssm, transformers and mambapy."""

import math
from types import ModuleType

import torch
from torch import nn
from torch.nn import functional as F

from .. import _checks
from ..causal_conv1d import MAX_WIDTH
from ..selective_scan import selective_scan, selective_scan_step
from ._conv import ShortConvolution
from ._gates import MAX_LOG_RATE
from ._mamba_inner import InnerStates, InnerWeights, mamba_inner, recomputing_scan
from ._mixer import SequenceMixer
from ._plain import is_plain
from ._positive_io import PositiveIOProjection
from ._state import LayerOutput, LayerState
from ._token_reorder import TokenReorder


class Mamba(SequenceMixer):
    r"""Mamba (arXiv 2312.00752): a state space model whose step size, input and output maps depend on the token.

    With x, z = W_in x_t and u = silu(conv(x)), per channel and with a state h in R^N:

        dt, B, C = W_x u
        delta = softplus(W_dt dt + b_dt),   A = -exp(A_log)
        h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t
        y_t = W_out ((C_t . h_t + D u_t) silu(z_t))

    A is computed in float32 (float64 for float64) whatever A_log is stored in. In training the layer keeps x and z and
    makes u and delta anew in the backward, as long as conv1d, x_proj and dt_proj are the plain modules that they were
    built as; with adapters or hooks on them each is called.

    Args:
        d_model: width d of the input and output.
        d_state: N, the size of a channel's state.
        d_conv: the convolution's number of taps W, 1 to 8.
        expand: number of channels Di = int(expand * d_model).
        dt_rank: R, the rank of the map to the step sizes; "auto" is ceil(d_model / 16).
        dt_min, dt_max: the initial step sizes softplus(b_dt) are log-uniform between them,
        dt_init_floor: and at least this.
        dt_init, dt_scale: W_dt starts "random", uniform within dt_scale * R ** -0.5, or "constant" at that bound.
        conv_bias: give the convolution a bias.
        bias: give in_proj and out_proj a bias.
        positive_io: re-parametrise x_proj so that S_C^T S_B is positive semi-definite, S_B and S_C being its rows of B
            and C (arXiv 2410.03292). Its parameters then are `x_proj.dt_weight`, `.shared_weight` and `.scale`.
        token_reorder: sort the convolved tokens u by a learned importance, softly, before the scan (arXiv 2410.03292);
            z stays where it is. This lets every output see every token: **it is not causal**, costs memory as L^2, and
            takes neither mask, cu_seqlens, state nor `step`. Its parameter is `reorder.weight`.
        backend: as in `fla_ops.selective_scan`, for both ops of the layer.
        device, dtype: of all parameters, but A_log and D are float32 for a 16-bit dtype too.

    Parameters: `A_log` `[Di, N]` and `D` `[Di]`; `in_proj.weight` `[2 Di, d]` (x, then z); `conv1d.weight` `[Di, 1, W]`
    and `.bias` (conv_bias); `x_proj.weight` `[R + 2 N, Di]` (dt, B, C); `dt_proj.weight` `[Di, R]` and `.bias`;
    `out_proj.weight` `[d, Di]`; `in_proj.bias` and `out_proj.bias` (bias). A_log, D and dt_proj.bias are marked
    `_no_weight_decay`, see `fla_ops.param_groups`.

    The state is `LayerState(conv [S, Di, W - 1], recurrent [S, Di, N])` of S sequences.

    Raises:
        ValueError, TypeError: a wrong argument; the message names it.

    Example:
        >>> import torch
        >>> from fla_ops.layers import Mamba
        >>> layer = Mamba(d_model=32, backend="reference")
        >>> x = torch.randn(1, 10, 32)
        >>> y = layer(x)                                               # train
        >>> with torch.no_grad():                                      # generate
        ...     _, state = layer(x[:, :9], return_state=True)
        ...     last = layer.step(x[:, 9], state)
        >>> torch.allclose(last, y[:, 9], atol=1e-5)
        True
    """

    undecayed = ("A_log", "D", "dt_proj.bias")
    width_name = "d_model"

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        *,
        positive_io: bool = False,
        token_reorder: bool = False,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.d_model = self.hidden_size = d_model
        self.d_state, self.d_conv, self.expand = d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        self.dt_init, self.dt_scale = dt_init, dt_scale
        self.token_reorder, self.backend = token_reorder, backend
        self._check_sizes()
        Di, N, R = self.d_inner, self.d_state, self.dt_rank
        where = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * Di, bias=bias, **where)
        self.conv1d = ShortConvolution(Di, d_conv, conv_bias, "silu", backend, **where)
        if positive_io:
            self.x_proj = PositiveIOProjection(Di, R, N, **where)
        else:
            self.x_proj = nn.Linear(Di, R + 2 * N, bias=False, **where)
        self.dt_proj = nn.Linear(R, Di, **where)
        if token_reorder:
            self.reorder = TokenReorder(Di, **where)
        self.out_proj = nn.Linear(Di, d_model, bias=bias, **where)
        dtype = torch.promote_types(self.out_proj.weight.dtype, torch.float32)
        self.A_log = nn.Parameter(torch.empty(Di, N, device=device, dtype=dtype))
        self.D = nn.Parameter(torch.empty(Di, device=device, dtype=dtype))
        self._reset_scan()

    def _check_sizes(self) -> None:
        op = type(self).__name__
        for name in ("d_model", "d_state", "d_conv", "dt_rank"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int):
                raise _checks.bad(TypeError, op, name, "an int", repr(size))
            if size < 1:
                raise _checks.bad(ValueError, op, name, "at least 1", size)
        if self.d_conv > MAX_WIDTH:
            raise _checks.bad(ValueError, op, "d_conv", f"1 to {MAX_WIDTH}", self.d_conv)
        if self.d_inner < 1:
            raise _checks.bad(ValueError, op, "expand", "such that int(expand * d_model) is at least 1", self.expand)
        if self.dt_init not in ("random", "constant"):
            raise _checks.bad(ValueError, op, "dt_init", "'random' or 'constant'", repr(self.dt_init))
        if not 0 < self.dt_min <= self.dt_max:
            raise _checks.bad(ValueError, op, "dt_min", f"in (0, dt_max={self.dt_max}]", self.dt_min)

    def reset_parameters(self) -> None:
        """Initialise every parameter, as the constructor does; also after `to_empty`.

        Linears and the convolution as torch's own; A_log = log(1..N), D = 1; W_dt and b_dt as the arguments say.
        """
        super().reset_parameters()
        self._reset_scan()

    @torch.no_grad()
    def _reset_scan(self) -> None:
        rates = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=self.A_log.device)
        self.A_log.copy_(rates.log().expand_as(self.A_log))
        nn.init.ones_(self.D)
        bound = self.dt_rank**-0.5 * self.dt_scale
        if self.dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        else:
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        step = torch.empty_like(self.dt_proj.bias, dtype=torch.float32).uniform_(low, high)
        step = step.exp().clamp(min=self.dt_init_floor)
        self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def _mark(self) -> None:
        super()._mark()
        bias = getattr(self._modules.get("dt_proj"), "bias", None)
        if bias is not None:
            bias._no_reinit = True  # models that set the biases of their Linears to zero ask for it

    def forward(
        self,
        x: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        state: LayerState | None = None,
        return_state: bool = False,
    ) -> torch.Tensor | LayerOutput:
        if self.token_reorder:
            self._refuse(attention_mask=attention_mask, cu_seqlens=cu_seqlens, state=state, return_state=return_state)
        options = {"attention_mask": attention_mask, "cu_seqlens": cu_seqlens}
        return super().forward(x, **options, state=state, return_state=return_state)

    forward.__doc__ = SequenceMixer.forward.__doc__

    def _refuse(self, **options: object) -> None:
        """What a layer with token_reorder=True cannot take: every output depends on all tokens of a whole sequence."""
        for name, value in options.items():
            if value is not None and value is not False:
                op, hint = type(self).__name__, "The reordering is not causal: it needs whole, unpadded sequences."
                raise _checks.bad(ValueError, op, name, "left out with token_reorder=True", type(value).__name__, hint)

    def _sequence(self, x, cu_seqlens, state, return_state):
        y, state = self._inner(self.in_proj(x), cu_seqlens, state, return_state)
        return self.out_proj(y), state

    def _inner(
        self, xz: torch.Tensor, cu_seqlens: torch.Tensor | None, state: LayerState | None, return_state: bool
    ) -> tuple[torch.Tensor, LayerState | None]:
        """xz `[B, T, 2 Di]` -> (y `[B, T, Di]`, the new state if asked for)."""
        conv, recurrent = (None, None) if state is None else state
        scan = self._recomputing_scan(xz, conv, recurrent)
        if scan is not None:
            options = {"cu_seqlens": cu_seqlens, "return_state": return_state, "backend": self.backend}
            y, states = mamba_inner(xz, self._inner_weights(), InnerStates(conv, recurrent), scan, **options)
            return y, LayerState(*states) if return_state else None
        x, z = xz.chunk(2, -1)
        u, conv = self.conv1d(x, state=conv, return_state=return_state, cu_seqlens=cu_seqlens)
        if self.token_reorder:
            u = self.reorder(u, self._selected(u)[0])
        delta, delta_bias, B, C = self._selected(u)
        A, D = self._rates_and_skip()
        y, recurrent = selective_scan(
            u.transpose(1, 2),
            delta.transpose(1, 2),
            A,
            B.transpose(1, 2),
            C.transpose(1, 2),
            D,
            z=z.transpose(1, 2),
            delta_bias=delta_bias,
            delta_softplus=True,
            initial_state=recurrent,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        return y.transpose(1, 2), LayerState(conv, recurrent) if return_state else None

    def _token(self, x, state):
        if self.token_reorder:
            self._refuse(state=state)
        return self.out_proj(self._inner_token(self.in_proj(x), state))

    def _inner_token(self, xz: torch.Tensor, state: LayerState) -> torch.Tensor:
        """xz `[B, 2 Di]` -> y `[B, Di]`; writes `state` in place."""
        x, z = xz.chunk(2, -1)
        u, _ = self.conv1d(x, state=state.conv)
        delta, delta_bias, B, C = self._selected(u)
        A, D = self._rates_and_skip()
        options = {"delta_bias": delta_bias, "delta_softplus": True, "backend": self.backend}
        return selective_scan_step(u, delta, A, B, C, D, state=state.recurrent, z=z, **options)

    def _selected(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """What the scan takes from its input u `[..., Di]`: (delta `[..., Di]`, its bias, B, C `[..., N]`).

        The scan adds the bias in float32. It is None where dt_proj, being more than a Linear, has added it itself.
        """
        dt, B, C = self.x_proj(u).split((self.dt_rank, self.d_state, self.d_state), -1)
        if is_plain(self.dt_proj, nn.Linear):
            return F.linear(dt, self.dt_proj.weight), self._delta_bias(), B, C
        return self.dt_proj(dt), None, B, C

    def _delta_bias(self) -> torch.Tensor | None:
        bias = self.dt_proj.bias
        return None if bias is None else bias.to(torch.promote_types(bias.dtype, torch.float32))

    def _rates_and_skip(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(A `[Di, N]`, D `[Di]`) in float32 or better."""
        A_log, D = (w.to(torch.promote_types(w.dtype, torch.float32)) for w in (self.A_log, self.D))
        return -A_log.clamp(max=MAX_LOG_RATE).exp(), D

    def _recomputing_scan(self, xz: torch.Tensor, *states: torch.Tensor | None) -> ModuleType | None:
        """The scan's backend module if `mamba_inner` can and should stand for the submodules here, else None."""
        kinds = ((self.conv1d, ShortConvolution), (self.x_proj, nn.Linear), (self.dt_proj, nn.Linear))
        if (
            self.token_reorder
            or not all(is_plain(module, kind) for module, kind in kinds)
            or self.x_proj.bias is not None
        ):
            return None
        tensors = (xz, *states, self.A_log, self.D, *(w for module, _ in kinds for w in module.parameters()))
        return recomputing_scan(xz, tensors, self.d_state, self.backend)

    def _inner_weights(self) -> InnerWeights:
        conv, x_weight, dt_weight = self.conv1d, self.x_proj.weight, self.dt_proj.weight
        side = (self._delta_bias(), *self._rates_and_skip())
        return InnerWeights(conv.weight[:, 0], conv.bias, x_weight, dt_weight, *side)

    def _state_sizes(self):
        conv = {"channels": self.d_inner, "W-1": self.conv1d.weight.shape[-1] - 1}
        return conv, {"Di": self.d_inner, "d_state": self.d_state}
