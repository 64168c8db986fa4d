# SPDX-License-Identifier: Apache-2.0
"""`fla-ops demo`: train a byte-level language model on the kernels, generate from its state, time it, draw it."""

import argparse
import time
from pathlib import Path

import torch

import fla_ops

from . import CommandError, demo_text, require
from .demo_model import DEPTH, WIDTH, LanguageModel
from .demo_train import as_tensor, bits_per_byte, train
from .info import cpu_name

PROMPT_BYTES, SAMPLE_BYTES, TEMPERATURE = 2000, 400, 0.6
CHECKED_BYTES = 256
CONTEXT_BEFORE = 4096  # training text read before the held-out text begins


@torch.no_grad()
def decoding_difference(model: LanguageModel, tokens: torch.Tensor) -> float:
    """Largest difference between the logits of one forward pass and those of one-token steps, on `tokens` `[T]`."""
    full = model(tokens[None])[0][0]
    states = model.init_states(1)
    steps = torch.cat([model.step(token[None], states) for token in tokens])
    return (full - steps).abs().max().item()


@torch.no_grad()
def generate(model: LanguageModel, prompt: bytes, count: int, seed: int) -> tuple[bytes, float]:
    """(bytes drawn one at a time from the recurrent state after `prompt`, bytes a second)."""
    generator = torch.Generator().manual_seed(seed)
    logits, states = model(as_tensor(prompt)[None])
    token_logits, drawn = logits[:, -1], bytearray()
    start = time.perf_counter()
    for _ in range(count):
        token = torch.multinomial((token_logits[0] / TEMPERATURE).softmax(-1), 1, generator=generator)
        drawn.append(token.item())
        token_logits = model.step(token, states)
    return bytes(drawn), count / (time.perf_counter() - start)


def _backends() -> str:
    """What the ops run on, and what to do if that is the reference."""
    chosen = fla_ops.backends()
    text = ", ".join(f"{op}: {row['cpu']}" for op, row in chosen.items())
    if any(row["cpu"] == "reference" for row in chosen.values()):
        text += "\nWithout compiled kernels little is learnt in the time: see `fla-ops info`, then `fla-ops build`."
    return text


def run(args: argparse.Namespace) -> int:
    require("demo", "demo", "tqdm", "matplotlib", "tabulate")
    from tabulate import tabulate
    from tqdm import tqdm

    if args.seconds <= 0:
        raise CommandError(f"argument '--seconds' must be > 0, got {args.seconds}.", code=2)
    out = Path(args.out)
    if not out.absolute().parent.is_dir():
        raise CommandError(f"argument '--out' must be in a folder that exists, got {out}.", code=2)
    # The plotting library takes a second to load; do it before the clock of the training runs.
    from . import demo_plot
    from .demo_speed import training_speed

    torch.manual_seed(args.seed)
    train_text, held_text = demo_text.load(args.text)
    text, held = as_tensor(train_text), as_tensor(held_text)
    model = LanguageModel(args.mixer)
    size = sum(p.numel() for p in model.parameters())
    print(f"fla_ops {fla_ops.__version__} on {cpu_name()}, {torch.get_num_threads()} threads; {_backends()}")
    print(f"{DEPTH} blocks of {args.mixer}, width {WIDTH}, {size:,} parameters; one byte is one token")
    print(
        f"text: {args.text or 'pydoc_data.topics'}, {len(text):,} bytes to train on, the last {len(held):,} held out\n"
    )

    bar_format = "{l_bar}{bar}| {elapsed} {postfix}"
    with tqdm(total=100, desc="training", bar_format=bar_format, mininterval=0.5) as bar:
        curve = train(model, text, held, args.seconds, args.seed, bar)
    ours = f"fla_ops {args.mixer}"
    bpb = {ours: bits_per_byte(model, text[-CONTEXT_BEFORE:], held)} | demo_text.baselines(train_text, held_text)
    curve.held.append((curve.seconds, bpb[ours]))
    readings = curve.tokens / len(text)
    print(f"\n{curve.tokens:,} bytes in {curve.seconds:.1f} s, {readings:.1f} readings of the text\n")
    rows = [(name, value) for name, value in bpb.items()]
    print(tabulate(rows, ("model", "held-out bits per byte"), tablefmt="simple", floatfmt=".3f"))
    print("bzip2 that has read the training text stays ahead: the text repeats itself, and it copies.")

    difference = decoding_difference(model, held[:CHECKED_BYTES])
    agrees = difference < 1e-3
    print(f"\nstep-by-step decoding against the full pass, {CHECKED_BYTES} bytes: ", end="")
    print(f"largest difference of the logits {difference:.1e}, {'the same' if agrees else 'NOT the same'}")

    prompt = held_text[:PROMPT_BYTES]
    drawn, rate = generate(model, prompt, SAMPLE_BYTES, args.seed)
    print(f"\na sample from the recurrent state, {rate:.0f} bytes/s, after {prompt[-40:].decode(errors='replace')!r}:")
    print("  | " + drawn.decode(errors="replace").replace("\n", "\n  | "))

    speed = training_speed(model, args.mixer, text[: 8 * 257].view(8, 257), min(5.0, args.seconds / 3))
    fastest = speed["fla_ops kernels"]
    rows = [(name, value, f"{fastest / value:.1f}x") for name, value in speed.items()]
    print()
    print(tabulate(rows, ("training the whole model on", "tokens/s", "kernels are"), tablefmt="simple", floatfmt=".0f"))

    title = f"{args.mixer}, {size / 1e6:.2f} M parameters, {curve.seconds:.0f} s of training on {cpu_name()}"
    demo_plot.draw(str(out), title, curve, bpb, speed)
    print(f"\nfigure: {out}")
    return 0 if agrees else 1
