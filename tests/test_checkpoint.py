"""Loading and saving in the released layout, and what is refused: damaged files, impossible configs, inputs that do not fit."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import CANVAS, VOCAB, build_oracle, ours, same_weights, tiny_config, tokens
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    DiffusionGemmaForBlockDiffusion,
)

from modeling_diffusiongemma import DiffusionGemmaBlockModel, DiffusionGemmaForMaskedBlockLM, drop_in

ROOT = Path(__file__).parents[1]
RELEASED = Path(__file__).parent / "data" / "released"
SHAPES = {  # of the files of google/diffusiongemma-26B-A4B-it
    "model.decoder.embed_tokens.weight": (262144, 2816),
    "model.decoder.norm.weight": (2816,),
    "model.decoder.self_conditioning.pre_norm.weight": (2816,),
    "model.decoder.self_conditioning.gate_proj.weight": (2112, 2816),
    "model.decoder.layers.0.experts.gate_up_proj": (128, 1408, 2816),
    "model.decoder.layers.0.experts.down_proj": (128, 2816, 704),
    "model.decoder.layers.0.router.proj.weight": (128, 2816),
    "model.decoder.layers.0.router.per_expert_scale": (128,),
    "model.decoder.layers.0.self_attn.v_proj.weight": (2048, 2816),
    "model.decoder.layers.5.self_attn.q_proj.weight": (8192, 2816),
    "model.decoder.layers.5.self_attn.k_proj.weight": (1024, 2816),
    "model.decoder.layers.5.self_attn.k_norm.weight": (512,),
    "model.decoder.layers.29.layer_scalar": (1,),
    "model.encoder.language_model.layers.29.layer_scalar": (1,),
    "model.encoder.vision_tower.std_bias": (1152,),
    "model.encoder.embed_vision.embedding_projection.weight": (2816, 1152),
}
DAMAGES = ("missing", "empty", "header_cut", "data_cut", "garbage", "no_header", "name_hit")


pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """An oracle's checkpoint in several shards; read only."""
    folder = tmp_path_factory.mktemp("sharded")
    build_oracle().save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def stored(model):
    """What a file holds of a state dict: everything but the tied head."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def clean(info):
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info


def released_on_meta(kind):
    with torch.device("meta"):
        return kind(AutoConfig.from_pretrained(RELEASED))


def test_released_model_has_the_published_parameters():
    """Each weight once: the oracle builds two stacks and ties them."""
    model = released_on_meta(DiffusionGemmaForMaskedBlockLM)
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_823_778_864
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in names if name.startswith("model.encoder.language_model")] == []


def test_released_model_stores_the_published_tensors():
    tensors = stored(released_on_meta(DiffusionGemmaForMaskedBlockLM))
    assert len(tensors) == 1047
    assert 2 * sum(tensor.numel() for tensor in tensors.values()) == 51_647_562_456  # bytes in bfloat16
    assert {name: tuple(tensors[name].shape) for name in SHAPES} == SHAPES
    assert sum(name.startswith("model.encoder.vision_tower.") for name in tensors) == 355
    assert "model.decoder.layers.5.self_attn.v_proj.weight" not in tensors  # full attention


def test_released_model_stores_the_oracles_names_and_shapes():
    oracle = released_on_meta(DiffusionGemmaForBlockDiffusion)
    expected = {name: t.shape for name, t in oracle.state_dict().items() if name not in oracle.all_tied_weights_keys}
    assert {name: t.shape for name, t in stored(released_on_meta(DiffusionGemmaForMaskedBlockLM)).items()} == expected


@pytest.mark.parametrize("shards", [False, True])
def test_oracles_checkpoint_loads_without_missing_or_unexpected_keys(shards, oracle_checkpoint, sharded):
    folder = sharded if shards else oracle_checkpoint
    model, info = DiffusionGemmaForMaskedBlockLM.from_pretrained(folder, output_loading_info=True)
    clean(info)
    assert not model.training
    expected = build_oracle().state_dict()
    equal(stored(model), {name: expected[name] for name in stored(model)})
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight


@pytest.mark.parametrize("shard_size", ["50GB", "60KB"])
def test_oracle_loads_ours_bit_for_bit(shard_size, tmp_path):
    ours().save_pretrained(tmp_path, max_shard_size=shard_size)
    oracle, info = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path, output_loading_info=True)
    clean(info)
    expected = build_oracle().state_dict()
    equal(oracle.state_dict(), expected)


def test_ours_writes_the_file_the_oracle_writes(oracle_checkpoint, tmp_path):
    ours().save_pretrained(tmp_path)
    equal(load_file(tmp_path / "model.safetensors"), load_file(oracle_checkpoint / "model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_for_bit(dtype, tmp_path):
    model = same_weights(build_oracle()).to(dtype)
    model.save_pretrained(tmp_path)
    again, info = DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path, output_loading_info=True)
    clean(info)
    assert again.dtype == dtype
    equal(again.state_dict(), model.state_dict())
    inputs = {"input_ids": tokens(1, 9), "decoder_input_ids": tokens(1, CANVAS, 1)}
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_loading_in_bfloat16_rounds_the_weights(oracle_checkpoint):
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(oracle_checkpoint, dtype=torch.bfloat16)
    equal(stored(model), {name: tensor.bfloat16() for name, tensor in stored(ours()).items()})


def test_saved_config_names_transformers_architecture(tmp_path):
    """Every other runtime finds its own model by this name; ours would make the checkpoint unreadable there."""
    for model, name in ((ours(), "DiffusionGemmaForBlockDiffusion"), (ours().model, "DiffusionGemmaModel")):
        model.save_pretrained(tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["architectures"] == [name]


def test_base_model_and_oracles_base_model_read_each_other(tmp_path):
    ours().model.save_pretrained(tmp_path)
    oracle, info = transformers.DiffusionGemmaModel.from_pretrained(tmp_path, output_loading_info=True)
    clean(info)
    equal(oracle.state_dict(), build_oracle().model.state_dict())
    oracle.save_pretrained(tmp_path / "back")
    model, info = DiffusionGemmaBlockModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    clean(info)
    equal(model.state_dict(), ours().model.state_dict())


@pytest.mark.parametrize(
    ("auto", "expected"),
    [
        (AutoModel, drop_in.DiffusionGemmaModel),
        (AutoModelForCausalLM, DiffusionGemmaForMaskedBlockLM),
        (AutoModelForImageTextToText, drop_in.DiffusionGemmaForBlockDiffusion),
        (AutoModelForMultimodalLM, drop_in.DiffusionGemmaForBlockDiffusion),
    ],
)
def test_auto_classes_give_ours(auto, expected, oracle_checkpoint):
    model, info = auto.from_pretrained(oracle_checkpoint, output_loading_info=True)
    assert type(model) is expected
    clean(info)
    assert type(auto.from_config(tiny_config())) is expected


def changed(folder, target, change):
    """Copies a one-file checkpoint to `target` and changes its tensors."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_missing_and_unexpected_keys_are_reported_exactly(oracle_checkpoint, tmp_path):
    missing = {"model.decoder.norm.weight", "model.encoder.vision_tower.std_scale"}

    def change(tensors):
        for name in missing:
            del tensors[name]
        tensors["model.decoder.layers.1.self_attn.v_proj.weight"] = torch.zeros(16, 32)  # a full-attention layer has none

    folder = changed(oracle_checkpoint, tmp_path, change)
    _, info = DiffusionGemmaForMaskedBlockLM.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == missing
    assert set(info["unexpected_keys"]) == {"model.decoder.layers.1.self_attn.v_proj.weight"}


