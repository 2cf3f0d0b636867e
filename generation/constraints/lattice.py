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

The rows of a batch lie side by side in flat lists of states and edges, and both directions of the sum and the best path advance in one
scan (`scans`), so that a position costs a dozen operations whatever the batch. Nothing waits for the device. Sums over segments
are `torch.segment_reduce`, whose order is fixed, so that seeds reproduce on a GPU.

Legend: B rows, n positions that count, K classes (of the row that has most), S states and E edges of all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .automaton import Automaton
from .lattice_kernel import choose_scans
from .scans import Paths, Scan, make_scans

MOST = 2**22  # numbers of positions and edges computed at a time: 32 MiB


class Solution(NamedTuple):
    """`log_partition` float64 (B,), nats: of the canvases that are accepted; -inf, or NaN, where none is, and then all else of the row
    means nothing: `posterior` float64 (B, n, K), log-probabilities of the classes given acceptance; `sample` and `best`, int64 (B, n),
    classes of a path that is drawn and of the most probable one; `sample_state` and `best_state`, int64 (B,), the states behind them."""

    log_partition: torch.Tensor
    posterior: torch.Tensor
    sample: torch.Tensor
    sample_state: torch.Tensor
    best: torch.Tensor
    best_state: torch.Tensor

    def where(self, chosen: torch.Tensor, other: "Solution") -> "Solution":
        """This solution, and the other one's rows where `chosen` bool (B,)."""
        pairs = zip(self, other, strict=True)
        return Solution(*(torch.where(chosen.view(-1, *(1,) * (mine.dim() - 1)), theirs, mine) for mine, theirs in pairs))


