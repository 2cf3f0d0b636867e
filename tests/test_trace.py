"""The trace: it records what any watcher is told, its numbers are those of a canvas made by hand, its file and page hold all of it."""

import html
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import CANVAS, prompts, small_model
from transformers import pipeline

from generation import Regex, Trace, Watcher
from generation.rules.prediction import Wanted
from generation.watch.packing import fill_forward, pack_bits, unpack_bits
from generation.watch.page import PAGE
from generation.watch.pictures import draw_trace, trace_page
from generation.watch.trace import CanvasTrace, rank_correlation

SETTINGS = {
    "max_new_tokens": 25, "max_denoising_steps": 7, "confidence_threshold": 2.0, "stability_threshold": 1, "seed": [3, 4, 5],
    "eos_token_id": [8], "pad_token_id": 0, "return_dict_in_generate": True,
}  # fmt: skip
CHAT = "Write 3 March 1998 as an ISO date."
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
FIELDS = ("canvas", "argmax", "accepted", "entropy", "forced", "taken", "temperature", "seconds", "tokens", "lengths")


class Ragged(Watcher):
    """Keeps what it is told, and ends row `r` at its step `r + 1`, of every canvas, and row 0 for good with the first."""

    def __init__(self, trace):
        self.trace, self.told, self.commits = trace, [], []

    def begin(self, schedule):
        self.schedule = schedule
        self.trace.begin(schedule)

    def start(self, prompt):
        self.trace.start(prompt)

    def step(self, canvas_index, step, places, state, prediction):
        self.trace.step(canvas_index, step, places, state, prediction)
        self.told.append((canvas_index, step, places.tolist(), state))
        return state._replace(finished=step >= places + 1)

    def commit(self, tokens, lengths, finish_reasons):
        self.trace.commit(tokens, lengths, finish_reasons)
        self.commits.append((tokens, lengths))


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module", params=["dynamic", "static"])
def recorded(model, request):
    """Three rows that take 2, 3 and 4 steps of each of three canvases, and leave the batch when they do, or wait in it."""
    trace = Trace()
    watcher = Ragged(trace)
    output = model.generate(prompts(3, 9)[0], watcher=watcher, cache_implementation=request.param, **{**SETTINGS, "eos_token_id": []})
    return trace, watcher, output


@pytest.fixture(scope="module")
def answered(trained, tokenizer):
    """The shipped checkpoint's trace of an answer under a constraint, in two canvases."""
    trace = Trace()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": CHAT}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    asked = {"canvas_length": 8, "max_new_tokens": 16, "seed": 0, "constraint": Regex(r"\d{4}-\d\d-\d\d"), "tokenizer": tokenizer}
    trained.generate(**inputs, watcher=trace, **asked)
    return trace


def hand_made():
    """One canvas of five positions and four steps, of which the row keeps four tokens."""
    argmax = [[1, 2, 3, 4, 9], [1, 5, 3, 4, 8], [1, 2, 6, 4, 7], [1, 2, 6, 4, 6]]
    accepted = [[1, 1, 0, 0, 1], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 1, 1, 1]]
    trace, shape = Trace(), (4, 1, 5)
    ids, flags = torch.tensor(argmax, dtype=torch.int32).view(shape), torch.tensor(accepted, dtype=torch.bool).view(shape)
    trace.finish_reasons = ["stop"]
    trace.canvases = [
        CanvasTrace(
            0, torch.ones(4, 1, dtype=torch.bool), torch.where(flags, ids, 50), ids, flags, torch.full(shape, 0.5, dtype=torch.float16),
            torch.zeros(shape, dtype=torch.bool), torch.full((4,), 0.6), torch.full((4,), 0.25), ids[3, :, :4], torch.tensor([4]),
        )
    ]  # fmt: skip
    return trace


