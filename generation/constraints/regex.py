"""A regular expression as a language over characters: what it means is what `re.fullmatch` means, since `re` parses it, and since `re` is
asked which characters a class holds.

An anchor is a condition on what stands before or behind a match. A pattern becomes one language for each pair of conditions under which it
matches; conditions that meet text of the pattern itself are resolved there. What is no regular language, or not read here, is refused by
name: look-around, references to groups, conditional, atomic and possessive matches, word boundaries, and anchors under a repetition.

Knows nothing of tokens and of JSON.
"""

import re
import sys
from array import array
from collections.abc import Iterable
from functools import cache, reduce
from itertools import chain
from re import _constants as codes
from re import _parser as parser

from .expression import (
    ANY,
    EMPTY,
    LAST,
    NOTHING,
    SURROGATES,
    Both,
    Chars,
    Either,
    Except,
    Expression,
    Join,
    Mark,
    Repeat,
    chars,
    outside,
    text,
)

LARGEST = 10_000  # characters that a pattern may stand for, repetitions written out: beyond, its automaton is larger than any canvas needs

# Conditions, each stronger than the one before: on what stands before a match, and on what stands behind it.
ANYTHING_BEFORE, LINE_BEFORE, START_BEFORE = range(3)
ANYTHING_BEHIND, LINE_BEHIND, LAST_LINE_BEHIND, END_BEHIND = range(4)  # LAST_LINE: the end, or a line feed and the end
NO_CONDITION = (ANYTHING_BEFORE, ANYTHING_BEHIND)
LINE_FEED = text("\n")

ANCHORS = {
    codes.AT_BEGINNING_STRING: (START_BEFORE, ANYTHING_BEHIND),
    codes.AT_BEGINNING: (START_BEFORE, ANYTHING_BEHIND),
    codes.AT_END_STRING: (ANYTHING_BEFORE, END_BEHIND),
    codes.AT_END: (ANYTHING_BEFORE, LAST_LINE_BEHIND),
}
LINE_ANCHORS = {codes.AT_BEGINNING: (LINE_BEFORE, ANYTHING_BEHIND), codes.AT_END: (ANYTHING_BEFORE, LINE_BEHIND)}
CATEGORIES = {
    codes.CATEGORY_DIGIT: r"\d", codes.CATEGORY_NOT_DIGIT: r"\D", codes.CATEGORY_SPACE: r"\s", codes.CATEGORY_NOT_SPACE: r"\S",
    codes.CATEGORY_WORD: r"\w", codes.CATEGORY_NOT_WORD: r"\W",
}  # fmt: skip
REFUSED = {
    codes.ASSERT: "a look-around",
    codes.ASSERT_NOT: "a look-around",
    codes.FAILURE: "a look-around",
    codes.GROUPREF: "a reference to a group",
    codes.GROUPREF_EXISTS: "a condition on a group",
    codes.ATOMIC_GROUP: "an atomic group",
    codes.POSSESSIVE_REPEAT: "a possessive repetition",
}
# Languages by the conditions under which they match: {(before, behind): language}.
Matches = dict[tuple[int, int], Expression]


def parse_regex(pattern: str, name: str = "pattern") -> Expression:
    """The strings that `re.fullmatch(pattern, string)` accepts.

    Raises:
        ValueError: `re` does not parse it; it holds something that is refused by name; it stands for more than 10,000 characters.
    """
    return _parsed(pattern, name, searched=False)


def parse_search(pattern: str, name: str = "pattern") -> Expression:
    r"""The strings in which the pattern is found, as JSON schema's `pattern` means it.

    Its patterns are ECMA-262's. Validators in Python read them by `re.search`, which differs: a class means here what it means to `re` both
    in Unicode and in ASCII (so `\d` are ten digits), `.` is no line terminator, and `$` is the end and not before a last line feed.

    Raises: as `parse_regex`.
    """
    return _parsed(pattern, name, searched=True)


def _parsed(pattern: str, name: str, searched: bool) -> Expression:
    if not isinstance(pattern, str):
        raise ValueError(f"`{name}` is {pattern!r}; expected a regular expression as a string")
    try:
        re.compile(pattern)  # says more than the parser alone
        tree = parser.parse(pattern)
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        raise ValueError(f"`{name}` is {pattern!r}, which is no regular expression: {error}") from error
    matches = _Reader(pattern, name, searched).sequence(tree, tree.state.flags)
    if searched:
        around = {NO_CONDITION: Repeat(ANY, 0, None)}
        matches = _follow(_follow(around, matches), around)
    found = either(matches.values())  # before and behind a whole string stands nothing, which every condition allows
    if (size := expanded(found)) > LARGEST:
        raise ValueError(f"`{name}` is {pattern!r}, which stands for {size:,} characters; expected at most {LARGEST:,}: repeat less often")
    return found


