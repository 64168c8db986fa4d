# SPDX-License-Identifier: Apache-2.0
"""Decoders of transformers on temporal-sparse attention: what its definition says, through every way of calling them.

Small models with random weights. "Defined" is the model with attention that is the reference itself, without a cache.
"""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import fla_ops
from fla_ops.reference.temporal_sparse_attention import temporal_sparse_attention as definition

transformers = pytest.importorskip("transformers", minversion="5.17", reason="transformers >= 5.17 is not installed")

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

from fla_ops.integrations.transformers import (  # noqa: E402
    DeltaCache,
    disable_temporal_sparse,
    enable_temporal_sparse,
)

HK, D, LAYERS, VOCABULARY, PAD = 2, 16, 2, 61, 0
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2 * HK, "num_key_value_heads": HK}
SIZES |= {"num_hidden_layers": LAYERS, "head_dim": D, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
TOKENS = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}
KINDS = ("Llama", "Qwen2", "Qwen3")
SPARSE = {"thresholds": 0.5, "window": 8}


@pytest.fixture(autouse=True)
def best_backend():
    """The backends have tests of their own; here the first of this machine runs, which may be the reference."""
    with fla_ops.use_backend(fla_ops.backends()["delta_kv_cache"]["cpu"]):
        yield


def build(kind="Llama", **options):
    """A model in eval mode whose weights are large enough for attention to matter."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | TOKENS | options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


def sparse(model, **options):
    return enable_temporal_sparse(copy.deepcopy(model), **SPARSE | options)


def tokens(batch=2, length=40, seed=1):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def generate(model, ids, count=20, **options):
    return model.generate(ids, max_new_tokens=count, do_sample=False, **options)


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def defined(model, ids, threshold, **options):
    """Logits of the model whose attention is the definition."""

    def attention(module, query, key, value, mask, scaling=None, **_):
        theta = threshold[module.layer_idx] if isinstance(threshold, (list, dict)) else threshold
        theta = torch.as_tensor(theta, dtype=query.dtype).expand(HK, D)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return definition(q, k, v, threshold=theta, scale=scaling, **options)[0], None

    AttentionInterface.register("defined", attention)
    AttentionMaskInterface.register("defined", sdpa_mask)
    model = copy.deepcopy(model)
    model.set_attn_implementation("defined")
    return logits(model, ids, use_cache=False)


# The values.


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_threshold_it_is_the_models_own_attention(kind):
    model, ids = build(kind), tokens()
    exact = sparse(model, thresholds=0.0)
    close(logits(exact, ids), logits(model, ids), 1e-5)
    close(logits(exact, ids, use_cache=False), logits(model, ids), 1e-5)
    close(logits(sparse(model, window=1.0), ids), logits(model, ids), 1e-5)
    assert torch.equal(generate(exact, ids), generate(model, ids))


@pytest.mark.parametrize("options", [{}, {"sink": 3}, {"window_mode": "block"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_through_the_cache_is_the_definition(kind, options):
    """All at once, without a cache, in chunks, and token by token."""
    model, ids = build(kind), tokens()
    expected = defined(model, ids, 0.5, window=8, **options)
    assert (expected - logits(model, ids)).abs().max() > 0.05  # the threshold does something
    model = sparse(model, **options)
    close(logits(model, ids), expected)
    close(logits(model, ids, use_cache=False), expected)
    for sizes in ((17, 3, 20), (1, 38, 1), (38, 1, 1)):
        cache, parts = DeltaCache(model), []
        for part in ids.split(sizes, 1):
            parts.append(logits(model, part, past_key_values=cache))
        close(torch.cat(parts, 1), expected)
        assert cache.get_seq_length() == 40


def test_thresholds_by_layer_head_and_channel():
    model, ids = build(), tokens()
    thetas = [torch.rand(HK, D), torch.rand(HK, 1)]
    expected = defined(model, ids, thetas, window=8)
    for given in (thetas, dict(enumerate(thetas)), [thetas[0].double(), thetas[1]]):
        close(logits(sparse(model, thresholds=given), ids), expected)
    again = enable_temporal_sparse(sparse(model, thresholds=9.0), thetas, 8)  # a second call changes them
    close(logits(again, ids), expected)


def test_a_share_for_a_window_is_fixed_by_the_first_tokens():
    model, ids = build(), tokens()
    shared = sparse(model, window=0.2)
    close(logits(shared, ids), logits(sparse(model, window=8), ids))
    cache = DeltaCache(shared)
    logits(shared, ids[:, :20], past_key_values=cache)
    close(
        logits(shared, ids[:, 20:], past_key_values=cache),
        logits(sparse(model, window=4), ids)[:, 20:],
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model, ids = build().to(dtype), tokens()
    model = sparse(model)
    o = logits(model, ids)
    assert o.dtype == dtype
    close(o, defined(build().to(dtype), ids, 0.5, window=8), 3e-2 if dtype == torch.bfloat16 else 1e-10)
    assert generate(model, ids).shape == (2, 60)


def test_autocast():
    model, ids = sparse(build()), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        o = logits(model, ids)
        assert generate(model, ids).shape == (2, 60)
    close(o.float(), logits(model, ids), 0.1)  # a change near the threshold fires or not with its rounding


# Training.


def test_gradients_are_the_definitions():
    model, ids = build(), tokens()
    defined(model, ids, 0.5, window=8)  # registers it
    expected, actual = copy.deepcopy(model), sparse(model)
    expected.set_attn_implementation("defined")
    for use_cache in (False, True):  # what comes with a new cache is differentiable all the same
        for m, options in ((expected, {"use_cache": False}), (actual, {"use_cache": use_cache})):
            m.zero_grad()
            m(ids, labels=ids, **options).loss.backward()
        for (name, p), q in zip(expected.named_parameters(), actual.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_gradient_checkpointing():
    model, ids = sparse(build()), tokens()
    model.train()
    model(ids, labels=ids).loss.backward()
    expected = model.lm_head.weight.grad.clone()
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its name in 5.23
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.past_key_values is None
    close(model.lm_head.weight.grad, expected)


def test_no_gradient_reaches_a_cache():
    model, ids = sparse(build()), tokens()
    cache = model(ids).past_key_values
    with pytest.raises(RuntimeError, match=r"append: an input requires a gradient.*torch\.no_grad"):
        model(ids[:, :1], past_key_values=cache)


# Generation.


def test_generation_is_full_recomputation():
    model, ids = sparse(build()), tokens()
    out = generate(model, ids, return_dict_in_generate=True)
    assert type(out.past_key_values) is DeltaCache and out.past_key_values.get_seq_length() == 59
    whole = logits(model, out.sequences[:, :-1], use_cache=False)
    assert torch.equal(whole[:, 39:].argmax(-1), out.sequences[:, 40:])
    assert not torch.equal(out.sequences, generate(build(), ids))  # and not the exact model's


def test_prompts_in_chunks():
    model, ids = sparse(build()), tokens()
    assert torch.equal(generate(model, ids, prefill_chunk_size=7), generate(model, ids))


def test_a_padded_row_is_as_it_would_be_alone():
    model, ids = sparse(build()), tokens()
    ids[0, :9] = PAD
    mask = (ids != PAD).long()
    alone = [generate(model, row[keep.bool()][None])[0, -20:] for row, keep in zip(ids, mask, strict=True)]
    together = generate(model, ids, attention_mask=mask)
    assert torch.equal(together[:, -20:], torch.stack(alone))
    expected = logits(model, ids[:1, 9:])
    positions = (mask.cumsum(1) - 1).clamp(0)
    for use_cache in (True, False):
        o = logits(model, ids, attention_mask=mask, position_ids=positions, use_cache=use_cache)
        close(o[:1, 9:], expected)


def test_padding_in_every_chunk():
    model, ids = sparse(build()), tokens()
    mask = torch.ones_like(ids)
    mask[0, :12] = 0  # a chunk of padding alone
    mask[1, 25:] = 0  # padding behind
    positions = (mask.cumsum(1) - 1).clamp(0)
    cache, parts = DeltaCache(model), []
    for start in range(0, 40, 10):
        new = slice(start, start + 10)
        options = {"attention_mask": mask[:, : new.stop], "position_ids": positions[:, new]}
        parts.append(logits(model, ids[:, new], past_key_values=cache, **options))
    o = torch.cat(parts, 1)
    close(o[:1, 12:], logits(model, ids[:1, 12:]))
    close(o[1:, :25], logits(model, ids[1:, :25]))


def test_beam_search():
    """By its definition: the beams' scores are those of a model that recomputes everything."""
    model, ids = sparse(build()), tokens()
    options = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generate(model, ids, **options), generate(model, ids, use_cache=False, **options))


