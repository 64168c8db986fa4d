# SPDX-License-Identifier: Apache-2.0
"""Builds the native CPU library from `csrc/`: used by setup.py and by `fla-ops build`. Standard library only.

The library uses LibTorch's stable ABI, so one binary serves every torch from 2.11 on and every Python.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
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


class BuildError(RuntimeError):
    """The compiler failed; the message holds what it printed."""


def compiler() -> str | None:
    """The C++ compiler to use: $CXX, else the first of c++, g++ and clang++ on PATH."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def why_not() -> str | None:
    """The reason why the native library cannot be built here, or None."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not importable in this build (install torch, then use --no-build-isolation)"
    if sys.platform == "win32":
        return "the build supports g++ and clang++ on Linux and macOS"
    if compiler() is None:
        return "no C++ compiler on PATH (install g++ or clang++, or set CXX)"
    return None


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-4000:]
        raise BuildError(f"`{' '.join(command[:1])} ... {command[-1]}` exited {done.returncode}:\n{said}")


def build_native(csrc: Path, target: Path) -> None:
    """Compile every .cpp of `csrc` and link the shared library `target`. Raises BuildError."""
    missing = why_not()
    if missing:
        raise BuildError(missing)
    torch_root = Path(importlib.util.find_spec("torch").origin).parent
    include = [csrc, torch_root / "include", torch_root / "include/torch/csrc/api/include"]
    include += [Path(sysconfig.get_path("include"))]
    flags = FLAGS + DEFINES + [f"-I{path}" for path in include]
    skipped = () if _is_x86() else ("_avx2", "_avx512")
    sources = [p for p in sorted(csrc.glob("*.cpp")) if not p.stem.endswith(skipped or ("\0",))]
    target.parent.mkdir(parents=True, exist_ok=True)
    cxx = compiler()
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]

        def compile_one(source: Path, obj: Path) -> None:
            level = next((f for s, f in LEVEL_FLAGS.items() if source.stem.endswith(s)), [])
            _run([cxx, *flags, *level, "-c", "-o", str(obj), str(source)])

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(compile_one, sources, objects))
        # Link beside the target and move it into place: a library that is loaded must not be overwritten.
        linked = Path(folder) / target.name
        libs = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
        extra = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        _run([cxx, "-shared", *map(str, objects), *libs, *extra, "-o", str(linked)])
        shutil.copyfile(linked, f"{target}.new")
    os.replace(f"{target}.new", target)
