"""Checkpoints of the released size with random weights, in the two published layouts, written shard by shard at the disk's speed.

Names, shapes and dtypes are exact: 1,047 tensors and 51,647,562,456 bytes in bfloat16, 24,232 and 27,197,665,496 in FP8. The values are
slices of one block of random numbers, each tensor beginning elsewhere, so that no two are equal and none has to be drawn.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import DiffusionGemmaConfig

from measure import say
from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM
from modeling_diffusiongemma.weights.fp8_layout import default_ignore, make_fp8, published_layout, published_quantization
from modeling_diffusiongemma.weights.fp8_math import E4M3
from random_model import STANDARD_DEVIATION

NUMBERS = 2**25 - 39  # of the random block: an odd count, so that rows of a matrix do not repeat one another
STRIDE = 7_919_113  # between the beginnings of two tensors
SCALE = 2e-4  # of FP8 rows: e4m3 numbers have a deviation of 100 here, so weights have `STANDARD_DEVIATION`
NAMES = {torch.bfloat16: "BF16", E4M3: "F8_E4M3"}


class Block:
    """Random numbers, normal, in both dtypes, as bytes; `take` goes round in it."""

    def __init__(self):
        normal = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0))
        values = {torch.bfloat16: normal * STANDARD_DEVIATION, E4M3: (normal * STANDARD_DEVIATION / SCALE).clamp(-448, 448)}
        self.bytes = {dtype: memoryview(each.to(dtype).view(torch.uint8).numpy()) for dtype, each in values.items()}
        self.taken = 0

    def take(self, shape: torch.Size, dtype: torch.dtype) -> Iterator[memoryview]:
        """A tensor of random weights, in pieces."""
        data, size = self.bytes[dtype], shape.numel() * dtype.itemsize
        self.taken += 1
        start = self.taken * STRIDE % NUMBERS * dtype.itemsize
        while size:
            piece = data[start : start + size]
            yield piece
            start, size = 0, size - len(piece)


def layout_of(stored: dict, fp8: bool) -> tuple[dict, dict[str, tuple[torch.Size, torch.dtype]]]:
    """config.json, of the `stored` one, and by name shape and dtype of what a checkpoint of it holds."""
    with torch.device("meta"):
        model = DiffusionGemmaForMaskedBlockLM(DiffusionGemmaConfig.from_dict(stored))
    if not fp8:
        weights = {name: (tensor.shape, torch.bfloat16) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        return stored | {"dtype": "bfloat16"}, weights
    ignore = default_ignore(model)
    make_fp8(model, ignore)
    stored = stored | {"dtype": "bfloat16", "quantization_config": published_quantization(ignore)}
    layout = published_layout(model).items()
    return stored, {name: (torch.Size(shape), E4M3 if dtype == "F8_E4M3" else torch.bfloat16) for name, (dtype, shape) in layout}


def shards_of(weights: dict[str, tuple[torch.Size, torch.dtype]], most: int) -> Iterator[list[str]]:
    """Names, in their order, by shards of at most `most` bytes; a larger tensor is a shard of its own."""
    names, size = [], 0
    for name, (shape, dtype) in weights.items():
        each = shape.numel() * dtype.itemsize
        if names and size + each > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += each
    yield names


def write_shard(path: Path, weights: dict[str, tuple[torch.Size, torch.dtype]], block: Block) -> int:
    """One safetensors file, a tensor in memory at a time. Returns its bytes of weights."""
    header, size = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in weights.items():
        end = size + shape.numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (shape, dtype) in weights.items():
            scale = name.endswith(".weight_scale")
            constant = torch.full(shape, SCALE if scale else 1.0, dtype=dtype) if scale or len(shape) < 2 else None
            file.writelines(block.take(shape, dtype) if constant is None else [constant.view(-1).view(torch.uint8).numpy()])
    return size


def write_checkpoint(folder: Path, stored: dict, fp8: bool, shard_bytes: int = 2_000_000_000) -> int:
    """A checkpoint of a config.json in `folder`: shards, their index and last of all the config; a folder without one is unfinished.
    Returns its bytes of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    stored, weights = layout_of(stored, fp8)
    shards, block, weight_map, total = list(shards_of(weights, shard_bytes)), Block(), {}, 0
    for place, names in enumerate(shards, start=1):
        file = f"model-{place:05d}-of-{len(shards):05d}.safetensors"
        total += write_shard(folder / file, {name: weights[name] for name in names}, block)
        weight_map |= dict.fromkeys(names, file)
        say(f"{folder.name}: shard {place} of {len(shards)}, {total / 1e9:.1f} GB")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(stored))
    return total


__all__ = ["layout_of", "shards_of", "write_checkpoint", "write_shard"]
