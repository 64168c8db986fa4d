# SPDX-License-Identifier: Apache-2.0
r"""What several Householder steps a token are for: DeltaProduct's state-tracking experiment (arXiv 2502.10297).

    python bench/state_tracking.py                                           # S3: about ten minutes on one core
    python bench/state_tracking.py --group A5 --num-householder 2 --eigenvalues negative --seeds 0 --hidden-size 128 \
        --head-dim 32 --lr 3e-3 --steps 6000 --long-at 0.8

The word problem of a group: tokens are random elements x_1, x_2, ...; after each, the model names the product
x_t ... x_2 x_1. One layer of `GatedDeltaProduct` without short convolutions does it all, so what it can learn is what a
product of n generalised Householder matrices can be. S3 needs n = 2 and negative eigenvalues: one Householder matrix a
token is a reflection at best, which gives parity and with it one element in three; without negative eigenvalues there
is not even that.

Models are trained on lengths up to 128 and measured up to 512. accuracy(t) is the share of test sequences whose element
is right at position t. Every seed is shown. Training begins with short words, which grow when a batch is right, and in
any case with time: on words of 128 from the start, models stay at parity. The larger groups take more than the default
steps: the second command, nine minutes, reaches accuracy 0.81 at 128 and 0.10 at 512.

Writes bench/results/state-tracking-<group>.csv (a row a run), -curves.csv (accuracy by position) and .png.
"""

import argparse
import csv
import datetime
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import fla_ops
from fla_ops.commands.info import cpu_name
from fla_ops.layers import GatedDeltaProduct

GROUPS = ("S3", "S4", "A5", "S5")
FIRST_LENGTH, TRAIN_LENGTH, TEST_LENGTH = 2, 128, 512
LAST_POSITIONS = 16  # the end of the curve, positions 497 to 512, is read as one number
TEST_SEQUENCES, TEST_BATCH, TEST_SEED = 1024, 256, 1_000_003
WARMUP, DECAY = 50, 0.4  # steps in which the rate rises; share of the run in which it falls to zero
LONGER_AT, LONGER_BY = 0.95, 1.5  # a batch this accurate makes the next ones longer, by this factor
EIGENVALUES = {"negative": "[-1, 1]", "positive": "[0, 1]"}


def multiplication_table(group: str) -> torch.Tensor:
    """`table[a, b]` = a b, "b, then a", of the symmetric group Sn or the alternating group An; element 0 is the
    identity."""
    kind, n = group[0], int(group[1:])
    elements = list(itertools.permutations(range(n)))
    if kind == "A":
        elements = [p for p in elements if sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0]
    index = {p: i for i, p in enumerate(elements)}
    return torch.tensor([[index[tuple(a[i] for i in b)] for b in elements] for a in elements])


