"""The job `sort`: three to five distinct whole numbers 0 to 99 in ascending order.

    "Sort: 42, 7, 19" -> "7, 19, 42"

Held out is the set of numbers, in every order.
"""

import random
import re

from .job import Job, draw_until, unparsable

PHRASINGS = ("Sort: {}", "Sort these numbers: {}", "{} in ascending order", "Order from small to large: {}")
COUNTS = (3, 4, 5)

_LIST = re.compile(r"\d+(?:, \d+)+")


def _content(numbers: list[int]) -> str:
    return f"sort {sorted(numbers)}"


def _draw_numbers(rng: random.Random) -> list[int]:
    numbers: list[int] = []
    count = rng.choice(COUNTS)
    while len(numbers) < count:
        number = int(rng.random() * 100)
        if number not in numbers:
            numbers.append(number)
    return numbers


def _draw(rng: random.Random, held_out: bool) -> tuple[str, str]:
    numbers = draw_until(lambda: _draw_numbers(rng), _content, held_out)
    return rng.choice(PHRASINGS).format(", ".join(map(str, numbers))), ", ".join(map(str, sorted(numbers)))


def _read_prompt(prompt: str) -> list[int]:
    match = _LIST.search(prompt)
    if match is None:
        raise unparsable("sort", prompt)
    return [int(number) for number in match[0].split(", ")]


def _check(prompt: str, answer: str) -> bool:
    """The answer's own spelling is kept, so "07" is wrong."""
    return answer == ", ".join(str(number) for number in sorted(_read_prompt(prompt)))


SORT = Job(name="sort", draw=_draw, check=_check, content=lambda prompt, response: frozenset({_content(_read_prompt(prompt))}))

__all__ = ["SORT"]
