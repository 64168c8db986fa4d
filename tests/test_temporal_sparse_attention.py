# SPDX-License-Identifier: Apache-2.0
"""Temporal-sparse attention: the reference against its definition, every backend against the reference, and the
promises: what is exact, how far a score may be off, packing, statistics, reproducible bits."""

import math
from functools import partial

import pytest
import torch
from delta_rule_cases import assert_same_bits, bounds
from temporal_sparse_attention_cases import (
    TENSORS,
    check,
    random_cotangent,
    random_inputs,
    references,
    results,
    thresholds,
)

import fla_ops
from fla_ops.reference.temporal_sparse_attention import last_transmitted
from fla_ops.reference.temporal_sparse_attention import temporal_sparse_attention as reference
from fla_ops.testing import assert_matches_reference

OP = "temporal_sparse_attention"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
modes = pytest.mark.parametrize("mode", ["band", "block"])


def attention(x, **options):
    return fla_ops.temporal_sparse_attention(**x, **options)


# The reference itself.


@modes
def test_the_reference_is_the_definition_element_by_element(mode):
    x = random_inputs(1, 23, 4, 2, 3, 5, Tq=20, dtype=torch.float64)
    theta = torch.tensor([[0.1, 0.3, 0.6], [0.2, 0.0, 0.4]], dtype=torch.float64)
    options = {"threshold": theta, "window": 4, "sink": 2, "window_mode": mode, "scale": 0.7}
    o, fired = reference(**x, **options)
    q, k, v = (x[name][0] for name in TENSORS)
    for h in range(2):
        held = [k[0, h].clone()]
        for t in range(1, 23):
            row = held[-1].clone()
            for c in range(3):
                if not abs(k[t, h, c] - row[c]) <= theta[h, c]:
                    row[c] = k[t, h, c]
            held.append(row)
            changed = sum(row[c] != held[-2][c] for c in range(3))
            assert fired[0, h, t] == changed
        for i in range(3, 23):
            near = [j // 4 == i // 4 if mode == "block" else i - j < 4 for j in range(i + 1)]
            for head in (2 * h, 2 * h + 1):
                scores = [0.7 * q[i - 3, head] @ (k[j, h] if near[j] or j < 2 else held[j]) for j in range(i + 1)]
                weights = torch.stack(scores).softmax(0)
                torch.testing.assert_close(o[0, i - 3, head], weights @ v[: i + 1, h])


def test_the_reference_passes_gradcheck_twice():
    x = random_inputs(1, 7, 2, 1, 2, 2, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in x.values()]
    op = partial(fla_ops.temporal_sparse_attention, threshold=0.3, window=2, backend="reference")
    assert torch.autograd.gradcheck(lambda *t: op(*t).o, leaves)
    assert torch.autograd.gradgradcheck(lambda *t: op(*t).o, leaves)


@modes
def test_no_threshold_or_a_wide_window_is_the_references_dense_branch(mode):
    """Bitwise in float64, although the one computes no held score and the other would."""
    x = random_inputs(2, 40, 2, 1, 8, 8, dtype=torch.float64)
    q, k, v = (x[name].transpose(1, 2) for name in TENSORS)
    dense = attention(x, threshold=0.5, window=40, backend="reference").o
    for threshold, window in ((0.0, 3), (torch.zeros(8), 3), (0.5, 40), (0.5, 100), (0.5, 1.0)):
        assert torch.equal(attention(x, threshold=threshold, window=window, backend="reference").o, dense)
    sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(dense, sdpa.transpose(1, 2), rtol=1e-12, atol=1e-12)
    # A threshold that no change reaches goes through the hold, and comes to the same bits.
    tiny = attention(x, threshold=1e-300, window=3, window_mode=mode, backend="reference").o
    assert torch.equal(tiny, dense)


# Every backend against the reference.


@modes
@dtypes
def test_dtypes(backend, ways, dtype, mode):
    for _ in ways():
        check(backend, random_inputs(dtype=dtype), threshold=0.4, window=20, window_mode=mode)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9, 0.999])
