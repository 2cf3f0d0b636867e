"""The two walks over the vocabulary of rows that share an order, as `classes.ClassWalk` joins them.

Legend: N positions that count (B * n of those of a group), W ids of a piece, S segments, K classes, D hidden size.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from ..rules.draws import pick
from .filters import Filters, Threshold, find_threshold, listed
from .segments import BySegment, Order, Piece, pieces
from .sums import MASKED, counts_rows
from .walk import leading

LEAST = 2.0**-34  # of a segment's share of a position: a thousand that are left out have together no last bit of float32
MOST_ROWS = 0.75  # of the positions; where more need a piece, all are computed
NAT = math.log(2)  # of bits


class Group(NamedTuple):
    """Rows of one order that are computed together, what the second walk must know of the first, of N positions and S segments: `top`
    float32 (N, S), bits; `share` float64 (N, S), of a segment in its class; `offset` float64 (N, 1), nats. With current tokens, (N,) each:
    their `current_bits`, and of their segment without them `rest_top`, bits, and `rest_mass`, both float32. Where the first walk has mixed:
    `soft` float32 (N, D), the sum of `2^(bits - level)` times an id's embedding over all that are possible, and `level` (N,), bits."""

    top: torch.Tensor
    share: torch.Tensor
    offset: torch.Tensor
    current_bits: torch.Tensor | None = None
    rest_top: torch.Tensor | None = None
    rest_mass: torch.Tensor | None = None
    soft: torch.Tensor | None = None
    level: torch.Tensor | None = None


def _rows(inside: torch.Tensor) -> torch.Tensor | slice:
    """Those that are looked at: where counting them is for nothing, only those that matter."""
    return inside.nonzero().flatten() if counts_rows(inside.device) else slice(None)


def _few(needed: torch.Tensor) -> torch.Tensor | slice:
    """The positions that are `needed` bool (N,), where they are few; else all."""
    some = needed.nonzero().flatten()
    return some if len(some) < MOST_ROWS * len(needed) else slice(None)


