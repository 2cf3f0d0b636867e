"""Languages over characters as values: what a regular expression, a JSON schema or a template says, before it is an automaton.

Characters are Unicode code points. `Both` and `Except` go beyond what a regular expression can write; automata have them for nothing. Knows
nothing of tokens.
"""

from dataclasses import dataclass
from typing import TypeAlias

LAST = 0x10FFFF  # the last code point
SURROGATES = (0xD800, 0xDFFF)  # are no characters, and UTF-8 has no bytes for them


@dataclass(frozen=True)
class Chars:
    """One character of `ranges`: pairs of code points, first and last, rising, apart and without surrogates. No range: no string at all."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Mark:
    """One special token, by its place among the `marks` of its language; it writes no character."""

    place: int


@dataclass(frozen=True)
class Join:
    """One of each, in this order; of none: the empty string."""

    members: tuple["Expression", ...]


@dataclass(frozen=True)
class Either:
    """Any of the options; of none: no string at all."""

    options: tuple["Expression", ...]


@dataclass(frozen=True)
class Repeat:
    """`body`, at least `least` and at most `most` times; None: any number of times."""

    body: "Expression"
    least: int
    most: int | None


@dataclass(frozen=True)
class Both:
    """The strings of both languages."""

    left: "Expression"
    right: "Expression"


@dataclass(frozen=True)
class Except:
    """The strings of `left` that are none of `right`."""

    left: "Expression"
    right: "Expression"


Expression: TypeAlias = Chars | Mark | Join | Either | Repeat | Both | Except

EMPTY, NOTHING = Join(()), Either(())


def chars(*ranges: tuple[int, int]) -> Chars:
    """Any one character of these ranges, in whatever order they are and whether they overlap or not; surrogates are left out."""
    cut = []
    for first, last in ranges:
        cut += [(first, min(last, SURROGATES[0] - 1)), (max(first, SURROGATES[1] + 1), last)]
    joined: list[tuple[int, int]] = []
    for first, last in sorted((first, last) for first, last in cut if first <= last):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], last))
        else:
            joined.append((first, last))
    return Chars(tuple(joined))


def outside(some: Chars) -> Chars:
    """Any one character but these."""
    ends = [-1, *(bound for first, last in some.ranges for bound in (first, last)), LAST + 1]
    return chars(*((ends[place] + 1, ends[place + 1] - 1) for place in range(0, len(ends), 2)))


ANY = chars((0, LAST))


def text(string: str) -> Join:
    """Just this string. Raises ValueError for a surrogate, which no text holds."""
    found = tuple(chars((ord(character), ord(character))) for character in string)
    if any(not each.ranges for each in found):
        raise ValueError(f"the text {string!r} holds a surrogate; expected characters")
    return Join(found)


__all__ = [
    "ANY", "EMPTY", "LAST", "NOTHING", "SURROGATES", "Both", "Chars", "Either", "Except", "Expression", "Join", "Mark", "Repeat",
    "chars", "outside", "text",
]  # fmt: skip
