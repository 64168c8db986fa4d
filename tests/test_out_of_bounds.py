# SPDX-License-Identifier: Apache-2.0
"""Triton kernels touch their tensors' elements and nothing else: every load and store is looked at.

Of the CUDA kernels behind the shim what lies around a tensor is looked at: what is read there is NaN and shows, and
nobody has written to it.
"""

import contextlib

import pytest
import simt
import torch
from delta_product_cases import MICRO
from delta_product_cases import random_inputs as product_inputs
from delta_rule_cases import TENSORS, bounds, random_cotangents, random_inputs
from selective_scan_cases import random_cotangents as scan_cotangents
from selective_scan_cases import random_inputs as scan_inputs
from temporal_sparse_attention_cases import random_cotangent as sparse_cotangent
from temporal_sparse_attention_cases import random_inputs as sparse_inputs

import fla_ops
from fla_ops import _backend

triton = pytest.importorskip("triton")
tl = triton.language

from interpreted_memory import (  # noqa: E402 - needs triton
    assert_fence_stands,
    far_apart,
    fenced,
    fenced_allocations,
    watched_memory,
)


def in_interpreter(op):
    why_not = _backend.why_not(op, "triton", "cpu", torch.float32, ())
    return pytest.mark.skipif(why_not is not None, reason=str(why_not))


@in_interpreter("delta_rule")
def test_a_dropped_mask_is_seen():
    """The watch itself: a kernel that reads, and one that writes, one element too many."""

    @triton.jit
    def copy(x, y, n, m, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < m)

    x, y = fenced(torch.ones(7)), fenced(torch.zeros(7))
    with watched_memory() as launches:
        copy[(1,)](x, y, 7, 7, N=8)
        assert launches[0].loaded == launches[0].stored == 28 and launches[0].distinct == 56
        for n, m, what in ((8, 7, "load of 1 "), (7, 8, "store of 1 ")):
            with pytest.raises(triton.runtime.errors.InterpreterError, match=what):
                copy[(1,)](x, y, n, m, N=8)


def in_wider_rows(x):
    """x as columns of a tensor with NaN between its rows."""
    return torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]]


@in_interpreter("delta_rule")
@pytest.mark.parametrize(
    ("axis", "shape"),
    [
        (0, {"B": 3, "T": 1, "H": 1, "HV": 1}),
        (1, {"T": 3, "H": 1, "HV": 1}),
        (1, {"T": 193, "H": 1, "HV": 1}),
        (2, {"T": 2, "H": 3, "HV": 3}),
    ],
    ids=["batch", "token of a tile", "token of a chunk", "head"],
)
def test_delta_rule_offsets_beyond_32_bits(axis, shape):
    """Heads of 32 channels: narrower ones are computed in a wider dtype, so that kernels would see a dense copy. Far
    tokens too are copied for the backward, unless there are 129 of them: strides below 2^24."""
    x = random_inputs(**shape, K=32, V=32, dtype=torch.bfloat16, state=torch.bfloat16)
    do, ds = random_cotangents(x)

    def run(q, k, v, do):
        leaf = [t.detach().requires_grad_() for t in (q, k, v, x["beta"], x["g"], x["initial_state"])]
        o, final = fla_ops.delta_rule(*leaf[:5], initial_state=leaf[5], output_final_state=True, backend="triton")
        return [o, final, *torch.autograd.grad([o, final], leaf, [do, ds])]

    near = [x["q"], x["k"], x["v"], do]
    expected = run(*near)
    with watched_memory():
        assert all(map(torch.equal, run(*far_apart(near, axis)), expected))


