"""The running sums of one pass over the vocabulary, and what a piece of it adds to them.

Running sums as in online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867). The sample is a reservoir over pieces: a
piece's candidate replaces the one before with the probability of its share of the mass so far, and only then is it drawn.

Knows nothing of weights: it is handed a piece's logits. N: positions, W: ids of a piece.
"""

from typing import NamedTuple

import torch

MASKED = -1e30  # the logit of an id that cannot be: exp gives 0 beside any real logit, and 0 * MASKED is 0, where -inf gives NaN


class Running(NamedTuple):
    """What is known after some pieces, `(N,)` each.

    `top`, the highest logit; `mass` and `spread`, the sums of e^(l - top) and of e^(l - top) * (l - top), float32; `argmax` and
    `sample`, int64. Of the current tokens, if they are given: `current` int64, and its logit `own`; and of all ids but that one
    `other_top`, `other_mass` and the draw `other`.
    """

    top: torch.Tensor
    mass: torch.Tensor
    spread: torch.Tensor
    argmax: torch.Tensor
    sample: torch.Tensor
    current: torch.Tensor | None
    own: torch.Tensor | None
    other_top: torch.Tensor | None
    other_mass: torch.Tensor | None
    other: torch.Tensor | None


def start_running(count: int, device: torch.device, current: torch.Tensor | None) -> Running:
    """Before the first piece; `current` int64 (N,) or None."""
    lowest = torch.full((count,), MASKED, device=device)
    zero, none = torch.zeros_like(lowest), torch.zeros(count, dtype=torch.int64, device=device)
    others = (None,) * 5 if current is None else (current, lowest, lowest, zero, current)
    return Running(lowest, zero, zero, none, none, *others)


def absorb(running: Running, logits: torch.Tensor, start: int, chance: torch.Tensor | None) -> tuple[Running, torch.Tensor, torch.Tensor]:
    """Adds a piece.

    Args:
        logits: shaped, float32 (N, W), `MASKED` where an id cannot be; overwritten.
        start: the first id of the piece.
        chance: uniform numbers in [0, 1), (N, 2), or (N, 4) with current tokens; None takes the most probable tokens.

    Returns:
        The sums; e^(l - top), float32 (N, W); and the factor (N,) that brings earlier sums to the new `top`.
    """
    piece_top, place = logits.max(dim=-1)
    argmax = torch.where(piece_top > running.top, place + start, running.argmax)
    top = torch.maximum(running.top, piece_top)
    rise = running.top - top
    shrink = torch.exp(rise)
    own, other_top, other_mass, other = running.own, running.other_top, running.other_mass, running.other
    if running.current is not None:
        place = (running.current - start).clamp(0, logits.shape[1] - 1)[:, None]
        inside = (running.current - start)[:, None] == place
        here = logits.gather(1, place)
        own = torch.where(inside, here, own[:, None]).squeeze(1)
        if chance is None:
            best, candidate = logits.scatter_(1, place, torch.where(inside, MASKED, here)).max(dim=-1)
            other = torch.where(best > other_top, candidate + start, other)
            other_top = torch.maximum(other_top, best)
            logits.scatter_(1, place, here)
    logits.sub_(top[:, None])
    exponentials = torch.exp(logits)
    piece_mass = exponentials.sum(dim=-1)
    mass = running.mass * shrink + piece_mass
    spread = (running.spread + rise * running.mass) * shrink + torch.linalg.vecdot(exponentials, logits)
    sample = argmax if chance is None else draw(exponentials, mass, piece_mass, chance[:, :2], start, running.sample)
    if running.current is not None and chance is not None:
        here = exponentials.gather(1, place)
        exponentials.scatter_(1, place, torch.where(inside, 0.0, here))
        piece_mass = exponentials.sum(dim=-1)
        other_mass = other_mass * shrink + piece_mass
        other = draw(exponentials, other_mass, piece_mass, chance[:, 2:], start, other)
        other = torch.where(other_mass > 0, other, running.current)  # a piece that was all masked may have left one of its ids
        exponentials.scatter_(1, place, here)
    return Running(top, mass, spread, argmax, sample, running.current, own, other_top, other_mass, other), exponentials, shrink


def draw(
    exponentials: torch.Tensor, mass: torch.Tensor, piece_mass: torch.Tensor, chance: torch.Tensor, start: int, sample: torch.Tensor
) -> torch.Tensor:
    """The sample (N,) after a piece: drawn from it with the probability `piece_mass / mass`, else the one before.

    On the CPU only the rows that replace walk their piece; elsewhere all do, since to count them is to wait for the device.
    """
    replaced = chance[:, 0] * mass < piece_mass
    rows = replaced.nonzero().flatten() if sample.device.type == "cpu" else slice(None)
    cumulative = exponentials[rows].cumsum(dim=-1)
    wanted = (1 - chance[rows, 1:]) * cumulative[:, -1:]  # in (0, total], so that an id of no mass is never hit
    drawn = torch.searchsorted(cumulative, wanted.clamp(min=1e-45)).squeeze(-1) + start
    if sample.device.type == "cpu":
        return sample.index_copy(0, rows, drawn)
    return torch.where(replaced, drawn, sample)


__all__ = ["MASKED", "Running", "absorb", "draw", "start_running"]
