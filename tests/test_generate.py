"""`generate`: lengths, ends, settings, refusals, streaming. Equality with transformers is in test_generate_parity.py."""

import copy
import json
import re
import threading
from pathlib import Path

import pytest
import torch
from small_models import CANVAS, IMAGE, PAD, VOCAB, prompts, small_model
from transformers import (
    DiffusionGemmaGenerationConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextDiffusionStreamer,
    TextIteratorStreamer,
    TextStreamer,
)  # fmt: skip
from transformers.generation.streamers import BaseStreamer
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

from generation import AfterCanvas, CanvasState, DiffusionGenerationConfig
from generation.call.configuration import RELEASED_DEFAULTS

ROOT = Path(__file__).parents[1]
RELEASED = Path(__file__).parent / "data" / "released"
RELEASED_VALUES = {
    "max_new_tokens": 256, "max_denoising_steps": 48, "entropy_bound": 0.1, "t_max": 0.8, "t_min": 0.4,
    "stability_threshold": 1, "confidence_threshold": 0.005, "eos_token_id": [1, 106, 50], "pad_token_id": 0,
}  # fmt: skip
IDS, MASK = prompts(2, 9, seed=1)
NAN = float("nan")


@pytest.fixture(scope="module")
def shared():
    model = small_model()
    model.generation_config = DiffusionGenerationConfig(pad_token_id=PAD, max_denoising_steps=3)
    return model


@pytest.fixture
def model(shared):
    """The shared model; the test fails if it leaves another generation config behind."""
    before = copy.deepcopy(shared.generation_config.__dict__)
    yield shared
    assert shared.generation_config.__dict__ == before, "generate changed model.generation_config"


def run(model, ids=IDS, seed=0, **settings):
    return model.generate(ids, generator=torch.Generator().manual_seed(seed), **settings)


class Recorder(BaseStreamer):
    def __init__(self, logits=False):
        self._takes_logits, self.puts, self.drafts, self.states, self.ends = logits, [], [], [], 0

    def put(self, value):
        self.puts.append(value)

    def put_draft(self, value=None, logits=None):
        self.drafts.append(value if logits is None else logits)

    def put_state(self, state):
        self.states.append(state)

    def end(self):
        self.ends += 1


class Allow(LogitsProcessor):
    def __init__(self, ids):
        self.ids = list(ids)

    def __call__(self, input_ids, scores):
        allowed = torch.full_like(scores, -float("inf"))
        allowed[..., self.ids] = scores[..., self.ids]
        return allowed


# Lengths and ends


def test_returns_a_tensor_unless_asked_for_the_output(model):
    sequences = run(model, max_new_tokens=11)
    output = run(model, max_new_tokens=11, return_dict_in_generate=True)
    assert isinstance(sequences, torch.Tensor) and sequences.dtype == torch.int64
    assert torch.equal(output.sequences, sequences) and torch.equal(sequences[:, :9], IDS)
    assert output.denoising_steps.tolist() == [6, 6] and output.tokens_per_forward.tolist() == pytest.approx([11 / 6] * 2)
    assert output.past_key_values.get_seq_length() == 19


@pytest.mark.parametrize("count", [1, 9, 10, 11, 25])
def test_output_is_trimmed_to_the_allowed_length(model, count):
    """transformers rounds up to whole canvases. The part that stays is that of a longer run from the same seed."""
    longest = run(model, max_new_tokens=30)
    assert torch.equal(run(model, max_new_tokens=count), longest[:, : 9 + count])
    assert torch.equal(run(model, max_length=9 + count), longest[:, : 9 + count])


def test_max_length_counts_wherever_max_new_tokens_is_not_set(model):
    config = DiffusionGenerationConfig(max_length=14)
    assert run(model, generation_config=config).shape[1] == 14
    assert run(model, generation_config=DiffusionGenerationConfig(max_length=14, max_new_tokens=3)).shape[1] == 12
    assert run(model, generation_config=config, max_new_tokens=2).shape[1] == 11


def test_max_length_of_the_models_own_config_counts():
    """The released default of 256 new tokens was put over a checkpoint's `max_length`."""
    own = small_model()
    own.generation_config = DiffusionGenerationConfig(max_length=14, max_denoising_steps=1, pad_token_id=PAD)
    assert run(own).shape[1] == 14


