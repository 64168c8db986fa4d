# SPDX-License-Identifier: Apache-2.0
"""What every test runs under: poisoned allocations, fixed seeds, and the backends this machine has."""

import contextlib

import pytest
import torch

import fla_ops
from fla_ops import _backend, _build

try:
    import fla_ops.kernels  # noqa: F401 - catches a checkout that was never installed
except ImportError as error:
    raise pytest.UsageError(
        "fla_ops.kernels does not import: fla_ops is not installed in this environment. Run "
        f"`pip install --no-build-isolation -e .` first ({error})"
    ) from error

BACKENDS = [b for b in ("native", "reference") if not _backend.why_not("delta_rule", b, "cpu", torch.float32, ())]
LEVELS = {0: "base", 1: "avx2", 2: "avx512"}


def _poisoned(allocate):
    """`allocate`, with every float of the result set to NaN: a kernel that forgets an element is found."""

    def poisoned(*args, **kwargs):
        x = allocate(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    return poisoned


@pytest.fixture(autouse=True)
def poison(request, monkeypatch):
    """NaN in all memory that Python code takes uninitialised. Tests of torch's own compilers opt out."""
    if "no_poison" in request.keywords:
        return
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend that runs on CPU tensors here."""
    return request.param


@pytest.fixture
def native():
    """For promises that only the native backend makes."""
    if "native" not in BACKENDS:
        pytest.skip("no native library: " + fla_ops.backends()["delta_rule"]["why_not"]["native"])
    return "native"


@contextlib.contextmanager
def _forced(level: int):
    best = torch.ops.fla_ops._cpu_level()
    torch.ops.fla_ops._set_cpu_level(level)
    try:
        yield
    finally:
        torch.ops.fla_ops._set_cpu_level(best)


@pytest.fixture(params=LEVELS, ids=LEVELS.values())
def cpu_level(request, native):
    """Each instruction-set level of the native library that this processor has."""
    if request.param > torch.ops.fla_ops._cpu_level():
        pytest.skip(f"this processor has no {LEVELS[request.param]}")
    with _forced(request.param):
        yield request.param


@pytest.fixture
def all_levels(native):
    """`for level in all_levels(): ...` runs the body once per level, restoring the best one at the end."""

    def levels():
        for level in range(torch.ops.fla_ops._cpu_level() + 1):
            with _forced(level):
                yield level

    return levels


@pytest.fixture
def threads():
    """`threads(n)` sets the number of threads; the old number comes back at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_report_header():
    compiler = _build.compiler() or "none"
    return f"fla_ops {fla_ops.__version__}, torch {torch.__version__}, backends {BACKENDS}, C++ compiler {compiler}"
