# SPDX-License-Identifier: Apache-2.0
"""The shim that runs the CUDA kernels on the host: it must be right, and must stop what a GPU would let pass.

Its own kernels are in simt_kernels.cu. A wrong kernel ends the process, so each one runs in its own.
"""

import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import simt
import torch

from fla_ops import _build, causal_conv1d, temporal_sparse_attention
from fla_ops.reference.causal_conv1d import causal_conv1d as reference

pytestmark = pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))

HERE = Path(__file__).parent
ORDERS = simt.LANE_ORDERS


@pytest.fixture(scope="module", params=["assembly", "ucontext"])
def kernels(request, tmp_path_factory):
    """`kernels("name", "ascending")` runs one kernel of simt_kernels.cu; with both ways to switch."""
    program = tmp_path_factory.mktemp(request.param) / "simt_kernels"
    flags = _build.simt_flags(simt.CSRC) + ["-DFLA_SIMT_UCONTEXT"] * (request.param == "ucontext")
    sources = [HERE / "simt_kernels.cu", simt.CSRC / "simt_shim.cpp"]
    command = [_build.compiler(), *flags, "-Wall", "-x", "c++", *sources, "-o", program]
    subprocess.run(list(map(str, command)), check=True)

    def run(name, order):
        return subprocess.run([program, name, order], capture_output=True, text=True, check=False)

    return run


def numbers(done):
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


RIGHT = {
    "reverse": [63.0 - i for i in range(64)],
    "block_sum": [63.0 * 32] * 64,
    "rotate_twice": [(i + 2.0) % 64 for i in range(64)],
}


@pytest.mark.parametrize("order", ORDERS)
def test_barriers(kernels, order):
    for name, expected in RIGHT.items():
        assert numbers(kernels(f"{name}<true>", order)) == expected, name


@pytest.mark.parametrize("name", RIGHT)
def test_a_dropped_barrier_shows(kernels, name):
    """In one lane order at least, the result is wrong."""
    results = [numbers(kernels(f"{name}<false>", order)) for order in ORDERS]
    assert any(result != RIGHT[name] for result in results)


@pytest.mark.parametrize("order", ORDERS)
def test_shared_memory_is_poisoned_before_every_block(kernels, order):
    assert all(math.isnan(x) for x in numbers(kernels("unwritten", order)))


@pytest.mark.parametrize("order", ORDERS)
def test_warp_intrinsics(kernels, order):
    def shuffled(source):
        """Lane i of each warp gets what lane source(i) has."""
        return [32 * warp + source(i) for warp in range(2) for i in range(32)]

    expected = [
        shuffled(lambda i: 5),
        shuffled(lambda i: i // 8 * 8 + 1),
        shuffled(lambda i: (i + 1) % 32),
        shuffled(lambda i: i - 3 if i >= 3 else i),
        shuffled(lambda i: i - 3 if i % 8 >= 3 else i),
        shuffled(lambda i: i + 2 if i < 30 else i),
        shuffled(lambda i: i + 2 if i % 16 < 14 else i),
        shuffled(lambda i: i ^ 16),
        shuffled(lambda i: i ^ 1),
        [7] * 64,
        [0] * 32 + [1] * 32,
        [1] * 32 + [0] * 32,
    ]
    found = numbers(kernels("intrinsics", order))
    assert [found[i : i + 64] for i in range(0, len(found), 64)] == expected


@pytest.mark.parametrize("order", ORDERS)
def test_three_dimensions(kernels, order):
    assert numbers(kernels("three_dimensions", order)) == [1000.0 * b + t for b in range(8) for t in range(64)]


PLACE = r"\S*simt_kernels\.cu:\d+"


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "barrier_after_exit": rf"threads 0-47: at __syncthreads, {PLACE}\n  threads 48-63: exited",
        "two_barriers": rf"threads 0-31: at __syncthreads, {PLACE}\n  threads 32-63: at __syncthreads, {PLACE}",
        "barrier_and_shuffle": rf"threads 0, 2, 4, .*: at __shfl_sync, {PLACE}\n  threads 1, 3, .*: at __syncthreads",
        "two_shuffles": r"lanes of a warp wait at different places",
        "narrow_mask": r"mask of __shfl_xor_sync leaves out live lanes",
        "exited_lane": r"thread 32 reads from lane 1, which has exited",
        "behind_shared_memory": r"wrote behind the 256 bytes of dynamic shared memory",
        "too_much_shared_memory": r"102400 bytes of dynamic shared memory; every GPU has only 99 KB",
        "too_many_threads": r"1 to 1024 threads",
        "too_large_a_grid": r"grid is limited",
    }.items(),
)
@pytest.mark.parametrize("order", ORDERS)
def test_what_is_undefined_on_a_gpu_stops_the_process(kernels, name, said, order):
    done = kernels(name, order)
    assert done.returncode < 0, done.stdout  # by a signal
    assert re.match(rf"fla_ops simt: kernel {name}, block \(0, 0, 0\)", done.stderr), done.stderr
    assert re.search(said, done.stderr), done.stderr


