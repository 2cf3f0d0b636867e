"""The job `date`: a date in one of eight written forms, years 1900 to 2099, becomes ISO.

    "When is the 3rd of March 1998 in ISO?" -> "1998-03-03"

No form is ambiguous: dots mean day.month.year, slashes mean year/month/day. Held out is the day itself, in all its forms; the notes draw
their dates from the same split, so no job shows another one's test dates.
"""

import datetime
import random
import re

from .job import Job, draw_until, unparsable

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
FIRST_DAY = datetime.date(1900, 1, 1).toordinal()
LAST_DAY = datetime.date(2099, 12, 31).toordinal()
PHRASINGS = ("When is {} in ISO?", "{} in ISO", "Write {} as an ISO date.", "ISO date of {}")

DAY_MONTH_YEAR = "{d} {month} {y}"
MONTH_DAY_YEAR = "{month} {d}, {y}"
DAY_SHORT_YEAR = "{d} {short} {y}"
FORMS = (
    DAY_MONTH_YEAR,
    MONTH_DAY_YEAR,
    DAY_SHORT_YEAR,
    "{short} {d}, {y}",
    "the {d}{suffix} of {month} {y}",
    "{month} {d}{suffix}, {y}",
    "{d}.{m}.{y}",
    "{y}/{m:02}/{d:02}",
)
ISO_FORM = "{y}-{m:02}-{d:02}"

MONTH_NAMES = frozenset(MONTHS) | {month[:3] for month in MONTHS}
_NAMES = "|".join(sorted(MONTH_NAMES))
DATE_PATTERN = (
    rf"(?:\d{{4}}[-/]\d\d[-/]\d\d|\d\d?\.\d\d?\.\d{{4}}"
    rf"|(?:the )?\d\d?(?:(?:st|nd|rd|th) of)? (?:{_NAMES}) \d{{4}}|(?:{_NAMES}) \d\d?(?:st|nd|rd|th)?, \d{{4}})"
)
_PATTERN = re.compile(DATE_PATTERN)
_MONTH_NUMBER = {name: number for number, month in enumerate(MONTHS, 1) for name in (month, month[:3])}


def content_of_date(iso: str) -> str:
    """The held-out key of a day, given as ISO."""
    return "date " + iso


def write_date(date: datetime.date, form: str) -> str:
    """Writes `date` in one of `FORMS` or as `ISO_FORM`."""
    suffix = "th" if 11 <= date.day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(date.day % 10, "th")
    month = MONTHS[date.month - 1]
    return form.format(y=date.year, m=date.month, d=date.day, month=month, short=month[:3], suffix=suffix)


def read_date(text: str) -> str:
    """ISO of one written date: year first where four digits stand first, otherwise the day is the number of one or two digits."""
    numbers = re.findall(r"\d+", text)
    if len(numbers) == 2:
        day, year = numbers
        month = _MONTH_NUMBER[next(word for word in re.findall("[A-Za-z]+", text) if word in _MONTH_NUMBER)]
    elif len(numbers[0]) == 4:
        year, month, day = numbers
    else:
        day, month, year = numbers
    return datetime.date(int(year), int(month), int(day)).isoformat()


def draw_date(rng: random.Random, held_out: bool, first: int = FIRST_DAY, last: int = LAST_DAY) -> datetime.date:
    """Draws a day between two ordinals, both included, uniformly on its side of the split."""
    return draw_until(
        lambda: datetime.date.fromordinal(first + int(rng.random() * (last - first + 1))),
        lambda date: content_of_date(date.isoformat()),
        held_out,
    )


def _draw(rng: random.Random, held_out: bool) -> tuple[str, str]:
    date = draw_date(rng, held_out)
    return rng.choice(PHRASINGS).format(write_date(date, rng.choice(FORMS))), date.isoformat()


def _read_prompt(prompt: str) -> str:
    match = _PATTERN.search(prompt)
    if match is None:
        raise unparsable("date", prompt)
    return read_date(match[0])


DATE = Job(
    name="date",
    draw=_draw,
    check=lambda prompt, answer: answer == _read_prompt(prompt),
    content=lambda prompt, response: frozenset({content_of_date(_read_prompt(prompt))}),
)

__all__ = [
    "DATE",
    "DATE_PATTERN",
    "DAY_MONTH_YEAR",
    "DAY_SHORT_YEAR",
    "FORMS",
    "ISO_FORM",
    "MONTH_DAY_YEAR",
    "MONTH_NAMES",
    "content_of_date",
    "draw_date",
    "read_date",
    "write_date",
]
