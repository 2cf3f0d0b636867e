"""What a noised canvas position holds: a uniform random token (the released model) or the mask token.

Both kinds answer to one method, `draw`. They know nothing of models; training and generation use the same objects.
"""

from dataclasses import dataclass
from typing import Protocol

import torch


class Noise(Protocol):
    """Draws noise tokens, int64 of the given shape."""

    def draw(self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None = None) -> torch.Tensor: ...


@dataclass(frozen=True)
class UniformNoise:
    """Uniform random ids over the whole vocabulary, special tokens included: what the released model was trained on."""

    vocab_size: int

    def draw(self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None = None) -> torch.Tensor:
        return torch.randint(0, self.vocab_size, tuple(shape), device=device, generator=generator)


@dataclass(frozen=True)
class MaskNoise:
    """The mask token everywhere: masked (absorbing-state) diffusion. Draws no random numbers."""

    mask_token_id: int

    def draw(self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None = None) -> torch.Tensor:
        return torch.full(tuple(shape), self.mask_token_id, dtype=torch.int64, device=device)


def make_noise(kind: str, vocab_size: int, mask_token_id: int | None) -> Noise:
    """As `DiffusionGenerationConfig.noise` says it; ValueError for a mask token that the vocabulary does not hold."""
    if kind != "mask":
        return UniformNoise(vocab_size)
    if mask_token_id >= vocab_size:
        raise ValueError(f"`mask_token_id` is {mask_token_id}; expected a token id from 0 to {vocab_size - 1}")
    return MaskNoise(mask_token_id)


__all__ = ["MaskNoise", "Noise", "UniformNoise", "make_noise"]
