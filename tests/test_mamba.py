# SPDX-License-Identifier: Apache-2.0
"""What is Mamba's own: its equation, transformers' weights, the recomputing path, positive_io and token_reorder.

What every layer promises, test_layers.py asks of Mamba too.
"""

import contextlib
import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fla_ops
from fla_ops._native import selective_scan as native_scan
from fla_ops.layers import LayerState, Mamba
from fla_ops.layers import selective_scan as module
from fla_ops.layers._plain import is_plain
from fla_ops.layers._positive_io import PositiveIOProjection
from fla_ops.layers._token_reorder import TokenReorder, soft_sort

D, N = 12, 5


def make(dtype=torch.float64, backend="reference", **options):
    torch.manual_seed(0)
    layer = Mamba(**({"d_model": D, "d_state": N, "dt_rank": 3, "backend": backend, "dtype": dtype} | options))
    with torch.no_grad():  # steps large enough that the scan matters beside the skip
        layer.D.uniform_(0.5, 1.5)
        layer.dt_proj.bias.uniform_(-2, 1)
    return layer


def tokens(*shape, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, D, generator=generator, dtype=torch.float64).to(dtype)


def assert_close(actual, expected, bound=1e-12):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if expected.numel():
        error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
        assert error <= bound * max(size, 1e-3), f"error {error:.2e} at size {size:.2e}"


# Values.


def convolved(layer, x):
    """(u, z) `[L, Di]` of one sequence x `[L, d]`."""
    p, L = dict(layer.named_parameters()), x.shape[0]
    inner, z = (x @ p["in_proj.weight"].T).chunk(2, -1)
    padded = torch.cat([x.new_zeros(layer.d_conv - 1, layer.d_inner), inner])
    taps = p["conv1d.weight"][:, 0]
    return F.silu(sum(taps[:, w] * padded[w : w + L] for w in range(layer.d_conv)) + p["conv1d.bias"]), z


def by_hand(layer, u, z, x_weight):
    """y `[L, d]`, channel by channel and token by token."""
    p, rows = dict(layer.named_parameters()), []
    h = u.new_zeros(layer.d_inner, layer.d_state)
    for t in range(u.shape[0]):
        dt, B, C = (x_weight @ u[t]).split((layer.dt_rank, layer.d_state, layer.d_state))
        delta = F.softplus(p["dt_proj.weight"] @ dt + p["dt_proj.bias"])
        channels = []
        for d in range(layer.d_inner):
            h_d = (-delta[d] * p["A_log"][d].exp()).exp() * h[d] + delta[d] * u[t, d] * B
            channels.append((C @ h_d + p["D"][d] * u[t, d]) * F.silu(z[t, d]))
            h = torch.cat([h[:d], h_d[None], h[d + 1 :]])
        rows.append(p["out_proj.weight"] @ torch.stack(channels))
    return torch.stack(rows)


def test_the_layer_is_its_equation():
    layer, x = make(), tokens(1, 6)
    assert_close(layer(x)[0], by_hand(layer, *convolved(layer, x[0]), layer.x_proj.weight))


def test_defaults_are_mamba_ssms():
    layer = Mamba(768)
    assert (layer.d_inner, layer.d_state, layer.d_conv, layer.dt_rank) == (1536, 16, 4, 48)
    assert Mamba(40).dt_rank == 3 and Mamba(10, expand=1.25).d_inner == 12
    assert layer.x_proj.weight.shape == (80, 1536) and layer.in_proj.bias is layer.out_proj.bias is None


