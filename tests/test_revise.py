"""`revise`: which positions become noise, what stays, where denoising begins, several canvases, and what is refused before any pass."""

import pytest
import torch

from generation import Choice, DiffusionGenerationConfig, Regex, Template, Trace
from generation.constraints.automaton import closed
from generation.constraints.compiled import compile_constraint
from generation.renoising import any_text, choose, hold, read_selection
from generation.rules.draws import row_draws
from generation.watch.watcher import Watcher

TEXT = '{"name": "Quinn", "quantity": 54}'
CHAT = [{"role": "user", "content": "To JSON: Order from Quinn: 54 mirrors."}]
SIZE = 640
NARROW = {"canvas_length": 63, "max_new_tokens": 63, "seed": 0}
SHORT = {"canvas_length": 9, "max_new_tokens": 63, "seed": 0, "max_denoising_steps": 4}


class Steps(Watcher):
    """Every step: its canvas, its number, the argmax and the canvas that it leaves."""

    def __init__(self):
        self.seen, self.starts, self.ends, self.kept = [], 0, 0, []

    def start(self, prompt):
        self.starts += 1

    def step(self, canvas_index, step, places, state, prediction):
        self.seen.append((canvas_index, step, state.argmax[0].tolist(), prediction.sample[0].tolist()))

    def commit(self, tokens, lengths, finish_reasons):
        self.kept.append((tokens[0, : int(lengths[0])].tolist(), finish_reasons[0]))

    def end(self):
        self.ends += 1


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def positions(tokenizer, text, keep=None, where="random", noise=None):
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return read_selection(text, encoded["offset_mapping"], len(encoded["input_ids"]), noise, keep, where)


def test_every_form_of_positions_means_the_same_tokens(tokenizer):
    ids = ids_of(tokenizer, TEXT)
    start = TEXT.index("Quinn")
    told = positions(tokenizer, TEXT, where=["Quinn"]).told
    places = told.nonzero().flatten().tolist()
    assert "Quinn" in tokenizer.decode([ids[place] for place in places]) and len(places) < len(ids) // 2
    for form in ([(start, start + 5)], places, told, told.tolist(), torch.tensor(places)):
        assert torch.equal(positions(tokenizer, TEXT, where=form).told, told)
        assert torch.equal(positions(tokenizer, TEXT, keep=form).kept, told)


def test_a_string_means_every_place_where_it_stands(tokenizer):
    text = "seven, seventy-seven"
    told = positions(tokenizer, text, where=["seven"]).told
    spans = [(0, 5), (7, 12), (15, 20)]
    assert torch.equal(told, positions(tokenizer, text, where=spans).told)


def test_the_share_is_of_what_is_not_kept_and_at_least_one_position():
    free = torch.arange(21) >= 5
    for noise, count in ((1e-9, 1), (0.25, 4), (0.5, 8), (1.0, 16)):
        chosen = choose(row_draws(7, None, 1, 1), free, noise, None)
        assert int(chosen.sum()) == count and not bool((chosen & ~free).any())


def test_the_least_likely_positions_are_chosen():
    log_probs = torch.tensor([-9.0, -1.0, -7.0, -0.5, -8.0])
    chosen = choose(row_draws(7, None, 1, 1), torch.tensor([False, True, True, True, True]), 0.5, log_probs)
    assert chosen.tolist() == [False, False, True, False, True]


def test_random_positions_hang_on_the_seed_alone(trained, tokenizer):
    found = [trained.revise(TEXT, tokenizer, CHAT, **{**NARROW, "seed": seed}, max_denoising_steps=2) for seed in (3, 3, 4)]
    assert torch.equal(found[0].renoised, found[1].renoised) and torch.equal(found[0].tokens, found[1].tokens)
    assert not torch.equal(found[0].renoised, found[2].renoised)


