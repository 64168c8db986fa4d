# SPDX-License-Identifier: Apache-2.0
"""fla_ops under `MambaForCausalLM` and `FalconMambaForCausalLM` of transformers, in place.

    model = AutoModelForCausalLM.from_pretrained("state-spaces/mamba-130m-hf")
    accelerate(model)

Every Mamba mixer of the model becomes an instance of a subclass of its class: parameters, buffers, hooks and the
state_dict stay what they are, and so do the cache and `generate`. Only the mixer's forward is another: it runs
`causal_conv1d`, `selective_scan` and their steps.

What differs from the stock mixers beside speed:
- several tokens on top of a cache continue from the cached state, where the stock scan starts from zero;
- masked tokens are dropped, wherever they lie: neither the convolution nor the state sees them, their outputs are zero;
- LoRA and other wrappers of `dt_proj` take effect. `conv1d` is read, not called, as the stock mixers do.
"""

import types

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer

from .. import _checks
from ..causal_conv1d import MAX_WIDTH, causal_conv1d
from ..compat import _conv_cache
from ..layers._packing import kept_tokens, pack, unpack
from ..layers._plain import is_plain
from ..selective_scan import selective_scan, selective_scan_step


class _AcceleratedMixer:
    """The forward that both mixers share. T is this call's tokens, Di the mixer's inner width, N its state size."""

    @force_accelerate_hooks("conv1d")  # its weight is read without a call, which an offloaded module must be told
    def forward(self, hidden_states, cache_params=None, attention_mask=None):
        """hidden_states `[B, T, d]` -> `[B, T, d]`.

        cache_params: the cache whose layer `layer_idx` holds the states: read, continued from, and written.
        attention_mask: `[B, T]`, or `[B, past + T]`, of which the last T columns count; nonzero = keep. Its values are
            read on the host, on a GPU at the price of a sync.
        """
        batch, length = hidden_states.shape[:2]
        if attention_mask is not None:
            kept = _kept(self, attention_mask, batch, length)
            indices, cu_seqlens = kept_tokens(type(self).__name__, kept, batch, length, hidden_states.device)
            if indices.shape[0] < batch * length:
                y = self._sequences(pack(hidden_states, indices), cache_params, cu_seqlens)
                return unpack(y, indices, batch, length)
        if length == 1 and self._can_step(cache_params):
            return self._token(hidden_states[:, 0], cache_params)[:, None]
        return self._sequences(hidden_states, cache_params, None)

    def _sequences(self, hidden_states, cache, cu_seqlens):
        """Whole sequences, or with cu_seqlens `[B + 1]` the kept tokens of all rows packed into `[1, kept, d]`."""
        # [B, Di, T] with channels last in memory, which the kernels read as it is.
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, 1)
        state = _states(cache, self.layer_idx)[1]
        if state is not None and torch.is_grad_enabled():
            state = state.clone()  # the new state is written over it, before a backward pass reads it
        u = self._convolve(x, cache, cu_seqlens)
        delta, delta_bias, B, C = self._selection(u.transpose(1, 2))
        y, final_state = selective_scan(
            u,
            delta.transpose(1, 2),
            self._decay(),
            B.transpose(1, 2),
            C.transpose(1, 2),
            _wide(self.D),
            z=z,
            delta_bias=delta_bias,
            delta_softplus=True,
            initial_state=state,
            output_final_state=cache is not None,
            cu_seqlens=cu_seqlens,
        )
        if cache is not None:
            cache.update_recurrent_state(final_state, self.layer_idx)
        return self.out_proj(y.transpose(1, 2))

    def _convolve(self, x, cache, cu_seqlens):
        """silu(conv1d(x)) from the cached inputs; the cache takes the newest."""
        width = self.conv_kernel_size
        past = _states(cache, self.layer_idx)[0]
        if past is not None:  # the last width - 1 columns, a copy; a cache that records may have more, or fewer
            past = F.pad(past, (width - 1 - past.shape[2], 0))
        u, newest = causal_conv1d(
            x,
            _conv_cache.weight_for(x, self.conv1d.weight[:, 0]),
            _conv_cache.weight_for(x, self.conv1d.bias),
            activation="silu",
            initial_state=past,
            output_final_state=cache is not None and cu_seqlens is not None,
            cu_seqlens=cu_seqlens,
        )
        if cache is not None:
            if cu_seqlens is not None:  # the columns of a row are not x's; the first of width is read by nobody
                x = F.pad(newest, (1, 0)).to(x.dtype)
            elif not cache.layers[self.layer_idx].record_past:
                x = x[:, :, -width:]  # what stays of it
            cache.update_conv_state(x, self.layer_idx, conv_kernel_size=width)
        return u

    def _can_step(self, cache) -> bool:
        """Whether one token can be a step, which writes to the cached states: not if a gradient may need the old ones,
        nor if the cache has none or keeps them all."""
        if cache is None or torch.is_grad_enabled() or cache.layers[self.layer_idx].record_past:
            return False
        return _states(cache, self.layer_idx)[1] is not None

    def _token(self, hidden_states, cache):
        """One token `[B, d]` -> `[B, d]`; the cached states are updated in place."""
        x, z = self.in_proj(hidden_states).chunk(2, 1)
        conv_state, state = _states(cache, self.layer_idx)
        u = _conv_cache.step(x, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, "silu")
        delta, delta_bias, B, C = self._selection(u)
        A, D = self._decay(), _wide(self.D)
        options = {"z": z, "delta_bias": delta_bias, "delta_softplus": True}
        return self.out_proj(selective_scan_step(u, delta, A, B, C, D, state=state, **options))

    def _selection(self, u):
        """(delta, the bias that the scan adds to it or None, B, C) of u `[..., Di]`, channels last."""
        time_step, B, C = self._projections(u)
        if is_plain(self.dt_proj, nn.Linear):  # the scan adds the bias in float32
            return F.linear(time_step, self.dt_proj.weight), _wide(self.dt_proj.bias), B, C
        return self.dt_proj(time_step), None, B, C

    def _projections(self, u):
        """(time step `[..., rank]`, B `[..., N]`, C `[..., N]`)"""
        return self.x_proj(u).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], -1)

    def _decay(self):
        return -_wide(self.A_log).exp()


