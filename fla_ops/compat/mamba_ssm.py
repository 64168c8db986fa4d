# SPDX-License-Identifier: Apache-2.0
"""mamba-ssm 2.3 (Mamba-1) on fla_ops.

    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, mamba_inner_fn     # before
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    from mamba_ssm import Mamba
    from fla_ops.compat.mamba_ssm import (                                                   # after
        Mamba, mamba_inner_fn, selective_scan_fn, selective_state_update,
    )

Names, order and defaults of the arguments are theirs. What differs: CPU tensors and float64 work, as does any layout;
the last state has a gradient; `selective_state_update` takes D=None and dt_bias=None, on which theirs fails; `Mamba`
continues from its cache with several tokens at once too; complex A is a TypeError.
"""

import torch
from torch.nn import functional as F

from .. import _checks, layers
from ..causal_conv1d import causal_conv1d
from ..layers import LayerState
from ..layers._mamba_inner import InnerStates, InnerWeights, mamba_inner, recomputing_scan
from ..selective_scan import selective_scan, selective_scan_step
from . import _conv_cache


def selective_scan_fn(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The selective scan (`fla_ops.selective_scan`): out `[B, D, L]`, or (out, last state) with `return_last_state`.

    u, delta, z `[B, D, L]` of one dtype; A `[D, N]` real; B, C `[D, N]`, or `[B, N, L]` or `[B, G, N, L]` in u's dtype;
    D, delta_bias `[D]`; last state `[B, D, N]` in float32 (float64 for float64).
    """
    B, C = (_side(w, u) if isinstance(w, torch.Tensor) and w.dim() == 2 else w for w in (B, C))
    out, last_state = selective_scan(
        u,
        delta,
        _side(A, u),
        B,
        C,
        _side(D, u),
        z=z,
        delta_bias=_side(delta_bias, u),
        delta_softplus=delta_softplus,
        output_final_state=return_last_state,
    )
    return (out, last_state) if return_last_state else out


def mamba_inner_fn(
    xz: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    x_proj_weight: torch.Tensor,
    delta_proj_weight: torch.Tensor,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor | None = None,
    C: torch.Tensor | None = None,
    D: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    B_proj_bias: torch.Tensor | None = None,
    C_proj_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: torch.Tensor | None = None,
    c_rms_weight: torch.Tensor | None = None,
    dt_rms_weight: torch.Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> torch.Tensor:
    """What is behind Mamba's in_proj: convolution, projections, scan and out_proj; out `[B, L, d]`.

    Args:
        xz: `[B, 2 D, L]`, x and z.
        conv1d_weight: `[D, 1, W]`. conv1d_bias: `[D]` or None.
        x_proj_weight: `[R + 2 N, D]`: the rows of delta, B and C; without those of B or C where these are given.
        delta_proj_weight: `[D, R]`. out_proj_weight: `[d, D]`. out_proj_bias: `[d]` or None.
        A: `[D, N]` real. D, delta_bias: `[D]`.
        B, C: None: made of x. Else as in `selective_scan_fn`.
        B_proj_bias, C_proj_bias: `[N]`, added to the B and C made of x.
        checkpoint_lvl: 1: the backward makes the convolution's result and delta anew; 0: they are kept. The reference
            always keeps them, and so does every backend where an argument from B_proj_bias on, B or C is given.
        b_rms_weight, c_rms_weight: `[N]`: RMS-normalise the B and C made of x. dt_rms_weight: `[D]`: the same for delta
            before its bias.
        b_c_dt_rms_eps: added to the mean square in these.
    """
    op = "mamba_inner_fn"
    if checkpoint_lvl not in (0, 1):
        raise _checks.bad(ValueError, op, "checkpoint_lvl", "0 or 1", checkpoint_lvl)
    for name, made, *rest in (("B", B, B_proj_bias, b_rms_weight), ("C", C, C_proj_bias, c_rms_weight)):
        if made is not None and any(t is not None for t in rest):
            raise ValueError(f"{op}: a bias or norm of {name} must be None, got one: argument '{name}' is given.")
    (xz,) = _checks.autocast(xz)
    _check_inner(op, xz, conv1d_weight, x_proj_weight, delta_proj_weight, A, (B, C), D, delta_bias)
    conv_weight, conv_bias = _side(conv1d_weight[:, 0], xz), _side(conv1d_bias, xz)
    A, D, delta_bias = (_side(w, xz) for w in (A, D, delta_bias))
    weights = InnerWeights(conv_weight, conv_bias, x_proj_weight, delta_proj_weight, delta_bias, A, D)
    scan, extras = None, (B, C, B_proj_bias, C_proj_bias, b_rms_weight, c_rms_weight, dt_rms_weight)
    R, N = delta_proj_weight.shape[1], A.shape[1]
    if checkpoint_lvl == 1 and all(t is None for t in extras):
        scan = recomputing_scan(xz, (xz, *weights), N, "auto")
    if scan is not None:
        empty = InnerStates(None, None)
        y, _ = mamba_inner(xz.transpose(1, 2), weights, empty, scan, delta_softplus=delta_softplus)
    else:
        x, z = xz.chunk(2, 1)
        u, _ = causal_conv1d(x, conv_weight, conv_bias, activation="silu")
        rows = F.linear(u.transpose(1, 2), x_proj_weight)
        delta = _rms_norm(F.linear(rows[..., :R], delta_proj_weight), dt_rms_weight, b_c_dt_rms_eps)
        if B is None:
            B = _made_of_x(rows[..., R : R + N], B_proj_bias, b_rms_weight, b_c_dt_rms_eps)
        if C is None:
            C = _made_of_x(rows[..., rows.shape[-1] - N :], C_proj_bias, c_rms_weight, b_c_dt_rms_eps)
        y = selective_scan_fn(u, delta.transpose(1, 2), A, B, C, D, z, delta_bias, delta_softplus).transpose(1, 2)
    if out_proj_bias is not None:
        out_proj_bias = out_proj_bias.to(out_proj_weight.dtype)
    return F.linear(y, out_proj_weight, out_proj_bias)


def _check_inner(op, xz, conv1d_weight, x_proj_weight, delta_proj_weight, A, made, D, delta_bias):
    """Shapes and devices of what no op behind checks."""
    _checks.tensor(op, "xz", xz)
    _checks.tensor(op, "delta_proj_weight", delta_proj_weight)
    _checks.shape(op, "delta_proj_weight", delta_proj_weight, {"D": None, "R": None})
    channels, R = delta_proj_weight.shape
    _checks.shape(op, "xz", xz, {"B": None, "2 D": 2 * channels, "L": None})
    _check_real(op, A)
    _checks.shape(op, "A", A, {"D": channels, "N": None})
    rows = R + sum(w is None for w in made) * A.shape[1]
    _checks.shape(op, "conv1d_weight", conv1d_weight, {"D": channels, "1": 1, "W": None})
    _checks.shape(op, "x_proj_weight", x_proj_weight, {"R + 2 N": rows, "D": channels})
    for name, w in (("D", D), ("delta_bias", delta_bias)):
        if w is not None:
            _checks.shape(op, name, w, {"D": channels})
    _checks.same_device(op, "xz", xz=xz, A=A, D=D, delta_bias=delta_bias)


def _made_of_x(rows, bias, rms_weight, eps):
    """B or C `[B, N, L]` from its rows of x_proj's result, `[B, L, N]`."""
    if bias is not None:
        rows = rows + bias.to(rows.dtype)
    return _rms_norm(rows, rms_weight, eps).transpose(1, 2)


def _rms_norm(x, weight, eps):
    """x / sqrt(mean x^2 + eps) * weight in float32 or better; x itself without a weight."""
    if weight is None:
        return x
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps).to(x.dtype)


