# SPDX-License-Identifier: Apache-2.0
"""`fla-ops build`: compile the native libraries beside the package, after an installation that could not."""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fla_ops
from fla_ops import _build

from . import CommandError


def sources(package: Path) -> Path:
    """The C++ sources: package data of an installed wheel, or `csrc/` beside the package in a checkout."""
    for folder in (package / "_csrc", package.parent / "csrc"):
        if any(folder.glob("*.cpp")):
            return folder
    raise CommandError(f"no C++ sources in {package / '_csrc'} or {package.parent / 'csrc'}. Reinstall fla_ops.")


def run(args: argparse.Namespace) -> int:
    package = Path(fla_ops.__file__).parent
    csrc, target = sources(package), package / "_C.abi3.so"
    compile_one("native", _build.build_native, _build.compiler(), csrc, target)
    # A new process: a library that this one has loaded stays the old one.
    code = "import sys; from fla_ops._native import load; sys.exit(load())"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if loaded.returncode:
        raise CommandError(f"the native library is built, but does not run here: {loaded.stderr.strip()}")
    print("It loads. `fla-ops selftest` checks its results.")
    missing = _build.why_not_cuda()
    if missing:
        print(f"Without the CUDA library: {missing}.")
    else:
        compile_one("CUDA", _build.build_cuda, _build.nvcc(), csrc, package / "_C_cuda.abi3.so")
    return 0


def compile_one(name: str, build: Callable[[Path, Path], None], compiler: str | None, csrc: Path, target: Path) -> None:
    print(f"Compiling {csrc} with {compiler or 'no compiler'} ...", flush=True)
    start = time.perf_counter()
    try:
        build(csrc, target)
    except _build.BuildError as error:
        raise CommandError(f"the {name} library was not built: {error}") from error
    except OSError as error:
        raise CommandError(f"the {name} library cannot be written to {target}: {error}") from error
    print(f"Built {target} in {time.perf_counter() - start:.0f} s.")
