"""The Auto classes of transformers after `import modeling_diffusiongemma`. What the model ones load is in test_checkpoint.py."""

import importlib.util
import json
import shutil

import numpy as np
import programs
import pytest
import transformers
from tiny import tiny_config
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from modeling_diffusiongemma import DiffusionGemmaConfig, default_checkpoint
from modeling_diffusiongemma.weights.auto import REGISTERED
from modeling_diffusiongemma.weights.auto import __doc__ as table

BEFORE_AND_AFTER = """
import transformers
config = transformers.DiffusionGemmaConfig
def registered():
    found = {}
    for name in dir(transformers):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and config in mapping:
            found[name] = mapping[config].__name__
    return found
before = registered()
import modeling_diffusiongemma
print(before, registered(), sep="\\n")
"""


def test_importing_replaces_what_the_table_says_and_nothing_else():
    done = programs.run("-c", BEFORE_AND_AFTER)
    assert done.returncode == 0, done.stderr
    before, after = map(eval, done.stdout.splitlines()[-2:])
    assert after == before | REGISTERED
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in table.splitlines() if line.startswith("| `Auto")]
    expected = [
        [
            f"`{auto}`",
            f"its own `{before[auto]}`" if auto in before else "refuses the config",
            f"`{ours if auto not in before else f'drop_in.{ours}'}`",
        ]
        for auto, ours in REGISTERED.items()
    ]
    assert rows == expected


def test_config_is_transformers_own(oracle_checkpoint):
    config = AutoConfig.from_pretrained(oracle_checkpoint)
    assert type(config) is DiffusionGemmaConfig is transformers.DiffusionGemmaConfig
    assert config.to_diff_dict() == AutoConfig.from_pretrained(oracle_checkpoint, trust_remote_code=True).to_diff_dict()
    assert config.text_config.to_dict().items() >= tiny_config().text_config.to_diff_dict().items()
    assert type(AutoConfig.for_model("diffusion_gemma")) is DiffusionGemmaConfig


@pytest.mark.parametrize("name", ["text", "sudoku", "decisions", "tools"])
def test_tokenizer_is_the_checkpoints(name):
    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint(name))
    config = AutoConfig.from_pretrained(default_checkpoint(name))
    assert len(tokenizer) <= config.text_config.vocab_size and tokenizer.padding_side == "left"
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id) == (config.text_config.pad_token_id, 2)


def test_processor_of_a_checkpoint_without_images_is_its_tokenizer(tmp_path):
    """transformers' server asks for one. A folder that names none gives the usual error: the file that is missing, or the library."""
    assert type(AutoProcessor.from_pretrained(default_checkpoint())) is type(AutoTokenizer.from_pretrained(default_checkpoint()))
    shutil.copytree(default_checkpoint(), tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in settings.items() if key != "processor_class"}))
    with pytest.raises((OSError, ImportError), match="preprocessor_config.json|pip install pillow|Gemma4Processor"):
        AutoProcessor.from_pretrained(tmp_path)


@pytest.mark.skipif(not importlib.util.find_spec("torchvision"), reason="transformers' Gemma4Processor needs torchvision")
def test_processor_feeds_images_to_the_model(tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(default_checkpoint())
    audio = {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}  # the processor wants their names
    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint(), extra_special_tokens=audio)
    vision = model.config.vision_config
    sizes = {"max_soft_tokens": 70, "patch_size": vision.patch_size, "pooling_kernel_size": vision.pooling_kernel_size}
    images, videos = transformers.Gemma4ImageProcessor(**sizes), transformers.Gemma4VideoProcessor(**sizes)
    transformers.Gemma4Processor(transformers.Gemma4AudioFeatureExtractor(), images, tokenizer, videos).save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = processor(text=["<|image|> in words"], images=[np.zeros((24, 36, 3), np.uint8)], return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) > 1 and "pixel_values" in inputs
    sequences = model.generate(**inputs, max_new_tokens=5, canvas_length=8, seed=0, eos_token_id=None)
    assert sequences.shape == (1, inputs["input_ids"].shape[1] + 5)
