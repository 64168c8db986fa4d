# SPDX-License-Identifier: Apache-2.0
"""Mamba's selective scan: the public functions and their autograd boundary."""

from functools import partial
from typing import NamedTuple

import torch

from . import _checks
from ._autograd import first_order_only
from ._backend import Backend, resolve

_BACKENDS = (
    Backend("triton", "fla_ops.kernels.selective_scan", ("cuda",), on_request=("cpu",), switch="TRITON_INTERPRET"),
    Backend("native", "fla_ops._native.selective_scan", devices=("cpu", "cuda")),
    Backend("reference", "fla_ops.reference.selective_scan"),
)


class SelectiveScanOutput(NamedTuple):
    y: torch.Tensor
    final_state: torch.Tensor | None


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, backend, grad_mode
    ):
        impl = resolve("selective_scan", backend, u.device.type, u.dtype, A.shape[1])
        inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
        save = grad_mode and any(ctx.needs_input_grad)
        y, final_state, states = impl.forward(*inputs, delta_softplus=delta_softplus, save_states=save)
        if save:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs, states)
            ctx.delta_softplus, ctx.impl = delta_softplus, impl
        return y, final_state

    @staticmethod
    @first_order_only("selective_scan")
    def backward(ctx, dy, dfinal_state):
        needs = ctx.needs_input_grad[:9]
        if dy is None:  # only the final state was used
            dy = torch.zeros_like(ctx.saved_tensors[0])
        options = {"delta_softplus": ctx.delta_softplus, "needs": needs}
        grads = ctx.impl.backward(*ctx.saved_tensors, dy, dfinal_state, **options)
        return *grads, None, None, None, None


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> SelectiveScanOutput:
    r"""Mamba's selective scan (S6) over whole sequences. Differentiable in every tensor.

    For each sequence and channel d, with a state :math:`h \in R^N`,

        step_t = softplus(delta_t + delta_bias_d)
        h_t = exp(step_t A_d) h_{t-1} + step_t u_t B_t
        y_t = (C_t . h_t + D_d u_t) silu(z_t)

    (arXiv 2312.00752, equation 2 with Euler's rule for the input, as the released code has it). The softplus, D, z and
    delta_bias are optional. The state does not grow while step_t A <= 0.

    Memory is one state a chunk of steps beside the inputs and y: the states of all steps are never written.

    Args:
        u: input, `[B, Di, L]`. The Triton kernels read channels innermost, copy
            other layouts first, and return y so; the native ones read any layout, and y has u's.
        delta: step sizes before bias and softplus, `[B, Di, L]`.
        A: `[Di, N]`, N from 1 to 256 (larger runs on the reference), u's dtype or float32; real, usually negative.
        B, C: `[B, N, L]`, one for all channels; `[B, G, N, L]`, one for each of G groups of Di / G consecutive
            channels; or `[Di, N]`, constant in time (then u's dtype or float32).
        D: the skip, `[Di]`, u's dtype or float32. None: no skip.
        z: the gate, `[B, Di, L]`. None: no gate. u, delta, z and B, C with a time axis share one of float32, bfloat16,
            float16, float64.
        delta_bias: `[Di]`, u's dtype or float32.
        delta_softplus: apply softplus to delta + delta_bias.
        initial_state: `[S, Di, N]`, any float dtype, never modified; S is B, or the number of packed sequences.
        output_final_state: also return the state after the last step.
        cu_seqlens: int32 or int64 `[S + 1]`, the boundaries of S packed sequences from 0 to L; needs B = 1. Sequences
            may be empty.
        backend: "auto", "triton", "native" or "reference"; a named one runs or raises.

    Returns:
        `(y, final_state)`: y `[B, Di, L]` in u's dtype; final_state `[S, Di, N]` in float32 (float64 for float64), or
        None. With L = 0 the final state is the initial state, or zero.

    Raises:
        ValueError, TypeError: a wrong shape, value, dtype or type; the message names the argument.
        RuntimeError: the named backend cannot run; the message says why.
    """
    op = "selective_scan"
    u, delta, z, *varying = _checks.autocast(u, delta, z, *(w for w in (B, C) if _varies(w)))
    B, C = (varying.pop(0) if _varies(w) else w for w in (B, C))
    _check_tensors(op, u, delta, A, D, z, delta_bias, "L")
    batch, Di, L = u.shape
    N = A.shape[1]
    B, C = (_check_projection(op, name, w, u, N) for name, w in (("B", B), ("C", C)))
    if B.dim() == C.dim() == 4:
        _checks.shape(op, "C", C, dict(zip(("B", "G", "N", "L"), B.shape, strict=True)), "B and C share their groups.")
    _checks.flag(op, "delta_softplus", delta_softplus)
    _checks.flag(op, "output_final_state", output_final_state)
    cu_seqlens = _checks.cu_seqlens(op, cu_seqlens, batch, L, u.device, "L", "S")
    count = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _checks.initial_state(op, initial_state, {"S": count, "Di": Di, "N": N}, u.device, "S")
    impl = resolve(op, backend, u.device.type, u.dtype, N)
    if hasattr(impl, "selective_scan"):  # the reference: plain torch, differentiable as it is
        options = {"z": z, "delta_bias": delta_bias, "delta_softplus": delta_softplus, "cu_seqlens": cu_seqlens}
        options |= {"initial_state": initial_state, "output_final_state": output_final_state}
        y, final_state = impl.selective_scan(u, delta, A, B, C, D, **options)
    else:
        grad_mode = torch.is_grad_enabled()  # always off inside of a Function's forward
        inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
        y, final_state = _SelectiveScan.apply(*inputs, delta_softplus, backend, grad_mode)
    return SelectiveScanOutput(y, final_state if output_final_state else None)


