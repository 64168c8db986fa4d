# SPDX-License-Identifier: Apache-2.0
"""The state-tracking benchmark: its groups are groups, its answers are right, and a short run leaves its files."""

import csv
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

import fla_ops

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "state_tracking.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("state_tracking", SCRIPT)
    module = sys.modules["state_tracking"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["state_tracking"]


SIZES = {"S3": 6, "S4": 24, "A5": 60, "S5": 120}


@pytest.mark.parametrize("group", SIZES)
def test_tables_are_groups(group, bench):
    table = bench.multiplication_table(group)
    count = SIZES[group]
    everyone = torch.arange(count)
    assert table.shape == (count, count)
    assert torch.equal(table[0], everyone) and torch.equal(table[:, 0], everyone)  # 0 is the identity
    for rows in (table, table.T):
        assert torch.equal(rows.sort(1).values, everyone.expand(count, count))  # each element once
    a, b, c = torch.randint(count, (3, 500))
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])
    assert not torch.equal(table, table.T)


def test_each_answer_is_the_product_of_the_words_beginning(bench):
    table = bench.multiplication_table("S3")
    x, y = bench.word_problem(table, 4, 9, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (4, 9) and torch.equal(y[:, 0], x[:, 0])
    for word, answers in zip(x.tolist(), y.tolist(), strict=True):
        product = 0
        for element, answer in zip(word, answers, strict=True):
            product = table[element, product].item()
            assert answer == product
    assert torch.equal(x, bench.word_problem(table, 4, 9, torch.Generator().manual_seed(0))[0])


def test_the_figures_of_a_run(bench):
    right = torch.ones(4, bench.TEST_LENGTH, dtype=torch.bool)
    right[0, 200:] = False
    right[1, bench.TRAIN_LENGTH - 1] = False
    row = bench.Run("S3", 2, "negative", 0, right=right).row()
    assert row["accuracy_at_128"] == 0.75 and row["accuracy_497_to_512"] == 0.75
    assert row["whole_sequence_128"] == 0.75 and row["whole_sequence_512"] == 0.5


def test_nothing_but_the_mixers_state_goes_from_token_to_token(bench):
    args = bench.parse([])
    torch.manual_seed(0)
    model = bench.Tracker(6, 2, True, args)
    mixer = model.mixer
    assert not mixer.use_short_conv and mixer.num_householder == 2 and mixer.allow_neg_eigval
    assert not mixer.use_forget_gate and not hasattr(mixer, "g_proj")
    mixer.forward = lambda x: x
    x = torch.randint(6, (1, 5))
    torch.testing.assert_close(model(x)[:, 3], model(x[:, 3:4])[:, 0])


@pytest.mark.slow
def test_a_short_run_leaves_its_files(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "TEST_SEQUENCES", 8)
    threads = torch.get_num_threads()
    args = ["--num-householder", "1", "2", "--eigenvalues", "negative", "--seeds", "0", "1", "--steps", "6"]
    try:
        with fla_ops.use_backend("reference"):
            bench.main([*args, "--tokens", "64", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    with (tmp_path / "state-tracking-s3.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["num_householder"], row["seed"]) for row in rows] == [("1", "0"), ("1", "1"), ("2", "0"), ("2", "1")]
    assert all(0 <= float(row["accuracy_at_128"]) <= 1 and math.isfinite(float(row["train_loss"])) for row in rows)
    curves = (tmp_path / "state-tracking-s3-curves.csv").read_text().splitlines()
    assert len(curves) == 513
    assert (tmp_path / "state-tracking-s3.png").read_bytes().startswith(b"\x89PNG")
    assert "whole_sequence_128" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "/no/such/folder"], "a folder that exists"),
        (["--group", "S9"], "invalid choice"),
        (["--steps", "0"], ">= 1"),
    ],
)
def test_wrong_arguments_are_refused(args, message, bench, capsys):
    with pytest.raises(SystemExit):
        bench.parse(args)
    assert message in capsys.readouterr().err
