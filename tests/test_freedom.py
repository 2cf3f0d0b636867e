"""How many ids could stand at a position of a constrained canvas, and what watchers are shown of it.

The judge tries every id in the place of each, and asks `re` whether the text still fits.
"""

import io
import random
import re

import pytest
import torch
from small_models import small_model
from transformers import TextStreamer

from generation import CanvasStreamer, Choice, Pins, Regex, StepEvent, Template, Watcher, stream_events, stream_text
from generation.call.progress import count_possible, start_progress
from generation.constraints.automaton import closed
from generation.constraints.compiled import compile_constraint
from generation.constraints.freedom import possible_ids
from generation.loop import canvas

ENDS, PAD = [1, 106, 50], 0
SETTINGS = {"max_denoising_steps": 3, "eos_token_id": ENDS, "pad_token_id": PAD, "max_new_tokens": 40}
DATE = r"(19|20)\d\d-(0[1-9]|1[0-2])-([0-2]\d|3[01])"


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random, with the ids of the shipped tokenizer and three more; a canvas of 10."""
    return small_model(vocab_size=len(tokenizer) + 3)


@pytest.fixture(scope="module")
def texts(tokenizer):
    """What each id writes; None: nothing, or half a character."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    written = [None if token in special else tokenizer.decode([token]) for token in range(len(tokenizer))]
    return [None if text is None or "\ufffd" in text else text for text in written]


def prompts(rows):
    return torch.randint(200, 500, (rows, 7), generator=torch.Generator().manual_seed(0))


def cut(text, texts, source):
    """A text in tokens, in any way."""
    known = {written: token for token, written in enumerate(texts) if written}
    found = []
    while text:
        length = source.choice([length for length in range(1, min(len(text), 6) + 1) if text[:length] in known])
        found.append(known[text[:length]])
        text = text[length:]
    return found


@pytest.mark.parametrize("pattern, text", [
    (DATE, "1998-03-31"), (r"[a-f]{2,6}(, [a-f]{2,6})*", "cafe, bad, deed"), (r"(yes|no|maybe)( \w+)?\.", "maybe later."),
    (r'\{"name": "[^"\\]{1,12}", "quantity": \d+\}', '{"name": "Ida", "quantity": 12}'), (r"a.*b", "a + b - b"),
])  # fmt: skip
def test_every_id_that_fits_in_the_place_of_another_is_counted(tokenizer, texts, pattern, text):
    """ASCII patterns: half a character fits none of them but `.*`, and not with the rest as it is."""
    automaton, source = compile_constraint(Regex(pattern), tokenizer, len(tokenizer) + 3), random.Random(0)
    for _ in range(5):
        tokens = cut(text, texts, source)
        expected = []
        for place in range(len(tokens)):
            before, behind = ("".join(texts[token] for token in some) for some in (tokens[:place], tokens[place + 1 :]))
            expected.append(sum(bool(new and re.fullmatch(pattern, before + new + behind)) for new in texts))
        assert possible_ids(automaton, tokens) == expected


def test_one_wrong_id_leaves_the_others_nothing(tokenizer, texts):
    automaton = compile_constraint(Regex("[ab]{5}"), tokenizer, len(tokenizer))
    a, b, c = (texts.index(letter) for letter in "abc")
    assert possible_ids(automaton, [a, b, c, a, b]) == [0, 0, 2, 0, 0]
    assert possible_ids(automaton, [a, b, c, a, PAD]) == [0] * 5


def test_counting_goes_on_from_a_state_to_one_from_which_the_rest_fits(tokenizer, texts):
    automaton = compile_constraint(Choice(["abc", "abd", "bc"]), tokenizer, len(tokenizer))
    a, b, c = (texts.index(letter) for letter in "abc")
    behind = automaton.run([a])
    assert possible_ids(automaton, [b, c], behind) == [1, 2]
    assert possible_ids(automaton, [b], behind, left=0) == [0 if "bc" not in texts else sum(text in ("bc", "bd") for text in texts)]
    assert possible_ids(automaton, [b], behind, left=1) == [sum(text in ("b", "bc", "bd") for text in texts)]


def test_rows_count_for_themselves(tokenizer):
    """Without a constraint all of the vocabulary; behind what a row may get nothing but padding."""
    size = len(tokenizer)
    automaton = closed(compile_constraint(Choice(["a"]), tokenizer, size), ENDS, PAD)
    (a,) = tokenizer("a", add_special_tokens=False).input_ids
    canvases = torch.tensor([[5, 6, 7, 8], [a, ENDS[0], PAD, PAD]])
    progress = start_progress([None, automaton], 0, torch.device("cpu"))
    assert count_possible(progress, canvases, 9, size).tolist() == [[size] * 4, [1, 3, 1, 1]]
    assert count_possible(progress, canvases, 1, size).tolist() == [[size] * 4, [1, 1, 1, 1]]
    assert count_possible(None, canvases, 2, size).tolist() == [[size] * 4] * 2


class Seen(Watcher):
    needs_possible = True

    def __init__(self):
        self.states = []

    def step(self, canvas_index, step, places, state, prediction):
        self.states.append((canvas_index, places.tolist(), state))


