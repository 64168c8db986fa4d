# SPDX-License-Identifier: Apache-2.0
"""The demo's one figure: the curve, the bits per byte, the speeds."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .demo_train import Curve

OURS, THEIRS = "#1b6ca8", "#9aa5b1"


def _bars(axis, values: dict[str, float], title: str, fmt: str) -> None:
    names = list(values)
    drawn = axis.barh(names, list(values.values()), color=[OURS if n.startswith("fla_ops") else THEIRS for n in names])
    axis.bar_label(drawn, fmt=fmt, padding=3)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=11)
    axis.margins(x=0.18)
    axis.spines[["top", "right"]].set_visible(False)


def draw(path: str, title: str, curve: Curve, bpb: dict[str, float], speed: dict[str, float]) -> None:
    figure = plt.figure(figsize=(13, 5.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.2, 1))
    axis = figure.add_subplot(grid[:, 0])
    axis.plot(*zip(*curve.train, strict=True), color=OURS, alpha=0.5, label="training text, smoothed")
    if curve.held:
        axis.plot(*zip(*curve.held, strict=True), "o-", color=OURS, label="held-out text")
    for (name, value), style in zip(list(bpb.items())[1:], ("-.", "--", ":", "-"), strict=False):
        axis.axhline(value, color=THEIRS, linestyle=style, label=f"{name} ({value:.2f})")
    axis.set(xlabel="seconds of training", ylabel="bits per byte", ylim=(1.0, 5.2))
    axis.set_title("learning", fontsize=11)
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    _bars(figure.add_subplot(grid[0, 1]), bpb, "held-out bits per byte (lower is better)", "%.2f")
    _bars(figure.add_subplot(grid[1, 1]), speed, "training tokens a second (higher is better)", "%.0f")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