def _at(values: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Of (N, X) the values (N,) in `column` int64 (N,)."""
    return values.gather(1, column[:, None]).squeeze(1)


def _segment_of(bits: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """Of (n, segments, width) a copy of one segment each, (n, width)."""
    return bits.take_along_dim(segment[:, None, None], dim=1).squeeze(1)


def _sorted(filters: Filters, order: Order) -> Filters:
    """The filters, of places in the order instead of ids."""
    allowed_ids = filters.allowed_ids
    return replace(
        filters,
        allowed=None if filters.allowed is None else filters.allowed[..., order.ids],
        allowed_ids=None if allowed_ids is None else torch.where(allowed_ids < 0, -1, order.place[allowed_ids.clamp(min=0)]),
        hidden=None if filters.hidden is None else order.place[filters.hidden],
    )


class _Drawn(NamedTuple):
    """Ids that are to be found in a `segment` int64 (N,): drawn with `chance` (N,), or the most probable ones; not the one at the place
    `without` int64 (N,), unless it is `alone` bool (N,)."""

    segment: torch.Tensor
    chance: torch.Tensor | None = None
    without: torch.Tensor | None = None
    alone: torch.Tensor | None = None

    def lane(self, bits: torch.Tensor, begin: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        """Where in a segment, int64 (n,), of which `bits` (n, width) are given, and the places at which it begins."""
        if self.without is not None:
            lanes = torch.arange(bits.shape[1], dtype=torch.int64, device=bits.device)
            bits = bits.masked_fill(begin[:, None] + lanes == self.without[rows, None], MASKED)
        if self.chance is None:
            return bits.argmax(dim=-1)
        return pick(torch.exp2(bits - bits.amax(dim=-1, keepdim=True)), self.chance[rows])


class _Leading:
    """The `count` most probable ids of N positions, falling: their `places` int64 (N, count) in the order, and how probable they are."""

    def __init__(self, positions: int, count: int, device: torch.device):
        self.count = count
        self.places = torch.zeros((positions, count), dtype=torch.int64, device=device)
        self.bits = torch.full((positions, count), MASKED, dtype=torch.float32, device=device)

    def add(self, piece: Piece, bits: torch.Tensor, rows: torch.Tensor | slice) -> None:
        """The bits (n, W) of a piece, of the positions `rows`."""
        if not self.count:
            return
        self.places[rows], self.bits[rows] = leading((self.places[rows], self.bits[rows]), bits, piece.first, self.count)

    def log_probs(self) -> torch.Tensor:
        """Float32 (N, count), nats; -inf where there is no such id, or none that weighs anything."""
        return torch.where(self.bits > MASKED / 2, self.bits * NAT, -float("inf"))


class GroupWalk:
    """The walks of the `rows` of a `classes.ClassWalk` that have one order."""

    def __init__(self, walk, rows: torch.Tensor | slice, order: Order, threshold: Threshold | None, lifted: torch.Tensor | None = None):
        self.walk, self.order, self.threshold = walk, order, threshold
        hidden = walk.hidden[rows, : walk.count]
        self.batch_size, self.device = len(hidden), hidden.device
        self.hidden = hidden.flatten(0, 1)  # (N, D)
        if walk.shape.squashed:
            self.hidden = self.hidden * (2 / walk.head.softcap)
        self.current, self.likely = (None if ids is None else ids[rows, : walk.count].flatten() for ids in (walk.current, walk.likely))
        self.possible = None if walk.possible is None else walk.possible[rows].flatten(0, 1)  # (N, K)
        self.filters = None if walk.filters is None or not walk.filters.narrow() else _sorted(walk.filters.select(rows), order)
        self.lifted = None if lifted is None else lifted.repeat_interleave(walk.count)[:, None]
        self.seen = 0

    def pieces(self, dead: bool = False) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Pieces, and their bits float32 (N, W), which may be overwritten; those that are `dead`, too, as one segment each."""
        yield from ((piece, self.bits(piece)) for piece in pieces(self.order, self.walk.piece))
        for first in range(self.order.alive, len(self.order.ids) if dead else 0, self.walk.piece):
            ids = self.order.ids[first : first + self.walk.piece]
            piece = Piece(first, slice(0), ids, len(ids))
            yield piece, self.bits(piece)

    def bits(self, piece: Piece, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Of the positions `rows` alone."""
        walk, count, hidden = self.walk, len(piece.ids), self.hidden[rows]
        used = walk.workspace.narrow(len(hidden), count)
        weight = torch.index_select(walk.head.weight, 0, piece.ids, out=walk.weights[:count])
        walk.products.scores(hidden, weight.to(hidden.dtype), used.products, walk.shape.squashed)
        kept = None if self.filters is None else listed(self.filters, piece.first, count, self.batch_size, walk.count)
        kept = kept if kept is None or len(kept) == 1 else kept[rows]
        if self.threshold is not None:
            above, self.seen = self.threshold.keep(walk.shape.logits(used.products, kept), self.seen)
            if self.lifted is not None:
                above |= self.lifted
            kept = above if kept is None else kept & above
        return walk.shape.bits(used.products, kept, out=used.logits)

    def find_threshold(self) -> Threshold:
        """Of all ids, those of no class, too, and last: of equal logits at the threshold, those with a class are kept."""

        def logits() -> Iterator[torch.Tensor]:
            shape = self.walk.shape
            for _, bits in self.pieces(dead=True):
                masked = bits <= MASKED / 2
                yield bits.mul_(NAT).sub_(shape.softcap / shape.temperature).masked_fill_(masked, MASKED)

        return find_threshold(self.walk.filters, logits, len(self.order.ids))

    def first(self) -> tuple[BySegment, Group]:
        """The sums of every segment, each relative to its top."""
        mixture = None if self.possible is None else _Mixture(self)
        size, spare = (len(self.hidden), len(self.order.kind)), self.walk.workspace.exponentials
        top, mass, entropy = (torch.empty(size, dtype=torch.float32, device=self.device) for _ in range(3))
        current_bits = rest_top = rest_mass = None
        if self.current is not None:
            place = self.order.place[self.current]
            current_bits, rest_top, rest_mass = (torch.full_like(top[:, 0], value) for value in (MASKED, MASKED, 0.0))
        for piece, bits in self.pieces():
            if self.current is not None:
                inside = (place >= piece.first) & (place < piece.first + len(piece.ids))
                rows = _rows(inside)
                at = (place[rows] - piece.first).clamp_(0, len(piece.ids) - 1)[:, None]
                near = _segment_of(piece.of(bits)[rows], (at // piece.width).squeeze(1))
                here = near.gather(1, at % piece.width)
                near.scatter_(1, at % piece.width, MASKED)
                highest = near.amax(dim=-1)
                left = near.sub_(highest[:, None]).exp2_().sum(dim=-1)
                for kept, found in ((current_bits, here.squeeze(1)), (rest_top, highest), (rest_mass, left)):
                    kept[rows] = torch.where(inside[rows], found, kept[rows])
            depth, within = piece.of(bits), piece.segments
            top[:, within] = highest = depth.amax(dim=-1)
            shares = torch.exp2(depth.sub_(highest[..., None]), out=piece.of(spare[: len(bits), : len(piece.ids)]))
            mass[:, within] = shares.sum(dim=-1)
            entropy[:, within] = depth.mul_(shares).sum(dim=-1)
            if mixture is not None:
                mixture.add(piece, highest, shares)
        if self.current is not None:
            rest_mass.masked_fill_(rest_top <= MASKED / 2, 0.0)
        entropy.mul_(-NAT / mass).add_(mass.log())
        empty = top <= MASKED / 2
        high = (top.double() * NAT).masked_fill_(empty, -float("inf"))
        mixed = () if mixture is None else (mixture.soft, mixture.level)
        group = Group(top, high, high, current_bits, rest_top, rest_mass, *mixed)
        return BySegment(high + mass.double().log(), high, entropy.double()), group

    def second(
        self, group: Group, log_mass: torch.Tensor, entropy: torch.Tensor, shares: torch.Tensor, sample: torch.Tensor,
        best: torch.Tensor, best_log_prob: torch.Tensor, chance: torch.Tensor | None, candidates: int,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """The fields of a `Prediction` of N positions. Args: those of sums and lattice, (N, K) or (N,); `chance` (N, 4 or 6);
        `candidates`: how many of the most probable ids are given."""
        order, mass, mixes = self.order, shares.exp(), group.soft is None or candidates > 0
        rise = torch.where(mass > 0, shares - log_mass, -float("inf")).sub_(group.offset)  # (N, K), from what was summed to the marginal
        weight = mass.index_select(1, order.kind).mul_(group.share)  # (N, S)
        drawn = self.choose_segments(group, rise, weight, sample, best, chance)
        heavy = self.heavy(weight if mixes else None, drawn)
        places = [torch.zeros_like(one.segment) for one in drawn]
        if mixes:
            rises, spare = (rise / NAT).index_select(1, order.kind).float(), self.walk.workspace.exponentials
            soft = torch.zeros(self.hidden.shape, dtype=torch.float32, device=self.device)
        else:
            soft = group.soft * (rise.amax(dim=1) + group.level * NAT).exp_().float()[:, None]
        best_ids = _Leading(len(soft), min(candidates, len(order.ids)), self.device)
        for piece in pieces(order, self.walk.piece, None if heavy is None else heavy.any(dim=0).tolist()):
            within = piece.segments
            rows = slice(None) if heavy is None else _few(heavy[:, within].any(dim=1))
            bits = piece.of(self.bits(piece, rows))
            for place, one in zip(places, drawn, strict=True):
                segment = one.segment[rows] - within.start
                inside = (segment >= 0) & (segment < bits.shape[1])
                here = _rows(inside)
                segment = segment[here].clamp_(0, bits.shape[1] - 1)
                those = here if isinstance(rows, slice) else rows[here]
                begin = piece.first + segment * piece.width
                found = begin + one.lane(_segment_of(bits[here], segment), begin, those)
                place[those] = torch.where(inside[here], found, place[those])
            if mixes:
                bits.add_(rises[rows, within, None])
                best_ids.add(piece, bits.flatten(1), rows)
                weights = torch.exp2(bits, out=piece.of(spare[: len(bits), : len(piece.ids)])).flatten(1)
                self.mix(soft, rows, weights, piece)
        ids = [order.ids[place] for place in places]
        fields = {
            "sample": ids[0] if chance is None else ids[1], "argmax": ids[0],
            "entropy": torch.special.entr(mass).addcmul_(mass, entropy).sum(dim=-1).clamp_(min=0).float(),
            "log_probs": (_at(shares, best) + best_log_prob - _at(log_mass, best)).float(),
            "soft_embeds": soft.to(self.walk.table.dtype) * self.walk.head.embed_scale,
        }  # fmt: skip
        if candidates:
            fields |= {"candidates": order.ids[best_ids.places], "candidate_log_probs": best_ids.log_probs()}
        if self.current is not None:
            log_probs = _at(rise, order.classes[self.current]).add_(group.current_bits * NAT)
            left = ~(group.current_bits <= MASKED / 2) & (order.place[self.current] < order.alive)
            fields["current_log_probs"] = torch.where(left, log_probs, -float("inf")).float()
            fields["other"] = torch.where(drawn[-1].alone, self.current, ids[-1])
        return fields

    def mix(self, soft: torch.Tensor, rows: torch.Tensor | slice, weights: torch.Tensor, piece: Piece) -> None:
        """Adds embeddings of a piece, whose bits were computed last, to the `rows` of `soft` (N, D): with `weights` (n, W)."""
        mixed = self.walk.products.mix(weights.to(self.hidden.dtype), self.walk.embeddings(piece.ids))
        if isinstance(rows, slice):
            soft.add_(mixed)
        else:
            soft.index_add_(0, rows, mixed.float())

    def bits_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Of one id a position, int64 (N,): float32 (N,), `MASKED` where it is not possible, or might be banned."""
        if self.filters is not None:
            return torch.full(ids.shape, MASKED, dtype=torch.float32, device=self.device)
        products = (self.hidden * self.walk.head.weight[ids].to(self.hidden.dtype)).sum(dim=-1, keepdim=True)
        products = products.sigmoid_() if self.walk.shape.squashed else products
        return self.walk.shape.bits(products, self.possible.gather(1, self.order.classes[ids][:, None])).squeeze(1)

    def heavy(self, weight: torch.Tensor | None, drawn: list["_Drawn"]) -> torch.Tensor | None:
        """Which segments a position needs, bool (N, S): by their `weight` (N, S), or where it is None those of which something was drawn.
        None where all are computed: to count them would be to wait for the device, and a threshold counts what it has seen."""
        if not counts_rows(self.device) or self.threshold is not None:
            return None
        needed = torch.zeros((len(self.hidden), len(self.order.kind)), dtype=torch.bool, device="cpu") if weight is None else weight > LEAST
        return needed.scatter_(1, torch.stack([one.segment for one in drawn], dim=1), True)

    def choose_segments(
        self, group: Group, rise: torch.Tensor, weight: torch.Tensor, sample: torch.Tensor, best: torch.Tensor, chance: torch.Tensor | None
    ) -> list["_Drawn"]:
        """Where the best string's ids lie, the drawn one's, and another token's than the current one."""
        order = self.order
        last = len(order.kind) - 1  # what class 0 of lost rows would be is clamped to
        lanes, tops = order.listing[best], torch.nn.functional.pad(group.top, (0, 1), value=-float("inf"))
        drawn = [_Drawn(_at(lanes, tops.gather(1, lanes).argmax(dim=-1)).clamp_(max=last))]
        if chance is not None:
            lanes, shares = order.listing[sample], torch.nn.functional.pad(group.share, (0, 1))
            drawn.append(_Drawn(_at(lanes, pick(shares.gather(1, lanes), chance[:, 2])).clamp_(max=last), chance[:, 3]))
        if self.current is None:
            return drawn
        place = order.place[self.current]
        alive, near = (place < order.alive)[:, None], (torch.searchsorted(order.begin, place, right=True) - 1)[:, None]
        left = rise.gather(1, order.kind[near]) + (group.rest_top.double() * NAT)[:, None]
        if chance is None:
            tops = group.top.double() * NAT + rise.index_select(1, order.kind)
            tops = torch.where(alive, tops.scatter(1, near, left), tops)
            highest = tops.max(dim=-1)
            return [*drawn, _Drawn(highest.indices, None, place, ~(highest.values > MASKED / 2))]
        weight = torch.where(alive, weight.scatter(1, near, left.exp_().mul_(group.rest_mass[:, None])), weight)
        return [*drawn, _Drawn(pick(weight, chance[:, 4]), chance[:, 5], place, ~(weight.sum(dim=-1) > 0))]


class _Mixture:
    """The soft embedding of the possible classes as pieces come: `Group.soft` and `level`, the highest bits so far."""

    def __init__(self, walk: GroupWalk):
        self.walk, self.possible = walk, walk.possible.index_select(1, walk.order.kind)  # (N, S)
        self.soft = torch.zeros(walk.hidden.shape, dtype=torch.float32, device=walk.device)
        self.level = torch.full((len(self.soft),), MASKED, dtype=torch.float32, device=walk.device)
        if walk.likely is not None:
            self.level = walk.bits_of(walk.likely)

    def add(self, piece: Piece, top: torch.Tensor, shares: torch.Tensor) -> None:
        """A piece's ids, whose bits lie below the `top` (N, segments) of theirs by `shares` (N, segments, width), used up."""
        top = top.masked_fill(~self.possible[:, piece.segments], MASKED)
        level = torch.maximum(self.level, top.amax(dim=1))
        self.soft.mul_(torch.exp2(self.level - level)[:, None])
        self.level = level
        scale = torch.exp2(top - level[:, None]).masked_fill_(top <= MASKED / 2, 0.0)
        rows = _few((scale > LEAST).any(dim=1))
        if isinstance(rows, slice) or len(rows):
            weights = shares.mul_(scale[..., None]) if isinstance(rows, slice) else shares[rows].mul_(scale[rows, :, None])
            self.walk.mix(self.soft, rows, weights.flatten(1), piece)


__all__ = ["Group", "GroupWalk"]