def test_max_length_counts_cached_tokens(model):
    first = run(model, max_new_tokens=10, return_dict_in_generate=True)
    turn = torch.cat((first.sequences[:, 9:], IDS[:, :3]), dim=1)
    second = run(model, turn, past_key_values=first.past_key_values, max_length=9 + 13 + 4, attention_mask=torch.ones(2, 22))
    assert second.shape[1] == 13 + 4


@pytest.mark.parametrize("limit", [1, 9])
def test_limit_within_the_prompt_is_refused(model, limit):
    with pytest.raises(ValueError, match="`max_length`"):
        run(model, max_length=limit)


@pytest.mark.parametrize("max_length", [3, 10, 50])
def test_of_two_limits_that_of_the_new_tokens_counts(model, max_length):
    """A pipeline hands the tokenizer's `max_length` on; everywhere else in transformers `max_new_tokens` counts then."""
    assert torch.equal(run(model, max_length=max_length, max_new_tokens=5), run(model, max_new_tokens=5))


def test_rows_are_cut_after_their_first_end_and_padded(model):
    free = run(model, max_new_tokens=10)[:, 9:].tolist()
    place = next(p for p in range(2, 8) if free[0][p] not in free[0][:p] + free[1] + [PAD])
    eos = free[0][place]
    got = run(model, max_new_tokens=10, eos_token_id=eos, return_dict_in_generate=True)
    assert got.sequences[0, 9:].tolist() == free[0][: place + 1] + [PAD] * (9 - place)
    assert got.sequences[1, 9:].tolist() == free[1]
    assert got.tokens_per_forward.tolist() == pytest.approx([(place + 1) / 3, 10 / 3])
    unused = next(t for t in range(VOCAB) if t not in free[0] + free[1])
    assert torch.equal(run(model, max_new_tokens=10, eos_token_id=[unused, eos]), got.sequences)
    alone = run(model, max_new_tokens=30, eos_token_id=[free[0][0], free[1][0]])
    assert alone.shape[1] == 10, "both rows end with their first token: nothing is generated or kept behind it"


def test_pad_defaults_to_the_first_end_token():
    own = small_model()
    own.generation_config = DiffusionGenerationConfig(max_denoising_steps=2)
    first = run(own, max_new_tokens=10)[0, 9].item()
    got = run(own, max_new_tokens=10, eos_token_id=[first, 3])[0, 10:]
    assert bool((got == first).all())


class StopFirstRow(StoppingCriteria):
    """Ends the first row (known by its first token) at once, and every row after `everyone` tokens."""

    def __init__(self, everyone):
        self.everyone, self.lengths = everyone, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return (input_ids[:, 0] == IDS[0, 0]) | (input_ids.shape[1] >= self.everyone)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_stopping_criteria_are_asked_after_every_canvas(model, backend):
    """Counts went by end-of-sequence tokens alone, so a row stopped by a criterion was credited with its padding."""
    criterion = StopFirstRow(everyone=29)
    criteria = StoppingCriteriaList([criterion if backend == "reference" else AfterCanvas(criterion)])
    got = run(model, max_new_tokens=50, stopping_criteria=criteria, return_dict_in_generate=True, backend=backend)
    assert criterion.lengths == [19, 29] and got.sequences.shape[1] == 29
    assert bool((got.sequences[0, 19:] == PAD).all())
    assert got.denoising_steps.tolist() == [3, 6] and got.tokens_per_forward.tolist() == pytest.approx([10 / 3, 20 / 6])


# Randomness, rows, caches


def test_generator_decides_every_random_number(model):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run(model, seed=5, max_new_tokens=25)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"
    torch.manual_seed(2)
    assert torch.equal(run(model, seed=5, max_new_tokens=25), first)
    assert not torch.equal(run(model, seed=6, max_new_tokens=25), first)


def test_a_row_gives_in_a_padded_batch_what_it_gives_alone(model):
    """Mask noise and one step a canvas leave nothing to chance: the argmax of the first step is what is committed."""
    sure = {"noise": "mask", "mask_token_id": 4, "max_denoising_steps": 1, "max_new_tokens": 25}
    ids, mask = prompts(3, 21, seed=2, padded=10)
    batch = run(model, ids, attention_mask=mask, **sure)
    assert torch.equal(run(model, ids[:1, 10:], **sure)[0, 11:], batch[0, 21:])
    assert torch.equal(run(model, ids[2:], **sure)[0], batch[2])


