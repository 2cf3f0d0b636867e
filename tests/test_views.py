"""What a pass reads of a cache: one layout for all steps of a canvas, any kind of cache, prompts in chunks.

Tolerances: `tiny.TOLERANCE` where two ways of computing the same are compared, `ROUNDING` where only the borders of chunks or buffers
differ (values of about 2 through four layers), and 0 where the same kernel reads the same numbers.
"""

import functools
import re

import pytest
import tiny
import torch
from tiny import CANVAS, LAYERS, PAD, WINDOW, caches, close, ours, pad_rows, rows_of, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, Cache, DynamicCache, StaticCache, cache_utils
from transformers.cache_utils import DynamicLayer, QuantizedLayer

from modeling_diffusiongemma.layers import attention as attention_module
from modeling_diffusiongemma.layers import masks
from modeling_diffusiongemma.layers.attention import Implementation, eager_attention, sdpa_attention
from modeling_diffusiongemma.layers.layers import ScaledEmbedding
from modeling_diffusiongemma.layers.masks import image_numbers
from modeling_diffusiongemma.model.block_model import CHUNK, chunks

KINDS = ("windowed", "keep_all", "static")
CHUNKED = "chunk_length"
ROUNDING = 3e-5


pytestmark = pytest.mark.usefixtures("without_gradients")


