# SPDX-License-Identifier: Apache-2.0
"""The delta rule inside the rest of PyTorch: compile, export, opcheck, autocast, checkpointing, DDP, copies."""

import copy
import io
import itertools
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddp_worker import MODELS, Mixer, gradients
from delta_rule_cases import TENSORS, bounds, call, leaves, random_cotangents, random_inputs, results
from torch.utils.checkpoint import checkpoint

import fla_ops

TOKENS = TENSORS[:5]
# Dynamo itself instantiates autograd.Function, which torch deprecates.
compiles = [
    pytest.mark.no_poison,
    pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]


def compiled_tests(test):
    for mark in compiles:
        test = mark(test)
    return test


@pytest.fixture(autouse=True)
def no_leftover_graphs():
    yield
    torch._dynamo.reset()


def whole(q, k, v, beta, g, initial_state, backend):
    options = {"initial_state": initial_state, "output_final_state": True, "qk_l2norm": True, "backend": backend}
    return fla_ops.delta_rule(q, k, v, beta, g, **options)


def trained(op, x, backend):
    """o, the final state and all gradients of one forward and backward."""
    leaf = leaves(x)
    o, final = op(*leaf.values(), backend)
    (o.square().sum() + final.square().sum()).backward()
    return [o, final, *(t.grad for t in leaf.values())]


def assert_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# torch.compile.


@compiled_tests
def test_compiles_whole_without_recompiling_for_lengths(native):
    """One graph, forward and backward, for every T."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    op = torch.compile(whole, fullgraph=True, dynamic=True, backend=counter)
    for T in (130, 64, 65, 7, 200):
        x = random_inputs(B=2, T=T, HV=4, K=20, V=12, state=torch.float32)
        assert_close(trained(op, x, native), trained(whole, x, native))
    assert counter.frame_count == 1


@compiled_tests
def test_compiles_with_static_lengths_once_then_dynamic(native):
    """Default settings: the second length makes T dynamic; one block or several are two graphs; then never again."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    op = torch.compile(whole, fullgraph=True, backend=counter)
    for T in (130, 64, 65, 33, 200, 90, 2, 500):
        trained(op, random_inputs(T=T, state=torch.float32), native)
    assert counter.frame_count <= 3


@compiled_tests
@pytest.mark.slow
def test_compiles_with_inductor(native):
    op = torch.compile(whole, fullgraph=True)
    x = random_inputs(B=2, T=70, HV=4, K=20, V=12, state=torch.float32)
    assert_close(trained(op, x, native), trained(whole, x, native))


@compiled_tests
@pytest.mark.parametrize("backend_name", ["auto", "native", "reference"])
def test_compiles_with_packed_sequences(backend_name, native):
    cu = bounds([3, 0, 4])
    x = random_inputs(T=7, K=8, V=8)

    def op(q, k, v, beta, g):
        return fla_ops.delta_rule(q, k, v, beta, g, cu_seqlens=cu, backend=backend_name).o

    if backend_name == "reference":  # reads the boundaries into Python, so it cannot be one graph
        compiled = torch.compile(op, backend="eager")
    else:
        compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    tokens = [x[n] for n in TOKENS]
    torch.testing.assert_close(compiled(*tokens), op(*tokens))


@compiled_tests
def test_compiles_the_step(native):
    x = random_inputs(B=2, T=1, state=torch.float32)
    tokens = [x[n][:, 0] for n in TOKENS]
    eager, compiled = x["initial_state"].clone(), x["initial_state"].clone()

    def step(state, *tokens):
        return fla_ops.delta_rule_step(*tokens, state=state, backend=native)

    with torch.no_grad():
        expected = step(eager, *tokens)
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, *tokens)
    assert torch.equal(found, expected)
    assert torch.equal(compiled, eager)


@compiled_tests
def test_bad_input_is_refused_while_compiling(native):
    x = random_inputs(T=5) | {"beta": torch.zeros(1, 5, 1)}
    with pytest.raises(Exception, match="argument 'beta' must be of shape"):
        torch.compile(whole, fullgraph=True, backend="eager")(*x.values(), native)


# Export, opcheck, torch.func.


@compiled_tests
def test_the_reference_exports():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, beta, g):
            return fla_ops.delta_rule(q, k, v, beta, g, output_final_state=True, backend="reference")

    tokens = [random_inputs(T=4)[n] for n in TOKENS]
    program = torch.export.export(Module(), tuple(tokens))
    assert not [n for n in program.graph.nodes if "fla_ops" in str(n.target)]  # plain aten throughout
    torch.testing.assert_close(tuple(program.module()(*tokens)), tuple(Module()(*tokens)))


@compiled_tests
def test_the_native_backend_exports(native):
    class Module(torch.nn.Module):
        def forward(self, q, k, v, beta, g):
            return fla_ops.delta_rule(q, k, v, beta, g, backend=native).o

    tokens = [random_inputs(T=70)[n] for n in TOKENS]
    with torch.no_grad():
        program = torch.export.export(Module(), tuple(tokens))
        torch.testing.assert_close(program.module()(*tokens), Module()(*tokens))


