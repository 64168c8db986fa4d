# SPDX-License-Identifier: Apache-2.0
"""The demo's text, and what simpler models make of it: each baseline is computed, in bits per held-out byte."""

import bz2
import math
from collections import Counter, defaultdict
from pathlib import Path

from . import CommandError


def load(path: str | None) -> tuple[bytes, bytes]:
    """(training text, held-out last 10 %): the help topics that every Python carries, or a file."""
    if path is None:
        from pydoc_data import topics

        text = "".join(topics.topics[name] for name in sorted(topics.topics)).encode()
    else:
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise CommandError(f"argument '--text' must be a readable file, got {path}: {error.strerror}.") from error
        if len(text) < 20_000:
            raise CommandError(f"argument '--text' must be a file of at least 20,000 bytes, got {len(text)}.")
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def unigram(train: bytes, held: bytes) -> float:
    """Byte frequencies of the training text, one added to each count."""
    counts = Counter(train)
    return -sum(math.log2((counts[b] + 1) / (len(train) + 256)) for b in held) / len(held)


def context_model(train: bytes, held: bytes, order: int = 4) -> float:
    """Counts after every context of up to `order` bytes, longer ones smoothed by shorter ones (Witten-Bell):
    p_n(b) = (count_n(b) + distinct_n p_{n-1}(b)) / (total_n + distinct_n), from p = 1/256."""
    counts: list[dict[bytes, Counter]] = [defaultdict(Counter) for _ in range(order + 1)]
    for i, byte in enumerate(train):
        for n in range(min(order, i) + 1):
            counts[n][train[i - n : i]][byte] += 1
    totals = [{context: sum(seen.values()) for context, seen in table.items()} for table in counts]
    text, bits = train[-order:] + held, 0.0
    for i in range(len(text) - len(held), len(text)):
        p = 1 / 256
        for n in range(order + 1):
            context = text[i - n : i]
            seen = counts[n].get(context)
            if seen is None:
                break
            p = (seen[text[i]] + len(seen) * p) / (totals[n][context] + len(seen))
        bits -= math.log2(p)
    return bits / len(held)


def baselines(train: bytes, held: bytes) -> dict[str, float]:
    """Name -> held-out bits per byte."""
    conditional = len(bz2.compress(train + held)) - len(bz2.compress(train))
    return {
        "unigram": unigram(train, held),
        "order-4 context model": context_model(train, held),
        "bzip2, held-out text alone": len(bz2.compress(held)) * 8 / len(held),
        "bzip2, after the training text": conditional * 8 / len(held),
    }
