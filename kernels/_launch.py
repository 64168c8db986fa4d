# SPDX-License-Identifier: Apache-2.0
"""What every launcher needs: where it runs, with which precision, and how a launch is described."""

import contextlib
import functools
import os
from dataclasses import dataclass

import torch
import triton

# Triton decides this when a kernel is decorated, so the variable must be set before the first import of this package.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def cdiv(n: int, d: int) -> int:
    """n / d, rounded up. Triton's own costs 5 us a call outside of kernels."""
    return -(-n // d)


def chunk_slots(B: int, T: int, cu_seqlens: torch.Tensor | None, rows: int) -> int:
    """The number of chunk slots: known without reading a length of a packed sequence."""
    per_row = cdiv(T, rows)
    return B * per_row if cu_seqlens is None else per_row + cu_seqlens.shape[0] - 1


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched for some op, sizes, dtype and architecture. Rows of the tables in `_config.py`."""

    BT: int  # tokens of a tile
    BK: int = 0  # key channels of a tile (delta rule)
    BV: int = 0  # value channels of a tile (delta rule)
    BD: int = 0  # channels of a tile (convolution)
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None  # a thread: fewer let more programs share a multiprocessor
    tma: bool = False  # load tiles through tensor descriptors where strides and alignment allow

    @functools.cached_property
    def options(self) -> dict:
        """The keyword arguments of a launch. fp fusion is said out loud: its default changes in Triton 3.10."""
        limit = {"maxnreg": self.max_registers} if self.max_registers else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True} | limit


class Constexprs(dict):
    """The constexpr arguments and options of a launch, equal to itself alone."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@functools.cache
def constexprs(**values) -> Constexprs:
    """The same object for the same values, so that `launch` can look it up."""
    return Constexprs(values)


@functools.cache
def _compiled_for_value(kernel) -> tuple[bool, ...]:
    """Whether Triton compiles a kernel for the value of an argument, or for its type alone: one flag an argument."""
    return tuple(not param.do_not_specialize for param in kernel.params)


_compiled: dict[tuple, tuple] = {}


def launch(kernel, grid: tuple[int, ...], args: tuple, constants: Constexprs) -> None:
    """`kernel[grid](*args, **constants)`, with less of the host's time from the second such launch on.

    Triton binds and describes every argument, constexpr ones too, and asks the driver about every address. Here the
    description is what decides between variants on NVIDIA GPUs: a tensor's dtype and alignment, and of a number whether
    it is 1, a multiple of 16, and beyond 32 bits. The constexpr arguments are the kernel's last.
    """
    if not args[0].is_cuda or torch.version.hip:  # the interpreter, a recording, or other rules
        kernel[grid](*args, **constants)
        return
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    key, values = [id(kernel), id(constants), device], []  # both live as long as the process
    for x, by_value in zip(args, _compiled_for_value(kernel), strict=False):
        if isinstance(x, torch.Tensor):
            x, dtype = x.data_ptr(), x.dtype
            key += dtype, x % 16 == 0
        elif x is None:
            key.append(None)
        else:
            key.append((x > 0x7FFFFFFF) + (2 * (x == 1) + 4 * (x % 16 == 0) if by_value else 0))
        values.append(x)
    found = _compiled.get(key := tuple(key))
    hooks = triton.knobs.runtime  # of a profiler
    if found is None or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
        code = kernel[grid](*args, **constants)
        _compiled[key] = code, [constants[name] for name in kernel.arg_names[len(args) :]]
        return
    code, rest = found
    x, y, z = (*grid, 1, 1)[:3]
    stream = driver.get_current_stream(device)
    code.run(x, y, z, stream, code.function, code.packed_metadata, None, None, None, *values, *rest)


def why_not(device: str) -> str | None:
    """The reason why Triton kernels cannot run on tensors of this device type, or None."""
    if device == "cuda":
        return "TRITON_INTERPRET=1 is set, which runs kernels on the CPU" if INTERPRET else None
    if device == "cpu" and INTERPRET:
        return None
    late = "; TRITON_INTERPRET=1 was set after Triton's first import" if device == "cpu" else ""
    return f"triton takes cuda tensors, not {device} tensors{late}"


def arch() -> str:
    """The architecture to compile for: "sm_90", "gfx942"; the interpreter takes Hopper's configurations."""
    if INTERPRET:
        return "sm_90"
    driver = triton.runtime.driver.active
    return _arch(driver, driver.get_current_device())


@functools.cache  # a launcher asks several times
def _arch(driver, device) -> str:
    target = driver.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(x: torch.Tensor) -> int:
    """How many multiprocessors the device of x has; Hopper's number where that cannot be asked."""
    return _multiprocessors(x.device.index) if x.is_cuda else 132


def on_device(x: torch.Tensor):
    """Triton launches on the current device: make it that of x."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def _workspace(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def allow_descriptors() -> None:
    """Kernels that make tensor descriptors need a little device memory at launch: torch's, so that graphs keep it."""
    triton.set_allocator(_workspace)


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of products of this dtype: IEEE, or TF32 where the user allowed it for float32."""
    allowed = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed and arch().startswith("sm_") else "ieee"
