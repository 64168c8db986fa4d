# SPDX-License-Identifier: Apache-2.0
"""DeltaLLM's temporal-sparse attention under any decoder of transformers that uses its attention interface, in place.

    model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    enable_temporal_sparse(model, Thresholds.load("smollm2.safetensors"), window=128)
    model.generate(**inputs)

An attention function is registered under a name of its own, and the model's config names it. Before a forward pass a
hook puts a `DeltaCache` in the place of transformers' empty default cache. No code of the model is touched: weights,
state_dict, `save_pretrained` and `copy.deepcopy` stay what they are.

What differs from the model's own attention beside keys that are held:
- masked tokens leave before anything sees them: a padded row is as it would be alone, and attention says zero there;
- gradients reach the keys and values of the same forward pass, never those in a cache.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from .. import _checks, _sparse_options
from ._delta_cache import SETTINGS, DeltaCache, Pending, Settings, prefill, replace_empty

NAME = "fla_ops_temporal_sparse"
HOOK = "_temporal_sparse_hook"  # on the decoder: the handle of its hook, and what the config said before
OP = "temporal-sparse attention"
# Arguments of attention functions that change what attention is; each is refused unless it is absent, None or False.
UNSUPPORTED = {
    "sliding_window": "a sliding window",
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks with learnt scores",
    "position_bias": "a position bias",
    "head_mask": "a head mask",
    "output_attentions": "output_attentions",
    "cache": "a paged cache",
    "cu_seq_lens_q": "packed sequences",
}


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query `[B, HQ, T, D]`, key, value `[B, HK, T, D | DV]` -> `[B, T, HQ, DV]`."""
    settings = getattr(module, SETTINGS, None)
    if settings is None:
        raise RuntimeError(f"{type(module).__name__} has no thresholds. Call enable_temporal_sparse(model, ...) first.")
    for name, what in UNSUPPORTED.items():
        _refuse(kwargs.get(name) is not None and kwargs[name] is not False, what)
    _refuse(dropout > 0, f"attention dropout in training (attention_dropout={dropout})")
    _refuse(is_causal is False or not getattr(module, "is_causal", True), "attention that is not causal")
    past = key.shape[2] - query.shape[2]
    keep, before = _kept(attention_mask, query.shape[0], query.shape[2], past)
    q = query.transpose(1, 2)
    if isinstance(key, Pending):
        layer, k, v = key.layer, key.new.transpose(1, 2), value.new.transpose(1, 2)
        if past and before is not None and before.sum(1).tolist() != layer.cache.lengths.tolist():
            raise ValueError(f"{OP}: attention_mask masks other past tokens than when the cache took them.")
        return layer.attend(q, k, v, keep, scaling), None
    if past:
        raise ValueError(
            f"{OP}: the keys are {past} tokens longer than the queries and come from another cache. Pass "
            "past_key_values=DeltaCache(model), of fla_ops.integrations.transformers, or no cache at all."
        )
    return prefill(q, key.transpose(1, 2), value.transpose(1, 2), keep, scaling, settings), None


def _refuse(condition: bool, what: str) -> None:
    if condition:
        raise ValueError(f"{OP}: {what} is not supported. disable_temporal_sparse(model) restores the model's own.")


def _kept(mask: torch.Tensor | None, batch: int, length: int, past: int):
    """(which new tokens are not padding, bool `[B, length]`; which past ones, `[B, past]`) of a mask that says nothing
    but "causal, and these keys are padding", bool `[B, 1, length, past + length]`. None: all are kept; no mask."""
    if mask is None or length == 0:
        return None, None
    known = getattr(mask, "_fla_ops_kept", None)  # one mask goes to every layer
    if known is None:
        shape = (batch, 1, length, past + length)
        if mask.dtype != torch.bool or mask.shape != shape:
            expected, got = f"bool of shape {list(shape)}", f"{mask.dtype} {list(mask.shape)}"
            hint = "transformers makes it of a mask of 0 and 1 of shape [B, past + T]."
            raise _checks.bad(ValueError, OP, "attention_mask", expected, got, hint)
        columns = mask[:, 0, -1]  # the last query sees all keys but padding
        causal = torch.ones(shape[2:], dtype=torch.bool, device=mask.device).tril(past)
        _refuse(not torch.equal(mask[:, 0], causal & columns[:, None]), "a mask other than a causal one with padding")
        known = mask._fla_ops_kept = (None if columns[:, past:].all() else columns[:, past:], columns[:, :past])
    return known


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without one there is no mask at all, and padding would be attended


