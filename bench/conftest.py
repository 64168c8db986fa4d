# SPDX-License-Identifier: Apache-2.0
"""The benchmark harness: every variant of a case is checked, all are timed in turn, and each is one benchmark entry.

Cases, variants, checks and timing live in `fla_ops/commands/bench_*.py`, which `fla-ops bench` shares. This file feeds
the times to pytest-benchmark, and keeps a CSV row for each and a figure a family in `bench/results/`.
"""

import csv
import ctypes
import datetime
import functools
import importlib.metadata
import os
import re
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fla_ops
from fla_ops import _build
from fla_ops.commands import bench_cases, bench_decode, bench_measure
from fla_ops.commands.info import cpu_name

HERE = Path(__file__).parent
RESULTS = HERE / "results"
LONGEST_BAR = 20.0  # times our best; a slower variant's bar is cut there, and says so
PACKAGES = ("torch", "triton", "transformers", "fla-core", "flash-qla", "mambapy", "mamba-ssm")


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, default=4.0, help="per case and group, shared by its variants")
    parser.addoption("--compiled", action="store_true", help="also time the baselines under torch.compile (slow)")


# Limits of the machine, measured once a session.


@functools.cache
def fma_rate() -> float | None:
    """GFLOP/s of the machine: float32 multiply-adds of all threads, or None without a C++ compiler; on a GPU, a large
    bfloat16 matrix product."""
    return _gemm_rate() if bench_cases.device() == "cuda" else _probe("fma_rate")


@functools.cache
def exp_rate() -> float | None:
    """Gexp/s of the machine: float32 exponentials of all threads from their first-level caches, or None without a C++
    compiler; on a GPU, the 16 a clock of each multiprocessor's special function units at the highest clock."""
    if bench_cases.device() == "cpu":
        return _probe("exp_rate")
    found = torch.cuda.get_device_properties()
    clock = getattr(found, "clock_rate", None)  # kHz; not every torch tells it
    return 16 * found.multi_processor_count * clock / 1e6 if clock else None


def _probe(name: str) -> float | None:
    """What the function `name` of `<name>.cpp` measures, all threads together; None without a C++ compiler."""
    compiler = _build.compiler()
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/{name}.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, "-o", library, str(HERE / f"{name}.cpp")], check=True)
        rate = getattr(ctypes.CDLL(library), name)
    rate.restype, rate.argtypes = ctypes.c_double, [ctypes.c_double]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

    def one(thread: int) -> float:  # a foreign call releases the interpreter lock
        if cores:  # else the scheduler may leave two threads on one core all the while
            os.sched_setaffinity(0, {cores[thread % len(cores)]})
        return rate(0.4)

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        return max(sum(pool.map(one, range(threads))) for _ in range(5))


def _gemm_rate() -> float:
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return 2 * n**3 / best / 1e9


@functools.cache
def copy_bandwidth() -> float:
    """GB/s of a copy far larger than any cache, reads and writes counted."""
    source = torch.ones(64 << 20, device=bench_cases.device())
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * 4 / best / 1e9


@functools.cache
def provenance() -> dict[str, str]:
    commit = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True)
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if bench_cases.device() == "cuda" else cpu_name()
    return {
        "device": device,
        "threads": str(torch.get_num_threads()),
        "versions": f"fla_ops {fla_ops.__version__}, {', '.join(versions)}",
        "commit": commit.stdout.strip() or "unknown",
    }


# One benchmark an entry, all entries of a case timed together.


class ReplayClock:
    """The clock that pytest-benchmark reads: it advances by what a call took when all variants took turns."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, seconds: float) -> None:
        self.now += seconds


clock = ReplayClock()
rows: list[dict] = []


@functools.cache
def timings(case: bench_cases.Case, compiled: bool, seconds: float) -> tuple[dict, dict]:
    """(variant name -> Timing, variant name -> a note on its exactness) of one case."""
    found = bench_cases.variants(case, reference=True, compiled=compiled)
    notes = bench_measure.check(case, found)
    return {t.variant.name: t for t in bench_measure.measure(case, found, seconds)}, notes


def pytest_generate_tests(metafunc):
    """A benchmark `bench_<op>(case, variant, record)` runs for every case of its op and every variant of the case."""
    if "variant" not in metafunc.fixturenames:
        return
    op = metafunc.function.__name__.removeprefix("bench_")
    compiled = metafunc.config.getoption("--compiled")
    pairs = [
        pytest.param(
            case,
            v.name,
            id=f"{case.kind}-{case.label}-{v.name}".replace(" ", "_"),
            marks=pytest.mark.benchmark(group=case.group, timer=clock, disable_gc=True),
        )
        for case in bench_cases.cases()
        if case.op == op
        for v in bench_cases.variants(case, reference=True, compiled=compiled)
    ]
    metafunc.parametrize(("case", "variant"), pairs)


@pytest.fixture
def record(benchmark, request):
    """record(case, variant): enter the variant's times, and what they mean, as this benchmark."""

    def enter(case: bench_cases.Case, variant: str) -> None:
        compiled, seconds = (request.config.getoption(o) for o in ("--compiled", "--seconds"))
        measured, notes = timings(case, compiled, seconds)
        timing = measured[variant]
        calls = iter(timing.wall)
        benchmark.pedantic(lambda: clock.play(next(calls)), rounds=len(timing.wall))
        flops, moved = bench_cases.work(case)
        gflops, gbs, fma = flops / timing.median / 1e9, moved / timing.median / 1e9, fma_rate()
        info = {
            "op": case.op,
            "pass": case.kind,
            "shape": case.label,
            "variant": variant,
            "median_ms": round(timing.median * 1e3, 4),
            "cpu_ms": round(timing.cpu_mean * 1e3, 4),
            "gflop_s": round(gflops, 2),
            "gb_s": round(gbs, 2),
            "share_of_fma": round(gflops / fma, 3) if fma else "",
            "share_of_copy": round(gbs / copy_bandwidth(), 3),
            "exactness": notes.get(variant, ""),
        }
        info |= exponentials(case, timing.median)
        info |= decoding(case, measured, variant)
        if bench_cases.device() == "cuda":
            info["peak_mib"] = timing.peak_mib
        benchmark.extra_info.update(info | provenance())
        rows.append(info)

    return enter


