# SPDX-License-Identifier: Apache-2.0
"""Which backend runs, what is said when none can, and how the package imports."""

import ast
import importlib
import inspect
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from delta_rule_cases import call, random_inputs

import fla_ops
from fla_ops import _backend

OP = "delta_rule"
FLOAT = torch.float32
ROOT = Path(fla_ops.__file__).parent
NATIVE = "fla_ops._native.delta_rule"
REFERENCE = "fla_ops.reference.delta_rule"


@pytest.fixture
def fresh(monkeypatch):
    """Nothing warned about yet, and no choice in the environment."""
    monkeypatch.setattr(_backend, "_warned", set())
    monkeypatch.delenv(_backend.ENVIRONMENT, raising=False)


@pytest.fixture
def broken(fresh, monkeypatch):
    """A machine whose native library is missing."""
    module = importlib.import_module(NATIVE)
    monkeypatch.setattr(module, "_load_error", "the native library is not built (run `fla-ops build`)")


def chosen(backend="auto", device="cpu", *sizes):
    return _backend.resolve(OP, backend, device, FLOAT, *sizes).__name__


# The choice.


def test_a_machine_with_a_compiler_has_the_native_backend():
    """Without this, a suite in which the library failed to build would pass by skipping."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler here")
    report = fla_ops.backends()
    for op in _backend.OPS:
        assert report[op]["cpu"] == "native", f"{op}: {report[op]['why_not']}"


def test_auto_takes_the_best(fresh, native):
    assert chosen() == chosen("native") == NATIVE
    assert chosen("reference") == REFERENCE


@pytest.mark.parametrize("op", _backend.OPS)
def test_triton_says_why_not(op, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=rf"^{op}: backend 'triton' cannot run here: .+\.$"):
        _backend.resolve(op, "triton", "cpu", FLOAT)


def test_a_named_backend_never_falls_back(broken):
    with pytest.raises(RuntimeError, match=r"^delta_rule: backend 'native' cannot run here: .*run `fla-ops build`"):
        chosen("native")
    with pytest.raises(RuntimeError, match="native takes cpu and cuda tensors, not mps tensors"):
        chosen("native", "mps")


def test_an_unknown_backend_is_refused(fresh):
    legal = r'one of "auto", "triton", "native", "reference", got '
    with pytest.raises(ValueError, match=rf"^delta_rule: argument 'backend' must be {legal}'cuda'"):
        call(fla_ops.delta_rule, random_inputs(T=2), backend="cuda")
    with pytest.raises(ValueError, match=rf"^use_backend: .*{legal}'cpu'"):
        fla_ops.use_backend("cpu")
    with pytest.raises(ValueError, match=rf"{legal}None"):
        call(fla_ops.delta_rule, random_inputs(T=2), backend=None)


def test_use_backend_nests_and_ends(fresh, native):
    with fla_ops.use_backend("reference"):
        assert chosen() == REFERENCE
        with fla_ops.use_backend("native"):
            assert chosen() == NATIVE
            assert chosen("reference") == REFERENCE  # an argument wins
        assert chosen() == REFERENCE
        with fla_ops.use_backend("auto"):
            assert chosen() == NATIVE
        with pytest.raises(KeyError), fla_ops.use_backend("native"):
            raise KeyError
        assert chosen() == REFERENCE
    assert chosen() == NATIVE


def test_use_backend_is_one_threads_own(fresh, native):
    seen = []
    with fla_ops.use_backend("reference"):
        other = threading.Thread(target=lambda: seen.append(chosen()))
        other.start()
        other.join()
    assert seen == [NATIVE]


def test_use_backend_raises_like_the_argument(broken):
    with fla_ops.use_backend("native"), pytest.raises(RuntimeError, match="'native' cannot run here"):
        chosen()


def test_the_environment_steers_auto_only(fresh, native, monkeypatch):
    monkeypatch.setenv("FLA_OPS_BACKEND", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # asked for: no warning
        assert chosen() == REFERENCE
    assert chosen("native") == NATIVE
    with fla_ops.use_backend("native"):
        assert chosen() == NATIVE
    monkeypatch.setenv("FLA_OPS_BACKEND", "auto")
    assert chosen() == NATIVE


@pytest.mark.parametrize("value", ["cudaa", "Native", ""])
def test_a_wrong_environment_is_refused(fresh, monkeypatch, value):
    monkeypatch.setenv("FLA_OPS_BACKEND", value)
    with pytest.raises(ValueError, match=rf"environment variable FLA_OPS_BACKEND .*\"native\".*got '{value}'"):
        chosen()
    assert chosen("reference") == REFERENCE


# The fallback warning.


def test_falling_back_warns_once_with_cause_and_cure(broken):
    x = random_inputs(T=3)
    tokens = [x[n] for n in ("q", "k", "v", "beta", "g")]
    with pytest.warns(fla_ops.FallbackWarning) as seen:
        first = fla_ops.delta_rule(*tokens).o
        fla_ops.delta_rule(*tokens)
        fla_ops.delta_rule_step(*(t[:, 0] for t in tokens), state=torch.zeros(1, 2, 16, 16))
    assert len(seen) == 1
    text = str(seen[0].message)
    assert text.startswith("delta_rule runs on the slow reference: ")
    assert "the native library is not built" in text and "fla-ops build" in text  # cause and cure
    assert "fla-ops info" in text and 'backend="reference"' in text
    assert seen[0].filename == __file__  # points at the caller, not into fla_ops
    assert torch.equal(first, call(fla_ops.delta_rule, x, backend="reference").o)


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu"])
def test_other_devices_take_the_reference_with_one_warning(fresh, device):
    with pytest.warns(fla_ops.FallbackWarning, match=f"native takes cpu and cuda tensors, not {device}") as seen:
        assert chosen("auto", device) == chosen("auto", device) == REFERENCE
    assert len(seen) == 1


def test_each_cause_warns_once(broken):
    with pytest.warns(fla_ops.FallbackWarning) as seen:
        for device in ("cpu", "mps", "cpu", "mps"):
            chosen("auto", device)
    assert len(seen) == 2


def test_no_warning_when_the_reference_was_asked_for(broken):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen("reference")
        with fla_ops.use_backend("reference"):
            chosen()


# The report.


def test_backends_reports_every_op_and_reason(native, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    report = fla_ops.backends()
    assert report.keys() == set(_backend.OPS)
    assert json.loads(json.dumps(report)) == report
    for row in report.values():
        assert row.keys() == {"cpu", "cuda", "why_not"}
        assert "triton" in row["why_not"] and "reference" not in row["why_not"]
    assert report[OP]["cpu"] == "native" and "native" not in report[OP]["why_not"]


def test_backends_reports_a_missing_library(broken):
    report = fla_ops.backends()[OP]
    assert report["cpu"] == "reference"
    assert "not built" in report["why_not"]["native"]


def test_a_library_of_older_sources_is_a_reason(native):
    """After an update without a rebuild: no operator of the new version is missing at the first call."""
    from fla_ops._native import load

    assert load("delta_rule_forward") is None
    assert load("an_op_of_the_next_version") == (
        "the native library is older than this package; run `fla-ops build` to rebuild it"
    )


def test_the_tables_are_best_first():
    order = {name: i for i, name in enumerate(_backend.NAMES)}
    for op in _backend.OPS:
        names = [row.name for row in _backend.table(op)]
        assert names == sorted(names, key=order.get) and names[-1] == "reference"


# The public surface. A change here is a change of the API: it belongs in CHANGELOG.md.

T = "torch.Tensor"
SIGNATURES = {
    "causal_conv1d": (
        f"(x: {T}, weight: {T}, bias: {T} | None = None, *, activation: str | None = None, "
        f"initial_state: {T} | None = None, output_final_state: bool = False, cu_seqlens: {T} | None = None, "
        "backend: str = 'auto') -> fla_ops.causal_conv1d.CausalConv1dOutput"
    ),
    "causal_conv1d_step": (
        f"(x: {T}, weight: {T}, bias: {T} | None = None, *, state: {T}, activation: str | None = None, "
        f"state_indices: {T} | None = None, backend: str = 'auto') -> {T}"
    ),
    "delta_product": (
        f"(q: {T}, k: {T}, v: {T}, beta: {T}, g: {T} | None = None, *, num_householder: int, "
        f"scale: float | None = None, initial_state: {T} | None = None, output_final_state: bool = False, "
        f"cu_seqlens: {T} | None = None, qk_l2norm: bool = False, backend: str = 'auto') -> "
        "fla_ops.delta_product.DeltaProductOutput"
    ),
    "delta_product_step": (
        f"(q: {T}, k: {T}, v: {T}, beta: {T}, g: {T} | None = None, *, state: {T}, scale: float | None = None, "
        f"qk_l2norm: bool = False, state_indices: {T} | None = None, backend: str = 'auto') -> {T}"
    ),
    "delta_rule": (
        f"(q: {T}, k: {T}, v: {T}, beta: {T}, g: {T} | None = None, *, scale: float | None = None, "
        f"initial_state: {T} | None = None, output_final_state: bool = False, cu_seqlens: {T} | None = None, "
        "qk_l2norm: bool = False, backend: str = 'auto') -> fla_ops.delta_rule.DeltaRuleOutput"
    ),
    "delta_rule_step": (
        f"(q: {T}, k: {T}, v: {T}, beta: {T}, g: {T} | None = None, *, state: {T}, scale: float | None = None, "
        f"qk_l2norm: bool = False, state_indices: {T} | None = None, backend: str = 'auto') -> {T}"
    ),
    "exact_decode_attention": (
        f"(q: {T}, k: {T}, v: {T}, *, lengths: {T} | None = None, scale: float | None = None, "
        f"backend: str = 'auto') -> {T}"
    ),
    "selective_scan": (
        f"(u: {T}, delta: {T}, A: {T}, B: {T}, C: {T}, D: {T} | None = None, *, z: {T} | None = None, "
        f"delta_bias: {T} | None = None, delta_softplus: bool = False, initial_state: {T} | None = None, "
        f"output_final_state: bool = False, cu_seqlens: {T} | None = None, backend: str = 'auto') -> "
        "fla_ops.selective_scan.SelectiveScanOutput"
    ),
    "selective_scan_step": (
        f"(u: {T}, delta: {T}, A: {T}, B: {T}, C: {T}, D: {T} | None = None, *, state: {T}, z: {T} | None = None, "
        f"delta_bias: {T} | None = None, delta_softplus: bool = False, state_indices: {T} | None = None, "
        f"backend: str = 'auto') -> {T}"
    ),
    "temporal_sparse_attention": (
        f"(q: {T}, k: {T}, v: {T}, *, threshold: float | {T}, window: int | float, sink: int = 0, "
        f"window_mode: str = 'band', scale: float | None = None, cu_seqlens: {T} | None = None, "
        "return_stats: bool = False, backend: str = 'auto') -> "
        "fla_ops.temporal_sparse_attention.TemporalSparseAttentionOutput"
    ),
    "backends": "() -> dict[str, dict]",
    "check_values": "(on: bool) -> None",
    "param_groups": "(model: torch.nn.modules.module.Module, weight_decay: float) -> list[dict]",
    "use_backend": "(name: str)",
    "DeltaKVCache": (
        f"(*, threshold: float | {T}, window: int | float, sink: int = 0, window_mode: str = 'band', "
        "max_len: int | None = None, rollback: int = 0, backend: str = 'auto')"
    ),
    "DenseKV": f"(k: {T}, v: {T})",
    "CausalConv1dOutput": f"(y: {T}, final_state: {T} | None)",
    "DeltaProductOutput": f"(o: {T}, final_state: {T} | None)",
    "DeltaRuleOutput": f"(o: {T}, final_state: {T} | None)",
    "SelectiveScanOutput": f"(y: {T}, final_state: {T} | None)",
    "TemporalSparseAttentionOutput": (f"(o: {T}, stats: fla_ops.temporal_sparse_attention.TemporalSparseStats | None)"),
    "TemporalSparseStats": f"(zeros: {T}, skipped: {T})",
}


# What an op is called where not as its files.
OP_NAMES = {"decode_attention": "exact_decode_attention", "delta_kv_cache": "DeltaKVCache"}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    found = str(inspect.signature(getattr(fla_ops, name))).replace("Optional[torch.Tensor]", f"{T} | None")
    assert found == SIGNATURES[name]


@pytest.mark.parametrize(
    ("method", "signature"),
    [
        ("append", f"(self, k: {T}, v: {T}, *, mask: {T} | None = None, queries: int | None = None) -> None"),
        ("attend", f"(self, q: {T}, *, scale: float | None = None) -> {T}"),
        ("crop", "(self, length: int) -> None"),
        ("reorder", f"(self, indices: {T}) -> None"),
        ("reset", "(self) -> None"),
        ("to_dense", "(self) -> fla_ops.delta_kv_cache.DenseKV"),
    ],
)
def test_signature_of_the_cache(method, signature):
    found = str(inspect.signature(getattr(fla_ops.DeltaKVCache, method)))
    assert found.replace("Optional[torch.Tensor]", f"{T} | None") == signature


def test_every_public_name_is_pinned():
    values = {"__version__", "FallbackWarning"}  # not callables of ours
    modules = {name for name in fla_ops.__all__ if inspect.ismodule(getattr(fla_ops, name))}
    assert set(fla_ops.__all__) - values - modules == set(SIGNATURES)


def test_all_is_complete_and_documented():
    public = {n for n, x in vars(fla_ops).items() if not n.startswith("_") and not inspect.ismodule(x)}
    assert public <= set(fla_ops.__all__), public - set(fla_ops.__all__)
    for name in fla_ops.__all__:
        assert name == "__version__" or inspect.getdoc(getattr(fla_ops, name)), f"{name} has no docstring"
    for op in _backend.OPS:
        doc = getattr(fla_ops, OP_NAMES.get(op, op)).__doc__
        returns = () if op == "delta_kv_cache" else ("Returns:",)  # a class
        assert all(heading in doc for heading in ("Args:", *returns, "Raises:", "arXiv")), op


def test_the_version_has_one_source():
    from importlib.metadata import version

    assert version("fla_ops") == fla_ops.__version__


# Imports.


def modules():
    skipped = ("fla_ops._csrc",)  # C++ sources, packaged as data
    found = (m.name for m in pkgutil.walk_packages(fla_ops.__path__, "fla_ops."))
    return sorted(name for name in found if not name.startswith(skipped))


@pytest.mark.parametrize("name", modules())
def test_every_module_imports(name):
    if name == "fla_ops._C" or "._C" in name:
        pytest.importorskip("fla_ops._C", reason="no native library here")
    if name.startswith("fla_ops.integrations."):
        pytest.importorskip("transformers")
    importlib.import_module(name)


def in_fresh_process(code, **environment):
    """What `code` prints as JSON in a new interpreter, away from the checkout."""
    env = {k: v for k, v in os.environ.items() if k != _backend.ENVIRONMENT} | environment
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_is_light():
    """No Triton, no native library, no transformers, no call into torch.cuda, and well under a second over torch."""
    seen = in_fresh_process("""