@pytest.mark.parametrize("prefix", ["model.encoder.language_model.layers.", "model.decoder.layers."])
def test_absent_layer_scalars_load_as_ones(prefix, oracle_checkpoint, tmp_path):
    """transformers' own model reads uninitialised memory where the prompt pass's scalars are absent."""
    absent = [f"{prefix}{layer}.layer_scalar" for layer in range(4)]
    folder = changed(oracle_checkpoint, tmp_path, lambda tensors: [tensors.pop(name) for name in absent])
    model, info = DiffusionGemmaForMaskedBlockLM.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == set(absent)
    state = model.state_dict()
    assert [state[name].tolist() for name in absent] == [[1.0]] * 4


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("shards", [False, True])
def test_damaged_file_is_an_oserror_that_names_it(shards, damage, oracle_checkpoint, sharded, tmp_path):
    folder = Path(shutil.copytree(sharded if shards else oracle_checkpoint, tmp_path / "damaged"))
    path = sorted(folder.glob("*.safetensors"))[-1]
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({
            "empty": b"", "header_cut": content[:50], "data_cut": content[:-7], "garbage": b"\x08" * 900,
            "no_header": b"\x03" + bytes(7) + b"[1]", "name_hit": content.replace(b".weight", b".w\xffight", 1),
        }[damage])  # fmt: skip
    with pytest.raises(OSError, match=path.name):
        DiffusionGemmaForMaskedBlockLM.from_pretrained(folder)


