"""What independent positions become once the canvas must be a string of a language: exact inference over positions and states.

A prediction says for every position how probable each class of ids is. Given that the whole canvas is a path from the row's state to one
from which acceptance still fits into the tokens left, `solve` tells how probable that is, what the classes of a position are then
(posterior), draws a path, and finds the best one. Forward-backward and Viterbi (Rabiner 1989, "A tutorial on hidden Markov models");
the best string for this kind of model is DINGO's (arXiv 2505.23061).

An example, two positions, the language "a" or "bb" closed by "." any number of times; classes 1: a, 2: b, 3: ".". Of 9 strings two are
accepted, "a." and "bb": with p(a) = 1/2, p(b) = 1/4, p(.) = 1/4 at both, their probabilities 1/8 and 1/16 make the partition 3/16; the
posterior of the first position is 2/3 a, 1/3 b.

All messages are float64 **logs**. Rescaled float64 does not do: paths that are probable and never accepted take all of its range. A
partition of -2,000 nats is common at the first steps of a long schema.

The rows of a batch lie side by side in flat lists of states and edges, and the sum and the best path advance in one scan (`scans`), so that
a position costs a dozen operations whatever the batch. An edge is all that leads from one state to another, taken by a bundle of
classes (`bundles`): what a bundle weighs is summed before the scan, and a class of it is chosen behind it. Nothing waits for the device.
Sums over segments are `torch.segment_reduce`, whose order is fixed, so that seeds reproduce on a GPU.

Legend: B rows, n positions that count, K classes and G bundles (of the row that has most), S states, E edges and M classes of bundles of
all rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .automaton import Automaton
from .lattice_kernel import choose_scans
from .scans import NOTHING, Paths, Scan, draw, make_scans

MOST = 2**22  # numbers of positions and edges, or classes, computed at a time: 32 MiB


class Solution(NamedTuple):
    """`log_partition` float64 (B,), nats: of the canvases that are accepted; -inf, or NaN, where none is, and then all else of the row
    means nothing: `sample` and `best`, int64 (B, n), classes of a path that is drawn and of the most probable one; `sample_state` and
    `best_state`, int64 (B,), the states behind them; on request `posterior` float64 (B, n, K), log-probabilities of the classes given
    acceptance."""

    log_partition: torch.Tensor
    sample: torch.Tensor
    sample_state: torch.Tensor
    best: torch.Tensor
    best_state: torch.Tensor
    posterior: torch.Tensor | None = None

    def where(self, chosen: torch.Tensor, other: "Solution") -> "Solution":
        """This solution, and the other one's rows where `chosen` bool (B,)."""

        def joined(mine: torch.Tensor | None, theirs: torch.Tensor | None) -> torch.Tensor | None:
            return None if mine is None else torch.where(chosen.view(-1, *(1,) * (mine.dim() - 1)), theirs, mine)

        return Solution(*map(joined, self, other))


class Members(NamedTuple):
    """What the bundles hold: `kind` int64 (M,), flat classes, and `bundle` int64 (M,), the flat bundle each is of, rising. `sizes` int64
    (B * G,), how many each has, `begin` the first of them. `by_kind` int64 (M,): the members in rising order of class, and `counts` int64
    (B * K,), how many there are of each. `lanes` int64 (most,): counts up to the most of a bundle."""

    kind: torch.Tensor
    bundle: torch.Tensor
    sizes: torch.Tensor
    begin: torch.Tensor
    by_kind: torch.Tensor
    counts: torch.Tensor
    lanes: torch.Tensor


