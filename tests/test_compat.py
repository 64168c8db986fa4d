# SPDX-License-Identifier: Apache-2.0
"""The adapters: the peers' signatures, and their documented semantics on top of our ops. mamba-ssm's semantics:
test_compat_mamba.py."""

import inspect

import pytest
import torch
from torch.nn import functional as F

import fla_ops
from fla_ops import _backend
from fla_ops.compat import causal_conv1d as cc1d
from fla_ops.compat import fla, mamba_ssm
from fla_ops.reference.delta_rule import delta_rule as reference
from fla_ops.reference.delta_rule_general import delta_rule_general


@pytest.fixture
def backend(backend):
    """Every `backend="auto"` call of the test runs on this one."""
    with fla_ops.use_backend(backend):
        yield backend


@pytest.fixture
def on_reference():
    with fla_ops.use_backend("reference"):
        yield


B, T, H, HV, K, V = 2, 7, 2, 4, 5, 3


def inputs(batch=B, length=T, heads=HV, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "q": normal(batch, length, H, K),
        "k": normal(batch, length, H, K),
        "v": normal(batch, length, heads, V),
        "beta": normal(batch, length, heads).sigmoid(),
        "g": -normal(batch, length, heads).exp(),
    }


def state(count=B, heads=HV, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, heads, K, V, generator=generator, dtype=torch.float64)


def assert_close(actual, expected, bound=2e-12):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if expected.numel():
        assert (actual - expected).abs().max().item() <= bound * max(expected.abs().max().item(), 1e-3)


# Signatures, from the wheels of fla-core 0.6.0 and the sources of causal-conv1d 1.7.0 and mamba-ssm 2.3.2. Behind "|"
# stand the keywords that fla takes out of its **kwargs.
NO = inspect.Parameter.empty
CHUNK = {"scale": None, "initial_state": None, "output_final_state": False, "use_qk_l2norm_in_kernel": False}
SIGNATURES = [
    (
        fla.chunk_delta_rule,
        dict.fromkeys(["q", "k", "v", "beta"], NO) | CHUNK | {"cu_seqlens": None, "cu_seqlens_cpu": None},
        {"chunk_size": 64},
    ),
    (
        fla.fused_recurrent_delta_rule,
        dict.fromkeys(["q", "k", "v"], NO) | {"beta": None} | CHUNK | {"cu_seqlens": None},
        {},
    ),
    (
        fla.chunk_gated_delta_rule,
        dict.fromkeys(["q", "k", "v", "g", "beta"], NO)
        | CHUNK
        | {"use_beta_sigmoid_in_kernel": False, "allow_neg_eigval": False, "state_v_first": False}
        | {"cu_seqlens": None, "cu_seqlens_cpu": None, "chunk_indices": None, "cp_context": None},
        {
            "chunk_size": 64,
            "use_gate_in_kernel": False,
            "A_log": None,
            "dt_bias": None,
            "transpose_state_layout": None,
        },
    ),
    (
        fla.fused_recurrent_gated_delta_rule,
        dict.fromkeys(["q", "k", "v"], NO)
        | {"g": None, "gk": None, "gv": None, "beta": None}
        | CHUNK
        | {"use_gate_in_kernel": False, "A_log": None, "dt_bias": None, "use_beta_sigmoid_in_kernel": False}
        | {"allow_neg_eigval": False, "state_v_first": False, "cu_seqlens": None},
        {"transpose_state_layout": None},
    ),
    (
        fla.chunk_gated_delta_product,
        dict.fromkeys(["q", "k", "v", "g", "beta", "num_householder"], NO)
        | CHUNK
        | {"cu_seqlens": None, "cu_seqlens_cpu": None, "cp_context": None},
        {},
    ),
    (
        fla.causal_conv1d,
        {"x": NO, "weight": None, "bias": None, "residual": None, "initial_state": None, "output_final_state": False}
        | {"activation": None, "backend": "triton", "cu_seqlens": None, "cu_seqlens_cpu": None}
        | {"chunk_indices": None, "cp_context": None},
        {"seq_idx": None},
    ),
    (
        fla.causal_conv1d_update,
        {"x": NO, "cache": NO, "residual": None, "weight": None, "bias": None, "activation": None},
        {},
    ),
    (
        cc1d.causal_conv1d_fn,
        {"x": NO, "weight": NO, "bias": None, "seq_idx": None, "initial_states": None}
        | {"return_final_states": False, "final_states_out": None, "activation": None},
        {},
    ),
    (
        cc1d.causal_conv1d_update,
        {"x": NO, "conv_state": NO, "weight": NO, "bias": None, "activation": None}
        | {"cache_seqlens": None, "conv_state_indices": None},
        {},
    ),
    (
        mamba_ssm.selective_scan_fn,
        dict.fromkeys(["u", "delta", "A", "B", "C"], NO)
        | {"D": None, "z": None, "delta_bias": None, "delta_softplus": False, "return_last_state": False},
        {},
    ),
    (
        mamba_ssm.mamba_inner_fn,
        dict.fromkeys(["xz", "conv1d_weight", "conv1d_bias", "x_proj_weight", "delta_proj_weight"], NO)
        | dict.fromkeys(["out_proj_weight", "out_proj_bias", "A"], NO)
        | {"B": None, "C": None, "D": None, "delta_bias": None, "B_proj_bias": None, "C_proj_bias": None}
        | {"delta_softplus": True, "checkpoint_lvl": 1, "b_rms_weight": None, "c_rms_weight": None}
        | {"dt_rms_weight": None, "b_c_dt_rms_eps": 1e-6},
        {},
    ),
    (
        mamba_ssm.selective_state_update,
        dict.fromkeys(["state", "x", "dt", "A", "B", "C"], NO)
        | {"D": None, "z": None, "dt_bias": None, "dt_softplus": False, "state_batch_indices": None},
        {},
    ),
    (
        mamba_ssm.Mamba,
        {"d_model": NO, "d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto", "dt_min": 0.001, "dt_max": 0.1}
        | {"dt_init": "random", "dt_scale": 1.0, "dt_init_floor": 1e-4, "conv_bias": True, "bias": False}
        | {"use_fast_path": True, "layer_idx": None, "device": None, "dtype": None},
        {},
    ),
    (mamba_ssm.Mamba.forward, {"self": NO, "hidden_states": NO, "inference_params": None}, {}),
    (mamba_ssm.Mamba.step, dict.fromkeys(["self", "hidden_states", "conv_state", "ssm_state"], NO), {}),
    (
        mamba_ssm.Mamba.allocate_inference_cache,
        {"self": NO, "batch_size": NO, "max_seqlen": NO, "dtype": None},
        {},
    ),
]


