"""Right answers with corrupted tokens, revised: how many corruptions are mended, and how many right tokens harmed.

    python benchmarks/revising.py sudoku             # 100 solutions; cells replaced by other digits
    python benchmarks/revising.py text               # 100 unseen notes as JSON; tokens replaced by others
    python benchmarks/revising.py text --cases 20 --counts 1 4 --png revising.png

Of each answer 1, 2, 4, 8 and 16 tokens are corrupted, none of them given by the prompt as a clue, and `model.revise` gets what that writes,
with the prompt beside it. Every line sees the same corruptions with the same seeds:

- random, uncertain: where the noise goes, with the share of the tokens; "told": just to the corrupted ones;
- "others kept": nothing else may change, as with `keep="others"`;
- with `--left-out`, also the tokens that are least likely where each alone is renoised, a row for each: what a dearer choice would gain;
- "random 1": all of it is noise, so that it is written anew. "none": what stays without.

Whole answers come with Wilson's interval at 95 %. Passes are denoising steps, without the one pass that "uncertain" asks for.
"""

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from measure import heading, machine, markdown, say, wilson

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "examples")]

from generation.constraints.tokens import token_bytes  # noqa: E402
from generation.watch.watcher import Watcher  # noqa: E402
from jobs import TEXT_JOBS, sudoku  # noqa: E402
from modeling_diffusiongemma import default_checkpoint  # noqa: E402

COUNTS = (1, 2, 4, 8, 16)
CANVAS = {"text": 64, "sudoku": 81}
LINES: dict[str, dict[str, Any]] = {
    "random 0.1": {"noise": 0.1}, "random 0.3": {"noise": 0.3}, "random 0.6": {"noise": 0.6}, "random 1": {"noise": 1.0},
    "uncertain 0.1": {"where": "uncertain", "noise": 0.1},
    "uncertain 0.3": {"where": "uncertain", "noise": 0.3}, "uncertain 0.6": {"where": "uncertain", "noise": 0.6},
    "uncertain 0.1, others kept": {"where": "uncertain", "noise": 0.1, "keep": "others"},
    "uncertain 0.3, others kept": {"where": "uncertain", "noise": 0.3, "keep": "others"},
    "told": {"where": "told"}, "told, others kept": {"where": "told", "keep": "others"},
}  # fmt: skip
LEFT_OUT = {"left out 0.1, others kept": {"where": "left out", "noise": 0.1, "keep": "others"}}
DRAWN = ("random 0.3", "random 1", "uncertain 0.3", "uncertain 0.6", "uncertain 0.1, others kept", "told, others kept")


class Case(NamedTuple):
    """`ids`: of the right answer; `may`: places of it that may be corrupted."""

    prompt: str
    answer: str
    ids: list[int]
    may: list[int]


def make_cases(name: str, tokenizer, count: int, rng: random.Random) -> list[Case]:
    """Unseen puzzles of 26 to 36 clues and their solutions, or notes of the held-out split."""
    cases = []
    while len(cases) < count:
        if name == "sudoku":
            puzzle, solution = (sudoku.to_text(grid) for grid in sudoku.generate(rng, rng.randint(26, 36)))
            may = [place for place, cell in enumerate(puzzle) if cell == "."]
        else:
            puzzle, solution = TEXT_JOBS["note_to_json"].sample(rng, "test")
            may = None
        ids = tokenizer(solution, add_special_tokens=False)["input_ids"]
        if len(ids) < CANVAS[name] or name == "sudoku":
            cases.append(Case(puzzle, solution, ids, list(range(len(ids))) if may is None else may))
    return cases


def corrupt(case: Case, count: int, tokenizer, others: list[int], rng: random.Random) -> tuple[str, list[int]]:
    """The answer with `count` tokens replaced, and their places; its tokens stay what they are when it is read again."""
    while True:
        ids, places = list(case.ids), sorted(rng.sample(case.may, min(count, len(case.may))))
        for place in places:
            ids[place] = rng.choice([token for token in others if token != case.ids[place]])
        text = tokenizer.decode(ids)
        if tokenizer(text, add_special_tokens=False)["input_ids"] == ids:
            return text, places


class Reading(Watcher):
    """Keeps what a step says of every id, float32 (B, C, V) nats."""

    wants_logits = True

    def step(self, canvas_index, step, places, state, prediction) -> None:
        self.found = prediction.shaped.log_softmax(dim=-1)


def left_out(model, tokenizer, prompt: list[dict], ids: list[int], length: int, end: int, seed: int) -> list[int]:
    """Places of the tokens, from the least likely on, each under what the model says where it alone is noise."""
    chat = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")["input_ids"]
    rows = torch.tensor([(ids + [end] * (len(ids) < length) + [0] * length)[:length]]).repeat(len(ids), 1)
    size = model.config.get_text_config().vocab_size
    places = torch.arange(len(ids))
    noise = torch.randint(size, (len(ids),), generator=torch.Generator().manual_seed(seed))
    watcher = Reading()
    model.generate(
        chat.repeat(len(ids), 1), decoder_input_ids=rows.index_put((places, places), noise), canvas_length=length, max_new_tokens=length,
        max_denoising_steps=1, t_min=1.0, t_max=1.0, seed=seed, watcher=watcher,
    )  # fmt: skip
    return watcher.found[places, places, torch.tensor(ids)].argsort().tolist()


