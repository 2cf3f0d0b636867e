"""When a row's canvas is finished. Pure: tensors in, tensors out."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StableAndConfident:
    """A row stops when its argmax canvas equals the previous `stability_threshold` ones and the mean entropy of its
    temperature-scaled distributions is below `confidence_threshold` nats. (The released model's rule.)"""

    stability_threshold: int
    confidence_threshold: float

    def empty_history(self, canvas: torch.Tensor) -> torch.Tensor:
        """No earlier argmax canvases: int64 `(stability_threshold, B, C)` of -1, which equals no token."""
        return canvas.new_full((self.stability_threshold, *canvas.shape), -1)

    def check(
        self, argmax: torch.Tensor, entropy: torch.Tensor, history: torch.Tensor, counted: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Args: `argmax` (B, C), `entropy` (B, C) nats, `history` (T, B, C), `counted` bool (B, C): positions that matter, default
        all. Returns bool `(B,)` and the new history."""
        same = history == argmax
        mean = mean_entropy(entropy, counted)
        stable = (same if counted is None else same | ~counted).all(dim=-1).all(dim=0)  # (B,); all of nothing is True
        return stable & (mean < self.confidence_threshold), torch.cat((history, argmax[None]))[1:]


def mean_entropy(entropy: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Mean over the canvas, or over its counted positions, `(B,)`."""
    if counted is None:
        return entropy.mean(dim=-1)
    return (entropy * counted).sum(dim=-1) / counted.sum(dim=-1).clamp(min=1)


def before_sure_end(argmax: torch.Tensor, entropy: torch.Tensor, eos: torch.Tensor, threshold: float) -> torch.Tensor:
    """Positions up to and including the first end-of-sequence token the canvas is sure of, bool `(B, C)`; all where there is none.

    Sure means: the argmax is one of `eos` and the position's entropy is below `threshold` nats. What lies behind it is cut
    off in any case, and need not be waited for.
    """
    sure = torch.isin(argmax, eos) & (entropy < threshold)
    return sure.cumsum(dim=-1) - sure.long() == 0


__all__ = ["StableAndConfident", "before_sure_end", "mean_entropy"]
