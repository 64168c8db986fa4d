# SPDX-License-Identifier: Apache-2.0
"""transformers' Mamba models on fla_ops: what the stock model says, and what it says wrongly, said right.

"Stock" is transformers' path in plain torch. Small models with random weights, float32 unless a test says otherwise.
"""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import fla_ops

transformers = pytest.importorskip("transformers", minversion="5.17", reason="transformers >= 5.17 is not installed")

from fla_ops.integrations.transformers import accelerate, restore  # noqa: E402

OP = "selective_scan"
VOCABULARY, PAD = 61, 0
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 8, "conv_kernel": 4}
TOKENS = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}
KINDS = {
    "mamba": ("Mamba", {}),
    "mamba, other options": ("Mamba", {"use_bias": True, "use_conv_bias": False, "conv_kernel": 2, "state_size": 5}),
    "falcon": ("FalconMamba", {}),
}


@pytest.fixture(autouse=True)
def best_backend():
    """Tests that are not about one backend run on the first of this machine, which may be the reference."""
    with fla_ops.use_backend(fla_ops.backends()[OP]["cpu"]):
        yield


@pytest.fixture(params=KINDS)
def stock(request):
    return build(request.param)


def build(kind, **options):
    """A model with random weights, in eval mode, whose mixers do something: their initial weights are nearly zero."""
    name, changes = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**SIZES | TOKENS | changes | options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for layer in model.backbone.layers:
        nn.init.normal_(layer.mixer.in_proj.weight, std=0.3)
        nn.init.normal_(layer.mixer.x_proj.weight, std=0.3)
        nn.init.normal_(layer.mixer.out_proj.weight, std=0.3)
    return model


def fast(model):
    return accelerate(copy.deepcopy(model))


def mixers(model):
    return [layer.mixer for layer in model.backbone.layers]


def tokens(batch=2, length=11, seed=1):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def generate(model, ids, count=12, **options):
    return model.generate(ids, max_new_tokens=count, do_sample=False, **options)


def gradients(model, ids):
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


# The same as stock.


@torch.no_grad()
def test_logits_and_greedy_tokens(backend, stock):
    ids = tokens()
    with fla_ops.use_backend(backend):
        ours = fast(stock)
        close(ours(ids).logits, stock(ids).logits)
        assert torch.equal(generate(ours, ids), generate(stock, ids))


def test_training_gradients(backend, stock):
    expected_loss, expected = gradients(stock.train(), tokens())
    with fla_ops.use_backend(backend):
        loss, found = gradients(fast(stock).train(), tokens())
    close(loss, expected_loss)
    for name, gradient in expected.items():
        close(found[name], gradient, 2e-5)


@torch.no_grad()
def test_beam_search(stock):
    ids = tokens(2, 5)
    assert torch.equal(generate(fast(stock), ids, num_beams=3), generate(stock, ids, num_beams=3))


@torch.no_grad()
def test_the_cache_holds_what_stock_holds(stock):
    ours, ids = fast(stock), tokens(2, 9)
    caches = [transformers.DynamicCache(config=stock.config) for _ in range(2)]
    places = []
    for part in ids.split([3, 1, 1, 1, 1, 1, 1], 1):  # stock is right with one token at a time
        for model, cache in zip((ours, stock), caches, strict=True):
            model(part, cache_params=cache)
        for mine, theirs in zip(*(cache.layers for cache in caches), strict=True):
            assert mine.conv_states[0].dtype == theirs.conv_states[0].dtype
            close(mine.conv_states[0], theirs.conv_states[0])
            close(mine.recurrent_states[0], theirs.recurrent_states[0])
        places.append(
            [s.data_ptr() for layer in caches[0].layers for s in (layer.conv_states[0], layer.recurrent_states[0])]
        )
    assert all(place == places[0] for place in places)  # static addresses: a captured graph replays on them


