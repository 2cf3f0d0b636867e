"""The running sums of one pass over the vocabulary, and what a piece of it adds to them.

Running sums as in online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867). The sample is a reservoir over tiles: a tile's
candidate replaces the one before with the probability of its share of the mass so far, and only then is it drawn.

`absorb` is the reference of `kernel.absorb_triton`. Knows nothing of weights: it is handed a piece's logits.

N: positions, W: ids of a piece; the example of `vocabulary` shows the sums.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..rules.draws import pick

MASKED = -1e30  # the logit of an id that cannot be: exp gives 0 beside any real logit, and 0 * MASKED is 0, where -inf gives NaN


class Running(NamedTuple):
    """What is known after some pieces, `(N,)` each.

    In bits, as `Shape.bits` gives them: `top`, the highest b; `mass` and `spread`, the sums of 2^(b - top) and of 2^(b - top) * (b - top),
    float32; `argmax` and `sample`, int64. Of the current tokens, if they are given: `current` int64, and their `current_bits`; and of all
    ids but that one `other_top`, `other_mass` and the draw `other`.
    """

    top: torch.Tensor
    mass: torch.Tensor
    spread: torch.Tensor
    argmax: torch.Tensor
    sample: torch.Tensor
    current: torch.Tensor | None
    current_bits: torch.Tensor | None
    other_top: torch.Tensor | None
    other_mass: torch.Tensor | None
    other: torch.Tensor | None


class Shape(NamedTuple):
    """How a head's products x become logits: `l = softcap * tanh(x / softcap) / temperature`; `squashed`: what the products are is
    sigmoid(2 * x / softcap).

    By `tanh(y) = 2 * sigmoid(2 * y) - 1`: on a CPU that takes a ninth of tanh's time, and is as exact as 1e-7 of the soft cap. Likewise
    powers of 2 take a quarter of exp's, so sums are kept in bits.
    """

    softcap: float
    temperature: float | torch.Tensor
    squashed: bool = False

    def bits(self, products: torch.Tensor, kept: torch.Tensor | None, out: torch.Tensor | None = None) -> torch.Tensor:
        """`(l + softcap / temperature) / log(2)`, float32 (N, W), from products (N, W) of any dtype; `MASKED` where `kept`, bool
        (N or 1, W), is False. In `out` float32 (N, W), if given; those that are squashed, which are float32, then in their own place."""
        if out is None:
            bits = products.to(torch.float32, copy=True)
        else:
            bits = products if self.squashed else out.copy_(products)
        if not self.squashed:
            bits.mul_(2 / self.softcap).sigmoid_()
        bits.mul_(2 / math.log(2) * self.softcap / self.temperature)
        return bits if kept is None else bits.masked_fill_(~kept, MASKED)

    def logits(self, products: torch.Tensor, kept: torch.Tensor | None, out: torch.Tensor | None = None) -> torch.Tensor:
        """`l` itself, with arguments and result as of `bits`."""
        logits = self.bits(products, None, out).mul_(math.log(2)).sub_(self.softcap / self.temperature)
        return logits if kept is None else logits.masked_fill_(~kept, MASKED)


class Workspace(NamedTuple):
    """Where pieces are computed, one after the other, each `(N, W)`: `products` in the weights' dtype; for `absorb` also `logits` and
    `exponentials`, float32; for its kernel `exponentials` in the weights' dtype, and no logits.

    On a CPU a new tensor of this size is fresh memory, which costs more to get than the arithmetic that fills it.
    """

    products: torch.Tensor
    logits: torch.Tensor | None
    exponentials: torch.Tensor

    def narrow(self, count: int, width: int) -> "Workspace":
        """The workspace of a smaller piece, with no gaps between its rows: a sigmoid's last bit on a CPU depends on where a number lies in
        memory, and a threshold that is met by the number it was taken from must meet it when that is computed anew."""
        return Workspace(*(None if tensor is None else tensor.flatten()[: count * width].view(count, width) for tensor in self))


def make_workspace(count: int, width: int, dtype: torch.dtype, device: torch.device, for_kernel: bool = False) -> Workspace:
    """Workspace for `count` positions and `width` ids. In float32 the products become the logits in place."""

    def empty(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((count, width), dtype=dtype, device=device)

    products = empty(dtype)
    if for_kernel:
        return Workspace(products, None, empty(dtype))
    return Workspace(products, products if dtype == torch.float32 else empty(torch.float32), empty(torch.float32))


def start_running(count: int, device: torch.device, current: torch.Tensor | None) -> Running:
    """Before the first piece; `current` int64 (N,) or None."""

    def filled(value: float) -> torch.Tensor:
        return torch.full((count,), value, dtype=torch.float32, device=device)

    first = (filled(MASKED), filled(0.0), filled(0.0), filled(0).long(), filled(0).long())
    return Running(*first, *((None,) * 5 if current is None else (current, filled(MASKED), filled(MASKED), filled(0.0), current.clone())))


def absorb(
    running: Running, workspace: Workspace, start: int, shape: Shape, kept: torch.Tensor | None, chance: torch.Tensor | None
) -> tuple[Running, torch.Tensor, torch.Tensor]:
    """Adds a piece.

    Args:
        running: used up; go on with what is returned.
        workspace: its `products` are those of hidden states and weights, (N, W); used up.
        start: the first id of the piece.
        shape: makes them logits.
        kept: bool (N or 1, W), ids that can be; None: all.
        chance: uniform numbers in [0, 1), (N, tiles, 2), or (N, tiles, 4) with current tokens; None takes the most probable tokens. One
            tile here; in `absorb_triton` one for every `TILE` ids.

    Returns:
        The sums; 2^(b - top), (N, W) in the dtype of the products, in the workspace; and the factor float32 (N,) that brings earlier sums
        to the new `top`.
    """
    logits = shape.bits(workspace.products, kept, out=workspace.logits)
    piece_top = logits.amax(dim=-1)
    argmax = _update(running.argmax, piece_top > running.top, lambda rows: logits[rows].argmax(dim=-1) + start)
    top = torch.maximum(running.top, piece_top)
    rise = running.top - top
    shrink = torch.exp2(rise)
    current_bits, other_top, other_mass, other = running.current_bits, running.other_top, running.other_mass, running.other
    if running.current is not None:
        place = (running.current - start).clamp(0, logits.shape[1] - 1)[:, None]
        inside = (running.current - start)[:, None] == place
        here = logits.gather(1, place)
        current_bits = torch.where(inside, here, current_bits[:, None]).squeeze(1)
        if chance is None:
            best = logits.scatter_(1, place, torch.where(inside, MASKED, here)).amax(dim=-1)
            other = _update(other, best > other_top, lambda rows: logits[rows].argmax(dim=-1) + start)
            other_top = torch.maximum(other_top, best)
            logits.scatter_(1, place, here)
    logits.sub_(top[:, None])
    exponentials = torch.exp2(logits, out=workspace.exponentials)
    piece_mass = exponentials.sum(dim=-1)
    mass = running.mass * shrink + piece_mass
    spread = (running.spread + rise * running.mass) * shrink + logits.mul_(exponentials).sum(dim=-1)
    sample = argmax if chance is None else _draw(exponentials, mass, piece_mass, chance[:, 0, :2], start, running.sample)
    if running.current is not None and chance is not None:
        here = exponentials.gather(1, place)
        exponentials.scatter_(1, place, torch.where(inside, 0.0, here))
        piece_mass = exponentials.sum(dim=-1)
        other_mass = other_mass * shrink + piece_mass
        other = _draw(exponentials, other_mass, piece_mass, chance[:, 0, 2:], start, other)
        other = torch.where(other_mass > 0, other, running.current)  # a piece that was all masked may have left one of its ids
        exponentials.scatter_(1, place, here)
    running = Running(top, mass, spread, argmax, sample, running.current, current_bits, other_top, other_mass, other)
    same = exponentials.dtype == workspace.products.dtype
    return running, exponentials if same else workspace.products.copy_(exponentials), shrink


def counts_rows(device: torch.device) -> bool:
    """Whether few rows are looked up and computed alone; elsewhere all are, since to count some is to wait for the device."""
    return device.type == "cpu"


def _update(values: torch.Tensor, chosen: torch.Tensor, compute: Callable[[torch.Tensor | slice], torch.Tensor]) -> torch.Tensor:
    """`values` (N,), and `compute(rows)` where `chosen`."""
    if not counts_rows(values.device):
        return torch.where(chosen, compute(slice(None)), values)
    rows = chosen.nonzero().flatten()
    if len(rows) == len(values):  # as at the first piece
        return compute(slice(None))
    return values.index_copy(0, rows, compute(rows)) if len(rows) else values


def _draw(
    exponentials: torch.Tensor, mass: torch.Tensor, piece_mass: torch.Tensor, chance: torch.Tensor, start: int, sample: torch.Tensor
) -> torch.Tensor:
    """The sample (N,) after a piece: drawn from it with the probability `piece_mass / mass`, else the one before."""
    return _update(sample, chance[:, 0] * mass < piece_mass, lambda rows: pick(exponentials[rows], chance[rows, 1]) + start)


__all__ = ["MASKED", "Running", "Shape", "Workspace", "absorb", "counts_rows", "make_workspace", "start_running"]