class _Reader:
    """Reads the tree that `re` parses a pattern to."""

    def __init__(self, pattern: str, name: str, searched: bool) -> None:
        self.pattern, self.name, self.searched = pattern, name, searched

    def refuse(self, what: str) -> ValueError:
        return ValueError(f"`{self.name}` is {self.pattern!r}, which holds {what}; expected a regular expression without")

    def sequence(self, nodes: Iterable, flags: int) -> Matches:
        found = [self.node(code, value, flags) for code, value in nodes]
        if all(matches.keys() == {NO_CONDITION} for matches in found):
            return {NO_CONDITION: joined(*(matches[NO_CONDITION] for matches in found))}
        return reduce(_follow, found, {NO_CONDITION: EMPTY})

    def node(self, code, value, flags: int) -> Matches:
        if code is codes.AT:
            anchors = ANCHORS | LINE_ANCHORS if flags & re.MULTILINE else ANCHORS
            if value not in anchors:
                raise self.refuse(r"a word boundary (\b, \B)")
            before, behind = anchors[value]
            return {(before, END_BEHIND if self.searched and behind == LAST_LINE_BEHIND else behind): EMPTY}
        if code is codes.BRANCH:
            return _any_of(self.sequence(option, flags) for option in value[1])
        if code is codes.SUBPATTERN:
            _, added, removed, nodes = value
            return self.sequence(nodes, (flags | added) & ~removed)
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):  # greedy or lazy: the same strings
            return self.repeat(*value, flags)
        if code in REFUSED:
            raise self.refuse(REFUSED[code])
        return {NO_CONDITION: self.character(code, value, flags)}

    def repeat(self, least: int, most: int, nodes: Iterable, flags: int) -> Matches:
        body = self.sequence(nodes, flags)
        if body.keys() == {NO_CONDITION}:
            return {NO_CONDITION: Repeat(body[NO_CONDITION], least, None if most is codes.MAXREPEAT else most)}
        if most == 0:
            return {NO_CONDITION: EMPTY}
        if most == 1:
            return body if least else _any_of([body, {NO_CONDITION: EMPTY}])
        raise self.refuse("an anchor under a repetition")

    def character(self, code, value, flags: int) -> Chars:
        if code is codes.ANY:
            ends = "" if flags & re.DOTALL else "\n\r\u2028\u2029" if self.searched else "\n"
            return outside(chars(*((ord(end), ord(end)) for end in ends)))
        items = value if code is codes.IN else [(code, value)]
        if not flags & re.IGNORECASE and all(item in (codes.LITERAL, codes.NOT_LITERAL, codes.RANGE, codes.NEGATE) for item, _ in items):
            plain = chars(*(bounds if item is codes.RANGE else (bounds, bounds) for item, bounds in items if item is not codes.NEGATE))
            return outside(plain) if items[0][0] in (codes.NEGATE, codes.NOT_LITERAL) else plain
        written = "[" + "".join(self.item(*item) for item in items) + "]"
        found = _asked(written, flags & (re.IGNORECASE | re.ASCII))
        return meet(found, _asked(written, flags & re.IGNORECASE | re.ASCII)) if self.searched else found

    def item(self, code, value) -> str:
        """How `re` writes an item of a class."""
        if code is codes.NEGATE:
            return "^"
        if code is codes.LITERAL:
            return rf"\U{value:08x}"
        if code is codes.NOT_LITERAL:
            return rf"^\U{value:08x}"
        if code is codes.RANGE:
            return rf"\U{value[0]:08x}-\U{value[1]:08x}"
        if code is codes.CATEGORY:
            return CATEGORIES[value]
        raise self.refuse(f"{code} of Python's parser, which is not read here")


def _follow(first: Matches, second: Matches) -> Matches:
    """One behind the other. A condition reaches through a match that is empty; another match meets it, or does not."""
    found: Matches = {}
    for (before, behind), left in first.items():
        for (second_before, second_behind), right in second.items():
            for extra_before, head in _ends(left, second_before):
                for extra_behind, tail in _begins(right, behind):
                    key = (max(before, extra_before), max(second_behind, extra_behind))
                    language = joined(head, tail)
                    if language != NOTHING:
                        found[key] = either([found.get(key, NOTHING), language])
    return found