def test_trace_holds_what_a_watcher_is_told_of_rows_that_end_at_different_steps(recorded):
    trace, watcher, output = recorded
    assert len(trace.canvases) == 3 and trace.finish_reasons == output.finish_reasons == ["length"] * 3
    assert [len(row.steps) for row in trace.row(0)] == [2] * 3 and [len(row.steps) for row in trace.row(2)] == [4] * 3
    for row in range(3):
        assert sum(len(canvas.steps) for canvas in trace.row(row)) == output.denoising_steps[row]
    assert len({len(told[2]) for told in watcher.told}) == (3 if len(watcher.told[3][2]) < 3 else 1), "rows leave, or wait"
    for canvas_index, step, places, state in watcher.told:
        canvas = trace.canvases[canvas_index]
        for place, row in enumerate(places):
            assert bool(canvas.taken[step, row]) == (step <= row + 1)
            assert torch.equal(canvas.canvas[step, row], state.canvas[place].int()) and torch.equal(
                canvas.argmax[step, row], state.argmax[place].int()
            )
            assert torch.equal(canvas.accepted[step, row], state.accepted[place])
            assert torch.equal(canvas.entropy[step, row], state.entropy[place].half())
    for canvas, (tokens, lengths) in zip(trace.canvases, watcher.commits, strict=True):
        assert torch.equal(canvas.tokens, tokens.int()) and torch.equal(canvas.lengths, lengths) and not bool(canvas.forced.any())
        assert torch.equal(canvas.temperature, watcher.schedule.temperatures()[: len(canvas.taken)]) and bool((canvas.seconds > 0).all())
    assert torch.equal(trace.prompt, output.sequences[:, :9].int())


def test_kept_tokens_are_the_answer(recorded):
    trace, _, output = recorded
    for row in range(3):
        tokens = torch.cat([canvas.tokens for canvas in trace.row(row)])
        assert torch.equal(tokens, output.sequences[row, 9:].int()) and len(trace.revisions(row)) == len(trace.stood_at(row)) == 25


def test_row_that_had_ended_takes_no_step_of_a_later_canvas(model):
    """It is denoised all the same where its cache cannot be narrowed."""

    class Ends(Ragged):
        def step(self, canvas_index, step, places, state, prediction):
            super().step(canvas_index, step, places, state, prediction)
            return state._replace(argmax=torch.where((places == 1)[:, None], 8, state.argmax)) if canvas_index == 0 else None

    trace = Trace()
    output = model.generate(prompts(3, 9)[0], watcher=Ends(trace), cache_implementation="static", **SETTINGS)
    assert output.finish_reasons[1] == trace.finish_reasons[1] == "stop"
    assert len(trace.row(1)) == 1 and len(trace.row(1)[0].tokens) == 1 and not bool(trace.canvases[1].taken[:, 1].any())
    assert sum(len(canvas.steps) for canvas in trace.row(1)) == output.denoising_steps[1]


def test_trace_changes_no_token_and_begins_anew_with_each_call(model):
    ids, trace = prompts(3, 9)[0], Trace()
    without = model.generate(ids, **SETTINGS).sequences
    for _ in range(2):
        assert torch.equal(model.generate(ids, watcher=trace, **SETTINGS).sequences, without)
    assert len(trace.canvases) <= 3 and sum(len(canvas.tokens[0]) for canvas in trace.canvases) == without.shape[1] - 9


def test_nothing_is_recorded_without_a_trace(model, monkeypatch):
    for name in ("begin", "start", "step", "commit"):
        monkeypatch.setattr(Trace, name, lambda *args: pytest.fail("a trace that nobody gave"))
    called = []
    monkeypatch.setattr("generation.loop.canvas.watch", lambda watchers, *told: called.append(watchers) or told[3])
    model.generate(prompts(1, 9)[0], **{**SETTINGS, "seed": 0})
    assert called and not any(called), "no watcher at any step"


