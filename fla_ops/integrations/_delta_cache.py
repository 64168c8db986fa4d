# SPDX-License-Identifier: Apache-2.0
"""transformers' cache with `DeltaKVCache`s for layers.

A model hands new keys and values to `Cache.update`, and what that returns to its attention function, which alone knows
the padding. So `update` returns two tensors without memory that carry the layer and what is new; the attention function
unwraps them and lets the layer append and attend. Any other use of the two is an error: a model that reads the keys it
gets back would need all of them, dense.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from .. import _checks, _sparse_options
from ..delta_kv_cache import DeltaKVCache
from ..layers._packing import kept_tokens, pack, unpack
from ..temporal_sparse_attention import temporal_sparse_attention

SETTINGS = "temporal_sparse"  # the attribute of an attention module that holds its `Settings`
ROLLBACK = 64  # tokens that can be taken back; assisted generation drafts about 20 at a time


@dataclass(frozen=True)
class Settings:
    """What `enable_temporal_sparse` says about one layer."""

    threshold: float | torch.Tensor
    window: int | float
    sink: int
    window_mode: str
    look: Callable | None = None  # sees (q, k, scale, stats) of each prefill: calibration

    def options(self, device: torch.device) -> dict[str, object]:
        threshold = self.threshold
        if isinstance(threshold, torch.Tensor):
            threshold = threshold.to(device)
        return {"threshold": threshold, "window": self.window, "sink": self.sink, "window_mode": self.window_mode}


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor | None,
    scale: float | None,
    settings: Settings,
) -> torch.Tensor:
    """Attention of whole sequences q `[B, T, HQ, D]`, k, v `[B, T, HK, D | DV]` -> `[B, T, HQ, DV]`, differentiable.

    keep: bool `[B, T]`, or None for all. What is not kept leaves before anything sees it, its output is zero.
    """
    options = settings.options(q.device) | {"scale": scale}
    if keep is None:
        o, stats = temporal_sparse_attention(q, k, v, **options, return_stats=settings.look is not None)
        if settings.look:
            settings.look(q, k, scale, stats)
        return o
    batch, length, heads, _ = q.shape
    options["window"] = _sparse_options.in_tokens(options["window"], length)  # as the cache has it: padding counts
    indices, cu_seqlens = kept_tokens("temporal_sparse_attention", keep, batch, length, q.device)
    packed = (pack(x.flatten(2), indices).unflatten(2, x.shape[2:]) for x in (q, k, v))
    o = temporal_sparse_attention(*packed, cu_seqlens=cu_seqlens, **options).o
    return unpack(o.flatten(2), indices, batch, length).unflatten(2, (heads, -1))


class DeltaLayer(CacheLayerMixin):
    """One layer's `DeltaKVCache` behind transformers' interface. Tensors there are `[B, H, T, D]`."""

    supports_early_init = False
    is_croppable = True
    is_sliding = False

    def __init__(self, settings: Settings, max_len: int | None, rollback: int):
        super().__init__()
        self.settings, self.max_len, self.rollback = settings, max_len, rollback
        self.cache: DeltaKVCache | None = None  # made with the first keys, on their device

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        options = self.settings.options(key_states.device)
        self.cache = DeltaKVCache(**options, max_len=self.max_len, rollback=self.rollback)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Stand-ins for all keys and values, which the attention function gives to `attend`."""
        if self.cache is None:
            self.lazy_initialization(key_states, value_states)
        return tuple(Pending(self, new, self.cache.length) for new in (key_states, value_states))

    def attend(self, q, k, v, keep: torch.Tensor | None, scale: float | None) -> torch.Tensor:
        """Append new tokens, k, v `[B, T, HK, D | DV]`, and attend them, q `[B, T, HQ, D]` -> `[B, T, HQ, DV]`.

        The first tokens' attention is differentiable; the cache has no gradient.
        """
        q, k, v = _checks.autocast(q, k, v)
        if self.cache.length:
            self.cache.append(k, v, mask=keep)
            return self.cache.attend(q, scale=scale)
        o = prefill(q, k, v, keep, scale, self.settings)
        with torch.no_grad():
            self.cache.append(k, v, mask=keep, queries=min(1, k.shape[1]))
        return o

    @property
    def batch_size(self) -> int:
        return len(self.cache.lengths) if self.cache else 0

    def get_seq_length(self) -> int:
        return self.cache.length if self.cache else 0

    def get_max_length(self) -> int:
        return -1 if self.max_len is None else self.max_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        self.cache, self.is_initialized = None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove tokens."""
        if tokens_to_remove > 0:
            hint = "It is minus the number of tokens to take back."
            raise _checks.bad(ValueError, "DeltaCache.crop", "tokens_to_remove", "at most 0", tokens_to_remove, hint)
        if tokens_to_remove and self.cache:
            self.cache.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.cache:
            self.cache.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reorder_cache(torch.arange(self.batch_size)[indices.cpu()])

    def offload(self):
        raise NotImplementedError("DeltaCache: offloading is not supported; the cache stays on the model's device.")

    prefetch = offload


class DeltaCache(Cache):
    """The cache of a model under `enable_temporal_sparse`: a `DeltaKVCache` a layer, with the layer's thresholds.

    `generate` and forward passes with `use_cache=True` make one by themselves. Make it by hand to keep it, to bound it,
    or to start several calls from one prompt (`copy.deepcopy`).

    Args:
        model: a model under `enable_temporal_sparse`. Its thresholds of now are the cache's.
        max_len: tokens that a row may come to; memory for their values is taken at once. None: no limit.
        rollback: how many of the last tokens `crop` can always take back, as assisted generation does. That many keys
            stay unpacked beside those of the window.

    Raises:
        ValueError, TypeError: the model is not under `enable_temporal_sparse`; a wrong size.
    """

    def __init__(self, model: nn.Module, *, max_len: int | None = None, rollback: int = ROLLBACK):
        op = "DeltaCache"
        if not isinstance(model, nn.Module):
            raise _checks.bad(TypeError, op, "model", "an nn.Module", type(model).__name__)
        settings = layer_settings(model)
        if not settings:
            got = f"{type(model).__name__} without it"
            raise _checks.bad(ValueError, op, "model", "a model under enable_temporal_sparse", got)
        if max_len is not None:
            _checks.count(op, "max_len", max_len, 1)
        _checks.count(op, "rollback", rollback, 0)
        super().__init__(layers=[DeltaLayer(s, max_len, rollback) for s in settings])

    @property
    def nbytes(self) -> int:
        """The bytes of all memory that the layers hold, room to grow included."""
        return sum(layer.cache.nbytes for layer in self.layers if layer.cache)


def layer_settings(model: nn.Module) -> list[Settings]:
    """The settings of the model's attention layers, by layer; empty where there are none."""
    found = {m.layer_idx: getattr(m, SETTINGS) for m in model.modules() if hasattr(m, SETTINGS)}
    return [found[i] for i in sorted(found)]


