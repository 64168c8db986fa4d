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
    torch = torch_root()
    include = [csrc, torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_path("include")]
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
        libs = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
        extra = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        _run([cxx, "-shared", *map(str, objects), *libs, *extra, "-o", str(linked)])
        shutil.copyfile(linked, f"{target}.new")
    os.replace(f"{target}.new", target)