def test_first_step_and_its_temperature_are_those_of_the_schedule(model):
    trace, canvas = Trace(), torch.full((1, CANVAS), 17)
    given = {**SETTINGS, "seed": 1, "confidence_threshold": 1e-9, "max_new_tokens": 20, "t_max": 0.8, "t_min": 0.1}
    model.generate(prompts(1, 9)[0], decoder_input_ids=canvas, first_step=4, watcher=trace, **given)
    first, second = trace.row()
    assert first.steps.tolist() == [4, 5, 6] and second.steps.tolist() == [*range(7)]
    assert torch.equal(first.temperature, second.temperature[4:]) and float(second.temperature[0]) == pytest.approx(0.8)


def test_positions_that_a_constraint_forces_are_marked(answered, tokenizer):
    """The hyphens of a date, and no digit."""
    for canvas in answered.row():
        for token, forced in zip(canvas.tokens.tolist(), canvas.forced[-1].tolist(), strict=False):
            text = tokenizer.decode([token])
            assert forced or text != "-"
            assert not (forced and text.isdigit())


def test_autoregressive_decoding_is_refused(model):
    with pytest.raises(ValueError, match="`watcher` is a Trace, and `decoding` is 'autoregressive'"):
        model.generate(prompts(1, 9)[0], watcher=Trace(), decoding="autoregressive", max_new_tokens=3)


def test_verified_rounds_are_canvases(model):
    trace = Trace()
    settings = {**SETTINGS, "seed": 0, "eos_token_id": [], "max_new_tokens": 5}
    output = model.generate(prompts(1, 9)[0], watcher=trace, decoding="verified", do_sample=False, **settings)
    assert torch.equal(torch.cat([canvas.tokens for canvas in trace.row()]), output.sequences[0, 9:].int())


# Alternatives


@pytest.mark.parametrize("way", [{}, {"output_logits": True}, {"decoding": "verified", "do_sample": False}])
def test_alternatives_are_the_most_probable_ids_beside_the_best_and_change_no_token(model, way):
    """Walked in pieces, and from whole logits."""

    class Logits(Watcher):
        wants_logits, seen = True, []

        def step(self, canvas_index, step, places, state, prediction):
            self.seen.append((state.argmax, prediction.shaped.log_softmax(dim=-1)))

    plain, trace, whole, logits = Trace(), Trace(alternatives=2), Trace(alternatives=2), Logits()
    settings = {**SETTINGS, "seed": 0, "eos_token_id": [], "max_new_tokens": 5, **way}
    for watcher in (plain, trace, [whole, logits]):
        model.generate(prompts(1, 9)[0], watcher=watcher, **settings)
    assert plain.canvases[0].alternatives is None and torch.equal(plain.row()[0].canvas, trace.row()[0].canvas)
    steps = [
        values for canvas in whole.row() for values in zip(canvas.argmax, canvas.alternatives, canvas.alternative_log_probs, strict=True)
    ]
    for (best, ids, log_probs), (argmax, every) in zip(steps, logits.seen, strict=True):
        assert ids.shape == log_probs.shape == (CANVAS, 2) and torch.equal(best, argmax[0].int())
        expected = every[0].scatter(-1, argmax[0, :, None], -float("inf")).topk(2, dim=-1)
        assert torch.equal(ids, expected.indices.int()) and torch.allclose(log_probs.float(), expected.values, atol=0.01)
    for canvas in trace.row():
        assert canvas.alternatives.shape == (*canvas.argmax.shape, 2) and not bool((canvas.alternatives == canvas.argmax[..., None]).any())
        assert bool((canvas.alternative_log_probs.diff(dim=-1) <= 0).all()) and bool((canvas.alternative_log_probs < 0).all())


def test_best_token_that_somebody_put_there_leaves_two_others(model):
    trace = Trace(alternatives=2)
    model.generate(prompts(1, 9)[0], watcher=[Overwrites(17), trace], **{**SETTINGS, "seed": 0})
    assert all(canvas.alternatives.shape[-1] == 2 and not bool((canvas.alternatives == 17).any()) for canvas in trace.row())