@torch.no_grad()
@pytest.mark.parametrize("removed", [0, 2])
def test_a_cache_that_records_can_be_cropped(stock, removed):
    ours, ids = fast(stock), tokens(2, 8)
    caches = [transformers.DynamicCache(config=stock.config) for _ in range(2)]
    for model, cache in zip((ours, stock), caches, strict=True):
        cache.activate_past_recording()
        for part in ids.split([1, 4, 1, 1, 1], 1):
            model(part, cache_params=cache)
    for mine, theirs in zip(*(cache.layers for cache in caches), strict=True):
        assert mine.conv_states[0].shape == theirs.conv_states[0].shape == (2, theirs.conv_states[0].shape[1], 8)
    first = [cache.layers[0] for cache in caches]  # before any scan, which stock begins anew
    close(first[0].conv_states[0], first[1].conv_states[0])
    for cache in caches:
        cache.crop(-removed)
    assert first[0].conv_states[0].shape == first[1].conv_states[0].shape
    close(first[0].conv_states[0], first[1].conv_states[0])


def test_bfloat16_and_autocast(stock):
    ids = tokens()
    with torch.no_grad():
        expected = stock(ids).logits
        scale = expected.abs().max().item()
        ours = fast(stock)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=0.05 * scale)
            assert generate(ours, ids).shape == (2, 23)
        ours = ours.to(torch.bfloat16)
        torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=0.05 * scale)
        cache = ours(ids, use_cache=True).cache_params
        assert cache.layers[0].conv_states[0].dtype == torch.bfloat16
        assert cache.layers[0].recurrent_states[0].dtype == torch.float32


# What stock gets wrong.


@torch.no_grad()
@pytest.mark.parametrize("parts", [(5, 6), (1, 10), (2, 1, 1, 7), (3, 0, 8)], ids=str)
def test_tokens_on_top_of_a_cache_continue(backend, stock, parts):
    ids = tokens()
    with fla_ops.use_backend(backend):
        ours = fast(stock)
        cache, logits = transformers.DynamicCache(config=stock.config), []
        for part in ids.split(parts, 1):
            logits.append(ours(part, cache_params=cache).logits)
    close(torch.cat(logits, 1), stock(ids).logits)


def test_gradients_flow_through_a_cache(stock):
    ours, ids = fast(stock), tokens()
    _, expected = gradients(ours, ids)
    ours.zero_grad()
    cache, logits = transformers.DynamicCache(config=stock.config), []
    for part in ids.split([4, 1, 6], 1):
        logits.append(ours(part, cache_params=cache).logits)
    ours.loss_function(torch.cat(logits, 1), ids, VOCABULARY).backward()
    for name, parameter in ours.named_parameters():
        close(parameter.grad, expected[name], 2e-5)


