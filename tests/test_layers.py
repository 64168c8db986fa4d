# SPDX-License-Identifier: Apache-2.0
"""The layers: names, states, masks, wrapped submodules, and the rest of PyTorch. What is Mamba's own: test_mamba.py."""

import copy
import doctest
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fla_ops
from fla_ops.layers import DeltaNet, GatedDeltaNet, GatedDeltaProduct, LayerState, Mamba

D = 24


def delta_net(**options):
    return DeltaNet(**({"hidden_size": D, "num_heads": 2, "expand_v": 0.5} | options))


def gated_delta_net(**options):
    return GatedDeltaNet(**({"hidden_size": D, "head_dim": 6, "num_heads": 2, "num_v_heads": 4} | options))


def gated_delta_product(**options):
    return GatedDeltaProduct(**({"hidden_size": D, "head_dim": 6, "num_heads": 2, "num_v_heads": 4} | options))


def mamba(**options):
    return Mamba(**({"d_model": D, "d_state": 5} | options))


# Every option is somewhere; K != V, grouped value heads and conv widths 1 to 5 among them.
VARIANTS = {
    "delta": lambda **o: delta_net(**o),
    "delta-gate-bias": lambda **o: delta_net(use_gate=True, conv_bias=True, allow_neg_eigval=True, **o),
    "delta-relu-sum": lambda **o: delta_net(qk_activation="relu", qk_norm="sum", conv_size=2, **o),
    "delta-elu-no-beta": lambda **o: delta_net(qk_activation="elu", use_beta=False, conv_size=5, **o),
    "delta-identity-no-conv": lambda **o: delta_net(qk_activation="identity", use_short_conv=False, **o),
    "delta-width-1": lambda **o: delta_net(conv_size=1, **o),
    "gated": lambda **o: gated_delta_net(**o),
    "gated-plain-out": lambda **o: gated_delta_net(use_gate=False, conv_bias=True, allow_neg_eigval=True, **o),
    "gated-no-conv": lambda **o: gated_delta_net(use_short_conv=False, output_gate_activation="sigmoid", **o),
    "product": lambda **o: gated_delta_product(**o),
    "product-3-plain": lambda **o: gated_delta_product(
        use_forget_gate=False, use_output_gate=False, allow_neg_eigval=False, num_householder=3, conv_bias=True, **o
    ),
    "product-no-conv": lambda **o: gated_delta_product(use_short_conv=False, use_forget_gate=False, **o),
    "product-1": lambda **o: gated_delta_product(num_householder=1, expand_v=0.5, **o),
    "mamba": lambda **o: mamba(**o),
    "mamba-bias": lambda **o: mamba(d_conv=2, expand=1.5, dt_rank=3, conv_bias=False, bias=True, **o),
    "mamba-width-1": lambda **o: mamba(d_conv=1, d_state=1, dt_init="constant", **o),
    "mamba-positive": lambda **o: mamba(d_conv=5, positive_io=True, **o),
}
MAIN = ("delta-gate-bias", "gated", "product", "mamba")


def make(variant, backend="reference", dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = VARIANTS[variant](backend=backend, dtype=dtype, **options)
    with torch.no_grad():  # leave the ones of the norm and the skip, and tiny steps, so that a forgotten weight shows
        if isinstance(layer, Mamba):
            layer.D.uniform_(0.5, 1.5)
            layer.dt_proj.bias.uniform_(-2, 1)
        else:
            layer.o_norm.weight.uniform_(0.5, 1.5)
    return layer


def tokens(*shape, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, D, generator=generator, dtype=torch.float64).to(dtype)


def assert_close(actual, expected, bound=2e-12):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if expected.numel():
        error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
        assert error <= bound * max(size, 1e-3), f"error {error:.2e} at size {size:.2e}"


def assert_states_close(actual, expected):
    assert (actual.conv is None) == (expected.conv is None)
    for a, b in zip(actual, expected, strict=True):
        if a is not None:
            assert_close(a, b)


def gradients(layer, *outputs):
    """Gradients of the parameters for a fixed random projection of the outputs."""
    layer.zero_grad()
    generator = torch.Generator().manual_seed(7)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs)
    loss.backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters()}


# Names and shapes: what flash-linear-attention 0.6 prints for these sizes.


def qkv(q, k, v, width=4, bias=False):
    shapes = {}
    for name, dim in (("q", q), ("k", k), ("v", v)):
        shapes[f"{name}_proj.weight"] = (dim, 32)
        if width:
            shapes[f"{name}_conv1d.weight"] = (dim, 1, width)
        if bias:
            shapes[f"{name}_conv1d.bias"] = (dim,)
    return shapes


