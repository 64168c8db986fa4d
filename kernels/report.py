# SPDX-License-Identifier: Apache-2.0
"""What the compiler makes of every kernel, without a GPU: `python -m fla_ops.kernels.report`, or `make report`.

For each case below, the launchers' launches are recorded and compiled for each target (`_ahead_of_time.py`); the
machine code is counted (`_machine_code.py`) and held against the rules (`broken_rules`). The table goes to
bench/results/ahead-of-time.md. It exits with 1 if a rule is broken. The compiler is not the GPU: the table shows that
kernels compile, fit and use what the hardware has, not that they are right or how fast they are.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from . import _ahead_of_time, _launch
from ._machine_code import MachineCode, inspect
from ._ttir import loop_loads_and_multiplies, narrow_offsets

ALL = tuple(_ahead_of_time.TARGETS)
HOPPER = ("sm_90",)


@dataclass(frozen=True)
class Case:
    """Inputs to compile for. `options` are arguments of the function of this module that is named as the stem."""

    stem: str
    dtype: str
    options: dict = field(default_factory=dict)
    targets: tuple[str, ...] = HOPPER
    short: bool = False  # part of the list that tests compile

    @property
    def label(self) -> str:
        shown = (name if value is True else f"{name}={value}" for name, value in self.options.items())
        return " ".join([self.dtype, *shown])


CASES = (
    Case("delta_rule", "bfloat16", {"K": 128, "V": 128, "g": True, "l2norm": True}, targets=ALL, short=True),
    Case("delta_rule", "bfloat16", {"K": 128, "V": 128}),
    Case("delta_rule", "bfloat16", {"K": 128, "V": 128, "g": True, "GVA": True, "packed": True, "l2norm": True}),
    Case("delta_rule", "bfloat16", {"K": 128, "V": 128, "g": True, "T": 4096, "H": 2, "split": True}),
    Case("delta_rule", "bfloat16", {"K": 64, "V": 64, "g": True}),
    Case("delta_rule", "bfloat16", {"K": 256, "V": 256, "g": True}, targets=ALL),
    Case("delta_rule", "bfloat16", {"K": 100, "V": 60, "g": True}),
    Case("delta_rule", "float16", {"K": 128, "V": 128, "g": True}),
    Case("delta_rule", "float32", {"K": 128, "V": 128, "g": True}, targets=ALL),
    Case("delta_rule", "float32", {"K": 128, "V": 128, "g": True, "tf32": True}),
    Case("delta_rule", "float32", {"K": 64, "V": 64, "g": True}, short=True),
    Case("delta_rule", "float32", {"K": 256, "V": 256, "g": True}),
    Case("delta_rule", "float64", {"K": 64, "V": 64, "g": True}),
    Case("delta_product", "bfloat16", {"K": 128, "V": 128, "n": 2, "g": True, "l2norm": True}, short=True),
    Case("delta_product", "bfloat16", {"K": 128, "V": 128, "n": 3, "g": True, "GVA": True, "packed": True}),
    Case("delta_product", "bfloat16", {"K": 64, "V": 64, "n": 4, "g": True}),
    Case("delta_product", "float32", {"K": 64, "V": 64, "n": 3, "g": True}),
    Case("causal_conv1d", "bfloat16", {"W": 4, "silu": True}, targets=ALL, short=True),
    Case("causal_conv1d", "bfloat16", {"W": 4, "silu": True, "time_last": True}),
    Case("causal_conv1d", "bfloat16", {"W": 4, "silu": True, "packed": True, "bias": True}),
    Case("causal_conv1d", "bfloat16", {"W": 8, "silu": True, "packed": True}),
    Case("causal_conv1d", "float16", {"W": 4, "silu": True, "packed": True, "time_last": True}),
    Case("causal_conv1d", "float32", {"W": 4, "silu": True}, targets=ALL),
    Case("causal_conv1d", "float64", {"W": 4}),
    Case("selective_scan", "bfloat16", {"N": 16, "softplus": True}, targets=ALL, short=True),
    Case("selective_scan", "bfloat16", {"N": 16, "softplus": True, "B": 1, "T": 32768, "Di": 512, "split": True}),
    Case("selective_scan", "float16", {"N": 16, "softplus": True, "packed": True, "G": 2, "plain": True}, short=True),
    Case("selective_scan", "bfloat16", {"N": 64, "softplus": True}),
    Case("selective_scan", "bfloat16", {"N": 16, "constant": True}),
    Case("selective_scan", "float32", {"N": 16, "softplus": True}, targets=ALL),
    Case("selective_scan", "float32", {"N": 256, "softplus": True}),
    Case("selective_scan", "float64", {"N": 16, "softplus": True}),
    Case("temporal_sparse_attention", "bfloat16", {"D": 128}, targets=ALL, short=True),
    Case("temporal_sparse_attention", "bfloat16", {"D": 64, "GQA": 4, "packed": True, "window_mode": "block"}),
    Case("temporal_sparse_attention", "bfloat16", {"D": 128, "dense": True}),
    Case("temporal_sparse_attention", "bfloat16", {"D": 256}, targets=ALL),
    Case("temporal_sparse_attention", "float16", {"D": 64}),
    Case("temporal_sparse_attention", "float32", {"D": 64}, targets=ALL),
    Case("temporal_sparse_attention", "float64", {"D": 64}),
    Case("decode_attention", "bfloat16", {"D": 128, "split": True}, targets=ALL, short=True),
    Case("decode_attention", "bfloat16", {"D": 128, "Tq": 64, "lengths": True}),
    Case("decode_attention", "bfloat16", {"D": 64, "split": True, "lengths": True}),
    Case("decode_attention", "bfloat16", {"D": 256, "split": True}, targets=ALL),
    Case("decode_attention", "float16", {"D": 128, "Tq": 8}),
    Case("decode_attention", "float32", {"D": 128, "split": True}, targets=ALL),
    Case("decode_attention", "float32", {"D": 256, "Tq": 8}),
    Case("decode_attention", "float64", {"D": 64}),
    Case("delta_kv_cache", "bfloat16", {"D": 128, "split": True}, targets=ALL, short=True),
    Case("delta_kv_cache", "bfloat16", {"D": 128, "Tq": 64, "sink": 4, "window_mode": "block"}),
    Case("delta_kv_cache", "bfloat16", {"D": 64, "split": True, "sink": 4}),
    Case("delta_kv_cache", "bfloat16", {"D": 256, "split": True}, targets=ALL),
    Case("delta_kv_cache", "float16", {"D": 128, "Tq": 8, "masked": True}),
    Case("delta_kv_cache", "float32", {"D": 128, "split": True}, targets=ALL),
    Case("delta_kv_cache", "float64", {"D": 64}),
)


def delta_rule(dtype, **options) -> dict:
    """What each pass calls, by name; `backward` after `training`. Real sizes matter to the choice of a path only."""
    from . import delta_rule as op

    return _delta(op, dtype, **options)


def delta_product(dtype, *, n, **options) -> dict:
    """As `delta_rule`, with n rows of k, v and beta a token."""
    from . import delta_product as op

    return _delta(op, dtype, n=n, num_householder=n, **options)


def _delta(
    op, dtype, *, K, V, B=4, T=128, H=16, n=1, GVA=False, g=False, packed=False, l2norm=False, split=False, **steps
) -> dict:
    HV = 2 * H if GVA else H
    if packed or split:
        B = 1
    N = 8 if packed else B
    q, k = torch.zeros(B, T, H, K, dtype=dtype), torch.zeros(B, T * n, H, K, dtype=dtype)
    v = torch.zeros(B, T * n, HV, V, dtype=dtype)
    beta = torch.zeros(B, T * n, HV, dtype=dtype)
    gate = torch.zeros(B, T, HV) if g else None
    accumulator = torch.promote_types(dtype, torch.float32)
    state = torch.zeros(N, HV, K, V, dtype=accumulator)
    cu_seqlens = torch.linspace(0, T, N + 1).long() if packed else None
    inputs = (q, k, v, beta, gate, state, cu_seqlens)
    options = {"scale": 1.0, "qk_l2norm": l2norm}
    needs = (True, True, True, True, g, True)
    saved = []

    do = torch.zeros(B, T, HV, V, dtype=dtype)

    def training():
        saved[:] = [op.forward(*inputs, save_states=True, **options, **steps)[2]]

    def step():
        rows = (q[:, 0], *(x[:, :n] if steps else x[:, 0] for x in (k, v, beta)), gate if gate is None else gate[:, 0])
        tokens = (x if x is None else x.contiguous() for x in rows)
        op.step(*tokens, state=state[:B], state_indices=None, **options)

    passes = {
        "forward": lambda: op.forward(*inputs, save_states=False, **options, **steps),
        "training": training,
        "backward": lambda: op.backward(*inputs, *saved, do, state, needs=needs, **options, **steps),
        "step": step,
    }
    return passes if T else {name: passes[name] for name in passes if name != "step"}


def causal_conv1d(dtype, *, W, B=4, T=128, D=512, bias=False, silu=False, packed=False, time_last=False) -> dict:
    """As `delta_rule`. Layers hold channels last; `time_last` is the other layout."""
    from . import causal_conv1d as op

    B = 1 if packed else B
    N = 8 if packed else B
    x = torch.zeros(B, D, T, dtype=dtype) if time_last else torch.zeros(B, T, D, dtype=dtype).transpose(1, 2)
    weight = torch.zeros(D, W, dtype=dtype)
    state = torch.zeros(N, D, W - 1, dtype=torch.promote_types(dtype, torch.float32))
    cu_seqlens = torch.linspace(0, T, N + 1).long() if packed else None
    inputs = (x, weight, torch.zeros(D, dtype=dtype) if bias else None, state, cu_seqlens)
    activation = "silu" if silu else None
    needs = (True, True, bias, True)
    passes = {
        "forward": lambda: op.forward(*inputs, activation=activation),
        "backward": lambda: op.backward(*inputs, x, state, activation=activation, needs=needs),
        "step": lambda: op.step(
            x[:, :, 0].contiguous(), *inputs[1:3], state=state[:B], activation=activation, state_indices=None
        ),
    }
    return passes if T else {name: passes[name] for name in passes if name != "step"}


def selective_scan(
    dtype,
    *,
    N,
    B=4,
    T=128,
    Di=512,
    G=1,
    softplus=False,
    packed=False,
    split=False,
    constant=False,
    plain=False,
    time_last=False,
) -> dict:
    """As `delta_rule`, in the layouts of the layer: channels last, B and C columns of one projection. `plain`: without
    D, z and delta_bias; `constant`: B and C without a time axis; `time_last`: the layout of the peers."""
    from . import selective_scan as op

    B = 1 if packed else B
    S = 8 if packed else B
    u, delta, z = (
        torch.zeros(B, Di, T, dtype=dtype) if time_last else torch.zeros(B, T, Di, dtype=dtype).transpose(1, 2)
        for _ in range(3)
    )
    rows = torch.zeros(B, T, 2 * G * N + 16, dtype=dtype)[..., 16:].unflatten(2, (2, G, N)).permute(2, 0, 3, 4, 1)
    accumulator = torch.promote_types(dtype, torch.float32)
    A, D, bias = (torch.zeros(*size, dtype=accumulator) for size in ((Di, N), (Di,), (Di,)))
    projections = (A, A) if constant else (rows[0], rows[1])
    state = torch.zeros(S, Di, N, dtype=accumulator)
    cu_seqlens = torch.linspace(0, T, S + 1).long() if packed else None
    inputs = (u, delta, A, *projections, *((None,) * 3 if plain else (D, z, bias)), state, cu_seqlens)
    needs = (True,) * 5 + (not plain,) * 3 + (True,)
    saved = []

    def training():
        saved[:] = [op.forward(*inputs, delta_softplus=softplus, save_states=True)[2]]

    def step():
        B, C = (A[None].expand(len(u), -1, -1) if constant else w[..., 0].contiguous() for w in projections)
        tokens = (x if x is None else x[..., 0].contiguous() for x in (u, delta, inputs[6]))
        u_, delta_, z_ = tokens
        options = {"z": z_, "delta_bias": inputs[7], "delta_softplus": softplus, "state_indices": None}
        op.step(u_, delta_, A, B, C, inputs[5], state=state[: len(u)], **options)

    passes = {
        "forward": lambda: op.forward(*inputs, delta_softplus=softplus, save_states=False),
        "training": training,
        "backward": lambda: op.backward(*inputs, *saved, u, state, delta_softplus=softplus, needs=needs),
        "step": step,
    }
    return passes if T else {name: passes[name] for name in passes if name != "step"}


def temporal_sparse_attention(
    dtype, *, D, B=4, T=128, H=16, GQA=1, packed=False, dense=False, window_mode="band"
) -> dict:
    """As `delta_rule`; GQA query heads share a key head."""
    from . import temporal_sparse_attention as op

    B = 1 if packed else B
    q = torch.zeros(B, T, H, D, dtype=dtype)
    k, v = (torch.zeros(B, T, H // GQA, D, dtype=dtype) for _ in range(2))
    threshold = torch.zeros(H // GQA, D, dtype=torch.promote_types(dtype, torch.float32))
    cu_seqlens = torch.linspace(0, T, 9).long() if packed else None
    inputs = (q, k, v, threshold, cu_seqlens)
    options = {"window": 16, "sink": 4, "window_mode": window_mode, "scale": 0.125, "dense": dense}
    saved = []

    def forward():
        saved[:] = op.forward(*inputs, **options, count_fired=False)[:2]

    return {
        "forward": forward,
        "backward": lambda: op.backward(*inputs, *saved, q, **options, needs=(True,) * 3),
    }


def decode_attention(dtype, *, D, B=2, Tq=1, T=1000, HK=2, GQA=4, lengths=False, split=False) -> dict:
    """As `delta_rule`; GQA query heads share a key head. The caches are slices of wider ones."""
    from . import decode_attention as op

    q = torch.zeros(B, Tq, HK * GQA, D, dtype=dtype)
    k, v = torch.zeros(B, T, 2, HK, D, dtype=dtype).unbind(2)
    n = torch.full((B,), T) if lengths else None
    return {"decode": lambda: op.forward(q, k, v, lengths=n, scale=0.125)}


def delta_kv_cache(
    dtype, *, D, B=2, Tq=1, T=1000, HK=2, GQA=4, sink=0, window_mode="band", masked=False, split=False
) -> dict:
    """As `delta_rule`, from a cache of T tokens on: Tq more and their attention, then all keys written out."""
    from .delta_kv_cache import Store

    q = torch.zeros(B, Tq, HK * GQA, D, dtype=dtype)
    k, v = (torch.zeros(B, T, HK, D, dtype=dtype) for _ in range(2))
    threshold = torch.zeros(HK, D, dtype=torch.promote_types(dtype, torch.float32))
    store = Store(k, v, threshold, sink, None)
    keep = torch.ones(B, Tq, dtype=torch.bool) if masked else None
    options = {"window": 100, "window_mode": window_mode, "scale": 0.125}

    def prefill():
        store.append(k, v, None)
        store.seal([T - 150] * B)

    return {
        "prefill": prefill,
        "append": lambda: store.append(k[:, :Tq], v[:, :Tq], keep),
        "decode": lambda: store.attend(q, torch.arange(T, T + Tq).expand(B, Tq), **options),
        "to dense": lambda: store.to_dense([T - 100] * B),
    }


PASSES = {
    "delta_rule": delta_rule,
    "delta_product": delta_product,
    "causal_conv1d": causal_conv1d,
    "selective_scan": selective_scan,
    "temporal_sparse_attention": temporal_sparse_attention,
    "decode_attention": decode_attention,
    "delta_kv_cache": delta_kv_cache,
}


def recorded(case: Case, target: str) -> dict[str, list[_ahead_of_time.Launch]]:
    """The launches of each pass of a case."""
    options = dict(case.options)
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    torch.set_float32_matmul_precision("high" if options.pop("tf32", False) else "highest")
    torch.use_deterministic_algorithms(not options.get("split", False))  # nothing is split under these
    try:
        passes = PASSES[case.stem](getattr(torch, case.dtype), **options)
        found = {}
        for name, run in passes.items():
            with _ahead_of_time.recording(target) as found[name]:
                run()
        return found
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.use_deterministic_algorithms(before[1])


@dataclass
class Row:
    """One kernel as compiled for one target: a line of the table."""

    stem: str
    target: str
    kernel: str
    config: str
    cases: list[str]
    passes: list[str]
    dtype: str
    ieee: bool
    aligned: bool  # rows of the inputs start at multiples of 16 bytes
    loads_and_multiplies: bool = False  # a loop holds both loads and matrix products
    narrow: list[str] = field(default_factory=list)  # products in 32 bits that reach an address
    code: dict = field(default_factory=dict)  # MachineCode's fields
    error: str = ""  # why it did not compile

    @property
    def where(self) -> str:
        return f"{self.kernel} ({self.config}) for {self.cases[0]} on {self.target}"


def describe(launch: _ahead_of_time.Launch) -> str:
    """The tile sizes of a launch and how it is launched."""
    tiles = [f"{n}={v}" for n, v in launch.constants.items() if n in TILES]
    flags = [n for n, v in launch.constants.items() if n in ("TMA",) and v]
    return " ".join([*tiles, *flags, f"warps={launch.options.num_warps}", f"stages={launch.options.num_stages}"])


TILES = ("BT", "BK", "BV", "BD", "BN")


def first_cause(error: BaseException) -> str:
    """What a compiler complains of, without the places in the code that it came through."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return lines[-1] if lines else type(error).__name__