def test_an_empty_grid_is_no_launch(kernels):
    assert numbers(kernels("empty_grid", "ascending")) == [-1.0]


# The package's kernels.


@pytest.mark.parametrize("order", ORDERS)
def test_runs_the_cuda_kernels(order):
    x, weight = torch.randn(2, 3, 40), torch.randn(3, 4)
    with simt.as_native(order):
        y = causal_conv1d(x, weight, backend="native").y
    torch.testing.assert_close(y, reference(x.double(), weight.double())[0].float())


def conv_gradients(ops):
    x, weight, dy = torch.randn(1, 40, 1000), torch.randn(40, 4), torch.randn(1, 40, 1000)
    return ops.causal_conv1d_backward(x, weight, None, None, None, False, dy, None, 15)


def delta_rule_gradients(ops):
    q, k, v, do = (torch.randn(1, 40, 1, 64) for _ in range(4))
    k, beta, g = k / 8, torch.rand(1, 40, 1), -torch.rand(1, 40, 1)
    states = torch.ops.fla_ops_simt.delta_rule_forward(q, k, v, beta, g, 0.1, None, None, False, True)[2]
    return ops.delta_rule_backward(q, k, v, beta, g, 0.1, None, None, False, states, do, None, 63)


def delta_product_gradients(ops):
    q, do = (torch.randn(1, 20, 1, 64) for _ in range(2))
    k, v = (torch.randn(1, 40, 1, 64) for _ in range(2))
    k, beta, g = k / 8, torch.rand(1, 40, 1), -torch.rand(1, 20, 1)
    states = torch.ops.fla_ops_simt.delta_product_forward(q, k, v, beta, g, 2, 0.1, None, None, False, True)[2]
    return ops.delta_product_backward(q, k, v, beta, g, 2, 0.1, None, None, False, states, do, None, 63)


def selective_scan_gradients(ops):
    """Two slices of the states, and more channels than a block has rows."""
    u, delta, z, dy = (torch.randn(1, 6, 20) for _ in range(4))
    A, B, C = -torch.rand(6, 40), torch.randn(1, 1, 40, 20), torch.randn(1, 1, 40, 20)
    given = (u, delta, A, B, C, torch.randn(6), z, torch.randn(6), None, None, True)
    states = torch.ops.fla_ops_simt.selective_scan_forward(*given, True)[2]
    return ops.selective_scan_backward(*given, states, dy, None, 511)


def sparse_gradients(ops):
    """More slices of a row than one, and the counts of what fired, which four warps add up."""
    q, k, v, do = (torch.randn(1, 40, 1, D) for D in (100, 100, 70, 70))
    given = (q, k, v, torch.full((1, 100), 0.5), None, 0.1, 3, False, 0, True)
    o, norms, fired = ops.temporal_sparse_attention_forward(*given, True)
    good_o, good_norms, _ = torch.ops.fla_ops_simt.temporal_sparse_attention_forward(*given, True)
    gradients = ops.temporal_sparse_attention_backward(*given, good_o, good_norms, do, 7)
    return o, norms, fired, *gradients


# Where the barriers are: what has to be compiled with the file, and results that need every one of them.
BARRIERS = {
    "causal_conv1d_cuda.cu": ([], conv_gradients),
    "delta_product_backward_cuda.cu": ([], delta_product_gradients),
    "delta_rule_backward_cuda.cu": ([], delta_rule_gradients),
    "selective_scan_backward_cuda.cu": ([], selective_scan_gradients),
    "temporal_sparse_attention_cuda.h": (
        ["temporal_sparse_attention_cuda.cu", "temporal_sparse_attention_backward_cuda.cu"],
        sparse_gradients,
    ),
}


