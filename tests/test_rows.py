"""A row's tokens depend on its own prompt and seed alone, on the shipped text checkpoint: the results of a trained model are
stable against the last bit of a matrix product, which changes with the shape of the batch."""

import random
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import modeling_diffusiongemma

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from jobs import TEXT_JOBS  # noqa: E402

WIDTH = {"canvas_length": 64, "max_new_tokens": 64}


@pytest.fixture(scope="module")
def text():
    path = modeling_diffusiongemma.default_checkpoint()
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def encode(tokenizer, requests):
    chats = [[{"role": "user", "content": request}] for request in requests]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt")


def requests(count, seed=0):
    rng = random.Random(seed)
    jobs = list(TEXT_JOBS.values())
    return [jobs[place % len(jobs)].sample(rng, "test")[0] for place in range(count)]


def answers(model, encoder, wanted, **settings):
    inputs = encode(encoder, wanted)
    output = model.generate(**inputs, return_dict_in_generate=True, **{**WIDTH, **settings})
    return encoder.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True), output


def test_row_gives_the_same_alone_in_a_batch_and_at_another_place(text):
    wanted, seeds = requests(7), list(range(100, 107))
    together, output = answers(*text, wanted, seed=seeds)
    assert len(set(output.denoising_steps.tolist())) > 1, "rows finish at different times"
    turned, turned_output = answers(*text, wanted[3:] + wanted[:3], seed=seeds[3:] + seeds[:3])
    assert turned[4:] + turned[:4] == together
    assert turned_output.denoising_steps.tolist() == output.denoising_steps.roll(-3).tolist()
    for place in range(7):
        alone, single = answers(*text, [wanted[place]], seed=seeds[place])
        assert alone == [together[place]] and single.denoising_steps[0] == output.denoising_steps[place]


def test_rows_that_leave_the_batch_change_no_token(text):
    """The caller's own cache keeps every row; without one, finished rows are computed no further."""
    wanted = requests(6, seed=1)
    leaving, output = answers(*text, wanted, seed=5, canvas_length=16)
    cache = DynamicCache(config=text[0].config.get_text_config())
    staying, kept = answers(*text, wanted, seed=5, canvas_length=16, past_key_values=cache)
    assert leaving == staying and output.denoising_steps.tolist() == kept.denoising_steps.tolist()
    assert kept.past_key_values is cache and output.past_key_values is None


def test_scores_describe_every_committed_token(text):
    _, output = answers(*text, requests(6), seed=0, output_scores=True)
    scores, steps = output.scores, output.denoising_steps
    inside = output.sequences[:, -scores.entropy.shape[1] :] != 0
    assert bool((scores.log_probs[inside] <= 0).all()) and bool((scores.entropy >= 0).all())
    assert bool((scores.step < steps[:, None]).all()) and bool((scores.revisions <= steps[:, None]).all())
    assert bool(((scores.revisions > 0) == (scores.step > 0)).all()), "a token stands since the first step unless it was revised"
    assert bool((scores.log_probs[~inside] == 0).all())


def test_stop_string_ends_a_row_behind_it(text):
    model, tokenizer = text
    wanted = ["Write October 2, 2052 as an ISO date."]
    whole, _ = answers(model, tokenizer, wanted, seed=0)
    stop = whole[0][:5]
    assert answers(model, tokenizer, wanted, seed=0, stop_strings=[stop], tokenizer=tokenizer)[0] == [stop]
    with pytest.raises(ValueError, match="tokenizer"):
        answers(model, tokenizer, wanted, stop_strings=["x"])


@pytest.mark.parametrize("place", range(6))
def test_verified_decoding_gives_what_autoregressive_decoding_gives(text, place):
    wanted = [requests(6, seed=2)[place]]
    plain, slow = answers(*text, wanted, decoding="autoregressive", do_sample=False)
    verified, fast = answers(*text, wanted, decoding="verified", do_sample=False, canvas_length=16)
    assert verified == plain
