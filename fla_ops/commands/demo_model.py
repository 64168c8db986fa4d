# SPDX-License-Identifier: Apache-2.0
"""The demo's language model over bytes: embedding, blocks of [norm, mixer, norm, SwiGLU], head."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..layers import DeltaNet, GatedDeltaNet, GatedDeltaProduct, Mamba

WIDTH, DEPTH, HIDDEN = 128, 3, 192

# name -> (width, backend) -> layer. About 80 thousand parameters each: smaller heads for more keys and values, and
# fewer channels than the usual two a width for Mamba.
MIXERS: dict[str, Callable[[int, str], nn.Module]] = {
    "deltanet": lambda d, backend: DeltaNet(d, num_heads=d // 64, use_gate=True, backend=backend),
    "gated_deltanet": lambda d, backend: GatedDeltaNet(d, expand_v=1, head_dim=64, num_heads=d // 64, backend=backend),
    "gated_delta_product": lambda d, backend: GatedDeltaProduct(
        d, expand_v=1, head_dim=48, num_heads=d // 64, backend=backend
    ),
    "mamba": lambda d, backend: Mamba(d, expand=1.5, backend=backend),
}


def output_projection(mixer: nn.Module) -> nn.Linear:
    """The last Linear of a layer."""
    return mixer.out_proj if isinstance(mixer, Mamba) else mixer.o_proj


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, mixer: str, backend: str):
        super().__init__()
        self.mixer_norm, self.mixer = nn.RMSNorm(WIDTH, 1e-5), MIXERS[mixer](WIDTH, backend)
        self.mlp_norm, self.mlp = nn.RMSNorm(WIDTH, 1e-5), SwiGLU(WIDTH, HIDDEN)
        # Every block starts as the identity.
        nn.init.zeros_(output_projection(self.mixer).weight)
        nn.init.zeros_(self.mlp.down.weight)

    def forward(self, x: torch.Tensor, state):
        y, state = self.mixer(self.mixer_norm(x), state=state, return_state=True)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state

    def step(self, x: torch.Tensor, state) -> torch.Tensor:
        x = x + self.mixer.step(self.mixer_norm(x), state)
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out; the head is the embedding. States are a list, one a block, or None."""

    def __init__(self, mixer: str, backend: str = "auto"):
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(Block(mixer, backend) for _ in range(DEPTH))
        self.norm = nn.RMSNorm(WIDTH, 1e-5)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding(tokens) * WIDTH**0.5

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm(x), self.embedding.weight)

    def forward(self, tokens: torch.Tensor, states: list | None = None) -> tuple[torch.Tensor, list]:
        """tokens `[B, T]` -> (logits `[B, T, 256]`, states)."""
        x, new = self._embed(tokens), []
        for block, state in zip(self.blocks, states or [None] * DEPTH, strict=True):
            x, state = block(x, state)
            new.append(state)
        return self._logits(x), new

    def step(self, tokens: torch.Tensor, states: list) -> torch.Tensor:
        """One token: `[B]` -> logits `[B, 256]`; the states are updated in place."""
        x = self._embed(tokens)
        for block, state in zip(self.blocks, states, strict=True):
            x = block.step(x, state)
        return self._logits(x)

    def init_states(self, batch: int) -> list:
        return [block.mixer.init_state(batch) for block in self.blocks]
