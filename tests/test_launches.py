# SPDX-License-Identifier: Apache-2.0
"""How many launches a call costs on a GPU, and how many bytes move through its memory: counted, beside the peer's."""

import pytest
import torch
from delta_rule_cases import random_inputs
from recorded_launches import recorded

from fla_ops import _backend

pytest.importorskip("triton")

from interpreted_memory import watched_memory  # noqa: E402 - needs triton

DELTA = {"K": 128, "V": 128, "g": True}
interpreted = pytest.mark.skipif(
    _backend.why_not("delta_rule", "triton", "cpu", torch.float32, ()) is not None, reason="needs Triton's interpreter"
)


def names(launches):
    return [launch["kernel"] for launch in launches]


def test_launches():
    """The delta rule: two in inference, three at training at most, four in the backward; fla-core's chunks take five
    and seven, and further ones that add. The convolution: one, and in the backward a second that adds the parameters'
    partial sums. A step: one. DeltaProduct's are the delta rule's. The scan: one each way, three where a sequence
    is cut into segments; torch adds the backward's partial sums. Temporal-sparse attention: see
    test_temporal_sparse_attention_triton.py."""
    options = {"T": 1024, "l2norm": True}
    delta, packed, product, conv, scan, cut = recorded(
        ("delta_rule", "bfloat16", DELTA | options),
        ("delta_rule", "bfloat16", DELTA | options | {"packed": True, "GVA": True}),
        ("delta_product", "bfloat16", DELTA | options | {"n": 3}),
        ("causal_conv1d", "bfloat16", {"W": 4, "silu": True, "bias": True}),
        ("selective_scan", "bfloat16", {"N": 16, "softplus": True}),
        ("selective_scan", "bfloat16", {"N": 16, "softplus": True, "B": 1, "T": 32768, "Di": 512, "split": True}),
    )
    for passes, allowed in ((scan, 1), (cut, 3)):
        for name in ("forward", "training", "backward"):
            assert len(passes[name]) == allowed, names(passes[name])
        assert len(passes["step"]) == 1, names(passes["step"])
    for passes in (delta, packed, product):
        assert len(passes["forward"]) <= 2, names(passes["forward"])
        assert len(passes["training"]) <= 3, names(passes["training"])
        assert len(passes["backward"]) <= 4, names(passes["backward"])
        assert len(passes["step"]) == 1, names(passes["step"])
    assert len(conv["forward"]) == 1, names(conv["forward"])
    assert len(conv["backward"]) <= 2, names(conv["backward"])
    assert len(conv["step"]) == 1, names(conv["step"])


def test_no_grid_is_empty_or_too_wide():
    """A launch of no program is an error on a GPU, and the second and third axes of a grid end at 65,535."""
    tiny = {"K": 16, "V": 16, "H": 1, "T": 1}
    delta = (DELTA | {"T": 0}, DELTA | {"B": 0}, DELTA | {"T": 0, "packed": True}, tiny | {"B": 70_000})
    conv = ({"W": 4, "T": 0}, {"W": 4, "B": 0}, {"W": 4, "B": 70_000, "D": 1, "T": 1}, {"W": 4, "D": 70_000, "T": 1})
    requests = [("delta_rule", "bfloat16", options) for options in delta]
    requests += [("causal_conv1d", "bfloat16", options) for options in conv]
    scan = (
        {"N": 4, "T": 0},
        {"N": 4, "B": 0},
        {"N": 4, "T": 0, "packed": True},
        {"N": 1, "B": 70_000, "T": 1, "Di": 1},
    )
    requests += [("selective_scan", "bfloat16", options) for options in scan]
    sparse = ({"T": 0}, {"B": 0}, {"T": 0, "packed": True}, {"B": 70_000, "H": 1, "T": 1})
    requests += [("temporal_sparse_attention", "bfloat16", {"D": 16} | options) for options in sparse]
    for passes in recorded(*requests):
        for launches in passes.values():
            for launch in launches:
                grid = [*launch["grid"], 1, 1]
                assert all(n > 0 for n in grid), launch
                assert grid[1] <= 65_535 and grid[2] <= 65_535, launch


