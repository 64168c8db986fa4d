# SPDX-License-Identifier: Apache-2.0
"""Inputs of temporal-sparse attention's tests, and the one comparison of a backend with the reference."""

import contextlib
from functools import partial

import torch
from delta_rule_cases import SEED, leaves, on, one_thread, remembered

import fla_ops
from fla_ops.reference.temporal_sparse_attention import temporal_sparse_attention as reference
from fla_ops.testing import assert_matches_reference

TENSORS = ("q", "k", "v")


def random_inputs(
    B=1, T=150, HQ=2, HK=2, D=16, DV=16, *, Tq=None, dtype=torch.float32, keep=0.97, seed=SEED
) -> dict[str, torch.Tensor]:
    """q, k and v. Keys of unit variance move slowly: each keeps `keep` of the one before it."""
    r = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=r, dtype=torch.float64)

    q, k, v = randn(B, T if Tq is None else Tq, HQ, D), randn(B, T, HK, D), randn(B, T, HK, DV)
    for t in range(1, T):
        k[:, t] = keep * k[:, t - 1] + (1 - keep**2) ** 0.5 * k[:, t]
    return {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}


def random_cotangent(inputs, seed=SEED + 1) -> torch.Tensor:
    r = torch.Generator().manual_seed(seed)
    q, v = inputs["q"], inputs["v"]
    return torch.randn(*q.shape[:3], v.shape[3], generator=r, dtype=torch.float64).to(q.dtype)


def thresholds(inputs, threshold) -> torch.Tensor:
    """A number, or what broadcasts, as the reference takes it: `[HK, D]`, rounded to float32."""
    HK, D = inputs["k"].shape[2:]
    return torch.zeros(HK, D) + torch.as_tensor(threshold, dtype=torch.float32)


def results(op, inputs, do, *, dtype=None, wanted=TENSORS, **options) -> dict[str, torch.Tensor]:
    """o and the gradients d<name> of every wanted tensor."""
    x = leaves(inputs, dtype, wanted)
    o = op(**x, **options)[0]
    o.backward(do.to(o.dtype))
    return {"o": o.detach()} | {f"d{name}": x[name].grad for name in wanted}


def references(inputs, do, **options):
    """(ref64, ref_low) of `assert_matches_reference` for every result; not to be written to."""

    def compute():
        dtype = inputs["q"].dtype
        low = dtype if dtype != torch.float64 else None
        with one_thread():
            ref64 = results(reference, inputs, do, dtype=torch.float64, **options)
            return ref64, results(partial(reference, operand_dtype=low), inputs, do, **options)

    return remembered(compute, reference, inputs, do, do, options)


def check(backend, inputs, *, threshold, window, device="cpu", **options) -> None:
    """The output and all gradients of `backend` on `device` against the float64 reference."""
    do = random_cotangent(inputs)
    options |= {"threshold": thresholds(inputs, threshold), "window": window}
    op = partial(fla_ops.temporal_sparse_attention, backend=backend)
    with one_thread() if backend == "reference" else contextlib.nullcontext():
        there = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
        actual = results(op, on(device, inputs), do.to(device), **there)
    ref64, ref_low = references(inputs, do, **options)
    for name, found in actual.items():
        gradient = name.startswith("d")
        assert_matches_reference(found, ref64[name], ref_low[name], name, gradient=gradient, seed=SEED)