@dataclass(frozen=True, eq=False)
class Lattice:
    """The automata of a batch's rows, states and edges in flat lists, row by row.

    `automata`: one a row, shared ones the same object. Edges in rising order of source: `source`, `target` int64 (E,), flat states;
    `bundle` int64 (E,), flat: the row's place times G and its own. `row` int64 (S,), the row of a state; `fewest` int64 (S,). `by_bundle`
    int64 (E,), the edges in rising order of bundle, and `counts` int64 (B * G,), how many each has. `members`: what bundles hold;
    `scan`, `paths`: how messages and paths advance.
    """

    automata: tuple[Automaton, ...]
    kinds: int
    source: torch.Tensor
    bundle: torch.Tensor
    target: torch.Tensor
    row: torch.Tensor
    fewest: torch.Tensor
    by_bundle: torch.Tensor
    counts: torch.Tensor
    members: Members
    scan: Scan
    paths: Paths

    def select(self, rows: torch.Tensor) -> "Lattice":
        """The lattice of the rows that stay; `rows` int64 (n,). Waits for the device."""
        return make_lattice([self.automata[row] for row in rows.tolist()], self.source.device, self.kinds)

    def solve(
        self, log_mass: torch.Tensor, best_log_prob: torch.Tensor, state: torch.Tensor, left: torch.Tensor | int,
        chance: torch.Tensor | None = None, posterior: bool = False,
    ) -> Solution:  # fmt: skip
        """Conditions `n` positions on being accepted.

        Args:
            log_mass (`float64 (B, n, K)`): nats; of all ids of a class together, -inf for classes that a row does not have.
            best_log_prob (`float64 (B, n, K)`): of a class's most probable id.
            state (`int64 (B,)`): each row's state before the first position, as its automaton counts them.
            left (`int64 (B,)` or int): tokens left behind the last position: it may end in states with as few to acceptance.
            chance (`(B, n, 2)`, *optional*): uniform numbers in [0, 1), of a position's edge and of its class; without them `sample` is
                `best`.
            posterior: whether that is asked for; it takes as long again.

        Raises:
            ValueError: sums of another shape or dtype.
        """
        expected = (len(self.automata), log_mass.shape[1] if log_mass.dim() == 3 else 0, self.kinds)
        for name, value in (("log_mass", log_mass), ("best_log_prob", best_log_prob)):
            if tuple(value.shape) != expected or value.dtype != torch.float64 or not expected[1]:
                wanted = f"float64 {(expected[0], 'n', expected[2])}, both alike, of at least one position"
                raise ValueError(f"`{name}` is {value.dtype} {tuple(value.shape)}; expected {wanted}")
        return _solve(self, log_mass, best_log_prob, *self._ends(state, left), chance, posterior)

    def possible(self, length: int, state: torch.Tensor, left: torch.Tensor | int) -> torch.Tensor:
        """Which classes can stand at each of `length` positions in some canvas that is accepted, whatever is probable: bool (B, n, K). Args
        as of `solve`."""
        messages, _ = choose_scans(state.device)
        alike = torch.zeros((len(self.counts), length), dtype=torch.float64, device=state.device)
        _, behind, before = messages(self.scan, alike, alike, *self._ends(state, left))  # logs of how many paths there are
        kinds = alike.new_zeros((len(self.members.counts), length))
        for here, after in self._pieces(length):
            along = before[:, here].index_select(0, self.source).add_(behind[:, after].index_select(0, self.target))  # (E, m)
            found = torch.zeros_like(alike[:, here]).index_add_(0, self.bundle, (along > -float("inf")).double())
            kinds[:, here] = kinds[:, here].index_add(0, self.members.kind, found.index_select(0, self.members.bundle))
        return (kinds > 0).unflatten(0, (len(self.automata), self.kinds)).transpose(1, 2)

    def _ends(self, state: torch.Tensor, left: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
        """The flat states that paths begin in, int64 (B,), and those in which they may end, bool (S,)."""
        return self.scan.first[:-1] + state, self.fewest <= (left[self.row] if isinstance(left, torch.Tensor) else left)

    def _pieces(self, length: int) -> Iterator[tuple[slice, slice]]:
        """So many positions as are computed at a time, and those behind each."""
        step = max(MOST // max(len(self.source), len(self.members.kind)), 1)
        for first in range(0, length, step):
            here = slice(first, min(first + step, length))
            yield here, slice(here.start + 1, here.stop + 1)


def make_lattice(automata: Sequence[Automaton], device: torch.device, kinds: int = 0) -> Lattice:
    """The lattice of rows with these automata, on `device`; of at least `kinds` classes, as rows had that have left."""
    bundled, states = [automaton.bundled for automaton in automata], [automaton.states for automaton in automata]
    kinds, bundles = max(kinds, *(automaton.kinds for automaton in automata)), max(len(one.sizes) for one in bundled)
    begins = [sum(states[:row]) for row in range(len(states))]
    source, target = (torch.cat([getattr(one, name) + begins[row] for row, one in enumerate(bundled)]) for name in ("source", "target"))
    bundle = torch.cat([one.bundle + row * bundles for row, one in enumerate(bundled)])
    kind = torch.cat([one.kind + row * kinds for row, one in enumerate(bundled)])
    sizes = torch.cat([torch.nn.functional.pad(one.sizes, (0, bundles - len(one.sizes))) for one in bundled])
    lanes = torch.arange(int(sizes.max()), dtype=torch.int64, device="cpu")
    all_kinds, all_bundles = kinds * len(automata), bundles * len(automata)
    members = Members(
        kind=kind, bundle=torch.arange(all_bundles, device="cpu").repeat_interleave(sizes), sizes=sizes, begin=sizes.cumsum(dim=0) - sizes,
        by_kind=torch.argsort(kind, stable=True), counts=torch.bincount(kind, minlength=all_kinds), lanes=lanes,
    )  # fmt: skip
    row = torch.arange(len(automata), device="cpu").repeat_interleave(torch.tensor(states, dtype=torch.int64, device="cpu"))
    fewest = torch.cat([one.fewest.cpu() for one in automata])
    by_bundle, counts = torch.argsort(bundle, stable=True), torch.bincount(bundle, minlength=all_bundles)
    scan, paths = make_scans(source, bundle, target, states, all_bundles)
    tensors = [value.to(device) for value in (source, bundle, target, row, fewest, by_bundle, counts)]
    groups = (type(one)(*(value.to(device) for value in one)) for one in (members, scan, paths))
    return Lattice(tuple(automata), kinds, *tensors, *groups)


def _solve(
    lattice: Lattice, log_mass: torch.Tensor, best_log_prob: torch.Tensor, start: torch.Tensor, may_end: torch.Tensor,
    chance: torch.Tensor | None, posterior: bool,
) -> Solution:  # fmt: skip
    """`Lattice.solve`. Args: `start` int64 (B,), flat states; `may_end` bool (S,)."""
    messages, follow = choose_scans(log_mass.device)
    batch_size, length, _ = log_mass.shape
    sums, tops = (value.transpose(1, 2).flatten(0, 1) for value in (log_mass, best_log_prob))  # (B * K, n)
    weights, weight_tops = _weigh(lattice, sums, tops)  # (B * G, n)
    best_behind, behind, *before = messages(lattice.scan, weights, weight_tops, start, may_end, posterior)  # (S, n + 1)
    log_partition = behind[start, 0]
    share = None if chance is None else 1 - chance.double()
    state, taken, found = start.repeat(1 if chance is None else 2), [], []
    for here, after in lattice._pieces(length):
        # Rows of many positions are looked up, which takes a tenth of the time of looking up columns.
        best = weight_tops[:, here].index_select(0, lattice.bundle).add_(best_behind[:, after].index_select(0, lattice.target))  # (E, m)
        along = None
        if share is not None or posterior:
            along = weights[:, here].index_select(0, lattice.bundle).add_(behind[:, after].index_select(0, lattice.target))
        edges, state = follow(lattice.paths, state, best, along, None if share is None else share[:, here, 0])
        taken.append(edges)
        if posterior:
            found.append(_posterior(lattice, sums[:, here], weights[:, here], along, before[0][:, here], log_partition))
    lost = ~(log_partition > -float("inf"))  # NaN, too
    bundle = lattice.bundle[torch.cat(taken, dim=1)].unflatten(0, (-1, batch_size))  # (1 or 2, B, n)
    classes = [_best_class(lattice.members, bundle[0], tops)]
    if share is not None:
        classes.append(_drawn_class(lattice.members, bundle[1], sums, share[..., 1]))
    classes = [one.remainder(lattice.kinds).masked_fill(lost[:, None], 0) for one in classes]
    state = torch.where(lost, start, state.unflatten(0, (-1, batch_size))) - lattice.scan.first[:-1]
    solution = Solution(log_partition, classes[-1], state[-1], classes[0], state[0])
    if not posterior:
        return solution
    found = torch.cat(found, dim=1).unflatten(0, (batch_size, lattice.kinds)).transpose(1, 2)
    return solution._replace(posterior=found.masked_fill(lost[:, None, None], -float("inf")))


def _weigh(lattice: Lattice, sums: torch.Tensor, tops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all classes of a bundle together, and of its most probable id: float64 (B * G, n) each."""
    members, found = lattice.members, []
    for here, _ in lattice._pieces(sums.shape[1]):
        along = sums[:, here].index_select(0, members.kind)  # (M, m)
        highest = torch.segment_reduce(along, "max", lengths=members.sizes, axis=0, unsafe=True).clamp_(min=NOTHING)
        along.sub_(highest.index_select(0, members.bundle)).exp_()
        total = torch.segment_reduce(along, "sum", lengths=members.sizes, axis=0, unsafe=True).log_().add_(highest)
        top = torch.segment_reduce(tops[:, here].index_select(0, members.kind), "max", lengths=members.sizes, axis=0, unsafe=True)
        found.append((total, top))
    return tuple(torch.cat(pieces, dim=1) for pieces in zip(*found, strict=True))


def _posterior(
    lattice: Lattice, sums: torch.Tensor, weights: torch.Tensor, along: torch.Tensor, before: torch.Tensor, log_partition: torch.Tensor
) -> torch.Tensor:
    """Log-probabilities of the classes at m positions, float64 (B * K, m). Args: as in `_solve`, of these positions; `along`, of all that
    comes once an edge is taken, is overwritten."""
    members = lattice.members
    along.add_(before.index_select(0, lattice.source)).sub_(log_partition[lattice.row][lattice.source, None]).exp_()
    mass = torch.segment_reduce(along.index_select(0, lattice.by_bundle), "sum", lengths=lattice.counts, axis=0, unsafe=True)  # (B * G, m)
    inside = sums.index_select(0, members.kind).sub_(weights.clamp(min=NOTHING).index_select(0, members.bundle)).exp_()  # (M, m)
    inside.mul_(mass.index_select(0, members.bundle))
    mass = torch.segment_reduce(inside.index_select(0, members.by_kind), "sum", lengths=members.counts, axis=0, unsafe=True)
    mass = mass.unflatten(0, (len(lattice.automata), lattice.kinds))
    return mass.div_(mass.sum(dim=1, keepdim=True)).log_().flatten(0, 1)  # without the rounding of large logs


def _classes_of(members: Members, bundle: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The flat classes of each bundle int64 (B, n), int64 (B, n, most), and their values out of (B * K, n), -inf behind the last."""
    places = members.begin[bundle][..., None] + members.lanes
    kinds = members.kind[places.clamp(max=len(members.kind) - 1)]
    positions = torch.arange(values.shape[1], device=values.device)[:, None]
    return kinds, values[kinds, positions].masked_fill_(members.lanes >= members.sizes[bundle][..., None], -float("inf"))


def _best_class(members: Members, bundle: torch.Tensor, tops: torch.Tensor) -> torch.Tensor:
    kinds, found = _classes_of(members, bundle, tops)
    return kinds.gather(-1, found.argmax(dim=-1, keepdim=True)).squeeze(-1)


def _drawn_class(members: Members, bundle: torch.Tensor, sums: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    kinds, found = _classes_of(members, bundle, sums)
    return kinds.gather(-1, draw(found, share[..., None]).clamp_(max=len(members.lanes) - 1)).squeeze(-1)


__all__ = ["Lattice", "Solution", "make_lattice"]
