# SPDX-License-Identifier: Apache-2.0
"""The selective scan's part of what is timed: its inputs, how much work a pass is, and what people run today.

`sizes` are B, Di, L and N of `fla_ops.selective_scan`; softplus, D, z and delta_bias are always there.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fla_ops._native.selective_scan import BLOCK

Sizes = dict[str, int]
TOKENS = ("u", "delta", "z", "B", "C")  # the tensors with a time axis, which is their last


def inputs(sizes: Sizes, dtype: torch.dtype, L: int | None, channels_last: bool) -> dict[str, torch.Tensor]:
    """Random inputs as Mamba has them at the start of training; without a time axis for L = None."""
    B, Di, N = (sizes[name] for name in ("B", "Di", "N"))

    def rand(*shape: int) -> torch.Tensor:
        if L is None:
            return torch.randn(*shape, dtype=dtype)
        if channels_last:
            return torch.randn(shape[0], L, *shape[1:], dtype=dtype).transpose(1, 2)
        return torch.randn(*shape, L, dtype=dtype)

    x = {"u": rand(B, Di), "delta": rand(B, Di), "A": -torch.arange(1.0, N + 1).repeat(Di, 1)}
    x |= {"B": rand(B, N), "C": rand(B, N), "D": torch.ones(Di), "z": rand(B, Di)}
    # softplus of the bias is log-uniform from 0.001 to 0.1
    step = torch.exp(torch.empty(Di).uniform_(-6.9, -2.3))
    return x | {"delta_bias": step + torch.log(-torch.expm1(-step))}


def state_shape(sizes: Sizes) -> tuple[int, int, int]:
    return sizes["B"], sizes["Di"], sizes["N"]


def exponentials(sizes: Sizes, backward: bool) -> float:
    """How many exp(step A) a pass needs: one for each element of each state, and in the backward pass, which computes
    the states again, one more. The softplus and the gate are N times fewer."""
    return sizes["B"] * sizes["Di"] * sizes["L"] * sizes["N"] * (1 + backward)


def work(sizes: Sizes, size: int, step: bool, backward: bool) -> tuple[float, float]:
    """(floating-point operations, bytes) of a pass on elements of `size` bytes.

    Operations of a state's element: step A, step u B, h = decay h + that, y += C h, exponentials not counted; backward
    twice the forward. Bytes are each tensor once: forward u, delta, z, B, C, y; backward those but y again, dy, and the
    five gradients; between them one state each BLOCK tokens, written and read. A step reads and writes its state.
    """
    B, Di, L, N = (sizes[name] for name in ("B", "Di", "L", "N"))
    flops = 6 * B * Di * L * N * (3 if backward else 1)
    moved = B * L * (4 * Di + 2 * N) * size
    if backward:
        moved += B * L * (7 * Di + 4 * N) * size + 2 * 4 * B * -(-L // BLOCK) * Di * N
    if step:
        moved += 2 * 4 * B * Di * N
    return flops, moved


# What people run today.


def baselines(sizes: Sizes, step: bool, backward: bool, device: str, compiled: bool) -> dict[str, Callable]:
    """Name -> a function of the op's tensors by name, returning y, of each baseline that is installed and fits."""
    functions = transformers_scan()
    if step:
        return {} if compiled or isinstance(functions, str) else {"transformers step": _stepped(functions[1])}
    if compiled:
        fits = _installed("mambapy") and _fits(sizes, 14 if backward else 8, device)
        return {"mambapy pscan compiled": torch.compile(mambapy_scan)} if fits else {}
    found = {}
    if device == "cuda" and (official := _mamba_ssm()):
        found["mamba_ssm"] = functools.partial(official, delta_softplus=True)
    if _installed("mambapy") and _fits(sizes, 14 if backward else 8, device):
        found["mambapy pscan"] = mambapy_scan
    # Its backward pass is left out: each step adds to a gradient of all steps, a minute and more for 1024.
    if not backward and not isinstance(functions, str) and _fits(sizes, 4, device):
        found["transformers scan"] = _scanned(functions[0])
    return found


def missing() -> list[str]:
    """Why baselines that a `pip install` brings are not there."""
    found = transformers_scan()
    return [found] * isinstance(found, str) + ["mambapy is not installed"] * (not _installed("mambapy"))


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _fits(sizes: Sizes, copies: int, device: str) -> bool:
    """Whether that many float32 tensors `[B, Di, L, N]`, as baselines write them, take at most half of the memory."""
    if device == "cuda":
        memory = torch.cuda.mem_get_info()[1]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 4 * copies * exponentials(sizes, False) <= memory / 2


def transformers_scan() -> tuple[Callable, Callable] | str:
    """transformers' (scan, step) in plain torch, or the reason why there is none; `__wrapped__` is torch even where
    another package's kernels are installed."""
    if not _installed("transformers"):
        return "transformers is not installed"
    try:
        module = importlib.import_module("transformers.models.mamba.modeling_mamba")
        both = module.mamba_selective_scan, module.mamba_selective_state_update
    except (ImportError, AttributeError) as error:  # too old, or broken by another package: said in the table
        return f"transformers has no scan to import ({str(error).splitlines()[0]})"
    return tuple(getattr(f, "__wrapped__", f) for f in both)


def _scanned(function: Callable) -> Callable:
    def scan(u, delta, A, B, C, D, z, delta_bias):
        return function(u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True).to(u.dtype)

    return scan


def _stepped(function: Callable) -> Callable:
    def step(u, delta, A, B, C, D, z, delta_bias, state):
        return function(state, u, delta, A, B, C, D, dt_bias=delta_bias, dt_softplus=True, z=z)

    return step


def mambapy_scan(u, delta, A, B, C, D, z, delta_bias):
    """The op on mambapy's parallel scan, as its own MambaBlock and transformers call it: all decays and all inputs of
    the recurrence in memory, `[B, L, Di, N]`."""
    from mambapy.pscan import pscan

    step = F.softplus(delta + delta_bias.to(delta.dtype)[:, None]).transpose(1, 2)
    decay = (step[..., None] * A).exp()
    written = (step * u.transpose(1, 2))[..., None] * B.transpose(1, 2)[:, :, None]
    states = pscan(decay, written.to(decay.dtype))
    y = (states @ C.transpose(1, 2)[..., None].to(states.dtype))[..., 0].transpose(1, 2)
    return ((y + D[:, None] * u) * F.silu(z)).to(u.dtype)


def _mamba_ssm() -> Callable | None:
    """mamba-ssm's CUDA scan, where its extension imports."""
    try:
        return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except ImportError:
        return None
