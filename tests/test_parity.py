"""Ours against transformers' own model (the oracle) with the same weights, and against itself where the oracle is wrong.

The tolerance is `tiny.TOLERANCE`, 1e-4 in float32, unless a test states another.
"""

import pytest
import tiny
import torch
from tiny import CANVAS, LAYERS, alone, caches, close, needs_flex_attention, ours, pad_rows, pair, rows_of, same_weights, tokens
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, StaticCache

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM
from modeling_diffusiongemma.layers.layers import RotaryPositions

LENGTHS = (3, 7, 8, 9, 21)  # shorter than, equal to and longer than the window of 8
EXPERTS = ("eager", "grouped_mm", "batched_mm", "dense_mm")
LONG_ROWS = (4, 21, 9)
STATIC_SIZES = ((1,), (3,), (7,), (8,), (9,), (33,), (3, 5, 5, 5, 5), (21, 10, 10), (6, 1, 1, 1, 1), (8, 1, 9), (1, 30))


pytestmark = pytest.mark.usefixtures("without_gradients")


def test_logits_are_far_from_uniform():
    """Guards the other tests: with the default initialisation every model gives equal logits, whatever its masks."""
    logits = ours()(tokens(2, 9), decoder_input_ids=tokens(2, CANVAS, 1)).logits
    assert logits.std() > 1
    assert torch.distributions.Categorical(logits=logits).entropy().mean() < 0.75 * torch.log(torch.tensor(float(tiny.VOCAB)))
    other = ours()(tokens(2, 9, 2), decoder_input_ids=tokens(2, CANVAS, 1)).logits
    assert (logits - other).abs().mean() > 0.1


def test_layer_scalars_of_the_passes_differ():
    """Guards the other tests: with equal scalars a pass that takes the other's would not show."""
    scalars = [buffer.item() for name, buffer in ours().named_buffers() if name.endswith("layer_scalar")]
    assert len(set(scalars)) == len(scalars) == 2 * len(LAYERS)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("length", LENGTHS)
def test_forward_equals_the_oracle(length, batch_size, attention):
    oracle, model = pair(attention)
    inputs = {"input_ids": tokens(batch_size, length), "decoder_input_ids": tokens(batch_size, CANVAS, 1)}
    expected = oracle(attention_mask=torch.ones(batch_size, length), **inputs)
    for given in ({}, {"attention_mask": torch.ones(batch_size, length)}):
        got = model(**given, **inputs)
        close(got.logits, expected.logits)
        close(got.encoder_last_hidden_state, expected.encoder_last_hidden_state)


@needs_flex_attention
@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(21, 9), (14,), (8,)])
def test_flex_attention_equals_eager(lengths):
    """Few cases, since it is compiled: a left-padded batch longer than the window; passes of 24 and of 8 keys, which AVX2 got wrong."""
    ids, mask = pad_rows(rows_of(lengths), "left")
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": tokens(len(lengths), CANVAS, 1)}
    got, expected = ours("flex_attention")(**inputs), ours("eager")(**inputs)
    close(got.logits, expected.logits)
    close(got.encoder_last_hidden_state[mask.bool()], expected.encoder_last_hidden_state[mask.bool()])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [(1, 6, 4), LONG_ROWS, (8, 40, 7)])
def test_padded_rows_equal_the_rows_alone(lengths, side, attention):
    oracle, model = pair(attention)
    rows, canvas = rows_of(lengths), tokens(3, CANVAS, 1)
    ids, mask = pad_rows(rows, side, multiple=3)
    got = model(ids, mask, decoder_input_ids=canvas)
    close(got.logits, alone(model, rows, canvas))
    for index, row in enumerate(rows):
        expected = oracle(row[None], torch.ones(1, len(row)), decoder_input_ids=canvas[index : index + 1])
        close(got.logits[index], expected.logits[0])
        close(got.encoder_last_hidden_state[index][mask[index].bool()], expected.encoder_last_hidden_state[0])


