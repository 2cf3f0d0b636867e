"""Where random numbers come from.

`BatchDraws` draws for the whole batch at once, one number after another, in transformers' order. `RowDraws` draws for every row
from a seed of its own and the place in the generation: which canvas, which step, and what for. A row's tokens then depend on its own
seed alone: not on its neighbours, its place, rows that left the batch before, or steps that were computed although the row had
finished. `DrawnStep` holds the numbers of one step as tensors, drawn before it.

From whole probabilities `BatchDraws` draws tokens as transformers does, `RowDraws` as a walk over the vocabulary would (`WalkDraws`): who
looks at whole logits gets the tokens that he would have got without, but for rounding.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch

from .noise import Noise

COPY_STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads the seeds of `num_return_sequences` copies


def pick(weights: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """A place int64 (...), drawn in proportion to `weights` (..., W) with uniform numbers `chance` (...); never one of no weight, unless
    all have none."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[..., -1:]
    wanted = ((1 - chance.to(weights.dtype))[..., None] * total).clamp_(min=torch.finfo(weights.dtype).tiny)
    found = torch.searchsorted(cumulative, torch.minimum(wanted, total)).squeeze(-1)
    return found.clamp_(max=weights.shape[-1] - 1)  # NaN is sorted behind all


class TokenDraws(Protocol):
    """What draws tokens int64 (B, C) from whole probabilities `(B, C, V)`."""

    def tokens(self, probabilities: torch.Tensor, purpose: str = "tokens") -> torch.Tensor: ...


class Draws(TokenDraws, Protocol):
    """Source of sampled tokens and of noise for the rows that are still computed.

    Each number is drawn for a purpose, and two purposes of a step never get the same ones: "tokens" and "other tokens" from whole
    probabilities, "uniforms" of a walk over the vocabulary, "acceptance" of an informed sampler, and the noise.

    `of_walk` draws the tokens of a step from whole probabilities; `shape` is that of the numbers which a walk draws, `tile` the number of
    ids that share them.
    """

    def at(self, canvas_index: int, step: int) -> "Draws": ...
    def of_walk(self, shape: tuple[int, ...], tile: int, device: torch.device) -> "TokenDraws": ...
    def uniforms(self, shape: tuple[int, ...], device: torch.device, purpose: str = "uniforms") -> torch.Tensor: ...
    def noise(self, noise: Noise, shape: tuple[int, int], device: torch.device) -> torch.Tensor: ...
    def select(self, rows: torch.Tensor) -> "Draws": ...


@dataclass(frozen=True, eq=False)
class WalkDraws:
    """Tokens drawn from whole probabilities as a walk draws them: tile by tile, each of which takes over from those before it with the
    probability of its share of the mass so far, and only then draws an id (`vocabulary.sums`).

    `chance` float32 (B, C, tiles, 2 or 4): of each tile whether it takes over, and which id; the second pair of another token than the
    current one. `tile`: ids of one.
    """

    chance: torch.Tensor
    tile: int

    def tokens(self, probabilities: torch.Tensor, purpose: str = "tokens") -> torch.Tensor:
        first = 0 if purpose == "tokens" else 2
        takes_over, within = self.chance.to(probabilities.device)[..., first : first + 2].unbind(-1)  # (B, C, tiles)
        vocab_size = probabilities.shape[-1]
        tile = min(self.tile, vocab_size)
        tiles = torch.nn.functional.pad(probabilities, (0, -vocab_size % tile)).unflatten(-1, (-1, tile))
        mass = tiles.sum(dim=-1)
        numbers = torch.arange(mass.shape[-1], dtype=torch.int64, device=mass.device)
        last = torch.where(takes_over * mass.cumsum(dim=-1) < mass, numbers, 0).amax(dim=-1, keepdim=True)  # (B, C, 1)
        weights = tiles.take_along_dim(last[..., None], dim=-2).squeeze(-2)
        return pick(weights, within.gather(-1, last).squeeze(-1)) + last.squeeze(-1) * tile