def replace_empty(cache: Cache, model: nn.Module) -> None:
    """Make transformers' default cache a `DeltaCache` before anything is in it. Whoever holds it, `generate` above all,
    keeps holding it."""
    stock = type(cache) is DynamicCache
    if not stock or cache.offloading or cache.get_seq_length():
        state = "" if not stock else "offloading " if cache.offloading else "filled "
        raise ValueError(
            f"{type(model).__name__} runs temporal-sparse attention and cannot use a {state}{type(cache).__name__}. "
            "Pass past_key_values=DeltaCache(model), of fla_ops.integrations.transformers, or no cache at all."
        )
    vars(cache).update(vars(DeltaCache(model)))
    cache.__class__ = DeltaCache


class Pending(torch.Tensor):
    """All keys, or all values, of a `DeltaLayer`: shape, dtype and device, but no memory."""

    @staticmethod
    def __new__(cls, layer: DeltaLayer, new: torch.Tensor, past: int):
        batch, heads, tokens, size = new.shape
        shape = (batch, heads, past + tokens, size)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=new.dtype, device=new.device)

    def __init__(self, layer: DeltaLayer, new: torch.Tensor, past: int):
        self.layer, self.new = layer, new

    # Attributes need no dispatch, and what computes is refused one level below.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(
            f"DeltaCache: the model calls {func} on the keys or values that its cache returned, which are packed and "
            "only go to the attention function of enable_temporal_sparse. A model that reads them itself cannot run on "
            "a DeltaCache: pass use_cache=False. A model without enable_temporal_sparse needs its own cache."
        )

    def __repr__(self):
        return f"Pending({list(self.shape)}, {self.dtype})"
