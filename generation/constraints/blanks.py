"""From fixed text and blanks to an automaton over bytes, which is told where tokens end where blanks are counted in tokens.

A token counts for a blank where one of its bytes, or more, lies inside of it: so a literal "Dear " may be written with the blank behind it
by the token " Bob", and where a token holds bytes of two blanks, it counts for both. The end of a token is one more letter, which a blank
counts and text passes over. Knows no vocabulary.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from .characters import ByteAutomaton, byte_automaton
from .expression import ANY, Expression, Join, Repeat
from .states import Net, Table, determined

Moves = list[list[tuple[int, int]]]


@dataclass(frozen=True)
class Blank:
    """Any text that is not empty, of at least `least` (from 1 on) and at most `most` tokens; None: of any number."""

    least: int = 1
    most: int | None = None


def segments_automaton(segments: Sequence[Expression | Blank]) -> ByteAutomaton:
    """The automaton of all texts that are one text of each segment, in this order.

    Raises:
        ValueError: a segment accepts no text, or it takes too many states.
    """
    free = Blank()
    if all(one == free for one in segments if isinstance(one, Blank)):
        return byte_automaton(Join(tuple(Repeat(ANY, 1, None) if isinstance(one, Blank) else one for one in segments)))
    joined: list[Expression | Blank] = []
    for one in segments:
        if isinstance(one, Blank) or not joined or isinstance(joined[-1], Blank):
            joined.append(one)
        else:
            joined[-1] = Join((joined[-1], one))
    automata = [byte_automaton(ANY if isinstance(one, Blank) else one) for one in joined]
    names: dict[bytes, int] = {}
    columns = np.stack([automaton.byte_class for automaton in automata]).T
    byte_class = np.array([names.setdefault(column.tobytes(), len(names)) for column in columns], dtype=np.int64)
    sample = np.unique(byte_class, return_index=True)[1]  # a byte of each class
    end = len(sample)  # the letter that is the end of a token
    net, ranks = Net(), {}
    first = last = net.state()
    for place, (one, automaton) in enumerate(zip(joined, automata, strict=True)):
        table = Table(automaton.table[:, automaton.byte_class[sample]], automaton.accepting)
        moves, accepting, before, last = table.moves(), automaton.accepting[1:].tolist(), last, net.state()
        if isinstance(one, Blank):
            ranks |= _put_blank(net, moves, accepting, one, end, before, last, place)
        else:
            moves = [[*pairs, (1 << end, state)] for state, pairs in enumerate(moves)]
            net.put(moves, accepting, before, last)
    net.moves[last].append((1 << end, last))
    table, accepting = determined(net, first, last, end + 1, ranks)
    return ByteAutomaton(table[:, :end].copy(), byte_class.astype(np.uint8), accepting, table[:, end].copy())


def _put_blank(
    net: Net, moves: Moves, accepting: list[bool], blank: Blank, end: int, first: int, last: int, place: int
) -> dict[int, tuple[Hashable, int]]:
    """Adds a blank between two states, given the automaton of any one character. A state is one of that automaton's, how many tokens were
    counted, and whether the present one is among them. Returns the ranks of states that have enough tokens: fewer accept all that more do.
    """
    names: dict[tuple[int, int, bool], int] = {}
    waiting, ranks = [(0, 0, False)], {}

    def state(inside: int, count: int, counted: bool) -> int:
        if blank.most is None and count >= blank.least:  # nothing is left to count
            count, counted = blank.least, False
        key = inside, count, counted
        if key not in names:
            names[key] = net.state()
            waiting.append(key)
        return names[key]

    net.free[first].append(state(*waiting.pop()))
    for inside, count, counted in waiting:  # grows meanwhile
        here, after = names[inside, count, counted], count + (not counted)
        net.moves[here].append((1 << end, state(inside, count, False)))
        if count >= blank.least:
            ranks[here] = (place, inside), 2 * count - counted
            if inside == 0:
                net.free[here].append(last)
        if blank.most is None or after <= blank.most:
            net.moves[here] += [(letters, state(0 if accepting[target] else target, after, True)) for letters, target in moves[inside]]
    return ranks


__all__ = ["Blank", "segments_automaton"]
