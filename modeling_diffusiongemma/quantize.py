"""Quantises a DiffusionGemma checkpoint (bfloat16 or float32) to FP8: attention, dense MLP and all experts in e4m3 with one
scale an output channel, in the layout of RedHatAI/diffusiongemma-26B-A4B-it-FP8-dynamic. vLLM and this package load it.

    python -m modeling_diffusiongemma.quantize path/to/diffusiongemma-26B-A4B-it path/to/diffusiongemma-fp8

DST gets one file for each file of SRC, config.json with a quantization_config, and every other file of SRC (tokenizer,
generation_config.json, chat template, ...) but its README. It needs about 0.53 times the space of SRC, and a few hundred
megabytes of memory whatever the size of the checkpoint: tensors are read one by one, experts one by one out of their stack,
and written to their place in a file whose header is known beforehand.

If it is interrupted, run the same command again: finished files, in DST/.quantizing until the end, are recognised and kept, the
unfinished one is made anew. At the end everything is checked against the architecture: names, types, shapes, and every scale;
then all files get into DST as one.

Then:  AutoModelForCausalLM.from_pretrained("DST")    (after `import modeling_diffusiongemma`; no further argument)
The numbers are those of from_pretrained("SRC", quantization_config=FP8Config()).
"""

import argparse
import hashlib
import json
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from safetensors import safe_open
from transformers import AutoConfig

from .layers.configuration import DiffusionGemmaConfig
from .layers.experts import Experts
from .model.head import DiffusionGemmaForMaskedBlockLM
from .weights.fp8 import FP8Linear
from .weights.fp8_layout import (
    PROJECTIONS,
    check_files,
    check_scale,
    default_ignore,
    expert_names,
    fp8_modules,
    make_fp8,
    published_layout,
    published_quantization,
)
from .weights.fp8_math import quantize_rows
from .weights.safetensors_files import INDEX, StoredTensor, indexed_files, inspect_header, stored_tensors
from .weights.saving import files, finish, put_in_place, staging

