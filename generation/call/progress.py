"""What the rows of a batch must write, and how far they are: an automaton and a state for each row that has a constraint.

Made once a call, for languages that are closed (`automaton.closed`); a canvas that is committed moves the states on, and rows leave.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.utils import _pytree as pytree

from ..constraints.automaton import Automaton
from ..constraints.freedom import possible_ids
from ..constraints.lattice import Lattice, make_lattice
from ..vocabulary.segments import Orders, make_orders


class Reach(NamedTuple):
    """Of a canvas: `count` of its positions may hold tokens, and `behind`, int64 (), how many tokens a row may get behind them; `possible`
    bool (m, count, K): the classes that can stand at each position in some text that is accepted."""

    count: int
    behind: torch.Tensor
    possible: torch.Tensor


@dataclass(frozen=True, eq=False)
class Progress:
    """Of b rows that are still computed, m of which have a constraint.

    Args:
        rows: int64 (m,), which of the b rows; rising.
        count: b.
        lattice: their automata, on the rows' device.
        orders: the vocabulary as each of them sees it.
        pad: the id behind the end of a row.
        states: int64 (m,), where in its automaton each is, behind all that is committed.
        reach: of the canvas that is denoised, None between two.
    """

    rows: torch.Tensor
    count: int
    lattice: Lattice
    orders: Orders
    pad: int
    states: torch.Tensor
    reach: Reach | None = None

    def on(self, length: int, left: int) -> "Progress":
        """On a canvas of so many positions, of which rows may get `left` tokens with those behind it."""
        count = min(length, left)
        behind = self.states.new_full((), left - count)
        return replace(self, reach=Reach(count, behind, self.lattice.possible(count, self.states, behind.expand(len(self.states)))))

    @property
    def everywhere(self) -> bool:
        """Whether every row has one."""
        return len(self.rows) == self.count

    def others(self) -> torch.Tensor:
        """The rows that have none, int64 (b - m,)."""
        free = torch.ones(self.count, dtype=torch.bool, device=self.rows.device)
        free[self.rows] = False
        return free.nonzero().flatten()

    def select(self, rows: torch.Tensor) -> "Progress | None":
        """That of some of the rows, int64 rising; None where no one of them has a constraint."""
        places = torch.full((self.count,), -1, dtype=torch.int64, device=self.rows.device)
        places[self.rows] = torch.arange(len(self.rows), device=self.rows.device)
        stay = places[rows.to(places.device)]
        constrained = (stay >= 0).nonzero().flatten()
        if not len(constrained):
            return None
        return self._keep(stay[constrained], constrained, len(rows), self.states, self.reach)

    def commit(self, tokens: torch.Tensor, ended: torch.Tensor) -> "Progress | None":
        """Behind new tokens int64 (b, n), padded where a row has ended; without the rows that have `ended`, bool (b,): they write nothing
        more. None where all have.

        Raises:
            ValueError: tokens that the constraint does not allow: something else than the step wrote them.
        """
        rows, over = self.rows.tolist(), ended[self.rows].tolist()
        found = []
        for automaton, state, row, last in zip(self.lattice.automata, self.states.tolist(), rows, over, strict=True):
            written = tokens[row].tolist()
            while last and written and written[-1] == self.pad:
                written.pop()
            found.append(automaton.run(written, state))
        if None in found:
            raise ValueError(
                f"`constraint` does not accept the tokens of row {rows[found.index(None)]} of those still computed; expected that no "
                "watcher or callback changes its argmax canvas"
            )
        going = (~ended[self.rows]).nonzero().flatten()
        if not len(going):
            return None
        states = torch.tensor(found, dtype=torch.int64, device=self.states.device)
        return self._keep(going, self.rows[going], self.count, states)

    def accept(self, canvas: torch.Tensor) -> torch.Tensor:
        """Bool (b,): rows in which `canvas` int64 (b, C) may be written as it is, so that the text can end where a row may get no more;
        True without a constraint."""
        count, behind, found = self.reach.count, int(self.reach.behind), torch.ones_like(canvas[:, 0], dtype=torch.bool)
        for automaton, state, row in zip(self.lattice.automata, self.states.tolist(), self.rows.tolist(), strict=True):
            state = automaton.run(canvas[row, :count].tolist(), state)
            found[row] = state is not None and int(automaton.fewest[state]) <= behind
        return found

    def _keep(self, kept: torch.Tensor, rows: torch.Tensor, count: int, states: torch.Tensor, reach: Reach | None = None) -> "Progress":
        """Of those with a constraint the ones at the places `kept`, which are now `rows` of `count`; `states`, `reach`: of all so far."""
        lattice, orders = self.lattice, self.orders
        if len(kept) < len(self.rows):
            lattice, orders = lattice.select(kept), orders.select(kept)
        reach = None if reach is None else reach._replace(possible=reach.possible[kept])
        return Progress(rows, count, lattice, orders, self.pad, states[kept], reach)

    def restrict(self, logits: torch.Tensor, left: int) -> torch.Tensor:
        """Logits (b, 1, V) of the next token, -inf where it cannot be if `left` tokens may follow it; other rows' as they are."""
        logits = logits.clone()
        for automaton, row, state in zip(self.lattice.automata, self.rows.tolist(), self.states.tolist(), strict=True):
            logits[row, 0].masked_fill_(~automaton.following(state, left).to(logits.device), -float("inf"))
        return logits

    def restrict_along(self, logits: torch.Tensor, tokens: torch.Tensor, left: int) -> torch.Tensor:
        """Logits (1, n, V) of what stands behind each of `tokens` (1, n), as `restrict`; `left`: tokens that may follow behind the first
        of the places. From the first token on that the constraint does not accept they are as they are."""
        logits, (automaton,), state = logits.clone(), self.lattice.automata, int(self.states)
        for place, token in enumerate(tokens[0].tolist()):
            state = automaton.run([token], state)
            if state is None:
                break
            logits[0, place].masked_fill_(~automaton.following(state, left - place).to(logits.device), -float("inf"))
        return logits


