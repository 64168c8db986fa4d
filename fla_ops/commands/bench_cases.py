# SPDX-License-Identifier: Apache-2.0
"""What is timed: the cases of each family, and the variants of a case, ours and what people run today.

`fla-ops bench` times the short list, the files of a checkout's `bench/` every case.
"""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import fla_ops
from fla_ops._backend import why_not
from fla_ops._native import levels

from . import bench_decode, bench_scan, bench_sparse

Tensors = dict[str, torch.Tensor]
FORWARD, BACKWARD, STEP, DECODE = "forward", "forward+backward", "step", "decode"


@dataclass(frozen=True)
class Variant:
    name: str
    call: Callable[[Tensors], object]  # the whole pass on given inputs; returns its output
    ours: bool = False
    level: str | None = None  # of the native CPU kernels
    probe: bool = False  # a measure of the machine: it computes something else

    def context(self) -> contextlib.AbstractContextManager:
        return levels.use(self.level) if self.level else contextlib.nullcontext()


@dataclass(frozen=True, eq=False)
class Case:
    """One group of the table: an op, a pass and a shape. Sizes are those of the op's docstring, n DeltaProduct's number
    of steps a token."""

    op: str
    kind: str  # FORWARD, BACKWARD, STEP or DECODE
    sizes: dict[str, int]
    dtype: torch.dtype = torch.float32
    packed: tuple[int, ...] = ()  # sequence lengths; empty: not packed
    gated: bool = True  # the delta rule's: with a decay
    channels_last: bool = False  # the memory layout of the convolution and the scan
    quick: bool = False  # on the short list

    @property
    def label(self) -> str:
        sizes = ",".join(f"{k}{v}" for k, v in self.sizes.items())
        packed = f" packed x{len(self.packed)}" if self.packed else ""
        plain = "" if self.gated else " plain"
        layout = " channels-last" if self.channels_last else ""
        return f"{sizes}{packed}{plain}{layout} {str(self.dtype).removeprefix('torch.')}"

    @property
    def group(self) -> str:
        return f"{self.op} {self.kind} {self.label}"

    @property
    def delta(self) -> bool:
        """Whether the op is of the delta rule's kind, q, k, v and gates."""
        return self.op in ("delta_rule", "delta_product")

    @property
    def options(self) -> dict[str, object]:
        """What the op is called with beside its tensors."""
        if self.op == "selective_scan":
            return {"delta_softplus": True}
        if self.op == "temporal_sparse_attention":
            return bench_sparse.options(self.sizes)
        if self.kind == DECODE:
            return {}
        if not self.delta:
            return {"activation": "silu"}
        steps = {"num_householder": self.sizes["n"]} if self.op == "delta_product" and self.kind != STEP else {}
        return {"qk_l2norm": True} | steps


def _delta(kind: str, T: int, D: int, H: int = 8, V: int | None = None, B: int = 1, **options) -> Case:
    return Case("delta_rule", kind, {"B": B, "T": T, "H": H, "K": D, "V": V or D}, **options)


def _product(kind: str, T: int, D: int, n: int, H: int = 8, B: int = 1, **options) -> Case:
    return Case("delta_product", kind, {"B": B, "T": T, "H": H, "K": D, "V": D, "n": n}, **options)


def _conv(kind: str, D: int, L: int, B: int = 1, **options) -> Case:
    return Case("causal_conv1d", kind, {"B": B, "D": D, "L": L, "W": 4}, **options)


def _scan(kind: str, Di: int, L: int, B: int = 1, **options) -> Case:
    return Case("selective_scan", kind, {"B": B, "Di": Di, "L": L, "N": 16}, **options)


def _sparse(kind: str, T: int, zeros: int, W: int = 64, H: int = 8, D: int = 64, B: int = 1, **options) -> Case:
    sizes = {"B": B, "T": T, "H": H, "D": D, "W": W, "zeros": zeros}
    return Case("temporal_sparse_attention", kind, sizes, **options)


