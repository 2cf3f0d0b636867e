"""Ways to need fewer canvas passes without training, against the released sampler on the shipped checkpoints: exactness and passes.

    python benchmarks/fewer_passes.py sudoku --cases 1000
    python benchmarks/fewer_passes.py days note_to_json sort units --cases 1000
    python benchmarks/fewer_passes.py sudoku --only "patience 4" --keep found.jsonl

A table a job. Every candidate answers the same unseen requests with the same seed a case. `exact` is judged by the job's checker, with a
Wilson interval of 95 %; `passes` are canvas passes a case, with the standard error of their mean; `gained` and `lost` count the cases that
only the candidate, and only the released sampler, has right, with the probability of a split as uneven by chance (McNemar's exact test).
Passes are counted and not timed, so that a busy machine changes nothing. With `--keep` finished lines are kept in a file and not
computed anew: a run that was stopped goes on. What a line is found by there says requests, weights and settings.
"""

import argparse
import functools
import hashlib
import json
import math
import random
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from generation.call.presets import PRESETS
from measure import heading, machine, markdown, say, wilson
from modeling_diffusiongemma import default_checkpoint

from jobs import TEXT_JOBS, sudoku  # isort: skip
from recipes import RECIPES  # isort: skip

JOBS = (*TEXT_JOBS, "sudoku")


CANVAS = {"days": 256, "sudoku": 81}  # of the other jobs: 64
RELEASED = "released"
CANDIDATES: dict[str, dict] = {
    RELEASED: {},
    "joint_threshold 0.1": {"joint_threshold": 0.1},
    "joint_threshold 0.4": {"joint_threshold": 0.4},
    "stopping on the mean entropy alone": {"stability_threshold": 0},
    "stopping on stability alone": {"confidence_threshold": 1e9},
    "entropy_bound 0.02, joint_threshold 0.1": {"entropy_bound": 0.02, "joint_threshold": 0.1},
    "preset fast": PRESETS["fast"],
    "preset fast, joint_threshold 0.1": {**PRESETS["fast"], "joint_threshold": 0.1},
    "patience 6": {"patience": 6},
    "predictor_corrector": {"sampler": "predictor_corrector"},
    "predictor_corrector, joint_threshold 0.1": {"sampler": "predictor_corrector", "joint_threshold": 0.1},
    "predictor_corrector, 2 corrector steps": {"sampler": "predictor_corrector", "corrector_steps": 2},
    "predictor_corrector, none": {"sampler": "predictor_corrector", "corrector_steps": 0},
    "always conditioned": {"self_conditioning_steps": 48},
    **{f"self_conditioning_steps {steps}": {"self_conditioning_steps": steps} for steps in (8, 10, 12, 16)},
    "preset fast, self_conditioning_steps 12": {**PRESETS["fast"], "self_conditioning_steps": 12},
    "predictor_corrector, none, joint_threshold 0.1": {"sampler": "predictor_corrector", "corrector_steps": 0, "joint_threshold": 0.1},
}
FIRST_SEED, SUDOKU_SEED = 20_000, 3_000_003


class Case(NamedTuple):
    """One request of a job: ids of the prompt, and how its answer is judged."""

    ids: list[int]
    judged: object


class Line(NamedTuple):
    """What a candidate made of a job's cases: `exact` bool and `passes` int, one of each a case, and the answers."""

    exact: list[bool]
    passes: list[int]
    answers: list[str]


def make_cases(job: str, count: int, recipe) -> list[Case]:
    """The first `count` unseen requests; those of a smaller count are the first of a larger."""
    if job != "sudoku":
        rng = random.Random(f"fewer passes {job}")
        prompts = [TEXT_JOBS[job].sample(rng, "test")[0] for _ in range(count)]
        pairs = zip(recipe.encode(prompts), prompts, strict=True)
        return [Case(ids, functools.partial(TEXT_JOBS[job].check, prompt)) for ids, prompt in pairs]
    rng = random.Random(SUDOKU_SEED)
    puzzles = [sudoku.generate(rng, rng.randint(26, 36))[0] for _ in range(count)]
    encoded = recipe.encode(np.stack(puzzles)).tolist()
    return [Case([2, *ids], functools.partial(sudoku.is_solution, puzzle)) for ids, puzzle in zip(encoded, puzzles, strict=True)]