@pytest.mark.parametrize("dt_init", ["random", "constant"])
def test_documented_initialisation(dt_init):
    layer = Mamba(512, d_state=7, dt_init=dt_init, dt_scale=0.5, dt_min=0.01, dt_max=0.2, dt_init_floor=0.05)
    assert_close(layer.A_log.exp(), torch.arange(1.0, 8).expand(1024, 7), 1e-6)
    assert (layer.D == 1).all()
    step, bound = F.softplus(layer.dt_proj.bias), 0.5 * 32**-0.5
    assert 0.0499 < step.min() < 0.0501 and 0.19 < step.max() < 0.2001
    assert (step < 0.0501).float().mean() == pytest.approx(math.log(5) / math.log(20), abs=0.06)
    if dt_init == "constant":
        assert (layer.dt_proj.weight == bound).all()
    else:
        assert 0.99 * bound < layer.dt_proj.weight.abs().max() <= bound
    bound = 512**-0.5
    assert 0.99 * bound < layer.in_proj.weight.abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rates_and_skip_stay_float32(dtype):
    layer = Mamba(D, dtype=dtype, backend="reference")
    assert layer.A_log.dtype == layer.D.dtype == torch.float32 and layer.dt_proj.bias.dtype == dtype
    y, state = layer(tokens(1, 4, dtype=dtype), return_state=True)
    assert y.dtype == dtype and state.recurrent.dtype == torch.float32
    assert Mamba(D, dtype=torch.float64).A_log.dtype == torch.float64


def test_the_bias_of_the_step_sizes_is_added_in_float32():
    """A bias of -7 and an input of +-0.01: their sum in bfloat16 would lose the input."""
    layer = make(torch.bfloat16)
    with torch.no_grad():
        layer.dt_proj.bias.fill_(-7)
    u = tokens(1, 4, dtype=torch.bfloat16).repeat(1, 1, 2) / 100
    delta, bias, *_ = layer._selected(u)
    assert bias.dtype == torch.float32 and delta.unique().numel() > 50
    layer.dt_proj.register_forward_hook(lambda *_: None)  # called as a whole: the bias is in, and added once
    whole, none, *_ = layer._selected(u)
    assert none is None and (whole.float() - (delta.float() + bias)).abs().max() < 0.04


def test_parameters_that_models_must_not_reinitialise_are_marked():
    layer = make()
    for twin in (layer, copy.deepcopy(layer), layer.to(torch.float32)):
        assert twin.dt_proj.bias._no_reinit
        assert not hasattr(twin.in_proj.weight, "_no_reinit")


@pytest.mark.parametrize("A_log", [-20.0, 0.0, 5.0, 90.0])
@pytest.mark.parametrize("dt", [-50.0, 0.0, 50.0])
def test_extreme_step_sizes_and_rates_are_finite(A_log, dt):
    layer = make(torch.float32)
    with torch.no_grad():
        layer.A_log.fill_(A_log)
        layer.dt_proj.bias.fill_(dt)
    x = tokens(1, 5, dtype=torch.float32).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("dt", [-3.0, 0.0, 30.0])
def test_two_starts_come_together_as_the_decays_say(dt):
    """The difference of two states shrinks by exactly exp(sum delta A) (arXiv 2406.00209): nothing else touches it."""
    layer, x = make(), tokens(2, 8)
    with torch.no_grad():
        layer.dt_proj.bias.fill_(dt)
        one, other = random_state(layer, 2), random_state(layer, 2)
        other = other._replace(conv=one.conv, recurrent=other.recurrent * 3 + 1)
        ends = [layer(x, state=state, return_state=True).state.recurrent for state in (one, other)]
        u, _ = layer.conv1d(layer.in_proj(x)[..., : layer.d_inner], state=one.conv)
        delta, bias, *_ = layer._selected(u)
    decay = (F.softplus(delta + bias).sum(1)[..., None] * layer._rates_and_skip()[0]).exp()
    assert (decay >= 0).all() and (decay <= 1).all()
    difference = decay * (one.recurrent - other.recurrent)
    assert (ends[0] - ends[1] - difference).abs().max() < 1e-12 * ends[0].abs().max()


# The same weights in transformers.


def mixer(**options):
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    sizes = {"hidden_size": D, "state_size": N, "time_step_rank": 3, "num_hidden_layers": 1, "vocab_size": 8}
    return MambaMixer(transformers.MambaConfig(**sizes | options), layer_idx=0)


