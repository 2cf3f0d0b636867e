"""The job `number_pair`: a number of four digits and the same in words, whichever number the writer likes.

    "Any number in digits and in words." -> "4062 = four thousand and sixty-two"

The request says nothing of the number, so each side can only be told from the other: what fills in, from the left or from the right, can be
put to the test. Held out is the number, as in the jobs that turn one into the other (`number_words`).
"""

import random
import re

from .job import Job, is_held_out, unparsable
from .number_words import LIMIT, content_of_number, read_words, spell

PHRASINGS = ("Any number in digits and in words.", "A number: digits = words", "Write some number in digits and in words.")
LEAST = 1000
_FORM = re.compile(r"(?P<digits>[1-9]\d{3}) = (?P<words>[a-z -]+)")


def write_pair(number: int) -> str:
    """`4062` as "4062 = four thousand and sixty-two"."""
    return f"{number} = {spell(number)}"


def _draw(rng: random.Random, held_out: bool) -> tuple[str, str]:
    while is_held_out(content_of_number(number := rng.randrange(LEAST, LIMIT))) != held_out:
        pass
    return rng.choice(PHRASINGS), write_pair(number)


def _check(prompt: str, answer: str) -> bool:
    if prompt not in PHRASINGS:
        raise unparsable("number_pair", prompt)
    match = _FORM.fullmatch(answer)
    return match is not None and read_words(match["words"]) == int(match["digits"])


NUMBER_PAIR = Job(
    name="number_pair",
    draw=_draw,
    check=_check,
    content=lambda prompt, response: frozenset({content_of_number(int(response[:4]))}),
    many_answers=True,
)

__all__ = ["NUMBER_PAIR", "PHRASINGS", "write_pair"]