@torch.no_grad()
def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decoding (`fla_ops.selective_scan_step`): out as x, `state` updated in place. Records no gradient.

    Args:
        state: `[B or slots, D, N]`, or `[B or slots, H, P, N]` for heads of P channels.
        x, dt, z: `[B, D]` or `[B, H, P]`. Each of them, B and C may have a dtype of its own.
        A: `[D, N]` or `[H, P, N]`. D, dt_bias: `[D]` or `[H, P]`.
        B, C: `[B, N]`, or `[B, G, N]`, one for each of G groups of consecutive channels or heads.
        state_batch_indices: int `[B]`: the slot of each row; a negative one is padding: output 0, nothing written.
    """
    op = "selective_state_update"
    _checks.tensor(op, "state", state)
    if state.dim() not in (3, 4):
        raise _checks.bad(ValueError, op, "state", "of shape [B, D, N] or [B, H, P, N]", list(state.shape))
    inner = dict(zip("D" if state.dim() == 3 else "HP", state.shape[1:-1], strict=True))
    given = {"x": x, "dt": dt, "A": A, "D": D, "z": z, "dt_bias": dt_bias}
    for name, w in given.items():
        if w is not None or name in ("x", "dt", "A"):
            _checks.tensor(op, name, w)
            lead = {"B": x.shape[0]} if name in ("x", "dt", "z") else {}
            _checks.shape(op, name, w, lead | inner | ({"N": state.shape[-1]} if name == "A" else {}))
    _check_real(op, A)
    dtype = x.dtype
    for name, w in {"dt": dt, "B": B, "C": C, "z": z}.items():
        if w is not None or name != "z":
            _checks.tensor(op, name, w)
            dtype = torch.promote_types(dtype, w.dtype)
    B, C = (w[:, None] if w.dim() == 2 else w for w in (B, C))
    # Heads are channels side by side; the copy that flatten may make of a strided state is written back.
    channels = state.flatten(1, -2)
    x_, dt, z = (None if w is None else w.flatten(1).to(dtype) for w in (x, dt, z))
    D, dt_bias = (None if w is None else _side(w.flatten(), x_) for w in (D, dt_bias))
    out = selective_scan_step(
        x_,
        dt,
        _side(A.flatten(0, -2), x_),
        B.to(dtype),
        C.to(dtype),
        D,
        state=channels,
        z=z,
        delta_bias=dt_bias,
        delta_softplus=dt_softplus,
        state_indices=None if state_batch_indices is None else state_batch_indices.clamp(min=-1),
    )
    if channels.data_ptr() != state.data_ptr():
        state.copy_(channels.view(state.shape))
    return out.view(x.shape).to(x.dtype)


class Mamba(layers.Mamba):
    """`fla_ops.layers.Mamba` with mamba-ssm's constructor, forward, step and inference cache.

    Args:
        use_fast_path: False: never take the path that recomputes the convolution and delta in the backward.
        layer_idx: this layer's key in `inference_params.key_value_memory_dict`.
        Others: as in `fla_ops.layers.Mamba`.
    """

    def __init__(
        self,
        d_model,
        d_state=16,
        d_conv=4,
        expand=2,
        dt_rank="auto",
        dt_min=0.001,
        dt_max=0.1,
        dt_init="random",
        dt_scale=1.0,
        dt_init_floor=1e-4,
        conv_bias=True,
        bias=False,
        use_fast_path=True,
        layer_idx=None,
        device=None,
        dtype=None,
    ):
        arguments = (d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        super().__init__(*arguments, conv_bias, bias, device=device, dtype=dtype)
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx

    def forward(self, hidden_states: torch.Tensor, inference_params: object | None = None) -> torch.Tensor:
        """hidden_states `[B, L, d]` -> `[B, L, d]`.

        With `inference_params` (of attributes key_value_memory_dict and seqlen_offset) the layer's cache is made if it
        is not there, and written in place: from the start of the sequence where seqlen_offset is 0, else after what it
        holds. Then, too, L may be any number, where theirs takes one token.
        """
        if inference_params is None:
            return super().forward(hidden_states)
        op = type(self).__name__
        self._check_input(op, "hidden_states", hidden_states, ("B", "L"))
        conv_state, ssm_state = self._get_states_from_cache(inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset == 0:
            conv_state.zero_()
            ssm_state.zero_()
        elif hidden_states.shape[1] == 1:
            return self.step(hidden_states, conv_state, ssm_state)[0]
        xz = self.in_proj(hidden_states)
        state = LayerState(conv_state[:, :, 1:].clone(), ssm_state.clone())
        y, state = self._inner(xz, None, state, True)
        self._shift_in(conv_state, xz)
        ssm_state.copy_(state.recurrent.detach())
        return self.out_proj(y)

    @torch.no_grad()
    def step(
        self, hidden_states: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One token `[B, 1, d]`: (out `[B, 1, d]`, conv_state, ssm_state), both states updated in place.

        conv_state `[B, Di, W]`, the last W inputs of the convolution, oldest first; ssm_state `[B, Di, N]`. Records no
        gradient.
        """
        op = f"{type(self).__name__}.step"
        _checks.tensor(op, "hidden_states", hidden_states)
        _checks.shape(op, "hidden_states", hidden_states, {"B": None, "1": 1, "d_model": self.d_model})
        batch = hidden_states.shape[0]
        _checks.shape(op, "conv_state", conv_state, {"B": batch, "Di": self.d_inner, "W": self.d_conv})
        _checks.shape(op, "ssm_state", ssm_state, {"B": batch, "Di": self.d_inner, "N": self.d_state})
        xz = self.in_proj(hidden_states)
        y = self._inner_token(xz[:, 0], LayerState(conv_state[:, :, 1:].clone(), ssm_state))
        self._shift_in(conv_state, xz)
        return self.out_proj(y)[:, None], conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(conv_state `[B, Di, W]`, ssm_state `[B, Di, N]`) of zeros, in the weights' dtypes; max_seqlen is ignored."""
        conv, dt = self.conv1d.weight, self.dt_proj.weight
        sizes = ((conv, self.d_conv), (dt, self.d_state))
        return tuple(
            torch.zeros(batch_size, self.d_inner, size, device=w.device, dtype=dtype or w.dtype) for w, size in sizes
        )

    def _get_states_from_cache(self, inference_params, batch_size):
        if self.layer_idx is None:
            raise ValueError(f"{type(self).__name__}: argument 'layer_idx' must be given to use inference_params.")
        caches = inference_params.key_value_memory_dict
        if self.layer_idx not in caches:
            caches[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        return caches[self.layer_idx]

    def _shift_in(self, conv_state: torch.Tensor, xz: torch.Tensor) -> None:
        """The inputs x of xz `[B, L, 2 Di]` enter the cache `[B, Di, W]` on the right; all W columns are written."""
        x = xz.detach()[..., : self.d_inner].transpose(1, 2)
        columns = torch.cat([conv_state, x[:, :, -self.d_conv :].to(conv_state.dtype)], 2)
        conv_state.copy_(columns[:, :, columns.shape[2] - self.d_conv :])

    def _recomputing_scan(self, xz, *states):
        return super()._recomputing_scan(xz, *states) if self.use_fast_path else None


def _side(w: torch.Tensor | None, u: torch.Tensor) -> torch.Tensor | None:
    """A parameter in a dtype that the op takes beside u; what is no real tensor is left for the op to refuse."""
    return _conv_cache.weight_for(u, w) if isinstance(w, torch.Tensor) and w.is_floating_point() else w


def _check_real(op: str, A: torch.Tensor) -> None:
    _checks.tensor(op, "A", A)
    if A.is_complex():
        raise _checks.bad(TypeError, op, "A", "real", A.dtype, "Only the real scan is implemented.")