import json, sys, time, types
import torch
touched = []
for name, value in list(vars(torch.cuda).items()):
    if isinstance(value, types.FunctionType):
        def recorded(*a, _name=name, _value=value, **k):
            touched.append(_name)
            return _value(*a, **k)
        setattr(torch.cuda, name, recorded)
before = set(sys.modules)
start = time.perf_counter()
import fla_ops
seconds = time.perf_counter() - start
new = sorted(set(sys.modules) - before)
print(json.dumps({"touched": touched, "seconds": seconds, "new": new}))
""")
    assert seen["touched"] == []
    assert seen["seconds"] < 1
    assert "torch._dynamo" not in seen["new"]
    roots = {name.split(".")[0] for name in seen["new"]}
    assert not roots & {"triton", "transformers", "numpy", "matplotlib", "tqdm", "fla", "kernels"}, roots
    assert not {"fla_ops._C", "fla_ops.kernels"} & set(seen["new"])


def test_imports_and_runs_with_triton_blocked():
    found = in_fresh_process("""
import json, sys
sys.modules["triton"] = None
import torch, fla_ops
o = fla_ops.delta_rule(*(torch.ones(1, 2, 1, 1) for _ in "qkv"), torch.ones(1, 2, 1), backend="reference").o
print(json.dumps(o.flatten().tolist()))
""")
    assert found == [1.0, 1.0]


def test_a_fork_after_the_import_can_compute():
    found = in_fresh_process("""
