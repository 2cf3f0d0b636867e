"""The released size on this machine: random checkpoints of it, and what each way of running them costs.

    python benchmarks/full_size.py                                  # 30 layers: FP8 (27 GB of disk), then NF4 made from it (14 GB more)
    python benchmarks/full_size.py --ways bf16 theirs               # 52 GB of disk: mapped weights, and transformers' class with the same
    python benchmarks/full_size.py --layers 2                       # 2 of 30 layers: 4 GB for FP8, 6 GB for bf16
    python benchmarks/full_size.py --ways fp8 --device cuda         # on a GPU

Ways: `bf16`, `theirs` (transformers' class, bf16), `fp8`, `nf4` (made from the FP8 copy, then saved), `nf4-saved` (what `nf4` saved).
Each is a process of its own, under a watchdog that ends it when less than `--least-free` GiB of the machine's memory are left. It loads,
generates one canvas in `--passes` steps behind a prompt of 20 tokens, runs a prompt past the sliding window, and, with `--check`, saves the
model and compares the tensors of both, byte for byte. Weights are random, so text is noise; what is computed does not depend on the values.
Checkpoints lie in `--folder` and stay there.

Private memory is what the process cannot give back (RssAnon): pages of mapped files are not in it. The page cache is as the earlier
ways left it; a model larger than memory is read from the disk in every pass.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import DiffusionGemmaForBlockDiffusion

from measure import FIRST_TEXT_ID, PeakMemory, fixed_steps, heading, machine, markdown, memory_kib, now, say
from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, FourBitConfig
from random_checkpoint import write_checkpoint
from random_model import stored_config

WAYS = {"bf16": "bf16", "theirs": "bf16", "fp8": "fp8", "nf4": "fp8", "nf4-saved": "nf4"}  # and the checkpoint that each reads
COLUMNS = {
    "load": "load, s", "loaded": "private memory, GB", "peak": "at its peak", "short": "prompt of 20, s", "canvas": "canvas pass, s",
    "long": "prompt of {long}, s", "generate": "whole call, s", "save": "save, s", "same": "saved bytes equal", "bits": "logits",
}  # fmt: skip
STOPPED = 3  # exit status of a process that the watchdog ended


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ways", nargs="+", choices=list(WAYS), default=["fp8", "nf4", "nf4-saved"], help="in this order (default: fp8 nf4 nf4-saved)")
    add("--layers", type=int, default=30, help="the last ones of the released 30; the last one attends fully")
    add("--folder", type=Path, default=Path(tempfile.gettempdir()) / "diffusiongemma-full-size", help="where checkpoints are, or are made")
    add("--passes", type=int, default=3, help="denoising steps of the whole call; of their canvas passes the median is shown")
    add("--long", type=int, default=1200, help="tokens of the long prompt; 0: none")
    add("--device", default="cpu")
    add(
        "--check",
        action="store_true",
        help="also: a digest of a canvas's logits, and every way's model saved and compared (as much disk again)",
    )
    add("--shrink", action="store_true", help="a small model of the same form, of at most 6 layers: does it still run?")
    add("--least-free", type=float, default=1.0, metavar="GIB")
    add("--measure", choices=list(WAYS), help=argparse.SUPPRESS)  # this program calls itself
    args = parser.parse_args(arguments)
    most = 6 if args.shrink else 30
    args.layers = min(args.layers, most)
    if not 1 <= args.layers or args.passes < 1 or args.long < 0:
        parser.error(
            f"`--layers` is {args.layers}, `--passes` {args.passes}, `--long` {args.long}; expected 1 or more, 1 or more, 0 or more"
        )
    return args


def watch_memory(least: float) -> None:
    """Ends this process as soon as the machine has less than `least` GiB left; Linux."""

    def watch() -> None:
        while memory_kib("/proc/meminfo", "MemAvailable") > least * 2**20:
            time.sleep(0.05)
        os._exit(STOPPED)

    threading.Thread(target=watch, daemon=True).start()


def load(way: str, path: Path, device: str):
    """The model of a way, by plain `from_pretrained`."""
    placed = {} if device == "cpu" else {"device_map": device}
    if way == "theirs":
        return DiffusionGemmaForBlockDiffusion.from_pretrained(path, dtype=torch.bfloat16, **placed)
    quantised = {"quantization_config": FourBitConfig()} if way == "nf4" else {}
    return DiffusionGemmaForMaskedBlockLM.from_pretrained(path, dtype=torch.bfloat16, **quantised, **placed)


PASSES = {  # what runs a prompt and what runs a canvas, by owner and name
    "ours": lambda model: ((model, "prefill"), (model, "denoise")),
    "theirs": lambda model: ((model.encoder, "forward"), (model.decoder, "forward")),
}


def watch_calls(owner, name: str, device: torch.device) -> list[float]:
    """Returns a list to which every call of a method will append its seconds."""
    method, seconds = getattr(owner, name), []

    def watched(*args, **kwargs):
        started = now(device)
        result = method(*args, **kwargs)
        seconds.append(now(device) - started)
        return result

    setattr(owner, name, watched)
    return seconds


def memory() -> dict[str, str]:
    """The machine's, for the line above a table."""
    return {
        "memory": f"{memory_kib('/proc/meminfo', 'MemTotal') / 2**20:.0f} GiB",
        "swap": f"{memory_kib('/proc/meminfo', 'SwapTotal') / 2**20:.0f} GiB",
    }


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()[:8]


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same names, dtypes and bytes."""

    def files(folder: Path) -> dict[str, Path]:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        with safe_open(folder / "model.safetensors", "pt") as file:
            return dict.fromkeys(file.keys(), folder / "model.safetensors")

    ours, theirs = files(one), files(other)
    if set(ours) != set(theirs):
        return False
    pairs: dict[tuple[Path, Path], list[str]] = {}
    for name, file in ours.items():
        pairs.setdefault((file, theirs[name]), []).append(name)
    for (left, right), names in pairs.items():
        with safe_open(left, "pt") as first, safe_open(right, "pt") as second:
            for name in names:
                a, b = first.get_tensor(name), second.get_tensor(name)
                if a.dtype != b.dtype or not torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)):
                    return False
    return True


@torch.no_grad()
def measure(way: str, args: argparse.Namespace) -> dict:
    """One way, in this process."""
    watch_memory(args.least_free)
    source, device = args.folder / f"{WAYS[way]}-{args.layers}", torch.device(args.device)
    found = {}

    def timed(name: str, action):
        started = now(device)
        result = action()
        found[name] = now(device) - started
        say(f"{way}: {name} {found[name]:.1f} s")
        return result

    with PeakMemory() as memory:
        model = timed("load", lambda: load(way, source, args.device))
        found["loaded"], vocabulary = (memory.now() - memory.start) / 1e9, model.config.text_config.vocab_size
        generator = torch.Generator().manual_seed(0)
        prompt, canvas, long_prompt = (
            torch.randint(FIRST_TEXT_ID, vocabulary, (1, count), generator=generator).to(device)
            for count in (20, model.config.canvas_length, max(args.long, 1))
        )
        prompts, canvases = (watch_calls(*owner, device) for owner in PASSES["theirs" if way == "theirs" else "ours"](model.model))
        length = model.config.canvas_length
        timed("generate", lambda: model.generate(prompt, max_new_tokens=length, **fixed_steps(args.passes, endless=True)))
        found |= {"short": prompts[0], "canvas": statistics.median(canvases)}
        if args.long:
            prompts.clear()
            timed("then", lambda: model.generate(long_prompt, max_new_tokens=length, **fixed_steps(1, endless=True)))
            found["long"] = prompts[0]
        if args.check:
            logits = timed("forward", lambda: model(input_ids=prompt, decoder_input_ids=canvas).logits)
            found["bits"] = digest(logits.float())
        if args.check or way == "nf4":
            target = args.folder / f"{'nf4' if way == 'nf4' else f'saved-{way}'}-{args.layers}"
            timed("save", lambda: model.save_pretrained(target))
            if way != "nf4":
                found["same"] = "yes" if same_tensors(source, target) else "NO"
                shutil.rmtree(target)
    return found | {"peak": (memory.peak - memory.start) / 1e9}


def main() -> None:
    args = parse()
    if args.measure:
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no answer
        transformers.utils.logging.disable_progress_bar()
        answers.write(json.dumps(measure(args.measure, args)))
        answers.close()
        return
    for kind in dict.fromkeys(WAYS[way] for way in args.ways if WAYS[way] != "nf4"):
        folder = args.folder / f"{kind}-{args.layers}"
        if not (folder / "config.json").is_file():
            size = write_checkpoint(folder, stored_config(args.shrink, args.layers), kind == "fp8")
            say(f"{folder}: {size:,} bytes")
    columns = {key: name.format(long=args.long) for key, name in COLUMNS.items() if args.check or key not in ("bits", "same")}
    print(f"{heading(__file__, sys.argv[1:], machine(args.device.partition(':')[0]) | {'layers': args.layers} | memory())}\n")
    print(markdown(["way", *columns.values()], []), flush=True)
    for way in args.ways:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--measure", way], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            why = f"stopped: less than {args.least_free} GiB were left" if done.returncode == STOPPED else f"failed ({done.returncode})"
            print(f"| {way} | {why} |{' |' * (len(columns) - 1)}", flush=True)
            continue
        found = json.loads(done.stdout)
        cells = (found.get(key, "") for key in columns)
        print(f"| {way} | {' | '.join(cell if isinstance(cell, str) else f'{cell:,.2f}' for cell in cells)} |", flush=True)


if __name__ == "__main__":
    main()
