# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: baselines compute the op, counts are what can be counted by hand, files keep their rows."""

import argparse
import csv
import importlib.util
from pathlib import Path

import pytest
import torch

import fla_ops
from fla_ops._native.selective_scan import BLOCK
from fla_ops.commands import CommandError, bench, bench_cases, bench_decode, bench_measure, bench_scan

BENCH = Path(__file__).resolve().parent.parent / "bench"


def scan(kind, L, **options):
    return bench_cases.Case("selective_scan", kind, {"B": 2, "Di": 6, "L": L, "N": 4}, **options)


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels-last"])
@pytest.mark.parametrize("kind", [bench_cases.FORWARD, bench_cases.BACKWARD, bench_cases.STEP])
def test_the_scans_baselines_compute_the_scan(kind, channels_last):
    """One that computes something else is no baseline."""
    step, backward = kind == bench_cases.STEP, kind == bench_cases.BACKWARD
    case = scan(kind, 1 if step else 37, channels_last=channels_last and not step)
    found = bench_scan.baselines(case.sizes, step, backward, "cpu", False)
    if not found:
        pytest.skip("neither transformers nor mambapy is installed")
    variants = [bench_cases.Variant(name, bench_cases._pass(case, function)) for name, function in found.items()]
    assert bench_measure.check(case, variants) == {}


def test_the_scans_inputs_have_the_layout_that_is_asked_for():
    first, last = (bench_cases.inputs(scan(bench_cases.FORWARD, 9, channels_last=x)) for x in (False, True))
    for name in bench_scan.TOKENS:
        assert first[name].is_contiguous() and last[name].transpose(1, 2).is_contiguous()
        assert first[name].shape == last[name].shape
    assert "state" not in first and bench_cases.inputs(scan(bench_cases.STEP, 1))["u"].shape == (2, 6)


def test_the_scans_work():
    L = 2 * BLOCK + 1
    x = bench_cases.inputs(scan(bench_cases.BACKWARD, L))
    tokens = {name: x[name].nbytes for name in bench_scan.TOKENS} | {"y": x["u"].nbytes}
    forward = sum(tokens.values())
    state = 4 * 2 * 6 * 4
    assert bench_cases.work(scan(bench_cases.FORWARD, L)) == (6 * 2 * 6 * 4 * L, forward)
    again = forward + (forward - tokens["y"])  # with dy in the place of y, and a gradient for each input
    assert bench_cases.work(scan(bench_cases.BACKWARD, L)) == (18 * 2 * 6 * 4 * L, forward + again + 2 * 3 * state)
    assert bench_cases.work(scan(bench_cases.STEP, 1))[1] == forward // L + 2 * state
    assert bench_cases.exponentials(scan(bench_cases.FORWARD, L)) == 2 * 6 * 4 * L
    assert bench_cases.exponentials(scan(bench_cases.BACKWARD, L)) == 2 * 2 * 6 * 4 * L


def test_baselines_that_do_not_fit_are_left_out():
    sizes = {"B": 1, "Di": 1 << 20, "L": 1 << 20, "N": 16}
    assert not bench_scan.baselines(sizes, False, False, "cpu", False)
    assert not bench_scan.baselines(sizes, False, True, "cpu", False)


@pytest.mark.parametrize("zeros", [None, 60])
def test_decodings_variants_compute_it(zeros):
    """One of them only measures the machine. Beside a sparse cache, exact attention is another op."""
    case = bench_cases._decode(1000, zeros, HQ=4, HK=2, D=16)
    variants = bench_cases.variants(case)
    assert [v.probe for v in variants].count(True) == 1
    wrong = bench_measure.check(case, variants)
    assert not wrong or zeros


def test_decodings_inputs_and_work():
    case = bench_cases._decode(3000, 60, HQ=4, HK=2, D=16)
    x = bench_cases.inputs(case)
    same = (x["k"][:, 1:] == x["k"][:, :-1]).double().mean().item()
    assert abs(same - 0.6) < 0.01
    assert bench_cases.work(case)[1] == sum(t.nbytes for t in x.values()) + x["q"].nbytes
    found = bench_cases.remarks(case)
    assert found["cache_mib"] < found["dense_mib"] and found["append_us"] > 0


def test_missing_baselines_are_named(monkeypatch):
    find = importlib.util.find_spec
    gone = ("mambapy", "transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    assert bench_cases.missing_baselines("causal_conv1d") == []
    assert bench_cases.missing_baselines("delta_rule") == ["transformers is not installed"]
    assert bench_cases.missing_baselines(None) == ["transformers is not installed", "mambapy is not installed"]


def test_a_family_without_a_benchmark_says_so(monkeypatch):
    monkeypatch.setattr(bench_cases, "cases", lambda: ())
    given = argparse.Namespace(family="delta_kv_cache", all=False, seconds=1.0)
    with pytest.raises(CommandError, match=r"there is no benchmark of delta_kv_cache here\."):
        bench.run(given)


def test_a_new_column_keeps_the_old_rows(tmp_path, monkeypatch):
    pytest.importorskip("pytest_benchmark")
    if not BENCH.exists():
        pytest.skip("bench/ is part of a checkout")
    spec = importlib.util.spec_from_file_location("bench_conftest", BENCH / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    monkeypatch.setattr(conftest, "provenance", lambda: {"device": "a"})
    for name in ("fma_rate", "copy_bandwidth"):
        monkeypatch.setattr(conftest, name, lambda: 1.0)
    path = tmp_path / "rows.csv"
    for row in ({"op": "x"}, {"op": "y"}, {"op": "z", "gexp_s": 3}, {"op": "w", "gexp_s": ""}):
        monkeypatch.setattr(conftest, "rows", [row])
        conftest._append_csv(path)
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["op"], row["gexp_s"], row["device"]) for row in found] == [
        ("x", "", "a"),
        ("y", "", "a"),
        ("z", "3", "a"),
        ("w", "", "a"),
    ]


def test_every_family_has_a_benchmark_and_short_cases():
    if not BENCH.exists():
        pytest.skip("bench/ is part of a checkout")
    for cases in (bench_cases._ON_CPU, bench_cases._ON_GPU):
        for op in bench_cases._THEIRS:
            assert (BENCH / f"bench_{op}.py").exists()
            kinds = {case.kind for case in cases if case.op == op and case.quick}
            if op in bench_decode.OPS:
                assert kinds == {bench_cases.DECODE}, op
                continue
            steps = {bench_cases.STEP} if hasattr(fla_ops, f"{op}_step") else set()
            assert kinds >= {bench_cases.BACKWARD} | steps, op
    labels = [case.group for case in bench_cases._ON_CPU]
    assert len(labels) == len(set(labels))
    assert torch.bfloat16 in {case.dtype for case in bench_cases._ON_CPU if case.op == "selective_scan"}