def compile_one(job: tuple[int, str, str, int]) -> dict:
    """Compile launch `number` of a case's pass, in a process of its own pool."""
    index, target, name, number = job
    launch = recorded(CASES[index], target)[name][number]
    try:
        compiled = launch.compile(target)
    except Exception as error:
        return {"error": first_cause(error)}
    return {
        "code": asdict(inspect(compiled)),
        "loads_and_multiplies": loop_loads_and_multiplies(compiled.asm["ttir"]),
        "narrow": narrow_offsets(compiled.asm["ttir"]),
    }


def rows(cases: list[int], targets: tuple[str, ...], processes: int) -> list[Row]:
    """Compile each distinct kernel of the cases once for each target."""
    found, jobs = {}, []
    for index in cases:
        case = CASES[index]
        for target in (t for t in case.targets if t in targets):
            for name, launches in recorded(case, target).items():
                for number, launch in enumerate(launches):
                    key = target, launch.name, launch.key
                    if key not in found:
                        found[key] = Row(
                            case.stem,
                            target,
                            launch.name,
                            describe(launch),
                            [],
                            [],
                            case.dtype,
                            ieee=case.dtype == "float32" and "tf32" not in case.options,
                            aligned=all(case.options.get(n, 8) % 8 == 0 for n in ("K", "V")),
                        )
                        jobs.append((index, target, name, number))
                    row = found[key]
                    row.cases += [case.label] * (case.label not in row.cases)
                    row.passes += [name] * (name not in row.passes)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for row, result in zip(found.values(), pool.map(compile_one, jobs), strict=True):
            for name, value in result.items():
                setattr(row, name, value)
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return list(found.values())


