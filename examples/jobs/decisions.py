"""The jobs `bag`, `amounts` and `seats`: questions about a state, some of which it leaves open; the answers are one line of JSON.

    A bag holds 3 red and 7 blue marbles.          -> {"colour": "B", "red": "N"}
    colour: Which colour is drawn? A. red, B. blue
    red: Is it red? Y or N
    Answer as JSON.

or, in words, `{"colour": "blue", "red": "no"}`. The right probability of every answer is known: a marble is drawn as often as the bag
says, and amounts and shares of seats have one answer, which is easy or hard to see. So what a model says of its answers can be
judged as probabilities. `draw_request` gives questions in the form that transformers' pipeline "decision" takes, `render` the prompt,
as the checkpoint's `decision_template.jinja` writes it with letters, and `truth` the probabilities.

Held out is the state: the marbles of a bag, two amounts, or a number of seats.
"""

import json
import random
import re
from decimal import Decimal
from functools import partial

from .job import Job, draw_until, unparsable
from .units import EXPONENTS, QUANTITIES, shift

COLOURS = ("red", "blue", "green", "black", "white")
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn")
LEVELS = ("little", "some", "more", "most")  # of a quarter of all seats each
LETTERS, YES_NO, YES_NO_WORDS = "ABCDE", ("Y", "N"), ("yes", "no")
CLOSING = {False: "Answer as JSON.", True: "Answer as JSON, in words."}

_BAG = re.compile(r"A bag holds ((?:\d+ \w+(?:, | and )?)+) marbles\.")
_AMOUNTS = re.compile(r"(\w+) has ([\d.]+) (\w+), (\w+) has ([\d.]+) (\w+)\.")
_SEATS = re.compile(r"(\d+) of (\d+) seats are taken\.")
_QUESTION = re.compile(r"(?P<name>\w+): (?P<instructions>[^?\n]+\?) (?P<options>.+)")

Worlds = list[tuple[float, dict[str, str]]]  # what may be the case: how probable it is, and the option that answers each question then


def _draw_bag(rng: random.Random) -> str:
    counts = [f"{rng.randint(1, 9)} {colour}" for colour in rng.sample(COLOURS, rng.randint(2, 4))]
    return f"A bag holds {', '.join(counts[:-1])} and {counts[-1]} marbles."


def _draw_amounts(rng: random.Random) -> str:
    """Two amounts of the same quantity, one within a half and twice the other, in the same unit or the next."""
    units = rng.choice(QUANTITIES)
    place = rng.randrange(len(units))
    other = units[min(max(place + rng.choice((-1, 0, 0, 0, 1)), 0), len(units) - 1)]
    first = rng.randint(10, 999)
    second = min(max(int(first * 2 ** rng.uniform(-1, 1)), 1), 1999)
    shown = shift(second, 1 + EXPONENTS[other] - EXPONENTS[units[place]])
    one, two = rng.sample(NAMES, 2)
    return f"{one} has {shift(first, 1)} {units[place]}, {two} has {shown} {other}."


def _draw_seats(rng: random.Random) -> str:
    seats = rng.randint(10, 99)
    return f"{rng.randint(0, seats)} of {seats} seats are taken."


def read_bag(state: str) -> dict[str, int] | None:
    """How many marbles there are of each colour."""
    match = _BAG.fullmatch(state)
    return match and {colour: int(count) for count, colour in re.findall(r"(\d+) (\w+)", match[1])}


def _read_amounts(state: str) -> tuple[str, Decimal, str, Decimal] | None:
    match = _AMOUNTS.fullmatch(state)
    return match and (
        match[1], Decimal(match[2]).scaleb(EXPONENTS[match[3]]), match[4], Decimal(match[5]).scaleb(EXPONENTS[match[6]])
    )  # fmt: skip


_STATES = {"bag": _draw_bag, "amounts": _draw_amounts, "seats": _draw_seats}


def _draw_state(rng: random.Random, kind: str) -> str:
    while (amounts := _read_amounts(state := _STATES[kind](rng))) and amounts[1] == amounts[3]:
        pass
    return state


def _draw_questions(rng: random.Random, state: str) -> dict[str, dict]:
    """One or two questions about a state, options in any order."""
    bag, amounts = read_bag(state), _read_amounts(state)
    if bag:
        colour = rng.choice(list(bag))
        shuffled = dict.fromkeys(rng.sample(list(bag), len(bag)))
        questions = {
            "colour": {"type": "choice", "instructions": "Which colour is drawn?", "criteria": shuffled},
            colour: {"type": "noul", "instructions": f"Is it {colour}?"},
        }
    elif amounts:
        names = rng.sample([amounts[0], amounts[2]], 2)
        questions = {
            "more": {"type": "choice", "instructions": "Who has more?", "criteria": dict.fromkeys(names)},
            names[0].lower(): {"type": "noul", "instructions": f"Does {names[0]} have more?"},
        }
    else:
        questions = {
            "full": {"type": "score", "instructions": "How full is it?", "criteria": list(LEVELS)},
            "half": {"type": "noul", "instructions": "Is it at least half full?"},
        }
    return {name: questions[name] for name in rng.sample(list(questions), rng.randint(1, 2))}