class Recorder(TorchDispatchMode):
    """Lists every operation that reaches a backend, with the shape of what it returns."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.seen.append((function.overloadpacket.__name__, tuple(output.shape) if isinstance(output, torch.Tensor) else None))
        return output


def soft(rows=2, seed=7):
    return torch.randn(rows, CANVAS, 32, generator=torch.Generator().manual_seed(seed))


# One view for all steps of a canvas


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_steps_with_a_view_equal_steps_without(kind, attention, padded):
    """Over three canvases past the window: what an earlier step wrote into the free slots must not show in the next."""
    model = ours(attention)
    ids, mask = pad_rows(rows_of((4, 13)), "left") if padded else (tokens(2, 13), None)
    cache = caches(model)[kind]
    for turn in range(3):
        model.prefill(ids, mask, past_key_values=cache)
        whole = None if mask is None else torch.cat((mask, torch.ones(2, CANVAS, dtype=torch.int64)), dim=1)
        plain = [model.denoise(tokens(2, CANVAS, step), cache, soft(2, step), whole).last_hidden_state for step in range(3)]
        view = model.prepare_canvas(cache, (2, CANVAS), whole)
        for step in range(3):
            close(model.denoise(tokens(2, CANVAS, step), soft_embeds=soft(2, step), view=view).last_hidden_state, plain[step], 0)
        close(model.denoise(tokens(2, CANVAS, 0), cache, soft(2, 0), whole).last_hidden_state, plain[0], 0)  # the cache is as it was
        ids, mask = tokens(2, CANVAS, 20 + turn), whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_copies_no_cache_and_waits_for_no_device(kind):
    """No tensor as long as a layer's cache is made, and nothing goes from the device to the host or back. On a CPU both would
    pass unseen, so the operations are read: `_local_scalar_dense` is `.item()`, `lift_fresh` is `torch.tensor(number)`."""
    model = ours()
    model.set_experts_implementation("grouped_mm")  # as on a GPU; a CPU takes few experts one after the other and counts their tokens
    cache = caches(model)[kind]
    model.prefill(tokens(2, 29), past_key_values=cache)
    view = model.prepare_canvas(cache, (2, CANVAS))
    with Recorder() as recorder:
        model.denoise(tokens(2, CANVAS, 1), soft_embeds=soft(), view=view)
    waiting = {"_local_scalar_dense", "lift_fresh", "scalar_tensor", "nonzero", "is_nonzero", "masked_select", "bincount", "unique_dim"}
    names = {name for name, _ in recorder.seen}
    assert "mm" in names and not names & waiting
    lengths = {29 + CANVAS, 29, WINDOW - 1 + CANVAS, WINDOW - 1}
    copies = ("cat", "clone", "_to_copy", "constant_pad_nd")
    copied = [(name, shape) for name, shape in recorder.seen if name in copies and len(shape or ()) == 4 and shape[2] in lengths]
    assert copied == []
    with Recorder() as recorder:
        model.denoise(tokens(2, CANVAS, 1), cache, soft())
    assert ("cat", (2, 1, 29 + CANVAS, 16)) in recorder.seen, "without a view it copies"


@pytest.mark.parametrize("kind", KINDS)
def test_a_dynamic_cache_is_not_stored_twice(kind):
    model = ours()
    cache = caches(model)[kind]
    model.prefill(tokens(2, 29), past_key_values=cache)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    view = model.prepare_canvas(cache, (2, CANVAS))
    model.denoise(tokens(2, CANVAS), view=view)
    for layer_type, layer, (keys, values), laid_out in zip(LAYERS, cache.layers, before, view.cached, strict=True):
        close(layer.keys, keys, 0)
        close(layer.values, values, 0)
        windowed = layer_type == "sliding_attention"
        assert laid_out.keys.shape[2] == (WINDOW - 1 if windowed else 29) + CANVAS
        shared = laid_out.keys.data_ptr() == layer.keys.data_ptr() and laid_out.values.data_ptr() == layer.values.data_ptr()
        assert shared == (kind == "windowed" or (kind == "keep_all" and not windowed))


def test_a_cache_goes_on_after_its_tensors_were_replaced():
    """Prefill, view, commit, crop and row selection on the replaced tensors, against a cache that never had a view."""
    model = ours()
    cache, other = DynamicCache(), DynamicCache()
    for one in (cache, other):
        model.prefill(tokens(3, 13), past_key_values=one)
    model.denoise(tokens(3, CANVAS, 1), view=model.prepare_canvas(cache, (3, CANVAS)))
    for one in (cache, other):
        one.crop(-2)
        one.batch_select_indices(torch.tensor([2, 0]))
        model.prefill(tokens(2, CANVAS, 2), past_key_values=one)
    close(model.denoise(tokens(2, CANVAS, 3), cache).last_hidden_state, model.denoise(tokens(2, CANVAS, 3), other).last_hidden_state, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_views_with_equal_slots_have_equal_shapes(kind, padded):
    """What a captured graph needs: the slots not filled yet are masked, and change nothing."""
    model = ours()
    ids, mask = pad_rows(rows_of((2, 5)), "left") if padded else (tokens(2, 5), None)
    cache, shapes = caches(model)[kind], []
    for turn in range(4):
        model.prefill(ids, mask, past_key_values=cache)
        whole = None if mask is None else torch.cat((mask, torch.ones(2, CANVAS, dtype=torch.int64)), dim=1)
        canvas = tokens(2, CANVAS, 10 + turn)
        expected = model.denoise(canvas, cache, attention_mask=whole).last_hidden_state
        view = model.prepare_canvas(cache, (2, CANVAS), whole, slots=40)
        close(model.denoise(canvas, view=view).last_hidden_state, expected, ROUNDING)
        shapes.append([tuple(layer.keys.shape) for layer in view.cached])
        ids, mask = canvas, whole
    narrow = 40 if kind == "keep_all" and padded else WINDOW - 1  # padding makes the window reach further back
    assert shapes == [[(2, 2, narrow + CANVAS, 8), (2, 1, 40 + CANVAS, 16)] * 2] * 4


def test_gradients_through_a_view():
    """With gradients nothing is written in place: two steps, one without gradients between, then the backward pass."""
    model = tiny.same_weights(tiny.pair()[0])
    canvas, labels = tokens(2, CANVAS, 1), tokens(2, CANVAS, 2)

    def loss(prepared_with_gradients):
        cache = model.prefill(tokens(2, 13)).past_key_values
        with torch.set_grad_enabled(prepared_with_gradients):
            view = model.prepare_canvas(cache, (2, CANVAS))
        total = 0
        for step in range(2):
            with torch.no_grad():
                model.denoise(tokens(2, CANVAS, 5 + step), view=view)
            hidden = model.denoise(canvas, soft_embeds=soft(2, step), view=view).last_hidden_state
            total = total + torch.nn.functional.cross_entropy(model.compute_logits(hidden).flatten(0, 1), labels.flatten())
        return total

    def plain(model):
        cache = model.prefill(tokens(2, 13)).past_key_values
        total = 0
        for step in range(2):
            hidden = model.denoise(canvas, cache, soft(2, step)).last_hidden_state
            total = total + torch.nn.functional.cross_entropy(model.compute_logits(hidden).flatten(0, 1), labels.flatten())
        return total

    expected = tiny.gradients(model, plain)
    got = tiny.gradients(model, lambda _: loss(True))
    for name, gradient in expected.items():
        assert (got[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4)
    # A view made without gradients passes none to the prompt: the prompt pass's own parameters, its scalars aside, see less.
    cut = tiny.gradients(model, lambda _: loss(False))
    assert cut["model.decoder.layers.3.self_attn.k_proj.weight"].isfinite().all()
    assert not torch.equal(cut["model.decoder.layers.0.self_attn.k_proj.weight"], got["model.decoder.layers.0.self_attn.k_proj.weight"])


def test_a_view_is_compiled_in_one_graph():
    """No graph break in a step: `fullgraph=True` raises at the first, reading a number back included. The experts are computed in
    another way there, hence `TOLERANCE`."""
    model = tiny.same_weights(tiny.pair()[0])
    cache = caches(model)["static"]
    model.prefill(tokens(2, 13), past_key_values=cache)
    view = model.prepare_canvas(cache, (2, CANVAS), slots=20)
    step = torch.compile(model.denoise, backend="eager", fullgraph=True)
    for seed in range(2):
        got = step(tokens(2, CANVAS, seed), soft_embeds=soft(), view=view).last_hidden_state
        close(got, model.denoise(tokens(2, CANVAS, seed), soft_embeds=soft(), view=view).last_hidden_state)


def test_denoise_refuses_a_view_that_does_not_fit():
    model = ours()
    cache = model.prefill(tokens(2, 9)).past_key_values
    view = model.prepare_canvas(cache, (2, CANVAS))
    for arguments, match in (
        ({}, "exactly one"), ({"view": view, "cache": cache}, "exactly one"),
        ({"view": view, "attention_mask": torch.ones(2, 9 + CANVAS)}, "`attention_mask`"),
        ({"view": view, "position_ids": torch.arange(CANVAS)[None]}, "`position_ids`"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            model.denoise(tokens(2, CANVAS), **arguments)
    for shape in ((1, CANVAS), (2, CANVAS - 1)):
        with pytest.raises(ValueError, match="canvas_ids"):
            model.denoise(tokens(*shape), view=view)


# Masks, and the table of implementations


def test_the_picture_of_the_masks_is_what_they_are():
    rows = {int(token): marks.split() for token, marks in re.findall(r"(\d)  ((?:[xo] ?)+)", masks.__doc__)}
    assert sorted(rows) == list(range(9))
    images = torch.tensor([[-1, -1, 0, 0, -1, -1]])
    for window, visible in ((None, "xo"), (3, "x")):
        prompt = masks.prompt_mask(torch.arange(6), torch.arange(6), window, None, images)[0, 0]
        canvas = masks.canvas_mask(torch.arange(9), 3, torch.tensor([[6]]), window, None)[0, 0].expand(3, -1)
        got = [*prompt.tolist(), *canvas.tolist()]
        assert got == [[place < len(rows[i]) and rows[i][place] in visible for place in range(6 if i < 6 else 9)] for i in range(9)]


def everything(model):
    """Logits after both passes: padded with an image, plain, and over cached tokens."""
    ids, mask, images = tiny.image_inputs("one_row_of_two_padded")
    canvas = tokens(2, CANVAS)
    outputs = [model(ids, mask, **images, decoder_input_ids=canvas), model(tokens(2, 13), decoder_input_ids=canvas)]
    outputs.append(model(tokens(2, 9, 1), cache=outputs[1].cache, decoder_input_ids=canvas))
    return torch.cat([output.logits for output in outputs])


def test_a_kernel_is_a_row_of_the_table(monkeypatch):
    """Its function, the form of its mask, and whether None will do: nothing else names it."""
    for like, row in (
        ("eager", Implementation(eager_attention, masks.additive)),
        ("sdpa", Implementation(sdpa_attention, masks.boolean, causal_without=True)),
    ):
        monkeypatch.setitem(attention_module.ATTENTION, "new", row)
        model = tiny.same_weights(tiny.pair()[0], like)
        model.config.text_config._attn_implementation = "new"
        close(everything(model), everything(ours(like)), 0)


@pytest.mark.parametrize("name", ["eager", "flex_attention"])
def test_a_function_registered_under_a_known_name_is_called(name, monkeypatch):
    """Read once, when the package is imported, the table kept calling the function that stood there then."""
    model, called = tiny.same_weights(tiny.pair()[0], name), []

    def registered(module, query, key, value, attention_mask, **kwargs):
        called.append(module.layer_idx)
        return sdpa_attention(module, query, key, value, None)

    monkeypatch.setitem(AttentionInterface._global_mapping, name, registered)
    with torch.no_grad():
        model(input_ids=tokens(1, 5), decoder_input_ids=tokens(1, 4))
    assert called == [*range(4), *range(4)]


def test_other_attention_that_transformers_knows_gets_a_mask_of_every_query():
    """Boolean `(B, 1, Q, S)`, in every causal pass, and None where a canvas sees everything."""
    model, given = tiny.same_weights(tiny.pair()[0]), []

    def registered(module, query, key, value, attention_mask, is_causal, **kwargs):
        given.append((is_causal, attention_mask))
        assert attention_mask is None or attention_mask.shape == (len(query), 1, query.shape[2], key.shape[2])
        return sdpa_attention(module, query, key, value, attention_mask, is_causal=is_causal, **kwargs)

    AttentionInterface.register("of_a_user", registered)
    try:
        model.config.text_config._attn_implementation = "of_a_user"
        close(everything(model), everything(ours("eager")))
    finally:
        AttentionInterface._global_mapping.pop("of_a_user")
    assert {mask is None for is_causal, mask in given if is_causal} == {False}
    assert {mask is None for is_causal, mask in given if not is_causal} == {False, True}
    assert {mask.dtype for _, mask in given if mask is not None} == {torch.bool}


# Every kind of cache


@pytest.mark.parametrize("rows", [1, 3])
def test_static_cache_equals_dynamic_for_every_context(rows):
    """Contexts from 1 token to five windows, all reached by prompt."""
    model = ours()
    for length in range(1, 5 * WINDOW + 2):
        ids, canvas = tokens(rows, length, length), tokens(rows, CANVAS, 1)
        static = StaticCache(model.config.text_config, max_cache_len=5 * WINDOW + 2)
        got = model(ids, past_key_values=static, decoder_input_ids=canvas)
        expected = model(ids, decoder_input_ids=canvas)
        close(got.logits, expected.logits)
        close(got.encoder_last_hidden_state, expected.encoder_last_hidden_state)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 20])
def test_static_cache_equals_dynamic_while_it_is_written(size):
    """The same contexts reached by commits of every size around the window, a view for each."""
    model = ours()
    static = StaticCache(model.config.text_config, max_cache_len=61)
    dynamic = DynamicCache(config=model.config.text_config)
    for place in range(0, 60, size):
        ids, canvas = tokens(2, min(size, 60 - place), place), tokens(2, CANVAS, 1)
        states = [model.prefill(ids, past_key_values=cache).last_hidden_state for cache in (static, dynamic)]
        close(*states)
        views = [model.prepare_canvas(cache, (2, CANVAS)) for cache in (static, dynamic)]
        close(*(model.denoise(canvas, view=view).last_hidden_state for view in views))


def test_a_static_cache_shows_its_filled_slots_alone():
    """64 slots are allocated; attention over them would cost as much as over 64 tokens."""
    model = ours("eager")
    cache = caches(model, 64)["static"]
    for size, seen in ((5, 5), (6, 11)):
        weights = model(tokens(1, size), past_key_values=cache, decoder_input_ids=tokens(1, CANVAS), output_attentions=True).attentions
        assert [layer.shape[-1] for layer in weights] == [min(seen, WINDOW - 1) + CANVAS, seen + CANVAS] * 2


class Exact(QuantizedLayer):
    """Keeps its states in the layout of a quantized layer, without losing a bit."""

    def _quantize(self, tensor, axis):
        return tensor.clone()

    def _dequantize(self, q_tensor):
        return q_tensor


def test_a_quantized_cache_is_read_as_a_whole():
    """It keeps old tokens quantized and the last ones as they are: both must be seen, by canvas and commit."""
    model, cache, quantized = ours(), DynamicCache(), Cache(layers=[Exact(residual_length=6) for _ in LAYERS])
    for turn, size in enumerate((13, 4, 1, 10)):
        ids, canvas = tokens(2, size, turn), tokens(2, CANVAS, 10 + turn)
        states = [model.prefill(ids, past_key_values=one).last_hidden_state for one in (quantized, cache)]
        close(*states)
        close(model.denoise(canvas, quantized).last_hidden_state, model.denoise(canvas, cache).last_hidden_state)
        views = [model.prepare_canvas(one, (2, CANVAS)) for one in (quantized, cache)]
        close(*(model.denoise(canvas, view=view).last_hidden_state for view in views))


class Shrunk(DynamicCache):
    """As caches in few bits are written: what is returned is not what was given."""

    def update(self, *args, **kwargs):
        return [states / 2 for states in super().update(*args, **kwargs)]


class ShrunkLayer(DynamicLayer):
    def update(self, *args, **kwargs):
        return [states / 2 for states in super().update(*args, **kwargs)]


@pytest.mark.parametrize("kind", ["cache", "layers", "instance"])
def test_update_of_somebody_else_is_refused(kind):
    """What it returned was not looked at, and what it kept elsewhere never read."""
    cache = Shrunk() if kind == "cache" else Cache(layers=[ShrunkLayer() for _ in LAYERS]) if kind == "layers" else DynamicCache()
    if kind == "instance":
        whole = cache.update
        cache.update = functools.wraps(whole)(lambda *args, **kwargs: [states / 2 for states in whole(*args, **kwargs)])
    with pytest.raises(ValueError, match="`cache` is a .*, and .* has an `update` of .*: what it returns would not be seen"):
        ours().prefill(tokens(2, 9), past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no fp8 cache")
def test_an_fp8_cache_stays_close():
    """3 bits of mantissa in keys and values: the hidden states move by an eighth on average; other tokens would move them by all."""
    model, cache = ours(), Cache(layers=[cache_utils.Fp8QuantizedLayer() for _ in LAYERS])
    for turn in range(2):
        model.prefill(tokens(2, 13, turn), past_key_values=cache)
    whole = torch.cat((tokens(2, 13, 0), tokens(2, 13, 1)), dim=1)
    expected = model.denoise(tokens(2, CANVAS, 5), model.prefill(whole).past_key_values).last_hidden_state
    got = model.denoise(tokens(2, CANVAS, 5), view=model.prepare_canvas(cache, (2, CANVAS))).last_hidden_state
    assert 0 < (got - expected).abs().mean() < 0.25 * expected.abs().mean()


# Keys and values are not repeated


@pytest.mark.parametrize("shares_keys", [True, False])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "canvas", "row", "query"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
def test_sdpa_equals_eager_however_keys_are_shared(heads, mask, causal, shares_keys, monkeypatch):
    """`shares_keys` False is what CUDA gets with a mask or wide heads; the same code runs here."""
    monkeypatch.setattr(attention_module, "kernel_shares_keys", lambda key, attention_mask: shares_keys)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(3, 7, heads[0], 16, generator=generator).transpose(1, 2)
    key, value = torch.randn(2, 3, heads[1], 7, 16, generator=generator)
    shape = {"canvas": (1, 1, 1, 7), "row": (3, 1, 1, 7), "query": (3, 1, 7, 7)}.get(mask)
    visible = None if shape is None else (torch.rand(shape, generator=generator) < 0.6) | torch.eye(7, dtype=torch.bool)
    if visible is not None and visible.shape != shape:
        visible = torch.ones(shape, dtype=torch.bool).index_fill(3, torch.tensor([2, 5]), False)
    additive = visible if visible is not None else (torch.ones(7, 7).tril().bool() if causal else None)
    additive = None if additive is None else torch.zeros(additive.shape).masked_fill(~additive, -1e30)
    expected, _ = eager_attention(torch.nn.Module(), query, key, value, additive)
    got, weights = sdpa_attention(torch.nn.Module(), query, key, value, visible, is_causal=causal)
    assert weights is None and got.shape == (3, 7, heads[0], 16)
    close(got, expected, 1e-6)


@pytest.mark.parametrize("shares_keys", [True, False])
def test_keys_are_not_repeated_per_query_head(shares_keys, monkeypatch):
    """8 query heads on one key head of 512 values, as on the released full-attention layers."""
    monkeypatch.setattr(attention_module, "kernel_shares_keys", lambda key, attention_mask: shares_keys)
    query, (key, value) = torch.randn(1, 8, 5, 512), torch.randn(2, 1, 1, 300, 512)
    for mask in (None, torch.ones(1, 1, 1, 300, dtype=torch.bool), torch.ones(1, 1, 5, 300, dtype=torch.bool)):
        with Recorder() as recorder:
            sdpa_attention(torch.nn.Module(), query, key, value, mask)
        most = max(torch.Size(shape).numel() for _, shape in recorder.seen if shape)
        assert most <= key.numel(), "nothing larger than the keys themselves is made"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [33, 2816])
def test_the_embedding_is_scaled_as_by_a_tensor_of_its_dtype(dtype, size):
    """Gemma rounds sqrt(hidden_size) to the weights' dtype before it multiplies: 53 instead of 53.066 in bfloat16."""
    embedding = ScaledEmbedding(5, size).to(dtype)
    expected = embedding.weight * torch.tensor(size**0.5, dtype=dtype)
    close(embedding(torch.arange(5)[None])[0], expected, 0)
    close(embedding.expect(torch.eye(5)), expected, 0)


