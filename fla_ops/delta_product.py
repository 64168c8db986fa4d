# SPDX-License-Identifier: Apache-2.0
"""DeltaProduct, plain and gated: the public functions and their autograd boundary."""

import operator
from typing import NamedTuple

import torch

from . import _checks
from ._autograd import first_order_only
from ._backend import Backend, resolve
from .delta_rule import check_tokens, delta_rule, delta_rule_step

_BACKENDS = (
    Backend("triton", "fla_ops.kernels.delta_product", ("cuda",), on_request=("cpu",), switch="TRITON_INTERPRET"),
    Backend("native", "fla_ops._native.delta_product", devices=("cpu", "cuda")),
    Backend("reference", "fla_ops.reference.delta_product"),
)
MAX_HOUSEHOLDER = 8


class DeltaProductOutput(NamedTuple):
    o: torch.Tensor
    final_state: torch.Tensor | None


class _DeltaProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, k, v, beta, g, initial_state, cu_seqlens, num_householder, scale, qk_l2norm, backend, grad_mode
    ):
        impl = resolve("delta_product", backend, q.device.type, q.dtype, q.shape[-1], v.shape[-1])
        inputs = (q, k, v, beta, g, initial_state, cu_seqlens)
        save = grad_mode and any(ctx.needs_input_grad)
        ctx.options = {"num_householder": num_householder, "scale": scale, "qk_l2norm": qk_l2norm}
        o, final_state, states = impl.forward(*inputs, **ctx.options, save_states=save)
        if save:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs, states)
            ctx.impl = impl
        return o, final_state

    @staticmethod
    @first_order_only("delta_product")
    def backward(ctx, do, dfinal_state):
        needs = ctx.needs_input_grad[:6]
        if do is None:  # only the final state was used
            q, _, v = ctx.saved_tensors[:3]
            do = v.new_zeros(*q.shape[:2], *v.shape[2:])
        grads = ctx.impl.backward(*ctx.saved_tensors, do, dfinal_state, **ctx.options, needs=needs)
        return *grads, None, None, None, None, None, None


def delta_product(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    num_householder: int,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    qk_l2norm: bool = False,
    backend: str = "auto",
) -> DeltaProductOutput:
    r"""DeltaProduct over whole sequences: n delta-rule steps a token. Differentiable in every tensor.

    For each sequence and value head, with a state :math:`S \in R^{K \times V}` and n = num_householder,

        S_{t,0} = e^{g_t} S_{t-1}
        S_{t,j} = (I - beta_{t,j} k_{t,j} k_{t,j}^T) S_{t,j-1} + beta_{t,j} k_{t,j} v_{t,j}^T,   j = 1..n
        S_t = S_{t,n},   o_t = scale S_t^T q_t

    (arXiv 2502.10297, section 3). The gate acts once a token, before the first micro-step; the query reads once,
    after the last, and costs no more for a larger n. The state stays bounded while beta |k|^2 <= 2. n = 1 is
    `delta_rule`, bit for bit.

    Args:
        q: queries, `[B, T, H, K]`, K from 1 to 256 (larger runs on the reference).
        k: keys, `[B, T * n, H, K]`: the n keys of token t are rows `n * t` to `n * t + n - 1`, in the order in which
            they act. `k.flatten(1, 2)` makes that of `[B, T, n, H, K]`.
        v: values, `[B, T * n, HV, V]`, V from 1 to 256; HV a multiple of H. Value head hv reads query and key head
            `hv // (HV // H)`. q, k and v share one of float32, bfloat16, float16, float64.
        beta: writing strength, `[B, T * n, HV]`, q's dtype or float32. In (0, 2), of which (1, 2) gives negative
            eigenvalues; 2 reflects. Not clamped.
        g: natural-log decay, `[B, T, HV]`, <= 0, q's dtype or float32. -inf resets the state exactly. None: no decay.
        num_householder: n, the micro-steps a token, from 1 to 8.
        scale: multiplies q; default `K ** -0.5`.
        initial_state: `[N, HV, K, V]`, any float dtype, never modified; N is B, or the number of packed sequences.
        output_final_state: also return the state after the last token.
        cu_seqlens: int32 or int64 `[N + 1]`, the boundaries of N packed sequences from 0 to T, counted in tokens, not
            in micro-steps; needs B = 1. Sequences may be empty.
        qk_l2norm: replace q and k by `x / sqrt(sum x^2 + 1e-6)`.
        backend: "auto", "triton", "native" or "reference"; a named one runs or raises.

    Returns:
        `(o, final_state)`: o `[B, T, HV, V]` in q's dtype; final_state `[N, HV, K, V]` in float32 (float64 for
        float64), or None.

    Raises:
        ValueError, TypeError: a wrong shape, value, dtype or type; the message names the argument.
        RuntimeError: the named backend cannot run; the message says why.
    """
    op = "delta_product"
    q, k, v = _checks.autocast(q, k, v)
    num_householder = check_householder(op, num_householder)
    check_tokens(op, q, k, v, beta, g, "T", num_householder)
    B, T, _, K = q.shape
    factor = _checks.scale_or_default(op, scale, K)
    _checks.flag(op, "qk_l2norm", qk_l2norm)
    _checks.flag(op, "output_final_state", output_final_state)
    cu_seqlens = _checks.cu_seqlens(op, cu_seqlens, B, T, q.device)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sizes = {"N": N, "HV": v.shape[2], "K": K, "V": v.shape[3]}
    _checks.initial_state(op, initial_state, sizes, q.device)
    options = {"initial_state": initial_state, "cu_seqlens": cu_seqlens, "qk_l2norm": qk_l2norm}
    if num_householder == 1:
        options |= {"scale": scale, "output_final_state": output_final_state, "backend": backend}
        return DeltaProductOutput(*delta_rule(q, k, v, beta, g, **options))
    impl = resolve(op, backend, q.device.type, q.dtype, K, v.shape[3])
    if hasattr(impl, "delta_product"):  # the reference: plain torch, differentiable as it is
        options |= {"scale": factor, "output_final_state": output_final_state}
        options["num_householder"] = num_householder
        o, final_state = impl.delta_product(q, k, v, beta, g, **options)
    else:
        grad_mode = torch.is_grad_enabled()  # always off inside of a Function's forward
        settings = (num_householder, factor, qk_l2norm, backend, grad_mode)
        o, final_state = _DeltaProduct.apply(q, k, v, beta, g, initial_state, cu_seqlens, *settings)
    return DeltaProductOutput(o, final_state if output_final_state else None)


