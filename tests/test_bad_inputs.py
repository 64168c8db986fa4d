# SPDX-License-Identifier: Apache-2.0
"""Bad input gives the documented exception with the argument's name, what was expected and what was got.

One table: (title, call, exception class, pattern of the message). Every row runs on every backend: the checks come
before the dispatch, so that no backend can differ. Nasty but legal input is at the end.
"""

import math

import delta_product_cases
import pytest
import selective_scan_cases
import simt
import torch
from delta_rule_cases import bounds, call, check, random_inputs

import fla_ops
import fla_ops._native
import fla_ops.layers

B, T, H, HV, K, V = 2, 10, 2, 4, 8, 6
N = 3  # DeltaProduct's steps a token
DI, STATES = 6, 4  # the selective scan's channels and states a channel; its B and C have 2 groups


def good(**changed):
    """Arguments of a right call, some of them replaced."""
    x = random_inputs(B, T, H, HV, K, V)
    del x["initial_state"]
    return x | changed


def packed(**changed):
    """The same for one row of packed sequences."""
    x = random_inputs(1, T, H, HV, K, V)
    del x["initial_state"]
    return x | {"cu_seqlens": bounds([4, 6])} | changed


def token(**changed):
    """The same for a step."""
    x = {n: t[:, 0] for n, t in good().items()}
    return x | {"state": torch.zeros(B, HV, K, V)} | changed


def conv(**changed):
    """Arguments of a right convolution: D = 6 channels, width 4, L = T tokens."""
    x = {"x": torch.randn(B, 6, T), "weight": torch.randn(6, 4), "bias": torch.randn(6)} | changed
    return lambda backend: fla_ops.causal_conv1d(**x, backend=backend)


def conv_step(**changed):
    x = {"x": torch.randn(B, 6), "weight": torch.randn(6, 4), "bias": torch.randn(6), "state": torch.zeros(B, 6, 3)}
    x |= changed
    return lambda backend: fla_ops.causal_conv1d_step(**x, backend=backend)


def product(**changed):
    """The arguments of a right DeltaProduct, some of them replaced."""
    x = delta_product_cases.random_inputs(N, B, T, H, HV, K, V)
    del x["initial_state"]
    x |= {"num_householder": N} | changed
    return lambda backend: fla_ops.delta_product(**x, backend=backend)


def product_step(**changed):
    x = delta_product_cases.random_inputs(N, B, 1, H, HV, K, V)
    x |= {"q": x["q"][:, 0], "g": x["g"][:, 0], "state": torch.zeros(B, HV, K, V)}
    del x["initial_state"]
    x |= changed
    return lambda backend: fla_ops.delta_product_step(**x, backend=backend)


def product_without_n(backend):
    x = delta_product_cases.random_inputs(N, B, T, H, HV, K, V)
    return fla_ops.delta_product(*(x[name] for name in ("q", "k", "v", "beta", "g")), backend=backend)


def scan(**changed):
    """The arguments of a right selective scan over L = T steps, some of them replaced."""
    x = selective_scan_cases.random_inputs(B, DI, T, STATES, G=2)
    del x["initial_state"]
    x |= changed
    return lambda backend: fla_ops.selective_scan(**x, backend=backend)


def packed_scan(**changed):
    """The same for one row of packed sequences."""
    x = selective_scan_cases.random_inputs(1, DI, T, STATES, G=2)
    del x["initial_state"]
    return scan(**x | {"cu_seqlens": bounds([4, 6])} | changed)


def scan_step(**changed):
    x = selective_scan_cases.random_inputs(B, DI, 1, STATES, G=2)
    del x["initial_state"]
    x = {name: t[..., 0] if name in ("u", "delta", "B", "C", "z") else t for name, t in x.items()}
    x |= {"state": torch.zeros(B, DI, STATES)} | changed
    return lambda backend: fla_ops.selective_scan_step(**x, backend=backend)


def sparse(**changed):
    """The arguments of a right temporal-sparse attention, some of them replaced."""
    x = {"q": torch.randn(B, 8, HV, K), "k": torch.randn(B, T, H, K), "v": torch.randn(B, T, H, V)}
    x |= {"threshold": 0.3, "window": 4} | changed
    return lambda backend: fla_ops.temporal_sparse_attention(**x, backend=backend)


def packed_sparse(**changed):
    """The same for one row of packed sequences."""
    x = {"q": torch.randn(1, T, HV, K), "k": torch.randn(1, T, H, K), "v": torch.randn(1, T, H, V)}
    return sparse(**x | {"cu_seqlens": bounds([4, 6])} | changed)


def positional_sparse(backend):
    x = torch.randn(B, T, H, K)
    return fla_ops.temporal_sparse_attention(x, x, x, 0.3, 4, backend=backend)


def positional_scan(*extra):
    x = selective_scan_cases.random_inputs(B, DI, T, STATES, G=2)
    tensors = [x[name] for name in selective_scan_cases.TENSORS[:6]]
    return lambda backend: fla_ops.selective_scan(*tensors, *extra, backend=backend)


def decode(**changed):
    """The arguments of a right decode attention of two tokens over T keys, some of them replaced."""
    x = {"q": zeros(B, 2, HV, K), "k": zeros(B, T, H, K), "v": zeros(B, T, H, V)} | changed
    return lambda backend: fla_ops.exact_decode_attention(**x, backend=backend)


def cache(**changed):
    """A DeltaKVCache with right arguments, some of them replaced, and T tokens appended.

    It has no CUDA kernels yet: there the reference takes its right calls.
    """
    x = {"threshold": 0.3, "window": 4} | changed

    def make(backend):
        there = fla_ops._native.ops is torch.ops.fla_ops or simt.has("delta_kv_cache")
        made = fla_ops.DeltaKVCache(**x, backend=backend if there else "reference")
        made.append(zeros(B, T, H, K), zeros(B, T, H, V))
        return made

    return make


def append(**changed):
    """A second append to it, some of its arguments replaced."""
    x = {"k": zeros(B, 2, H, K), "v": zeros(B, 2, H, V)} | changed
    return lambda backend: cache(max_len=20)(backend).append(**x)


def first_append(**changed):
    x = {"k": zeros(B, 2, H, K), "v": zeros(B, 2, H, V)} | changed
    return lambda backend: fla_ops.DeltaKVCache(threshold=0.3, window=4, backend=backend).append(**x)


def attend(**changed):
    x = {"q": zeros(B, 2, HV, K)} | changed
    return lambda backend: cache()(backend).attend(**x)


def on_cache(method, *args):
    return lambda backend: getattr(cache()(backend), method)(*args)


def on_empty_cache(method, *args):
    return lambda backend: getattr(fla_ops.DeltaKVCache(threshold=0.3, window=4, backend=backend), method)(*args)


def delta_rule(x):
    return lambda backend: fla_ops.delta_rule(**x, backend=backend)


def step(x):
    return lambda backend: fla_ops.delta_rule_step(**x, backend=backend)


def positional(*extra):
    x = good()
    return lambda backend: fla_ops.delta_rule(x["q"], x["k"], x["v"], x["beta"], x["g"], *extra, backend=backend)


def without(op, x, name):
    return op({n: t for n, t in x.items() if n != name})


def zeros(*shape, dtype=torch.float32, device=None):
    return torch.zeros(*shape, dtype=dtype, device=device)


