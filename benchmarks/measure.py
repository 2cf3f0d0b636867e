"""What the benchmarks share: timed calls of `generate`, peak memory, a process for each implementation, ratios, Markdown.

It uses nothing of either implementation but `generate` with a streamer, so that it holds whatever happens inside (captured
steps, rows that leave the batch). Two consequences:

- The time of a denoising step is a difference: `steps` fixed steps against one, divided by the steps between. Prompt pass,
  commits and the first step, which has no self-conditioning, cancel out.
- First text is the first canvas that the streamer gets: the first tokens that a user may keep.

Run as a program this file is one implementation's process (`Worker` starts it), transformers' without a trace of this
package. It answers requests, a line of JSON each; see `serve`.
"""

import argparse
import contextlib
import ctypes
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.generation.streamers import BaseStreamer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

SIDES = ("ours", "transformers")
FIRST_TEXT_ID = 128  # ids below are special in every checkpoint here; a random prompt holds none
MEMORY_SHARE = 0.9  # of what is free: a process on a CPU gets no more, so that it fails by itself and nothing else is killed


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_mib(device: torch.device, forget: bool = False) -> float:
    """Peak memory, MiB; with `forget` the peak becomes what is in use now.

    On CUDA what torch allocated, on a CPU the resident set by /proc. (ru_maxrss, used where there is no /proc, starts at the
    parent's and never falls: nothing is then seen above the model.)
    """
    if device.type == "cuda":
        if forget:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(AttributeError, OSError):
        if forget:
            ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed and malloc kept is not in use
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM becomes VmRSS
        return memory_kib("/proc/self/status", "VmHWM") / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def memory_kib(file: str, name: str) -> int:
    """A value of a file like /proc/meminfo."""
    return int(re.search(rf"^{name}:\s+(\d+) kB", Path(file).read_text(), re.MULTILINE)[1])


class PeakMemory:
    """Peak of this process's anonymous memory (a mapped weight file is not counted), sampled every millisecond; Linux."""

    @staticmethod
    def now() -> int:
        return 1024 * memory_kib("/proc/self/status", "RssAnon")

    def __enter__(self):
        self.start = self.peak = self.now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, self.now())

    def __exit__(self, *error) -> None:
        self.done.set()
        self.thread.join()
        self.end = self.now()


def limit_memory() -> None:
    """Lets this process grow by `MEMORY_SHARE` of the memory that is free now. Only on Linux."""
    with contextlib.suppress(OSError):
        limit = 1024 * (memory_kib("/proc/self/status", "VmData") + int(MEMORY_SHARE * memory_kib("/proc/meminfo", "MemAvailable")))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def fixed_steps(steps: int, endless: bool = False) -> dict:
    """Settings under which every canvas takes exactly `steps` steps, in both implementations; `endless`: and no token ends a row.

    A canvas cannot equal `steps` earlier ones within `steps` steps, so `stability_threshold` alone keeps everything going, even
    at a mean entropy of exactly 0; that lies below every threshold.
    """
    fixed = {"max_denoising_steps": steps, "stability_threshold": steps, "confidence_threshold": 1e-30}
    return fixed | ({"eos_token_id": None} if endless else {})


