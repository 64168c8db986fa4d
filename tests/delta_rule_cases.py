# SPDX-License-Identifier: Apache-2.0
"""Inputs of the delta rule's tests, and the one comparison of a backend with the reference."""

import contextlib
import hashlib
from functools import partial

import torch

import fla_ops
from fla_ops.reference.delta_rule import delta_rule as reference
from fla_ops.testing import assert_matches_reference

TENSORS = ("q", "k", "v", "beta", "g", "initial_state")
SEED = 0


def random_inputs(
    B=1,
    T=70,
    H=2,
    HV=2,
    K=16,
    V=16,
    *,
    dtype=torch.float32,
    gate="normal",
    beta="normal",
    keys="unit",
    state=None,
    side=None,
    sequences=None,
    seed=SEED,
) -> dict[str, torch.Tensor | None]:
    """The six tensors by name.

    gate: None, "normal", "resets" (a tenth of the tokens -inf), or one number for all tokens. beta: "normal" or one
    number. keys: "unit", "parallel" (all within 1e-3 of one direction), "zeros" (some zero rows) or "raw" (not
    normalised). state: dtype of an initial state, or None. side: dtype of beta and g, `dtype` by default. sequences:
    how many packed sequences the state is for.
    """
    r = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=r, dtype=torch.float64)

    q, k, v = randn(B, T, H, K), randn(B, T, H, K), randn(B, T, HV, V)
    if keys == "parallel":
        k = k[:, :1] + 1e-3 * k if T else k
    if keys in ("unit", "parallel"):
        k = k / k.norm(dim=-1, keepdim=True)
    if keys == "zeros":
        k[:, ::3] = 0
        q[:, 1::4] = 0
    rate = torch.sigmoid(randn(B, T, HV)) if beta == "normal" else torch.full((B, T, HV), float(beta))
    g = None
    if gate in ("normal", "resets"):
        g = torch.nn.functional.logsigmoid(randn(B, T, HV) + 3)
        if gate == "resets":
            g = torch.where(torch.rand(B, T, HV, generator=r) < 0.1, -torch.inf, g)
    elif gate is not None:
        g = torch.full((B, T, HV), float(gate))
    side = side or dtype
    N = B if sequences is None else sequences
    return {
        "q": q.to(dtype),
        "k": k.to(dtype),
        "v": v.to(dtype),
        "beta": rate.to(side),
        "g": None if g is None else g.to(side),
        "initial_state": None if state is None else (0.5 * randn(N, HV, K, V)).to(state),
    }


def random_cotangents(inputs, sequences=None, seed=SEED + 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of o and of the final state for `inputs`, in the dtypes that those results have."""
    r = torch.Generator().manual_seed(seed)
    q, v = inputs["q"], inputs["v"]
    K = q.shape[-1]
    N = v.shape[0] if sequences is None else sequences
    do = torch.randn(*q.shape[:2], *v.shape[2:], generator=r, dtype=torch.float64)
    ds = torch.randn(N, v.shape[2], K, v.shape[3], generator=r, dtype=torch.float64)
    return do.to(v.dtype), ds.to(torch.promote_types(v.dtype, torch.float32))


def leaves(inputs, dtype=None, wanted=TENSORS):
    """Fresh leaf copies with the strides of `inputs`, requiring gradients where `wanted`."""

    def leaf(name, x):
        x = x.detach().clone() if dtype is None else x.detach().to(dtype).clone()
        return x.requires_grad_(name in wanted)

    return {name: None if x is None else leaf(name, x) for name, x in inputs.items()}


def call(op, inputs, **options):
    """`op` with the tensors by name."""
    tokens = [inputs[name] for name in TENSORS[:5]]
    return op(*tokens, initial_state=inputs["initial_state"], **options)


def results(op, inputs, do, ds, *, dtype=None, wanted=TENSORS, **options) -> dict[str, torch.Tensor]:
    """o, the final state and the gradients d<name> of every wanted tensor (zeros where nothing depends on it)."""
    x = leaves(inputs, dtype, wanted)
    o, final = call(op, x, output_final_state=True, **options)
    ends = [(y, dy.to(y.dtype)) for y, dy in ((o, do), (final, ds)) if y.requires_grad]
    if ends:
        torch.autograd.backward(*zip(*ends, strict=True))
    found = {"o": o.detach(), "final_state": final.detach()}
    for name in wanted:
        if x[name] is not None:
            grad = x[name].grad
            found[f"d{name}"] = torch.zeros_like(x[name]) if grad is None else grad
    return found


_found: dict = {}  # of `remembered`


def references(inputs, do, ds, *, reference=reference, **options):
    """(ref64, ref_low) of `assert_matches_reference` for every result; not to be written to."""

    def compute():
        dtype = inputs["q"].dtype
        low = dtype if dtype != torch.float64 else None
        with one_thread():
            ref64 = results(reference, inputs, do, ds, dtype=torch.float64, **options)
            return ref64, results(partial(reference, operand_dtype=low), inputs, do, ds, **options)

    return remembered(compute, reference, inputs, do, ds, options)


def remembered(compute, reference, inputs, dy, ds, options):
    """What `compute` returned for the same arguments: every backend and both lane orders ask for the same."""
    named = (x for item in sorted(options.items()) for x in item)
    key = tuple(map(_content, (reference, *inputs.values(), dy, ds, *named)))
    found = _found.pop(key, None) or compute()
    _found[key] = found  # the last of all
    while len(_found) > 100:
        del _found[next(iter(_found))]
    return found


def _content(x):
    """What tells one argument from another."""
    if not isinstance(x, torch.Tensor):
        return x
    bits = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return x.dtype, x.shape, hashlib.sha256(bits.numpy()).digest()


@contextlib.contextmanager
def one_thread():
    """The step loop's tiny products lose by threads, badly so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check(backend, inputs, *, op=None, reference=reference, names=None, device="cpu", **options) -> None:
    """Outputs, final state and all gradients of `backend` on `device` against the float64 reference.

    `op` is `fla_ops.delta_rule` if not given, and `reference` its reference.
    """
    cu = options.get("cu_seqlens")
    do, ds = random_cotangents(inputs, None if cu is None else cu.shape[0] - 1)
    op = partial(op or fla_ops.delta_rule, backend=backend)
    there = options if cu is None else options | {"cu_seqlens": cu.to(device)}
    with one_thread() if backend == "reference" else contextlib.nullcontext():
        actual = results(op, on(device, inputs), do.to(device), ds.to(device), **there)
    ref64, ref_low = references(inputs, do, ds, reference=reference, **options)
    for name in names or actual:
        found, low = actual[name], ref_low[name]
        if found.dtype == torch.float64 != inputs["q"].dtype:  # a float64 state's gradient, computed in float32
            found, low = found.float(), low.float()
        assert_matches_reference(found, ref64[name], low, name, gradient=name.startswith("d"), seed=SEED)


def assert_same_bits(actual, expected):
    """The same results by name, bit for bit; NaN equals NaN."""
    assert actual.keys() == expected.keys()
    for name in expected:
        same = torch.equal(actual[name].nan_to_num(7.5), expected[name].nan_to_num(7.5))
        assert same, f"{name}: max difference {(actual[name] - expected[name]).abs().max().item():.3e}"


def on(device, inputs):
    """`inputs` on another device; the same tensors, strides included, where they are there already."""
    return {name: None if x is None else x.to(device) for name, x in inputs.items()}


def bounds(lengths, dtype=torch.int64) -> torch.Tensor:
    """cu_seqlens of packed sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)
