"""The job `days`: so many days from a day on, as ISO dates: the one job whose answer fills a canvas.

    "The 16 days from 2 July 1998 on." -> "1998-07-02, 1998-07-03, ..., 1998-07-17"

14 to 22 days, which take 154 to 242 tokens. Held out is the year: no day of a test list occurs in a training list. (The job `date` shows
nine days of ten of those years, each by itself.)
"""

import datetime
import random
import re

from .dates import DATE_PATTERN, FIRST_DAY, FORMS, LAST_DAY, read_date, write_date
from .job import Job, is_held_out, unparsable

LEAST, MOST = 14, 22
SHORT_MONTHS = (2, 4, 6, 9, 11)
PHRASINGS = ("The {count} days from {date} on.", "List {count} days, beginning with {date}.", "{count} days from {date} in ISO")
_PATTERNS = tuple(
    re.compile(re.escape(phrasing).replace(r"\{count\}", r"(?P<count>\d+)").replace(r"\{date\}", rf"(?P<date>{DATE_PATTERN})"))
    for phrasing in PHRASINGS
)


def content_of_year(year: int) -> str:
    """The held-out key of a year, of which a list shows days."""
    return f"days of {year}"


def list_days(first: datetime.date, count: int) -> list[datetime.date]:
    """`count` days from `first` on."""
    return [first + datetime.timedelta(days=place) for place in range(count)]


def _draw(rng: random.Random, held_out: bool, over_short_month: bool = False) -> tuple[str, str]:
    while True:
        count = rng.randint(LEAST, MOST)
        days = list_days(datetime.date.fromordinal(rng.randint(FIRST_DAY, LAST_DAY - MOST)), count)
        split = all(is_held_out(content_of_year(year)) == held_out for year in {days[0].year, days[-1].year})
        if split and not (over_short_month and (days[0].month == days[-1].month or days[0].month not in SHORT_MONTHS)):
            break
    prompt = rng.choice(PHRASINGS).format(count=count, date=write_date(days[0], rng.choice(FORMS)))
    return prompt, ", ".join(day.isoformat() for day in days)


def draw_over_short_month(rng: random.Random) -> tuple[str, str]:
    """One training example over the end of a month that has no 31st: one list of six is, and in the others a month has 31 days."""
    return _draw(rng, False, over_short_month=True)


def _read_prompt(prompt: str) -> list[str]:
    for pattern in _PATTERNS:
        match = pattern.fullmatch(prompt)
        if match is not None:
            first = datetime.date.fromisoformat(read_date(match["date"]))
            return [day.isoformat() for day in list_days(first, int(match["count"]))]
    raise unparsable("days", prompt)


DAYS = Job(
    name="days",
    draw=_draw,
    check=lambda prompt, answer: answer == ", ".join(_read_prompt(prompt)),
    content=lambda prompt, response: frozenset(content_of_year(int(day[:4])) for day in _read_prompt(prompt)),
)

__all__ = ["DAYS", "LEAST", "MOST", "content_of_year", "draw_over_short_month", "list_days"]