# Shared memory that one program may have, in bytes. The compiler does not object by itself.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}
TENSOR_CORES = {"HMMA", "HGMMA", "UTCHMMA"}


def broken_rules(row: Row) -> list[str]:
    """A sentence for each rule that a compiled kernel breaks."""
    if row.error:
        return [f"{row.where} does not compile: {row.error}"]
    code = MachineCode(**row.code)
    broken = []
    if code.shared > SHARED_LIMIT[row.target]:
        broken.append(
            f"{row.where} takes {code.shared} bytes of shared memory; {row.target} has {SHARED_LIMIT[row.target]}."
        )
    if row.narrow:
        broken.append(f"{row.where} computes offsets in 32 bits: {'; '.join(row.narrow)}.")
    if row.ieee and TENSOR_CORES & set(code.matrix):
        broken.append(f"{row.where} promises IEEE float32 and multiplies on tensor cores: {code.matrix}.")
    if row.target == "sm_90" and row.dtype in ("bfloat16", "float16"):
        if code.spills_in_loops:
            broken.append(f"{row.where} has {code.spills_in_loops} loads and stores of spilled registers in its loop.")
        if row.loads_and_multiplies and not TENSOR_CORES & set(code.matrix):
            broken.append(f"{row.where} multiplies in a loop without tensor cores.")
        if row.loads_and_multiplies and row.aligned and not code.asynchronous_loads:
            broken.append(f"{row.where} multiplies in a loop whose loads are not asynchronous.")
    return broken


