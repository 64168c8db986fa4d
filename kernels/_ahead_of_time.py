# SPDX-License-Identifier: Apache-2.0
"""Launches without a GPU: what a launcher would launch on some target is recorded, and can be compiled for it.

The real launchers run on small CPU tensors under a driver that claims to be the target. So signatures, divisibility,
constexprs and options are those of a real launch, and the configuration is the one that the tables give the target.
Tests and `report.py` use this module; nothing that runs on a GPU does.
"""

import contextlib
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _Driver:
    """As much of a Triton driver as a launch asks for before it launches."""

    def __init__(self, target: str):
        self.target = target

    def get_current_target(self):
        return TARGETS[self.target]

    def get_current_device(self):
        return self.target  # a key of the caches in each kernel: what is recorded for two targets must not mix

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@dataclass(frozen=True)
class Launch:
    """One launch: its grid, and all that decides which machine code it runs."""

    kernel: JITFunction
    grid: tuple[int, ...]
    key: str  # equal for two launches of a kernel exactly when they share their machine code
    signature: dict
    constexprs: dict
    attributes: dict
    options: object

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def constants(self) -> dict:
        """The constexpr arguments by name."""
        names = self.kernel.arg_names
        return {names[path[0]]: value for path, value in self.constexprs.items() if len(path) == 1}

    def compile(self, target: str):
        source = ASTSource(self.kernel, self.signature, self.constexprs, self.attributes)
        with _active(target):
            return triton.compile(source, target=TARGETS[target], options=self.options.__dict__)


@contextlib.contextmanager
def _active(target: str):
    config = triton.runtime.driver
    before = config._active  # `active` would look for a GPU
    config.set_active(_Driver(target))
    try:
        yield
    finally:
        config.set_active(before)


@contextlib.contextmanager
def recording(target: str):
    """Inside, launches of Triton kernels are appended to the list that this yields, and nothing runs."""
    launches = []
    run, do_compile = JITFunction.run, JITFunction._do_compile

    def record(kernel, *args, grid, warmup, **kwargs):
        if callable(grid):
            grid = grid(dict(zip(kernel.arg_names, args, strict=False)) | kwargs)
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        launches.append(Launch(kernel, tuple(grid), *compiled))

    def describe(kernel, key, signature, device, constexprs, options, attributes, warmup):
        return str(key), signature, constexprs, attributes, options

    JITFunction.run, JITFunction._do_compile = record, describe
    try:
        with _active(target):
            yield launches
    finally:
        JITFunction.run, JITFunction._do_compile = run, do_compile
