# SPDX-License-Identifier: Apache-2.0
"""Builds the native libraries from `csrc/`, for setup.py, `fla-ops build` and the tests. Standard library only.

- `_C`: the schemas of every op and the CPU kernels, by the C++ compiler.
- `_C_cuda`: the CUDA kernels of `*_cuda.cu`, by nvcc.
- `_C_simt`: the same `.cu` files for the host, behind the shim of `csrc/simt_shim.h`; for the tests, never installed.

The libraries use LibTorch's stable ABI, so one binary serves every torch from 2.11 on and every Python.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
# Each instruction-set level is one file per kernel, named by its suffix, with flags of its own.
LEVEL_FLAGS = {
    "_base": [],
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
CUDA_ARCHS = (80, 90, 120)
CUDA_FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA_SWITCH = "FLA_OPS_CUDA"  # environment: 1 builds the CUDA library, 0 does not


class BuildError(RuntimeError):
    """The compiler failed; the message holds what it printed."""


def compiler() -> str | None:
    """The C++ compiler to use: $CXX, else the first of c++, g++ and clang++ on PATH."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def nvcc() -> str | None:
    """The CUDA compiler to use: $CUDA_HOME's, else the one on PATH or in /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    names = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in map(shutil.which, names) if path), None)


def torch_root() -> Path | None:
    """The folder of torch: importable, or installed in the environment that pip's build isolation hides.

    Only its headers and libraries are used, and through the stable ABI any version from 2.11 on will do; so
    `pip install .` needs no other torch for the build.
    """
    spec = importlib.util.find_spec("torch")
    found = [Path(spec.origin).parent] if spec and spec.origin else []
    found += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    return next((folder for folder in found if (folder / "include/torch/csrc/stable").is_dir()), None)


def why_not() -> str | None:
    """The reason why the native library cannot be built here, or None."""
    if torch_root() is None:
        return "no torch >= 2.11 in this environment (install torch first, then `fla-ops build` makes the library)"
    if sys.platform == "win32":
        return "the build supports g++ and clang++ on Linux and macOS"
    if compiler() is None:
        return "no C++ compiler on PATH (install g++ or clang++, or set CXX)"
    return None


def why_not_cuda() -> str | None:
    """The reason why the CUDA library is not built here, or None.

    nvcc alone is no reason to spend its time: a CPU torch could not load the library. FLA_OPS_CUDA=1 builds it anyway.
    """
    missing = why_not()
    if missing:
        return missing
    switch = os.environ.get(CUDA_SWITCH, "")
    if switch not in ("", "0", "1"):
        return f"environment variable {CUDA_SWITCH} must be 0 or 1, got {switch!r}"
    if switch == "0":
        return f"{CUDA_SWITCH}=0"
    if nvcc() is None:
        return "no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda (install the CUDA toolkit)"
    if not switch and not (torch_root() / "lib/libtorch_cuda.so").exists():
        return f"torch is a CPU build ({CUDA_SWITCH}=1 builds the CUDA library anyway)"
    return None


def cpu_sources(csrc: Path) -> list[Path]:
    """What `_C` is made of on this processor."""
    skipped = ("simt",) if _is_x86() else ("simt", "avx2", "avx512")
    return [p for p in sorted(csrc.glob("*.cpp")) if not set(p.stem.split("_")) & set(skipped)]


def cuda_sources(csrc: Path) -> list[Path]:
    return sorted(csrc.glob("*_cuda.cu"))


def simt_sources(csrc: Path) -> list[Path]:
    return sorted(csrc.glob("simt_*.cpp")) + cuda_sources(csrc)


def build_native(csrc: Path, target: Path) -> None:
    """Compile the CPU kernels of `csrc` and link the shared library `target`. Raises BuildError."""
    _require(why_not())
    flags = FLAGS + _includes(csrc)

    def command(source: Path, obj: Path) -> list[str]:
        level = next((f for s, f in LEVEL_FLAGS.items() if source.stem.endswith(s)), [])
        return [compiler(), *flags, *level, "-c", "-o", str(obj), str(source)]

    _build(cpu_sources(csrc), target, command, [compiler(), "-shared"])


def build_cuda(csrc: Path, target: Path, archs: Iterable[int] = CUDA_ARCHS, options: Iterable[str] = ()) -> None:
    """Compile the CUDA kernels of `csrc` with nvcc, given `options` as well, and link the shared library `target`.
    Raises BuildError.

    Needs neither a GPU nor a CUDA build of torch: what libtorch_cuda provides is resolved when the library is loaded.
    """
    _require(why_not() or (None if nvcc() else why_not_cuda()))
    flags = CUDA_FLAGS + cuda_archs(archs) + _includes(csrc) + list(options)

    def command(source: Path, obj: Path) -> list[str]:
        return [nvcc(), *flags, "-c", "-o", str(obj), str(source)]

    # libtorch brings libtorch_cuda with it, so a linker must not drop it as unneeded.
    link = [nvcc(), "-shared", "-cudart=static", *cuda_archs(archs), "-Xlinker=--no-as-needed"]
    _build(cuda_sources(csrc), target, command, link)


def cuda_archs(archs: Iterable[int]) -> list[str]:
    """Machine code for `archs`, and PTX of compute capability 9.0 for those between them (10.x)."""
    return [
        f"-gencode=arch=compute_{arch},code=" + (f"[sm_{arch},compute_{arch}]" if arch == 90 else f"sm_{arch}")
        for arch in archs
    ]


def simt_flags(csrc: Path) -> list[str]:
    return [*FLAGS, "-DFLA_SIMT", *_includes(csrc)]


def build_simt(csrc: Path, target: Path, namespace: str = "fla_ops_simt", options: Iterable[str] = ()) -> None:
    """Compile the CUDA kernels of `csrc` for the host, given `options` as well, and link the shared library `target`.
    Raises BuildError.

    Its ops are `namespace`::*; loaded with `torch.ops.load_library`, they take CPU tensors.
    """
    _require(why_not())
    flags = [*simt_flags(csrc), f"-DFLA_SIMT_NAMESPACE={namespace}", *options]

    def command(source: Path, obj: Path) -> list[str]:
        return [compiler(), *flags, "-c", "-o", str(obj), "-x", "c++", str(source)]

    _build(simt_sources(csrc), target, command, [compiler(), "-shared"])


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _includes(csrc: Path) -> list[str]:
    torch = torch_root()
    folders = [csrc, torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_path("include")]
    return DEFINES + [f"-I{folder}" for folder in folders]


def _require(missing: str | None) -> None:
    if missing:
        raise BuildError(missing)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-4000:]
        raise BuildError(f"`{' '.join(command[:1])} ... {command[-1]}` exited {done.returncode}:\n{said}")


def _build(sources: list[Path], target: Path, command: Callable[[Path, Path], list[str]], link: list[str]) -> None:
    """Run `command(source, object)` for each source and link the objects with torch's libraries."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(_run, map(command, sources, objects)))
        # Link beside the target and move it into place: a library that is loaded must not be overwritten.
        linked = Path(folder) / target.name
        libs = [f"-L{torch_root() / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
        extra = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        _run([*link, *map(str, objects), *libs, *extra, "-o", str(linked)])
        shutil.copyfile(linked, f"{target}.new")
    os.replace(f"{target}.new", target)
