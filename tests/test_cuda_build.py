# SPDX-License-Identifier: Apache-2.0
"""The CUDA library builds without a GPU, and the package does without it."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fla_ops import _backend, _build, _native
from fla_ops._native import causal_conv1d

CSRC = Path(__file__).resolve().parent.parent / "csrc"
needs_nvcc = pytest.mark.skipif(_build.nvcc() is None or _build.why_not() is not None, reason="no nvcc here")


def shown(*command):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


@needs_nvcc
@pytest.mark.slow
def test_what_is_in_the_library(tmp_path):
    """Every kernel for every architecture. What it leaves to be found when it is loaded is torch's stable C interface,
    and nothing of CUDA's: the runtime is inside."""
    library = tmp_path / "_C_cuda.abi3.so"
    # A quarter of the time where nvcc knows how, and what is in the library does not depend on it.
    quickly = ["--Ofast-compile", "max"] if "--Ofast-compile" in shown(_build.nvcc(), "--help") else []
    _build.build_cuda(CSRC, library, options=quickly)

    triton = importlib.util.find_spec("triton")
    beside_triton = triton and Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    cuobjdump = shutil.which("cuobjdump") or beside_triton
    if not cuobjdump or not shutil.which("nm") or not shutil.which("readelf"):
        pytest.skip("it was built; no cuobjdump, on PATH or beside Triton, or no binutils to look into it")
    listed = shown(cuobjdump, "--list-elf", "--list-ptx", library)
    files = len(_build.cuda_sources(CSRC))
    assert files > 0
    for arch in _build.CUDA_ARCHS:
        assert listed.count(f".sm_{arch}.cubin") >= files, listed
    assert listed.count(".sm_90.ptx") >= files, listed

    undefined = [line.split()[-1].split("@")[0] for line in shown("nm", "-D", "--undefined-only", library).splitlines()]
    assert "aoti_torch_get_current_cuda_stream" in undefined
    assert not [name for name in undefined if name.startswith(("cu", "_ZN3c10", "_ZN2at"))]
    assert "libtorch.so" in shown("readelf", "-d", library)


def test_when_the_cuda_library_is_built(monkeypatch, tmp_path):
    """With nvcc and a CUDA build of torch; FLA_OPS_CUDA decides otherwise."""
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(_build, "why_not", lambda: None)
    monkeypatch.setattr(_build, "nvcc", lambda: "/usr/local/cuda/bin/nvcc")
    monkeypatch.setattr(_build, "torch_root", lambda: tmp_path)
    monkeypatch.delenv("FLA_OPS_CUDA", raising=False)
    assert "torch is a CPU build" in _build.why_not_cuda()
    monkeypatch.setenv("FLA_OPS_CUDA", "1")
    assert _build.why_not_cuda() is None
    monkeypatch.delenv("FLA_OPS_CUDA")
    (tmp_path / "lib/libtorch_cuda.so").touch()
    assert _build.why_not_cuda() is None
    monkeypatch.setenv("FLA_OPS_CUDA", "0")
    assert _build.why_not_cuda() == "FLA_OPS_CUDA=0"
    monkeypatch.setenv("FLA_OPS_CUDA", "yes")
    assert "must be 0 or 1, got 'yes'" in _build.why_not_cuda()
    monkeypatch.setenv("FLA_OPS_CUDA", "1")
    monkeypatch.setattr(_build, "nvcc", lambda: None)
    assert "no nvcc" in _build.why_not_cuda()


def test_an_nvcc_that_fails(monkeypatch, tmp_path):
    if _build.why_not():
        pytest.skip(_build.why_not())
    broken = tmp_path / "bin/nvcc"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho 'no such moon' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(_build.BuildError, match="no such moon"):
        _build.build_cuda(CSRC, tmp_path / "_C_cuda.abi3.so")
    assert not (tmp_path / "_C_cuda.abi3.so").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_why_cuda_tensors_cannot_run_here(native, monkeypatch, tmp_path):
    """The library that is not there, then the device; never an import that fails."""
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native/__init__.py"))
    _native.load_cuda.cache_clear()
    for op in _backend.OPS:
        if not any(row.name == "native" and "cuda" in row.devices for row in _backend.table(op)):
            continue
        module = sys.modules[f"fla_ops._native.{op}"]
        assert "CUDA library is not built" in module.why_not("cuda", torch.float32)
    (tmp_path / "_C_cuda.abi3.so").touch()
    _native.load_cuda.cache_clear()
    assert "is_available() is False" in causal_conv1d.why_not("cuda", torch.float32)
    _native.load_cuda.cache_clear()
