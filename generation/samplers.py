"""Which positions of a denoising step are accepted. Pure: tensors in, tensors out, no state.

A sampler is a frozen dataclass with one method, `accept`; the others are renoised. Every one accepts at least one position.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from .statistics import RowStatistics


class Sampler(Protocol):
    def accept(self, statistics: RowStatistics, step: int, max_denoising_steps: int) -> torch.Tensor:
        """Returns bool `(B, C)`: True where a position is accepted. `step` counts up from 0."""
        ...


@dataclass(frozen=True)
class EntropyBoundSampler:
    """Accepts positions in ascending order of entropy while `cumulative - own <= entropy_bound`.

    The left side bounds the mutual information that is lost when the accepted positions are sampled independently of each
    other. Source: Ben-Hamu et al. 2025 (arXiv 2505.24857); the released model's sampler.

    Args:
        entropy_bound: nats; 0.1 in the released checkpoint.
    """

    entropy_bound: float

    def __post_init__(self):
        if not self.entropy_bound > 0:
            raise ValueError(f"`entropy_bound` is {self.entropy_bound!r}; expected a number > 0, in nats")

    def accept(self, statistics: RowStatistics, step: int = 0, max_denoising_steps: int = 1) -> torch.Tensor:
        ascending, order = statistics.entropy.sort(dim=-1)
        accepted = ascending.cumsum(dim=-1) - ascending <= self.entropy_bound
        return torch.zeros_like(accepted).scatter(-1, order, accepted)


@dataclass(frozen=True)
class ConfidenceSampler:
    """Accepts every position whose most probable token has at least the probability `confidence`, and always the best one.

    Source: the threshold rule of Fast-dLLM (Wu et al. 2025, arXiv 2505.22618).
    """

    confidence: float

    def __post_init__(self):
        if not 0 < self.confidence <= 1:
            raise ValueError(f"`confidence` is {self.confidence!r}; expected a probability above 0, at most 1")

    def accept(self, statistics: RowStatistics, step: int = 0, max_denoising_steps: int = 1) -> torch.Tensor:
        top = statistics.log_probs.exp()
        best = torch.zeros_like(top, dtype=torch.bool).scatter(-1, top.argmax(dim=-1, keepdim=True), True)
        return (top >= self.confidence) | best


@dataclass(frozen=True)
class FixedStepsSampler:
    """Accepts the `ceil(C * (step + 1) / max_denoising_steps)` most confident positions: the same number more at each step,
    the whole canvas at the last. Source: the linear schedule of MaskGIT (Chang et al. 2022, arXiv 2202.04200) and LLaDA."""

    def accept(self, statistics: RowStatistics, step: int, max_denoising_steps: int) -> torch.Tensor:
        length = statistics.log_probs.shape[-1]
        count = -(-length * (step + 1) // max_denoising_steps)
        chosen = statistics.log_probs.topk(min(count, length), dim=-1).indices
        return torch.zeros_like(statistics.log_probs, dtype=torch.bool).scatter(-1, chosen, True)


__all__ = ["ConfidenceSampler", "EntropyBoundSampler", "FixedStepsSampler", "Sampler"]