def exponentials(case: bench_cases.Case, seconds: float) -> dict[str, float | str]:
    """The two columns on exponentials: empty where they are not the floor of a pass."""
    count = bench_cases.exponentials(case)
    gexps, limit = count / seconds / 1e9, exp_rate() if count else None
    return {"gexp_s": round(gexps, 3) if count else "", "share_of_exp": round(gexps / limit, 3) if limit else ""}


remarks = functools.cache(bench_cases.remarks)


def decoding(case: bench_cases.Case, measured: dict, variant: str) -> dict[str, float | str]:
    """The columns on decoding: empty elsewhere. A share of the plain read is given for ours, on the cache they read."""
    found = dict.fromkeys(("share_of_read", "cache_mib", "dense_mib", "append_us"), "")
    if case.kind == bench_cases.DECODE:
        reading = next(t.median for t in measured.values() if t.variant.probe)
        if measured[variant].variant.ours:
            share = bench_decode.share_of_read(measured[variant].median, reading, remarks(case))
            found |= {"share_of_read": round(share, 3)} | remarks(case)
    return found


# What is kept.


def _finish_rows() -> None:
    """Each row's time over that of our best entry in its group."""
    ours: dict[tuple, float] = {}
    key = ("op", "pass", "shape")
    for row in rows:
        if row["variant"].startswith("fla_ops"):
            group = tuple(row[k] for k in key)
            ours[group] = min(ours.get(group, float("inf")), row["median_ms"])
    for row in rows:
        row["time_over_ours"] = round(row["median_ms"] / ours[tuple(row[k] for k in key)], 2)


def _append_csv(path: Path) -> None:
    when = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")
    known = {"date": when} | provenance()
    known |= {"fma_gflop_s": round(fma_rate() or 0, 1), "copy_gb_s": round(copy_bandwidth(), 1)}
    new = [known | row for row in rows]
    old, header = [], []
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            old, header = list(reader), list(reader.fieldnames)
    wider = list(dict.fromkeys([*header, *new[0]]))
    with path.open("w" if wider != header else "a", newline="") as file:
        writer = csv.DictWriter(file, wider, restval="")
        if wider != header:  # a file from before some column was measured: its rows leave it empty
            writer.writeheader()
            writer.writerows(old)
        writer.writerows(new)


def _print_exponentials() -> None:
    for row in rows:
        if row["share_of_exp"] and row["variant"].startswith("fla_ops"):
            pace = (
                f"{row['gexp_s']:.2f} Gexp/s, {row['share_of_exp']:.0%} of the {exp_rate():.1f} of exponentials alone"
            )
            print(f"{row['op']} {row['pass']} {row['shape']}, {row['variant']}: {pace}")


def _draw(op: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mine = [row for row in rows if row["op"] == op]
    groups = list(dict.fromkeys((row["pass"], row["shape"]) for row in mine))
    columns = 3
    height = -(-len(groups) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(17, 2.6 * height), layout="constrained", squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis, (kind, shape) in zip(axes.flat, groups, strict=False):
        bars = [row for row in mine if (row["pass"], row["shape"]) == (kind, shape)]
        names = [row["variant"] for row in bars]
        colors = ["#1b6ca8" if n.startswith("fla_ops") else "#9aa5b1" for n in names]
        ratios = [row["time_over_ours"] for row in bars]
        axis.barh(names, [min(r, LONGEST_BAR) for r in ratios], color=colors)
        for i, row in enumerate(bars):
            label = f" {row['median_ms']:.3g} ms, {ratios[i]:.3g}x{' (bar cut)' * (ratios[i] > LONGEST_BAR)}"
            axis.text(min(ratios[i], LONGEST_BAR), i, label, va="center", fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.6)
        axis.set_title(f"{kind}  {shape}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    known = provenance()
    where = f"{known['device']}, {known['threads']} threads, {known['versions']}"
    figure.suptitle(f"{op}: median time over our best; {where}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def pytest_sessionfinish(session, exitstatus):
    if not rows:
        return
    _finish_rows()
    slug = re.sub(r"\W+", "-", f"{provenance()['device']} {provenance()['threads']} threads").strip("-").lower()
    RESULTS.mkdir(exist_ok=True)
    _append_csv(RESULTS / f"{slug}.csv")
    print()
    _print_exponentials()
    print(f"rows appended to {RESULTS / f'{slug}.csv'}")
    for op in dict.fromkeys(row["op"] for row in rows):
        path = RESULTS / f"{slug}-{op}.png"
        _draw(op, path)
        print(f"figure: {path}")