def test_tokens_behind_padding_do_not_matter():
    """A padding position's id, -100 or a real word, must never reach a real one; NaN through a fully masked row neither.

    1e-5: padding goes through the experts, too, and on some CPUs a product's last bit depends on its row.
    """
    for side in ("left", "right"):
        ids, mask = pad_rows(rows_of(LONG_ROWS), side)
        canvas = tokens(3, CANVAS, 1)
        first = ours()(ids, mask, decoder_input_ids=canvas)
        second = ours()(torch.where(mask.bool(), ids, 55), mask, decoder_input_ids=canvas)
        close(first.logits, second.logits, 1e-5)
        assert first.encoder_last_hidden_state.isfinite().all()


@pytest.mark.parametrize("lengths", [(1, 6, 4), LONG_ROWS])
def test_left_padded_batch_equals_the_oracle(lengths):
    """In sdpa alone: in eager the oracle raises TypeError. Its positions count padding, which rotary attention does not see."""
    oracle, model = pair("sdpa")
    ids, mask = pad_rows(rows_of(lengths), "left")
    cache = oracle_cache = None
    for turn in range(3):
        canvas = tokens(len(lengths), CANVAS, 10 + turn)
        whole = torch.cat((mask, torch.ones_like(canvas)), dim=1)
        states, denoised, oracle_cache = tiny.oracle_generate_path(oracle, ids, canvas, mask, oracle_cache)
        given = (None, whole)[turn % 2]  # both ways of saying it
        got = model(ids, mask, past_key_values=cache, decoder_input_ids=canvas, decoder_attention_mask=given)
        close(got.logits, denoised.logits)
        real = mask[:, -ids.shape[1] :].bool()
        close(got.encoder_last_hidden_state[real], states.last_hidden_state[real])
        cache, ids, mask = got.past_key_values, canvas, whole


@pytest.mark.parametrize("kind", ["windowed", "static"])
def test_right_padding_is_refused_where_the_cache_forgets(kind):
    """A windowed cache keeps the last slots, which are padding: the row would lose its prompt without a word."""
    model = ours()
    ids, mask = pad_rows(rows_of(LONG_ROWS), "right")
    cache = caches(model)[kind]
    with pytest.raises(ValueError, match="pads 21 tokens on the right"):
        model(ids, mask, past_key_values=cache, decoder_input_ids=tokens(3, CANVAS, 1))
    assert int(cache.get_seq_length()) == 0


def test_right_padding_makes_a_cache_that_keeps_everything():
    ids, mask = pad_rows(rows_of(LONG_ROWS), "right")
    cache = ours().prefill(ids, mask).past_key_values
    assert [layer.keys.shape[-2] for layer in cache.layers] == [21] * len(LAYERS)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("length", [3, 9])
