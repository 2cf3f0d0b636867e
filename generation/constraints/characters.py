"""From a language over characters to the smallest deterministic automaton over the bytes of UTF-8.

All code points that an expression does not tell apart are one letter, so the automaton over characters is made over some dozens of letters;
then each of its states is given the states inside of a character that it needs. A mark is a letter of its own, written as one of the bytes
that UTF-8 never holds. Knows nothing of tokens.
"""

from dataclasses import dataclass

import numpy as np

from .expression import LAST, SURROGATES, Both, Chars, Either, Except, Expression, Join, Mark, Repeat
from .states import Net, Table, combined, determined, too_large

MOST_BYTE_STATES = 100_000  # those inside of characters included: a set like all letters has about 300 of them a state
FIRST_MARK = 0xF8  # the byte of mark 0; that of mark 7 is the last
LEADS = ((0x00, 0x80), (0xC0, 0xE0), (0xE0, 0xF0), (0xF0, 0xF5))  # the first bytes of characters of 1, 2, 3 and 4 bytes


@dataclass(frozen=True, eq=False)
class ByteAutomaton:
    """`table` int32 (S, K): the state that a byte of a class leads to; `byte_class` uint8 (256,), the class of each byte; `accepting` bool
    (S,). State 0 is dead, state 1 the start; from all others acceptance can be reached.

    `border` int32 (S,): the state that the end of a token leads to, for languages that count tokens; None: it changes nothing.
    """

    table: np.ndarray
    byte_class: np.ndarray
    accepting: np.ndarray
    border: np.ndarray | None = None

    def accepts(self, data: bytes) -> bool:
        """Whether bytes without any end of a token are in the language."""
        state = 1
        for byte in data:
            state = int(self.table[state, self.byte_class[byte]])
        return bool(self.accepting[state])


def byte_automaton(expression: Expression) -> ByteAutomaton:
    """The smallest automaton over UTF-8 bytes that accepts the strings of `expression` and nothing else, invalid UTF-8 least of all.

    Raises:
        ValueError: the language is empty, or needs too many states.
    """
    letters, points, marks = _letters(expression)
    count, net = int(points.max()) + 1 + len(marks), Net()
    first = net.state()
    last = _put(net, expression, letters, count, first)
    automaton = determined(net, first, last, count)
    if not automaton.accepting.any():
        raise ValueError("the constraint accepts no text at all; expected one that does")
    return _in_bytes(automaton, points, marks)


def _letters(expression: Expression) -> tuple[dict[Chars | Mark, int], np.ndarray, dict[int, int]]:
    """The letters of every `Chars` and `Mark` in an expression as a set; the letter of every code point, (LAST + 1,): 0 for those in none;
    and the letters of marks by their place."""
    found: dict[Chars, None] = {}
    places: set[int] = set()
    waiting = [expression]
    while waiting:
        match waiting.pop():
            case Chars() as some:
                found[some] = None
            case Mark(place):
                places.add(place)
            case Join(inside) | Either(inside):
                waiting += inside
            case Repeat(body):
                waiting.append(body)
            case Both(left, right) | Except(left, right):
                waiting += (left, right)
    bounds = {0, LAST + 1, SURROGATES[0], SURROGATES[1] + 1}
    bounds.update(bound for some in found for first, last in some.ranges for bound in (first, last + 1))
    starts = np.array(sorted(bounds))
    inside = np.zeros((len(found), len(starts)), dtype=np.int8)
    for row, some in zip(inside, found, strict=True):
        if some.ranges:
            ends = np.array(some.ranges) + (0, 1)
            np.add.at(row, np.searchsorted(starts, ends[:, 0]), 1)
            np.subtract.at(row, np.searchsorted(starts, ends[:, 1]), 1)
    inside = inside.cumsum(axis=1) > 0
    inside[:, np.searchsorted(starts, SURROGATES[0])] = False
    names = {bytes(len(found)): 0}
    letter = np.array([names.setdefault(column.tobytes(), len(names)) for column in inside.T[:-1]])
    sets = {some: sum(1 << one for one in set(letter[row[:-1]].tolist())) for some, row in zip(found, inside, strict=True)}
    marks = {place: int(letter.max()) + 1 + order for order, place in enumerate(sorted(places))}
    return sets | {Mark(place): 1 << one for place, one in marks.items()}, np.repeat(letter, np.diff(starts)), marks


def _put(net: Net, expression: Expression, letters: dict[Chars | Mark, int], count: int, first: int) -> int:
    """Adds what leads from the state `first` by the strings of `expression` to the state that is returned."""
    match expression:
        case Chars() | Mark():
            last = net.state()
            if letters[expression]:
                net.moves[first].append((letters[expression], last))
            return last
        case Join(inside):
            for one in inside:
                first = _put(net, one, letters, count, first)
            return first
        case Either(inside):
            last = net.state()
            for one in inside:
                begin = net.state()
                net.free[first].append(begin)
                net.free[_put(net, one, letters, count, begin)].append(last)
            return last
        case Repeat(body, least, most):
            return _put_repeat(net, _table(body, letters, count), least, most, first)
        case Both(left, right) | Except(left, right):
            both = combined(_table(left, letters, count), _table(right, letters, count), isinstance(expression, Both))
            last = net.state()
            net.put(both.moves(), both.accepting[1:].tolist(), first, last)
            return last
    raise TypeError(f"`expression` holds a {type(expression).__name__}; expected Chars, Mark, Join, Either, Repeat, Both or Except")


