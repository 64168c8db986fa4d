# SPDX-License-Identifier: Apache-2.0
"""`fla-ops bench`: the short list as a table of ratios; `--all` runs the pytest-benchmark suite of a checkout."""

import argparse
from pathlib import Path

import torch

import fla_ops

from . import CommandError, bench_cases, bench_decode, bench_measure, require
from .info import cpu_name


def run(args: argparse.Namespace) -> int:
    if args.family and all(case.op != args.family for case in bench_cases.cases()):
        raise CommandError(f"there is no benchmark of {args.family} here.", code=2)
    return run_suite(args.family) if args.all else run_short_list(args.family, args.seconds)


def run_suite(family: str | None) -> int:
    require("bench --all", "bench", "pytest", "pytest_benchmark", "matplotlib")
    import pytest

    folder = Path(fla_ops.__file__).parent.parent / "bench"
    if not (folder / "conftest.py").exists():
        raise CommandError(f"--all needs a checkout: there is no {folder}. Without it the short list is timed.", code=2)
    target = folder / f"bench_{family}.py" if family else folder
    results = folder / "results"
    results.mkdir(exist_ok=True)
    return int(pytest.main([str(target), f"--benchmark-json={results / 'last.json'}"]))


def run_short_list(family: str | None, seconds: float) -> int:
    require("bench", "bench", "tabulate")
    from tabulate import tabulate

    where = torch.cuda.get_device_name() if bench_cases.device() == "cuda" else cpu_name()
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of interleaved calls.")
    for reason in bench_cases.missing_baselines(family):
        print(f"Not among the baselines: {reason}. Install with: pip install 'fla_ops[bench]'")
    for case in bench_cases.cases():
        if not case.quick or (family and case.op != family):
            continue
        variants = bench_cases.variants(case)
        notes = bench_measure.check(case, variants)
        timings = bench_measure.measure(case, variants, seconds)
        flops, moved = bench_cases.work(case)
        ours = timings[0].median
        rows = [
            (
                t.variant.name + (" *" if t.variant.name in notes else ""),
                t.median * 1e3,
                t.cpu_mean * 1e3,
                flops / t.median / 1e9,
                moved / t.median / 1e9,
                f"{t.median / ours:.2f}x",
            )
            for t in timings
        ]
        headers = (case.group, "ms", "CPU ms", "GFLOP/s", "GB/s", f"time / {timings[0].variant.name}")
        print("\n" + tabulate(rows, headers, tablefmt="simple", floatfmt=("", ".3f", ".3f", ".1f", ".1f", "")))
        if case.kind == bench_cases.DECODE:
            print(*_on_decoding(case, timings), sep="\n")
        for name in notes:
            print(f"* {name}: its results are further from fla_ops' than the tolerance allows")
    return 0


def _on_decoding(case: bench_cases.Case, timings: list[bench_measure.Timing]) -> list[str]:
    """How near to the memory's pace our first row is, and what a sparse cache takes."""
    found = bench_cases.remarks(case)
    reading = next(t.median for t in timings if t.variant.probe)
    share = bench_decode.share_of_read(timings[0].median, reading, found)
    lines = [f"{timings[0].variant.name} reads its cache at {share:.0%} of the pace of the plain read."]
    if found:
        ratio = found["dense_mib"] / found["cache_mib"]
        lines.append(
            f"The cache takes {found['cache_mib']} MiB where dense keys and values take {found['dense_mib']}: "
            f"{ratio:.2f} times less. An append of one token takes {found['append_us']} us."
        )
    return lines