def test_tensor_of_the_wrong_shape_is_named_without_loading_twice(oracle_checkpoint, tmp_path, monkeypatch):
    name = "model.decoder.layers.0.mlp.up_proj.weight"
    folder = changed(oracle_checkpoint, tmp_path, lambda tensors: tensors.update({name: torch.zeros(36, 31)}))
    loads, load = [], DiffusionGemmaForMaskedBlockLM._load_pretrained_model
    monkeypatch.setattr(DiffusionGemmaForMaskedBlockLM, "_load_pretrained_model", lambda *args: loads.append(args) or load(*args))
    with pytest.raises(ValueError, match=rf"{name} has shape \(36, 31\), expected \(36, 32\)$"):
        DiffusionGemmaForMaskedBlockLM.from_pretrained(folder)
    assert len(loads) == 1, "loading again takes minutes"


def test_empty_folder_and_broken_config_are_oserrors(oracle_checkpoint, tmp_path):
    with pytest.raises(OSError, match=r"config\.json|safetensors"):
        DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path)
    folder = Path(shutil.copytree(oracle_checkpoint, tmp_path / "broken"))
    (folder / "config.json").write_text("")
    with pytest.raises(OSError, match="config"):
        DiffusionGemmaForMaskedBlockLM.from_pretrained(folder)


def test_saving_onto_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="save_directory"):
        ours().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "num_experts",
                                   "top_k_experts", "moe_intermediate_size", "sliding_window"])  # fmt: skip
@pytest.mark.parametrize("value", [0, -3])
def test_config_value_that_is_not_positive_is_named(field, value):
    config = tiny_config()
    setattr(config.text_config, field, value)
    for kind in (DiffusionGemmaForMaskedBlockLM, DiffusionGemmaBlockModel):
        with pytest.raises(ValueError, match=f"`{field}`"):
            kind(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_experts", None), ("top_k_experts", None), ("moe_intermediate_size", None), ("top_k_experts", 5),
        ("num_hidden_layers", 3), ("layer_types", ["full_attention"]), ("layer_types", ["chunked_attention"] * 4),
        ("use_bidirectional_attention", "all"), ("final_logit_softcapping", None), ("final_logit_softcapping", 0.0),
        ("final_logit_softcapping", -30.0), ("head_dim", 0), ("head_dim", 7), ("num_key_value_heads", 0),
        ("num_key_value_heads", 3),
    ],
)  # fmt: skip
def test_impossible_config_value_is_named(field, value):
    config = tiny_config()
    setattr(config.text_config, field, value)
    with pytest.raises(ValueError, match=f"`({field}|layer_types)`"):
        DiffusionGemmaForMaskedBlockLM(config)


