# SPDX-License-Identifier: Apache-2.0
"""One rank of test_torch_integration's data-parallel test: `ddp_worker.py RANK WORLD FILE BACKEND RESULT MODEL`.

Saves the gradients that this rank holds after one backward over its share of the batch.
"""

import sys

import torch
from torch.nn.parallel import DistributedDataParallel

import fla_ops
from fla_ops.layers import GatedDeltaNet, Mamba


class Mixer(torch.nn.Module):
    """The smallest model round the op: projections, the gated delta rule, a projection back."""

    def __init__(self, width=16, heads=2, backend="auto"):
        super().__init__()
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.gates = torch.nn.Linear(width, 2 * heads)
        self.out = torch.nn.Linear(width, width)
        self.heads, self.backend = heads, backend

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.qkv(x).chunk(3, -1))
        beta, g = self.gates(x).chunk(2, -1)
        g = torch.nn.functional.logsigmoid(g)
        o = fla_ops.delta_rule(q, k, v, beta.sigmoid(), g, qk_l2norm=True, backend=self.backend).o
        return self.out(o.flatten(-2))


def delta_rules(backend):
    """The op by hand, then the layer."""
    return torch.nn.Sequential(
        Mixer(backend=backend), GatedDeltaNet(hidden_size=16, num_heads=2, head_dim=8, backend=backend)
    )


def mamba(backend):
    """A layer whose backward runs a backward of its own inside."""
    return torch.nn.Sequential(Mamba(16, d_state=4, backend=backend))


MODELS = {"delta_rules": delta_rules, "mamba": mamba}


def gradients(model, x):
    model(x).square().mean().backward()
    return [p.grad for p in model.parameters()]


def main(rank, world, file, backend, result, model):
    rank, world = int(rank), int(world)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model, x = MODELS[model](backend), torch.randn(world, 70, 16)
    found = gradients(DistributedDataParallel(model), x[rank : rank + 1])
    torch.save(found, f"{result}.{rank}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