def test_from_no_zeros_to_nearly_all(backend, ways, keep):
    """Segments in which most channels fire are computed densely."""
    x = random_inputs(1, 200, 1, 1, 20, 20, keep=keep)
    for threshold in (0.05, 0.5, math.inf):
        for _ in ways():
            check(backend, x, threshold=threshold, window=10)


@pytest.mark.parametrize(("HQ", "HK"), [(1, 1), (4, 2), (6, 1)])
def test_head_groups(backend, ways, HQ, HK):
    theta = torch.linspace(0.1, 0.8, HK * 12).view(HK, 12)
    for _ in ways():
        check(backend, random_inputs(2, 100, HQ, HK, 12, 20), threshold=theta, window=7, sink=2)


@pytest.mark.parametrize(
    ("D", "DV"), [(1, 1), (3, 70), (16, 16), (17, 33), (31, 5), (64, 64), (65, 128), (129, 130), (256, 256)]
)
def test_head_dimensions(backend, ways, D, DV):
    for _ in ways():
        check(backend, random_inputs(1, 130 if D < 100 else 70, 1, 1, D, DV), threshold=0.3, window=5)


@pytest.mark.parametrize("T", [0, 1, 2, 63, 64, 65, 95, 96, 97, 129, 193])
def test_lengths(backend, ways, T):
    for _ in ways():
        check(backend, random_inputs(2, T, 1, 1, 5, 3), threshold=0.3, window=3)


@modes
@pytest.mark.parametrize("Tq", [0, 1, 17, 96, 149])
def test_fewer_queries_than_keys(backend, ways, Tq, mode):
    for _ in ways():
        check(backend, random_inputs(2, 150, 2, 1, Tq=Tq), threshold=0.4, window=30, window_mode=mode, sink=1)


@modes
@pytest.mark.parametrize("window", [1, 2, 16, 50, 64, 149, 150, 1000])
def test_windows(backend, ways, window, mode):
    x = random_inputs(1, 150, 1, 1)
    for _ in ways():
        check(backend, x, threshold=0.5, window=window, window_mode=mode)


@pytest.mark.parametrize("sink", [1, 5, 64, 100, 150, 200])
def test_sinks(backend, ways, sink):
    for _ in ways():
        check(backend, random_inputs(1, 150, 1, 1), threshold=0.5, window=3, sink=sink)


@pytest.mark.parametrize("scale", [-1.5, 0.0, 2.0, 4.0])
def test_a_scale_of_ones_own(backend, ways, scale):
    for _ in ways():
        check(backend, random_inputs(T=80), threshold=0.4, window=3, scale=scale)


