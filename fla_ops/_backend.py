# SPDX-License-Identifier: Apache-2.0
"""Which backend runs an op: the record, the choice, and the report of `fla_ops.backends()`.

A family file holds a literal table of `Backend` records, best first. `resolve` walks it once per call and returns the
backend's module; modules are imported on first use.
"""

import functools
import importlib
import operator
import os
import sys
import threading
import warnings
from dataclasses import dataclass
from types import ModuleType

import torch

OPS = (
    "causal_conv1d",
    "decode_attention",
    "delta_kv_cache",
    "delta_product",
    "delta_rule",
    "selective_scan",
    "temporal_sparse_attention",
)
NAMES = ("triton", "native", "reference")
ENVIRONMENT = "FLA_OPS_BACKEND"


class FallbackWarning(UserWarning):
    """A call runs on the slow reference because no compiled backend can take it. Given once per cause."""


@dataclass(frozen=True)
class Backend:
    name: str  # one of NAMES
    module: str  # offers why_not, forward, backward, step; the reference offers the op itself
    devices: tuple[str, ...] = ()  # device types it takes; empty: all
    on_request: tuple[str, ...] = ()  # device types it takes only when it is named, never for "auto",
    switch: str = ""  # and while this environment variable is 1


class _Chosen(threading.local):
    name = "auto"


_chosen = _Chosen()
_loaded = ModuleType("the backend modules in use, as attributes {op}_{backend}")
_warned: set[tuple[str, str]] = set()


class use_backend:  # noqa: N801 - a context manager that reads as a verb
    """`with fla_ops.use_backend("native"):` steers every `backend="auto"` call of this thread.

    Under torch.compile the choice is made when the code is traced.
    """

    def __init__(self, name: str):
        self.name = _check_name(name, "use_backend")

    def __enter__(self):
        self.outer, _chosen.name = _chosen.name, self.name

    def __exit__(self, *exc):
        _chosen.name = self.outer


def _check_name(name: str, op: str, source: str = "argument 'backend'") -> str:
    if name not in ("auto", *NAMES):
        legal = ", ".join(f'"{n}"' for n in ("auto", *NAMES))
        raise ValueError(f"{op}: {source} must be one of {legal}, got {name!r}.")
    return name


def table(op: str) -> tuple[Backend, ...]:
    """The records of a family, best first."""
    importlib.import_module(f"fla_ops.{op}")
    return sys.modules[f"fla_ops.{op}"]._BACKENDS


