# SPDX-License-Identifier: Apache-2.0
"""`fla-ops selftest`: every op on every backend that runs here, against the float64 reference, in under a minute.

Small inputs with odd sizes, a head group, an initial state, and gradients of everything through both results. The
tolerance is that of the test suite, `fla_ops.testing.assert_matches_reference`.
"""

import argparse
import contextlib
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import fla_ops
from fla_ops._backend import NAMES, OPS, why_not
from fla_ops._native import levels
from fla_ops.testing import assert_matches_reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    inputs: Tensors  # float64, with "initial_state" among them if there is a step
    main: tuple[str, ...]  # the inputs in the dtype under test; the others stay float32
    options: dict[str, object]
    # (token inputs, state, options, backend) -> the outputs of all steps; None: the op has no state.
    step: Callable[..., torch.Tensor] | None = None


def _delta_rule() -> Case:
    B, T, H, HV, K, V = 2, 70, 2, 4, 20, 36
    x = {"q": torch.randn(B, T, H, K), "k": torch.randn(B, T, H, K), "v": torch.randn(B, T, HV, V)}
    x |= {"beta": torch.rand(B, T, HV), "g": F.logsigmoid(torch.randn(B, T, HV) + 2)}
    x |= {"initial_state": torch.randn(B, HV, K, V)}

    def step(inputs: Tensors, state: torch.Tensor, options: dict, backend: str) -> torch.Tensor:
        tokens = [{n: t[:, i] for n, t in inputs.items()} for i in range(T)]
        return torch.stack([fla_ops.delta_rule_step(**x, state=state, backend=backend, **options) for x in tokens], 1)

    return Case(x, ("q", "k", "v"), {"qk_l2norm": True}, step)


def _delta_product() -> Case:
    B, T, n, H, HV, K, V = 2, 24, 3, 2, 4, 20, 36
    x = {"q": torch.randn(B, T, H, K), "k": torch.randn(B, T * n, H, K), "v": torch.randn(B, T * n, HV, V)}
    x |= {"beta": 2 * torch.rand(B, T * n, HV), "g": F.logsigmoid(torch.randn(B, T, HV) + 2)}
    x |= {"initial_state": torch.randn(B, HV, K, V)}

    def step(inputs: Tensors, state: torch.Tensor, options: dict, backend: str) -> torch.Tensor:
        def token(i: int) -> Tensors:
            return {name: t[:, i] if t.shape[1] == T else t[:, i * n : i * n + n] for name, t in inputs.items()}

        options = {name: value for name, value in options.items() if name != "num_householder"}
        return torch.stack(
            [fla_ops.delta_product_step(**token(i), state=state, backend=backend, **options) for i in range(T)], 1
        )

    return Case(x, ("q", "k", "v"), {"qk_l2norm": True, "num_householder": n}, step)


def _causal_conv1d() -> Case:
    B, D, L, W = 2, 37, 70, 4
    x = {"x": torch.randn(B, D, L), "weight": torch.randn(D, W), "bias": torch.randn(D)}
    x |= {"initial_state": torch.randn(B, D, W - 1)}

    def step(inputs: Tensors, state: torch.Tensor, options: dict, backend: str) -> torch.Tensor:
        x, rest = inputs["x"], {n: t for n, t in inputs.items() if n != "x"}
        return torch.stack(
            [fla_ops.causal_conv1d_step(x[..., i], **rest, state=state, backend=backend, **options) for i in range(L)],
            -1,
        )

    return Case(x, ("x",), {"activation": "silu"}, step)


def _selective_scan() -> Case:
    B, Di, L, N, G = 2, 36, 70, 12, 2
    x = {"u": torch.randn(B, Di, L), "delta": torch.randn(B, Di, L), "A": -torch.rand(Di, N) - 0.1}
    x |= {"B": torch.randn(B, G, N, L), "C": torch.randn(B, G, N, L), "D": torch.randn(Di), "z": torch.randn(B, Di, L)}
    x |= {"delta_bias": torch.randn(Di) - 1, "initial_state": torch.randn(B, Di, N)}
    main = ("u", "delta", "B", "C", "z")

    def step(inputs: Tensors, state: torch.Tensor, options: dict, backend: str) -> torch.Tensor:
        tokens = [{n: t[..., i] if n in main else t for n, t in inputs.items()} for i in range(L)]
        return torch.stack(
            [fla_ops.selective_scan_step(**x, state=state, backend=backend, **options) for x in tokens], -1
        )

    return Case(x, main, {"delta_softplus": True}, step)


def _temporal_sparse_attention() -> Case:
    B, T, Tq, HQ, HK, D, DV = 2, 130, 100, 4, 2, 20, 36
    keys = torch.randn(B, T, HK, D).cumsum(1) / 4
    x = {"q": torch.randn(B, Tq, HQ, D), "k": keys, "v": torch.randn(B, T, HK, DV)}
    threshold = torch.full((HK, D), 0.5)
    return Case(x, ("q", "k", "v"), {"threshold": threshold, "window": 20, "sink": 3})


CASES = {
    "causal_conv1d": _causal_conv1d,
    "delta_product": _delta_product,
    "delta_rule": _delta_rule,
    "selective_scan": _selective_scan,
    "temporal_sparse_attention": _temporal_sparse_attention,
}


def _cast(case: Case, dtype: torch.dtype, device: str) -> Tensors:
    side = torch.promote_types(dtype, torch.float32)
    return {n: t.to(device, dtype if n in case.main else side) for n, t in case.inputs.items()}