def _decode(T: int, zeros: int | None = None, HQ: int = 32, HK: int = 8, D: int = 128, B: int = 1, **options) -> Case:
    sizes = {"B": B, "T": T, "HQ": HQ, "HK": HK, "D": D}
    if zeros is None:
        return Case("decode_attention", DECODE, sizes, **options)
    return Case("delta_kv_cache", DECODE, sizes | {"zeros": zeros}, **options)


_ON_CPU = (
    _delta(FORWARD, 2048, 64, quick=True),
    _delta(FORWARD, 2048, 128, quick=True),
    _delta(FORWARD, 2048, 64, dtype=torch.bfloat16),
    _delta(FORWARD, 2048, 128, dtype=torch.bfloat16, quick=True),
    _delta(FORWARD, 2048, 64, packed=(700, 1, 0, 300, 1047)),
    _delta(FORWARD, 1000, 60, V=100),
    _delta(BACKWARD, 2048, 64, quick=True),
    _delta(BACKWARD, 2048, 128, quick=True),
    _delta(BACKWARD, 2048, 128, dtype=torch.bfloat16),
    _delta(BACKWARD, 1000, 60, V=100),
    _delta(STEP, 1, 128, H=16, quick=True),
    *(
        _product(kind, 1024, D, n, quick=n == 2 and kind == BACKWARD)
        for kind in (FORWARD, BACKWARD)
        for D in (64, 128)
        for n in (2, 4)
    ),
    _product(BACKWARD, 1024, 64, 3),
    _product(BACKWARD, 1024, 128, 2, dtype=torch.bfloat16),
    _product(STEP, 1, 128, 2, H=16, quick=True),
    _conv(FORWARD, 1536, 1024, quick=True),
    _conv(FORWARD, 1536, 1024, dtype=torch.bfloat16),
    _conv(FORWARD, 1536, 1024, packed=(500, 1, 0, 523)),
    _conv(FORWARD, 1000, 1001),
    _conv(BACKWARD, 1536, 1024, quick=True),
    _conv(STEP, 1536, 1, quick=True),
    *(
        case
        for kind in (FORWARD, BACKWARD)
        for case in (
            _scan(kind, 1536, 1024, quick=True),
            _scan(kind, 1536, 1024, channels_last=True),
            _scan(kind, 1536, 1024, dtype=torch.bfloat16),
            _scan(kind, 1536, 16384),
        )
    ),
    _scan(STEP, 1536, 1, quick=True),
    _scan(STEP, 1536, 1, B=8),
    *(_sparse(FORWARD, 4096, zeros, quick=zeros == 80) for zeros in (60, 80, 90)),
    _sparse(FORWARD, 4096, 80, W=205),
    _sparse(FORWARD, 512, 80),
    _sparse(FORWARD, 4096, 80, D=128),
    _sparse(FORWARD, 4096, 80, dtype=torch.bfloat16),
    _sparse(BACKWARD, 2048, 80, quick=True),
    *(
        _decode(32768, zeros, dtype=dtype, quick=dtype == torch.bfloat16)
        for zeros in (None, 60, 80)
        for dtype in (torch.bfloat16, torch.float32)
    ),
)

