"""The job `units`: metric conversions that only move the decimal point, by one to three places.

    "What is 3.5 km in m?" -> "3500 m"

Values have at most four significant digits and two decimals; results have at most four decimals. Both are written without trailing zeros,
without exponents and with a zero before the point. Held out is the value together with both units.
"""

import random
import re
from decimal import Decimal

from .job import Job, draw_until, unparsable

EXPONENTS = {"mm": 0, "cm": 1, "m": 3, "km": 6, "mg": -3, "g": 0, "kg": 3, "t": 6, "ml": 0, "cl": 1, "l": 3}
QUANTITIES = (("mm", "cm", "m", "km"), ("mg", "g", "kg", "t"), ("ml", "cl", "l"))
PAIRS = tuple(
    (source, target) for units in QUANTITIES for source in units for target in units if 1 <= abs(EXPONENTS[source] - EXPONENTS[target]) <= 3
)
MAX_DECIMALS = 4  # of a result
PHRASINGS = ("{value} {source} in {target}", "What is {value} {source} in {target}?", "Convert {value} {source} to {target}.")

_PATTERN = re.compile(r"(\d+(?:\.\d+)?) ([a-z]+) (?:in|to) ([a-z]+)\b")


def shift(digits: int, decimals: int) -> str:
    """Writes `digits * 10 ** -decimals` in canonical form; `decimals` may be negative."""
    if decimals <= 0:
        return str(digits * 10**-decimals)
    text = str(digits).zfill(decimals + 1)
    return (text[:-decimals] + "." + text[-decimals:]).rstrip("0").rstrip(".")


def _draw_conversion(rng: random.Random) -> tuple[str, str, str, str]:
    """Draws (value, source, target, result)."""
    while True:
        source, target = rng.choice(PAIRS)
        low = 10 ** int(rng.random() * 4)
        digits = low + int(rng.random() * 9 * low)
        decimals = int(rng.random() * 3)
        result = shift(digits, decimals + EXPONENTS[target] - EXPONENTS[source])
        if len(result.partition(".")[2]) <= MAX_DECIMALS:
            return shift(digits, decimals), source, target, result


def _content(value: str, source: str, target: str) -> str:
    return f"units {value} {source} {target}"


def _draw(rng: random.Random, held_out: bool) -> tuple[str, str]:
    value, source, target, result = draw_until(lambda: _draw_conversion(rng), lambda drawn: _content(*drawn[:3]), held_out)
    return rng.choice(PHRASINGS).format(value=value, source=source, target=target), f"{result} {target}"


def _read_prompt(prompt: str) -> tuple[str, str, str]:
    match = _PATTERN.search(prompt)
    if match is None or (match[2], match[3]) not in PAIRS:
        raise unparsable("units", prompt)
    return match[1], match[2], match[3]


def _check(prompt: str, answer: str) -> bool:
    """Exact decimal arithmetic, against the one canonical spelling."""
    value, source, target = _read_prompt(prompt)
    match = re.fullmatch(r"((?:0|[1-9][0-9]*)(?:\.[0-9]*[1-9])?) ([a-z]+)", answer)
    if match is None or match[2] != target:
        return False
    return Decimal(match[1]) == Decimal(value).scaleb(EXPONENTS[source] - EXPONENTS[target])


UNITS = Job(name="units", draw=_draw, check=_check, content=lambda prompt, response: frozenset({_content(*_read_prompt(prompt))}))

__all__ = ["PAIRS", "UNITS", "shift"]
