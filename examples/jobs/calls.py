"""The job `calls`: requests that functions answer, of which a prompt declares some.

    add_up(numbers), set_timer(minutes); "Remind me in 25 minutes." -> set_timer(minutes=25)

A prompt is JSON: `tools`, functions as chat templates take them, and `request`. The response is JSON as well: the calls in the order in
which they were asked for, or a text where no function fits. Functions and parameters have several names, so a call can only be written by
who reads what is declared. In one prompt of ten a call was made and its result is there (`result`): the response is that result.

Held out is what a call is about: its kind with all values.
"""

import datetime
import json
import random
import re
from dataclasses import dataclass

from .dates import DAY_MONTH_YEAR, FIRST_DAY, LAST_DAY, read_date, write_date
from .job import Job, draw_until, unparsable
from .note_words import ITEMS, MODIFIERS, NAMES
from .units import PAIRS, shift

CITIES = tuple("""
    Aachen Athens Basel Bergen Berlin Boston Bremen Cairo Chicago Cologne Dakar Delhi Denver Dublin Florence Geneva Hamburg Hanoi Havana
    Helsinki Istanbul Kyoto Lagos Leeds Lima Lisbon London Madrid Manila Milan Montreal Munich Nairobi Naples Oslo Ottawa Paris Porto Prague
    Quito Riga Rome Seoul Seville Sofia Sydney Tallinn Tokyo Toronto Turin Utrecht Vienna Warsaw York Zagreb Zurich
    """.split())  # fmt: skip
ROOMS = tuple("attic bathroom bedroom cellar garage garden hall kitchen library office pantry studio workshop".split())
STATES = tuple("are here|are ready|are late|are gone|are in the garage|are in the office|cost too much|are for you|came today".split("|"))
NO_TOOL = "No tool does that."
TWO, RESULT, NONE, OTHERS = 0.2, 0.1, 0.1, (0, 0, 1, 1)  # shares of prompts; how many functions are declared beside those that are called
JOIN = " Then: "


@dataclass(frozen=True)
class Kind:
    """A kind of function: its names; of each slot the names of its parameter, its type and whether every call has it; and how it is asked
    for, every phrasing by slots in braces."""

    names: tuple[str, ...]
    slots: dict[str, tuple[tuple[str, ...], str, bool]]
    phrasings: tuple[str, ...]


KINDS = {
    "timer": Kind(
        ("set_timer", "start_timer", "count_down"),
        {"minutes": (("minutes", "duration"), "integer", True), "item": (("label", "title"), "string", False)},
        ("Set a timer for {minutes} minutes.", "Remind me in {minutes} minutes.", "In {minutes} minutes, remind me of the {item}.",
         "Start a timer of {minutes} minutes for the {item}."),
    ),
    "units": Kind(
        ("convert", "convert_units", "change_unit"),
        {"amount": (("amount", "value"), "number", True), "source": (("from", "source"), "string", True),
         "target": (("to", "target"), "string", True)},
        ("How many {target} are {amount} {source}?", "What is {amount} {source} in {target}?", "Convert {amount} {source} to {target}."),
    ),
    "message": Kind(
        ("send_message", "tell", "write_to"),
        {"name": (("to", "recipient", "name"), "string", True), "text": (("text", "message"), "string", True)},
        ("Tell {name} that {text}.", "Let {name} know that {text}.", "Write to {name} that {text}.", "Message for {name}: {text}."),
    ),
    "light": Kind(
        ("switch_light", "set_light", "light"),
        {"room": (("room", "place"), "string", True), "on": (("on", "bright"), "boolean", True)},
        ("Turn {on} the light in the {room}.", "Turn the light in the {room} {on}.", "Light {on} in the {room}, please."),
    ),
    "table": Kind(
        ("book_table", "reserve_table", "reserve"),
        {"people": (("people", "seats"), "integer", True), "date": (("date", "day"), "string", True),
         "name": (("name", "guest"), "string", False)},
        ("Book a table for {people} on {date}.", "A table for {people} on {date}, name {name}.",
         "Reserve for {people} people on {date}, for {name}."),
    ),
    "list": Kind(
        ("add_item", "buy", "put_on_list"),
        {"quantity": (("quantity", "count"), "integer", True), "item": (("item", "what"), "string", True)},
        ("Put {quantity} {item} on the list.", "We need {quantity} {item}.", "Buy {quantity} {item}.",
         "Add {quantity} {item} to the list."),
    ),
    "weather": Kind(
        ("get_weather", "weather", "forecast"),
        {"city": (("city", "place"), "string", True), "date": (("date", "day"), "string", False)},
        ("What is the weather in {city}?", "Will it rain in {city} on {date}?", "Weather in {city} on {date}?"),
    ),
    "sum": Kind(
        ("add_up", "total", "sum"),
        {"numbers": (("numbers", "values"), "array", True)},
        ("Add {numbers}.", "What is the sum of {numbers}?", "How much are {numbers} together?"),
    ),
    "flight": Kind(
        ("find_flights", "search_flights", "fly"),
        {"city": (("from", "start"), "string", True), "other": (("to", "destination"), "string", True),
         "date": (("date", "day"), "string", True)},
        ("Find flights from {city} to {other} on {date}.", "I fly from {city} to {other} on {date}.",
         "From {city} to {other} on {date}, by air."),
    ),
}  # fmt: skip