def test_assisted_generation():
    """Drafts that are wrong are taken back, from the cache of the model and from that of the assistant."""
    model, ids = sparse(build()), tokens(1)
    expected = generate(model, ids)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=10), expected)
    assert torch.equal(generate(model, ids, assistant_model=sparse(build(hidden_size=16))), expected)


def test_crop():
    model, ids = sparse(build()), tokens(1, 300)
    cache = DeltaCache(model)
    logits(model, ids, past_key_values=cache)
    cache.crop(-64)
    assert cache.get_seq_length() == 236
    o = logits(model, ids[:, 236:], past_key_values=cache)
    close(o, logits(model, ids)[:, 236:])
    with pytest.raises(ValueError, match=r"crop: argument 'length' must be nearer to 300"):
        cache.crop(-200)
    with pytest.raises(ValueError, match=r"argument 'tokens_to_remove' must be at most 0, got 3"):
        cache.crop(3)
    far = DeltaCache(model, rollback=250)
    logits(model, ids, past_key_values=far)
    far.crop(-250)
    close(logits(model, ids[:, 50:], past_key_values=far), logits(model, ids)[:, 50:])


def test_one_prompt_for_several_answers():
    model, ids = sparse(build()), tokens(1)
    prompt = DeltaCache(model)
    logits(model, ids[:, :30], past_key_values=prompt)
    for _ in range(2):
        assert torch.equal(generate(model, ids, past_key_values=copy.deepcopy(prompt)), generate(model, ids))
    prompt.batch_repeat_interleave(3)
    prompt.batch_select_indices(torch.tensor([0, 2]))
    assert prompt.layers[0].batch_size == 2
    twice = ids.expand(2, -1)
    close(logits(model, twice[:, 30:], past_key_values=prompt), logits(model, twice)[:, 30:])
    prompt.reset()
    assert prompt.get_seq_length() == 0 and prompt.nbytes == 0
    close(logits(model, ids, past_key_values=prompt), logits(model, ids))


