"""The places where others take part in a canvas: a constraint, a watcher, a first step; each with a trivial user."""

import pytest
import torch
from small_models import prompts, small_model

from generation import StepEvent, Trace, Wanted, Watcher, mixin, stream_events
from generation.constraints.automaton import make_automaton
from generation.vocabulary.filters import Filters
from generation.watch.watcher import WholeCanvas

VOCAB, PAD, END = 5001, 0, 1  # two pieces of the vocabulary
SETTINGS = {"max_new_tokens": 20, "max_denoising_steps": 4, "seed": [3, 4, 5], "eos_token_id": [], "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return small_model(vocab_size=VOCAB)


class Even:
    """Only even ids: the best even candidate of each position, and nothing of the others' self-conditioning."""

    wanted = Wanted(candidates=40, named=torch.tensor([7, 4000]))

    def __init__(self, rows=3, seen=None):
        self.rows, self.seen = rows, [] if seen is None else seen

    def constrain(self, prediction, state, embed):
        self.seen.append(prediction)
        assert len(state.canvas) == self.rows
        even = prediction.candidates % 2 == 0
        place = even.int().argmax(dim=-1, keepdim=True)
        ids = torch.where(even.any(dim=-1), prediction.candidates.gather(-1, place).squeeze(-1), 0)
        return prediction._replace(sample=ids, argmax=ids, entropy=prediction.entropy / 2, soft_embeds=embed(ids))

    def select(self, rows):
        return Even(len(rows), self.seen)


@pytest.mark.parametrize("way", [{}, {"output_logits": True, "return_dict_in_generate": True}], ids=["streamed", "dense"])
def test_a_constraint_decides_what_is_written(model, way):
    constraint = Even()
    found = model.generate(prompts(3, 9)[0], constraint=constraint, **SETTINGS, **way)
    sequences = found if isinstance(found, torch.Tensor) else found.sequences
    assert bool((sequences[:, 9:] % 2 == 0).all())
    for prediction in constraint.seen:
        assert prediction.candidates.shape == prediction.candidate_log_probs.shape == (*prediction.argmax.shape, 40)
        assert torch.equal(prediction.candidates[..., 0], prediction.argmax) and prediction.named_logits.shape[-1] == 2


def test_what_a_constraint_feeds_back_conditions_the_next_step(model):
    """The same tokens and another soft embedding give other predictions at the second step, and the same at the first."""

    class Silent(Even):
        def constrain(self, prediction, state, embed):
            found = super().constrain(prediction, state, embed)
            return found._replace(soft_embeds=torch.zeros_like(found.soft_embeds))

    first, second = Even(), Silent()
    for constraint in (first, second):
        model.generate(prompts(3, 9)[0], constraint=constraint, **{**SETTINGS, "confidence_threshold": 1e-9})
    assert torch.equal(first.seen[0].entropy, second.seen[0].entropy) and not torch.equal(first.seen[1].entropy, second.seen[1].entropy)


def test_a_constraint_goes_with_diffusion_alone(model):
    for other in ({"backend": "reference"}, {"decoding": "autoregressive"}):
        with pytest.raises(ValueError, match="`constraint` "):
            model.generate(prompts(1, 9)[0], constraint=Even(1), **other)
    with pytest.raises(ValueError, match="`constraint` is 3; expected a `Regex`"):
        model.generate(prompts(1, 9)[0], constraint=3)


WRONG = {
    "nothing": lambda given: None,
    "a tuple": tuple,
    "a narrower tensor": lambda given: given._replace(argmax=given.argmax[:, :3]),
    "another dtype": lambda given: given._replace(entropy=given.entropy.double()),
    "nothing for a tensor": lambda given: given._replace(sample=None),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_constraint_returns_must_be_a_prediction_like_the_one_it_was_given(model, name):
    """Most of them ended in an AttributeError far from the constraint, and another dtype in other tokens."""

    class Strange(Even):
        def constrain(self, prediction, state, embed):
            return WRONG[name](prediction)

    with pytest.raises(ValueError, match=r"`constraint` is a Strange, whose `constrain` returned a \w+; expected `prediction._replace"):
        model.generate(prompts(3, 9)[0], constraint=Strange(), **SETTINGS)


def test_a_constraint_says_what_it_wants_to_see(model):
    class Silent(Even):
        wanted = None

    with pytest.raises(ValueError, match="`constraint` is .*Silent.*expected .*wanted"):
        model.generate(prompts(3, 9)[0], constraint=Silent(), **SETTINGS)


class Pinned(Watcher):
    """Holds position 2 of every canvas at token 7, and keeps what it was told."""

    def __init__(self):
        self.steps, self.commits, self.ended = [], [], False

    def step(self, canvas_index, step, places, state, prediction):
        assert len(places) == len(state.canvas) == len(prediction.argmax)
        self.steps.append((canvas_index, step))
        here = torch.arange(state.canvas.shape[1]) == 2
        return state._replace(canvas=torch.where(here, 7, state.canvas), argmax=torch.where(here, 7, state.argmax))

    def commit(self, tokens, lengths, finish_reasons):
        self.commits.append((tokens, lengths.tolist(), finish_reasons))

    def end(self):
        self.ended = True


def test_a_watcher_is_told_and_may_change_the_canvas(model):
    watcher = Pinned()
    sequences = model.generate(prompts(3, 9)[0], watcher=watcher, **SETTINGS)
    assert sequences[:, [11, 21]].tolist() == [[7, 7]] * 3
    assert watcher.steps == sorted(set(watcher.steps)) and {canvas for canvas, _ in watcher.steps} == {0, 1} and watcher.ended
    assert torch.equal(torch.cat([tokens for tokens, _, _ in watcher.commits], dim=1), sequences[:, 9:])
    assert [lengths for _, lengths, _ in watcher.commits] == [[10] * 3] * 2
    assert [reasons for _, _, reasons in watcher.commits] == [(None,) * 3, ("length",) * 3]


def test_a_watcher_of_whole_canvases_is_shown_those_of_its_call_alone(model):
    """A second call whose rows were fewer was shown rows of the first, and one with more rows ended in an IndexError."""

    class Shown(WholeCanvas):
        rows = ()

        def show(self, canvas_index, step, state, prediction):
            self.rows = (*self.rows, len(state.canvas))

    watcher = Shown()
    for count in (3, 2, 4):
        model.generate(prompts(count, 9)[0], watcher=watcher, **{**SETTINGS, "seed": 0, "max_new_tokens": 5, "max_denoising_steps": 1})
    assert watcher.rows == (3, 2, 4)


def test_what_is_no_whole_watcher_is_refused(model):
    class Half:
        start = step = commit = end = lambda *args: None

    with pytest.raises(ValueError, match="`watcher` is .*Half.*expected a `generation.watch.watcher.Watcher`"):
        model.generate(prompts(1, 9)[0], watcher=Half(), **{**SETTINGS, "seed": 0})


def test_a_watcher_may_finish_rows(model):
    class Impatient(Watcher):
        def step(self, canvas_index, step, places, state, prediction):
            return state._replace(finished=state.finished | (places == 1))

    output = model.generate(
        prompts(3, 9)[0], watcher=Impatient(), return_dict_in_generate=True, **{**SETTINGS, "confidence_threshold": 1e-9}
    )
    assert output.denoising_steps.tolist() == [8, 2, 8], "two canvases of four steps, or of one"


@pytest.mark.parametrize("wrong", [3, "state", "narrow"])
def test_what_a_watcher_returns_must_be_a_state(model, wrong):
    class Strange(Watcher):
        def step(self, canvas_index, step, places, state, prediction):
            return state._replace(canvas=state.canvas[:, :3]) if wrong == "narrow" else wrong

    with pytest.raises(ValueError, match="`watcher` is a Strange.*expected None, or `state._replace"):
        model.generate(prompts(1, 9)[0], watcher=Strange(), **{**SETTINGS, "seed": 0})


def test_a_watcher_and_a_streamer_hear_the_same(model):
    class Streamer:
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got.append(value)

        def end(self): ...

    streamer, watcher = Streamer(), Pinned()
    model.generate(prompts(3, 9)[0], streamer=streamer, watcher=watcher, **SETTINGS)
    assert all(torch.equal(put, tokens) for put, (tokens, _, _) in zip(streamer.got[1:], watcher.commits, strict=True))
    with pytest.raises(ValueError, match="`watcher` is given; expected none"):
        stream_events(model, prompts(1, 9)[0], watcher=watcher)


@pytest.mark.parametrize("way", [{}, {"typical_p": 0.9}], ids=["streamed", "dense"])
def test_a_canvas_is_taken_on_from_its_first_step(model, way):
    """The canvas and the temperatures of the steps that are left; the second canvas takes all of them."""
    ids, canvas = prompts(1, 9)[0], torch.full((1, 10), 17)
    given = {**SETTINGS, "seed": 1, "confidence_threshold": 1e-9, **way}
    events = list(stream_events(model, ids, decoder_input_ids=canvas, first_step=3, **given))
    assert [(event.canvas, event.step) for event in events if isinstance(event, StepEvent)] == [(0, 3), *((1, step) for step in range(4))]
    for wrong in ({"first_step": 5, "decoder_input_ids": canvas}, {"first_step": 2}):
        with pytest.raises(ValueError, match=r"`first_step` is \d; expected a step up to `max_denoising_steps`, 4, .* and a canvas"):
            model.generate(ids, **given, **wrong)


class Heard(Watcher):
    """The canvas and the number of every step, and what was committed."""

    def __init__(self):
        self.steps, self.commits = [], []

    def step(self, canvas_index, step, places, state, prediction):
        self.steps.append((canvas_index, step))

    def commit(self, tokens, lengths, finish_reasons):
        self.commits.append(tokens)


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}], ids=str)
def test_several_canvases_begin_as_they_are_given(model, settings):
    """Each from its own step; one that has none left is committed as it stands, and nothing but its tokens is told of it."""
    ids, canvases = prompts(3, 9)[0], torch.arange(90).view(3, 30) + 20
    watcher, trace = Heard(), Trace()
    given = {**SETTINGS, "max_new_tokens": 40, "seed": 1, "confidence_threshold": 1e-9, "eos_token_id": [], **settings}
    first = {"decoder_input_ids": canvases, "first_step": [3, 4, 1]}
    output = model.generate(ids, watcher=[watcher, trace], return_dict_in_generate=True, **first, **given)
    assert output.canvas_steps.tolist() == [[1, 0, 3, 4]] * 3 and output.denoising_steps.tolist() == [8] * 3
    assert torch.equal(output.sequences[:, 19:29], canvases[:, 10:20])
    assert watcher.steps == [(0, 3), *((2, step) for step in (1, 2, 3)), *((3, step) for step in range(4))]
    assert torch.equal(watcher.commits[1], canvases[:, 10:20]) and [canvas.first_step for canvas in trace.canvases] == [3, 1, 0]
    alone = model.generate(ids[1:2], decoder_input_ids=canvases[1:2], first_step=[3, 4, 1], **given)
    assert torch.equal(alone[0], output.sequences[1])


