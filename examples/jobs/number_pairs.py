"""The job `number_pair`: a number in words and in digits, whichever the writer likes.

    "Any number in words and in digits." -> "four hundred and six = 406"

The request says nothing of the number, so each side can only be told from the other: what fills in the middle can be put to the test.
Held out is the number, as in the jobs that turn one into the other (`number_words`).
"""

import random
import re

from .job import Job, unparsable
from .number_words import content_of_number, draw_number, read_words, spell

PHRASINGS = ("Any number in words and in digits.", "A number: words = digits", "Write some number in words and in digits.")
_FORM = re.compile(r"(?P<words>[a-z -]+) = (?P<digits>0|[1-9]\d*)")


def write_pair(number: int) -> str:
    """`406` as "four hundred and six = 406"."""
    return f"{spell(number)} = {number}"


def _draw(rng: random.Random, held_out: bool) -> tuple[str, str]:
    return rng.choice(PHRASINGS), write_pair(draw_number(rng, held_out))


def _check(prompt: str, answer: str) -> bool:
    if prompt not in PHRASINGS:
        raise unparsable("number_pair", prompt)
    match = _FORM.fullmatch(answer)
    return match is not None and read_words(match["words"]) == int(match["digits"])


NUMBER_PAIR = Job(
    name="number_pair",
    draw=_draw,
    check=_check,
    content=lambda prompt, response: frozenset({content_of_number(int(response.rpartition(" = ")[2]))}),
    many_answers=True,
)

__all__ = ["NUMBER_PAIR", "PHRASINGS", "write_pair"]
