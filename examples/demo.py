"""Puts the shipped checkpoints to work on inputs they have never seen, and shows each canvas being denoised.

make demo                                                      one unseen input of every job, a Sudoku, and a race of two decodings
make demo ARGS='--prompt "Write 3rd of May 1998 as an ISO date."'   your own request
make demo ARGS='--sudoku 53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79'
"""

import argparse
import random
import sys
import time

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import modeling_diffusiongemma
from generation import CanvasStreamer
from generation.watch.screens import Cell
from jobs import TEXT_JOBS, sudoku
from race import race


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", help="your own request to the text checkpoint")
    parser.add_argument("--sudoku", help="your own puzzle, 81 characters with . or 0 for blanks")
    parser.add_argument("--job", choices=sorted(TEXT_JOBS), help="only this job")
    parser.add_argument("--seed", type=int, help="which unseen inputs (default: other ones every time)")
    parser.add_argument("--delay", type=float, help="seconds between drawn steps (default: 0.15 in a terminal)")
    return parser.parse_args(arguments)


def load(name: str):
    path = modeling_diffusiongemma.default_checkpoint(name)
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def draw_grid(puzzle: str):
    """Layout of a 9x9 canvas, the givens of the puzzle apart from what the model fills in."""

    def layout(cells, paint) -> str:
        cells = [*cells, *[Cell(" ", "plain")] * (81 - len(cells))]
        painted = [
            paint(Cell(given if given != "." else cell.text[:1], "given" if given != "." else cell.state))
            for cell, given in zip(cells, puzzle, strict=True)
        ]
        rows = ["    " + " ".join("".join(painted[9 * row + 3 * box :][:3]) for box in range(3)) for row in range(9)]
        return "\n".join(row + ("\n" if place in (2, 5) else "") for place, row in enumerate(rows))

    return layout


def solve(model, tokenizer: PreTrainedTokenizerBase, inputs, streamer, check) -> dict:
    """Generates with the canvas on screen, prints the answer and the verdict; returns the row of the summary."""
    started = time.perf_counter()
    output = model.generate(**inputs, streamer=streamer, return_dict_in_generate=True)
    seconds = time.perf_counter() - started - streamer.delay * int(output.denoising_steps[0])
    answer = tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    verdict = {True: "right", False: "WRONG", None: "not checked: no job of ours"}[check(answer)]
    steps, per_forward = int(output.denoising_steps[0]), float(output.tokens_per_forward[0])
    print(f"  {verdict}: {answer}\n  {steps} steps, {per_forward:.1f} tokens per forward, {seconds:.2f} s\n")
    return {"verdict": verdict, "steps": steps, "tokens per forward": per_forward, "seconds": seconds}


def judge(prompt: str, answer: str) -> bool | None:
    """Whether any job takes the prompt for its own and finds the answer right; None where none does."""
    verdicts = []
    for job in TEXT_JOBS.values():
        try:
            verdicts.append(job.check(prompt, answer))
        except ValueError:
            continue
    return any(verdicts) if verdicts else None


def run_text(prompts: dict[str, str], delay: float) -> list[dict]:
    model, tokenizer = load("text")
    stops = {0, *model.generation_config.eos_token_id}
    rows = []
    for name, prompt in prompts.items():
        print(f"{name}: {prompt}")
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        streamer = CanvasStreamer(tokenizer, stop_ids=stops, delay=delay)
        check = TEXT_JOBS[name].check if name in TEXT_JOBS else judge
        rows.append({"job": name} | solve(model, tokenizer, inputs, streamer, lambda answer, c=check, p=prompt: c(p, answer)))
    return rows


def run_sudoku(puzzle: str, delay: float) -> dict:
    model, tokenizer = load("sudoku")
    if sudoku.count_solutions(puzzle) != 1:
        raise ValueError("`sudoku` has no solution, or more than one; expected a puzzle with exactly one")
    print(f"sudoku, {sum(c != '.' for c in puzzle)} clues:\n{sudoku.render(puzzle)}")
    streamer = CanvasStreamer(tokenizer, layout=draw_grid(puzzle), delay=delay)
    inputs = tokenizer([puzzle], return_tensors="pt", return_token_type_ids=False)
    return {"job": "sudoku"} | solve(model, tokenizer, inputs, streamer, lambda answer: sudoku.is_solution(puzzle, answer))


def main() -> None:
    args = parse()
    delay = args.delay if args.delay is not None else 0.15 if sys.stdout.isatty() else 0.0
    rng = random.Random(args.seed)
    own = args.prompt is not None or args.sudoku is not None
    prompts = {name: job.sample(rng, "test")[0] for name, job in TEXT_JOBS.items() if not own and args.job in (None, name)}
    if args.prompt is not None:
        prompts = {"your request": args.prompt}
    print("green: accepted by the step, magenta: corrected, yellow: renoised (the model's guess)\n" if sys.stdout.isatty() else
          "^ accepted by the step, * corrected, . renoised (the model's guess)\n")  # fmt: skip
    rows = run_text(prompts, delay) if prompts else []
    if args.sudoku is not None:
        rows.append(run_sudoku(sudoku.to_text(sudoku.parse(args.sudoku)), delay))
    elif not own and args.job is None:
        rows.append(run_sudoku(sudoku.to_text(sudoku.generate(rng, rng.randint(26, 36))[0]), delay))
    print(f"{'job':18s}{'verdict':>10s}{'steps':>8s}{'tokens per forward':>20s}{'seconds':>9s}")
    for row in rows:
        verdict = row["verdict"].split(":")[0]
        print(f"{row['job']:18s}{verdict:>10s}{row['steps']:8d}{row['tokens per forward']:20.1f}{row['seconds']:9.2f}")
    print(
        f"{sum(row['verdict'] == 'right' for row in rows)} of {len(rows)} right, by a checker that reads only the question and the answer"
    )
    if not own and args.job in (None, "days"):
        print("\n" + race(*load("text"), rng))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
