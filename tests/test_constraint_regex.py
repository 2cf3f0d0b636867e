"""A regular expression as a language: `re` is the judge of every string."""

import random
import re
from itertools import product

import pytest
from languages import NoString, holds, sample

from generation.constraints.expression import NOTHING
from generation.constraints.regex import LARGEST, parse_regex, parse_search

STRINGS = ["".join(letters) for length in range(5) for letters in product("aB\n", repeat=length)]
ATOMS = ["a", "B", "b", r"\n", ".", "[aB]", "[^a]", r"\w", r"\s", "[^\\s]", "", r"\D", "A"]
ANCHORS = ["^", "$", r"\A", r"\Z", "(?m:^)", "(?m:$)"]
FLAGS = ["", "", "(?i)", "(?s)", "(?m)", "(?x)", "(?a)", "(?ims)"]


def random_pattern(draw, depth, anchored):
    """A pattern of atoms and, outside of repetitions, anchors."""
    kind = draw.random()
    if depth == 0 or kind < 0.2:
        return draw.choice(ATOMS + (ANCHORS if anchored else []))
    if kind < 0.6:
        return "".join(random_pattern(draw, depth - 1, anchored) for _ in range(draw.randint(2, 4)))
    if kind < 0.75:
        return f"(?:{'|'.join(random_pattern(draw, depth - 1, anchored) for _ in range(draw.randint(2, 3)))})"
    if kind < 0.85:
        return f"({draw.choice(['', '?:', '?i:', '?s:', '?m:'])}{random_pattern(draw, depth - 1, anchored)})"
    repetition = draw.choice(["*", "+", "?", "{2}", "{1,3}", "{0,2}", "*?", "+?", "??"])
    return f"(?:{random_pattern(draw, depth - 1, anchored and repetition in ('?', '??'))}){repetition}"


@pytest.mark.parametrize("seed", range(8))
def test_language_is_what_fullmatch_accepts(seed):
    """On every string of up to four of three characters, a line feed among them."""
    draw = random.Random(seed)
    for _ in range(60):
        pattern = draw.choice(FLAGS) + random_pattern(draw, 3, anchored=True)
        language, judge = parse_regex(pattern), re.compile(pattern)
        wrong = [string for string in STRINGS if holds(language, string) != bool(judge.fullmatch(string))]
        assert wrong == [], pattern


@pytest.mark.parametrize("seed", range(4))
def test_search_is_what_search_finds(seed):
    r"""With `$` as the end, which `re` writes `\Z`."""
    draw = random.Random(100 + seed)
    for _ in range(60):
        pattern = random_pattern(draw, 3, anchored=True)
        if re.search(r"\(\?m:(?![$^]\))", pattern):  # where `$` is the end of a line
            continue
        language, judge = parse_search(pattern), re.compile(re.sub(r"(?<!m:)\$", r"\\Z", pattern))
        wrong = [string for string in STRINGS if holds(language, string) != bool(judge.search(string))]
        assert wrong == [], pattern


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{3}-\w+", r"(?a)\d+\w\s", "[^a-z]{2,}", r"(?P<year>\d{4})-(?P<month>0[1-9]|1[0-2])", r"[\W\d]+", "(?i)[^k]",
        "(?i)straße|kelvin",
        "é+|ß?", r"[\U0001F600-\U0001F64F]{1,3}", r"\x41\u00e9\t", "(?i:[à-ö])x", r"(?i)\w", "(?-i:a)B(?i:c)", r"[\]\\^-]+", "[^\\n]*",
    ],
)  # fmt: skip
def test_random_strings_are_judged_alike(pattern):
    """Strings of the language, and the same with a character left out, doubled or changed."""
    draw, language, judge = random.Random(pattern), parse_regex(pattern), re.compile(pattern)
    for _ in range(60):
        string = sample(language, draw)
        assert judge.fullmatch(string), (pattern, string)
        place = draw.randrange(len(string) + 1)
        other = draw.choice(["", "k", "K", "\u212a", "ſ", "\n", "ü", "٣", "\u2003", "_", chr(draw.randrange(0xE000, 0x110000))])
        for changed in (string[:place] + other + string[place + draw.randrange(2) :], other, string + other):
            assert holds(language, changed) == bool(judge.fullmatch(changed)), (pattern, changed)


@pytest.mark.parametrize(
    "pattern", [r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", "[a-zé]", "(?i)k", "(?i)[^s]", r"(?a)\w", r"(?i)[\d_ß]", "."]
)
def test_every_character_is_judged_alike(pattern):
    language, judge, ranges = parse_regex(pattern), re.compile(pattern), set()
    for first, last in language.ranges:
        ranges.update(range(first, last + 1))
    assert ranges == {point for point in range(0x110000) if not 0xD800 <= point < 0xE000 and judge.fullmatch(chr(point))}


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        (r"a(?=b)", "a look-around"), (r"(?<!a)b", "a look-around"), ("(?!)", "a look-around"), (r"(a)\1", "a reference to a group"),
        (r"(?P<x>a)(?P=x)", "a reference to a group"), (r"(a)?(?(1)b|c)", "a condition on a group"), (r"\ba", "a word boundary"),
        (r"a\B", "a word boundary"), ("a*+b", "a possessive repetition"), ("(?>a|ab)c", "an atomic group"),
        ("(?:^a)*", "an anchor under a repetition"), ("(?:a$){2}", "an anchor under a repetition"),
    ],
)  # fmt: skip
def test_what_is_not_regular_is_refused_by_name(pattern, what):
    with pytest.raises(ValueError, match=re.escape(f"`code` is {pattern!r}, which holds {what}")):
        parse_regex(pattern, "code")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a", "missing ), unterminated subpattern at position 0"),
        ("a**", "multiple repeat at position 2"),
        (r"\p{L}", r"bad escape \p at position 0"),
        ("a{99999999999999}", "the repetition number is too large"),
        (b"a", "expected a regular expression as a string"),
        ("(?:a{500}){0,500}", "stands for 250,000 characters; expected at most 10,000"),
    ],
)
def test_bad_pattern_is_refused(pattern, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_regex(pattern)


def test_repetitions_up_to_the_bound_are_read():
    assert holds(parse_regex(f"a{{{LARGEST}}}"), "a" * LARGEST)


def test_pattern_that_matches_nothing_is_nothing():
    assert parse_regex("a^b") == NOTHING


def test_searched_class_means_what_unicode_and_ascii_agree_on():
    """So that a validator which reads a pattern as ECMA-262 does accepts the same text."""
    for pattern, allowed, refused in [
        (r"^\d$", "7", "٣"), (r"^\w$", "w", "é"), (r"^\W$", "-", "é"), (r"^\s$", " ", "\u2003"), (r"^[^\d]$", "x", "٣"),
        ("^.$", "é", "\u2028"), ("^a$", "a", "a\n"),
    ]:  # fmt: skip
        language = parse_search(pattern)
        assert holds(language, allowed) and not holds(language, refused), pattern


def test_search_finds_anywhere():
    language = parse_search("b+|^x")
    assert [string for string in ("abc", "b", "xa", "ax", "", "\nb\n") if holds(language, string)] == ["abc", "b", "xa", "\nb\n"]


def test_sampler_knows_when_there_is_no_string():
    with pytest.raises(NoString):
        sample(NOTHING, random.Random(0))
