"""Every field of `GenerationConfig` is honoured or refused by name; the honoured ones do what they say, on a small random model."""

import time

import numpy as np
import pytest
import torch
from small_models import CANVAS, PAD, VOCAB, prompts, small_model
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TopKLogitsWarper,
    cache_utils,
)
from transformers.generation.streamers import BaseStreamer

from generation import DiffusionGenerationConfig
from generation.call import prompt
from generation.call.configuration import HONOURED, NEUTRAL, PRESETS

FIELDS = sorted(name for name in GenerationConfig().__dict__ if not name.startswith("_"))


@pytest.fixture(scope="module")
def model():
    built = small_model()
    built.generation_config.update(eos_token_id=[1], pad_token_id=0)
    return built


def generate(model, ids, length=2 * CANVAS, **settings):
    output = model.generate(
        ids, max_new_tokens=length, generation_config={"max_denoising_steps": 5}, seed=0, return_dict_in_generate=True, **settings
    )
    return output.sequences[:, ids.shape[1] :]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_generation_config_is_honoured_or_refused(name):
    """Nothing may be ignored: temperature, top_k, stop_strings and more silently were, elsewhere."""
    config = DiffusionGenerationConfig()
    setattr(config, name, "something")
    refused = [entry for entry in config.refused() if entry.startswith(f"{name}=")]
    assert (name in HONOURED) != bool(refused)


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_neutral_values_of_refused_fields_are_accepted(name):
    assert name not in HONOURED
    config = DiffusionGenerationConfig()
    for value in NEUTRAL[name]:
        setattr(config, name, value)
        assert config.refused() == []


@pytest.mark.parametrize("name, value", [("num_beams", 3), ("guidance_scale", 2.0), ("penalty_alpha", 0.6), ("use_cache", False)])
def test_refused_argument_raises_in_generate(model, name, value):
    with pytest.raises(ValueError, match=name):
        model.generate(prompts(1, 5)[0], **{name: value})


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"temperature": 0}])
def test_greedy_is_deterministic_whatever_the_global_seed(model, settings):
    ids = prompts(2, 6)[0]
    torch.manual_seed(1)
    one = model.generate(ids, max_new_tokens=15, max_denoising_steps=4, **settings)
    torch.manual_seed(2)
    assert torch.equal(one, model.generate(ids, max_new_tokens=15, max_denoising_steps=4, **settings))
    with pytest.raises(ValueError, match="`num_return_sequences` is 2; expected 1 with `" + "=.*".join(map(str, settings))):
        model.generate(ids, num_return_sequences=2, **settings)


def test_temperature_scales_the_schedule(model):
    """A temperature of 0.5 is t_min and t_max halved."""
    ids = prompts(2, 6)[0]
    assert torch.equal(generate(model, ids, temperature=0.5), generate(model, ids, t_min=0.2, t_max=0.4))
    assert not torch.equal(generate(model, ids, temperature=0.5), generate(model, ids))


def test_suppressed_tokens_and_bad_words_never_appear(model):
    ids = prompts(2, 6)[0]
    free = generate(model, ids).flatten().tolist()
    bad = sorted(set(free))[:5]
    assert not set(generate(model, ids, suppress_tokens=bad).flatten().tolist()) & set(bad)
    assert not set(generate(model, ids, bad_words_ids=[[token] for token in bad]).flatten().tolist()) & set(bad)


def test_sequence_bias_draws_a_token_in(model):
    assert (generate(model, prompts(1, 6)[0], sequence_bias={(42,): 80.0}) == 42).float().mean() > 0.9


def test_whole_numbers_do_as_sequence_bias(model):
    """OpenAI's logit_bias holds integers; transformers' processor takes floats alone."""
    ids = prompts(1, 6)[0]
    assert torch.equal(generate(model, ids, sequence_bias={(42,): 80}), generate(model, ids, sequence_bias={(42,): 80.0}))