def _put_repeat(net: Net, body: Table, least: int, most: int | None, first: int) -> int:
    moves, accepting = body.moves(), body.accepting[1:].tolist()
    if accepting[0]:  # it may be empty: then any count may be, and the others are made of bodies that are not
        moves, accepting, least = [*moves, moves[0]], [*accepting, False], 0
        moves[0], moves[-1] = moves[-1], moves[0]
        back = len(moves) - 1
        moves = [[(mask, back if target == 0 else target) for mask, target in pairs] for pairs in moves]
        accepting[0], accepting[-1] = False, True
    for _ in range(least):
        after = net.state()
        net.put(moves, accepting, first, after)
        first = after
    last = net.state()
    net.free[first].append(last)
    if most is None:
        net.put(moves, accepting, last, last)
    for _ in range(0 if most is None else most - least):
        after = net.state()
        net.put(moves, accepting, first, after)
        net.free[after].append(last)
        first = after
    return last


def _table(expression: Expression, letters: dict[Chars | Mark, int], count: int) -> Table:
    net = Net()
    first = net.state()
    return determined(net, first, _put(net, expression, letters, count, first), count)


def _in_bytes(automaton: Table, points: np.ndarray, marks: dict[int, int]) -> ByteAutomaton:
    """An automaton over letters as one over the bytes of the code points with these letters, and those of marks.

    Code points are cut as UTF-8 cuts them: blocks of 64 behind one byte before the last, and so on; equal blocks are one. A state inside of
    a character is a state and a block; equal ones are one, so the result is as small as it can be when `automaton` is.
    """
    blocks, contents, heads = points, [], [points[:0x80]]  # which block stands where; level by level (blocks, 64), what a block holds
    for shorter, leads in ((0x80, 32), (32, 16), (16, 5)):  # what a shorter form holds, and how many first bytes there are
        whole = np.zeros(-(-len(blocks) // 64) * 64, dtype=np.int64)
        whole[shorter : len(blocks)] = blocks[shorter:]
        names = {bytes(8 * 64): 0}  # block 0 of each level leads nowhere
        blocks = np.array([names.setdefault(row.tobytes(), len(names)) for row in whole.reshape(-1, 64)])
        contents.append(np.frombuffer(b"".join(names), dtype=np.int64).reshape(-1, 64))
        heads.append(blocks[:leads])
    offsets = np.cumsum([0, automaton.table.shape[1], *map(len, contents)])
    lead = np.zeros(256, dtype=np.int64)
    for offset, found, (begin, end) in zip(offsets, heads, LEADS, strict=False):
        lead[begin:end] = offset + found
    for place, letter in marks.items():
        lead[FIRST_MARK + place] = letter
    columns = np.zeros((1 + sum(map(len, contents)), 256), dtype=np.int64)
    columns[0] = lead
    columns[1:, 0x80:0xC0] = np.concatenate(contents)
    names = {}
    byte_class = np.array([names.setdefault(column.tobytes(), len(names)) for column in columns.T])
    sample = np.unique(byte_class, return_index=True)[1]  # one byte of each class
    inner = (sample >= 0x80) & (sample < 0xC0)

    made: dict[bytes, int] = {bytes(4 * len(sample)): 0}
    below, levels, count = automaton.table, [automaton.table], len(automaton.table)
    for rows in contents:
        above = np.zeros((count, len(rows)), dtype=np.int32)
        for block, row in enumerate(rows):
            used, there = np.unique(row, return_inverse=True)
            reached = below[:, used]
            behind = there[sample[inner] - 0x80]
            found: dict[bytes, int] = {bytes(4 * len(used)): 0}
            for state in reached.any(axis=1).nonzero()[0].tolist():
                key = reached[state].tobytes()
                if key not in found:
                    whole = np.zeros(len(sample), dtype=np.int32)
                    whole[inner] = reached[state][behind]
                    found[key] = made.setdefault(whole.tobytes(), count + len(made) - 1)
                    if len(made) + count > MOST_BYTE_STATES:
                        raise too_large("states over bytes", len(made) + count, MOST_BYTE_STATES)
                above[state, block] = found[key]
        levels.append(above)
        below = above
    border = np.concatenate(levels, axis=1)[:, lead[sample]]
    middle = np.frombuffer(b"".join(list(made)[1:]), dtype=np.int32).reshape(-1, len(sample))
    accepting = np.concatenate((automaton.accepting, np.zeros(len(middle), dtype=bool)))
    return ByteAutomaton(np.concatenate((border, middle)), byte_class.astype(np.uint8), accepting)


__all__ = ["FIRST_MARK", "ByteAutomaton", "byte_automaton"]
