# SPDX-License-Identifier: Apache-2.0
"""What torch.compile must not trace of autocast."""

import torch


def has_autocast(device: str) -> bool:
    """Whether a device type knows autocast."""
    return torch.amp.is_autocast_available(device)


# Traced code sees the answer as a constant: Dynamo of torch 2.11 does not know the question.
has_autocast._dynamo_marked_constant = True