# Bytes a token and value head at K = V = 128 in bfloat16, H = HV, float32 gates, chunks of 64: rows of q, k, v, o or of
# a gradient; a chunk's 64 x 64 matrix; a state every 64 tokens; a float32 number.
ROW, MATRIX, STATE, NUMBER = 256, 128, 512, 4
# fla-core 0.6, gated, as its launches read and write their tensors (each once a launch, final state left out).
PEER_FORWARD = {
    "sums of g": 2 * NUMBER,
    "k k^T and its inverse": ROW + 2 * NUMBER + 2 * MATRIX,  # A is filled with zeros before
    "w and u": (2 * ROW + 2 * NUMBER + MATRIX) + 2 * ROW,
    "states": (3 * ROW + NUMBER) + (ROW + STATE),
    "output": (3 * ROW + STATE + NUMBER) + ROW,
}
PEER_BACKWARD = {
    "w and u again": PEER_FORWARD["w and u"],
    "states again": PEER_FORWARD["states"],
    "dv in the chunk": (3 * ROW + NUMBER) + ROW,
    "gradients of the states": (5 * ROW + NUMBER) + (STATE + ROW),
    "dq, dk, dw, dg": (5 * ROW + 2 * STATE + NUMBER) + (3 * ROW + NUMBER),
    "through the inverse": (4 * ROW + MATRIX + 2 * NUMBER) + (2 * ROW + 2 * NUMBER),
    "sums of dk and dg": 3 * ROW + 5 * NUMBER,
}


@interpreted
def test_bytes_of_the_delta_rule():
    """Each byte once a launch ("distinct"), and every load and store of every program as it is written ("all", what
    a GPU without a cache would move)."""
    from fla_ops.kernels import delta_rule as op

    T, H = 256, 2
    x = random_inputs(T=T, H=H, HV=H, K=128, V=128, dtype=torch.bfloat16, side=torch.float32)
    tokens = [x[n] for n in ("q", "k", "v", "beta", "g")]
    options = {"scale": 1.0, "qk_l2norm": True}
    with watched_memory() as inference:
        op.forward(*tokens, None, None, save_states=False, **options)
    with watched_memory() as training:
        o, _, states = op.forward(*tokens, None, None, save_states=True, **options)
    with watched_memory() as backward:
        op.backward(*tokens, None, None, states, torch.ones_like(o), None, needs=(True,) * 5 + (False,), **options)
    peer = {"inference": PEER_FORWARD, "training": PEER_FORWARD, "backward": PEER_BACKWARD}
    allowed = {"inference": (2_500, 3_450), "training": (2_750, 3_700), "backward": (9_700, 14_200)}
    for name, launches in {"inference": inference, "training": training, "backward": backward}.items():
        distinct = sum(launch.distinct for launch in launches) / (T * H)
        every = sum(launch.loaded + launch.stored for launch in launches) / (T * H)
        print(f"{name}: {distinct:.0f} distinct, {every:.0f} all; fla-core: {sum(peer[name].values())} distinct")
        assert distinct <= allowed[name][0] and every <= allowed[name][1], (name, distinct, every)
        assert distinct < sum(peer[name].values())


@interpreted
def test_bytes_of_delta_product():
    """A step more a token costs what its rows of k, v and beta cost: nothing is as long as T n but what stems from
    those, and queries, outputs and their gradients move once a token."""
    from delta_product_cases import random_inputs as product_inputs
    from fla_ops.kernels import delta_product as op

    T, H = 128, 1
    moved = {}
    for n in (1, 2, 4):
        x = product_inputs(n, T=T, H=H, HV=H, K=128, V=128, dtype=torch.bfloat16, side=torch.float32)
        tokens = [x[name] for name in ("q", "k", "v", "beta", "g")]
        options = {"num_householder": n, "scale": 1.0, "qk_l2norm": True}
        with watched_memory() as forward:
            o, _, states = op.forward(*tokens, None, None, save_states=True, **options)
        with watched_memory() as backward:
            op.backward(*tokens, None, None, states, torch.ones_like(o), None, needs=(True,) * 5 + (False,), **options)
        moved[n] = [sum(launch.distinct for launch in launches) / (T * H) for launches in (forward, backward)]
        print(n, moved[n])
    # q is read twice and o written once in the forward, q and do once more each in the backward's three launches and dq
    # written: rows that do not double with n.
    for one, two, four, rows in zip(*(moved[n] for n in (1, 2, 4)), (3, 6), strict=True):
        assert two < 2 * one - rows * ROW
        assert abs((four - two) - 2 * (two - one)) < 1


