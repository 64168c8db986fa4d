# SPDX-License-Identifier: Apache-2.0
"""What the autograd boundary of every op shares: the refusal of second derivatives."""

import functools
from collections.abc import Callable

import torch


class _Refuse(torch.autograd.Function):
    """The identity, with a backward that raises."""

    @staticmethod
    def forward(ctx, op, *grads):
        ctx.op = op
        return grads

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{ctx.op}: the compiled backends have no second derivative (create_graph=True, gradient penalties, "
            'Hessians). Call it with backend="reference", which is differentiable any number of times.'
        )


def first_order_only(op: str) -> Callable:
    """Decorates the backward of a Function: its results carry a graph whose own backward says what to do instead.

    torch's `once_differentiable` does the same with a text that names no cure, and only if the incoming gradient
    requires a gradient: a penalty on the gradient of `o.sum()` would drop its term in silence.
    """

    def decorate(backward):
        @functools.wraps(backward)
        def run(ctx, *grads):
            with torch.no_grad():
                found = backward(ctx, *grads)
            # While tracing, torch.compile itself refuses a second backward.
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return found
            return _Refuse.apply(op, *(None if x is None else x.detach().requires_grad_() for x in found))

        return run

    return decorate