def raw_calls():
    """Arguments of every raw op of the native library that has a fake, covering its optional arguments."""
    for gate, state, packed, l2norm in ((None, None, False, False), ("normal", torch.float32, True, True)):
        lengths = [30, 0, 36]
        N = len(lengths) if packed else None
        x = random_inputs(T=66, HV=4, K=20, V=12, gate=gate, state=state, sequences=N)
        cu = bounds(lengths) if packed else None
        head = (*(x[n] for n in TOKENS), 0.3, x["initial_state"], cu, l2norm)
        for save in (False, True):
            yield "delta_rule_forward", (*head, save)
        saved = torch.ops.fla_ops.delta_rule_forward(*head, True)[2]
        do, ds = random_cotangents(x, N)
        needs = 63 if state else 63 & ~32
        needs = needs if gate else needs & ~16
        yield "delta_rule_backward", (*head, saved, do, ds, needs)
        yield "delta_rule_backward", (*head, saved, do, ds, 4)
        one = [None if x[n] is None else x[n][:, 0] for n in TOKENS]
        for slots in (None, torch.tensor([0])):
            yield "delta_rule_step", (*one, torch.zeros(1, 4, 20, 12), 0.3, l2norm, slots)


@compiled_tests
def test_opcheck(native):
    seen = set()
    for name, arguments in raw_calls():
        tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        if name == "delta_rule_forward" and arguments[7] is not None and arguments[9]:
            tests.pop()  # compares all of `states`, of which packed sequences leave rows unused
        torch.library.opcheck(getattr(torch.ops.fla_ops, name).default, arguments, test_utils=tests)
        seen.add(name)
    assert seen == {"delta_rule_forward", "delta_rule_backward", "delta_rule_step"}


