"""Notes in more wordings than a list has: sentences for the training of `note_to_json`, put together from clauses.

What fails on unseen notes are unseen wordings ("By 20 August we need ..." gives a name "By") and the copy of unseen words. Here a sentence
is goods with or without somebody and a verb, and clauses of a name, a price and a day around them in any order; names and nouns are mostly
made up. Sentences of `TEST_TEMPLATES` are never made, nor is anything that is held out.
"""

import random

from .job import draw_until
from .note_words import MODIFIERS, TEST_TEMPLATES
from .notes import content_of_noun, draw_item, draw_name, expand, fill_in, made_up, made_up_name

VERBS = tuple(
    """
    wants needs took bought ordered sold got gets returned booked chose reserved received picked collects has keeps requested sends shipped
    lost found borrowed rents delivers expects owes packed checked asked_for paid_for looks_for signed_for waits_for picked_up sent_back
    """.split()
)
GOODS = ("{quantity} {item}", "{quantity} {item}", "{quantity} {item}", "{item}", "{quantity} pieces", "{item}, {quantity} pieces")
PEOPLE = ("for {name}", "to {name}", "from {name}", "by {name}", "sold to {name}", "ordered by {name}", "paid by {name}", "with {name}")
PRICES = ("for {price}", "at {price}", "price {price}", "{price}", "cost {price}", "worth {price}", "total {price}", "paid {price}")
DAYS = (
    "on {date}", "by {date}", "due {date}", "before {date}", "until {date}", "from {date}", "{date}", "after {date}", "for {date}",
    "not later than {date}", "since {date}", "around {date}", "arrives {date}",
)  # fmt: skip
OPENINGS = (
    "order", "sold", "reminder", "please", "today", "urgent", "invoice", "delivery", "request", "new order", "reserved", "bill", "offer",
    "as agreed", "in stock", "thanks", "receipt", "shipment", "returned", "waiting list",
)  # fmt: skip
CROWD = ("we", "they", "our shop", "the office", "somebody", "both", "you", "the school")
_HELD_OUT = frozenset(sentence for template in TEST_TEMPLATES for sentence in expand(template))


def compose(rng: random.Random) -> str:
    """A sentence with three to five of the slots {name} {quantity} {item} {price} {date}, once each."""
    while True:
        goods, named = rng.choice(GOODS), rng.random() < 0.75
        subject = rng.random()
        if named and subject < 0.5:
            goods, named = "{name} " + rng.choice(VERBS).replace("_", " ") + " " + goods, False
        elif subject > 0.75:
            goods = rng.choice(CROWD) + " " + rng.choice(VERBS).replace("_", " ") + " " + goods
        clauses = [goods]
        clauses += [rng.choice(PEOPLE)] * named
        clauses += [rng.choice(PRICES)] * (rng.random() < 0.6)
        clauses += [rng.choice(DAYS)] * (rng.random() < 0.7)
        rng.shuffle(clauses)
        text = clauses[0]
        for clause in clauses[1:]:
            text += rng.choice((" ", " ", ", ")) + clause
        first = rng.random()
        if first < 0.2:
            text = rng.choice(OPENINGS) + rng.choice((": ", ", ", " - ")) + text
        elif first < 0.3 and len(clauses) > 1:
            text = clauses[0] + ": " + ", ".join(clauses[1:])
        if not text.startswith("{"):
            text = text[0].upper() + text[1:]
        text += "."
        if text.count("{") >= 3 and text not in _HELD_OUT:
            return text


def _name(rng: random.Random, held_out: bool) -> str:
    return made_up_name(rng) if rng.random() < 0.75 else draw_name(rng, held_out)


def _item(rng: random.Random, held_out: bool) -> str:
    if rng.random() < 0.25:
        return draw_item(rng, held_out)
    noun = draw_until(lambda: made_up(rng, (1, 1, 2)) + rng.choice(("s", "s", "")), content_of_noun, held_out)
    before = rng.choice((None, rng.choice(MODIFIERS), made_up(rng, (1, 2))))
    return noun if before is None else f"{before} {noun}"


def draw_varied(rng: random.Random) -> tuple[str, str]:
    """One training example of `note_to_json`: a composed sentence, whose names and nouns are mostly made up."""
    return fill_in(rng, compose(rng), False, _name, _item)


__all__ = ["compose", "draw_varied"]