@pytest.mark.parametrize("value", [None, 0, 0.0, -30.0, float("nan"), "30"])
def test_soft_cap_set_on_a_built_model_is_honoured_or_named(value):
    """None was a TypeError that named nothing, behind the prompt pass, and 0 gave NaN."""
    model = DiffusionGemmaForMaskedBlockLM(tiny_config()).eval()
    ids = torch.tensor([[3, 4, 5]])
    model.config.text_config.final_logit_softcapping = 5.0
    assert float(model.causal_logits(ids).abs().max()) <= 5
    model.config.text_config.final_logit_softcapping = value
    canvas = ids[:, :1].expand(1, CANVAS)
    calls = (
        lambda: model.generate(ids, max_new_tokens=4),
        lambda: model.causal_logits(ids),
        lambda: model(ids, decoder_input_ids=canvas),
    )
    for call in calls:
        with pytest.raises(ValueError, match="`final_logit_softcapping` is"):
            call()


@pytest.mark.parametrize(("field", "value"), [("canvas_length", 0), ("canvas_length", -1), ("canvas_length", None)])
def test_impossible_top_level_value_is_named(field, value):
    config = tiny_config()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=f"`{field}`"):
        DiffusionGemmaForMaskedBlockLM(config)


def test_impossible_config_of_a_checkpoint_is_named(oracle_checkpoint, tmp_path):
    folder = Path(shutil.copytree(oracle_checkpoint, tmp_path / "impossible"))
    config = json.loads((folder / "config.json").read_text())
    config["canvas_length"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`canvas_length`"):
        DiffusionGemmaForMaskedBlockLM.from_pretrained(folder)


SEEN, LENGTH = 6, 5  # tokens in the cache, tokens of the prompt
ONES = torch.ones(2, SEEN + LENGTH, dtype=torch.int64)
LOGITS = torch.zeros(2, CANVAS, VOCAB)
PROMPT_FAULTS = {
    "negative id": ({"input_ids": torch.full((2, LENGTH), -1)}, "`input_ids`"),
    "id too large": ({"input_ids": torch.full((2, LENGTH), VOCAB)}, "`input_ids`"),
    "float ids": ({"input_ids": torch.ones(2, LENGTH)}, "`input_ids`"),
    "one-dimensional ids": ({"input_ids": tokens(1, LENGTH)[0]}, "`input_ids`"),
    "empty prompt": ({"input_ids": tokens(2, 0)}, "prompt is empty"),
    "ids and embeddings": ({"inputs_embeds": torch.zeros(2, LENGTH, 32)}, "`inputs_embeds`"),
    "mask without the cached tokens": ({"attention_mask": ONES[:, SEEN:]}, "`attention_mask`"),
    "mask of one row": ({"attention_mask": ONES[:1]}, "`attention_mask`"),
    "mask of wrong dimension": ({"attention_mask": ONES[0]}, "`attention_mask`"),
    "rows other than the cache's": (
        {"input_ids": tokens(3, LENGTH), "decoder_input_ids": tokens(3, CANVAS)},
        "cache|input_ids",
    ),
    "positions of wrong length": ({"position_ids": torch.arange(LENGTH + 1)[None]}, "`position_ids`"),
}
CANVAS_FAULTS = {
    "negative canvas id": ({"decoder_input_ids": torch.full((2, CANVAS), -1)}, "`decoder_input_ids`"),
    "canvas id too large": ({"decoder_input_ids": torch.full((2, CANVAS), VOCAB)}, "`decoder_input_ids`"),
    "float canvas": ({"decoder_input_ids": torch.ones(2, CANVAS)}, "`decoder_input_ids`"),
    "canvas of no length": ({"decoder_input_ids": tokens(2, 0)}, "`decoder_input_ids`"),
    "canvas of other rows": ({"decoder_input_ids": tokens(3, CANVAS)}, "`decoder_input_ids`"),
    "canvas mask without the canvas": ({"decoder_attention_mask": ONES}, "`decoder_attention_mask`"),
    "canvas positions of wrong length": ({"decoder_position_ids": torch.arange(CANVAS - 1)[None]}, "`decoder_position_ids`"),
    "logits of another vocabulary": (
        {"self_conditioning_logits": LOGITS[..., :-1]},
        "`self_conditioning_logits`",
    ),
    "logits of another canvas": ({"self_conditioning_logits": LOGITS[:, :-1]}, "`self_conditioning_logits`"),
    "self-conditioning mask of other rows": (
        {"self_conditioning_logits": LOGITS, "self_conditioning_mask": torch.ones(3, dtype=torch.bool)},
        "`self_conditioning_mask`",
    ),
    "labels of another canvas": ({"labels": tokens(2, CANVAS - 1)}, "`labels`"),
}
FAULTS = PROMPT_FAULTS | CANVAS_FAULTS


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_and_leaves_the_cache_alone(fault, static):
    """A caller that catches the error and tries again must not find the prompt in the cache twice."""
    model, (inputs, match) = ours(), FAULTS[fault]
    config = model.config.text_config
    cache = transformers.StaticCache(config, max_cache_len=40) if static else transformers.DynamicCache(config=config)
    model.prefill(tokens(2, SEEN), past_key_values=cache)
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=match):
        model(**{"input_ids": tokens(2, LENGTH), "decoder_input_ids": tokens(2, CANVAS), "past_key_values": cache, **inputs})
    for layer, earlier in zip(cache.layers, before.layers, strict=True):
        assert int(layer.get_seq_length()) == SEEN
        assert torch.equal(layer.keys, earlier.keys) and torch.equal(layer.values, earlier.values)


