# SPDX-License-Identifier: Apache-2.0
"""The `fla-ops` script: each command's output and exit code, in a process of its own where that is what users see."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fla_ops
from fla_ops import cli
from fla_ops.commands import demo_text
from fla_ops.commands.demo_model import WIDTH, LanguageModel, output_projection
from fla_ops.commands.demo_speed import _layers_on, chunked_delta_rule, plain_torch, product_by
from fla_ops.reference.delta_product import delta_product as reference_delta_product
from fla_ops.reference.delta_rule import delta_rule as reference_delta_rule
from fla_ops.reference.delta_rule import l2norm


def run(*args: str, **environment: str) -> subprocess.CompletedProcess:
    """`fla-ops ARGS` in a new process, as installed: the working directory is not on sys.path."""
    code = "import sys; from fla_ops.cli import main; sys.exit(main(sys.argv[1:]))"
    env = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=env, check=False)


def test_info_names_the_backend_of_every_op_and_each_reason(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for op, row in fla_ops.backends().items():
        assert f"{op}\n  CPU tensors: {row['cpu']}" in text
        for name, reason in row["why_not"].items():
            assert f"{name} cannot run here: {reason}" in text


def test_info_json_is_what_backends_returns(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ops"] == fla_ops.backends()
    assert found["torch"] == torch.__version__ and found["fla_ops"] == fla_ops.__version__
    assert found["cpu"]["threads"] == torch.get_num_threads()


def test_info_needs_no_extra():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['tqdm', 'matplotlib', 'tabulate', 'transformers', 'pytest']));"
        "from fla_ops.cli import main; sys.exit(main(['info']))"
    )
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr


def test_selftest_passes_and_reports_every_op_backend_and_dtype(capsys):
    assert cli.main(["selftest"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ok")]
    for op, row in fla_ops.backends().items():
        for backend in {"native", "reference"} - set(row["why_not"]):
            for dtype in ("float64", "float32", "bfloat16", "float16"):
                assert any(op in line and backend in line and dtype in line for line in lines), (op, backend, dtype)


def test_selftest_fails_when_a_kernel_is_wrong(capsys, monkeypatch):
    right = fla_ops.causal_conv1d

    def wrong(*args, **kwargs):
        y, state = right(*args, **kwargs)
        return y * 1.01, state

    monkeypatch.setattr(fla_ops, "causal_conv1d", wrong)
    assert cli.main(["selftest"]) == 1
    assert "FAIL causal_conv1d" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("mixer", cli.MIXERS)
def test_demo_draws_its_figure_and_prints_every_row(mixer, tmp_path):
    text = tmp_path / "text"
    text.write_bytes(demo_text.load(None)[0][:24_000])
    figure = tmp_path / "figure.png"
    args = ("--mixer", mixer, "--seconds", "2", "--text", str(text), "--out", str(figure))
    done = run("demo", *args)
    assert done.returncode == 0, done.stderr
    assert figure.read_bytes().startswith(b"\x89PNG") and str(figure) in done.stdout
    for row in (
        f"fla_ops {mixer}",
        "unigram",
        "order-4 context model",
        "bzip2, held-out text alone",
        "bzip2, after the training text",
        "stays ahead",
        "the same",
        "fla_ops kernels",
        "naive reference",
        "plain torch",
    ):
        assert row in done.stdout, row


def test_demo_baselines_of_the_default_text_are_the_known_ones():
    train, held = demo_text.load(None)
    found = demo_text.baselines(train, held)
    assert 4.4 < found["unigram"] < 5.0
    assert found["order-4 context model"] < found["unigram"] / 2
    assert found["bzip2, after the training text"] < found["bzip2, held-out text alone"]


def test_context_model_is_a_probability():
    """Summed over all next bytes, the probabilities that the bits stand for are 1."""
    total = sum(2 ** -demo_text.context_model(b"abracadabra" * 5 + b"abra", bytes([b])) for b in range(256))
    assert total == pytest.approx(1)


def test_the_demos_own_chunked_form_is_the_delta_rule():
    """It stands in for transformers' where that is missing; a baseline that computes something else is no baseline."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 150, 3, 16, dtype=torch.float64) for _ in range(3))
    beta, g = torch.rand(2, 150, 3).double(), -torch.rand(2, 150, 3).double()
    state = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        o, final = chunked_delta_rule(l2norm(q), l2norm(k), v, beta, g, state)
    finally:
        torch.set_default_dtype(torch.float32)
    options = {"initial_state": state, "output_final_state": True, "qk_l2norm": True}
    expected, expected_final = reference_delta_rule(q, k, v, beta, g, **options)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(final, expected_final)


