"""`model.decide`: what it says of questions on a tiny random model, of what that depends and of what it does not, and what is refused."""

import pytest
import torch
from small_models import small_model
from transformers import StaticCache

from generation import Calibration, Choice, Decisions
from generation.call.caches import dynamic_cache

PROMPT = "To JSON: Order from Quinn."
CHAT = [{"role": "user", "content": "Is it red?"}]
THREE = {"refund": Choice(["Y", "N"]), "tone": Choice(["A", "B", "C"]), "stars": Choice(["1", "2"])}


@pytest.fixture(scope="module")
def model(tokenizer):
    made = small_model(canvas_length=48, vocab_size=len(tokenizer))
    made.generation_config.update(eos_token_id=[1, 106], pad_token_id=0)
    return made


def scores(decisions):
    return torch.cat([answer.scores.flatten() for answer in decisions.values()])


def test_every_question_has_a_probability_of_each_option(model, tokenizer):
    found = model.decide(CHAT, THREE, tokenizer, reads=3)
    assert isinstance(found, Decisions) and list(found) == list(THREE) and (found.reads, found.canvases, found.passes) == (3, 1, 3)
    for name, answer in found.items():
        assert tuple(answer.probabilities) == THREE[name].options == tuple(answer.errors)
        assert sum(answer.probabilities.values()) == pytest.approx(1) and 0 < answer.mass < 1
        assert answer.best in THREE[name].options and answer.scores.shape == (3, len(THREE[name].options))
        expected = answer.scores.softmax(dim=1)
        assert list(answer.probabilities.values()) == pytest.approx(expected.mean(dim=0).tolist())
        assert list(answer.errors.values()) == pytest.approx((expected.std(dim=0) / 3**0.5).tolist())
    assert found.best == {name: answer.best for name, answer in found.items()}
    assert str(found).count("\n") == 1 + sum(len(choice.options) for choice in THREE.values())


def test_one_read_has_no_standard_error(model, tokenizer):
    assert model.decide(PROMPT, THREE, tokenizer, reads=1)["tone"].errors is None


def test_reads_depend_on_their_seed_and_place_alone(model, tokenizer):
    """Four reads begin with the two of a call of two; sums in a batch of another size may round otherwise."""
    two, four = (model.decide(PROMPT, THREE, tokenizer, reads=reads, seed=7) for reads in (2, 4))
    for name in THREE:
        torch.testing.assert_close(four[name].scores[:2], two[name].scores, atol=1e-4, rtol=0)
    assert torch.equal(scores(model.decide(PROMPT, THREE, tokenizer, reads=2, seed=7)), scores(two))
    assert not torch.allclose(scores(model.decide(PROMPT, THREE, tokenizer, reads=2, seed=8)), scores(two), atol=1e-3)


def test_scores_are_those_of_a_canvas_pass_by_hand(model, tokenizer):
    """Pinned ids stand as they are, noise where options stand, and of one token an option's score is its log-probability."""
    seen = []
    denoise = model.denoise
    model.denoise = lambda canvas, **kwargs: seen.append(canvas) or denoise(canvas, **kwargs)
    try:
        found = model.decide(PROMPT, {"tone": Choice(["A", "B", "C"])}, tokenizer, reads=2)
    finally:
        del model.denoise
    (canvases,) = seen
    written = [*tokenizer('{"tone": "A"}', add_special_tokens=False)["input_ids"], 106]
    expected = torch.tensor(written + [0] * (48 - len(written)))
    place = written.index(tokenizer.convert_tokens_to_ids("A"))
    kept = torch.arange(48) != place
    assert torch.equal(canvases[:, kept], expected[kept].expand(2, -1))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids.expand(2, -1)
    with torch.no_grad():
        logits = model(ids, decoder_input_ids=canvases).logits[:, place].double().log_softmax(dim=-1)
    by_hand = logits[:, tokenizer.convert_tokens_to_ids(["A", "B", "C"])]
    torch.testing.assert_close(found["tone"].scores, by_hand, atol=1e-4, rtol=0)  # float32 rounding through three layers