def test_max_len():
    model, ids = sparse(build()), tokens()
    cache = DeltaCache(model, max_len=41)
    assert cache.get_max_length() == 41
    logits(model, ids, past_key_values=cache)
    logits(model, ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="max_len=41"):
        logits(model, ids[:, :1], past_key_values=cache)


def test_an_empty_cache_of_transformers_is_replaced():
    model, ids = sparse(build()), tokens()
    for cache in (transformers.DynamicCache(), transformers.DynamicCache(config=model.config)):
        logits(model, ids, past_key_values=cache)
        assert type(cache) is DeltaCache and cache.get_seq_length() == 40


# The model around it.


def test_undoing():
    model, ids = build(), tokens()
    changed = disable_temporal_sparse(sparse(model))
    assert torch.equal(logits(changed, ids), logits(model, ids))
    assert changed.config._attn_implementation == model.config._attn_implementation
    assert type(changed(ids).past_key_values) is transformers.DynamicCache
    assert not changed.model._forward_pre_hooks
    assert [set(vars(m)) for m in changed.modules()] == [set(vars(m)) for m in model.modules()]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(duplicate):
    model, ids = sparse(build()), tokens()
    other = duplicate(model)
    assert torch.equal(generate(other, ids), generate(model, ids))
    disable_temporal_sparse(other)
    close(logits(other, ids), logits(build(), ids), 0)
    assert type(model(ids).past_key_values) is DeltaCache  # nothing is shared


def test_what_is_saved_knows_nothing_of_it(tmp_path):
    plain, ids = build(), tokens()
    model = sparse(plain, thresholds=[torch.rand(HK, D)] * LAYERS)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.save_pretrained(tmp_path)
    assert "fla_ops" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    close(logits(loaded, ids), logits(plain, ids), 0)


@pytest.mark.parametrize("kind", ["GPTNeoX", "OPT", "Phi3", "SmolLM3"])
def test_other_decoders(kind):
    options = {"num_key_value_heads": 2 * HK, "hidden_size": 64} if kind == "GPTNeoX" else {}
    model, ids = build(kind, **options), tokens()
    exact = sparse(model, thresholds=0.0)
    close(logits(exact, ids), logits(model, ids), 1e-5)
    assert torch.equal(generate(sparse(model), ids, 5), generate(sparse(model), ids, 5, use_cache=False))


# What is refused.

PLAIN = "model' must be a decoder with full causal attention in every layer, got "


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("Mistral", {"sliding_window": 8}, "sliding_window=8 in layer 0"),
        ("Qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
         "sliding_window=8 in layer 1"),
        ("Gemma2", {"layer_types": ["full_attention"] * 2}, "attn_logit_softcapping=50.0"),
        ("GptOss", {"layer_types": ["full_attention"] * 2, "num_local_experts": 2, "num_experts_per_tok": 1,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "sliding_window": None},
         "learnt attention sinks in layer 0"),
        ("Mamba", {}, "MambaForCausalLM, whose attention does not go through transformers' attention interface"),
    ],
)  # fmt: skip
def test_models_that_cannot_run(kind, options, message):
    model = build(kind, **options)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=PLAIN + message):
        enable_temporal_sparse(model, **SPARSE)
    assert model.config._attn_implementation == before


def test_an_encoder_cannot_run():
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(ValueError, match=PLAIN + "attention that is not causal in layer 0"):
        enable_temporal_sparse(transformers.BertModel(config), **SPARSE)