def cu(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


def masked_layer(**changed):
    layer = fla_ops.layers.GatedDeltaNet(hidden_size=16, num_heads=2, head_dim=8)
    return lambda backend: layer(torch.zeros(1, T, 16), **changed)


D, S = "delta_rule: ", "delta_rule_step: "
P, PS = "delta_product: ", "delta_product_step: "
C, CS = "causal_conv1d: ", "causal_conv1d_step: "
E = "exact_decode_attention: "
K_ = "DeltaKVCache"
M, MS = "selective_scan: ", "selective_scan_step: "
A = "temporal_sparse_attention: "
TABLE = [
    # 1. lengths and sizes that do not match q
    ("k is shorter than q", delta_rule(good(k=zeros(B, 6, H, K))), ValueError,
     D + r"argument 'k' must be of shape \[B=2, T=10, H=2, K=8\], got \[2, 6, 2, 8\]"),
    ("v is shorter than q", delta_rule(good(v=zeros(B, 6, HV, V))), ValueError,
     D + r"argument 'v' must be of shape \[B=2, T=10, HV, V\], got \[2, 6, 4, 6\]"),
    ("k has another head dimension", delta_rule(good(k=zeros(B, T, H, 5))), ValueError,
     D + r"argument 'k' must be .*K=8\], got \[2, 10, 2, 5\]"),
    ("k has another batch", delta_rule(good(k=zeros(1, T, H, K))), ValueError,
     D + r"argument 'k' must be of shape \[B=2.*got \[1, 10, 2, 8\]"),
    ("k has the value heads", delta_rule(good(k=zeros(B, T, HV, K))), ValueError,
     D + r"argument 'k' must be .*H=2.*got \[2, 10, 4, 8\]"),
    ("q is 3-D", delta_rule(good(q=zeros(B, T, K))), ValueError,
     D + r"argument 'q' must be of shape \[B, T, H, K\], got \[2, 10, 8\]"),
    ("v is 3-D", delta_rule(good(v=zeros(B, T, V))), ValueError,
     D + r"argument 'v' must be of shape \[B=2, T=10, HV, V\], got \[2, 10, 6\]"),
    ("K is 0", delta_rule(good(q=zeros(B, T, H, 0), k=zeros(B, T, H, 0))), ValueError,
     D + r"argument 'q' must be of a head dimension >= 1, got 0"),
    ("V is 0", delta_rule(good(v=zeros(B, T, HV, 0))), ValueError,
     D + r"argument 'v' must be of a head dimension >= 1, got 0"),
    # 2. no silent broadcast of gates
    ("beta is [B, T, 1]", delta_rule(good(beta=zeros(B, T, 1))), ValueError,
     D + r"argument 'beta' must be of shape \[B=2, T=10, HV=4\], got \[2, 10, 1\]\. .*expand"),
    ("beta has H heads, not HV", delta_rule(good(beta=zeros(B, T, H))), ValueError,
     D + r"argument 'beta' must be .*HV=4\], got \[2, 10, 2\]"),
    ("beta is a float", delta_rule(good(beta=0.5)), TypeError, D + r"argument 'beta' must be a tensor, got float"),
    ("g is [B, T]", delta_rule(good(g=zeros(B, T))), ValueError,
     D + r"argument 'g' must be of shape \[B=2, T=10, HV=4\], got \[2, 10\]"),
    ("g is a gate per channel", delta_rule(good(g=zeros(B, T, HV, K))), ValueError,
     D + r"argument 'g' must be of shape .*got \[2, 10, 4, 8\]"),
    ("g is a float", delta_rule(good(g=-0.1)), TypeError, D + r"argument 'g' must be a tensor, got float"),
    # 3. head-first gates
    ("beta is [B, HV, T]", delta_rule(good(beta=zeros(B, HV, T))), ValueError,
     D + r"argument 'beta' must be .*got \[2, 4, 10\]\. It looks like \[B, HV, T\]: transpose\(1, 2\)"),
    ("g is [B, HV, T]", delta_rule(good(g=zeros(B, HV, T))), ValueError,
     D + r"argument 'g' must be .*got \[2, 4, 10\]\. It looks like \[B, HV, T\]: transpose\(1, 2\)"),
    # 4, 5, 6. packed sequences
    ("cu_seqlens ends before T", delta_rule(packed(cu_seqlens=cu(0, 4, 9))), ValueError,
     D + r"argument 'cu_seqlens' must be non-decreasing from 0 to T=10, got \[0, 4, 9\]"),
    ("cu_seqlens ends past T", delta_rule(packed(cu_seqlens=cu(0, 4, 11))), ValueError,
     D + r"argument 'cu_seqlens' must be .*T=10, got \[0, 4, 11\]"),
    ("cu_seqlens decreases", delta_rule(packed(cu_seqlens=cu(0, 7, 4, 10))), ValueError,
     D + r"argument 'cu_seqlens' must be non-decreasing.*got \[0, 7, 4, 10\]"),
    ("cu_seqlens starts at 1", delta_rule(packed(cu_seqlens=cu(1, 4, 10))), ValueError,
     D + r"argument 'cu_seqlens' must be .*from 0.*got \[1, 4, 10\]"),
    ("cu_seqlens is negative", delta_rule(packed(cu_seqlens=cu(0, -2, 10))), ValueError,
     D + r"argument 'cu_seqlens' must be .*got \[0, -2, 10\]"),
    ("a long cu_seqlens is not printed whole", delta_rule(packed(cu_seqlens=torch.arange(100))), ValueError,
     D + r"argument 'cu_seqlens' must be .*got \[0, 1, \.\.\., 99\]"),
    ("cu_seqlens is 2-D", delta_rule(packed(cu_seqlens=cu([0, 4], [4, 10]))), ValueError,
     D + r"argument 'cu_seqlens' must be of shape \[N\+1\], got \[2, 2\]"),
    ("cu_seqlens is empty", delta_rule(packed(cu_seqlens=cu())), ValueError,
     D + r"argument 'cu_seqlens' must be of shape \[N\+1\], got \[0\]"),
    ("cu_seqlens is float", delta_rule(packed(cu_seqlens=cu(0, 10, dtype=torch.float32))), TypeError,
     D + r"argument 'cu_seqlens' must be an int32 or int64 tensor, got torch\.float32"),
    ("cu_seqlens is bool", delta_rule(packed(cu_seqlens=cu(0, 1, dtype=torch.bool))), TypeError,
     D + r"argument 'cu_seqlens' must be an int32 or int64 tensor, got torch\.bool"),
    ("cu_seqlens is int16", delta_rule(packed(cu_seqlens=cu(0, 10, dtype=torch.int16))), TypeError,
     D + r"argument 'cu_seqlens' must be an int32 or int64 tensor, got torch\.int16"),
    ("cu_seqlens is a list", delta_rule(packed(cu_seqlens=[0, 4, 10])), TypeError,
     D + r"argument 'cu_seqlens' must be a tensor, got list"),
    ("cu_seqlens with B = 2", delta_rule(good(cu_seqlens=cu(0, 10))), ValueError,
     D + r"argument 'cu_seqlens' must be given with B=1 only, got B=2\. Put the sequences behind one another"),
    # 11. states of a wrong shape or type
    ("initial_state without N", delta_rule(good(initial_state=zeros(HV, K, V))), ValueError,
     D + r"argument 'initial_state' must be of shape \[N=2, HV=4, K=8, V=6\], got \[4, 8, 6\]\. N is the number"),
    ("initial_state for B, not N", delta_rule(packed(initial_state=zeros(1, HV, K, V))), ValueError,
     D + r"argument 'initial_state' must be of shape \[N=2, .*got \[1, 4, 8, 6\]\. N is the number of sequences"),
    ("initial_state is value-first", delta_rule(good(initial_state=zeros(B, HV, V, K))), ValueError,
     D + r"argument 'initial_state' must be .*got \[2, 4, 6, 8\]\. .*look swapped: transpose\(-1, -2\)"),
    ("initial_state has H heads", delta_rule(good(initial_state=zeros(B, H, K, V))), ValueError,
     D + r"argument 'initial_state' must be .*HV=4.*got \[2, 2, 8, 6\]"),
    ("initial_state is int", delta_rule(good(initial_state=zeros(B, HV, K, V, dtype=torch.int32))), TypeError,
     D + r"argument 'initial_state' must be one of float32, .*got torch\.int32"),
    ("initial_state is a number", delta_rule(good(initial_state=0.0)), TypeError,
     D + r"argument 'initial_state' must be a tensor, got float"),
    # 16. dtypes
    ("v is bf16, q is float32", delta_rule(good(v=zeros(B, T, HV, V, dtype=torch.bfloat16))), TypeError,
     D + r"argument 'v' must be torch\.float32 to match 'q', got torch\.bfloat16\. Cast one, or run under autocast"),
    ("k is float64, q is float32", delta_rule(good(k=zeros(B, T, H, K, dtype=torch.float64))), TypeError,
     D + r"argument 'k' must be torch\.float32 to match 'q', got torch\.float64"),
    ("beta is bf16, q is float32", delta_rule(good(beta=zeros(B, T, HV, dtype=torch.bfloat16))), TypeError,
     D + r"argument 'beta' must be torch\.float32, got torch\.bfloat16"),
    ("g is float64, q is float32", delta_rule(good(g=zeros(B, T, HV, dtype=torch.float64))), TypeError,
     D + r"argument 'g' must be torch\.float32, got torch\.float64"),
    ("g is int", delta_rule(good(g=zeros(B, T, HV, dtype=torch.int64))), TypeError,
     D + r"argument 'g' must be torch\.float32, got torch\.int64"),
    *(
        (f"q is {dtype}", delta_rule(good(q=torch.zeros(B, T, H, K).to(dtype))), TypeError,
         D + rf"argument 'q' must be one of float32, bfloat16, float16, float64, got {dtype}")
        for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    ),
    ("q is a list", delta_rule(good(q=[1.0])), TypeError, D + r"argument 'q' must be a tensor, got list"),
    ("v is None", delta_rule(good(v=None)), TypeError, D + r"argument 'v' must be a tensor, got NoneType"),
    ("beta is None", delta_rule(good(beta=None)), TypeError, D + r"argument 'beta' must be a tensor, got NoneType"),
    # 17. keywords
    ("a misspelt keyword", delta_rule(good(intial_state=zeros(B, HV, K, V))), TypeError, "intial_state"),
    ("scale given by position", positional(0.5), TypeError, "positional"),
    ("a missing argument", without(delta_rule, good(), "beta"), TypeError, "beta"),
    ("scale is a bool", delta_rule(good(scale=True)), TypeError,
     D + r"argument 'scale' must be a float or None, got True"),
    ("scale is a string", delta_rule(good(scale="1")), TypeError,
     D + r"argument 'scale' must be a float or None, got '1'"),
    ("scale is NaN", delta_rule(good(scale=math.nan)), ValueError,
     D + r"argument 'scale' must be finite, got nan"),
    ("scale is infinite", delta_rule(good(scale=math.inf)), ValueError,
     D + r"argument 'scale' must be finite, got inf"),
    ("qk_l2norm is 1", delta_rule(good(qk_l2norm=1)), TypeError,
     D + r"argument 'qk_l2norm' must be True or False, got 1"),
    ("output_final_state is None", delta_rule(good(output_final_state=None)), TypeError,
     D + r"argument 'output_final_state' must be True or False, got None"),
    # 18. head counts
    ("HV is no multiple of H", delta_rule(good(v=zeros(B, T, 3, V))), ValueError,
     D + r"argument 'v' must be of a head count that is a multiple of H=2, got HV=3"),
    ("HV is less than H", delta_rule(good(v=zeros(B, T, 1, V))), ValueError,
     D + r"argument 'v' must be of a head count that is a multiple of H=2, got HV=1"),
    ("no heads", delta_rule(good(q=zeros(B, T, 0, K), k=zeros(B, T, 0, K))), ValueError,
     D + r"argument 'v' must be of a head count that is a multiple of H=0"),
    # 19. devices
    ("k is on another device", delta_rule(good(k=zeros(B, T, H, K, device="meta"))), ValueError,
     D + r"all tensors must be on one device, got q: cpu, k: meta, v: cpu"),
    ("beta is on another device", delta_rule(good(beta=zeros(B, T, HV, device="meta"))), ValueError,
     D + r"all tensors must be on one device, got .*beta: meta"),
    ("the state is on another device", delta_rule(good(initial_state=zeros(B, HV, K, V, device="meta"))), ValueError,
     D + r"all tensors must be on one device, got initial_state: meta"),
    # Steps
    ("step: q has a time axis", step(token(q=zeros(B, 1, H, K))), ValueError,
     S + r"argument 'q' must be of shape \[B, H, K\], got \[2, 1, 2, 8\]"),
    ("step: k does not match", step(token(k=zeros(B, H, 5))), ValueError,
     S + r"argument 'k' must be of shape \[B=2, H=2, K=8\], got \[2, 2, 5\]"),
    ("step: beta is [B, 1]", step(token(beta=zeros(B, 1))), ValueError,
     S + r"argument 'beta' must be of shape \[B=2, HV=4\], got \[2, 1\]"),
    ("step: mixed dtypes", step(token(v=zeros(B, HV, V, dtype=torch.float16))), TypeError,
     S + r"argument 'v' must be torch\.float32 to match 'q', got torch\.float16"),
    ("step: no state", without(step, token(), "state"), TypeError, "state"),
    ("step: the state is None", step(token(state=None)), TypeError,
     S + r"argument 'state' must be a tensor, got NoneType"),
    ("step: the state is value-first", step(token(state=zeros(B, HV, V, K))), ValueError,
     S + r"argument 'state' must be of shape \[slots, HV=4, K=8, V=6\], got \[2, 4, 6, 8\]"),
    ("step: the state has too many rows", step(token(state=zeros(3, HV, K, V))), ValueError,
     S + r"argument 'state' must be of 2 rows \(B\), got 3 rows\. Or give state_indices"),
    ("step: the state is int", step(token(state=zeros(B, HV, K, V, dtype=torch.int64))), TypeError,
     S + r"argument 'state' must be one of float32.*got torch\.int64"),
    ("step: the state is on another device", step(token(state=zeros(B, HV, K, V, device="meta"))), ValueError,
     S + r"all tensors must be on one device, got state: meta"),
    ("step: one memory for several states", step(token(state=zeros(1, HV, K, V).expand(B, HV, K, V))), ValueError,
     S + r"argument 'state' must be free of overlapping memory, got strides .*clone"),
    ("step: scale is NaN", step(token(scale=math.nan)), ValueError,
     S + r"argument 'scale' must be finite, got nan"),
    ("step: qk_l2norm is 1", step(token(qk_l2norm=1)), TypeError,
     S + r"argument 'qk_l2norm' must be True or False, got 1"),
    # 25. state slots
    ("step: a slot past the end", step(token(state_indices=cu(0, 2))), ValueError,
     S + r"argument 'state_indices' must be -1 or in 0\.\.1, got \[0, 2\]"),
    ("step: a slot below -1", step(token(state_indices=cu(0, -2))), ValueError,
     S + r"argument 'state_indices' must be -1 or in 0\.\.1, got \[0, -2\]"),
    ("step: one slot twice", step(token(state_indices=cu(1, 1))), ValueError,
     S + r"argument 'state_indices' must be free of duplicates, got \[1, 1\]"),
    ("step: too few slots", step(token(state_indices=cu(0))), ValueError,
     S + r"argument 'state_indices' must be of shape \[B=2\], got \[1\]"),
    ("step: float slots", step(token(state_indices=cu(0, 1, dtype=torch.float32))), TypeError,
     S + r"argument 'state_indices' must be an int32 or int64 tensor, got torch\.float32"),
    ("step: a list of slots", step(token(state_indices=[0, 1])), TypeError,
     S + r"argument 'state_indices' must be a tensor, got list"),
    # 23. DeltaProduct: n rows a token
    ("product: k has T rows", product(k=zeros(B, T, H, K)), ValueError,
     P + r"argument 'k' must be of shape \[B=2, T\*n=30, H=2, K=8\], got \[2, 10, 2, 8\]\. It has 3 rows"),
    ("product: n is another", product(num_householder=4), ValueError,
     P + r"argument 'k' must be of shape \[B=2, T\*n=40, .*got \[2, 30, 2, 8\]\. It has 4 rows for each token of q"),
    ("product: k is [B, T, n, H, K]", product(k=zeros(B, T, N, H, K)), ValueError,
     P + r"argument 'k' must be of shape .*got \[2, 10, 3, 2, 8\]\. It looks like \[B, T, n, H, K\]: flatten\(1, 2\)"),
    ("product: v has T rows", product(v=zeros(B, T, HV, V)), ValueError,
     P + r"argument 'v' must be of shape \[B=2, T\*n=30, HV, V\], got \[2, 10, 4, 6\]"),
    ("product: beta has T rows", product(beta=zeros(B, T, HV)), ValueError,
     P + r"argument 'beta' must be of shape \[B=2, T\*n=30, HV=4\], got \[2, 10, 4\]"),
    ("product: beta is [B, HV, T * n]", product(beta=zeros(B, HV, T * N)), ValueError,
     P + r"argument 'beta' must be .*got \[2, 4, 30\]\. It looks like \[B, HV, T\]: transpose\(1, 2\)"),
    ("product: g has T * n rows", product(g=zeros(B, T * N, HV)), ValueError,
     P + r"argument 'g' must be of shape \[B=2, T=10, HV=4\], got \[2, 30, 4\]"),
    ("product: q has T * n rows", product(q=zeros(B, T * N, H, K)), ValueError,
     P + r"argument 'k' must be of shape \[B=2, T\*n=90"),
    ("product: n is 0", product(num_householder=0), ValueError,
     P + r"argument 'num_householder' must be from 1 to 8, got 0"),
    ("product: n is 9", product(num_householder=9), ValueError,
     P + r"argument 'num_householder' must be from 1 to 8, got 9"),
    ("product: n is a float", product(num_householder=3.0), TypeError,
     P + r"argument 'num_householder' must be an int, got 3\.0"),
    ("product: n is a bool", product(num_householder=True), TypeError,
     P + r"argument 'num_householder' must be an int, got True"),
    ("product: no n", product_without_n, TypeError, "num_householder"),
    ("product: a misspelt keyword", product(num_householders=3), TypeError, "num_householders"),
    ("product: cu_seqlens counts micro-steps",
     product(**{n: zeros(1, T * N, *tail) for n, tail in (("k", (H, K)), ("v", (HV, V)), ("beta", (HV,)))},
             q=zeros(1, T, H, K), g=None, cu_seqlens=cu(0, 12, 30)), ValueError,
     P + r"argument 'cu_seqlens' must be non-decreasing from 0 to T=10, got \[0, 12, 30\]"),
    ("product: initial_state is value-first", product(initial_state=zeros(B, HV, V, K)), ValueError,
     P + r"argument 'initial_state' must be .*look swapped: transpose\(-1, -2\)"),
    ("product: v is bf16, q is float32", product(v=zeros(B, T * N, HV, V, dtype=torch.bfloat16)), TypeError,
     P + r"argument 'v' must be torch\.float32 to match 'q', got torch\.bfloat16"),
    ("product: scale is NaN", product(scale=math.nan), ValueError, P + r"argument 'scale' must be finite, got nan"),
    ("product: HV is no multiple of H", product(v=zeros(B, T * N, 3, V)), ValueError,
     P + r"argument 'v' must be of a head count that is a multiple of H=2, got HV=3"),
    ("product: k on another device", product(k=zeros(B, T * N, H, K, device="meta")), ValueError,
     P + r"all tensors must be on one device, got q: cpu, k: meta"),
    ("product step: k has no axis of n", product_step(k=zeros(B, H, K)), ValueError,
     PS + r"argument 'k' must be of shape \[B, n, H, K\] with n from 1 to 8, got \[2, 2, 8\]"),
    ("product step: n is 9", product_step(k=zeros(B, 9, H, K)), ValueError,
     PS + r"argument 'k' must be of shape .* with n from 1 to 8, got \[2, 9, 2, 8\]"),
    ("product step: k is a list", product_step(k=[1.0]), TypeError, PS + r"argument 'k' must be a tensor, got list"),
    ("product step: v has another n", product_step(v=zeros(B, 2, HV, V)), ValueError,
     PS + r"argument 'v' must be of shape \[B=2, n=3, HV, V\], got \[2, 2, 4, 6\]"),
    ("product step: beta is [B, HV]", product_step(beta=zeros(B, HV)), ValueError,
     PS + r"argument 'beta' must be of shape \[B=2, n=3, HV=4\], got \[2, 4\]"),
    ("product step: q has a time axis", product_step(q=zeros(B, 1, H, K)), ValueError,
     PS + r"argument 'q' must be of shape \[B, H, K\], got \[2, 1, 2, 8\]"),
    ("product step: the state is value-first", product_step(state=zeros(B, HV, V, K)), ValueError,
     PS + r"argument 'state' must be of shape \[slots, HV=4, K=8, V=6\], got \[2, 4, 6, 8\]"),
    ("product step: one slot twice", product_step(state_indices=cu(1, 1)), ValueError,
     PS + r"argument 'state_indices' must be free of duplicates"),
    # The convolution: the same rules, its own shapes
    ("conv: x is [B, L, D]", conv(x=zeros(B, T, 6), weight=zeros(6, 4)), ValueError,
     C + r"argument 'weight' must be of shape \[D=10, W\], got \[6, 4\]\. x looks like \[B, L, D\]: transpose"),
    ("conv: x is 2-D", conv(x=zeros(6, T)), ValueError,
     C + r"argument 'x' must be of shape \[B, D, L\], got \[6, 10\]"),
    ("conv: no channels", conv(x=zeros(B, 0, T), weight=zeros(0, 4), bias=None), ValueError,
     C + r"argument 'x' must be of at least one channel, got \[2, 0, 10\]"),
    ("conv: nn.Conv1d's weight", conv(weight=zeros(6, 1, 4)), ValueError,
     C + r"argument 'weight' must be of shape \[D=6, W\], got \[6, 1, 4\]\. .*squeeze\(1\)"),
    ("conv: width 0", conv(weight=zeros(6, 0)), ValueError, C + r"argument 'weight' must be of width 1 to 8, got 0"),
    ("conv: width 9", conv(weight=zeros(6, 9)), ValueError, C + r"argument 'weight' must be of width 1 to 8, got 9"),
    ("conv: bias of another size", conv(bias=zeros(1)), ValueError,
     C + r"argument 'bias' must be of shape \[D=6\], got \[1\]"),
    ("conv: bias is a float", conv(bias=0.0), TypeError, C + r"argument 'bias' must be a tensor, got float"),
    ("conv: weight is bf16, x float32", conv(weight=zeros(6, 4, dtype=torch.bfloat16)), TypeError,
     C + r"argument 'weight' must be torch\.float32, got torch\.bfloat16"),
    ("conv: x is int", conv(x=zeros(B, 6, T, dtype=torch.int64)), TypeError,
     C + r"argument 'x' must be one of float32.*got torch\.int64"),
    ("conv: unknown activation", conv(activation="gelu"), ValueError,
     C + r"argument 'activation' must be None, \"silu\" or \"swish\", got 'gelu'"),
    ("conv: activation is True", conv(activation=True), ValueError, C + r"argument 'activation' must be .*got True"),
    ("conv: a misspelt keyword", conv(activaton="silu"), TypeError, "activaton"),
    ("conv: peers' state of W columns", conv(initial_state=zeros(B, 6, 4)), ValueError,
     C + r"argument 'initial_state' must be of shape \[N=2, D=6, W-1=3\], got \[2, 6, 4\]"),
    ("conv: cu_seqlens ends before L", conv(x=zeros(1, 6, T), cu_seqlens=cu(0, 9)), ValueError,
     C + r"argument 'cu_seqlens' must be non-decreasing from 0 to L=10, got \[0, 9\]"),
    ("conv: cu_seqlens with B = 2", conv(cu_seqlens=cu(0, 10)), ValueError,
     C + r"argument 'cu_seqlens' must be given with B=1 only, got B=2"),
    ("conv: weight on another device", conv(weight=zeros(6, 4, device="meta")), ValueError,
     C + r"all tensors must be on one device, got x: cpu, weight: meta"),
    ("conv step: x has a time axis", conv_step(x=zeros(B, 6, 1)), ValueError,
     CS + r"argument 'x' must be of shape \[B, D\], got \[2, 6, 1\]"),
    ("conv step: a state of W columns", conv_step(state=zeros(B, 6, 4)), ValueError,
     CS + r"argument 'state' must be of shape \[slots, D=6, W-1=3\], got \[2, 6, 4\]"),
    ("conv step: a slot past the end", conv_step(state_indices=cu(0, 2)), ValueError,
     CS + r"argument 'state_indices' must be -1 or in 0\.\.1, got \[0, 2\]"),
    ("conv step: one slot twice", conv_step(state_indices=cu(1, 1)), ValueError,
     CS + r"argument 'state_indices' must be free of duplicates"),
    ("conv step: one memory for two states", conv_step(state=zeros(1, 6, 3).expand(B, 6, 3)), ValueError,
     CS + r"argument 'state' must be free of overlapping memory"),
    # 24. The selective scan: channels, groups, states
    ("scan: everything is channel-last",
     scan(u=zeros(B, T, DI), delta=zeros(B, T, DI), z=zeros(B, T, DI)), ValueError,
     M + r"argument 'A' must be of shape \[Di=10, N\], got \[6, 4\]\. u looks like \[B, L, Di\]: transpose\(1, 2\)"),
    ("scan: u is channel-last", scan(u=zeros(B, T, DI)), ValueError,
     M + r"argument 'delta' must be .*got \[2, 6, 10\]\. u or delta looks like \[B, L, Di\]: transpose\(1, 2\)"),
    ("scan: u is 2-D", scan(u=zeros(DI, T)), ValueError,
     M + r"argument 'u' must be of shape \[B, Di, L\], got \[6, 10\]"),
    ("scan: u is a list", scan(u=[1.0]), TypeError, M + r"argument 'u' must be a tensor, got list"),
    ("scan: delta is shorter", scan(delta=zeros(B, DI, 9)), ValueError,
     M + r"argument 'delta' must be of shape \[B=2, Di=6, L=10\], got \[2, 6, 9\]"),
    ("scan: delta has another batch", scan(delta=zeros(1, DI, T)), ValueError,
     M + r"argument 'delta' must be of shape \[B=2, Di=6, L=10\], got \[1, 6, 10\]"),
    ("scan: delta before dt_proj", scan(delta=zeros(B, 1, T)), ValueError,
     M + r"argument 'delta' must be of shape \[B=2, Di=6, L=10\], got \[2, 1, 10\]"),
    ("scan: delta is a float", scan(delta=0.1), TypeError, M + r"argument 'delta' must be a tensor, got float"),
    ("scan: delta is None", scan(delta=None), TypeError, M + r"argument 'delta' must be a tensor, got NoneType"),
    ("scan: z is longer", scan(z=zeros(B, DI, 11)), ValueError,
     M + r"argument 'z' must be of shape \[B=2, Di=6, L=10\], got \[2, 6, 11\]"),
    ("scan: z is channel-last", scan(z=zeros(B, T, DI)), ValueError,
     M + r"argument 'z' must be .*got \[2, 10, 6\]\. u or z looks like \[B, L, Di\]: transpose\(1, 2\)"),
    ("scan: z is True", scan(z=True), TypeError, M + r"argument 'z' must be a tensor, got bool"),
    ("scan: A has other channels", scan(A=zeros(5, STATES)), ValueError,
     M + r"argument 'A' must be of shape \[Di=6, N\], got \[5, 4\]\.$"),
    ("scan: A is [N, Di]", scan(A=zeros(STATES, DI)), ValueError,
     M + r"argument 'A' must be .*got \[4, 6\]\. It looks like \[N, Di\]: transpose\(0, 1\)"),
    ("scan: A is a scalar a channel", scan(A=zeros(DI)), ValueError,
     M + r"argument 'A' must be of shape \[Di=6, N\], got \[6\]"),
    ("scan: A has no states", scan(A=zeros(DI, 0)), ValueError,
     M + r"argument 'A' must be of shape \[Di, N\] with N at least 1, got \[6, 0\]"),
    ("scan: A is complex", scan(A=zeros(DI, STATES, dtype=torch.complex64)), TypeError,
     M + r"argument 'A' must be real, got torch\.complex64\. Only the real scan"),
    ("scan: A is bf16, u float32", scan(A=zeros(DI, STATES, dtype=torch.bfloat16)), TypeError,
     M + r"argument 'A' must be torch\.float32, got torch\.bfloat16"),
    ("scan: A is int", scan(A=zeros(DI, STATES, dtype=torch.int64)), TypeError,
     M + r"argument 'A' must be torch\.float32, got torch\.int64"),
    ("scan: B is complex", scan(B=zeros(B, 2, STATES, T, dtype=torch.complex64)), TypeError,
     M + r"argument 'B' must be real, got torch\.complex64"),
    ("scan: B is [B, L, N]", scan(B=zeros(B, T, STATES)), ValueError,
     M + r"argument 'B' must be of shape \[B=2, N=4, L=10\], got \[2, 10, 4\]\. It looks like \[B, L, N\]: transpose"),
    ("scan: C is [B, L, G, N]", scan(C=zeros(B, T, 2, STATES)), ValueError,
     M + r"argument 'C' must be .*got \[2, 10, 2, 4\]\. It looks like \[B, L, G, N\]: permute\(0, 2, 3, 1\)"),
    ("scan: B is [G, N, L]", scan(B=zeros(3, STATES, T)), ValueError,
     M + r"argument 'B' must be of shape \[B=2, N=4, L=10\], got \[3, 4, 10\]\. Three .*four \[B, G, N, L\]"),
    ("scan: B is shorter", scan(B=zeros(B, 2, STATES, 9)), ValueError,
     M + r"argument 'B' must be of shape \[B=2, G, N=4, L=10\], got \[2, 2, 4, 9\]"),
    ("scan: C has other states than A", scan(C=zeros(B, 2, 5, T)), ValueError,
     M + r"argument 'C' must be of shape \[B=2, G, N=4, L=10\], got \[2, 2, 5, 10\]"),
    ("scan: B has another batch", scan(B=zeros(1, 2, STATES, T)), ValueError,
     M + r"argument 'B' must be of shape \[B=2, G, N=4, L=10\], got \[1, 2, 4, 10\]"),
    ("scan: groups that do not divide Di", scan(B=zeros(B, 4, STATES, T)), ValueError,
     M + r"argument 'B' must be of a group count that divides Di=6, got G=4"),
    ("scan: no groups", scan(C=zeros(B, 0, STATES, T)), ValueError,
     M + r"argument 'C' must be of a group count that divides Di=6, got G=0"),
    ("scan: a constant B is [N, Di]", scan(B=zeros(STATES, DI)), ValueError,
     M + r"argument 'B' must be of shape \[Di=6, N=4\], got \[4, 6\]\. .*two the constant \[Di, N\]"),
    ("scan: B is [N, L]", scan(B=zeros(STATES, T)), ValueError,
     M + r"argument 'B' must be of shape \[Di=6, N=4\], got \[4, 10\]\. Three dimensions are \[B, N, L\]"),
    ("scan: C is 1-D", scan(C=zeros(STATES)), ValueError,
     M + r"argument 'C' must be of shape \[B, N, L\], \[B, G, N, L\] or \[Di, N\], got \[4\]"),
    ("scan: C is 5-D", scan(C=zeros(1, B, 2, STATES, T)), ValueError,
     M + r"argument 'C' must be of shape \[B, N, L\], \[B, G, N, L\] or \[Di, N\], got \[1, 2, 2, 4, 10\]"),
    ("scan: B is None", scan(B=None), TypeError, M + r"argument 'B' must be a tensor, got NoneType"),
    ("scan: D is [Di, 1]", scan(D=zeros(DI, 1)), ValueError,
     M + r"argument 'D' must be of shape \[Di=6\], got \[6, 1\]"),
    ("scan: D of another size", scan(D=zeros(1)), ValueError, M + r"argument 'D' must be of shape \[Di=6\], got \[1\]"),
    ("scan: D is a float", scan(D=1.0), TypeError, M + r"argument 'D' must be a tensor, got float"),
    ("scan: delta_bias is [1, Di, 1]", scan(delta_bias=zeros(1, DI, 1)), ValueError,
     M + r"argument 'delta_bias' must be of shape \[Di=6\], got \[1, 6, 1\]"),
    ("scan: delta_bias is float64, u float32", scan(delta_bias=zeros(DI, dtype=torch.float64)), TypeError,
     M + r"argument 'delta_bias' must be torch\.float32, got torch\.float64"),
    ("scan: delta_softplus is 1", scan(delta_softplus=1), TypeError,
     M + r"argument 'delta_softplus' must be True or False, got 1"),
    ("scan: output_final_state is None", scan(output_final_state=None), TypeError,
     M + r"argument 'output_final_state' must be True or False, got None"),
    # 16. its dtypes
    ("scan: u is int", scan(u=zeros(B, DI, T, dtype=torch.int64)), TypeError,
     M + r"argument 'u' must be one of float32.*got torch\.int64"),
    ("scan: u is complex", scan(u=zeros(B, DI, T, dtype=torch.complex64)), TypeError,
     M + r"argument 'u' must be one of float32.*got torch\.complex64"),
    ("scan: u is float8", scan(u=zeros(B, DI, T).to(torch.float8_e4m3fn)), TypeError,
     M + r"argument 'u' must be one of float32.*got torch\.float8_e4m3fn"),
    ("scan: delta is bf16, u float32", scan(delta=zeros(B, DI, T, dtype=torch.bfloat16)), TypeError,
     M + r"argument 'delta' must be torch\.float32 to match 'u', got torch\.bfloat16\. .*autocast"),
    ("scan: z is fp16, u float32", scan(z=zeros(B, DI, T, dtype=torch.float16)), TypeError,
     M + r"argument 'z' must be torch\.float32 to match 'u', got torch\.float16"),
    ("scan: B is bf16, u float32", scan(B=zeros(B, 2, STATES, T, dtype=torch.bfloat16)), TypeError,
     M + r"argument 'B' must be torch\.float32 to match 'u', got torch\.bfloat16"),
    ("scan: a constant C is bf16, u float32", scan(C=zeros(DI, STATES, dtype=torch.bfloat16)), TypeError,
     M + r"argument 'C' must be torch\.float32, got torch\.bfloat16"),
    # 17. its keywords
    ("scan: a peer's keyword", scan(return_last_state=True), TypeError, "return_last_state"),
    ("scan: z by place", positional_scan(zeros(B, DI, T)), TypeError, "positional"),
    # 4. - 6. and 11. its packs and states
    ("scan: cu_seqlens ends before L", packed_scan(cu_seqlens=cu(0, 4, 9)), ValueError,
     M + r"argument 'cu_seqlens' must be non-decreasing from 0 to L=10, got \[0, 4, 9\]"),
    ("scan: cu_seqlens ends behind L", packed_scan(cu_seqlens=cu(0, 11)), ValueError,
     M + r"argument 'cu_seqlens' must be non-decreasing from 0 to L=10, got \[0, 11\]"),
    ("scan: cu_seqlens starts at 1", packed_scan(cu_seqlens=cu(1, 10)), ValueError,
     M + r"argument 'cu_seqlens' must be non-decreasing from 0 to L=10, got \[1, 10\]"),
    ("scan: cu_seqlens decreases", packed_scan(cu_seqlens=cu(0, 6, 4, 10)), ValueError,
     M + r"argument 'cu_seqlens' must be non-decreasing"),
    ("scan: cu_seqlens is 2-D", packed_scan(cu_seqlens=cu(0, 10)[None]), ValueError,
     M + r"argument 'cu_seqlens' must be of shape \[S\+1\], got \[1, 2\]"),
    ("scan: cu_seqlens is float", packed_scan(cu_seqlens=cu(0, 10, dtype=torch.float32)), TypeError,
     M + r"argument 'cu_seqlens' must be an int32 or int64 tensor, got torch\.float32"),
    ("scan: cu_seqlens is a list", packed_scan(cu_seqlens=[0, 10]), TypeError,
     M + r"argument 'cu_seqlens' must be a tensor, got list"),
    ("scan: cu_seqlens with B = 2", scan(cu_seqlens=cu(0, 10)), ValueError,
     M + r"argument 'cu_seqlens' must be given with B=1 only, got B=2\. .*along L first"),
    ("scan: initial_state without a batch", scan(initial_state=zeros(DI, STATES)), ValueError,
     M + r"argument 'initial_state' must be of shape \[S=2, Di=6, N=4\], got \[6, 4\]\. S is the number of sequences"),
    ("scan: initial_state is [B, N, Di]", scan(initial_state=zeros(B, STATES, DI)), ValueError,
     M + r"argument 'initial_state' must be .*look swapped: transpose\(-1, -2\)"),
    ("scan: initial_state of another batch", scan(initial_state=zeros(3, DI, STATES)), ValueError,
     M + r"argument 'initial_state' must be of shape \[S=2, Di=6, N=4\], got \[3, 6, 4\]"),
    ("scan: one initial_state for two packed sequences", packed_scan(initial_state=zeros(1, DI, STATES)), ValueError,
     M + r"argument 'initial_state' must be of shape \[S=2, Di=6, N=4\], got \[1, 6, 4\]"),
    ("scan: initial_state is int", scan(initial_state=zeros(B, DI, STATES, dtype=torch.int64)), TypeError,
     M + r"argument 'initial_state' must be one of float32.*got torch\.int64"),
    ("scan: initial_state is a float", scan(initial_state=0.0), TypeError,
     M + r"argument 'initial_state' must be a tensor, got float"),
    # 19. its devices
    ("scan: delta on another device", scan(delta=zeros(B, DI, T, device="meta")), ValueError,
     M + r"all tensors must be on one device, got u: cpu, delta: meta"),
    ("scan: A on another device", scan(A=zeros(DI, STATES, device="meta")), ValueError,
     M + r"all tensors must be on one device, got u: cpu, A: meta"),
    ("scan: B on another device", scan(B=zeros(B, STATES, T, device="meta")), ValueError,
     M + r"all tensors must be on one device, got u: cpu, B: meta"),
    ("scan: the state on another device", scan(initial_state=zeros(B, DI, STATES, device="meta")), ValueError,
     M + r"all tensors must be on one device, got initial_state: meta"),
    # Its steps
    ("scan step: u has a time axis", scan_step(u=zeros(B, DI, 1)), ValueError,
     MS + r"argument 'u' must be of shape \[B, Di\], got \[2, 6, 1\]"),
    ("scan step: delta does not match", scan_step(delta=zeros(B, 5)), ValueError,
     MS + r"argument 'delta' must be of shape \[B=2, Di=6\], got \[2, 5\]"),
    ("scan step: z does not match", scan_step(z=zeros(B, 5)), ValueError,
     MS + r"argument 'z' must be of shape \[B=2, Di=6\], got \[2, 5\]"),
    ("scan step: A has other channels", scan_step(A=zeros(5, STATES)), ValueError,
     MS + r"argument 'A' must be of shape \[Di=6, N\], got \[5, 4\]"),
    ("scan step: A is complex", scan_step(A=zeros(DI, STATES, dtype=torch.complex64)), TypeError,
     MS + r"argument 'A' must be real, got torch\.complex64"),
    ("scan step: D of another size", scan_step(D=zeros(5)), ValueError,
     MS + r"argument 'D' must be of shape \[Di=6\], got \[5\]"),
    ("scan step: B has other states", scan_step(B=zeros(B, 5)), ValueError,
     MS + r"argument 'B' must be of shape \[B=2, N=4\], got \[2, 5\]\. Or the constant \[Di=6, N=4\]"),
    ("scan step: B has a time axis", scan_step(B=zeros(B, 2, STATES, 1)), ValueError,
     MS + r"argument 'B' must be of shape \[B, N\], \[B, G, N\] or \[Di, N\], got \[2, 2, 4, 1\]"),
    ("scan step: groups that do not divide Di", scan_step(C=zeros(B, 4, STATES)), ValueError,
     MS + r"argument 'C' must be of a group count that divides Di=6, got G=4"),
    ("scan step: mixed dtypes", scan_step(C=zeros(B, 2, STATES, dtype=torch.bfloat16)), TypeError,
     MS + r"argument 'C' must be torch\.float32 to match 'u', got torch\.bfloat16"),
    ("scan step: a constant is int", scan_step(C=zeros(DI, STATES, dtype=torch.int64)), TypeError,
     MS + r"argument 'C' must be torch\.float32, got torch\.int64"),
    ("scan step: the state is None", scan_step(state=None), TypeError,
     MS + r"argument 'state' must be a tensor, got NoneType"),
    ("scan step: the state is [B, N, Di]", scan_step(state=zeros(B, STATES, DI)), ValueError,
     MS + r"argument 'state' must be of shape \[slots, Di=6, N=4\], got \[2, 4, 6\]"),
    ("scan step: the state has too many rows", scan_step(state=zeros(3, DI, STATES)), ValueError,
     MS + r"argument 'state' must be of 2 rows \(B\), got 3 rows\. Or give state_indices"),
    ("scan step: the state is int", scan_step(state=zeros(B, DI, STATES, dtype=torch.int64)), TypeError,
     MS + r"argument 'state' must be one of float32.*got torch\.int64"),
    ("scan step: one memory for two states", scan_step(state=zeros(1, DI, STATES).expand(B, DI, STATES)), ValueError,
     MS + r"argument 'state' must be free of overlapping memory, got strides .*clone"),
    ("scan step: a slot past the end", scan_step(state_indices=cu(0, 2)), ValueError,
     MS + r"argument 'state_indices' must be -1 or in 0\.\.1, got \[0, 2\]"),
    ("scan step: one slot twice", scan_step(state_indices=cu(1, 1)), ValueError,
     MS + r"argument 'state_indices' must be free of duplicates, got \[1, 1\]"),
    ("scan step: too few slots", scan_step(state_indices=cu(0)), ValueError,
     MS + r"argument 'state_indices' must be of shape \[B=2\], got \[1\]"),
    ("scan step: delta_softplus is None", scan_step(delta_softplus=None), TypeError,
     MS + r"argument 'delta_softplus' must be True or False, got None"),
    # 25. temporal-sparse attention
    ("sparse: threshold is negative", sparse(threshold=-0.1), ValueError,
     A + r"argument 'threshold' must be >= 0, got -0\.1"),
    ("sparse: threshold is NaN", sparse(threshold=math.nan), ValueError,
     A + r"argument 'threshold' must be >= 0, got nan"),
    ("sparse: threshold is negative somewhere", sparse(threshold=torch.tensor([0.1] * 7 + [-2.0])), ValueError,
     A + r"argument 'threshold' must be >= 0 everywhere, got -2\.0"),
    ("sparse: threshold is NaN somewhere", sparse(threshold=zeros(H, K).fill_(math.nan)), ValueError,
     A + r"argument 'threshold' must be >= 0 everywhere, got nan"),
    ("sparse: threshold is a row of the wrong length", sparse(threshold=zeros(5)), ValueError,
     A + r"argument 'threshold' must be broadcastable to \[HK=2, D=8\], got \[5\]"),
    ("sparse: threshold is [D, HK]", sparse(threshold=zeros(K, H)), ValueError,
     A + r"argument 'threshold' must be .*got \[8, 2\]\. It looks like \[D, HK\]: transpose\(0, 1\)"),
    ("sparse: threshold is a number a query head", sparse(threshold=zeros(HV, 1)), ValueError,
     A + r"argument 'threshold' must be broadcastable to \[HK=2, D=8\], got \[4, 1\]"),
    ("sparse: threshold is a number a token", sparse(threshold=zeros(T, H, K)), ValueError,
     A + r"argument 'threshold' must be broadcastable to \[HK=2, D=8\], got \[10, 2, 8\]"),
    ("sparse: threshold is int", sparse(threshold=torch.ones(8, dtype=torch.int64)), TypeError,
     A + r"argument 'threshold' must be a floating tensor, got torch\.int64"),
    ("sparse: threshold is a list", sparse(threshold=[0.1]), TypeError,
     A + r"argument 'threshold' must be a number or a tensor, got \[0\.1\]"),
    ("sparse: threshold is True", sparse(threshold=True), TypeError,
     A + r"argument 'threshold' must be a number or a tensor, got True"),
    ("sparse: threshold is on another device", sparse(threshold=zeros(K, device="meta")), ValueError,
     A + r"all tensors must be on one device, got q: cpu, threshold: meta"),
    ("sparse: window is 0", sparse(window=0), ValueError, A + r"argument 'window' must be at least 1, got 0"),
    ("sparse: window is 0.0", sparse(window=0.0), ValueError,
     A + r"argument 'window' must be an int >= 1 or a float in \(0, 1\], got 0\.0\. A float is a share of T"),
    ("sparse: window is a share above 1", sparse(window=64.0), ValueError,
     A + r"argument 'window' must be .*got 64\.0\. A float is a share of T; give an int for tokens"),
    ("sparse: window is NaN", sparse(window=math.nan), ValueError, A + r"argument 'window' must be .*got nan"),
    ("sparse: window is None", sparse(window=None), TypeError,
     A + r"argument 'window' must be an int or a float in \(0, 1\], got None"),
    ("sparse: window is True", sparse(window=True), TypeError,
     A + r"argument 'window' must be an int or a float in \(0, 1\], got True"),
    ("sparse: window is a share of packed sequences", packed_sparse(window=0.05), ValueError,
     A + r"argument 'window' must be an int with cu_seqlens, got 0\.05"),
    ("sparse: sink is negative", sparse(sink=-1), ValueError, A + r"argument 'sink' must be at least 0, got -1"),
    ("sparse: sink is a float", sparse(sink=1.0), TypeError, A + r"argument 'sink' must be an int, got 1\.0"),
    ("sparse: window_mode is unknown", sparse(window_mode="sliding"), ValueError,
     A + r"argument 'window_mode' must be \"band\" or \"block\", got 'sliding'"),
    ("sparse: return_stats is None", sparse(return_stats=None), TypeError,
     A + r"argument 'return_stats' must be True or False, got None"),
    ("sparse: scale is NaN", sparse(scale=math.nan), ValueError, A + r"argument 'scale' must be finite, got nan"),
    ("sparse: more queries than keys", sparse(q=zeros(B, 11, HV, K)), ValueError,
     A + r"argument 'q' must be of at most T=10 tokens, as k has, got Tq=11\. Queries are the last"),
    ("sparse: fewer queries than keys, packed", packed_sparse(q=zeros(1, 8, HV, K)), ValueError,
     A + r"argument 'q' must be of T=10 tokens with cu_seqlens, got 8"),
    ("sparse: query heads are no multiple", sparse(q=zeros(B, 8, 3, K)), ValueError,
     A + r"argument 'q' must be of a head count that is a multiple of HK=2, got HQ=3"),
    ("sparse: q is 3-D", sparse(q=zeros(B, 8, K)), ValueError,
     A + r"argument 'q' must be of shape \[B, Tq, HQ, D\], got \[2, 8, 8\]"),
    ("sparse: k has another head dimension", sparse(k=zeros(B, T, H, 5)), ValueError,
     A + r"argument 'k' must be of shape \[B=2, T, HK, D=8\], got \[2, 10, 2, 5\]"),
    ("sparse: k has another batch", sparse(k=zeros(1, T, H, K)), ValueError,
     A + r"argument 'k' must be of shape \[B=2, .*got \[1, 10, 2, 8\]"),
    ("sparse: v is shorter", sparse(v=zeros(B, 9, H, V)), ValueError,
     A + r"argument 'v' must be of shape \[B=2, T=10, HK=2, DV\], got \[2, 9, 2, 6\]"),
    ("sparse: v has the query heads", sparse(v=zeros(B, T, HV, V)), ValueError,
     A + r"argument 'v' must be .*HK=2, DV\], got \[2, 10, 4, 6\]"),
    ("sparse: D is 0", sparse(q=zeros(B, 8, HV, 0), k=zeros(B, T, H, 0)), ValueError,
     A + r"argument 'q' must be of a head dimension >= 1, got 0"),
    ("sparse: k is bf16", sparse(k=zeros(B, T, H, K, dtype=torch.bfloat16)), TypeError,
     A + r"argument 'k' must be torch\.float32 to match 'q', got torch\.bfloat16"),
    ("sparse: k is on another device", sparse(k=zeros(B, T, H, K, device="meta")), ValueError,
     A + r"all tensors must be on one device, got q: cpu, k: meta"),
    ("sparse: cu_seqlens ends before T", packed_sparse(cu_seqlens=cu(0, 4, 9)), ValueError,
     A + r"argument 'cu_seqlens' must be non-decreasing from 0 to T=10, got \[0, 4, 9\]"),
    ("sparse: cu_seqlens for a batch", sparse(q=zeros(B, T, HV, K), cu_seqlens=cu(0, 10)), ValueError,
     A + r"argument 'cu_seqlens' must be given with B=1 only, got B=2"),
    ("sparse: positional options", positional_sparse, TypeError, r"takes 3 positional arguments"),
    ("sparse: unknown keyword", sparse(thresold=0.1), TypeError, "unexpected keyword argument 'thresold'"),
    # 26. decode attention
    ("decode: q is 2-D", decode(q=zeros(B, K)), ValueError,
     E + r"argument 'q' must be of shape \[B, Tq, HQ, D\] or \[B, HQ, D\], got \[2, 8\]"),
    ("decode: k has another head dimension", decode(k=zeros(B, T, H, 5)), ValueError,
     E + r"argument 'k' must be of shape \[B=2, T, HK, D=8\], got \[2, 10, 2, 5\]"),
    ("decode: k is [B, HK, T, D]", decode(k=zeros(3, H, T, K)), ValueError,
     E + r"argument 'k' must be .*got \[3, 2, 10, 8\]\. It looks like \[B, HK, T, D\]: transpose\(1, 2\)"),
    ("decode: v is shorter than k", decode(v=zeros(B, 6, H, V)), ValueError,
     E + r"argument 'v' must be of shape \[B=2, T=10, HK=2, DV\], got \[2, 6, 2, 6\]"),
    ("decode: v has other heads", decode(v=zeros(B, T, HV, V)), ValueError,
     E + r"argument 'v' must be of shape .*HK=2, DV\], got \[2, 10, 4, 6\]"),
    ("decode: DV is 0", decode(v=zeros(B, T, H, 0)), ValueError,
     E + r"argument 'v' must be of a head dimension >= 1, got 0"),
    ("decode: heads that do not divide", decode(q=zeros(B, 2, 3, K)), ValueError,
     E + r"argument 'q' must be of a head count that is a multiple of HK=2, got 3"),
    ("decode: more queries than keys", decode(q=zeros(B, T + 1, HV, K)), ValueError,
     E + r"argument 'k' must be of at least Tq=11 keys, got T=10\. .*append"),
    ("decode: mixed dtypes", decode(v=zeros(B, T, H, V, dtype=torch.bfloat16)), TypeError,
     E + r"argument 'v' must be torch\.float32 to match 'q', got torch\.bfloat16"),
    ("decode: q is int", decode(q=zeros(B, 2, HV, K, dtype=torch.int64)), TypeError,
     E + r"argument 'q' must be one of float32.*got torch\.int64"),
    ("decode: k is None", decode(k=None), TypeError, E + r"argument 'k' must be a tensor, got NoneType"),
    ("decode: k on another device", decode(k=zeros(B, T, H, K, device="meta")), ValueError,
     E + r"all tensors must be on one device, got q: cpu, k: meta"),
    ("decode: lengths past T", decode(lengths=cu(3, 11)), ValueError,
     E + r"argument 'lengths' must be in 0\.\.10 \(T\), got \[3, 11\]"),
    ("decode: negative lengths", decode(lengths=cu(3, -1)), ValueError,
     E + r"argument 'lengths' must be in 0\.\.10 \(T\), got \[3, -1\]"),
    ("decode: one length for two rows", decode(lengths=cu(3)), ValueError,
     E + r"argument 'lengths' must be of shape \[B=2\], got \[1\]"),
    ("decode: lengths are float", decode(lengths=cu(3, 4, dtype=torch.float32)), TypeError,
     E + r"argument 'lengths' must be an int32 or int64 tensor, got torch\.float32"),
    ("decode: lengths is a list", decode(lengths=[3, 4]), TypeError,
     E + r"argument 'lengths' must be a tensor, got list"),
    ("decode: scale is a bool", decode(scale=True), TypeError,
     E + r"argument 'scale' must be a float or None, got True"),
    ("decode: scale is NaN", decode(scale=math.nan), ValueError, E + r"argument 'scale' must be finite, got nan"),
    ("decode: a gradient is needed", decode(q=torch.zeros(B, 2, HV, K, requires_grad=True)), RuntimeError,
     E + r"an input requires a gradient, and this op has no backward\. Wrap the call in torch\.no_grad\(\)"),
    # 27. DeltaLLM's cache
    ("cache: a negative threshold", cache(threshold=-0.1), ValueError,
     K_ + r": argument 'threshold' must be >= 0, got -0\.1"),
    ("cache: the threshold is NaN", cache(threshold=math.nan), ValueError,
     K_ + r": argument 'threshold' must be >= 0, got nan"),
    ("cache: a NaN in the threshold", cache(threshold=torch.tensor([0.1, math.nan])), ValueError,
     K_ + r": argument 'threshold' must be >= 0 everywhere, got nan"),
    ("cache: a negative value in the threshold", cache(threshold=torch.tensor([0.1, -1.0])), ValueError,
     K_ + r": argument 'threshold' must be >= 0 everywhere, got -1\.0"),
    ("cache: the threshold is int", cache(threshold=torch.tensor([1])), TypeError,
     K_ + r": argument 'threshold' must be a floating tensor, got torch\.int64"),
    ("cache: the threshold is a string", cache(threshold="0.1"), TypeError,
     K_ + r": argument 'threshold' must be a number or a tensor, got '0\.1'"),
    ("cache: the threshold does not broadcast", cache(threshold=torch.ones(3, K)), ValueError,
     K_ + r": argument 'threshold' must be broadcastable to \[HK=2, D=8\], got \[3, 8\]"),
    ("cache: the threshold has a batch", cache(threshold=torch.ones(1, H, K)), ValueError,
     K_ + r": argument 'threshold' must be broadcastable to \[HK=2, D=8\], got \[1, 2, 8\]"),
    ("cache: window 0", cache(window=0), ValueError, K_ + r": argument 'window' must be at least 1, got 0"),
    ("cache: window 1.5", cache(window=1.5), ValueError,
     K_ + r": argument 'window' must be an int >= 1 or a float in \(0, 1\], got 1\.5"),
    ("cache: window 0.0", cache(window=0.0), ValueError,
     K_ + r": argument 'window' must be an int >= 1 or a float in \(0, 1\], got 0\.0"),
    ("cache: window None", cache(window=None), TypeError,
     K_ + r": argument 'window' must be an int or a float in \(0, 1\], got None"),
    ("cache: window True", cache(window=True), TypeError, K_ + r": argument 'window' must be an int or .*got True"),
    ("cache: a negative sink", cache(sink=-1), ValueError, K_ + r": argument 'sink' must be at least 0, got -1"),
    ("cache: sink is a float", cache(sink=1.0), TypeError, K_ + r": argument 'sink' must be an int, got 1\.0"),
    ("cache: an unknown window_mode", cache(window_mode="diagonal"), ValueError,
     K_ + r": argument 'window_mode' must be \"band\" or \"block\", got 'diagonal'"),
    ("cache: max_len 0", cache(max_len=0), ValueError, K_ + r": argument 'max_len' must be at least 1, got 0"),
    ("cache: a negative rollback", cache(rollback=-1), ValueError,
     K_ + r": argument 'rollback' must be at least 0, got -1"),
    ("append: past max_len", append(k=zeros(B, 11, H, K), v=zeros(B, 11, H, V)), ValueError,
     K_ + r"\.append: argument 'k' must be of no more tokens than max_len=20 allows, got 11\. A row would hold 21"),
    ("append: another dtype", append(k=zeros(B, 2, H, K).half(), v=zeros(B, 2, H, V).half()), TypeError,
     K_ + r"\.append: argument 'k' must be torch\.float32 as the first append, got torch\.float16"),
    ("append: mixed dtypes", append(v=zeros(B, 2, H, V).half()), TypeError,
     K_ + r"\.append: argument 'v' must be torch\.float32 to match 'k', got torch\.float16"),
    ("append: another batch", append(k=zeros(3, 2, H, K), v=zeros(3, 2, H, V)), ValueError,
     K_ + r"\.append: argument 'k' must be of shape \[B=2, T, HK=2, D=8\], got \[3, 2, 2, 8\]"),
    ("append: other value dimensions", append(v=zeros(B, 2, H, 5)), ValueError,
     K_ + r"\.append: argument 'v' must be of shape \[B=2, T=2, HK=2, DV=6\], got \[2, 2, 2, 5\]"),
    ("append: fewer values than keys", append(v=zeros(B, 1, H, V)), ValueError,
     K_ + r"\.append: argument 'v' must be of shape \[B=2, T=2, HK=2, DV=6\], got \[2, 1, 2, 6\]"),
    ("append: k is 2-D", first_append(k=zeros(B, K)), ValueError,
     K_ + r"\.append: argument 'k' must be of shape \[B, T, HK, D\] or \[B, HK, D\], got \[2, 8\]"),
    ("append: k is None", first_append(k=None), TypeError, K_ + r"\.append: argument 'k' must be a tensor"),
    ("append: D is 0", first_append(k=zeros(B, 2, H, 0)), ValueError,
     K_ + r"\.append: argument 'k' must be of a head count and dimension >= 1, got \[2, 2, 2, 0\]"),
    ("append: a float mask", append(mask=torch.ones(B, 2)), TypeError,
     K_ + r"\.append: argument 'mask' must be of bool or an integer dtype, got torch\.float32"),
    ("append: a mask of another length", append(mask=torch.ones(B, 3, dtype=torch.bool)), ValueError,
     K_ + r"\.append: argument 'mask' must be of shape \[B=2, T=2\], got \[2, 3\]"),
    ("append: more queries than tokens", append(queries=3), ValueError,
     K_ + r"\.append: argument 'queries' must be in 0\.\.2, got 3"),
    ("append: a gradient is needed", append(k=torch.zeros(B, 2, H, K, requires_grad=True)), RuntimeError,
     K_ + r"\.append: an input requires a gradient"),
    ("attend: nothing was appended", on_empty_cache("attend", zeros(B, HV, K)), RuntimeError,
     K_ + r"\.attend: there are no new tokens\. Append"),
    ("attend: more queries than tokens", attend(q=zeros(B, T + 1, HV, K)), ValueError,
     K_ + r"\.attend: argument 'q' must be of at most 10 tokens, got 11\. .*last append"),
    ("attend: another batch", attend(q=zeros(3, 2, HV, K)), ValueError,
     K_ + r"\.attend: argument 'q' must be of shape \[B=2, Tq, HQ, D=8\], got \[3, 2, 4, 8\]"),
    ("attend: heads that do not divide", attend(q=zeros(B, 2, 3, K)), ValueError,
     K_ + r"\.attend: argument 'q' must be of a head count that is a multiple of HK=2, got 3"),
    ("attend: another dtype", attend(q=zeros(B, 2, HV, K).double()), TypeError,
     K_ + r"\.attend: argument 'q' must be torch\.float32 as the first append, got torch\.float64"),
    ("attend: q is 2-D", attend(q=zeros(B, K)), ValueError,
     K_ + r"\.attend: argument 'q' must be of shape \[B, Tq, HQ, D\] or \[B, HQ, D\], got \[2, 8\]"),
    ("attend: q is None", attend(q=None), TypeError, K_ + r"\.attend: argument 'q' must be a tensor, got NoneType"),
    ("attend: scale is inf", attend(scale=math.inf), ValueError,
     K_ + r"\.attend: argument 'scale' must be finite, got inf"),
    ("to_dense: nothing was appended", on_empty_cache("to_dense"), RuntimeError,
     K_ + r"\.to_dense: the cache is empty"),
    ("crop: past the end", on_cache("crop", T + 1), ValueError,
     K_ + r"\.crop: argument 'length' must be in -10\.\.10, got 11"),
    ("crop: a float", on_cache("crop", 3.0), TypeError, K_ + r"\.crop: argument 'length' must be an int, got 3\.0"),
    ("reorder: a row that is not there", on_cache("reorder", cu(0, 2)), ValueError,
     K_ + r"\.reorder: argument 'indices' must be in 0\.\.1, got \[0, 2\]"),
    ("reorder: float indices", on_cache("reorder", torch.zeros(2)), TypeError,
     K_ + r"\.reorder: argument 'indices' must be an int32 or int64 tensor, got torch\.float32"),
    # 13. a mask and a pack at once
    ("layer: attention_mask and cu_seqlens", masked_layer(attention_mask=torch.ones(1, T), cu_seqlens=cu(0, T)),
     ValueError, r"attention_mask.*cu_seqlens"),
]  # fmt: skip


@pytest.mark.parametrize("title, bad_call, error, pattern", TABLE, ids=[row[0] for row in TABLE])
def test_bad_input(backend, title, bad_call, error, pattern):
    with pytest.raises(error, match=pattern) as raised:
        bad_call(backend)
    assert type(raised.value) is error


@pytest.mark.parametrize("title, bad_call, error, pattern", TABLE, ids=[row[0] for row in TABLE])
def test_auto_and_named_backends_say_the_same(title, bad_call, error, pattern):
    with pytest.raises(error, match=pattern):
        bad_call("auto")


def test_the_right_calls_are_right(backend):
    """The table would prove little if its starting points failed too."""
    delta_rule(good())(backend)
    delta_rule(packed())(backend)
    step(token())(backend)
    product()("auto")
    product_step()("auto")
    conv()(backend)
    conv_step()(backend)
    scan()("auto")
    packed_scan()("auto")
    scan_step()("auto")
    sparse()("reference")
    packed_sparse()("reference")
    decode()("reference")
    append()("reference")
    attend()("reference")


@pytest.mark.parametrize("name", ["triton", "native"])
def test_more_states_than_the_kernels_have(name):
    """N = 300: a named backend says what it goes up to, "auto" falls to the reference and warns once."""
    x = selective_scan_cases.random_inputs(1, 2, 3, 300, delta="positive")
    if not fla_ops._backend.why_not("selective_scan", name, "cpu", torch.float32, ()):
        with pytest.raises(RuntimeError, match=rf"selective_scan: backend '{name}' cannot run here: .*256, got 300"):
            selective_scan_cases.call(fla_ops.selective_scan, x, backend=name)
    fla_ops._backend._warned.clear()
    with pytest.warns(fla_ops.FallbackWarning, match=r"selective_scan runs on the slow reference: .*256, got 300"):
        y = selective_scan_cases.call(fla_ops.selective_scan, x).y
    assert torch.equal(y, selective_scan_cases.call(fla_ops.selective_scan, x, backend="reference").y)


# Nasty but legal: each of these gave garbage somewhere else.


def test_cu_seqlens_of_either_integer_type(backend):
    one = [delta_rule(packed(cu_seqlens=cu(0, 4, 10, dtype=d)))(backend).o for d in (torch.int32, torch.int64)]
    assert torch.equal(*one)


def test_keys_that_are_not_normalised(backend):
    """|k|^2 beta over 2 diverges: the equation's large numbers come back, neither clamped nor refused."""
    inputs = random_inputs(T=24, K=16, V=16, keys="raw", beta=1, gate=None)
    check(backend, inputs, names=["o", "final_state"])
    assert call(fla_ops.delta_rule, inputs, backend=backend).o.abs().max() > 1e3


def test_a_state_in_a_low_precision_is_not_modified(backend):
    x = random_inputs(T=5, state=torch.bfloat16)
    before = x["initial_state"].clone()
    final = call(fla_ops.delta_rule, x, output_final_state=True, backend=backend).final_state
    assert final.dtype == torch.float32
    assert torch.equal(x["initial_state"], before)


@pytest.fixture
def values_checked():
    fla_ops.check_values(True)
    yield
    fla_ops.check_values(False)


def test_checked_values_change_nothing_on_cpu(backend, values_checked):
    with pytest.raises(ValueError, match="cu_seqlens"):
        delta_rule(packed(cu_seqlens=cu(0, 11)))(backend)
    delta_rule(packed())(backend)