@pytest.mark.parametrize(("function", "positional", "keywords"), SIGNATURES)
def test_signatures_are_the_peers(function, positional, keywords):
    parameters = inspect.signature(function).parameters.values()
    kinds = {kind: {p.name: p.default for p in parameters if p.kind == kind} for kind in inspect._ParameterKind}
    assert list(kinds[inspect.Parameter.POSITIONAL_OR_KEYWORD].items()) == list(positional.items())
    assert kinds[inspect.Parameter.KEYWORD_ONLY] == keywords
    assert not kinds[inspect.Parameter.VAR_KEYWORD] and not kinds[inspect.Parameter.VAR_POSITIONAL]


# fla's delta rules.


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("l2norm", [False, True])
def test_plain_rules_are_the_op(packed, l2norm, backend):
    t = inputs(batch=1 if packed else B, heads=H)
    t.pop("g")
    cu = torch.tensor([0, 0, 4, T]) if packed else None
    count = 3 if packed else B
    s = state(count, H)
    o, final = fla_ops.delta_rule(
        **t, scale=0.3, initial_state=s, output_final_state=True, cu_seqlens=cu, qk_l2norm=l2norm
    )
    # By position, in fla's order.
    for function in (fla.chunk_delta_rule, fla.fused_recurrent_delta_rule):
        result = function(t["q"], t["k"], t["v"], t["beta"], 0.3, s, True, l2norm, cu)
        assert type(result) is tuple and torch.equal(result[0], o) and torch.equal(result[1], final)
        assert function(t["q"], t["k"], t["v"], t["beta"])[1] is None


def test_beta_defaults_to_ones(on_reference):
    t = inputs()
    ones = torch.ones(B, T, HV, dtype=torch.float64)
    expected = reference(t["q"], t["k"], t["v"], ones)[0]
    assert torch.equal(fla.fused_recurrent_delta_rule(t["q"], t["k"], t["v"])[0], expected)
    assert torch.equal(fla.fused_recurrent_gated_delta_rule(t["q"], t["k"], t["v"])[0], expected)


