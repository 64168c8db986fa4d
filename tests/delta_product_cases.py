# SPDX-License-Identifier: Apache-2.0
"""Inputs of DeltaProduct's tests; comparisons with the reference are those of `delta_rule_cases`."""

import delta_rule_cases
import torch

import fla_ops
from fla_ops.reference.delta_product import delta_product as reference

# How many rows a token has in each of the tensors by name: 1, or n.
MICRO = ("k", "v", "beta")


def random_inputs(n=2, B=1, T=30, H=2, HV=2, K=16, V=16, **options) -> dict[str, torch.Tensor | None]:
    """The six tensors by name, k, v and beta with n rows a token; options as in `delta_rule_cases.random_inputs`."""
    x = delta_rule_cases.random_inputs(B, T * n, H, HV, K, V, **options)
    for name in ("q", "g"):
        if x[name] is not None:
            x[name] = x[name][:, :T].contiguous()
    return x


def check(backend, n, inputs, **options) -> None:
    """Outputs, final state and all gradients of `backend` against the float64 reference."""
    options |= {"op": fla_ops.delta_product, "reference": reference, "num_householder": n}
    delta_rule_cases.check(backend, inputs, **options)


def interleaved(x, n) -> dict[str, torch.Tensor | None]:
    """The delta rule of T * n tokens whose outputs at every n-th token are DeltaProduct's: queries and gates are spread
    out over zeros, the query to a token's last micro-step, the gate to its first."""

    def spread(t, at):
        if t is None:
            return None
        wide = t.new_zeros(t.shape[0], t.shape[1], n, *t.shape[2:])
        wide[:, :, at] = t
        return wide.flatten(1, 2)

    return x | {"q": spread(x["q"], n - 1), "g": spread(x["g"], 0)}