# Prompts in chunks


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk_length", [1, 5, WINDOW, 17])
def test_chunks_equal_the_prompt_at_once(chunk_length, padded, kind, attention):
    """A first prompt, then a second one on top of it; the row of 3 tokens begins with chunks of padding alone."""
    model = ours(attention)
    ids, mask = pad_rows(rows_of((3, 29)), "left") if padded else (tokens(2, 29), None)
    chunked, whole = caches(model)[kind], caches(model)[kind]
    for turn in range(2):
        got = model.prefill(ids, mask, past_key_values=chunked, chunk_length=chunk_length).last_hidden_state
        expected = model.prefill(ids, mask, past_key_values=whole).last_hidden_state
        real = slice(None) if mask is None else mask[:, -ids.shape[1] :].bool()
        close(got[real], expected[real], ROUNDING)
        ids = tokens(2, 12, 3 + turn)
        mask = None if mask is None else torch.cat((mask, torch.ones_like(ids)), dim=1)
    seen = None if mask is None else torch.cat((mask[:, :-12], torch.ones(2, CANVAS)), dim=1)
    canvas = tokens(2, CANVAS, 9)
    close(*(model.denoise(canvas, cache, attention_mask=seen).last_hidden_state for cache in (chunked, whole)), ROUNDING)