def test_file_and_page_hold_alternatives(trained, tokenizer, tmp_path):
    trace, inputs = Trace(alternatives=3), tokenizer(CHAT, return_tensors="pt")
    trained.generate(**inputs, watcher=trace, canvas_length=16, max_new_tokens=16, max_denoising_steps=3, seed=0)
    trace.save(path := tmp_path / "trace.safetensors")
    loaded = Trace.load(path)
    assert loaded.candidates == trace.candidates == 4
    for name in ("alternatives", "alternative_log_probs", "argmax", "seconds"):
        assert torch.equal(getattr(trace.canvases[0], name), getattr(loaded.canvases[0], name))
    data = json.loads(re.search(r'json">(.*?)</script>', trace_page(loaded, tokenizer), re.DOTALL)[1])
    canvas = loaded.row()[0]
    for step, shown in enumerate(data["canvases"][0]["steps"]):
        for place in range(16):
            chances = canvas.alternative_log_probs[step, place].float().exp()
            expected = [tokenizer.decode([token]) for token in canvas.alternatives[step, place][chances >= 0.001].tolist()]
            found = [data["texts"][id].replace("\u23ce", "") for id, _ in shown["others"].get(str(place), [])]
            assert found == [text or "\u2205" for text in expected]
    assert any(step["others"] for step in data["canvases"][0]["steps"])


@pytest.mark.parametrize("wrong", [-1, True, 1.5, "3", None])
def test_number_of_alternatives_is_checked(wrong):
    with pytest.raises(ValueError, match="`alternatives` is .*; expected 0, or how many"):
        Trace(alternatives=wrong)


@pytest.mark.parametrize("way", [{}, {"output_logits": True, "return_dict_in_generate": True}])
def test_alternatives_under_a_constraint_fit_it(trained, tokenizer, way):
    """Beside a row that may write anything. At the first position stands what "It is" begins with, behind it a piece of it or a digit."""
    inputs = tokenizer([CHAT, CHAT], return_tensors="pt", padding=True)
    settings = {"canvas_length": 16, "max_new_tokens": 16, "max_denoising_steps": 3, "seed": [0, 1], "tokenizer": tokenizer, **way}
    plain, trace = Trace(), Trace(alternatives=3)
    for watcher in (plain, trace):
        trained.generate(**inputs, watcher=watcher, constraint=[Regex("It is [0-9]{4}!"), None], **settings)
    for row in range(2):
        assert all(torch.equal(one.canvas, other.canvas) for one, other in zip(plain.row(row), trace.row(row), strict=True))
    (canvas,) = trace.row(0)
    text = tokenizer.decode(canvas.tokens, skip_special_tokens=True)
    place = next(place for place, token in enumerate(canvas.tokens.tolist()) if tokenizer.decode([token]).isdigit())
    assert re.fullmatch("It is [0-9]{4}!", text)
    for step in range(len(canvas.argmax)):
        first, digit = (
            [tokenizer.decode([token]) for token in canvas.alternatives[step, at][canvas.alternative_log_probs[step, at] > -15].tolist()]
            for at in (0, place)
        )
        assert all("It is ".startswith(found) for found in first), first
        assert digit and all(found.isdigit() or found in "It is " for found in digit), digit
    assert bool((trace.row(1)[0].alternative_log_probs[:, 0] > -float("inf")).any())


def test_alternatives_behind_a_constraint_that_sees_predictions_are_refused(trained, tokenizer):
    class Sees:
        wanted = Wanted()

        def constrain(self, prediction, state, embedding):
            return prediction

        def select(self, rows):
            return self

    inputs, trace = tokenizer(CHAT, return_tensors="pt"), Trace(alternatives=1)
    with pytest.raises(ValueError, match="`constraint` sees predictions, and a `watcher` reads the most probable ids"):
        trained.generate(**inputs, watcher=[Trace(), trace], constraint=Sees())
    trained.revise("1998-03-03", tokenizer, CHAT, noise=0.5, keep=["1998"], seed=0, watcher=trace, canvas_length=16)
    assert trace.canvases[0].alternatives.shape[-1] == 1