def selective_scan_step(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    state: torch.Tensor,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    state_indices: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """One step of `selective_scan` for inference, no time axis; the state is updated in place.

    Args:
        u, delta, z: `[B, Di]`. A: `[Di, N]`. D, delta_bias: `[Di]`. Dtypes as in `selective_scan`.
        B, C: `[B, N]`, `[B, G, N]`, or `[Di, N]`, the same for every sequence. Where B = Di, two dimensions mean
            `[B, N]`; `w.expand(B, Di, N)` says the other.
        state: `[B or slots, Di, N]`, any float dtype, written in place.
        delta_softplus, backend: as in `selective_scan`.
        state_indices: int32 or int64 `[B]`, the slot of each row; -1 skips the row: its state stays, its output is 0.

    Returns:
        y `[B, Di]` in u's dtype.

    Raises:
        RuntimeError: an input requires a gradient while grad mode is on. Otherwise as `selective_scan`.
    """
    op = "selective_scan_step"
    _checks.no_grad_needed(op, u, delta, A, B, C, D, z, delta_bias, state, time="L")
    if state_indices is None and _is_plain_on_cpu(u):
        impl = resolve("selective_scan", backend, "cpu", u.dtype)
        if hasattr(impl, "unchecked_step"):
            options = {"state": state, "z": z, "delta_bias": delta_bias, "delta_softplus": delta_softplus}
            y = _unless_refused(impl.unchecked_step, u, delta, A, B, C, D, **options)
            if y is not None:
                return y
    u, delta, z, B, C = _checks.autocast(u, delta, z, B, C)
    known = _checks.signature(u, delta, A, B, C, D, z, delta_bias, written=state)
    if known is None or known not in _checked_steps:
        _check_step(op, u, delta, A, B, C, D, z, delta_bias, state)
        if known is not None and len(_checked_steps) < MAX_CHECKED_STEPS:
            _checked_steps.add(known)
    batch, Di = u.shape
    N = A.shape[1]
    B, C = _in_groups(B, batch, Di, N), _in_groups(C, batch, Di, N)
    if B.shape[1] != C.shape[1]:  # a constant has a group a channel
        B, C = (w if w.shape[1] == Di else w.repeat_interleave(Di // w.shape[1], 1) for w in (B, C))
    _checks.flag(op, "delta_softplus", delta_softplus)
    state_indices = _checks.state_indices(op, state_indices, batch, state.shape[0], u.device)
    impl = resolve("selective_scan", backend, u.device.type, u.dtype, N)
    run = impl.selective_scan_step if hasattr(impl, "selective_scan_step") else impl.step
    options = {"state": state, "delta_softplus": delta_softplus, "state_indices": state_indices}
    return run(u, delta, A, B, C, D, z=z, delta_bias=delta_bias, **options)


# On a CPU the checks of one token take longer than its arithmetic. The native step refuses by itself whatever they
# refuse for B and C of two dimensions, and what is wrong is asked only then.


def _is_plain_on_cpu(u) -> bool:
    return (
        type(u) is torch.Tensor
        and u.is_cpu
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def _unless_refused(step, u, delta, A, B, C, D, **options) -> torch.Tensor | None:
    try:
        if B.dim() == C.dim() == 2 and type(options["delta_softplus"]) is bool:
            return step(u, delta, A, B, C, D, **options)
    except (AttributeError, TypeError, RuntimeError):  # no tensor among them, or refused
        pass
    return None


def _varies(w) -> bool:
    """Whether B or C has a time axis. A constant is a parameter, like A, which autocast leaves alone."""
    return isinstance(w, torch.Tensor) and w.dim() > 2


def _check_tensors(op, u, delta, A, D, z, delta_bias, time: str | None) -> None:
    """All tensors but B and C. `time` is the letter of the time axis, None for a step."""
    main = {"u": u, "delta": delta} | ({} if z is None else {"z": z})
    _checks.main_tensors(op, "u", **main)
    letters = ("B", "Di", time) if time else ("B", "Di")
    _checks.shape(op, "u", u, dict.fromkeys(letters))
    expected = dict(zip(letters, u.shape, strict=True))
    for name, x in main.items():
        _checks.shape(op, name, x, expected, partial(_hint_on_time, name, x, u))
    _check_real(op, "A", A)
    _checks.side_tensor(op, "A", A, u.dtype)
    _checks.shape(op, "A", A, {"Di": u.shape[1], "N": None}, partial(_hint_on_channels, A, u))
    if A.shape[1] == 0:
        raise _checks.bad(ValueError, op, "A", "of shape [Di, N] with N at least 1", list(A.shape))
    side = {"A": A}
    for name, x in (("D", D), ("delta_bias", delta_bias)):
        if x is not None:
            _checks.side_tensor(op, name, x, u.dtype)
            _checks.shape(op, name, x, {"Di": u.shape[1]})
            side[name] = x
    _checks.same_device(op, "u", u=u, **side)


# What is likely meant by a wrong shape.


def _hint_on_time(name, x, u) -> str:
    turned = x.dim() == 3 and x.shape == (u.shape[0], *u.shape[:0:-1])
    return f"u or {name} looks like [B, L, Di]: transpose(1, 2)." if turned else ""


def _hint_on_channels(A, u) -> str:
    if A.dim() == 2 and u.dim() == 3 and A.shape[0] == u.shape[2]:
        return "u looks like [B, L, Di]: transpose(1, 2)."
    if A.dim() == 2 and A.shape[1] == u.shape[1]:
        return "It looks like [N, Di]: transpose(0, 1)."
    return ""


def _hint_on_projection(w, batch, N, L) -> str:
    if w.shape == (batch, L, N):
        return "It looks like [B, L, N]: transpose(1, 2)."
    if w.dim() == 4 and (w.shape[1], w.shape[3]) == (L, N):
        return "It looks like [B, L, G, N]: permute(0, 2, 3, 1)."
    return "Three dimensions are [B, N, L], four [B, G, N, L], two the constant [Di, N]."


def _check_real(op, name, x) -> None:
    _checks.tensor(op, name, x)
    if x.is_complex():
        hint = "Only the real scan is implemented: complex states were dropped by Mamba's own later models."
        raise _checks.bad(TypeError, op, name, "real", x.dtype, hint)


def _check_projection(op, name, w, u, N):
    """B or C over whole sequences, as `[B, G, N, L]` or the constant `[Di, N]`."""
    batch, Di, L = u.shape
    _check_real(op, name, w)
    if w.dim() == 2:
        _checks.side_tensor(op, name, w, u.dtype)
        _checks.shape(op, name, w, {"Di": Di, "N": N}, partial(_hint_on_projection, w, batch, N, L))
    elif w.dim() in (3, 4):
        _checks.main_tensors(op, "u", u=u, **{name: w})
        groups = {} if w.dim() == 3 else {"G": None}
        hint = partial(_hint_on_projection, w, batch, N, L)
        _checks.shape(op, name, w, {"B": batch} | groups | {"N": N, "L": L}, hint)
        w = w[:, None] if w.dim() == 3 else w
        _check_groups(op, name, w.shape[1], Di)
    else:
        raise _checks.bad(ValueError, op, name, "of shape [B, N, L], [B, G, N, L] or [Di, N]", list(w.shape))
    _checks.same_device(op, "u", u=u, **{name: w})
    return w


# A step takes less time than its checks. What they depend on is the same from token to token.
_checked_steps: set[tuple] = set()
MAX_CHECKED_STEPS = 1000


def _check_step(op, u, delta, A, B, C, D, z, delta_bias, state) -> None:
    """All tensors of a step but state_indices."""
    _check_tensors(op, u, delta, A, D, z, delta_bias, None)
    for name, w in (("B", B), ("C", C)):
        _check_step_projection(op, name, w, u, A.shape[1])
    _checks.step_state(op, state, {"slots": None, "Di": u.shape[1], "N": A.shape[1]}, u.device)


def _is_constant(w, batch, Di, N) -> bool:
    """Whether a step's B or C has no batch axis."""
    return w.dim() == 2 and tuple(w.shape) == (Di, N) and batch != Di


def _in_groups(w, batch, Di, N):
    """B or C of one step, as `[B, G, N]`."""
    if _is_constant(w, batch, Di, N):
        return w.expand(batch, Di, N)
    return w.unsqueeze(1) if w.dim() == 2 else w


def _check_step_projection(op, name, w, u, N) -> None:
    batch, Di = u.shape
    _check_real(op, name, w)
    if _is_constant(w, batch, Di, N):
        _checks.side_tensor(op, name, w, u.dtype)
    elif w.dim() in (2, 3):
        _checks.main_tensors(op, "u", u=u, **{name: w})
        if w.dim() == 2:
            _checks.shape(op, name, w, {"B": batch, "N": N}, f"Or the constant [Di={Di}, N={N}].")
        else:
            _checks.shape(op, name, w, {"B": batch, "G": None, "N": N})
            _check_groups(op, name, w.shape[1], Di)
    else:
        raise _checks.bad(ValueError, op, name, "of shape [B, N], [B, G, N] or [Di, N]", list(w.shape))
    _checks.same_device(op, "u", u=u, **{name: w})


def _check_groups(op, name, groups, channels) -> None:
    if groups == 0 or channels % groups:
        want = f"of a group count that divides Di={channels}"
        raise _checks.bad(ValueError, op, name, want, f"G={groups}")