def rows_with_triton(folder: str, arguments: list[str]) -> tuple[str, list[Row]]:
    """(version, rows) of this same command under the Triton that is installed in `folder`."""
    kept = [*arguments, "--json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", f"{__package__}.report", *kept]
    answer = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout)
    return answer["triton"], [Row(**row) for row in answer["rows"]]


COLUMNS = (
    "kernel",
    "pass",
    "inputs",
    "configuration",
    "registers",
    "spilled bytes (in loops)",
    "shared KB",
    "matrix instructions",
    "FMA",
    "asynchronous loads",
)


def cells(row: Row) -> list[str]:
    """The measured part of a line of the table."""
    if row.error:
        return ["does not compile"] + [""] * 5
    code = MachineCode(**row.code)

    def counts(of):
        return " ".join(f"{n} {name}" for name, n in of.items()) or "-"

    in_loops = f" ({code.spills_in_loops})" if code.spills_in_loops else ""
    return [
        str(code.registers),
        f"{code.spill_bytes}{in_loops}",
        f"{code.shared / 1024:.0f}",
        counts(code.matrix),
        str(code.fma or "-"),
        counts(code.asynchronous_loads),
    ]


def markdown(found: dict[str, list[Row]]) -> str:
    """The table: versions of Triton side by side in a cell where they differ."""
    from tabulate import tabulate

    versions = list(found)
    text = [HEADER.format(versions=", ".join(versions))]
    every = [row for rows_of in found.values() for row in rows_of]
    for stem, target in dict.fromkeys((row.stem, row.target) for row in every):
        lines = {}
        for version, rows_of in found.items():
            for row in rows_of:
                if (row.stem, row.target) == (stem, target):
                    key = row.kernel, tuple(row.passes), tuple(row.cases), row.config
                    lines.setdefault(key, {})[version] = cells(row)
        merged = {}
        for (kernel, passes, cases, config), by_version in lines.items():
            columns = zip(*(by_version.get(v, ["-"] * 6) for v in versions), strict=True)
            measured = tuple(c[0] if len(set(c)) == 1 else " / ".join(c) for c in columns)
            merged.setdefault((kernel, passes, config, measured), []).extend(cases)
        table = [
            [kernel, ", ".join(passes), "; ".join(dict.fromkeys(cases)), config, *measured]
            for (kernel, passes, config, measured), cases in merged.items()
        ]
        text.append(f"## {stem}, {target}\n\n" + tabulate(table, COLUMNS, tablefmt="github", disable_numparse=True))
    return "\n\n".join(text) + "\n"


