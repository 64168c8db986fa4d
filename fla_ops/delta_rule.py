# SPDX-License-Identifier: Apache-2.0
"""The delta rule, plain (DeltaNet) and gated (Gated DeltaNet): the public functions and their autograd boundary."""

from typing import NamedTuple

import torch

from . import _checks
from ._autograd import first_order_only
from ._backend import Backend, resolve

_BACKENDS = (
    Backend("triton", "fla_ops.kernels.delta_rule", ("cuda",), on_request=("cpu",), switch="TRITON_INTERPRET"),
    Backend("native", "fla_ops._native.delta_rule", devices=("cpu", "cuda")),
    Backend("reference", "fla_ops.reference.delta_rule"),
)


class DeltaRuleOutput(NamedTuple):
    o: torch.Tensor
    final_state: torch.Tensor | None


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, g, initial_state, cu_seqlens, scale, qk_l2norm, backend, grad_mode):
        impl = resolve("delta_rule", backend, q.device.type, q.dtype, q.shape[-1], v.shape[-1])
        inputs = (q, k, v, beta, g, initial_state, cu_seqlens)
        save = grad_mode and any(ctx.needs_input_grad)
        o, final_state, states = impl.forward(*inputs, scale=scale, qk_l2norm=qk_l2norm, save_states=save)
        if save:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs, states)
            ctx.scale, ctx.qk_l2norm, ctx.impl = scale, qk_l2norm, impl
        return o, final_state

    @staticmethod
    @first_order_only("delta_rule")
    def backward(ctx, do, dfinal_state):
        if do is None:  # only the final state was used
            v = ctx.saved_tensors[2]
            do = v.new_zeros(v.shape)
        grads = ctx.impl.backward(
            *ctx.saved_tensors,
            do,
            dfinal_state,
            scale=ctx.scale,
            qk_l2norm=ctx.qk_l2norm,
            needs=ctx.needs_input_grad[:6],
        )
        return *grads, None, None, None, None, None


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    qk_l2norm: bool = False,
    backend: str = "auto",
) -> DeltaRuleOutput:
    r"""Delta-rule attention over whole sequences, differentiable in every tensor.

    For each sequence and value head, with a state :math:`S \in R^{K \times V}`,

        S_t = e^{g_t} S_{t-1} + k_t u_t^T,   u_t = beta_t (v_t - (e^{g_t} S_{t-1})^T k_t),   o_t = scale S_t^T q_t

    (arXiv 2406.06484 eq. 2 for g = 0, arXiv 2412.06464 eq. 10). It stays bounded while beta_t |k_t|^2 <= 2.

    Args:
        q, k: queries and keys, `[B, T, H, K]`, K from 1 to 256 (larger runs on the reference).
        v: values, `[B, T, HV, V]`, V from 1 to 256; HV a multiple of H. Value head hv reads query and key head
            `hv // (HV // H)`. q, k and v share one of float32, bfloat16, float16, float64.
        beta: writing strength, `[B, T, HV]`, q's dtype or float32. Usually in (0, 1); (0, 2) allows negative
            eigenvalues. Not clamped.
        g: natural-log decay, `[B, T, HV]`, <= 0, q's dtype or float32. -inf resets the state exactly. None: no decay.
        scale: multiplies q; default `K ** -0.5`.
        initial_state: `[N, HV, K, V]`, any float dtype, never modified; N is B, or the number of packed sequences.
        output_final_state: also return the state after the last token.
        cu_seqlens: int32 or int64 `[N + 1]`, the boundaries of N packed sequences from 0 to T; needs B = 1.
            Sequences may be empty.
        qk_l2norm: replace q and k by `x / sqrt(sum x^2 + 1e-6)`.
        backend: "auto", "triton", "native" or "reference"; a named one runs or raises.

    Returns:
        `(o, final_state)`: o `[B, T, HV, V]` in q's dtype; final_state `[N, HV, K, V]` in float32 (float64 for
        float64), or None.

    Raises:
        ValueError, TypeError: a wrong shape, value, dtype or type; the message names the argument.
        RuntimeError: the named backend cannot run; the message says why.
    """
    op = "delta_rule"
    q, k, v = _checks.autocast(q, k, v)
    check_tokens(op, q, k, v, beta, g, "T")
    B, T, _, K = q.shape
    scale = _checks.scale_or_default(op, scale, K)
    _checks.flag(op, "qk_l2norm", qk_l2norm)
    _checks.flag(op, "output_final_state", output_final_state)
    cu_seqlens = _checks.cu_seqlens(op, cu_seqlens, B, T, q.device)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sizes = {"N": N, "HV": v.shape[2], "K": K, "V": v.shape[3]}
    _checks.initial_state(op, initial_state, sizes, q.device)
    impl = resolve(op, backend, q.device.type, q.dtype, K, v.shape[3])
    if hasattr(impl, "delta_rule"):  # the reference: plain torch, differentiable as it is
        o, final_state = impl.delta_rule(
            q,
            k,
            v,
            beta,
            g,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            qk_l2norm=qk_l2norm,
        )
    else:
        grad_mode = torch.is_grad_enabled()  # always off inside of a Function's forward
        o, final_state = _DeltaRule.apply(
            q, k, v, beta, g, initial_state, cu_seqlens, scale, qk_l2norm, backend, grad_mode
        )
    return DeltaRuleOutput(o, final_state if output_final_state else None)