DELTA = {"o_norm.weight": (8,), "o_proj.weight": (32, 32), "b_proj.weight": (4, 32)}
GATED = {
    "A_log": (4,),
    "dt_bias": (4,),
    "a_proj.weight": (4, 32),
    "b_proj.weight": (4, 32),
    "g_proj.weight": (64, 32),
    "o_norm.weight": (16,),
    "o_proj.weight": (32, 64),
}
MAMBA = {  # as mamba-ssm 2.3 and transformers 5.23 print them
    "A_log": (64, 16),
    "D": (64,),
    "in_proj.weight": (128, 32),
    "conv1d.weight": (64, 1, 4),
    "conv1d.bias": (64,),
    "x_proj.weight": (34, 64),
    "dt_proj.weight": (64, 2),
    "dt_proj.bias": (64,),
    "out_proj.weight": (32, 64),
}
TABLE = [
    (DeltaNet, {}, qkv(32, 32, 32) | DELTA),
    (
        DeltaNet,
        {"use_gate": True, "conv_bias": True, "conv_size": 3, "expand_k": 0.5, "expand_v": 2},
        qkv(16, 16, 64, 3, True)
        | DELTA
        | {"g_proj.weight": (64, 32), "o_norm.weight": (16,), "o_proj.weight": (32, 64)},
    ),
    (
        DeltaNet,
        {"use_beta": False, "use_short_conv": False},
        qkv(32, 32, 32, 0) | {k: v for k, v in DELTA.items() if k != "b_proj.weight"},
    ),
    (GatedDeltaNet, {"head_dim": 8, "num_heads": 2, "num_v_heads": 4}, qkv(16, 16, 64) | GATED),
    (
        GatedDeltaNet,
        {"head_dim": 8, "num_heads": 4, "use_gate": False, "conv_bias": True},
        qkv(32, 32, 64, 4, True) | {k: v for k, v in GATED.items() if k != "g_proj.weight"},
    ),
    (
        GatedDeltaProduct,
        {"head_dim": 8, "num_heads": 2, "num_v_heads": 4, "num_householder": 3},
        qkv(16, 48, 192) | GATED | {"b_proj.weight": (12, 32)},
    ),
    (
        GatedDeltaProduct,
        {"head_dim": 8, "num_heads": 4, "use_forget_gate": False, "use_output_gate": False, "conv_bias": True},
        qkv(32, 64, 128, 4, True) | {"b_proj.weight": (8, 32), "o_norm.weight": (16,), "o_proj.weight": (32, 64)},
    ),
    (
        GatedDeltaProduct,
        {"head_dim": 8, "num_heads": 4, "use_short_conv": False, "num_householder": 1},
        qkv(32, 32, 64, 0) | GATED,
    ),
    (Mamba, {}, MAMBA),
    (
        Mamba,
        {"d_state": 5, "d_conv": 3, "dt_rank": 7, "conv_bias": False, "bias": True},
        {k: v for k, v in MAMBA.items() if k != "conv1d.bias"}
        | {"A_log": (64, 5), "conv1d.weight": (64, 1, 3), "x_proj.weight": (17, 64), "dt_proj.weight": (64, 7)}
        | {"in_proj.bias": (128,), "out_proj.bias": (32,)},
    ),
    (
        Mamba,
        {"positive_io": True, "token_reorder": True},
        {k: v for k, v in MAMBA.items() if k != "x_proj.weight"}
        | {"x_proj.dt_weight": (2, 64), "x_proj.shared_weight": (16, 64), "x_proj.scale": (16,)}
        | {"reorder.weight": (64,)},
    ),
]


@pytest.mark.parametrize(("cls", "options", "shapes"), TABLE)
def test_state_dict_names_and_shapes(cls, options, shapes):
    layer = cls(32, **options)
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == shapes
    assert all(v.dtype == torch.float32 for v in layer.state_dict().values())


