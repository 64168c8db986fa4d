# SPDX-License-Identifier: Apache-2.0
"""CUDA tensors on a real GPU: the Triton kernels and the CUDA fallback against the float64 reference.

What the interpreter and the SIMT shim cannot see: miscompiled tiles, races between warps, launch limits, streams and
graphs. The values' fine grid is in the families' own files, which need no GPU.
"""

import functools

import delta_product_cases
import pytest
import selective_scan_cases
import temporal_sparse_attention_cases as sparse_cases
import torch
from causal_conv1d_cases import LAYOUTS, gradients_for, make, run
from causal_conv1d_cases import check as check_conv
from delta_rule_cases import (
    TENSORS,
    assert_same_bits,
    bounds,
    call,
    check,
    on,
    random_cotangents,
    random_inputs,
    results,
)

import fla_ops
from fla_ops import _backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.no_poison,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
gates = pytest.mark.parametrize("gate", [None, "normal"], ids=["plain", "gated"])


ON_CUDA = [op for op in _backend.OPS if any("cuda" in row.devices for row in _backend.table(op))]


@pytest.fixture(params=["triton", "native"])
def gpu(request):
    """Each compiled backend that runs on CUDA tensors here."""
    for op in ON_CUDA:
        if request.param not in {row.name for row in _backend.table(op) if "cuda" in row.devices}:
            continue
        reason = _backend.why_not(op, request.param, "cuda", torch.float32, ())
        if reason:
            pytest.skip(reason)
    return request.param


def test_a_gpu_has_triton_and_takes_it():
    """Without this, a suite in which Triton fails to import would pass by skipping."""
    report = fla_ops.backends()
    for op in ON_CUDA:
        row = report[op]
        assert row["cuda"] == "triton", (op, row["why_not"])


# The delta rule. Tile edges, every head size of the launch tables, and lengths of several chunks.

SIZES = [
    (64, 64),
    (128, 128),
    (256, 256),
    (32, 32),
    (16, 16),
    (128, 64),
    (64, 128),
    (256, 128),
    (17, 60),
    (96, 100),
    (3, 5),
]


@dtypes
@gates
@pytest.mark.parametrize("K, V", SIZES)
def test_delta_rule(gpu, dtype, gate, K, V):
    inputs = random_inputs(B=2, T=330, H=2, HV=4, K=K, V=V, dtype=dtype, gate=gate, state=torch.float32)
    check(gpu, inputs, device="cuda", qk_l2norm=True)


@dtypes
@pytest.mark.parametrize("gate", ["resets", -1e4, -120.0, 0.01, -float("inf")])
def test_delta_rule_gates(gpu, dtype, gate):
    check(gpu, random_inputs(T=300, K=128, V=128, dtype=dtype, gate=gate, state=torch.float32), device="cuda")


@dtypes
@gates
@pytest.mark.parametrize("lengths", [[130, 0, 1, 64, 63, 65, 300], [1] * 40, [0, 0, 500]], ids=str)
def test_delta_rule_packed(gpu, dtype, gate, lengths):
    inputs = random_inputs(
        T=sum(lengths), H=2, HV=2, K=128, V=128, dtype=dtype, gate=gate, state=torch.float32, sequences=len(lengths)
    )
    check(gpu, inputs, device="cuda", cu_seqlens=bounds(lengths))


@gates
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_delta_rule_long(gpu, dtype, gate):
    """One head over thousands of tokens: split over the multiprocessors where a backend does that."""
    inputs = random_inputs(T=4000, H=1, HV=1, K=128, V=128, dtype=dtype, gate=gate, state=torch.float32)
    check(gpu, inputs, device="cuda", qk_l2norm=True)


@dtypes
@gates
@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("K, V", [(64, 64), (128, 128), (256, 256), (17, 60)])
def test_delta_product(gpu, dtype, gate, n, K, V):
    inputs = delta_product_cases.random_inputs(
        n, B=2, T=140, H=2, HV=4, K=K, V=V, dtype=dtype, gate=gate, state=torch.float32
    )
    delta_product_cases.check(gpu, n, inputs, device="cuda", qk_l2norm=True)


@pytest.mark.parametrize("n", [2, 5])
def test_delta_product_packed(gpu, n):
    lengths = [70, 0, 1, 64]
    inputs = delta_product_cases.random_inputs(n, T=135, K=128, V=128, state=torch.float32, sequences=4)
    delta_product_cases.check(gpu, n, inputs, device="cuda", cu_seqlens=bounds(lengths))