def gated(function, t, **options):
    """Either gated function, through its own argument order."""
    if function is fla.chunk_gated_delta_rule:
        return function(t["q"], t["k"], t["v"], t["g"], t["beta"], **options)
    return function(t["q"], t["k"], t["v"], t["g"], None, None, t["beta"], **options)


GATED = pytest.mark.parametrize("function", [fla.chunk_gated_delta_rule, fla.fused_recurrent_gated_delta_rule])


@GATED
def test_gated_rules_are_the_op(function, backend):
    t, s = inputs(), state()
    o, final = fla_ops.delta_rule(**t, initial_state=s, output_final_state=True, qk_l2norm=True)
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    got, got_final = gated(function, t, initial_state=s, **options)
    assert torch.equal(got, o) and torch.equal(got_final, final)
    assert gated(function, t)[1] is None
    view = s.transpose(-1, -2).contiguous()
    got, v_first = gated(function, t, initial_state=view, state_v_first=True, **options)
    assert_close(got, o)
    assert_close(v_first, final.transpose(-1, -2))
    with pytest.warns(DeprecationWarning, match="state_v_first"):
        old = gated(function, t, initial_state=view, transpose_state_layout=True, **options)
    assert_close(old[1], v_first)


@GATED
def test_gate_and_beta_in_kernel(function, backend):
    t = inputs()
    t["g"] = torch.randn(B, T, HV, dtype=torch.float64)
    logits = t["beta"] = torch.randn(B, T, HV, dtype=torch.float64)
    A_log, dt_bias = torch.randn(HV, dtype=torch.float64), torch.randn(HV, dtype=torch.float64)
    options = {"use_gate_in_kernel": True, "A_log": A_log, "use_beta_sigmoid_in_kernel": True}
    for bias in (None, dt_bias):
        for neg in (False, True):
            g = -A_log.exp() * F.softplus(t["g"] + (0 if bias is None else bias))
            beta = logits.sigmoid() * (2 if neg else 1)
            expected = fla_ops.delta_rule(t["q"], t["k"], t["v"], beta, g).o
            assert_close(gated(function, t, dt_bias=bias, allow_neg_eigval=neg, **options)[0], expected)


@GATED
def test_gradients_reach_every_tensor(function, backend):
    t, s = inputs(), state()
    t["g"] = torch.randn(B, T, HV, dtype=torch.float64)
    extra = {"A_log": torch.randn(HV, dtype=torch.float64), "dt_bias": torch.randn(HV, dtype=torch.float64)}
    leaves = [x.requires_grad_() for x in (*t.values(), s, *extra.values())]
    options = {"use_gate_in_kernel": True, "output_final_state": True, **extra}
    o, final = gated(function, t, initial_state=s, **options)
    (o.sum() + final.square().sum()).backward()
    got = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad = None
    g = -extra["A_log"].exp() * F.softplus(t["g"] + extra["dt_bias"])
    o, final = reference(t["q"], t["k"], t["v"], t["beta"], g, initial_state=s, output_final_state=True)
    (o.sum() + final.square().sum()).backward()
    for x, grad in zip(leaves, got, strict=True):
        assert_close(grad, x.grad, 1e-11)


@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_chunk_size_is_accepted_and_ignored(chunk_size, on_reference):
    t = inputs(heads=H)
    whole = fla.chunk_gated_delta_rule(**t)[0]
    assert torch.equal(fla.chunk_gated_delta_rule(**t, chunk_size=chunk_size)[0], whole)
    t.pop("g")
    assert torch.equal(fla.chunk_delta_rule(**t, chunk_size=chunk_size)[0], fla.chunk_delta_rule(**t)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, backend):
    t = inputs(dtype=dtype)
    exact = reference(**{name: x.double() for name, x in t.items()}, qk_l2norm=True)[0]
    for beta_dtype in (torch.float32, torch.bfloat16, torch.float64):  # fla takes any dtype of beta and g
        mixed = t | {"beta": t["beta"].to(beta_dtype), "g": t["g"].to(beta_dtype)}
        o, final = fla.chunk_gated_delta_rule(**mixed, output_final_state=True, use_qk_l2norm_in_kernel=True)
        assert o.dtype == dtype and final.dtype == torch.float32
        bound = 4 * max(torch.finfo(dtype).eps, torch.finfo(beta_dtype).eps)
        assert (o.double() - exact).abs().max() < bound * exact.abs().max()


# fla's DeltaProduct: n rows a token in k, v and beta, one in q and g.

MICRO = 3


