# SPDX-License-Identifier: Apache-2.0
"""The suite sees what it is there for: each fault below, planted in a copy of the Triton kernels, fails a test named.

Four kinds of fault. A dropped mask and a swapped operand change values, which the comparison with the reference sees,
or touch memory that is not the kernel's, which the watch of test_out_of_bounds.py sees; a 32-bit offset is the latter
(`make report` looks for those too, in what the compiler makes of every kernel). A missing barrier cannot be seen here,
since Triton's interpreter runs a program as one thread: `test_a_barrier_dropped_from_a_real_kernel_shows` in
test_simt.py takes out each one of the CUDA kernels. Faults of values in a CUDA kernel are at the end of this file.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import simt
import torch
from temporal_sparse_attention_cases import check, random_inputs

from fla_ops import _build, _native

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
VALUES = r" in assert_matches_reference\n(.*\n)*E +AssertionError"
MEMORY = r"AssertionError: \w+: (load|store) of \d+ elements outside of all of its tensors"


class Fault(NamedTuple):
    what: str
    file: str  # of kernels/
    text: str  # stands there once
    instead: str
    test: str
    seen: str = VALUES


FAULTS = [
    Fault(
        "dropped mask: channels behind a row's end are read as its own",
        "_tiles.py",
        "tl.load(source + at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)",
        "tl.load(source + at, mask=(row < rows)[:, None], other=0.0)",
        "test_delta_rule_triton.py::test_every_row_in_bfloat16[20-36-sm_80]",
    ),
    Fault(
        "dropped mask: rows behind the last token are read; their factors are 0, which hides all but NaN",
        "_tiles.py",
        "tl.load(source + at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)",
        "tl.load(source + at, mask=(column < columns)[None, :], other=0.0)",
        "test_out_of_bounds.py::test_delta_rule[nothing fits-batch]",
        MEMORY,
    ),
    Fault(
        "dropped mask: rows behind the last token are written",
        "_tiles.py",
        "tl.store(target + at, x, mask=(row < rows)[:, None] & (column < columns)[None, :])",
        "tl.store(target + at, x, mask=(column < columns)[None, :])",
        "test_out_of_bounds.py::test_delta_rule[nothing fits-batch]",
        MEMORY,
    ),
    Fault(
        "dropped mask: queries see the later keys of their chunk",
        "delta_rule_prepare.py",
        "tl.where(j <= i, kq, 0.0)",
        "kq",
        "test_delta_rule.py::test_lengths[triton-gated-17]",
    ),
    Fault(
        "swapped operands: k q^T for q k^T",
        "delta_rule_prepare.py",
        "kq = dot(k_tile, tl.trans(q_tile), kq, PRECISION)",
        "kq = dot(q_tile, tl.trans(k_tile), kq, PRECISION)",
        "test_delta_rule.py::test_lengths[triton-gated-17]",
    ),
    Fault(
        "swapped operands: blocks of the inverse, which do not commute",
        "delta_rule_prepare.py",
        "fine_dot(Z, N, None, PRECISION)",
        "fine_dot(N, Z, None, PRECISION)",
        "test_delta_rule_triton.py::test_live_rows[one-63]",
    ),
    Fault(
        "swapped operands: the decay from a chunk's start for the one to its end",
        "delta_rule_prepare.py",
        "tl.store(factors + 2 * BT, tl.exp(after) * k_norm)",
        "tl.store(factors + 2 * BT, tl.exp(before) * k_norm)",
        "test_delta_rule.py::test_lengths[triton-gated-17]",
    ),
    Fault(
        "swapped operands: new values and their gradient in the keys' gradient",
        "delta_rule_gradients.py",
        "over = dot(tl.trans(X_tile), dR_tile, over, PRECISION)",
        "over = dot(tl.trans(dR_tile), X_tile, over, PRECISION)",
        "test_delta_rule.py::test_lengths[triton-gated-17]",
    ),
    Fault(
        "swapped operands: a filter's taps from the other end",
        "causal_conv1d.py",
        "z += weight[s] * taps[s]",
        "z += weight[W - 1 - s] * taps[s]",
        "test_causal_conv1d.py::test_backend_matches_reference[triton-torch.float64]",
    ),
    Fault(
        "dropped mask: the scan's steps behind a segment's end still decay its state",
        "selective_scan.py",
        "            size = tl.where(t + i < last, size, 0)  # steps behind the end change nothing\n",
        "",
        "test_selective_scan_triton.py::test_edges_of_checkpoints[33]",
    ),
    Fault(
        "dropped mask: the scan writes steps behind the last",
        "selective_scan.py",
        "mask=when(t + i < last, live)",
        "mask=live",
        "test_out_of_bounds.py::test_selective_scan[nothing fits-whole-batch]",
        MEMORY,
    ),
    Fault(
        "swapped operands: the gradient of B takes the state's for its own gradient",
        "selective_scan_backward.py",
        "tl.sum(written[None, :] * G, 1)",
        "tl.sum(written[None, :] * h, 1)",
        "test_selective_scan_triton.py::test_edges_of_checkpoints[33]",
    ),
    Fault(
        "dropped mask: queries see later keys",
        "temporal_sparse_attention.py",
        's = tl.where(j[None, :] <= i[:, None], s * FACTOR, float("-inf"))',
        "s = s * FACTOR",
        "test_temporal_sparse_attention.py::test_lengths[triton-65]",
    ),
    Fault(
        "dropped mask: rows behind the last key or query are read",
        "_sparse.py",
        "tl.load(at + place, mask=(row < last)[:, None] & (column < D)[None, :], other=0)",
        "tl.load(at + place, mask=(column < D)[None, :], other=0)",
        "test_out_of_bounds.py::test_temporal_sparse_attention[one token-batch-triton]",
        MEMORY,
    ),
    Fault(
        "swapped operands: held keys for near ones where a tile has both",
        "_sparse.py",
        "s = tl.where(is_near(i[:, None], j[None, :], window, sink, BLOCKS), s, far)",
        "s = tl.where(is_near(i[:, None], j[None, :], window, sink, BLOCKS), far, s)",
        "test_temporal_sparse_attention.py::test_lengths[triton-65]",
    ),
    Fault(
        "swapped operands: the gradients of near keys and of held ones",
        "temporal_sparse_attention_backward.py",
        "dheld = dot(cast(tl.where(near, 0.0, ds) if NEAR else ds, low), queries, dheld, PRECISION)",
        "dheld = dot(cast(tl.where(near, ds, 0.0) if NEAR else ds, low), queries, dheld, PRECISION)",
        "test_temporal_sparse_attention.py::test_lengths[triton-65]",
    ),
    Fault(
        "swapped operands: a held key's gradient stays where it fired, and goes back where it did not",
        "temporal_sparse_attention_backward.py",
        "later = tl.where(stays, later, 0.0)",
        "later = tl.where(stays, 0.0, later)",
        "test_temporal_sparse_attention.py::test_lengths[triton-65]",
    ),
    Fault(
        "32-bit offset: of a step of the scan behind 2^31 elements",
        "_scan.py",
        "at + tl.cast(first + i, tl.int64) * stride, mask=when",
        "at + tl.cast((tl.cast(first + i, tl.int64) * stride).to(tl.int32), tl.int64), mask=when",
        "test_out_of_bounds.py::test_selective_scan_offsets_beyond_32_bits[step]",
        MEMORY,
    ),
    Fault(
        "32-bit offset: of a batch row behind 2^31 elements",
        "delta_rule_prepare.py",
        "batch = batch.to(tl.int64)",
        "batch = batch.to(tl.int32)",
        "test_out_of_bounds.py::test_delta_rule_offsets_beyond_32_bits[batch]",
        MEMORY,
    ),
]


@pytest.fixture
def package(tmp_path):
    """A copy of the package without its native library, laid out as it is installed."""
    kept_out = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fla_ops", tmp_path / "fla_ops", ignore=kept_out)
    shutil.copytree(ROOT / "kernels", tmp_path / "fla_ops" / "kernels", ignore=kept_out)
    return tmp_path / "fla_ops"


def run(package, tests):
    """(exit code, output) of tests in a process of their own, whose `fla_ops` is `package`."""
    ours = ("PYTEST_", "FLA_OPS_")  # an outer pytest's workers and options
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    env |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/{test}" for test in tests)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_faultless_copy_of_the_triton_kernels_passes(package):
    """So that a failure below is the fault's. Every test is one of its own, none is skipped."""
    tests = sorted({fault.test for fault in FAULTS})
    code, output = run(package, tests)
    assert code == 0 and re.search(rf"^{len(tests)} passed in", output, re.MULTILINE), output[-4000:]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_fault_in_a_triton_kernel_is_caught(fault, package):
    """Exit code 1 is a failed test; 2, 4 and 5 are errors of the planting."""
    path = package / "kernels" / fault.file
    source = path.read_text(encoding="utf-8")
    assert source.count(fault.text) == 1, f"kernels/{fault.file} has changed: plant this fault anew. {fault.what}"
    path.write_text(source.replace(fault.text, fault.instead), encoding="utf-8")
    code, output = run(package, [fault.test])
    assert code == 1 and re.search(fault.seen, output), f"{fault.what}: exit code {code}\n{output[-4000:]}"


