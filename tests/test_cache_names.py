"""The cache goes in and comes out under both of its names, without a word of deprecation, whatever transformers is installed."""

import copy
import pickle

import pytest
import tiny
import torch
from torch.utils import _pytree as pytree
from transformers import DynamicCache, Trainer, TrainingArguments
from transformers.utils import logging

from generation.cache_names import FIELD, NAMES
from modeling_diffusiongemma import drop_in
from modeling_diffusiongemma.layers.outputs import MaskedBlockOutput, PassOutput

IDS = torch.arange(5, 14)[None]


@pytest.fixture(scope="module")
def model():
    return tiny.ours()


@pytest.fixture
def warnings_of_transformers(monkeypatch):
    """What transformers' loggers were told to warn of, those that say a thing once included."""
    found = []
    logger = logging.get_logger("transformers")
    for name in ("warning", "warning_once"):
        monkeypatch.setattr(type(logger), name, lambda self, message, *args, **kwargs: found.append(message))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_call_takes_the_cache_under_both_names(model, name, without_gradients, warnings_of_transformers, recwarn):
    cache = DynamicCache(config=model.config.text_config)
    prefilled = model.prefill(IDS, **{name: cache})
    assert prefilled.cache is cache is prefilled.past_key_values
    canvas = IDS[:, :7]
    expected = model.denoise(canvas, cache).last_hidden_state
    view = model.prepare_canvas(**{name: cache}, canvas_shape=(1, 7))
    assert torch.equal(model.denoise(canvas, view=view).last_hidden_state, expected)
    assert torch.equal(model.denoise(canvas, **{name: cache}).last_hidden_state, expected)
    for module in (model, model.model):
        output = module(decoder_input_ids=canvas, **{name: cache})
        assert output.cache is cache is output.past_key_values
    returned = model.generate(IDS[:, :2], max_new_tokens=3, return_dict_in_generate=True, **{name: cache})
    assert returned.cache is cache is returned.past_key_values
    stands_in = drop_in.DiffusionGemmaModel(model.config)
    for prompt_pass in (stands_in.encoder, stands_in.encoder.language_model):
        output = prompt_pass(input_ids=IDS, **{name: DynamicCache(config=model.config.text_config)})
        assert output.cache is output.past_key_values and output.cache.get_seq_length() == IDS.shape[1]
    assert stands_in.decoder(decoder_input_ids=canvas, **{name: output.cache}).last_hidden_state.shape[:2] == canvas.shape
    mask = torch.ones(1, 12)
    assert stands_in.decoder.create_diffusion_decoder_attention_mask(decoder_attention_mask=mask, **{name: cache}) is mask
    assert not [text for text in warnings_of_transformers if "deprecated" in text]
    assert not [warning for warning in recwarn if "past_key_values" in str(warning.message)]


def test_both_names_at_once_are_refused(model, without_gradients):
    cache = DynamicCache(config=model.config.text_config)
    for call in (model.prefill, model.forward, model.generate):
        with pytest.raises(ValueError, match="`cache` and `past_key_values` are both given"):
            call(input_ids=IDS, cache=cache, past_key_values=cache)
    with pytest.raises(ValueError, match="both given"):
        model.denoise(IDS, cache, past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert model.prefill(IDS, cache=cache, past_key_values=None).cache is cache


def test_an_output_reads_and_writes_its_cache_under_both_names(warnings_of_transformers):
    cache, other = DynamicCache(), DynamicCache()
    output = PassOutput(torch.zeros(1), cache)
    for name in NAMES:
        assert output[name] is output.get(name) is getattr(output, name) is cache and name in output
    assert list(output.keys()) == ["last_hidden_state", FIELD] and output.to_tuple() == (output[0], cache)
    output.past_key_values = other
    assert output.cache is output["cache"] is output[1] is other
    output["cache"] = cache
    assert output.past_key_values is output[1] is cache
    empty = PassOutput(torch.zeros(1))
    assert empty.cache is empty.past_key_values is None and "cache" not in empty and empty.get("past_key_values", 3) == 3
    assert not warnings_of_transformers


def test_an_output_survives_copies_pickles_and_pytrees():
    output = MaskedBlockOutput(logits=torch.ones(2), **{FIELD: DynamicCache()})
    leaves, structure = pytree.tree_flatten(output)
    again = pytree.tree_unflatten(leaves, structure)
    assert again.cache is output.cache and torch.equal(again.logits, output.logits)
    for made in (copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        assert type(made) is MaskedBlockOutput and isinstance(made.past_key_values, DynamicCache)
        assert torch.equal(made.logits, output.logits)


def test_trainer_leaves_the_cache_out_of_what_it_gathers(tmp_path):
    """It drops outputs by the name that its own transformers gives a cache."""
    trainer = Trainer(tiny.ours(), TrainingArguments(tmp_path, report_to=[], use_cpu=True))
    labels = IDS.clone()
    labels[:, :4] = -100
    gathered = trainer.prediction_step(trainer.model, {"input_ids": IDS, "labels": labels}, prediction_loss_only=False)[1]
    assert all(isinstance(part, torch.Tensor) for part in gathered)