@torch.inference_mode()
def answer(model, tokenizer, cases: list[Case], batch_size: int, settings: dict) -> Line:
    """Answers of all cases, each with a seed of its own, so that the batch size changes nothing but the last bits."""
    line = Line([], [], [])
    for first in range(0, len(cases), batch_size):
        some = cases[first : first + batch_size]
        inputs = tokenizer.pad({"input_ids": [case.ids for case in some]}, return_tensors="pt", padding_side="left")
        seeds = [FIRST_SEED + first + place for place in range(len(some))]
        output = model.generate(**inputs, seed=seeds, return_dict_in_generate=True, **settings)
        answers = tokenizer.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        line.answers.extend(answers)
        line.exact.extend(bool(case.judged(text)) for case, text in zip(some, answers, strict=True))
        line.passes.extend(output.denoising_steps.tolist())
    return line


def mcnemar(gained: int, lost: int) -> float:
    """Probability of a split of `gained + lost` cases that is as uneven or more, where both ways are as likely: exact, two-sided."""
    count = gained + lost
    tail = sum(math.comb(count, place) for place in range(min(gained, lost) + 1)) / 2**count
    return min(1.0, 2 * tail)


def row(name: str, line: Line, base: Line) -> list[str]:
    """A candidate's line of the table beside the released one."""
    count, right = len(line.exact), sum(line.exact)
    low, high = wilson(right, count)
    error = statistics.stdev(line.passes) / math.sqrt(count) if count > 1 else 0.0
    gained, lost = (sum(a and not b for a, b in zip(*pair, strict=True)) for pair in ((line.exact, base.exact), (base.exact, line.exact)))
    ratio = sum(line.passes) / sum(base.passes)
    shown = [name, f"{right / count:.1%} ({low:.1%} to {high:.1%})", f"{statistics.mean(line.passes):.2f} ± {error:.2f}", f"{ratio:.2f}"]
    return shown + [f"+{gained} -{lost}", f"{mcnemar(gained, lost):.2g}"]


class Kept:
    """Lines found before, in a file of JSON lines; None: nothing is kept."""

    def __init__(self, path: str | None):
        self.path, self.lines = path, {}
        if path is not None and Path(path).is_file():
            for text in Path(path).read_text(encoding="utf-8").splitlines():
                found = json.loads(text)
                self.lines[found["name"]] = Line(*(found[field] for field in Line._fields))

    def add(self, name: str, line: Line) -> None:
        self.lines[name] = line
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"name": name, **line._asdict()}) + "\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", choices=JOBS, nargs="+", metavar="job", help=", ".join(JOBS))
    parser.add_argument("--cases", type=int, default=300, help="unseen requests of each job")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--only", action="append", help="a candidate's whole name, beside the released sampler; may be given again")
    parser.add_argument("--keep", help="a file that finished lines are kept in")
    parser.add_argument("--checkpoint", help="folder to load (default: the shipped one of the job)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    if args.cases < 1 or args.batch < 1:
        parser.error(f"`--cases` and `--batch` are {args.cases} and {args.batch}; expected 1 or more")
    if wrong := [name for name in args.only or () if name not in CANDIDATES]:
        parser.error(f"`--only` is {wrong[0]!r}; expected one of {sorted(CANDIDATES)}")
    return args


def measure_job(
    model, recipe, job: str, args: argparse.Namespace, weights: str, kept: Kept, candidates: dict[str, dict]
) -> list[list[str]]:
    """The table's lines of one job."""
    cases, rows, base = make_cases(job, args.cases, recipe), [], None
    length = CANVAS.get(job, 64)
    for name, given in candidates.items():
        settings = {"canvas_length": length, "max_new_tokens": length, **given}
        title = f"{job} {args.cases} {weights} {settings}"
        if title not in kept.lines:
            kept.add(title, answer(model, recipe.tokenizer, cases, args.batch, settings))
        line = kept.lines[title]
        base = base or line  # the released sampler comes first
        rows.append(row(name, line, base))
        say(f"{job}: {' | '.join(rows[-1])}")
    return rows


def run(arguments: list[str], candidates: dict[str, dict]) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    kept = Kept(args.keep)
    chosen = {name: settings for name, settings in candidates.items() if not args.only or name in (RELEASED, *args.only)}
    print(heading(__file__, arguments, machine("cpu", args.threads)))
    for job in args.jobs:
        recipe = RECIPES["sudoku" if job == "sudoku" else "text"](None)
        path = args.checkpoint or default_checkpoint(recipe.name)
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        model.set_experts_implementation("dense_mm")
        weights = hashlib.sha256((Path(path) / "model.safetensors").read_bytes()).hexdigest()[:12]
        rows = measure_job(model, recipe, job, args, weights, kept, chosen)
        print(f"\n{job}, {args.cases} unseen requests, canvas {CANVAS.get(job, 64)}, weights {weights}\n")
        print(markdown(["candidate", "exact", "passes", "of released", "gained, lost", "p"], rows), flush=True)


if __name__ == "__main__":
    run(sys.argv[1:], CANDIDATES)
