"""Where Accelerate puts the released model: the plan of `device_map="auto"` for several machines. Loads no weights, needs no GPU.

    python benchmarks/placement.py                                  # one 24 GB, one 80 GB and two 24 GB GPUs, bf16
    python benchmarks/placement.py --gpus 48 24 --cpu 64 --map      # another machine, and its map, ready for `device_map=`

The model is built on the meta device from the released config.json, and `accelerate.infer_auto_device_map` places it under the
rule that no layer is split. GPUs are filled in order and the rest goes to the CPU, then to the disk. While it computes, an
offloaded layer is copied to GPU 0, where Accelerate keeps room for it; so what is offloaded crosses the bus once in every
denoising step and once in every prefill and commit (the vision tower only where there are images).
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import torch
from accelerate import infer_auto_device_map
from transformers import AutoConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM  # noqa: E402

MACHINES = ([24], [80], [24, 24])
LAYERS = "model.decoder.layers."


def build(config_folder: str) -> DiffusionGemmaForMaskedBlockLM:
    """The model on the meta device."""
    with torch.device("meta"):
        return DiffusionGemmaForMaskedBlockLM(AutoConfig.from_pretrained(config_folder))


def plan(model, gpus: list[float], cpu: float, reserve: float, dtype: torch.dtype) -> dict[str, int | str]:
    """Module name to GPU index, "cpu" or "disk". Memory in GiB; `reserve` of every GPU is kept for cache and activations."""
    memory = {index: int((size - reserve) * 2**30) for index, size in enumerate(gpus)} | {"cpu": int(cpu * 2**30)}
    return infer_auto_device_map(model, memory, model._no_split_modules, dtype=dtype)


def bytes_on(model, placed: dict[str, int | str], dtype: torch.dtype, within: str = "") -> dict[int | str, int]:
    """Bytes of weights and buffers on each device, a tied weight counted once; of those whose name begins with `within`."""
    found = dict.fromkeys(placed.values(), 0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.startswith(within):
            continue
        parts = name.split(".")
        home = next(prefix for end in range(len(parts), -1, -1) if (prefix := ".".join(parts[:end])) in placed)
        found[placed[home]] += tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.itemsize)
    return found


def layers_on(model, placed: dict[str, int | str]) -> dict[int | str, list[int]]:
    """Indices of the layers on each device."""
    found = {device: [] for device in placed.values()}
    for index in range(model.config.text_config.num_hidden_layers):
        name = f"{LAYERS}{index}"
        home = next(prefix for prefix in (name, LAYERS[:-1], "model.decoder", "model", "") if prefix in placed)
        found[placed[home]].append(index)
    return found


def describe(device: int | str, size: int, layers: list[int]) -> str:
    where = f"GPU {device}" if isinstance(device, int) else device
    which = "no layer" if not layers else f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
    return f"{where}: {size / 2**30:.1f} GiB ({which})"


def row(model, gpus: list[float], args: argparse.Namespace) -> tuple[str, dict[str, int | str]]:
    """One machine's line of the table, and its map."""
    dtype = getattr(torch, args.dtype)
    placed = plan(model, gpus, args.cpu, args.reserve, dtype)
    sizes, layers = bytes_on(model, placed, dtype), layers_on(model, placed)
    places = "; ".join(describe(device, size, layers[device]) for device, size in sizes.items())
    moved = sum(size for device, size in bytes_on(model, placed, dtype, "model.decoder").items() if device in ("cpu", "disk"))
    return f"| {' + '.join(f'{size:g}' for size in gpus)} | {places} | {moved / 2**30:.1f} |", placed


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gpus", nargs="+", type=float, metavar="GIB", help="memory of each GPU of one machine (default: the three above)")
    add("--cpu", type=float, default=64, metavar="GIB", help="memory of the CPU that may hold weights (default: 64)")
    add("--reserve", type=float, default=2, metavar="GIB", help="kept free on every GPU for context, cache, activations (default: 2)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--config", default=str(ROOT / "tests" / "data" / "released"), help="folder with a config.json (default: the released one)")
    add("--map", action="store_true", help="also print each device map as JSON")
    args = parser.parse_args(arguments)
    if args.reserve < 0 or args.cpu < 0:
        parser.error(f"`--reserve` is {args.reserve} and `--cpu` is {args.cpu}; expected neither below 0")
    if args.gpus and min(args.gpus) <= args.reserve:
        parser.error(f"`--gpus` is {args.gpus}; expected more than `--reserve`, {args.reserve}, each")
    if not (Path(args.config) / "config.json").is_file():
        parser.error(f"`--config` is {args.config!r}; expected a folder with a config.json")
    return args


def main() -> None:
    args = parse()
    logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)  # it warns of every GPU that is not here
    model = build(args.config)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters in {args.dtype}; "
          f"{args.reserve:g} GiB of every GPU kept free, {args.cpu:g} GiB of CPU memory\n")  # fmt: skip
    print("| GPUs, GiB | where the weights go | GiB that cross the bus in a step |\n|---|---|---|")
    maps = []
    for gpus in [args.gpus] if args.gpus else MACHINES:
        line, placed = row(model, gpus, args)
        print(line)
        maps.append(placed)
    for placed in maps if args.map else ():
        print(f"\n{json.dumps(placed, indent=2)}")


if __name__ == "__main__":
    main()