def padded(lengths, width, where):
    """(ids, mask): rows of random tokens with padding "left", "right", or in the "middle" of each row."""
    ids, mask = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width, dtype=torch.long)
    for i, n in enumerate(lengths):
        start = {"left": width - n, "right": 0, "middle": 0}[where]
        places = torch.arange(start, start + n)
        if where == "middle":
            places = torch.cat([places[: n // 2], places[n // 2 :] + width - n])
        ids[i, places], mask[i, places] = tokens(1, n, seed=i)[0], 1
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("where", ["left", "right", "middle"])
def test_a_padded_row_is_the_row_alone(backend, stock, where):
    lengths = (5, 9, 0, 1, 12)
    ids, mask = padded(lengths, 12, where)
    with fla_ops.use_backend(backend):
        ours = fast(stock)
        embedded = ours.get_input_embeddings()(ids).masked_fill(mask[..., None] == 0, torch.nan)
        out = ours(inputs_embeds=embedded, attention_mask=mask, use_cache=True)
        more = tokens(len(lengths), 3, seed=9)
        continued = ours(more, cache_params=out.cache_params).logits
        for i, n in enumerate(lengths):
            alone = stock(torch.cat([tokens(1, n, seed=i), more[i : i + 1]], 1)).logits[0]
            if n:
                close(out.logits[i, mask[i] == 1], alone[:n])
            close(continued[i], alone[n:])


@torch.no_grad()
def test_left_padded_generation(stock):
    ids, mask = padded((5, 9, 1), 9, "left")
    ours = fast(stock)
    found = generate(ours, ids, attention_mask=mask)
    assert torch.equal(found, generate(stock, ids, attention_mask=mask))
    for i, row in enumerate(found):
        kept = ids[i, mask[i] == 1]
        assert torch.equal(row[9:], generate(stock, kept[None])[0, len(kept) :])


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 4])
def test_of_a_mask_over_the_past_the_last_columns_count(stock, count):
    ids, mask = padded((4, 6 + count), 6 + count, "left")
    mask[0, -count] = 0  # a hole at the first of the columns that count
    ours = fast(stock)
    cache = ours(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).cache_params
    both = [copy.deepcopy(cache) for _ in range(2)]
    whole = ours(ids[:, 6:], attention_mask=mask, cache_params=both[0]).logits
    part = ours(ids[:, 6:], attention_mask=mask[:, 6:], cache_params=both[1]).logits
    assert torch.equal(whole, part)
    last = tokens(2, 1, seed=9)
    logits = torch.cat([whole, ours(last, cache_params=both[0]).logits], 1)
    for i, row in enumerate(ids):
        kept = torch.cat([mask[i, 6:], torch.ones(1)]) == 1
        alone = stock(torch.cat([row[mask[i] == 1], last[i]])[None]).logits[0]
        close(logits[i, kept], alone[len(alone) - int(kept.sum()) :])


class LowRank(nn.Module):
    """A Linear with a learned difference of low rank, as PEFT's LoRA wraps it: `weight` and `bias` are the base's."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        nn.init.normal_(self.up.weight, std=0.3)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

    def merged(self):
        self.base.weight.data += self.up.weight @ self.down.weight
        return self.base


@torch.no_grad()
def test_lora_on_every_projection_is_the_merged_weight(stock):
    names, ids = ("in_proj", "x_proj", "dt_proj", "out_proj"), tokens()
    for mixer in mixers(stock):
        for name in names:
            setattr(mixer, name, LowRank(getattr(mixer, name)))
    ours = fast(stock)
    logits, generated = ours(ids).logits, generate(ours, ids)
    for mixer in mixers(stock):
        for name in names:
            setattr(mixer, name, getattr(mixer, name).merged())
    close(logits, stock(ids).logits)
    assert torch.equal(generated, generate(stock, ids))


def test_a_hook_on_dt_proj_takes_effect(stock):
    ours = fast(stock)
    with torch.no_grad():
        before = ours(tokens()).logits
        for mixer in mixers(ours):
            mixer.dt_proj.register_forward_hook(lambda module, inputs, output: output + 1)
        after = ours(tokens()).logits
        for mixer in mixers(stock):
            mixer.dt_proj.bias += 1
        assert not torch.allclose(before, after)
        close(after, stock(tokens()).logits)


# What surrounds the forward.


@torch.no_grad()
def test_restore_gives_the_very_class_back(stock):
    expected, classes = stock(tokens()).logits, [type(mixer) for mixer in mixers(stock)]
    state = stock.state_dict()
    assert accelerate(stock) is stock and accelerate(stock) is stock
    assert not set(classes) & {type(mixer) for mixer in mixers(stock)}
    assert all(isinstance(mixer, kind) for mixer, kind in zip(mixers(stock), classes, strict=True))
    assert {name: x.data_ptr() for name, x in stock.state_dict().items()} == {n: x.data_ptr() for n, x in state.items()}
    assert restore(stock) is stock and restore(stock) is stock
    assert [type(mixer) for mixer in mixers(stock)] == classes
    assert torch.equal(stock(tokens()).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_stay_accelerated_and_apart(stock, clone):
    ours = accelerate(stock)
    other = clone(ours)
    assert [type(mixer) for mixer in mixers(other)] == [type(mixer) for mixer in mixers(ours)]
    assert torch.equal(other(tokens()).logits, ours(tokens()).logits)
    before = ours(tokens()).logits
    restore(other)
    for parameter in other.parameters():
        parameter.zero_()
    assert type(mixers(ours)[0]) is not type(mixers(other)[0])
    assert torch.equal(ours(tokens()).logits, before)


def test_saved_and_loaded_as_stock(stock, tmp_path):
    ours = accelerate(stock)
    ours.save_pretrained(tmp_path)
    assert "fla_ops" not in (tmp_path / "config.json").read_text()
    loaded = type(ours).from_pretrained(tmp_path).eval()
    assert type(mixers(loaded)[0]).__module__.startswith("transformers.")
    with torch.no_grad():
        close(loaded(tokens()).logits, ours(tokens()).logits)


def test_gradient_checkpointing(stock):
    ours = fast(stock).train()
    _, expected = gradients(ours, tokens())
    old = not hasattr(ours, "activation_checkpointing_enable")  # transformers before 5.23
    enable = ours.gradient_checkpointing_enable if old else ours.activation_checkpointing_enable
    enable({"use_reentrant": False})
    _, found = gradients(ours, tokens())
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_a_forward_kept_on_the_instance_follows(stock):
    """As accelerate's hooks keep one, where a model is spread over devices."""
    calls = []
    for mixer in mixers(stock):
        mixer._old_forward = mixer.forward
        mixer.forward = lambda *args, mixer=mixer, **kwargs: calls.append(mixer) or mixer._old_forward(*args, **kwargs)
    ids = tokens()
    with torch.no_grad():
        whole = stock(ids).logits
        accelerate(stock)
        first = stock(ids[:, :5], use_cache=True)
        close(stock(ids[:, 5:], cache_params=first.cache_params).logits, whole[:, 5:])
        assert len(calls) == 6
        restore(stock)
        assert mixers(stock)[0]._old_forward.__func__ is type(mixers(stock)[0]).forward
        assert torch.equal(stock(ids).logits, whole)


def test_one_mixer_alone_and_the_base_model(stock):
    mixer = mixers(stock)[0]
    x = torch.randn(2, 7, SIZES["hidden_size"])
    with torch.no_grad():
        expected = mixer(x)
        close(accelerate(mixer)(x), expected)
        hidden = restore(stock).backbone(tokens()).last_hidden_state
        close(accelerate(stock.backbone)(tokens()).last_hidden_state, hidden)


@pytest.mark.no_poison
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mamba", "falcon"])
def test_torch_compile(kind):
    ours, ids = accelerate(build(kind)), tokens(2, 4)
    with torch.no_grad():
        expected = ours(ids, use_cache=False).logits
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        close(compiled(ids, use_cache=False).logits, expected)


# Errors.


def test_a_model_without_such_mixers():
    with pytest.raises(ValueError, match=r"accelerate: argument 'model' .* MambaMixer or FalconMambaMixer, got Linear"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"restore: argument 'model' .* MambaMixer"):
        restore(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="accelerate: argument 'model' must be an nn.Module, got str"):
        accelerate("state-spaces/mamba-130m-hf")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"hidden_act": "gelu"}, "'gelu' in backbone.layers.0.mixer"), ({"conv_kernel": 9}, "at most 8, got 9")],
    ids=str,
)
def test_a_model_that_the_kernels_cannot_run_is_left_alone(options, message):
    model = build("mamba", **options)
    before = type(mixers(model)[0])
    with pytest.raises(ValueError, match=message):
        accelerate(model)
    assert all(type(mixer) is before for mixer in mixers(model))


def test_a_mask_of_a_wrong_shape(stock):
    with pytest.raises(ValueError, match=r"'attention_mask' must be of shape \[B=2, T=11\], or"):
        fast(stock)(tokens(), attention_mask=torch.ones(2, 3))


@pytest.mark.parametrize(
    ("before", "found"),
    [
        ("sys.modules['transformers'] = None", "transformers"),
        ("import transformers; transformers.__version__ = '4.57.1'", "found 4.57.1"),
    ],
    ids=["absent", "too old"],
)
def test_without_transformers_the_import_says_what_to_install(before, found):
    code = f"""
import json, sys
{before}
import fla_ops, fla_ops.integrations
try:
    import fla_ops.integrations.transformers
except ImportError as error:
    print(json.dumps(str(error)))
"""
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    message = json.loads(done.stdout)
    assert "needs transformers >= 5.17" in message and found in message
    assert "pip install 'fla_ops[transformers]'" in message