def test_watchers_see_it_wherever_a_row_has_a_constraint(model, tokenizer):
    """Rows leave the batch, those that had a constraint before the others, and the others go on to further canvases."""
    seen, size = Seen(), model.config.get_text_config().vocab_size
    languages = [None, Choice(["yes", "no"]), None]
    model.generate(prompts(3), constraint=languages, tokenizer=tokenizer, watcher=seen, seed=[1, 2, 3], **SETTINGS)
    assert len({index for index, _, _ in seen.states}) > 1
    for index, places, state in seen.states:
        if index == 0:
            (possible,) = state.possible
            assert possible.shape == state.argmax.shape and possible.dtype == torch.int64
            for place, counts in zip(places, possible.tolist(), strict=True):
                assert set(counts) == {size} if languages[place] is None else max(counts) < 10 and min(counts) >= 1
        else:
            assert state.possible == ()


def test_nothing_is_counted_for_who_does_not_read_it(model, tokenizer, monkeypatch):
    """A count was paid for at every step for any watcher, a server's streamer too."""
    given = {"constraint": Regex(DATE), "tokenizer": tokenizer, **SETTINGS}
    seen, told = Seen(), Seen()
    told.needs_possible = False
    model.generate(prompts(1), watcher=[told, seen], **given)
    assert all(len(state.possible) == 1 for _, _, state in told.states), "one watcher asks for all"
    monkeypatch.setattr(canvas, "count_possible", lambda *_: pytest.fail("nobody reads it"))
    told.states.clear()
    model.generate(prompts(1), watcher=told, streamer=TextStreamer(tokenizer), **given)
    assert told.states and all(state.possible == () for _, _, state in told.states)
    assert re.fullmatch(DATE, "".join(stream_text(model, input_ids=prompts(1), **given)))


def test_without_a_constraint_there_is_none(model, tokenizer):
    seen = Seen()
    model.generate(prompts(2), tokenizer=tokenizer, watcher=seen, **SETTINGS)
    assert {state.possible for _, _, state in seen.states} == {()}
    events = [event for event in stream_events(model, prompts(1), **SETTINGS) if isinstance(event, StepEvent)]
    assert {event.possible for event in events} == {None}


@pytest.mark.parametrize("decoding", ["diffusion", "verified"])
def test_looking_on_changes_nothing(model, tokenizer, decoding):
    settings = {**SETTINGS, "constraint": Regex(DATE), "tokenizer": tokenizer, "decoding": decoding, "do_sample": False}
    seen = Seen()
    assert torch.equal(model.generate(prompts(1), **settings), model.generate(prompts(1), watcher=seen, **settings))
    assert all(int(state.possible[0].min()) >= 1 for _, _, state in seen.states), "the canvas fits, so each of its ids does"


def test_events_bring_it(model, tokenizer):
    mask = torch.tensor([True, False, True, True, False])
    pins = Pins(torch.tensor([300, 0, 301, 302, 0]), mask)
    events = stream_events(model, prompts(1), constraint=pins, tokenizer=tokenizer, seed=0, **SETTINGS)
    first = next(event for event in events if isinstance(event, StepEvent))
    counts = first.possible[0, : len(mask)]
    assert ((counts == 1) == mask).all() and bool((counts[~mask] > len(tokenizer) / 2).all())


def draw(model, tokenizer, content, constraint, colour=False, **settings):
    chat = [{"role": "user", "content": content}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    drawn = io.StringIO()
    streamer = CanvasStreamer(tokenizer, stop_ids=[PAD, *ENDS], file=drawn, colour=colour)
    given = {} if constraint is None else {"constraint": constraint, "tokenizer": tokenizer}
    model.generate(ids, streamer=streamer, max_new_tokens=32, canvas_length=32, seed=0, **given, **settings)
    return drawn.getvalue()


def test_pinned_constrained_and_free_positions_are_marked_apart(trained, tokenizer):
    template = Template("On {day}, in {year}.", year=Regex(r"\d{4}"))
    lines = draw(trained, tokenizer, "Write 1998-03-03 in words.", template, max_denoising_steps=6).splitlines()
    text, marks = (line[len("  step 12  ") :] for line in lines[-2:])
    fit = re.fullmatch(r"On (.+), in (\d{4})\.", text)
    assert fit and len(marks) == len(text), text
    assert marks[0] in "=-" and marks[-1] in "=-", "beside a blank a token may hold a piece of it, and is not pinned"
    assert marks[fit.start(1) + 1] in "^*." and set(marks[fit.start(2) : fit.end(2)]) <= set("+#:")


def test_colours_stand_for_the_marks(trained, tokenizer):
    drawn = draw(trained, tokenizer, "Write 3 March 1998 as an ISO date.", Regex(DATE), colour=True)
    assert "\033[1m-\033[0m" in drawn and "\033[1;4;32m8\033[0m" in drawn and "\033[1;32m" not in drawn


def test_without_a_constraint_all_is_drawn_as_ever(trained, tokenizer):
    question = "Write 3 March 1998 as an ISO date."
    assert set(draw(trained, tokenizer, question, None)) <= set(" step12\n1998-03-03^*.") | set("0123456789abcdefghijklmnopqrstuvwxyz")
    coloured = draw(trained, tokenizer, question, None, colour=True)
    assert "\033[1;32m-\033[0m" in coloured and "\033[1m" not in coloured and ";4;" not in coloured
