"""Presets, samplers and ways of decoding on a shipped checkpoint's held-out set: accuracy, steps, tokens per forward, time.

    python benchmarks/presets.py text --cases 100
    python benchmarks/presets.py sudoku --cases 100

One table; every line runs on the same inputs with the same seeds. Below it: a batch whose rows finish at different times,
with finished rows leaving and without (same tokens, ratio of time), on the same machine in one run. Prints hardware and
versions, so that the output can be pasted into RESULTS.md.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from generation.call.configuration import DIFFUSION_FIELDS, PRESETS
from measure import heading, machine
from modeling_diffusiongemma import default_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from jobs import TEXT_JOBS  # noqa: E402
from recipes import RECIPES, TextRecipe  # noqa: E402

LINES = {
    **{f"preset {name}": {**DIFFUSION_FIELDS, **settings} for name, settings in PRESETS.items()},
    "released, waiting behind the end": {"ignore_after_eos": False},
    "released, patience 8": {"patience": 8},
    "sampler confidence 0.9": {"sampler": "confidence"},
    "sampler fixed_steps, 16": {"sampler": "fixed_steps", "max_denoising_steps": 16},
    "sampler predictor_corrector, 16": {"sampler": "predictor_corrector", "max_denoising_steps": 16},
    "sampler predictor_corrector, 48": {"sampler": "predictor_corrector"},
    "the same without corrector, 48": {"sampler": "predictor_corrector", "corrector_steps": 0},
    "one step": {"max_denoising_steps": 1},
    "greedy": {"do_sample": False},
    "autoregressive, greedy": {"decoding": "autoregressive", "do_sample": False},
    "verified, greedy": {"decoding": "verified", "do_sample": False},
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=["text", "sudoku"], nargs="?", default="text")
    parser.add_argument("--cases", type=int, default=50, help="unseen inputs (of each job)")
    parser.add_argument("--checkpoint", help="default: the shipped one")
    parser.add_argument("--canvas-length", type=int, help="of every line (default: the checkpoint's: 256 for text, 81 for sudoku)")
    parser.add_argument("--only", help="lines whose name holds this")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args(arguments)
    args.canvas_length = args.canvas_length or {"text": 256, "sudoku": 81}[args.recipe]
    return args


def measure_lines(model, recipe, args: argparse.Namespace) -> None:
    print("| setting | exact | passes | tokens per forward | seconds |\n|---|---|---|---|---|")
    for name, settings in LINES.items():
        if (args.only and args.only not in name) or (args.recipe == "sudoku" and "decoding" in settings):
            continue  # a checkpoint trained without the causal loss cannot write from left to right
        settings = {"generation_config": {"canvas_length": args.canvas_length}, "max_new_tokens": args.canvas_length, **settings}
        started = time.perf_counter()
        results = recipe.evaluate(model, args.cases, **settings)
        seconds = time.perf_counter() - started
        rows = [results["all"]] if "all" in results else results.values()
        means = [statistics.mean(row[key] for row in rows) for key in ("exact", "steps", "tokens_per_forward")]
        print(f"| {name} | {means[0]:.1%} | {means[1]:.1f} | {means[2]:.1f} | {seconds:.1f} |", flush=True)


def measure_leaving(model, recipe: TextRecipe, rounds: int = 3) -> None:
    rng = random.Random(0)
    names = ["date", "words_to_number", "sort", "note_to_json"] * 2
    part = recipe.tokenizer.pad(
        {"input_ids": recipe.encode([TEXT_JOBS[name].sample(rng, "test")[0] for name in names])}, return_tensors="pt"
    )
    settings = {"seed": 0, "canvas_length": 64, "max_new_tokens": 64, "return_dict_in_generate": True}
    ratios = []
    for _ in range(rounds):
        started = time.perf_counter()
        leaving = model.generate(**part, **settings)
        between = time.perf_counter()
        cache = DynamicCache(config=model.config.get_text_config())
        staying = model.generate(**part, cache=cache, **settings)
        ratios.append((time.perf_counter() - between) / (between - started))
    same = torch.equal(leaving.sequences, staying.sequences)
    verdict = "equal" if same else "DIFFER"
    print(f"\n8 rows, steps {leaving.denoising_steps.tolist()}: all rows to the end takes {statistics.median(ratios):.2f} times as long")
    print(f"as letting finished rows leave ({min(ratios):.2f} to {max(ratios):.2f} over {rounds} rounds); tokens {verdict}")


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint or default_checkpoint(args.recipe)).eval()
    model.set_experts_implementation("dense_mm")
    recipe = RECIPES[args.recipe](None)
    print(f"{heading(__file__, sys.argv[1:], machine('cpu'))}\n\n{args.cases} unseen inputs (of each job), canvas {args.canvas_length}\n")
    measure_lines(model, recipe, args)
    if args.recipe == "text":
        measure_leaving(model, recipe)


if __name__ == "__main__":
    main()