@pytest.mark.slow
def test_a_barrier_dropped_from_a_real_kernel_shows(tmp_path):
    """Each __syncthreads of the kernels, taken out of a copy, changes a result in one of the lane orders."""
    simt.load()
    barrier = "__syncthreads();"
    sources = {path.name: path.read_text() for path in _build.cuda_sources(simt.CSRC)}
    headers = {path.name: path.read_text() for path in simt.CSRC.glob("*_cuda.h")}
    assert {name for name, text in (sources | headers).items() if barrier in text} == set(BARRIERS)
    for name, (users, gradients) in BARRIERS.items():

        def in_both_orders(ops, gradients=gradients):
            for order in ORDERS:
                torch.manual_seed(0)
                with simt.lane_order(order, ops), simt.lane_order(order):
                    yield torch.cat([d.flatten() for d in gradients(ops)])

        right, other = in_both_orders(torch.ops.fla_ops_simt)
        assert torch.equal(right, other)
        pieces = (sources | headers)[name].split(barrier)
        for i in range(1, len(pieces)):
            mutant = f"fla_ops_simt_{Path(name).stem}_{i}"
            copy = tmp_path / mutant
            left_out = set(sources) - {name, *users}
            shutil.copytree(simt.CSRC, copy, ignore=lambda _, names, left_out=left_out: set(names) & left_out)
            (copy / name).write_text(barrier.join(pieces[:i]) + barrier.join(pieces[i:]))
            # Barriers do the same without the compiler's optimisation, which takes most of the time.
            _build.build_simt(copy, copy / "mutant.so", mutant, options=["-O0"])
            torch.ops.load_library(copy / "mutant.so")
            found = in_both_orders(getattr(torch.ops, mutant))
            assert not all(torch.equal(right, got) for got in found), f"{name}: barrier {i} can go"


def conv_calls(dtype):
    """Every kernel of the convolution: two layouts, packed and not, steps, more strips than one."""
    x, weight, bias = torch.randn(1, 7, 90).to(dtype), torch.randn(7, 4).to(dtype), torch.randn(7).to(dtype)
    for layout in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        for bounds in (None, torch.tensor([0, 1, 1, 40, 90], dtype=torch.int32)):
            N = 1 if bounds is None else 4
            state = torch.randn(N, 7, 3)
            yield "forward", (layout, weight, bias, state, bounds, True)
            yield "backward", (layout, weight, bias, state, bounds, True, layout, state, 15)
    yield "step", (x[0].T, weight, bias, torch.randn(90, 7, 3), True, None)
    yield "step", (x[0, :, :3].T, weight, bias, torch.randn(5, 7, 3), False, torch.tensor([4, -1, 0]))


def scan_calls(dtype):
    """Every kernel of the selective scan: one slice of states and two, constants and groups, packed and not, steps."""
    for N in (5, 40):
        u, delta, z = (torch.randn(1, 12, 90).to(dtype) for _ in range(3))
        A, D, bias = -torch.rand(12, N), torch.randn(12), torch.randn(12)
        B, C, constant = torch.randn(1, 2, N, 90).to(dtype), torch.randn(1, 3, N, 90).to(dtype), torch.randn(12, N)
        for b, c, bounds in ((B, C, None), (constant, C, torch.tensor([0, 1, 1, 40, 90])), (B, constant, None)):
            state = torch.randn(1 if bounds is None else 4, 12, N)
            given = (u, delta, A, b, c, D, z, bias, state, bounds, True)
            yield "forward", (*given, True)
            states = torch.ops.fla_ops_simt.selective_scan_forward(*given, True)[2]
            yield "backward", (*given, states, z, state, 511)
        rows = [x[0, :, :3].T for x in (u, delta, z)]
        b, c = B[0, ..., :3].permute(2, 0, 1), constant.expand(3, 12, N).to(dtype)
        slots = torch.tensor([4, -1, 0])
        yield "step", (*rows[:2], A, b, c, D, rows[2], bias, torch.randn(5, 12, N), False, slots)


def sparse_calls(dtype):
    """Every kernel of temporal-sparse attention: both windows, sinks, packed and not, two slices of a row, fewer
    queries than keys, and none held."""
    q, k, v, do = (torch.randn(1, 70, heads, D).to(dtype) for heads, D in ((4, 70), (2, 70), (2, 40), (4, 40)))
    theta = torch.rand(2, 70, dtype=torch.promote_types(dtype, torch.float32))
    bounds = torch.tensor([0, 1, 1, 40, 70])
    for rows, cu, options in (
        (70, bounds, (4, True, 1, True)),
        (33, None, (9, False, 0, True)),
        (70, None, (1, False, 0, False)),
    ):
        given = (q[:, -rows:], k, v, theta, cu, 0.2, *options)
        yield "forward", (*given, True)
        o, norms, _ = torch.ops.fla_ops_simt.temporal_sparse_attention_forward(*given, True)
        yield "backward", (*given, o, norms, do[:, -rows:], 7)


