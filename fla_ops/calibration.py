# SPDX-License-Identifier: Apache-2.0
r"""Thresholds for temporal-sparse attention, chosen for a model by what its queries make of its keys.

A channel of a held key is off by delta_jc, at most its threshold, and query i's score of key j by sum_c q_ic delta_jc.
What that does to the softmax goes with the probability p_ij of the key. So an error costs

    cost_c(theta) = sum_j m_jc delta_jc(theta)^2,      m_jc = sum of p_ij q_ic^2 over the i that do not see j exactly,

summed over the query heads of the key head too, and saves the deltas that are zero, zeros_c(theta). Both are measured
for a grid of thresholds, channel by channel; then each channel of each head of each layer takes the threshold that
minimises cost_c - lambda zeros_c. One lambda for the whole model makes the last zero cost the same everywhere: channels
that queries weigh heavily and heads that look far back get small thresholds, heads that look near, or at the first key
alone, get large ones. lambda is found by bisection, so that the share of zeros is the one asked for.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import _checks, _sparse_options
from .reference.temporal_sparse_attention import in_window

# Thresholds that are tried, in mean changes of the channel from key to key.
GRID = torch.logspace(-1.2, 1.5, 28)


@dataclass(frozen=True)
class Thresholds(Mapping):
    """What `calibrate_thresholds` found: a mapping from layer indices to float32 `[HK, D]`, with how it was found.

    `enable_temporal_sparse(model, thresholds, window=thresholds.window, ...)` takes it as it is.
    """

    layers: dict[int, torch.Tensor]
    sparsity: float  # the share of zero deltas on the tokens of the calibration, by exact keys
    model_type: str
    target_sparsity: float
    window: int | float
    sink: int
    window_mode: str

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self.layers[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        found = f"{self.sparsity:.3f} zeros for {self.target_sparsity}, window={self.window}, sink={self.sink}"
        return f"Thresholds({len(self)} layers of {self.model_type}, {found}, window_mode={self.window_mode!r})"

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, a tensor a layer; all else is its metadata."""
        save_file = _safetensors().torch.save_file
        about = {name: value for name, value in asdict(self).items() if name != "layers"}
        tensors = {str(i): x.contiguous() for i, x in self.layers.items()}
        save_file(tensors, path, metadata={"format": "pt", "fla_ops.thresholds": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> "Thresholds":
        """Read what `save` wrote.

        Raises:
            ValueError: a safetensors file of something else.
        """
        with _safetensors().safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get("fla_ops.thresholds")
            if about is None:
                raise _checks.bad(ValueError, "Thresholds.load", "path", "a file of Thresholds.save", repr(str(path)))
            layers = {int(name): file.get_tensor(name) for name in sorted(file.keys(), key=int)}
        return cls(layers, **json.loads(about))


def calibrate_thresholds(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    *,
    target_sparsity: float | Sequence[float],
    window: int | float = 0.05,
    sink: int = 0,
    window_mode: str = "band",
) -> Thresholds | list[Thresholds]:
    """Thresholds theta `[HK, D]` for each layer of `model`, such that `target_sparsity` of all key deltas are zero.

    The model is run once, on all of `tokens` together and without a gradient; it comes back as it was. That takes,
    beside the model's own, memory for the `[T, T]` probabilities of one head.

    Args:
        model: a decoder of transformers that `enable_temporal_sparse` takes.
        tokens: int64 `[N, T]`, N texts of T tokens, or `[T]`. T as long as the texts to come, or some thousands; four
            texts of 1,024 tokens do for a small model.
        target_sparsity: the share of zero deltas, in (0, 1); or several, for as many results from one run. On other
            texts it is met to about one per cent.
        window, sink, window_mode: as they will be given to `enable_temporal_sparse`.

    Raises:
        ValueError, TypeError: a wrong shape, value or type; a model that `enable_temporal_sparse` refuses.
        ImportError: transformers is missing.
    """
    from .integrations import transformers as models  # which is no requirement of this package

    op = "calibrate_thresholds"
    targets = target_sparsity if isinstance(target_sparsity, (list, tuple)) else [target_sparsity]
    for target in targets:
        if isinstance(target, bool) or not isinstance(target, (int, float)):
            raise _checks.bad(TypeError, op, "target_sparsity", "a float, or a list of them", repr(target))
        if not 0 < target < 1:
            raise _checks.bad(ValueError, op, "target_sparsity", "in (0, 1)", target)
    texts = _texts(op, tokens)
    options = {"window": window, "sink": sink, "window_mode": window_mode}
    models.check_arguments(op, model, **options)
    measured: dict[int, _Measured] = {}

    def look(layer, q, k, scale, stats):
        measured[layer] = _measure(q, k, scale, **options)

    with models.watching(model, look, 0.0, **options) as decoder, torch.no_grad():
        decoder(texts.to(model.device), use_cache=False)
    kind = getattr(model.config, "model_type", type(model).__name__)
    found = [Thresholds(*_allocate(measured, target), kind, float(target), **options) for target in targets]
    return found if isinstance(target_sparsity, (list, tuple)) else found[0]


def measure_sparsity(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """The share of key deltas that are zero when `model`, under `enable_temporal_sparse`, reads `tokens`.

    Args:
        model: a model under `enable_temporal_sparse`.
        tokens: int64 `[N, T]`, N texts of T tokens, or `[T]`.

    Raises:
        ValueError, TypeError: a wrong shape or dtype; a model that is not under `enable_temporal_sparse`.
        ImportError: transformers is missing.
    """
    from .integrations import transformers as models

    op, shares = "measure_sparsity", []
    texts = _texts(op, tokens)
    if not isinstance(model, torch.nn.Module) or not models.layer_settings(model):
        got = f"{type(model).__name__} without it"
        raise _checks.bad(ValueError, op, "model", "a model under enable_temporal_sparse", got)

    def look(layer, q, k, scale, stats):
        shares.append(stats.zeros.mean().item())

    with models.watching(model, look) as decoder, torch.no_grad():
        decoder(texts.to(model.device), use_cache=False)
    return sum(shares) / len(shares)


def _texts(op: str, tokens: object) -> torch.Tensor:
    """The tokens as `[N, T]`."""
    _checks.tensor(op, "tokens", tokens)
    if tokens.dtype not in _checks.INDEX_DTYPES:
        raise _checks.bad(TypeError, op, "tokens", "an int32 or int64 tensor", tokens.dtype)
    texts = tokens[None] if tokens.dim() == 1 else tokens
    _checks.shape(op, "tokens", texts, {"N": None, "T": None})
    if texts.shape[0] == 0 or texts.shape[1] < 2:
        raise _checks.bad(ValueError, op, "tokens", "at least one text of two tokens", list(tokens.shape))
    return texts


@dataclass(frozen=True)
class _Measured:
    """One layer's keys on a grid of thresholds, `[grid, HK, D]`: what they save and what they cost."""

    thetas: torch.Tensor
    zeros: torch.Tensor  # share of the tokens
    cost: torch.Tensor


def _measure(q, k, scale, **options) -> _Measured:
    """Of q `[N, T, HQ, D]` and k `[N, T, HK, D]`, after the rotary embedding."""
    q, k = q.float(), k.float()
    weight = torch.stack([_importance(*text, scale, **options) for text in zip(q, k, strict=True)])
    thetas = GRID.to(k.device)[:, None, None] * k.diff(dim=1).abs().mean((0, 1))
    texts, length = k.shape[:2]
    held = k[:, 0, None].repeat(1, len(GRID), 1, 1)  # at all thresholds at once: [N, grid, HK, D]
    zeros, cost = torch.zeros_like(held), torch.zeros_like(held)
    for t in range(1, length):
        error = k[:, t, None] - held
        still = error.abs() <= thetas
        held = torch.where(still, held, k[:, t, None])
        zeros += still
        cost += torch.where(still, error.square_() * weight[:, t, None], 0)
    return _Measured(thetas, zeros.sum(0) / (texts * length), cost.sum(0))


def _importance(q, k, scale, window, sink, window_mode):
    """m `[T, HK, D]` of q `[T, HQ, D]` and k `[T, HK, D]`: what an error of a key's channel, squared, costs."""
    length, group = k.shape[0], q.shape[1] // k.shape[1]
    window = _sparse_options.in_tokens(window, length)
    i, j = torch.arange(length, device=k.device)[:, None], torch.arange(length, device=k.device)
    far = (j <= i) & ~in_window(i, j, window, window_mode) & (j >= sink)
    weight = torch.zeros_like(k)
    for h in range(q.shape[1]):  # one head's probabilities at a time
        scores = (q[:, h] @ k[:, h // group].T * scale).masked_fill(j > i, -torch.inf)
        weight[:, h // group] += (scores.softmax(-1) * far).T @ (scale * q[:, h]).square()
    return weight


def _allocate(measured: dict[int, _Measured], target: float) -> tuple[dict[int, torch.Tensor], float]:
    """The thresholds of each layer where one more zero costs the same everywhere, and their share of zeros."""
    layers = sorted(measured)
    channels = sum(measured[i].zeros[0].numel() for i in layers)

    def choose(price: float):
        best = {i: (measured[i].cost - price * measured[i].zeros).argmin(0, keepdim=True) for i in layers}
        return best, sum(measured[i].zeros.gather(0, best[i]).sum().item() for i in layers) / channels

    low, high = -80.0, 80.0  # log2 of the price
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if choose(2.0**middle)[1] >= target else (middle, high)
    best, sparsity = choose(2.0**high)
    return {i: measured[i].thetas.gather(0, best[i])[0].cpu() for i in layers}, sparsity


def _safetensors():
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"Thresholds are saved as safetensors, which is missing ({error}). "
            "Install with: pip install 'fla_ops[transformers]'"
        ) from error
    return safetensors
