"""The vocabulary in the order of its classes, and sums over the ids of a class.

A constraint tells ids apart by class alone. Sorted by class, the ids of one lie side by side in segments whose widths are powers of two:
a class of 2,571 ids has segments of 1,024, 1,024, 512, 8, 2 and 1. Segments of a width form rectangles `(count, width)`, so that a piece is
summed by plain reductions, with no padding, no loop over classes, and in an order that is fixed on every device. Each segment has a top
of its own: no class loses bits to one that is more probable, whatever the temperature.

Legend: V ids, S segments, K classes; class 0, which no constraint takes, has none. N: positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .sums import counts_rows

LARGEST = 1024  # ids of a segment. Fewer skip more of a peaked distribution, and have more sums to keep
GRAIN = 512  # ids that are left out together or not at all: fewer cost more to go without than to compute
NOTHING = -1e300  # stands for the log of nothing where it is subtracted: -inf less it is -inf, not NaN


@dataclass(frozen=True, eq=False)
class Order:
    """`classes` int64 (V,). `ids` int64 (V,): those that have a class, segment by segment, the `alive` first; then the others. `place`
    int64 (V,): of each id in `ids`. `kind` int64 (S,): the class of a segment; `begin` int64 (S,), its first place; `widths`, how many
    segments there are of which width, falling. `by_kind` int64 (S,): the segments in rising order of class, `counts` int64 (K,): how many
    each has; `listing` int64 (K, most): them, filled up with S."""

    classes: torch.Tensor
    ids: torch.Tensor
    place: torch.Tensor
    alive: int
    kind: torch.Tensor
    begin: torch.Tensor
    widths: tuple[tuple[int, int], ...]
    by_kind: torch.Tensor
    counts: torch.Tensor
    listing: torch.Tensor


def make_order(classes: torch.Tensor, kinds: int, device: torch.device) -> Order:
    """The order of a vocabulary whose ids have `classes` int64 (V,), less than `kinds`; on `device`."""
    classes = classes.cpu()
    listed = torch.argsort(classes, stable=True)
    sizes = torch.bincount(classes, minlength=kinds)
    first, dead = sizes.cumsum(dim=0) - sizes, int(sizes[0])
    kind, ids, widths, width = [], [], [], LARGEST
    while width:
        count = sizes // width if width == LARGEST else sizes // width % 2
        count[0] = 0
        kind.append(torch.repeat_interleave(count))  # the class of each
        rank = torch.arange(len(kind[-1]), dtype=torch.int64, device="cpu") - (count.cumsum(dim=0) - count)[kind[-1]]
        before = torch.zeros_like(sizes) if width == LARGEST else sizes // (2 * width) * (2 * width)
        begin = (first + before)[kind[-1]] + rank * width
        ids.append(listed[begin[:, None] + torch.arange(width, dtype=torch.int64, device="cpu")].flatten())
        if len(begin):
            widths.append((width, len(begin)))
        width //= 2
    kind, ids = torch.cat(kind), torch.cat([*ids, listed[:dead]])
    lengths = torch.tensor([width for width, count in widths for _ in range(count)], dtype=torch.int64, device="cpu")
    by_kind, counts = torch.argsort(kind, stable=True), torch.bincount(kind, minlength=kinds)
    most = int(counts.max())
    lanes = torch.arange(most, dtype=torch.int64, device="cpu")
    listing = (counts.cumsum(dim=0) - counts)[:, None] + lanes
    listing = torch.where(lanes < counts[:, None], by_kind[listing.clamp(max=max(len(kind) - 1, 0))], len(kind))
    place = torch.empty_like(ids).index_copy_(0, ids, torch.arange(len(ids), dtype=torch.int64, device="cpu"))
    classes, ids, place, kind, begin, by_kind, counts, listing = (
        value.to(device) for value in (classes, ids, place, kind, lengths.cumsum(dim=0) - lengths, by_kind, counts, listing)
    )
    return Order(classes, ids, place, len(ids) - dead, kind, begin, tuple(widths), by_kind, counts, listing)


@dataclass(frozen=True, eq=False)
class Orders:
    """The orders of a batch's rows: `rows`, one a row, shared ones the same object; `kinds`, K. `groups`: rows that are computed together
    and their order; one by one on a CPU, so that no row depends on its neighbours."""

    rows: tuple[Order, ...]
    kinds: int
    groups: tuple[tuple[torch.Tensor | slice, Order], ...]

    def select(self, rows: torch.Tensor) -> "Orders":
        """The orders of the rows that stay; `rows` int64 (n,). Waits for the device."""
        return _grouped([self.rows[row] for row in rows.tolist()], self.kinds)


def make_orders(classes: Sequence[torch.Tensor], device: torch.device) -> Orders:
    """The orders of rows whose ids have these classes, int64 (V,) each; rows that share the tensor share the order.

    Raises:
        ValueError: a row without any id that has a class.
    """
    made, kinds = {}, 1 + max(int(one.max()) for one in classes)
    for row, one in enumerate(classes):
        if not bool((one > 0).any()):
            raise ValueError(f"`classes` of row {row} has no id of a class above 0; expected at least one that may be written")
        if id(one) not in made:
            made[id(one)] = make_order(one, kinds, device)
    return _grouped([made[id(one)] for one in classes], kinds)


def _grouped(rows: list[Order], kinds: int) -> Orders:
    device = rows[0].ids.device
    if counts_rows(device):
        return Orders(tuple(rows), kinds, tuple((slice(row, row + 1), order) for row, order in enumerate(rows)))
    members: dict[int, list[int]] = {}
    for row, order in enumerate(rows):
        members.setdefault(id(order), []).append(row)
    groups = [
        (slice(None) if len(members) == 1 else torch.tensor(found, dtype=torch.int64, device=device), rows[found[0]])
        for found in members.values()
    ]
    return Orders(tuple(rows), kinds, tuple(groups))


class Piece(NamedTuple):
    """The segments `segments` of one `width`, whose ids, int64 (W,), have the places from `first` on."""

    first: int
    segments: slice
    ids: torch.Tensor
    width: int

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """(N, W) as (N, segments, width)."""
        return values.unflatten(1, (-1, self.width))


def pieces(order: Order, size: int, needed: list[bool] | None = None) -> Iterator[Piece]:
    """The segments, at most `size` ids at a time, or one segment. Those that are not `needed` may be left out, and are where `GRAIN` ids
    side by side are not."""
    first = begin = 0
    for width, count in order.widths:
        grain, most = max(GRAIN // width, 1), max(size // width, 1)
        wanted = [True] * count
        if needed is not None:
            for done in range(0, count, grain):
                here = slice(done, min(done + grain, count))
                wanted[here] = [any(needed[first + here.start : first + here.stop])] * (here.stop - here.start)
        done = 0
        while done < count:
            stop = done + 1
            while stop < count and stop - done < most and wanted[stop] == wanted[done]:
                stop += 1
            place = begin + done * width
            if wanted[done]:
                ids = order.ids[place : begin + stop * width]
                yield Piece(place, slice(first + done, first + stop), ids, width)
            done = stop
        first, begin = first + count, begin + count * width


class BySegment(NamedTuple):
    """What ids say, segment by segment, each (N, S): `log_mass` float64, nats; `top` float64, nats, of the most probable id; `entropy`
    float64, nats, of an id inside its segment. -inf, -inf and anything where no id is left."""

    log_mass: torch.Tensor
    top: torch.Tensor
    entropy: torch.Tensor


class ByClass(NamedTuple):
    """What ids say, class by class, float64 (N, K), nats: `log_mass`, `best` and `entropy` as of `BySegment`, normalised so that all
    classes have the mass 1 together: `offset` (N, 1) has been subtracted. `share` (N, S): of a segment in its class."""

    log_mass: torch.Tensor
    best: torch.Tensor
    entropy: torch.Tensor
    offset: torch.Tensor
    share: torch.Tensor


def by_class(sums: BySegment, order: Order) -> ByClass:
    """Sums over the segments of a class. Its entropy is that of the segment, and the mean one inside."""
    counts = order.counts.expand(len(sums.top), -1).contiguous()

    def reduced(values: torch.Tensor, how: str) -> torch.Tensor:
        return torch.segment_reduce(values.index_select(1, order.by_kind), how, lengths=counts, axis=1, unsafe=True)

    best = reduced(sums.top, "max")
    highest = best.clamp(min=NOTHING)
    log_mass = reduced((sums.log_mass - highest.index_select(1, order.kind)).exp_(), "sum").log_().add_(highest)
    share = (sums.log_mass - log_mass.clamp(min=NOTHING).index_select(1, order.kind)).exp_()
    entropy = reduced(torch.special.entr(share).addcmul_(share, sums.entropy), "sum")
    offset = log_mass.logsumexp(dim=1, keepdim=True).clamp_(min=NOTHING)
    return ByClass(log_mass - offset, best - offset, entropy, offset, share)


__all__ = [
    "LARGEST",
    "NOTHING",
    "ByClass",
    "BySegment",
    "Order",
    "Orders",
    "Piece",
    "by_class",
    "make_order",
    "make_orders",
    "pieces",
]