import json, os, torch, fla_ops
x = torch.ones(1, 2, 1, 1)
run = lambda: fla_ops.delta_rule(x, x, x, x[..., 0], backend="reference").o.flatten().tolist()
read, write = os.pipe()
if os.fork() == 0:
    os.write(write, json.dumps(run()).encode())
    os._exit(0)
os.wait()
print(os.read(read, 1000).decode())
""")
    assert found == [1.0, 1.0]


def imports(path):
    """(module, level) of every import statement in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


def sources(folder):
    return [p for p in sorted(Path(folder).rglob("*.py")) if "_csrc" not in p.parts]


KERNELS = Path(importlib.import_module("fla_ops.kernels").__file__).parent


def test_only_kernels_imports_triton():
    assert ROOT.joinpath("delta_rule.py") in sources(ROOT)
    inside = KERNELS.resolve()
    for path in sources(ROOT):
        if not path.resolve().is_relative_to(inside):
            roots = {module.split(".")[0] for module, level in imports(path) if not level}
            assert "triton" not in roots, path


def test_imports_run_one_way():
    """reference and kernels import nothing of the package above them; _native does not know the ops."""
    for folder in (ROOT / "reference", KERNELS):
        for path in sources(folder):
            for module, level in imports(path):
                assert level <= 1, f"{path}: imports from above its folder"
                assert module.split(".")[0] != "fla_ops", f"{path}: imports fla_ops"
    for path in sources(ROOT / "_native"):
        assert all(level <= 1 for module, level in imports(path)), path
    for op in _backend.OPS:
        roots = {module.split(".")[0] for module, level in imports(ROOT / f"{op}.py") if level}
        assert not roots & {"layers", "compat", "integrations", "cli", "testing", "kernels", "_native"}, op
    for path in sources(ROOT / "layers"):
        found = {module.split(".")[0] for module, level in imports(path) if level == 2}
        assert not found & {"compat", "integrations", "cli", "testing", "kernels", "_native", "reference"}, path