def word_problem(
    table: torch.Tensor, batch: int, length: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random words x `[batch, length]` and the product of each of their beginnings, y_t = x_t y_{t-1}."""
    x = torch.randint(table.shape[0], (batch, length), generator=generator)
    y, state = torch.empty_like(x), torch.zeros(batch, dtype=torch.long)
    for t in range(length):
        state = y[:, t] = table[x[:, t], state]
    return x, y


class Tracker(nn.Module):
    """Embedding, norm, one mixer, norm, head. Nothing else carries anything from token to token."""

    def __init__(self, elements: int, num_householder: int, negative: bool, args: argparse.Namespace):
        super().__init__()
        self.embedding = nn.Embedding(elements, args.hidden_size)
        self.mixer_norm = nn.RMSNorm(args.hidden_size)
        self.mixer = GatedDeltaProduct(
            hidden_size=args.hidden_size,
            head_dim=args.head_dim,
            num_heads=args.num_heads,
            expand_v=1,
            use_output_gate=False,
            use_short_conv=False,
            use_forget_gate=args.forget_gate,
            allow_neg_eigval=negative,
            num_householder=num_householder,
        )
        self.head_norm = nn.RMSNorm(args.hidden_size)
        self.head = nn.Linear(args.hidden_size, elements)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[B, T]` -> logits `[B, T, elements]`."""
        return self.head(self.head_norm(self.mixer(self.mixer_norm(self.embedding(x)))))


@dataclass
class Run:
    """One model: what it is, and how it did. `right` `[sequences, TEST_LENGTH]` is the verdict on every position."""

    group: str
    num_householder: int
    eigenvalues: str
    seed: int
    seconds: float = 0.0
    train_loss: float = 0.0
    right: torch.Tensor = field(default_factory=lambda: torch.empty(0), repr=False)

    @property
    def name(self) -> str:
        return f"n = {self.num_householder}, {EIGENVALUES[self.eigenvalues]}"

    def curve(self) -> torch.Tensor:
        """accuracy(t) of positions 1 to TEST_LENGTH."""
        return self.right.float().mean(0)

    def whole(self, length: int) -> float:
        """The share of sequences that are right at every position up to `length`."""
        return self.right[:, :length].all(1).float().mean().item()

    def row(self) -> dict[str, object]:
        curve = self.curve()
        return {
            "group": self.group,
            "num_householder": self.num_householder,
            "eigenvalues": EIGENVALUES[self.eigenvalues],
            "seed": self.seed,
            f"accuracy_at_{TRAIN_LENGTH}": round(curve[TRAIN_LENGTH - 1].item(), 4),
            f"accuracy_{TEST_LENGTH - LAST_POSITIONS + 1}_to_{TEST_LENGTH}": round(
                curve[-LAST_POSITIONS:].mean().item(), 4
            ),
            f"whole_sequence_{TRAIN_LENGTH}": round(self.whole(TRAIN_LENGTH), 4),
            f"whole_sequence_{TEST_LENGTH}": round(self.whole(TEST_LENGTH), 4),
            "train_loss": round(self.train_loss, 5),
            "seconds": round(self.seconds, 1),
        }


def train(run: Run, args: argparse.Namespace, bar: tqdm) -> Tracker:
    table = multiplication_table(run.group)
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    model = Tracker(table.shape[0], run.num_householder, run.eigenvalues == "negative", args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    earned = float(FIRST_LENGTH)
    for step in range(args.steps):
        progress = step / args.steps
        due = FIRST_LENGTH * (TRAIN_LENGTH / FIRST_LENGTH) ** min(1.0, progress / args.long_at)
        length = min(TRAIN_LENGTH, int(max(earned, due)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / WARMUP, (1 - progress) / DECAY)
        x, y = word_problem(table, max(1, args.tokens // length), length, generator)
        logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accuracy = (logits.argmax(-1) == y).float().mean().item()
        if accuracy > LONGER_AT:
            earned = min(TRAIN_LENGTH, max(earned, length) * LONGER_BY)
        run.train_loss = loss.item() if step == 0 else 0.95 * run.train_loss + 0.05 * loss.item()
        bar.set_postfix_str(f"length {length}, loss {run.train_loss:.3f}", refresh=False)
        bar.update()
    return model


@torch.no_grad()
def test(model: Tracker, group: str) -> torch.Tensor:
    """Whether each position of each test sequence is right, `[TEST_SEQUENCES, TEST_LENGTH]`; one test for all."""
    generator = torch.Generator().manual_seed(TEST_SEED)
    x, y = word_problem(multiplication_table(group), TEST_SEQUENCES, TEST_LENGTH, generator)
    return torch.cat([model(part).argmax(-1) for part in x.split(TEST_BATCH)]) == y


def draw(path: Path, runs: list[Run], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(run.name for run in runs))
    figure, axis = plt.subplots(figsize=(10, 5.5), layout="constrained")
    positions = torch.arange(1, TEST_LENGTH + 1)
    for i, name in enumerate(names):
        for j, run in enumerate(r for r in runs if r.name == name):
            axis.plot(positions, run.curve(), color=f"C{i}", alpha=0.75, linewidth=1.3, label=None if j else name)
    elements = multiplication_table(runs[0].group).shape[0]
    level = {"color": "#20262e", "linewidth": 1, "zorder": 3}
    axis.axhline(1 / elements, linestyle=":", **level, label=f"chance, 1/{elements}")
    if runs[0].group.startswith("S"):
        axis.axhline(2 / elements, linestyle="--", **level, label=f"parity known, 2/{elements}")
    axis.axvline(TRAIN_LENGTH, color="#9aa5b1", linewidth=1)
    axis.text(TRAIN_LENGTH + 4, 0.52, "longest in training", color="#5c6773", fontsize=9)
    axis.set(xlabel="position t", ylabel="share of sequences right at t", ylim=(0, 1.03), xlim=(1, TEST_LENGTH))
    axis.legend(title="householders a token, eigenvalues\n(a line a seed)", loc=(0.68, 0.45), fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def provenance(args: argparse.Namespace) -> dict[str, object]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "device": cpu_name(),
        "threads": args.threads,
        "versions": f"fla_ops {fla_ops.__version__}, torch {torch.__version__}",
        "steps": args.steps,
    }


def stem(args: argparse.Namespace) -> Path:
    return args.out / f"state-tracking-{args.group.lower()}"


def write(runs: list[Run], args: argparse.Namespace) -> None:
    known, path = provenance(args), stem(args)
    rows = [known | run.row() for run in runs]
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with Path(f"{path}-curves.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["position", *(f"{run.name}, seed {run.seed}" for run in runs)])
        for t, values in enumerate(zip(*(run.curve().tolist() for run in runs), strict=True), 1):
            writer.writerow([t, *(f"{value:.4f}" for value in values)])
    size = f"d = {args.hidden_size}, {args.num_heads} heads of {args.head_dim}"
    layer = f"one {'Gated ' * args.forget_gate}DeltaProduct layer"
    draw(path.with_suffix(".png"), runs, f"{args.group} word problem, {layer}, {size}, {args.steps} steps")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--group", choices=GROUPS, default="S3")
    parser.add_argument("--num-householder", type=int, nargs="+", default=[1, 2], metavar="N", help="1 to 8, several")
    parser.add_argument(
        "--eigenvalues",
        choices=EIGENVALUES,
        nargs="+",
        default=list(EIGENVALUES),
        help="negative: of a Householder step in [-1, 1]; positive: in [0, 1]",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--long-at", type=float, default=0.5, help="share of the steps after which all words are long, right or not"
    )
    parser.add_argument("--tokens", type=int, default=2048, help="in a batch, whatever its length")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=16)
    parser.add_argument("--forget-gate", action="store_true", help="Gated DeltaProduct")
    parser.add_argument("--threads", type=int, default=1, help="the models are small: more than 2 gain nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    args = parser.parse_args(argv)
    if not args.out.is_dir():
        parser.error(f"argument --out: must be a folder that exists, got {args.out}")
    if min(args.steps, args.tokens, args.threads) < 1:
        parser.error("arguments --steps, --tokens and --threads must be >= 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    start, runs = time.perf_counter(), []
    cases = list(itertools.product(args.num_householder, args.eigenvalues, args.seeds))
    print(f"{args.group}: {len(cases)} runs of {args.steps} steps, delta_product on", end=" ")
    print(f"{fla_ops.backends()['delta_product']['cpu']}, {args.threads} thread(s) of {cpu_name()}")
    with tqdm(total=len(cases) * args.steps, unit="step", mininterval=0.5) as bar:
        for n, eigenvalues, seed in cases:
            run = Run(args.group, n, eigenvalues, seed)
            bar.set_description(f"{run.name}, seed {seed}")
            begin = time.perf_counter()
            model = train(run, args, bar)
            run.right, run.seconds = test(model, args.group), time.perf_counter() - begin
            runs.append(run)
            write(runs, args)  # after every run: one that is stopped leaves what it has
    print(tabulate([run.row() for run in runs], headers="keys"))
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes in all; files: {stem(args)}.csv, -curves.csv and .png")


if __name__ == "__main__":
    main()
