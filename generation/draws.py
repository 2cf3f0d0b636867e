"""Where random numbers come from.

`BatchDraws` draws for the whole batch at once, in transformers' order. `RowDraws` has a generator for every row, so that
a row's tokens depend on its own seed alone: not on its neighbours, its place, or rows that left the batch before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .noise import Noise

COPY_STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads the seeds of `num_return_sequences` copies


class Draws(Protocol):
    """Source of sampled tokens and of noise for the rows that are still computed."""

    def tokens(self, probabilities: torch.Tensor) -> torch.Tensor: ...
    def uniforms(self, batch_size: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor: ...
    def noise(self, noise: Noise, shape: tuple[int, int], device: torch.device) -> torch.Tensor: ...
    def select(self, rows: torch.Tensor) -> "Draws": ...


@dataclass(frozen=True)
class BatchDraws:
    """One generator for the batch (None: torch's global one); rows cannot leave."""

    generator: torch.Generator | None = None

    def tokens(self, probabilities: torch.Tensor) -> torch.Tensor:
        """One token a position from probabilities `(B, C, V)`, int64 `(B, C)`."""
        flat = torch.multinomial(probabilities.flatten(0, 1), num_samples=1, generator=self.generator)
        return flat.view(probabilities.shape[:-1])

    def uniforms(self, batch_size: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Uniform numbers in [0, 1), float32 `(B, *shape)`."""
        return torch.rand((batch_size, *shape), device=device, generator=self.generator)

    def noise(self, noise: Noise, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
        return noise.draw(shape, device, self.generator)

    def select(self, rows: torch.Tensor) -> "BatchDraws":
        return self


@dataclass(frozen=True)
class RowDraws:
    """One generator a row."""

    generators: tuple[torch.Generator, ...]

    def tokens(self, probabilities: torch.Tensor) -> torch.Tensor:
        pairs = zip(probabilities, self.generators, strict=True)
        return torch.stack([torch.multinomial(row, num_samples=1, generator=generator).squeeze(-1) for row, generator in pairs])

    def uniforms(self, batch_size: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        return torch.stack([torch.rand(shape, device=device, generator=generator) for generator in self.generators])

    def noise(self, noise: Noise, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
        return torch.cat([noise.draw((1, shape[1]), device, generator) for generator in self.generators])

    def select(self, rows: torch.Tensor) -> "RowDraws":
        return RowDraws(tuple(self.generators[row] for row in rows.tolist()))


def row_draws(
    seed: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    prompts: int,
    copies: int,
    device: torch.device,
) -> RowDraws:
    """A generator for each of `prompts * copies` rows, the copies of a prompt lying side by side.

    Args:
        seed: one for every row, or one a prompt; copies of a prompt get seeds of their own, derived from it.
        generator: one, from which the rows' seeds are drawn, or one a row. Default: torch's global one.

    Raises:
        ValueError: both are given, or the wrong number of either, or a seed that is no integer.
    """
    if seed is not None and generator is not None:
        raise ValueError("`seed` and `generator` are both given; expected one of them")
    if seed is not None:
        seeds = [seed] * prompts if isinstance(seed, int) else list(seed)
        if len(seeds) != prompts or not all(isinstance(value, int) and not isinstance(value, bool) for value in seeds):
            raise ValueError(f"`seed` is {seed!r}; expected an integer, or a list of {prompts}, one a prompt")
        seeds = [(value + copy * COPY_STRIDE) % 2**63 for value in seeds for copy in range(copies)]
    elif isinstance(generator, Sequence):
        if len(generator) != prompts * copies:
            raise ValueError(f"`generator` has {len(generator)} generators; expected {prompts * copies}, one a row")
        return RowDraws(tuple(generator))
    else:
        source = torch.device("cpu") if generator is None else generator.device
        seeds = torch.randint(2**63 - 1, (prompts * copies,), generator=generator, device=source).tolist()
    return RowDraws(tuple(torch.Generator(device).manual_seed(value) for value in seeds))


__all__ = ["BatchDraws", "Draws", "RowDraws", "row_draws"]
