# SPDX-License-Identifier: Apache-2.0
"""Inputs of the selective scan's tests, and the one comparison of a backend with the reference."""

import contextlib
from functools import partial

import torch
from delta_rule_cases import SEED, leaves, on, one_thread, remembered

import fla_ops
from fla_ops.reference.selective_scan import selective_scan as reference
from fla_ops.testing import assert_matches_reference

# In the order of a backend's gradients.
TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
LAYOUTS = {
    "channel-first": lambda x: x,
    "channel-last": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "slice of wider rows": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "every second": lambda x: torch.stack([x, x], -1)[..., 0],
}


def random_inputs(
    batch=2,
    Di=24,
    L=70,
    N=16,
    G=1,
    *,
    dtype=torch.float32,
    constant="",
    skip=True,
    gate=True,
    bias=True,
    delta="normal",
    decay="normal",
    state=None,
    side=None,
    sequences=None,
    seed=SEED,
) -> dict[str, torch.Tensor | None]:
    """The nine tensors by name.

    G: groups of B and C; 0 leaves the dimension out. constant: which of "B", "C", "BC" have no time axis. skip, gate,
    bias: whether D, z, delta_bias are given. delta: "normal" (right for softplus), "positive", or one number. decay:
    "normal" (A = -1..-N as Mamba starts), or one number for all of A. state: dtype of an initial state, or None. side:
    dtype of A, D, delta_bias and constants, float32 by default (float64 for float64). sequences: how many packed
    sequences the state is for.
    """
    r = torch.Generator().manual_seed(seed)
    side = side or torch.promote_types(dtype, torch.float32)

    def randn(*shape):
        return torch.randn(*shape, generator=r, dtype=torch.float64)

    def projection(name):
        if name in constant:
            return randn(Di, N).to(side)
        return randn(*((batch, G, N, L) if G else (batch, N, L))).to(dtype)

    step, shift = randn(batch, Di, L), randn(Di) - 2
    if delta == "positive":
        step, shift = step.abs(), shift.abs() / 10
    elif delta != "normal":
        step = torch.full_like(step, float(delta))
    if decay == "normal":
        A = -torch.arange(1, N + 1).double().expand(Di, N) * (1 + 0.1 * randn(Di, N))
    else:
        A = torch.full((Di, N), float(decay))
    count = batch if sequences is None else sequences
    return {
        "u": randn(batch, Di, L).to(dtype),
        "delta": step.to(dtype),
        "A": A.to(side),
        "B": projection("B"),
        "C": projection("C"),
        "D": randn(Di).to(side) if skip else None,
        "z": randn(batch, Di, L).to(dtype) if gate else None,
        "delta_bias": shift.to(side) if bias else None,
        "initial_state": randn(count, Di, N).to(state) if state else None,
    }


def random_cotangents(inputs, sequences=None, seed=SEED + 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of y and of the final state for `inputs`, in the dtypes that those results have."""
    r = torch.Generator().manual_seed(seed)
    u, A = inputs["u"], inputs["A"]
    dy = torch.randn(u.shape, generator=r, dtype=torch.float64)
    count = u.shape[0] if sequences is None else sequences
    ds = torch.randn(count, *A.shape, generator=r, dtype=torch.float64)
    return dy.to(u.dtype), ds.to(torch.promote_types(u.dtype, torch.float32))


def call(op, inputs, **options):
    """`op` with the tensors by name."""
    named = {name: inputs[name] for name in ("z", "delta_bias", "initial_state")}
    return op(*(inputs[name] for name in TENSORS[:6]), **named, **options)


def results(op, inputs, dy, ds, *, dtype=None, wanted=TENSORS, **options) -> dict[str, torch.Tensor]:
    """y, the final state and the gradients d<name> of every wanted tensor (zeros where nothing depends on it)."""
    x = leaves(inputs, dtype, wanted)
    y, final = call(op, x, output_final_state=True, **options)
    ends = [(end, d.to(end.dtype)) for end, d in ((y, dy), (final, ds)) if end.requires_grad]
    if ends:
        torch.autograd.backward(*zip(*ends, strict=True))
    found = {"y": y.detach(), "final_state": final.detach()}
    for name in wanted:
        if x[name] is not None:
            grad = x[name].grad
            found[f"d{name}"] = torch.zeros_like(x[name]) if grad is None else grad
    return found


def references(inputs, dy, ds, **options):
    """(ref64, ref_low) of `assert_matches_reference` for every result; not to be written to."""

    def compute():
        dtype = inputs["u"].dtype
        low = dtype if dtype != torch.float64 else None
        with one_thread():
            ref64 = results(reference, inputs, dy, ds, dtype=torch.float64, **options)
            return ref64, results(partial(reference, operand_dtype=low), inputs, dy, ds, **options)

    return remembered(compute, reference, inputs, dy, ds, options)


def check(backend, inputs, *, names=None, device="cpu", **options) -> None:
    """Outputs, final state and all gradients of `backend` on `device` against the float64 reference."""
    cu = options.get("cu_seqlens")
    dy, ds = random_cotangents(inputs, None if cu is None else cu.shape[0] - 1)
    op = partial(fla_ops.selective_scan, backend=backend)
    there = options if cu is None else options | {"cu_seqlens": cu.to(device)}
    with one_thread() if backend == "reference" else contextlib.nullcontext():
        actual = results(op, on(device, inputs), dy.to(device), ds.to(device), **there)
    ref64, ref_low = references(inputs, dy, ds, **options)
    for name in names or actual:
        found, low = actual[name], ref_low[name]
        if found.dtype == torch.float64 != inputs["u"].dtype:  # a float64 state's gradient, computed in float32
            found, low = found.float(), low.float()
        assert_matches_reference(found, ref64[name], low, name, gradient=name.startswith("d"), seed=SEED)