def test_a_seeded_row_gives_in_a_padded_batch_what_it_gives_alone(model):
    """Three steps: a rounding error grows tenfold a step in this model, so that more would compare noise."""
    ids, mask = prompts(3, 21, seed=2, padded=10)
    settings = {"max_denoising_steps": 3, "max_new_tokens": 25}
    batch = model.generate(ids, attention_mask=mask, seed=[5, 6, 7], **settings)
    assert torch.equal(model.generate(ids[:1, 10:], seed=5, **settings)[0, 11:], batch[0, 21:])
    assert torch.equal(model.generate(ids[[2, 1]], seed=[7, 6], **settings), batch[[2, 1]])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_first_step_logits_of_a_row_do_not_depend_on_its_neighbours(model, backend):
    ids, mask = prompts(2, 21, seed=3, padded=10)
    canvas = torch.randint(VOCAB, (2, CANVAS), generator=torch.Generator().manual_seed(0))
    settings = {"max_denoising_steps": 1, "max_new_tokens": 5, "backend": backend}
    batch, alone = Recorder(logits=True), Recorder(logits=True)
    run(model, ids, attention_mask=mask, decoder_input_ids=canvas, streamer=batch, **settings)
    run(model, ids[:1, 10:], decoder_input_ids=canvas[:1], streamer=alone, **settings)
    # Logits reach 30 / 0.8; sums over another number of keys round differently in float32.
    torch.testing.assert_close(batch.drafts[0][:1], alone.drafts[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize("length", [5, 9, 21])
def test_static_cache_gives_what_the_dynamic_one_gives(model, length):
    """transformers' static cache shows sliding layers one token more than its dynamic one."""
    ids, mask = prompts(2, length, seed=4, padded=3)
    settings = {"attention_mask": mask, "max_new_tokens": 40, "max_denoising_steps": 3}
    dynamic = run(model, ids, cache_implementation="dynamic", **settings)
    assert torch.equal(run(model, ids, cache_implementation="static", **settings), dynamic)
    assert torch.equal(run(model, ids, past_key_values=DynamicCache(), **settings), dynamic)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("change", [{"entropy_bound": 50.0}, {"t_min": 2.0, "t_max": 4.0}, {"max_denoising_steps": 4}])
def test_settings_take_effect_in_every_call(model, cache, change):
    """transformers' static cache keeps the first call's `entropy_bound`."""
    first = run(model, max_new_tokens=20, cache_implementation=cache)
    assert not torch.equal(run(model, max_new_tokens=20, cache_implementation=cache, **change), first)
    assert torch.equal(run(model, max_new_tokens=20, cache_implementation=cache), first)


def test_mask_noise_starts_from_and_renoises_to_the_mask_token(model):
    seen, recorder = [], Recorder()
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        run(model, max_new_tokens=20, noise="mask", mask_token_id=4, streamer=recorder)
    finally:
        hook.remove()
    canvases = [ids for ids in seen if not ids.is_floating_point() and ids.shape == (2, CANVAS)]
    assert bool((canvases[0] == 4).all())
    assert all(bool((state.canvas[~state.accepted] == 4).all()) for state in recorder.states)
    assert any(bool((~state.accepted).any()) for state in recorder.states)


# Configurations


def test_released_generation_config_loads_with_every_value():
    config = DiffusionGenerationConfig.from_pretrained(RELEASED)
    assert {name: getattr(config, name) for name in RELEASED_VALUES} == RELEASED_VALUES
    assert all(RELEASED_DEFAULTS.get(name, value) == value for name, value in RELEASED_VALUES.items())


FULL = {**RELEASED_VALUES, "max_new_tokens": 77, "entropy_bound": 0.25, "t_min": 0.1, "cache_implementation": "static"}
OWN = {"noise": "mask", "mask_token_id": 4, "backend": "reference"}


@pytest.mark.parametrize("fields", [FULL, {"max_length": 9}, {"t_max": 2, "stability_threshold": 0}, OWN])
def test_saved_config_loads_with_equal_values(tmp_path, fields):
    config = DiffusionGenerationConfig(**fields)
    config.save_pretrained(tmp_path)
    loaded = DiffusionGenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in fields} == fields
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert DiffusionGenerationConfig.from_dict(config.to_dict()).to_diff_dict() == config.to_diff_dict()


def test_transformers_class_loads_a_saved_config(tmp_path):
    DiffusionGenerationConfig(**FULL).save_pretrained(tmp_path)
    loaded = DiffusionGemmaGenerationConfig.from_pretrained(tmp_path)
    assert loaded.sampler_config == EntropyBoundSamplerConfig(0.25)
    assert all(getattr(loaded, name) == value for name, value in FULL.items() if name != "entropy_bound")


def test_checkpoint_says_every_diffusion_field(tmp_path, model):
    """vLLM (0.24 and later) takes them from generation_config.json and has no values of its own: it failed on what was saved here."""
    own = copy.deepcopy(model)
    own.generation_config = DiffusionGenerationConfig(max_new_tokens=64, t_max=0.9)
    own.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["sampler_config"] == {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1}
    released = {"max_denoising_steps": 48, "t_min": 0.4, "stability_threshold": 1, "confidence_threshold": 0.005}
    assert saved.items() >= {**released, "t_max": 0.9, "max_new_tokens": 64}.items()
    assert own.generation_config.t_min is None, "the model's own settings stay as they are"


def test_config_travels_with_the_checkpoint(tmp_path, model):
    own = copy.deepcopy(model)
    own.generation_config = DiffusionGenerationConfig(**FULL)
    own.save_pretrained(tmp_path)
    loaded = type(own).from_pretrained(tmp_path).generation_config
    assert isinstance(loaded, DiffusionGenerationConfig)
    assert loaded.to_diff_dict() == {**own.generation_config.to_diff_dict(), "temperature": 1.0}, "1: what it is anyway"


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(max_new_tokens=7, pad_token_id=PAD),
        DiffusionGemmaGenerationConfig(max_new_tokens=7, pad_token_id=PAD, return_dict_in_generate=False),
        DiffusionGenerationConfig(max_new_tokens=7),
    ],
    ids=lambda config: type(config).__name__,
)
def test_every_kind_of_generation_config_is_accepted_and_left_alone(model, config):
    before = copy.deepcopy(config.__dict__)
    assert torch.equal(run(model, generation_config=config, t_max=0.9), run(model, max_new_tokens=7, t_max=0.9))
    with pytest.raises(ValueError, match="t_min"):
        run(model, generation_config=config, t_min=3.0, t_max=2.0)
    with pytest.raises(ValueError, match="num_beams"):
        run(model, generation_config=config, num_beams=2)
    assert config.__dict__ == before


