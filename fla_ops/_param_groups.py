# SPDX-License-Identifier: Apache-2.0
"""Optimizer groups that respect the marks of recurrent parameters."""

from torch import nn


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for AdamW: parameters that decay, and those marked `_no_weight_decay`, which do not.

    The decay rates and step sizes of a recurrence (A_log, D, dt_bias) carry the mark: pulling them towards zero changes
    how long the layer remembers. Every other parameter is in the first group; frozen ones are in none.

    Args:
        model: any module that holds layers of this package, or marks of its own.
        weight_decay: of the first group.

    Returns:
        `[{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}]`

    Example:
        >>> import torch, fla_ops
        >>> layer = fla_ops.layers.GatedDeltaNet(hidden_size=64, head_dim=16, num_heads=2)
        >>> optimizer = torch.optim.AdamW(fla_ops.param_groups(layer, weight_decay=0.1), lr=1e-3)
        >>> [len(group["params"]) for group in optimizer.param_groups]
        [11, 2]
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    marked = [p for p in trained if getattr(p, "_no_weight_decay", False)]
    unmarked = [p for p in trained if not getattr(p, "_no_weight_decay", False)]
    return [{"params": unmarked, "weight_decay": weight_decay}, {"params": marked, "weight_decay": 0.0}]
