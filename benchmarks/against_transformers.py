"""Times this implementation and transformers' own on one checkpoint, in one run, and prints tables for RESULTS.md.

Two workloads, each at every `--batch` and every `--prompt`. `default`: a trained checkpoint with a small vocabulary and held-out
prompts of examples/jobs, jobs mixed in a batch, so that rows finish at different times; longer prompts are conversations of
solved jobs. `large`: random weights behind a small backbone at the released vocabulary size, random prompts; nothing converges
there, so every canvas takes `--steps` steps, also end to end. Every call of `generate` writes one canvas.

Method. Every cell (workload, batch, prompt) has two fresh processes, one for each implementation, and rounds in which both run
in turn, so that a machine that drifts slows both halves of a pair alike. Reported are each side's median and, pair by pair, the
ratio (above 1: ours is better). Every pair has its own seed, as backends that draw differently take different steps.

- ms per denoising step: `--steps` fixed steps against one (`measure.py`); adaptive stopping cannot fire.
- peak memory above the loaded model: of the call with `--steps` steps, above what was in use after one row's warm-up.
- tokens/s end to end: whole calls under the checkpoint's generation_config.json over the released values, 24 prompts a round (8
  where they are longer than 256 tokens; one batch of `large`). Tokens count up to and including the first end of sequence.
- first text: seconds from the call to the first committed tokens, mean over the same calls.
- products (`large` alone, after each round, in the process of ours): a step has two products with the head, and what we add to them
  is by how much the step is slower: than those products by `torch.mm`, and than as ours makes them.
- identical tokens: one row, ours with backend="reference" against transformers, one seed, not timed. Everything else of ours
  runs with the default backend.

A side that runs out of memory (on a CPU: 90 % of what was free) is reported as such, without a ratio.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer

from measure import (
    FIRST_TEXT_ID,
    SIDES,
    check,
    compared,
    fixed_steps,
    fresh_workers,
    heading,
    machine,
    markdown,
    number,
    random_checkpoint,
    random_prompts,
    ratios,
    say,
    turns,
)

MEASURES = {  # name: title, whether more is better
    "ms_per_step": ("ms per denoising step", False),
    "tokens_per_second": ("tokens/s end to end", True),
    "first_text_seconds": ("seconds to first text", False),
    "peak_above_model_mib": ("peak above the loaded model, MiB", False),
}
RELEASED_VOCABULARY = 262_144
GOALS = (  # workload, batch, prompt, measure, times better
    ("large", 1, 64, "ms_per_step", 8.0),
    ("large", 1, 64, "peak_above_model_mib", 20.0),
    ("default", 1, 64, "tokens_per_second", 1.5),
    ("default", 8, 64, "tokens_per_second", 2.5),
)
LONGEST_TURN = 64  # tokens; a prompt of the jobs in chat form is no longer


def job_prompts(checkpoint: str, batch_size: int, length: int, count: int) -> list[dict]:
    """Held-out prompts in chat form, one job after another, padded on the left to `length`, in batches.

    Where there is room for more than the prompt, earlier turns of solved jobs come before it.
    """
    from jobs import TEXT_JOBS

    tokenizer, rng, jobs, rows = AutoTokenizer.from_pretrained(checkpoint), random.Random(0), list(TEXT_JOBS.values()), []

    def encode(chat: list[dict]) -> list[int]:
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]

    for place in range(count):
        chat = [{"role": "user", "content": jobs[place % len(jobs)].sample(rng, "test")[0]}]
        ids = encode(chat)
        while len(ids) + LONGEST_TURN <= length:
            question, answer = rng.choice(jobs).sample(rng, "train")
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}, *chat]
            if len(longer := encode(chat)) > length:
                break
            ids = longer
        rows.append(ids)
    if max(map(len, rows)) > length:
        raise ValueError(f"`--prompt` is {length}; expected at least {max(map(len, rows))}, the longest prompt of the jobs")
    padded = [([0] * (length - len(row)) + row, [0] * (length - len(row)) + [1] * len(row)) for row in rows]
    batches = [padded[first : first + batch_size] for first in range(0, count, batch_size)]
    return [{"input_ids": [ids for ids, _ in batch], "attention_mask": [mask for _, mask in batch]} for batch in batches]


def measure_cell(name: str, checkpoint: str, batch_size: int, length: int, prompts: list[dict], args: argparse.Namespace) -> dict:
    """Everything about one workload at one batch and prompt, as it goes into the JSON file."""
    label, steps = f"{name}, batch {batch_size}, prompt {length}", args.steps[name]
    endless = name == "large"
    whole = fixed_steps(steps, endless) if endless or args.quick else {}
    spec = {"checkpoint": checkpoint} | {key: getattr(args, key) for key in ("dtype", "device", "threads")}
    spec |= {key: getattr(args, key) for key in ("attn_implementation", "experts_implementation")} | {"compiled": args.compiled}
    say(f"{label}: loading both")
    with tempfile.TemporaryDirectory() as folder, fresh_workers(spec, folder) as workers:
        about = {side: workers[side].ask() for side in SIDES}
        first_row = [{key: rows[:1] for key, rows in prompts[0].items()}]
        check = whole | ({"max_denoising_steps": min(steps, 2)} if whole else {})
        ours = workers["ours"].ask(prompts=first_row, settings=check | {"backend": "reference"})["rows"]
        theirs = workers["transformers"].ask(prompts=first_row, settings=check)["rows"]
        workers["ours"].ask(prompts=first_row, settings=fixed_steps(2, endless))  # the other is warm
        for side in SIDES:
            if side in args.compiled:  # every shape that will come, so that no round compiles
                say(f"{label}: {side} compiles")
                workers[side].ask(prompts=prompts, settings=whole)
                workers[side].ask(prompts=prompts[:1], settings=fixed_steps(steps, endless))
            workers[side].ask(settle=True)
        start, rounds, errors = time.perf_counter(), [], {}
        while len(rounds) < args.rounds and (not rounds or time.perf_counter() - start < args.budget) and not errors:
            taken, seed = {}, len(rounds)
            for side in turns(len(rounds)):
                answers = {}
                fixed = {key: fixed_steps(number, endless) for key, number in (("one", 1), ("fixed", steps))}
                for key, settings in (fixed | {"whole": whole}).items():
                    if key == "whole" and endless:
                        answers[key] = answers["fixed"]
                        continue
                    answers[key] = workers[side].ask(prompts=prompts if key == "whole" else prompts[:1], settings=settings, seed=seed)
                    if error := answers[key].get("error"):
                        errors[side] = error
                        break
                else:
                    taken[side] = side_of_round(answers, steps)
                    say(f"{label}: round {seed + 1} {side}: {taken[side]['ms_per_step']:.1f} ms per step, "
                        f"{taken[side]['tokens_per_second']:.1f} tokens/s")  # fmt: skip
            if endless and "ours" in taken:
                products = workers["ours"].ask(products=batch_size * about["ours"]["canvas_length"])
                taken["ours"] |= {f"step_by_{way}_products": taken["ours"]["ms_per_step"] / ms for way, ms in products.items()}
                taken["ours"] |= {f"ms_{way}_products": ms for way, ms in products.items()}
            rounds.append(taken)
    for side, error in errors.items():
        say(f"{label}: {side}: {error}")
    return {
        "workload": name, "checkpoint": "random" if name == "large" else Path(checkpoint).name, "batch_size": batch_size,
        "prompt_length": length, "prompt_tokens": [sum(mask) for batch in prompts for mask in batch["attention_mask"]],
        "steps_for_step_time": steps, "end_to_end_settings": f"{steps} fixed steps" if whole else "the checkpoint's generation_config.json",
        "identical_tokens": ours == theirs, "models": about, "rounds": rounds, "errors": errors,
        "ratios": {key: ratios([tuple(pair[side][key] for side in SIDES) for pair in rounds if len(pair) == 2], more)
                   for key, (_, more) in MEASURES.items()},
    }  # fmt: skip


def side_of_round(answers: dict[str, dict], steps: int) -> dict:
    """One side's measures of one round."""
    whole = answers["whole"]
    return {
        "ms_per_step": 1000 * (answers["fixed"]["seconds"][0] - answers["one"]["seconds"][0]) / (steps - 1),
        "tokens_per_second": sum(map(len, whole["rows"])) / sum(whole["seconds"]),
        "first_text_seconds": statistics.mean(whole["first_text"]),
        "peak_above_model_mib": answers["fixed"]["peak_above_model_mib"],
        "peak_mib": answers["fixed"]["peak_mib"],
        "tokens_per_forward": statistics.mean(whole["tokens_per_forward"]),
    }


