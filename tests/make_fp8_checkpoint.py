"""Writes a synthetic checkpoint in the layout of RedHatAI/diffusiongemma-26B-A4B-it-FP8-dynamic, from a random tiny model.

    python tests/make_fp8_checkpoint.py FOLDER

It is written out name by name, by the facts published about that copy, and shares no code with the package: what the package
reads and writes is tested against it.
"""

import json
import os
import sys

import torch
from safetensors.torch import save_file
from tiny import build_oracle

E4M3 = torch.float8_e4m3fn


def quantization_config(layers: int, vision_layers: int) -> dict:
    """The published `quantization_config`, its `ignore` list cut to the model's layers (255 names for 30 and 27)."""
    vision = [
        f"model.encoder.vision_tower.encoder.layers.{layer}.{name}.linear"
        for layer in range(vision_layers)
        for name in (*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down")))
    ]
    routers = [f"model.{side}.layers.{layer}.router.proj" for side in ("decoder", "encoder.language_model") for layer in range(layers)]
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True},
            "output_activations": None,
        }},
        "ignore": [
            "lm_head", *routers, *(f"model.decoder.self_conditioning.{part}_proj" for part in ("gate", "up", "down")), *vision,
            "model.encoder.vision_tower.patch_embedder.input_proj", "model.encoder.embed_vision.embedding_projection",
        ],
        "kv_cache_scheme": None,
    }  # fmt: skip


def fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """`.weight` and `.weight_scale` of a matrix `(out, in)`."""
    weight = weight.float()
    scale = (weight.abs().max(dim=1).values / 448).to(torch.bfloat16)[:, None]
    return {".weight": (weight / scale.float()).clamp(-448, 448).to(E4M3), ".weight_scale": scale}


def published_tensors(weights: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """The released layout's tensors (`model.state_dict()`) in the FP8 copy's layout; what is not FP8 is bfloat16."""
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items() if name != "lm_head.weight"}
    for layer in range(layers):
        prefix = f"model.decoder.layers.{layer}"
        linears = [f"{prefix}.self_attn.{part}_proj" for part in "qkvo"] + [f"{prefix}.mlp.{part}_proj" for part in ("gate", "up", "down")]
        for name in linears:
            if f"{name}.weight" in tensors:  # full-attention layers have no v_proj
                tensors |= {f"{name}{suffix}": tensor for suffix, tensor in fp8(weights[f"{name}.weight"]).items()}
        gate_up = weights[f"{prefix}.experts.gate_up_proj"]
        half = gate_up.shape[1] // 2
        parts = {"gate": gate_up[:, :half], "up": gate_up[:, half:], "down": weights[f"{prefix}.experts.down_proj"]}
        del tensors[f"{prefix}.experts.gate_up_proj"], tensors[f"{prefix}.experts.down_proj"]
        for part, stacked in parts.items():
            for expert, weight in enumerate(stacked):
                name = f"{prefix}.experts.{expert}.{part}_proj"
                tensors |= {f"{name}{suffix}": tensor for suffix, tensor in fp8(weight).items()}
    return tensors


def write_fp8_checkpoint(model, folder, shards: int = 1) -> None:
    """Args: `model`, transformers' or ours; `folder`, made if need be; in how many files the weights go."""
    os.makedirs(folder, exist_ok=True)
    config = model.config
    layers, vision_layers = config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers
    stored = config.to_dict() | {"quantization_config": quantization_config(layers, vision_layers), "dtype": "bfloat16"}
    stored["architectures"] = ["DiffusionGemmaForBlockDiffusion"]
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(stored, file, indent=2)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    tensors = {name: tensor.contiguous().clone() for name, tensor in published_tensors(weights, layers).items()}
    if shards == 1:
        save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        return
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file, part = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors", names[shard::shards]
        save_file({name: tensors[name] for name in part}, os.path.join(folder, file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    with open(os.path.join(folder, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
        json.dump({"metadata": {"total_size": size}, "weight_map": weight_map}, file, indent=2)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    write_fp8_checkpoint(build_oracle(), sys.argv[1])