def enable_temporal_sparse(
    model: PreTrainedModel,
    thresholds: float | torch.Tensor | Sequence | Mapping,
    window: int | float,
    sink: int = 0,
    *,
    window_mode: str = "band",
) -> PreTrainedModel:
    """Run the attention of `model` as temporal-sparse attention (arXiv 2507.19608), in place, and return it.

    A key channel, after the rotary embedding, is held until it moves by more than a threshold; a query reads the keys
    of its window exactly, the others as they were held:

        K_hat[t, c] = K[t, c] if not |K[t, c] - K_hat[t-1, c]| <= theta[c], else K_hat[t-1, c]

    `generate` and every forward pass with `use_cache=True` fill a `DeltaCache`, where far keys are stored by what
    changed. Without a cache attention is `fla_ops.temporal_sparse_attention`, and differentiable. A second call changes
    the thresholds; `disable_temporal_sparse` undoes it.

    Args:
        model: a decoder of transformers whose attention goes through its attention interface (Llama, Qwen2, Qwen3,
            SmolLM, ...).
        thresholds: theta: a number >= 0 for all layers, or for each layer, by a list or by a dict from layer indices, a
            number or a float tensor that broadcasts to `[HK, D]`, key heads and head dimension; what
            `fla_ops.calibration` returns. 0 is exact attention.
        window: tokens that a query sees exactly, itself among them: an int >= 1; or a float in (0, 1], that part of a
            call's first tokens, fixed then for all that follow on the same cache.
        sink: how many of the first keys are always exact.
        window_mode: "band", query i sees keys j > i - window exactly, or "block", those with j // window == i //
            window.

    Raises:
        ValueError, TypeError: a wrong value or type, or a model that cannot run so: no attention modules behind the
            interface, an encoder, a sliding window, soft-capped scores, learnt sinks. Nothing is changed then.

    A model in training whose attention_dropout is not 0, a mask other than a causal one with padding, and
    output_attentions are errors of the forward pass.
    """
    op = "enable_temporal_sparse"
    modules = check_arguments(op, model, window, sink, window_mode)
    found = [
        Settings(_threshold(op, theta, modules[i]), window, sink, window_mode)
        for i, theta in _by_layer(op, thresholds, sorted(modules)).items()
    ]
    decoder = _decoder(model, modules)
    if not hasattr(decoder, HOOK):
        previous = decoder.config._attn_implementation
        decoder.set_attn_implementation(NAME)
        setattr(decoder, HOOK, (decoder.register_forward_pre_hook(_bring_cache, with_kwargs=True), previous))
    for settings, i in zip(found, sorted(modules), strict=True):
        setattr(modules[i], SETTINGS, settings)
    return model


