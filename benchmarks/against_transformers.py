"""Times this implementation and transformers' own on one checkpoint, in one run, and prints a table for RESULTS.md.

Two workloads. `default`: a trained checkpoint, held-out prompts of examples/jobs, one batch of each job. `large`: random
weights behind a small backbone at the released vocabulary size, random prompts; nothing converges there, so every canvas takes
all its steps. Every generation is one canvas.

Method. Each implementation lives in a process of its own, transformers' without a trace of this package; it waits for a
request on stdin, runs it, answers in JSON. After a warm-up the parent asks for rounds in turn, ours, transformers, ours,
transformers: a machine that drifts slows both halves of a pair alike. Reported are the median of each side and, pair by pair,
the ratio (above 1: ours is better). Every pair has its own seed, as backends that draw differently take different steps.

- ms per denoising step: `--steps` steps with adaptive stopping off, from the first canvas pass to the end; no prompt pass.
- tokens/s, tokens per forward: the checkpoint's generation_config.json over the released values; whole calls of `generate`.
  Tokens are counted up to and including the first end of sequence; tokens per forward is what each implementation reports.
- peak memory: of the runs that time a step; what torch allocated on CUDA, the resident set by /proc on a CPU. (ru_maxrss, used
  where there is no /proc, starts at the parent's and never falls after loading: nothing is then seen above the model.)
- identical tokens: ours with backend="reference" against transformers, end-to-end settings, one seed, not timed.
  Everything else of ours runs with the default backend.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import platform
import random
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

SIDES = ("ours", "transformers")
MEASURES = {  # name: title, whether more is better
    "ms_per_step": ("ms per denoising step", False),
    "tokens_per_second": ("tokens/s end to end", True),
    "tokens_per_forward": ("tokens per forward", True),
    "peak_above_model_mib": ("peak memory above the loaded model, MiB", False),
    "peak_mib": ("peak memory in all, MiB", False),
}
FIRST_TEXT_ID = 128  # ids below are special in every checkpoint here; a random prompt holds none


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_mib(device: torch.device, forget: bool = False) -> float:
    """Peak memory, MiB; with `forget` the peak becomes what is in use now."""
    if device.type == "cuda":
        if forget:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(AttributeError, OSError):
        if forget:
            ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed and malloc kept is not in use
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM becomes VmRSS
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def mark_canvas_passes(model, side: str) -> list[float]:
    """Returns a list to which every canvas pass of `model` will append the time of its beginning."""
    owner, name = (model, "denoise") if side == "ours" else (model.model.decoder, "forward")
    canvas_pass, marks = getattr(owner, name), []

    def marked(*args, **kwargs):
        marks.append(time.perf_counter() if marks else now(model.device))
        return canvas_pass(*args, **kwargs)

    setattr(owner, name, marked)
    return marks


def run(model, marks: list[float], prompts: list[dict], settings: dict, seed: int = 0) -> dict:
    """Generates every batch once, one canvas each."""
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends).flatten()
    seconds, step_seconds, steps, rows, per_forward = 0.0, 0.0, 0, [], []
    for batch in prompts:
        torch.manual_seed(seed)
        marks.clear()
        start = now(model.device)
        output = model.generate(**batch, max_new_tokens=model.config.canvas_length, return_dict_in_generate=True, **settings)
        end = now(model.device)
        if not marks:
            raise RuntimeError("`generate` made no canvas pass that was seen; expected it to call what mark_canvas_passes wraps")
        seconds, step_seconds, steps = seconds + end - start, step_seconds + end - marks[0], steps + len(marks)
        for row in output.sequences[:, batch["input_ids"].shape[1] :].cpu():
            is_end = torch.isin(row, ends)
            rows.append(row[: int(is_end.int().argmax()) + 1 if is_end.any() else None].tolist())
        per_forward += output.tokens_per_forward.tolist()
    return {"seconds": seconds, "step_seconds": step_seconds, "steps": steps, "rows": rows, "tokens_per_forward": per_forward}


def serve(side: str, spec_file: str) -> None:
    """Answers each request, a line of JSON on stdin, by a line of JSON; anything else that is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    spec = json.loads(Path(spec_file).read_text())
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    transformers.logging.disable_progress_bar()
    model_class = DiffusionGemmaForBlockDiffusion
    if side == "ours":
        from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM as model_class
    chosen = {kind: spec[kind][SIDES.index(side)] for kind in ("attn_implementation", "experts_implementation")}
    chosen = {kind: name for kind, name in chosen.items() if name is not None}
    model = model_class.from_pretrained(spec["checkpoint"], dtype=getattr(torch, spec["dtype"]), **chosen).to(spec["device"])
    marks = mark_canvas_passes(model, side)
    prompts = [{name: torch.tensor(rows, device=model.device) for name, rows in batch.items()} for batch in spec["prompts"]]
    text = model.config.text_config
    about = {"attn": text._attn_implementation, "experts": text._experts_implementation, "parameters": model.num_parameters(),
             "canvas_length": model.config.canvas_length, "vocab_size": text.vocab_size, "hidden_size": text.hidden_size,
             "layers": text.num_hidden_layers, "threads": torch.get_num_threads()}  # fmt: skip
    answers.write(json.dumps(about) + "\n")
    for line in sys.stdin:
        before = peak_mib(model.device, forget=True)
        answer = run(model, marks, prompts, **json.loads(line))
        answer |= {"peak_mib": (peak := peak_mib(model.device)), "peak_above_model_mib": peak - before}
        answers.write(json.dumps(answer) + "\n")


