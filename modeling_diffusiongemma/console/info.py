"""`diffusiongemma info`: what a checkpoint is, from its config and the headers of its weight files; no weight is read. With `--device`
instead: which of the fast paths work on this machine, each run there on a few values against its reference. With `--plan`: where the
model would go on several machines in bf16, FP8 and NF4. With `--adapters`: what tuning it by LoRA keeps in memory in each of these."""

import argparse
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_local_safetensors_metadata, get_safetensors_metadata
from transformers import AutoModelForCausalLM
from transformers.utils import cached_file

from generation.call.configuration import RELEASED_DEFAULTS, SPECIAL_TOKENS, DiffusionGenerationConfig

from ..model.head import DiffusionGemmaForMaskedBlockLM
from ..weights.adapter_memory import tuning_table
from ..weights.loading import damaged_files
from ..weights.plans import CPU_RESERVE, GIB, GPU_RESERVE, PRECISIONS, table
from ..weights.safetensors_files import INDEX, SINGLE
from .arguments import UsageError, json_line
from .device_report import FAILED, describe_device, device_table, prove_all
from .placement import checked_device
from .session import read_config

ON_DISK = "What is on the disk is of a checkpoint in that precision: weights that are quantised while they are loaded do not go there"
HIDDEN = ("transformers_version", "do_sample")  # of a generation config


def count_weights(path: str, folder: Path) -> dict[str, Any]:
    """What the headers of the weight files name, in numbers. From the Hub the headers alone are fetched, where the weights of the
    repository `path` are not in `folder`, this machine's copy of it. OSError where there are none, or a file is missing or damaged."""
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        if problems := damaged_files(folder):
            raise OSError(f"cannot read {folder}: {'; '.join(problems)}")
        files = get_local_safetensors_metadata(folder).files_metadata
    elif Path(path).is_dir():
        raise OSError(f"{path} has neither {SINGLE} nor {INDEX}; expected the weights of a checkpoint")
    else:
        files = get_safetensors_metadata(path).files_metadata
    tensors = [tensor for file in files.values() for tensor in file.tensors.values()]
    by_dtype = Counter()
    for tensor in tensors:
        by_dtype[tensor.dtype] += tensor.data_offsets[1] - tensor.data_offsets[0]
    return {"files": len(files), "tensors": len(tensors), "bytes": by_dtype.total(), "bytes_by_dtype": dict(by_dtype)}


def count_parameters(config) -> tuple[int, int]:
    """All parameters, and those a token goes through: of the experts only `top_k_experts`. Built without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    total = model.num_parameters()
    return total, total - experts + experts * text.top_k_experts // text.num_experts


def describe(path: str) -> dict[str, Any]:
    """Everything `info` tells, as it goes into JSON."""
    config = read_config(path)
    text, (parameters, active) = config.get_text_config(), count_parameters(config)
    try:
        generation = DiffusionGenerationConfig.from_pretrained(path)
    except OSError:  # the checkpoint has none: its special tokens over the released settings
        generation = DiffusionGenerationConfig.from_model_config(config)
    fields = {name: value for name, value in vars(generation).items() if value is not None and name[0] != "_" and name not in HIDDEN}
    settings = {name: value for name, value in (RELEASED_DEFAULTS | fields).items() if value is not None}
    return {
        "path": str(path), "architectures": config.architectures, "model_type": config.model_type,
        "parameters": parameters, "active_parameters": active,
        "dtype": str(config.dtype).removeprefix("torch.") if config.dtype is not None else None,
        "quantization": (getattr(config, "quantization_config", None) or {}).get("quant_method"),
        "weights": count_weights(path, Path(cached_file(path, "config.json")).parent),
        "canvas_length": config.canvas_length, "vocab_size": text.vocab_size, "max_position_embeddings": text.max_position_embeddings,
        "hidden_size": text.hidden_size, "layers": {kind: text.layer_types.count(kind) for kind in sorted(set(text.layer_types))},
        "sliding_window": text.sliding_window, "attention_heads": text.num_attention_heads,
        "experts": text.num_experts, "experts_per_token": text.top_k_experts, "vision_layers": config.vision_config.num_hidden_layers,
        "special_ids": {
            **{name: settings.get(name, getattr(text, name, None)) for name in SPECIAL_TOKENS},
            **{name: getattr(config, name) for name in ("image_token_id", "boi_token_id", "eoi_token_id")},
        },
        "generation": {name: value for name, value in settings.items() if name not in SPECIAL_TOKENS},
    }  # fmt: skip


def report(about: dict[str, Any]) -> str:
    """`describe`'s answer to read."""
    weights = about["weights"]
    dtypes = ", ".join(f"{size:,} in {dtype}" for dtype, size in sorted(weights["bytes_by_dtype"].items()))
    layers = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in about["layers"].items())
    lines = {
        "checkpoint": about["path"],
        "architecture": f"{', '.join(about['architectures'] or ['unnamed'])} ({about['model_type']})",
        "parameters": f"{about['parameters']:,}, of which a token goes through {about['active_parameters']:,}",
        "weights": f"{weights['bytes']:,} bytes in {weights['files']} files, {weights['tensors']:,} tensors: {dtypes}",
        "dtype": f"{about['dtype']}" + (f", quantized: {about['quantization']}" if about["quantization"] else ""),
        "canvas": f"{about['canvas_length']} tokens of {about['vocab_size']:,}",
        "layers": f"{layers}; hidden size {about['hidden_size']}, {about['attention_heads']} heads, window {about['sliding_window']}, "
        f"up to {about['max_position_embeddings']:,} positions",
        "experts": f"{about['experts']}, {about['experts_per_token']} for each token",
        "vision": f"{about['vision_layers']} layers",
        "special ids": ", ".join(f"{name.removesuffix('_token_id')} {value}" for name, value in about["special_ids"].items()),
        "generation": ", ".join(f"{name}={value}" for name, value in about["generation"].items()),
    }
    return "\n".join(f"{title:14s}{line}" for title, line in lines.items())


