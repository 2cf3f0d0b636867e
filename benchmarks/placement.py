"""Where Accelerate puts the released model in bf16, FP8 and NF4: plans of `device_map="auto"`. Loads no weights, needs no GPU.

    python benchmarks/placement.py                                  # CPUs of 16 to 64 GB, GPUs of 16 to 80, and pairs of them
    python benchmarks/placement.py --gpus 48 24 --cpu 64 --map      # another machine, layer by layer, and its maps for `device_map=`
    python benchmarks/placement.py --cpu 24                         # one without a GPU

The model is built on the meta device from the released config.json and placed under the rule that no layer is split. In a cell stand GiB
by place, and behind the semicolon those that move in every denoising step, prefill and commit: what no GPU holds is copied to GPU 0, where
Accelerate keeps room for it; without a GPU what is on the disk is read from there (the vision tower only where there are images). How it is
computed: `modeling_diffusiongemma/weights/plans.py`; `diffusiongemma info --plan` prints the same table of any checkpoint.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

from transformers import AutoConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM  # noqa: E402
from modeling_diffusiongemma.weights.plans import CPU_RESERVE, GIB, GPU_RESERVE, MACHINES, Machine, Plan, layers_on, table  # noqa: E402


def layers_in_words(plan: Plan, layers: int) -> str:
    """`GPU 0 layers 0 to 11, cpu layers 12 to 29`."""
    found = []
    for place, indices in layers_on(plan, layers).items():
        which = "no layer" if not indices else f"layer {indices[0]}" if len(indices) == 1 else f"layers {indices[0]} to {indices[-1]}"
        found.append(f"{f'GPU {place}' if isinstance(place, int) else place} {which}")
    return ", ".join(found)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gpus", nargs="+", type=float, default=[], metavar="GIB", help="memory of each GPU of one machine")
    add("--cpu", type=float, metavar="GIB", help="memory of one machine's CPU: beside GPUs all of it for weights (default: 64)")
    add("--reserve", type=float, metavar="GIB", help="kept free on every GPU, or on a CPU without one (default: "
        f"{GPU_RESERVE / GIB:g} or {CPU_RESERVE / GIB:g})")  # fmt: skip
    add("--config", default=str(ROOT / "tests" / "data" / "released"), help="folder with a config.json (default: the released one)")
    add("--map", action="store_true", help="also print one machine's device maps as JSON")
    args = parser.parse_args(arguments)
    if min(args.reserve or 0, args.cpu or 0) < 0:
        parser.error(f"`--reserve` is {args.reserve} and `--cpu` is {args.cpu}; expected neither below 0")
    reserve = GPU_RESERVE / GIB if args.reserve is None else args.reserve
    if args.gpus and min(args.gpus) <= reserve:
        parser.error(f"`--gpus` is {args.gpus}; expected more than `--reserve`, {reserve:g}, each")
    if not (Path(args.config) / "config.json").is_file():
        parser.error(f"`--config` is {args.config!r}; expected a folder with a config.json")
    if args.map and not args.gpus and args.cpu is None:
        parser.error("`--map` is given; expected `--gpus` or `--cpu`, which say of what machine")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)  # it warns of every GPU that is not here
    one = bool(args.gpus) or args.cpu is not None
    machines = [Machine.gib(*args.gpus, cpu=64 if args.cpu is None else args.cpu)] if one else MACHINES
    reserves = (GPU_RESERVE, CPU_RESERVE) if args.reserve is None else (int(args.reserve * GIB),) * 2
    config = AutoConfig.from_pretrained(args.config)
    lines, plans = table(config, DiffusionGemmaForMaskedBlockLM, machines, *reserves)
    print(f"{reserves[0] / GIB:g} GiB of every GPU kept free, {reserves[1] / GIB:g} GiB of a CPU without one\n")
    print("\n".join(lines))
    for precision, plan in plans[machines[0]].items() if one else ():
        print(f"\n{precision}: {layers_in_words(plan, config.text_config.num_hidden_layers)}")
        if args.map:
            print(json.dumps(plan.device_map, indent=2))


if __name__ == "__main__":
    main()