class AcceleratedMambaMixer(_AcceleratedMixer, MambaMixer):
    """transformers' MambaMixer on fla_ops' kernels. `accelerate` makes them."""


class AcceleratedFalconMambaMixer(_AcceleratedMixer, FalconMambaMixer):
    """transformers' FalconMambaMixer on fla_ops' kernels. `accelerate` makes them."""

    def _projections(self, u):
        time_step, B, C = super()._projections(u)
        return self.dt_layernorm(time_step), self.b_layernorm(B), self.c_layernorm(C)


_ACCELERATED = {MambaMixer: AcceleratedMambaMixer, FalconMambaMixer: AcceleratedFalconMambaMixer}
_STOCK = {ours: stock for stock, ours in _ACCELERATED.items()}


def accelerate(model: nn.Module) -> nn.Module:
    """Run the Mamba mixers of `model` on fla_ops, in place, and return it.

    Logits, generated tokens and gradients are those of the stock model up to rounding. `copy.deepcopy` and `pickle`
    keep the acceleration, `save_pretrained` and `state_dict` know nothing of it; a second call changes nothing.

    Args:
        model: any module that holds `MambaMixer`s or `FalconMambaMixer`s of transformers: a `MambaForCausalLM`, a
            `FalconMambaForCausalLM`, one of their parts, or a wrapper such as PEFT's. On any device, in any dtype that
            the ops take.

    Raises:
        ValueError: there is no such mixer, or one that the kernels cannot run (an activation other than SiLU, a
            convolution wider than 8); nothing is changed then.
    """
    mixers = _mixers("accelerate", model)
    for name, mixer in mixers:
        if mixer.activation not in ("silu", "swish"):
            expected = 'a model whose hidden_act is "silu" or "swish"'
            raise _checks.bad(ValueError, "accelerate", "model", expected, f"{mixer.activation!r} in {name or 'it'}")
        if mixer.conv_kernel_size > MAX_WIDTH:
            expected = f"a model whose conv_kernel is at most {MAX_WIDTH}"
            raise _checks.bad(ValueError, "accelerate", "model", expected, mixer.conv_kernel_size)
    for _, mixer in mixers:
        _change_class(mixer, _ACCELERATED.get(type(mixer), type(mixer)))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate` in place, and return `model`: each mixer is of transformers' very class again.

    Raises:
        ValueError: there is no mixer of either kind in `model`.
    """
    for _, mixer in _mixers("restore", model):
        _change_class(mixer, _STOCK.get(type(mixer), type(mixer)))
    return model


def _mixers(op: str, model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The mixers of `model` by name, accelerated or not. Subclasses of others may have a forward that must stay."""
    if not isinstance(model, nn.Module):
        raise _checks.bad(TypeError, op, "model", "an nn.Module", type(model).__name__)
    found = [(name, m) for name, m in model.named_modules() if type(m) in _ACCELERATED or type(m) in _STOCK]
    if not found:
        kinds = " or ".join(kind.__name__ for kind in _ACCELERATED)
        expected = f"a model with mixers of transformers' classes {kinds}"
        raise _checks.bad(ValueError, op, "model", expected, f"{type(model).__name__} without one")
    return found


def _change_class(mixer: nn.Module, new: type) -> None:
    """Make `mixer` one of `new`. The hooks of a model that is spread over devices keep the forward that they found."""
    for name in ("forward", "_old_forward"):
        kept = vars(mixer).get(name)
        if isinstance(kept, types.MethodType) and kept.__func__ is type(mixer).forward:
            setattr(mixer, name, types.MethodType(new.forward, mixer))
    mixer.__class__ = new


def _states(cache, layer_idx: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The cached (convolution inputs `[B, Di, W]`, recurrent state `[B, Di, N]`), None before the first tokens."""
    layer = None if cache is None else cache.layers[layer_idx]
    if layer is None or not layer.has_previous_state[0]:
        return None, None
    return layer.conv_states[0], layer.recurrent_states[0]


def _kept(mixer: nn.Module, mask: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """The columns of `mask` that are for this call's tokens, as booleans."""
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length:
        expected = f"of shape [B={batch}, T={length}], or that with columns for past tokens before"
        raise _checks.bad(ValueError, type(mixer).__name__, "attention_mask", expected, list(mask.shape))
    return mask[:, -length:] != 0


def _wide(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """In float32 at least, as A, D and the bias are used."""
    if parameter is None:
        return None
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))