def with_kept_sections(text: str, before: str) -> str:
    """`text` with the sections of `before`, an older table of the same Tritons, of ops that it says nothing of."""
    (head, *new), (old_head, *old) = (x.rstrip("\n").split("\n\n## ") for x in (text, before))
    if head != old_head:
        raise SystemExit("the table that is there is of other versions: write the whole table, without --stem")
    stems = {section.split(",")[0] for section in new}
    kept = [section for section in old if section.split(",")[0] not in stems]
    ordered = sorted(kept + new, key=lambda section: list(PASSES).index(section.split(",")[0]))
    return "\n\n## ".join([head, *ordered]) + "\n"


HEADER = """# What the compiler makes of every kernel

Written by `make report` (`kernels/report.py`), without a GPU, with Triton {versions}; where they differ, a cell holds
their values in this order. Registers and spilled bytes are a thread's, shared memory a program's; instructions are
counted in the machine code as it stands, not as often as they run. g: gated; GVA: twice as many value heads; l2norm: of
q and k; split: one long sequence over an empty card, in segments."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fla_ops.kernels.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help="only the cases that tests compile")
    parser.add_argument("--stem", choices=PASSES, action="append", help="only this op")
    parser.add_argument("--target", choices=ALL, action="append", help="only this target")
    parser.add_argument(
        "--triton", metavar="DIR", action="append", default=[], help="a further Triton, installed there"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--check", action="store_true", help="only the rules, no table")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON, and hold it against no rule")
    parser.add_argument("--write", metavar="FILE", help="write the table there; with --stem leave other ops' sections")
    given = parser.parse_args(arguments)
    if _launch.INTERPRET:
        parser.error("TRITON_INTERPRET=1 is set: nothing would be compiled")
    cases = [
        i for i, c in enumerate(CASES) if (c.short or not given.short) and (not given.stem or c.stem in given.stem)
    ]
    mine = rows(cases, tuple(given.target or ALL), given.processes)
    if given.json:
        print(json.dumps({"triton": triton.__version__, "rows": [asdict(row) for row in mine]}))
        return 0
    others = [rows_with_triton(folder, sys.argv[1:] if arguments is None else arguments) for folder in given.triton]
    found = dict(sorted([*others, (triton.__version__, mine)]))
    if given.write:
        table, path = markdown(found), Path(given.write)
        if given.stem and path.exists():
            table = with_kept_sections(table, path.read_text())
        path.write_text(table)
    elif not given.check:
        print(markdown(found))
    broken = [f"Triton {v}: {text}" for v, rows_of in found.items() for row in rows_of for text in broken_rules(row)]
    print(*broken, sep="\n", end="\n" * bool(broken))
    print(f"{sum(map(len, found.values()))} kernels compiled, Triton {', '.join(found)}; {len(broken)} rules broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