def test_prompt_longer_than_a_static_cache_is_refused_before_any_layer_stores_it():
    """Sliding layers take any length, full ones do not: half of the layers would be a prompt ahead of the others."""
    model = ours()
    cache = transformers.StaticCache(model.config.text_config, max_cache_len=12)
    model.prefill(tokens(2, SEEN), past_key_values=cache)
    with pytest.raises(ValueError, match="max_cache_len"):
        model.prefill(tokens(2, 9), past_key_values=cache)
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [SEEN] * 4


@pytest.mark.parametrize("kind", [None, transformers.DynamicCache])
def test_canvas_without_a_prompt_is_refused(kind):
    with pytest.raises(ValueError, match="prompt"):
        ours()(decoder_input_ids=tokens(2, CANVAS), past_key_values=None if kind is None else kind())


@pytest.mark.parametrize("fault", ["mm types of wrong length", "embeddings with images", "neither ids nor embeddings"])
def test_prefill_names_what_does_not_fit(fault):
    inputs = {
        "mm types of wrong length": {"input_ids": tokens(1, 5), "mm_token_type_ids": torch.zeros(1, 4)},
        "embeddings with images": {"inputs_embeds": torch.zeros(1, 5, 32), "pixel_values": torch.zeros(1, 16, 12)},
        "neither ids nor embeddings": {},
    }[fault]
    match = {"mm types of wrong length": "mm_token_type_ids", "embeddings with images": "pixel_values"}.get(fault, "input_ids")
    cache = transformers.DynamicCache(config=ours().config.text_config)
    with pytest.raises(ValueError, match=match):
        ours().prefill(**inputs, past_key_values=cache)
    assert cache.get_seq_length() == 0


def run_import(folder):
    """Imports the package with `folder` first on the path; -S: before any installed package, which the check must not need."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    command = [sys.executable, "-S", "-B", "-c", "import modeling_diffusiongemma"]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("file", ["generation/__init__.py", "generation.py"])
def test_foreign_generation_package_is_one_clear_import_error(file, tmp_path):
    """`generation` is a name that others use: `No module named generation.mixin` would send the user looking here."""
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    finished = run_import(tmp_path)
    assert finished.returncode == 1
    assert finished.stderr.count("Traceback") == 1
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: modeling_diffusiongemma needs") and str(path) in last


def test_absent_generation_package_is_one_clear_import_error(tmp_path):
    (tmp_path / "modeling_diffusiongemma").symlink_to(ROOT / "modeling_diffusiongemma")
    command = [sys.executable, "-S", "-B", "-c", "import modeling_diffusiongemma"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: modeling_diffusiongemma needs") and "finds nothing" in last
