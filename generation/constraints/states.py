"""Finite automata over any letters: nondeterministic ones are put together, made deterministic, and states that accept the same are merged.

Letters are whole numbers; a set of them is an int with a bit for each. A deterministic automaton is a table int32 (S, L), the state that a
letter leads from a state to: state 0 is dead, for it leads nowhere, and state 1 is the start. Knows neither characters nor tokens.
"""

from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

FAR = 2**40  # more edges than any way has
MOST_STATES = 20_000  # of an automaton over characters: far above what a step can use
MOST_PLACES = 400_000  # of a nondeterministic one
MOST_MOVES = 10_000_000  # looked at while one is made deterministic: some seconds


def too_large(kind: str, count: int, most: int) -> ValueError:
    return ValueError(
        f"the constraint needs {count:,} or more {kind}, of at most {most:,}; lower its counts (`maxLength`, `maxItems`, `{{m,n}}`, the "
        "tokens of blanks), its number of options, or the depth of what nests"
    )


class Table(NamedTuple):
    """A deterministic automaton: `table` int32 (S, L), `accepting` bool (S,)."""

    table: np.ndarray
    accepting: np.ndarray

    def moves(self) -> list[list[tuple[int, int]]]:
        """Of each state its moves: the set of letters and the state that they lead to, state 1 as 0, without the dead one."""
        found = []
        for row in self.table[1:]:
            by_target: dict[int, int] = {}
            for letter in row.nonzero()[0].tolist():
                target = int(row[letter]) - 1
                by_target[target] = by_target.get(target, 0) | 1 << letter
            found.append([(letters, target) for target, letters in by_target.items()])
        return found


class Net:
    """A nondeterministic automaton that grows: `moves[state]` holds pairs of a set of letters and a target, `free[state]` the states that
    are reached from it by no letter."""

    def __init__(self) -> None:
        self.moves: list[list[tuple[int, int]]] = []
        self.free: list[list[int]] = []

    def state(self) -> int:
        """A new state. Raises ValueError where there are too many."""
        if len(self.moves) >= MOST_PLACES:
            raise too_large("places", len(self.moves), MOST_PLACES)
        self.moves.append([])
        self.free.append([])
        return len(self.moves) - 1

    def put(self, moves: list[list[tuple[int, int]]], accepting: Iterable[bool], first: int, last: int) -> None:
        """A deterministic automaton between two states: its start is reached from `first`, and `last` from where it accepts."""
        base = len(self.moves)
        for pairs, accepts in zip(moves, accepting, strict=True):
            self.state()
            self.moves[-1] = [(letters, base + target) for letters, target in pairs]
            if accepts:
                self.free[-1].append(last)
        self.free[first].append(base)


def determined(net: Net, first: int, last: int, letters: int, ranks: Mapping[int, tuple[Hashable, int]] | None = None) -> Table:
    """The smallest deterministic automaton of all strings that lead from `first` to `last`, by the subset construction.

    Args:
        letters: how many there are.
        ranks: of some states a group and a rank: of states of one group that are reached at once, only the lowest rank is followed. Right
            where it accepts whatever the others of its group do.

    Raises:
        ValueError: more than `MOST_STATES` states, or `MOST_MOVES` looked at on the way.
    """
    closures: dict[int, frozenset[int]] = {}

    def closure(state: int) -> frozenset[int]:
        if state not in closures:
            seen, waiting = {state}, [state]
            while waiting:
                for target in net.free[waiting.pop()]:
                    if target not in seen:
                        seen.add(target)
                        waiting.append(target)
            closures[state] = frozenset(one for one in seen if net.moves[one] or one == last)
        return closures[state]

    def followed(states: frozenset[int]) -> frozenset[int]:
        if not ranks or len(states) == 1:
            return states
        lowest: dict[Hashable, tuple[int, int]] = {}
        for state in states:
            if state in ranks:
                group, rank = ranks[state]
                lowest[group] = min(lowest.get(group, (rank, state)), (rank, state))
        kept = {state for _, state in lowest.values()}
        return frozenset(state for state in states if state not in ranks or state in kept)

    start, looked_at = followed(closure(first)), 0
    numbers, order, edges = {start: 1}, [start], []
    for states in order:  # grows meanwhile
        moves = [move for state in states for move in net.moves[state]]
        looked_at += len(moves)
        if looked_at > MOST_MOVES:
            raise too_large("moves between states", looked_at, MOST_MOVES)
        for mask, targets in _apart(moves):
            key = closure(targets[0]) if len(targets) == 1 else frozenset().union(*map(closure, targets))
            key = followed(key)
            if not key:
                continue
            edges.append((numbers[states], mask, _numbered(key, numbers, order)))
    table = np.zeros((len(order) + 1, letters), dtype=np.int32)
    places: dict[int, list[int]] = {}
    for source, mask, target in edges:
        if mask not in places:
            places[mask] = [letter for letter in range(letters) if mask >> letter & 1]
        table[source, places[mask]] = target
    return smallest(Table(table, np.array([False, *(last in states for states in order)])))


def _numbered(key: Hashable, numbers: dict, order: list) -> int:
    """The place of a state that is being found, from 1 on; a new one is put behind the others. ValueError where there are too many."""
    if key not in numbers:
        if len(order) > 2 * MOST_STATES:
            raise too_large("states", len(order), 2 * MOST_STATES)
        numbers[key] = len(numbers) + 1
        order.append(key)
    return numbers[key]