def test_questions_on_canvases_of_their_own_score_as_asked_alone(model, tokenizer):
    """The first canvas is that of its questions alone, whatever canvases stand beside it in the batch."""
    first = {"a": Choice(["Y", "N"]), "b": Choice(["mugs", "blue mugs"])}
    both = model.decide(PROMPT, first | {"c": Choice(["A", "B"])}, tokenizer, reads=2)
    alone = model.decide(PROMPT, first, tokenizer, reads=2)
    assert (both.canvases, alone.canvases) == (2, 1)
    for name in first:
        torch.testing.assert_close(both[name].scores, alone[name].scores, atol=1e-4, rtol=0)


def test_further_steps_are_taken_under_the_constraint(model, tokenizer):
    questions = {"a": Choice(["Y", "N"]), "b": Choice(["mugs", "blue mugs"]), "c": Choice(["A", "B"])}
    found = model.decide(PROMPT, questions, tokenizer, reads=2, steps=3)
    assert found.passes == 2 * 3 * 2 and found["a"].scores.isfinite().all()
    one = model.decide(PROMPT, questions, tokenizer, reads=2)
    assert not torch.allclose(found["a"].scores, one["a"].scores, atol=1e-3)
    assert torch.equal(found["a"].scores, model.decide(PROMPT, questions, tokenizer, reads=2, steps=3)["a"].scores)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_cache_stands_before_the_prompt_and_stays_as_it_is(model, tokenizer, steps):
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    head, tail = ids[:, :5], tokenizer.decode(ids[0, 5:])
    assert torch.equal(torch.cat((head, tokenizer(tail, return_tensors="pt").input_ids), dim=1), ids)
    cache = dynamic_cache(model.config.text_config)
    with torch.no_grad():
        model.prefill(input_ids=head, attention_mask=torch.ones_like(head), position_ids=torch.arange(5)[None], cache=cache)
    before = [layer.keys.clone() for layer in cache.layers]
    expected = model.decide(PROMPT, THREE, tokenizer, reads=2, steps=steps)
    found = model.decide(tail, THREE, tokenizer, reads=2, steps=steps, cache=cache)
    if steps == 1:  # a further step draws tokens, which rounding may change
        torch.testing.assert_close(scores(found), scores(expected), atol=1e-3, rtol=0)
    assert int(cache.get_seq_length()) == 5
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))


def test_calibration_is_the_callers_or_the_checkpoints(model, tokenizer, monkeypatch):
    raw = model.decide(PROMPT, THREE, tokenizer, reads=1)["tone"]
    flat = Calibration({"tone": 2.0}, {"choice": [0.5, 0.0]})
    expected = (raw.scores[0] / 2 + torch.tensor([0.5, 0, 0])).softmax(dim=0).tolist()
    given = model.decide(PROMPT, THREE, tokenizer, reads=1, calibration=flat)["tone"]
    assert list(given.probabilities.values()) == pytest.approx(expected) and torch.equal(given.scores, raw.scores)
    monkeypatch.setattr(model, "calibration", flat, raising=False)
    assert model.decide(PROMPT, THREE, tokenizer, reads=1)["tone"].probabilities == given.probabilities
    assert model.decide(PROMPT, THREE, tokenizer, reads=1, calibration=Calibration())["tone"].probabilities == raw.probabilities


