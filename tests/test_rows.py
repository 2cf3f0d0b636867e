"""A row's tokens depend on its own prompt and seed alone, on the shipped text checkpoint: the results of a trained model are
stable against the last bit of a matrix product, which changes with the shape of the batch."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LogitsProcessor, LogitsProcessorList, cache_utils

import modeling_diffusiongemma
from jobs import TEXT_JOBS

WIDTH = {"generation_config": {"canvas_length": 64}, "max_new_tokens": 64}


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


@pytest.mark.parametrize(
    "settings",
    [{}, {"cache_implementation": "static"}, {"sampler": "confidence"}, {"sampler": "predictor_corrector", "max_denoising_steps": 12}],
    ids=["released", "static cache", "confidence", "predictor-corrector"],
)
def test_row_gives_the_same_alone_in_a_batch_and_at_another_place(text, settings):
    """With a static cache finished rows stay in the batch: what they draw meanwhile must not shift their next canvas."""
    wanted, seeds = requests(7), list(range(100, 107))
    settings = {"canvas_length": 32, **settings}
    together, output = answers(*text, wanted, seed=seeds, **settings)
    assert len(set(output.denoising_steps.tolist())) > 1, "rows finish at different times"
    turned, turned_output = answers(*text, wanted[3:] + wanted[:3], seed=seeds[3:] + seeds[:3], **settings)
    assert turned[4:] + turned[:4] == together
    assert turned_output.denoising_steps.tolist() == output.denoising_steps.roll(-3).tolist()
    for place in range(0, 7, 2):
        alone, single = answers(*text, [wanted[place]], seed=seeds[place], **settings)
        assert alone == [together[place]] and single.denoising_steps[0] == output.denoising_steps[place]


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"max_denoising_steps": 1}, {"max_denoising_steps": 3}])
def test_flags_read_one_step_late_change_no_token(text, settings, monkeypatch):
    """As on a GPU, where the host looks at a step while the next one runs: the surplus step must leave finished rows alone."""
    settings = {"canvas_length": 16, "seed": list(range(6)), "output_scores": True, **settings}
    wanted = requests(6, seed=3)
    at_once, output = answers(*text, wanted, **settings)
    monkeypatch.setattr("generation.call.plan.reads_late", lambda device: True)
    late, late_output = answers(*text, wanted, **settings)
    assert late == at_once and late_output.denoising_steps.tolist() == output.denoising_steps.tolist()
    for one, other in zip(late_output.scores, output.scores, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)  # a finished row leaves one step later: sums of another shape


def test_late_flags_report_bad_logits_all_the_same(text, monkeypatch):
    """Also where the step is the last one, whose flags nobody waits for."""
    monkeypatch.setattr("generation.call.plan.reads_late", lambda device: True)

    class Spoil(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.masked_fill(torch.arange(scores.shape[0])[:, None, None] == 1, float("nan"))

    for steps in (1, 2, 5):
        with pytest.raises(ValueError, match=r"NaN.*rows \[1\]"):
            answers(*text, requests(3), seed=0, max_denoising_steps=steps, logits_processor=LogitsProcessorList([Spoil()]))


def test_rows_that_leave_the_batch_change_no_token(text):
    """The caller's own cache keeps every row; without one, finished rows are computed no further."""
    wanted = requests(6, seed=1)
    leaving, output = answers(*text, wanted, seed=5, canvas_length=16)
    cache = DynamicCache(config=text[0].config.get_text_config())
    staying, kept = answers(*text, wanted, seed=5, canvas_length=16, past_key_values=cache)
    assert leaving == staying and output.denoising_steps.tolist() == kept.denoising_steps.tolist()
    assert kept.past_key_values is cache and output.past_key_values is None


def test_quantized_cache_holds_full_attention_in_eight_bits(text):
    """The answers of a trained model survive it; the sliding layers, which never grow beyond the window, stay as they are."""
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("transformers before 5.23 has no FP8 cache")
    wanted = requests(6, seed=4)
    exact, _ = answers(*text, wanted, seed=0, canvas_length=16)
    quantized, output = answers(*text, wanted, seed=0, canvas_length=16, cache_implementation="quantized")
    assert quantized == exact
    stored = {type(layer).__name__ for layer in output.past_key_values.layers}
    assert stored == {"Fp8QuantizedLayer", "DynamicSlidingWindowLayer"}


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


def test_verified_decoding_gives_what_autoregressive_decoding_gives(text):
    wanted = requests(6, seed=2)
    plain, slow = answers(*text, wanted, decoding="autoregressive", do_sample=False, output_logits=True)
    verified, fast = answers(*text, wanted, decoding="verified", do_sample=False, canvas_length=16, output_logits=True)
    assert verified == plain and torch.equal(fast.sequences, slow.sequences)
    torch.testing.assert_close(fast.logits, slow.logits, atol=1e-4, rtol=0)  # each token's own, sums in another order