def test_chunks_of_a_right_padded_prompt():
    model, (ids, mask) = ours(), pad_rows(rows_of((3, 29)), "right")
    got, expected = model.prefill(ids, mask, chunk_length=6), model.prefill(ids, mask)
    close(got.last_hidden_state[mask.bool()], expected.last_hidden_state[mask.bool()], ROUNDING)


@pytest.mark.parametrize("kind", tiny.IMAGE_KINDS)
@pytest.mark.parametrize("chunk_length", [1, 4, 7])
def test_chunks_never_cut_an_image(chunk_length, kind):
    """Its tokens see each other in both directions, those of a later chunk too."""
    model, (ids, mask, images) = ours(), tiny.image_inputs(kind)
    got = model.prefill(ids, mask, **images, chunk_length=chunk_length).last_hidden_state
    close(got[mask.bool()], model.prefill(ids, mask, **images).last_hidden_state[mask.bool()], ROUNDING)


@pytest.mark.parametrize("length", [1, 2, 7, 12])
@pytest.mark.parametrize("chunk_length", [1, 3, 5, 20])
def test_chunks_are_as_long_as_may_be(length, chunk_length):
    """Against a walk over the places: every chunk ends at the last allowed place in reach, or else at the first behind it."""
    generator = torch.Generator().manual_seed(length)
    for types in (None, *(torch.rand(2, length, generator=generator) < share for share in (0.2, 0.6, 1.1))):
        numbers = None if types is None else image_numbers(types.long())
        got = chunks(length, chunk_length, numbers)
        place = 0
        for start, end in got:
            assert start == place < end <= length
            allowed = [
                j for j in range(start + 1, length + 1)
                if j == length or numbers is None or not any(row[j - 1] == row[j] != -1 for row in numbers.tolist())
            ]  # fmt: skip
            reach = [j for j in allowed if j <= start + chunk_length]
            assert end == (reach[-1] if reach else allowed[0])
            place = end
        assert place == length


