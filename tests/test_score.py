"""Scores of responses: exact ones against a loop, Monte-Carlo ones against their own limit, and what both are for."""

import pytest
import torch
from small_models import small_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_diffusiongemma import BlockDiffusionCollator, default_checkpoint

PAIRS = [(list(range(20, 27)), list(range(30, 53))), ([9, 8], [40, 41, 42])]


@pytest.fixture(scope="module")
def model():
    return small_model(3)


def test_autoregressive_score_is_the_sum_over_single_tokens(model):
    scored = model.score(**BlockDiffusionCollator(pad_token_id=0)(PAIRS), mode="autoregressive")
    for row, (prompt, response) in enumerate(PAIRS):
        total, ids = 0.0, list(prompt)
        for token in response:
            hidden = model.prefill(torch.tensor([ids])).last_hidden_state[:, -1:]
            total += float(model.compute_logits(hidden).log_softmax(-1)[0, 0, token])
            ids.append(token)
        assert float(scored.log_prob[row]) == pytest.approx(total / len(response), abs=1e-4)
    assert scored.tokens.tolist() == [23, 3] and scored.standard_error.tolist() == [0, 0]
    assert scored.greedy.tolist() == [False, False]


@pytest.mark.parametrize("piece", [1, 4, 256])
def test_response_is_greedy_where_greedy_decoding_writes_it(model, monkeypatch, piece):
    """In pieces of the vocabulary head, across rows; one other token anywhere makes it no longer greedy."""
    monkeypatch.setattr("modeling_diffusiongemma.training.pieces.NUMBERS", piece * model.config.text_config.vocab_size)
    prompt = [20, 21, 22, 23]
    settings = {"decoding": "autoregressive", "do_sample": False, "max_new_tokens": 7, "eos_token_id": []}
    written = model.generate(torch.tensor([prompt]), **settings)[0, 4:].tolist()
    changed = [[*written[:at], (written[at] + 1) % 90, *written[at + 1 :]] for at in (0, 3, 6)]
    scored = model.score(
        **BlockDiffusionCollator(pad_token_id=0)([(prompt, r) for r in (written, *changed, written[:2])]), mode="autoregressive"
    )
    assert scored.greedy.tolist() == [True, False, False, False, True]


def test_diffusion_score_agrees_with_a_longer_run_within_its_error(model):
    """23 tokens are three canvases of 10: all of them count, and none of the fill."""
    batch = BlockDiffusionCollator(pad_token_id=0)(PAIRS)
    torch.manual_seed(0)
    short, long = model.score(**batch, samples=32), model.score(**batch, samples=256)
    error = (short.standard_error**2 + long.standard_error**2).sqrt()
    assert bool(((short.log_prob - long.log_prob).abs() < 5 * error).all())
    assert bool((long.standard_error < short.standard_error).all()) and bool((long.standard_error > 0).all())


def test_row_scores_alone_what_it_scores_in_a_padded_batch(model):
    whole = model.score(**BlockDiffusionCollator(pad_token_id=0)(PAIRS), mode="autoregressive")
    alone = model.score(**BlockDiffusionCollator(pad_token_id=0)(PAIRS[1:]), mode="autoregressive")
    assert float(alone.log_prob[0]) == pytest.approx(float(whole.log_prob[1]), abs=1e-5)


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_trained_model_finds_the_right_answer_likelier_than_a_wrong_one(mode):
    path = default_checkpoint()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    request = "Write October 2, 2052 as an ISO date."
    torch.manual_seed(0)
    scored = model.score(
        **BlockDiffusionCollator(tokenizer)([(request, "2052-10-02"), (request, "2052-10-03"), (request, "1952-10-02")]),
        mode=mode, **({"canvas_length": 16} if mode == "diffusion" else {}),
    )  # fmt: skip
    assert int(scored.log_prob.argmax()) == 0 and bool((scored.log_prob <= 0).all())


@pytest.mark.parametrize("settings, name", [
    ({"mode": "greedy"}, "mode"), ({"samples": 1}, "samples"),
    ({"mode": "autoregressive", "samples": 4}, "`samples` is 4, and `mode` is 'autoregressive'"),
    ({"mode": "autoregressive", "canvas_length": 5}, "`canvas_length` is 5, and `mode` is 'autoregressive'"),
])  # fmt: skip
def test_bad_settings_are_refused(model, settings, name):
    with pytest.raises(ValueError, match=name):
        model.score(**BlockDiffusionCollator(pad_token_id=0)(PAIRS), **settings)
    with pytest.raises(ValueError, match="labels"):
        model.score(torch.ones((1, 4), dtype=torch.int64), torch.full((1, 4), -100))


def test_packed_rows_are_refused_and_so_is_what_is_no_image(model):
    """Rows that hold two conversations were scored as if the second one went on from the first; `last_states` ended in an IndexError."""
    packed = BlockDiffusionCollator(pad_token_id=0, packing=True, max_length=40)(PAIRS)
    for given, named in ((packed, "position_ids"), ({**BlockDiffusionCollator(pad_token_id=0)(PAIRS), "last_states": 2}, "last_states")):
        with pytest.raises(ValueError, match=rf"`score` got the arguments \['{named}'\]"):
            model.score(**given, mode="autoregressive")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_ids_of_any_integer_type_are_read(model, dtype):
    """They ended in torch's "expected target dtype to be Long", in training and in `score`."""
    batch = dict(BlockDiffusionCollator(pad_token_id=0)(PAIRS))
    narrow = batch | {"input_ids": batch["input_ids"].to(torch.int32), "labels": batch["labels"].to(dtype)}
    canvas = batch["input_ids"][:, :10]
    for call in (
        lambda given: model.score(**given, mode="autoregressive").log_prob, lambda given: model.score(**given).log_prob,
        lambda given: model(**given).loss,
        lambda given: model(canvas, decoder_input_ids=canvas, labels=given["input_ids"][:, :10]).loss,
    ):  # fmt: skip
        found = []
        for given in (batch, narrow):
            torch.manual_seed(0)
            found.append(call(given))
        assert torch.equal(*found)
