"""Forms of a call that transformers' class and its tests take: each means the same here, or is refused by name."""

import pytest
import tiny
import torch
from tiny import CANVAS, LAYERS, VOCAB, WINDOW, close, ours, pair, patches, tokens
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM

pytestmark = pytest.mark.usefixtures("without_gradients")
NOTHING_HIDDEN = {"full_attention": None, "sliding_attention": None}
STATES = len(LAYERS) + 1


def call(model=None, **inputs):
    inputs = {"input_ids": tokens(2, 9), "decoder_input_ids": tokens(2, CANVAS, 1), **inputs}
    return (model or ours())(**{name: value for name, value in inputs.items() if value is not None})


def with_labels():
    labels = tokens(2, 9)
    labels[:, :4] = -100
    return {"decoder_input_ids": None, "labels": labels}


# use_cache


def test_use_cache_says_whether_a_cache_made_here_is_returned():
    expected = call()
    assert expected.cache.get_seq_length() == 9
    for model in (ours(), ours().model):
        assert call(model, use_cache=False).cache is None
        assert call(model, use_cache=True).cache.get_seq_length() == 9
    assert torch.equal(call(use_cache=False).logits, expected.logits)
    assert call(use_cache=False, **with_labels()).cache is None


def test_given_cache_is_filled_and_returned_without_use_cache():
    cache = DynamicCache()
    assert call(cache=cache, use_cache=False).cache is cache and cache.get_seq_length() == 9


# output_hidden_states


@pytest.mark.parametrize("chosen", [[0], [1, 3], (-1,), 2, [0, -STATES], range(STATES)])
def test_chosen_hidden_states_are_those_of_all(chosen):
    everything = call(output_hidden_states=True).hidden_states
    wanted = {index % STATES for index in ([chosen] if isinstance(chosen, int) else chosen)}
    for got in (call(output_hidden_states=chosen), call(ours().model, output_hidden_states=chosen)):
        assert len(got.hidden_states) == STATES
        for index, state in enumerate(got.hidden_states):
            assert torch.equal(state, everything[index]) if index in wanted else state is None


def test_prompt_pass_chooses_its_hidden_states():
    ids = tokens(2, 9)
    everything = ours().prefill(ids, output_hidden_states=True).hidden_states
    got = ours().prefill(ids, output_hidden_states=[2]).hidden_states
    assert torch.equal(got[2], everything[2]) and [state is None for state in got] == [True, True, False, True, True]


@pytest.mark.parametrize("none", [None, False, [], 0])
def test_no_hidden_states_are_chosen(none):
    assert call(output_hidden_states=none).hidden_states is None


@pytest.mark.parametrize("wrong", [[STATES], [-STATES - 1], ["1"], [0.5], [True], "last", 1.5, torch.tensor([0])])
def test_impossible_choice_is_refused_before_the_prompt_is_cached(wrong):
    cache = DynamicCache()
    with pytest.raises(ValueError, match="`output_hidden_states`"):
        call(cache=cache, output_hidden_states=wrong)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_training_objective_refuses_what_it_does_not_return(name):
    with pytest.raises(ValueError, match=name):
        call(**with_labels(), **{name: True})


# Masks by layer type


def test_masks_by_layer_type_that_hide_nothing_are_taken():
    expected = call().logits
    assert torch.equal(call(attention_mask=NOTHING_HIDDEN, decoder_attention_mask=NOTHING_HIDDEN).logits, expected)
    close(call(pair()[0], attention_mask=NOTHING_HIDDEN, decoder_attention_mask=NOTHING_HIDDEN, input_ids=tokens(2, WINDOW - 2)).logits,
          call(attention_mask=NOTHING_HIDDEN, input_ids=tokens(2, WINDOW - 2)).logits)  # fmt: skip
    losses = []
    for mask in (None, NOTHING_HIDDEN):
        torch.manual_seed(0)
        losses.append(call(attention_mask=mask, **with_labels()).loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", ["attention_mask", "decoder_attention_mask"])
def test_masks_by_layer_type_that_hide_something_are_refused(name):
    cache = DynamicCache()
    with pytest.raises(ValueError, match=f"`{name}` holds a mask for .'full_attention'.*expected one 2-D mask"):
        call(cache=cache, **{name: {"full_attention": torch.ones(2, 1, 9, 9), "sliding_attention": None}})
    assert cache.get_seq_length() == 0


# Loading without a checkpoint


def test_state_dict_and_config_make_a_model():
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(None, config=ours().config, state_dict=ours().state_dict())
    assert torch.equal(call(model).logits, call().logits)
    assert model.generation_config.max_denoising_steps == ours().generation_config.max_denoising_steps


# Image features


def test_image_features_are_the_oracles():
    pixels, places = patches(4, 4)
    expected = pair()[0].model.encoder.get_image_features(pixels, places)
    got = ours().model.encoder.get_image_features(pixels, places)
    assert isinstance(got, BaseModelOutputWithPooling) and got.pooler_output.shape == (4, 32)
    close(got.pooler_output, expected.pooler_output)
    close(got.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(ours().model.get_image_features(pixels, places).pooler_output, got.pooler_output)


def test_image_features_come_as_a_tuple_and_with_states_on_request():
    pixels, places = patches(4, 4)
    encoder = ours().model.encoder
    as_tuple = encoder.get_image_features(pixels, places, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[1], encoder.get_image_features(pixels, places).pooler_output)
    assert encoder.get_image_features(pixels, places, output_hidden_states=True).hidden_states is not None


# What is refused


@pytest.mark.parametrize("model", [ours(), ours().model], ids=["with head", "without"])
def test_unknown_argument_is_named(model):
    """transformers' class takes any and ignores it."""
    with pytest.raises(ValueError, match="num_diffusion_steps"):
        call(model, num_diffusion_steps=3)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2", "paged|sdpa"])
def test_attention_that_takes_no_mask_is_refused(name):
    """transformers 5.24 lists its own class without flash attention: it drops the mask over image tokens."""
    model = tiny.same_weights(pair()[0])
    with pytest.raises(ValueError, match="`attn_implementation` is .*images and padding"):
        model.set_attn_implementation(name)
    with pytest.raises(ValueError, match="`attn_implementation` is .*images and padding"):
        DiffusionGemmaForMaskedBlockLM._from_config(tiny.tiny_config(), attn_implementation=name)
    assert model.config._attn_implementation == "sdpa" and call(model).logits.shape == (2, CANVAS, VOCAB)
