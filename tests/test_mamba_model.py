# SPDX-License-Identifier: Apache-2.0
"""The whole-model benchmark: a short run compares the variants, refuses those that disagree, and leaves its file."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import fla_ops

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "mamba_model.py"
pytest.importorskip("transformers", minversion="5.17", reason="transformers >= 5.17 is not installed")
SMALL = ["--layers", "1", "--hidden-size", "16", "--vocabulary", "50", "--length", "9", "--prompt", "3"]
SMALL += ["--new-tokens", "5", "--rounds", "1"]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("mamba_model", SCRIPT)
    module = sys.modules["mamba_model"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mamba_model"]


def test_a_short_run_leaves_its_file(bench, tmp_path, capsys, threads):
    threads(1)
    with fla_ops.use_backend(fla_ops.backends()["selective_scan"]["cpu"]):
        bench.main([*SMALL, "--threads", "1", "--out", str(tmp_path)])
    assert "The variants agree" in capsys.readouterr().out
    with (tmp_path / "mamba-model-1x16.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["pass"], row["variant"]) for row in rows}
    assert found >= {(kind, variant) for kind in (bench.TRAINING, bench.GENERATION) for variant in ("fla_ops", "stock")}
    for row in rows:
        assert float(row["seconds"]) > 0
        assert row["time_over_ours"] == "1.0" or row["variant"] != "fla_ops"
        assert row["tokens"] == ("9" if row["pass"] == bench.TRAINING else "5")
    other = [row for row in rows if row["pass"] == bench.TRAINING]
    again = bench.write(
        [{**rows[0], "pass": bench.GENERATION}],
        bench.parse([*SMALL, "--only", bench.GENERATION, "--out", str(tmp_path)]),
    )
    with again.open() as file:
        assert [row for row in csv.DictReader(file) if row["pass"] == bench.TRAINING] == other


def test_variants_that_disagree_are_an_error(bench):
    def result(name, *facts):
        return bench.Result(name, [1.0], torch.tensor(facts))

    bench.check(bench.TRAINING, [result("fla_ops", 4.0, 2.0), result("stock", 4.001, 2.0)])
    with pytest.raises(AssertionError):
        bench.check(bench.TRAINING, [result("fla_ops", 4.0, 2.0), result("stock", 4.0, 2.1)])
    with pytest.raises(AssertionError, match="stock generates other tokens than fla_ops from number 2 on"):
        bench.check(bench.GENERATION, [result("fla_ops", [1, 2, 3]), result("stock", [1, 2, 4])])


def test_arguments_are_checked(bench, tmp_path, capsys):
    assert bench.parse(["--quick"]).layers == 2
    for arguments, message in ((["--layers", "0"], "must be >= 1"), (["--out", str(tmp_path / "no")], "that exists")):
        with pytest.raises(SystemExit):
            bench.parse(arguments)
        assert message in capsys.readouterr().err