@in_interpreter("delta_rule")
@pytest.mark.parametrize("axis", range(3), ids=["sequence", "head", "key channel"])
def test_states_beyond_32_bits(axis):
    """The state's own strides, those of a step's pool too."""
    x = random_inputs(B=3, T=1, H=3, HV=3, K=3, V=16, dtype=torch.bfloat16, state=torch.bfloat16)
    tokens = [x[n] for n in TENSORS[:5]]

    def run(state):
        with torch.no_grad():
            o, final = fla_ops.delta_rule(*tokens, initial_state=state, output_final_state=True, backend="triton")
            step = fla_ops.delta_rule_step(*(t[:, 0] for t in tokens), state=state, backend="triton")
        return [o, final, step, state]

    (far,) = far_apart([x["initial_state"]], axis)
    expected = run(x["initial_state"].clone())
    with watched_memory():
        assert all(map(torch.equal, run(far), expected))


SHAPES = {
    "tiles that fit": {"T": 128, "K": 32, "V": 32},
    "nothing fits": {"B": 2, "T": 67, "HV": 4, "K": 20, "V": 12},
    "K over 64": {"T": 17, "K": 72, "V": 40},
    "one token": {"B": 2, "T": 1, "K": 17, "V": 33},
    "wide": {"T": 65, "H": 1, "HV": 1, "K": 136, "V": 200},
}