_HALF = {"dtype": torch.bfloat16}
_ON_GPU = (
    *(
        _delta(kind, T, D, H=H, B=B, gated=gated, quick=gated, **_HALF)
        for B, T, H, D in ((1, 8192, 32, 128), (4, 2048, 16, 128), (8, 2048, 8, 64), (1, 32768, 16, 128))
        for kind in (FORWARD, BACKWARD)
        for gated in (True, False)
    ),
    _delta(FORWARD, 8192, 128, H=32, packed=(4096, 1, 0, 3000, 1095), **_HALF),
    _delta(BACKWARD, 8192, 128, H=32, packed=(4096, 1, 0, 3000, 1095), **_HALF),
    _delta(FORWARD, 8192, 256, H=8, **_HALF),
    _delta(BACKWARD, 8192, 256, H=8, **_HALF),
    _delta(FORWARD, 2048, 64, H=8, B=4),
    _delta(BACKWARD, 2048, 64, H=8, B=4),
    _delta(FORWARD, 1000, 60, V=100, **_HALF),
    _delta(STEP, 1, 128, H=32, B=64, quick=True, **_HALF),
    *(
        _product(kind, T, 128, n, H=16, B=B, quick=n == 2, **_HALF)
        for B, T in ((4, 2048), (1, 8192))
        for kind in (FORWARD, BACKWARD)
        for n in (2, 3)
    ),
    _product(STEP, 1, 128, 2, H=32, B=64, quick=True, **_HALF),
    _conv(FORWARD, 4096, 8192, quick=True, **_HALF),
    _conv(FORWARD, 4096, 8192, channels_last=True, quick=True, **_HALF),
    _conv(FORWARD, 4096, 8192),
    _conv(BACKWARD, 4096, 8192, quick=True, **_HALF),
    _conv(BACKWARD, 4096, 8192, channels_last=True, quick=True, **_HALF),
    _conv(STEP, 4096, 1, B=64, quick=True, **_HALF),
    *(
        _scan(kind, Di, L, B=B, channels_last=last, quick=not last, **_HALF)
        for B, Di, L in ((8, 4096, 2048), (1, 2048, 32768))
        for kind in (FORWARD, BACKWARD)
        for last in (False, True)
    ),
    _scan(STEP, 4096, 1, B=64, quick=True, **_HALF),
    *(_sparse(FORWARD, T, 60, W=T // 20, H=32, D=128, quick=True, **_HALF) for T in (4096, 32768)),
    _sparse(BACKWARD, 4096, 60, W=205, H=32, D=128, quick=True, **_HALF),
    *(_decode(131072, zeros, quick=True, **_HALF) for zeros in (None, 60, 80)),
    *(_decode(131072, zeros) for zeros in (None, 60)),
)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def cases() -> tuple[Case, ...]:
    """The cases that are timed on this machine: on its GPU, if it has one."""
    return _ON_GPU if device() == "cuda" else _ON_CPU


# Inputs, and how much work a pass is.


def inputs(case: Case, length: int | None = None) -> Tensors:
    """Random inputs of a case; `length` cuts the time axis, for the check against the reference."""
    torch.manual_seed(0)
    s = case.sizes
    rand = functools.partial(torch.randn, dtype=case.dtype)
    packed = case.packed if length is None else tuple(min(p, length // len(case.packed)) for p in case.packed)
    T = sum(packed) if packed else min(s.get("T", s.get("L")), length or 1 << 30)
    if case.delta:
        lead = (s["B"],) if case.kind == STEP else (s["B"], T)
        micro = lead
        if case.op == "delta_product":
            micro = (s["B"], s["n"]) if case.kind == STEP else (s["B"], T * s["n"])
        x = {"q": rand(*lead, s["H"], s["K"]), "k": rand(*micro, s["H"], s["K"]), "v": rand(*micro, s["H"], s["V"])}
        x["beta"] = torch.rand(*micro, s["H"])
        if case.gated:
            x["g"] = F.logsigmoid(torch.randn(*lead, s["H"]) + 2)
        state = (s["B"], s["H"], s["K"], s["V"])
    elif case.op == "selective_scan":
        x = bench_scan.inputs(s, case.dtype, None if case.kind == STEP else T, case.channels_last)
        state = bench_scan.state_shape(s)
    elif case.op == "temporal_sparse_attention":
        x = bench_sparse.inputs(s, case.dtype, T)
    elif case.kind == DECODE:
        x = bench_decode.inputs(s, case.dtype, T)
    else:
        x = {"x": rand(s["B"], s["D"]) if case.kind == STEP else rand(s["B"], s["D"], T)}
        x |= {"weight": torch.randn(s["D"], s["W"]) / 2, "bias": torch.randn(s["D"])}
        state = (s["B"], s["D"], s["W"] - 1)
    if case.kind == STEP:
        x["state"] = torch.randn(state)
    if case.channels_last and case.op == "causal_conv1d":
        x["x"] = x["x"].transpose(1, 2).contiguous().transpose(1, 2)
    x = {n: t.to(device()) for n, t in x.items()}
    if case.kind == BACKWARD:
        x = {n: t.requires_grad_() for n, t in x.items()}
        x["do"] = rand(s["B"], T, s["H"], s["V"]).to(device()) if case.delta else torch.randn_like(_first(x))
    if packed:
        x["cu_seqlens"] = torch.tensor([0, *packed], device=device()).cumsum(0)
    return x


def _first(x: Tensors) -> torch.Tensor:
    """The tensor that the output has the shape of, where it is one of the inputs."""
    return next(iter(x.values()))


def exponentials(case: Case) -> float:
    """How many exponentials a pass needs where they are its floor, in the scan; elsewhere 0."""
    return bench_scan.exponentials(case.sizes, case.kind == BACKWARD) if case.op == "selective_scan" else 0.0


def work(case: Case) -> tuple[float, float]:
    """(floating-point operations, bytes) of a pass.

    The delta rule's operations are those of the chunked form with the smallest useful chunk of 16 rows, backward
    twice the forward: what a kernel recomputes, or does more in larger chunks, earns no credit. DeltaProduct has n rows
    of keys and values a token, and one of queries. Bytes are each input and output once. The scan's: bench_scan.py.
    """
    if case.op == "temporal_sparse_attention":
        return bench_sparse.work(case.sizes, case.dtype.itemsize, case.kind == BACKWARD)
    if case.kind == DECODE:
        return bench_decode.work(case.sizes, case.dtype.itemsize)
    if case.op == "selective_scan":
        return bench_scan.work(case.sizes, case.dtype.itemsize, case.kind == STEP, case.kind == BACKWARD)
    s, size = case.sizes, case.dtype.itemsize
    passes = 3 if case.kind == BACKWARD else 1
    if case.delta:
        rows, n = s["B"] * s["T"] * s["H"], s.get("n", 1)
        chunk = 16 if case.kind != STEP else 0
        flops = rows * ((4 * n + 2) * s["K"] * s["V"] + (n + 1) * chunk * (s["K"] + s["V"]))
        moved = rows * ((n + 1) * (s["K"] + s["V"]) * size + 4 * (n + 1))
        if case.kind == STEP:
            moved += 2 * 4 * s["B"] * s["H"] * s["K"] * s["V"]
    else:
        rows = s["B"] * s["D"] * s["L"]
        flops, moved = rows * 2 * s["W"], rows * 2 * size
        if case.kind == STEP:
            moved += 2 * 4 * s["B"] * s["D"] * (s["W"] - 1)
    return passes * flops, passes * moved


# How a pass is run.


def _pass(case: Case, function: Callable[..., torch.Tensor]) -> Callable[[Tensors], object]:
    """The case's pass around `function(**tensors) -> output`."""
    if case.kind == BACKWARD:

        def run(x: Tensors):
            leaves = {n: t for n, t in x.items() if n != "do"}
            o = function(**leaves)
            grads = torch.autograd.grad(o, [t for t in leaves.values() if t.requires_grad], x["do"])
            return o, *grads

        return run
    return torch.no_grad()(lambda x: function(**x))


def _call(case: Case, backend: str) -> Callable[..., torch.Tensor]:
    """The op as a function of its tensors by name, which returns its output."""
    if case.kind == DECODE:
        return bench_decode.ours(case.op, backend)
    op = getattr(fla_ops, f"{case.op}_step" if case.kind == STEP else case.op)

    def call(**x: torch.Tensor) -> torch.Tensor:
        result = op(**x, **case.options, backend=backend)
        return result if case.kind == STEP else result[0]

    return call


def _ours(case: Case, reference: bool) -> list[Variant]:
    letters = {"causal_conv1d": "W", "selective_scan": "N"}.get(case.op, "KV" if case.delta else "D")
    sizes = tuple(case.sizes[letter] for letter in letters)

    found = []
    for backend in ("triton", "native"):
        if backend == "triton" and device() == "cpu":  # the interpreter is for tests
            continue
        if why_not(case.op, backend, device(), case.dtype, sizes) is not None:
            continue
        if device() == "cuda":
            found.append(Variant(f"fla_ops {backend}", _pass(case, _call(case, backend)), ours=True))
        else:
            found += [
                Variant(f"fla_ops native {level}", _pass(case, _call(case, backend)), ours=True, level=level)
                for level in reversed(levels.available())
            ]
    # Its step loop would take the whole day on a GPU, and on a CPU for the gradients of a long scan; attention's T x T
    # matrices would take the memory.
    slow = device() == "cuda" or case.kind == BACKWARD and case.sizes.get("L", 0) > 4096 or "D" in letters
    if not found or (reference and not slow):
        found.append(Variant("fla_ops reference", _pass(case, _call(case, "reference")), ours=True))
    return found


def transformers_delta_rule() -> tuple[Callable, Callable] | str:
    """transformers' (chunked, recurrent) gated delta rule in plain torch, or the reason why there is none.

    Where fla is importable transformers swaps in its GPU kernels, which fail on CPU tensors; `__wrapped__` is torch.
    """
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    try:
        module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    except ImportError as error:  # too old, or broken by another package: said in the table
        return f"transformers does not import ({str(error).splitlines()[0]})"
    both = module.torch_chunk_gated_delta_rule, module.torch_recurrent_gated_delta_rule
    return tuple(getattr(f, "__wrapped__", f) for f in both)


def _theirs_delta_rule(case: Case, compiled: bool) -> list[Variant]:
    found = transformers_delta_rule()
    if isinstance(found, str) or case.packed:  # the torch path has no packed form
        return [] if compiled else _gpu_delta_rule(case)
    chunked, recurrent = found
    options = {"use_qk_l2norm_in_kernel": True}

    def full(function: Callable, q, k, v, beta, g=None):
        g = torch.zeros_like(beta) if g is None else g
        return function(q, k, v, g=g, beta=beta, **options)[0]

    def step(function: Callable, q, k, v, beta, g, state):
        tokens = [t[:, None] for t in (q, k, v)]
        o, new = function(
            *tokens, g=g[:, None], beta=beta[:, None], initial_state=state, output_final_state=True, **options
        )
        return o[:, 0]

    around = step if case.kind == STEP else full
    named = [("transformers recurrent", recurrent)]
    if case.kind != STEP:
        named = [("transformers chunk", chunked)] + named * (case.kind == FORWARD and device() == "cpu")
    if compiled:
        named = [(f"{named[0][0]} compiled", torch.compile(named[0][1]))]
    gpu = [] if compiled else _gpu_delta_rule(case)
    return gpu + [Variant(name, _pass(case, functools.partial(around, f))) for name, f in named]


def _gpu_delta_rule(case: Case) -> list[Variant]:
    """fla-core's and flash-qla's kernels, where a GPU and the packages are."""
    if device() != "cuda" or case.kind == STEP:
        return []
    options = {"use_qk_l2norm_in_kernel": True}

    def gated(function: Callable, q, k, v, beta, g, cu_seqlens=None):
        return function(q, k, v, g, beta, cu_seqlens=cu_seqlens, **options)[0]

    def plain(function: Callable, q, k, v, beta, cu_seqlens=None):
        return function(q, k, v, beta.to(q.dtype), cu_seqlens=cu_seqlens, **options)[0]

    found = []
    if importlib.util.find_spec("fla") and case.dtype != torch.float32:
        stem, around = ("gated_delta_rule", gated) if case.gated else ("delta_rule", plain)
        function = getattr(importlib.import_module(f"fla.ops.{stem}"), f"chunk_{stem}")
        name = f"fla{_without_flas_guard()}" if case.gated and case.kind == BACKWARD else "fla"
        found.append(Variant(name, _pass(case, functools.partial(around, function))))
    flash_qla_takes = case.gated and case.dtype != torch.float32 and case.sizes["K"] == case.sizes["V"] == 128
    if importlib.util.find_spec("flash_qla") and flash_qla_takes:
        function = importlib.import_module("flash_qla").chunk_gated_delta_rule
        found.append(Variant("flash_qla", _pass(case, functools.partial(gated, function))))
    return found


def _without_flas_guard() -> str:
    """fla refuses its gated backward on Hopper with Triton 3.4 to 3.7.0 (its issue 640): let it run, and say so."""
    module = importlib.import_module("fla.ops.common.chunk_o")
    guarded = module.IS_NVIDIA_HOPPER and module.TRITON_ABOVE_3_4_0 and not module.TRITON_ABOVE_3_7_1
    if not guarded and not getattr(module, "_guard_is_off", False):
        return ""
    module.TRITON_ABOVE_3_7_1 = module._guard_is_off = True
    return " (its guard off: its gradient may be wrong)"


def _theirs_delta_product(case: Case, compiled: bool) -> list[Variant]:
    """A delta rule on T * n tokens, which is what there is without a kernel for n steps a token: queries of zero at all
    but each token's last row, gates of zero at all but its first. Our own delta rule, and transformers'."""
    if case.kind == STEP:
        return [] if compiled else [Variant("fla_ops delta_rule, n steps", torch.no_grad()(_steps_one_by_one))]
    found = transformers_delta_rule()

    def ours(q, k, v, beta, g):
        return fla_ops.delta_rule(q, k, v, beta, g, qk_l2norm=True)[0]

    def theirs(function: Callable, q, k, v, beta, g):
        return function(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]

    named = {} if compiled else {"fla_ops delta_rule interleaved": ours}
    if not isinstance(found, str):
        chunked = torch.compile(found[0]) if compiled else found[0]
        suffix = " compiled" if compiled else ""
        named[f"transformers chunk interleaved{suffix}"] = functools.partial(theirs, chunked)
    gpu = [] if compiled else _gpu_delta_product(case)
    return gpu + [Variant(name, _interleaved(case, function)) for name, function in named.items()]


def _gpu_delta_product(case: Case) -> list[Variant]:
    """fla-core's kernel, where a GPU and the package are; its backward is refused as the gated delta rule's is."""
    if device() != "cuda" or not importlib.util.find_spec("fla") or case.dtype == torch.float32:
        return []
    function = importlib.import_module("fla.ops.gated_delta_product").chunk_gated_delta_product
    n = case.sizes["n"]

    def call(q, k, v, beta, g):
        return function(q, k, v, g, beta.to(q.dtype), num_householder=n, use_qk_l2norm_in_kernel=True)[0]

    name = f"fla{_without_flas_guard()}" if case.kind == BACKWARD else "fla"
    return [Variant(name, _pass(case, call))]


def _interleaved(case: Case, function: Callable[..., torch.Tensor]) -> Callable[[Tensors], object]:
    """The case's pass around `function` on interleaved inputs: made once, ahead of the calls that are timed."""
    n, run = case.sizes["n"], _pass(case, function)
    at = {"q": n - 1, "g": 0, "do": n - 1}  # the row of a token that holds it
    made: list = [None, None]

    def wide(name: str, t: torch.Tensor) -> torch.Tensor:
        t = t.detach()
        if name in at:
            spread = t.new_zeros(*t.shape[:2], n, *t.shape[2:])
            spread[:, :, at[name]] = t
            t = spread.flatten(1, 2)
        return t.requires_grad_(case.kind == BACKWARD and name != "do")

    def call(x: Tensors):
        if made[0] is not x["q"]:
            made[:] = x["q"], {name: wide(name, t) for name, t in x.items()}
        results = run(made[1])
        if case.kind != BACKWARD:
            return results[:, n - 1 :: n]
        names = ("do", *(name for name in x if name != "do"))  # the output is read where its gradient is
        return tuple(t[:, at[name] :: n] if name in at else t for name, t in zip(names, results, strict=True))

    return call


def _steps_one_by_one(x: Tensors) -> torch.Tensor:
    n, none = x["k"].shape[1], torch.zeros_like(x["g"])
    for j in range(n):
        o = fla_ops.delta_rule_step(
            x["q"],
            *(x[name][:, j] for name in ("k", "v", "beta")),
            none if j else x["g"],
            state=x["state"],
            qk_l2norm=True,
        )
    return o


def _theirs_conv(case: Case, compiled: bool) -> list[Variant]:
    if case.packed:
        return []

    def full(x, weight, bias):
        weight, bias, width = weight.to(x.dtype), bias.to(x.dtype), weight.shape[1]
        return F.silu(F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=x.shape[1])[..., : x.shape[2]])

    def step(x, weight, bias, state):
        window = torch.cat([state, x[..., None]], -1)
        state.copy_(window[..., 1:])
        return F.silu((window * weight).sum(-1) + bias).to(x.dtype)

    function = step if case.kind == STEP else full
    if compiled:
        return [Variant("F.conv1d+SiLU compiled", _pass(case, torch.compile(function)))]
    name = "torch cat+sum+SiLU" if case.kind == STEP else "F.conv1d+SiLU"
    return [*_gpu_conv(case), Variant(name, _pass(case, function))]


def _gpu_conv(case: Case) -> list[Variant]:
    """fla-core's and causal-conv1d's kernels, where a GPU and the packages are."""
    if device() != "cuda" or case.kind == STEP:
        return []

    def fla(function: Callable, x, weight, bias):
        return function(x.transpose(1, 2), weight, bias, activation="silu")[0].transpose(1, 2)

    def dao(function: Callable, x, weight, bias):
        return function(x, weight, bias, activation="silu")

    found = []
    for package, module, name, around in (
        ("fla", "fla.modules.causal_conv1d", "causal_conv1d", fla),
        ("causal_conv1d", "causal_conv1d", "causal_conv1d_fn", dao),
    ):
        if importlib.util.find_spec(package):
            function = getattr(importlib.import_module(module), name)
            found.append(Variant(package, _pass(case, functools.partial(around, function))))
    return found


def _theirs_scan(case: Case, compiled: bool) -> list[Variant]:
    step, backward = case.kind == STEP, case.kind == BACKWARD
    found = bench_scan.baselines(case.sizes, step, backward, device(), compiled)
    return [Variant(name, _pass(case, function)) for name, function in found.items()]


def _exact_attention(case: Case, compiled: bool) -> list[Variant]:
    found = {} if compiled else bench_sparse.baselines()
    return [Variant(name, _pass(case, function)) for name, function in found.items()]


def _dense_decoding(case: Case, compiled: bool) -> list[Variant]:
    found = {} if compiled else bench_decode.baselines(case.op)
    probes = (
        [] if compiled else [Variant("a read of dense keys and values", _pass(case, bench_decode.read), probe=True)]
    )
    return [Variant(name, _pass(case, function)) for name, function in found.items()] + probes


def remarks(case: Case) -> dict[str, float]:
    """What times do not tell of a case, by the name of a column."""
    if case.op != "delta_kv_cache":
        return {}
    return bench_decode.remarks(case.sizes, case.dtype, device())


_THEIRS = {
    "delta_product": _theirs_delta_product,
    "delta_rule": _theirs_delta_rule,
    "causal_conv1d": _theirs_conv,
    "selective_scan": _theirs_scan,
    "temporal_sparse_attention": _exact_attention,
    "decode_attention": _dense_decoding,
    "delta_kv_cache": _dense_decoding,
}


def missing_baselines(family: str | None) -> list[str]:
    """Why baselines of `family`, or of any, that a `pip install` brings are not there."""
    delta = transformers_delta_rule() if family in (None, "delta_rule", "delta_product") else None
    scan = bench_scan.missing() if family in (None, "selective_scan") else []
    return list(dict.fromkeys([delta] * isinstance(delta, str) + scan))


def variants(case: Case, *, reference: bool = False, compiled: bool = False) -> list[Variant]:
    """Ours at every level of this machine, and every baseline that is installed.

    `reference` adds our reference, which is also there when nothing else of ours runs. `compiled` adds the baseline
    under torch.compile, which needs a C++ compiler and takes minutes for some shapes.
    """
    theirs = _THEIRS[case.op]
    return _ours(case, reference) + theirs(case, False) + (theirs(case, True) if compiled else [])