# Several watchers


class Overwrites(Watcher):
    """Puts one id everywhere into the argmax canvas."""

    def __init__(self, token):
        self.token = token

    def step(self, canvas_index, step, places, state, prediction):
        return state._replace(argmax=torch.full_like(state.argmax, self.token))


@pytest.mark.parametrize("form", [list, tuple])
def test_each_of_several_watchers_is_told_what_those_before_it_left(model, form):
    before, between, after = Trace(), Trace(), Trace()
    settings = {**SETTINGS, "seed": 0, "eos_token_id": []}
    ids = prompts(1, 9)[0]
    given = form([before, Overwrites(17), between, Overwrites(18), after])
    output = model.generate(ids, watcher=given, **settings)
    assert output.sequences[0, 9:].tolist() == [18] * 25
    assert all(bool((canvas.argmax == 17).all()) for canvas in between.row())
    assert all(bool((canvas.argmax == 18).all()) for canvas in after.row())
    assert not any(bool((canvas.argmax == 17).all()) for canvas in before.row())
    assert len(before.canvases) == len(between.canvases) == len(after.canvases) == 3 and before.finish_reasons == ["length"]


def test_no_watcher_at_all_may_be_a_list(model):
    settings = {**SETTINGS, "seed": 0}
    assert torch.equal(
        model.generate(prompts(1, 9)[0], watcher=[], **settings).sequences, model.generate(prompts(1, 9)[0], **settings).sequences
    )


def test_several_watchers_see_a_text_revised(trained, tokenizer):
    first, second = Trace(), Trace()
    trained.revise("1998-03-03", tokenizer, CHAT, noise=0.5, seed=0, watcher=[first, second])
    assert len(first.canvases) == len(second.canvases) > 0
    assert all(torch.equal(one.argmax, other.argmax) for one, other in zip(first.canvases, second.canvases, strict=True))


@pytest.mark.parametrize("wrong", ["twice", "a class", "another object", "no list"])
def test_what_is_no_list_of_watchers_is_refused(model, wrong):
    trace = Trace()
    given = {"twice": [trace, Trace(), trace], "a class": [trace, Trace], "another object": [trace, 3], "no list": {"watcher": trace}}[
        wrong
    ]
    with pytest.raises(ValueError, match=r"`watcher` is .*; expected a `generation.watch.watcher.Watcher`, or a list of them, each once"):
        model.generate(prompts(1, 9)[0], watcher=given, max_new_tokens=3)
    assert trace.canvases == []


# Numbers


def test_numbers_are_those_of_a_canvas_made_by_hand():
    trace = hand_made()
    (canvas,) = trace.row()
    assert trace.revisions().tolist() == [0, 2, 0, 0], "position 2 changed in the step that accepted it first, position 4 is not kept"
    assert trace.stood_at().tolist() == [0, 2, 2, 0] and canvas.wasted() == 1
    assert canvas.order() == 0.0 and rank_correlation(torch.tensor([0, 1, 5, 7])) == pytest.approx(1)
    assert rank_correlation(torch.tensor([3, 2, 1])) == pytest.approx(-1) and rank_correlation(torch.tensor([2, 2])) is None
    assert trace.summary() == {
        "tokens": 4, "steps": [4], "revisions": 2, "revised": 1, "order": [0.0], "wasted": [1], "seconds": 1.0,
    }  # fmt: skip


def test_ties_share_their_mean_rank():
    scipy = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    values = torch.tensor([0, 3, 0, 1, 3, 3, 2])
    assert rank_correlation(values) == pytest.approx(scipy.spearmanr(values, range(7)).statistic)


def test_row_that_keeps_nothing_has_numbers_too():
    trace = hand_made()
    (canvas,) = trace.row()
    nothing = canvas._replace(tokens=canvas.tokens[:0])
    assert nothing.wasted() == 4 and nothing.order() is None and nothing.revisions().tolist() == []


