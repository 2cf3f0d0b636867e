"""A saved generation config is the one that was set, and transformers' class reads what is written."""

import json
import os
import subprocess

import pytest
from small_models import small_model
from transformers import CompileConfig, DiffusionGemmaForBlockDiffusion, DiffusionGemmaGenerationConfig

from generation import DiffusionGenerationConfig
from generation.arguments import BACKENDS, CACHES, DECODINGS, FIELDS, NOISES, SAMPLERS

OWN = "diffusion_generation_config.json"
INFINITY = float("inf")
WHOLE, FROM_ONE, FLAG, TOKEN = (0, 1, 7, 2**40), (1, 2, 2**40), (True, False), (0, 5, 2**40)
VALUES = {
    **dict.fromkeys(("max_new_tokens", "max_length", "patience", "corrector_positions", "self_conditioning_steps"), FROM_ONE),
    **dict.fromkeys(("max_denoising_steps", "canvas_length", "num_return_sequences"), (1, 48, 2**20)),
    **dict.fromkeys(("stability_threshold", "corrector_steps", "min_new_tokens", "min_length", "no_repeat_ngram_size", "top_k"), WHOLE),
    **dict.fromkeys(("entropy_bound", "confidence_threshold", "joint_threshold", "max_time"), (1, 0.25, 1e-30, INFINITY)),
    **dict.fromkeys(("t_min", "t_max", "repetition_penalty"), (1, 0.3, 1e-9, 1e9)), "temperature": (0, 1, 1.0, 0.5, 1e9),
    **dict.fromkeys(("confidence", "typical_p"), (1, 1.0, 0.25)), **dict.fromkeys(("top_p", "min_p"), (0, 0.0, 0.5, 1, 1.0)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), (0, 0.0, 1e-4)),
    **dict.fromkeys(
        ("ignore_after_eos", "do_sample", "output_scores", "output_logits", "return_dict_in_generate", "disable_compile"), FLAG
    ),
    "sampler": SAMPLERS, "decoding": DECODINGS, "noise": NOISES, "backend": BACKENDS, "cache_implementation": CACHES,
    **dict.fromkeys(("bos_token_id", "pad_token_id", "mask_token_id"), TOKEN), "eos_token_id": (0, 7, [], [1, 106, 50], (3, 4)),
    "suppress_tokens": ([], [0], (4, 5)), "bad_words_ids": ([[5]], [[5, 6], (7,)]),
    "sequence_bias": ({(5,): 2.0, (5, 6): -INFINITY}, [[[5], 1]], {(7,): 3}), "stop_strings": ("x", ["x", "yz"], ["\u2028"]),
    "cache_config": ({}, {"backend": "fp8"}, {"nbits": 4, "axis_key": None}), "transformers_version": (),
    "compile_config": (CompileConfig(), CompileConfig(fullgraph=True, mode="default"), {"dynamic": True}),
}  # fmt: skip
CASES = [(name, value) for name, values in VALUES.items() for value in values]


def settings(config):
    """Comparable, and without what is no setting."""
    fields = {name: value for name, value in config.__dict__.items() if name[0] != "_" and name != "transformers_version"}
    return {name: value.to_dict() if isinstance(value, CompileConfig) else value for name, value in fields.items()}


def test_every_field_has_values_here():
    assert VALUES.keys() == FIELDS.keys()


@pytest.mark.parametrize(("name", "value"), CASES)
def test_every_value_of_every_field_is_loaded_as_it_was_saved(tmp_path, name, value):
    """Every False was dropped, tuples of a bias came back as text, and compile_config not at all."""
    config = DiffusionGenerationConfig(**{name: value})
    config.save_pretrained(tmp_path)
    loaded = DiffusionGenerationConfig.from_pretrained(tmp_path)
    assert settings(loaded) == settings(config) and getattr(loaded, name) is not None
    assert isinstance(getattr(loaded, name), bool) == isinstance(value, bool)
    assert DiffusionGenerationConfig.from_dict(config.to_dict()).to_diff_dict() == config.to_diff_dict()
    DiffusionGemmaGenerationConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", sorted(VALUES))
