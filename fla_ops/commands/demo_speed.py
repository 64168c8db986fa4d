# SPDX-License-Identifier: Apache-2.0
"""Training speed of the demo's model on our kernels, on the naive reference, and on what plain torch has to offer."""

import contextlib
import statistics
import time
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F

from ..layers import _conv as conv_layer
from ..layers import delta_product as product_layer
from ..layers import delta_rule as delta_layer
from ..layers import selective_scan as scan_layer
from .bench_cases import transformers_delta_rule
from .demo_model import LanguageModel
from .demo_train import ROWS, WINDOW, Optimizer, train_step

Tensor = torch.Tensor


def chunked_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor | None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """The chunkwise form with torch operators (arXiv 2412.06464 section 3.3), what one would write without kernels.

    q, k `[B, T, H, K]` normalised, v `[B, T, H, V]`, beta, g `[B, T, H]`, state `[B, H, K, V]` -> (o, state).
    """
    B, T, H, K = q.shape
    pad = -T % chunk
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, pad)).transpose(1, 2).unflatten(2, (-1, chunk)) for x in (q, k, v))
    beta, g = (F.pad(x, (0, 0, 0, pad)).transpose(1, 2).unflatten(2, (-1, chunk)) for x in (beta, g))
    S = q.new_zeros(B, H, K, v.shape[-1]) if state is None else state
    G = g.cumsum(-1)
    lower = torch.ones(chunk, chunk, dtype=torch.bool).tril()
    decay = (G[..., :, None] - G[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    A = beta[..., None] * (k @ k.mT) * decay
    eye = torch.eye(chunk)
    solve = torch.linalg.solve_triangular(A.tril(-1) + eye, eye.expand_as(A), upper=False, unitriangular=True)
    W, U = solve @ (k * (beta * G.exp())[..., None]), solve @ (v * beta[..., None])
    P, outputs = (q @ k.mT) * decay, []
    for i in range(q.shape[2]):
        u = U[:, :, i] - W[:, :, i] @ S
        outputs.append((q[:, :, i] * G[:, :, i, :, None].exp()) @ S + P[:, :, i] @ u)
        last = G[:, :, i, -1:]
        S = S * last[..., None].exp() + (k[:, :, i] * (last - G[:, :, i])[..., None].exp()).mT @ u
    o = torch.stack(outputs, 2).flatten(2, 3)[:, :, :T].transpose(1, 2)
    return o * K**-0.5, S


def product_by(function, q, k, v, beta, g, state, num_householder: int) -> tuple[Tensor, Tensor]:
    """DeltaProduct through a `function` for the delta rule, as one writes it without a kernel (arXiv 2502.10297): a
    token per micro-step, the gate on a token's first, the query on its last, the other outputs thrown away."""
    n = num_householder
    q = F.pad(q[:, :, None], (0, 0, 0, 0, n - 1, 0)).flatten(1, 2)
    g = F.pad(g[:, :, None], (0, 0, 0, n - 1)).flatten(1, 2)
    o, state = function(q, k, v, beta, g, state)
    return o[:, n - 1 :: n], state


def _own(q, k, v, beta, g, state):
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    return chunked_delta_rule(q, k, v, beta, g, state)


def stepwise_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    z: Tensor,
    delta_bias: Tensor,
    initial_state: Tensor | None,
    **_,
) -> tuple[Tensor, Tensor]:
    """The selective scan with torch operators, everything but the recurrence on all steps at once.

    Of such forms a loop is the fastest on a CPU, forward and backward, if no step takes a slice: the gradient of each
    would be as long as the sequence. Two forms of a parallel scan took two to five times as long.
    """
    delta = F.softplus(delta + delta_bias[:, None])
    decays = (delta[..., None] * A[:, None]).exp().unbind(2)
    writes = ((delta * u)[..., None] * B.transpose(1, 2)[:, None]).unbind(2)
    h = torch.zeros_like(writes[0]) if initial_state is None else initial_state
    states = []
    for decay, write in zip(decays, writes, strict=True):
        h = decay * h + write
        states.append(h)
    y = torch.einsum("bdln,bnl->bdl", torch.stack(states, 2), C) + D[:, None] * u
    return y * F.silu(z), h


def plain_torch(mixer: str) -> tuple[str, object]:
    """(name, function for the delta rule) of what one has without kernels: the chunked form, transformers' where it is
    installed, else our own; for Mamba the step loop."""
    if mixer == "mamba":
        return "plain torch, step by step", None
    found = transformers_delta_rule()
    if isinstance(found, str):
        return "plain torch, chunked", _own

    def theirs(q, k, v, beta, g, state):
        options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        return found[0](q, k, v, g=g, beta=beta, **options)

    return "plain torch, transformers' chunked", theirs


@contextlib.contextmanager
def _layers_on(function) -> Iterator[None]:
    """For the timing alone: the layers call `function`, and F.conv1d, in place of our ops."""

    def delta(q, k, v, beta, g=None, *, initial_state, **_):
        g = torch.zeros_like(beta) if g is None else g
        return function(q, k, v, beta, g, initial_state)

    def product(q, k, v, beta, g=None, *, num_householder, initial_state, **_):
        g = beta.new_zeros(*q.shape[:2], beta.shape[2]) if g is None else g
        return product_by(function, q, k, v, beta, g, initial_state, num_householder)

    def conv(x, weight, bias=None, *, initial_state=None, output_final_state=False, activation=None, **_):
        state = x.new_zeros(*x.shape[:2], weight.shape[1] - 1) if initial_state is None else initial_state
        x = torch.cat([state, x], -1)
        y = F.conv1d(x, weight[:, None], bias, groups=x.shape[1])
        return (F.silu(y) if activation else y), x[..., 1 - weight.shape[1] :]

    with (
        mock.patch.object(scan_layer, "selective_scan", stepwise_scan),
        mock.patch.object(scan_layer, "recomputing_scan", lambda *_: None),
        mock.patch.object(delta_layer, "delta_rule", delta),
        mock.patch.object(product_layer, "delta_product", product),
        mock.patch.object(conv_layer, "causal_conv1d", conv),
    ):
        yield


def training_speed(model: LanguageModel, mixer: str, tokens: Tensor, seconds: float) -> dict[str, float]:
    """Name -> training tokens a second, from medians of steps that take turns for about `seconds` each."""
    plain, function = plain_torch(mixer)
    runs = {
        "fla_ops kernels": ("auto", contextlib.nullcontext()),
        plain: ("auto", None),
        "naive reference": ("reference", contextlib.nullcontext()),
    }
    steps = {}
    for name, (backend, context) in runs.items():
        copy = LanguageModel(mixer, backend)
        copy.load_state_dict(model.state_dict())
        steps[name] = (copy, Optimizer(copy), context)
    times: dict[str, list[float]] = {name: [] for name in steps}
    deadline = time.perf_counter() + seconds * len(steps)
    # The first turn warms up. Who has two turns and no time left waits: asking anyone for a third would never end.
    while time.perf_counter() < deadline or any(len(t) < 2 for t in times.values()):
        for name, (copy, optimizer, context) in steps.items():
            if sum(times[name]) > seconds and len(times[name]) > 1:
                continue
            with context or _layers_on(function):
                start = time.perf_counter()
                train_step(copy, optimizer, tokens, None, 0.99)
                times[name].append(time.perf_counter() - start)
    return {name: ROWS * WINDOW / statistics.median(t[1:]) for name, t in times.items()}