def test_rows_whose_constraint_refuses_a_canvas_that_stands_take_the_last_step(model):
    """And no other row does: what a row writes does not hang on its neighbours."""
    ids, canvas = prompts(3, 9)[0], torch.full((3, 10), PAD)
    canvas[:, 0], canvas[:, 1] = torch.tensor([17, 18, 19]), END
    classes = torch.zeros(model.config.text_config.vocab_size, dtype=torch.int64)
    classes[17] = 1
    edge, one = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    seventeen = make_automaton(classes, edge, one, one, torch.tensor([False, True]))
    given = {**SETTINGS, "pad_token_id": PAD, "eos_token_id": END, "max_new_tokens": 10, "return_dict_in_generate": True}
    output = model.generate(ids, decoder_input_ids=canvas, first_step=4, constraint=[seventeen, seventeen, None], **given)
    assert output.canvas_steps.tolist() == [[0], [1], [0]]
    assert output.sequences[:, 9].tolist() == [17, 17, 19] and output.lengths.tolist() == [2, 2, 2]


CANVASES = torch.full((1, 20), 17)
UNFIT = {
    "half a canvas": ({"decoder_input_ids": CANVASES[:, :15]}, r"`decoder_input_ids` has shape \(1, 15\); expected \(1, 10\)"),
    "no canvas": ({"decoder_input_ids": CANVASES[:, :0]}, r"`decoder_input_ids` has shape \(1, 0\)"),
    "too many": ({"decoder_input_ids": CANVASES, "max_new_tokens": 10}, "`decoder_input_ids` holds 2 canvases .* expected at most 1"),
    "steps for others": ({"decoder_input_ids": CANVASES, "first_step": [1]}, r"`first_step` is \[1\]; expected one for each of the 2"),
    "a step beyond": ({"decoder_input_ids": CANVASES, "first_step": [1, 5]}, r"`first_step` is \[1, 5\]; expected a step up to"),
    "scores of no step": (
        {"decoder_input_ids": CANVASES, "first_step": [4, 0], "output_scores": True, "return_dict_in_generate": True},
        r"`first_step` is \[4, 0\], and `output_scores` is given",
    ),
}