def test_a_model_that_reads_the_cached_keys_cannot_run():
    model, ids = sparse(build("DiffLlama")), tokens()
    with pytest.raises(RuntimeError, match=r"DeltaCache: the model calls aten.* on the keys or values that its cache"):
        logits(model, ids)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"thresholds": -1.0}, ValueError, "'thresholds' must be >= 0, got -1.0"),
        ({"thresholds": float("nan")}, ValueError, "'thresholds' must be >= 0, got nan"),
        ({"thresholds": torch.tensor([-0.1])}, ValueError, "'thresholds' must be >= 0 everywhere, got -0.1"),
        ({"thresholds": "0.1"}, TypeError, "'thresholds' must be a number or a tensor, got '0.1'"),
        ({"thresholds": [0.1]}, ValueError, "'thresholds' must be a number, or one for each of 2 layers, got 1 of"),
        ({"thresholds": {0: 0.1}}, ValueError, "'thresholds' must be .*got none for layer 1. 0.0 keeps a layer exact"),
        ({"thresholds": {0: 0.1, 1: 0.1, 2: 0.1}}, ValueError, "'thresholds' must be .*got one for layer 2"),
        ({"thresholds": [0.1, torch.ones(3, D)]}, ValueError,
         r"'thresholds\[1\]' must be broadcastable to \[HK=2, D=16\], got \[3, 16\]"),
        ({"window": 0}, ValueError, "'window' must be at least 1, got 0"),
        ({"window": 1.5}, ValueError, "'window' must be "),
        ({"sink": -1}, ValueError, "'sink' must be at least 0, got -1"),
        ({"window_mode": "slide"}, ValueError, "'window_mode' must be \"band\" or \"block\", got 'slide'"),
        ({"model": nn.Linear(2, 2)}, TypeError, "'model' must be a PreTrainedModel of transformers, got Linear"),
    ],
)  # fmt: skip
def test_bad_arguments(changed, error, message):
    model = build()
    with pytest.raises(error, match="enable_temporal_sparse: argument " + message):
        enable_temporal_sparse(**{"model": model} | SPARSE | changed)
    assert type(model(tokens()).past_key_values) is transformers.DynamicCache  # nothing was changed


def test_bad_calls():
    plain, ids = build(), tokens()
    model = sparse(plain)
    filled = plain(ids).past_key_values

    def refused(message, ids=ids, error=ValueError, **options):
        with pytest.raises(error, match=message):
            logits(model, ids, **options)

    advice = r"Pass past_key_values=DeltaCache\(model\), of fla_ops\.integrations\.transformers, or no cache at all"
    refused("cannot use a filled DynamicCache. " + advice, past_key_values=filled)
    refused("cannot use a StaticCache. " + advice, past_key_values=transformers.StaticCache(model.config, 50))
    refused("output_attentions is not supported", output_attentions=True)
    refused(r"must be bool of shape \[2, 1, 40, 40\], got torch.float32", attention_mask=torch.zeros(2, 1, 40, 40))
    packed = (torch.arange(40) % 20).expand(2, -1)
    refused("a mask other than a causal one with padding is not supported", position_ids=packed, use_cache=False)
    cache = model(ids, attention_mask=torch.ones_like(ids)).past_key_values
    late = torch.ones(2, 41, dtype=torch.long)
    late[0, :3] = 0
    refused("masks other past tokens", ids[:, :1], past_key_values=cache, attention_mask=late)

    with pytest.raises(ValueError, match="DeltaCache: argument 'model' must be a model under enable_temporal_sparse"):
        DeltaCache(plain)
    with pytest.raises(TypeError, match="DeltaCache: argument 'model' must be an nn.Module, got int"):
        DeltaCache(3)
    with pytest.raises(ValueError, match="DeltaCache: argument 'max_len' must be at least 1"):
        DeltaCache(model, max_len=0)
    with pytest.raises(RuntimeError, match="A model without enable_temporal_sparse needs its own cache"):
        logits(plain, ids, past_key_values=DeltaCache(model))
    with pytest.raises(ValueError, match="disable_temporal_sparse: argument 'model' must be a model under"):
        disable_temporal_sparse(plain)
    named = copy.deepcopy(plain)
    named.set_attn_implementation("fla_ops_temporal_sparse")
    with pytest.raises(RuntimeError, match=r"has no thresholds. Call enable_temporal_sparse\(model"):
        logits(named, ids)


def test_dropout_is_refused_in_training_alone():
    model, ids = sparse(build(attention_dropout=0.1)), tokens()
    logits(model, ids)
    with pytest.raises(ValueError, match=r"attention dropout in training \(attention_dropout=0.1\) is not supported"):
        model.train()(ids)
