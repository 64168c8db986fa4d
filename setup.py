# SPDX-License-Identifier: Apache-2.0
"""Packages `kernels/` as `fla_ops.kernels` and `csrc/` as data, and builds the native libraries if it can.

Without torch, or without a C++ compiler, the result is a pure Python package that installs and imports; `fla-ops build`
makes the libraries later. The CUDA library is built where nvcc and a CUDA build of torch are; FLA_OPS_CUDA=1 or 0 in
the environment decides otherwise. A compiler that fails is reported and does not stop the installation.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def load(name: str, path: str):
    """Import one file of the package without importing the package, which would need torch."""
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


version = load("_fla_ops_version", "fla_ops/_version.py").__version__
build = load("_fla_ops_build", "fla_ops/_build.py")


class BuildNative(build_ext):
    """Hand each extension to `fla_ops/_build.py`, which knows the flags of every source file."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        name, make = LIBRARIES[ext.name][:2]
        try:
            make(ROOT / "csrc", target)
        except build.BuildError as error:
            target.unlink(missing_ok=True)  # a library of older sources must not be installed in its place
            print(f"fla_ops: the native {name} library was not built: {error}", file=sys.stderr)
            print("fla_ops: installing without it; `fla-ops build` tries again.", file=sys.stderr)


# Extension -> what it holds, the function that builds it, its sources, why it cannot be built.
LIBRARIES = {
    "fla_ops._C": ("CPU", build.build_native, build.cpu_sources, build.why_not()),
    "fla_ops._C_cuda": ("CUDA", build.build_cuda, build.cuda_sources, build.why_not_cuda()),
}
extensions = []
for extension, (name, _, sources, missing) in LIBRARIES.items():
    if missing:
        print(f"fla_ops: installing without the native {name} library: {missing}", file=sys.stderr)
        continue
    files = [str(p.relative_to(ROOT)) for p in sources(ROOT / "csrc")]
    extensions.append(Extension(extension, files, py_limited_api=True, optional=True))
native = {}
if extensions:
    native = {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildNative},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }

packages = find_packages(include=["fla_ops", "fla_ops.*"])
packages += ["fla_ops.kernels"] + [f"fla_ops.kernels.{p}" for p in find_packages("kernels")]
packages += ["fla_ops._csrc"]
setup(
    version=version,
    packages=packages,
    package_dir={"fla_ops.kernels": "kernels", "fla_ops._csrc": "csrc"},
    package_data={"fla_ops": ["py.typed", "reference/*.md"], "fla_ops._csrc": ["*"]},
    **native,
)