def test_the_demos_mixers_are_of_one_size():
    sizes = {name: sum(p.numel() for p in build(WIDTH, "auto").parameters()) for name, build in cli.MIXERS.items()}
    assert set(sizes) == {"deltanet", "gated_deltanet", "gated_delta_product", "mamba"}
    assert all(80_000 < size < 90_000 for size in sizes.values()), sizes


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_demos_form_of_delta_product_without_a_kernel_is_delta_product(n):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, T, 3, 16, dtype=torch.float64) for T in (70, 70 * n, 70 * n))
    beta, g = torch.rand(2, 70 * n, 3).double(), -torch.rand(2, 70, 3).double()
    state = torch.randn(2, 3, 16, 16, dtype=torch.float64)

    def plain(q, k, v, beta, g, state):
        return reference_delta_rule(q, k, v, beta, g, initial_state=state, output_final_state=True)

    o, final = product_by(plain, q, k, v, beta, g, state, n)
    options = {"num_householder": n, "initial_state": state, "output_final_state": True}
    expected, expected_final = reference_delta_product(q, k, v, beta, g, **options)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(final, expected_final)


@pytest.mark.parametrize("mixer", cli.MIXERS)
def test_the_demos_baseline_is_the_same_model(mixer):
    """With the plain-torch form in the place of the ops, a model says what it says on them."""
    model = LanguageModel(mixer, "reference")
    with torch.no_grad():
        for block in model.blocks:  # blocks start as the identity
            output_projection(block.mixer).weight.normal_(std=0.1)
            block.mlp.down.weight.normal_(std=0.1)
    tokens = torch.randint(256, (2, 70))
    with torch.no_grad():
        expected = model(tokens)[0]
        with _layers_on(plain_torch(mixer)[1]):
            found = model(tokens)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--text", "/no/such/file"], "argument '--text' must be a readable file, got /no/such/file"),
        (["--seconds", "0"], "argument '--seconds' must be > 0, got 0.0"),
        (["--out", "/no/such/folder/x.png"], "argument '--out' must be in a folder that exists"),
    ],
)
def test_demo_says_what_is_wrong_with_an_argument(args, message, capsys):
    assert cli.main(["demo", *args]) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        (["demo"], "tqdm", "demo"),
        (["demo"], "matplotlib", "demo"),
        (["bench"], "tabulate", "bench"),
        (["bench", "--all"], "pytest_benchmark", "bench"),
    ],
)
def test_a_missing_extra_is_one_line_with_the_pip_command(command, module, extra, capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert module in error and f"pip install 'fla_ops[{extra}]'" in error


def test_build_shows_the_compilers_words_when_it_fails(tmp_path):
    compiler = tmp_path / "broken++"
    compiler.write_text("#!/bin/sh\necho 'error: the disk is made of cheese' >&2\nexit 3\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    library = Path(fla_ops.__file__).parent / "_C.abi3.so"
    before = library.stat().st_mtime_ns if library.exists() else None
    done = run("build", CXX=str(compiler))
    assert done.returncode == 1
    assert "the disk is made of cheese" in done.stderr and "Traceback" not in done.stderr
    assert (library.stat().st_mtime_ns if library.exists() else None) == before, "the library was touched"


def test_build_without_a_compiler_says_what_to_install(tmp_path):
    done = run("build", PATH=str(tmp_path), CXX="")
    assert done.returncode == 1
    assert "no C++ compiler on PATH" in done.stderr and "Traceback" not in done.stderr


def test_bench_short_list_prints_ratios():
    done = run("bench", "causal_conv1d", "--seconds", "0.05")
    assert done.returncode == 0, done.stderr
    assert "F.conv1d+SiLU" in done.stdout and "1.00x" in done.stdout


def test_bench_suite_collects_every_family():
    bench = Path(fla_ops.__file__).parent.parent / "bench"
    if not bench.exists():
        pytest.skip("bench/ is part of a checkout")
    command = [sys.executable, "-m", "pytest", str(bench), "--collect-only", "-q"]
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for op in fla_ops.backends():
        assert f"bench_{op}" in done.stdout