def report_device(name: str, as_json: bool) -> int:
    """Prints what works on a device; 1 where something that is for it does not."""
    if name == "auto":
        raise UsageError("`--device` is 'auto'; expected one device: cpu, cuda, cuda:1 or mps")
    device = torch.device(checked_device(name or None))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    about, rows = describe_device(device), prove_all(device)
    print(json_line({**about, "paths": rows}) if as_json else device_table(about, rows))
    return int(any(row["state"] == FAILED for row in rows))


def report_plan(path: str, as_json: bool) -> int:
    """Prints where a checkpoint's model would go, by its config alone."""
    logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)  # it warns of every GPU that is not here
    lines, plans = table(read_config(path), DiffusionGemmaForMaskedBlockLM)
    if as_json:
        for machine, by_precision in plans.items():
            for precision, plan in by_precision.items():
                about = {"gpus": machine.gpus, "cpu": machine.cpu, "precision": precision, "bytes": plan.bytes, "moved": plan.moved}
                print(json_line(about))
        return 0
    kept = f"{GPU_RESERVE / GIB:g} GiB of each GPU stay free, and {CPU_RESERVE / GIB:g} GiB of a CPU without one"
    print("\n".join(lines) + f"\n\nGiB by place; and, of those, how many move in each denoising step. {kept}. {ON_DISK}.")
    return 0


def report_adapters(path: str, rank: int, as_json: bool) -> int:
    """Prints what tuning a checkpoint's model by LoRA keeps in memory, by its config alone."""
    config = read_config(path)
    lines, found = tuning_table(config, DiffusionGemmaForMaskedBlockLM, rank)
    if as_json:
        for (precision, experts), memory in found.items():
            print(json_line({"precision": precision, "rank": rank, "experts": experts, **memory._asdict(), "total": memory.total}))
        return 0
    counts = [f"{found[PRECISIONS[0], experts].adapters // torch.float32.itemsize:,}" for experts in (True, False)]
    about = f"An adapter of rank {rank} has {counts[0]} parameters, without experts {counts[1]}, in float32"
    print("\n".join(lines) + f"\n\nGiB. {about}. What a pass computes comes on top.")
    return 0


def run(args: argparse.Namespace) -> int:
    if args.device is not None:
        return report_device(args.device, args.json)
    if args.plan:
        return report_plan(args.model.path, args.json)
    if args.adapters is not None:
        return report_adapters(args.model.path, args.adapters, args.json)
    about = describe(args.model.path)
    print(json_line(about) if args.json else report(about))
    return 0


__all__ = ["describe", "run"]