@pytest.mark.parametrize("value", ["", [""], ["a", ""], [3], 3])
def test_stop_strings_that_are_none_are_refused(value):
    """The empty string stands in every text, so that nothing was ever written."""
    with pytest.raises(ValueError, match="stop_strings"):
        DiffusionGenerationConfig(stop_strings=value)


def test_repetition_penalty_counts_prompt_and_canvas(model):
    """A huge penalty leaves no room for a token of the prompt, or for one twice in the stable canvas."""
    ids = prompts(1, 6)[0]
    new = generate(model, ids, length=CANVAS, repetition_penalty=1e6, top_k=1)[0].tolist()
    positive_only = [token for token in new if token in ids[0].tolist()]
    assert len(positive_only) <= len(
        [token for token in generate(model, ids, length=CANVAS, top_k=1)[0].tolist() if token in ids[0].tolist()]
    )


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_narrowest_truncation_makes_every_sample_the_argmax(model, settings):
    """One token is left at each position, so nothing is uncertain: everything is accepted at once, with entropy 0."""
    output = model.generate(
        prompts(2, 6)[0],
        max_new_tokens=CANVAS,
        max_denoising_steps=3,
        seed=0,
        output_scores=True,
        return_dict_in_generate=True,
        **settings,
    )
    assert bool((output.scores.entropy == 0).all()) and bool((output.scores.log_probs == 0).all())


