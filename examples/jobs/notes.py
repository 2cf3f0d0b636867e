"""The job `note_to_json`: one sentence of free text becomes one line of JSON.

    "To JSON: On 12 May 2024 Anna paid $4.50 for 3 blue mugs." ->
    {"name": "Anna", "quantity": 3, "item": "blue mugs", "price": 4.50, "date": "2024-05-12"}

Keys come in this order; a key the note does not state is absent. A price is a JSON number with the two decimals of the note, so that it is
copied as it stands (4.50 is valid JSON and equals 4.5). An item is one word or a modifier and a noun, both kept. Dates become ISO.

Held out are the template, the name, the last word of the item, the price and the day (the split of the job `date`); a test note consists of
held-out parts only. Quantities, modifiers and ways to write a price or a date are shared. In training, every second name and every third
noun is made up of random syllables: copying letters is the skill, and a list of 200 names can be memorised instead.
"""

import datetime
import json
import random
import re
from itertools import product

from .dates import (
    DATE_PATTERN,
    DAY_MONTH_YEAR,
    DAY_SHORT_YEAR,
    ISO_FORM,
    MONTH_DAY_YEAR,
    MONTH_NAMES,
    content_of_date,
    draw_date,
    read_date,
    write_date,
)
from .job import Job, draw_until, is_held_out, partition, unparsable
from .note_words import ITEMS, MODIFIERS, NAMES, TEST_TEMPLATES, TRAIN_TEMPLATES

KEYS = ("name", "quantity", "item", "price", "date")
PHRASINGS = ("To JSON: {}", "Note to JSON: {}", "Write as JSON: {}")
PRICE_FORMS = ("{}", "${}", "{} euros")
DATE_FORMS = (DAY_MONTH_YEAR, MONTH_DAY_YEAR, DAY_SHORT_YEAR, ISO_FORM)
FIRST_DAY = datetime.date(2000, 1, 1).toordinal()
LAST_DAY = datetime.date(2039, 12, 31).toordinal()

# Between them every letter, at the start of a word too: "Quinn" is a test name, and no real training name has a Q.
_ONSETS = " b br c ch d dr f fl g gr h j k l m n p ph pl qu r s sc sh st t th tr v w x y z".split(" ")
_VOWELS = "a e i o u a e i o ai ea ee oo ou y".split()
_CODAS = " n r l s m t b d p g ck ll nd rt tch x".split(" ")
# Words of the templates and months, which no name may be; made-up names include "Send" and "Mar" otherwise.
_RESERVED = frozenset(re.findall(r"[A-Z][a-z]+", " ".join(TRAIN_TEMPLATES + TEST_TEMPLATES + PHRASINGS))) | MONTH_NAMES
_SLOTS = {
    "name": rf"(?!(?:{'|'.join(sorted(_RESERVED))})\b)(?P<name>[A-Z][a-z]+)",
    "quantity": r"(?P<quantity>[1-9]\d*)",
    "item": r"(?!pieces\b)(?P<item>[a-z]+(?: [a-z]+)?)",
    "price": r"(?:\$(?P<price>\d+\.\d\d)|(?P<price_>\d+\.\d\d)(?: euros)?)",
    "date": rf"(?P<date>{DATE_PATTERN})",
}
_START = re.compile("|".join(re.escape(phrasing.removesuffix("{}")) for phrasing in PHRASINGS))


def expand(template: str) -> list[str]:
    """Every sentence of a template with alternatives: "a (b|c)" gives "a b" and "a c"."""
    parts = [part.split("|") for part in re.split(r"[()]", template)]
    return ["".join(choice) for choice in product(*parts)]


def compile_template(template: str) -> re.Pattern[str]:
    """The sentences of a template as one pattern with a group for each slot."""
    pieces = re.split(r"\{(\w+)\}", template.replace(".", r"\.").replace("(", "(?:"))
    return re.compile("".join(_SLOTS[piece] if position % 2 else piece for position, piece in enumerate(pieces)))


def content_of_name(name: str) -> str:
    """The held-out key of a name."""
    return "name " + name


def content_of_noun(noun: str) -> str:
    """The held-out key of an item: its last word."""
    return "noun " + noun


def content_of_price(price: str) -> str:
    """The held-out key of a price, written with two decimals."""
    return "price " + price


# One tuple a sentence, so that a template with three verbs is drawn as often as one with one.
_TEMPLATES = tuple(tuple(tuple(expand(template)) for template in split) for split in (TRAIN_TEMPLATES, TEST_TEMPLATES))
_PATTERNS = {template: compile_template(template) for template in TRAIN_TEMPLATES + TEST_TEMPLATES}
_NAMES = partition(NAMES, content_of_name)
_NOUNS = partition(ITEMS, content_of_noun)
_PRICES = partition((f"{cents // 100}.{cents % 100:02}" for cents in range(50, 10_000)), content_of_price)


def made_up(rng: random.Random, syllables: tuple[int, ...]) -> str:
    """A word of random syllables, at least three letters."""
    word = ""
    while len(word) < 3:
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.choice(syllables)))
    return word