def product_inputs(batch=B, dtype=torch.float64):
    wide, narrow = inputs(batch, T * MICRO, dtype=dtype), inputs(batch, dtype=dtype, seed=2)
    return wide | {"q": narrow["q"], "g": narrow["g"]}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_gate", [False, True])
@pytest.mark.parametrize("l2norm", [False, True])
def test_product_is_the_op(l2norm, with_gate, packed, backend):
    t = product_inputs(1 if packed else B)
    q, k, v, beta = (t[name] for name in ("q", "k", "v", "beta"))
    g = t["g"] if with_gate else None
    cu = torch.tensor([0, 0, 4, T]) if packed else None
    s = state(3 if packed else B)
    options = {"num_householder": MICRO, "initial_state": s, "output_final_state": True, "cu_seqlens": cu}
    o, final = fla_ops.delta_product(q, k, v, beta, g, scale=0.3, qk_l2norm=l2norm, **options)
    # By position, in fla's order.
    result = fla.chunk_gated_delta_product(q, k, v, g, beta, MICRO, 0.3, s, True, l2norm, cu, cu)
    assert type(result) is tuple and torch.equal(result[0], o) and torch.equal(result[1], final)
    plain, none = fla.chunk_gated_delta_product(q, k, v, g, beta, num_householder=MICRO, cu_seqlens=cu)
    assert none is None
    assert torch.equal(plain, fla_ops.delta_product(q, k, v, beta, g, num_householder=MICRO, cu_seqlens=cu).o)


