# SPDX-License-Identifier: Apache-2.0
"""DeltaLLM's cache: the definition by itself, then every backend against it, however the tokens come."""

import itertools

import pytest
import torch
from delta_rule_cases import remembered

import fla_ops
from fla_ops import DeltaKVCache
from fla_ops.reference import delta_kv_cache as definition
from fla_ops.testing import assert_matches_reference

OP = "delta_kv_cache"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
modes = pytest.mark.parametrize("mode", ["band", "block"])


def random_tokens(B=2, T=300, HQ=4, HK=2, D=32, DV=None, *, dtype=torch.float32, seed=0):
    """q, k, v; the keys wander, so that about a half of the channels fires at a threshold of 0.3."""
    r = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=r, dtype=torch.float64)

    k = 0.3 * randn(B, T, HK, D).cumsum(1)
    return randn(B, T, HQ, D).to(dtype), k.to(dtype), randn(B, T, HK, DV or D).to(dtype)


def expected(q, k, v, *, threshold=0.3, window=20, sink=0, window_mode="band", scale=None, **low):
    """The definition for all tokens at once. The keys are held in the tested dtype, everything else is in q's."""
    held = definition.hold(k, torch.as_tensor(threshold))
    B, T = q.shape[:2]
    options = {"window": window, "window_mode": window_mode, "sink": sink, "scale": scale or q.shape[-1] ** -0.5}
    x = (t.to(q.dtype) for t in (k, held, v))
    return definition.attention(q, *x, torch.arange(T).expand(B, T), **options, **low)


def run(tokens, pieces, *, backend, scale=None, **options):
    """The outputs of all tokens, fed in pieces; and the cache."""
    q, k, v = tokens
    cache = DeltaKVCache(**{"threshold": 0.3, "window": 20, "backend": backend} | options)
    outputs, start = [], 0
    for n in pieces:
        part = slice(start, start + n)
        cache.append(k[:, part], v[:, part])
        outputs.append(cache.attend(q[:, part], scale=scale))
        start += n
    return torch.cat(outputs, 1), cache


def check(tokens, pieces, *, backend, **options):
    q, k, v = tokens
    T = sum(pieces)
    o, _ = run(tokens, pieces, backend=backend, **options)
    q, k, v = q[:, :T], k[:, :T], v[:, :T]

    def compute():
        low = None if q.dtype == torch.float64 else q.dtype
        return expected(q.double(), k, v, **options), expected(q, k, v, **options, operand_dtype=low)

    ref64, ref_low = remembered(compute, definition.attention, {"q": q, "k": k, "v": v}, None, None, options)
    assert_matches_reference(o, ref64, ref_low, "o", seed=0)


# The definition.


def test_the_hold_element_by_element():
    k = random_tokens(1, 40, 2, 2, 3, dtype=torch.float64)[1]
    k[0, 20, 1, 1] = torch.nan
    theta = torch.tensor([[0.1, 0.5, torch.inf], [0.0, 0.3, 1.0]])
    held = definition.hold(k, theta)
    for h, c in itertools.product(range(2), range(3)):
        last = None
        for t in range(40):
            x = k[0, t, h, c].item()
            if last is None or not abs(x - last) <= theta[h, c].item():
                last = x
            assert held[0, t, h, c].item() == last or (last != last and held[0, t, h, c].isnan())
    assert held[0, 20, 1, 1].isnan() and not held[0, 21].isnan().any()