@pytest.mark.parametrize("form", [copy.copy, EntropyBoundSamplerConfig.to_dict, vars], ids=["object", "file", "dict"])
def test_sampler_config_means_entropy_bound(model, form):
    """transformers refuses the dict that its own file holds."""
    sampler = form(EntropyBoundSamplerConfig(9.0))
    config = DiffusionGenerationConfig(sampler_config=sampler)
    expected = run(model, max_new_tokens=20, entropy_bound=9.0)
    assert torch.equal(run(model, max_new_tokens=20, sampler_config=sampler), expected)
    assert torch.equal(run(model, max_new_tokens=20, generation_config=config), expected)
    assert not torch.equal(run(model, max_new_tokens=20), expected)


# Refusals

POSITIVE_INT = (0, -1, True, "5", 1.5, NAN)
POSITIVE = (0, -0.5, True, "0.5", NAN)
BAD = {
    "max_new_tokens": POSITIVE_INT, "max_length": POSITIVE_INT, "max_denoising_steps": POSITIVE_INT,
    "stability_threshold": (-1, True, "1", 1.0, NAN), "entropy_bound": POSITIVE, "confidence_threshold": POSITIVE,
    "joint_threshold": POSITIVE,
    "t_min": POSITIVE, "t_max": POSITIVE, "noise": ("absorbing", True, 1), "backend": ("fast", True, 0),
    "cache_implementation": ("hybrid", "bogus", True), "mask_token_id": (-1, True, "4", 4.0),
    "eos_token_id": ("1", True, 1.5, [1, "6"], [True]), "pad_token_id": ("0", True, 0.0, -1),
    "sampler": ("top", True), "decoding": ("beam", True), "confidence": (0, 1.01, True, "0.9", NAN), "patience": POSITIVE_INT,
    "self_conditioning_steps": POSITIVE_INT,
    "canvas_length": POSITIVE_INT, "num_return_sequences": POSITIVE_INT, "min_new_tokens": (-1, True, "3"), "max_time": POSITIVE,
    "temperature": (-0.5, True, "1", NAN), "do_sample": (0, 1, "no"), "ignore_after_eos": (0, 1, "no"),
    "sampler_config": ({}, {"entropy_bound": -1.0}, {"_cls_name": "Other", "entropy_bound": 0.1}, 0.1),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_value_is_refused_by_name(model, name, value):
    """A boolean is an int to Python, NaN compares False to everything, strings raise TypeError where they are compared."""
    named = "entropy_bound" if isinstance(value, dict) and value.get("entropy_bound") == -1.0 else name
    with pytest.raises(ValueError, match=named):
        run(model, **{name: value})
    with pytest.raises(ValueError, match=named):
        DiffusionGenerationConfig(**{name: value})


def test_t_min_above_t_max_is_refused_and_equal_is_not(model):
    """transformers refuses `t_min == t_max`."""
    with pytest.raises(ValueError, match="`t_min`"):
        run(model, t_min=0.81)  # the default t_max is 0.8
    assert run(model, t_min=0.7, t_max=0.7, max_new_tokens=3).shape[1] == 12


@pytest.mark.parametrize("name", ["foo", "max_new_token", "self_conditioning_logits", "update", "validate", "generation_kwargs"])
def test_unknown_argument_is_refused(model, name):
    """`hasattr` alone takes a method's name for a field."""
    with pytest.raises(ValueError, match=name):
        run(model, **{name: 3})


UNSUPPORTED = {
    "num_beams": 4, "use_cache": False, "output_attentions": True, "output_hidden_states": True, "output_logits": True,
    "guidance_scale": 2.0, "length_penalty": 0.5, "early_stopping": True, "penalty_alpha": 0.6, "forced_bos_token_id": 5,
    "encoder_repetition_penalty": 1.2, "prompt_lookup_num_tokens": 3, "watermarking_config": {},
    "assistant_model": object(), "assistant_tokenizer": object(), "synced_gpus": 3, "prefix_allowed_tokens_fn": print,
    "custom_generate": "x", "use_model_defaults": True, "negative_prompt_ids": torch.ones(2, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_argument_is_refused_by_name(model, name):
    """transformers ignores most of these silently."""
    with pytest.raises(ValueError, match=name):
        run(model, **{name: UNSUPPORTED[name]})


def test_what_replaces_a_refused_argument_is_said_in_few_words(model):
    """A model as an argument was shown with all its layers; lm-format-enforcer hands in `prefix_allowed_tokens_fn`."""
    with pytest.raises(ValueError, match=r"`assistant_model` is a \w+; .*'verified'"):
        run(model, assistant_model=model)
    for name, value, instead in (("prefix_allowed_tokens_fn", print, "`constraint`"), ("custom_generate", "x", "`sampler`")):
        with pytest.raises(ValueError, match=f"`{name}` is .*expected None.*{instead}"):
            run(model, **{name: value})


def test_logits_that_are_normalised_again_are_the_same(model):
    """lighteval asks for it in every call; what is kept of scores are log-probabilities in any case."""
    settings = {"seed": 0, "max_new_tokens": 15, "return_dict_in_generate": True, "output_scores": True}
    got, plain = (run(model, renormalize_logits=value, **settings) for value in (True, False))
    assert torch.equal(got.sequences, plain.sequences) and torch.equal(got.scores.log_probs, plain.scores.log_probs)
    assert got.hidden_states is None and got.attentions is None, "inspect-ai reads the names of every output"


WITH_IMAGE, HOLE = IDS.clone(), MASK.clone()
WITH_IMAGE[1, 3], HOLE[0, -2:] = IMAGE, 0
BAD_PROMPTS = {
    "right padding": ({"attention_mask": HOLE}, "left"), "short mask": ({"attention_mask": MASK[:, 1:]}, "attention_mask"),
    "4-D mask": ({"attention_mask": MASK[:, None, None]}, "attention_mask"),
    "mask as a list": ({"attention_mask": MASK.tolist()}, "attention_mask"), "text": ({"ids": "hello"}, "input_ids"),
    "empty": ({"ids": IDS[:, :0]}, "empty"), "no rows": ({"ids": IDS[:0]}, "empty"), "1-D": ({"ids": IDS[0]}, "input_ids"),
    "floats": ({"ids": IDS.float()}, "input_ids"), "id too large": ({"ids": IDS + VOCAB}, "input_ids"),
    "image tokens without images": ({"ids": WITH_IMAGE}, "pixel_values"), "no prompt": ({"ids": None}, "input_ids"),
    "two prompts": ({"input_ids": IDS}, "input_ids"), "narrow canvas": ({"decoder_input_ids": IDS}, "decoder_input_ids"),
    "canvas of floats": ({"decoder_input_ids": torch.zeros(2, CANVAS)}, "decoder_input_ids"),
    "canvas id too large": ({"decoder_input_ids": torch.full((2, CANVAS), VOCAB)}, "decoder_input_ids"),
    "mask noise without its token": ({"noise": "mask"}, "mask_token_id"),
    "mask token too large": ({"noise": "mask", "mask_token_id": VOCAB}, "mask_token_id"),
    "stop strings without a tokenizer": ({"stop_strings": ["x"]}, "tokenizer"),
    "cache given and asked for": ({"past_key_values": DynamicCache(), "cache_implementation": "static"}, "cache_implementation"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_input_is_refused_by_name(model, name):
    inputs, match = BAD_PROMPTS[name]
    with pytest.raises(ValueError, match=match):
        run(model, **inputs)


def test_prompt_goes_by_either_name(model):
    assert torch.equal(run(model, ids=None, input_ids=IDS, max_new_tokens=10), run(model, max_new_tokens=10))


# Streaming


def test_streamer_gets_every_step_and_every_canvas(model):
    recorder = Recorder()
    output = run(model, IDS[:1], max_new_tokens=25, streamer=recorder, return_dict_in_generate=True)
    assert len(recorder.drafts) == len(recorder.states) == int(output.denoising_steps) == 9
    assert all(isinstance(state, CanvasState) for state in recorder.states)
    assert all(torch.equal(draft, state.argmax) for draft, state in zip(recorder.drafts, recorder.states, strict=True))
    assert torch.equal(recorder.puts[0], IDS[:1]) and [tuple(put.shape) for put in recorder.puts[1:]] == [(10,), (10,), (5,)]
    assert torch.equal(torch.cat((recorder.puts[0][0], *recorder.puts[1:])), output.sequences[0]) and recorder.ends == 1


def test_streamer_gets_several_rows_side_by_side(model):
    recorder = Recorder()
    output = run(model, max_new_tokens=15, streamer=recorder, return_dict_in_generate=True)
    assert torch.equal(torch.cat(recorder.puts, dim=1), output.sequences)


@pytest.fixture(scope="module")
def text():
    """Tokenizer, a model of its size, a prompt, and settings that generate only printable text and `<turn|>`, its end."""
    from jobs.tokenizer import SPECIAL_IDS, build_tokenizer

    tokenizer, end = build_tokenizer(), SPECIAL_IDS["<turn|>"]
    printable = [i for i in range(128, 640) if (word := tokenizer.decode([i])).isascii() and word.isprintable()]
    own = small_model(seed=2, vocab_size=640)
    own.generation_config = DiffusionGenerationConfig(pad_token_id=0, eos_token_id=[end, 1], max_denoising_steps=3)
    return tokenizer, own, tokenizer("<|turn>user\nSort 3, 1<turn|>\n", return_tensors="pt")["input_ids"], printable, end


@pytest.mark.parametrize(("with_end", "count"), [(False, 10), (False, 25), (True, 90)])
@pytest.mark.parametrize("kind", [TextStreamer, TextIteratorStreamer, TextDiffusionStreamer])
def test_streamed_text_is_the_output_text(text, kind, with_end, count, capsys):
    """Neither what is trimmed nor what follows the end may be shown."""
    tokenizer, own, ids, printable, end = text
    settings = {"max_new_tokens": count, "seed": 4}
    if with_end:
        printable = [*printable[::29], end]  # few ids, so that the end comes within nine canvases
    allow = LogitsProcessorList([Allow(printable)])
    streamer = kind(tokenizer, skip_prompt=True, **({"timeout": 60} if kind is TextIteratorStreamer else {}))
    if kind is TextIteratorStreamer:
        thread = threading.Thread(target=lambda: run(own, ids, streamer=streamer, logits_processor=allow, **settings))
        thread.start()
        streamed = "".join(streamer)
        thread.join()
    else:
        run(own, ids, streamer=streamer, logits_processor=allow, **settings)
        streamed = capsys.readouterr().out
    drafts = re.findall(r"\x1b7\x1b\[33m(.*?)\x1b\[0m\x1b8\x1b\[J", streamed, flags=re.DOTALL)
    streamed = re.sub(r"\x1b7\x1b\[33m.*?\x1b\[0m\x1b8\x1b\[J", "", streamed, flags=re.DOTALL)
    output = run(own, ids, logits_processor=allow, return_dict_in_generate=True, **settings)
    new = output.sequences[0, ids.shape[1] :]
    assert streamed.removesuffix("\n") == tokenizer.decode(new)
    assert new.shape[0] == count if not with_end else new[-1] == end and new.shape[0] < count
    assert len(drafts) == (int(output.denoising_steps) if kind is TextDiffusionStreamer else 0)