@dataclass(frozen=True)
class BatchDraws:
    """One generator for the batch (None: torch's global one); rows cannot leave."""

    generator: torch.Generator | None = None

    def at(self, canvas_index: int, step: int) -> "BatchDraws":
        return self

    def of_walk(self, shape: tuple[int, ...], tile: int, device: torch.device) -> "BatchDraws":
        return self

    def tokens(self, probabilities: torch.Tensor, purpose: str = "tokens") -> torch.Tensor:
        """One token a position from probabilities `(B, C, V)`, int64 `(B, C)`."""
        flat = torch.multinomial(probabilities.flatten(0, 1), num_samples=1, generator=self.generator)
        return flat.view(probabilities.shape[:-1])

    def uniforms(self, shape: tuple[int, ...], device: torch.device, purpose: str = "uniforms") -> torch.Tensor:
        """Uniform numbers in [0, 1), float32 of `shape` (B, ...)."""
        return torch.rand(shape, dtype=torch.float32, device=device, generator=self.generator)

    def noise(self, noise: Noise, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
        return noise.draw(shape, device, self.generator)

    def select(self, rows: torch.Tensor) -> "BatchDraws":
        return self


@dataclass(frozen=True)
class RowDraws:
    """One seed a row. `canvas_index` and `step` say where in the generation the numbers are drawn (-1: a canvas's first noise);
    the same place always gives the same numbers for a purpose, and other ones for another."""

    seeds: tuple[int, ...]
    canvas_index: int = 0
    step: int = -1

    def at(self, canvas_index: int, step: int) -> "RowDraws":
        """The numbers of another place."""
        return replace(self, canvas_index=canvas_index, step=step)

    def of_walk(self, shape: tuple[int, ...], tile: int, device: torch.device) -> WalkDraws:
        return WalkDraws(self.uniforms(shape, device), tile)

    def tokens(self, probabilities: torch.Tensor, purpose: str = "tokens") -> torch.Tensor:
        pairs = zip(probabilities, self._generators(purpose, probabilities.device), strict=True)
        return torch.stack([torch.multinomial(row, num_samples=1, generator=generator).squeeze(-1) for row, generator in pairs])

    def uniforms(self, shape: tuple[int, ...], device: torch.device, purpose: str = "uniforms") -> torch.Tensor:
        generators = self._generators(purpose, device)
        return torch.stack([torch.rand(shape[1:], dtype=torch.float32, device=device, generator=one) for one in generators])

    def noise(self, noise: Noise, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
        return torch.cat([noise.draw((1, shape[1]), device, generator) for generator in self._generators("noise", device)])

    def select(self, rows: torch.Tensor) -> "RowDraws":
        return replace(self, seeds=tuple(self.seeds[row] for row in rows.tolist()))

    def _generators(self, purpose: str, device: torch.device):
        """One generator, seeded for one row after the other."""
        generator = torch.Generator(device)
        for seed in self.seeds:
            place = f"{seed} {self.canvas_index} {self.step} {purpose}".encode()
            yield generator.manual_seed(int.from_bytes(hashlib.blake2b(place, digest_size=7).digest()))


class DrawnStep(NamedTuple):
    """The random numbers of one step, drawn before it: plain tensors, which a recorded step takes as inputs. Gives them as `Draws` does.

    `walk` float32 (B, C, tiles, 2 or 4), None if none are drawn; `renoised` int64 (B, C); `acceptance` float32 (B, C), None unless the
    sampler is informed.
    """

    walk: torch.Tensor | None
    renoised: torch.Tensor
    acceptance: torch.Tensor | None

    def uniforms(self, shape: tuple[int, ...], device: torch.device, purpose: str = "uniforms") -> torch.Tensor:
        found = self.acceptance if purpose == "acceptance" else self.walk
        if found is None or tuple(found.shape) != tuple(shape):
            got = None if found is None else tuple(found.shape)
            raise ValueError(f"the step's {purpose} were drawn with shape {got}; expected {tuple(shape)}")
        return found

    def noise(self, noise: Noise, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
        return self.renoised


def row_draws(
    seed: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    prompts: int,
    copies: int,
    fixed: bool = False,
) -> RowDraws:
    """A seed for each of `prompts * copies` rows, the copies of a prompt lying side by side.

    Args:
        seed: one for every row, or one a prompt; copies of a prompt get seeds of their own, derived from it.
        generator: one, from which the rows' seeds are drawn, or one a row, from which its seed is. Default: torch's global one.
        fixed: where neither is given the seed is 0.

    Raises:
        ValueError: the wrong number of either, or a seed that is no integer.
    """
    if fixed and seed is None and generator is None:
        seed = 0
    if seed is not None:
        seeds = [seed] * prompts if isinstance(seed, int) else list(seed)
        if len(seeds) != prompts or not all(isinstance(value, int) and not isinstance(value, bool) for value in seeds):
            raise ValueError(f"`seed` is {seed!r}; expected an integer, or a list of {prompts}, one a prompt")
        return RowDraws(tuple((value + copy * COPY_STRIDE) % 2**63 for value in seeds for copy in range(copies)))
    if isinstance(generator, Sequence):
        if len(generator) != prompts * copies:
            raise ValueError(f"`generator` has {len(generator)} generators; expected {prompts * copies}, one a row")
        return RowDraws(tuple(_draw_seeds(1, each)[0] for each in generator))
    return RowDraws(tuple(_draw_seeds(prompts * copies, generator)))


def _draw_seeds(count: int, generator: torch.Generator | None) -> list[int]:
    device = torch.device("cpu") if generator is None else generator.device
    return torch.randint(2**63 - 1, (count,), generator=generator, device=device).tolist()


__all__ = ["BatchDraws", "DrawnStep", "Draws", "RowDraws", "TokenDraws", "WalkDraws", "pick", "row_draws"]