class Worker(subprocess.Popen):
    """The process of one side."""

    def __init__(self, side: str, spec_file: Path):
        command = [sys.executable, __file__, "--serve", side, str(spec_file)]
        super().__init__(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def ask(self, **request) -> dict:
        """The answer to a request; the first, to none, is about the model."""
        with contextlib.suppress(BrokenPipeError):  # the lines below say it better
            self.stdin.write(json.dumps(request) + "\n" if request else "")
        if line := self.stdout.readline():
            return json.loads(line)
        raise SystemExit(f"error: the process of `{self.args[3]}` ended with status {self.wait()}; its message stands above")


def job_prompts(checkpoint: str, batch_size: int, jobs: int | None) -> list[dict]:
    """One batch of held-out prompts a job, in the chat form of the checkpoint's tokenizer, padded on the left."""
    from jobs import TEXT_JOBS

    tokenizer, rng, batches = AutoTokenizer.from_pretrained(checkpoint, padding_side="left"), random.Random(0), []
    for job in list(TEXT_JOBS.values())[:jobs]:
        chats = [[{"role": "user", "content": job.sample(rng, "test")[0]}] for _ in range(batch_size)]
        batch = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True, padding=True)
        batches.append({name: batch[name] for name in ("input_ids", "attention_mask")})
    return batches