def table(results: list[dict], args: argparse.Namespace) -> str:
    """One workload in Markdown."""
    first = results[0]
    model, name, rows = first["models"]["ours"], first["workload"], []
    chosen = ", ".join(
        f"{side} {first['models'][side]['attn']} and {first['models'][side]['experts']}{' compiled' * (side in args.compiled)}"
        for side in SIDES
    )
    for result in results:
        cells = []
        for key in MEASURES:
            values = [[pair[side][key] for pair in result["rounds"] if side in pair] for side in SIDES]
            cells.append(compared(values, [result["errors"].get(side, "") for side in SIDES], result["ratios"][key]))
        row = [result["batch_size"], result["prompt_length"], len(result["rounds"]), *cells, "yes" if result["identical_tokens"] else "NO"]
        rows.append(row)
    return (
        f"### {name}: {first['checkpoint']}\n\n"
        f"{model['parameters']:,} parameters (hidden {model['hidden_size']}, {model['layers']} layers, vocabulary "
        f"{model['vocab_size']:,}, canvas {model['canvas_length']}), {args.dtype}; attention and experts: {chosen}; "
        f"{args.steps[name]} steps for step time and peak, end to end: {first['end_to_end_settings']}.\n\n"
        "Each field: ours : transformers, and by how much ours is better (median, lowest and highest pair).\n\n"
        + markdown(["batch", "prompt", "rounds", *(title for title, _ in MEASURES.values()), "identical tokens"], rows)
        + "".join(map(products_line, results))
    )


