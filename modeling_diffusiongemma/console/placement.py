"""How weights are to be loaded: `--device`, `--dtype`, `--quantize`, `--max-memory` and `--offload-folder`, for the console, the server
and lm-eval, which all have them read here into arguments of `from_pretrained`.

Importing this imports neither torch nor transformers; they come with the first call of `loading_arguments`.
"""

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

from .arguments import UsageError, fitting

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZE = ("fp8", "4bit")
EVERY_GPU = "gpu"  # the key of a size that was given without a device
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", re.IGNORECASE)
EXPECTED = "a size, such as 12GB or 12GiB, or DEVICE=SIZE with commas between, such as 0=20GB,cpu=40GB"


def quantization_name(given: str) -> str:
    """`--quantize`."""
    return fitting(given, given in QUANTIZE, " or ".join(QUANTIZE))


def memory(given: str) -> dict[int | str, int]:
    """`--max-memory`: bytes by device, a GPU's index, "cpu" or "mps"; a size alone is that of `EVERY_GPU`.
    Of lm-eval, which cuts at commas, `+` is taken for one."""
    found: dict[int | str, int] = {}
    for entry in (entries := re.split("[,+]", given)):
        device, separator, text = entry.strip().rpartition("=")
        size = SIZE.fullmatch(text.strip())
        fits = size and (re.fullmatch(r"\d+|cpu|mps", device) if separator else len(entries) == 1)
        fitting(given, fits, EXPECTED)
        name = int(device) if device.isdecimal() else device or EVERY_GPU
        fitting(given, name not in found, f"each device once: {EXPECTED}")
        found[name] = int(float(size[1]) * (1024 if size[3] else 1000) ** ("KMGT".index(size[2].upper()) + 1))
    return found


def writable_folder(given: str) -> str:
    """`--offload-folder`, which need not be there yet: where the first file in it would get."""
    path = Path(given).absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        fitting(given, False, f"a folder that can be written ({error.strerror})")
    return given


def add_placement(parser: argparse.ArgumentParser) -> None:
    """What transformers' own server does not have."""
    parser.add_argument(
        "--quantize", type=quantization_name, metavar="NAME",
        help="weights while they are loaded: fp8, half of bfloat16's memory; or 4bit, the experts in NF4, which needs bitsandbytes",
    )  # fmt: skip
    parser.add_argument(
        "--max-memory", type=memory, metavar="SIZES",
        help="most that weights may take: 0=20GB,cpu=40GB by device, or 12GB: each GPU, or the CPU without one. GPUs are filled first, "
        "then the CPU, and the rest stays on the disk (default: what is free)",
    )  # fmt: skip
    parser.add_argument(
        "--offload-folder", type=writable_folder, metavar="FOLDER",
        help="where weights go that fit into no memory and cannot be read as they lie in the checkpoint, as FP8 and 4 bit",
    )  # fmt: skip


def add_loading(parser: argparse.ArgumentParser) -> None:
    """All of them."""
    where = "cpu, cuda, cuda:1, mps, or auto to spread over all (default: cuda if there is one)"
    parser.add_argument("--device", metavar="NAME", help=where)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: auto, the checkpoint's)")
    add_placement(parser)


def checked_device(device: str | None) -> str:
    """A device that is there, or "auto"; by default CUDA if there is one, else the CPU. Raises `UsageError`."""
    import torch

    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return "cuda" if there is not None and there.type == "cuda" else "cpu"
    if device == "auto":
        return device
    try:
        asked = torch.device(device)
    except RuntimeError:
        raise UsageError(f"`--device` is {device!r}; expected cpu, cuda, cuda:1, mps or auto") from None
    if asked.type != "cpu":
        count = torch.accelerator.device_count() if there is not None and there.type == asked.type else 0
        if (asked.index or 0) >= count:
            raise UsageError(f"`--device` is {device!r}, and torch finds {count} {asked.type} devices; expected one that is there, or cpu")
    return device


def memory_of(device: str | None, most: dict[int | str, int]) -> dict[int | str, int]:
    """Bytes that weights may take by device, in transformers' words, of those that `--device` (None: all) lets in: what `--max-memory`,
    `most`, says, and else what is free, of a GPU nine tenths, as where transformers chooses."""
    import psutil
    import torch
    from accelerate.utils import get_max_memory

    free = {name: int(0.9 * size) if isinstance(name, int) else size for name, size in get_max_memory().items()}
    if device not in (None, "auto"):
        asked = torch.device(device)
        first = asked.type if asked.type in ("cpu", "mps") else asked.index or 0
        free = {name: free.get(name, psutil.virtual_memory().available) for name in dict.fromkeys((first, "cpu"))}
    gpus = [name for name in free if name != "cpu"] or ["cpu"]
    said = dict.fromkeys(gpus, most[EVERY_GPU]) if EVERY_GPU in most else most
    if unknown := [name for name in said if name not in free]:
        raise UsageError(f"`--max-memory` names {unknown[0]!r}; expected some of {list(free)}, which are there and `--device` allows")
    return {name: said.get(name, size) for name, size in free.items()}


def loading_arguments(
    device: str | None = None, dtype: Any = "auto", quantize: str | None = None, max_memory: dict[int | str, int] | None = None,
    offload_folder: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `from_pretrained`.

    Args:
        device: None is CUDA, or else the CPU; with `max_memory` or `offload_folder`, which spread the model, all that is there. Another
            device than "auto" then is the only one beside the CPU.
        dtype: as `from_pretrained`'s.
        quantize: one of `QUANTIZE`.
        max_memory: as `memory` gives it.

    Raises:
        UsageError: the device is not there, or a size is for none that is.
    """
    place = checked_device(device)
    arguments: dict[str, Any] = {"dtype": dtype}
    if max_memory is not None or offload_folder is not None:
        arguments |= {"device_map": "auto", "max_memory": memory_of(device, max_memory or {})}
    elif place != "cpu":
        arguments["device_map"] = place
    if offload_folder is not None:
        arguments["offload_folder"] = offload_folder
    if quantize is not None:
        arguments["quantization_config"] = quantization(quantize)
    return arguments


def quantization(name: str):
    """The config of `--quantize`."""
    from ..weights.four_bit import FourBitConfig
    from ..weights.fp8_quantizer import FP8Config

    return {"fp8": FP8Config, "4bit": FourBitConfig}[quantization_name(name)]()


__all__ = [
    "DTYPES", "QUANTIZE", "add_loading", "add_placement", "checked_device", "loading_arguments", "memory", "quantization_name",
    "writable_folder",
]  # fmt: skip
