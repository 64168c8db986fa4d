# SPDX-License-Identifier: Apache-2.0
"""Launchers as operators: what torch.compile traces in the place of a launch.

A launch depends on addresses (may a descriptor be used?) and on the device (which row of the table?), which a trace
does not know. Eager calls pass the operator by: it would cost more than a small kernel.
"""

import functools
from collections.abc import Callable

import torch

_library = torch.library.Library("fla_ops_triton", "DEF")


def operator(schema: str, empty: Callable) -> Callable:
    """Decorates a launcher: under torch.compile a call of it becomes the operator of this schema.

    `empty` takes the launcher's arguments and returns what it does, not written: a tensor, or for a schema that returns
    Tensor[] a sequence of tensors and None.
    """
    name = schema[: schema.index("(")]

    def decorate(launcher: Callable) -> Callable:
        def run(function: Callable, *args, **kwargs):
            results = function(*args, **kwargs)
            if isinstance(results, torch.Tensor):
                return results
            return [_nothing(args[0]) if x is None else x for x in results]

        _library.define(schema)
        _library.impl(name, functools.partial(run, launcher), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fla_ops_triton::{name}", functools.partial(run, empty), lib=_library)
        traced = getattr(torch.ops.fla_ops_triton, name).default

        @functools.wraps(launcher)
        def call(*args, **kwargs):
            if not torch.compiler.is_compiling():
                return launcher(*args, **kwargs)
            results = traced(*args, **kwargs)
            if isinstance(results, torch.Tensor):
                return results
            return [None if x.dtype == torch.uint8 else x for x in results]

        return call

    return decorate


def _nothing(like: torch.Tensor) -> torch.Tensor:
    """What stands for None in an operator's results. No launcher returns bytes."""
    return like.new_empty(0, dtype=torch.uint8)