@modes
def test_the_definition_row_by_row(mode):
    q, k, v = random_tokens(1, 50, 2, 1, 4, dtype=torch.float64)
    o, held = expected(q, k, v, window=7, sink=2, window_mode=mode), definition.hold(k, torch.tensor(0.3))
    for i in range(50):
        near = [j // 7 == i // 7 if mode == "block" else i - j < 7 for j in range(i + 1)]
        keys = torch.stack([k[0, j, 0] if near[j] or j < 2 else held[0, j, 0] for j in range(i + 1)])
        weights = torch.softmax(q[0, i] @ keys.T / 2, -1)
        torch.testing.assert_close(o[0, i], weights @ v[0, : i + 1, 0])


def test_the_error_bound():
    """|q . k - q . k_hat| <= sum_c theta_c |q_c|."""
    q, k, _ = random_tokens(1, 200, 1, 1, 16, dtype=torch.float64)
    theta = torch.rand(16, dtype=torch.float64)
    error = torch.einsum("bihd,bjhd->bij", q, k - definition.hold(k, theta)).abs()
    assert (error <= (theta * q.abs()).sum(-1) + 1e-12).all() and error.max() > 0.1


# Every backend against the definition.


@modes
@dtypes
def test_dtypes(backend, every_way, dtype, mode):
    tokens = random_tokens(dtype=dtype)
    for _ in every_way():
        check(tokens, [100, 1, 1, 198], backend=backend, window_mode=mode, sink=3)


PIECES = {
    "at once": [300],
    "one by one": [1] * 200,
    "prefill and steps": [150] + [1] * 80,
    "chunks": [64, 64, 100, 72],
    "mixed": [5, 1, 130, 1, 1, 63, 1, 2, 96],
}


@modes
@pytest.mark.parametrize("pieces", PIECES)
def test_any_interleaving(backend, pieces, mode):
    tokens = random_tokens(1, 300, 4, 2, 32, dtype=torch.float64)
    check(tokens, PIECES[pieces], backend=backend, window=33, window_mode=mode, sink=2)


@pytest.mark.parametrize("D", [1, 7, 16, 33, 64, 100, 128, 256])
def test_head_dimensions(backend, every_way, D):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        tokens = random_tokens(1, 150, 2, 1, D, 24, dtype=dtype)
        for _ in every_way():
            check(tokens, [140, 1, 9], backend=backend, window=8, sink=1)


@pytest.mark.parametrize(("HQ", "HK"), [(1, 1), (2, 1), (3, 1), (4, 1), (8, 2), (5, 1)])
def test_heads(backend, every_way, HQ, HK):
    """One, two and four rows a tile and more; one token's four are multiplied as their keys are unpacked."""
    for D, sink in ((64, 0), (128, 70), (96, 0)):
        tokens = random_tokens(1, 330, HQ, HK, D, 64, dtype=torch.bfloat16)
        for _ in every_way():
            check(tokens, [320, 1, 8, 1], backend=backend, window=8, sink=sink)


@pytest.mark.parametrize("window", [1, 63, 64, 65, 1000, 0.1, 1.0])
def test_windows(backend, window):
    tokens = random_tokens(1, 200, 2, 1, 16)
    o, cache = run(tokens, [150, 1, 49], backend=backend, window=window)
    tokens_wide = max(1, round(window * 150)) if isinstance(window, float) else window
    assert cache.window == tokens_wide
    check(tokens, [150, 1, 49], backend=backend, window=tokens_wide)


@pytest.mark.parametrize("sink", [1, 64, 70, 500])
def test_sinks(backend, sink):
    tokens = random_tokens(1, 250, 2, 1, 16)
    check(tokens, [30, 200, 1, 19], backend=backend, sink=sink, window=5)


def test_thresholds_a_channel(backend, every_way):
    tokens = random_tokens(1, 200, 4, 2, 32)
    theta = torch.rand(2, 32)
    for threshold in (theta, theta[:1], theta[0], theta[:, :1], theta[0, 0]):
        for _ in every_way():
            check(tokens, [150, 1, 49], backend=backend, threshold=threshold)


def test_a_threshold_of_zero_is_exact_attention(backend, every_way):
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = random_tokens(2, 1100, 4, 2, 32, dtype=dtype)
        for _ in every_way():
            cache = DeltaKVCache(threshold=0.0, window=1, backend=backend)
            cache.append(k, v, queries=2)
            for o, tokens in ((cache.attend(q[:, -1]), 1), (cache.attend(q[:, -2:])[:, -1], 2)):
                exact = fla_ops.exact_decode_attention(q[:, -tokens:], k, v, backend=backend)[:, -1]
                if backend == "native":
                    assert torch.equal(o, exact)
                else:
                    torch.testing.assert_close(o, exact)


def test_an_endless_window_is_exact_attention(backend):
    q, k, v = random_tokens(1, 200)
    o, _ = run((q, k, v), [150, 1, 49], backend=backend, threshold=torch.inf, window=1000)
    torch.testing.assert_close(o[:, -5:], fla_ops.exact_decode_attention(q[:, -5:], k, v, backend=backend))


def test_an_endless_threshold_holds_the_first_key(backend):
    _, k, v = random_tokens(1, 200)
    cache = DeltaKVCache(threshold=torch.inf, window=1, backend=backend)
    cache.append(k, v, queries=1)
    assert torch.equal(cache.to_dense().k, k[:, :1].expand_as(k))


@modes
def test_what_is_kept_is_the_definition(backend, every_way, mode):
    """Bit for bit, whatever the bits: subnormal numbers, infinities and NaN too."""
    for dtype in DTYPES:
        _, k, v = random_tokens(2, 300, 2, 2, 40, dtype=dtype)
        k[0, 100, 0, 3], k[1, 50, 1, 2], k[0, 200] = torch.nan, torch.inf, torch.finfo(dtype).tiny / 4
        for _ in every_way():
            cache = DeltaKVCache(threshold=0.3, window=30, sink=2, window_mode=mode, backend=backend)
            for part in (slice(0, 170), slice(170, 171), slice(171, 300)):
                cache.append(k[:, part], v[:, part], queries=1)
            want = definition.hold(k, torch.tensor(0.3))
            first = 300 // 30 * 30 if mode == "block" else 300 - 29
            want[:, :2], want[:, first:] = k[:, :2], k[:, first:]
            found = cache.to_dense()
            bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
            assert torch.equal(found.k.contiguous().view(bits), want.view(bits))
            assert torch.equal(found.v, v)


def test_nothing_drifts(native):
    """100,000 tokens, appended in one-token, odd and long steps: the held keys are the definition's, bit for bit."""
    T, D = 100_000, 8
    k = (0.05 * torch.randn(1, T, 1, D)).cumsum(1).bfloat16()
    cache = DeltaKVCache(threshold=0.25, window=16, backend=native)
    start, sizes = 0, itertools.cycle([1, 1, 7, 1, 300, 2, 64, 1, 1000])
    while start < T:
        part = k[:, start : start + next(sizes)]
        cache.append(part, part)
        start += part.shape[1]
    found = cache.to_dense()
    held = definition.hold(k, torch.tensor(0.25))
    assert torch.equal(found.k[:, :-15], held[:, : T - 15]) and torch.equal(found.v, k)
    q = torch.randn(1, 2, D).bfloat16()
    cache.append(k[:, -1:], k[:, -1:])
    keys = torch.cat([held[:, : T - 15], k[:, T - 15 :], k[:, -1:]], 1)
    want = fla_ops.exact_decode_attention(q, keys, torch.cat([k, k[:, -1:]], 1))
    torch.testing.assert_close(cache.attend(q), want, rtol=0.02, atol=0.02)


def test_it_is_smaller_than_what_it_replaces(native):
    """At 60 % zeros, D = 128, 16 bits: 1.35 times, all memory counted."""
    T = 8192
    fires = torch.rand(1, T, 2, 128) >= 0.6
    last = torch.where(fires, torch.arange(T)[None, :, None, None], 0).cummax(1).values
    k = torch.randn(1, T, 2, 128).bfloat16().gather(1, last)
    cache = DeltaKVCache(threshold=0.0, window=16, max_len=T, backend=native)
    cache.append(k, k, queries=1)
    assert 2 * k.nbytes / cache.nbytes > 1.33
    grown = DeltaKVCache(threshold=0.0, window=16, backend=native)
    for part in k.split(100, 1):
        grown.append(part, part)
    assert 2 * k.nbytes / grown.nbytes > 1.2


# Rows of a batch.


@modes
def test_padding(backend, every_way, mode):
    """A padded row is as it would be alone, and masked tokens give 0, wherever the padding is."""
    q, k, v = random_tokens(3, 200)
    mask = torch.ones(3, 200, dtype=torch.int64)
    mask[1, :70], mask[2, 100:130], mask[2, -1] = 0, 0, 0
    k[mask == 0], v[mask == 0] = torch.nan, torch.nan
    for _ in every_way():
        cache = DeltaKVCache(threshold=0.3, window=20, sink=2, window_mode=mode, backend=backend)
        outputs = []
        for part in (slice(0, 90), slice(90, 199), slice(199, 200)):
            cache.append(k[:, part], v[:, part], mask=mask[:, part])
            outputs.append(cache.attend(q[:, part]))
        o = torch.cat(outputs, 1)
        assert cache.lengths.tolist() == [200, 130, 169] and cache.length == 200
        assert (o[mask == 0] == 0).all()
        for b in range(3):
            keep = mask[b] != 0
            alone = expected(*(x[b : b + 1, keep] for x in (q, k, v)), sink=2, window_mode=mode)
            torch.testing.assert_close(o[b : b + 1, keep], alone, rtol=1e-4, atol=1e-5)


def test_reorder(backend):
    """Beams: rows change places, come twice and go, and go on from there; a batch may grow and shrink."""
    tokens = random_tokens(3, 400)
    q, k, v = tokens
    cache = DeltaKVCache(threshold=0.3, window=20, sink=2, backend=backend)
    history, start = torch.arange(3)[:, None].expand(3, 0), 0
    steps = [(150, [2, 0, 0]), (1, [1, 1, 2]), (100, [0, 2]), (64, [1, 0, 0, 1]), (60, [3, 1])]
    for n, order in steps:
        rows = torch.arange(len(cache.lengths) if start else 3) % 3
        part = slice(start, start + n)
        cache.append(k[rows, part], v[rows, part])
        history = torch.cat([history, rows[:, None].expand(-1, n)], 1)
        cache.reorder(torch.tensor(order))
        history, start = history[order], start + n
        where = (history, torch.arange(start).expand_as(history))
        o = cache.attend(q[where][:, -1])
        want = expected(q[where], k[where], v[where], sink=2)[:, -1]
        torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-5)