def test_uncertain_are_those_least_likely_in_a_pass_over_the_text(trained, tokenizer):
    """The judge is the model's own forward pass, with whole logits."""
    ids = ids_of(tokenizer, TEXT)
    revised = trained.revise(TEXT, tokenizer, CHAT, where="uncertain", noise=0.3, **NARROW)
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt")["input_ids"]
    canvas = torch.tensor([ids + [106] + [0] * (62 - len(ids))])
    with torch.no_grad():
        log_probs = trained(prompt, decoder_input_ids=canvas).logits.log_softmax(dim=-1)[0, torch.arange(len(ids)), torch.tensor(ids)]
    assert int(revised.renoised.sum()) == round(0.3 * len(ids))
    assert float(log_probs[revised.renoised].max()) <= float(log_probs[~revised.renoised].min()) + 1e-4


@pytest.mark.parametrize("own", [{"top_k": 1}, {"temperature": 0.01}, {"decoding": "autoregressive"}, {"backend": "reference"}], ids=str)
def test_what_is_uncertain_does_not_hang_on_the_models_settings(trained, tokenizer, monkeypatch, own):
    """The pass over the text was one of `generate`, with the model's filters and temperature, whatever the call said."""
    call = {"where": "uncertain", "noise": 0.3, "decoding": "diffusion", "backend": "auto", **SHORT}
    expected = trained.revise(TEXT, tokenizer, CHAT, **call).renoised
    monkeypatch.setattr(trained, "generation_config", DiffusionGenerationConfig(**{**trained.generation_config.to_dict(), **own}))
    assert torch.equal(trained.revise(TEXT, tokenizer, CHAT, **call).renoised, expected)


@pytest.mark.parametrize(("noise", "first"), [(1.0, 0), (0.5, 6), (1e-3, 11)])
def test_denoising_begins_at_the_step_of_its_noise_proportion(trained, tokenizer, noise, first):
    watcher, count = Steps(), len(ids_of(tokenizer, TEXT))
    trained.revise(TEXT, tokenizer, CHAT, noise=noise, watcher=watcher, max_denoising_steps=12, **NARROW)
    share = max(1, round(noise * count)) / count
    assert watcher.seen[0][1] == min(round((1 - share) * 12), 11) == pytest.approx(first, abs=1)


def test_kept_tokens_stand_at_every_step_in_argmax_and_sample(trained, tokenizer):
    wrong, watcher = TEXT.replace("Quinn", "Zelda"), Steps()
    revised = trained.revise(wrong, tokenizer, CHAT, noise=1.0, keep=["Zelda"], watcher=watcher, **NARROW)
    ids, kept = ids_of(tokenizer, wrong), positions(tokenizer, wrong, keep=["Zelda"]).kept.nonzero().flatten().tolist()
    assert watcher.seen
    for _, _, argmax, sample in watcher.seen:
        assert [argmax[place] for place in kept] == [sample[place] for place in kept] == [ids[place] for place in kept]
    assert not bool((revised.renoised | revised.changed)[kept].any())
    assert int(revised.renoised.sum()) == len(ids) - len(kept)


def test_others_kept_changes_what_became_noise_alone_and_no_length(trained, tokenizer):
    for settings in ({"noise": 0.4}, {"where": ["54"]}, {"where": "uncertain", "noise": 0.2}):
        revised = trained.revise(TEXT, tokenizer, CHAT, keep="others", **settings, **NARROW)
        assert len(revised.tokens) == len(ids_of(tokenizer, TEXT))
        assert not bool((revised.changed & ~revised.renoised).any())


def test_what_changed_is_told_of_the_given_text(trained, tokenizer):
    revised = trained.revise(TEXT, tokenizer, CHAT, noise=1.0, **NARROW)
    before, after = ids_of(tokenizer, TEXT), revised.tokens.tolist()
    assert revised.text == tokenizer.decode(after) and revised.changed.dtype == revised.renoised.dtype == torch.bool
    assert revised.changed.tolist() == [place >= len(after) or after[place] != token for place, token in enumerate(before)]