LAYOUTS = {
    "head first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slice of wider rows": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "every second": lambda x: torch.stack([x, x], -1)[..., 0],
    "one head expanded": lambda x: x[:, :, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    x = {name: LAYOUTS[layout](t) for name, t in random_inputs(2, 100, dtype=torch.float64).items()}
    do = LAYOUTS[layout](random_cotangent(x))
    options = {"threshold": thresholds(x, 0.3), "window": 9}
    found = results(partial(fla_ops.temporal_sparse_attention, backend=backend), x, do, **options)
    ref64, ref_low = references(x, do, **options)
    for name, value in found.items():
        assert_matches_reference(value, ref64[name], ref_low[name], name, gradient=name.startswith("d"))


# What is promised.


@dtypes
def test_no_threshold_or_a_wide_window_is_dense_attention(backend, ways, dtype):
    x = random_inputs(1, 150, 2, 1, dtype=dtype)
    for _ in ways():
        dense = attention(x, threshold=0.4, window=150, backend=backend).o
        assert torch.equal(attention(x, threshold=0.0, window=1, backend=backend).o, dense)
        check(backend, x, threshold=0.0, window=1)


@pytest.mark.parametrize("seed", range(5))
def test_a_score_is_off_by_no_more_than_the_thresholds_allow(seed):
    """|q (k - k_hat)| <= sum_c theta_c |q_c|, for any keys: steps, walks, noise."""
    r = torch.Generator().manual_seed(seed)
    k = torch.randn(2, 120, 3, 8, generator=r, dtype=torch.float64)
    k = (k, k.cumsum(1), k.cumsum(1) / 9, k.sign(), k.cumsum(1).round())[seed]
    q, theta = torch.randn(8, generator=r, dtype=torch.float64), torch.rand(3, 8, generator=r, dtype=torch.float64)
    last, fired = last_transmitted(k, theta)
    held = k.gather(1, last)
    assert ((k - held).abs() <= theta).all()
    assert (((k - held) @ q).abs() <= (theta * q.abs()).sum(-1) * (1 + 1e-12)).all()
    assert torch.equal(held[:, 0], k[:, 0]) and (fired[:, 0] == 8).all()


def test_outputs_are_as_near_to_dense_attention_as_scores_allow(backend, ways):
    """Weights change by a factor of at most e^(2 bound)."""
    x = random_inputs(1, 200, 2, 1, 16, 1)
    x["v"] = x["v"].abs()
    for _ in ways():
        dense = attention(x, threshold=0.0, window=1, backend=backend).o
        for theta in (0.01, 0.1, 0.3):
            bound = (2 * theta * x["q"].abs().sum(-1, keepdim=True) / 4).exp() * (1 + 1e-5)
            o = attention(x, threshold=theta, window=1, backend=backend).o
            assert ((o <= dense * bound) & (o >= dense / bound)).all()


def test_the_first_row_is_exact(backend, ways):
    x = random_inputs(2, 150, 2, 1)
    for _ in ways():
        o = attention(x, threshold=10.0, window=1, backend=backend).o
        torch.testing.assert_close(o[:, 0], x["v"][:, 0].expand(2, 2, 16), rtol=1e-6, atol=0)


def test_the_hold_never_forgets_and_never_drifts(backend, ways):
    """Keys that come back after 5,000 tokens of noise below the threshold are worth what they were."""
    T, D = 5000, 8
    x = random_inputs(1, T, 1, 1, D, D, Tq=40, keep=0.0)
    x["k"] = x["k"][:, :1] + 0.2 * x["k"].tanh()
    held = x | {"k": x["k"][:, :1].expand(1, T, 1, D)}
    options = {"window": 1, "backend": backend, "scale": 1.0}
    for _ in ways():
        o = attention(x, threshold=0.45, **options).o
        x["k"][:, -40:] = x["k"][:, :1]  # the window's keys are exact
        same = attention(x, threshold=0.45, **options).o
        torch.testing.assert_close(same, attention(held, threshold=0.0, **options).o, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(o, same, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("keep", [0.3, 0.99, 0.9999])
def test_long_sequences_are_as_accurate_as_short_ones(native, all_levels, keep):
    """Scores that are running sums of differences, against the float64 kernel with the same held keys."""
    x = random_inputs(1, 6000, 1, 1, 64, 16, Tq=64, keep=keep)
    options = {"threshold": thresholds(x, 0.3), "window": 1, "backend": native}
    exact = attention({n: t.double() for n, t in x.items()}, **options).o
    dense = attention(x, **options | {"threshold": 0.0}).o.double()
    budget = (dense - attention({n: t.double() for n, t in x.items()}, **options | {"threshold": 0.0}).o).abs().max()
    for _ in all_levels():
        error = (attention(x, **options).o.double() - exact).abs().max()
        assert error <= 3 * budget + 1e-7, (error.item(), budget.item())


def test_a_nan_key_is_not_swallowed(backend, ways):
    """It fires, reaches every query that sees it and no earlier one, and the next key is itself again."""
    for where in (0, 5, 70):
        x = random_inputs(1, 150, 1, 1)
        x["k"][0, where, 0, 3] = torch.nan
        for _ in ways():
            o, stats = attention(x, threshold=100.0, window=1, return_stats=True, backend=backend)
            assert torch.equal(o.isnan().all(-1)[0, :, 0], torch.arange(150) >= where)
            assert torch.equal(o.isnan().any(-1), o.isnan().all(-1))
            # Channel 3 fires at the NaN and at the key after it.
            assert stats.zeros.item() == pytest.approx(1 - (16 + (2 if where else 1)) / (150 * 16))


def test_a_nan_value_reaches_no_earlier_query(native, all_levels):
    x = random_inputs(1, 150, 1, 1)
    for where in (5, 100):
        v = x["v"].clone()
        v[0, where, 0, 2] = torch.nan
        for _ in all_levels():
            o = attention(x | {"v": v}, threshold=0.3, window=1, backend=native).o
            assert torch.equal(o[0, :, 0, 2].isnan(), torch.arange(150) >= where)
            assert not o[..., 3].isnan().any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, 3e38])
def test_keys_that_overflow_meet_the_reference(backend, ways, value):
    x = random_inputs(1, 150, 1, 1, 4, 4)
    x["k"][0, 30:33, 0, 1] = value
    x["k"][0, 33, 0, 1] = -value
    expected = attention({n: t.double() for n, t in x.items()}, threshold=0.3, window=1, backend="reference").o
    for _ in ways():
        o = attention(x, threshold=0.3, window=1, backend=backend).o
        # Where a score overflows in float32 alone, NaN may come of it, as in any float32 attention.
        early = o[:, :30]
        torch.testing.assert_close(early.double(), expected[:, :30], rtol=1e-4, atol=1e-5)
        if not math.isfinite(value):
            assert torch.equal(o.isnan(), expected.isnan())


# Packed sequences.

LENGTHS = [[150], [1, 2, 3, 63, 64, 65], [0, 70, 0, 96, 0], [97, 1, 100]]


@modes
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_sequences_are_separate_calls(backend, ways, lengths, mode):
    T, cu = sum(lengths), bounds(lengths)
    x = random_inputs(1, T, 2, 1, dtype=torch.float64)
    do = random_cotangent(x)
    options = {"threshold": 0.4, "window": 10, "window_mode": mode, "sink": 2, "backend": backend}
    for _ in ways():
        packed = results(fla_ops.temporal_sparse_attention, x, do, cu_seqlens=cu, **options)
        for a, b in zip(cu, cu[1:], strict=False):
            part = {n: t[:, a:b] for n, t in x.items()}
            alone = results(fla_ops.temporal_sparse_attention, part, do[:, a:b], **options)
            assert_same_bits({n: t[:, a:b] for n, t in packed.items()}, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_packed_sequences_meet_the_reference(backend, ways, dtype):
    x = random_inputs(1, 200, 2, 1, dtype=dtype)
    for kind in (torch.int32, torch.int64):
        for _ in ways():
            check(backend, x, threshold=0.4, window=10, cu_seqlens=bounds([70, 0, 1, 129], kind))


def test_bad_bounds_touch_nothing_outside(backend, monkeypatch):
    """Unchecked, as on a device: tokens that no sequence covers are 0, in outputs and gradients."""
    monkeypatch.setattr(fla_ops._checks, "_can_read", lambda x: False)
    x = random_inputs(1, 100, 1, 1, dtype=torch.float64)
    do = random_cotangent(x)
    for values in ([0, 40, 70], [5, 5, 60], [-7, 30, 1000], [80, 20, 90]):
        cu = torch.tensor(values)
        found = results(
            fla_ops.temporal_sparse_attention, x, do, threshold=0.3, window=4, cu_seqlens=cu, backend=backend
        )
        first, last = max(min(values), 0), min(max(values), 100)
        for name, t in found.items():
            assert torch.isfinite(t).all(), (values, name)
            assert (t[:, :first] == 0).all() and (t[:, last:] == 0).all(), (values, name)


# Statistics.


@modes
@pytest.mark.parametrize(("Tq", "sink", "cu"), [(60, 0, None), (23, 5, None), (60, 3, [20, 0, 40])])
def test_statistics_count_what_they_say(backend, mode, Tq, sink, cu):
    x = random_inputs(1, 60, 4, 2, 6, 6, Tq=Tq)
    cu = None if cu is None else bounds(cu)
    options = {"window": 7, "sink": sink, "window_mode": mode, "cu_seqlens": cu}
    stats = attention(x, threshold=0.4, return_stats=True, backend=backend, **options).stats
    starts = [(0, 60)] if cu is None else list(zip(cu.tolist(), cu.tolist()[1:], strict=False))
    assert stats.zeros.shape == stats.skipped.shape == (len(starts), 2)
    assert stats.zeros.dtype == stats.skipped.dtype == torch.float64
    for n, (a, b) in enumerate(starts):
        T = b - a
        _, fired = last_transmitted(x["k"][:, a:b], thresholds(x, 0.4))
        for h in range(2):
            total = saved = 0
            for i in range(T - Tq if cu is None else 0, T):
                for j in range(i + 1):
                    near = i // 7 == j // 7 if mode == "block" else i - j < 7
                    total += 6
                    saved += 0 if near or j < sink else 6 - fired[0, j, h].item()
            assert stats.skipped[n, h].item() == pytest.approx(saved / max(total, 1))
            zeros = 1 - fired[0, :, h].sum().item() / (6 * T) if T else 0
            assert stats.zeros[n, h].item() == pytest.approx(zeros)


def test_statistics_are_only_computed_on_demand_and_carry_no_gradient(backend):
    x = random_inputs(1, 20, 1, 1)
    x["k"].requires_grad_()
    out = attention(x, threshold=0.4, window=2, backend=backend)
    assert out.stats is None and out.o.requires_grad
    with_stats = attention(x, threshold=0.4, window=2, return_stats=True, backend=backend)
    assert torch.equal(with_stats.o, out.o)
    assert not with_stats.stats.zeros.requires_grad
    dense = attention(x, threshold=0.4, window=20, return_stats=True, backend=backend).stats
    assert dense.skipped.item() == 0 and torch.equal(dense.zeros, with_stats.stats.zeros)


# Gradients.


@modes
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_the_kernels_pass_gradcheck(native, mode, packed):
    x = random_inputs(1, 9, 2, 1, 3, 2, Tq=9 if packed else 7, dtype=torch.float64)
    cu = torch.tensor([0, 4, 4, 9]) if packed else None
    options = {"threshold": 0.3, "window": 2, "window_mode": mode, "sink": 1, "cu_seqlens": cu, "backend": native}
    op = partial(fla_ops.temporal_sparse_attention, **options)
    assert torch.autograd.gradcheck(lambda *t: op(*t).o, [t.requires_grad_() for t in x.values()])


def test_a_held_keys_gradient_goes_to_the_key_that_was_transmitted(backend):
    """With one query, a window of 1 and a threshold that nothing exceeds: all to the first key, save the last's own."""
    x = random_inputs(1, 80, 1, 1, dtype=torch.float64, Tq=1)
    do = random_cotangent(x)
    found = results(fla_ops.temporal_sparse_attention, x, do, threshold=math.inf, window=1, backend=backend)
    assert (found["dk"][:, 1:-1] == 0).all()
    assert (found["dk"][:, 0] != 0).all() and (found["dk"][:, -1] != 0).all()


def test_only_needed_gradients(backend):
    """Each alone, and each left out, with the bits that all together have."""
    x = random_inputs(1, 80, 2, 1, dtype=torch.float64)
    do = random_cotangent(x)
    op = partial(fla_ops.temporal_sparse_attention, threshold=0.3, window=4, backend=backend)
    everything = results(op, x, do)
    for name in TENSORS:
        for wanted in ((name,), tuple(n for n in TENSORS if n != name)):
            found = results(op, x, do, wanted=wanted)
            assert_same_bits(found, {n: everything[n] for n in found})


def test_second_derivatives_are_refused_with_a_cure(native):
    x = random_inputs(1, 10, 1, 1)
    q = x["q"].requires_grad_()
    o = attention(x, threshold=0.3, window=2, backend=native).o
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative.*backend="reference"'):
        dq.sum().backward()


# The CPU kernels.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [None, [60, 0, 1, 300]], ids=["", "packed"])
def test_threads_change_no_bit(native, threads, all_levels, dtype, lengths):
    cu = None if lengths is None else bounds(lengths)
    x = random_inputs(1 if lengths else 2, 361, 4, 2, 24, 40, dtype=dtype)
    do = random_cotangent(x)
    op = partial(fla_ops.temporal_sparse_attention, threshold=0.3, window=9, cu_seqlens=cu, backend=native)
    for _ in all_levels():
        found = []
        for n in (1, 2, 3, 2):
            threads(n)
            found.append(results(op, x, do))
        for other in found[1:]:
            assert_same_bits(other, found[0])


def test_the_batch_around_a_row_changes_no_bit(native):
    x = random_inputs(3, 200, 2, 1)
    options = {"threshold": 0.3, "window": 9, "backend": native}
    together = attention(x, **options).o
    for b in range(3):
        alone = attention({n: t[b : b + 1] for n, t in x.items()}, **options).o
        assert torch.equal(alone[0], together[b])


def test_wider_heads_than_the_kernels_have():
    x = random_inputs(1, 5, 1, 1, 300, 4)
    with pytest.raises(RuntimeError, match=r"temporal_sparse_attention: backend 'native' cannot run here: .*256, got"):
        attention(x, threshold=0.3, window=1, backend="native")
    fla_ops._backend._warned.clear()
    with pytest.warns(fla_ops.FallbackWarning, match="temporal_sparse_attention runs on the slow reference"):
        attention(x, threshold=0.3, window=1)


def test_autocast_casts_the_main_tensors(backend):
    x = random_inputs(1, 40, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        o = attention(x, threshold=0.3, window=4, backend=backend).o
    low = {n: t.bfloat16() for n, t in x.items()}
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, attention(low, threshold=0.3, window=4, backend=backend).o)


@pytest.mark.no_poison
def test_opcheck(native):
    x = random_inputs(1, 40, 2, 1, 5, 3, dtype=torch.bfloat16)
    attention(x, threshold=0.3, window=4, backend=native)  # loads the library and its fakes
    ops, utils = torch.ops.fla_ops, ("test_schema", "test_faketensor")
    theta = thresholds(x, 0.3).contiguous()
    for cu, holds, count in ((None, True, False), (bounds([10, 30]), False, True), (None, False, False)):
        args = (*x.values(), theta, cu, 0.5, 4, False, 1, holds)
        torch.library.opcheck(ops.temporal_sparse_attention_forward, (*args, count), test_utils=utils)
        o, norms, _ = ops.temporal_sparse_attention_forward(*args, count)
        for needs in (0, 1, 2, 4, 7):
            given = (*args, o, norms, torch.ones_like(o), needs)
            torch.library.opcheck(ops.temporal_sparse_attention_backward, given, test_utils=utils)


@pytest.mark.no_poison
def test_compiles_whole(native):
    x = random_inputs(1, 70, 2, 1)

    def both(q, k, v):
        o, stats = fla_ops.temporal_sparse_attention(
            q, k, v, threshold=0.3, window=0.1, return_stats=True, backend=native
        )
        return o, stats.skipped

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    found = []
    for op in (both, compiled):
        q, k, v = (t.clone().requires_grad_() for t in x.values())
        o, skipped = op(q, k, v)
        found.append(
            {"o": o, "skipped": skipped} | dict(zip(TENSORS, torch.autograd.grad(o.sum(), (q, k, v)), strict=True))
        )
    assert_same_bits(*found)


def test_lists_do_not_meet(native, threads, all_levels):
    """Many short sequences and heads of few channels: what one task packs lies right behind another's."""
    lengths = [2, 3, 1, 2] * 40
    x = random_inputs(1, sum(lengths), 16, 16, 1, 3, keep=0.0, dtype=torch.float32)
    options = {"threshold": 0.3, "window": 1, "cu_seqlens": bounds(lengths)}
    expected = attention(x, **options, backend="reference").o
    for _ in all_levels():
        for n in (1, 2, 4):
            threads(n)
            for _ in range(5):
                torch.testing.assert_close(attention(x, **options, backend=native).o, expected, rtol=1e-5, atol=1e-6)