@pytest.mark.parametrize("row", [-1, 1])
def test_row_that_is_not_there_is_named(row):
    with pytest.raises(ValueError, match=f"`row` is {row}; expected 0 to 0"):
        hand_made().row(row)
    with pytest.raises(ValueError, match="the trace is empty"):
        Trace().summary()


# Files


def test_file_gives_back_the_trace(recorded, tmp_path):
    trace, path = recorded[0], tmp_path / "trace.safetensors"
    trace.save(path)
    loaded = Trace.load(path)
    assert loaded.finish_reasons == trace.finish_reasons and torch.equal(loaded.prompt, trace.prompt)
    for row in range(3):
        assert loaded.summary(row) == trace.summary(row)
    for before, after in zip(trace.canvases, loaded.canvases, strict=True):
        assert before.first_step == after.first_step
        for name in FIELDS:
            old, new = getattr(before, name), getattr(after, name)
            assert torch.equal(old, new) and old.dtype == new.dtype, name


def test_file_of_48_steps_of_256_positions_takes_under_100_kb(tmp_path):
    """Of a vocabulary of 262,144; every position is noise at every step, and half of the guesses change."""
    generator, shape = torch.Generator().manual_seed(0), (48, 1, 256)
    trace, noise = hand_made(), torch.randint(262_144, shape, generator=generator, dtype=torch.int32)
    changed = torch.rand(shape, generator=generator) < 0.35
    argmax = noise.clone()
    for step in range(1, 48):
        argmax[step] = torch.where(changed[step], noise[step - 1], argmax[step - 1])
    flags = torch.zeros(shape, dtype=torch.bool)
    trace.canvases = [
        CanvasTrace(
            0, torch.ones(48, 1, dtype=torch.bool), noise, argmax, flags, torch.rand(shape, generator=generator).half(), flags,
            torch.ones(48), torch.ones(48), argmax[-1], torch.tensor([256]),
        )
    ]  # fmt: skip
    trace.save(path := tmp_path / "trace.safetensors")
    assert path.stat().st_size < 100_000 and torch.equal(Trace.load(path).canvases[0].canvas, noise)


def test_other_files_are_refused_by_name(tmp_path):
    (tmp_path / "text").write_text("not a trace")
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    hand_made().save(whole := tmp_path / "whole.safetensors")
    with safe_open(whole, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(whole)
    save_file(tensors, tmp_path / "newer", metadata={**metadata, "version": "2"})
    save_file({name: value for name, value in tensors.items() if name != "0.entropy"}, tmp_path / "lacks", metadata=metadata)
    save_file({**tensors, "0.argmax_ids": tensors["0.argmax_ids"][:-1]}, tmp_path / "short", metadata=metadata)
    save_file({**tensors, "0.accepted": tensors["0.accepted"][:-1]}, tmp_path / "bits", metadata=metadata)
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:-1])
    reasons = {
        "text": "cannot be read", "weights.safetensors": "of something else", "newer": "a trace of version '2'", "lacks": "0.entropy",
        "short": "cannot be read", "bits": "2 bytes for 20 flags", "cut": "cannot be read",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=f"{name}'.*{reason}.*expected a trace of version 1"):
            Trace.load(tmp_path / name)