@in_interpreter("delta_rule")
@pytest.mark.parametrize("lengths", [None, [0, 3, 0, -1, 1]], ids=["batch", "packed"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_delta_rule(monkeypatch, shape, lengths):
    dtype = torch.bfloat16 if lengths else torch.float32
    N = None
    if lengths:
        T = shape["T"]
        lengths = [min(n, T // 8) if n >= 0 else T - sum(min(m, T // 8) for m in lengths if m > 0) for n in lengths]
        shape, N = shape | {"B": 1}, len(lengths)
    x = random_inputs(**shape, dtype=dtype, state=torch.float32, sequences=N)
    x = {n: fenced(in_wider_rows(t)) if n in ("q", "k", "v") else fenced(t) for n, t in x.items()}
    do, ds = (fenced(in_wider_rows(t)) for t in random_cotangents(x, N))
    leaf = {n: x[n].requires_grad_() for n in TENSORS}
    cu = None if N is None else fenced(bounds(lengths))
    with watched_memory() as launches, fenced_allocations(monkeypatch):
        o, final = fla_ops.delta_rule(
            *(leaf[n] for n in TENSORS[:5]),
            initial_state=leaf["initial_state"],
            output_final_state=True,
            cu_seqlens=cu,
            qk_l2norm=True,
            backend="triton",
        )
        torch.autograd.backward([o, final], [do, ds])
    assert launches
    results = [o, final, *(leaf[n].grad for n in TENSORS)]
    assert all(r.isfinite().all() for r in results)


@in_interpreter("delta_product")
@pytest.mark.parametrize("n, lengths", [(2, None), (3, [0, 3, 0, 64, 1]), (7, [9, 10, 0])], ids=["2", "3", "7"])
def test_delta_product(monkeypatch, n, lengths):
    """With 3 and 7 rows a token chunks have rows that belong to the next; with 2 none."""
    N = lengths and len(lengths)
    T, B = (67, 2) if lengths is None else (sum(lengths), 1)
    x = product_inputs(n, B=B, T=T, HV=4, K=20, V=12, dtype=torch.bfloat16, state=torch.float32, sequences=N)
    x = {name: fenced(in_wider_rows(t)) if name in ("q", "k", "v") else fenced(t) for name, t in x.items()}
    leaf = {name: x[name].requires_grad_() for name in TENSORS}
    cu = None if N is None else fenced(bounds(lengths))
    with watched_memory() as launches, fenced_allocations(monkeypatch):
        o, final = fla_ops.delta_product(
            *(leaf[name] for name in TENSORS[:5]),
            num_householder=n,
            initial_state=leaf["initial_state"],
            output_final_state=True,
            qk_l2norm=True,
            backend="triton",
            **({} if cu is None else {"cu_seqlens": cu}),
        )
        torch.autograd.backward([o, final], [fenced(torch.randn_like(o)), fenced(torch.randn_like(final))])
        tokens = [x[name][:, :n] if name in MICRO else x[name][:, 0] for name in TENSORS[:5]]
        with torch.no_grad():
            step = fla_ops.delta_product_step(*tokens, state=final.detach()[:B].clone(), backend="triton")
    assert launches
    assert all(r.isfinite().all() for r in (o, final, step, *(leaf[name].grad for name in TENSORS)))


@in_interpreter("delta_rule")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_delta_rule_step(monkeypatch, shape):
    x = random_inputs(**shape | {"B": 3, "T": 1}, dtype=torch.bfloat16, state=torch.float32)
    tokens = [fenced(in_wider_rows(x[n][:, 0]) if n in ("q", "k", "v") else x[n][:, 0]) for n in TENSORS[:5]]
    state = fenced(in_wider_rows(torch.zeros(5, *x["initial_state"].shape[1:])))
    with watched_memory() as launches, fenced_allocations(monkeypatch):
        o = fla_ops.delta_rule_step(
            *tokens, state=state, state_indices=fenced(torch.tensor([4, -1, 0])), qk_l2norm=True, backend="triton"
        )
    assert launches and o.isfinite().all()
    assert state[[0, 4]].any() and not state[1:4].any()


SCANS = {
    "blocks that fit": {"Di": 64, "L": 32, "N": 16},
    "nothing fits": {"batch": 2, "Di": 37, "L": 35, "N": 5},
    "groups": {"batch": 1, "Di": 12, "L": 3, "N": 3, "G": 4},
    "wide": {"batch": 1, "Di": 3, "L": 9, "N": 70},
    "constants": {"batch": 2, "Di": 5, "L": 33, "N": 7, "constant": "BC"},
}


@in_interpreter("selective_scan")
@pytest.mark.parametrize("lengths", [None, [0, 3, 0, 40, 2]], ids=["batch", "packed"])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize("shape", SCANS.values(), ids=SCANS)
def test_selective_scan(monkeypatch, interpreters_rows, shape, cut, lengths):
    from fla_ops.kernels import selective_scan, selective_scan_backward

    interpreters_rows(False)
    if cut:
        for module in (selective_scan, selective_scan_backward):
            monkeypatch.setattr(module, "segment_steps", lambda *_: 32)
    S = None
    if lengths:
        shape, S = shape | {"batch": 1, "L": sum(lengths)}, len(lengths)
    x = scan_inputs(**shape, dtype=torch.bfloat16 if lengths else torch.float32, state=torch.float32, sequences=S)
    dy, ds = (fenced(in_wider_rows(t)) for t in scan_cotangents(x, S))
    leaf = {name: fenced(in_wider_rows(t)).requires_grad_() for name, t in x.items()}
    cu = None if S is None else fenced(bounds(lengths))
    options = {"delta_softplus": True, "output_final_state": True, "backend": "triton", "cu_seqlens": cu}
    with watched_memory() as launches, fenced_allocations(monkeypatch):
        y, final = fla_ops.selective_scan(**leaf, **options)
        torch.autograd.backward([y, final], [dy, ds])
        with torch.no_grad():
            tokens = {name: fenced(t[..., 0]) if t.dim() > 2 else t for name, t in leaf.items()}
            pool = fenced(in_wider_rows(torch.zeros(5, *final.shape[1:])))
            del tokens["initial_state"]
            slots = fenced(torch.tensor([4, -1][: len(tokens["u"])]))
            tokens |= {"delta_softplus": True, "state": pool, "state_indices": slots}
            step = fla_ops.selective_scan_step(**tokens, backend="triton")
    assert launches
    assert all(r.isfinite().all() for r in (y, final, step, *(t.grad for t in leaf.values())))
    assert pool[4].any() and not pool[:4].any()


@in_interpreter("selective_scan")
@pytest.mark.parametrize("axis", range(3), ids=["batch", "step", "channel"])
def test_selective_scan_offsets_beyond_32_bits(axis):
    """Kernels read channels innermost: far channels are copied for the scan, and read as they are by the step."""
    x = scan_inputs(3, 3, 3, 2, G=3, dtype=torch.bfloat16)
    near = [x[name].transpose(1, 2).contiguous() for name in ("u", "delta", "z")]

    def run(*rows):
        u, delta, z = (t.transpose(1, 2) for t in rows)
        leaf = [t.detach().requires_grad_() for t in (u, delta, x["A"], x["B"], x["C"], x["D"])]
        y = fla_ops.selective_scan(*leaf, z=z, delta_softplus=True, backend="triton").y
        step = fla_ops.selective_scan_step(
            u[..., 0], delta[..., 0], x["A"], x["B"][..., 0], x["C"][..., 0], z=z[..., 0], state=torch.zeros(3, 3, 2),
            backend="triton",
        )  # fmt: skip
        return [y, *torch.autograd.grad(y.sum(), leaf), step]

    expected = run(*near)
    with watched_memory():
        assert all(map(torch.equal, run(*far_apart(near, axis)), expected))


CONVOLUTIONS = {
    "channels last": {"B": 2, "D": 40, "L": 37, "W": 4, "last": True},
    "channels first": {"B": 2, "D": 24, "L": 64, "W": 4, "last": False},
    "nothing fits": {"B": 1, "D": 7, "L": 19, "W": 3, "last": True},
    "widest": {"B": 1, "D": 5, "L": 9, "W": 8, "last": False},
    "shorter than the filter": {"B": 2, "D": 8, "L": 2, "W": 4, "last": True},
    "one tap": {"B": 1, "D": 8, "L": 5, "W": 1, "last": False},
}


@in_interpreter("causal_conv1d")
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("shape", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_causal_conv1d(monkeypatch, shape, packed):
    dtype = torch.bfloat16 if packed else torch.float32
    B, D, L, W, last = shape.values()
    B = 1 if packed else B
    N = 4 if packed else B

    def rows():
        x = torch.randn(B, L, D).transpose(1, 2) if last else torch.randn(B, D, L)
        return fenced(x.to(dtype))

    x, dy = rows().requires_grad_(), rows()
    weight = fenced(in_wider_rows(torch.randn(D, W))).requires_grad_()
    bias = fenced(torch.randn(D)).requires_grad_()
    state, ds = (fenced(in_wider_rows(torch.randn(N, D, W - 1))) for _ in range(2))
    state.requires_grad_()
    cu = fenced(torch.tensor([0, 0, L // 2, L // 2 + 1, L])) if packed else None
    with watched_memory() as launches, fenced_allocations(monkeypatch):
        y, final = fla_ops.causal_conv1d(
            x, weight, bias, activation="silu", initial_state=state, output_final_state=True, cu_seqlens=cu,
            backend="triton",
        )  # fmt: skip
        torch.autograd.backward([y, final], [dy, ds])
        tokens = fenced(in_wider_rows(torch.randn(3, D).to(dtype)))
        pool = fenced(torch.zeros(5, D, W - 1))
        slots = fenced(torch.tensor([4, -1, 0]))
        stepped = fla_ops.causal_conv1d_step(
            tokens, weight.detach(), bias.detach(), state=pool, state_indices=slots, backend="triton"
        )
    assert launches
    assert all(r.isfinite().all() for r in (y, final, x.grad, weight.grad, bias.grad, state.grad, stepped))
    assert not pool[1:4].any()


@in_interpreter("causal_conv1d")
@pytest.mark.parametrize(
    ("axis", "entries", "L"),
    [(0, 3, 20), (0, 2, 24), (1, 3, 20), (1, 2, 24), (2, 3, 24)],
    ids=["batch", "batch stride", "channel", "channel stride", "token"],
)
def test_causal_conv1d_offsets_beyond_32_bits(axis, entries, L):
    """A stride is passed divided by what divides it for sure, and overflows by itself when it is multiplied again."""
    near = [torch.randn(entries, entries, L, dtype=torch.bfloat16) for _ in range(2)]
    weight, state = torch.randn(entries, 4), torch.randn(entries, entries, 3)

    def run(x, dy):
        leaf = [t.detach().requires_grad_() for t in (x, weight, state)]
        y, final = fla_ops.causal_conv1d(
            *leaf[:2], initial_state=leaf[2], output_final_state=True, backend="triton", activation="silu"
        )
        grads = torch.autograd.grad([y, final], leaf, [dy, torch.ones_like(final)])
        step = fla_ops.causal_conv1d_step(x[:, :, 0], weight, state=state.clone(), backend="triton")
        return [y.detach(), final.detach(), *grads, step]

    expected = run(*near)
    with watched_memory():
        for found, right in zip(run(*far_apart(near, axis)), expected, strict=True):
            torch.testing.assert_close(found, right)


SPARSE = {
    "tiles that fit": {"T": 64, "D": 32, "DV": 32},
    "nothing fits": {"B": 2, "T": 45, "Tq": 31, "HQ": 4, "HK": 2, "D": 20, "DV": 12},
    "wide": {"T": 35, "HQ": 1, "HK": 1, "D": 136, "DV": 70},
    "one token": {"B": 2, "T": 1, "D": 3, "DV": 5},
}


def in_simt(order="ascending"):
    """The CUDA kernels as the backend "native"."""
    if simt.why_not():
        pytest.skip(simt.why_not())
    return simt.as_native(order)


@in_interpreter("temporal_sparse_attention")
@pytest.mark.parametrize("backend", ["triton", "native"], ids=["triton", "simt"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("shape", SPARSE.values(), ids=SPARSE)
def test_temporal_sparse_attention(monkeypatch, interpreters_rows, shape, packed, backend):
    """Keys that are sinks, held, and near; the last of a block's and of a tile's rows."""
    interpreters_rows(False)
    T = shape["T"]
    if packed:
        shape = shape | {"B": 1, "Tq": T}
    lengths = [0, min(3, T), 0, T - min(3, T)]
    x = sparse_inputs(**shape, dtype=torch.bfloat16 if packed else torch.float32)
    given = {name: fenced(in_wider_rows(t)) for name, t in x.items()}
    given |= {"do": fenced(in_wider_rows(sparse_cotangent(x))), "cu": fenced(bounds(lengths)) if packed else None}
    given["threshold"] = fenced(torch.full((x["k"].shape[2], x["k"].shape[3]), 0.3))
    leaf = {name: given[name].requires_grad_() for name in x}
    options = {"window": 9, "sink": 2, "window_mode": "block" if packed else "band", "cu_seqlens": given["cu"]}
    triton_ = backend == "triton"
    with contextlib.ExitStack() as stack:
        launches = stack.enter_context(watched_memory())
        stack.enter_context(fenced_allocations(monkeypatch) if triton_ else in_simt())
        o = fla_ops.temporal_sparse_attention(
            **leaf, threshold=given["threshold"], **options, return_stats=True, backend=backend
        ).o
        o.backward(given["do"])
    assert bool(launches) == triton_
    assert all(r.isfinite().all() for r in (o, *(t.grad for t in leaf.values())))
    for t in given.values():
        if t is not None:
            assert_fence_stands(t.detach())


@in_interpreter("temporal_sparse_attention")
@pytest.mark.parametrize("backend", ["triton", "native"], ids=["triton", "simt"])
@pytest.mark.parametrize(
    ("axis", "shape"),
    [(0, {"B": 3, "T": 3}), (1, {"T": 193, "HQ": 1, "HK": 1}), (2, {"T": 2, "HQ": 3, "HK": 3})],
    ids=["batch", "token", "head"],
)
def test_temporal_sparse_attention_offsets_beyond_32_bits(axis, shape, backend):
    """In Triton kernels offsets inside of a tile have 32 bits: there are more tokens than a tile has."""
    x = sparse_inputs(**shape, dtype=torch.bfloat16)
    near = [*x.values(), sparse_cotangent(x)]

    def run(*tensors):
        *leaf, do = (t.detach() for t in tensors)
        leaf = [t.requires_grad_() for t in leaf]
        o = fla_ops.temporal_sparse_attention(*leaf, threshold=0.3, window=1, sink=1, backend=backend).o
        return [o, *torch.autograd.grad(o, leaf, do)]

    with contextlib.nullcontext() if backend == "triton" else in_simt():
        expected = run(*near)
        with watched_memory():
            assert all(map(torch.equal, run(*far_apart(near, axis)), expected))


@in_interpreter("decode_attention")
@pytest.mark.parametrize("split", [False, True], ids=["whole", "splits"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_decode_attention(monkeypatch, interpreters_rows, tokens, split):
    """Rows of different lengths in a cache that is longer; nothing behind them is read."""
    interpreters_rows(False)
    torch.use_deterministic_algorithms(not split)
    T = 300
    q, k, v = (torch.randn(2, n, h, d).bfloat16() for n, h, d in ((tokens, 6, 20), (T, 2, 20), (T, 2, 36)))
    lengths = [150, 290]
    for b, n in enumerate(lengths):
        k[b, n:], v[b, n:] = torch.nan, torch.nan
    x = [fenced(in_wider_rows(t)) for t in (q, k, v)]
    with watched_memory() as launches, fenced_allocations(monkeypatch):
        o = fla_ops.exact_decode_attention(*x, lengths=fenced(torch.tensor(lengths)), backend="triton")
    assert len(launches) == 1 + split and o.isfinite().all()


@in_interpreter("decode_attention")
@pytest.mark.parametrize("axis", range(3), ids=["batch", "token", "head"])
def test_decode_attention_offsets_beyond_32_bits(axis):
    near = [torch.randn(3, 3, 3, 16, dtype=torch.bfloat16) for _ in range(3)]
    expected = fla_ops.exact_decode_attention(*near, backend="triton")
    with watched_memory():
        found = fla_ops.exact_decode_attention(*far_apart(near, axis), backend="triton")
    assert torch.equal(found, expected)


@in_interpreter("delta_kv_cache")
@pytest.mark.parametrize("sink", [0, 5])
@pytest.mark.parametrize("D", [20, 128])
def test_delta_kv_cache(monkeypatch, interpreters_rows, D, sink):
    interpreters_rows(False)
    q, k, v = (torch.randn(2, 280, h, d).bfloat16() for h, d in ((2, D), (1, D), (1, 36)))
    k = k.cumsum(1)
    mask = torch.ones(2, 280, dtype=torch.bool)
    mask[1, :30] = False
    cache = fla_ops.DeltaKVCache(threshold=1.0, window=9, sink=sink, backend="triton")
    with watched_memory() as launches, fenced_allocations(monkeypatch):
        for part in (slice(0, 200), slice(200, 201), slice(201, 280)):
            x = [fenced(in_wider_rows(t[:, part])) for t in (k, v)]
            cache.append(*x, mask=fenced(mask[:, part].int()), queries=1)
            o = cache.attend(fenced(in_wider_rows(q[:, part][:, -1])))
            assert o.isfinite().all()
        cache.reorder(torch.tensor([1, 1, 0]))
        dense = cache.to_dense()
    assert {x.kernel for x in launches} >= {
        "append_kernel",
        "hold_kernel",
        "mark_kernel",
        "pack_kernel",
        "attend_kernel",
    }
    assert dense.k.isfinite().all() and dense.v.isfinite().all()