REFUSED = {
    "no questions": ({"questions": {}}, "`questions` is empty"),
    "no mapping": ({"questions": ["Y"]}, "`questions` is"),
    "no choice": ({"questions": {"a": ["Y", "N"]}}, "expected a `Choice`"),
    "name": ({"questions": {3: Choice(["Y", "N"])}}, "has the name 3"),
    "one option": ({"questions": {"a": Choice(["Y"])}}, "'a' has 1 option"),
    "not written": ({"questions": {"a": Choice(["Y", "<eos>"])}}, "cannot write"),
    "too long": ({"questions": {"a": Choice(["Y", "N" * 80])}}, "does not fit"),
    "reads": ({"reads": 0}, "`reads` is 0"),
    "steps": ({"steps": True}, "`steps` is True"),
    "seed": ({"seed": -1}, "`seed` is -1"),
    "canvas": ({"canvas_length": 0}, "`canvas_length` is 0"),
    "unknown": ({"temperature": 2.0}, "unknown arguments"),
    "calibration": ({"calibration": {"choice": 2.0}}, "`calibration` is"),
    "tokenizer": ({"tokenizer": None}, "`tokenizer` is None"),
    "prompt": ({"prompt": 3}, "`prompt` is 3"),
    "two forms": ({"input_ids": torch.ones((1, 3), dtype=torch.int64)}, "one form"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_a_pass(model, tokenizer, monkeypatch, name):
    def never(*args, **kwargs):
        raise AssertionError("a pass was made")

    monkeypatch.setattr(model, "prefill", never)
    given, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        model.decide(**{"prompt": PROMPT, "questions": THREE, "tokenizer": tokenizer, **given})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"noise": "mask", "mask_token_id": 5000}, "`mask_token_id` is 5000"), ({"pad_token_id": 5001}, "`pad_token_id` is 5001"),
        ({"eos_token_id": [1, 5002]}, r"`eos_token_id` holds \[5002\]"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("door", ["decide", "fill", "revise", "generate"])
def test_id_outside_of_the_vocabulary_is_named_before_a_pass(model, tokenizer, monkeypatch, door, settings, said):
    """Of the config: `decide` failed in the embedding by the first two, without a name; the last was passed over, silently."""
    config = type(model.generation_config)(**{**model.generation_config.to_dict(), **settings})
    monkeypatch.setattr(model, "generation_config", config)
    monkeypatch.setattr(model, "prefill", lambda *args, **kwargs: pytest.fail("a pass was made"))
    calls = {
        "decide": lambda: model.decide(PROMPT, THREE, tokenizer),
        "fill": lambda: model.fill("{a:2}", tokenizer, PROMPT),
        "revise": lambda: model.revise("abc", tokenizer, PROMPT, where="uncertain"),
        "generate": lambda: model.generate(torch.ones((1, 3), dtype=torch.int64)),
    }
    with pytest.raises(ValueError, match=f"{said}; expected"):
        calls[door]()


def test_a_cache_of_another_kind_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="`cache` is"):
        model.decide(PROMPT, THREE, tokenizer, cache=StaticCache(config=model.config.text_config, max_cache_len=32))


def test_equal_options_are_refused():
    with pytest.raises(ValueError, match="twice"):
        Choice(["Y", "Y"])


LONE = [{"role": "user", "content": [{"type": "text", "text": "a\ud800"}]}]


@pytest.mark.parametrize("prompt", ["a\ud800", LONE])
def test_lone_surrogate_is_named(model, tokenizer, prompt):
    """The tokenizer's TypeError named nothing."""
    for call in (
        lambda: model.decide(prompt, THREE, tokenizer),
        lambda: model.fill("{a:2}", tokenizer, prompt),
        lambda: model.revise("abc", tokenizer, prompt),
    ):
        with pytest.raises(ValueError, match="`prompt` holds the lone surrogate"):
            call()
    with pytest.raises(ValueError, match="`text` holds the lone surrogate"):
        model.revise("a\udfff", tokenizer)


def test_steps_that_the_models_settings_do_not_allow_are_refused_by_their_own_name(model, tokenizer, monkeypatch):
    """It failed by the name of an argument that nobody had given."""
    for name, value in {"cache_implementation": "static", "backend": "reference", "stop_strings": ["x"]}.items():
        config = type(model.generation_config)(**{**model.generation_config.to_dict(), name: value})
        monkeypatch.setattr(model, "generation_config", config)
        model.decide(PROMPT, THREE, tokenizer, reads=1)
        with pytest.raises(ValueError, match=f"`steps` is 2, .* the model's generation config; .*{name}"):
            model.decide(PROMPT, THREE, tokenizer, reads=1, steps=2)
        monkeypatch.undo()