# A recorded step takes states and reach as inputs, and lattice and orders, which must be the same objects, as they are.
pytree.register_pytree_node(
    Progress,
    lambda progress: ([progress.rows, progress.states, progress.reach], (progress.count, progress.lattice, progress.orders, progress.pad)),
    lambda values, fixed: Progress(values[0], *fixed, *values[1:]),
)


def start_progress(automata: Sequence[Automaton | None], pad: int, device: torch.device) -> Progress | None:
    """Before anything is written; `automata`: closed with `pad`, one a row, None for a row without a constraint. None where there is none
    at all."""
    rows = [row for row, automaton in enumerate(automata) if automaton is not None]
    if not rows:
        return None
    given = torch.tensor(rows, dtype=torch.int64, device=device)
    bound = [automata[row] for row in rows]
    orders = make_orders([automaton.classes for automaton in bound], device)
    return Progress(given, len(automata), make_lattice(bound, device), orders, pad, torch.zeros_like(given))


def count_possible(progress: Progress | None, tokens: torch.Tensor, left: int, vocab_size: int) -> torch.Tensor:
    """How many ids could stand at each position of canvases `tokens` int64 (b, C), all others being as they are: int64 (b, C), all of the
    vocabulary in rows without a constraint. `left`: tokens that each row may still get. Bans and thresholds take nothing away, and behind
    what a row may get there is padding alone. Waits for the device (`freedom.possible_ids`)."""
    found = torch.full_like(tokens, vocab_size)
    if progress is None:
        return found
    count = min(left, tokens.shape[1])
    found[progress.rows, count:] = 1
    for automaton, row, state in zip(progress.lattice.automata, progress.rows.tolist(), progress.states.tolist(), strict=True):
        possible = possible_ids(automaton, tokens[row, :count].tolist(), state, left - count)
        found[row, :count] = found.new_tensor(possible)
    return found


__all__ = ["Progress", "count_possible", "start_progress"]