@pytest.mark.parametrize(
    ("tensors", "about", "told"),
    [({"lengths": [-3]}, {}, "keeps .-3"), ({"lengths": [500]}, {}, "keeps .500"), ({"lengths": []}, {}, "canvas 0 of 1 rows"),
     ({"seconds": []}, {}, "canvas 0 of 1 rows"), ({"tokens": [1]}, {}, "canvas 0 of 1 rows"), ({}, {"finish_reasons": "s"}, "reasons s"),
     ({}, {"finish_reasons": ["stop", "stop"]}, "canvas 0 of 2 rows|finish reasons"), ({}, None, "cannot be read")],
)  # fmt: skip
def test_file_whose_tensors_belong_to_no_one_call_is_refused(tensors, about, told, tmp_path):
    """It loaded, and a summary was wrong, or an IndexError later on."""
    hand_made().save(whole := tmp_path / "whole")
    with safe_open(whole, "pt") as file:
        metadata = file.metadata()
    metadata["about"] = "{" if about is None else json.dumps(json.loads(metadata["about"]) | about)
    read = load_file(whole)
    changed = {f"0.{name}": torch.tensor(value, dtype=read[f"0.{name}"].dtype) for name, value in tensors.items()}
    save_file(read | changed, tmp_path / "changed", metadata=metadata)
    with pytest.raises(ValueError, match=f"changed'.*{told}.*expected a trace of version 1"):
        Trace.load(tmp_path / "changed")


def test_flags_are_packed_and_rows_filled_in():
    flags = torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(unpack_bits(pack_bits(flags), (3, 7)), flags) and pack_bits(flags).shape == (3,)
    pieces = [(torch.tensor([0, 2]), torch.tensor([[1, 2], [3, 4]])), (torch.tensor([2]), torch.tensor([[5]]))]
    assert fill_forward(3, pieces).tolist() == [[1, 0, 2], [3, 0, 4], [3, 0, 5]]


# Pictures


