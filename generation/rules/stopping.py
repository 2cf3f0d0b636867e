"""When a row's canvas is finished: small rules, each with a memory of its own, and how they go together. Pure: tensors in, tensors out.

A rule has two methods. `start(canvas)` gives its memory before the first step, a tuple of tensors whose first dimension are the rows;
`update(memory, prediction, counted)` says which rows are done, bool `(B,)`, and gives the memory for the next step. `counted` bool (B, C),
None for all, are the positions that matter: a canvas need not be waited for behind an end it is sure of (`before_sure_end`).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from .prediction import Prediction


class StoppingRule(Protocol):
    """An instance of one's own is passed to `generate` as `stopping`."""

    def start(self, canvas: torch.Tensor) -> Any: ...
    def update(self, memory: Any, prediction: Prediction, counted: torch.Tensor | None) -> tuple[torch.Tensor, Any]: ...


@dataclass(frozen=True)
class Stable:
    """Done when the argmax canvas equals the `steps` before it. Memory: earlier ones, int64 `(B, steps, C)`, of -1 where there is none."""

    steps: int

    def start(self, canvas: torch.Tensor) -> tuple[torch.Tensor]:
        return (canvas.new_full((canvas.shape[0], self.steps, canvas.shape[1]), -1),)

    def update(self, memory, prediction: Prediction, counted: torch.Tensor | None) -> tuple[torch.Tensor, tuple[torch.Tensor]]:
        argmax, (history,) = prediction.argmax[:, None], memory
        same = history == argmax if counted is None else (history == argmax) | ~counted[:, None]
        return same.flatten(1).all(dim=1), (torch.cat((history, argmax), dim=1)[:, 1:],)  # all of nothing is True


@dataclass(frozen=True)
class Confident:
    """Done when the mean entropy is below `nats`. Remembers nothing."""

    nats: float

    def start(self, canvas: torch.Tensor) -> tuple:
        return ()

    def update(self, memory, prediction: Prediction, counted: torch.Tensor | None) -> tuple[torch.Tensor, tuple]:
        return mean_entropy(prediction.entropy, counted) < self.nats, memory


@dataclass(frozen=True)
class Settled:
    """Done when the entropies of all positions together are below `nats`, whether or not the argmax canvas has changed. Remembers nothing.

    The sum bounds what the positions can still tell each other, as in `samplers.EntropyBoundSampler`, whose bound it is compared with:
    below it that sampler accepts all of them at once, so another pass can only confirm them. A mean has no such meaning: what it allows
    grows with the canvas. Source: the bound of Ben-Hamu et al. 2025 (arXiv 2505.24857), here taken for the end.
    """

    nats: float

    def start(self, canvas: torch.Tensor) -> tuple:
        return ()

    def update(self, memory, prediction: Prediction, counted: torch.Tensor | None) -> tuple[torch.Tensor, tuple]:
        entropy = prediction.entropy if counted is None else prediction.entropy * counted
        return entropy.sum(dim=-1) < self.nats, memory


