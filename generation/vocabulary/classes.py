"""What a canvas pass says about a canvas that must be a string of a language, from two walks over the vocabulary.

A constraint tells ids apart by class alone (`constraints.automaton`). The first walk sums the ids of every class: all that is needed to
say what the classes of a canvas are once it must be accepted (`constraints.lattice`). The second draws the ids inside the classes that were
chosen, and mixes the soft embedding of the constrained marginal, `r(t) = p(t) * q(class of t) / m(class of t)`, where m is what p
gives the class and q what is made of it. Its entropy needs no walk: that of q, and the mean one inside a class.

On a CPU, where q is p itself over the classes that are `possible`, known before, the first walk mixes, too, and the second only looks up
what was drawn: three products of the vocabulary become two, as many as without a constraint. What weighs nothing beside the most
probable id is not mixed; a `likely` id, whose bits are known from the start, lets most of the vocabulary go by once a canvas is nearly
certain. Where the second walk mixes, it leaves out what weighs nothing, too.

No `(N, V)` tensor exists, and no id is left out. Ids of no class are never read. `dense_classes` makes the same of whole logits; tests
hold both against an enumeration of all strings (tests/test_vocabulary_classes.py). This file does not know automata; what a walk does
is in `group_walk`:

    walk = ClassWalk(hidden, head, temperature, orders, count, filters, current, possible, likely)
    sums = walk.sums()                                      # then a lattice says what the classes are
    prediction = walk.draw(sums, chosen, chance, pad)

Random numbers: `CHANCES` of each position, whatever the vocabulary and the language. The first two are for the lattice.

Nothing here waits for another device than a CPU.

Legend: N positions that count (B * n of those of a group), n of the C positions of a canvas, W ids of a piece, S segments, K classes.
"""

from typing import NamedTuple

import torch

from ..rules.prediction import NOTHING_MORE, Prediction, Wanted
from .filters import Filters, Threshold
from .group_walk import Group, GroupWalk
from .products import choose_products
from .segments import Orders, by_class
from .sums import Shape, counts_rows, make_workspace
from .walk import NUMBERS, PIECE, VocabularyHead, cast_dtype

CHANCES, CHANCES_WITH_CURRENT = 4, 6  # uniform numbers of a position: edge, class, segment, id; and segment and id of another token


class ClassSums(NamedTuple):
    """Of B rows, n positions and K classes, float64 (B, n, K), nats, all classes together having the mass 1: `log_mass`; `best`, of a
    class's most probable id; `entropy` of an id inside its class. -inf where a class has no id that may be predicted.

    `lifted` bool (B,): rows of which `top_k`, `top_p` and `min_p` have been taken back (`ClassWalk.lift`); None: of none.
    """

    log_mass: torch.Tensor
    best: torch.Tensor
    entropy: torch.Tensor
    groups: tuple[Group, ...] = ()
    lifted: torch.Tensor | None = None


class Chosen(NamedTuple):
    """What a lattice made of `ClassSums`: `shares` float64 (B, n, K), log-probabilities of the classes; `sample` and `best` int64 (B, n),
    the classes drawn and those of the best string; `lost` bool (B,), rows of which no canvas is accepted. `summed`: whether the shares are
    `possible_shares` of the walk's classes."""

    shares: torch.Tensor
    sample: torch.Tensor
    best: torch.Tensor
    lost: torch.Tensor
    summed: bool = False