def delta_product_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    state: torch.Tensor,
    scale: float | None = None,
    qk_l2norm: bool = False,
    state_indices: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """One token of `delta_product` for inference, no time axis; the state is updated in place.

    Args:
        q: `[B, H, K]`. k: `[B, n, H, K]`, n from 1 to 8. v: `[B, n, HV, V]`. beta: `[B, n, HV]`. g: `[B, HV]`.
            Dtypes as in `delta_product`.
        state: `[B or slots, HV, K, V]`, any float dtype, written in place.
        scale, qk_l2norm, backend: as in `delta_product`.
        state_indices: int32 or int64 `[B]`, the slot of each row; -1 skips the row: its state stays, its output is 0.

    Returns:
        o `[B, HV, V]` in q's dtype.

    Raises:
        RuntimeError: an input requires a gradient while grad mode is on. Otherwise as `delta_product`.
    """
    op = "delta_product_step"
    _checks.no_grad_needed(op, q, k, v, beta, g, state)
    q, k, v = _checks.autocast(q, k, v)
    _checks.tensor(op, "k", k)
    if k.dim() != 4 or not 1 <= k.shape[1] <= MAX_HOUSEHOLDER:
        want = f"of shape [B, n, H, K] with n from 1 to {MAX_HOUSEHOLDER}"
        raise _checks.bad(ValueError, op, "k", want, list(k.shape))
    n = operator.index(k.shape[1])
    check_tokens(op, q, k, v, beta, g, None, n)
    B, _, K = q.shape
    HV, V = v.shape[2:]
    factor = _checks.scale_or_default(op, scale, K)
    _checks.flag(op, "qk_l2norm", qk_l2norm)
    _checks.step_state(op, state, {"slots": None, "HV": HV, "K": K, "V": V}, q.device)
    state_indices = _checks.state_indices(op, state_indices, B, state.shape[0], q.device)
    options = {"state": state, "qk_l2norm": qk_l2norm, "state_indices": state_indices}
    if n == 1:
        return delta_rule_step(q, k[:, 0], v[:, 0], beta[:, 0], g, **options, scale=scale, backend=backend)
    impl = resolve("delta_product", backend, q.device.type, q.dtype, K, V)
    run = impl.delta_product_step if hasattr(impl, "delta_product_step") else impl.step
    return run(q, k, v, beta, g, **options, scale=factor)


def check_householder(op: str, n: object) -> int:
    """num_householder as a plain int."""
    if isinstance(n, bool) or not isinstance(n, int):
        raise _checks.bad(TypeError, op, "num_householder", "an int", repr(n))
    n = operator.index(n)  # a plain int where torch.compile holds it for dynamic: kernels are chosen by it
    if not 1 <= n <= MAX_HOUSEHOLDER:
        raise _checks.bad(ValueError, op, "num_householder", f"from 1 to {MAX_HOUSEHOLDER}", n)
    return n
