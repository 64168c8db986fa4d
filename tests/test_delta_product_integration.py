# SPDX-License-Identifier: Apache-2.0
"""DeltaProduct inside the rest of PyTorch: compile, opcheck, fakes, second derivatives, autocast."""

import pytest
import torch
from delta_product_cases import MICRO, random_inputs
from delta_rule_cases import TENSORS, bounds, call, leaves, random_cotangents
from test_torch_integration import assert_close, compiled_tests, no_leftover_graphs  # noqa: F401 - a fixture

import fla_ops

OP = "delta_product"
TOKENS = TENSORS[:5]


def whole(q, k, v, beta, g, initial_state, n, backend):
    options = {"initial_state": initial_state, "output_final_state": True, "qk_l2norm": True, "backend": backend}
    return fla_ops.delta_product(q, k, v, beta, g, num_householder=n, **options)


def trained(op, x, n, backend):
    """o, the final state and all gradients of one forward and backward."""
    leaf = leaves(x)
    o, final = op(*leaf.values(), n, backend)
    (o.square().sum() + final.square().sum()).backward()
    return [o, final, *(t.grad for t in leaf.values())]


@compiled_tests
@pytest.mark.parametrize("n", [1, 3])
def test_compiles_whole_without_recompiling_for_lengths(native, n):
    """One graph, forward and backward, for every T."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    op = torch.compile(whole, fullgraph=True, dynamic=True, backend=counter)
    for T in (70, 64, 65, 7, 130):
        x = random_inputs(n, B=2, T=T, HV=4, K=20, V=12, state=torch.float32)
        assert_close(trained(op, x, n, native), trained(whole, x, n, native))
    assert counter.frame_count == 1


@compiled_tests
@pytest.mark.slow
def test_compiles_with_inductor(native):
    op = torch.compile(whole, fullgraph=True)
    x = random_inputs(2, B=2, T=30, HV=4, K=20, V=12, state=torch.float32)
    assert_close(trained(op, x, 2, native), trained(whole, x, 2, native))


@compiled_tests
@pytest.mark.parametrize("backend_name", ["auto", "native"])
def test_compiles_with_packed_sequences(backend_name, native):
    cu = bounds([3, 0, 4])
    x = random_inputs(2, T=7, K=8, V=8)

    def op(q, k, v, beta, g):
        return fla_ops.delta_product(q, k, v, beta, g, num_householder=2, cu_seqlens=cu, backend=backend_name).o

    tokens = [x[name] for name in TOKENS]
    torch.testing.assert_close(torch.compile(op, backend="aot_eager", fullgraph=True)(*tokens), op(*tokens))


def one_token(x):
    return [x[name] if x[name] is None or name in MICRO else x[name][:, 0] for name in TOKENS]


@compiled_tests
def test_compiles_the_step(native):
    x = random_inputs(3, B=2, T=1, state=torch.float32)
    eager, compiled = x["initial_state"].clone(), x["initial_state"].clone()

    def step(state, *tokens):
        return fla_ops.delta_product_step(*tokens, state=state, backend=native)

    with torch.no_grad():
        expected = step(eager, *one_token(x))
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, *one_token(x))
    assert torch.equal(found, expected)
    assert torch.equal(compiled, eager)


@compiled_tests
def test_bad_input_is_refused_while_compiling(native):
    x = random_inputs(2, T=5) | {"beta": torch.zeros(1, 5, 2)}
    with pytest.raises(Exception, match="argument 'beta' must be of shape"):
        torch.compile(whole, fullgraph=True, backend="eager")(*x.values(), 2, native)


def raw_calls():
    """Arguments of every raw op of the native library that has a fake, covering its optional arguments."""
    for n, gate, state, packed, l2norm in ((2, None, None, False, False), (3, "normal", torch.float32, True, True)):
        lengths = [15, 0, 18]
        N = len(lengths) if packed else None
        x = random_inputs(n, T=33, HV=4, K=20, V=12, gate=gate, state=state, sequences=N)
        cu = bounds(lengths) if packed else None
        head = (*(x[name] for name in TOKENS), n, 0.3, x["initial_state"], cu, l2norm)
        for save in (False, True):
            yield "delta_product_forward", (*head, save)
        saved = torch.ops.fla_ops.delta_product_forward(*head, True)[2]
        do, ds = random_cotangents(x, N)
        needs = (63 if state else 63 & ~32) & (63 if gate else 63 & ~16)
        yield "delta_product_backward", (*head, saved, do, ds, needs)
        yield "delta_product_backward", (*head, saved, do, ds, 4)
        token = one_token({name: None if t is None else t[:, : n if name in MICRO else 1] for name, t in x.items()})
        for slots in (None, torch.tensor([0])):
            yield "delta_product_step", (*token, torch.zeros(1, 4, 20, 12), 0.3, l2norm, slots)


@compiled_tests
def test_opcheck(native):
    seen = set()
    for name, arguments in raw_calls():
        tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        if name == "delta_product_forward" and arguments[8] is not None and arguments[10]:
            tests.pop()  # compares all of `states`, of which packed sequences leave rows unused
        torch.library.opcheck(getattr(torch.ops.fla_ops, name).default, arguments, test_utils=tests)
        seen.add(name)
    assert seen == {"delta_product_forward", "delta_product_backward", "delta_product_step"}


def test_fakes_have_the_real_shapes_and_dtypes(native):
    """opcheck compares them too; this also covers every dtype."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = random_inputs(2, B=2, T=35, HV=4, K=20, V=12, dtype=dtype, state=torch.float32)
        real = whole(*x.values(), 2, native)
        with FakeTensorMode() as mode:
            fake = whole(*(mode.from_tensor(t) for t in x.values()), 2, native)
        for f, r in zip(fake, real, strict=True):
            assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())


def test_double_backward_names_its_cure(native):
    x = leaves(random_inputs(2, T=20))
    o = call(fla_ops.delta_product, x, num_householder=2, backend=native).o
    (grad,) = torch.autograd.grad(o.sum(), x["q"], create_graph=True)
    with pytest.raises(RuntimeError, match=r'^delta_product: .*no second derivative.*backend="reference"'):
        grad.square().sum().backward()


def test_an_input_changed_before_the_backward_is_noticed(native):
    x = random_inputs(2, T=20)
    k = x["k"].clone()
    x["q"].requires_grad_()
    o = call(fla_ops.delta_product, x | {"k": k}, num_householder=2, backend=native).o
    k.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, low):
    """The main tensors are cast; gates and states keep their dtype, gradients come back in the leaf's."""
    x = random_inputs(2, B=2, T=30, K=24, V=20, state=torch.float32)
    leaf = leaves(x)
    options = {"num_householder": 2, "output_final_state": True, "backend": backend}
    with torch.autocast("cpu", dtype=low):
        o, final = call(fla_ops.delta_product, leaf, **options)
    assert o.dtype == low and final.dtype == torch.float32
    (o.float().sum() + final.sum()).backward()
    cast = leaves({name: t.to(low) if name in ("q", "k", "v") else t for name, t in x.items()})
    o2, final2 = call(fla_ops.delta_product, cast, **options)
    (o2.float().sum() + final2.sum()).backward()
    assert torch.equal(o, o2) and torch.equal(final, final2)
    for name, t in leaf.items():
        assert t.grad.dtype == torch.float32
        assert torch.equal(t.grad, cast[name].grad.float()), name
