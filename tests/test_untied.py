"""A head of its own (`tie_word_embeddings=False`, or a tied one that was replaced): computed with, trained, saved and loaded."""

import copy
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import CANVAS, VOCAB, close, shake, tiny_config, tokens
from torch import nn
from transformers import AutoModelForCausalLM, DiffusionGemmaForBlockDiffusion

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, FP8Config

FILE = "model.safetensors"


def untied_config():
    config = tiny_config()
    config.tie_word_embeddings = False
    return config


def untied_model():
    torch.manual_seed(0)
    return shake(DiffusionGemmaForMaskedBlockLM(untied_config()).eval())


def by_hand(model, seed=3):
    """The same model with another matrix as its head; its config still says that they are tied."""
    model = copy.deepcopy(model)
    weight = model.lm_head.weight.detach()
    model.lm_head.weight = nn.Parameter(weight + 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
    return model


@torch.no_grad()
def logits(model):
    """With self-conditioning, which takes the embedding where the logits take the head."""
    conditioning = torch.randn(2, CANVAS, VOCAB, generator=torch.Generator().manual_seed(5))
    return model(tokens(2, 9), decoder_input_ids=tokens(2, CANVAS, 1), self_conditioning_logits=conditioning).logits


def saved(folder):
    return load_file(folder / FILE), json.loads((folder / "config.json").read_text())


def test_logits_equal_the_oracle():
    oracle, model = (by_hand(each) for each in tiny.pair())
    close(logits(model), logits(oracle))
    assert (logits(model) - logits(tiny.ours())).abs().max() > 0.1


def test_head_of_its_own_is_saved_and_loaded(tmp_path):
    model = untied_model()
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    weights, config = saved(tmp_path)
    assert torch.equal(weights["lm_head.weight"], model.lm_head.weight) and config["tie_word_embeddings"] is False
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is not again.get_input_embeddings().weight
    assert torch.equal(logits(again), logits(model))


def test_head_replaced_by_hand_is_saved_as_one_of_its_own(tmp_path):
    """The config said that they were tied, which took the file's head for a mistake."""
    model = by_hand(tiny.ours())
    model.save_pretrained(tmp_path)
    weights, config = saved(tmp_path)
    assert torch.equal(weights["lm_head.weight"], model.lm_head.weight) and config["tie_word_embeddings"] is False
    assert model.config.tie_word_embeddings is True
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_tied_head_is_saved_once(tmp_path):
    tiny.ours().save_pretrained(tmp_path)
    weights, config = saved(tmp_path)
    assert "lm_head.weight" not in weights and config["tie_word_embeddings"] is True


def test_head_in_a_file_that_calls_itself_tied_counts(tmp_path):
    model = by_hand(tiny.ours())
    model.save_pretrained(tmp_path)
    config = saved(tmp_path)[1]
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    close(logits(DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path)), logits(model))  # so does transformers' class read it
    again.save_pretrained(tmp_path / "again")
    assert saved(tmp_path / "again")[1]["tie_word_embeddings"] is False


def test_two_stacks_of_transformers_class_are_refused(tmp_path):
    """Without `tie_word_embeddings` it ties its two passes no longer, either."""
    DiffusionGemmaForBlockDiffusion(untied_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="second stack for the prompt pass"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_head_and_embedding_get_gradients_of_their_own():
    model, ids, canvas = untied_model(), tokens(2, 9), tokens(2, CANVAS, 1)
    model(ids, decoder_input_ids=canvas, labels=tokens(2, CANVAS, 2)).loss.backward()
    head, embedding = model.lm_head.weight.grad, model.get_input_embeddings().weight.grad
    seen = torch.zeros(VOCAB, dtype=torch.bool)
    seen[torch.cat((ids.flatten(), canvas.flatten()))] = True
    assert bool((head != 0).any(dim=1).all())
    assert torch.equal((embedding != 0).any(dim=1), seen)


def test_training_loss_uses_the_head():
    labels = tokens(2, 9)
    labels[:, :4] = -100
    losses = []
    for model in (tiny.ours(), by_hand(tiny.ours())):
        torch.manual_seed(0)
        losses.append(model(tokens(2, 9), labels=labels).loss)
    assert not torch.equal(*losses)


def test_whole_logits_and_the_default_write_the_same():
    """The second step is conditioned by the embedding, not by the head."""
    model = untied_model()
    given = {"decoder_input_ids": tokens(2, CANVAS, 1), "max_new_tokens": CANVAS, "max_denoising_steps": 2, "do_sample": False}
    whole = model.generate(tokens(2, 9), output_logits=True, return_dict_in_generate=True, **given)
    assert torch.equal(model.generate(tokens(2, 9), **given), whole.sequences)


def test_quantised_model_keeps_its_head(tmp_path):
    untied_model().save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=FP8Config())
    model.save_pretrained(tmp_path / "fp8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    assert saved(tmp_path / "fp8")[1]["tie_word_embeddings"] is False
    assert torch.equal(again.lm_head.weight, untied_model().lm_head.weight)
    assert torch.equal(logits(again), logits(model))


def test_new_ids_resize_both():
    model = untied_model()
    model.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    assert model.lm_head.weight.shape == model.get_input_embeddings().weight.shape == (VOCAB + 5, 32)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