def products_line(result: dict) -> str:
    """How our step compares with the two products that it cannot do without; nothing where they were not timed."""
    ours = [pair["ours"] for pair in result["rounds"] if "step_by_used_products" in pair.get("ours", {})]
    if not ours:
        return ""

    def middle(name: str) -> str:
        return number(statistics.median(one[name] for one in ours))

    return (
        f"\n\nBatch {result['batch_size']}, prompt {result['prompt_length']}: a step of ours takes "
        f"{middle('step_by_plain_products')} times its two products with the head by `torch.mm` ({middle('ms_plain_products')} ms), and "
        f"{middle('step_by_used_products')} times them as it makes them ({middle('ms_used_products')} ms); medians over the rounds."
    )


def goals(results: list[dict], args: argparse.Namespace) -> str:
    """What was aimed at and what was reached."""
    rows = []
    for name, batch_size, length, measure, wanted in GOALS:
        cell = (name, batch_size, length)
        found = [result for result in results if (result["workload"], result["batch_size"], result["prompt_length"]) == cell]
        ratio, verdict = (found[0]["ratios"][measure] if found else None), "not measured"
        if args.quick or (name == "large" and args.vocab_size != RELEASED_VOCABULARY):
            verdict = "not judged: a quick run, or another vocabulary"
        elif ratio is not None:
            verdict = "met" if ratio["median"] >= wanted else "MISSED"
        reached = "n/a" if ratio is None else f"{ratio['median']:.2f}x"
        rows.append([f"{name}, batch {batch_size}, prompt {length}: {MEASURES[measure][0]}", f"{wanted:g}x", reached, verdict])
    return "### goals\n\n" + markdown(["cell", "goal", "reached", "verdict"], rows)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", help="folder for the workload `default` (default: the shipped text checkpoint)")
    add("--only", choices=("default", "large"), help="one workload alone")
    add("--batch", type=int, nargs="+", help="rows (default: 1 4 8; 1 2 with --quick)")
    add("--prompt", type=int, nargs="+", help="tokens of a prompt (default: 64 2048; 64 with --quick)")
    add("--vocab-size", type=int, help="of `large` (default: 262144; 4096 with --quick)")
    add("--rounds", type=int, help="at most so many a cell (default: 5; 1 with --quick)")
    add("--budget", type=float, default=45.0, help="seconds after which a cell begins no further round; the first always ends (45)")
    add("--steps", type=int, help="denoising steps where they are fixed (default: 16 for `default`, 3 for `large`; 2 with --quick)")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    pair = {"nargs": "+", "metavar": "NAME", "help": "for both, or ours and transformers' (default: each its own)"}
    add("--attn-implementation", choices=("eager", "sdpa", "flex_attention"), **pair)
    add("--experts-implementation", choices=("eager", "grouped_mm", "batched_mm", "dense_mm"), **pair)
    add("--compiled", nargs="+", choices=SIDES, default=[], help="these run their layers through torch.compile, warmed up first")
    add("--quick", action="store_true", help="a smoke run: few cells, --steps steps also end to end; measures nothing")
    add("--json", metavar="FILE", help="also write everything, round by round, to this file")
    args = parser.parse_args(arguments)
    for name in {"large": ("checkpoint",), "default": ("vocab_size",)}.get(args.only, ()):
        if getattr(args, name) is not None:
            parser.error(f"`--{name.replace('_', '-')}` is given; expected it unset, since `--only` is {args.only!r}")
    for name, full, quick in (("rounds", 5, 1), ("vocab_size", RELEASED_VOCABULARY, 4096), ("batch", [1, 4, 8], [1, 2]),
                              ("prompt", [64, 2048], [64])):  # fmt: skip
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
    smallest = {"rounds": 1, "steps": 2, "batch": 1, "prompt": 1, "threads": 1, "vocab_size": FIRST_TEXT_ID + 1, "budget": 0}
    check(parser, args, smallest, "json")
    args.steps = {name: args.steps or (2 if args.quick else usual) for name, usual in (("default", 16), ("large", 3))}
    for name in ("attn_implementation", "experts_implementation"):
        given = getattr(args, name) or [None]
        if len(given) > 2:
            parser.error(f"`--{name.replace('_', '-')}` is {given}; expected one name, or ours and transformers'")
        setattr(args, name, [given[0], given[-1]])
    if args.experts_implementation[1] == "dense_mm":
        parser.error("`--experts-implementation` is 'dense_mm', which only ours has; expected e.g. dense_mm grouped_mm")
    if args.attn_implementation[1] == "eager" and args.only != "large":
        parser.error("`--attn-implementation` is 'eager', with which transformers fails on padding; expected it with --only large")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("`--device` is 'cuda', and torch finds no CUDA device; expected cpu")
    args.prompts = {}
    if args.only != "large":
        from modeling_diffusiongemma import default_checkpoint

        args.checkpoint = args.checkpoint or default_checkpoint()
        if not (Path(args.checkpoint) / "config.json").is_file():
            parser.error(f"`--checkpoint` is {args.checkpoint!r}; expected a folder with a config.json")
        for batch_size, length in ((batch_size, length) for batch_size in args.batch for length in args.prompt):
            count = 1 if args.quick else 24 if length <= 256 else 8
            try:
                count = max(1, count // batch_size) * batch_size
                args.prompts["default", batch_size, length] = job_prompts(args.checkpoint, batch_size, length, count)
            except (OSError, ValueError) as error:
                parser.error(str(error))
    if args.only != "default":
        for batch_size, length in ((batch_size, length) for batch_size in args.batch for length in args.prompt):
            args.prompts["large", batch_size, length] = random_prompts(args.vocab_size, batch_size, length)
    return args


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    transformers.logging.disable_progress_bar()
    about = machine(args.device, args.threads)
    print(heading(__file__, arguments, about), flush=True)
    results = []
    with tempfile.TemporaryDirectory(prefix="against_transformers_") as folder:
        if args.only != "default":
            say(f"large: saving a random checkpoint with a vocabulary of {args.vocab_size:,}")
            random_checkpoint(folder, args.vocab_size)
        for name in ("default", "large") if args.only is None else (args.only,):
            checkpoint = folder if name == "large" else args.checkpoint
            cells = [cell for cell in args.prompts if cell[0] == name]
            part = [measure_cell(*cell[:1], checkpoint, *cell[1:], args.prompts[cell], args) for cell in cells]
            print(f"\n{table(part, args)}", flush=True)
            results += part
    print(f"\n{goals(results, args)}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"arguments": arguments, "machine": about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