def test_records_that_no_row_needs_are_dropped(backend):
    _, k, v = random_tokens(8, 1024)
    cache = DeltaKVCache(threshold=0.3, window=20, backend=backend)
    cache.append(k, v, queries=1)
    before, dense = cache.nbytes, cache.to_dense()
    cache.reorder(torch.tensor([3, 3]))
    assert cache.nbytes < before / 2
    assert torch.equal(cache.to_dense().k, dense.k[[3, 3]])


@modes
def test_crop(backend, mode):
    """What was appended last can be taken back, as speculative decoding does."""
    q, k, v = random_tokens(2, 400)
    options = {"threshold": 0.3, "window": 20, "sink": 2, "window_mode": mode, "backend": backend}
    cache, wrong = DeltaKVCache(**options), torch.randn(2, 9, 2, 32)
    start = 0
    for n in (150, 1, 5, 64, 1, 100):
        cache.append(k[:, start : start + n], v[:, start : start + n])
        start += n
        cache.append(wrong, wrong)
        cache.crop(start) if n != 5 else cache.crop(-9)
        assert cache.length == start
    cache.append(k[:, start : start + 2], v[:, start : start + 2])
    o = cache.attend(q[:, start : start + 2])
    x = (t[:, : start + 2] for t in (q, k, v))
    torch.testing.assert_close(o, expected(*x, sink=2, window_mode=mode)[:, -2:], rtol=1e-4, atol=1e-5)