def test_canvases_through_the_cache_equal_the_oracle(length, attention):
    """Prefill, denoise, commit, four times, past several windows; then a second turn with the cache handed back."""
    oracle, model = pair(attention)
    prompt, oracle_cache, cache = tokens(2, length), None, None
    so_far = prompt
    for turn in range(6):
        canvas = tokens(2, CANVAS, 10 + turn)
        states, denoised, oracle_cache = tiny.oracle_generate_path(oracle, prompt, canvas, cache=oracle_cache)
        got = model(prompt, past_key_values=cache, decoder_input_ids=canvas)
        close(got.logits, denoised.logits)
        close(got.encoder_last_hidden_state, states.last_hidden_state)
        close(got.logits, model(so_far, decoder_input_ids=canvas).logits)  # cached equals not cached
        cache = got.past_key_values
        assert int(cache.get_seq_length()) == so_far.shape[1] == oracle_cache.get_seq_length()
        prompt = canvas if turn != 3 else torch.cat((canvas, tokens(2, 13, 20)), dim=1)
        so_far = torch.cat((so_far, prompt), dim=1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_canvases_through_the_cache_equal_the_rows_alone(side):
    model, rows = ours(), rows_of(LONG_ROWS)
    ids, mask = pad_rows(rows, side)
    cache = None
    for turn in range(4):
        canvas = tokens(3, CANVAS, 10 + turn)
        got = model(ids, mask, past_key_values=cache, decoder_input_ids=canvas)
        close(got.logits, alone(model, rows, canvas))
        cache, ids, mask = got.past_key_values, canvas, torch.cat((mask, torch.ones_like(canvas)), dim=1)
        rows = [torch.cat(pieces) for pieces in zip(rows, canvas, strict=True)]


@pytest.mark.parametrize("kind", ["windowed", "keep_all", "static"])
def test_denoising_leaves_the_cache_alone(kind):
    model = ours()
    cache = caches(model)[kind]
    model.prefill(tokens(2, 13), past_key_values=cache)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    first = model.denoise(tokens(2, CANVAS, 1), cache).last_hidden_state
    close(model.denoise(tokens(2, CANVAS, 1), cache).last_hidden_state, first, 0)
    assert int(cache.get_seq_length()) == 13
    for (keys, values), layer in zip(before, cache.layers, strict=True):
        close(layer.keys, keys, 0)
        close(layer.values, values, 0)


@pytest.mark.parametrize("rows", [None, (True, True, True), (True, False, True), (False, False, False)])
def test_self_conditioning_equals_the_oracle(rows):
    """None: on without a mask. The scale of the logits matters: softmax, not the logits, is embedded."""
    oracle, model = pair()
    inputs = {
        "input_ids": tokens(3, 9), "decoder_input_ids": tokens(3, CANVAS, 1), "attention_mask": torch.ones(3, 9),
        "self_conditioning_logits": 4 * torch.randn(3, CANVAS, tiny.VOCAB, generator=torch.Generator().manual_seed(2)),
        "self_conditioning_mask": None if rows is None else torch.tensor(rows),
    }  # fmt: skip
    got = model(**inputs)
    close(got.logits, oracle(**inputs).logits)
    off = model(inputs["input_ids"], decoder_input_ids=inputs["decoder_input_ids"]).logits
    for index, on in enumerate(rows or (True,) * 3):
        assert ((got.logits[index] - off[index]).abs().mean() > 0.05) == on


def test_default_canvas_is_uniform_noise_of_the_configs_length():
    torch.manual_seed(5)
    got = ours()(tokens(2, 9)).logits
    torch.manual_seed(5)
    canvas = torch.randint(tiny.VOCAB, (2, CANVAS))
    close(got, ours()(tokens(2, 9), decoder_input_ids=canvas).logits, 0)


def test_canvas_of_any_length_equals_the_oracle():
    for length in (1, CANVAS + 7):
        expected = pair()[0](tokens(2, 9), torch.ones(2, 9), decoder_input_ids=tokens(2, length, 1)).logits
        close(ours()(tokens(2, 9), decoder_input_ids=tokens(2, length, 1)).logits, expected)


@pytest.mark.parametrize("kind", tiny.IMAGE_KINDS)
def test_images_equal_the_oracles_generate_path(kind):
    """The oracle's plain forward throws its image-aware mask away, so that an image's tokens attend causally there."""
    oracle, model = pair()
    ids, mask, images = tiny.image_inputs(kind)
    types, canvas = (ids == tiny.IMAGE).long(), tokens(ids.shape[0], CANVAS, 1)
    states, denoised, _ = tiny.oracle_generate_path(oracle, ids, canvas, mask, mm_token_type_ids=types, **images)
    causal = model.prefill(ids, mask, **images, mm_token_type_ids=torch.zeros_like(ids)).last_hidden_state
    for given in (types, 2 * types, None):  # 2, a video's, was refused as a mask of other numbers than 0 and 1
        got = model(ids, mask, decoder_input_ids=canvas, mm_token_type_ids=given, **images)
        close(got.logits, denoised.logits)
        close(got.encoder_last_hidden_state[mask.bool()], states.last_hidden_state[mask.bool()])
        assert (got.encoder_last_hidden_state - causal)[mask.bool()].abs().max() > 0.1  # the mask does something


@pytest.mark.parametrize("kind", ["windowed", "keep_all", "static"])
def test_an_image_goes_on_through_the_cache(kind):
    """Text, then an image in the second prefill, then a commit: as one prefill of everything."""
    model = ours("eager")
    ids, _, images = tiny.image_inputs("small")
    canvas, cache = tokens(1, CANVAS, 1), caches(model)[kind]
    model.prefill(tokens(1, 11, 4), past_key_values=cache)
    model.prefill(ids, past_key_values=cache, **images)
    got = model(tokens(1, CANVAS, 6), past_key_values=cache, decoder_input_ids=canvas).logits
    whole = torch.cat((tokens(1, 11, 4), ids, tokens(1, CANVAS, 6)), dim=1)
    close(got, model(whole, decoder_input_ids=canvas, **images).logits)


@pytest.mark.parametrize(
    ("count", "given", "match"),
    [(3, True, "3 image tokens"), (5, True, "5 image tokens"), (0, True, "0 image tokens"), (4, False, "pixel_values")],
)
def test_images_that_do_not_fit_the_tokens_are_refused(count, given, match):
    model = ours()
    ids = torch.cat((tokens(1, 5), torch.full((1, count), tiny.IMAGE), tokens(1, 3)), dim=1)
    pixels, places = tiny.patches(4, 4)
    images = {"pixel_values": pixels, "image_position_ids": places} if given else {}
    cache = DynamicCache(config=model.config.text_config)
    with pytest.raises(ValueError, match=match):
        model(ids, past_key_values=cache, decoder_input_ids=tokens(1, CANVAS), **images)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("sizes", STATIC_SIZES)
def test_static_cache_equals_dynamic_cache(sizes, attention):
    """`sizes`: the prompt and the commits after it. The oracle's static cache is wrong from the window on, by one token."""
    oracle, model = pair(attention)
    static, dynamic = caches(model, sum(sizes) + 2)["static"], caches(model)["windowed"]
    for step, size in enumerate(sizes):
        inputs = {"input_ids": tokens(2, size, step), "decoder_input_ids": tokens(2, CANVAS, 10 + step)}
        got = model(past_key_values=static, **inputs)
        expected = tiny.oracle_generate_path(oracle, inputs["input_ids"], inputs["decoder_input_ids"], cache=dynamic)
        close(got.logits, expected[1].logits)
        close(got.encoder_last_hidden_state, expected[0].last_hidden_state)


@pytest.mark.parametrize("lengths", [(1, 6, 4), LONG_ROWS])
def test_left_padded_static_cache_equals_the_rows_alone(lengths):
    model, rows = ours(), rows_of(lengths)
    ids, mask = pad_rows(rows, "left")
    cache = StaticCache(model.config.text_config, max_cache_len=64)
    for turn in range(3):
        canvas = tokens(3, CANVAS, 10 + turn)
        close(model(ids, mask, past_key_values=cache, decoder_input_ids=canvas).logits, alone(model, rows, canvas))
        ids, mask = canvas, torch.cat((mask, torch.ones_like(canvas)), dim=1)
        rows = [torch.cat(pieces) for pieces in zip(rows, canvas, strict=True)]


@pytest.mark.parametrize(
    "text",
    [
        {"top_k_experts": 1}, {"top_k_experts": 4}, {"num_experts": 1, "top_k_experts": 1}, {"sliding_window": 2},
        {"use_bidirectional_attention": None}, {"num_global_key_value_heads": None}, {"layer_types": ["full_attention"] * 4},
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
        {"final_logit_softcapping": 3.0, "hidden_activation": "silu", "rms_norm_eps": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_other_configs_equal_the_oracle(text):
    """No value of the released config is taken for granted. With an image, which without "vision" is causal."""
    oracle = tiny.build_oracle(**text)
    model = same_weights(oracle)
    ids, mask, images = tiny.image_inputs("one_row_of_two")
    canvas, types = tokens(2, CANVAS, 1), (ids == tiny.IMAGE).long()
    states, denoised, cache = tiny.oracle_generate_path(oracle, ids, canvas, mask, mm_token_type_ids=types, **images)
    got = model(ids, decoder_input_ids=canvas, **images)
    close(got.logits, denoised.logits)
    close(got.encoder_last_hidden_state, states.last_hidden_state)
    denoised = tiny.oracle_generate_path(oracle, canvas, ids[:, -CANVAS:], cache=cache)[1]
    close(model(canvas, past_key_values=got.past_key_values, decoder_input_ids=ids[:, -CANVAS:]).logits, denoised.logits)


@pytest.mark.parametrize("experts", EXPERTS)
def test_experts_implementations_are_equal(experts):
    oracle = pair()[0]
    inputs = {"input_ids": tokens(2, 9), "decoder_input_ids": tokens(2, CANVAS, 1), "attention_mask": torch.ones(2, 9)}
    close(same_weights(oracle, experts=experts)(**inputs).logits, oracle(**inputs).logits)


@pytest.mark.parametrize("experts", EXPERTS)
def test_an_expert_without_tokens_gets_no_gradient(experts):
    """An empty group must be neither an error nor NaN, and must not shift the groups behind it."""
    module = same_weights(pair()[0], experts=experts).model.decoder.layers[0].experts
    generator = torch.Generator().manual_seed(3)
    hidden, weights = torch.randn(7, 32, generator=generator), torch.rand(7, 2, generator=generator)
    chosen = torch.tensor([[0, 3], [3, 0], [0, 2], [2, 3], [3, 2], [0, 3], [3, 0]])  # never expert 1
    expected = torch.zeros(7, 32)
    for token, slot in torch.cartesian_prod(torch.arange(7), torch.arange(2)):
        expert = chosen[token, slot]
        gate, up = (module.gate_up_proj[expert] @ hidden[token]).chunk(2)
        activated = torch.nn.functional.gelu(gate, approximate="tanh") * up
        expected[token] += weights[token, slot] * module.down_proj[expert] @ activated
    with torch.enable_grad():
        output = module(hidden, chosen, weights)
        output.square().sum().backward()
    close(output.detach(), expected)
    for parameter in (module.gate_up_proj, module.down_proj):
        assert parameter.grad.isfinite().all()
        assert [bool(parameter.grad[expert].any()) for expert in range(4)] == [True, False, True, True]


def test_hidden_states_and_attentions_equal_the_oracle():
    oracle, model = pair("eager")
    inputs = {"input_ids": tokens(2, 13), "decoder_input_ids": tokens(2, CANVAS, 1), "attention_mask": torch.ones(2, 13)}
    got = model(**inputs, output_hidden_states=True, output_attentions=True)
    expected = oracle(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(got.hidden_states) == len(expected.hidden_states) == len(LAYERS) + 1
    assert len(got.attentions) == len(expected.attentions) == len(LAYERS)
    for one, other in zip(got.hidden_states + got.attentions, expected.hidden_states + expected.attentions, strict=True):
        close(one, other)
    for layer_type, weights in zip(LAYERS, got.attentions, strict=True):
        assert weights.shape == (2, 4, CANVAS, (tiny.WINDOW - 1 if layer_type == "sliding_attention" else 13) + CANVAS)
        close(weights.sum(dim=-1), torch.ones(2, 4, CANVAS))
    plain = model(**inputs)
    assert plain.hidden_states is None and plain.attentions is None


def test_prefill_gives_hidden_states_and_attentions_on_request():
    output = ours("eager").prefill(tokens(2, 13), output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [(2, 13, 32)] * (len(LAYERS) + 1)
    close(output.hidden_states[-1], output.last_hidden_state, 0)
    for layer_type, weights in zip(LAYERS, output.attentions, strict=True):
        close(weights.sum(dim=-1), torch.ones(2, 4, 13))
        seen = (weights > 0).sum(dim=-1)[0, 0].tolist()
        assert seen == [min(i + 1, tiny.WINDOW if layer_type == "sliding_attention" else 13) for i in range(13)]


def test_tuples_hold_what_the_output_holds():
    inputs = {"input_ids": tokens(1, 5), "decoder_input_ids": tokens(1, CANVAS, 1)}
    for model in (ours(), ours().model):
        named, unnamed = model(**inputs), model(**inputs, return_dict=False)
        assert isinstance(unnamed, tuple) and len(unnamed) == len(named.to_tuple())
        close(unnamed[0], named[0])


HALF_INPUTS = {"input_ids": tokens(3, 21), "decoder_input_ids": tokens(3, CANVAS, 1), "attention_mask": torch.ones(3, 21)}


@pytest.fixture(scope="module", params=[(torch.bfloat16, 0.35), (torch.float16, 0.05)], ids=("bfloat16", "float16"))
def half(request, tmp_path_factory):
    """For seven random models: ours in half precision, transformers' logits in float32 and in half precision; and a tolerance.

    Loaded, since `.to(dtype)` rounds the oracle's rotary frequencies. Seven, since in one model which expert a token rounds to is luck:
    its error is anywhere from a half to four times that of another way to round.
    """
    dtype, tolerance = request.param
    models = []
    for seed in range(7):
        folder = tmp_path_factory.mktemp("half")
        oracle = tiny.build_oracle(seed=seed)
        oracle.save_pretrained(folder)
        rounded = type(oracle).from_pretrained(folder, dtype=dtype)(**HALF_INPUTS).logits
        models.append((DiffusionGemmaForMaskedBlockLM.from_pretrained(folder, dtype=dtype), oracle(**HALF_INPUTS).logits, rounded))
    return models, tolerance


@pytest.mark.parametrize("experts", EXPERTS)
def test_half_precision_stays_close_to_float32(half, experts):
    """Tolerance on the mean error of logits whose deviation is 1.9: 8 and 11 bits through four layers, and at bfloat16 now
    and then another expert. transformers' model in the same dtype must not be the better one by more than a quarter."""
    models, tolerance = half
    errors, ratios = [], []
    for model, expected, rounded in models:
        model.set_experts_implementation(experts)
        got = model(**HALF_INPUTS)
        assert got.logits.dtype == torch.float32 and got.encoder_last_hidden_state.dtype == model.dtype
        errors.append((got.logits - expected).abs().mean())
        ratios.append(errors[-1] / (rounded - expected).abs().mean())
    assert torch.tensor(errors).median() < tolerance
    assert torch.tensor(ratios).median() < 1.25


def test_half_precision_rounds_where_transformers_rounds(half):
    """A norm or a router's softmax in half precision is as far from transformers' logits as these are from float32."""
    shares = []
    for model, expected, rounded in half[0]:
        model.set_experts_implementation("auto")
        with model.reference_arithmetic():
            got = model(**HALF_INPUTS).logits
        shares.append((got - rounded).abs().mean() / (rounded - expected).abs().mean())
    assert torch.tensor(shares).median() < 0.1  # 0 on every CPU seen


@pytest.mark.parametrize("layer_type", ["sliding_attention", "full_attention"])
def test_rotary_angles_are_not_rounded_with_the_weights(layer_type):
    """`.to(bfloat16)` rounds the oracle's frequencies: at position 2,000 its angles are off by several radians.

    5e-4: an angle of 2,000 has a float32 rounding of 1.2e-4.
    """
    module = RotaryPositions(tiny.tiny_config().text_config).to(torch.bfloat16)
    positions = torch.arange(2000)
    cos, sin = module(positions[None], torch.float32)[layer_type]
    if layer_type == "sliding_attention":
        frequencies = 10_000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    else:  # a quarter of the 8 pairs rotates
        frequencies = torch.cat((1e6 ** -(torch.arange(0, 4, 2, dtype=torch.float64) / 16), torch.zeros(6, dtype=torch.float64)))
    angles = (positions[:, None] * frequencies).repeat(1, 2)
    close(cos[0, :, 0].double(), angles.cos(), 5e-4)
    close(sin[0, :, 0].double(), angles.sin(), 5e-4)
    held = [buffer.dtype for _, buffer in ours().model.decoder.rotary.named_buffers()]
    assert held == []  # nothing that a cast could round


def test_gradients_equal_the_oracle():
    """Every parameter, by our names; the oracle's ties make one parameter, and so one sum, of both passes' gradients."""
    oracle, model = tiny.build_oracle(), same_weights(pair()[0])
    ids, _, images = tiny.image_inputs("small")
    canvas, labels, types = tokens(1, CANVAS, 1), tokens(1, CANVAS, 2), (ids == tiny.IMAGE).long()
    canvas[0, 0] = labels[0, 1] = ids[0, 0] = tiny.PAD  # the pad row of the embedding gets the head's gradient and no lookup's
    logits = torch.randn(1, CANVAS, tiny.VOCAB, generator=torch.Generator().manual_seed(4))

    def oracle_loss(model):
        output = tiny.oracle_generate_path(model, ids, canvas, mm_token_type_ids=types, logits=logits, **images)[1]
        return cross_entropy(output.logits.flatten(0, 1), labels.flatten())

    expected = tiny.gradients(oracle, oracle_loss)
    got = tiny.gradients(model, lambda m: tiny.canvas_loss(m, ids, canvas, labels, self_conditioning_logits=logits, **images))
    assert set(got) <= set(expected)
    for name, gradient in got.items():
        assert gradient is not None and gradient.any(), f"{name} has no gradient"
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_loss_of_a_given_canvas_is_its_cross_entropy():
    ids, canvas, labels = tokens(2, 5), tokens(2, CANVAS, 1), tokens(2, CANVAS, 2)
    labels[0, 3:] = -100
    close(ours()(ids, decoder_input_ids=canvas, labels=labels).loss, tiny.canvas_loss(ours(), ids, canvas, labels), 1e-6)


def checkpointed_gradients(reentrant):
    """Gradients without and with checkpointing, of the stack."""
    model = same_weights(pair()[0]).train()
    ids, canvas, labels = tokens(2, 13), tokens(2, CANVAS, 1), tokens(2, CANVAS, 2)
    expected = tiny.gradients(model, lambda m: tiny.canvas_loss(m, ids, canvas, labels))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    got = tiny.gradients(model, lambda m: tiny.canvas_loss(m, ids, canvas, labels))
    assert model(ids, decoder_input_ids=canvas).past_key_values.get_seq_length() == 13
    return [(got[name], gradient) for name, gradient in expected.items() if gradient is not None]


def test_gradient_checkpointing_gives_the_same_gradients():
    """Recomputing a prompt layer must not append to the cache a second time."""
    for got, expected in checkpointed_gradients(reentrant=False):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


def test_reentrant_checkpointing_never_gives_wrong_gradients():
    """Reentrant checkpointing follows no tensor inside a tuple: keys and values from the cache, and new ones, lose their
    gradient without a word. Either the gradients are right or `use_reentrant` is refused by name."""
    try:
        found = checkpointed_gradients(reentrant=True)
    except ValueError as error:
        assert "use_reentrant" in str(error)
        return
    for got, expected in found:
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