@dataclass(frozen=True, eq=False)
class Lattice:
    """The automata of a batch's rows, states and edges in flat lists, row by row.

    `automata`: one a row, shared ones the same object. Edges in rising order of source: `source`, `target` int64 (E,), flat states; `kind`
    int64 (E,), the row's place times K plus the class. `row` int64 (S,), the row of a state; `fewest` int64 (S,). `by_kind` int64 (E,), the
    edges in rising order of kind, and `counts` int64 (B * K,), how many each kind has. `scan`, `paths`: how messages and paths advance.
    """

    automata: tuple[Automaton, ...]
    kinds: int
    source: torch.Tensor
    kind: torch.Tensor
    target: torch.Tensor
    row: torch.Tensor
    fewest: torch.Tensor
    by_kind: torch.Tensor
    counts: torch.Tensor
    scan: Scan
    paths: Paths

    def select(self, rows: torch.Tensor) -> "Lattice":
        """The lattice of the rows that stay; `rows` int64 (n,). Waits for the device."""
        return make_lattice([self.automata[row] for row in rows.tolist()], self.source.device, self.kinds)

    def solve(
        self, log_mass: torch.Tensor, best_log_prob: torch.Tensor, state: torch.Tensor, left: torch.Tensor | int,
        chance: torch.Tensor | None = None,
    ) -> Solution:  # fmt: skip
        """Conditions `n` positions on being accepted.

        Args:
            log_mass (`float64 (B, n, K)`): nats; of all ids of a class together, -inf for classes that a row does not have.
            best_log_prob (`float64 (B, n, K)`): of a class's most probable id.
            state (`int64 (B,)`): each row's state before the first position, as its automaton counts them.
            left (`int64 (B,)` or int): tokens left behind the last position: it may end in states with as few to acceptance.
            chance (`(B, n)`, *optional*): uniform numbers in [0, 1); without them `sample` is `best`.

        Raises:
            ValueError: sums of another shape or dtype.
        """
        expected = (len(self.automata), log_mass.shape[1] if log_mass.dim() == 3 else 0, self.kinds)
        for name, value in (("log_mass", log_mass), ("best_log_prob", best_log_prob)):
            if tuple(value.shape) != expected or value.dtype != torch.float64 or not expected[1]:
                wanted = f"float64 {(expected[0], 'n', expected[2])}, both alike, of at least one position"
                raise ValueError(f"`{name}` is {value.dtype} {tuple(value.shape)}; expected {wanted}")
        return _solve(self, log_mass, best_log_prob, *self._ends(state, left), chance)

    def possible(self, length: int, state: torch.Tensor, left: torch.Tensor | int) -> torch.Tensor:
        """Which classes can stand at each of `length` positions in some canvas that is accepted, whatever is probable: bool (B, n, K). Args
        as of `solve`."""
        (messages, _), batch_size = choose_scans(state.device), len(self.automata)
        found = torch.zeros((batch_size * self.kinds, length), dtype=torch.float64, device=state.device)
        behind, before, _ = messages(self.scan, found, found, *self._ends(state, left))  # logs of how many paths there are
        step = max(MOST // len(self.source), 1)
        for first in range(0, length, step):
            here = slice(first, min(first + step, length))
            after = slice(here.start + 1, here.stop + 1)
            along = before[:, here].index_select(0, self.source).add_(behind[:, after].index_select(0, self.target))  # (E, m)
            found[:, here] = found[:, here].index_add(0, self.kind, (along > -float("inf")).double())
        return (found > 0).unflatten(0, (batch_size, self.kinds)).transpose(1, 2)

    def _ends(self, state: torch.Tensor, left: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
        """The flat states that paths begin in, int64 (B,), and those in which they may end, bool (S,)."""
        return self.scan.first[:-1] + state, self.fewest <= (left[self.row] if isinstance(left, torch.Tensor) else left)


def make_lattice(automata: Sequence[Automaton], device: torch.device, kinds: int = 0) -> Lattice:
    """The lattice of rows with these automata, on `device`; of at least `kinds` classes, as rows had that have left."""
    kinds, sizes = max(kinds, *(automaton.kinds for automaton in automata)), [automaton.states for automaton in automata]
    begins = [sum(sizes[:row]) for row in range(len(sizes))]
    source, target = (
        torch.cat([getattr(one, name).cpu() + begin for one, begin in zip(automata, begins, strict=True)]) for name in ("source", "target")
    )
    kind = torch.cat([one.kind.cpu() + place * kinds for place, one in enumerate(automata)])
    row = torch.cat([torch.full((size,), place, dtype=torch.int64, device="cpu") for place, size in enumerate(sizes)])
    fewest = torch.cat([one.fewest.cpu() for one in automata])
    all_kinds = kinds * len(automata)
    by_kind, counts = torch.argsort(kind, stable=True), torch.bincount(kind, minlength=all_kinds)
    tensors = [value.to(device) for value in (source, kind, target, row, fewest, by_kind, counts)]
    scan, paths = make_scans(source, kind, target, sizes, all_kinds)
    return Lattice(
        tuple(automata), kinds, *tensors, Scan(*(value.to(device) for value in scan)), Paths(*(value.to(device) for value in paths))
    )


def _solve(
    lattice: Lattice, log_mass: torch.Tensor, best_log_prob: torch.Tensor, start: torch.Tensor, may_end: torch.Tensor,
    chance: torch.Tensor | None,
) -> Solution:  # fmt: skip
    """`Lattice.solve`. Args: `start` int64 (B,), flat states; `may_end` bool (S,)."""
    messages, follow = choose_scans(log_mass.device)
    batch_size, length, kinds = log_mass.shape
    sums, tops = (value.transpose(1, 2).flatten(0, 1) for value in (log_mass, best_log_prob))  # (B * K, n)
    behind, before, best_behind = messages(lattice.scan, sums, tops, start, may_end)  # (S, n + 1)
    log_partition = behind[start, 0]
    share = None if chance is None else 1 - chance.double()
    state, taken = start.repeat(1 if chance is None else 2), []
    posterior, partition = torch.empty_like(sums), log_partition[lattice.row][lattice.source, None]  # (E, 1)
    step = max(MOST // len(partition), 1)
    for first in range(0, length, step):
        here = slice(first, min(first + step, length))
        after = slice(here.start + 1, here.stop + 1)
        # Rows of many positions are looked up, which takes a tenth of the time of looking up columns.
        along = sums[:, here].index_select(0, lattice.kind).add_(behind[:, after].index_select(0, lattice.target))  # (E, m)
        best = tops[:, here].index_select(0, lattice.kind).add_(best_behind[:, after].index_select(0, lattice.target))
        edges, state = follow(lattice.paths, state, best, along, None if chance is None else share[:, here])
        taken.append(edges)
        along.add_(before[:, here].index_select(0, lattice.source)).sub_(partition).exp_()
        mass = torch.segment_reduce(along.index_select(0, lattice.by_kind), "sum", lengths=lattice.counts, axis=0, unsafe=True)
        mass = mass.unflatten(0, (batch_size, kinds))
        posterior[:, here] = mass.div_(mass.sum(dim=1, keepdim=True)).log_().flatten(0, 1)  # without the rounding of large logs
    lost = ~(log_partition > -float("inf"))  # NaN, too
    classes = lattice.kind[torch.cat(taken, dim=1)].remainder_(kinds).unflatten(0, (-1, batch_size))  # (1 or 2, B, n)
    classes = classes.masked_fill_(lost[:, None], 0)
    state = torch.where(lost, start, state.unflatten(0, (-1, batch_size))) - lattice.scan.first[:-1]
    posterior = posterior.unflatten(0, (batch_size, kinds)).transpose(1, 2).masked_fill(lost[:, None, None], -float("inf"))
    return Solution(log_partition, posterior, classes[-1], state[-1], classes[0], state[0])


__all__ = ["Lattice", "Solution", "make_lattice"]