CONFIG = "config.json"
ITEM_SIZE = {"F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "F64": 8}
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
FINGERPRINT = "source_fingerprint"  # in the metadata of a written shard
UNFINISHED = ".quantizing"  # the folder in the destination that holds what is written until all is


def fingerprint(path: Path, samples: int = 256, length: int = 4096) -> str:
    """What tells a weight file from another one of the same layout without reading it all: its size, its first bytes, and
    pieces of `length` bytes from `samples` places."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for place in range(samples):
            file.seek(place * max(size - length, 0) // max(samples - 1, 1))
            digest.update(file.read(length))
    return digest.hexdigest()


def read_source(source: Path) -> tuple[DiffusionGemmaConfig, dict[str, StoredTensor]]:
    """The config and the tensors of a checkpoint folder, which must be one of this model, whole and not quantised."""
    finish(source)
    if not (source / CONFIG).is_file():
        raise OSError(f"`source` is {source}, which has no {CONFIG}; expected the folder of a checkpoint")
    config = AutoConfig.from_pretrained(source)
    if not isinstance(config, DiffusionGemmaConfig):
        raise ValueError(f"`source` is {source}, a {config.model_type!r} model; expected 'diffusion_gemma'")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source / CONFIG} has a `quantization_config`; expected a checkpoint that is not quantised")
    indexed = indexed_files(source)
    files = sorted(source.glob("*.safetensors")) if indexed is None else [source / name for name in indexed]
    if not files:
        raise OSError(f"`source` is {source}, which has no .safetensors file")
    return config, stored_tensors(files)


def check_source(model: DiffusionGemmaForMaskedBlockLM, source: Path, stored: dict[str, StoredTensor]) -> None:
    """The tensors of `source` must be those of `model`, by name and shape; ValueError names what is not."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    if missing := sorted(expected.keys() - stored.keys()):
        raise ValueError(f"{source} lacks {len(missing)} tensors, the first {missing[0]}; expected all {len(expected)}")
    if unknown := sorted(stored.keys() - expected.keys() - {"lm_head.weight"}):
        raise ValueError(f"{source} holds {unknown[0]} and {len(unknown) - 1} more that the model does not have")
    for name, shape in expected.items():
        entry = stored[name]
        if entry.shape != shape or entry.dtype not in ITEM_SIZE or entry.dtype.startswith("F8"):
            raise ValueError(f"{name} in {entry.file} is {entry.dtype} {entry.shape}; expected bfloat16 or float32 {shape}")


def quantized_names(model: DiffusionGemmaForMaskedBlockLM) -> dict[str, list[str]]:
    """The tensors of the source that become FP8, and the names of the matrices in each, which `model` has FP8 modules for."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            raise ValueError(f"`ignore` names the experts of {name}; expected them to be quantised: they are most of the model")
    names = {}
    for name, module in fp8_modules(model).items():
        if isinstance(module, FP8Linear):
            names[f"{name}.weight"] = [name]
        else:
            names |= {f"{name}.{projection}": expert_names(name, module.num_experts, projection) for projection in PROJECTIONS}
    return names


class Shard:
    """One file of the destination: which tensors of one source file it is made of, what becomes FP8 in them, and its header."""

    def __init__(self, source: Path, entries: list[StoredTensor], quantized: dict[str, list[str]], layout: dict):
        self.source, self.entries, self.quantized = source, entries, quantized
        tensors = {}
        for entry in entries:
            matrices = quantized.get(entry.name)
            names = [entry.name] if matrices is None else [f"{name}.{kind}" for name in matrices for kind in ("weight", "weight_scale")]
            tensors |= {name: (layout[name][0] or entry.dtype, layout[name][1]) for name in names}
        self.header: dict = {"__metadata__": {"format": "pt", FINGERPRINT: fingerprint(source)}}
        start = 0
        # By falling size of their numbers, as safetensors itself does: every tensor is aligned.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-ITEM_SIZE[item[1][0]], item[0])):
            end = start + ITEM_SIZE[dtype] * torch.Size(shape).numel()
            self.header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
            start = end
        self.size = start

    def is_complete(self, place: Path) -> bool:
        """Whether the file stands in the folder `place` already, made from this source; ValueError where it was not made here."""
        path = place / self.source.name
        if not path.is_file():
            return False
        header, wrong = inspect_header(path)
        if wrong or FINGERPRINT not in header.get("__metadata__", {}):
            raise ValueError(f"{path} was not made by this command; expected a folder without weights, or an unfinished one")
        return header == self.header

    def tensors(self, entry: StoredTensor, opened, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        """What is written of one tensor of the source, matrix by matrix."""
        if entry.name not in self.quantized:
            yield entry.name, opened.get_tensor(entry.name)
            return
        names, stored = iter(self.quantized[entry.name]), opened.get_slice(entry.name)
        experts = range(entry.shape[0]) if len(entry.shape) == 3 else [slice(None)]
        for expert in experts:
            for rows in stored[expert].to(device).chunk(len(self.quantized[entry.name]) // len(experts)):
                name, (weight, scale) = next(names), quantize_rows(rows, torch.bfloat16)
                check_scale(scale, f"{name}.weight_scale", self.source)
                yield f"{name}.weight", weight
                yield f"{name}.weight_scale", scale.to(torch.bfloat16)

    def write(self, place: Path, device: torch.device, progress) -> None:
        """Writes the file into the folder `place`, under another name, and renames it when it is complete."""
        text = json.dumps(self.header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        unfinished = place / f"{self.source.stem}.unfinished"
        with unfinished.open("wb") as file, safe_open(self.source, "pt") as opened:
            file.write(struct.pack("<Q", len(text)) + text)
            for entry in self.entries:
                for name, tensor in self.tensors(entry, opened, device):
                    file.seek(8 + len(text) + self.header[name]["data_offsets"][0])
                    file.write(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
                progress(entry.size)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, place / self.source.name)


def quantize_checkpoint(
    source: str | os.PathLike, destination: str | os.PathLike, ignore: list[str] | None = None, device: str | torch.device = "cpu",
    progress: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Writes the checkpoint folder `source` to `destination` in the published FP8 layout, or goes on with it.

    Args:
        source: folder of a checkpoint in the released layout, in bfloat16 or float32.
        destination: a new or empty folder, or one that an interrupted call left.
        ignore: as `FP8Config`.
        device: where the matrices are quantised; the numbers do not depend on it.
        progress: show a bar.

    Returns:
        `{"files", "kept", "tensors", "bytes"}`: files written or found complete, those found, tensors, and bytes of weights.

    Raises:
        OSError: a file of `source` is missing or damaged.
        ValueError: `source` is no unquantised DiffusionGemma or holds NaN; `destination` holds other weights.
    """
    source, destination = Path(source), Path(destination)
    config, stored = read_source(source)
    if destination.resolve() == source.resolve():
        raise ValueError(f"`destination` is {destination}, the source itself; expected another folder")
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"`destination` is the file {destination}; expected a folder")
    with torch.device("meta"):
        model = DiffusionGemmaForMaskedBlockLM(config)
    check_source(model, source, stored)
    stored.pop("lm_head.weight", None)  # tied: the embedding again
    ignore = default_ignore(model) if ignore is None else ignore
    make_fp8(model, ignore)
    layout, quantized = published_layout(model), quantized_names(model)

    destination.mkdir(parents=True, exist_ok=True)
    finish(destination)
    sources = sorted({entry.file for entry in stored.values()})
    shards = [Shard(file, [entry for entry in stored.values() if entry.file == file], quantized, layout) for file in sources]
    if foreign := sorted({path.name for path in destination.glob("*.safetensors")} - {file.name for file in sources}):
        raise ValueError(f"`destination` holds {foreign[0]}, which is not of this checkpoint; expected a folder without other weights")
    staged = destination / UNFINISHED
    places = [destination if shard.is_complete(destination) else staged for shard in shards]
    with staging(staged) as plan:
        for path in files(staged):  # of another source, whose quantisation was never finished
            if path not in {file.name for file in sources}:
                (staged / path).unlink()
        kept = [place == destination or shard.is_complete(staged) for shard, place in zip(shards, places, strict=True)]
        total = sum(entry.size for entry in stored.values())
        with tqdm(total=total, unit="B", unit_scale=True, desc="quantising", disable=not progress) as bar:
            for shard, complete in zip(shards, kept, strict=True):
                if complete:
                    bar.update(sum(entry.size for entry in shard.entries))
                else:
                    shard.write(staged, torch.device(device), bar.update)

        names = {name: shard.source.name for shard in shards for name in shard.header if name != "__metadata__"}
        size = sum(shard.size for shard in shards)
        if len(shards) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}
            (staged / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.name.endswith(WEIGHT_FILES) and path.name not in (CONFIG, "README.md", ".gitattributes"):
                shutil.copyfile(path, staged / path.name)
        finished = json.loads((source / CONFIG).read_text()) | {"quantization_config": published_quantization(ignore)}
        (staged / CONFIG).write_text(json.dumps(finished, indent=2) + "\n")
        check_destination(model, [place / shard.source.name for place, shard in zip(places, shards, strict=True)], layout)
        put_in_place(staged, plan, destination)
        shutil.rmtree(staged, ignore_errors=True)
    return {"files": len(shards), "kept": sum(kept), "tensors": len(names), "bytes": size}


def check_destination(model: DiffusionGemmaForMaskedBlockLM, files: list[Path], layout: dict) -> None:
    """The final check, from the files: every name, type, shape and scale; ValueError names what is wrong."""
    stored = stored_tensors(files)
    if stored.keys() != layout.keys():
        differ = sorted(stored.keys() ^ layout.keys())[:3]
        raise ValueError(f"{files[0].parent} differs from the layout in {differ}; remove it and start again")
    for name, (dtype, shape) in layout.items():
        entry = stored[name]
        if entry.shape != shape or (dtype is not None and entry.dtype != dtype):
            raise ValueError(f"{name} in {entry.file} is {entry.dtype} {entry.shape}; expected {dtype} {shape}")
    check_files(model, files)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_diffusiongemma.quantize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SRC", help="folder of the checkpoint to quantise; it is only read")
    parser.add_argument("destination", metavar="DST", help="folder to write: new, empty, or left by an interrupted run")
    parser.add_argument("--device", default="cpu", help="where matrices are quantised: cpu (default), cuda, cuda:1; same numbers")
    ignored = "a linear layer to leave alone, or re:EXPRESSION; repeatable; replaces the default list"
    parser.add_argument("--ignore", action="append", metavar="NAME", help=ignored)
    args = parser.parse_args(arguments)
    try:
        done = quantize_checkpoint(args.source, args.destination, args.ignore, args.device, progress=True)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
    counts = f"{done['tensors']:,} tensors, {done['bytes']:,} bytes in {done['files']} files ({done['kept']} kept)"
    print(f"{args.destination}: {counts}; checked")


if __name__ == "__main__":
    main()

__all__ = ["main", "quantize_checkpoint"]