CALLS = {
    "causal_conv1d": conv_calls,
    "selective_scan": scan_calls,
    "temporal_sparse_attention": sparse_calls,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", CALLS)
def test_lane_orders_agree_bit_for_bit(family, dtype):
    simt.load()
    for op, arguments in CALLS[family](dtype):
        results = []
        for order in ORDERS:
            given = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
            with simt.lane_order(order):
                out = getattr(torch.ops.fla_ops_simt, f"{family}_{op}")(*given)
            results.append([*([out] if op == "step" else out), *(a for a in given if isinstance(a, torch.Tensor))])
        for first, second in zip(*results, strict=True):
            # Saved states that no packed sequence uses are left as they were: NaN here.
            assert torch.equal(first.nan_to_num(7.5), second.nan_to_num(7.5)), op


@pytest.mark.parametrize("order", ORDERS)
def test_a_nan_value_reaches_no_earlier_query(order):
    """Of temporal-sparse attention, whose weights of later keys are 0: NaN would survive a product with them."""
    q, k, v = (torch.randn(1, 70, 1, 16) for _ in range(3))
    for where in (5, 40):
        bad = v.clone()
        bad[0, where, 0, 2] = torch.nan
        with simt.as_native(order):
            o = temporal_sparse_attention(q, k, bad, threshold=0.3, window=1, backend="native").o
        assert torch.equal(o[0, :, 0, 2].isnan(), torch.arange(70) >= where)
        assert not o[..., 3].isnan().any()


@pytest.mark.parametrize("order", ORDERS)
def test_bounds_and_slots_that_only_the_device_knows(order):
    """What no sequence covers is 0, bounds are clamped into the row, slots outside of the state are skipped."""
    simt.load()
    ops = torch.ops.fla_ops_simt
    x, weight, bias = torch.randn(1, 5, 70), torch.randn(5, 4), torch.randn(5)
    with simt.lane_order(order):
        for bounds, covered in (([2, 5, 65], slice(2, 65)), ([-9, 5, 99], slice(0, 70)), ([5], slice(0, 0))):
            bounds = torch.tensor(bounds)
            y, final = ops.causal_conv1d_forward(x, weight, bias, None, bounds, True)
            grads = ops.causal_conv1d_backward(x, weight, bias, None, bounds, True, x, final, 15)
            inside = torch.tensor([0, *bounds[1:-1], 70]) - torch.tensor(covered.start)
            inside = inside.clamp(0, covered.stop - covered.start) if len(bounds) > 1 else bounds[:1] - 5
            part = x[:, :, covered]
            same = ops.causal_conv1d_forward(part, weight, bias, None, inside, True)
            gradients = ops.causal_conv1d_backward(part, weight, bias, None, inside, True, part, final, 15)
            for whole, piece in ((y, same[0]), (grads[0], gradients[0])):
                assert torch.equal(whole[:, :, covered], piece)
                assert not whole[:, :, : covered.start].any() and not whole[:, :, covered.stop :].any()
            assert torch.equal(final, same[1]) and torch.equal(grads[3], gradients[3])
            torch.testing.assert_close(grads[1], gradients[1])
        for bounds in ([0, 60, 3, 70], [70, 0], [-5, -1, -3], [9, 2**40, -(2**40), 1]):
            bounds = torch.tensor(bounds)
            y, final = ops.causal_conv1d_forward(x, weight, bias, None, bounds, True)
            grads = ops.causal_conv1d_backward(x, weight, bias, None, bounds, True, x, final, 15)
            assert all(result.isfinite().all() for result in (y, final, *grads))
        state = torch.randn(3, 5, 3)
        before = state.clone()
        y = ops.causal_conv1d_step(x[0, :, :3].T, weight, bias, state, True, torch.tensor([3, -2, 1]))
        assert not y[:2].any() and y[2].any()
        assert torch.equal(state[[0, 2]], before[[0, 2]]) and torch.equal(state[1, :, :2], before[1, :, 1:])