def test_product_is_its_recurrence(backend):
    """fla's documented semantics, step by step: one decay a token, n updates, one read. With gradients."""
    t, s = product_inputs(), state()
    leaves = [x.requires_grad_() for x in (*t.values(), s)]
    o, final = fla.chunk_gated_delta_product(**t, num_householder=MICRO, initial_state=s, output_final_state=True)
    got = torch.autograd.grad(o.square().sum() + final.square().sum(), leaves)
    expected, S = [], s
    k = t["k"].repeat_interleave(HV // H, 2)
    for i in range(T):
        S = S * t["g"][:, i, :, None, None].exp()
        for j in range(i * MICRO, (i + 1) * MICRO):
            key = k[:, j, :, :, None]
            u = t["v"][:, j] - (S * key).sum(2)
            S = S + key * (t["beta"][:, j, :, None] * u)[:, :, None]
        query = t["q"][:, i].repeat_interleave(HV // H, 1)
        expected.append((S * query[..., None]).sum(2) * K**-0.5)
    expected = torch.stack(expected, 1)
    assert_close(o, expected)
    assert_close(final, S)
    for a, b in zip(got, torch.autograd.grad(expected.square().sum() + S.square().sum(), leaves), strict=True):
        assert_close(a, b, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_product_dtypes(dtype, backend):
    t = product_inputs(dtype=dtype)
    options = {"num_householder": MICRO, "use_qk_l2norm_in_kernel": True, "output_final_state": True}
    exact = fla.chunk_gated_delta_product(**{name: x.double() for name, x in t.items()}, **options)[0]
    for side in (torch.float32, torch.bfloat16, torch.float64):
        o, final = fla.chunk_gated_delta_product(**t | {"beta": t["beta"].to(side), "g": t["g"].to(side)}, **options)
        assert o.dtype == dtype and final.dtype == torch.float32
        bound = 4 * max(torch.finfo(dtype).eps, torch.finfo(side).eps)
        assert (o.double() - exact).abs().max() < bound * exact.abs().max()


# What only the general reference has.


@pytest.mark.parametrize("packed", [False, True])
def test_general_loop_reduces_to_the_rule(packed):
    t = inputs(1 if packed else B)
    cu = torch.tensor([0, 3, 3, T]) if packed else None
    s = state(3 if packed else B)
    o, final = reference(**t, scale=0.5, initial_state=s, output_final_state=True, cu_seqlens=cu, qk_l2norm=True)
    options = {"scale": 0.5, "initial_state": s, "cu_seqlens": cu, "qk_l2norm": True}
    q, k, v, beta, g = (t[name] for name in ("q", "k", "v", "beta", "g"))
    wide = {
        "g": (beta, g, None, None),
        "gk": (beta, None, g[..., None].expand(*g.shape, K), None),
        "gv": (beta[..., None].expand_as(v), None, None, g[..., None].expand_as(v)),
        "halves": (beta, g / 2, g[..., None].expand(*g.shape, K) / 4, g[..., None].expand_as(v) / 4),
    }
    for rate, *gates in wide.values():
        got, got_final = delta_rule_general(q, k, v, rate, *gates, **options)
        assert_close(got, o)
        assert_close(got_final, final)


def test_vector_gates_and_beta_by_hand(on_reference):
    t = inputs(batch=1, heads=H)
    gk, gv = -torch.rand(1, T, H, K, dtype=torch.float64), -torch.rand(1, T, H, V, dtype=torch.float64)
    beta = torch.rand(1, T, H, V, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (t["q"], t["g"], gk, gv, beta)]
    o, final = fla.fused_recurrent_gated_delta_rule(
        t["q"], t["k"], t["v"], t["g"], gk, gv, beta, scale=1.0, output_final_state=True
    )
    for h in range(H):
        S = torch.zeros(K, V, dtype=torch.float64)
        for i in range(T):
            S = S * t["g"][0, i, h].exp() * gk[0, i, h].exp()[:, None] * gv[0, i, h].exp()
            k = t["k"][0, i, h]
            S = S + torch.outer(k, beta[0, i, h] * (t["v"][0, i, h] - S.T @ k))
            assert_close(o[0, i, h], S.T @ t["q"][0, i, h])
        assert_close(final[0, h], S)
    o.sum().backward()
    assert all(x.grad.abs().max() > 0 for x in leaves)
    plain, _ = fla.fused_recurrent_delta_rule(t["q"], t["k"], t["v"], beta, scale=1.0)
    assert_close(plain, delta_rule_general(t["q"], t["k"], t["v"], beta, scale=1.0)[0])


def test_general_options_are_never_slow_in_silence(monkeypatch):
    t = inputs()
    gv = torch.zeros(B, T, HV, V, dtype=torch.float64)
    call = lambda: fla.fused_recurrent_gated_delta_rule(**t, gv=gv)  # noqa: E731
    monkeypatch.setattr(_backend, "_warned", set())
    with pytest.warns(fla_ops.FallbackWarning, match="gk, gv"):
        call()
    call()  # once per cause
    with fla_ops.use_backend("native"), pytest.raises(RuntimeError, match="gk, gv"):
        call()


# fla's convolution: time before channels, caches of W columns.

D, W, L = 6, 4, 9


def conv_inputs(batch=B, length=L, width=W, dtype=torch.float64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, length, D), (D, width), (D,))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [0, 1, 3, 9])
def test_fla_conv(width, length, backend):
    x, weight, bias = conv_inputs(length=length, width=width)
    residual, cache = torch.randn_like(x), torch.randn(B, D, width, dtype=torch.float64)
    y, final = fla.causal_conv1d(x, weight, bias, residual, cache, True, "silu", backend="cuda")
    padded = torch.cat([cache[:, :, 1:], x.transpose(1, 2)], 2)
    expected = F.silu(F.conv1d(padded, weight[:, None], bias, groups=D)) if length else padded.new_empty(B, D, 0)
    assert_close(y, expected.transpose(1, 2) + residual)
    assert_close(final, torch.cat([cache, x.transpose(1, 2)], 2)[:, :, length:])
    y, final = fla.causal_conv1d(x, weight, output_final_state=True)
    assert_close(final, F.pad(x.transpose(1, 2), (width, 0))[:, :, length:])
    heads = x.unflatten(2, (2, 3))
    assert torch.equal(fla.causal_conv1d(heads, weight)[0], y.unflatten(2, (2, 3)))


def test_fla_conv_packed_equals_separate(backend):
    lengths = [1, 0, 5, 2, 3]
    x, weight, bias = conv_inputs(1, sum(lengths))
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    for cache in (None, torch.randn(5, D, W, dtype=torch.float64)):
        leaves = [t for t in (x, weight, bias, cache) if t is not None]
        for leaf in leaves:
            leaf.grad = None
            leaf.requires_grad_()
        y, final = fla.causal_conv1d(x, weight, bias, None, cache, True, cu_seqlens=cu, cu_seqlens_cpu=cu)
        (y.square().sum() + final.square().sum()).backward()
        packed = [leaf.grad.clone() for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        parts = [
            fla.causal_conv1d(x[:, a:b], weight, bias, None, None if cache is None else cache[n : n + 1], True)
            for n, (a, b) in enumerate(zip(cu, cu[1:], strict=False))
        ]
        assert_close(y, torch.cat([p[0] for p in parts], 1))
        assert_close(final, torch.cat([p[1] for p in parts]))
        sum(p[0].square().sum() + p[1].square().sum() for p in parts).backward()
        for leaf, grad in zip(leaves, packed, strict=True):
            assert_close(grad, leaf.grad, 1e-11)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_fla_update_continues_the_convolution(width, backend):
    x, weight, bias = conv_inputs(width=width)
    residual = torch.randn_like(x)
    whole, _ = fla.causal_conv1d(x, weight, bias, residual, activation="swish")
    weight.requires_grad_()  # decoding with trainable weights and grad mode on works, as with fla
    cache = torch.full((B, D, width), 0.0, dtype=torch.float64)
    for t in range(L):
        token, rest = x[:, t], residual[:, t]
        if t % 3 == 1:
            token, rest = token[:, None], rest[:, None]  # [N, 1, D]
        elif t % 3 == 2:
            token, rest = token[None], rest[None]  # [1, N, D]
        y, same = fla.causal_conv1d_update(token, cache, rest, weight, bias, "silu")
        assert same is cache and y.shape == token.shape and not y.requires_grad
        assert_close(y.reshape(B, D), whole[:, t])
        # All W columns hold the last W inputs, the newest on the right.
        assert torch.equal(cache, F.pad(x[:, : t + 1].transpose(1, 2), (width, 0))[:, :, -width:])


def test_fla_update_writes_through_a_transposed_cache(backend):
    x, weight, _ = conv_inputs()
    storage = torch.zeros(B, W, D, dtype=torch.float64)
    for t in range(L):
        y, _ = fla.causal_conv1d_update(x[:, t], storage.transpose(1, 2), weight=weight)
    assert torch.equal(storage, x[:, -W:])
    assert_close(y, fla.causal_conv1d(x, weight)[0][:, -1])


# causal-conv1d: channels before time.


def plain_conv(x, weight, bias, state=None, activation=None):
    width = weight.shape[1]
    x = F.pad(x, (width - 1, 0)) if state is None else torch.cat([state, x], 2)
    y = F.conv1d(x, weight[:, None], bias, groups=D)
    return y if activation is None else F.silu(y)


@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_conv_fn(activation, channel_last, backend):
    x, weight, bias = conv_inputs()
    x = x.transpose(1, 2) if channel_last else x.transpose(1, 2).contiguous()
    assert_close(
        cc1d.causal_conv1d_fn(x, weight, bias, activation=activation), plain_conv(x, weight, bias, None, activation)
    )
    initial = torch.randn(B, D, W - 1, dtype=torch.float64)
    out, final = cc1d.causal_conv1d_fn(x, weight, None, None, initial, True, None, activation)
    assert_close(out, plain_conv(x, weight, None, initial, activation))
    assert torch.equal(final, x[:, :, -(W - 1) :])
    given = torch.empty(B, D, W - 1, dtype=torch.float64)
    out, final = cc1d.causal_conv1d_fn(
        x[:, :, :2], weight, initial_states=initial, return_final_states=True, final_states_out=given
    )
    assert final is given and torch.equal(given, torch.cat([initial, x[:, :, :2]], 2)[:, :, -(W - 1) :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_conv_fn_weight_dtype_is_free(dtype, weight_dtype, backend):
    x, weight, bias = conv_inputs()
    x, weight, bias = x.to(dtype), weight.to(weight_dtype), bias.to(weight_dtype)
    out, final = cc1d.causal_conv1d_fn(x.transpose(1, 2), weight, bias, return_final_states=True)
    assert out.dtype == final.dtype == dtype
    exact = plain_conv(x.double().transpose(1, 2), weight.double(), bias.double())
    assert (out - exact).abs().max() < torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("with_state", [False, True])
def test_conv_fn_seq_idx(with_state, backend):
    """Each run is a sequence; negative is padding; the initial state belongs to the first run of a row."""
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1, 2, -1, -1], [-1, 3, 3, 3, 3, 3, 3, 3, 4]], dtype=torch.int32)
    x, weight, bias = conv_inputs()
    x = x.transpose(1, 2).contiguous().requires_grad_()
    initial = torch.randn(B, D, W - 1, dtype=torch.float64) if with_state else None
    out = cc1d.causal_conv1d_fn(x, weight, bias, seq_idx, initial, activation="silu")
    expected = torch.zeros_like(x)
    for row, a, b in ((0, 0, 4), (0, 4, 6), (0, 6, 7), (1, 1, 8), (1, 8, 9)):
        start = initial[row : row + 1] if with_state and a == 0 else None
        expected[row : row + 1, :, a:b] = plain_conv(x[row : row + 1, :, a:b], weight, bias, start, "silu")
    assert_close(out, expected)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert_close(grad, torch.autograd.grad(expected.square().sum(), x)[0])
    poisoned = x.detach().masked_fill((seq_idx < 0)[:, None], float("nan"))
    assert_close(cc1d.causal_conv1d_fn(poisoned, weight, bias, seq_idx, initial, activation="silu"), out.detach())


def test_conv_fn_gradients(backend):
    x, weight, bias = conv_inputs()
    initial = torch.randn(B, D, W - 1, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x.transpose(1, 2).contiguous(), weight, bias, initial)]
    out, final = cc1d.causal_conv1d_fn(*leaves[:3], None, leaves[3], True, None, "silu")
    got = torch.autograd.grad(out.square().sum() + final.square().sum(), leaves)
    expected = plain_conv(*leaves, "silu").square().sum() + leaves[0][:, :, -(W - 1) :].square().sum()
    for a, b in zip(got, torch.autograd.grad(expected, leaves), strict=True):
        assert_close(a, b, 1e-11)