def _item(rng: random.Random) -> str:
    return f"{rng.choice(MODIFIERS)} {rng.choice(ITEMS)}" if rng.random() < 0.6 else rng.choice(ITEMS)


def _draw_values(rng: random.Random, kind: str) -> dict[str, object]:
    """A value for every slot of a kind."""
    source, target = rng.choice(PAIRS)
    city, other = rng.sample(CITIES, 2)
    drawn = {
        "minutes": rng.randint(2, 180), "item": _item(rng), "source": source, "target": target, "name": rng.choice(NAMES),
        "amount": json.loads(shift(rng.randint(1, 9999), rng.randrange(3))), "text": f"the {_item(rng)} {rng.choice(STATES)}",
        "room": rng.choice(ROOMS), "on": rng.random() < 0.5, "people": rng.randint(2, 20),
        "date": datetime.date.fromordinal(rng.randint(FIRST_DAY, LAST_DAY)).isoformat(),
        "quantity": rng.randint(2, 99), "city": city, "other": other,
        "numbers": [rng.randint(1, 999) for _ in range(rng.randint(2, 4))],
    }  # fmt: skip
    return {slot: drawn[slot] for slot in KINDS[kind].slots}


# How a request writes the value of each slot, and what reads it back.
WRITTEN = {"on": lambda on: "on" if on else "off",
           "date": lambda iso: write_date(datetime.date.fromisoformat(iso), DAY_MONTH_YEAR),
           "numbers": lambda numbers: f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"}  # fmt: skip
READ = {"on": lambda text: text == "on", "date": read_date, "numbers": lambda text: [int(found) for found in re.findall(r"\d+", text)],
        **dict.fromkeys(("minutes", "people", "quantity", "amount"), json.loads)}  # fmt: skip
PATTERNS = {"on": "on|off", "date": r"\d+ [A-Z][a-z]+ \d{4}", "numbers": r"\d+(?:, \d+)* and \d+", "amount": r"\d+(?:\.\d+)?",
            "text": "the [a-z ]+", "item": "[a-z]+(?: [a-z]+)?", **dict.fromkeys(("minutes", "people", "quantity"), r"\d+")}  # fmt: skip
PIECES = re.compile(r"\{(\w+)\}")


def _reader(phrasing: str) -> re.Pattern:
    """What matches the requests of a phrasing, with a group for each slot."""
    pieces = PIECES.split(phrasing)  # text, slot, text, and so on
    written = [f"(?P<{piece}>{PATTERNS.get(piece, '[A-Za-z]+')})" if place % 2 else re.escape(piece) for place, piece in enumerate(pieces)]
    return re.compile("".join(written))


READERS = [(kind, _reader(phrasing)) for kind, each in KINDS.items() for phrasing in each.phrasings]


def _read_asked(asked: str) -> tuple[str, dict[str, object]]:
    """The kind of one thing that is asked for, and its values."""
    for kind, reader in READERS:
        if match := reader.fullmatch(asked):
            return kind, {slot: READ.get(slot, str)(text) for slot, text in match.groupdict().items()}
    raise unparsable("calls", asked)


def _draw_asked(rng: random.Random, kind: str) -> str:
    phrasing, values = rng.choice(KINDS[kind].phrasings), _draw_values(rng, kind)
    return PIECES.sub(lambda match: WRITTEN.get(match[1], str)(values[match[1]]), phrasing)


def _content(asked: str) -> str:
    kind, values = _read_asked(asked)
    return f"call {kind} {json.dumps(values, sort_keys=True)}"


def _declare(rng: random.Random, kind: str) -> dict:
    """A function of a kind, under one of its names, as chat templates take it."""
    properties, required = {}, []
    for names, type_, demanded in KINDS[kind].slots.values():
        name = rng.choice(names)
        properties[name] = {"type": type_} | ({"items": {"type": "integer"}} if type_ == "array" else {})
        required += [name] if demanded else []
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": rng.choice(KINDS[kind].names), "parameters": parameters}}


def call_for(asked: str, tools: list[dict]) -> dict | None:
    """The call that one thing asked for takes, as `{"name", "arguments"}`; None where none of `tools` does it."""
    kind, values = _read_asked(asked)
    for tool in tools:
        function = tool["function"]
        if function["name"] in KINDS[kind].names:
            names = dict(zip(KINDS[kind].slots, function["parameters"]["properties"], strict=True))
            return {"name": function["name"], "arguments": {names[slot]: value for slot, value in values.items()}}
    return None


def _draw(rng: random.Random, held_out: bool) -> tuple[str, str]:
    share = rng.random()
    count = 2 if share < TWO else 1
    kinds = rng.sample([*KINDS], count + rng.choice(OTHERS) + 1)
    asked = [draw_until(lambda kind=kind: _draw_asked(rng, kind), _content, held_out) for kind in kinds[:count]]
    declared = kinds[count:] if share > 1 - NONE else kinds[:-1]
    tools = [_declare(rng, kind) for kind in rng.sample(declared, len(declared))]
    prompt = {"tools": tools, "request": JOIN.join(asked)}
    if TWO <= share < TWO + RESULT:
        prompt["result"] = f"{_item(rng)} {rng.randint(1, 999)}"
    prompt = json.dumps(prompt)
    return prompt, expected(prompt)


def expected(prompt: str) -> str:
    """The response to a prompt, JSON in the one spelling of `json.dumps`: the calls in the order in which they are asked for, or a text."""
    try:
        given = json.loads(prompt)
    except json.JSONDecodeError:
        raise unparsable("calls", prompt) from None
    if "result" in given:
        return json.dumps(given["result"])
    calls = [call_for(asked, given["tools"]) for asked in given["request"].split(JOIN)]
    return json.dumps(NO_TOOL if None in calls else calls, sort_keys=True)


def kinds_of(prompt: str) -> str:
    """What a prompt asks for, in a word or two."""
    given, said = json.loads(prompt), expected(prompt)
    asked = given["request"].split(JOIN)
    if "result" in given or said == json.dumps(NO_TOOL):
        return "a result is there" if "result" in given else "no tool fits"
    return "two things" if len(asked) == 2 else _read_asked(asked[0])[0]


def _check(prompt: str, answer: str) -> bool:
    try:
        return json.dumps(json.loads(answer), sort_keys=True) == expected(prompt)
    except json.JSONDecodeError:
        return False


CALLS = Job(
    name="calls",
    draw=_draw,
    check=_check,
    content=lambda prompt, response: frozenset(map(_content, json.loads(prompt)["request"].split(JOIN))),
)

__all__ = ["CALLS", "JOIN", "KINDS", "NO_TOOL", "call_for", "expected", "kinds_of"]