def delta_rule_step(
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
    """One token of `delta_rule` for inference, no time axis; the state is updated in place.

    Args:
        q, k: `[B, H, K]`. v: `[B, HV, V]`. beta, g: `[B, HV]`. Dtypes as in `delta_rule`.
        state: `[B or slots, HV, K, V]`, any float dtype, written in place.
        scale, qk_l2norm, backend: as in `delta_rule`.
        state_indices: int32 or int64 `[B]`, the slot of each row; -1 skips the row: its state stays, its output is 0.

    Returns:
        o `[B, HV, V]` in q's dtype.

    Raises:
        RuntimeError: an input requires a gradient while grad mode is on. Otherwise as `delta_rule`.
    """
    op = "delta_rule_step"
    _checks.no_grad_needed(op, q, k, v, beta, g, state)
    q, k, v = _checks.autocast(q, k, v)
    check_tokens(op, q, k, v, beta, g, None)
    B, _, K = q.shape
    HV, V = v.shape[1:]
    scale = _checks.scale_or_default(op, scale, K)
    _checks.flag(op, "qk_l2norm", qk_l2norm)
    _checks.step_state(op, state, {"slots": None, "HV": HV, "K": K, "V": V}, q.device)
    state_indices = _checks.state_indices(op, state_indices, B, state.shape[0], q.device)
    impl = resolve("delta_rule", backend, q.device.type, q.dtype, K, V)
    run = impl.delta_rule_step if hasattr(impl, "delta_rule_step") else impl.step
    return run(q, k, v, beta, g, state=state, scale=scale, qk_l2norm=qk_l2norm, state_indices=state_indices)


def check_tokens(op, q, k, v, beta, g, time: str | None, n: int | None = None) -> None:
    """Shapes and dtypes of the token tensors; `time` is the letter of the time axis, None for a step.

    DeltaProduct's k, v and beta have `n` rows a token: T * n of them, or an axis of n in a step.
    """
    _checks.main_tensors(op, "q", q=q, k=k, v=v)
    lead = ("B", time) if time else ("B",)
    dims = len(lead) + 2
    if q.dim() != dims:
        raise _checks.bad(ValueError, op, "q", f"of shape [{', '.join((*lead, 'H', 'K'))}]", list(q.shape))
    token = dict(zip(lead, q.shape, strict=False))
    sizes, hint = token, "Shapes are those of q."
    if n is not None:
        sizes = {"B": token["B"]} | ({f"{time}*n": token[time] * n} if time else {"n": n})
        hint = f"It has {n} rows for each token of q."
        if time and k.dim() == 5 and k.shape[1:3] == (token[time], n):
            hint = "It looks like [B, T, n, H, K]: flatten(1, 2)."
    H, K = q.shape[-2:]
    _checks.shape(op, "k", k, sizes | {"H": H, "K": K}, hint)
    hint = "Its leading sizes are those of q." if n is None else "Its leading sizes are those of k."
    _checks.shape(op, "v", v, sizes | {"HV": None, "V": None}, hint)
    HV = v.shape[-2]
    if H == 0 or HV == 0 or HV % H:
        raise _checks.bad(ValueError, op, "v", f"of a head count that is a multiple of H={H}", f"HV={HV}")
    if K == 0 or v.shape[-1] == 0:
        raise _checks.bad(ValueError, op, "q" if K == 0 else "v", "of a head dimension >= 1", 0)
    for name, x, lead_sizes in (("beta", beta, sizes), ("g", g, token)):
        if x is None and name == "g":
            continue
        _checks.side_tensor(op, name, x, q.dtype)
        hint = "There is no broadcasting: use expand."
        # Under torch.compile the lengths that agree are one symbol: the rest of the condition then guards nothing.
        rows = list(lead_sizes.values())[-1]
        if time and x.dim() == 3 and x.shape[1] != rows and tuple(x.shape) == (q.shape[0], HV, rows):
            hint = "It looks like [B, HV, T]: transpose(1, 2)."
        _checks.shape(op, name, x, lead_sizes | {"HV": HV}, hint)
    _checks.same_device(op, "q", q=q, k=k, v=v, beta=beta, g=g)
