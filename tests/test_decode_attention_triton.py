# SPDX-License-Identifier: Apache-2.0
"""What only the Triton kernels of decode attention have: launch rows, splits over the keys, promises to torch.compile.

Without a GPU they run in Triton's interpreter, with the rows of the launch tables that GPUs get; the other tests take
the interpreter's own.
"""

import pytest
import torch
from test_decode_attention import check as check_on_cpu
from test_decode_attention import random_inputs

import fla_ops
from fla_ops import _backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = _backend.why_not("decode_attention", "triton", DEVICE, torch.float32, ())
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(autouse=True)
def rows_of_a_gpu(interpreters_rows):
    interpreters_rows(False)


@pytest.fixture
def split():
    """Splits by the shapes of the batch, which tests otherwise run without."""
    torch.use_deterministic_algorithms(False)


def check(x, **options):
    tensors = (t.to(DEVICE) for t in x)
    return check_on_cpu("triton", *tensors, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("D", [16, 64, 100, 256])
@pytest.mark.parametrize("tokens", [1, 7, 20])
def test_every_row(D, dtype, tokens):
    check(random_inputs(1, tokens, 100, 4, 1, D, 40, dtype=dtype))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_every_architecture(arch, monkeypatch):
    from fla_ops.kernels import decode_attention

    monkeypatch.setattr(decode_attention, "arch", lambda: arch)
    for tokens in (1, 20):
        check(random_inputs(1, tokens, 150, 4, 1, 70, 40, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [None, [0, 1, 300, 128, 129, 700]], ids=["", "lengths"])
def test_splits(split, dtype, lengths):
    """Splits without any key of a row, all of them for an empty one; and more splits than are put together at once."""
    from fla_ops.kernels._decode import split_keys

    n = None if lengths is None else torch.tensor(lengths)
    for T in (700, 2600):
        x = random_inputs(2 if lengths is None else 6, 2, T, 4, 2, 16, dtype=dtype)
        assert split_keys(4, T, 64, x[0])[1] == -(-T // 128)
        if n is not None:
            for b, length in enumerate(lengths):
                x[1][b, length:], x[2][b, length:] = torch.nan, torch.nan
        o = check(x, lengths=None if n is None else n.to(DEVICE))
        assert not o.isnan().any()


def test_nan_and_infinity_over_splits(split):
    q, k, v = random_inputs(4, 1, 700, 4, 1, 32)
    q = q.abs()
    k[0, 100, 0, 3], k[1, 300], k[2, :500], k[3] = torch.nan, -torch.inf, -torch.inf, -torch.inf
    o = check((q, k, v))
    assert o[0].isnan().all() and not o[1:3].isnan().any() and o[3].isnan().all()


def test_splits_follow_from_shapes(split):
    """Enough for a GPU where the batch is small, none where it is large; short ones where lengths are unknown."""
    from fla_ops.kernels._decode import split_keys

    q = torch.empty(1, device=DEVICE)
    span, splits = split_keys(8, 131072, 64, q)
    assert splits * 8 > 500 or DEVICE == "cuda"
    assert span % 64 == 0 and (splits - 1) * span < 131072 <= splits * span
    assert split_keys(100_000, 4096, 64, q) == (4096 * 100_000 // 528 // 64 * 64 + 64, 1) or DEVICE == "cuda"
    assert split_keys(8, 131072, 64, q, 512)[0] <= 512
    assert split_keys(8, 0, 64, q)[1] == 1
    torch.use_deterministic_algorithms(True)
    assert split_keys(8, 5000, 64, q) == split_keys(800, 5000, 64, q) == (1024, 5)


def test_results_are_what_is_promised_to_torch_compile():
    from fla_ops.kernels import decode_attention as op

    q, k, v = (x.to(DEVICE) for x in random_inputs(2, 3, 30, 4, 2, 5, 7, dtype=torch.bfloat16))
    o, promised = (f(q, k, v, lengths=None, scale=1.0) for f in (op.forward, op._result))
    assert (o.shape, o.stride(), o.dtype) == (promised.shape, promised.stride(), promised.dtype)


def test_a_head_dimension_beyond_the_kernels():
    q, k, v = (x.to(DEVICE) for x in random_inputs(1, 1, 5, 1, 1, 257, 8))
    with pytest.raises(RuntimeError, match="head dimensions go up to 256, got 257"):
        fla_ops.exact_decode_attention(q, k, v, backend="triton")


def test_launches():
    from recorded_launches import recorded

    options = {"D": 64}
    whole, split = recorded(
        ("decode_attention", "bfloat16", options | {"T": 1000}),
        ("decode_attention", "bfloat16", options | {"split": True}),
    )
    assert [len(x["decode"]) for x in (whole, split)] == [1, 2]
