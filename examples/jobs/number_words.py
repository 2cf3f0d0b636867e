"""The jobs `number_to_words` and `words_to_number`: whole numbers 0 to 9999 in British style.

    "Write 4012 in words." -> "four thousand and twelve"
    "one thousand two hundred and thirty-four in digits" -> "1234"

British style: "and" before the last two digits, a hyphen inside 21 to 99, no comma. Held out is the number, the same for both directions.
Numbers below 100 are never held out: they are the vocabulary ("zero" occurs in no other number). A quarter of the samples are
below 1000, the rest uniform; test samples too.
"""

import random
import re

from .job import Job, is_held_out, unparsable

ONES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = (
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
LIMIT = 10_000
TO_WORDS = ("Write {} in words.", "{} in words", "Spell out {}.")
TO_NUMBER = ("Write {} in digits.", "{} in digits", "{} as a number")

_ONE, _TEEN, _TEN = "|".join(ONES), "|".join(TEENS), "|".join(TENS)
_GRAMMAR = re.compile(
    rf"(?:(?P<thousands>{_ONE}) thousand(?: (?!$)|$))?(?:(?P<hundreds>{_ONE}) hundred(?: (?!$)|$))?(?P<and>and )?"
    rf"(?:(?P<tens>{_TEN})(?:-(?P<after>{_ONE}))?|(?P<teens>{_TEEN})|(?P<ones>{_ONE}))?"
)
_VALUE = {word: number for number, word in enumerate(ONES + TEENS, 1)} | {word: 10 * n for n, word in enumerate(TENS, 2)}


def spell(number: int) -> str:
    """Writes 0 to 9999 in words."""
    if not 0 <= number < LIMIT:
        raise ValueError(f"`number` is {number}, expected 0 to {LIMIT - 1}")
    if number == 0:
        return "zero"
    words = []
    if number >= 1000:
        words.append(ONES[number // 1000 - 1] + " thousand")
    if number % 1000 >= 100:
        words.append(ONES[number % 1000 // 100 - 1] + " hundred")
    rest = number % 100
    if rest:
        if words:
            words.append("and")
        if rest < 20:
            words.append((ONES + TEENS)[rest - 1])
        else:
            words.append(TENS[rest // 10 - 2] + ("-" + ONES[rest % 10 - 1] if rest % 10 else ""))
    return " ".join(words)


def read_words(text: str) -> int | None:
    """The number `text` spells, or None where it is not the one British spelling of a number. Written as a grammar, not through `spell`."""
    if text == "zero":
        return 0
    match = _GRAMMAR.fullmatch(text)
    if match is None or not text:
        return None
    part = {name: _VALUE.get(word, 0) for name, word in match.groupdict().items()}
    above = 1000 * part["thousands"] + 100 * part["hundreds"]
    rest = part["tens"] + part["after"] + part["teens"] + part["ones"]
    if bool(match["and"]) != bool(above and rest):
        return None
    return above + rest


def content_of_number(number: int) -> str:
    """The held-out key of a number."""
    return f"number {number}"


def _numbers(limit: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The numbers below `limit` as (train, test)."""
    held_out = tuple(number for number in range(100, limit) if is_held_out(content_of_number(number)))
    return tuple(sorted(set(range(limit)) - set(held_out))), held_out


_SMALL, _ALL = _numbers(1000), _numbers(LIMIT)


def draw_number(rng: random.Random, held_out: bool) -> int:
    """Draws a number on its side of the split, a quarter of them below 1000."""
    return rng.choice((_SMALL if rng.random() < 0.25 else _ALL)[held_out])


def _draw_to_words(rng: random.Random, held_out: bool) -> tuple[str, str]:
    number = draw_number(rng, held_out)
    return rng.choice(TO_WORDS).format(number), spell(number)


def _draw_to_number(rng: random.Random, held_out: bool) -> tuple[str, str]:
    number = draw_number(rng, held_out)
    return rng.choice(TO_NUMBER).format(spell(number)), str(number)


def _read_digits_prompt(prompt: str) -> int:
    numbers = re.findall(r"\d+", prompt)
    if len(numbers) != 1:
        raise unparsable("number_to_words", prompt)
    return int(numbers[0])


def _read_words_prompt(prompt: str) -> int:
    for phrasing in TO_NUMBER:
        before, after = phrasing.split("{}")
        if prompt.startswith(before) and prompt.endswith(after):
            number = read_words(prompt[len(before) : len(prompt) - len(after)])
            if number is not None:
                return number
    raise unparsable("words_to_number", prompt)


NUMBER_TO_WORDS = Job(
    name="number_to_words",
    draw=_draw_to_words,
    check=lambda prompt, answer: read_words(answer) == _read_digits_prompt(prompt),
    content=lambda prompt, response: frozenset({content_of_number(_read_digits_prompt(prompt))}),
)
WORDS_TO_NUMBER = Job(
    name="words_to_number",
    draw=_draw_to_number,
    check=lambda prompt, answer: answer == str(_read_words_prompt(prompt)),
    content=lambda prompt, response: frozenset({content_of_number(_read_words_prompt(prompt))}),
)

__all__ = ["NUMBER_TO_WORDS", "WORDS_TO_NUMBER", "content_of_number", "draw_number", "read_words", "spell"]