def made_up_name(rng: random.Random) -> str:
    """A name of random syllables that is no word of a template and not held out."""
    while True:
        name = made_up(rng, (1, 2, 2)).capitalize()
        if name not in _RESERVED and not is_held_out(content_of_name(name)):
            return name


def draw_name(rng: random.Random, held_out: bool) -> str:
    """A name on its side of the split; in training every second one is made up."""
    return rng.choice(_NAMES[held_out]) if held_out or rng.random() < 0.5 else made_up_name(rng)


def draw_item(rng: random.Random, held_out: bool) -> str:
    """An item on its side of the split; in training every third noun is made up."""
    if held_out or rng.random() < 2 / 3:
        noun = rng.choice(_NOUNS[held_out])
    else:
        noun = draw_until(lambda: made_up(rng, (1, 1, 2)) + "s", content_of_noun, False)
    return f"{rng.choice(MODIFIERS)} {noun}" if rng.random() < 0.5 else noun


def write_json(values: dict[str, str]) -> str:
    """One line of JSON in the order of `KEYS`; quantity and price as numbers in their own spelling."""
    pairs = ((key, values[key] if key in ("quantity", "price") else f'"{values[key]}"') for key in KEYS if key in values)
    return "{" + ", ".join(f'"{key}": {value}' for key, value in pairs) + "}"


def fill_in(rng: random.Random, sentence: str, held_out: bool, name=draw_name, item=draw_item) -> tuple[str, str]:
    """Prompt and response of a sentence with slots, whose values are drawn; names and items by `(rng, held_out) -> str`."""
    values, written = {}, {}
    if "{name}" in sentence:
        values["name"] = written["name"] = name(rng, held_out)
    if "{quantity}" in sentence:
        values["quantity"] = written["quantity"] = str(2 + int(rng.random() * 98))
    if "{item}" in sentence:
        values["item"] = written["item"] = item(rng, held_out)
    if "{price}" in sentence:
        values["price"] = rng.choice(_PRICES[held_out])
        written["price"] = rng.choice(PRICE_FORMS).format(values["price"])
    if "{date}" in sentence:
        date = draw_date(rng, held_out, FIRST_DAY, LAST_DAY)
        values["date"] = date.isoformat()
        written["date"] = write_date(date, rng.choice(DATE_FORMS))
    return rng.choice(PHRASINGS).format(sentence.format_map(written)), write_json(values)


def _draw(rng: random.Random, held_out: bool) -> tuple[str, str]:
    return fill_in(rng, rng.choice(rng.choice(_TEMPLATES[held_out])), held_out)


def read_note(prompt: str) -> tuple[str, dict[str, str]]:
    """The template of a note and what it states, each value as text in the spelling of the response.

    Raises:
        ValueError: no template matches, or two templates read the note differently.
    """
    start = _START.match(prompt)
    if start is None:
        raise unparsable("note_to_json", prompt)
    readings: dict[str, dict[str, str]] = {}
    for template, pattern in _PATTERNS.items():
        match = pattern.fullmatch(prompt, start.end())
        if match is not None:
            values = {key.rstrip("_"): value for key, value in match.groupdict().items() if value is not None}
            if "date" in values:
                values["date"] = read_date(values["date"])
            readings[template] = values
    if len(readings) != 1:
        raise ValueError(f"`prompt` is {prompt!r}, expected a note of exactly one template, got {list(readings)}")
    return readings.popitem()


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError(f"`answer` has keys {[key for key, _ in pairs]}, expected every key once")
    return dict(pairs)


def _check(prompt: str, answer: str) -> bool:
    """Compares parsed JSON, types included; spacing, key order and trailing zeros of the price are free, a repeated key is wrong."""
    values: dict[str, object] = dict(read_note(prompt)[1])
    if "quantity" in values:
        values["quantity"] = int(values["quantity"])
    if "price" in values:
        values["price"] = float(values["price"])
    try:
        parsed = json.loads(answer, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return False
    if not isinstance(parsed, dict) or parsed.keys() != values.keys():
        return False
    if type(parsed.get("price")) is int:  # "5" for a price of 5.00
        parsed["price"] = float(parsed["price"])
    return all(type(parsed[key]) is type(values[key]) and parsed[key] == values[key] for key in values)


def _content(prompt: str, response: str) -> frozenset[str]:
    template, values = read_note(prompt)
    keys = {
        "name": content_of_name,
        "item": lambda item: content_of_noun(item.split()[-1]),
        "price": content_of_price,
        "date": content_of_date,
    }
    return frozenset({"template " + template} | {keys[key](value) for key, value in values.items() if key in keys})


NOTE_TO_JSON = Job(name="note_to_json", draw=_draw, check=_check, content=_content)

__all__ = [
    "KEYS", "NOTE_TO_JSON", "compile_template", "content_of_noun", "draw_item", "draw_name", "expand", "fill_in", "made_up", "made_up_name",
    "read_note", "write_json",
]  # fmt: skip
