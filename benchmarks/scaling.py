"""Measures how the cost grows with the context, the batch and the number of canvases, ours beside transformers', and plots it.

    python benchmarks/scaling.py                 # needs matplotlib for the plot: pip install -e '.[bench]'
    python benchmarks/scaling.py --quick         # does it still run? Its numbers mean nothing

Random weights behind a small backbone (`measure.random_checkpoint`; window 512), random prompts. One axis is varied at a time, the
others stay at the first of their values. Every point has a fresh process for each side; rounds are taken in turn.

- ms per denoising step: `--steps` fixed steps a canvas against one, by the steps between (`measure.py`).
- prompt pass and commits: time inside the causal passes of the call with one step, all canvases together.
- peak memory: of the call with `--steps` steps, above what was in use after a first small call.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import transformers

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
    random_checkpoint,
    random_prompts,
    ratios,
    say,
    turns,
)

AXES = {"context": "prompt tokens", "batch": "rows of the batch", "canvases": "canvases of 256 tokens"}
MEASURES = {
    "ms_per_step": "ms per denoising step",
    "prefill_ms": "prompt pass and commits, ms",
    "peak_above_model_mib": "peak above the loaded model, MiB",
}
COLOURS = {"ours": "#0b6e4f", "transformers": "#c8553d"}
MISSING = "error: the plot needs matplotlib (pip install matplotlib, or this package's extra `bench`); or pass --no-plot"


def points(args: argparse.Namespace) -> list[dict[str, int]]:
    """Every point to measure, each once: one axis at a time, the others at their first value."""
    base = {axis: getattr(args, axis)[0] for axis in AXES}
    found = [base | {axis: value} for axis in AXES for value in getattr(args, axis)]
    return [point for place, point in enumerate(found) if point not in found[:place]]


def measure_point(point: dict[str, int], checkpoint: str, args: argparse.Namespace) -> dict:
    """A point's rounds: per side its measures, or nothing where memory ran out."""
    spec = {"checkpoint": checkpoint, "dtype": args.dtype, "device": "cpu", "threads": args.threads}
    prompts, canvases = random_prompts(args.vocab_size, point["batch"], point["context"]), point["canvases"]
    label, rounds = ", ".join(f"{axis} {value}" for axis, value in point.items()), []
    say(f"{label}: loading both")
    with tempfile.TemporaryDirectory() as folder, fresh_workers(spec, folder) as workers:
        for side in SIDES:
            workers[side].ask()
        for side in SIDES:
            workers[side].ask(prompts=random_prompts(args.vocab_size, 1, 16), settings=fixed_steps(2, endless=True))
            workers[side].ask(settle=True)
        failed = False
        while len(rounds) < args.rounds and not failed:
            taken = {}
            for side in turns(len(rounds)):
                one, many = (
                    workers[side].ask(prompts=prompts, settings=fixed_steps(steps, endless=True), canvases=canvases, seed=len(rounds))
                    for steps in (1, args.steps)
                )
                if "error" in one or "error" in many:
                    say(f"{label}: {side}: out of memory")
                    failed = True
                    continue
                step = 1000 * (many["seconds"][0] - one["seconds"][0]) / (canvases * (args.steps - 1))
                taken[side] = {
                    "ms_per_step": step,
                    "prefill_ms": 1000 * one["prefill_seconds"][0],
                    "peak_above_model_mib": many["peak_above_model_mib"],
                }
                say(f"{label}: round {len(rounds) + 1} {side}: {step:.1f} ms per step")
            rounds.append(taken)
    return {"point": point, "rounds": rounds}


def values(result: dict, side: str, measure: str) -> list[float]:
    return [taken[side][measure] for taken in result["rounds"] if side in taken]


def table(results: list[dict]) -> str:
    rows = []
    for result in results:
        cells = []
        for measure in MEASURES:
            both = [values(result, side, measure) for side in SIDES]
            ratio = ratios([tuple(taken[side][measure] for side in SIDES) for taken in result["rounds"] if len(taken) == 2], False)
            cells.append(compared(both, ["out of memory"] * 2, ratio))
        rows.append([*result["point"].values(), len(result["rounds"]), *cells])
    header = [*result["point"], "rounds", *MEASURES.values()]
    return "Each field: ours : transformers, and by how much ours is better (median, lowest and highest pair).\n\n" + markdown(header, rows)