def test_fakes_have_the_real_shapes_and_dtypes(native):
    """opcheck compares them too; this also covers every dtype."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = random_inputs(B=2, T=70, HV=4, K=20, V=12, dtype=dtype, state=torch.float32)
        real = whole(*x.values(), native)
        with FakeTensorMode() as mode:
            fake = whole(*(mode.from_tensor(t) for t in x.values()), native)
        for f, r in zip(fake, real, strict=True):
            assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())


def test_vmap_works_or_says_why_not(backend):
    x = random_inputs(B=3, T=5, K=4, V=4)
    tokens = [x[n].unsqueeze(1) for n in TOKENS]  # vmapped over rows, each a batch of one

    def op(*tokens):
        return fla_ops.delta_rule(*tokens, backend=backend).o

    if backend == "reference":
        torch.testing.assert_close(torch.vmap(op)(*tokens).squeeze(1), op(*(x[n] for n in TOKENS)))
    else:
        with pytest.raises(RuntimeError, match=r"functorch|vmap"):
            torch.vmap(op)(*tokens)


def test_functional_gradients_of_the_reference():
    x = random_inputs(T=5, K=4, V=4)
    q, *rest = (x[n] for n in TOKENS)

    def loss(q):
        return fla_ops.delta_rule(q, *rest, backend="reference").o.square().sum()

    leaf = q.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(q), leaf.grad)


# Second derivatives.


@pytest.mark.parametrize("through", ["a seed", "ones"])
def test_double_backward_names_its_cure(native, through):
    """Both when the incoming gradient needs a gradient and when only the inputs do (torch's own text misses that)."""
    x = leaves(random_inputs(T=20))
    o = call(fla_ops.delta_rule, x, backend=native).o
    seed = torch.ones_like(o, requires_grad=through == "a seed")
    (grad,) = torch.autograd.grad(o, x["q"], seed, create_graph=True)
    plain = torch.autograd.grad(call(fla_ops.delta_rule, x, backend=native).o.sum(), x["q"])[0]
    assert torch.equal(grad, plain)
    with pytest.raises(RuntimeError, match=r'^delta_rule: .*no second derivative.*backend="reference"'):
        grad.square().sum().backward()


def test_a_gradient_penalty_is_not_dropped_in_silence(native):
    x = leaves(random_inputs(T=20))
    o = call(fla_ops.delta_rule, x, backend=native).o
    (grad,) = torch.autograd.grad(o.sum(), x["v"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (o.sum() + grad.square().sum()).backward()


def test_the_reference_has_a_double_backward():
    x = leaves(random_inputs(T=5))
    o = call(fla_ops.delta_rule, x, backend="reference").o
    (grad,) = torch.autograd.grad(o.sum(), x["q"], create_graph=True)
    grad.square().sum().backward()
    assert x["k"].grad.isfinite().all() and x["k"].grad.any()


def test_backward_twice_needs_retain_graph(backend):
    x = leaves(random_inputs(T=20))
    o = call(fla_ops.delta_rule, x, backend=backend).o.sum()
    o.backward(retain_graph=True)
    once = x["q"].grad.clone()
    o.backward()
    torch.testing.assert_close(x["q"].grad, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        o.backward()


def test_an_input_changed_before_the_backward_is_noticed(backend):
    x = random_inputs(T=20)
    k = x["k"].clone()
    x["q"].requires_grad_()
    o = call(fla_ops.delta_rule, x | {"k": k}, backend=backend).o
    k.zero_()
    if backend == "native":  # the reference keeps rounded copies, so a change cannot hurt it
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            o.sum().backward()


# Autocast, checkpointing, threads of autograd.


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, low):
    """The main tensors are cast; gates and states keep their dtype, gradients come back in the leaf's."""
    x = random_inputs(B=2, T=70, K=24, V=20, state=torch.float32)
    leaf = leaves(x)
    with torch.autocast("cpu", dtype=low):
        o, final = call(fla_ops.delta_rule, leaf, output_final_state=True, backend=backend)
    assert o.dtype == low and final.dtype == torch.float32
    (o.float().sum() + final.sum()).backward()
    cast = leaves({n: t.to(low) if n in ("q", "k", "v") else t for n, t in x.items()})
    o2, final2 = call(fla_ops.delta_rule, cast, output_final_state=True, backend=backend)
    (o2.float().sum() + final2.sum()).backward()
    assert torch.equal(o, o2) and torch.equal(final, final2)
    for name, t in leaf.items():
        assert t.grad.dtype == torch.float32
        assert torch.equal(t.grad, cast[name].grad.float()), name


def test_autocast_takes_mixed_inputs_and_leaves_float64(backend):
    x = random_inputs(T=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(fla_ops.delta_rule, x | {"v": x["v"].bfloat16()}, backend=backend).o.dtype == torch.bfloat16
        wide = {n: None if t is None else t.double() for n, t in x.items()}
        assert call(fla_ops.delta_rule, wide, backend=backend).o.dtype == torch.float64
        state = torch.zeros(1, 2, 16, 16)
        o = fla_ops.delta_rule_step(*(x[n][:, 0] for n in TOKENS), state=state, backend=backend)
        assert o.dtype == torch.bfloat16 and state.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(backend, reentrant):
    torch.manual_seed(1)
    model, x = Mixer(backend=backend), torch.randn(2, 70, 16, requires_grad=True)
    expected = gradients(model, x)
    kept, x.grad = [x.grad, *(g.clone() for g in expected)], None
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    for a, b in zip([x.grad, *(p.grad for p in model.parameters())], kept, strict=True):
        torch.testing.assert_close(a, b)


def test_eval_mode_still_has_gradients(backend):
    model = Mixer(backend=backend).eval()
    assert all(g is not None and g.any() for g in gradients(model, torch.randn(1, 20, 16)))


# Copies and processes.


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "state_dict"])
def test_copies_of_a_model_agree(backend, duplicate):
    model, x = Mixer(backend=backend), torch.randn(1, 20, 16)
    if duplicate == "deepcopy":
        other = copy.deepcopy(model)
    elif duplicate == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other = Mixer(backend=backend)
        other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(model(x), other(x))


def test_results_pickle(backend):
    result = call(fla_ops.delta_rule, random_inputs(T=5), output_final_state=True, backend=backend)
    again = pickle.loads(pickle.dumps(result))
    assert type(again) is fla_ops.DeltaRuleOutput
    assert all(torch.equal(a, b) for a, b in zip(result, again, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_two_processes_of_data_parallel_training(backend, model, tmp_path):
    """Gradients of DDP over two gloo processes are those of the whole batch in one."""
    worker = Path(__file__).with_name("ddp_worker.py")
    arguments = ["2", str(tmp_path / "meeting"), backend, str(tmp_path / "gradients"), model]
    ranks = [
        subprocess.Popen([sys.executable, str(worker), str(rank), *arguments], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    torch.manual_seed(0)
    expected = gradients(MODELS[model](backend), torch.randn(2, 70, 16))
    for rank in range(2):
        for found, grad in zip(torch.load(tmp_path / f"gradients.{rank}"), expected, strict=True):
            torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-6)


def test_python_threads_do_not_disturb_each_other(backend):
    """Four threads, each with its own problem and its own backward."""
    from concurrent.futures import ThreadPoolExecutor

    problems = [random_inputs(T=70 + i, seed=i, state=torch.float32) for i in range(4)]

    def solve(x):
        return results(lambda *a, **o: fla_ops.delta_rule(*a, backend=backend, **o), x, *random_cotangents(x))

    expected = [solve(x) for x in problems]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(solve, itertools.chain(problems, problems)))
    for i, one in enumerate(found):
        for name, t in one.items():
            torch.testing.assert_close(t, expected[i % 4][name])
