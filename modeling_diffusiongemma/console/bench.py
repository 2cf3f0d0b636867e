"""`diffusiongemma bench`: how fast a checkpoint runs on this machine, in a minute.

- ms per denoising step: from the end of the first to the end of the last of `--steps` steps, adaptive stopping off; no prompt pass.
- tokens/s, tokens per forward, steps per canvas: whole calls of `generate` with the checkpoint's settings, prompt pass included.
- peak memory: what torch allocated on all CUDA devices; on a CPU the process's largest resident set, Python and torch included.

The median of the rounds is reported. For a comparison with transformers' own model see benchmarks/ in the project.
"""

import argparse
import statistics
import sys
import time
from typing import Any

import torch

from generation.watch.watcher import Watcher

from .arguments import UsageError, json_line, say
from .device_report import describe_device
from .session import Session, generation_settings

PROMPTS = {
    "text": "Write 3 March 1998 as an ISO date.",
    "sudoku": "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79",
}
PROMPT = "Explain in three paragraphs how the tides of the sea come about."
ENDS_EARLY = ("joint_threshold", "max_length", "max_time", "patience", "stop_strings")  # settings left out where single steps are timed
TITLES = {
    "ms_per_step": "ms per denoising step", "tokens_per_second": "tokens/s", "tokens_per_forward": "tokens per forward",
    "steps_per_canvas": "denoising steps per canvas", "peak_memory_mib": "peak memory, MiB",
}  # fmt: skip


def measure(session, prompt: str, args: argparse.Namespace) -> dict[str, Any]:
    """One warm-up, then the rounds. Every round has a seed of its own."""
    model, accelerated = session.model, session.model.device.type != "cpu"

    def now() -> float:
        if accelerated:
            torch.accelerator.synchronize(model.device)
        return time.perf_counter()

    class Clock(Watcher):
        """Notes when each denoising step ends."""

        def __init__(self):
            self.ends = []

        def step(self, *told) -> None:
            self.ends.append(now())

    inputs = session.encode([[{"role": "user", "content": prompt}]] * args.batch_size)
    canvas = session.settings.get("canvas_length") or model.config.canvas_length
    # No canvas can equal `steps` earlier ones within `steps` steps, so nothing stops early.
    fixed = {name: value for name, value in session.settings.items() if name not in ENDS_EARLY}
    fixed |= {"max_denoising_steps": args.steps, "stability_threshold": args.steps, "max_new_tokens": canvas}
    model.generate(**inputs, **fixed | {"max_denoising_steps": 2, "stability_threshold": 2}, seed=session.seed)
    rounds = []
    for index in range(args.rounds):
        if sys.stderr.isatty():
            say(f"round {index + 1} of {args.rounds}")
        clock, seed = Clock(), session.seed + index
        model.generate(**inputs, **fixed, seed=seed, watcher=clock)
        begun = now()
        output = model.generate(**inputs, **session.settings, seed=seed, tokenizer=session.tokenizer, return_dict_in_generate=True)
        seconds = now() - begun
        canvases = (output.lengths / canvas).ceil()
        rounds.append({
            "ms_per_step": 1000 * (clock.ends[-1] - clock.ends[0]) / (len(clock.ends) - 1),
            "tokens_per_second": int(output.lengths.sum()) / seconds,
            "tokens_per_forward": float(output.tokens_per_forward.mean()),
            "steps_per_canvas": float((output.denoising_steps / canvases).mean()),
        })  # fmt: skip
    result = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    return {**result, "peak_memory_mib": peak_mib(model.device), "prompt_tokens": inputs["input_ids"].shape[1], "canvas_length": canvas}


def peak_mib(device) -> float | None:
    """None where the platform does not tell."""
    if device.type == "cuda":  # all of them: `--device auto` spreads the model
        return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())) / 2**20
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def run(args: argparse.Namespace) -> int:
    settings = generation_settings(args)
    unfit = {name: value for name, value in settings.items() if name in ("backend", "decoding")}
    if set(unfit.values()) - {"auto", "diffusion"}:
        raise UsageError(f"`--set` asks for {unfit}; expected them unset: what is timed are denoising steps")
    session = Session(args, settings)
    measured = measure(session, args.prompt or PROMPTS.get(args.model.given, PROMPT), args)
    about = describe_device(session.model.device)
    result = {
        "model": args.model.given, "dtype": str(session.model.dtype).removeprefix("torch."), "batch_size": args.batch_size, **measured,
        "steps_timed": args.steps, "rounds": args.rounds, "seed": session.seed, "settings": session.settings,
        "device": f"{about['device']} ({about['name']})", "threads": torch.get_num_threads(),
        **{name: about[name] for name in ("torch", "transformers", "python")},
    }  # fmt: skip
    if args.json:
        print(json_line(result))
        return 0
    print("| measure | value |\n|---|---|")
    for name, title in TITLES.items():
        print(f"| {title} | {'unknown' if result[name] is None else f'{result[name]:,.1f}'} |")
    setting = {name.replace("_", " "): value for name, value in result.items() if name not in TITLES and value != {}}
    print("\n" + ", ".join(f"{name} {value}" for name, value in setting.items()))
    return 0


__all__ = ["measure", "run"]
