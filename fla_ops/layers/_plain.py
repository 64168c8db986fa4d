# SPDX-License-Identifier: Apache-2.0
"""Whether a submodule may be read instead of called: only if calling it would do nothing else."""

import torch
from torch import nn
from torch.nn.modules import module as _module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is exactly a `kind`, with plain weight and bias, no hooks, and its class's own forward.

    Adapters (LoRA), parametrisations, pruned, quantised, distributed or offloaded weights all fail one of these.
    """
    return (
        type(module) is kind
        and not any(getattr(module, name) for name in _HOOKS)
        and not _module._has_any_global_hook()
        and "forward" not in module.__dict__
        and all(type(w) in (nn.Parameter, torch.Tensor, type(None)) for w in (module.weight, module.bias))
    )