def measure(name: str, model, tokenizer, cases: list[Case], count: int, settings: dict | None, args: argparse.Namespace) -> dict:
    """Of `count` corruptions in each case: shares mended, harmed, whole; steps. `settings` None: nothing is revised."""
    rng = random.Random(f"{args.seed} {count}")
    digits = [tokenizer.convert_tokens_to_ids(digit) for digit in "123456789"]
    others = digits if name == "sudoku" else [token for token, written in enumerate(token_bytes(tokenizer)) if written]
    mended = harmed = corrupted = intact = whole = steps = 0
    for seed, case in enumerate(cases):
        text, places = corrupt(case, count, tokenizer, others, rng)
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        if settings is not None:
            given, prompt = dict(settings), [{"role": "user", "content": case.prompt}]
            if given.get("where") == "told":
                given["where"] = places
            elif given.get("where") == "left out":
                order = left_out(model, tokenizer, prompt, found, CANVAS[name], model.generation_config.eos_token_id[-2:][0], seed)
                given["where"] = order[: max(1, round(given.pop("noise") * len(found)))]
            revised = model.revise(text, tokenizer, prompt, seed=seed, canvas_length=CANVAS[name], max_new_tokens=CANVAS[name], **given)
            found, steps = revised.tokens.tolist(), steps + sum(revised.steps)
        right = [place < len(found) and found[place] == token for place, token in enumerate(case.ids)]
        mended += sum(right[place] for place in places)
        harmed += sum(not one for place, one in enumerate(right) if place not in places)
        corrupted, intact = corrupted + len(places), intact + len(right) - len(places)
        whole += found == case.ids
    return {
        "mended": mended / corrupted, "harmed": harmed / intact, "whole": whole / len(cases), "steps": steps / len(cases),
        "interval": wilson(whole, len(cases)),
    }  # fmt: skip


def draw(found: dict[str, dict[int, dict]], title: str, path: str) -> None:
    """Writes the plot: mended, harmed and whole answers, by how many tokens were corrupted."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("error: `--png` needs matplotlib (pip install -e '.[bench]')") from error
    figure = Figure(figsize=(12, 4.2), layout="constrained", dpi=110)
    axes = figure.subplots(1, 3)
    titles = {"mended": "corrupted tokens mended, %", "harmed": "right tokens harmed, %", "whole": "whole answers right, %"}
    for axis, (key, label) in zip(axes, titles.items(), strict=True):
        for place, line in enumerate(line for line in DRAWN if line in found):
            points = found[line]
            values = [100 * point[key] for point in points.values()]
            beside = [count * 1.05 ** (place - 2.5) for count in points]  # or equal points would hide each other
            style = {"marker": "osD^vP"[place], "color": f"C{place}", "label": line, "linewidth": 1.6, "markersize": 5}
            if key == "whole":
                ends = [[100 * abs(point["interval"][side] - point[key]) for point in points.values()] for side in (0, 1)]
                axis.errorbar(beside, values, yerr=ends, capsize=2, **style)
            else:
                axis.plot(beside, values, **style)
        axis.set_xscale("log", base=2)
        counts = sorted({count for points in found.values() for count in points})
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.set_xlabel("corrupted tokens")
        axis.set_title(label, fontsize=10, loc="left")
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=-2 if key == "whole" else None)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, format="png")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=sorted(CANVAS))
    parser.add_argument("--checkpoint", help="folder to load (default: the shipped one)")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help="corrupted tokens of an answer")
    parser.add_argument("--only", help="lines whose name holds this")
    parser.add_argument("--left-out", action="store_true", help="also choose by leaving out each token; many times as slow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--png", help="where the plot goes; needs matplotlib")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    path = args.checkpoint or default_checkpoint(args.job)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    model.set_experts_implementation("dense_mm")
    cases = make_cases(args.job, tokenizer, args.cases, random.Random(1_000_003 + args.seed))
    print(f"{heading(__file__, arguments, machine('cpu', args.threads))}\n\n{args.cases} answers, canvas {CANVAS[args.job]}\n")
    found: dict[str, dict[int, dict]] = {}
    for line, settings in {"none": None, **LINES, **(LEFT_OUT if args.left_out else {})}.items():
        if line != "none" and args.only and args.only not in line:
            continue
        started, found[line] = time.perf_counter(), {}
        for count in args.counts:
            found[line][count] = measure(args.job, model, tokenizer, cases, count, settings, args)
        say(f"{line}: {time.perf_counter() - started:.0f} s")
    rows = [
        [line, count, *(f"{one[key]:.1%}" for key in ("mended", "harmed", "whole")), "{:.0%} to {:.0%}".format(*one["interval"]),
         f"{one['steps']:.1f}"]
        for line, points in found.items() for count, one in points.items()
    ]  # fmt: skip
    print(markdown(["where, noise", "corrupted", "mended", "harmed", "whole", "95 %", "passes"], rows))
    if args.png:
        draw(found, f"{args.job}: {args.cases} right answers with corrupted tokens, revised", args.png)


if __name__ == "__main__":
    main(sys.argv[1:])
