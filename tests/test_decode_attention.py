# SPDX-License-Identifier: Apache-2.0
"""Dense decode attention: the reference against PyTorch's own, then every backend against the reference."""

import contextlib

import pytest
import torch
from delta_rule_cases import assert_same_bits
from selective_scan_cases import LAYOUTS

import fla_ops
from fla_ops.reference.decode_attention import decode_attention as reference
from fla_ops.testing import assert_matches_reference

OP = "decode_attention"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def random_inputs(B=2, Tq=1, T=150, HQ=8, HK=2, D=64, DV=None, *, dtype=torch.float32, seed=0):
    r = torch.Generator().manual_seed(seed)
    shapes = ((B, Tq, HQ, D), (B, T, HK, D), (B, T, HK, DV or D))
    return tuple(torch.randn(*shape, generator=r, dtype=torch.float64).to(dtype) for shape in shapes)


def check(backend, q, k, v, *, lengths=None, scale=None):
    o = fla_ops.exact_decode_attention(q, k, v, lengths=lengths, scale=scale, backend=backend)
    options = {"lengths": lengths, "scale": q.shape[-1] ** -0.5 if scale is None else scale}
    ref64 = reference(q.double(), k.double(), v.double(), **options)
    low = None if q.dtype == torch.float64 else q.dtype
    assert_matches_reference(o, ref64, reference(q, k, v, **options, operand_dtype=low), "o", seed=0)
    return o


def test_the_reference_is_pytorchs_attention():
    q, k, v = random_inputs(Tq=3, dtype=torch.float64)
    mask = torch.ones(3, 150, dtype=torch.bool).tril(147)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(reference(q, k, v, scale=64**-0.5), want.transpose(1, 2))


def test_the_reference_ends_each_row_at_its_length():
    q, k, v = random_inputs(Tq=3, dtype=torch.float64)
    o = reference(q, k, v, lengths=torch.tensor([150, 2]), scale=1.0)
    torch.testing.assert_close(o[1, 1:], reference(q[1:, 1:], k[1:, :2], v[1:, :2], scale=1.0)[0])
    assert (o[1, 0] == 0).all()


@pytest.mark.parametrize("tokens", [1, 5])
@dtypes
def test_dtypes(backend, every_way, dtype, tokens):
    x = random_inputs(Tq=tokens, dtype=dtype)
    for _ in every_way():
        check(backend, *x)