def _apart(moves: Iterable[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    """Moves whose letters may overlap as sets of letters that do not, each with all its targets."""
    by_letters: dict[int, list[int]] = {}
    for letters, target in moves:
        by_letters.setdefault(letters, []).append(target)
    found: list[tuple[int, list[int]]] = []
    for letters, targets in by_letters.items():
        pieces = []
        for mask, others in found:
            if both := mask & letters:
                pieces.append((both, others + targets))
            if rest := mask & ~letters:
                pieces.append((rest, others))
            letters &= ~mask
        if letters:
            pieces.append((letters, targets))
        found = pieces
    return found


def combined(left: Table, right: Table, both: bool) -> Table:
    """What `left` and `right` accept (`both`), or what `left` accepts and `right` does not, over the same letters. Raises ValueError where
    that takes too many states."""
    numbers, order, rows = {(1, 1): 1}, [(1, 1)], []
    for one, other in order:  # grows meanwhile
        pairs = list(zip(left.table[one].tolist(), right.table[other].tolist(), strict=True))
        row = []
        for pair in pairs:
            if not pair[0] or both and not pair[1]:
                row.append(0)
                continue
            row.append(_numbered(pair, numbers, order))
        rows.append(row)
    places = np.array([(0, 0), *order])
    accepting = left.accepting[places[:, 0]] & (right.accepting[places[:, 1]] == both)
    table = np.zeros((len(places), left.table.shape[1]), dtype=np.int32)
    table[1:] = rows
    return smallest(Table(table, accepting))


def smallest(automaton: Table) -> Table:
    """The same language with as few states as there can be. Every state must be reached from the start.

    Raises:
        ValueError: more than `MOST_STATES` states.
    """
    table, accepting = automaton
    source, letter = table.nonzero()
    target = table[source, letter]
    alive = distances(source, target, accepting) < FAR
    alive[1] = True  # the start stays, where nothing is accepted, too
    kept = alive[target] & alive[source]
    blocks = merged(source[kept], letter[kept], target[kept], accepting, len(table))
    blocks = np.where(alive, blocks, -1)
    firsts, places = {-1: 0}, [0]
    for state, block in enumerate(blocks.tolist()[1:], 1):
        if block not in firsts:
            firsts[block] = len(places)
            places.append(state)
    if len(places) > MOST_STATES:
        raise too_large("states", len(places), MOST_STATES)
    renamed = np.array([0, *(firsts[block] for block in blocks.tolist()[1:])], dtype=np.int32)
    made = np.where(alive[table[places]], renamed[table[places]], 0).astype(np.int32)
    return Table(made, accepting[places] & alive[places])


def spans(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """The indices of all half-open ranges, one range behind the other."""
    lengths = stops - starts
    ends = lengths.cumsum()
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)


def distances(source: np.ndarray, target: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """The fewest edges from each state to one of `goals` bool (S,): int64 (S,), `FAR` where there is no way. Looks at each edge once."""
    by_target = np.argsort(target, kind="stable")
    bounds = np.searchsorted(target[by_target], np.arange(len(goals) + 1))
    found, new, level = np.where(goals, 0, FAR), goals.nonzero()[0], 0
    while len(new):
        before, level = source[by_target[spans(bounds[new], bounds[new + 1])]], level + 1
        new = np.unique(before[found[before] == FAR])
        found[new] = level
    return found


def merged(source: np.ndarray, letter: np.ndarray, target: np.ndarray, accepting: np.ndarray, count: int) -> np.ndarray:
    """The block of each state, int64 (S,): two states have the same one where they accept the same strings.

    By refining: states that differ in what they accept or in the letters they know are apart; then, round by round, those whose letters
    lead into different blocks. A round looks only at states that lead into a block which the last one split.

    Args: the edges in rising order of source and letter, without those into dead states; `count` S.
    """
    bounds = np.searchsorted(source, np.arange(count + 1))
    by_target = np.argsort(target, kind="stable")
    bounds_before = np.searchsorted(target[by_target], np.arange(count + 1))
    kinds: dict[tuple[bool, bytes], int] = {}
    letters = letter.astype(np.int32)
    blocks = np.array(
        [
            kinds.setdefault((accepts, letters[one:other].tobytes()), len(kinds))
            for accepts, one, other in zip(accepting.tolist(), bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        ]
    )
    sizes = np.bincount(blocks).tolist()
    changed = np.arange(count)
    while len(changed):
        inside = blocks[target[spans(bounds[changed], bounds[changed + 1])]].astype(np.int32).tobytes()
        stops = (4 * (bounds[changed + 1] - bounds[changed]).cumsum()).tolist()
        groups: dict[tuple[int, bytes], list[int]] = {}
        begin = 0
        for state, block, stop in zip(changed.tolist(), blocks[changed].tolist(), stops, strict=True):
            groups.setdefault((block, inside[begin:stop]), []).append(state)
            begin = stop
        by_block: dict[int, list[list[int]]] = {}
        for (block, _), states in groups.items():
            by_block.setdefault(block, []).append(states)
        renamed: list[int] = []
        for block, members in by_block.items():
            if sizes[block] == sum(map(len, members)):  # all of it was looked at: the largest group keeps its name
                members.remove(max(members, key=len))
            for states in members:
                blocks[states] = len(sizes)
                sizes.append(len(states))
                sizes[block] -= len(states)
                renamed += states
        moved = np.array(renamed, dtype=np.int64)
        changed = np.unique(source[by_target[spans(bounds_before[moved], bounds_before[moved + 1])]])
    return blocks


__all__ = ["FAR", "MOST_STATES", "Net", "Table", "combined", "determined", "distances", "merged", "smallest", "spans", "too_large"]
