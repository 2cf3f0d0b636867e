"""What a canvas pass says about a canvas that must be a string of a language, from two walks over the vocabulary.

A constraint tells ids apart by class alone (`constraints.automaton`). The first walk sums the ids of every class: all that is needed to
say what the classes of a canvas are once it must be accepted (`constraints.lattice`). The second draws the ids inside the classes that were
chosen, and mixes the soft embedding of the constrained marginal, `r(t) = p(t) * q(class of t) / m(class of t)`, where m is what p
gives the class and q what acceptance makes of it. Its entropy needs no walk: that of q, and the mean one inside a class.

No `(N, V)` tensor exists, and no id is left out. Ids of no class are never read. `dense_classes` makes the same of whole logits; tests
hold both against an enumeration of all strings (tests/test_vocabulary_classes.py). This file does not know automata:

    walk = ClassWalk(hidden, head, temperature, orders, count, filters, current)
    sums = walk.sums()                                      # then a lattice says what the classes are
    prediction = walk.draw(sums, chosen, chance, pad)

Random numbers: `CHANCES` of each position, whatever the vocabulary and the language. The first is for the lattice.

On a CPU the second walk leaves out segments that weigh less than `LEAST` at a position and of which nothing was drawn there: most of the
vocabulary once a canvas is nearly certain. Nothing here waits for another device.

Legend: N positions that count (B * n of those of a group), n of the C positions of a canvas, W ids of a piece, S segments, K classes.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from ..rules.prediction import NOTHING_MORE, Prediction, Wanted
from .filters import Filters, Threshold, find_threshold, listed
from .products import choose_products
from .segments import BySegment, Order, Orders, Piece, by_class, pick, pieces
from .sums import MASKED, Shape, counts_rows, make_workspace
from .walk import NUMBERS, PIECE, VocabularyHead, cast_dtype, leading

CHANCES, CHANCES_WITH_CURRENT = 3, 5  # uniform numbers of a position: class, segment, id; and segment and id of another token
LEAST = 2.0**-34  # of a segment's share of a position: a thousand that are left out have together no last bit of float32
MOST_ROWS = 0.75  # of the positions; where more need a piece, all are computed
NAT = math.log(2)  # of bits


class Group(NamedTuple):
    """Rows of one order that are computed together, what the second walk must know of the first, of N positions and S segments: `top`
    float32 (N, S), bits; `share` float64 (N, S), of a segment in its class; `offset` float64 (N, 1), nats. With current tokens, (N,) each:
    their `current_bits`, and of their segment without them `rest_top`, bits, and `rest_mass`, both float32."""

    top: torch.Tensor
    share: torch.Tensor
    offset: torch.Tensor
    current_bits: torch.Tensor | None = None
    rest_top: torch.Tensor | None = None
    rest_mass: torch.Tensor | None = None


class ClassSums(NamedTuple):
    """Of B rows, n positions and K classes, float64 (B, n, K), nats, all classes together having the mass 1: `log_mass`; `best`, of a
    class's most probable id; `entropy` of an id inside its class. -inf where a class has no id that may be predicted.

    `loose`: the same without `top_k`, `top_p` and `min_p`, where those are in use; they may leave a canvas no string of the language. Of
    the rows `lifted` bool (B,) they have been taken back.
    """

    log_mass: torch.Tensor
    best: torch.Tensor
    entropy: torch.Tensor
    groups: tuple[Group, ...] = ()
    loose: "ClassSums | None" = None
    lifted: torch.Tensor | None = None


class Chosen(NamedTuple):
    """What a lattice made of `ClassSums`: `posterior` float64 (B, n, K), log-probabilities of the classes; `sample` and `best` int64
    (B, n), the classes drawn and those of the best string; `lost` bool (B,), rows of which no canvas is accepted."""

    posterior: torch.Tensor
    sample: torch.Tensor
    best: torch.Tensor
    lost: torch.Tensor


class ClassWalk:
    """The walks of one step over the vocabulary.

    Args:
        hidden (`(B, C, D)`): normed output of the canvas pass.
        head: as `walk.streamed_prediction` takes it.
        temperature: divides the soft-capped logits.
        orders: the vocabulary as each row's constraint sees it.
        count: positions that count, the first ones of a canvas; those behind are padding.
        filters (*optional*): what narrows the distribution first. The constraint outranks `top_k`, `top_p` and `min_p`: rows of which they
            leave no accepted canvas are predicted without them (`ClassSums.loose`). What `allowed`, `allowed_ids` and `hidden` take
            away is never given back.
        current (`int64 (B, C)`, *optional*): the canvas's tokens; with them, `current_log_probs` and `other` are given.
        piece: ids at a time.

    Raises:
        ValueError: a count that is not of the canvas's positions.
    """

    def __init__(
        self, hidden: torch.Tensor, head: VocabularyHead, temperature: float | torch.Tensor, orders: Orders, count: int,
        filters: Filters | None = None, current: torch.Tensor | None = None, piece: int | None = None,
    ):  # fmt: skip
        if not 0 < count <= hidden.shape[1]:
            raise ValueError(f"`count` is {count}; expected 1 to {hidden.shape[1]}, the positions of the canvas")
        if head.weight.dtype != torch.float64:
            hidden = hidden.to(cast_dtype(hidden.dtype, hidden.device))
        self.hidden, self.head, self.orders, self.count, self.filters, self.current = hidden, head, orders, count, filters, current
        self.table = head.weight if head.embedding is None else head.embedding
        self.shape = Shape(head.softcap, temperature, hidden.dtype == torch.float32)
        self.products = choose_products(hidden.device, hidden.dtype)
        positions = max((1 if isinstance(rows, slice) and rows.stop else len(orders.rows)) for rows, _ in orders.groups) * count
        if piece is None:
            piece = PIECE if hidden.device.type == "cpu" else max(NUMBERS // positions, 1)
        self.piece = min(piece, len(head.weight))
        largest = max([self.piece, *(order.widths[0][0] for _, order in orders.groups)])
        self.workspace = make_workspace(positions, largest, hidden.dtype, hidden.device)
        self.weights = head.weight.new_empty((largest, hidden.shape[-1]))
        self.embedded = self.weights if head.embedding is None else self.table.new_empty(self.weights.shape)
        self.thresholds: list[Threshold | None] = [None] * len(orders.groups)

    def sums(self) -> ClassSums:
        """The first walk; with `top_k`, `top_p` or `min_p` those that find the threshold before it, and one without them."""
        if self.filters is None or not self.filters.need_threshold():
            return self._sums()
        for index, (rows, order) in enumerate(self.orders.groups):
            self.thresholds[index] = _GroupWalk(self, rows, order, None).find_threshold()
        loose, strict = self._sums(), self._sums(self.thresholds)
        return strict._replace(loose=loose)

    def embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Of the ids of a piece whose bits were computed last, (W, D)."""
        if self.head.embedding is None:
            return self.weights[: len(ids)]
        return torch.index_select(self.table, 0, ids, out=self.embedded[: len(ids)])

    def _sums(self, thresholds: list[Threshold | None] | None = None) -> ClassSums:
        groups, found = [], None
        for index, (rows, order) in enumerate(self.orders.groups):
            walk = _GroupWalk(self, rows, order, None if thresholds is None else thresholds[index])
            sums, group = walk.first()
            summed = by_class(sums, order)
            groups.append(group._replace(share=summed.share, offset=summed.offset))
            if found is None:
                found = [summed.log_mass.new_empty((len(self.hidden), self.count, self.orders.kinds)) for _ in range(3)]
            for whole, value in zip(found, summed[:3], strict=True):
                whole[rows] = value.view(-1, self.count, self.orders.kinds)
        return ClassSums(*found, tuple(groups))

    def lift(self, sums: ClassSums, rows: torch.Tensor) -> ClassSums:
        """The sums, without thresholds for `rows` bool (B,)."""
        groups = []
        for (where, _), strict, loose in zip(self.orders.groups, sums.groups, sums.loose.groups, strict=True):
            chosen = rows[where].repeat_interleave(self.count)  # (N,)
            pairs = zip(strict, loose, strict=True)
            groups.append(
                Group(*(None if one is None else torch.where(chosen.view(-1, *(1,) * (one.dim() - 1)), other, one) for one, other in pairs))
            )
        mixed = (torch.where(rows[:, None, None], other, one) for one, other in zip(sums[:3], sums.loose[:3], strict=True))
        return ClassSums(*mixed, tuple(groups), lifted=rows)

    def draw(
        self, sums: ClassSums, chosen: Chosen, chance: torch.Tensor | None, pad: int, wanted: Wanted = NOTHING_MORE
    ) -> Prediction:  # fmt: skip
        """The second walk.

        Args:
            sums: what `sums` gave, or `lift`.
            chosen: what the lattice made of it.
            chance (`float32 (B, C, 3 or 5)`): uniform numbers in [0, 1), the first of them the lattice's; None takes the best string.
            pad: the id behind the positions that count.
            wanted: what is given on request; candidates alone.

        Returns:
            `Prediction` as of `walk.streamed_prediction`, under the constrained marginals: `argmax` the best string as a whole, `sample`
            one that is drawn as a whole. `bad`: rows of which no canvas is accepted, or with a NaN logit.
        """
        whole, (batch_size, length) = {}, self.hidden.shape[:2]
        for index, (rows, order) in enumerate(self.orders.groups):
            walk = _GroupWalk(self, rows, order, self.thresholds[index], None if sums.lifted is None else sums.lifted[rows])
            given = (value[rows].flatten(0, 1) for value in (sums.log_mass, sums.entropy, chosen.posterior, chosen.sample, chosen.best))
            best = sums.best[rows].flatten(0, 1).gather(1, chosen.best[rows].flatten()[:, None]).squeeze(1)
            numbers = None if chance is None else chance[rows, : self.count].flatten(0, 1)
            for name, value in walk.second(sums.groups[index], *given, best, numbers, wanted.candidates).items():
                if name not in whole:
                    whole[name] = value.new_zeros((batch_size, length, *value.shape[1:]))
                whole[name][rows, : self.count] = value.view(-1, self.count, *value.shape[1:])
        behind = slice(self.count, length)
        for name in whole.keys() & {"sample", "argmax", "other"}:
            whole[name][:, behind] = pad
        if "candidates" in whole:
            whole["candidates"][:, behind] = pad
            whole["candidate_log_probs"][:, behind, 1:] = -float("inf")
        if "current_log_probs" in whole:
            whole["current_log_probs"][:, behind].masked_fill_(self.current[:, behind] != pad, -float("inf"))
        whole["soft_embeds"][:, behind] = self.table[pad] * self.head.embed_scale
        return Prediction(bad=chosen.lost | self.hidden.isnan().flatten(1).any(dim=-1), **whole)


