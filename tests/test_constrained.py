"""`generate(constraint=)` with a language: what is written is always a text of it, whatever the model, the settings and the batch.

The judges are `re` and `json`. Languages, compilation and the exact step have tests of their own (tests/test_constraint_*.py).
"""

import json
import random
import re

import pytest
import torch
from small_models import small_model
from transformers import DynamicCache, pipeline

from generation import Automaton, Choice, JsonSchema, Pins, Regex, Template, Watcher, stream_text

ENDS, PAD = [1, 106, 50], 0
SETTINGS = {"generation_config": {"max_denoising_steps": 3}, "eos_token_id": ENDS, "pad_token_id": PAD}
DATE = r"(19|20)\d\d-(0[1-9]|1[0-2])-([0-2]\d|3[01])"
NOTE = {
    "type": "object", "additionalProperties": False, "required": ["name", "quantity"],
    "properties": {"name": {"type": "string", "maxLength": 12}, "quantity": {"type": "integer"}, "due": {"enum": ["today", None]}},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random, with the ids of the shipped tokenizer and three more that it has not; a canvas of 10."""
    return small_model(vocab_size=len(tokenizer) + 3)


def prompts(rows, length=7, seed=0):
    return torch.randint(200, 500, (rows, length), generator=torch.Generator().manual_seed(seed))


def new_ids(sequences, ids):
    return [row[ids.shape[1] :].tolist() for row in sequences]


def text_of(tokenizer, row):
    """What stands before the first end, after which there is only padding."""
    end = next((place for place, token in enumerate(row) if token in ENDS), len(row))
    assert all(token == PAD for token in row[end + 1 :])
    return tokenizer.decode(row[:end], skip_special_tokens=False)


def write(model, tokenizer, constraint, rows=1, **settings):
    ids = prompts(rows)
    found = model.generate(ids, constraint=constraint, tokenizer=tokenizer, **{**SETTINGS, "max_new_tokens": 40, **settings})
    return [text_of(tokenizer, row) for row in new_ids(found, ids)]


def ask(tokenizer, content):
    chat = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]


def random_language(source):
    """A language and its judge."""
    kind = source.randrange(5)
    if kind == 0:
        pattern = source.choice(
            [DATE, r"[a-f]{2,6}(, [a-f]{2,6})*", r"(yes|no|maybe)( \w+)?\.", r"\d{1,3}(\.\d+)? (kg|g|mg)", r"é+ß?[^\d\s]x*"]
        )
        return Regex(pattern), lambda text: re.fullmatch(pattern, text)
    if kind == 1:
        options = source.sample(
            ["yes", "no", "3 March 1998", "one hundred and one", '"quoted"', "ä", "a longer text of several tokens."], 3
        )
        return Choice(options), options.__contains__
    if kind == 2:
        return JsonSchema(NOTE), fits_note
    if kind == 3:
        least, most = sorted(source.sample(range(1, 7), 2))
        template = Template(f"Dear {{name:{least}-{most}}}, on {{day}}: {{what}}", day=Regex(DATE), what=Choice(["pay", "wait"]))
        return template, lambda text: re.fullmatch(rf"(?s)Dear .+, on {DATE}: (pay|wait)", text)
    return Template("a {one:2} b {two} c"), lambda text: re.fullmatch(r"(?s)a .+ b .+ c", text)


def fits_note(text):
    found = json.loads(text)
    assert list(found) == [name for name in NOTE["properties"] if name in found]
    assert isinstance(found["name"], str) and len(found["name"]) <= 12 and type(found["quantity"]) is int
    return found.get("due", None) in ("today", None)


@pytest.mark.parametrize("seed", range(6))
def test_what_a_random_model_writes_fits(model, tokenizer, seed):
    """Over canvases of 10 tokens, of a length that ends inside one, with the settings of a row that differ from call to call."""
    source = random.Random(seed)
    for _ in range(4):
        languages = [random_language(source) for _ in range(3)]
        settings = {"do_sample": source.random() < 0.7, "temperature": source.choice([0.3, 1.0, 3.0])}
        settings |= {"max_new_tokens": source.choice([64, 77]), "max_denoising_steps": source.choice([1, 2, 5])}
        settings |= {"seed": [source.randrange(1000) for _ in range(3)]} if settings["do_sample"] else {}
        found = write(model, tokenizer, [language for language, _ in languages], 3, **settings)
        for text, (language, judge) in zip(found, languages, strict=True):
            assert judge(text), (language, text)


def test_rows_without_a_constraint_are_as_ever(model, tokenizer):
    ids, seeds = prompts(3), [5, 6, 7]
    settings = {**SETTINGS, "max_new_tokens": 25, "seed": seeds}
    free = new_ids(model.generate(ids, **settings), ids)
    mixed = new_ids(model.generate(ids, constraint=[None, Regex(DATE), None], tokenizer=tokenizer, **settings), ids)
    width = max(len(row) for row in free)
    assert [row + [PAD] * (width - len(row)) for row in mixed][::2] == [row[:width] for row in free][::2]
    assert re.fullmatch(DATE, text_of(tokenizer, mixed[1]))


def test_a_row_depends_on_its_seed_and_not_on_its_neighbours(trained, tokenizer):
    ids = ask(tokenizer, "Write 3 March 1998 as an ISO date.").expand(3, -1)
    languages = [Regex(r"\d{4}-\d\d-\d\d"), Choice(["first", "second", "third"]), JsonSchema(NOTE)]
    settings = {**SETTINGS, "max_new_tokens": 64, "canvas_length": 64, "temperature": 1.5}
    together = new_ids(trained.generate(ids, constraint=languages, tokenizer=tokenizer, seed=[1, 2, 3], **settings), ids)
    for row, language in enumerate(languages):
        (alone,) = new_ids(trained.generate(ids[:1], constraint=language, tokenizer=tokenizer, seed=row + 1, **settings), ids)
        assert text_of(tokenizer, together[row]) == text_of(tokenizer, alone)


def test_one_constraint_counts_for_every_row_and_copy(model, tokenizer):
    texts = write(model, tokenizer, Choice(["left", "right"]), 2, num_return_sequences=3, seed=4)
    assert len(texts) == 6 and set(texts) <= {"left", "right"}


@pytest.mark.parametrize("schemas", [
    [{"properties": {name: {"const": 1} for name in order}, "required": ["a", "b"]} for order in ("ab", "ba")],
    [{"const": 1}, {"const": True}],
], ids=["order", "kind"])  # fmt: skip
def test_schemas_that_are_equal_to_python_alone_stay_apart(model, tokenizer, schemas):
    """Every row was written by the first of them."""
    first, second = schemas
    assert first == second and JsonSchema(first) != JsonSchema(second)
    assert JsonSchema(first) == JsonSchema(json.dumps(first)) and hash(JsonSchema(first)) == hash(JsonSchema(json.dumps(first)))
    texts = write(model, tokenizer, [JsonSchema(schema, "spaced") for schema in schemas], 2, seed=0)
    assert texts == [json.dumps(schema.get("const", dict.fromkeys(schema.get("properties", ()), 1))) for schema in schemas]


def test_an_automaton_is_taken_as_it_is(model, tokenizer):
    from generation.constraints.compiled import compile_constraint

    automaton = compile_constraint(Choice(["yes", "no"]), tokenizer, model.config.text_config.vocab_size)
    assert isinstance(automaton, Automaton)
    ids = prompts(1)
    (row,) = new_ids(model.generate(ids, constraint=automaton, max_new_tokens=20, **SETTINGS), ids)
    assert text_of(tokenizer, row) in ("yes", "no")


def test_the_text_ends_where_no_more_tokens_are_left(model, tokenizer):
    """Ten digits, and as many tokens: no end fits behind them, and it is whole all the same."""
    for seed in range(4):
        ids = prompts(1)
        found = model.generate(
            ids,
            constraint=Regex("([0-9]{5})*"),
            tokenizer=tokenizer,
            max_new_tokens=10,
            seed=seed,
            return_dict_in_generate=True,
            **SETTINGS,
        )
        text = text_of(tokenizer, found.sequences[0, ids.shape[1] :].tolist())
        assert re.fullmatch("([0-9]{5})*", text)
        assert found.finish_reasons == ["length" if len(text) == 10 else "stop"]


def test_pinned_positions_hold_their_ids(model, tokenizer):
    ids = torch.randint(200, 500, (23,), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(23, dtype=torch.bool)
    mask[[0, 3, 4, 9, 10, 22]] = True
    prompt = prompts(1)
    (row,) = new_ids(model.generate(prompt, constraint=Pins(ids, mask), tokenizer=tokenizer, max_new_tokens=40, seed=3, **SETTINGS), prompt)
    assert len(row) == 24 and row[23] in ENDS
    assert [row[place] for place in mask.nonzero().flatten()] == ids[mask].tolist()


@pytest.mark.parametrize("decoding", ["diffusion", "autoregressive", "verified"])
def test_every_way_of_decoding_obeys(model, tokenizer, decoding):
    for language, judge in ((Regex(DATE), lambda text: re.fullmatch(DATE, text)), (JsonSchema(NOTE), fits_note)):
        (text,) = write(model, tokenizer, language, decoding=decoding, do_sample=False, max_new_tokens=70)
        assert judge(text)


def test_verified_drafts_give_the_text_of_greedy_autoregression(trained, tokenizer):
    ids = ask(tokenizer, "Write 3 March 1998 as an ISO date.")
    found = [
        trained.generate(ids, constraint=Regex(r"(19|20)\d\d/\d\d?/\d\d?"), tokenizer=tokenizer, max_new_tokens=30,
                         generation_config={"canvas_length": 32}, do_sample=False, decoding=decoding)
        for decoding in ("autoregressive", "verified")
    ]  # fmt: skip
    assert torch.equal(*found)


def test_a_canvas_that_is_valid_anyway_stays_as_it_is(trained, tokenizer):
    for question, language in (
        ("Write 3 March 1998 as an ISO date.", Regex(DATE)), ("What is 0.1 g in kg?", Regex(r"[\d.]+ kg")),
        ("Write 4012 in words.", Regex(r"[a-z -]+")),
    ):  # fmt: skip
        ids = ask(tokenizer, question)
        settings = {"max_new_tokens": 64, "canvas_length": 64, "do_sample": False}
        (free,), (bound,) = (
            new_ids(trained.generate(ids, **settings, **given), ids) for given in ({}, {"constraint": language, "tokenizer": tokenizer})
        )
        assert re.fullmatch(language.pattern, text_of(tokenizer, free)), question
        assert text_of(tokenizer, bound) == text_of(tokenizer, free)


@pytest.mark.parametrize("settings", [
    {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}, {"typical_p": 0.5}, {"repetition_penalty": 1.3}, {"sampler": "predictor_corrector"},
    {"sampler": "confidence"}, {"cache_implementation": "static"}, {"noise": "mask", "mask_token_id": 4}, {"suppress_tokens": [300, 301]},
    {"min_new_tokens": 5}, {"stop_strings": ["zzz"]}, {"t_min": 0.01, "t_max": 0.01},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("whole_logits", [False, True], ids=["in pieces", "whole logits"])
def test_it_goes_together_with(model, tokenizer, settings, whole_logits):
    settings = settings | ({"output_logits": True, "return_dict_in_generate": True} if whole_logits else {})
    ids = prompts(2)
    found = model.generate(ids, constraint=Regex(DATE), tokenizer=tokenizer, max_new_tokens=32, seed=[1, 2], **{**SETTINGS, **settings})
    for row in new_ids(found.sequences if whole_logits else found, ids):
        assert re.fullmatch(DATE, text_of(tokenizer, row))


def test_both_ways_of_predicting_write_the_same(trained, tokenizer):
    ids = ask(tokenizer, "To JSON: 12 lamps for Ida, due 4 May 2026.")
    settings = {"max_new_tokens": 64, "canvas_length": 64, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    pieces, whole = (
        trained.generate(ids, constraint=JsonSchema(NOTE), tokenizer=tokenizer, **settings, **given)
        for given in ({}, {"output_logits": True})
    )
    assert torch.equal(pieces.sequences, whole.sequences)
    for one, other in zip(pieces.scores, whole.scores, strict=True):
        assert torch.allclose(one.float(), other.float(), atol=1e-3)


def test_a_cache_of_an_earlier_turn_goes_on(model, tokenizer):
    cache, ids = DynamicCache(config=model.config.get_text_config()), prompts(1)
    first = model.generate(ids, cache=cache, max_new_tokens=10, seed=1, **{**SETTINGS, "eos_token_id": []})
    seen = int(cache.get_seq_length())
    given = torch.cat((first[:, seen:], prompts(1, 3, seed=2)), dim=1)
    found = model.generate(given, cache=cache, constraint=Regex(DATE), tokenizer=tokenizer, max_new_tokens=20, seed=1, **SETTINGS)
    assert re.fullmatch(DATE, text_of(tokenizer, new_ids(found, given)[0]))


def test_streamed_text_is_the_text(model, tokenizer):
    ids = prompts(1)
    settings = {**SETTINGS, "max_new_tokens": 64, "seed": 2, "constraint": JsonSchema(NOTE)}
    (row,) = new_ids(model.generate(ids, tokenizer=tokenizer, **settings), ids)
    assert "".join(stream_text(model, tokenizer, ids, **settings)) == text_of(tokenizer, row)


def test_entropy_is_that_of_the_constrained_canvas(model, tokenizer):
    """Behind the end there is padding alone, and a pinned token is sure."""
    seen = []

    class Look(Watcher):
        def step(self, canvas_index, step, places, state, prediction):
            seen.append(prediction)
            return state

    model.generate(prompts(1), constraint=Choice(["yes"]), tokenizer=tokenizer, watcher=Look(), max_new_tokens=10, seed=0, **SETTINGS)
    length = len("yes")  # in bytes, the most tokens that it can be written with
    for prediction in seen:
        assert float(prediction.entropy[0, length + 1 :].abs().max()) < 1e-6
        assert bool((prediction.argmax[0, length + 1 :] == PAD).all()) and bool((prediction.sample[0, length + 1 :] == PAD).all())


def test_a_pipeline_takes_a_constraint(trained, tokenizer):
    generator = pipeline("text-generation", model=trained, tokenizer=tokenizer)
    chat = [{"role": "user", "content": "Write 3 March 1998 as an ISO date."}]
    (answer,) = generator(chat, constraint=Regex(r"\d{4}-\d\d-\d\d"), tokenizer=tokenizer, max_new_tokens=64, return_full_text=False)
    assert answer["generated_text"] == "1998-03-03"
    with pytest.raises(ValueError, match="`tokenizer` is None; .*a pipeline is given it in its call"):
        generator(chat, constraint=Regex("a"), max_new_tokens=64)


def test_fill_gives_text_and_values(trained, tokenizer):
    chat = [{"role": "user", "content": "Write 3 March 1998 as an ISO date."}]
    found = trained.fill("{year}-{month:1-2}-03", tokenizer, chat, max_new_tokens=64, canvas_length=64, seed=0)
    assert found.text == "1998-03-03" and found.values == {"year": "1998", "month": "03"}
    assert tokenizer.decode(found.tokens.tolist(), skip_special_tokens=True) == found.text
    assert re.fullmatch(r"(?s).+ and .+", trained.fill("{a:1-3} and {b:1-3}", tokenizer, seed=0, max_denoising_steps=2).text)
    with pytest.raises(ValueError, match="`num_return_sequences` .* is 2; expected 1"):
        trained.fill("{a:1}", tokenizer, seed=0, generation_config={"num_return_sequences": 2})


WRONG = {
    "a string": ({"constraint": "yes"}, "`constraint` is 'yes'"),
    "a mapping": ({"constraint": NOTE}, "`constraint` is"),
    "too many": ({"constraint": [Choice(["a"]), Choice(["b"])]}, "`constraint` has 2 entries; expected 1"),
    "a list of something": ({"constraint": ["yes"]}, "`constraint` is 'yes'"),
    "no tokenizer": ({"constraint": Choice(["a"]), "tokenizer": None}, "`tokenizer` is None"),
    "too long": ({"constraint": Regex("[a-z ]{400}"), "max_new_tokens": 9}, "`max_new_tokens` leaves 9 tokens; expected at least"),
    "no end": ({"constraint": Choice(["a"]), "eos_token_id": []}, "`eos_token_id` holds no id"),
    "reference": ({"constraint": Choice(["a"]), "backend": "reference"}, "`backend` is 'reference'"),
    "a pinned end": ({"constraint": Pins(torch.tensor([106]), torch.tensor([True]))}, "demands the ids"),
    "a pinned id of no vocabulary": ({"constraint": Pins(torch.tensor([10**6]), torch.tensor([True]))}, "`ids` pins 1000000"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_before_anything_is_computed(model, tokenizer, name, monkeypatch):
    given, message = WRONG[name]
    monkeypatch.setattr(type(model), "prefill", lambda *_, **__: pytest.fail("a prompt was computed"))
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(prompts(1), **{**SETTINGS, "max_new_tokens": 20, "tokenizer": tokenizer, **given})


def test_bans_that_leave_no_text_are_named(model, tokenizer):
    (token,) = tokenizer("yes").input_ids[:1]
    with pytest.raises(ValueError, match="`constraint` accepts"):
        write(model, tokenizer, Choice(["yes"]), suppress_tokens=[token, *range(384)])


def test_a_callback_that_breaks_the_text_is_named(model, tokenizer):
    def wreck(model, step, noise_proportion, state):
        return {"argmax": torch.full_like(state["argmax"], 300)}

    for language in (Regex(r"[ab]{30,}"), Regex("[ab]{3}")):  # over canvases, and in the last one
        with pytest.raises(ValueError, match="does not accept the tokens"):
            write(model, tokenizer, language, callback_on_step_end=wreck)