def _run(function: Callable, inputs: Tensors, options: dict) -> Tensors:
    """The output, the final state if the op has one, and the gradient of every input through both."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    if "initial_state" in leaves:
        results = dict(
            zip(("output", "final_state"), function(**leaves, output_final_state=True, **options), strict=True)
        )
    else:
        results = {"output": function(**leaves, **options)[0]}
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in results.values()]
    grads = torch.autograd.grad(tuple(results.values()), list(leaves.values()), weights)
    return results | {f"d{n}": d for n, d in zip(leaves, grads, strict=True)}


def _check(op: str, case: Case, backend: str, dtype: torch.dtype, device: str) -> None:
    reference = getattr(importlib.import_module(f"fla_ops.reference.{op}"), op)
    rounded = _cast(case, dtype, device)
    ref64 = _run(reference, {n: t.double() for n, t in rounded.items()}, case.options)
    ref_low = _run(reference, rounded, case.options | {"operand_dtype": None if dtype == torch.float64 else dtype})
    actual = _run(getattr(fla_ops, op), rounded, case.options | {"backend": backend})
    for name, x in actual.items():
        gradient = name not in ("output", "final_state")
        assert_matches_reference(x, ref64[name], ref_low[name], f"{op} {name}", gradient=gradient, seed=0)
    if case.step is None:
        return
    state = rounded.pop("initial_state").clone()
    with torch.no_grad():
        steps = case.step(rounded, state, case.options, backend)
    assert_matches_reference(steps, ref64["output"], ref_low["output"], f"{op}_step", seed=0)
    low = ref_low["final_state"].to(state.dtype)
    assert_matches_reference(state, ref64["final_state"], low, f"{op}_step state", seed=0)


def _check_decode_attention(backend: str, dtype: torch.dtype, device: str) -> None:
    """An op for inference: an append of three tokens and a step, over rows of two lengths."""
    reference = importlib.import_module("fla_ops.reference.decode_attention").decode_attention
    q, k, v = (torch.randn(2, T, H, 36).to(device, dtype) for T, H in ((3, 6), (1100, 2), (1100, 2)))
    options = {"lengths": torch.tensor([1100, 70], device=device), "scale": 0.2}
    ref64 = reference(q.double(), k.double(), v.double(), **options)
    ref_low = reference(q, k, v, **options, operand_dtype=None if dtype == torch.float64 else dtype)
    o = fla_ops.exact_decode_attention(q, k, v, **options, backend=backend)
    assert_matches_reference(o, ref64, ref_low, "exact_decode_attention", seed=0)
    step = fla_ops.exact_decode_attention(q[:, -1], k, v, **options, backend=backend)
    assert_matches_reference(step, ref64[:, -1], ref_low[:, -1], "exact_decode_attention, one token", seed=0)


def _check_delta_kv_cache(backend: str, dtype: torch.dtype, device: str) -> None:
    """A prefill, an append of many tokens and one of one, against the definition for all tokens at once."""
    definition = importlib.import_module("fla_ops.reference.delta_kv_cache")
    q, k, v = (torch.randn(1, 300, H, 36).to(device, dtype) for H in (4, 2, 2))
    cache = fla_ops.DeltaKVCache(threshold=0.8, window=30, sink=2, backend=backend)
    outputs = []
    for part in (slice(0, 200), slice(200, 299), slice(299, 300)):
        cache.append(k[:, part], v[:, part])
        outputs.append(cache.attend(q[:, part], scale=0.2))
    positions = torch.arange(300, device=device)[None]
    options = {"window": 30, "sink": 2, "window_mode": "band", "scale": 0.2}
    x = (q, k, definition.hold(k, torch.tensor(0.8, device=device)), v)
    ref64 = definition.attention(*(t.double() for t in x), positions, **options)
    low = None if dtype == torch.float64 else dtype
    ref_low = definition.attention(*x, positions, **options, operand_dtype=low)
    assert_matches_reference(torch.cat(outputs, 1), ref64, ref_low, "DeltaKVCache", seed=0)


# What has no gradients.
INFERENCE = {"decode_attention": _check_decode_attention, "delta_kv_cache": _check_delta_kv_cache}


def _places(op: str) -> list[tuple[str, str, str | None]]:
    """(backend, device, CPU level to force) of everything that can run here."""
    places = []
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for backend in NAMES:
            if why_not(op, backend, device, torch.float32, ()) is None:
                native = backend == "native" and device == "cpu"
                places += [(backend, device, level) for level in (levels.available() if native else (None,))]
    return places


def run(args: argparse.Namespace) -> int:
    start, failed, total = time.perf_counter(), 0, 0
    for op in OPS:
        torch.manual_seed(0)
        case = CASES[op]() if op in CASES else None
        checked = "output"
        if case:
            checked += ", final state, gradients, step" if case.step else ", gradients"
        for backend, device, level in _places(op):
            where = f"{backend} ({level})" if level else f"{backend} ({device})"
            for dtype in DTYPES:
                began, total = time.perf_counter(), total + 1
                line = f"{op:<26} {where:<18} {str(dtype).removeprefix('torch.'):<9}"
                try:
                    with levels.use(level) if level else contextlib.nullcontext():
                        if case:
                            _check(op, case, backend, dtype, device)
                        else:
                            INFERENCE[op](backend, dtype, device)
                except Exception as error:  # any failure is this line's result; the other lines still run
                    failed += 1
                    print(f"FAIL {line} {type(error).__name__}: {error}", flush=True)
                else:
                    seconds = time.perf_counter() - began
                    print(f"ok   {line} {checked:<36}  {seconds:5.2f} s", flush=True)
    took = time.perf_counter() - start
    print(f"{total - failed} of {total} checks passed in {took:.0f} s.", file=sys.stderr if failed else sys.stdout)
    return 1 if failed else 0
