# SPDX-License-Identifier: Apache-2.0
"""What Triton kernels read and write, seen in Triton's interpreter: counted, and held against what they were given."""

import contextlib
import functools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

FENCE = 256  # elements on either side of a fenced tensor


def fenced(x: torch.Tensor) -> torch.Tensor:
    """A copy of x with the same strides, between two stretches of memory that no kernel may touch: NaN, or the largest
    integer. So a read outside of x finds no other tensor by luck, and shows in the result if nothing else sees it."""
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    canary = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    memory = torch.full((2 * FENCE + extent,), canary, dtype=x.dtype)
    inside = memory.as_strided(x.shape, x.stride(), FENCE)
    return inside.copy_(x) if x.numel() else inside


def assert_fence_stands(x: torch.Tensor) -> None:
    """Nobody has written around `fenced` x."""
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    around = torch.cat([memory[:FENCE], memory[-FENCE:]])
    assert (around.isnan() if x.is_floating_point() else around == torch.iinfo(x.dtype).max).all()


@contextlib.contextmanager
def fenced_allocations(monkeypatch):
    """Tensors that Python code allocates inside lie between fences."""

    def wrap(allocate):
        return lambda *args, **kwargs: fenced(allocate(*args, **kwargs))

    with monkeypatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided", "zeros", "zeros_like"):
            patch.setattr(torch, name, wrap(getattr(torch, name)))
        for name in ("new_empty", "new_zeros"):
            patch.setattr(torch.Tensor, name, wrap(getattr(torch.Tensor, name)))
        yield


def far_apart(tensors: list[torch.Tensor], axis: int) -> list[torch.Tensor]:
    """The same tensors with the last entry of an axis more than 2^31 elements behind the first, so that an offset in 32
    bits overflows. They take gigabytes of address space, all in the same place, and a few pages of memory.

    Kernels may count offsets inside of a tile in 32 bits: give an axis of tokens more entries than a tile has.
    """
    entries = tensors[0].shape[axis]
    stride = (2**31 // (entries - 1) // 64 + 1) * 64
    views, used = [], 0
    for x in tensors:
        strides = list(x.contiguous().stride())
        strides[axis] = stride
        views.append((x, used, strides))
        used += -(-x.numel() // 64) * 64
    assert used < stride
    try:
        storage = torch.UntypedStorage(tensors[0].element_size() * ((entries - 1) * stride + 2 * used))
    except RuntimeError:
        pytest.skip("this machine does not grant the address space")
    return [torch.empty(0, dtype=x.dtype).set_(storage, at, x.shape, strides).copy_(x) for x, at, strides in views]


def _addresses(x: torch.Tensor) -> np.ndarray:
    """The address of each element of x."""
    offset = np.zeros((1,) * x.dim(), np.int64)
    for axis, (n, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        offset = offset + (np.arange(n) * stride).reshape([-1 if a == axis else 1 for a in range(x.dim())])
    return np.uint64(x.data_ptr()) + (offset.ravel() * x.element_size()).astype(np.uint64)


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, TensorDescriptor):
            yield value.base
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


@dataclass
class Launched:
    """One launch: the bytes that its programs load and store, and the bytes that they touch, each counted once."""

    kernel: str
    allowed: dict[int, np.ndarray]  # element size -> sorted addresses of the launch's tensors
    loaded: int = 0
    stored: int = 0
    touched: dict[tuple[str, int], list[np.ndarray]] = field(default_factory=dict)  # (what, size) -> addresses

    def access(self, what: str, pointers, mask) -> None:
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        live = np.asarray(mask.data, dtype=bool)
        at = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, live.shape))
        at = at[np.broadcast_to(live, at.shape)].astype(np.uint64)
        allowed = self.allowed.get(size, np.empty(0, np.uint64))
        place = np.searchsorted(allowed, at)
        right = place < len(allowed)
        right[right] = allowed[place[right]] == at[right]
        if not right.all():
            raise AssertionError(f"{self.kernel}: {what} of {(~right).sum()} elements outside of all of its tensors")
        if what == "load":
            self.loaded += at.size * size
        else:
            self.stored += at.size * size
        self.touched.setdefault((what, size), []).append(at)

    @property
    def distinct(self) -> int:
        """Bytes that are loaded or stored, each once a launch: what a cache of any size could not avoid."""
        return sum(size * np.unique(np.concatenate(at)).size for (_, size), at in self.touched.items())


@contextlib.contextmanager
def watched_memory():
    """Inside, launches in the interpreter are appended to the list that this yields. An access to anything but the
    elements of a tensor that the kernel was given raises before it happens."""
    launches = []
    call, restore = interpreter.GridExecutor.__call__, interpreter.GridExecutor._restore_args_dev
    load = interpreter.InterpreterBuilder.create_masked_load
    store = interpreter.InterpreterBuilder.create_masked_store

    @functools.wraps(call)
    def launch(self, *args, **kwargs):
        by_size = {}
        for x in _tensors([*args, *kwargs.values()]):
            by_size.setdefault(x.element_size(), []).append(_addresses(x))
        allowed = {size: np.unique(np.concatenate(parts)) for size, parts in by_size.items()}
        launches.append(Launched(self.fn.__name__, allowed))
        return call(self, *args, **kwargs)

    def watched_load(self, pointers, mask, *rest, **options):
        launches[-1].access("load", pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def watched_store(self, pointers, value, mask, *rest, **options):
        launches[-1].access("store", pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    interpreter.GridExecutor.__call__ = launch
    # The interpreter copies every tensor's memory back from where it worked. On CPU tensors it worked in place.
    interpreter.GridExecutor._restore_args_dev = lambda *args: None
    interpreter.InterpreterBuilder.create_masked_load = watched_load
    interpreter.InterpreterBuilder.create_masked_store = watched_store
    try:
        yield launches
    finally:
        interpreter.GridExecutor.__call__ = call
        interpreter.GridExecutor._restore_args_dev = restore
        interpreter.InterpreterBuilder.create_masked_load = load
        interpreter.InterpreterBuilder.create_masked_store = store