def save_random(folder: str, args: argparse.Namespace) -> list[dict]:
    """Saves a random checkpoint, hidden size 256, 4 layers, canvas 256, no end of sequence. Returns one batch of prompts."""
    from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM
    from recipes import small_config

    torch.manual_seed(0)
    config = small_config(args.vocab_size, 256, 4, 256, 10_000.0, image_token_id=107, boi_token_id=108, eoi_token_id=109)
    model = DiffusionGemmaForMaskedBlockLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    rows = torch.randint(FIRST_TEXT_ID, args.vocab_size, (args.batch_size, args.prompt_length))
    return [{"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}]


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def measure(name: str, checkpoint: str, prompts: list[dict], args: argparse.Namespace, folder: str) -> dict:
    """Everything about one workload, as it goes into the JSON file."""
    spec_file = Path(folder) / f"{name}.json"
    spec_file.write_text(json.dumps(vars(args) | {"checkpoint": checkpoint, "prompts": prompts}))
    # No canvas can equal `steps` earlier ones within `steps` steps, so nothing stops early, not even at an entropy of exactly 0.
    fixed = {"max_denoising_steps": args.steps, "stability_threshold": args.steps, "confidence_threshold": 1e-30}
    whole = {"max_denoising_steps": args.steps} if args.quick else {}
    rounds = {side: [] for side in SIDES}
    with contextlib.ExitStack() as stack:
        say(f"{name}: loading both")
        workers = {side: Worker(side, spec_file) for side in SIDES}
        for worker in workers.values():
            stack.callback(worker.wait)
            stack.callback(worker.kill)  # runs first
        about = {side: workers[side].ask() for side in SIDES}
        say(f"{name}: warming up both, comparing tokens")
        for side in SIDES:
            workers[side].ask(settings=fixed)
        ours = workers["ours"].ask(settings=whole | {"backend": "reference"})["rows"]
        theirs = workers["transformers"].ask(settings=whole)["rows"]
        for index in range(args.rounds):
            for side in SIDES:
                stepped, ended = (workers[side].ask(settings=settings, seed=index) for settings in (fixed, whole))
                if stepped["steps"] != args.steps * len(prompts):
                    raise RuntimeError(f"{side} took {stepped['steps']} steps; expected {len(prompts)} canvases of {args.steps}")
                result = {
                    "ms_per_step": 1000 * stepped["step_seconds"] / stepped["steps"],
                    "tokens_per_second": sum(map(len, ended["rows"])) / ended["seconds"],
                    "tokens_per_forward": statistics.mean(ended["tokens_per_forward"]),
                    "peak_above_model_mib": stepped["peak_above_model_mib"],
                    "peak_mib": stepped["peak_mib"],
                    "steps_per_canvas": ended["steps"] / len(prompts),
                }
                rounds[side].append(result)
                say(f"{name}: round {index + 1}/{args.rounds} {side}: {result['ms_per_step']:.1f} ms per step, "
                    f"{result['tokens_per_second']:.1f} tokens/s, {result['steps_per_canvas']:.1f} steps a canvas")  # fmt: skip
    lengths = [sum(mask) for batch in prompts for mask in batch["attention_mask"]]
    pairs = [(x, y) for a, b in zip(ours, theirs, strict=True) for x, y in itertools.zip_longest(a, b)]
    return {
        "checkpoint": "random" if name == "large" else Path(checkpoint).name, "dtype": args.dtype, "batch_size": args.batch_size,
        "batches": len(prompts), "prompt_tokens": [min(lengths), max(lengths)], "steps_for_step_time": args.steps,
        "end_to_end_settings": whole or "the checkpoint's generation_config.json",
        "identical_tokens": ours == theirs, "equal_tokens": [sum(x == y for x, y in pairs), len(pairs)],
        **{side: {"model": about[side], "rounds": rounds[side],
                  **{key: statistics.median(result[key] for result in rounds[side]) for key in MEASURES}} for side in SIDES},
        "ratios": {key: ratios(key, rounds) for key in MEASURES},
    }  # fmt: skip


def ratios(key: str, rounds: dict[str, list[dict]]) -> dict[str, float] | None:
    """Of the pairs, above 1 where ours is better. None where a value is below 0.1: no tokens, or a peak of a few pages."""
    pairs = [(ours[key], theirs[key]) for ours, theirs in zip(*rounds.values(), strict=True)]
    if min(map(min, pairs)) < 0.1:
        return None
    values = [ours / theirs if MEASURES[key][1] else theirs / ours for ours, theirs in pairs]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(name: str, result: dict, args: argparse.Namespace) -> str:
    """One workload in Markdown."""
    model, (shortest, longest), (equal, total) = result["ours"]["model"], result["prompt_tokens"], result["equal_tokens"]
    chosen = ", ".join(f"{side} {result[side]['model']['attn']} and {result[side]['model']['experts']}" for side in SIDES)
    rows = []
    for key, (title, _) in MEASURES.items():
        ours, theirs = (f"{result[side][key]:,.{1 if result[side][key] >= 10 else 2}f}" for side in SIDES)
        ratio = result["ratios"][key]
        rows.append((title, ours, theirs, "n/a" if ratio is None else "{median:.2f}x ({min:.2f} to {max:.2f})".format(**ratio)))
    verdict = ["yes" if result["identical_tokens"] else "NO"] * 2
    rows.append(('identical tokens, ours with backend="reference"', *verdict, f"{equal} of {total} equal"))
    return (
        f"### {name}: {result['checkpoint']}\n\n"
        f"{model['parameters']:,} parameters (hidden {model['hidden_size']}, {model['layers']} layers, vocabulary "
        f"{model['vocab_size']:,}, canvas {model['canvas_length']}), {args.dtype}, prompts of {shortest} to {longest} tokens in "
        f"batches of {args.batch_size}, {result['batches']} a round; attention and experts: {chosen}; {args.steps} steps for the "
        f"step time, end to end: {result['end_to_end_settings']}; {args.rounds} rounds.\n\n"
        "| measure | ours | transformers | ours better by (lowest to highest pair) |\n|---|---|---|---|\n"
        + "\n".join(f"| {' | '.join(row)} |" for row in rows)
    )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", help="folder for the workload `default` (default: the shipped text checkpoint)")
    add("--only", choices=("default", "large"), help="one workload alone")
    add("--rounds", type=int, help="timed rounds of each side (default: 5; 1 with --quick)")
    add("--steps", type=int, help="denoising steps of the runs that time a step (default: 16; 2 with --quick)")
    add("--batch-size", type=int, default=1)
    add("--prompt-length", type=int, help="tokens of a prompt of `large` (default: 128)")
    add("--vocab-size", type=int, help="of `large` (default: 262144; 4096 with --quick)")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    pair = {"nargs": "+", "metavar": "NAME", "help": "for both, or ours and transformers' (default: each its own)"}
    add("--attn-implementation", choices=("eager", "sdpa", "flex_attention"), **pair)
    add("--experts-implementation", choices=("eager", "grouped_mm", "batched_mm", "dense_mm"), **pair)
    add("--quick", action="store_true", help="a smoke run: one job, and --steps steps also end to end; measures nothing")
    add("--json", metavar="FILE", help="also write everything, round by round, to this file")
    args = parser.parse_args(arguments)
    for name in {"large": ("checkpoint",), "default": ("vocab_size", "prompt_length")}.get(args.only, ()):
        if getattr(args, name) is not None:
            parser.error(f"`--{name.replace('_', '-')}` is given; expected it unset, since `--only` is {args.only!r}")
    for name, full, quick in (("rounds", 5, 1), ("steps", 16, 2), ("vocab_size", 262_144, 4096), ("prompt_length", 128, 128)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
    smallest = {"rounds": 1, "steps": 1, "batch_size": 1, "prompt_length": 1, "threads": 1, "vocab_size": FIRST_TEXT_ID + 1}
    for name, low in smallest.items():
        if (value := getattr(args, name)) is not None and value < low:
            parser.error(f"`--{name.replace('_', '-')}` is {value}; expected an integer >= {low}")
    for name in ("attn_implementation", "experts_implementation"):
        given = getattr(args, name) or [None]
        if len(given) > 2:
            parser.error(f"`--{name.replace('_', '-')}` is {given}; expected one name, or ours and transformers'")
        setattr(args, name, [given[0], given[-1]])
    if args.experts_implementation[1] == "dense_mm":
        parser.error("`--experts-implementation` is 'dense_mm', which only ours has; expected e.g. dense_mm grouped_mm")
    if args.attn_implementation[1] == "eager" and args.batch_size > 1 and args.only != "large":
        parser.error("`--attn-implementation` is 'eager', with which transformers fails on padding; expected --batch-size 1")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        parser.error(f"`--json` is {args.json!r}; expected a file in a folder that exists")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("`--device` is 'cuda', and torch finds no CUDA device; expected cpu")
    if args.only != "large":
        from modeling_diffusiongemma import default_checkpoint

        try:
            args.checkpoint = args.checkpoint or default_checkpoint()
            if not (Path(args.checkpoint) / "config.json").is_file():
                raise ValueError("expected a folder with a config.json")
            args.prompts = job_prompts(args.checkpoint, args.batch_size, 1 if args.quick else None)
        except (OSError, ValueError) as error:
            parser.error(f"`--checkpoint` is {args.checkpoint!r}: {error}")
    return args


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    transformers.logging.disable_progress_bar()
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    machine = {
        "cpu": cpu[1] if cpu else platform.processor(), "cores": os.cpu_count(),
        "threads": args.threads or torch.get_num_threads(), "load average": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else "unused",
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    command = shlex.join(["python", "benchmarks/against_transformers.py", *arguments])
    report = {"command": command, "machine": machine, "results": {}}
    print(f"`{command}`\n\n{', '.join(f'{name} {value}' for name, value in machine.items())}", flush=True)
    with tempfile.TemporaryDirectory(prefix="against_transformers_") as folder:
        for name in ("default", "large") if args.only is None else (args.only,):
            checkpoint, prompts = args.checkpoint, getattr(args, "prompts", None)
            if name == "large":
                say(f"large: saving a random checkpoint with a vocabulary of {args.vocab_size:,}")
                checkpoint, prompts = f"{folder}/large", save_random(f"{folder}/large", args)
            report["results"][name] = measure(name, checkpoint, prompts, args, folder)
            print(f"\n{table(name, report['results'][name], args)}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        main(sys.argv[1:])
