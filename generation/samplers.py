"""Which positions of a denoising step are accepted. Pure: tensors in, tensors out, no state."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class EntropyBoundSampler:
    """Accepts positions in ascending order of entropy while `cumulative - own <= entropy_bound`.

    The left side bounds the mutual information that is lost when the accepted positions are sampled independently of each
    other. At least one position is always accepted. Source: Ben-Hamu et al. 2025 (arXiv 2505.24857).

    Args:
        entropy_bound: nats; 0.1 in the released checkpoint.
    """

    entropy_bound: float

    def __post_init__(self):
        if not self.entropy_bound > 0:
            raise ValueError(f"`entropy_bound` is {self.entropy_bound!r}; expected a number > 0, in nats")

    def accept(self, entropy: torch.Tensor) -> torch.Tensor:
        """Args: `entropy` float `(B, C)`, nats. Returns bool `(B, C)`: True where a position is accepted."""
        ascending, order = entropy.sort(dim=-1)
        accepted = ascending.cumsum(dim=-1) - ascending <= self.entropy_bound
        return torch.zeros_like(accepted).scatter(-1, order, accepted)


__all__ = ["EntropyBoundSampler"]