def load_pyplot():
    """matplotlib's pyplot, for files alone.

    Raises:
        SystemExit: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(MISSING) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(report: dict, file: str) -> None:
    """Writes the plot: a row a measure, a column an axis; medians, and the span of the rounds."""
    pyplot = load_pyplot()
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    base, about = report["results"][0]["point"], report["machine"]
    figure, grid = pyplot.subplots(len(MEASURES), len(AXES), figsize=(12, 10), sharex="col", sharey="row", squeeze=False)
    for column, (axis, axis_title) in enumerate(AXES.items()):
        line = [result for result in report["results"] if all(result["point"][other] == base[other] for other in AXES if other != axis)]
        line.sort(key=lambda result: result["point"][axis])
        for row, (measure, title) in enumerate(MEASURES.items()):
            plot = grid[row][column]
            for side in SIDES:
                known = [(result["point"][axis], found) for result in line if (found := values(result, side, measure))]
                places = [place for place, _ in known]
                plot.plot(places, [statistics.median(found) for _, found in known], "o-", color=COLOURS[side], label=side, markersize=4)
                spans = [[min(found) for _, found in known], [max(found) for _, found in known]]
                plot.fill_between(places, *spans, color=COLOURS[side], alpha=0.15, linewidth=0)
            plot.set_xscale("log", base=2)
            plot.set_yscale("log")
            plot.set_xticks([result["point"][axis] for result in line])
            plot.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            plot.xaxis.set_minor_locator(NullLocator())
            plot.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            plot.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            plot.yaxis.set_minor_formatter(NullFormatter())
            plot.grid(alpha=0.3)
            if row == 0:
                others = ", ".join(f"{other} {base[other]}" for other in AXES if other != axis)
                plot.set_title(f"by {axis} ({others})", fontsize=11)
            if row == len(MEASURES) - 1:
                plot.set_xlabel(axis_title)
            if column == 0:
                plot.set_ylabel(title)
    grid[0][0].legend(frameon=False)
    figure.suptitle("Cost of block diffusion, lower is better; both axes logarithmic", fontsize=13)
    hardware = f"{about['cpu']}, threads: {about['threads']}, torch {about['torch']}, transformers {about['transformers']}"
    note = f"{report['about']}; lines are medians, shades reach from the lowest round to the highest\n{hardware}"
    figure.text(0.5, 0.01, note, ha="center", fontsize=8)
    figure.tight_layout(rect=(0, 0.045, 1, 0.99))
    figure.savefig(file, dpi=110)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    full = {"context": [64, 256, 1024, 4096], "batch": [1, 2, 4, 8], "canvases": [1, 2, 4, 8]}
    quick = {"context": [16, 64], "batch": [1], "canvases": [1, 2]}
    for axis, title in AXES.items():
        usual, fast = (" ".join(map(str, chosen[axis])) for chosen in (full, quick))
        told = f"{title}; the first is used along the other axes (default: {usual}; {fast} with --quick)"
        add(f"--{axis}", type=int, nargs="+", help=told)
    add("--vocab-size", type=int, help="(default: 16384; 1024 with --quick)")
    add("--steps", type=int, help="fixed denoising steps of a canvas (default: 3; 2 with --quick)")
    add("--rounds", type=int, help="(default: 3; 1 with --quick)")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--quick", action="store_true", help="a smoke run; measures nothing")
    add("--plot", metavar="FILE", default=str(Path(__file__).with_suffix(".png")), help="where the plot goes (benchmarks/scaling.png)")
    add("--no-plot", action="store_true", help="print the table alone; needs no matplotlib")
    add("--json", metavar="FILE", help="also write everything, round by round, to this file")
    add("--draw", metavar="FILE", help="measure nothing, and draw what --json wrote to this file")
    args = parser.parse_args(arguments)
    numbers = {"vocab_size": (16_384, 1024), "steps": (3, 2), "rounds": (3, 1)} | {axis: (full[axis], quick[axis]) for axis in AXES}
    for name, (usual, fast) in numbers.items():
        if getattr(args, name) is None:
            setattr(args, name, fast if args.quick else usual)
    lowest = dict.fromkeys((*numbers, "threads"), 1) | {"vocab_size": FIRST_TEXT_ID + 1, "steps": 2}
    check(parser, args, lowest, "json", "plot")
    if args.draw and not Path(args.draw).is_file():
        parser.error(f"`--draw` is {args.draw!r}; expected a file that --json wrote")
    if args.draw and args.no_plot:
        parser.error("`--draw` and `--no-plot` are both given; expected one of them")
    return args


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    if not args.no_plot:
        load_pyplot()  # says what is missing before the long run, not after it
    if args.draw:
        draw(json.loads(Path(args.draw).read_text()), args.plot)
        return
    transformers.logging.disable_progress_bar()
    hardware = machine("cpu", args.threads)
    print(heading(__file__, arguments, hardware), flush=True)
    with tempfile.TemporaryDirectory(prefix="scaling_") as folder:
        random_checkpoint(folder, args.vocab_size)
        results = [measure_point(point, folder, args) for point in points(args)]
    about = (
        f"Random weights, hidden 256, 6 layers, window 512, canvas 256, vocabulary {args.vocab_size:,}, {args.dtype}, "
        f"{args.steps} fixed steps a canvas, {args.rounds} rounds"
    )
    report = {"arguments": arguments, "machine": hardware, "about": about, "results": results}
    print(f"\n### scaling\n\n{about}.\n\n{table(results)}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    if not args.no_plot:
        draw(report, args.plot)
        print(f"\n![Cost against context, batch and canvases]({Path(args.plot).name})")


if __name__ == "__main__":
    main(sys.argv[1:])