class CudaFault(NamedTuple):
    what: str
    file: str  # of csrc/
    text: str  # stands there once
    instead: str
    op: str  # the operator whose kernels are compiled anew
    user: str  # the file that defines it


CUDA_FAULTS = [
    CudaFault(
        "dropped mask: queries see later keys",
        "temporal_sparse_attention_cuda.h",
        "return j <= i && (j >= begin || j < sink) == exactly;",
        "return (j >= begin || j < sink) == exactly;",
        "temporal_sparse_attention_forward",
        "temporal_sparse_attention_cuda.cu",
    ),
    CudaFault(
        "swapped operands: P for dS in the gradient of queries",
        "temporal_sparse_attention_backward_cuda.cu",
        "add_weighted(sums.dq, n, shared.ds, shared.slice, keys, Everywhere());",
        "add_weighted(sums.dq, n, shared.p, shared.slice, keys, Everywhere());",
        "temporal_sparse_attention_backward",
        "temporal_sparse_attention_backward_cuda.cu",
    ),
]


@pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))
@pytest.mark.parametrize("fault", CUDA_FAULTS, ids=lambda fault: fault.what)
def test_a_fault_in_a_cuda_kernel_is_caught(fault, tmp_path, monkeypatch):
    x = random_inputs(1, 40, 1, 1)
    with simt.as_native("ascending"):
        check("native", x, threshold=0.3, window=3)
        mutant = f"fla_ops_simt_fault_{CUDA_FAULTS.index(fault)}"
        others = {path.name for path in _build.cuda_sources(simt.CSRC)} - {fault.user}
        copy = shutil.copytree(simt.CSRC, tmp_path / "csrc", ignore=lambda _, names: set(names) & others)
        source = (copy / fault.file).read_text(encoding="utf-8")
        assert source.count(fault.text) == 1, f"csrc/{fault.file} has changed: plant this fault anew. {fault.what}"
        (copy / fault.file).write_text(source.replace(fault.text, fault.instead), encoding="utf-8")
        _build.build_simt(copy, tmp_path / "mutant.so", mutant, options=["-O0"])
        torch.ops.load_library(tmp_path / "mutant.so")
        both = ("temporal_sparse_attention_forward", "temporal_sparse_attention_backward")
        ops = {name: getattr(torch.ops, mutant if name == fault.op else "fla_ops_simt") for name in both}
        ops = SimpleNamespace(**{name: getattr(library, name) for name, library in ops.items()})
        with monkeypatch.context() as patch, pytest.raises(AssertionError, match="max error"):
            patch.setattr(_native, "ops", ops)
            check("native", x, threshold=0.3, window=3)
