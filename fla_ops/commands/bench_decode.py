# SPDX-License-Identifier: Apache-2.0
"""Decoding's part of what is timed: one token attends to a long cache, kept dense or as DeltaLLM keeps it.

`sizes` are B, T, HQ, HK and D of `fla_ops.exact_decode_attention` (DV = D), and for `fla_ops.DeltaKVCache` the share of
zero deltas in percent, `zeros`. The cache lies in memory as models hold it, `[B, HK, T, D]`.
"""

import functools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import fla_ops
from fla_ops.reference import delta_kv_cache as definition
from fla_ops.reference.decode_attention import decode_attention as exact_reference

Sizes = dict[str, int]
Tensors = dict[str, torch.Tensor]
OPS = ("decode_attention", "delta_kv_cache")
OPTIONS = {"threshold": 1e-3, "window": 128, "sink": 4}  # of the sparse cache
APPENDED = 256  # tokens whose appends are timed, one after the other


def inputs(sizes: Sizes, dtype: torch.dtype, T: int) -> Tensors:
    """q is one token's. A channel of the keys keeps its value with the probability of `zeros`, and else takes another:
    so many deltas are zero at any threshold below the values' distances."""
    B, HQ, HK, D = (sizes[name] for name in ("B", "HQ", "HK", "D"))
    k, v = (torch.randn(B, HK, T, D, dtype=dtype) for _ in range(2))
    if "zeros" in sizes:
        fires = torch.rand(B, HK, T, D) >= sizes["zeros"] / 100
        at = torch.where(fires, torch.arange(T, dtype=torch.int32)[:, None], 0).cummax(2).values
        k = k.gather(2, at.long())
    return {"q": torch.randn(B, HQ, D, dtype=dtype), "k": k.transpose(1, 2), "v": v.transpose(1, 2)}


def work(sizes: Sizes, size: int) -> tuple[float, float]:
    """(floating-point operations, bytes) of a token on elements of `size` bytes: those of dense attention, which reads
    all keys and values once. What a sparse cache does not read counts as read."""
    B, T, HQ, HK, D = (sizes[name] for name in ("B", "T", "HQ", "HK", "D"))
    return 4 * B * HQ * T * D, 2 * B * (T * HK + HQ) * D * size


def reference(op: str, x: Tensors, low: torch.dtype | None) -> torch.Tensor:
    """The token on the reference: in float64, or with operands rounded to `low`. Keys are held as they are."""
    q, k, v = x["q"].unsqueeze(1), x["k"], x["v"]
    dense = (q, k, v) if low else (q.double(), k.double(), v.double())
    scale = q.shape[-1] ** -0.5
    if op == "decode_attention":
        return exact_reference(*dense, scale=scale, operand_dtype=low)[:, 0]
    held = definition.hold(k, torch.tensor(OPTIONS["threshold"])).to(dense[1].dtype)
    positions = torch.full((q.shape[0], 1), k.shape[1] - 1, device=q.device)
    options = {"window": OPTIONS["window"], "sink": OPTIONS["sink"], "window_mode": "band", "scale": scale}
    return definition.attention(*dense[:2], held, dense[2], positions, **options, operand_dtype=low)[:, 0]


def filled(x: Tensors, backend: str, spare: int = 0) -> fla_ops.DeltaKVCache:
    """A cache of all tokens of x, with room for `spare` more."""
    cache = fla_ops.DeltaKVCache(**OPTIONS, max_len=x["k"].shape[1] + spare, backend=backend)
    cache.append(x["k"], x["v"], queries=1)
    return cache


def ours(op: str, backend: str) -> Callable[..., torch.Tensor]:
    """A function of the tensors by name. A sparse cache is filled once for its inputs, ahead of the calls that are
    timed."""
    if op == "decode_attention":
        return functools.partial(fla_ops.exact_decode_attention, backend=backend)
    made: list = [None, None]

    def attend(q, k, v):
        if made[0] is not k:
            made[:] = k, filled({"k": k, "v": v}, backend)
        return made[1].attend(q)

    return attend


def baselines(op: str) -> dict[str, Callable[..., torch.Tensor]]:
    """What people run today; and for the sparse cache our own dense kernel."""

    def sdpa(q, k, v):
        o = F.scaled_dot_product_attention(q.unsqueeze(2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True)
        return o.squeeze(2)

    exact = {"fla_ops exact decode": fla_ops.exact_decode_attention} if op == "delta_kv_cache" else {}
    return exact | {"torch SDPA (exact)": sdpa}


def read(q, k, v) -> torch.Tensor:
    """Reads the dense cache, all threads, and does next to nothing else: what the machine's memory allows. Of torch's
    reductions, the largest of 64-bit integers is the fastest."""
    return torch.stack([x.transpose(1, 2).reshape(-1).view(torch.int64).amax() for x in (k, v)])


def share_of_read(seconds: float, reading: float, found: dict[str, float]) -> float:
    """The pace at which a call of `seconds` reads its cache, over that of `read`, which takes `reading`; `found` are
    the remarks on a sparse cache."""
    return reading / seconds * (found["cache_mib"] / found["dense_mib"] if found else 1.0)


def remarks(sizes: Sizes, dtype: torch.dtype, where: str) -> dict[str, float]:
    """What a time does not tell of a sparse cache: its size, that of dense keys and values, and what an append of one
    token takes."""
    T = sizes["T"]
    x = {name: t.to(where) for name, t in inputs(sizes, dtype, T + APPENDED).items()}
    start = {name: t[:, :T] if name != "q" else t for name, t in x.items()}
    cache = filled(start, "auto", APPENDED)
    dense = sum(start[name].numel() * dtype.itemsize for name in ("k", "v"))
    spared = dense * APPENDED // (2 * T)  # room for the values to come
    found = {"cache_mib": round((cache.nbytes - spared) / 2**20, 1), "dense_mib": round(dense / 2**20, 1)}
    times = []
    for t in range(T, T + APPENDED):
        k, v = x["k"][:, t], x["v"][:, t]
        if where == "cuda":
            torch.cuda.synchronize()
        before = time.perf_counter()
        cache.append(k, v)
        if where == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    found["append_us"] = round(statistics.fmean(times) * 1e6, 1)  # the mean: one in many packs
    return found