@pytest.mark.parametrize("bias", [False, True])
def test_transformers_mixer_has_the_same_state_dict_and_output(bias):
    ours = make(torch.float32, bias=bias, conv_bias=not bias)
    theirs = mixer(use_bias=bias, use_conv_bias=not bias).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = tokens(2, 9, dtype=torch.float32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    again = Mamba(D, N, dt_rank=3, bias=bias, conv_bias=not bias, backend="reference")
    again.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(again(x), ours(x))


# The path that keeps x and z alone.


@pytest.fixture
def fused(monkeypatch):
    """`fused(False)` turns the path off; `fused.calls` counts its calls."""
    inner, choose = module.mamba_inner, module.recomputing_scan

    def counted(*args, **options):
        switch.calls += 1
        return inner(*args, **options)

    def turn(on):
        monkeypatch.setattr(module, "recomputing_scan", choose if on else lambda *_: None)

    class Switch(SimpleNamespace):
        def __call__(self, on):
            turn(on)

    switch = Switch(calls=0)
    monkeypatch.setattr(module, "mamba_inner", counted)
    return switch


def trained(layer, x, *, state=None, used=("y", "conv", "recurrent"), **options):
    """y, the final states, and the gradients of everything through those of them that are `used`."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    if state is not None:
        state = LayerState(*(t.detach().clone().requires_grad_() for t in state))
    y, final = layer(x, state=state, return_state=True, **options)
    found = {"y": y, "conv": final.conv, "recurrent": final.recurrent}
    generator = torch.Generator().manual_seed(7)
    weights = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in found.items()}
    sum((found[n].double() * weights[n]).sum() for n in used).backward()
    found |= {f"d{name}": p.grad for name, p in layer.named_parameters()} | {"dx": x.grad}
    if state is not None:
        found |= {"dconv": state.conv.grad, "drecurrent": state.recurrent.grad}
    return found


def random_state(layer, count):
    generator = torch.Generator().manual_seed(3)
    return LayerState(*(torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in layer.init_state(count)))


OPTIONS = [{}, {"d_conv": 1, "conv_bias": False}, {"bias": True, "d_state": 1, "expand": 1.5}]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_recomputing_gives_the_same_values_and_gradients(options, with_state, packed, native, fused):
    layer, x = make(backend=native, **options), tokens(1 if packed else 2, 9)
    call = {"cu_seqlens": torch.tensor([0, 4, 4, 9])} if packed else {}
    call["state"] = random_state(layer, 3 if packed else 2) if with_state else None
    actual = trained(layer, x, **call)
    assert fused.calls == 1
    fused(False)
    expected = trained(layer, x, **call)
    assert fused.calls == 1 and actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value is not None and (value.any() or value.numel() == 0), name
        assert_close(actual[name], value)
    assert torch.equal(actual["y"], expected["y"])


@pytest.mark.parametrize("used", ["y", "conv", "recurrent"])
def test_recomputing_when_one_result_is_used(used, native, fused):
    layer, x = make(backend=native), tokens(2, 6)
    call = {"state": random_state(layer, 2), "used": (used,)}
    actual = trained(layer, x, **call)
    fused(False)
    for name, value in trained(layer, x, **call).items():
        if value is None or name.startswith("d") and not value.any():
            assert actual[name] is None or not actual[name].any(), name
        else:
            assert_close(actual[name], value)


@pytest.mark.parametrize(
    "trainable",
    [["A_log"], ["conv1d.bias"], ["x_proj.weight"], ["dt_proj.bias"], ["out_proj.weight"], ["in_proj.weight", "D"]],
)
def test_recomputing_with_frozen_parameters(trainable, native, fused):
    layer, x = make(backend=native).requires_grad_(False), tokens(2, 6)
    for name in trainable:
        layer.get_parameter(name).requires_grad_()

    def gradients():
        layer.zero_grad()
        layer(x).square().sum().backward()
        return {name: p.grad for name, p in layer.named_parameters()}

    actual = gradients()
    assert fused.calls == (trainable != ["out_proj.weight"])
    fused(False)
    expected = gradients()
    assert {n for n, g in actual.items() if g is not None} == set(trainable)
    for name in trainable:
        assert_close(actual[name], expected[name])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_recomputing_under_autocast(low, native, fused):
    """The casts are autocast's: the same bits out, gradients in the parameters' dtype, close to the other path's."""
    layer, x = make(torch.float32, native), tokens(2, 20, dtype=torch.float32)
    with torch.autocast("cpu", dtype=low):
        actual = trained(layer, x)
    assert fused.calls == 1 and actual["y"].dtype == low
    fused(False)
    with torch.autocast("cpu", dtype=low):
        expected = trained(layer, x)
    assert torch.equal(actual["y"], expected["y"])
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        error = (actual[name] - value).float().square().mean().sqrt() / value.float().square().mean().sqrt()
        assert error < 2 * torch.finfo(low).eps, name


def test_a_backward_inside_of_autocast_recomputes_in_the_forwards_precision(native, fused):
    """torch runs out_proj's backward in low precision then; what is recomputed must still fit what was saved."""
    layer, x = make(torch.float32, native), tokens(2, 20, dtype=torch.float32)

    def gradient(context):
        layer.zero_grad()
        y = layer(x)
        with context:
            y.square().sum().backward()
        return layer.conv1d.weight.grad

    exact = gradient(contextlib.nullcontext())
    found = gradient(torch.autocast("cpu", dtype=torch.bfloat16))
    assert fused.calls == 2 and (found - exact).abs().max() < 0.02 * exact.abs().max()


def saved_bytes(layer, x):
    """Bytes that a forward keeps for its backward, parameters and the input apart; storages count once."""
    kept, given = {}, {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = (storage.nbytes(), t)  # the tensor, so that no other takes its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    del y
    return sum(size for size, _ in kept.values())


def test_recomputing_keeps_x_z_and_y_alone(native, fused):
    layer, L = make(torch.float32, native, d_model=64, d_state=16, expand=2), 256
    layer.float()
    x = torch.randn(2, L, 64)
    channel = 2 * L * layer.d_inner * 4  # bytes of one number a token and channel
    ours = saved_bytes(layer, x)
    fused(False)
    theirs = saved_bytes(layer, x)
    assert fused.calls == 1
    # x and z, and y for out_proj; then the scan's checkpoints, one state in 64 tokens, and A.
    checkpoints = 2 * math.ceil(L / 64) * layer.d_inner * layer.d_state * 4
    small = 3 * layer.d_inner * layer.d_state * 4 + 8 * layer.d_inner * 4
    assert 3 * channel <= ours <= 3 * channel + checkpoints + small
    # u and delta beside them.
    assert theirs - ours >= 2 * channel


def test_tensors_reach_the_scan_without_a_copy(native, fused, monkeypatch):
    """Channel-last views of what the products wrote."""
    layer, x, seen = make(torch.float32, native), tokens(2, 6, dtype=torch.float32), []
    forward = native_scan.forward
    monkeypatch.setattr(native_scan, "forward", lambda *t, **o: seen.append(t) or forward(*t, **o))
    for on in (True, False):
        fused(on)
        layer(x)
    for u, delta, _, B, C, _, z, *_ in seen:
        assert u.stride(1) == delta.stride(1) == B.stride(2) == C.stride(2) == z.stride(1) == 1
        assert z.stride(2) == 2 * layer.d_inner and B.stride(3) == C.stride(3) == 3 + 2 * N
    assert len(seen) == 2 and fused.calls == 1


def test_recomputing_is_for_training_on_plain_submodules(native, fused):
    layer, x = make(backend=native), tokens(1, 4)

    def calls(layer):
        before = fused.calls
        layer(x)
        return fused.calls - before

    assert calls(layer) == calls(layer.eval()) == 1
    with torch.no_grad():
        assert calls(layer) == 0
    assert calls(copy.deepcopy(layer).requires_grad_(False)) == 0
    assert calls(make(backend=native, positive_io=True)) == calls(make(backend=native, token_reorder=True)) == 0
    assert calls(make(backend="reference")) == 0
    for name in ("conv1d", "x_proj", "dt_proj"):
        hooked = copy.deepcopy(layer)
        getattr(hooked, name).register_forward_hook(lambda *_: None)
        assert calls(hooked) == 0, name
    hooked = copy.deepcopy(layer)
    hooked.out_proj.register_forward_hook(lambda *_: None)  # in_proj and out_proj are outside
    hooked.in_proj = nn.Sequential(hooked.in_proj)
    assert calls(hooked) == 1


def test_a_parameter_changed_before_the_backward_is_noticed(native):
    layer = make(backend=native)
    y = layer(tokens(1, 4))
    with torch.no_grad():
        layer.x_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_double_backward_names_its_cure(native, fused):
    layer, x = make(backend=native), tokens(1, 4).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    assert fused.calls == 1
    with pytest.raises(RuntimeError, match=r'^Mamba: .*no second derivative.*backend="reference"'):
        grad.square().sum().backward()


def test_what_is_plain():
    assert is_plain(nn.Linear(2, 3), nn.Linear) and is_plain(nn.Linear(2, 3, bias=False), nn.Linear)
    assert not is_plain(nn.Sequential(nn.Linear(2, 3)), nn.Linear)
    assert not is_plain(nn.Bilinear(2, 2, 3), nn.Linear)
    for register in (
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_full_backward_hook(lambda *_: None),
        lambda m: m.register_full_backward_pre_hook(lambda *_: None),
        lambda m: setattr(m, "forward", m.forward),  # as offloading libraries do
        lambda m: parametrizations.weight_norm(m),
        lambda m: nn.utils.prune.l1_unstructured(m, "weight", 0.5),
        lambda m: setattr(m, "weight", nn.Parameter(m.weight.data.as_subclass(Odd))),
    ):
        linear = nn.Linear(2, 3)
        register(linear)
        assert not is_plain(linear, nn.Linear)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not is_plain(nn.Linear(2, 3), nn.Linear)
    handle.remove()


class Odd(torch.Tensor):
    """A tensor of another kind, as quantised weights are."""


# positive_io.


def naive_projection(p, rank, states, channels):
    """[S_delta; S_B; S_C] entry by entry (arXiv 2410.03292, refinement 1)."""
    P = torch.zeros(states, channels, dtype=torch.float64)
    for i in range(states):
        for j in range(channels):
            P[i, j] = 1 if i == j else (p["shared_weight"][i, j] if j > i else 0)
    S_B = torch.stack([(math.log1p(math.exp(p["scale"][i])) + 0.7) * P[i] for i in range(states)])
    return torch.cat([p["dt_weight"], S_B, P])


@pytest.mark.parametrize(("states", "channels"), [(5, 24), (1, 3), (6, 6)])
def test_positive_io_is_its_definition(states, channels):
    projection = PositiveIOProjection(channels, 3, states, dtype=torch.float64)
    with torch.no_grad():
        projection.scale.uniform_(-3, 3)
    weight = naive_projection({k: v.detach() for k, v in projection.named_parameters()}, 3, states, channels)
    assert_close(projection.weight.detach(), weight)
    x = torch.randn(2, 4, channels, dtype=torch.float64)
    assert_close(projection(x).detach(), x @ weight.T)


@pytest.mark.parametrize("scale", [-50.0, 0.0, 8.0])
def test_positive_io_has_no_negative_eigenvalue(scale):
    projection = PositiveIOProjection(12, 2, 5, dtype=torch.float64)
    with torch.no_grad():
        projection.shared_weight.normal_(std=3)
        projection.scale.fill_(scale)
    _, S_B, S_C = projection.weight.split((2, 5, 5))
    product = S_C.T @ S_B
    values = torch.linalg.eigvalsh((product + product.T) / 2)
    assert_close(product, product.T)
    assert values.min() > -1e-12 * values.max() and (values > 1e-9 * values.max()).sum() == 5


def test_positive_io_in_the_layer():
    layer, x = make(positive_io=True), tokens(1, 6)
    p = {k: v.detach() for k, v in layer.x_proj.named_parameters()}
    expected = by_hand(layer, *convolved(layer, x[0]), naive_projection(p, 3, N, layer.d_inner))
    assert_close(layer(x)[0], expected)
    layer(x).square().sum().backward()
    grad = layer.x_proj.shared_weight.grad
    assert all(p.grad.any() for p in layer.x_proj.parameters()) and not grad.tril().any()


# token_reorder.


def naive_soft_sort(scores, temperature):
    """Row i of the matrix for one sequence, entry by entry."""
    ordered = sorted(scores.tolist())
    P = torch.empty(len(ordered), len(ordered), dtype=torch.float64)
    for i, s in enumerate(ordered):
        weights = [math.exp(-abs(s - other) / temperature) for other in scores.tolist()]
        P[i] = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return P


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_soft_sort_is_its_definition(temperature):
    scores = torch.randn(3, 7, dtype=torch.float64)
    P = soft_sort(scores, temperature)
    assert_close(P.sum(-1), torch.ones(3, 7, dtype=torch.float64))
    assert_close(P, torch.stack([naive_soft_sort(s, temperature) for s in scores]))


def test_soft_sort_turns_into_the_sort():
    scores = torch.randn(4, 9, dtype=torch.float64)
    x = torch.randn(4, 9, 3, dtype=torch.float64)
    order = scores.argsort(-1)
    assert_close(soft_sort(scores, 1e-6) @ x, x.gather(1, order[..., None].expand(-1, -1, 3)))
    assert torch.equal(soft_sort(scores + 5, 1e-6), soft_sort(scores, 1e-6))


def test_token_reorder_in_the_layer():
    layer, x = make(token_reorder=True), tokens(1, 6)
    with torch.no_grad():
        layer.reorder.weight.normal_(std=2)
    u, z = convolved(layer, x[0])
    scores = torch.stack(
        [
            layer.reorder.weight @ (layer.dt_proj.weight @ (layer.x_proj.weight[:3] @ token) + layer.dt_proj.bias)
            for token in u
        ]
    )
    expected = by_hand(layer, naive_soft_sort(scores, 1.0) @ u, z, layer.x_proj.weight)
    assert_close(layer(x)[0], expected, 1e-11)
    layer(x).square().sum().backward()
    assert layer.reorder.weight.grad.abs().max() > 1e-6
    # Not causal: the first output sees the last token.
    changed = x.clone()
    changed[:, -1] += 1
    assert (layer(changed)[:, 0] - layer(x)[:, 0]).abs().max() > 1e-6


def test_token_reorder_scores_in_float32_under_autocast():
    reorder, x = TokenReorder(8), torch.randn(1, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = reorder(x.bfloat16(), x.bfloat16())
    expected = reorder(x.bfloat16().float(), x.bfloat16().float())
    assert (y.float() - expected).abs().max() < 0.02 * expected.abs().max()


def test_token_reorder_takes_whole_sequences_only():
    layer, x = make(token_reorder=True), tokens(1, 4)
    state = layer.init_state(1)
    for name, options in (
        ("attention_mask", {"attention_mask": torch.ones(1, 4, dtype=torch.bool)}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 4])}),
        ("state", {"state": state}),
        ("return_state", {"return_state": True}),
    ):
        with pytest.raises(ValueError, match=f"Mamba: argument '{name}' must be left out with token_reorder=True"):
            layer(x, **options)
    with torch.no_grad(), pytest.raises(ValueError, match="argument 'state' must be left out with token_reorder=True"):
        layer.step(x[:, 0], state)


@pytest.mark.parametrize("options", [{"positive_io": True}, {"token_reorder": True}])
def test_variants_reset_after_to_empty(options):
    layer = Mamba(D, N, device="meta", backend="reference", **options).to_empty(device="cpu")
    for p in layer.parameters():
        p.data.fill_(float("nan"))
    layer.reset_parameters()
    assert layer(tokens(1, 3, dtype=torch.float32)).isfinite().all()
    assert len(fla_ops.param_groups(layer, 0.1)[1]["params"]) == 3