class _GroupWalk:
    """The walks of rows of one order."""

    def __init__(
        self, walk: ClassWalk, rows: torch.Tensor | slice, order: Order, threshold: Threshold | None, lifted: torch.Tensor | None = None
    ):
        self.walk, self.order, self.threshold = walk, order, threshold
        hidden = walk.hidden[rows, : walk.count]
        self.batch_size, self.device = len(hidden), hidden.device
        self.hidden = hidden.flatten(0, 1)  # (N, D)
        if walk.shape.squashed:
            self.hidden = self.hidden * (2 / walk.head.softcap)
        self.current = None if walk.current is None else walk.current[rows, : walk.count].flatten()
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
        if self.current is not None:
            rest_mass.masked_fill_(rest_top <= MASKED / 2, 0.0)
        entropy.mul_(-NAT / mass).add_(mass.log())
        empty = top <= MASKED / 2
        high = (top.double() * NAT).masked_fill_(empty, -float("inf"))
        return BySegment(high + mass.double().log(), high, entropy.double()), Group(top, high, high, current_bits, rest_top, rest_mass)

    def second(
        self, group: Group, log_mass: torch.Tensor, entropy: torch.Tensor, posterior: torch.Tensor, sample: torch.Tensor,
        best: torch.Tensor, best_log_prob: torch.Tensor, chance: torch.Tensor | None, candidates: int,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """The fields of a `Prediction` of N positions. Args: those of sums and lattice, (N, K) or (N,); `chance` (N, 3 or 5);
        `candidates`: how many of the most probable ids are given."""
        order, mass = self.order, posterior.exp()
        rise = torch.where(mass > 0, posterior - log_mass, -float("inf")).sub_(group.offset)  # (N, K), from what was summed to the marginal
        weight = mass.index_select(1, order.kind).mul_(group.share)  # (N, S)
        drawn = self.choose_segments(group, rise, weight, sample, best, chance)
        heavy = self.heavy(weight, drawn)
        places = [torch.zeros_like(one.segment) for one in drawn]
        rises, spare = (rise / NAT).index_select(1, order.kind).float(), self.walk.workspace.exponentials
        soft = torch.zeros(self.hidden.shape, dtype=torch.float32, device=self.device)
        best_ids = _Leading(len(soft), min(candidates, len(order.ids)), self.device)
        for piece in pieces(order, self.walk.piece, None if heavy is None else heavy.any(dim=0).tolist()):
            rows, within = slice(None), piece.segments
            if heavy is not None:
                some = heavy[:, within].any(dim=1).nonzero().flatten()
                rows = some if len(some) < MOST_ROWS * len(heavy) else rows
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
            bits.add_(rises[rows, within, None])
            best_ids.add(piece, bits.flatten(1), rows)
            shares = torch.exp2(bits, out=piece.of(spare[: len(bits), : len(piece.ids)])).flatten(1)
            mixed = self.walk.products.mix(shares.to(self.hidden.dtype), self.walk.embeddings(piece.ids))
            if isinstance(rows, slice):
                soft.add_(mixed)
            else:
                soft.index_add_(0, rows, mixed.float())
        ids = [order.ids[place] for place in places]
        fields = {
            "sample": ids[0] if chance is None else ids[1], "argmax": ids[0],
            "entropy": torch.special.entr(mass).addcmul_(mass, entropy).sum(dim=-1).clamp_(min=0).float(),
            "log_probs": (_at(posterior, best) + best_log_prob - _at(log_mass, best)).float(),
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

    def heavy(self, weight: torch.Tensor, drawn: list["_Drawn"]) -> torch.Tensor | None:
        """Which segments a position needs, bool (N, S); None where all are computed: to count them would be to wait for the device, and a
        threshold counts what it has seen."""
        if not counts_rows(self.device) or self.threshold is not None:
            return None
        return (weight > LEAST).scatter_(1, torch.stack([one.segment for one in drawn], dim=1), True)

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
            drawn.append(_Drawn(_at(lanes, pick(shares.gather(1, lanes), chance[:, 1])).clamp_(max=last), chance[:, 2]))
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
        return [*drawn, _Drawn(pick(weight, chance[:, 3]), chance[:, 4], place, ~(weight.sum(dim=-1) > 0))]


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


def _rows(inside: torch.Tensor) -> torch.Tensor | slice:
    """Those that are looked at: where counting them is for nothing, only those that matter."""
    return inside.nonzero().flatten() if counts_rows(inside.device) else slice(None)


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


__all__ = ["CHANCES", "CHANCES_WITH_CURRENT", "Chosen", "ClassSums", "ClassWalk", "Group"]