def test_top_k_and_top_p_keep_the_distribution_they_name():
    """Against the definition, on one position: the k largest, and the smallest set that holds the mass."""
    from generation.call.processors import build_shaping

    logits = torch.randn(1, 3, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    for settings, kept in (
        ({"top_k": 7}, lambda p: p.argsort(descending=True)[:7]),
        ({"top_p": 0.6}, lambda p: _nucleus(p, 0.6)),
    ):
        shaping = build_shaping(DiffusionGenerationConfig(**settings), None, torch.tensor([], dtype=torch.int64), 4, VOCAB)
        shaped = shaping(logits, shaping.filters, torch.zeros((1, 4), dtype=torch.int64), None, 1.0, 1)
        for place in range(3):
            finite = shaped[0, place].isfinite().nonzero().flatten().tolist()
            assert sorted(finite) == sorted(kept(logits[0, place].softmax(-1)).tolist())


def _nucleus(probabilities, mass):
    order = probabilities.argsort(descending=True)
    before = probabilities[order].cumsum(0) - probabilities[order]
    return order[before < mass]


def test_min_new_tokens_hides_the_end(model):
    ids = prompts(4, 6)[0]
    bias = {"sequence_bias": {(1,): 60.0}}
    assert (generate(model, ids, **bias)[:, 0] == 1).all()
    late = generate(model, ids, **bias, min_new_tokens=13)
    assert late.shape[1] == 14 and (late[:, :13] != 1).all() and (late[:, 13] == 1).all()


def test_no_end_token_of_the_call_goes_over_the_models(model):
    """None used to fall back on the model's own ids."""
    bias = {"sequence_bias": {(1,): 60.0}}
    assert generate(model, prompts(1, 6)[0], **bias).shape[1] == 1
    assert generate(model, prompts(1, 6)[0], **bias, eos_token_id=None).shape[1] == 2 * CANVAS


def test_max_time_stops_after_the_step_at_hand(model):
    started = time.perf_counter()
    output = model.generate(prompts(1, 6)[0], max_new_tokens=2000, max_time=0.2, return_dict_in_generate=True)
    assert time.perf_counter() - started < 20 and output.sequences.shape[1] < 2000 and output.denoising_steps.item() >= 1


def test_users_processor_runs_first_and_sees_the_remaining_steps(model):
    seen = []

    class Record(LogitsProcessor):
        def __call__(self, input_ids, scores, cur_step):
            seen.append((tuple(input_ids.shape), tuple(scores.shape), int(cur_step)))
            return scores

    generate(model, prompts(2, 6)[0], length=CANVAS, logits_processor=LogitsProcessorList([Record()]), confidence_threshold=1e-9)
    assert seen == [((2, 6), (2, CANVAS, VOCAB), remaining) for remaining in (5, 4, 3, 2, 1)]


@pytest.mark.parametrize("length", [4, 7, 25])
def test_canvas_length_of_the_call_goes_over_the_models(model, length):
    output = model.generate(
        prompts(1, 6)[0], max_new_tokens=21, canvas_length=length, max_denoising_steps=3, confidence_threshold=1e-9, seed=0,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert output.denoising_steps.item() == 3 * -(-21 // length) and output.sequences.shape == (1, 27)


def test_copies_differ_and_the_first_is_the_seeds_own(model):
    ids = prompts(2, 6)[0]
    single, copies = generate(model, ids), generate(model, ids, num_return_sequences=3)
    assert copies.shape[0] == 6 and torch.equal(copies[::3], single) and not torch.equal(copies[0], copies[1])


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_whole_settings(model, name):
    config = DiffusionGenerationConfig.preset(name, max_new_tokens=5)
    assert model.generate(prompts(1, 6)[0], generation_config=config, seed=0).shape[1] <= 11
    with pytest.raises(ValueError, match="name"):
        DiffusionGenerationConfig.preset("faster")


@pytest.mark.parametrize("sampler", ["confidence", "fixed_steps"])
def test_other_samplers_run_to_the_end(model, sampler):
    assert generate(model, prompts(2, 6)[0], sampler=sampler).shape[1] >= 1


def test_nan_logits_are_reported_and_not_committed(model):
    class Spoil(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.masked_fill(torch.arange(scores.shape[0])[:, None, None] == 1, float("nan"))

    with pytest.raises(ValueError, match=r"NaN.*rows \[1\]"):
        generate(model, prompts(3, 6)[0], logits_processor=LogitsProcessorList([Spoil()]))


def test_continuous_batching_is_refused(model):
    """Its scheduler writes token by token; the server asks for the method, and calls `generate` where there is none."""
    assert not hasattr(model, "init_continuous_batching")
    with pytest.raises(ValueError, match="generate_batch"):
        model.generate_batch([[5, 6, 7]])


def test_failure_does_not_end_the_streamer(model):
    """transformers' server reports a failure after `generate` has raised; ended before, the stream read as a whole, empty answer."""

    class Stream:
        ended = False

        def put(self, value):
            raise RuntimeError("closed")

        def end(self):
            self.ended = True

    stream = Stream()
    with pytest.raises(RuntimeError, match="closed"):
        model.generate(prompts(1, 6)[0], streamer=stream, max_denoising_steps=2)
    assert not stream.ended


@pytest.mark.parametrize("seed, length", [(0, 25), (1, 40), (2, 13)])
def test_verified_decoding_equals_autoregressive_decoding(seed, length):
    """Token for token, past several windows, also where random weights make every draft wrong."""
    model = small_model(seed)
    ids = prompts(1, 9, seed)[0]
    settings = {
        "max_new_tokens": length,
        "do_sample": False,
        "eos_token_id": [1],
        "pad_token_id": 0,
        "generation_config": {"max_denoising_steps": 3},
    }
    plain = model.generate(ids, decoding="autoregressive", **settings)
    assert torch.equal(model.generate(ids, decoding="verified", **settings), plain)


def test_autoregressive_decoding_is_a_loop_over_the_causal_pass(model):
    ids = prompts(1, 9)[0]
    slow = ids
    for _ in range(12):
        hidden = model.prefill(slow).last_hidden_state[:, -1:]
        slow = torch.cat((slow, model.compute_logits(hidden).argmax(-1)), dim=1)
    assert torch.equal(model.generate(ids, decoding="autoregressive", do_sample=False, max_new_tokens=12, eos_token_id=[]), slow)


def test_output_logits_are_the_models_own_for_every_token(model):
    """Of the pass that committed the token, whatever shaped the distribution afterwards."""
    seen = []

    class Record(LogitsProcessor):
        def __call__(self, input_ids, scores, cur_step):
            seen.append(scores.clone())
            return scores

    ids = prompts(2, 6)[0]
    settings = {"max_new_tokens": 15, "max_denoising_steps": 3, "confidence_threshold": 1e-9, "seed": 0, "eos_token_id": []}
    output = model.generate(
        ids, logits_processor=LogitsProcessorList([Record()]), suppress_tokens=[5, 6], temperature=0.5, output_logits=True,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip
    assert len(seen) == 6 and torch.equal(output.logits, torch.cat((seen[2], seen[5]), dim=1)[:, :15])
    assert model.generate(ids, return_dict_in_generate=True, **settings).logits is None
    with pytest.raises(ValueError, match="return_dict_in_generate"):
        model.generate(ids, output_logits=True, **settings)


def test_output_logits_of_rows_that_end_early_are_their_own(model):
    """A row that has left the batch, or stands finished in it, keeps the logits of its last step; behind its end they are 0."""
    ids = prompts(3, 6)[0]
    ends = list(range(20, 26))
    settings = {"max_new_tokens": 2 * CANVAS, "max_denoising_steps": 4, "seed": [1, 2, 3], "eos_token_id": ends, "pad_token_id": 0}
    output = model.generate(ids, output_logits=True, output_scores=True, return_dict_in_generate=True, **settings)
    new = output.sequences[:, 6:]
    is_end = torch.isin(new, torch.tensor(ends)).long()
    ended = is_end.cumsum(dim=1) - is_end > 0
    assert bool(ended.any()) and bool((output.logits[ended] == 0).all()) and bool((output.logits[~ended] != 0).any(-1).all())
    assert torch.equal(output.logits.argmax(-1)[~ended], new[~ended]), "nothing else shapes them here"


def test_prompt_as_embeddings_gives_the_new_tokens_of_the_prompt_as_ids(model):
    ids, mask = prompts(2, 6, padded=2)
    settings = {"attention_mask": mask, "max_new_tokens": 15, "max_denoising_steps": 3, "seed": 0}
    embeds = model.get_input_embeddings()(ids)
    expected = model.generate(ids, **settings)[:, 6:]
    assert torch.equal(model.generate(inputs_embeds=embeds, **settings), expected)
    assert torch.equal(model.generate(inputs_embeds=embeds, num_return_sequences=2, **settings)[::2], expected)
    for decoding in ("autoregressive", "verified"):
        one = model.generate(inputs_embeds=embeds[1:], decoding=decoding, do_sample=False, max_new_tokens=7)
        assert torch.equal(one, model.generate(ids[1:], decoding=decoding, do_sample=False, max_new_tokens=7)[:, 6:])


def test_bad_embeddings_are_refused(model):
    ids = prompts(2, 6)[0]
    embeds = model.get_input_embeddings()(ids)
    for wrong in (embeds[0], embeds[..., :-1], ids[..., None], embeds[:, :0], "text"):
        with pytest.raises(ValueError, match="inputs_embeds"):
            model.generate(inputs_embeds=wrong, max_new_tokens=5)
    for other in ({"input_ids": ids}, {"inputs": ids}):
        with pytest.raises(ValueError, match="exactly one"):
            model.generate(inputs_embeds=embeds, max_new_tokens=5, **other)
    with pytest.raises(ValueError, match="pixel_values"):
        model.generate(inputs_embeds=embeds, pixel_values=torch.zeros(1, 4, 12), max_new_tokens=5)


def test_cache_of_a_kind_that_cannot_be_is_refused(model):
    ids = prompts(1, 6)[0]
    for kind in ("offloaded", "offloaded_static"):
        with pytest.raises(ValueError, match=rf"cache_implementation.*'{kind}'.*CUDA"):
            model.generate(ids, cache_implementation=kind, max_new_tokens=5)
    with pytest.raises(ValueError, match="backend 'gguf'"):
        model.generate(ids, cache_implementation="quantized", cache_config={"backend": "gguf"}, max_new_tokens=5)
    if hasattr(cache_utils, "Fp8QuantizedLayer"):  # transformers before 5.23 has no FP8 cache
        with pytest.raises(ValueError, match="cache_config.*bits"):
            model.generate(ids, cache_implementation="quantized", cache_config={"bits": 3}, max_new_tokens=5)
    with pytest.raises(ValueError, match="cache_config"):
        model.generate(ids, cache_config={"backend": "fp8"}, max_new_tokens=5)


@pytest.mark.parametrize("decoding", ["autoregressive", "verified"])
def test_other_decodings_refuse_caches_that_they_do_not_make(model, decoding):
    """They made a dynamic one, whatever was asked for, silently."""
    settings = {"max_new_tokens": 5, "decoding": decoding, "do_sample": False}
    for kind in ("static", "quantized", "offloaded"):
        with pytest.raises(ValueError, match=f"`cache_implementation` is '{kind}'; expected 'dynamic' with `decoding='{decoding}'"):
            model.generate(prompts(1, 6)[0], cache_implementation=kind, **settings)
    model.generate(prompts(1, 6)[0], cache_implementation="dynamic", **settings)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"confidence": 0.5}, "confidence"), ({"sampler": "fixed_steps", "entropy_bound": 0.3}, "entropy_bound"),
        ({"sampler": "confidence", "corrector_steps": 2}, "corrector_steps"), ({"mask_token_id": 4}, "mask_token_id"),
        ({"sampler": "fixed_steps", "sampler_config": {"entropy_bound": 0.3}}, "sampler_config"),
        *(({"decoding": "autoregressive", name: value}, name) for name, value in (
            ("max_denoising_steps", 3), ("entropy_bound", 0.3), ("t_min", 0.1), ("t_max", 0.9), ("stability_threshold", 2),
            ("confidence_threshold", 0.1), ("canvas_length", 5), ("sampler", "confidence"), ("joint_threshold", 0.1), ("patience", 3),
            ("self_conditioning_steps", 3),
            ("ignore_after_eos", False), ("noise", "uniform"), ("sampler_config", {"entropy_bound": 0.3}),
        )),
    ],
)  # fmt: skip
def test_an_argument_that_nothing_of_the_call_reads_is_refused(model, settings, name):
    """Each was ignored, silently; a config may hold them for calls with another sampler or decoding."""
    with pytest.raises(ValueError, match=f"`{name}` is .*, and `(sampler|noise|decoding)` is .*; expected .*, which nothing else reads"):
        model.generate(prompts(1, 6)[0], max_new_tokens=5, **settings)
    config = DiffusionGenerationConfig(**{"max_denoising_steps": 2, "max_new_tokens": 5, **settings})
    model.generate(prompts(1, 6)[0], generation_config=config)


def test_several_prompts_verified_are_each_as_alone(model):
    """Rows keep different numbers of tokens a round. There were no scores, silently."""
    ids, mask = prompts(3, 9, padded=4)
    settings = {
        "max_new_tokens": 13,
        "do_sample": False,
        "generation_config": {"max_denoising_steps": 3},
        "eos_token_id": [1],
        "return_dict_in_generate": True,
    }
    plain = model.generate(ids, attention_mask=mask, decoding="autoregressive", output_scores=True, **settings)
    several = model.generate(ids, attention_mask=mask, decoding="verified", output_scores=True, **settings)
    assert torch.equal(several.sequences, plain.sequences)
    for got, expected in zip(several.scores, plain.scores, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert several.denoising_steps.shape == several.tokens_per_forward.shape == (3,)
    with pytest.raises(ValueError, match="verified.*3 rows"):
        model.generate(ids, decoding="verified", streamer=BaseStreamer(), **settings)


def test_autoregressive_scores_are_those_of_the_tokens_that_were_drawn(model):
    """They were those of the most probable tokens, whatever was drawn."""
    ids = prompts(2, 6)[0]
    output = model.generate(
        ids, decoding="autoregressive", temperature=2.0, top_k=40, seed=0, max_new_tokens=9, eos_token_id=[], output_scores=True,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    logits = output.logits / 2.0
    kept = logits.masked_fill(logits < logits.topk(40, dim=-1).values[..., -1:], -float("inf")).log_softmax(dim=-1)
    log_probs = kept.gather(-1, output.sequences[:, 6:, None]).squeeze(-1)
    assert bool((log_probs < kept.amax(dim=-1)).any()), "no token was drawn that is not the most probable one"
    torch.testing.assert_close(output.scores.log_probs, log_probs, atol=1e-4, rtol=0)


def test_scores_that_nobody_gets_are_refused(model):
    with pytest.raises(ValueError, match="`output_scores` is True; expected `return_dict_in_generate=True`"):
        model.generate(prompts(1, 6)[0], output_scores=True)


# What simply works, and what a call leaves as it is


@pytest.mark.parametrize("form", [np.int64, torch.tensor, np.array, lambda seed: [seed] * 2, lambda seed: torch.tensor([seed, seed])])
def test_seed_is_a_number_in_any_form(model, form):
    ids = prompts(2, 6)[0]
    expected = model.generate(ids, max_new_tokens=7, max_denoising_steps=2, seed=5)
    assert torch.equal(model.generate(ids, max_new_tokens=7, max_denoising_steps=2, seed=form(5)), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_any_integer_type_are_read(model, dtype):
    ids = prompts(2, 6)[0]
    assert torch.equal(generate(model, ids.to(dtype)), generate(model, ids))


def test_generation_config_may_be_a_mapping(model):
    ids, fields = prompts(1, 6)[0], {"max_new_tokens": 7, "top_k": np.int64(3)}
    expected = model.generate(ids, generation_config=DiffusionGenerationConfig(max_new_tokens=7, top_k=3), seed=0)
    assert torch.equal(model.generate(ids, generation_config=fields, seed=0), expected) and fields["top_k"] == 3
    with pytest.raises(ValueError, match="max_new_token"):
        model.generate(ids, generation_config={"max_new_token": 7})


def test_what_is_assigned_as_the_models_config_is_read_like_an_argument():
    own, ids = small_model(), prompts(1, 6)[0]
    for value in (None, {"max_denoising_steps": 1}, GenerationConfig(max_new_tokens=3)):
        own.generation_config = value
        assert own.generate(ids, canvas_length=4, max_length=9, seed=0).shape == (1, 9)
    own.generation_config = 3
    with pytest.raises(ValueError, match="generation_config"):
        own.generate(ids)


@pytest.mark.parametrize("mask", [0.5, -1, 2, float("nan")])
def test_mask_of_other_numbers_than_0_and_1_is_refused(model, mask):
    """They were taken as real tokens."""
    ids = prompts(1, 6)[0]
    for call in (model.generate, model.prefill, model):
        with pytest.raises(ValueError, match="attention_mask"):
            call(ids, attention_mask=torch.tensor([[mask, 1, 1, 1, 1, 1]]))


def test_huge_stability_threshold_takes_no_memory(model):
    """A history of 10**9 canvases was allocated."""
    ids = prompts(1, 6)[0]
    assert torch.equal(generate(model, ids, stability_threshold=10**9), generate(model, ids, stability_threshold=5))


def test_end_tokens_beyond_the_vocabulary_are_never_predicted(model):
    """The released ids, on a small vocabulary: hiding them was an index out of range."""
    ids = prompts(1, 6)[0]
    assert torch.equal(
        generate(model, ids, eos_token_id=[1, 106], min_new_tokens=3), generate(model, ids, eos_token_id=[1], min_new_tokens=3)
    )


# Batches padded on the left without a mask


@pytest.mark.parametrize("settings", [{}, {"decoding": "autoregressive", "do_sample": False}, {"logits_processor": [TopKLogitsWarper(3)]}])
def test_padding_on_the_left_is_told_by_its_token(model, settings):
    """It was read as text, and short rows answered nothing."""
    ids, mask = prompts(3, 9, padded=4)
    expected = generate(model, ids, attention_mask=mask, **settings)
    assert torch.equal(generate(model, ids, **settings), expected)
    if "decoding" not in settings:
        assert not torch.equal(generate(model, ids, attention_mask=torch.ones_like(mask), **settings), expected)


def test_pad_token_inside_of_a_prompt_and_a_row_of_nothing_else_stay_text(model):
    ids = prompts(2, 9)[0]
    ids[0, 3:5], ids[1] = PAD, PAD
    assert torch.equal(generate(model, ids), generate(model, ids, attention_mask=torch.ones_like(ids)))


@pytest.fixture
def warned(monkeypatch):
    """What is warned of once."""
    messages = []
    monkeypatch.setattr(prompt.logger, "warning_once", messages.append)
    return messages


@pytest.mark.parametrize("case", ["pad is an end", "right", "reference"])
def test_what_may_be_padding_is_text_with_a_warning(model, warned, case):
    ids = prompts(2, 9, padded=3)[0]
    ids = ids.roll(-3, dims=1) if case == "right" else ids
    settings = {"pad is an end": {"eos_token_id": [1, PAD]}, "right": {}, "reference": {"backend": "reference"}}[case]
    if case == "reference":
        settings["generator"] = torch.Generator()
    got = model.generate(
        ids, max_new_tokens=5, max_denoising_steps=2, **{"seed": 0, **settings, **({"seed": None} if case == "reference" else {})}
    )
    assert got.shape[1] > 9 and len(warned) == 1 and "attention_mask" in warned[0] and f"({PAD})" in warned[0]


def test_cached_turn_that_begins_with_the_pad_token_is_text_with_a_warning(model, warned):
    ids = prompts(2, 9, padded=3)[0]
    model.generate(ids, cache=model.prefill(prompts(2, 4)[0]).cache, max_new_tokens=5, max_denoising_steps=2)
    assert len(warned) == 1


def test_nothing_is_warned_of_with_a_mask_or_without_padding(model, warned):
    ids, mask = prompts(2, 9, padded=3)
    generate(model, ids, attention_mask=mask)
    generate(model, ids[:, 3:])
    generate(model, ids)
    assert warned == []


# Smaller doors


def test_transition_scores_are_the_log_probabilities_of_the_output(model):
    settings = {"max_new_tokens": 15, "max_denoising_steps": 3, "seed": 0, "output_scores": True, "return_dict_in_generate": True}
    output = model.generate(prompts(2, 6)[0], **settings)
    scores = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    assert torch.equal(scores, output.scores.log_probs)
    for name, call in {
        "scores": {"scores": None}, "normalize_logits": {"scores": output.scores},
        "beam_indices": {"scores": output.scores, "beam_indices": torch.zeros(2, 15), "normalize_logits": True},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=name):
            model.compute_transition_scores(output.sequences, **call)


def test_caches_that_are_none_are_refused_by_name(model):
    ids = prompts(2, 6)[0]
    other = small_model(num_key_value_heads=1).prefill(ids).cache
    for cache in (EncoderDecoderCache(DynamicCache(), DynamicCache()), ((ids, ids),), "x", 3):
        for call in (model.generate, model.prefill, model, model.model):
            with pytest.raises(ValueError, match="cache"):
                call(ids, cache=cache)
    with pytest.raises(ValueError, match="`cache` holds 1 heads"):
        model.generate(ids, cache=other)
