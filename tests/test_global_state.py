"""What torch keeps for the whole process does not reach into the arithmetic: default dtype, default device, grad and inference mode,
deterministic mode, denormals. Autocast does, since it is asked for: the linear layers, the head among them, compute in its dtype, whichever
way a canvas is denoised.
"""

import ast
import contextlib
import functools
from pathlib import Path

import pytest
import torch
from small_models import CANVAS, PAD, prompts, small_model
from tiny import build_oracle, image_inputs, needs_flex_attention, ours, same_weights
from transformers import StaticCache

from generation import CanvasStreamer
from generation.vocabulary.sums import _draw
from modeling_diffusiongemma import BlockDiffusionCollator, Rollout, block_diffusion_loss

SETTINGS = {
    "max_new_tokens": CANVAS + 3,
    "generation_config": {"max_denoising_steps": 4},
    "pad_token_id": PAD,
    "eos_token_id": 1,
    "seed": 5,
}
SCORED = {"return_dict_in_generate": True, "output_scores": True}


@contextlib.contextmanager
def set_for(setter, value, default):
    setter(value)
    try:
        yield
    finally:
        setter(default)


def default_dtype(dtype):
    return set_for(torch.set_default_dtype, dtype, torch.float32)


STATES = {
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default device": lambda: set_for(torch.set_default_device, "meta", None),
    "inference mode": torch.inference_mode,
    "deterministic": lambda: set_for(torch.use_deterministic_algorithms, True, False),
    "denormals flushed": lambda: set_for(torch.set_flush_denormal, True, False),
}  # fmt: skip


# The core


def given(make, *arguments, **settings):
    """What a caller hands in, made on the CPU whatever torch's default device is."""
    with torch.device("cpu"):
        return make(*arguments, **settings)


class Steps(CanvasStreamer):
    """A streamer that keeps what it is handed."""

    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(value)

    def put_state(self, state):
        self.seen.append(state.entropy)

    def end(self):
        pass


def passes(model):
    """Prefill at once and in chunks, and canvas passes with what they say of the canvas, over several caches."""
    ids, mask = given(prompts, 2, 13, padded=3)
    canvas = given(prompts, 2, CANVAS, seed=1)[0]
    found = []
    for cache in (None, given(StaticCache, model.config.text_config, max_cache_len=32)):
        chunk_length = None if torch.is_grad_enabled() else 5
        prefilled = model.prefill(ids, mask, cache=cache, chunk_length=chunk_length)
        real = torch.cat((mask, torch.ones_like(canvas)), dim=1)
        logits = model.compute_logits(model.denoise(canvas, prefilled.cache, attention_mask=real).last_hidden_state)
        with torch.no_grad():
            view = model.prepare_canvas(prefilled.cache, tuple(canvas.shape), real)
            again = model.denoise(canvas, soft_embeds=model.soft_embed(logits), view=view).last_hidden_state
        found += [prefilled.last_hidden_state, logits, again]
    return [*found, model(ids, mask, decoder_input_ids=canvas, self_conditioning_logits=logits).logits]


def generating(*, length=7, rows=2, **settings):
    """A call of `generate`: the tokens of a batch with padding, or what it returns besides."""

    def run(model):
        ids, mask = given(prompts, rows, length, padded=2 if rows > 1 else 0)
        steps = Steps() if settings.get("decoding") is None and settings.get("backend") is None else None
        own = SETTINGS | ({"generator": torch.Generator(model.device).manual_seed(3), "seed": None} if "backend" in settings else {})
        output = model.generate(ids, attention_mask=mask, streamer=steps, **own, **SCORED, **settings)
        scores = [] if output.scores is None else list(output.scores)
        logits = [] if output.logits is None else [output.logits]
        return [output.sequences, output.tokens_per_forward, *scores, *logits, *([] if steps is None else steps.seen)]

    return run


def training(model):
    """The loss, its gradients where there are any, and the response's scores."""
    batch = BlockDiffusionCollator(pad_token_id=PAD)([([5, 6, 7], [8] * 4 + [9] * 9), ([11, 12], [13, 14])])
    found = list(batch.values())
    torch.manual_seed(0)
    losses = block_diffusion_loss(model, **batch)
    found += [losses.diffusion, losses.causal, losses.logits]
    if losses.diffusion.requires_grad:
        wanted = [p for name, p in model.named_parameters() if "encoder." not in name]
        with torch.autocast("cpu", enabled=False):  # a backward pass belongs outside
            found += torch.autograd.grad(losses.diffusion + losses.causal, wanted)
    torch.manual_seed(1)
    for how in ({"samples": 3}, {"mode": "autoregressive"}):
        found += [value for value in model.score(**batch, **how) if value is not None]
    return found