class _FirstText(BaseStreamer):
    """Notes when it got the prompt and each finished canvas."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Call(NamedTuple):
    """One call of `generate`: seconds in all, seconds to the first text (None where it was not watched), and what came out."""

    seconds: float
    first_text: float | None
    output: object


def timed_call(model, batch: dict[str, torch.Tensor], canvases: int, settings: dict, seed: int = 0, watch: bool = True) -> Call:
    """Generates `canvases` canvases for one batch, fewer where every row ends before; `watch`: with a streamer, for the first text."""
    torch.manual_seed(seed)
    streamer, length = _FirstText() if watch else None, canvases * model.config.canvas_length
    start = now(model.device)
    output = model.generate(**batch, max_new_tokens=length, return_dict_in_generate=True, streamer=streamer, **settings)
    end = now(model.device)
    return Call(end - start, streamer.times[1] - start if watch else None, output)


def compile_layers(model, side: str) -> None:
    """`torch.compile`, by its defaults, for every layer of both passes: ours by `compile_config`, transformers' by the layers' method."""
    if side == "ours":
        model.generation_config.compile_config = transformers.CompileConfig()
        return
    torch._dynamo.config.recompile_limit = 64
    for layer in (*model.model.decoder.layers, *model.model.encoder.language_model.layers):
        layer.compile()


def watch_prefill(model, side: str) -> list[float]:
    """Returns a list to which every causal pass (prefill, commit) of `model` will append its seconds."""
    owner, name = (model.model, "prefill") if side == "ours" else (model.model.encoder, "forward")
    causal_pass, seconds = getattr(owner, name), []

    def watched(*args, **kwargs):
        start = now(model.device)
        result = causal_pass(*args, **kwargs)
        seconds.append(now(model.device) - start)
        return result

    setattr(owner, name, watched)
    return seconds


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def run(model, prefills: list[float], prompts: list[dict], settings: dict, canvases: int = 1, seed: int = 0) -> dict:
    """Generates every batch once. Per batch: seconds, seconds to the first text, seconds in causal passes. Per row: the new tokens
    up to and including the first end of sequence, and tokens per forward as the implementation counts them."""
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends).flatten()
    answer = {"seconds": [], "first_text": [], "prefill_seconds": [], "rows": [], "tokens_per_forward": []}
    for batch in prompts:
        prefills.clear()
        batch = {name: torch.tensor(rows, device=model.device) for name, rows in batch.items()}
        call = timed_call(model, batch, canvases, settings, seed)
        if not prefills:
            raise RuntimeError("`generate` made no causal pass that was seen; expected it to call what `watch_prefill` wraps")
        answer["seconds"].append(call.seconds)
        answer["first_text"].append(call.first_text)
        answer["prefill_seconds"].append(sum(prefills))
        for row in call.output.sequences[:, batch["input_ids"].shape[1] :].cpu():
            is_end = torch.isin(row, ends)
            answer["rows"].append(row[: int(is_end.int().argmax()) + 1 if is_end.any() else None].tolist())
        answer["tokens_per_forward"] += call.output.tokens_per_forward.tolist()
    return answer


def time_products(weight: torch.Tensor, positions: int, clock: Callable[[], float], repeats: int = 3) -> dict[str, float]:
    """Milliseconds of a denoising step's two products with the head `weight`, in pieces and with nothing between: `plain`, by `torch.mm`;
    `used`, as the pass over the vocabulary makes them. Fastest of `repeats`, in turn."""
    from generation.vocabulary.products import PLAIN, choose_products

    weight, piece = weight.detach(), 4096 if weight.device.type == "cpu" else 32_768
    rows, shares = (torch.rand((positions, size), dtype=weight.dtype, device=weight.device) for size in (weight.shape[1], piece))
    products, mixed = torch.empty_like(shares), torch.zeros_like(rows, dtype=torch.float32)
    spent: dict[str, list[float]] = {"plain": [], "used": []}
    with torch.no_grad():
        for name in [*spent] * (repeats + 1):  # the first of each warms up
            scores, mix = PLAIN if name == "plain" else choose_products(weight.device, weight.dtype)
            start = clock()
            for part in weight.split(piece):
                scores(rows, part, products[:, : len(part)], False)
                mixed.add_(mix(shares[:, : len(part)], part))
            spent[name].append(clock() - start)
    return {name: 1000 * min(times[1:]) for name, times in spent.items()}


def serve(side: str, spec_file: str) -> None:
    """Loads a checkpoint and answers each request on stdin on stdout; anything else that is printed goes to stderr.

    The first answer, to no request, is about the model. `{"settle": true}` makes what is in use now the "loaded model" of the
    peaks to come. `{"products": N}` is answered with `time_products` of N positions. Every other request holds the arguments of `run`;
    its answer is `run`'s with both peaks, or `{"error": ...}` where memory ran out.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    spec = json.loads(Path(spec_file).read_text())
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    transformers.logging.disable_progress_bar()
    model_class = DiffusionGemmaForBlockDiffusion
    if side == "ours":
        from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM as model_class
    chosen = {kind: spec[kind][SIDES.index(side)] for kind in ("attn_implementation", "experts_implementation") if kind in spec}
    chosen = {kind: name for kind, name in chosen.items() if name is not None}
    model = model_class.from_pretrained(spec["checkpoint"], dtype=getattr(torch, spec["dtype"]), **chosen).to(spec["device"])
    if side in spec.get("compiled", ()):
        compile_layers(model, side)
    prefills, text, loaded = watch_prefill(model, side), model.config.text_config, 0.0
    experts = text._experts_implementation
    if experts == "auto":
        from modeling_diffusiongemma.layers.experts import choose_experts

        experts = choose_experts(model.model.decoder.layers[0].experts)
    about = {"attn": text._attn_implementation, "experts": experts, "parameters": model.num_parameters(),
             "canvas_length": model.config.canvas_length, "vocab_size": text.vocab_size, "hidden_size": text.hidden_size,
             "layers": text.num_hidden_layers, "threads": torch.get_num_threads()}  # fmt: skip
    answers.write(json.dumps(about) + "\n")
    for line in sys.stdin:
        request, before = json.loads(line), peak_mib(model.device, forget=True)
        if request.get("settle"):
            loaded, answer = before, {"loaded_mib": before}
            if model.device.type == "cpu":
                limit_memory()
        elif "products" in request:
            answer = time_products(model.lm_head.weight, request["products"], functools.partial(now, model.device))
        else:
            try:
                answer = run(model, prefills, **request)
                answer |= {"peak_mib": (peak := peak_mib(model.device)), "peak_above_model_mib": peak - loaded}
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                answer = {"error": "out of memory"}
        answers.write(json.dumps(answer) + "\n")


