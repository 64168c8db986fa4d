# SPDX-License-Identifier: Apache-2.0
"""Calibration of thresholds: what it measures against definitions, what it chooses, and the file it writes."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import fla_ops
from fla_ops import calibration
from fla_ops.calibration import Thresholds, calibrate_thresholds, measure_sparsity

transformers = pytest.importorskip("transformers", minversion="5.17", reason="transformers >= 5.17 is not installed")

from safetensors.torch import save_file  # noqa: E402

from fla_ops.integrations import _delta_cache  # noqa: E402
from fla_ops.integrations.transformers import DeltaCache, disable_temporal_sparse, enable_temporal_sparse  # noqa: E402

HK, D, LAYERS, VOCABULARY = 2, 16, 2, 61


@pytest.fixture(autouse=True)
def best_backend():
    with fla_ops.use_backend(fla_ops.backends()["temporal_sparse_attention"]["cpu"]):
        yield


def build(kind="Llama"):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2 * HK, "num_key_value_heads": HK}
    sizes |= {"num_hidden_layers": LAYERS, "head_dim": D, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes | tokens)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


def texts(count=3, length=100, seed=1):
    return torch.randint(1, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def zeros(model, ids, thresholds, **options):
    return measure_sparsity(enable_temporal_sparse(copy.deepcopy(model), thresholds, **options), ids)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize("target", [0.3, 0.6, 0.8])
def test_the_share_of_zeros_is_the_one_asked_for(kind, target):
    model = build(kind)
    found = calibrate_thresholds(model, texts(), target_sparsity=target, window=10)
    assert sorted(found) == [0, 1] and all(x.shape == (HK, D) and x.dtype == torch.float32 for x in found.values())
    assert abs(found.sparsity - target) < 0.02  # there are 64 channels, and a grid
    assert abs(zeros(model, texts(), found, window=10) - target) < 0.04
    assert abs(zeros(model, texts(seed=2), found, window=10) - target) < 0.06


def test_better_than_one_threshold_at_equal_sparsity():
    """By the error of the logits on other texts, of a model in which queries weigh channels unequally."""
    model = build()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(torch.logspace(-1.5, 0.5, D).repeat(2 * HK)[:, None])
    found, other = calibrate_thresholds(model, texts(), target_sparsity=0.6, window=5), texts(seed=2)
    low, high = 0.0, 20.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if zeros(model, other, middle, window=5) < 0.6 else (low, middle)

    def error(thresholds):
        changed = enable_temporal_sparse(copy.deepcopy(model), thresholds, window=5)
        with torch.no_grad():
            return (changed(other).logits - model(other).logits).square().mean().sqrt()

    assert zeros(model, other, found, window=5) > 0.57
    assert error(found) < 0.7 * error(high)


def test_what_it_measures():
    """Zeros are those of the op's statistics; costs are those of the definition."""
    q, k, v = torch.randn(2, 40, 4, D), torch.randn(2, 40, HK, D).cumsum(1), torch.randn(2, 40, HK, D)
    options = {"window": 6, "sink": 2, "window_mode": "band"}
    measured = calibration._measure(q, k, 0.25, **options)
    for g in (0, 9, 20):
        theta = measured.thetas[g]
        stats = fla_ops.temporal_sparse_attention(q, k, v, threshold=theta, **options, return_stats=True).stats
        torch.testing.assert_close(measured.zeros[g].mean(-1).double(), stats.zeros.mean(0))
    theta, expected = measured.thetas[20], torch.zeros(HK, D)
    for n in range(2):
        held = k[n, 0].clone()
        errors = torch.zeros(40, HK, D)
        for t in range(40):
            held = torch.where((k[n, t] - held).abs() <= theta, held, k[n, t])
            errors[t] = k[n, t] - held
        for h in range(4):
            for i in range(40):
                p = (0.25 * k[n, : i + 1, h // 2] @ q[n, i, h]).softmax(0)
                for j in range(2, max(0, i - 5)):
                    expected[h // 2] += p[j] * (0.25 * q[n, i, h] * errors[j, h // 2]).square()
    torch.testing.assert_close(measured.cost[20], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"window_mode": "block"}, {"sink": 4}, {"window": 0.1}], ids=str)
def test_options(options):
    options = {"window": 10} | options
    found = calibrate_thresholds(build(), texts(1), target_sparsity=0.5, **options)
    assert {name: getattr(found, name) for name in options} == options
    assert abs(zeros(build(), texts(1), found, **options) - 0.5) < 0.04


def test_one_text_and_reproducible():
    model = build()
    first, second = (calibrate_thresholds(model, texts(1)[0], target_sparsity=0.5) for _ in range(2))
    assert all(torch.equal(first[i], second[i]) for i in first) and first.sparsity == second.sparsity


def test_measuring_sparsity():
    """The share is that of the op's statistics, layer by layer."""
    model, shares = build(), []
    changed = enable_temporal_sparse(copy.deepcopy(model), 0.5, 8)
    op = fla_ops.temporal_sparse_attention

    def counted(*args, **options):
        out = op(*args, **options | {"return_stats": True})
        shares.append(out.stats.zeros.mean().item())
        return out

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(_delta_cache, "temporal_sparse_attention", counted)
        changed(texts())
    assert len(shares) == LAYERS and measure_sparsity(changed, texts()) == sum(shares) / LAYERS
    with pytest.raises(ValueError, match="measure_sparsity: argument 'model' must be a model under enable_temporal"):
        measure_sparsity(model, texts())


def test_several_targets_at_once():
    model = build()
    several = calibrate_thresholds(model, texts(), target_sparsity=[0.4, 0.7])
    for found in several:
        alone = calibrate_thresholds(model, texts(), target_sparsity=found.target_sparsity)
        assert repr(alone) == repr(found) and all(torch.equal(alone[i], found[i]) for i in found)


# The model comes back as it was.


def test_a_model_that_is_dense():
    model = build().train()
    model.model.layers[0].eval()
    before = [(set(vars(m)), m.training) for m in model.modules()]
    calibrate_thresholds(model, texts(), target_sparsity=0.5)
    assert [(set(vars(m)), m.training) for m in model.modules()] == before
    assert model.config._attn_implementation == build().config._attn_implementation
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_is_sparse_already():
    model = enable_temporal_sparse(build(), 0.7, 9)
    expected = model(texts()).logits
    found = calibrate_thresholds(model, texts(), target_sparsity=0.5)
    out = model(texts())
    assert torch.equal(out.logits, expected) and type(out.past_key_values) is DeltaCache
    plain = calibrate_thresholds(disable_temporal_sparse(model), texts(), target_sparsity=0.5)
    assert all(torch.equal(found[i], plain[i]) for i in found)


def test_an_error_in_between(monkeypatch):
    def fail(*args, **kwargs):
        raise ArithmeticError("here")

    monkeypatch.setattr(calibration, "_measure", fail)
    model = build()
    with pytest.raises(ArithmeticError, match="here"):
        calibrate_thresholds(model, texts(), target_sparsity=0.5)
    assert type(model(texts()).past_key_values) is transformers.DynamicCache


# The file.


def test_saving(tmp_path):
    model, path = build(), tmp_path / "thresholds.safetensors"
    found = calibrate_thresholds(model, texts(), target_sparsity=0.5, window=7, sink=1)
    found.save(path)
    loaded = Thresholds.load(path)
    assert repr(loaded) == repr(found) and loaded.sparsity == found.sparsity and list(loaded) == [0, 1]
    assert all(torch.equal(loaded[i], found[i]) for i in found)
    assert (loaded.model_type, loaded.target_sparsity, loaded.window, loaded.sink) == ("llama", 0.5, 7, 1)
    a, b = (enable_temporal_sparse(copy.deepcopy(model), x, x.window, x.sink)(texts()).logits for x in (found, loaded))
    assert torch.equal(a, b)


def test_a_file_of_something_else(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"Thresholds.load: argument 'path' must be a file of Thresholds.save, got"):
        Thresholds.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("missing", "call", "message"),
    [
        ("safetensors", "Thresholds.load('x')", "Thresholds are saved as safetensors, which is missing"),
        (
            "transformers",
            "calibrate_thresholds(torch.nn.Linear(1, 1), torch.ones(9, dtype=int), target_sparsity=0.5)",
            "fla_ops.integrations.transformers needs transformers",
        ),
    ],
)
def test_what_is_missing_is_named(missing, call, message):
    code = f"import sys; sys.modules[{missing!r}] = None\nimport torch\nfrom fla_ops.calibration import *\n{call}"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert message in done.stderr and "pip install 'fla_ops[transformers]'" in done.stderr


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"target_sparsity": 1.0}, ValueError, r"'target_sparsity' must be in \(0, 1\), got 1.0"),
        ({"target_sparsity": float("nan")}, ValueError, r"'target_sparsity' must be in \(0, 1\), got nan"),
        ({"target_sparsity": None}, TypeError, "'target_sparsity' must be a float, or a list of them, got None"),
        ({"target_sparsity": [0.5, 2.0]}, ValueError, r"'target_sparsity' must be in \(0, 1\), got 2.0"),
        ({"tokens": [1, 2]}, TypeError, "'tokens' must be a tensor, got list"),
        ({"tokens": torch.ones(1, 9)}, TypeError, "'tokens' must be an int32 or int64 tensor, got torch.float32"),
        ({"tokens": torch.ones(1, 1, 9, dtype=torch.int64)}, ValueError, r"'tokens' must be of shape \[N, T\]"),
        ({"tokens": torch.ones(3, 1, dtype=torch.int64)}, ValueError, "'tokens' must be at least one text of two"),
        ({"window": 0}, ValueError, "'window' must be at least 1, got 0"),
        ({"sink": -1}, ValueError, "'sink' must be at least 0, got -1"),
        ({"window_mode": "slide"}, ValueError, "'window_mode' must be \"band\" or \"block\", got 'slide'"),
        ({"model": nn.Linear(2, 2)}, TypeError, "'model' must be a PreTrainedModel of transformers, got Linear"),
    ],
)  # fmt: skip
def test_bad_arguments(changed, error, message):
    options = {"model": build(), "tokens": texts(), "target_sparsity": 0.5} | changed
    with pytest.raises(error, match="calibrate_thresholds: argument " + message):
        calibrate_thresholds(**options)