@pytest.mark.parametrize(("D", "DV"), [(1, 1), (3, 5), (8, 16), (17, 100), (32, 96), (64, 32), (96, 160), (256, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_head_dimensions(backend, every_way, dtype, D, DV):
    x = random_inputs(1, 2, 70, 4, 1, D, DV, dtype=dtype)
    for _ in every_way():
        check(backend, *x)


@pytest.mark.parametrize(("HQ", "HK", "tokens"), [(1, 1, 1), (2, 1, 1), (3, 1, 1), (7, 1, 1), (8, 8, 1), (4, 2, 70)])
def test_heads(backend, every_way, HQ, HK, tokens):
    """One, two and four rows a tile, tiles that are not full, and more rows than a task takes."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = random_inputs(1, tokens, 130, HQ, HK, 32, dtype=dtype)
        for _ in every_way():
            check(backend, *x)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 1023, 1024, 1025, 2100])
def test_lengths_of_the_cache(backend, every_way, T):
    for dtype in (torch.float32, torch.bfloat16):
        x = random_inputs(1, 1, T, 4, 2, 32, dtype=dtype)
        for _ in every_way():
            check(backend, *x)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_rows_of_different_lengths(backend, every_way, index):
    """What lies behind a row's length is never read: it is NaN here."""
    lengths = torch.tensor([0, 1, 2, 64, 1030, 1100], dtype=index)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = random_inputs(6, 3, 1100, 4, 2, 32, dtype=dtype)
        for b, n in enumerate(lengths.tolist()):
            k[b, n:], v[b, n:] = torch.nan, torch.nan
        for _ in every_way():
            o = check(backend, q, k, v, lengths=lengths)
            assert (o[0] == 0).all() and (o[1, :2] == 0).all()


def test_a_row_does_not_depend_on_the_batch(backend, every_way):
    q, k, v = random_inputs(3, 2, 1100, 4, 2, 32, dtype=torch.bfloat16)
    lengths = torch.tensor([1100, 70, 1090])
    if backend == "reference":
        pytest.skip("the kernels' promise: matrix products of torch depend on the shape")
    for _ in every_way():
        together = fla_ops.exact_decode_attention(q, k, v, lengths=lengths, backend=backend)
        for b, n in enumerate(lengths.tolist()):
            row = (q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n])
            assert torch.equal(together[b : b + 1], fla_ops.exact_decode_attention(*row, backend=backend))


def test_one_token_without_a_time_axis(backend):
    q, k, v = random_inputs()
    step = fla_ops.exact_decode_attention(q[:, 0], k, v, backend=backend)
    assert torch.equal(step, fla_ops.exact_decode_attention(q, k, v, backend=backend)[:, 0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    x = [LAYOUTS[layout](t) for t in random_inputs(Tq=2)]
    check(backend, *x)
    check(backend, *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in x))


def test_a_slice_of_a_larger_cache(backend):
    q, k, v = random_inputs(2, 1, 64, 4, 2, 32)
    cache = torch.full((2, 3, 200, 2, 32), torch.nan)
    cache[:, 0, 7:71], cache[:, 2, 7:71] = k, v
    check(backend, q, cache[:, 0, 7:71], cache[:, 2, 7:71])


def test_extreme_scores(backend, every_way):
    """Scores far beyond exp's range, of either sign, and blocks that the first of all outweighs."""
    q, k, v = random_inputs(1, 1, 300, 4, 1, 32)
    k[:, 70] *= 100
    for _ in every_way():
        check(backend, q * 100, k, v)
        check(backend, q, k, v, scale=-3.0)
        check(backend, q, k, v, scale=0.0)


def test_nan_and_infinity(backend, every_way):
    """One NaN key gives NaN, a score of -inf nothing, one of +inf NaN; other rows do not see it."""
    q, k, v = random_inputs(3, 1, 200, 4, 1, 32)
    q = q.abs()
    k[0, 100, 0, 3], k[1, 100] = torch.nan, -torch.inf
    v[1, 100] = 7.0
    for _ in every_way():
        o = check(backend, q, k, v)
        assert o[0].isnan().all() and not o[1:].isnan().any()


def test_same_bits_for_any_number_of_threads(native, threads):
    q, k, v = random_inputs(1, 1, 5000, 8, 2, 64, dtype=torch.bfloat16)

    def run(count):
        threads(count)
        return {"o": fla_ops.exact_decode_attention(q, k, v, backend=native)}

    assert_same_bits(run(1), run(3))
    assert_same_bits(run(3), run(3))


@pytest.mark.parametrize("empty", ["batch", "tokens"])
def test_nothing_to_do(backend, empty):
    B, Tq = (0, 2) if empty == "batch" else (2, 0)
    q, k, v = random_inputs(B, Tq, 5, 4, 2, 32)
    assert fla_ops.exact_decode_attention(q, k, v, backend=backend).shape == (B, Tq, 4, 32)


def test_autocast(backend):
    q, k, v = random_inputs(1, 1, 70, 4, 2, 32)
    with torch.autocast("cpu", torch.bfloat16):
        o = fla_ops.exact_decode_attention(q, k, v, backend=backend)
    want = fla_ops.exact_decode_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend=backend)
    assert o.dtype == torch.bfloat16 and torch.equal(o, want)


def test_inputs_that_need_gradients_under_no_grad(backend):
    q, k, v = random_inputs(1, 1, 70, 4, 2, 32)
    for context in (torch.no_grad, torch.inference_mode, contextlib.nullcontext):
        with context():
            check(backend, q.requires_grad_(context is torch.no_grad), k, v)
            q = q.detach()


@pytest.mark.no_poison
def test_under_torch_compile(native):
    q, k, v = random_inputs(1, 1, 70, 4, 2, 32)
    compiled = torch.compile(fla_ops.exact_decode_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), fla_ops.exact_decode_attention(q, k, v))


def test_the_op_is_well_behaved(native):
    q, k, v = random_inputs(1, 1, 70, 4, 2, 32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fla_ops.decode_attention, (q, k, v, None, 0.3), test_utils=tests)
