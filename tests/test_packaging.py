# SPDX-License-Identifier: Apache-2.0
"""The package as a stranger gets it: source distribution, wheel, and installations into fresh environments.

No network: each environment sees this one's torch and setuptools through a .pth file. The native library is compiled
once, for the wheel; one more installation has a compiler that fails.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fla_ops
from fla_ops import _build

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SITES = sorted({str(Path(module.__file__).parent.parent) for module in (torch, pytest)})
KEPT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache", "shared"
)
COMPILERS = ("c++", "g++", "clang++")

# The op stores three values under orthonormal keys and must read the newest one back; with the versions and reasons.
ONE_OP = """
import json, sys, warnings
import torch, fla_ops
warnings.simplefilter("ignore", fla_ops.FallbackWarning)
keys = torch.eye(4)[[0, 1, 0]][None, :, None]
values = torch.randn(1, 3, 1, 8, requires_grad=True)
o = fla_ops.delta_rule(keys, keys, values, torch.ones(1, 3, 1), scale=1.0).o
o.sum().backward()
print(json.dumps({
    "right": torch.allclose(o, values) and torch.equal(values.grad, torch.ones_like(values)),
    "file": fla_ops.__file__,
    "triton": "triton" in sys.modules,
    "report": fla_ops.backends()["delta_rule"],
}))
"""


def run(*command, cwd, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX", "FLA_OPS_BACKEND", "TRITON_INTERPRET")}
    env |= {"PYTHONSAFEPATH": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environment
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=env, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def pip(*arguments, **options):
    return run(sys.executable, "-m", "pip", *arguments, **options)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, made from a copy of the checkout, and unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "checkout", ignore=KEPT_OUT)
    make = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    run(sys.executable, "-c", make, cwd=folder / "checkout")
    shutil.rmtree(folder / "checkout")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel, built from the source distribution alone, by a compiler in a hurry."""
    out = tmp_path_factory.mktemp("wheel")
    hurry = {}
    if has_compiler():
        hurry["CXX"] = out / "hurried"
        hurry["CXX"].write_text(f'#!/bin/sh\nexec {_build.compiler()} "$@" -O0\n')
        hurry["CXX"].chmod(0o755)
    pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", out, sdist, cwd=out, **hurry)
    return next(out.glob("*.whl"))


@pytest.fixture
def environment(tmp_path):
    """A fresh virtual environment: `environment("name")` returns its python."""

    def make(name):
        folder = tmp_path / name
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=tmp_path)
        python = folder / "bin/python"
        (site_packages(python) / "torch.pth").write_text("\n".join(SITES))
        return python

    return make


def site_packages(python):
    return next((python.parent.parent / "lib").glob("python*")) / "site-packages"


def install(python, what, **options):
    arguments = ("--no-build-isolation", "--no-deps", "--no-index", "--ignore-installed", "-v", what)
    return pip("--python", python, "install", *arguments, cwd=python.parent, **options)


def check_install(python, code=ONE_OP, **environment):
    """Run one op away from the checkout, and the script's `info`; both must speak of the installed package."""
    found = json.loads(run(python, "-c", code, cwd=python.parent, **environment).splitlines()[-1])
    assert found["right"]
    assert Path(found["file"]).is_relative_to(python.parent.parent)
    said = run(python.parent / "fla-ops", "info", "--json", cwd=python.parent, **environment)
    assert json.loads(said)["ops"]["delta_rule"] == found["report"]
    return found


def has_compiler():
    return _build.compiler() is not None


# What is inside.


