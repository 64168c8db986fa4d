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

Tensors = dict[str, torch.Tensor]
FORWARD, BACKWARD, STEP = "forward", "forward+backward", "step"


@dataclass(frozen=True)
class Variant:
    name: str
    call: Callable[[Tensors], object]  # the whole pass on given inputs; returns its output
    ours: bool = False
    level: str | None = None  # of the native CPU kernels

    def context(self) -> contextlib.AbstractContextManager:
        return levels.use(self.level) if self.level else contextlib.nullcontext()


@dataclass(frozen=True, eq=False)
class Case:
    """One group of the table: an op, a pass and a shape. Sizes are those of the op's docstring."""

    op: str
    kind: str  # FORWARD, BACKWARD or STEP
    sizes: dict[str, int]
    dtype: torch.dtype = torch.float32
    packed: tuple[int, ...] = ()  # sequence lengths; empty: not packed
    quick: bool = False  # on the short list

    @property
    def label(self) -> str:
        sizes = ",".join(f"{k}{v}" for k, v in self.sizes.items())
        packed = f" packed x{len(self.packed)}" if self.packed else ""
        return f"{sizes}{packed} {str(self.dtype).removeprefix('torch.')}"

    @property
    def group(self) -> str:
        return f"{self.op} {self.kind} {self.label}"


def _delta(kind: str, T: int, D: int, H: int = 8, V: int | None = None, **options) -> Case:
    return Case("delta_rule", kind, {"B": 1, "T": T, "H": H, "K": D, "V": V or D}, **options)


def _conv(kind: str, D: int, L: int, **options) -> Case:
    return Case("causal_conv1d", kind, {"B": 1, "D": D, "L": L, "W": 4}, **options)


CASES = (
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
    _conv(FORWARD, 1536, 1024, quick=True),
    _conv(FORWARD, 1536, 1024, dtype=torch.bfloat16),
    _conv(FORWARD, 1536, 1024, packed=(500, 1, 0, 523)),
    _conv(FORWARD, 1000, 1001),
    _conv(BACKWARD, 1536, 1024, quick=True),
    _conv(STEP, 1536, 1, quick=True),
)


