"""When a row's canvas is finished."""

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

    def check(self, argmax: torch.Tensor, entropy: torch.Tensor, history: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Args: `argmax` (B, C), `entropy` (B, C) nats, `history` (T, B, C). Returns bool `(B,)` and the new history."""
        stable = (history == argmax).all(dim=-1).all(dim=0)  # (B,); all of nothing is True
        confident = entropy.mean(dim=-1) < self.confidence_threshold
        return stable & confident, torch.cat((history, argmax[None]))[1:]


__all__ = ["StableAndConfident"]