def test_the_sdist_is_complete(sdist):
    names = {str(p.relative_to(sdist)) for p in sdist.rglob("*") if p.is_file()}
    wanted = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").iterdir()}
    assert any(n.endswith(".h") for n in wanted) and any(n.endswith(".inc") for n in wanted)
    wanted |= {"LICENSE", "README.md", "setup.py", "pyproject.toml", "kernels/__init__.py", "tests/conftest.py"}
    wanted |= {"bench/conftest.py", "bench/fma_rate.cpp", "bench/widest_vector.h", "bench/pytest.ini"}
    wanted |= {"fla_ops/py.typed", "fla_ops/reference/delta_rule.md"}
    assert wanted <= names, sorted(wanted - names)
    assert not [n for n in names if n.endswith((".so", ".pyc"))]


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {n.split("/")[0] for n in names}
    assert tops == {"fla_ops", f"fla_ops-{fla_ops.__version__}.dist-info"}, tops
    wanted = {"fla_ops/kernels/__init__.py", "fla_ops/py.typed", "fla_ops/reference/delta_rule.md"}
    wanted |= {f"fla_ops/_csrc/{p.name}" for p in (ROOT / "csrc").iterdir()}
    python = {str(p.relative_to(ROOT)) for p in (ROOT / "fla_ops").rglob("*.py") if "kernels" not in p.parts}
    kernels = {f"fla_ops/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    assert wanted | python | kernels <= names, sorted((wanted | python | kernels) - names)
    assert not [n for n in names if n.endswith((".o", ".pyc")) or "/tests/" in n or "/bench/" in n]


def test_one_wheel_serves_every_python(wheel):
    if not has_compiler():
        pytest.skip("no C++ compiler here: the wheel is pure Python")
    names = zipfile.ZipFile(wheel).namelist()
    built = {"fla_ops/_C.abi3.so"} | ({"fla_ops/_C_cuda.abi3.so"} if _build.why_not_cuda() is None else set())
    assert {n for n in names if n.endswith(".so")} == built
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"fla_ops-{fla_ops.__version__}-cp310-abi3-{platform}.whl"


def test_the_licence_is_named_in_every_source():
    for path in [
        *ROOT.glob("*.py"),
        *(p for f in ("fla_ops", "kernels", "csrc", "tests") for p in (ROOT / f).rglob("*")),
    ]:
        if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h", ".inc"):
            assert "SPDX-License-Identifier: Apache-2.0" in path.read_text().splitlines()[0], path


# What it does.


def test_a_plain_installation(wheel, environment):
    python = environment("plain")
    install(python, wheel)
    found = check_install(python)
    assert found["report"]["cpu"] == ("native" if has_compiler() else "reference")
    every_module = """
import importlib, pkgutil, fla_ops
for module in pkgutil.walk_packages(fla_ops.__path__, "fla_ops."):
    if "_csrc" not in module.name:
        importlib.import_module(module.name)
"""
    run(python, "-W", "error", "-c", every_module, cwd=python.parent)


@pytest.mark.parametrize("variable", ["PATH", "CXX"])
def test_an_installation_whose_compiler_fails(sdist, environment, tmp_path, variable):
    """It installs, says why the library is missing, and gives the right answer on the reference.

    The sources may hold the library of an earlier, successful build: it must not be installed as if it were new.
    """
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in COMPILERS:
        (tools / name).write_text("#!/bin/sh\necho 'the moon is in the wrong phase' >&2\nexit 1\n")
        (tools / name).chmod(0o755)
    broken = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"} if variable == "PATH" else {"CXX": str(tools / "g++")}
    python = environment("broken")
    said = install(python, sdist, **broken)
    assert "the native CPU library was not built" in said and "wrong phase" in said and "fla-ops build" in said
    found = check_install(python, **broken)
    assert found["report"]["cpu"] == "reference"
    assert "not built" in found["report"]["why_not"]["native"]


def test_an_nvcc_that_fails_costs_the_cuda_library_alone(sdist, environment, tmp_path):
    """The C++ compiler of this test makes empty files: what counts is which of them is installed."""
    (tmp_path / "bin").mkdir()
    for name, script in (
        ("c++", 'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done'),
        ("nvcc", "echo 'the moon is in the wrong phase' >&2; exit 1"),
    ):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    python = environment("half")
    said = install(python, sdist, CXX=str(tmp_path / "bin/c++"), CUDA_HOME=str(tmp_path), FLA_OPS_CUDA="1")
    assert "the native CUDA library was not built" in said and "wrong phase" in said
    assert [p.name for p in (site_packages(python) / "fla_ops").glob("*.so")] == ["_C.abi3.so"]


def test_beside_hugging_faces_kernels(wheel, environment):
    """Their package keeps its name: both import in one process, in either order."""
    python = environment("beside")
    theirs = site_packages(python) / "kernels"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("def get_kernel(name):\n    return 'theirs'\n")
    install(python, wheel)
    assert (theirs / "__init__.py").read_text().startswith("def get_kernel")
    both = "from kernels import get_kernel\nimport fla_ops.kernels\nassert get_kernel('x') == 'theirs'\n"
    check_install(python, both + ONE_OP)
    check_install(
        python, ONE_OP + "import fla_ops.kernels, kernels\nassert kernels.get_kernel('x') == 'theirs'\n" + ONE_OP
    )


@pytest.mark.parametrize("triton", ["absent", "present"])
def test_with_and_without_triton(wheel, environment, triton):
    """Whether Triton is there or not changes neither the import nor the answer on CPU."""
    python = environment(triton)
    install(python, wheel)
    if triton == "present":
        (site_packages(python) / "triton").mkdir()
        (site_packages(python) / "triton/__init__.py").write_text("raise RuntimeError('imported on a CPU path')\n")
        found = check_install(python)
        assert not found["triton"]
    else:
        check_install(python, "import sys\nsys.modules['triton'] = None\n" + ONE_OP)