@pytest.mark.skipif(
    _backend.why_not("selective_scan", "triton", "cpu", torch.float32, ()) is not None,
    reason="needs Triton's interpreter",
)
def test_bytes_of_the_scan(interpreters_rows):
    """Bytes a channel and step in bfloat16 at N = 16: u, delta, z and y once are 8, a state every 32 steps 2. The
    backward reads five of them and writes three; its parts of dB and dC, one for 32 channels, are 4. The states before
    each of its runs, and u and delta a second time, stay in the second cache ("all")."""
    from fla_ops.kernels import selective_scan as op
    from selective_scan_cases import TENSORS, random_inputs

    interpreters_rows(False)
    x = random_inputs(1, 64, 128, dtype=torch.bfloat16)
    for name in ("u", "delta", "z"):
        x[name] = x[name].transpose(1, 2).contiguous().transpose(1, 2)
    inputs = [*(x[name] for name in TENSORS), None]
    with watched_memory() as forward:
        y, _, states = op.forward(*inputs, delta_softplus=True, save_states=True)
    with watched_memory() as backward:
        op.backward(*inputs, states, torch.ones_like(y), None, delta_softplus=True, needs=(True,) * 8 + (False,))
    for name, launches, distinct_allowed, all_allowed in (
        ("forward", forward, 12.5, 14),
        ("backward", backward, 40, 95),
    ):
        distinct = sum(launch.distinct for launch in launches) / x["u"].numel()
        every = sum(launch.loaded + launch.stored for launch in launches) / x["u"].numel()
        print(f"{name}: {distinct:.2f} distinct, {every:.2f} all")
        assert distinct <= distinct_allowed and every <= all_allowed, (name, distinct, every)


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
@pytest.mark.skipif(
    _backend.why_not("causal_conv1d", "triton", "cpu", torch.float32, ()) is not None,
    reason="needs Triton's interpreter",
)
def test_bytes_of_the_convolution(last):
    """Bytes an element of x in bfloat16: x once and y once are 4; backward x, dy and dx are 6."""
    from fla_ops.kernels import causal_conv1d as op

    x = torch.randn(1, 512, 128, dtype=torch.bfloat16).transpose(1, 2) if last else torch.randn(1, 128, 512).bfloat16()
    weight, dy = torch.randn(128, 4), x.clone()
    with watched_memory() as forward:
        op.forward(x, weight, None, None, None, activation="silu")
    needs = (True, True, False, False)
    with watched_memory() as backward:
        op.backward(x, weight, None, None, None, dy, None, activation="silu", needs=needs)
    for name, launches, distinct_allowed, all_allowed in (
        ("forward", forward, 4.5, 6.5),
        ("backward", backward, 7.5, 12.5),
    ):
        distinct = sum(launch.distinct for launch in launches) / x.numel()
        every = sum(launch.loaded + launch.stored for launch in launches) / x.numel()
        print(f"{name}: {distinct:.2f} distinct, {every:.2f} all")
        assert distinct <= distinct_allowed and every <= all_allowed, (name, distinct, every)


@pytest.mark.skipif(
    _backend.why_not("temporal_sparse_attention", "triton", "cpu", torch.float32, ()) is not None,
    reason="needs Triton's interpreter",
)
def test_bytes_of_sparse_attention(interpreters_rows):
    """Bytes a token and head in bfloat16 at D = DV = 64, where a row is 128 and a float32 row 256. Forward: q, v, o; k
    for the hold and where it is near; the held keys written and read: 896, and 12 of norms and counts. Backward: the
    hold again, 260; dq from six rows, 908; dk of near and of held keys and dv from five, 1,292; dk from both, 768.
    Nothing is as long as T x T: twice the tokens are twice the bytes."""
    from fla_ops.kernels import temporal_sparse_attention as op
    from temporal_sparse_attention_cases import random_inputs as sparse_inputs

    interpreters_rows(False)
    options = {"window": 32, "sink": 4, "window_mode": "band", "scale": 0.125, "dense": False}
    moved = {}
    for T in (128, 256):
        x = sparse_inputs(1, T, 1, 1, 64, 64, dtype=torch.bfloat16)
        given = (*x.values(), torch.full((1, 64), 0.3), None)
        with watched_memory() as forward:
            o, norms, _ = op.forward(*given, **options, count_fired=False)
        with watched_memory() as backward:
            op.backward(*given, o, norms, torch.ones_like(o), **options, needs=(True,) * 3)
        moved[T] = [sum(launch.distinct for launch in launches) / T for launches in (forward, backward)]
        print(T, moved[T])
    assert moved[256][0] <= 910 and moved[256][1] <= 3_230
    for one, two in zip(*moved.values(), strict=True):
        assert two <= 1.02 * one
