# SPDX-License-Identifier: Apache-2.0
"""A whole Mamba language model on the CPU: transformers' MambaForCausalLM as it is, and on fla_ops.

    python bench/mamba_model.py              # mamba-130m's size; nearly all of the minutes are stock's training step
    python bench/mamba_model.py --quick      # a small model: seconds

The weights are random and the same for every variant. A training step is forward, backward and AdamW, of next-token
prediction on random tokens; generation is greedy. "stock" is transformers' path in plain torch, "stock, mambapy" the
same with its option use_mambapy, which trains with mambapy's parallel scan. All must agree: on the loss and on the norm
of the gradient of the first step to 1e-3, on every generated token; a run in which they do not ends with an error.

Ours is the median of --rounds after one more that warms up. Stock's training step is timed once, and first: it takes
minutes, beside which what a first step costs is nothing.

Writes bench/results/mamba-model-<layers>x<hidden size>.csv, a row a variant and pass; --only leaves the other pass's.
"""

import argparse
import csv
import datetime
import gc
import importlib.util
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tabulate import tabulate

import fla_ops
from fla_ops.commands.info import cpu_name
from fla_ops.integrations.transformers import accelerate

OURS, STOCK, MAMBAPY = "fla_ops", "stock", "stock, mambapy"
TRAINING, GENERATION = "training step", "generation"
QUICK = {"layers": 2, "hidden_size": 64, "vocabulary": 500, "length": 48, "prompt": 8, "new_tokens": 16, "rounds": 1}
AGREE = 1e-3


@dataclass
class Result:
    variant: str
    seconds: list[float]
    facts: torch.Tensor  # what the variants must agree on: (loss, gradient norm) of the first step, or the tokens

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@contextmanager
def model(variant: str, args: argparse.Namespace) -> Iterator[transformers.MambaForCausalLM]:
    """A fresh model of the variant; its memory is free for the next one at the end."""
    config = transformers.MambaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        use_mambapy=variant == MAMBAPY,
        bos_token_id=None,
        eos_token_id=None,  # generation goes on to the last token
        pad_token_id=0,
    )
    torch.manual_seed(args.seed)
    built = transformers.MambaForCausalLM(config)
    yield accelerate(built) if variant == OURS else built
    del built
    gc.collect()


def tokens(batch: int, length: int, args: argparse.Namespace) -> torch.Tensor:
    return torch.randint(args.vocabulary, (batch, length), generator=torch.Generator().manual_seed(args.seed))


def train(variant: str, args: argparse.Namespace) -> Result:
    ids = tokens(args.batch, args.length, args)
    seconds, facts = [], torch.empty(0)
    with model(variant, args) as net:
        net.train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
        for round_ in range(args.rounds + 1 if variant == OURS else 1):
            start = time.perf_counter()
            loss = net(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
            if round_ == 0:
                norms = [p.grad.norm() for p in net.parameters() if p.grad is not None]
                facts = torch.stack([loss.detach(), torch.stack(norms).norm()])
            optimizer.zero_grad()
    return Result(variant, seconds[1:] or seconds, facts)


@torch.no_grad()
def generate(variant: str, args: argparse.Namespace) -> Result:
    prompt = tokens(args.batch, args.prompt, args)
    seconds = []
    with model(variant, args) as net:
        net.eval()
        net.generate(prompt, max_new_tokens=4, do_sample=False)
        for _ in range(args.rounds if variant == OURS else 1):
            start = time.perf_counter()
            found = net.generate(prompt, max_new_tokens=args.new_tokens, do_sample=False)
            seconds.append(time.perf_counter() - start)
    return Result(variant, seconds, found[:, args.prompt :])


def check(kind: str, results: list[Result]) -> None:
    """Raise unless all variants computed the same thing: a time of another computation means nothing."""
    ours, *others = results
    for other in others:
        if kind == TRAINING:
            torch.testing.assert_close(ours.facts, other.facts, rtol=AGREE, atol=0.0)
        elif not torch.equal(ours.facts, other.facts):
            first = (ours.facts != other.facts).any(0).nonzero()[0].item()
            raise AssertionError(f"{other.variant} generates other tokens than fla_ops from number {first} on")


def rows(kind: str, results: list[Result], args: argparse.Namespace) -> list[dict[str, object]]:
    count = args.batch * (args.length if kind == TRAINING else args.new_tokens)
    return [
        {
            "pass": kind,
            "batch": args.batch,
            "tokens": count,
            "variant": result.variant,
            "seconds": round(result.median, 3),
            "rounds": len(result.seconds),
            "tokens_per_s": round(count / result.median, 1),
            "time_over_ours": round(result.median / results[0].median, 2),
        }
        for result in results
    ]


def provenance(args: argparse.Namespace) -> dict[str, object]:
    versions = f"fla_ops {fla_ops.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "backend": fla_ops.backends()["selective_scan"]["cpu"],
        "layers": args.layers,
        "hidden_size": args.hidden_size,
        "vocabulary": args.vocabulary,
    }


def write(found: list[dict[str, object]], args: argparse.Namespace) -> Path:
    path = args.out / f"mamba-model-{args.layers}x{args.hidden_size}.csv"
    known = [provenance(args) | row for row in found]
    if args.only and path.exists():
        with path.open(newline="") as file:
            known += [row for row in csv.DictReader(file) if row["pass"] != args.only]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, known[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(known)
    return path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50280)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512, help="tokens of a training sequence")
    parser.add_argument("--prompt", type=int, default=32, help="tokens before the generated ones")
    parser.add_argument("--new-tokens", type=int, default=256, help="generated tokens a sequence")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of fla_ops, whose median counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=(TRAINING, GENERATION), help="one of the two passes")
    parser.add_argument("--quick", action="store_true", help="a small model, whatever the sizes above say")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    if not args.out.is_dir():
        parser.error(f"argument --out: must be a folder that exists, got {args.out}")
    sizes = ("layers", "hidden_size", "vocabulary", "batch", "length", "prompt", "new_tokens", "rounds", "threads")
    if min(getattr(args, name) for name in sizes) < 1:
        parser.error("every size, --rounds and --threads must be >= 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    print(f"selective_scan on {fla_ops.backends()['selective_scan']['cpu']}, {args.threads} threads of {cpu_name()}")
    mambapy = [MAMBAPY] * (importlib.util.find_spec("mambapy") is not None)
    found: list[dict[str, object]] = []
    for kind, run, variants in (
        (TRAINING, train, [OURS, *mambapy, STOCK]),
        (GENERATION, generate, [OURS, STOCK]),
    ):
        if args.only not in (None, kind):
            continue
        results = []
        for variant in variants:
            results.append(run(variant, args))
            print(f"{kind}, {variant}: {results[-1].median:.3f} s", flush=True)
        check(kind, results)
        found += rows(kind, results, args)
        path = write(found, args)  # after every pass: a run that is stopped leaves what it has
    print(tabulate(found, headers="keys"))
    print(f"The variants agree. Rows written to {path}")


if __name__ == "__main__":
    main()