def rolling_out(model):
    def draw(count):
        return BlockDiffusionCollator(pad_token_id=PAD)([([5, 6, 7], [8, 9])] * count)

    torch.manual_seed(0)
    rollout, found = Rollout(model, rows=2, max_steps=2), []
    for _ in range(4):
        inputs, noised, soft_embeds = rollout.batch(draw)
        losses = block_diffusion_loss(model, **inputs, noised=noised, soft_embeds=soft_embeds)
        rollout.advance(losses.logits)
        found += [noised, soft_embeds, losses.diffusion]
    return found


NARROWING = {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "suppress_tokens": [7, 8], "min_new_tokens": 4}
CONTEXT = {
    "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[17], [18, 19]], "suppress_tokens": [7, 8],
    "sequence_bias": [[[20], 3.0], [[21, 22], 2.0]], "min_new_tokens": 4,
}  # fmt: skip
CORE = {
    "passes": passes,
    "training": training,
    "rollout": rolling_out,
    "streamed": generating(),
    "one row": generating(rows=1),
    "wide canvas": generating(canvas_length=140),
    "greedy": generating(do_sample=False),
    "dense": generating(output_logits=True),
    "reference": generating(backend="reference"),
    "static cache": generating(cache_implementation="static"),
    "filters": generating(**NARROWING),
    "dense filters": generating(**NARROWING, output_logits=True),
    "processors": generating(**CONTEXT),
    "warpers": generating(typical_p=0.9, epsilon_cutoff=0.001, eta_cutoff=0.003),
    "mask noise": generating(noise="mask", mask_token_id=4),
    "copies": generating(num_return_sequences=2),
    "confidence": generating(sampler="confidence"),
    "fixed steps": generating(sampler="fixed_steps"),
    "predictor corrector": generating(sampler="predictor_corrector"),
    "autoregressive": generating(decoding="autoregressive"),
    "verified": generating(decoding="verified", do_sample=False, rows=1),
}  # fmt: skip


@functools.cache
def expected(name, gradients=True):
    with torch.set_grad_enabled(gradients):
        return CORE[name](small_model())


@pytest.fixture(params=STATES)
def state(request):
    return STATES[request.param]


@pytest.mark.parametrize("name", CORE)
def test_results_are_those_of_an_untouched_torch(name, state):
    """To the last bit, values, dtypes and devices. A model made while torch was untouched, and what it keeps between calls (rotary
    frequencies), is all that is given."""
    own = small_model()
    with state():
        gradients = torch.is_grad_enabled()
    without = expected(name, gradients)
    with state():
        got = CORE[name](own)
    assert len(got) == len(without)
    for one, other in zip(got, without, strict=True):
        assert (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape)
        assert torch.equal(one, other), (one.double() - other.double()).abs().max()


def test_images_are_those_of_an_untouched_torch(state):
    ids, mask, pixels = image_inputs("one_row_of_two_padded")
    without = ours().prefill(ids, mask, **pixels).last_hidden_state
    own = same_weights(build_oracle())
    with state():
        got = own.prefill(ids, mask, **pixels).last_hidden_state
    assert got.dtype == torch.float32 and torch.equal(got, without)


@pytest.mark.parametrize("attention", ["eager", pytest.param("flex_attention", marks=needs_flex_attention)])
def test_masks_are_those_of_an_untouched_torch(attention, state):
    """Not to the last bit: torch traces flex_attention anew in each state."""
    ids, mask = prompts(2, 13, padded=3)
    canvas, found = prompts(2, CANVAS, seed=1)[0], []
    for around in (contextlib.nullcontext, state):
        own = small_model()
        own.set_attn_implementation(attention)
        with around(), torch.no_grad():
            found.append(own(ids, mask, decoder_input_ids=canvas).logits)
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


def test_a_device_given_as_a_context_changes_nothing():
    without = expected("streamed")
    own = small_model()
    with torch.device("meta"):
        got = CORE["streamed"](own)
    assert all(torch.equal(one, other) for one, other in zip(got, without, strict=True))


def test_flushed_denormals_draw_no_id_without_mass():
    exponentials = torch.tensor([[0.0, 0.0, 2.0]]) * torch.finfo(torch.float32).tiny
    mass = exponentials.sum(dim=-1)
    with set_for(torch.set_flush_denormal, True, False):
        drawn = _draw(exponentials, mass, mass, torch.tensor([[0.0, 0.999]]), 10, torch.tensor([5]))
    assert drawn.tolist() == [12]


# Which tensors are made