def _ends(language: Expression, condition: int) -> list[tuple[int, Expression]]:
    """A language before a match that has a condition on what stands before it: what stays of it, and of the condition."""
    if condition == ANYTHING_BEFORE:
        return [(ANYTHING_BEFORE, language)]
    empty = (condition, EMPTY if nullable(language) else NOTHING)
    if condition == START_BEFORE:
        return [empty]
    return [empty, (ANYTHING_BEFORE, _both(language, joined(Repeat(ANY, 0, None), LINE_FEED)))]


def _begins(language: Expression, condition: int) -> list[tuple[int, Expression]]:
    """A language behind a match that has a condition on what stands behind it: what stays of it, and of the condition."""
    if condition == ANYTHING_BEHIND:
        return [(ANYTHING_BEHIND, language)]
    empty = (condition, EMPTY if nullable(language) else NOTHING)
    if condition == END_BEHIND:
        return [empty]
    if condition == LAST_LINE_BEHIND:
        return [empty, (END_BEHIND, _both(language, LINE_FEED))]
    return [empty, (ANYTHING_BEHIND, _both(language, joined(LINE_FEED, Repeat(ANY, 0, None))))]


def _both(left: Expression, right: Expression) -> Expression:
    return NOTHING if left in (EMPTY, NOTHING) else Both(left, right)  # `right` holds a line feed


def _any_of(options: Iterable[Matches]) -> Matches:
    found: dict[tuple[int, int], list[Expression]] = {}
    for matches in options:
        for key, language in matches.items():
            found.setdefault(key, []).append(language)
    return {key: either(languages) for key, languages in found.items()}


@cache
def _alphabet() -> str:
    """Every character, in order."""
    points = chain(range(SURROGATES[0]), range(SURROGATES[1] + 1, LAST + 1))
    return array("I", points).tobytes().decode(f"utf-32-{sys.byteorder[0]}e")


@cache
def _asked(written: str, flags: int) -> Chars:
    """The characters that a class matches, by asking `re`: 5 to 20 ms on a core."""
    skipped = SURROGATES[1] + 1 - SURROGATES[0]
    spans = (match.span() for match in re.finditer(f"{written}+", _alphabet(), flags))
    ranges = ((first, end - 1) for first, end in spans)
    shifted = (tuple(place + skipped * (place >= SURROGATES[0]) for place in pair) for pair in ranges)
    return chars(*shifted)


def meet(left: Chars, right: Chars) -> Chars:
    """The characters of both."""
    return outside(chars(*outside(left).ranges, *outside(right).ranges))


def joined(*pieces: Expression) -> Expression:
    """One behind the other: nothing where one of them is nothing."""
    flat: list[Expression] = []
    for piece in pieces:
        match piece:
            case Join(inner):
                flat += inner
            case Either(()) | Chars(()):
                return NOTHING
            case _:
                flat.append(piece)
    return flat[0] if len(flat) == 1 else Join(tuple(flat))


def either(options: Iterable[Expression]) -> Expression:
    """Any of them, those left out that are nothing."""
    kept = [option for option in options if option not in (NOTHING, Chars(()))]
    return kept[0] if len(kept) == 1 else Either(tuple(kept))


def nullable(expression: Expression) -> bool:
    """Whether the empty string is of the language."""
    match expression:
        case Chars() | Mark():
            return False
        case Join(inner):
            return all(map(nullable, inner))
        case Either(options):
            return any(map(nullable, options))
        case Repeat(body, least, _):
            return least == 0 or nullable(body)
        case Both(left, right):
            return nullable(left) and nullable(right)
        case Except(left, right):
            return nullable(left) and not nullable(right)


def expanded(expression: Expression, known: dict[int, int] | None = None) -> int:
    """How many characters an expression stands for, repetitions written out: the size of its automaton before anything is shared."""
    known = {} if known is None else known  # by identity: an expression may hold another in many places
    if id(expression) in known:
        return known[id(expression)]
    match expression:
        case Chars() | Mark():
            size = 1
        case Join(inner) | Either(inner):
            size = sum(expanded(each, known) for each in inner)
        case Repeat(body, least, most):
            size = expanded(body, known) * max(1, least if most is None else most)
        case Both(left, right) | Except(left, right):
            size = expanded(left, known) + expanded(right, known)
    known[id(expression)] = size
    return size


__all__ = ["LARGEST", "either", "expanded", "joined", "meet", "nullable", "parse_regex", "parse_search"]