@pytest.mark.parametrize("n", [2, 4])
def test_delta_product_steps(gpu, n):
    x = on("cuda", delta_product_cases.random_inputs(n, B=3, T=20, HV=4, K=64, V=64, state=torch.float32))
    options = {"qk_l2norm": True, "backend": gpu}
    whole = call(fla_ops.delta_product, x, num_householder=n, output_final_state=True, **options)
    state = x["initial_state"].clone()

    def token(t):
        return [x[m][:, t * n : t * n + n] if m in delta_product_cases.MICRO else x[m][:, t] for m in TENSORS[:5]]

    o = torch.stack([fla_ops.delta_product_step(*token(t), state=state, **options) for t in range(20)], 1)
    torch.testing.assert_close(o, whole.o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, whole.final_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_float32_is_ieee_unless_tf32_is_allowed(precision):
    """TF32 keeps 10 bits: its error is hundreds of times that of float32."""
    inputs = random_inputs(T=256, K=64, V=64, state=torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        o = call(fla_ops.delta_rule, on("cuda", inputs), backend="triton").o.cpu().double()
    finally:
        torch.set_float32_matmul_precision(before)
    wide = {name: x.double() for name, x in inputs.items()}
    exact = call(fla_ops.delta_rule, wide, backend="reference").o
    error = ((o - exact).norm() / exact.norm()).item()
    assert (error < 1e-6) == (precision == "highest"), error


@pytest.mark.parametrize("shape", [(1, 4096, 8, 128), (4, 1024, 16, 64), (1, 1024, 4, 256)], ids=str)
def test_runs_give_the_same_bits(gpu, shape):
    """Races show as runs that differ: a full card, twenty times."""
    B, T, H, D = shape
    inputs = on("cuda", random_inputs(B=B, T=T, H=H, HV=H, K=D, V=D, dtype=torch.bfloat16, state=torch.float32))
    do, ds = (x.cuda() for x in random_cotangents(inputs | {n: x.cpu() for n, x in inputs.items()}))
    op = functools.partial(fla_ops.delta_rule, backend=gpu, qk_l2norm=True)
    first = results(op, inputs, do, ds)
    for _ in range(20):
        assert_same_bits(results(op, inputs, do, ds), first)


@dtypes
@pytest.mark.parametrize("K, V", [(64, 64), (128, 128), (256, 256), (17, 60)])
def test_delta_rule_steps(gpu, dtype, K, V):
    inputs = on("cuda", random_inputs(B=3, T=20, H=2, HV=4, K=K, V=V, dtype=dtype, state=torch.float32))
    whole = call(fla_ops.delta_rule, inputs, qk_l2norm=True, output_final_state=True, backend=gpu)
    state = inputs["initial_state"].clone()
    tokens = [inputs[n] for n in ("q", "k", "v", "beta", "g")]
    steps = [
        fla_ops.delta_rule_step(*(x[:, t] for x in tokens), state=state, qk_l2norm=True, backend=gpu) for t in range(20)
    ]
    tolerance = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps * whole.o.abs().max().item()}
    torch.testing.assert_close(torch.stack(steps, 1), whole.o, **tolerance)
    tolerance["atol"] = 8 * torch.finfo(dtype).eps * whole.final_state.abs().max().item()
    torch.testing.assert_close(state, whole.final_state, **tolerance)


# The convolution.


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_causal_conv1d(gpu, dtype, layout):
    for W, L, D in ((4, 1000, 300), (2, 65, 129), (8, 333, 64), (1, 40, 7), (3, 2, 40)):
        inputs = make(W, L, dtype, D=D)
        dy, dfinal = gradients_for(inputs)
        there = [None if x is None else x.cuda() for x in inputs]
        options = {"activation": "silu", "layout": LAYOUTS[layout], "backend": gpu}
        actual = run(fla_ops.causal_conv1d, there, dy.cuda(), dfinal.cuda(), **options)
        check_conv(actual, inputs, dy, dfinal, f"W={W}, L={L}, D={D}", activation="silu")


@dtypes
def test_causal_conv1d_packed(gpu, dtype):
    lengths = [130, 0, 1, 2, 64, 300]
    inputs = make(4, sum(lengths), dtype, B=1, N=len(lengths))
    dy, dfinal = gradients_for(inputs, len(lengths))
    there = [x.cuda() for x in inputs]
    options = {"activation": "silu", "cu_seqlens": bounds(lengths)}
    run_there = options | {"cu_seqlens": bounds(lengths).cuda(), "backend": gpu}
    actual = run(fla_ops.causal_conv1d, there, dy.cuda(), dfinal.cuda(), **run_there)
    check_conv(actual, inputs, dy, dfinal, gpu, **options)


def test_causal_conv1d_steps(gpu):
    x, weight, bias, state = (t.cuda() for t in make(4, 9, torch.bfloat16))
    whole = fla_ops.causal_conv1d(x, weight, bias, activation="silu", initial_state=state, backend=gpu).y
    for t in range(9):
        y = fla_ops.causal_conv1d_step(x[:, :, t], weight, bias, state=state, activation="silu", backend=gpu)
        torch.testing.assert_close(y, whole[:, :, t])


# The selective scan.


def scan_of(gpu, **options):
    return functools.partial(fla_ops.selective_scan, delta_softplus=True, backend=gpu, **options)


@dtypes
@pytest.mark.parametrize("N", [1, 3, 16, 17, 32, 64, 100, 256])
def test_selective_scan(gpu, dtype, N):
    """Fewer states than lanes, more than one slice of them, and channels that fill no block."""
    inputs = selective_scan_cases.random_inputs(2, 150 if N < 64 else 40, 330, N, dtype=dtype, state=torch.float32)
    selective_scan_cases.check(gpu, inputs, device="cuda", delta_softplus=True)


@pytest.mark.parametrize("layout", selective_scan_cases.LAYOUTS)
@pytest.mark.parametrize("G, constant", [(0, ""), (4, "B"), (1, "C"), (2, ""), (96, ""), (1, "BC")])
def test_selective_scan_projections(gpu, G, constant, layout):
    """Groups, constants, none of the optional tensors, any layout."""
    given = constant != "BC"
    inputs = selective_scan_cases.random_inputs(
        2, 96, 200, G=G, constant=constant, skip=given, gate=given, bias=given, dtype=torch.bfloat16
    )
    for name in ("u", "delta", "z", "B", "C"):
        if inputs[name] is not None and inputs[name].dim() > 2:
            inputs[name] = selective_scan_cases.LAYOUTS[layout](inputs[name])
    selective_scan_cases.check(gpu, inputs, device="cuda", delta_softplus=True)


@dtypes
@pytest.mark.parametrize("lengths", [[130, 0, 1, 64, 63, 65, 300], [1] * 40, [0, 0, 500]], ids=str)
def test_selective_scan_packed(gpu, dtype, lengths):
    inputs = selective_scan_cases.random_inputs(
        1, 96, sum(lengths), G=2, dtype=dtype, state=torch.float32, sequences=len(lengths)
    )
    selective_scan_cases.check(gpu, inputs, device="cuda", cu_seqlens=bounds(lengths), delta_softplus=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_selective_scan_long(gpu, dtype):
    """Few channels over thousands of steps: split over the multiprocessors where a backend does that."""
    inputs = selective_scan_cases.random_inputs(1, 48, 4000, dtype=dtype, state=torch.float32)
    selective_scan_cases.check(gpu, inputs, device="cuda", delta_softplus=True)


@dtypes
@pytest.mark.parametrize("decay, delta", [(-1e4, "normal"), (-1e-6, "normal"), (0.0, "positive"), (-1.0, 1e3)])
def test_selective_scan_decays(gpu, dtype, decay, delta):
    inputs = selective_scan_cases.random_inputs(
        1, 48, 200, dtype=dtype, decay=decay, delta=delta, bias=delta == "normal", state=torch.float32
    )
    inputs["u"] /= max(1.0, delta if isinstance(delta, float) else 1.0)
    selective_scan_cases.check(gpu, inputs, device="cuda", delta_softplus=delta == "normal")


@pytest.mark.parametrize("shape", [(1, 1536, 2048), (8, 2048, 512)], ids=str)
def test_selective_scan_runs_give_the_same_bits(gpu, shape):
    """Races show as runs that differ: a full card, twenty times. dB and dC are where others add by atomics."""
    inputs = selective_scan_cases.random_inputs(*shape, dtype=torch.bfloat16, state=torch.float32)
    dy, ds = (x.cuda() for x in selective_scan_cases.random_cotangents(inputs))
    there = on("cuda", inputs)
    first = selective_scan_cases.results(scan_of(gpu), there, dy, ds)
    assert all(x.isfinite().all() for x in first.values())
    for _ in range(20):
        assert_same_bits(selective_scan_cases.results(scan_of(gpu), there, dy, ds), first)


@dtypes
@pytest.mark.parametrize("Di, N", [(1536, 16), (70, 100), (5, 1), (9, 256)])
def test_selective_scan_steps(gpu, dtype, Di, N):
    x = on("cuda", selective_scan_cases.random_inputs(3, Di, 20, N, dtype=dtype, state=torch.float32))
    whole = selective_scan_cases.call(scan_of(gpu), x, output_final_state=True)
    state = x["initial_state"].clone()

    def token(t):
        timed = ("u", "delta", "B", "C", "z")
        return {n: x[n][..., t] if n in timed else x[n] for n in selective_scan_cases.TENSORS[:8]}

    options = {"delta_softplus": True, "state": state, "backend": gpu}
    y = torch.stack([fla_ops.selective_scan_step(**token(t), **options) for t in range(20)], -1)
    tolerance = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps * whole.y.abs().max().item()}
    torch.testing.assert_close(y, whole.y, **tolerance)
    tolerance["atol"] = 8 * torch.finfo(torch.float32).eps * whole.final_state.abs().max().item()
    torch.testing.assert_close(state, whole.final_state, **tolerance)
    pool = torch.full((5, Di, N), torch.nan, device="cuda")
    pool[4] = x["initial_state"][0]
    slots = torch.tensor([4, -1, -1], device="cuda")
    y = fla_ops.selective_scan_step(**token(0), **options | {"state": pool, "state_indices": slots})
    assert y[0].isfinite().all() and not y[1:].any() and pool[:4].isnan().all()


def test_selective_scan_takes_memory_for_no_state_of_every_step(gpu):
    """Less than a quarter of B Di L N values of float32, forward and backward together."""
    shape, N = (2, 256, 2048), 64
    inputs = on("cuda", selective_scan_cases.random_inputs(*shape, N, dtype=torch.bfloat16))
    y = selective_scan_cases.call(scan_of(gpu), inputs).y  # compiles what has to be
    dy = torch.randn_like(y)
    leaf = {n: None if t is None else t.requires_grad_() for n, t in inputs.items()}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    selective_scan_cases.call(scan_of(gpu), leaf).y.backward(dy)
    taken = torch.cuda.max_memory_allocated() - before
    every_state = 4 * shape[0] * shape[1] * shape[2] * N
    print(f"{gpu}: {taken / 2**20:.0f} MiB, every state would be {every_state / 2**20:.0f} MiB")
    assert taken < every_state / 4


def test_selective_scan_replays_from_a_graph(gpu):
    """A packed forward whose lengths change at replay, and a step."""
    inputs = on("cuda", selective_scan_cases.random_inputs(1, 96, 300, dtype=torch.bfloat16))
    cu = bounds([100, 0, 200]).cuda()
    token = {n: t[..., 0].clone() if n in ("u", "delta", "B", "C", "z") else t for n, t in inputs.items()}
    del token["initial_state"]
    start = torch.randn(1, 96, 16, device="cuda")
    state = start.clone()

    def work():
        y = selective_scan_cases.call(scan_of(gpu), inputs, cu_seqlens=cu).y
        return y, fla_ops.selective_scan_step(**token, state=state, delta_softplus=True, backend=gpu)

    with torch.no_grad():
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            work()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, step = work()
        cu.copy_(bounds([17, 200, 83]).cuda())
        state.copy_(start)
        graph.replay()
        torch.cuda.synchronize()
        seen = y.clone(), step.clone()
        state.copy_(start)
        for found, expected in zip(seen, work(), strict=True):
            assert torch.equal(found, expected)


# Temporal-sparse attention.


@dtypes
@pytest.mark.parametrize("D, DV", [(64, 64), (128, 128), (256, 256), (17, 33), (1, 130), (100, 60)])
def test_temporal_sparse_attention(gpu, dtype, D, DV):
    """Grouped heads, fewer queries than keys; tiles that are sinks, held, near, and mixed."""
    inputs = sparse_cases.random_inputs(2, 330, 4, 2, D, DV, Tq=300, dtype=dtype)
    sparse_cases.check(gpu, inputs, device="cuda", threshold=0.4, window=50, sink=3)


@pytest.mark.parametrize("mode", ["band", "block"])
@pytest.mark.parametrize("window, sink", [(1, 0), (2, 70), (64, 0), (129, 5), (300, 0), (3, 300)])
def test_temporal_sparse_attention_windows(gpu, window, sink, mode):
    inputs = sparse_cases.random_inputs(1, 300, 2, 1, 64, 64)
    sparse_cases.check(gpu, inputs, device="cuda", threshold=0.4, window=window, sink=sink, window_mode=mode)


@dtypes
@pytest.mark.parametrize("lengths", [[130, 0, 1, 64, 63, 65, 300], [1] * 40, [0, 0, 500]], ids=str)
def test_temporal_sparse_attention_packed(gpu, dtype, lengths):
    inputs = sparse_cases.random_inputs(1, sum(lengths), 2, 1, 64, 64, dtype=dtype)
    sparse_cases.check(gpu, inputs, device="cuda", threshold=0.4, window=20, cu_seqlens=bounds(lengths))


@pytest.mark.parametrize(
    "shape", [(1, 4096, 8, 2, 128, 128), (4, 1024, 8, 8, 64, 64), (1, 512, 4, 1, 256, 256)], ids=str
)
def test_temporal_sparse_attention_runs_give_the_same_bits(gpu, shape):
    inputs = sparse_cases.random_inputs(*shape, dtype=torch.bfloat16)
    do, there = sparse_cases.random_cotangent(inputs).cuda(), on("cuda", inputs)
    op = functools.partial(fla_ops.temporal_sparse_attention, threshold=0.4, window=200, sink=4, backend=gpu)
    first = sparse_cases.results(op, there, do)
    assert all(x.isfinite().all() for x in first.values())
    for _ in range(20):
        assert_same_bits(sparse_cases.results(op, there, do), first)


def test_temporal_sparse_attention_takes_memory_for_no_matrix(gpu):
    """Forward and backward together take less than a hundredth of a float32 T x T a head."""
    T, H = 16384, 4
    q, k, v = (torch.randn(1, T, H, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    op = functools.partial(fla_ops.temporal_sparse_attention, threshold=0.4, window=500, backend=gpu)
    do = torch.randn_like(op(q, k, v).o)  # compiles what has to be
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    op(q, k, v).o.backward(do)
    taken = torch.cuda.max_memory_allocated() - before
    print(f"{gpu}: {taken / 2**20:.0f} MiB")
    assert taken < 4 * T * T * H / 100


# With the device.


def test_a_step_and_a_forward_replay_from_a_graph(gpu):
    inputs = on("cuda", random_inputs(B=2, T=300, K=64, V=64, dtype=torch.bfloat16, state=torch.float32))
    cu = bounds([100, 0, 200]).cuda()
    packed = {n: None if x is None else x[:1] for n, x in inputs.items()} | {"initial_state": None}
    token = [inputs[n][:, 0].clone() for n in ("q", "k", "v", "beta", "g")]
    state = inputs["initial_state"].clone()

    def work():
        o = call(fla_ops.delta_rule, packed, cu_seqlens=cu, backend=gpu).o
        return o, fla_ops.delta_rule_step(*token, state=state, backend=gpu)

    with torch.no_grad():
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            work()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, y = work()
        cu.copy_(bounds([17, 200, 83]).cuda())  # other lengths at replay
        state.copy_(inputs["initial_state"])
        graph.replay()
        torch.cuda.synchronize()
        seen = o.clone(), y.clone()
        state.copy_(inputs["initial_state"])
        for found, expected in zip(seen, work(), strict=True):
            assert torch.equal(found, expected)


def test_compiled_code_is_one_graph(gpu):
    inputs = on("cuda", random_inputs(B=1, T=150, K=64, V=64, dtype=torch.bfloat16))
    do, ds = random_cotangents(inputs)
    op = functools.partial(fla_ops.delta_rule, backend=gpu, qk_l2norm=True)
    compiled = torch.compile(op, fullgraph=True, dynamic=True)
    expected, found = results(op, inputs, do.cuda(), ds.cuda()), results(compiled, inputs, do.cuda(), ds.cuda())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-2, msg=name)


def test_a_second_stream_and_a_second_device(gpu):
    inputs = on("cuda", random_inputs(T=100, K=64, V=64))
    expected = call(fla_ops.delta_rule, inputs, backend=gpu).o
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        o = call(fla_ops.delta_rule, inputs, backend=gpu).o
    stream.synchronize()
    assert torch.equal(o, expected)
    if torch.cuda.device_count() > 1:  # while another device is current
        assert torch.equal(call(fla_ops.delta_rule, on("cuda:1", inputs), backend=gpu).o.cpu(), expected.cpu())


def test_cu_seqlens_may_be_on_the_other_device():
    inputs = random_inputs(T=20)
    on_gpu = on("cuda", inputs)
    boundaries = torch.tensor([0, 7, 7, 20])
    o = call(fla_ops.delta_rule, on_gpu, cu_seqlens=boundaries, backend="reference").o
    expected = call(fla_ops.delta_rule, inputs, cu_seqlens=boundaries.cuda(), backend="reference").o
    torch.testing.assert_close(o.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_mixed_devices_are_named():
    inputs = random_inputs(T=4)
    inputs["k"] = inputs["k"].cuda()
    with pytest.raises(ValueError, match=r"one device, got q: cpu, k: cuda:0"):
        call(fla_ops.delta_rule, inputs)