@pytest.mark.parametrize("fault", UNFIT)
def test_canvases_that_do_not_fit_are_refused_by_name(model, fault):
    given, message = UNFIT[fault]
    with pytest.raises(ValueError, match=message):
        model.generate(prompts(1, 9)[0], **{**SETTINGS, **given})


@pytest.mark.parametrize("records", [False, True], ids=["plain", "recorded"])
def test_filters_of_rows_leave_with_their_rows(model, records, monkeypatch):
    """Rows end at different steps, and each may have ids of its own, which no argument gives as yet."""
    if records:
        monkeypatch.setattr("generation.call.plan.records", lambda device: True)
        monkeypatch.setattr("generation.call.plan.reads_late", lambda device: True)
    allowed = torch.zeros(3, VOCAB, dtype=torch.bool)
    allowed[0, 10:11], allowed[1, 100:3000], allowed[2, 4000:4003] = True, True, True
    start = mixin.start_rows
    monkeypatch.setattr(mixin, "start_rows", lambda *args: start(*args)._replace(filters=Filters(allowed=allowed)))
    ids, mask = prompts(3, 9, padded=3)
    settings = {**SETTINGS, "max_denoising_steps": 9, "confidence_threshold": 0.4, "return_dict_in_generate": True}
    kind = "static" if records else "dynamic"
    output = model.generate(ids, attention_mask=mask, cache_implementation=kind, **settings)
    assert len(set(output.denoising_steps.tolist())) > 1, "rows end at different steps"
    for row, tokens in enumerate(output.sequences[:, 9:]):
        assert bool(allowed[row, tokens].all())