FLOATING = {"rand", "zeros", "ones", "full", "empty", "tensor", "linspace", "eye", "randn"}
MADE = FLOATING | {"arange", "randint", "randperm"}


@pytest.mark.parametrize("package", ["generation", "modeling_diffusiongemma"])
def test_every_tensor_that_is_made_says_its_dtype_and_device(package):
    """Parameters and buffers are made as the caller's context says: by it transformers makes a model in another dtype, or on `meta`."""
    silent = []
    for path in sorted((Path(__file__).parents[1] / package).rglob("*.py")):
        tree = ast.parse(path.read_text())
        kept = {id(inner) for call in ast.walk(tree) if isinstance(call, ast.Call) and _name(call) in ("Parameter", "Buffer")
                for inner in ast.walk(call)}  # fmt: skip
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or id(call) in kept or not ast.unparse(call.func).startswith("torch."):
                continue
            named = {keyword.arg for keyword in call.keywords}
            if None in named:  # `**made`
                continue
            if (_name(call) in MADE and "device" not in named) or (_name(call) in FLOATING and "dtype" not in named):
                silent.append(f"{path.name}:{call.lineno}: {ast.unparse(call)}")
    assert silent == []


def _name(call):
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_asked_for_precision_of_float32_is_taken(precision):
    """Which changes the products on some machines; nothing fails, and the first canvas pass says about the same."""
    with set_for(torch.set_float32_matmul_precision, precision, "highest"):
        got = passes(small_model())[1]
    torch.testing.assert_close(got, expected("passes")[1], atol=0.5, rtol=0.05)


# Autocast

HALVES = (torch.bfloat16, torch.float16)
AUTOCAST = [(dtype, half) for dtype in (torch.float32, *HALVES) for half in HALVES]
RUN_UNDER_AUTOCAST = (
    "passes", "training", "rollout", "streamed", "wide canvas", "dense", "static cache", "filters", "predictor corrector", "autoregressive",
    "verified",
)  # fmt: skip


@pytest.mark.parametrize(("dtype", "half"), AUTOCAST)
def test_every_way_runs_under_autocast(dtype, half):
    """Before, the walk over the vocabulary failed where the two were different 16-bit types, and a static cache under any."""
    own = small_model().to(dtype)
    for name in RUN_UNDER_AUTOCAST:
        with torch.no_grad(), torch.autocast("cpu", dtype=half):
            found = CORE[name](own)
        assert all(bool(tensor.isfinite().all()) for tensor in found), name


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("dtype", "half"), AUTOCAST)
def test_walk_and_dense_way_agree_under_autocast(dtype, half, rows):
    """Both compute the head in autocast's dtype, and say of a canvas what float32 says, to what 16 bits can tell: entropies in nats."""
    settings = {"max_denoising_steps": 1, "max_new_tokens": CANVAS, "eos_token_id": []}
    found = []
    for arguments in ({}, {"output_logits": True}):
        own = small_model().to(dtype)
        ids, mask = prompts(rows, 9)
        with torch.autocast("cpu", dtype=half):
            output = own.generate(ids, attention_mask=mask, do_sample=False, **SETTINGS | settings, **SCORED, **arguments)
        found.append(output)
    whole = small_model().generate(ids, attention_mask=mask, do_sample=False, **SETTINGS | settings, **SCORED)
    walked, dense = found
    assert torch.equal(walked.sequences, dense.sequences)
    torch.testing.assert_close(walked.scores.entropy, dense.scores.entropy, atol=1e-3, rtol=0)
    assert float((walked.scores.entropy - whole.scores.entropy).abs().mean()) < 0.3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("half", HALVES)
def test_autocast_trains_every_weight(half, causal):
    """Autocast keeps the weights it has cast: those of a first pass without gradient must not serve the second."""
    own = small_model(initializer_range=0.05).train()  # in which rounding stays small; larger weights would turn gradients any way
    batch = BlockDiffusionCollator(pad_token_id=PAD)([([5, 6, 7], [8] * 4 + [9] * 9), ([11, 12], [13, 14])])
    grads = []
    for enabled in (False, True):
        own.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=half, enabled=enabled):
            losses = block_diffusion_loss(own, **batch, causal=causal, self_conditioning_mask=torch.tensor([True, True]))
        sum(loss for loss in (losses.diffusion, losses.causal) if loss is not None).backward()
        grads.append({name: p.grad.clone() for name, p in own.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and "model.decoder.self_conditioning.up_proj.weight" in grads[0]
    for name, grad in grads[0].items():  # 16 bits turn them, but not away
        assert float(torch.nn.functional.cosine_similarity(grads[1][name].flatten(), grad.flatten(), dim=0)) > 0.9, name
