r"""Draws a canvas being denoised, one line a step, as an SVG: the picture in docs/constraints.md.

`diffusiongemma trace --svg` draws one that moves.

python examples/picture.py --out canvas.svg --seed 4
python examples/picture.py --out docs/constraints.svg --seed 4 \
    --prompt "To JSON: 9.72 euros paid by Quinn on 14 Dec 2032 for 20 white clips." \
    --template '{{"name": "{name}", "quantity": {quantity}, "item": "{item}", "price": {price}, "date": "{date}"}}' \
    --regex quantity='[0-9]+' --regex price='[0-9]+\.[0-9]{2}' --regex date='[0-9]{4}-[0-9]{2}-[0-9]{2}'

With a template each step shows its text, what stands in fields with a pattern and in blanks, and where there is still noise.
"""

import argparse
import sys
from html import escape
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from generation import CanvasStreamer, Regex, Template
from generation.watch.screens import Cell
from jobs import TEXT_JOBS
from modeling_diffusiongemma import default_checkpoint

# How a state is drawn, and what it is called below the picture.
FREE = {
    "accepted": ('fill="#14532d"', "accepted by the step"),
    "corrected": ('fill="#86198f"', "accepted, and other than before"),
    "renoised": ('fill="#b45309"', "renoised; the model's guess"),
}
BOUND = {
    "pinned": ('fill="#6b7280"', "pinned by the template"),
    "constrained": ('fill="#1d4ed8" font-weight="bold"', "constrained"),
    "free": ('fill="#14532d" font-weight="bold"', "free"),
    "renoised": ('fill="#b45309" font-style="italic"', "noise; the best text so far"),
}
WIDTH, HEIGHT, SIZE = 8.4, 22, 14  # of a character and a line, pixels


class Recorder(CanvasStreamer):
    """Keeps the cells of every step and draws nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = []

    def put_state(self, state) -> None:
        self.steps.append(self.cells(state))


class BoundRecorder(Recorder):
    """The same under a template: a cell is a token of the step's best text, or the piece of one that lies in one piece of the template."""

    def __init__(self, template: Template, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.template = template

    def cells(self, state) -> list[Cell]:
        ids, accepted = state.argmax[0].tolist(), state.accepted[0].tolist()
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), len(ids))
        kinds = self.kinds(self.tokenizer.decode(ids[:end]))
        cells, written = [], 0
        for count, kept in enumerate(accepted[:end], start=1):
            after = len(self.tokenizer.decode(ids[:count]))
            for kind, letter in kinds[written:after]:
                kind = kind if kept else "renoised"
                joins = bool(cells) and cells[-1].state == kind
                cells[-1:] = [Cell(cells[-1].text + letter, kind)] if joins else [*cells[-1:], Cell(letter, kind)]
            written = after
        return cells

    def kinds(self, text: str) -> list[tuple[str, str]]:
        """Each letter of a text of the template, and what wrote it."""
        values, kinds = self.template.values(text), []
        fields = dict(self.template.fields)
        for name, piece in self.template.pieces:
            kind = "pinned" if name is None else "constrained" if name in fields else "free"
            kinds += [kind] * len(piece if name is None else values[name])
        return list(zip(kinds, text, strict=True))


def draw(prompt: str, steps: list, verdict: str, styles: dict[str, tuple[str, str]]) -> str:
    """The SVG: request, one line a step, what the colours mean."""
    columns = max(len(prompt) + 10, *(sum(len(cell.text) for cell in cells) + 9 for cells in steps), 84)
    lines = [f'<text x="12" y="24" font-weight="bold" fill="#111827">{escape(prompt)}</text>']
    for number, cells in enumerate(steps, start=1):
        y, x = 30 + number * HEIGHT, 12 + 9 * WIDTH
        lines.append(f'<text x="12" y="{y}" fill="#6b7280">step {number}</text>')
        for cell in cells:
            length = WIDTH * len(cell.text)  # also where the font is another one
            style = f'{styles[cell.state][0]} xml:space="preserve" textLength="{length:.1f}"'
            lines.append(f'<text x="{x:.1f}" y="{y}" {style}>{escape(cell.text)}</text>')
            x += length
    y, x = 42 + (len(steps) + 1) * HEIGHT, 12
    for style, label in styles.values():
        lines.append(f'<text x="{x:.1f}" y="{y}" {style}>{label}</text>')
        x += WIDTH * (len(label) + 3)
    lines.append(f'<text x="12" y="{y + HEIGHT}" fill="#6b7280">{escape(verdict)}</text>')
    size = f'width="{columns * WIDTH + 24:.0f}" height="{y + 2 * HEIGHT}"'
    body = "\n".join(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="{SIZE}">\n'
        f'<rect width="100%" height="100%" fill="#fafaf9"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompt", default="Note to JSON: By 1 April 2036 Simon wants 71 summer bulbs for 66.75 euros.")
    parser.add_argument("--template", help="what the answer must be: a text with blanks, as `diffusiongemma fill` takes it")
    parser.add_argument("--regex", action="append", default=[], metavar="FIELD=PATTERN", help="what a field of the template holds")
    parser.add_argument("--steps", type=int, help="denoising steps at most (default: as released)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.regex and args.template is None:
        raise ValueError(f"`--regex` is {args.regex[0]!r} without a template; expected `--template`, too")
    path = default_checkpoint()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": args.prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    shown = {"tokenizer": tokenizer, "stop_ids": [0, *model.generation_config.eos_token_id]}
    settings = {} if args.steps is None else {"max_denoising_steps": args.steps}
    if args.template is None:
        recorder, styles = Recorder(**shown), FREE
    else:
        template = Template(args.template, **{name: Regex(pattern) for name, _, pattern in (given.partition("=") for given in args.regex)})
        recorder, styles = BoundRecorder(template, **shown), BOUND
        settings |= {"constraint": template, "tokenizer": tokenizer, "canvas_length": 64, "max_new_tokens": 64}
    output = model.generate(**inputs, streamer=recorder, seed=args.seed, return_dict_in_generate=True, **settings)
    answer = tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = any(_judged(job, args.prompt, answer) for job in TEXT_JOBS.values())
    verdict = f"{int(output.denoising_steps[0])} steps, {float(output.tokens_per_forward[0]):.1f} tokens per forward"
    verdict = f"{verdict}; {'right' if right else 'wrong'}, says the checker"
    args.out.write_text(draw(args.prompt, recorder.steps, verdict, styles), encoding="utf-8")
    print(f"wrote {args.out}: {answer}")


def _judged(job, prompt: str, answer: str) -> bool:
    try:
        return job.check(prompt, answer)
    except ValueError:  # not a request of this job
        return False


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
