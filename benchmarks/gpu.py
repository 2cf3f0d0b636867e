"""Times the full-size architecture with random weights on one GPU, and sets it beside what its memory allows.

    python benchmarks/gpu.py --against transformers
    python benchmarks/gpu.py --dtype fp8
    python benchmarks/gpu.py --cache static static-compiled
    python benchmarks/gpu.py --device cpu --shrink      # does it still run? Its numbers mean nothing

Weights are made on the device (`random_model.py`). Prompts are random; every canvas takes exactly `--steps` steps: adaptive
stopping is off by `stability_threshold` equal to the steps, which no canvas reaches within them, in transformers as in ours.

- ms per canvas pass: whole calls with `--steps` steps against whole calls with one, by the passes between (`measure.py`).
- ms in all per pass: the whole call by its canvas passes and commits, `canvases * (steps + 1)`: what published tokens/s give.
- share of the roofline: the bytes that a pass must read (`random_model.bytes_per_pass`) at the bandwidth measured in this run, by
  the time it took. Bandwidth is the better of summing and of copying a large tensor.
- stages: one canvas, without capture or compilation, marks in the stream (`stages.py`). Their sum is above the pass timed
  without marks where launching keeps the device waiting.

Everything runs in one process, round by round in turn; transformers' class holds the very same tensors.
"""

import argparse
import gc
import statistics
import sys
import time

import torch
import transformers

import measure
from measure import FIRST_TEXT_ID, fixed_steps, heading, is_out_of_memory, machine, markdown, now, number, peak_mib, say, timed_call, turns
from modeling_diffusiongemma.console.device_report import device_table, prove_all
from random_model import build, bytes_per_pass, experts_hit, full_size_config, share
from stages import STAGES, stage_times

GOALS = {"bf16": 14.7, "fp8": 7.9}  # ms per canvas pass at batch 1 on an H200: 75 % of the roofline at 4.8 TB/s
FULL = {"prompt": 1024, "new_tokens": 1024, "batch": [1, 2, 4, 8], "bandwidth_mib": 8192}
SHRUNK = {"prompt": 48, "new_tokens": 64, "batch": [1, 2], "bandwidth_mib": 64}