def test_transformers_class_reads_its_fields_of_what_is_saved(tmp_path, name):
    for value in VALUES[name]:
        DiffusionGenerationConfig(**{name: value}).save_pretrained(tmp_path)
        loaded = DiffusionGemmaGenerationConfig.from_pretrained(tmp_path)
        if hasattr(loaded, name):
            assert getattr(loaded, name) == (list(value) if isinstance(value, tuple) else value)


def test_equal_temperatures_survive_though_transformers_class_refuses_them(tmp_path):
    DiffusionGenerationConfig(t_min=0.7, t_max=0.7).save_pretrained(tmp_path)
    loaded = DiffusionGenerationConfig.from_pretrained(tmp_path)
    assert (loaded.t_min, loaded.t_max) == (0.7, 0.7)
    assert DiffusionGemmaGenerationConfig.from_pretrained(tmp_path).t_max == pytest.approx(0.7, abs=1e-12)


def test_models_settings_travel_with_it(tmp_path):
    """`do_sample=False` was gone, and the model sampled again; transformers' class refused a checkpoint with fields it does not know."""
    own = small_model()
    own.generation_config = DiffusionGenerationConfig(
        do_sample=False, pad_token_id=0, top_k=3, output_scores=True, decoding="verified", eos_token_id=[]
    )
    own.save_pretrained(tmp_path)
    loaded = type(own).from_pretrained(tmp_path).generation_config
    assert settings(loaded) == {**settings(own.generation_config.filled()), "temperature": 1.0}
    assert DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path).generation_config.pad_token_id == 0
    own.generation_config = DiffusionGenerationConfig(pad_token_id=0)
    own.save_pretrained(tmp_path)
    assert not (tmp_path / OWN).exists(), "the settings of before"
    assert type(own).from_pretrained(tmp_path).generation_config.do_sample is None


def test_bad_settings_are_refused_and_nothing_is_written(tmp_path):
    own = small_model()
    own.generation_config.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    own.generation_config.do_sample = "no"
    for save in (own.save_pretrained, own.generation_config.save_pretrained):
        with pytest.raises(ValueError, match="do_sample"):
            save(tmp_path)
    config = DiffusionGenerationConfig()
    config.penalty_alpha = object()
    with pytest.raises(ValueError, match="penalty_alpha"):
        config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="push_to_hub"):
        DiffusionGenerationConfig().save_pretrained(tmp_path, push_to_hub=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_damaged_second_file_is_named(tmp_path):
    DiffusionGenerationConfig(top_k=3).save_pretrained(tmp_path)
    (tmp_path / OWN).write_text("{")
    with pytest.raises(OSError, match=OWN):
        DiffusionGenerationConfig.from_pretrained(tmp_path)


def test_refused_update_changes_nothing():
    config = DiffusionGenerationConfig(top_k=3)
    with pytest.raises(ValueError, match="top_p"):
        config.update(top_k=5, top_p=2.0)
    assert config.top_k == 3 and config.top_p is None


@pytest.mark.parametrize("python", [path for path in os.environ.get("OTHER_PYTHONS", "").split(os.pathsep) if path])
def test_another_transformers_reads_what_is_saved(tmp_path, python):
    """With OTHER_PYTHONS naming interpreters that have other versions of transformers."""
    for number, (name, value) in enumerate(CASES):
        DiffusionGenerationConfig(**{name: value}).save_pretrained(tmp_path / str(number))
    script = (
        "import sys, pathlib; from transformers import DiffusionGemmaGenerationConfig as C;"
        "[C.from_pretrained(folder) for folder in pathlib.Path(sys.argv[1]).iterdir()]"
    )
    subprocess.run([python, "-c", script, str(tmp_path)], check=True, env={**os.environ, "PYTHONPATH": ""})


def test_files_hold_what_is_theirs(tmp_path):
    DiffusionGenerationConfig(top_k=3, max_new_tokens=7, entropy_bound=0.2, do_sample=False).save_pretrained(tmp_path)
    published, own = (json.loads((tmp_path / name).read_text()) for name in ("generation_config.json", OWN))
    assert published.keys() == {"max_new_tokens", "sampler_config", "transformers_version"}
    assert own == {"top_k": 3, "do_sample": False}