def test_a_constraint_holds_together_with_what_is_kept(trained, tokenizer):
    wrong = TEXT.replace("54", "61")
    language = Regex(r'\{"name": "[A-Z][a-z]*", "quantity": \d\d\}')
    for keep in (["61"], "others", None):
        revised = trained.revise(wrong, tokenizer, CHAT, noise=0.5, keep=keep, constraint=language, **NARROW)
        assert compile_constraint(language, tokenizer, SIZE).accepts(revised.tokens.tolist())
        assert keep != ["61"] or revised.text.endswith("61}")


def test_a_text_outside_of_the_constraint_becomes_one_inside(trained, tokenizer):
    revised = trained.revise(TEXT, tokenizer, CHAT, constraint=Choice(["yes", "no"]), **NARROW)
    assert revised.text in ("yes", "no") and bool(revised.changed[len(revised.tokens) :].all())


@pytest.mark.parametrize("keep", [None, ["54"], "others"])
def test_several_canvases_each_behind_those_before(trained, tokenizer, keep):
    watcher, ids = Steps(), ids_of(tokenizer, TEXT)
    revised = trained.revise(TEXT, tokenizer, CHAT, noise=0.5, keep=keep, watcher=watcher, **SHORT)
    count = -(-(len(ids) + 1) // 9)
    assert len(revised.steps) == count and watcher.starts == watcher.ends == 1
    assert sorted({seen[0] for seen in watcher.seen}) == [place for place, steps in enumerate(revised.steps) if steps]
    if all(revised.steps):
        assert [reason for _, reason in watcher.kept[: count - 1]] == [None] * (count - 1) and watcher.kept[-1][1] is not None
        written = [token for tokens, _ in watcher.kept for token in tokens]
        assert written[: len(revised.tokens)] == revised.tokens.tolist()
    assert len(revised.tokens) >= 9 * (count - 1)  # no canvas but the last ends the text
    if keep == "others":
        assert not bool((revised.changed & ~revised.renoised).any()) and len(revised.tokens) == len(ids)


def test_each_canvas_has_other_random_numbers(trained, tokenizer):
    """Noise of one seed for each canvas would be the same everywhere."""
    text, firsts = "seven " * 11 + "seven", []

    def note(model, step, noise_proportion, state):
        firsts.append((state["canvas_index"], state["canvas"][0].tolist()))

    trained.revise(text, tokenizer, noise=1.0, callback_on_step_end=note, **{**SHORT, "max_denoising_steps": 1})
    assert [index for index, _ in firsts[:2]] == [0, 1] and firsts[0][1] != firsts[1][1]


def test_a_canvas_without_noise_is_left_alone(trained, tokenizer):
    ids = ids_of(tokenizer, TEXT)
    put = []

    class Streamer:
        def put(self, value):
            put.append(value.flatten().tolist())

        def end(self):
            put.append("end")

    revised = trained.revise(TEXT, tokenizer, CHAT, where=[len(ids) - 1], streamer=Streamer(), **SHORT)
    place = (len(ids) - 1) // 9
    assert [steps == 0 for steps in revised.steps] == [index != place for index in range(len(revised.steps))]
    assert not bool(revised.changed[: 9 * place].any())
    assert len(put[0]) > 9 and put[1 : 1 + place] == [ids[start : start + 9] for start in range(0, 9 * place, 9)]
    assert put[-1] == "end" and put.count("end") == 1


def test_several_canvases_are_one_call(trained, tokenizer, monkeypatch):
    """There was a call for each canvas: the prompt was read again for every one, and what sees a call saw several."""
    read, prefill, watcher = [], trained.prefill, Steps()

    def counted(*args, **given):
        read.append(given["input_ids"].shape[1])
        return prefill(*args, **given)

    monkeypatch.setattr(trained, "prefill", counted)
    revised = trained.revise(TEXT, tokenizer, CHAT, where=["54"], keep="others", watcher=watcher, cache_implementation="static", **SHORT)
    assert read[0] > 9 and set(read[1:]) == {9} and len(read) == len(revised.steps)
    assert [token for tokens, _ in watcher.kept for token in tokens][: len(revised.tokens)] == revised.tokens.tolist()


def test_a_canvas_without_noise_that_the_constraint_refuses_is_denoised(trained, tokenizer):
    ids = ids_of(tokenizer, TEXT)
    language = Regex(r'\{"name": "Zelda[a-z]*", "quantity": \d+\}')
    revised = trained.revise(TEXT, tokenizer, CHAT, where=[len(ids) - 1], constraint=language, **SHORT)
    assert revised.steps[0] > 0 and compile_constraint(language, tokenizer, SIZE).accepts(revised.tokens.tolist())


def test_a_trace_holds_all_canvases(trained, tokenizer):
    trace = Trace()
    revised = trained.revise(TEXT, tokenizer, CHAT, noise=1.0, watcher=trace, **SHORT)
    row = trace.row()
    counts = [len(canvas.steps) for canvas in row]
    last = len(revised.steps) - 1
    assert [*counts[:last], sum(counts[last:])] == list(revised.steps)
    assert torch.cat([canvas.tokens for canvas in row])[: len(revised.tokens)].tolist() == revised.tokens.tolist()
    assert trace.prompt[0].tolist() == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]