def why_not(op: str, name: str, device: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> str | None:
    """The reason why backend `name` cannot run `op` on such tensors, or None."""
    row = next((row for row in table(op) if row.name == name), None)
    if row is None:
        return f"this version of fla_ops has no {name} kernel for {op}"
    if row.devices and device not in row.devices + row.on_request:
        return f"{name} takes {' and '.join(row.devices)} tensors, not {device} tensors"
    if name == "reference":
        return None
    if device in row.on_request and os.environ.get(row.switch) != "1":
        hint = f"{row.switch}=1, set before the first call, makes an exception"
        return f"{name} takes {' and '.join(row.devices)} tensors, not {device} tensors ({hint})"
    try:
        module = importlib.import_module(row.module)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return "triton is not installed (`pip install triton`)"
    return module.why_not(device, dtype, *sizes)


def _automatic(op: str, device: str) -> list[Backend]:
    """The records that "auto" asks in turn, best first."""
    return [row for row in table(op) if device not in row.on_request]


def resolve(op: str, backend: str, device: str, dtype: torch.dtype, *sizes: int) -> ModuleType:
    """The module that runs `op` on tensors of this device type, dtype and head or channel sizes.

    A named backend runs or raises RuntimeError with the reason. "auto" takes the table's first that can, and warns
    once per cause when that is the reference.
    """
    # index() makes a plain int of a size that torch.compile holds for dynamic.
    return getattr(_loaded, _choose(op, backend, device, dtype, *(operator.index(size) for size in sizes)))


def _choose(op: str, backend: str, device: str, dtype: torch.dtype, *sizes: int) -> str:
    """The attribute of `_loaded` that `resolve` asks for."""
    return _first_that_runs(op, _asked_for(op, backend), device, dtype, sizes)


@functools.cache  # what can run does not change while a process lives, and every call asks
def _first_that_runs(op: str, name: str, device: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> str:
    """`_choose` once the environment has been read: `name` is a backend or "auto"."""
    if name != "auto":
        reason = why_not(op, name, device, dtype, sizes)
        if reason:
            raise RuntimeError(f"{op}: backend {name!r} cannot run here: {reason}.")
        return _load(op, next(row for row in table(op) if row.name == name))
    reasons = []
    for row in _automatic(op, device):
        reason = why_not(op, row.name, device, dtype, sizes)
        if reason is None:
            if row.name == "reference":
                _warn_once(op, reasons, stacklevel=6)
            return _load(op, row)
        reasons.append(reason)
    raise RuntimeError(f"{op}: no backend can run here: {'; '.join(reasons)}.")


# Traced code sees the result as a constant: every argument is a string, a dtype or a static int, and the imports, the
# environment and the warning stay out of the graph. Dynamo cannot look into a module that is a constant, so the
# constant is a name, and `resolve` reads the module from `_loaded`. torch.compiler.assume_constant_result does just
# this, after an import of torch._dynamo that takes over a second.
_choose._dynamo_marked_constant = True


def _load(op: str, row: Backend) -> str:
    attribute = f"{op}_{row.name}"
    setattr(_loaded, attribute, importlib.import_module(row.module))
    return attribute


def _asked_for(op: str, backend: str) -> str:
    """The backend that the argument, `use_backend` or the environment names, or "auto"."""
    name = _check_name(backend, op)
    if name == "auto":
        name = _chosen.name
    if name == "auto" and ENVIRONMENT in os.environ:
        name = _check_name(os.environ[ENVIRONMENT], op, f"environment variable {ENVIRONMENT}")
    return name


def warn_reference(op: str, cause: str) -> None:
    """For an option that only the reference has: warn once, or raise if another backend was asked for."""
    name = _asked_for(op, "auto")
    if name not in ("auto", "reference"):
        raise RuntimeError(f"{op}: backend {name!r} cannot run here: {cause}.")
    if name == "auto":
        _warn_once(op, [cause], stacklevel=5)


def _warn_once(op: str, reasons: list[str], stacklevel: int) -> None:
    """`stacklevel` reaches from here to the user's call."""
    cause = "; ".join(reasons)
    if (op, cause) not in _warned:
        _warned.add((op, cause))
        warnings.warn(
            f"{op} runs on the slow reference: {cause}. Run `fla-ops info` to see what this machine can use; "
            'backend="reference" asks for the reference without this warning.',
            FallbackWarning,
            stacklevel=stacklevel,
        )


def backends() -> dict[str, dict]:
    """What runs each op on this machine: op -> {"cpu": name, "cuda": name, "why_not": {name: reason}}.

    `cpu` and `cuda` are the backends that `backend="auto"` takes for float32 tensors there (`cuda` is None without a
    CUDA device). `why_not` holds the reason for each backend that runs on neither.
    """
    report = {}
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for op in OPS:
        reasons: dict[str, dict[str, str | None]] = {
            name: {device: why_not(op, name, device, torch.float32, ()) for device in devices} for name in NAMES
        }
        first = {d: next(row.name for row in _automatic(op, d) if reasons[row.name][d] is None) for d in devices}
        report[op] = {
            "cpu": first["cpu"],
            "cuda": first.get("cuda"),
            "why_not": {n: "; ".join(dict.fromkeys(r.values())) for n, r in reasons.items() if all(r.values())},
        }
    return report