@pytest.mark.parametrize("columns", [W - 1, W, W + 3])
@pytest.mark.parametrize("pieces", [[1] * L, [2, 1, 3, 3], [9], [8, 1]])
@pytest.mark.parametrize("ring", [False, True])
def test_conv_update_continues_the_convolution(ring, pieces, columns, backend):
    x, weight, bias = conv_inputs()
    x = x.transpose(1, 2)
    initial = torch.randn(B, D, columns, dtype=torch.float64)
    whole = plain_conv(x, weight, bias, initial[:, :, columns - (W - 1) :], "silu")
    history = torch.cat([initial, x], 2)
    # A ring whose row r has seen r inputs more than one full turn holds input i in column i % columns.
    seen = torch.tensor([columns, columns + 2])
    cache = initial.clone()
    if ring:
        cache = torch.stack([initial[r].roll(int(seen[r]), 1) for r in range(B)])
    done = 0
    for n in pieces:
        token = x[:, :, done] if n == 1 else x[:, :, done : done + n]
        lengths = (seen + done).int() if ring else None
        out = cc1d.causal_conv1d_update(token, cache, weight, bias, "silu", lengths)
        assert out.shape == token.shape
        done += n
        assert_close(out.reshape(B, D, n), whole[:, :, done - n : done])
        now = history[:, :, done : done + columns]
        if ring:
            now = torch.stack([now[r].roll(int(seen[r]) + done, 1) for r in range(B)])
        assert torch.equal(cache, now)