def bandwidth(device: torch.device, mib: int, repeats: int = 5) -> dict[str, float]:
    """Bytes a second of reading a tensor of `mib` MiB and of copying one of half that size, the best of `repeats`."""
    source = torch.zeros(mib * 2**20 // 4, dtype=torch.float32, device=device)
    half = source.chunk(2)
    rates = {}
    for name, action in (("read", source.sum), ("copy", lambda: half[0].copy_(half[1]))):
        seconds = []
        for _ in range(repeats + 1):  # the first warms up
            start = now(device)
            action()
            seconds.append(now(device) - start)
        rates[name] = source.nbytes / min(seconds[1:])
    return rates


def time_variants(variants: dict, ids: torch.Tensor, args: argparse.Namespace) -> dict[tuple[str, str], list[dict] | None]:
    """Rounds of every (side, cache) at one batch size; None where memory ran out."""
    device, results = ids.device, {key: [] for key in variants}
    canvases = args.new_tokens // args.canvas_length
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for index in range(-1, args.rounds):  # round -1 warms up
        order = list(variants) if turns(index)[0] == "ours" else list(variants)[::-1]
        for key in order:
            if results[key] is None:
                continue
            cache, _, compiled = key[1].partition("-")
            options = {} if cache == "dynamic" else {"cache_implementation": cache}
            options |= {"compile_config": transformers.CompileConfig()} if compiled else {}
            try:
                before = peak_mib(device, forget=True)
                many, one = (
                    timed_call(variants[key], batch, canvases, fixed_steps(steps, True) | options, index + 1, watch=False).seconds
                    for steps in (args.steps, 1)
                )
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                results[key] = None
                gc.collect()
                torch.cuda.empty_cache()
                continue
            if index >= 0:
                step, rate = 1000 * (many - one) / (canvases * (args.steps - 1)), len(ids) * args.new_tokens / many
                results[key].append({"seconds": many, "ms_per_pass": step, "peak_mib": peak_mib(device) - before})
                say(f"batch {len(ids)}, {' '.join(key)}: {step:.2f} ms per canvas pass, {rate:.0f} tokens/s")
    return results


def table(results: dict, needed: dict[int, float], rate: float, args: argparse.Namespace) -> str:
    """All batch sizes in Markdown. `needed`: bytes a pass, by batch size; `rate`: bytes a second."""
    passes, rows = args.new_tokens // args.canvas_length * (args.steps + 1), []
    for (batch_size, side, cache), rounds in results.items():
        if rounds is None:
            rows.append([batch_size, side, cache, "out of memory", *[""] * 5])
            continue
        steps = [values["ms_per_pass"] for values in rounds]
        step, seconds = statistics.median(steps), statistics.median(values["seconds"] for values in rounds)
        least = 1000 * needed[batch_size] / rate
        rows.append([
            batch_size, side, cache, f"{number(step)} ({number(min(steps))} to {number(max(steps))})", number(1000 * seconds / passes),
            number(batch_size * args.new_tokens / seconds), number(least), f"{least / step:.0%}",
            number(max(values["peak_mib"] for values in rounds)),
        ])  # fmt: skip
    header = ["batch", "implementation", "cache", "ms per canvas pass", "ms in all per pass", "tokens/s", "roofline, ms", "share of it",
              "peak above the model, MiB"]  # fmt: skip
    return markdown(header, rows)


def stage_table(times: dict[str, dict[str, float]], needed: dict[str, float], rate: float) -> str:
    rows = []
    for stage in STAGES:
        cells = []
        for spent in times.values():
            known = stage in spent
            cells += [number(spent[stage]), f"{spent[stage] / sum(spent.values()):.0%}"] if known else ["in the one above", ""]
        size = needed.get(stage, 0)
        rows.append([stage, *cells, number(size / 1e9), number(1000 * size / rate)])
    sums = [cell for spent in times.values() for cell in (number(sum(spent.values())), "100%")]
    rows.append(["sum", *sums, number(sum(needed.values()) / 1e9), number(1000 * sum(needed.values()) / rate)])
    columns = [cell for side in times for cell in (f"{side}, ms", "share")]
    return markdown(["stage", *columns, "GB read", "roofline, ms"], rows)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--dtype", choices=("bf16", "fp8"), default="bf16")
    add("--shrink", action="store_true", help="a small architecture of the same form; with --device cpu always")
    add("--batch", type=int, nargs="+", help="rows (default: 1 2 4 8; 1 2 with --shrink)")
    add("--prompt", type=int, help="tokens in (default: 1024; 48 with --shrink)")
    add("--new-tokens", type=int, help="tokens out, whole canvases (default: 1024; 64 with --shrink)")
    add("--steps", type=int, default=16, help="denoising steps of every canvas (16)")
    add("--rounds", type=int, default=3, help="timed rounds (3)")
    caches = ("dynamic", "static", "dynamic-compiled", "static-compiled")
    add("--cache", choices=caches, nargs="+", default=["dynamic", "static"], help="ours with these (the first two), layers compiled or not")
    add("--against", choices=("transformers", "transformers-static"), nargs="+", default=[],
        help="also time transformers' class, with its dynamic cache, or with its static one, which it compiles for minutes")  # fmt: skip
    add("--no-stages", action="store_true", help="leave out where the time goes")
    add("--trace", metavar="FILE", help="also write torch.profiler's trace of one canvas of ours, for chrome://tracing")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("`--device` is 'cuda', and torch finds no CUDA device; expected cpu, with --shrink")
    if args.device == "cpu" and not args.shrink:
        parser.error("`--device` is 'cpu' and `--shrink` is not given; expected both: the full size has 26 billion parameters")
    if args.dtype == "fp8" and args.against:
        parser.error(f"`--against` is {args.against} and `--dtype` 'fp8', which transformers' class cannot run; expected bf16")
    for name, value in (SHRUNK if args.shrink else FULL).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    measure.check(parser, args, {"batch": 1, "prompt": 1, "new_tokens": 1, "steps": 2, "rounds": 1}, "trace")
    args.config = full_size_config(args.shrink)
    args.canvas_length = args.config.canvas_length
    if args.new_tokens % args.canvas_length:
        parser.error(f"`--new-tokens` is {args.new_tokens}; expected a multiple of the canvas, {args.canvas_length}")
    return args


def describe(args: argparse.Namespace, models: dict, rates: dict[str, float], seconds: float, hit: int) -> str:
    """What was measured on what; `seconds`: to build our model, `hit`: `random_model.experts_hit`."""
    ours, text = models["ours"], args.config.text_config
    size = sum(tensor.nbytes for tensor in (*ours.parameters(), *ours.buffers()))
    used = {side: model.config.text_config for side, model in models.items()}
    chosen = ", ".join(f"{side} {config._attn_implementation} and {config._experts_implementation}" for side, config in used.items())
    return (
        f"### {'a shrunk' if args.shrink else 'the full-size'} architecture, random weights, {args.dtype}\n\n"
        f"{ours.num_parameters():,} parameters{' with scales' if args.dtype == 'fp8' else ''} in {size / 1e9:.3g} GB "
        f"({text.num_hidden_layers} layers, hidden {text.hidden_size}, {text.num_experts} experts of which a pass reads {hit} a layer, "
        f"vocabulary {text.vocab_size:,}), built in {seconds:.0f} s; attention and experts: {chosen}. {args.prompt} tokens in, "
        f"{args.new_tokens} out in canvases of {args.canvas_length}, {args.steps} fixed steps and a commit each, {args.rounds} rounds. "
        f"Bandwidth: read {rates['read'] / 1e9:,.0f} GB/s, copy {rates['copy'] / 1e9:,.0f} GB/s."
    )


def goal(results: dict, dtype: str) -> str | None:
    """Whether the fastest of ours at batch 1 reached the goal; None where that was not measured."""
    ours = [rounds for (batch_size, side, _), rounds in results.items() if (batch_size, side) == (1, "ours") and rounds]
    if not ours:
        return None
    reached = min(statistics.median(values["ms_per_pass"] for values in rounds) for rounds in ours)
    verdict = "met" if reached <= GOALS[dtype] else "MISSED"
    return f"Goal on an H200 at batch 1: {GOALS[dtype]} ms per canvas pass; reached {number(reached)}: {verdict}."


@torch.no_grad()
def main(arguments: list[str]) -> None:
    args = parse(arguments)
    transformers.logging.set_verbosity_error()
    device, dtype = torch.device(args.device), torch.bfloat16
    print(heading(__file__, arguments, machine(args.device)), flush=True)
    if device.type == "cuda":  # what is timed is what works here
        print(f"\n{device_table({}, prove_all(torch.device(device.type, torch.cuda.current_device())))}", flush=True)
    rates = bandwidth(device, args.bandwidth_mib)
    rate = max(rates.values())
    torch.cuda.empty_cache()
    say("building the model")
    start = time.perf_counter()
    ours = build(args.config, device, dtype, args.dtype == "fp8")
    built = now(device) - start
    models = {"ours": ours} | ({"transformers": share(ours, dtype)} if args.against else {})
    variants = {("ours", cache): ours for cache in args.cache}
    variants |= {("transformers", "static" if name.endswith("static") else "dynamic"): models["transformers"] for name in args.against}
    high = min(args.config.text_config.vocab_size, 200_000)  # ids of images are above

    def prompts(batch_size: int, length: int) -> torch.Tensor:
        return torch.randint(FIRST_TEXT_ID, high, (batch_size, length), device=device)

    hit = experts_hit(ours, prompts(1, args.canvas_length + 1))
    print(f"\n{describe(args, models, rates, built, hit)}\n", flush=True)
    canvases, results, needed = args.new_tokens // args.canvas_length, {}, {}
    for batch_size in args.batch:
        needed[batch_size] = sum(bytes_per_pass(ours, batch_size, args.prompt, canvases).values())
        for key, rounds in time_variants(variants, prompts(batch_size, args.prompt), args).items():
            results[batch_size, *key] = rounds
    print(table(results, needed, rate, args), flush=True)
    if not args.shrink and (line := goal(results, args.dtype)):
        print(f"\n{line}", flush=True)

    ids = prompts(args.batch[0], args.prompt)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if args.trace:
        kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (args.device == "cuda")
        with torch.profiler.profile(activities=kinds) as profile:
            timed_call(ours, batch, 1, fixed_steps(args.steps, endless=True), watch=False)
        profile.export_chrome_trace(args.trace)
    if not args.no_stages:
        times = {}
        for side, model in models.items():
            options = {"cache_implementation": "static"} if side == "ours" and args.cache[0].startswith("static") else {}
            times[side] = stage_times(model, side, batch, fixed_steps(args.steps, endless=True) | options)
        print(f"\nWhere a canvas pass goes at batch {args.batch[0]} (ours: {args.cache[0]} cache), without capture or compilation:\n")
        print(stage_table(times, bytes_per_pass(ours, args.batch[0], args.prompt, 1), rate), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
