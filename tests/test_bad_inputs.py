# SPDX-License-Identifier: Apache-2.0
"""Bad input gives the documented exception with the argument's name, what was expected and what was got.

One table: (title, call, exception class, pattern of the message). Every row runs on every backend: the checks come
before the dispatch, so that no backend can differ. Nasty but legal input is at the end.
"""

import math

import delta_product_cases
import pytest
import torch
from delta_rule_cases import bounds, call, check, random_inputs

import fla_ops
import fla_ops.layers

B, T, H, HV, K, V = 2, 10, 2, 4, 8, 6
N = 3  # DeltaProduct's steps a token


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