def test_defaults_are_the_peers():
    with torch.device("meta"):
        delta, gated, product = DeltaNet(), GatedDeltaNet(), GatedDeltaProduct()
    assert delta.q_proj.weight.shape == (1024, 1024) and delta.o_norm.weight.shape == (256,)
    assert delta.q_conv1d.weight.shape == (1024, 1, 4) and not hasattr(delta, "g_proj")
    assert gated.q_proj.weight.shape == (1536, 2048) and gated.v_proj.weight.shape == (3072, 2048)
    assert gated.A_log.shape == (6,) and gated.o_norm.weight.shape == (512,) and gated.g_proj.weight.shape[0] == 3072
    assert product.q_proj.weight.shape == (1536, 2048) and product.k_proj.weight.shape == (3072, 2048)
    assert product.v_proj.weight.shape == (6144, 2048) and product.b_proj.weight.shape == (12, 2048)
    assert product.k_conv1d.weight.shape == (3072, 1, 4) and product.g_proj.weight.shape[0] == 3072
    assert product.A_log.shape == (6,) and product.o_norm.weight.shape == (512,) and product.allow_neg_eigval


# Against the definition, written out token by token for one head.


def test_gated_layer_is_its_equation():
    torch.manual_seed(0)
    layer = GatedDeltaNet(hidden_size=D, head_dim=6, num_heads=1, backend="reference", dtype=torch.float64)
    x = tokens(1, 7)
    p, T = dict(layer.named_parameters()), 7

    def convolved(name):
        u = torch.cat([x.new_zeros(3, p[f"{name}_proj.weight"].shape[0]), x[0] @ p[f"{name}_proj.weight"].T])
        return nn.functional.silu(sum(p[f"{name}_conv1d.weight"][:, 0, w] * u[w : w + T] for w in range(4)))

    q, k, v = (convolved(name) for name in "qkv")
    q, k = (u / (u.square().sum(-1, keepdim=True) + 1e-6).sqrt() for u in (q, k))
    beta = torch.sigmoid(x[0] @ p["b_proj.weight"].T)
    g = -p["A_log"].exp() * nn.functional.softplus(x[0] @ p["a_proj.weight"].T + p["dt_bias"])
    S, rows = x.new_zeros(6, 12), []
    for t in range(T):
        S = g[t].exp() * S
        S = S + beta[t] * torch.outer(k[t], v[t] - S.T @ k[t])
        o = S.T @ q[t] * 6**-0.5
        o = o / (o.square().mean() + 1e-5).sqrt() * p["o_norm.weight"]
        rows.append(o * nn.functional.silu(p["g_proj.weight"] @ x[0, t]))
    assert_close(layer(x)[0], torch.stack(rows) @ p["o_proj.weight"].T)