def test_long_prompts_go_in_chunks_by_themselves():
    """Only without gradients, and only where nothing is asked for that spans them, or looks on: a hook would see pieces."""
    model, size = ours(), ours().config.text_config.intermediate_size

    def passes(*args, **kwargs):
        """How many tokens go through a layer's MLP at a time."""
        with Recorder() as recorder:
            model.prefill(*args, **kwargs)
        return sorted({shape[1] for _, shape in recorder.seen if shape and len(shape) == 3 and shape[-1] == size})

    ids = tokens(1, CHUNK + 3)
    assert passes(ids) == [3, CHUNK]
    assert passes(ids[:, : CHUNK // 8], output_hidden_states=True) == [CHUNK // 8]
    with torch.enable_grad():
        assert passes(ids[:, :99]) == [99]
    seen = []
    hook = model.model.decoder.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model.prefill(ids)
    hook.remove()
    assert seen == [CHUNK + 3]


def test_masks_of_a_chunked_prompt_stay_small():
    """The bound on memory: nothing in the pass over a chunk is as large as prompt times prompt."""
    model, ids = ours(), tokens(1, 600)
    with Recorder() as recorder:
        model.prefill(ids, chunk_length=50)
    assert max(torch.Size(shape).numel() for _, shape in recorder.seen if shape) < 600 * 600 // 4
    with Recorder() as recorder:
        model.prefill(ids)
    assert max(torch.Size(shape).numel() for _, shape in recorder.seen if shape) >= 600 * 600


@pytest.mark.parametrize("last", [1, 4, 6, 29, 50])
def test_prefill_returns_as_many_last_states_as_asked(last):
    model, expected = ours(), ours().prefill(tokens(2, 29)).last_hidden_state
    for chunk_length in (None, 5):
        got = model.prefill(tokens(2, 29), last_states=last, chunk_length=chunk_length)
        close(got.last_hidden_state, expected[:, -last:], ROUNDING)
        assert int(got.past_key_values.get_seq_length()) == 29


def test_prefill_refuses_chunks_it_cannot_make():
    model, ids = ours(), torch.full((1, 5), PAD + 5)
    for arguments, match in (
        ({CHUNKED: 0}, CHUNKED), ({"last_states": 0}, "last_states"), ({CHUNKED: 3, "output_attentions": True}, "output_attentions"),
        ({CHUNKED: 3, "output_hidden_states": True}, CHUNKED),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            model.prefill(ids, **arguments)
    with torch.enable_grad(), pytest.raises(ValueError, match="with gradients"):
        model.prefill(ids, chunk_length=3)