def test_a_text_that_fills_what_is_allowed_has_no_end(trained, tokenizer):
    ids = ids_of(tokenizer, TEXT)
    settings = {"canvas_length": 9, "max_new_tokens": len(ids), "seed": 0}
    revised = trained.revise(TEXT, tokenizer, CHAT, noise=0.2, keep="others", **settings)
    assert len(revised.steps) == -(-len(ids) // 9) and len(revised.tokens) == len(ids)


def test_the_model_and_its_config_stay_as_they_are(trained, tokenizer):
    before, state = trained.generation_config.to_dict(), torch.get_rng_state()
    trained.revise(TEXT, tokenizer, CHAT, where="uncertain", **NARROW)
    assert trained.generation_config.to_dict() == before and torch.equal(torch.get_rng_state(), state)


def test_mask_noise_and_greedy_revise_alike_each_time(trained, tokenizer):
    settings = {"canvas_length": 63, "max_new_tokens": 63, "do_sample": False}
    first, second = (trained.revise(TEXT, tokenizer, CHAT, noise=0.5, **settings) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens) and torch.equal(first.renoised, second.renoised)
    masked = {"generation_config": {"noise": "mask", "mask_token_id": 4}}
    assert trained.revise(TEXT, tokenizer, CHAT, noise=0.5, where="uncertain", **masked, **NARROW).steps[0] > 0


def test_kept_ids_and_any_text_are_an_automaton_of_their_texts(tokenizer):
    ids = torch.tensor(ids_of(tokenizer, "one two three"))
    kept = torch.zeros(len(ids), dtype=torch.bool)
    kept[2] = True
    free = any_text(tokenizer, SIZE)
    open_end, exact = hold(free, ids, kept, False), hold(free, ids, kept, True)
    text, other = ids.tolist(), int(ids[0])
    changed = [other, other, text[2], *text[3:]]
    longer, missing = [*changed, other, other], [*text[:2], other, *text[3:]]
    assert other != text[2]
    assert [open_end.accepts(one) for one in (text, changed, longer, missing, text[:3], text[:2])] == [True, True, True, False, True, False]
    assert [exact.accepts(one) for one in (text, changed, longer, missing, text[:-1])] == [True, True, False, False, False]
    assert closed(exact, [1], 0).accepts([*text, 1, 0, 0])


WRONG = {
    "a text of another kind": ({"text": 7}, "`text` is 7"),
    "an empty text": ({"text": ""}, "`text` is ''"),
    "a special token": ({"text": "a <turn|> b"}, "`text` is 'a <turn|> b', which the tokens"),
    "a text that is too long": ({"max_new_tokens": 5}, "`text` has .* expected at most 5"),
    "a text with an end in it": ({"eos_token_id": [1, 205]}, r"`text` holds the ids \[205\], which end a text"),
    "no noise": ({"noise": 0}, "`noise` is 0; expected a share above 0"),
    "too much noise": ({"noise": 1.1}, "`noise` is 1.1"),
    "noise by name": ({"noise": "mask"}, "`noise` is 'mask'"),
    "NaN": ({"noise": float("nan")}, "`noise` is nan"),
    "True": ({"noise": True}, "`noise` is True"),
    "noise and positions": ({"noise": 0.5, "where": [1]}, "`noise` is 0.5, and `where` says"),
    "another where": ({"where": "Quinn"}, "`where` is 'Quinn'; expected 'random'"),
    "no position": ({"where": []}, "`where` holds no position"),
    "a position outside": ({"where": [400]}, r"`where` holds the positions \[400\]"),
    "a negative position": ({"keep": [-1]}, r"`keep` holds the positions \[-1\]"),
    "characters outside": ({"where": [(0, 999)]}, r"`where` holds \[\(0, 999\)\]"),
    "no characters": ({"where": [(3, 3)]}, r"`where` holds \[\(3, 3\)\]"),
    "a string that is not there": ({"keep": ["Anna"]}, r"`keep` holds \['Anna'\]"),
    "a string that is empty": ({"keep": [""]}, r"`keep` holds \[''\]"),
    "bools of another length": ({"where": torch.ones(3, dtype=torch.bool)}, "`where` has 3 bools"),
    "positions of several kinds": ({"where": [1, "Quinn"]}, "`where` is"),
    "numbers": ({"where": [0.5]}, "`where` is"),
    "floats in a tensor": ({"where": torch.ones(3)}, "`where` is Tensor"),
    "one string to keep": ({"keep": "Quinn"}, r"`keep` is 'Quinn'; expected 'others', or a list .* \['Quinn'\]"),
    "everything is kept": ({"keep": [TEXT]}, "`keep` covers all"),
    "kept and renoised": ({"keep": ["Quinn"], "where": ["nn"]}, "`keep` and `where` both hold"),
    "kept against the constraint": ({"keep": ["Quinn"], "constraint": Choice(["yes"])}, "`keep` holds tokens with which"),
    "others of another length": ({"keep": "others", "constraint": Choice(["yes"]), "where": [0]}, "`keep` holds tokens with which"),
    "a constraint of another kind": ({"constraint": "yes"}, "`constraint` is"),
    "a first canvas": ({"decoder_input_ids": torch.ones(1, 9, dtype=torch.int64)}, "`decoder_input_ids` is given to `revise`"),
    "a step": ({"first_step": 3}, "`first_step` is given to `revise`"),
    "several answers": ({"num_return_sequences": 2}, "`num_return_sequences` is 2"),
    "time": ({"max_time": 1.0}, "`max_time` is 1.0"),
    "stop strings": ({"stop_strings": ["a"]}, "`stop_strings` is"),
    "one token at a time": ({"decoding": "autoregressive"}, "`decoding` is 'autoregressive'"),
    "the reference": ({"backend": "reference"}, "`backend` is 'reference'"),
    "an unknown argument": ({"colour": 1}, "unknown arguments `colour`"),
    "no end": ({"eos_token_id": []}, r"`eos_token_id` is \[\]; expected at least one id"),
    "a watcher of another kind": ({"watcher": 3}, "`watcher` is 3"),
    "a seed and a generator": ({"seed": 1, "generator": torch.Generator()}, "`seed` and `generator` are both given"),
    "two seeds": ({"seed": [1, 2]}, "`seed` is"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_is_said_before_any_pass(trained, tokenizer, monkeypatch, fault):
    given, message = WRONG[fault]
    monkeypatch.setattr(trained, "prefill", None)
    with pytest.raises(ValueError, match=message):
        trained.revise(**{"text": TEXT, "tokenizer": tokenizer, "prompt": CHAT, **given})


def test_a_template_keeps_its_text_and_gives_its_values(trained, tokenizer):
    template = Template('{{"name": "{name:1-8}", "quantity": {quantity}}}', quantity=Regex(r"\d+"))
    revised = trained.revise(TEXT, tokenizer, CHAT, noise=0.8, constraint=template, **NARROW)
    assert int(template.values(revised.text)["quantity"]) >= 0