@pytest.mark.parametrize("gated", [False, True])
def test_product_layer_is_its_equation(gated):
    """Two heads, three micro-steps: rows of the projections are ordered (n h d)."""
    torch.manual_seed(0)
    n, H, K, V, T = 3, 2, 6, 12, 7
    layer = GatedDeltaProduct(
        D, head_dim=K, num_heads=H, num_householder=n, use_forget_gate=gated, backend="reference", dtype=torch.float64
    )
    x = tokens(1, T)
    p = dict(layer.named_parameters())

    def convolved(name):
        u = torch.cat([x.new_zeros(3, p[f"{name}_proj.weight"].shape[0]), x[0] @ p[f"{name}_proj.weight"].T])
        return nn.functional.silu(sum(p[f"{name}_conv1d.weight"][:, 0, w] * u[w : w + T] for w in range(4)))

    def normalised(u):
        return u / (u.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    q, k, v = convolved("q").view(T, H, K), convolved("k").view(T, n, H, K), convolved("v").view(T, n, H, V)
    beta = 2 * torch.sigmoid(x[0] @ p["b_proj.weight"].T).view(T, n, H)
    gate = (p["g_proj.weight"] @ x[0].T).T.view(T, H, V)
    g = x.new_zeros(T, H)
    if gated:
        g = -p["A_log"].exp() * nn.functional.softplus(x[0] @ p["a_proj.weight"].T + p["dt_bias"])
    rows = x.new_zeros(T, H, V)
    for h in range(H):
        S = x.new_zeros(K, V)
        for t in range(T):
            S = g[t, h].exp() * S
            for j in range(n):
                key = normalised(k[t, j, h])
                S = S + beta[t, j, h] * torch.outer(key, v[t, j, h] - S.T @ key)
            o = S.T @ normalised(q[t, h]) * K**-0.5
            o = o / (o.square().mean() + 1e-5).sqrt() * p["o_norm.weight"]
            rows[t, h] = o * nn.functional.silu(gate[t, h])
    assert_close(layer(x)[0], rows.flatten(1) @ p["o_proj.weight"].T)


def test_product_of_one_is_the_gated_delta_net(backend):
    product = make("product-1", backend)
    net = gated_delta_net(expand_v=0.5, allow_neg_eigval=True, backend=backend, dtype=torch.float64)
    net.load_state_dict(product.state_dict(), strict=True)
    assert torch.equal(net(tokens(2, 70)), product(tokens(2, 70)))


# Any split of the sequence gives the same answer.


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_and_steps_equal_the_whole(variant, backend):
    layer = make(variant, backend)
    x = tokens(2, 11)
    y, final = layer(x, return_state=True)
    for cuts in ([4], [1, 2, 3], [0, 5, 5, 10]):
        state, parts = None, []
        for a, b in zip([0, *cuts], [*cuts, 11], strict=True):
            part, state = layer(x[:, a:b], state=state, return_state=True)
            parts.append(part)
        assert_close(torch.cat(parts, 1), y)
        assert_states_close(state, final)
    with torch.no_grad():
        state = layer.init_state(2)
        for t in range(11):
            assert_close(layer.step(x[:, t], state), y[:, t].detach())
        assert_states_close(state, final)


@pytest.mark.parametrize("variant", MAIN)
def test_gradients_through_the_state(variant, backend):
    layer = make(variant, backend)
    x = tokens(2, 9).requires_grad_()
    y, final = layer(x, return_state=True)
    expected = gradients(layer, y, *final)
    expected["x"], x.grad = x.grad, None
    first, state = layer(x[:, :2], return_state=True)
    second, final = layer(x[:, 2:], state=state, return_state=True)
    actual = gradients(layer, torch.cat([first, second], 1), *final) | {"x": x.grad}
    for name, grad in expected.items():
        assert_close(actual[name], grad, 1e-11)


@pytest.mark.parametrize("variant", MAIN)
def test_packed_equals_separate(variant, backend):
    layer = make(variant, backend)
    lengths = [5, 0, 1, 66, 3]
    x = tokens(1, sum(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    state = layer.init_state(len(lengths))
    state.recurrent.normal_(std=0.1)
    state.conv.normal_()
    before = state.clone()
    y, final = layer(x, cu_seqlens=cu_seqlens.int(), state=state, return_state=True)
    packed = gradients(layer, y, *final)
    parts = [
        layer(x[:, a:b], state=state.select(torch.tensor([n])), return_state=True)
        for n, (a, b) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False))
    ]
    assert_close(y, torch.cat([part.y for part in parts], 1))
    together = LayerState(*(torch.cat([p.state[i] for p in parts]) for i in range(2)))
    assert_states_close(final, together)
    assert_states_close(final.select(torch.tensor([1])), before.select(torch.tensor([1])))
    separate = gradients(layer, torch.cat([part.y for part in parts], 1), *together)
    for name in packed:
        assert_close(packed[name], separate[name], 1e-11)
    assert_states_close(state, before)  # what was given is not modified


MASK = torch.tensor(
    [
        [0, 0, 0, 1, 1, 1, 1, 1],  # left padding
        [1, 1, 1, 1, 1, 0, 0, 0],  # right padding
        [0, 1, 0, 0, 1, 1, 0, 1],  # holes
        [0, 0, 0, 0, 0, 0, 0, 0],  # nothing kept
        [1, 1, 1, 1, 1, 1, 1, 1],
    ]
)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("variant", (*MAIN, "delta-identity-no-conv", "product-3-plain"))
def test_a_masked_row_equals_the_row_alone(variant, with_state, backend):
    layer = make(variant, backend)
    x = tokens(5, 8)
    x[MASK == 0] = float("nan")
    x.requires_grad_()
    state = layer.init_state(5)
    if with_state:
        for part in state:
            if part is not None:
                part.normal_(std=0.3)
    y, final = layer(x, attention_mask=MASK, state=state if with_state else None, return_state=True)
    masked = gradients(layer, y, *(s for s in final if s is not None)) | {"x": x.grad}
    assert (y[MASK == 0] == 0).all()
    alone, states = torch.zeros_like(y), []
    z = x.detach().clone().requires_grad_()
    for row in range(5):
        keep = MASK[row].bool()
        given = state.select(torch.tensor([row])) if with_state else None
        part, row_state = layer(z[row : row + 1, keep], state=given, return_state=True)
        alone = alone.index_put((torch.tensor(row), keep.nonzero()[:, 0]), part[0])
        states.append(row_state)
    together = LayerState(*(None if final[i] is None else torch.cat([s[i] for s in states]) for i in range(2)))
    assert_close(y, alone)
    assert_states_close(final, together)
    if with_state:
        assert_states_close(final.select(torch.tensor([3])), state.select(torch.tensor([3])))
    separate = gradients(layer, alone, *(s for s in together if s is not None)) | {"x": z.grad}
    for name in separate:
        assert_close(masked[name], separate[name], 1e-11)
    assert (masked["x"][MASK == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_mask_dtypes(dtype):
    layer, x = make("gated"), tokens(5, 8)
    assert torch.equal(layer(x, attention_mask=MASK.to(dtype)), layer(x, attention_mask=MASK))
    assert torch.equal(layer(x, attention_mask=torch.ones(5, 8, dtype=dtype)), layer(x))


@pytest.mark.parametrize("variant", MAIN)
def test_empty_inputs(variant, backend):
    layer = make(variant, backend)
    state = layer.init_state(2)
    state.recurrent.normal_()
    y, final = layer(tokens(2, 0), state=state, return_state=True)
    assert y.shape == (2, 0, D)
    assert_states_close(final, state)
    assert final.recurrent.data_ptr() != state.recurrent.data_ptr()
    y, final = layer(tokens(0, 4), return_state=True)
    assert y.shape == (0, 4, D) and final.recurrent.shape[0] == 0


# Submodules are called, never bypassed.


class LoRA(nn.Module):
    """A frozen Linear with a low-rank update, as adapter libraries wrap them."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype) * 0.3)
        self.up = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype) * 0.3)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T

    def merged(self):
        merged = copy.deepcopy(self.base)
        merged.weight.data += self.up @ self.down
        return merged


@pytest.mark.parametrize("variant", MAIN)
def test_wrapped_linears_take_effect(variant, backend):
    x = tokens(2, 5)
    names = [name for name, m in make(variant).named_children() if isinstance(m, nn.Linear)]
    mambas = {"in_proj", "x_proj", "dt_proj", "out_proj"}
    assert (mambas if variant == "mamba" else {"q_proj", "k_proj", "v_proj", "b_proj", "g_proj", "o_proj"}) <= set(
        names
    )
    for name in names:
        layer = make(variant, backend)
        plain = layer(x)
        setattr(layer, name, LoRA(getattr(layer, name)))
        y = layer(x)
        assert (y - plain).abs().max() > 1e-4, name
        y.square().sum().backward()
        assert all(p.grad.abs().max() > 0 for p in (getattr(layer, name).up, getattr(layer, name).down)), name
        with torch.no_grad():
            state = layer.init_state(2)
            assert_close(torch.stack([layer.step(x[:, t], state) for t in range(5)], 1), y.detach())
        setattr(layer, name, getattr(layer, name).merged())
        assert_close(layer(x), y)


@pytest.mark.parametrize("variant", MAIN)
def test_every_submodule_is_called_once(variant):
    layer, calls = make(variant), []
    for name, module in layer.named_children():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    expected = sorted(name for name, _ in layer.named_children())
    layer(tokens(2, 5))
    assert sorted(calls) == expected
    calls.clear()
    with torch.no_grad():
        layer.step(tokens(2), layer.init_state(2))
    assert sorted(calls) == expected


def test_a_hook_that_changes_the_convolution_is_obeyed():
    layer, x = make("gated"), tokens(1, 5)
    plain = layer(x)
    layer.v_conv1d.register_forward_hook(lambda module, inputs, out: (out[0] * 0, out[1]))
    assert plain.abs().max() > 0 and (layer(x) == 0).all()


# Construction, dtypes, copies.


@pytest.mark.parametrize("variant", MAIN)
def test_meta_construction_and_reset(variant):
    layer = make(variant, dtype=torch.float32, device="cpu")
    on_meta = VARIANTS[variant](backend="reference", device="meta")
    assert all(p.is_meta for p in on_meta.parameters())
    on_meta.to_empty(device="cpu")
    for p in on_meta.parameters():
        p.data.fill_(float("nan"))
    on_meta.reset_parameters()
    assert on_meta.state_dict().keys() == layer.state_dict().keys()
    assert torch.isfinite(on_meta(tokens(1, 3, dtype=torch.float32))).all()
    assert marked(on_meta) == marked(layer)


@pytest.mark.parametrize("cls", [GatedDeltaNet, GatedDeltaProduct])
def test_documented_initialisation(cls):
    torch.manual_seed(0)
    layer = cls(hidden_size=64, head_dim=8, num_heads=256, conv_bias=True)
    rate, step = layer.A_log.exp(), nn.functional.softplus(layer.dt_bias)
    assert 0 < rate.min() < 1 and 15 < rate.max() <= 16 and 7 < rate.mean() < 9
    assert 0.001 <= step.min() < 0.0015 and 0.08 < step.max() <= 0.1001
    assert abs(step.log10().mean() + 2) < 0.1
    assert (layer.o_norm.weight == 1).all()
    for linear in (layer.k_proj, layer.b_proj, layer.o_proj):
        bound = linear.in_features**-0.5
        assert 0.95 * bound < linear.weight.abs().max() <= bound
    for conv in (layer.q_conv1d, layer.v_conv1d):
        assert 0.45 < conv.weight.abs().max() <= 0.5 and 0.45 < conv.bias.abs().max() <= 0.5


def marked(layer):
    return {name for name, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ("gated", {"A_log", "dt_bias"}),
        ("product", {"A_log", "dt_bias"}),
        ("mamba", {"A_log", "D", "dt_proj.bias"}),
    ],
)
def test_marks_survive_and_param_groups_obeys_them(variant, names):
    layer = make(variant, dtype=torch.float32)
    assert marked(layer) == names and marked(make("delta")) == marked(make("product-no-conv")) == set()
    assert marked(copy.deepcopy(layer)) == names
    assert marked(pickle.loads(pickle.dumps(layer))) == names
    assert marked(copy.deepcopy(layer).bfloat16()) == names
    other = VARIANTS[variant](device="meta")
    other.load_state_dict(layer.state_dict(), assign=True)
    assert marked(other) == names
    model = nn.Sequential(layer, nn.Linear(D, D))
    model[1].bias.requires_grad_(False)
    decay, keep = fla_ops.param_groups(model, 0.1)
    assert decay["weight_decay"] == 0.1 and keep["weight_decay"] == 0.0
    assert {id(p) for p in keep["params"]} == {id(layer.get_parameter(name)) for name in names}
    assert len(decay["params"]) == len(list(model.parameters())) - 1 - len(names)
    nn.Sequential(other).load_state_dict({f"0.{k}": v for k, v in layer.state_dict().items()}, assign=True)
    assert marked(other) == names
    torch.optim.AdamW(fla_ops.param_groups(make("delta"), 0.1))


@pytest.mark.parametrize("variant", MAIN)
def test_copies_pickles_and_state_dicts(variant):
    layer, x = make(variant, dtype=torch.float32), tokens(2, 5, dtype=torch.float32)
    y, state = layer(x, return_state=True)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = VARIANTS[variant](backend="reference")
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(twin(x), y)
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in layer.parameters()}
    again = pickle.loads(pickle.dumps(state.detach()))
    assert isinstance(again, LayerState) and torch.equal(again.recurrent, state.recurrent)
    assert torch.equal(again.conv, state.conv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", MAIN)
def test_low_precision_layer_stays_near_float32(variant, dtype, backend):
    layer = make(variant, backend, torch.float32)
    low = copy.deepcopy(layer).to(dtype)
    layer.load_state_dict(low.state_dict())  # the same, already rounded, parameters
    x = tokens(2, 40, dtype=dtype)
    exact, exact_state = layer(x.float(), return_state=True)
    y, state = low(x, return_state=True)
    assert y.dtype == dtype and state.recurrent.dtype == state.conv.dtype == torch.float32
    for a, b in ((y, exact), (state.recurrent, exact_state.recurrent)):
        relative = (a.float() - b).square().mean().sqrt() / b.square().mean().sqrt()
        assert relative < 4 * torch.finfo(dtype).eps, relative
    y.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == dtype for p in low.parameters())


def test_gate_is_computed_in_float32_for_a_bfloat16_layer():
    from fla_ops.layers._gates import decay_gate

    layer = make("gated", dtype=torch.float32).bfloat16()
    a = torch.randn(100, 4).bfloat16()
    g = decay_gate(a, layer.A_log, layer.dt_bias)
    exact = -layer.A_log.double().exp() * nn.functional.softplus(a.double() + layer.dt_bias.double())
    assert g.dtype == torch.float32 and (g - exact).abs().max() < 1e-5


@pytest.mark.parametrize("A_log", [-20.0, 0.0, 5.0, 90.0])
@pytest.mark.parametrize("dt", [-50.0, 0.0, 50.0])
@pytest.mark.parametrize("variant", ["gated", "product"])
def test_extreme_decays_are_finite(variant, A_log, dt, backend):
    layer = make(variant, backend, torch.float32)
    with torch.no_grad():
        layer.A_log.fill_(A_log)
        layer.dt_bias.fill_(dt)
    x = tokens(1, 5, dtype=torch.float32).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


# The rest of PyTorch.


@pytest.mark.parametrize("variant", MAIN)
def test_autocast(variant, backend):
    layer, x = make(variant, backend, torch.float32), tokens(2, 20, dtype=torch.float32)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = layer(x, return_state=True)
        with torch.no_grad():
            assert layer.step(x[:, 0], layer.init_state(2)).dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16 and state.recurrent.dtype == torch.float32
    assert (y - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("variant", MAIN)
def test_checkpointing(variant, use_reentrant, backend):
    layer = make(variant, backend)
    x = tokens(2, 9).requires_grad_()
    expected = gradients(layer, layer(x)) | {"x": x.grad.clone()}
    x.grad = None
    actual = gradients(layer, checkpoint(layer, x, use_reentrant=use_reentrant)) | {"x": x.grad}
    assert all(torch.equal(actual[name], grad) for name, grad in expected.items())


@pytest.mark.parametrize("variant", MAIN)
def test_eval_mode_changes_nothing(variant, backend):
    layer, x = make(variant, backend), tokens(1, 3)
    trained = gradients(layer, layer(x))
    evaluated = gradients(layer.eval(), layer(x))
    assert all(torch.equal(trained[name], grad) for name, grad in evaluated.items())


@pytest.mark.slow
@pytest.mark.parametrize("variant", MAIN)
def test_compiles_without_a_graph_break(variant, backend):
    torch._dynamo.reset()
    layer, x = make(variant, backend), tokens(2, 3).requires_grad_()
    expected = gradients(layer, layer(x)) | {"x": x.grad.clone()}
    y = layer(x)
    x.grad = None
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    z = compiled(x)
    assert_close(z, y)
    actual = gradients(layer, z) | {"x": x.grad}
    for name, grad in expected.items():
        assert_close(actual[name], grad, 1e-11)
    _, state = layer(x, return_state=True)
    z, final = compiled(x, state=state.detach(), return_state=True)
    assert_close(z, layer(x, state=state))
    assert isinstance(final, LayerState)
    step = torch.compile(layer.step, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        ours, theirs = state.clone(), state.clone()
        assert_close(step(x[:, 0], ours), layer.step(x[:, 0], theirs))
        assert_states_close(ours, theirs)


def test_docstrings():
    from fla_ops import _param_groups
    from fla_ops.layers import delta_product, delta_rule, selective_scan

    for module in (delta_product, delta_rule, selective_scan, _param_groups):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed


# Bad arguments name themselves.

CU = torch.tensor([0, 3, 5])
BAD_CALLS = [
    (ValueError, "'x' must be of shape", lambda l: l(tokens(5))),
    (ValueError, f"(hidden_size|d_model)={D}", lambda l: l(tokens(1, 5)[..., :-1])),
    (TypeError, "'x' must be a tensor", lambda l: l([1.0])),
    (
        ValueError,
        "either argument 'attention_mask' or",
        lambda l: l(tokens(1, 5), attention_mask=torch.ones(1, 5).int(), cu_seqlens=CU),
    ),
    (ValueError, "'attention_mask' must be of shape", lambda l: l(tokens(2, 5), attention_mask=torch.ones(2, 6).int())),
    (TypeError, "'attention_mask' must be a bool", lambda l: l(tokens(2, 5), attention_mask=torch.ones(2, 5))),
    (ValueError, "'cu_seqlens' must be given with B=1", lambda l: l(tokens(2, 5), cu_seqlens=CU)),
    (ValueError, "'cu_seqlens' must be non-decreasing", lambda l: l(tokens(1, 6), cu_seqlens=CU)),
    (ValueError, "'state.recurrent' must be", lambda l: l(tokens(2, 5), state=l.init_state(3))),
    (ValueError, "'state.conv' must be", lambda l: l(tokens(2, 5), state=l.init_state(2)._replace(conv=None))),
    (TypeError, "'state' must be a LayerState", lambda l: l(tokens(2, 5), state=torch.zeros(2))),
    (TypeError, "'return_state' must be True or False", lambda l: l(tokens(2, 5), return_state=1)),
    (TypeError, "unexpected keyword", lambda l: l(tokens(2, 5), mask=None)),
    (RuntimeError, "a step has no backward", lambda l: l.step(tokens(2), l.init_state(2))),
    (ValueError, "'x' must be of shape", lambda l: l.step(tokens(2, 1), l.init_state(2))),
    (ValueError, "'state.recurrent' must be", lambda l: l.step(tokens(2), l.init_state(3))),
]


@pytest.mark.parametrize("variant", ["gated", "product", "mamba"])
@pytest.mark.parametrize(("error", "message", "call"), BAD_CALLS)
def test_bad_calls(error, message, call, variant):
    with pytest.raises(error, match=message):
        call(make(variant))


BAD_LAYERS = [
    ("'num_heads' must be", lambda: DeltaNet(hidden_size=32, num_heads=5)),
    ("'expand_k' must be", lambda: DeltaNet(hidden_size=32, expand_k=0.3)),
    ("'qk_norm' must be", lambda: DeltaNet(hidden_size=32, qk_norm="l1")),
    ("'qk_activation' must be", lambda: DeltaNet(hidden_size=32, qk_activation="gelu")),
    ("'num_v_heads' must be", lambda: GatedDeltaNet(hidden_size=32, num_heads=4, num_v_heads=6)),
    ("'expand_v' must be", lambda: GatedDeltaNet(hidden_size=32, head_dim=7, expand_v=1.3)),
    ("'output_gate_activation' must be", lambda: GatedDeltaNet(hidden_size=32, output_gate_activation="relu")),
    ("GatedDeltaProduct: argument 'num_householder' must be", lambda: GatedDeltaProduct(32, num_householder=0)),
    ("'num_v_heads' must be", lambda: GatedDeltaProduct(hidden_size=32, num_heads=4, num_v_heads=6)),
    ("'expand_v' must be", lambda: GatedDeltaProduct(hidden_size=32, head_dim=7, expand_v=1.3)),
    ("'d_model' must be", lambda: Mamba(0)),
    ("'d_state' must be", lambda: Mamba(32, 0)),
    ("'d_conv' must be", lambda: Mamba(32, d_conv=9)),
    ("'expand' must be", lambda: Mamba(32, expand=0.01)),
    ("'dt_rank' must be", lambda: Mamba(32, dt_rank=0)),
    ("'dt_init' must be", lambda: Mamba(32, dt_init="normal")),
    ("'dt_min' must be", lambda: Mamba(32, dt_min=0.1, dt_max=0.01)),
    ("'d_state' must be at most Di=8", lambda: Mamba(4, 9, positive_io=True)),
]


@pytest.mark.parametrize(("message", "build"), BAD_LAYERS)
def test_bad_constructions(message, build):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("count", [True, 2.0, "2"])
def test_number_of_micro_steps_is_an_int(count):
    with pytest.raises(TypeError, match="'num_householder' must be an int"):
        GatedDeltaProduct(hidden_size=32, num_householder=count)


def test_failed_step_leaves_the_state_alone():
    layer = make("gated")
    state = layer.init_state(2)
    with torch.no_grad(), pytest.raises(ValueError, match=r"state\.recurrent"):
        layer.step(tokens(2), state._replace(recurrent=state.recurrent[:1]))
    assert (state.conv == 0).all()


def test_steps_from_a_state_with_history_and_in_inference_mode():
    layer, x = make("gated"), tokens(2, 5)
    y, state = layer(x[:, :4], return_state=True)
    with torch.no_grad():
        token = layer.step(x[:, 4], state)
    y.sum().backward()
    with torch.inference_mode():
        y, state = layer(x[:, :4], return_state=True)
        assert torch.equal(layer.step(x[:, 4], state), token)


def test_state_helpers():
    layer = make("gated", dtype=torch.float32)
    assert layer.init_state(3).recurrent.dtype == torch.float32
    assert layer.init_state(3, dtype=torch.bfloat16).conv.dtype == torch.bfloat16
    _, state = layer(tokens(3, 4, dtype=torch.float32), return_state=True)
    assert state.recurrent.requires_grad and not state.detach().recurrent.requires_grad
    assert state.detach().recurrent.data_ptr() == state.recurrent.data_ptr()
    assert state.clone().recurrent.data_ptr() != state.recurrent.data_ptr()
    assert state.to(torch.float64).conv.dtype == torch.float64
    picked = state.select(torch.tensor([2, 0, 2]))
    assert torch.equal(picked.conv[0], state.conv[2]) and torch.equal(picked.recurrent[1], state.recurrent[0])
    assert LayerState(None, torch.zeros(1)).clone().conv is None
    with torch.no_grad():  # a state kept in bfloat16 still steps
        low = state.to(torch.bfloat16)
        y = layer.step(tokens(3, dtype=torch.float32), low)
        exact = layer.step(tokens(3, dtype=torch.float32), state.detach())
    assert low.recurrent.dtype == torch.bfloat16 and (y - exact).abs().max() < 0.05
