"""Arguments of `from_pretrained` that transformers passes over for this model, or whose errors name nothing: refused by name; the others do
what they say."""

import pytest
import torch
from small_models import small_model
from transformers import LlamaConfig, Mxfp4Config

from modeling_diffusiongemma import DiffusionGemmaBlockModel, DiffusionGemmaForMaskedBlockLM, drop_in

REFUSED = {
    "config as a mapping": ({"config": {"model_type": "diffusion_gemma"}}, "`config` is a dict; expected a DiffusionGemmaConfig"),
    "config as a class": ({"config": type(small_model().config)}, "`config` is a DiffusionGemmaConfig; expected"),
    "config of another model": ({"config": LlamaConfig()}, "`config` is a LlamaConfig; expected"),
    "GGUF": ({"gguf_file": "model.gguf"}, "`gguf_file` is 'model.gguf'; expected None"),
    "memory without a map": ({"max_memory": {"cpu": "1GB"}}, "`max_memory` is given without a `device_map`"),
    "dtypes of parts": ({"dtype": {"": "float32", "text_config": "bfloat16"}}, r"`dtype` names \['text_config'\]; expected one dtype"),
    "an FP8 dtype": ({"dtype": torch.float8_e4m3fn}, r"`dtype` is torch\.float8_e4m3fn; expected .*FP8Config"),
    "attention of no part": ({"attn_implementation": {"text": "eager"}}, r"`attn_implementation` names \['text'\]; expected some of"),
    "experts of no part": ({"experts_implementation": {"text": "eager"}}, r"`experts_implementation` names \['text'\]; expected some of"),
    "MXFP4": ({"quantization_config": Mxfp4Config()}, "`quantization_config` is MXFP4; expected `FourBitConfig"),
    "MXFP4 as a mapping": ({"quantization_config": {"quant_method": "mxfp4"}}, "`quantization_config` is MXFP4"),
}
TAKEN = (
    {"dtype": {"": "float32"}}, {"dtype": "auto"}, {"max_memory": {"cpu": "1GB"}, "device_map": "auto"},
    {"attn_implementation": {"text_config": "sdpa", "vision_config": "eager"}}, {"experts_implementation": {"": "eager"}},
    {"config": small_model().config}, {"quantization_config": Mxfp4Config(dequantize=True)},
)  # fmt: skip
CLASSES = (DiffusionGemmaForMaskedBlockLM, DiffusionGemmaBlockModel, drop_in.DiffusionGemmaForBlockDiffusion)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    small_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_argument_that_nothing_follows_is_refused(name, folder):
    """They changed nothing, silently, or ended in a TypeError or AttributeError inside of transformers."""
    arguments, said = REFUSED[name]
    for cls in CLASSES:
        with pytest.raises(ValueError, match=said):
            cls.from_pretrained(folder, **arguments)


def test_arguments_that_are_followed_are_taken(folder):
    expected = small_model().state_dict()
    for arguments in TAKEN:
        loaded = DiffusionGemmaForMaskedBlockLM.from_pretrained(folder, **arguments).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items()), arguments
