"""Times loading of one checkpoint in this implementation and in transformers' own, and its peak memory, in one run.

    python benchmarks/loading.py                                # random weights, 270 million parameters in bf16
    python benchmarks/loading.py --checkpoint FOLDER --dtype float32 --rounds 7

Every load has a process of its own, transformers' without a trace of this package; imports are done before the clock starts. A
first pair, not counted, brings the files into the page cache. Then ours, transformers, ours, transformers: a machine that drifts
slows both halves of a pair alike. Reported are the median of each side and, pair by pair, the ratio (above 1: ours is better).

- load: `from_pretrained`.
- load and read: until every weight has been read once as well, for files may be mapped and not yet read.
- peak memory: resident set at its highest while loading and reading, less that before (/proc, so Linux alone).
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from measure import SIDES, heading, machine

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

MEASURES = {"load": "load, seconds", "load_and_read": "load and read, seconds", "peak_mib": "peak memory above the imports, MiB"}


def resident_mib(field: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def load(side: str, checkpoint: str, dtype: str) -> dict[str, float]:
    """One load in this process."""
    model_class = transformers.DiffusionGemmaForBlockDiffusion
    if side == "ours":
        from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM as model_class
    transformers.logging.disable_progress_bar()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM becomes VmRSS
    before, started = resident_mib("VmRSS"), time.perf_counter()
    model = model_class.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    loaded = time.perf_counter()
    for parameter in model.parameters():
        parameter.detach().sum()
    return {"load": loaded - started, "load_and_read": time.perf_counter() - started, "peak_mib": resident_mib("VmHWM") - before}


def load_elsewhere(side: str, checkpoint: str, dtype: str) -> dict[str, float]:
    """One load in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--load", side, checkpoint, dtype], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"error: loading with {side} ended with status {done.returncode}; its message stands above")
    return json.loads(done.stdout.splitlines()[-1])


def save_random(folder: str, dtype: str, hidden_size: int, layers: int, vocab_size: int) -> None:
    from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM
    from recipes import small_config

    config = small_config(vocab_size, hidden_size, layers, 256, 10_000.0, image_token_id=107, boi_token_id=108, eoi_token_id=109)
    DiffusionGemmaForMaskedBlockLM(config).to(getattr(torch, dtype)).save_pretrained(folder)


def table(rounds: list[dict[str, dict[str, float]]]) -> str:
    """In Markdown."""
    lines = ["| measure | ours | transformers | ours better by (lowest to highest pair) |", "|---|---|---|---|"]
    for key, title in MEASURES.items():
        ours, theirs = ([pair[side][key] for pair in rounds] for side in SIDES)
        ratios = [there / here for here, there in zip(ours, theirs, strict=True)]
        spread = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {title} | {statistics.median(ours):,.2f} | {statistics.median(theirs):,.2f} | {spread} |")
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", help="folder (default: random weights, saved for this run)")
    add("--rounds", type=int, default=5, help="pairs of loads (default: 5)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="to load in, and of the random weights")
    add("--hidden-size", type=int, default=1024, help="of the random weights")
    add("--layers", type=int, default=12, help="of the random weights")
    add("--vocab-size", type=int, default=65_536, help="of the random weights")
    args = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error(f"the platform is {sys.platform!r}; expected linux, whose /proc tells the peak memory")
    for name, low in {"rounds": 1, "hidden_size": 64, "layers": 1, "vocab_size": 128}.items():
        if getattr(args, name) < low:
            parser.error(f"`--{name.replace('_', '-')}` is {getattr(args, name)}; expected an integer >= {low}")
    if args.checkpoint and not (Path(args.checkpoint) / "config.json").is_file():
        parser.error(f"`--checkpoint` is {args.checkpoint!r}; expected a folder with a config.json")
    return args


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    transformers.logging.disable_progress_bar()
    print(f"{heading(__file__, arguments, machine('cpu'))}\n")
    with tempfile.TemporaryDirectory() as folder:
        if args.checkpoint is None:
            save_random(folder, args.dtype, args.hidden_size, args.layers, args.vocab_size)
        checkpoint = args.checkpoint or folder
        size = sum(path.stat().st_size for path in Path(checkpoint).glob("*.safetensors"))
        print(f"{Path(checkpoint).name if args.checkpoint else 'random weights'}, {size / 2**20:,.0f} MiB, loaded in {args.dtype}\n")
        rounds = [{side: load_elsewhere(side, checkpoint, args.dtype) for side in SIDES} for _ in range(args.rounds + 1)]
    print(table(rounds[1:]), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        print(json.dumps(load(*sys.argv[2:])))
    else:
        main(sys.argv[1:])