@pytest.mark.parametrize("columns", [W - 1, W + 2])
@pytest.mark.parametrize("length", [0, 1, 3])
@pytest.mark.parametrize("ring", [False, True])
def test_conv_update_slots(ring, length, columns, backend):
    """Rows go to their slots; a negative index is padding; other slots keep every bit."""
    x, weight, bias = conv_inputs(3, max(length, 1))
    x = x.transpose(1, 2) if length else x[:, 0]
    slots = torch.tensor([4, -1, 1], dtype=torch.int32)
    lengths = torch.tensor([2, 0, 7], dtype=torch.int32) if ring else None
    pool = torch.randn(6, D, columns, dtype=torch.float64)
    before = pool.clone()
    out = cc1d.causal_conv1d_update(x, pool, weight, bias, None, lengths, slots)
    alone = before[[4, 1]]
    live = lengths[[0, 2]] if ring else None
    expected = cc1d.causal_conv1d_update(x[[0, 2]], alone, weight, bias, None, live)
    assert torch.equal(out[[0, 2]], expected) and (out[1] == 0).all()
    assert torch.equal(pool[[4, 1]], alone) and torch.equal(pool[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


# Refusals.


def t(**changes):
    return inputs(heads=H) | changes


X, WEIGHT, BIAS = conv_inputs()
XT = X.transpose(1, 2)
CACHE = torch.zeros(B, D, W, dtype=torch.float64)
CU = torch.tensor([0, 3, L])
BAD_CALLS = [
    (ValueError, "'chunk_size' must be 16", lambda: fla.chunk_gated_delta_rule(**t(), chunk_size=128)),
    (TypeError, "unexpected keyword", lambda: fla.chunk_gated_delta_rule(**t(), intial_state=None)),
    (TypeError, "unexpected keyword", lambda: fla.fused_recurrent_gated_delta_rule(**t(), head_first=False)),
    (NotImplementedError, "context parallelism", lambda: fla.chunk_gated_delta_rule(**t(), cp_context=object())),
    (NotImplementedError, "context parallelism", lambda: fla.causal_conv1d(X, WEIGHT, cp_context=object())),
    (
        NotImplementedError,
        "context parallelism",
        lambda: fla.chunk_gated_delta_product(**product_inputs(), num_householder=MICRO, cp_context=object()),
    ),
    (ValueError, "'k' must be of shape", lambda: fla.chunk_gated_delta_product(**product_inputs(), num_householder=2)),
    (
        ValueError,
        "'num_householder' must be",
        lambda: fla.chunk_gated_delta_product(**product_inputs(), num_householder=0),
    ),
    (TypeError, "num_householder", lambda: fla.chunk_gated_delta_product(**product_inputs())),
    (ValueError, "'A_log' must be given", lambda: fla.chunk_gated_delta_rule(**t(), use_gate_in_kernel=True)),
    (ValueError, "'allow_neg_eigval' must be", lambda: fla.chunk_gated_delta_rule(**t(), allow_neg_eigval=True)),
    (
        ValueError,
        "'transpose_state_layout' is its old name",
        lambda: fla.chunk_gated_delta_rule(**t(), state_v_first=True, transpose_state_layout=True),
    ),
    (ValueError, "'k' must be of shape", lambda: fla.chunk_gated_delta_rule(**t(k=t()["k"][:, :3]))),
    (ValueError, "'beta' must be of shape", lambda: fla.chunk_gated_delta_rule(**t(beta=t()["beta"][..., :1]))),
    (
        ValueError,
        "'gk' must be of shape",
        lambda: fla.fused_recurrent_gated_delta_rule(**t(), gk=t()["v"]),
    ),
    (
        ValueError,
        "'beta' must be of shape",
        lambda: fla.fused_recurrent_gated_delta_rule(**t(beta=t()["q"])),
    ),
    (
        ValueError,
        "'initial_state' must be of shape",
        lambda: fla.fused_recurrent_gated_delta_rule(**t(), gv=t()["v"], initial_state=state(3, H)),
    ),
    (TypeError, "'weight' must be a tensor", lambda: fla.causal_conv1d(X)),
    (ValueError, "'backend' must be", lambda: fla.causal_conv1d(X, WEIGHT, backend="native")),
    (ValueError, "'seq_idx' must be given together", lambda: fla.causal_conv1d(X, WEIGHT, seq_idx=CU)),
    (ValueError, "'initial_state' must be of shape", lambda: fla.causal_conv1d(X, WEIGHT, None, None, CACHE[:, :, 1:])),
    (ValueError, "'cu_seqlens' must be given with B=1", lambda: fla.causal_conv1d(X, WEIGHT, cu_seqlens=CU)),
    (ValueError, "'cache' must be of shape", lambda: fla.causal_conv1d_update(X[:, 0], CACHE[:1], None, WEIGHT)),
    (NotImplementedError, "'activation' must be", lambda: cc1d.causal_conv1d_fn(XT, WEIGHT, activation="relu")),
    (
        NotImplementedError,
        "'activation' must be",
        lambda: cc1d.causal_conv1d_update(X[:, 0], CACHE, WEIGHT, None, "gelu"),
    ),
    (
        ValueError,
        "'return_final_states' must be False",
        lambda: cc1d.causal_conv1d_fn(XT, WEIGHT, seq_idx=torch.zeros(B, L).int(), return_final_states=True),
    ),
    (ValueError, "'seq_idx' must be of shape", lambda: cc1d.causal_conv1d_fn(XT, WEIGHT, seq_idx=CU)),
    (ValueError, "W - 1 columns", lambda: cc1d.causal_conv1d_update(X[:, 0], CACHE[:, :, :2], WEIGHT)),
    (ValueError, "'conv_state' must be of shape", lambda: cc1d.causal_conv1d_update(X[:1, 0], CACHE, WEIGHT)),
    (
        ValueError,
        "duplicates",
        lambda: cc1d.causal_conv1d_update(X[:, 0], CACHE, WEIGHT, conv_state_indices=torch.tensor([1, 1])),
    ),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD_CALLS)
def test_bad_calls(error, message, call, on_reference):
    with pytest.raises(error, match=message):
        call()