def test_crop_with_padding(backend):
    q, k, v = random_tokens(2, 100)
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[0, :30], mask[1, 95:] = False, False
    cache = DeltaKVCache(threshold=0.3, window=20, backend=backend)
    cache.append(k, v, mask=mask)
    cache.crop(97)
    assert cache.lengths.tolist() == [67, 95]
    cache.append(k[:, 97:98], v[:, 97:98])
    o = cache.attend(q[:, 97])
    for b, rows in ((0, [*range(30, 98)]), (1, [*range(95), 97])):
        x = (t[b : b + 1, rows] for t in (q, k, v))
        torch.testing.assert_close(o[b], expected(*x)[0, -1], rtol=1e-4, atol=1e-5)


def test_crop_goes_no_further_than_the_exact_keys(backend):
    _, k, v = random_tokens(1, 300)
    cache = DeltaKVCache(threshold=0.3, window=20, backend=backend)
    cache.append(k, v, queries=1)
    with pytest.raises(ValueError, match=r"crop: argument 'length' must be nearer to 300, or 0, got 100\. .*packed"):
        cache.crop(100)
    cache.crop(0)
    assert cache.length == 0 and cache.nbytes == 0 and cache.window == 20
    cache.append(k, v)


@modes
def test_rollback(backend, mode):
    """Tokens of many appends can be taken back, and the cache goes on as if they had never come."""
    tokens = random_tokens(2, 300)
    q, k, v = tokens
    options = {"window_mode": mode, "backend": backend}
    want, _ = run(tokens, [200, 100], **options)
    cache = DeltaKVCache(threshold=0.3, window=20, rollback=70, **options)
    cache.append(k[:, :230], v[:, :230], queries=1)
    for t in range(230, 270):
        cache.append(k[:, t], v[:, t])
    cache.crop(200)
    cache.append(k[:, 200:], v[:, 200:])
    torch.testing.assert_close(cache.attend(q[:, 200:]), want[:, 200:])


