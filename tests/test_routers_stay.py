"""Quantisers of transformers that walk over linear layers leave routers alone, as the released FP8 recipe does."""

import pytest
import torch
from small_models import small_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DiffusionGemmaForBlockDiffusion, HqqConfig, QuantoConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, FourBitConfig, FP8Config, default_checkpoint
from modeling_diffusiongemma.weights.loading import UNCONVERTED, without_routers

BITS = ["load_in_4bit", "load_in_8bit"]


def converted(cls, config):
    """Names of the linear layers of the default checkpoint that bitsandbytes converted."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = cls.from_pretrained(default_checkpoint(), quantization_config=config, dtype=torch.float32)
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return model, [name for name, module in model.named_modules() if isinstance(module, kinds)]


@pytest.mark.parametrize("bits", BITS)
def test_bitsandbytes_converts_all_but_routers_and_head(bits):
    """On transformers' class it leaves the tied text stack alone: 12 small matrices of 104."""
    asked = BitsAndBytesConfig(**{bits: True})
    model, names = converted(AutoModelForCausalLM, asked)
    left = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    layers = model.config.text_config.num_hidden_layers
    assert left == [*(f"model.decoder.layers.{place}.router.proj" for place in range(layers)), "lm_head"] and len(names) == 52
    assert asked.llm_int8_skip_modules is None  # the caller's own object
    assert model.config.quantization_config.llm_int8_skip_modules == list(UNCONVERTED)
    assert len(converted(DiffusionGemmaForBlockDiffusion, asked)[1]) == 12
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert model.eval()(input_ids=ids, decoder_input_ids=ids).logits.isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_config_as_a_mapping_means_the_same(bits):
    assert len(converted(DiffusionGemmaForMaskedBlockLM, {bits: True})[1]) == 52


def test_modules_that_are_named_are_the_ones_that_stay():
    model, names = converted(DiffusionGemmaForMaskedBlockLM, BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head"]))
    assert sum("router" in name for name in names) == model.config.text_config.num_hidden_layers and len(names) == 58


def test_a_model_saved_in_four_bits_loads_again_with_its_routers(tmp_path):
    model, names = converted(DiffusionGemmaForMaskedBlockLM, BitsAndBytesConfig(load_in_4bit=True))
    model.save_pretrained(tmp_path)
    again = DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path)
    for layer, other in zip(model.model.decoder.layers, again.model.decoder.layers, strict=True):
        assert torch.equal(layer.router.proj.weight, other.router.proj.weight)
        assert type(layer.self_attn.q_proj) is type(other.self_attn.q_proj)


@pytest.mark.parametrize(
    ("config", "field"), [(lambda **skip: QuantoConfig(weights="int8", **skip), "modules_to_not_convert"), (HqqConfig, "skip_modules")]
)
def test_other_quantisers_are_told_so_unless_they_were_told(config, field):
    try:
        asked = config()
    except ImportError as error:
        pytest.skip(str(error))
    told = without_routers(asked)
    assert getattr(told, field) == list(UNCONVERTED) and told is not asked
    named = config(**{field: ["embed_vision"]})
    assert without_routers(named) is named


@pytest.mark.parametrize("config", [FP8Config, FourBitConfig])
def test_quantisers_of_our_own_stay_as_they_are(config):
    asked = config()
    assert without_routers(asked) is asked


def test_routers_of_any_model_are_named():
    routers = [name for name, module in small_model().named_modules() if isinstance(module, nn.Linear) and "router" in name]
    assert routers and all(name.endswith(UNCONVERTED[0]) for name in routers)
    # torchao asks for the names of weights, of which "router.proj" is no end: every router was quantised.
    assert all(not should_convert_module(f"{name}.weight", list(UNCONVERTED)) for name in routers)
    assert should_convert_module("model.decoder.layers.0.self_attn.q_proj.weight", list(UNCONVERTED))