@dataclass(frozen=True)
class Patience:
    """Done when the mean entropy has reached no new minimum for `steps` steps. Memory: the lowest so far, float32 `(B,)` nats, and the
    steps since, int64 `(B,)`."""

    steps: int

    def start(self, canvas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        waited = canvas.new_zeros(canvas.shape[0])
        return torch.full_like(waited, float("inf"), dtype=torch.float32), waited

    def update(self, memory, prediction: Prediction, counted: torch.Tensor | None) -> tuple[torch.Tensor, tuple]:
        (best, waited), mean = memory, mean_entropy(prediction.entropy, counted)
        waited = torch.where(mean < best, 0, waited + 1)
        return waited >= self.steps, (torch.minimum(mean, best), waited)


@dataclass(frozen=True)
class Never:
    """Not done before the denoising steps are used up. Remembers nothing."""

    def start(self, canvas: torch.Tensor) -> tuple:
        return ()

    def update(self, memory, prediction: Prediction, counted: torch.Tensor | None) -> tuple[torch.Tensor, tuple]:
        return torch.zeros_like(prediction.argmax[:, 0], dtype=torch.bool), memory


@dataclass(frozen=True)
class AllOf:
    """Done when all of `rules` are, of which there is one at least."""

    rules: tuple[StoppingRule, ...]

    def start(self, canvas: torch.Tensor) -> tuple:
        return tuple(rule.start(canvas) for rule in self.rules)

    def update(self, memory, prediction: Prediction, counted: torch.Tensor | None) -> tuple[torch.Tensor, tuple]:
        found, memory = zip(*(rule.update(each, prediction, counted) for rule, each in zip(self.rules, memory, strict=True)), strict=True)
        return self.join(torch.stack(found)), memory

    @staticmethod
    def join(done: torch.Tensor) -> torch.Tensor:
        """Of the rules' answers, bool (rules, B)."""
        return done.all(dim=0)


class AnyOf(AllOf):
    """Done when one of `rules` is."""

    @staticmethod
    def join(done: torch.Tensor) -> torch.Tensor:
        return done.any(dim=0)


class StableAndConfident(AllOf):
    """A row stops when its argmax canvas equals the previous `stability_threshold` ones and the mean entropy of its
    temperature-scaled distributions is below `confidence_threshold` nats. (The released model's rule.)"""

    def __init__(self, stability_threshold: int, confidence_threshold: float):
        super().__init__((Stable(stability_threshold), Confident(confidence_threshold)))


def check_memory(rule: StoppingRule, memory: Any, canvas: torch.Tensor) -> Any:
    """What a rule begins with must be tensors with a row for each of the canvas's, int64 (B, C). Returns it."""
    if wrong := [leaf for leaf in pytree.tree_leaves(memory) if not isinstance(leaf, torch.Tensor) or leaf.shape[:1] != canvas.shape[:1]]:
        rows = len(canvas)
        raise ValueError(f"`stopping` is {rule!r}, whose `start` returned {type(wrong[0]).__name__}; expected tensors of {rows} rows first")
    return memory


def check_update(rule: StoppingRule, found: Any, memory: Any, canvas: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """What a rule says must be bool (B,), and its memory be as before, in form, shapes and dtypes. Returns both."""
    if isinstance(found, tuple) and len(found) == 2:
        done, after = found
        (old, form), (new, got) = pytree.tree_flatten(memory), pytree.tree_flatten(after)
        kept = form == got and all(
            isinstance(each, torch.Tensor) and each.shape == was.shape and each.dtype == was.dtype
            for was, each in zip(old, new, strict=True)
        )
        if kept and isinstance(done, torch.Tensor) and done.dtype == torch.bool and done.shape == canvas.shape[:1]:
            return done, after
    raise ValueError(
        f"`stopping` is {rule!r}, whose `update` returned {type(found).__name__}; expected bool of shape ({len(canvas)},), and a memory of "
        "the same form, shapes and dtypes as before"
    )


def mean_entropy(entropy: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Mean over the canvas, or over its counted positions, `(B,)`."""
    if counted is None:
        return entropy.mean(dim=-1)
    return (entropy * counted).sum(dim=-1) / counted.sum(dim=-1).clamp(min=1)


def before_sure_end(prediction: Prediction, eos: torch.Tensor, nats: float) -> torch.Tensor:
    """Positions up to and including the first end-of-sequence token the canvas is sure of, bool `(B, C)`; all where there is none.

    Sure means: the argmax is one of `eos` and the position's entropy is below `nats`. What lies behind it is cut off in any case, and
    need not be waited for.
    """
    sure = torch.isin(prediction.argmax, eos) & (prediction.entropy < nats)
    return sure.cumsum(dim=-1) - sure.long() == 0


__all__ = [
    "AllOf", "AnyOf", "Confident", "Never", "Patience", "Settled", "Stable", "StableAndConfident", "StoppingRule", "before_sure_end",
    "check_memory", "check_update", "mean_entropy",
]  # fmt: skip
