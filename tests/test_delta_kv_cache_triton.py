# SPDX-License-Identifier: Apache-2.0
"""What only the Triton kernels of DeltaLLM's cache have: launch rows, splits over the keys, records of 128 keys.

Without a GPU they run in Triton's interpreter, with the rows of the launch tables that GPUs get; the other tests take
the interpreter's own.
"""

import pytest
import torch
from test_delta_kv_cache import expected, random_tokens

from fla_ops import DeltaKVCache, _backend
from fla_ops.reference import delta_kv_cache as definition
from fla_ops.testing import assert_matches_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = _backend.why_not("delta_kv_cache", "triton", DEVICE, torch.float32, ())
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(autouse=True)
def rows_of_a_gpu(interpreters_rows):
    interpreters_rows(False)


def check(tokens, last, **options):
    """The last tokens' attention, after a prefill of the others that is packed at once."""
    q, k, v = tokens
    cache = DeltaKVCache(**{"threshold": 0.3, "window": 20, "backend": "triton"} | options)
    x = [t.to(DEVICE) for t in tokens]
    cache.append(x[1][:, :-last], x[2][:, :-last], queries=1)
    cache.append(x[1][:, -last:], x[2][:, -last:])
    o = cache.attend(x[0][:, -last:])
    low = None if q.dtype == torch.float64 else q.dtype
    ref64, ref_low = (expected(t, k, v, **options, **f) for t, f in ((q.double(), {}), (q, {"operand_dtype": low})))
    assert_matches_reference(o, ref64[:, -last:], ref_low[:, -last:], "o", seed=0)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("D", [16, 64, 100, 256])
@pytest.mark.parametrize("tokens", [1, 20])
def test_every_row(D, dtype, tokens):
    check(random_tokens(1, 270, 4, 1, D, 40, dtype=dtype), tokens, sink=3)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_every_architecture(arch, monkeypatch):
    from fla_ops.kernels import delta_kv_cache

    monkeypatch.setattr(delta_kv_cache, "arch", lambda: arch)
    for tokens in (1, 20):
        check(random_tokens(1, 200, 4, 1, 70, 40, dtype=torch.bfloat16), tokens, window_mode="block")


@pytest.mark.parametrize("mode", ["band", "block"])
@pytest.mark.parametrize(("window", "sink"), [(20, 0), (300, 70), (1, 129)])
def test_splits(mode, window, sink):
    """Of records, of both, of recent keys; sinks that end in the first split or the second."""
    from fla_ops.kernels._decode import split_keys

    torch.use_deterministic_algorithms(False)
    tokens = random_tokens(2, 700, 4, 2, 16, dtype=torch.float64)
    assert split_keys(4, 700, 128, tokens[0]) == (128, 6)
    for last in (1, 3):
        check(tokens, last, window=window, sink=sink, window_mode=mode)


def test_rows_of_different_lengths_in_splits():
    """Splits without any key of a row, and a row without any key."""
    torch.use_deterministic_algorithms(False)
    q, k, v = random_tokens(3, 500, dtype=torch.float64)
    mask = torch.ones(3, 500, dtype=torch.bool)
    mask[1, :400], mask[2] = False, False
    cache = DeltaKVCache(threshold=0.3, window=20, backend="triton")
    cache.append(*(x.to(DEVICE) for x in (k, v)), mask=mask.to(DEVICE), queries=1)
    o = cache.attend(q[:, -1].to(DEVICE)).cpu()
    assert (o[2] == 0).all()
    for b, keep in ((0, slice(None)), (1, slice(400, None))):
        want = expected(*(x[b : b + 1, keep] for x in (q, k, v)))[0, -1]
        torch.testing.assert_close(o[b], want)


@pytest.mark.parametrize("D", [3, 128])
def test_records_of_any_share_of_zeros(D):
    """Keys of which nothing fires, everything, or one channel; all that is kept are values, each of them once."""
    r = torch.Generator().manual_seed(0)
    wild = torch.randn(1, 300, 2, D, generator=r).bfloat16()
    still = wild[:, :1].expand_as(wild)
    one = torch.cat([wild[..., :1], still[..., 1:]], -1)
    for k in (wild, still, one):
        cache = DeltaKVCache(threshold=0.0, window=1, backend="triton")
        cache.append(*(k.to(DEVICE),) * 2, queries=1)
        assert torch.equal(cache.to_dense().k.cpu(), k)
        fired = (k[:, 1:256] != k[:, :255]).reshape(1, 255, 2, D)
        fired[:, 127] = False  # the first key of the second record is there in any case
        assert cache._store.used == 2 * 2 * D + fired.sum().item()


def test_it_is_smaller_than_what_it_replaces():
    """At 60 % zeros, D = 128, 16 bits: 1.35 times, with values and all that belongs to records."""
    T = 4096 + 16
    fires = torch.rand(1, T, 1, 128) >= 0.6
    last = torch.where(fires, torch.arange(T)[None, :, None, None], 0).cummax(1).values
    k = torch.randn(1, T, 1, 128).bfloat16().gather(1, last).to(DEVICE)
    cache = DeltaKVCache(threshold=0.0, window=16, max_len=T, backend="triton")
    cache.append(k, k, queries=1)
    cache.attend(k[:, -1])
    store = cache._store
    assert store.sealed == [4096]
    recent = store.recent.nbytes + store.held.nbytes
    assert recent < 100 * k[:, 0].nbytes
    assert 2 * k.nbytes / (cache.nbytes - recent) > 1.35


def test_long_decoding_moves_recent_keys():
    """Beyond the spare room of recent and held keys, time and again, each row by itself."""
    _, k, v = random_tokens(2, 600, 1, 1, 4)
    mask = torch.ones(2, 600, dtype=torch.bool)
    mask[1, 100:200] = False
    cache = DeltaKVCache(threshold=0.3, window=7, backend="triton")
    for part in range(0, 600, 24):
        at = slice(part, part + 24)
        cache.append(*(x[:, at].to(DEVICE) for x in (k, v)), mask=mask[:, at].to(DEVICE), queries=1)
    dense = cache.to_dense()
    for b in range(2):
        own = k[b : b + 1, mask[b]]
        want = definition.hold(own, torch.tensor(0.3))
        n = own.shape[1]
        want[:, n - 6 :] = own[:, n - 6 :]
        assert torch.equal(dense.k[b, :n].cpu(), want[0]) and torch.equal(dense.v[b, :n].cpu(), v[b, mask[b]])


def test_launches():
    """A token: one to append, one to hold the key that leaves the window, one to attend, one to put splits together."""
    from recorded_launches import recorded

    (split,) = recorded(("delta_kv_cache", "bfloat16", {"D": 64, "split": True, "T": 8192}))
    names = {name: [launch["kernel"] for launch in launches] for name, launches in split.items()}
    assert names["prefill"] == ["append_kernel", "hold_kernel", "mark_kernel", "pack_kernel"]
    assert names["append"] == ["append_kernel"]
    assert names["decode"] == ["hold_kernel", "attend_kernel", "combine_kernel"]