def test_page_holds_every_step_as_text_that_is_escaped(answered, tokenizer):
    title = "@@DATA@@</title><script>alert('1')</script> & \"2\""
    page = trace_page(answered, tokenizer, title)
    assert (
        html.escape(title) in page
        and "alert('1')" not in page
        and not re.search(r"(?:src|href)=\"(?!data:,)|https?://|@import|url\(", page)
    )
    data = json.loads(re.search(r'<script id="trace" type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    assert page.count("@@DATA@@") == 2 and "@@TITLE@@" not in page, "in the title, as it was given"
    for shown, canvas in zip(data["canvases"], answered.row(), strict=True):
        assert [data["texts"][place] for place in shown["tokens"]] == [tokenizer.decode([token]) for token in canvas.tokens.tolist()]
        assert [step["states"].count("r") for step in shown["steps"]] == (~canvas.accepted).sum(dim=1).tolist()
        assert [step["forced"].count("1") for step in shown["steps"]] == canvas.forced.sum(dim=1).tolist()


def test_token_that_would_end_the_script_does_not(tokenizer):
    class Hostile:
        def decode(self, ids):
            return "</script><img src=x onerror=alert(1)>\u2028"

    page = trace_page(hand_made(), Hostile())
    assert "<img" not in page and page.count("</script>") == PAGE.count("</script>")


def test_page_says_what_an_accepted_token_was_before():
    class Ids:
        def decode(self, ids):
            return str(ids[0])

    page = trace_page(hand_made(), Ids())
    data = json.loads(re.search(r'json">(.*?)</script>', page, re.DOTALL)[1])
    assert [step["states"] for step in data["canvases"][0]["steps"]] == ["aarra", "acrrr", "arar" + "r", "acaac"]


DRIVE = """<script>
window.problems = [];
window.addEventListener("error", (event) => problems.push(event.message));
addEventListener("load", () => {
  const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
  const seen = [where.textContent];
  press("ArrowRight"); press("ArrowRight"); press("ArrowLeft"); seen.push(where.textContent, slider.value);
  text.lastElementChild.dispatchEvent(new PointerEvent("pointerover", {bubbles: true})); seen.push(about.textContent);
  press(" "); seen.push(play.textContent); press(" "); seen.push(play.textContent);
  go(frames.length - 1); seen.push(text.textContent);
  whole.click(); seen.push(text.textContent.length > seen.at(-1).length);
  document.documentElement.dataset.seen = JSON.stringify([...seen, problems]);
});
</script>"""


def test_page_plays_in_a_browser_without_an_error(answered, tokenizer, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    page = tmp_path / "page.html"
    page.write_text(trace_page(answered, tokenizer, "<b>title</b>").replace("</title>", "</title>" + DRIVE), encoding="utf-8")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', done.stdout)[1]))
    steps = len(answered.row()[0].steps)
    assert seen[0].startswith(f"canvas 1 of 2, step 1 of {steps} \u00b7") and f"step 2 of {steps}" in seen[1] and seen[2] == "1"
    assert re.match(r'position 7: ".*" since step \d.* nats', seen[3]) and seen[4:6] == ["Pause", "Play"]
    answer = tokenizer.decode([token for canvas in answered.row() for token in canvas.tokens.tolist()])
    assert re.match(r"\d{4}-\d\d-\d\d<turn", answer) and seen[6].startswith(answer) and seen[7] is True and seen[8] == []


def test_picture_is_a_png(answered, tokenizer, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r"modeling-diffusiongemma\[bench\]"):
            draw_trace(answered, tokenizer, tmp_path / "no.png")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.image import imread

    draw_trace(answered, tokenizer, tmp_path / "trace.png")
    height, width, _ = imread(tmp_path / "trace.png").shape
    assert height > 200 and width > 500
    nothing = hand_made()
    nothing.canvases[0].lengths.zero_()
    with pytest.raises(ValueError, match="`row` is 0, which keeps no token"):
        draw_trace(nothing, tokenizer, tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_pipeline_hands_a_trace_through(trained, tokenizer):
    ask, trace = pipeline("text-generation", model=trained, tokenizer=tokenizer), Trace()
    (answer,) = ask([{"role": "user", "content": CHAT}], watcher=trace, canvas_length=16, max_new_tokens=16, do_sample=False)
    (canvas,) = trace.row()
    assert answer["generated_text"][-1]["content"] == tokenizer.decode(canvas.tokens, skip_special_tokens=True)


# Console and example

NARROW = ["--set", "canvas_length=16", "--max-new-tokens", "16", "--seed", "0"]


def test_console_answers_and_writes_what_it_is_asked_for(console, answers, tmp_path):
    files = {name: tmp_path / f"out.{name}" for name in ("html", "save")}
    code, out, err = console("trace", CHAT, *NARROW, "--html", str(files["html"]), "--save", str(files["save"]))
    assert code == 0 and out.startswith("1998-03-03\n\n| measure | value |") and "| tokens of the answer | 11 |" in out, err
    assert html.escape(CHAT) in files["html"].read_text(encoding="utf-8")
    (row,) = answers("trace", CHAT, *NARROW, "--regex", r"\d{4}-\d\d-\d\d")
    assert row["text"] == "1998-03-03" and row["tokens"] == 11 and row["steps"] == [row["denoising_steps"]] and row["seed"] == 0
    saved = Trace.load(files["save"]).summary()
    assert saved["tokens"] == 11 and set(saved) <= set(row)


@pytest.mark.parametrize(
    "line, reason",
    [
        ("", "PROMPT"),
        ("hello --html {0}", "`--html` is '{0}'; expected a file in a folder that is there"),
        ("hello --html /proc/page.html", "`--html` is '/proc/page.html'; expected a file that can be written"),
        ("hello --png {0}/nowhere/a.png", "`--png` is '{0}/nowhere/a.png'"),
        ("hello --html {0}/a --save {0}/a", "`--html` and `--save` name one file"),
        ("hello --set num_return_sequences=2", "`num_return_sequences` is above 1"),
        ("hello --set decoding=autoregressive", "`decoding` is 'autoregressive', which has no denoising steps"),
        ("hello --regex a --set backend=reference", "the reference knows no constraint"),
    ],
)
def test_wrong_usage_is_named_and_exits_with_2(console, tmp_path, line, reason):
    code, out, err = console("trace", *line.format(tmp_path).split())
    assert code == 2 and out == "" and reason.format(tmp_path) in err and os.listdir(tmp_path) == []