def disable_temporal_sparse(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `enable_temporal_sparse` in place, and return `model`. A `DeltaCache` is of no use to it any more.

    Raises:
        ValueError: `model` is not under `enable_temporal_sparse`.
    """
    op = "disable_temporal_sparse"
    decoder = next((m for m in _modules(op, model) if hasattr(m, HOOK)), None)
    if decoder is None:
        got = f"{type(model).__name__} without it"
        raise _checks.bad(ValueError, op, "model", "a model under enable_temporal_sparse", got)
    handle, previous = getattr(decoder, HOOK)
    handle.remove()
    delattr(decoder, HOOK)
    for module in model.modules():
        if hasattr(module, SETTINGS):
            delattr(module, SETTINGS)
    decoder.set_attn_implementation(previous)
    return model


@contextlib.contextmanager
def watching(model: PreTrainedModel, look: Callable, thresholds: object = None, **options):
    """The decoder of `model` in eval mode, temporally sparse by `thresholds` and `options`, or as it is if it is so.

    `look(layer, q, k, scale, stats)` is called at every attention without padding over q `[B, T, HQ, D]` and k `[B, T,
    HK, D]`, with the op's statistics. At the end all is as it was.
    """
    before = [(m, m.training, getattr(m, SETTINGS, None)) for m in model.modules()]
    enabled = any(settings for _, _, settings in before)
    try:
        model.eval()
        if thresholds is not None:
            enable_temporal_sparse(model, thresholds, **options)
        for module in model.modules():
            if hasattr(module, SETTINGS):
                settings = replace(getattr(module, SETTINGS), look=functools.partial(look, module.layer_idx))
                setattr(module, SETTINGS, settings)
        yield next(m for m in model.modules() if hasattr(m, HOOK))
    finally:
        for module, training, settings in before:
            module.training = training
            if settings:
                setattr(module, SETTINGS, settings)
        if not enabled and any(hasattr(m, HOOK) for m in model.modules()):
            disable_temporal_sparse(model)


def _bring_cache(decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Before a decoder's forward: a `DeltaCache` where it would use transformers' default one."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, DeltaCache):
        return None
    if cache is not None:
        replace_empty(cache, decoder)
        return None
    use_cache = kwargs.get("use_cache")
    use_cache = decoder.config.use_cache if use_cache is None else use_cache
    if not use_cache or (decoder.training and getattr(decoder, "gradient_checkpointing", False)):
        return None
    return args, kwargs | {"past_key_values": DeltaCache(decoder)}


def _modules(op: str, model: object):
    if not isinstance(model, PreTrainedModel):
        raise _checks.bad(TypeError, op, "model", "a PreTrainedModel of transformers", type(model).__name__)
    return model.modules()


def _attention_modules(op: str, model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention modules by layer, or the reason why this model has none that can run."""

    def refuse(got):
        return _checks.bad(ValueError, op, "model", "a decoder with full causal attention in every layer", got)

    found = [m for m in _modules(op, model) if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")]
    if not found or not getattr(model, "_supports_attention_backend", False):
        raise refuse(f"{type(model).__name__}, whose attention does not go through transformers' attention interface")
    if getattr(model.config, "is_encoder_decoder", False):
        raise refuse(f"{type(model).__name__}, an encoder and a decoder")
    layers = {m.layer_idx: m for m in found}
    if len(layers) != len(found):
        raise refuse(f"{type(model).__name__} with several attention modules a layer")
    for i, module in layers.items():
        config = getattr(module, "config", model.config)
        types = getattr(config, "layer_types", None) or ()
        window = getattr(module, "sliding_window", None if types else getattr(config, "sliding_window", None))
        if window is not None:
            raise refuse(f"sliding_window={window} in layer {i}")
        if i < len(types) and types[i] != "full_attention":
            raise refuse(f"{types[i]} in layer {i}")
        if len(types) > len(found):
            raise refuse(f"{len(found)} attention modules in {len(types)} layers")
        if not getattr(module, "is_causal", True):
            raise refuse(f"attention that is not causal in layer {i}")
        if getattr(config, "attn_logit_softcapping", None) is not None:
            raise refuse(f"attn_logit_softcapping={config.attn_logit_softcapping}")
        if hasattr(module, "sinks"):
            raise refuse(f"learnt attention sinks in layer {i}")
    return layers


def check_arguments(op: str, model: object, window: object, sink: object, window_mode: object) -> dict[int, nn.Module]:
    """The attention modules by layer of a model that can run so."""
    modules = _attention_modules(op, model)
    _sparse_options.window(op, window)
    _checks.count(op, "sink", sink, 0)
    _sparse_options.window_mode(op, window_mode)
    return modules


def _by_layer(op: str, thresholds: object, layers: list[int]) -> dict[int, object]:
    """Each layer's threshold as it was given."""
    name, want = "thresholds", f"a number, or one for each of {len(layers)} layers"
    if isinstance(thresholds, Mapping):
        if set(thresholds) != set(layers):
            missing, other = set(layers) - set(thresholds), set(thresholds) - set(layers)
            got = f"none for layer {min(missing)}" if missing else f"one for layer {next(iter(other))!r}"
            raise _checks.bad(ValueError, op, name, want, got, "0.0 keeps a layer exact.")
        return {i: thresholds[i] for i in layers}
    if isinstance(thresholds, Sequence) and not isinstance(thresholds, str):
        if len(thresholds) != len(layers):
            raise _checks.bad(ValueError, op, name, want, f"{len(thresholds)} of them")
        return dict(zip(layers, thresholds, strict=True))
    return dict.fromkeys(layers, thresholds)


def _threshold(op: str, theta: object, module: nn.Module) -> float | torch.Tensor:
    theta, _ = _sparse_options.threshold(op, theta, "thresholds")
    if not isinstance(theta, torch.Tensor):
        return theta
    config = module.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(module, "head_dim", theta.shape[-1] if theta.dim() else 1)
    _sparse_options.check_shape(op, theta, heads, size, f"thresholds[{module.layer_idx}]")
    return theta.to(torch.promote_types(theta.dtype, torch.float32))


def _decoder(model: PreTrainedModel, modules: dict[int, nn.Module]) -> PreTrainedModel:
    """The innermost model that holds all attention modules: it makes the cache."""
    wanted = set(modules.values())
    holders = [m for m in model.modules() if isinstance(m, PreTrainedModel) and wanted <= set(m.modules())]
    return holders[-1]
