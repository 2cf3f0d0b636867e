"""NVFP4 checkpoints of both producers load as plain models with the numbers they stand for."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build_oracle, tokens
from transformers import AutoModelForCausalLM

from modeling_diffusiongemma.weights.nvfp4 import StoredNVFP4Config, dequantize_nvfp4

E4M3 = torch.float8_e4m3fn
CODES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
SIZES = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}  # rows of whole groups of 16
CONFIGS = {
    "compressed-tensors": {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True, "dynamic": False}}},
        "ignore": ["lm_head"],
    },
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
}  # fmt: skip


def nvfp4(weight, producer):
    """A matrix `(rows, K)` as its stored tensors, and what they stand for."""
    groups = weight.float().reshape(len(weight), -1, 16)
    largest = groups.abs().amax(dim=-1)
    matrix = 448 * 6 / largest.max()  # compressed-tensors' convention: what the scales were multiplied by
    scale = (largest / 6 * matrix).to(E4M3)
    values = groups / (scale.float() / matrix).clamp(min=1e-12)[..., None]
    codes = (values[..., None] - CODES).abs().argmin(dim=-1).reshape(len(weight), -1).to(torch.uint8)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    meaning = CODES[codes.int()] * (scale.float() / matrix).repeat_interleave(16, dim=1)
    if producer == "modelopt":
        return {"weight": packed, "weight_scale": scale, "weight_scale_2": 1 / matrix, "input_scale": torch.tensor(0.1)}, meaning
    return {
        "weight_packed": packed,
        "weight_scale": scale,
        "weight_global_scale": matrix[None],
        "input_global_scale": torch.ones(1),
    }, meaning


def write(folder, producer):
    """Experts one by one in NVFP4, and with compressed-tensors attention too; returns the plain weights they stand for."""
    oracle = build_oracle(**SIZES).to(torch.bfloat16)
    oracle.save_pretrained(folder)
    plain = load_file(folder / "model.safetensors")
    tensors, meant = {}, {}
    for name, weight in plain.items():
        if "decoder.layers" in name and ".experts." in name:
            parts = {"gate": 0, "up": 1} if "gate_up" in name else {"down": 0}
            halves = weight.chunk(len(parts), dim=1)
            stacked = []
            for part, place in parts.items():
                each = [nvfp4(one, producer) for one in halves[place]]
                stacked.append(torch.stack([meaning for _, meaning in each]))
                for expert, (stored, _) in enumerate(each):
                    prefix = f"{name.rpartition('.')[0]}.{expert}.{part}_proj"
                    tensors |= {f"{prefix}.{suffix}": tensor for suffix, tensor in stored.items()}
            meant[name] = torch.cat(stacked, dim=1)
        elif producer == "compressed-tensors" and re.search(r"decoder\.layers\.\d+\.self_attn\.[qkvo]_proj", name):
            stored, meant[name] = nvfp4(weight, producer)
            tensors |= {f"{name.removesuffix('.weight')}.{suffix}": tensor for suffix, tensor in stored.items()}
        else:
            tensors[name], meant[name] = weight, weight.float()
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIGS[producer]}))
    return meant


producers = pytest.mark.parametrize("producer", sorted(CONFIGS))


def test_all_codes_have_their_values():
    packed = torch.arange(256, dtype=torch.uint8).view(8, 32)
    got = dequantize_nvfp4(packed, torch.ones(8, 4).to(E4M3), torch.tensor(2.0), torch.float32)
    numbers = torch.arange(256).view(8, 32)
    assert torch.equal(got[:, ::2], 2 * CODES[numbers % 16]) and torch.equal(got[:, 1::2], 2 * CODES[numbers // 16])


def test_numbers_are_those_of_compressed_tensors():
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    stored, meaning = nvfp4(torch.randn(6, 48, generator=torch.Generator().manual_seed(0)), "compressed-tensors")
    codes = helpers.unpack_fp4_from_uint8(stored["weight_packed"], 6, 48, dtype=torch.float32)
    scales = (stored["weight_scale"].float() / stored["weight_global_scale"]).repeat_interleave(16, dim=1)
    torch.testing.assert_close(codes * scales, meaning)


@producers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_loads_with_the_numbers_it_stands_for(producer, dtype, tmp_path):
    meant = write(tmp_path, producer)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    state = model.state_dict()
    for name, expected in meant.items():
        assert state[name].dtype == dtype, name
        # a scale times 1 / (1 / global) differs in the last bit from a scale over global
        torch.testing.assert_close(state[name].float(), expected.to(dtype).float(), rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=0)
    assert model(tokens(1, 9), decoder_input_ids=tokens(1, 5)).logits.isfinite().all()


@producers
def test_loaded_model_is_a_plain_one_and_saves_as_one(producer, tmp_path):
    write(tmp_path / "nvfp4", producer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nvfp4")
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    inputs = {"input_ids": tokens(1, 9), "decoder_input_ids": tokens(1, 5)}
    assert torch.equal(model(**inputs).logits, again(**inputs).logits)


def damage(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


EXPERT = "model.decoder.layers.1.experts.2.up_proj"


@producers
@pytest.mark.parametrize("scale", [1, 2])
def test_missing_scale_is_named(producer, scale, tmp_path):
    write(tmp_path, producer)
    names = {"compressed-tensors": ("weight_packed", "weight_scale", "weight_global_scale")}.get(
        producer, ("weight", "weight_scale", "weight_scale_2")
    )
    damage(tmp_path, lambda tensors: tensors.pop(f"{EXPERT}.{names[scale]}"))
    with pytest.raises(ValueError, match=rf"model\.safetensors holds {EXPERT}\.{names[0]} without {EXPERT}\.{names[scale]}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_missing_expert_is_named(tmp_path):
    write(tmp_path, "modelopt")
    damage(tmp_path, lambda tensors: tensors.pop(f"{EXPERT}.weight"))
    with pytest.raises(ValueError, match=rf"none of 1 files holds {EXPERT}\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_matrix_scale_that_is_no_positive_number_is_named(value, tmp_path):
    write(tmp_path, "modelopt")
    damage(tmp_path, lambda tensors: tensors[f"{EXPERT}.weight_scale_2"].fill_(value))
    with pytest.raises(ValueError, match=rf"{EXPERT}\.weight_scale_2 in .*model\.safetensors holds \[{value}\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, r"\['quant_algo'\]` is 'FP8'; expected 'NVFP4'"),
        ({"format": "nvfp4-other"}, r"\['format'\]` is 'nvfp4-other'; expected 'nvfp4-pack-quantized'"),
        ({"format": "nvfp4-pack-quantized", "config_groups": {"g": {"weights": {"num_bits": 4}}}}, r"\['g'\]\['weights'\]` is"),
    ],
)
def test_other_formats_are_refused_by_name(config, match):
    with pytest.raises(ValueError, match=match):
        StoredNVFP4Config.from_dict(config)
