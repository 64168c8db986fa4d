# SPDX-License-Identifier: Apache-2.0
"""`fla_ops.compat.mamba_ssm`: mamba-ssm's documented semantics, against loops written from its documentation."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import fla_ops
from fla_ops.compat.mamba_ssm import Mamba, mamba_inner_fn, selective_scan_fn, selective_state_update

B, D, L, N, R, W = 2, 6, 7, 4, 3, 4


@pytest.fixture
def backend(backend):
    """Every call of the test runs on this one."""
    with fla_ops.use_backend(backend):
        yield backend


@pytest.fixture
def on_reference():
    with fla_ops.use_backend("reference"):
        yield


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_close(actual, expected, bound=2e-12):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if expected.numel():
        assert (actual - expected).abs().max().item() <= bound * max(expected.abs().max().item(), 1e-3)


def scan_inputs(dtype=torch.float64):
    return {
        "u": normal(B, D, L, dtype=dtype),
        "delta": normal(B, D, L, seed=1, dtype=dtype),
        "A": -normal(D, N).exp(),
        "B": normal(B, N, L, seed=2, dtype=dtype),
        "C": normal(B, N, L, seed=3, dtype=dtype),
        "D": normal(D),
        "z": normal(B, D, L, seed=4, dtype=dtype),
        "delta_bias": normal(D, seed=5),
    }


def scan_by_hand(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """mamba-ssm's documented scan with B, C `[B, N, L]`, `[B, G, N, L]` or `[D, N]`: (out, last state)."""
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta, threshold=1e9) if delta_softplus else delta

    def per_channel(w):
        if w.dim() == 2:
            return w[None, :, :, None].expand(*u.shape[:2], -1, u.shape[2])
        w = w[:, None] if w.dim() == 3 else w
        return w.repeat_interleave(u.shape[1] // w.shape[1], 1)

    B, C = per_channel(B), per_channel(C)
    h, out = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        h = (delta[:, :, t, None] * A).exp() * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        out.append((h * C[..., t]).sum(-1))
    out = torch.stack(out, -1) + (0 if D is None else D[:, None] * u)
    return out if z is None else out * F.silu(z), h


# selective_scan_fn.


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("optional", [("D", "z", "delta_bias"), ("D",), ()])
def test_scan_is_its_definition(optional, softplus, backend):
    t = scan_inputs()
    if not softplus:
        t["delta"], t["delta_bias"] = t["delta"].abs(), t["delta_bias"].abs()
    t = {name: x for name, x in t.items() if name in "u delta A B C" or name in optional}
    out, last = selective_scan_fn(**t, delta_softplus=softplus, return_last_state=True)
    expected, expected_last = scan_by_hand(**t, delta_softplus=softplus)
    assert_close(out, expected)
    assert_close(last, expected_last)
    alone = selective_scan_fn(**t, delta_softplus=softplus)
    assert isinstance(alone, torch.Tensor) and torch.equal(alone, out)
    by_position = [t["u"], t["delta"], t["A"], t["B"], t["C"], *(t.get(n) for n in ("D", "z", "delta_bias"))]
    assert torch.equal(selective_scan_fn(*by_position, softplus, True)[1], last)


@pytest.mark.parametrize("kind", ["groups", "constant", "mixed"])
def test_scan_with_groups_and_constants(kind, backend):
    t = scan_inputs()
    if kind == "groups":
        t |= {"B": normal(B, 3, N, L), "C": normal(B, 3, N, L, seed=1)}
    elif kind == "constant":
        t |= {"B": normal(D, N), "C": normal(D, N, seed=1)}
    else:
        t |= {"B": normal(B, 1, N, L), "C": normal(D, N, seed=1)}
    assert_close(selective_scan_fn(**t, delta_softplus=True), scan_by_hand(**t, delta_softplus=True)[0])


def test_scan_gradients_include_the_last_states(backend):
    t = {name: x.requires_grad_() for name, x in scan_inputs().items()}
    out, last = selective_scan_fn(**t, delta_softplus=True, return_last_state=True)
    got = torch.autograd.grad(out.square().sum() + last.square().sum(), list(t.values()))
    out, last = scan_by_hand(**t, delta_softplus=True)
    for a, b in zip(got, torch.autograd.grad(out.square().sum() + last.square().sum(), list(t.values())), strict=True):
        assert_close(a, b, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", [torch.float32, torch.bfloat16, torch.float64])
def test_scan_takes_parameters_in_any_dtype(side, dtype, backend):
    t = scan_inputs(dtype)
    t |= {name: t[name].to(side) for name in ("A", "D", "delta_bias")}
    out, last = selective_scan_fn(**t, delta_softplus=True, return_last_state=True)
    assert out.dtype == dtype and last.dtype == torch.float32
    exact = scan_by_hand(**{name: x.double() for name, x in t.items()}, delta_softplus=True)[0]
    assert (out - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()


# mamba_inner_fn.


def inner_inputs():
    return {
        "xz": normal(B, 2 * D, L),
        "conv1d_weight": normal(D, 1, W),
        "conv1d_bias": normal(D, seed=1),
        "x_proj_weight": normal(R + 2 * N, D),
        "delta_proj_weight": normal(D, R),
        "out_proj_weight": normal(5, D),
        "out_proj_bias": normal(5),
        "A": -normal(D, N).exp(),
        "D": normal(D),
        "delta_bias": normal(D, seed=2),
    }


def rms(x, weight, eps):
    return x if weight is None else x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def inner_by_hand(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    b_rms_weight=None,
    c_rms_weight=None,
    dt_rms_weight=None,
    eps=1e-6,
):
    x, z = xz.chunk(2, 1)
    u = F.silu(F.conv1d(F.pad(x, (W - 1, 0)), conv1d_weight, conv1d_bias, groups=x.shape[1]))
    rows = u.transpose(1, 2) @ x_proj_weight.T
    delta = rms(rows[..., :R] @ delta_proj_weight.T, dt_rms_weight, eps).transpose(1, 2)
    if B is None:
        B = rows[..., R : R + N] + (0 if B_proj_bias is None else B_proj_bias)
        B = rms(B, b_rms_weight, eps).transpose(1, 2)
    if C is None:
        C = rows[..., -N:] + (0 if C_proj_bias is None else C_proj_bias)
        C = rms(C, c_rms_weight, eps).transpose(1, 2)
    y, _ = scan_by_hand(u, delta, A, B, C, D, z, delta_bias, True)
    return y.transpose(1, 2) @ out_proj_weight.T + (0 if out_proj_bias is None else out_proj_bias)


INNER = {
    "plain": {},
    "no options": {"conv1d_bias": None, "out_proj_bias": None, "D": None, "delta_bias": None},
    "biases": {"B_proj_bias": normal(N), "C_proj_bias": normal(N, seed=1)},
    "norms": {"b_rms_weight": normal(N), "c_rms_weight": normal(N, seed=1), "dt_rms_weight": normal(D)},
    "constant B": {"B": normal(D, N), "x_proj_weight": normal(R + N, D)},
    "given C": {"C": normal(B, 1, N, L), "x_proj_weight": normal(R + N, D)},
    "both given": {"B": normal(D, N), "C": normal(D, N, seed=1), "x_proj_weight": normal(R, D)},
}


@pytest.mark.parametrize("checkpoint_lvl", [0, 1])
@pytest.mark.parametrize("case", INNER)
def test_inner_is_its_definition(case, checkpoint_lvl, backend):
    t = inner_inputs() | INNER[case]
    t = {name: None if x is None else x.clone().requires_grad_() for name, x in t.items()}
    leaves = [x for x in t.values() if x is not None]
    out, expected = mamba_inner_fn(**t, checkpoint_lvl=checkpoint_lvl), inner_by_hand(**t)
    assert_close(out, expected, 1e-11)
    got = torch.autograd.grad(out.square().sum(), leaves)
    for a, b in zip(got, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        assert_close(a, b, 1e-10)


def test_inner_under_autocast_and_in_low_precision(backend):
    t = {name: x.float() for name, x in inner_inputs().items()}
    exact = mamba_inner_fn(**t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = mamba_inner_fn(**t)
    side = ("A", "D", "delta_bias")
    low = mamba_inner_fn(**{name: x if name in side else x.bfloat16() for name, x in t.items()})
    for out in (cast, low):
        assert out.dtype == torch.bfloat16 and (out - exact).abs().max() < 0.04 * exact.abs().max()


# selective_state_update.


def update_inputs(*inner, groups=None):
    shape = (B, *inner)
    projected = (B, N) if groups is None else (B, groups, N)
    return {
        "state": normal(*shape, N),
        "x": normal(*shape),
        "dt": normal(*shape, seed=1),
        "A": -normal(*inner, N).exp(),
        "B": normal(*projected, seed=2),
        "C": normal(*projected, seed=3),
        "D": normal(*inner),
        "z": normal(*shape, seed=4),
        "dt_bias": normal(*inner, seed=5),
    }


def update_by_hand(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """(out, new state), with heads flattened into channels."""
    channels = x[0].numel()
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    B, C = (w[:, None] if w.dim() == 2 else w for w in (B, C))
    B, C = (w.repeat_interleave(channels // w.shape[1], 1).view(*x.shape, -1) for w in (B, C))
    new = state * (dt[..., None] * A).exp() + (dt * x)[..., None] * B
    out = (new * C).sum(-1) + (0 if D is None else D * x)
    return out if z is None else out * F.silu(z), new


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("optional", [("D", "z", "dt_bias"), ("z",), ()])
@pytest.mark.parametrize(("inner", "groups"), [((6,), None), ((6,), 3), ((4, 3), None), ((4, 3), 2)])
def test_update_is_its_definition(inner, groups, optional, softplus, backend):
    t = update_inputs(*inner, groups=groups)
    t = {name: x for name, x in t.items() if name not in ("D", "z", "dt_bias") or name in optional}
    expected, new = update_by_hand(**t, dt_softplus=softplus)
    pointer = t["state"].data_ptr()
    out = selective_state_update(
        *(t[n] for n in ("state", "x", "dt", "A", "B", "C")), *map(t.get, ("D", "z", "dt_bias")), softplus
    )
    assert_close(out, expected)
    assert_close(t["state"], new)
    assert t["state"].data_ptr() == pointer


@pytest.mark.parametrize("inner", [(6,), (4, 3)])
def test_update_of_slots(inner, backend):
    t = update_inputs(*inner)
    pool = normal(5, *inner, N, seed=9)
    before, slots = pool.clone(), torch.tensor([3, -1], dtype=torch.int32)
    out = selective_state_update(**t | {"state": pool}, dt_softplus=True, state_batch_indices=slots)
    expected, new = update_by_hand(**t | {"state": before[[3, 3]]}, dt_softplus=True)
    assert_close(out[:1], expected[:1])
    assert_close(pool[3], new[0])
    assert not out[1].any() and torch.equal(pool[[0, 1, 2, 4]], before[[0, 1, 2, 4]])


def test_update_writes_through_any_strides(backend):
    t = update_inputs(4, 3)
    storage = normal(B, 3, 4, N).clone()
    state = storage.transpose(1, 2)  # heads inside of channels: no view has them side by side
    expected, new = update_by_hand(**t | {"state": state.clone()})
    assert_close(selective_state_update(**t | {"state": state}), expected)
    assert_close(storage.transpose(1, 2), new)


def test_update_of_tied_heads(backend):
    """A, dt, D and dt_bias of one value a head, as expanded views."""
    t = update_inputs(4, 3)
    t |= {name: t[name][..., :1].expand(*t[name].shape) for name in ("dt", "D", "dt_bias")}
    t["A"] = t["A"][:, :1, :1].expand(4, 3, N)
    expected, new = update_by_hand(**t)
    assert_close(selective_state_update(**t), expected)
    assert_close(t["state"], new)


def test_update_takes_mixed_dtypes_and_parameters_that_train(backend):
    t = update_inputs(6)
    exact, _ = update_by_hand(**t, dt_softplus=True)
    mixed = {"state": torch.float32, "x": torch.bfloat16, "z": torch.bfloat16, "D": torch.bfloat16}
    t = {name: x.to(mixed.get(name, torch.float32)) for name, x in t.items()}
    t["A"].requires_grad_()
    out = selective_state_update(**t, dt_softplus=True)
    assert out.dtype == torch.bfloat16 and not out.requires_grad and t["state"].dtype == torch.float32
    assert (out - exact).abs().max() < 0.04 * exact.abs().max()


# Mamba.


def layer(**options):
    torch.manual_seed(0)
    made = Mamba(**({"d_model": 8, "d_state": N, "layer_idx": 3, "dtype": torch.float64} | options))
    with torch.no_grad():
        made.dt_proj.bias.uniform_(-2, 1)
    return made


def params(offset=0):
    return SimpleNamespace(key_value_memory_dict={}, seqlen_offset=offset)


def test_mamba_is_the_layer(backend):
    ours = fla_ops.layers.Mamba(8, d_state=N, dtype=torch.float64)
    theirs = layer()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = normal(B, L, 8)
    assert torch.equal(theirs(x), ours(x))
    assert theirs.dt_proj.bias._no_reinit and theirs.A_log._no_weight_decay


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("pieces", [[1] * L, [5, 1, 1], [2, 4, 1], [L]])
def test_mamba_continues_from_its_cache(pieces, width, backend):
    """Prefill, single tokens, and several at once; the cache's tensors stay where they are and hold all W inputs."""
    made, x, cache = layer(d_conv=width), normal(B, L, 8), params()
    whole = made(x)
    inputs = made.in_proj(x)[..., :16].transpose(1, 2)
    outs, pointers = [], None
    for n in pieces:
        part = x[:, cache.seqlen_offset : cache.seqlen_offset + n]
        outs.append(made(part, inference_params=cache))
        cache.seqlen_offset += n
        conv, ssm = cache.key_value_memory_dict[3]
        pointers = pointers or (conv.data_ptr(), ssm.data_ptr())
        assert (conv.data_ptr(), ssm.data_ptr()) == pointers
        assert_close(conv, F.pad(inputs[:, :, : cache.seqlen_offset], (width, 0))[:, :, -width:].detach())
        assert not conv.requires_grad and not ssm.requires_grad
    assert_close(torch.cat(outs, 1).detach(), whole.detach())
    cache.seqlen_offset = 0  # a new sequence begins in the same cache
    assert_close(made(x, cache).detach(), whole.detach())


@pytest.mark.parametrize("width", [1, 4])
def test_mamba_steps(width, backend):
    made, x = layer(d_conv=width), normal(B, L, 8)
    conv, ssm = made.allocate_inference_cache(B, 100)
    assert conv.shape == (B, 16, width) and ssm.shape == (B, 16, N) and conv.dtype == ssm.dtype == torch.float64
    whole, inputs = made(x).detach(), made.in_proj(x)[..., :16].transpose(1, 2).detach()
    for t in range(L):
        out, same_conv, same_ssm = made.step(x[:, t : t + 1], conv, ssm)
        assert same_conv is conv and same_ssm is ssm and not out.requires_grad
        assert_close(out, whole[:, t : t + 1])
        assert_close(conv, F.pad(inputs[:, :, : t + 1], (width, 0))[:, :, -width:])


def test_mamba_cache_dtypes(backend):
    made = layer(dtype=torch.bfloat16)
    assert {t.dtype for t in made.allocate_inference_cache(1, 9)} == {torch.bfloat16}
    assert {t.dtype for t in made.allocate_inference_cache(1, 9, dtype=torch.float32)} == {torch.float32}
    x, cache = normal(1, L, 8, dtype=torch.bfloat16), params()
    outs = []
    for t in range(L):
        outs.append(made(x[:, t : t + 1], cache))
        cache.seqlen_offset += 1
    whole = made(x)
    assert outs[0].dtype == torch.bfloat16
    assert (torch.cat(outs, 1) - whole).abs().max() < 0.05 * whole.abs().max()


def test_mamba_without_its_fast_path(on_reference, monkeypatch):
    asked = []
    base = fla_ops.layers.Mamba._recomputing_scan
    monkeypatch.setattr(fla_ops.layers.Mamba, "_recomputing_scan", lambda *args: asked.append(1) or base(*args))
    for use in (True, False):
        asked.clear()
        layer(use_fast_path=use)(normal(1, 3, 8))
        assert len(asked) == use


# Refusals.


def t(**changes):
    return scan_inputs() | changes


def u(**changes):
    return update_inputs(6) | changes


def i(**changes):
    return inner_inputs() | changes


COMPLEX = -normal(D, N).to(torch.complex64)
BAD_CALLS = [
    (TypeError, "selective_scan: argument 'A' must be real", lambda: selective_scan_fn(**t(A=COMPLEX))),
    (TypeError, "'A' must be real", lambda: mamba_inner_fn(**i(A=COMPLEX))),
    (TypeError, "'A' must be real", lambda: selective_state_update(**u(A=COMPLEX))),
    (TypeError, "unexpected keyword", lambda: selective_scan_fn(**t(), initial_state=None)),
    (ValueError, "'B' must be of shape", lambda: selective_scan_fn(**t(B=normal(B, N, L + 1)))),
    (ValueError, "'xz' must be of shape", lambda: mamba_inner_fn(**i(xz=normal(B, D, L)))),
    (ValueError, "'x_proj_weight' must be of shape", lambda: mamba_inner_fn(**i(B=normal(D, N)))),
    (ValueError, "'conv1d_weight' must be of shape", lambda: mamba_inner_fn(**i(conv1d_weight=normal(D, W)))),
    (ValueError, "'A' must be of shape", lambda: mamba_inner_fn(**i(A=normal(D + 1, N)))),
    (ValueError, "'D' must be of shape", lambda: mamba_inner_fn(**i(D=normal(D + 1)))),
    (ValueError, "'checkpoint_lvl' must be 0 or 1", lambda: mamba_inner_fn(**i(checkpoint_lvl=2))),
    (ValueError, "argument 'B' is given", lambda: mamba_inner_fn(**i(B=normal(D, N), B_proj_bias=normal(N)))),
    (ValueError, "'state' must be of shape", lambda: selective_state_update(**u(state=normal(6, N)))),
    (ValueError, "'x' must be of shape", lambda: selective_state_update(**u(x=normal(B, 5)))),
    (ValueError, "'dt' must be of shape", lambda: selective_state_update(**u(dt=normal(B, 5)))),
    (ValueError, "'A' must be of shape", lambda: selective_state_update(**u(A=normal(6, N + 1)))),
    (ValueError, "'D' must be of shape", lambda: selective_state_update(**u(D=normal(5)))),
    (ValueError, "'B' must be", lambda: selective_state_update(**u(B=normal(B, 4, N)))),
    (TypeError, "'x' must be a tensor", lambda: selective_state_update(**u(x=1.0))),
    (ValueError, "'layer_idx' must be given", lambda: layer(layer_idx=None)(normal(B, L, 8), params())),
    (ValueError, "'hidden_states' must be of shape", lambda: layer()(normal(B, 8), params())),
    (
        ValueError,
        "Mamba.step: argument 'hidden_states' must be of shape",
        lambda: layer().step(normal(B, 2, 8), *layer().allocate_inference_cache(B, 9)),
    ),
    (
        ValueError,
        "'conv_state' must be of shape",
        lambda: layer().step(normal(B, 1, 8), *layer().allocate_inference_cache(B + 1, 9)),
    ),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD_CALLS)
def test_bad_calls(error, message, call, on_reference):
    with pytest.raises(error, match=message):
        call()
