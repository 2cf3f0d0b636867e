"""Whether a checkpoint fits where it is to go: asked when every weight has its place, and before the first of them is read.

Only what is certain is refused. A weight on the CPU that the model takes as it lies in a safetensors file is mapped, and needs no memory of
its own; one that is converted, cast or quantised does. On the disk such a weight is read from the checkpoint, and another one is written
into the offload folder. What loading needs for a moment, and a pass later on, is not counted.
"""

import contextlib
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from .safetensors_files import inspect_header

STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3",
          torch.uint8: "U8", torch.int64: "I64", torch.bool: "BOOL"}  # fmt: skip
SMALLER = (
    'the disk for the rest (`device_map="auto"`, `max_memory=` and `offload_folder=`), or fewer bytes a weight: '
    "an FP8 copy (python -m modeling_diffusiongemma.quantize), or `quantization_config=FourBitConfig()`"
)


def stored_dtypes(model: nn.Module, files: list[str], mapping: list) -> tuple[dict[str, str], dict[str, bool]]:
    """By the headers of a checkpoint's files: the weights of `model` that are taken as they lie there, with safetensors' words for their
    dtypes; and those that transformers converts, by its `mapping` of names, with whether what comes out takes memory: operations that are
    `apart` keep to the tensors of the files."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    copies = {
        pattern: not any(getattr(operation, "apart", False) for operation in converter.operations)
        for converter in converters for pattern in converter.source_patterns
    }  # fmt: skip
    state, as_they_are, converted = model.state_dict(), {}, {}
    for file in files:
        for name, entry in inspect_header(Path(file))[0].items():
            if name == "__metadata__":
                continue
            target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            if target not in state and name in state:
                target, pattern = name, None
            if pattern is not None:
                converted[target] = copies[pattern]
            elif target in state:
                as_they_are[target] = entry["dtype"]
    return as_they_are, converted


def place_of(name: str, device_map: dict) -> object:
    """The device of a weight: that of the innermost module in the map."""
    path = name.split(".")
    prefixes = (".".join(path[:end]) for end in range(len(path), -1, -1))
    return next((device_map[prefix] for prefix in prefixes if prefix in device_map), "cpu")


def bytes_needed(model: nn.Module, files: list[str], load_config) -> tuple[Counter, Counter]:
    """Bytes of memory by device, and bytes of the disk: those of the offload folder, "written", and "quantised" ones, which would have to
    be there. `load_config` is transformers', with the final device map."""
    as_they_are, converted = stored_dtypes(model, files, load_config.weight_mapping or [])
    quantizer, mapped = load_config.hf_quantizer, sys.platform != "win32" and not load_config.disable_mmap
    memory, disk, seen = Counter(), Counter(), set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen or name not in as_they_are and name not in converted:
            continue
        seen.add(id(tensor))  # tied
        each = tensor.element_size() if quantizer is None else quantizer.param_element_size(model, name, tensor)
        size, place = int(each * tensor.numel()), place_of(name, load_config.device_map or {})
        quantised = quantizer is not None and quantizer.param_needs_quantization(model, name)
        quantising = quantised and not quantizer.pre_quantized
        if name in converted:
            unchanged = not converted[name]
        else:  # what is stored quantised is not cast
            unchanged = not quantising and (quantised or as_they_are[name] == STORED.get(tensor.dtype))
        if place == "disk" and isinstance(tensor, nn.Parameter):
            disk["quantised" if quantising and name in as_they_are else "written"] += size if quantising or name in converted else 0
        elif str(place) not in ("cpu", "disk") or not (mapped and unchanged):
            memory["cpu" if place == "disk" else place] += size
    return memory, disk


def free_memory(place: object) -> int | None:
    """Bytes that are free on a device; None where nobody can tell."""
    device = torch.device(place) if not isinstance(place, int) else torch.device("cuda", place)
    if device.type == "cpu":
        try:
            import psutil  # which accelerate requires
        except ImportError:
            return None
        memory = psutil.virtual_memory()
        # Other systems grow their swap, and make room: what is free at the moment says little there.
        return memory.available + psutil.swap_memory().free if sys.platform == "linux" else memory.total
    # Windows lends a GPU the machine's memory, and an integrated one has no other.
    if device.type != "cuda" or not torch.cuda.is_available() or sys.platform == "win32":
        return None
    if getattr(torch.cuda.get_device_properties(device), "is_integrated", False):
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def check_fits(model: nn.Module, files: list[str] | None, load_config) -> None:
    """ValueError, by the name of the argument and with what to do, where weights do not fit; nothing has been read or written.

    Args:
        files: of the checkpoint; none, or other than safetensors, are not looked at.
        load_config: transformers', as `_load_pretrained_model` gets it.
    """
    distributed = getattr(load_config, "device_mesh", None) is not None
    if distributed or not files or not all(file.endswith(".safetensors") and Path(file).is_file() for file in files):
        return
    if sys.platform == "linux" and not load_config.disable_mmap:
        check_mapping(files)
    memory, disk = bytes_needed(model, files, load_config)
    what, folder = f"cannot load {load_config.pretrained_model_name_or_path}", load_config.disk_offload_folder
    if disk["quantised"]:
        gone = f"{gigabytes(disk['quantised'])} of weights that are quantised while they are loaded would go to the disk"
        raise ValueError(f"{what}: {gone}; expected memory for them (`max_memory=`), or a checkpoint that has been quantised before")
    for place, size in memory.items():
        if (free := free_memory(place)) is not None and size > free:
            where = "the CPU" if str(place) == "cpu" else f"device {place}"
            raise ValueError(
                f"{what}: weights take {gigabytes(size)} of {where}'s memory, where {gigabytes(free)} are free; expected {SMALLER}"
            )
    if disk["written"]:
        check_folder(folder, disk["written"], what)


def check_mapping(files: list[str]) -> None:
    """OSError where Linux does not map a file: by default none that is larger than memory and swap together."""
    for file in files:
        try:
            with contextlib.suppress(SafetensorError), safe_open(file, "pt"):
                pass
        except RuntimeError as error:
            size, remedy = gigabytes(Path(file).stat().st_size), "shards that fit, more swap, or `sysctl vm.overcommit_memory=1`"
            raise OSError(f"cannot load {file}: its {size} cannot be mapped into memory; expected {remedy}") from error


def check_folder(folder: str | None, size: int, what: str) -> None:
    """ValueError unless `size` bytes can be written into an offload folder."""
    why = f"{gigabytes(size)} of weights go to the disk in another form than the checkpoint's"
    if folder is None:
        expected = "a folder with as much room, or a `max_memory` that keeps them off the disk"
        raise ValueError(f"{what}: `offload_folder` is None, and {why}; expected {expected}")
    path = Path(folder).absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{what}: `offload_folder` is {str(folder)!r} ({error.strerror}); expected one that can be written") from error
    free = shutil.disk_usage(there).free
    with contextlib.suppress(OSError):  # an earlier load's are written over
        free += sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if size > free:
        there_are = f"{gigabytes(free)} are free there"
        raise ValueError(f"{what}: `offload_folder` is {str(folder)!r}, {why}, and {there_are}; expected a folder with as much room")


def gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size > 5e7 else f"{size:,} bytes"


__all__ = ["check_fits", "place_of"]