# Inputs, and how much work a pass is.


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def inputs(case: Case, length: int | None = None) -> Tensors:
    """Random inputs of a case; `length` cuts the time axis, for the check against the reference."""
    torch.manual_seed(0)
    s = case.sizes
    rand = functools.partial(torch.randn, dtype=case.dtype)
    packed = case.packed if length is None else tuple(min(p, length // len(case.packed)) for p in case.packed)
    T = sum(packed) if packed else min(s.get("T", s.get("L")), length or 1 << 30)
    if case.op == "delta_rule":
        lead = (s["B"],) if case.kind == STEP else (s["B"], T)
        x = {n: rand(*lead, s["H"], s[d]) for n, d in (("q", "K"), ("k", "K"), ("v", "V"))}
        x["beta"] = torch.rand(*lead, s["H"])
        x["g"] = F.logsigmoid(torch.randn(*lead, s["H"]) + 2)
        state = (s["B"], s["H"], s["K"], s["V"])
    else:
        x = {"x": rand(s["B"], s["D"]) if case.kind == STEP else rand(s["B"], s["D"], T)}
        x |= {"weight": torch.randn(s["D"], s["W"]) / 2, "bias": torch.randn(s["D"])}
        state = (s["B"], s["D"], s["W"] - 1)
    if case.kind == STEP:
        x["state"] = torch.randn(state)
    x = {n: t.to(device()) for n, t in x.items()}
    if case.kind == BACKWARD:
        x = {n: t.requires_grad_() for n, t in x.items()}
        x["do"] = torch.randn_like(x["v"] if case.op == "delta_rule" else x["x"])
    if packed:
        x["cu_seqlens"] = torch.tensor([0, *packed], device=device()).cumsum(0)
    return x


def work(case: Case) -> tuple[float, float]:
    """(floating-point operations, bytes) of a pass.

    The delta rule's operations are those of the chunked form with the smallest useful chunk of 16 tokens, backward
    twice the forward: what a kernel recomputes, or does more in larger chunks, earns no credit. Bytes are each input
    and output once.
    """
    s, size = case.sizes, case.dtype.itemsize
    passes = 3 if case.kind == BACKWARD else 1
    if case.op == "delta_rule":
        rows = s["B"] * s["T"] * s["H"]
        chunk = 16 if case.kind != STEP else 0
        flops = rows * (6 * s["K"] * s["V"] + 2 * chunk * (s["K"] + s["V"]))
        moved = rows * ((2 * s["K"] + 2 * s["V"]) * size + 8)
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


def _ours(case: Case, reference: bool) -> list[Variant]:
    op = getattr(fla_ops, f"{case.op}_step" if case.kind == STEP else case.op)
    options = {"qk_l2norm": True} if case.op == "delta_rule" else {"activation": "silu"}

    def call(backend: str, **x: torch.Tensor) -> torch.Tensor:
        result = op(**x, **options, backend=backend)
        return result if case.kind == STEP else result[0]

    found = []
    if why_not(case.op, "native", device(), case.dtype, ()) is None:
        run = _pass(case, functools.partial(call, "native"))
        for level in reversed(levels.available()):
            found.append(Variant(f"fla_ops native {level}", run, ours=True, level=level))
    if reference or not found:
        found.append(Variant("fla_ops reference", _pass(case, functools.partial(call, "reference")), ours=True))
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
        return []
    chunked, recurrent = found
    options = {"use_qk_l2norm_in_kernel": True}

    def full(function: Callable, q, k, v, beta, g):
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
        named = [("transformers chunk", chunked)] + named * (case.kind == FORWARD)
    if compiled:
        named = [(f"{named[0][0]} compiled", torch.compile(named[0][1]))]
    return [Variant(name, _pass(case, functools.partial(around, f))) for name, f in named] + _gpu_delta_rule(case)


def _gpu_delta_rule(case: Case) -> list[Variant]:
    """fla-core's and flash-qla's kernels, where a GPU and the packages are."""
    if device() != "cuda" or case.kind == STEP:
        return []
    takes = {"fla": True, "flash_qla": case.dtype != torch.float32 and case.sizes["K"] == case.sizes["V"] == 128}
    modules = {"fla": "fla.ops.gated_delta_rule", "flash_qla": "flash_qla"}

    def call(function: Callable, q, k, v, beta, g, cu_seqlens=None):
        return function(q, k, v, g, beta, use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens)[0]

    found = []
    for name, module in modules.items():
        if takes[name] and importlib.util.find_spec(name):
            function = importlib.import_module(module).chunk_gated_delta_rule
            found.append(Variant(name, _pass(case, functools.partial(call, function))))
    return found


def _theirs_conv(case: Case, compiled: bool) -> list[Variant]:
    if case.packed:
        return []

    def full(x, weight, bias):
        weight, bias, width = weight.to(x.dtype), bias.to(x.dtype), weight.shape[1]
        return F.silu(F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=x.shape[1])[..., : x.shape[2]])

    def step(x, weight, bias, state):
        window = torch.cat([state, x[..., None]], -1)
        state.copy_(window[..., 1:])
        return F.silu((window * weight).sum(-1) + bias)

    function = step if case.kind == STEP else full
    if compiled:
        return [Variant("F.conv1d+SiLU compiled", _pass(case, torch.compile(function)))]
    return [Variant("torch cat+sum+SiLU" if case.kind == STEP else "F.conv1d+SiLU", _pass(case, function))]


_THEIRS = {"delta_rule": _theirs_delta_rule, "causal_conv1d": _theirs_conv}


def variants(case: Case, *, reference: bool = False, compiled: bool = False) -> list[Variant]:
    """Ours at every level of this machine, and every baseline that is installed.

    `reference` adds our reference, which is also there when nothing else of ours runs. `compiled` adds the baseline
    under torch.compile, which needs a C++ compiler and takes minutes for some shapes.
    """
    theirs = _THEIRS[case.op]
    return _ours(case, reference) + theirs(case, False) + (theirs(case, True) if compiled else [])