def test_reset(backend):
    tokens = random_tokens(1, 200)
    cache = DeltaKVCache(threshold=0.3, window=0.1, backend=backend)
    cache.append(tokens[1], tokens[2])
    cache.reset()
    assert cache.nbytes == 0 and cache.window is None and cache.lengths.tolist() == []
    cache.append(tokens[1][..., :3], tokens[2][..., :5])  # other sizes
    assert cache.window == 20


# Calls.


def test_a_token_without_a_time_axis(backend):
    q, k, v = random_tokens(2, 100)
    cache, whole = (DeltaKVCache(threshold=0.3, window=20, backend=backend) for _ in range(2))
    for t in range(100):
        cache.append(k[:, t], v[:, t])
    whole.append(k, v)
    assert torch.equal(cache.to_dense().k, whole.to_dense().k)
    torch.testing.assert_close(cache.attend(q[:, -1]), whole.attend(q)[:, -1])


def test_layouts(backend):
    q, k, v = random_tokens(2, 150)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    channels_first = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    want, _ = run((q, k, v), [150], backend=backend)
    for tokens in (heads_first, channels_first):
        torch.testing.assert_close(run(tokens, [150], backend=backend)[0], want)


def test_same_bits_for_any_number_of_threads(native, threads):
    tokens = random_tokens(2, 2500, 4, 2, 64, dtype=torch.bfloat16)

    def outputs(count):
        threads(count)
        return run(tokens, [2400, 1, 1, 98], backend=native, window=100)[0]

    assert torch.equal(outputs(1), outputs(3))


def test_an_append_of_no_tokens(backend):
    q, k, v = random_tokens(2, 100)
    cache = DeltaKVCache(threshold=0.3, window=20, backend=backend)
    for part in (slice(0, 0), slice(0, 60), slice(60, 60), slice(60, 100)):
        cache.append(k[:, part], v[:, part])
        assert cache.attend(q[:, part]).shape == q[:, part].shape
    assert cache.length == 100


def test_max_len(backend):
    _, k, v = random_tokens(2, 100)
    cache = DeltaKVCache(threshold=0.3, window=20, max_len=100, backend=backend)
    cache.append(k[:, :99], v[:, :99])
    with pytest.raises(ValueError, match=r"append: argument 'k' must be .* max_len=100 .* hold 101"):
        cache.append(k[:, :2], v[:, :2])
    cache.append(k[:, 99], v[:, 99])
    assert cache.length == 100 and torch.equal(cache.to_dense().v, v)
