# SPDX-License-Identifier: Apache-2.0
"""Timing one case: every variant is checked against the float64 reference, then all take turns, round after round.

Turns make ratios fair on a machine whose speed drifts. Medians are reported, and the processor time of each call.
Memory comes from torch's allocator as it is: page faults of fresh outputs are part of a call, as they are for users.
"""

import importlib
import statistics
import time
from dataclasses import dataclass, field

import torch

from fla_ops.testing import assert_matches_reference

from . import bench_decode, bench_scan
from .bench_cases import BACKWARD, DECODE, STEP, Case, Tensors, Variant, device, inputs

CHECK_LENGTH = 192  # tokens: several blocks of any kernel, and little enough for a float64 loop with gradients
MIN_ROUNDS, MAX_ROUNDS = 3, 200
SHORTEST_TURN = 2e-3  # seconds: a call of microseconds is repeated, and its turn is their mean


@dataclass
class Timing:
    variant: Variant
    wall: list[float] = field(default_factory=list)  # seconds a call
    cpu: list[float] = field(default_factory=list)  # processor seconds a call, all threads
    peak_mib: float = 0.0  # device memory of a call beyond its inputs, on a GPU

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def cpu_mean(self) -> float:
        """The mean: the clock of other threads advances in ticks that are longer than many calls."""
        return statistics.fmean(self.cpu)


# The inputs of a step that have no time axis and need one for the reference. DeltaProduct's others have one of n there.
_TOKENS = {
    "delta_rule": ("q", "k", "v", "beta", "g"),
    "delta_product": ("q", "g"),
    "causal_conv1d": ("x",),
    "selective_scan": bench_scan.TOKENS,
}


def _reference(case: Case, x: Tensors, low: torch.dtype | None) -> tuple[torch.Tensor, ...]:
    """The pass on the reference: in float64, or in the case's dtype with operands rounded to `low`."""
    if case.kind == DECODE:
        return (bench_decode.reference(case.op, x, low),)
    op = getattr(importlib.import_module(f"fla_ops.reference.{case.op}"), case.op)
    leaves = {n: t.detach() if n == "cu_seqlens" else t.detach().clone() for n, t in x.items() if n != "do"}
    if low is None:
        leaves = {n: t if n == "cu_seqlens" else t.double() for n, t in leaves.items()}
    options = case.options
    if case.kind == STEP:
        state = leaves.pop("state")
        tokens = _TOKENS[case.op]
        axis = 1 if case.delta else 2
        if case.op == "delta_product":
            options = options | {"num_householder": case.sizes["n"]}
        leaves = {n: t.unsqueeze(axis) if n in tokens else t for n, t in leaves.items()}
        return (op(**leaves, initial_state=state, operand_dtype=low, **options)[0].squeeze(axis),)
    if case.kind != BACKWARD:
        return (op(**leaves, operand_dtype=low, **options)[0],)
    wanted = [t.requires_grad_() for n, t in leaves.items() if n != "cu_seqlens"]
    o = op(**leaves, operand_dtype=low, **options)[0]
    return o, *torch.autograd.grad(o, wanted, x["do"].to(o.dtype))


def check(case: Case, variants: list[Variant]) -> dict[str, str]:
    """Variant name -> what is wrong with its results. A wrong result of ours raises: its time means nothing.

    Baselines that miss our tolerance are timed and marked.
    """
    for variant in variants:
        if not variant.ours and device() == "cuda":  # a peer tunes itself at its first call: on what will be timed
            with variant.context():
                variant.call(inputs(case))
    length = {STEP: None, DECODE: 4 * CHECK_LENGTH}.get(case.kind, CHECK_LENGTH)
    x = inputs(case, length)
    low = None if case.dtype == torch.float64 else case.dtype
    ref64, ref_low = _reference(case, x, None), _reference(case, x, low)
    notes = {}
    for variant in variants:
        if variant.probe:
            continue
        with variant.context():
            got = variant.call(inputs(case, length))
        got = got if isinstance(got, tuple) else (got,)
        for i, (a, r, l) in enumerate(zip(got, ref64, ref_low, strict=True)):
            try:
                name = f"{variant.name}, {case.group}, {'gradient' if i else 'output'} {i}"
                assert_matches_reference(a, r, l, name, gradient=i > 0, seed=0)
            except AssertionError as error:
                if variant.ours:
                    raise
                notes[variant.name] = str(error)
    return notes


class _GpuClock:
    """CUDA events around a call, with the L2 cache flushed before it."""

    def __init__(self):
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, variant: Variant, x: Tensors, calls: int) -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        cpu = time.process_time()
        start.record()
        for _ in range(calls):
            variant.call(x)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls, (time.process_time() - cpu) / calls


def _cpu_clock(variant: Variant, x: Tensors, calls: int) -> tuple[float, float]:
    if calls > 1:  # what the last turn left in the caches counts against nobody
        variant.call(x)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        variant.call(x)
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def measure(case: Case, variants: list[Variant], seconds: float) -> list[Timing]:
    """Time the variants in turn for about `seconds`. Each sits out once it has used its share of the time, of which it
    gets 3 rounds at least: one that is far slower than the others takes none of their rounds."""
    clock = _GpuClock() if device() == "cuda" else _cpu_clock
    x = inputs(case)
    timings = [Timing(v) for v in variants]
    calls = {}
    for timing in timings:
        with timing.variant.context():
            clock(timing.variant, x, 1)  # warm up: compile, allocate, page in
            if device() == "cuda":
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                timing.variant.call(x)
                timing.peak_mib = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
            else:
                once = clock(timing.variant, x, 1)[0]
                calls[timing.variant.name] = max(1, round(SHORTEST_TURN / once))
    share = seconds / len(variants)
    for round_ in range(MAX_ROUNDS):
        used = [sum(timing.wall) * calls.get(timing.variant.name, 1) for timing in timings]
        active = [
            t for t, seconds_used in zip(timings, used, strict=True) if round_ < MIN_ROUNDS or seconds_used < share
        ]
        if not active:
            break
        for timing in active:
            with timing.variant.context():
                wall, cpu = clock(timing.variant, x, calls.get(timing.variant.name, 1))
            timing.wall.append(wall)
            timing.cpu.append(cpu)
    return timings