class Worker(subprocess.Popen):
    """The process of one side."""

    def __init__(self, side: str, spec_file: Path):
        self.side = side
        super().__init__(
            [sys.executable, __file__, side, str(spec_file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(self, **request) -> dict:
        """The answer to a request; the first, to none, is about the model."""
        with contextlib.suppress(BrokenPipeError):  # the lines below say it better
            self.stdin.write(json.dumps(request) + "\n" if request else "")
        if line := self.stdout.readline():
            return json.loads(line)
        raise SystemExit(f"error: the process of `{self.side}` ended with status {self.wait()}; its message stands above")


@contextlib.contextmanager
def fresh_workers(spec: dict, folder: str) -> Iterator[dict[str, Worker]]:
    """A process for each side, loading at the same time; both end with the block."""
    spec_file = Path(folder) / "spec.json"
    spec_file.write_text(json.dumps(spec))
    with contextlib.ExitStack() as stack:
        workers = {side: Worker(side, spec_file) for side in SIDES}
        for worker in workers.values():
            stack.callback(worker.wait)
            stack.callback(worker.kill)  # runs first
        yield workers


def turns(index: int) -> tuple[str, ...]:
    """The order of the sides in a round: each goes first in every other one, so that a drifting machine favours none."""
    return SIDES if index % 2 == 0 else SIDES[::-1]


def ratios(pairs: list[tuple[float, float]], more_is_better: bool) -> dict[str, float] | None:
    """Median, lowest and highest of the pairs (ours, transformers), above 1 where ours is better.

    None without pairs, and where a value is below 0.001: a peak of a few pages, or a difference of times lost in noise.
    """
    if not pairs or min(map(min, pairs)) < 1e-3:
        return None
    values = [ours / theirs if more_is_better else theirs / ours for ours, theirs in pairs]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def random_checkpoint(folder: str, vocab_size: int) -> None:
    """Saves random weights: hidden size 256, 6 layers, canvas 256, window 512, no end of sequence, so that nothing converges."""
    from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM
    from recipes import small_config

    torch.manual_seed(0)
    config = small_config(vocab_size, 256, 6, 256, 10_000.0, image_token_id=107, boi_token_id=108, eoi_token_id=109)
    model = DiffusionGemmaForMaskedBlockLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)


def random_prompts(vocab_size: int, batch_size: int, length: int) -> list[dict]:
    """One batch of random ids, unpadded."""
    rows = torch.randint(FIRST_TEXT_ID, vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}]


def machine(device: str, threads: int | None = None) -> dict:
    """Hardware and versions, for the line above a table."""
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    found = {"cpu": cpu[1] if cpu else platform.processor(), "cores": os.cpu_count(), "threads": threads or torch.get_num_threads(),
             "load average": round(os.getloadavg()[0], 1), "gpu": "unused", "python": platform.python_version(),
             "torch": torch.__version__, "transformers": transformers.__version__}  # fmt: skip
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        found |= {"gpu": f"{torch.cuda.get_device_name()} ({memory:.0f} GiB)", "cuda": torch.version.cuda}
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["triton"] = importlib.metadata.version("triton")
    return found


def heading(script: str, arguments: list[str], about: dict) -> str:
    """The command as it was given, and the machine."""
    command = shlex.join(["python", f"benchmarks/{Path(script).name}", *arguments])
    return f"`{command}`\n\n{', '.join(f'{name} {value}' for name, value in about.items())}"


def markdown(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share, of 95 %."""
    middle, width = right / count + z * z / (2 * count), z * math.sqrt(right * (count - right) / count**3 + z * z / (4 * count * count))
    return tuple(max(0.0, min(1.0, (middle + sign * width) / (1 + z * z / count))) for sign in (-1, 1))


def compared(ours_and_theirs: list[list[float]], missing: list[str], ratio: dict[str, float] | None) -> str:
    """A field of a table, `ours : transformers`: the medians, or why there is none, and the `ratios` where there are any."""
    texts = [number(statistics.median(found)) if found else why for found, why in zip(ours_and_theirs, missing, strict=True)]
    return " : ".join(texts) + ("" if ratio is None else "<br>**{median:.2f}x** ({min:.2f} to {max:.2f})".format(**ratio))


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, lowest: dict[str, int], *files: str) -> None:
    """Ends the program where an argument, or one of its numbers, is below what it must be, or a file could not be written in the end."""
    for name, low in lowest.items():
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < low:
            parser.error(f"`--{name.replace('_', '-')}` is {value}; expected no number below {low}")
    for name in files:
        if (file := getattr(args, name)) and not Path(file).resolve().parent.is_dir():
            parser.error(f"`--{name}` is {file!r}; expected a file in a folder that exists")


def number(value: float) -> str:
    """Three or four digits, thousands apart."""
    return f"{value:,.{0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 4}f}"


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