def possible_shares(log_mass: torch.Tensor, possible: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the classes, float64 (B, n, K), among those that are `possible`, bool (B, n, K)."""
    return torch.log_softmax(log_mass.masked_fill(~possible, -float("inf")), dim=-1)


class ClassWalk:
    """The walks of one step over the vocabulary.

    Args:
        hidden (`(B, C, D)`): normed output of the canvas pass.
        head: as `walk.streamed_prediction` takes it.
        temperature: divides the soft-capped logits.
        orders: the vocabulary as each row's constraint sees it.
        count: positions that count, the first ones of a canvas; those behind are padding.
        filters (*optional*): what narrows the distribution first. The constraint outranks `top_k`, `top_p` and `min_p`: rows of which they
            leave no accepted canvas are predicted without them (`loose_sums`, `lift`). What `allowed`, `allowed_ids` and `hidden` take
            away is never given back.
        current (`int64 (B, C)`, *optional*): the canvas's tokens; with them, `current_log_probs` and `other` are given.
        possible (`bool (B, n, K)`, *optional*): the classes of which the soft embedding is, where `Chosen.summed`; lets the first walk mix.
        likely (`int64 (B, C)`, *optional*): ids that are probable, such as the last step's; the nearer, the less is mixed.
        piece: ids at a time.

    Raises:
        ValueError: a count that is not of the canvas's positions.
    """

    def __init__(
        self, hidden: torch.Tensor, head: VocabularyHead, temperature: float | torch.Tensor, orders: Orders, count: int,
        filters: Filters | None = None, current: torch.Tensor | None = None, possible: torch.Tensor | None = None,
        likely: torch.Tensor | None = None, piece: int | None = None,
    ):  # fmt: skip
        if not 0 < count <= hidden.shape[1]:
            raise ValueError(f"`count` is {count}; expected 1 to {hidden.shape[1]}, the positions of the canvas")
        if head.weight.dtype != torch.float64:
            hidden = hidden.to(cast_dtype(hidden.dtype, hidden.device))
        self.hidden, self.head, self.orders, self.count, self.filters, self.current = hidden, head, orders, count, filters, current
        self.needs_thresholds = filters is not None and filters.need_threshold()  # what they leave is not known before
        self.possible, self.likely = None if self.needs_thresholds or not counts_rows(hidden.device) else possible, likely
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
        """The first walk; with `top_k`, `top_p` or `min_p` those that find the threshold before it."""
        for index, (rows, order) in enumerate(self.orders.groups if self.needs_thresholds else ()):
            self.thresholds[index] = GroupWalk(self, rows, order, None).find_threshold()
        return self._sums(self.thresholds)

    def loose_sums(self) -> ClassSums:
        """What `sums` gives without `top_k`, `top_p` and `min_p`, which may leave a canvas no string of the language: one more walk."""
        return self._sums([None] * len(self.thresholds))

    def embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Of the ids of a piece whose bits were computed last, (W, D)."""
        if self.head.embedding is None:
            return self.weights[: len(ids)]
        return torch.index_select(self.table, 0, ids, out=self.embedded[: len(ids)])

    def _sums(self, thresholds: list[Threshold | None]) -> ClassSums:
        groups, found = [], None
        for index, (rows, order) in enumerate(self.orders.groups):
            walk = GroupWalk(self, rows, order, thresholds[index])
            sums, group = walk.first()
            summed = by_class(sums, order)
            groups.append(group._replace(share=summed.share, offset=summed.offset))
            if found is None:
                found = [summed.log_mass.new_empty((len(self.hidden), self.count, self.orders.kinds)) for _ in range(3)]
            for whole, value in zip(found, summed[:3], strict=True):
                whole[rows] = value.view(-1, self.count, self.orders.kinds)
        return ClassSums(*found, tuple(groups))

    def lift(self, sums: ClassSums, loose: ClassSums, rows: torch.Tensor) -> ClassSums:
        """The sums, and the `loose_sums` in `rows` bool (B,)."""
        groups = []
        for (where, _), *both in zip(self.orders.groups, sums.groups, loose.groups, strict=True):
            chosen = rows[where].repeat_interleave(self.count)  # (N,)
            pairs = zip(*both, strict=True)
            groups.append(
                Group(*(None if one is None else torch.where(chosen.view(-1, *(1,) * (one.dim() - 1)), other, one) for one, other in pairs))
            )
        mixed = (torch.where(rows[:, None, None], other, one) for one, other in zip(sums[:3], loose[:3], strict=True))
        return ClassSums(*mixed, tuple(groups), lifted=rows)

    def draw(
        self, sums: ClassSums, chosen: Chosen, chance: torch.Tensor | None, pad: int, wanted: Wanted = NOTHING_MORE
    ) -> Prediction:  # fmt: skip
        """The second walk.

        Args:
            sums: what `sums` gave, or `lift`.
            chosen: what the lattice made of it.
            chance (`float32 (B, C, 4 or 6)`): uniform numbers in [0, 1), the first two of them the lattice's; None takes the best string.
            pad: the id behind the positions that count.
            wanted: what is given on request; candidates alone.

        Returns:
            `Prediction` as of `walk.streamed_prediction`, under the constrained marginals: `argmax` the best string as a whole, `sample`
            one that is drawn as a whole. `bad`: rows of which no canvas is accepted, or with a NaN logit.
        """
        whole, (batch_size, length) = {}, self.hidden.shape[:2]
        for index, (rows, order) in enumerate(self.orders.groups):
            walk = GroupWalk(self, rows, order, self.thresholds[index], None if sums.lifted is None else sums.lifted[rows])
            given = (value[rows].flatten(0, 1) for value in (sums.log_mass, sums.entropy, chosen.shares, chosen.sample, chosen.best))
            best = sums.best[rows].flatten(0, 1).gather(1, chosen.best[rows].flatten()[:, None]).squeeze(1)
            numbers = None if chance is None else chance[rows, : self.count].flatten(0, 1)
            group = sums.groups[index] if chosen.summed else sums.groups[index]._replace(soft=None)
            for name, value in walk.second(group, *given, best, numbers, wanted.candidates).items():
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


__all__ = ["CHANCES", "CHANCES_WITH_CURRENT", "Chosen", "ClassSums", "ClassWalk", "possible_shares"]
