# SPDX-License-Identifier: Apache-2.0
"""The demo's training recipe and its held-out measure.

A few rows of text are read side by side, a window a step, and every row's recurrent state is carried from window to
window (detached): the model learns to use a context far longer than what one step sees, and is measured the same way.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from .demo_model import LanguageModel

ROWS, WINDOW = 8, 256  # bytes a step: 2,048
STEPS = 1200  # about six readings of the default text; a slow machine stops at the time limit instead
WARMUP = 0.03  # of the run; the rates rise over it, then fall linearly to zero
MATRIX_RATE, OTHER_RATE = 0.02, 0.003
LIMIT_TESTS = 4  # held-out measurements before the last


@dataclass
class Curve:
    """What the figure draws: seconds since the start, and bits per byte."""

    train: list[tuple[float, float]] = field(default_factory=list)
    held: list[tuple[float, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


def as_tensor(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def windows(text: torch.Tensor, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, bool]]:
    """(tokens `[ROWS, WINDOW + 1]`, whether the text starts over), without end.

    Each reading starts at another random place of the ring that the text forms, so that the cuts fall elsewhere.
    """
    length = text.shape[0] // ROWS
    while True:
        start = int(torch.randint(text.shape[0], (), generator=generator))
        rows = text.roll(-start)[: ROWS * length].view(ROWS, length)
        for i, at in enumerate(range(0, length - WINDOW, WINDOW)):
            yield rows[:, at : at + WINDOW + 1], i == 0


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made nearly orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    torch.optim.Muon works matrix by matrix in bfloat16, which a processor without bfloat16 units does very slowly: here
    matrices of one shape go together, in float32.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        groups = [{"params": same} for same in shapes.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            matrices, state = group["params"], self.state[group["params"][0]]
            grad = torch.stack([matrix.grad for matrix in matrices])
            average = state.setdefault("average", torch.zeros_like(grad)).lerp_(grad, 1 - group["momentum"])
            update = orthogonalise(grad.lerp_(average, group["momentum"]))
            rate = group["lr"] * max(1.0, grad.shape[1] / grad.shape[2]) ** 0.5
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, update.unbind(), alpha=-rate)


def orthogonalise(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Move the singular values of each matrix `[n, rows, columns]` close to 1, by Newton-Schulz iterations."""
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT, steps).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x


class Optimizer:
    """Muon for the matrices inside the blocks, AdamW for everything else, one schedule for both."""

    def __init__(self, model: LanguageModel):
        # A gate's projection has a row a head: too few for its directions to matter. Mamba's A_log is a table of rates.
        inside = [
            p
            for p in model.blocks.parameters()
            if p.ndim == 2 and min(p.shape) >= 16 and not hasattr(p, "_no_weight_decay")
        ]
        chosen = {id(p) for p in inside}
        others = [p for p in model.parameters() if id(p) not in chosen]
        self.parts = [
            Muon(inside, lr=MATRIX_RATE),
            torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]

    def step(self, progress: float) -> None:
        factor = min(1.0, (progress + 1e-3) / WARMUP) * (1 - progress)
        for part, rate in zip(self.parts, (MATRIX_RATE, OTHER_RATE), strict=True):
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()
            part.zero_grad()


def train_step(
    model: LanguageModel, optimizer: Optimizer, tokens: torch.Tensor, states: list | None, progress: float
) -> tuple[float, list]:
    """One step on `[ROWS, WINDOW + 1]`: (bits per byte, the states after the window)."""
    logits, states = model(tokens[:, :-1], states)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step(progress)
    return loss.item() / math.log(2), [state.detach() for state in states]


@torch.no_grad()
def bits_per_byte(model: LanguageModel, before: torch.Tensor, held: torch.Tensor, window: int = 4096) -> float:
    """Every byte of `held` predicted once, the state carried from the first to the last; it starts from `before`."""
    nats, states, last = 0.0, None, before[-1:]
    if before.shape[0] > 1:
        _, states = model(before[None, :-1])
    for part in held.split(window):
        logits, states = model(torch.cat([last, part[:-1]])[None], states)
        nats += F.cross_entropy(logits[0], part, reduction="sum").item()
        last = part[-1:]
    return nats / math.log(2) / held.shape[0]


def train(model: LanguageModel, text: torch.Tensor, held: torch.Tensor, seconds: float, seed: int, bar) -> Curve:
    """Train until STEPS steps or `seconds`, held-out measurements included; `bar` is a tqdm bar that counts to 100."""
    curve, optimizer, states = Curve(), Optimizer(model), None
    tests = [i / (LIMIT_TESTS + 1) for i in range(LIMIT_TESTS, 0, -1)]
    start, smooth, step_time = time.perf_counter(), None, 0.0
    for step, (tokens, starts_over) in enumerate(windows(text, torch.Generator().manual_seed(seed))):
        elapsed = time.perf_counter() - start
        progress = max(step / STEPS, (elapsed + step_time) / seconds)
        if progress >= 1:
            break
        bits, states = train_step(model, optimizer, tokens, None if starts_over else states, progress)
        smooth = bits if smooth is None else 0.95 * smooth + 0.05 * bits
        curve.tokens += ROWS * WINDOW
        now = time.perf_counter() - start
        step_time = now - elapsed
        curve.train.append((now, smooth))
        if tests and progress >= tests[-1]:
            tests.pop()
            curve.held.append((now, bits_per_byte(model, text[-WINDOW:], held)))
        bar.n = round(100 * progress, 1)
        bar.set_postfix_str(f"{smooth:.3f} bpb, {curve.tokens / now / 1e3:.1f}k tokens/s", refresh=False)
        bar.update(0)
    curve.seconds = time.perf_counter() - start
    bar.n = 100
    bar.refresh()
    return curve