def options(question: dict) -> list[str]:
    """The options of a question in words; those of a score are its levels."""
    return list(YES_NO_WORDS if question["type"] == "noul" else question["criteria"])


def _worlds(state: str, questions: dict[str, dict]) -> Worlds:
    bag, amounts, seats = read_bag(state), _read_amounts(state), _SEATS.fullmatch(state)
    if bag:
        cases = [(count / sum(bag.values()), colour, f"Is it {colour}?") for colour, count in bag.items()]
    elif amounts:
        more = amounts[0] if amounts[1] > amounts[3] else amounts[2]
        cases = [(1.0, more, f"Does {more} have more?")]
    elif seats:
        quarter = min(4 * int(seats[1]) // int(seats[2]), 3)
        cases = [(1.0, LEVELS[quarter], "Is it at least half full?" if quarter >= 2 else "")]
    else:
        raise ValueError(f"`state` is {state!r}; expected a bag, two amounts or seats")
    return [(weight, {name: _answer(question, option, true) for name, question in questions.items()}) for weight, option, true in cases]


def _answer(question: dict, option: str, true: str) -> str:
    return option if question["type"] != "noul" else YES_NO_WORDS[question["instructions"] != true]


def truth(request: dict) -> dict[str, list[float]]:
    """Of each question the probability of each of its `options`."""
    worlds = _worlds(request["state"], request["questions"])
    return {
        name: [sum(weight for weight, answers in worlds if answers[name] == option) for option in options(question)]
        for name, question in request["questions"].items()
    }


def labels(question: dict, in_words: bool) -> list[str]:
    """What an answer says for each of the question's `options`."""
    if in_words:
        return options(question)
    return list(YES_NO if question["type"] == "noul" else LETTERS[: len(question["criteria"])])


def render(request: dict, in_words: bool = False) -> str:
    """The prompt of a request."""
    lines = [request["state"]]
    for name, question in request["questions"].items():
        shown = labels(question, in_words)
        if question["type"] == "noul":
            listed = " or ".join(shown)
        elif in_words:
            listed = ", ".join(shown)
        else:
            listed = ", ".join(f"{letter}. {option}" for letter, option in zip(shown, options(question), strict=True))
        lines.append(f"{name}: {question['instructions']} {listed}")
    return "\n".join([*lines, CLOSING[in_words]])


def _read_prompt(prompt: str) -> tuple[dict, bool]:
    """The request of a prompt, and whether its answers are words."""
    state, *lines = prompt.split("\n")
    closing = lines.pop() if lines else ""
    matches = [_QUESTION.fullmatch(line) for line in lines]
    if closing not in CLOSING.values() or not lines or not all(matches):
        raise unparsable("decisions", prompt)
    in_words, questions = closing == CLOSING[True], {}
    for match in matches:
        name, instructions, listed = match["name"], match["instructions"], match["options"]
        questions[name] = {"type": "noul", "instructions": instructions}
        if " or " not in listed:
            words = [re.sub(r"^[A-E]\. ", "", option) for option in listed.split(", ")]
            score = tuple(words) == LEVELS
            questions[name] |= {"type": "score" if score else "choice", "criteria": words if score else dict.fromkeys(words)}
    return {"state": state, "questions": questions}, in_words


def _write_answers(request: dict, answers: dict[str, str], in_words: bool) -> str:
    said = {name: labels(question, in_words)[options(question).index(answers[name])] for name, question in request["questions"].items()}
    return json.dumps(said)


def draw_request(rng: random.Random, split: str, kind: str | None = None) -> dict:
    """A request about a state of the "train" or the "test" split: a "bag", "amounts" or "seats", or any of these."""
    kind = kind or rng.choice(list(_STATES))
    state = draw_until(lambda: _draw_state(rng, kind), _content, split == "test")
    return {"state": state, "questions": _draw_questions(rng, state)}


def _content(state: str) -> str:
    bag = read_bag(state)
    return f"decision {sorted(bag.items()) if bag else re.sub('|'.join(NAMES), '', state)}"


def _draw(rng: random.Random, held_out: bool, kind: str) -> tuple[str, str]:
    request, in_words = draw_request(rng, "test" if held_out else "train", kind), rng.random() < 0.5
    worlds = _worlds(request["state"], request["questions"])
    (_, answers), = rng.choices(worlds, weights=[weight for weight, _ in worlds])  # fmt: skip
    return render(request, in_words), _write_answers(request, answers, in_words)


def _check(prompt: str, answer: str) -> bool:
    """Whether the answers may all be the case at once."""
    request, in_words = _read_prompt(prompt)
    return answer in {_write_answers(request, answers, in_words) for _, answers in _worlds(request["state"], request["questions"])}


DECISION_JOBS: dict[str, Job] = {
    kind: Job(
        name=kind,
        draw=partial(_draw, kind=kind),
        check=_check,
        content=lambda prompt, response: frozenset({_content(prompt.split("\n")[0])}),
        many_answers=kind == "bag",
    )
    for kind in _STATES
}

__all__ = ["DECISION_JOBS", "draw_request", "labels", "options", "read_bag", "render", "truth"]
