"""Draws a canvas being denoised, one line a step, as an SVG: the picture in the README.

python examples/picture.py --out model_cards/denoising.svg --seed 4
"""

import argparse
from html import escape
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from generation import CanvasStreamer
from jobs import TEXT_JOBS
from modeling_diffusiongemma import default_checkpoint

FILLS = {"accepted": "#14532d", "corrected": "#86198f", "renoised": "#b45309"}
LABELS = {
    "accepted": "accepted by the step",
    "corrected": "accepted, and other than before",
    "renoised": "renoised; the model's guess",
}
WIDTH, HEIGHT, SIZE = 8.4, 22, 14  # of a character and a line, pixels


class Recorder(CanvasStreamer):
    """Keeps the cells of every step and draws nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = []

    def put_state(self, state) -> None:
        self.steps.append(self.cells(state))


def draw(prompt: str, steps: list, verdict: str) -> str:
    """The SVG: request, one line a step, what the colours mean."""
    columns = max(len(prompt) + 10, *(sum(len(cell.text) for cell in cells) + 9 for cells in steps), 84)
    lines = [f'<text x="12" y="24" font-weight="bold" fill="#111827">{escape(prompt)}</text>']
    for number, cells in enumerate(steps, start=1):
        y, x = 30 + number * HEIGHT, 12 + 9 * WIDTH
        lines.append(f'<text x="12" y="{y}" fill="#6b7280">step {number}</text>')
        for cell in cells:
            lines.append(f'<text x="{x:.1f}" y="{y}" fill="{FILLS[cell.state]}" xml:space="preserve">{escape(cell.text)}</text>')
            x += WIDTH * len(cell.text)
    y, x = 42 + (len(steps) + 1) * HEIGHT, 12
    for state, label in LABELS.items():
        lines.append(f'<text x="{x:.1f}" y="{y}" fill="{FILLS[state]}">{label}</text>')
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
    parser.add_argument("--prompt", default="To JSON: Order from Quinn: 54 paper mirrors, due 4 December 2026.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    path = default_checkpoint()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": args.prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    recorder = Recorder(tokenizer, stop_ids=[0, *model.generation_config.eos_token_id])
    output = model.generate(**inputs, streamer=recorder, seed=args.seed, return_dict_in_generate=True)
    answer = tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = any(_judged(job, args.prompt, answer) for job in TEXT_JOBS.values())
    verdict = f"{int(output.denoising_steps[0])} steps, {float(output.tokens_per_forward[0]):.1f} tokens per forward"
    args.out.write_text(
        draw(args.prompt, recorder.steps, f"{verdict}; {'right' if right else 'wrong'}, says the checker"), encoding="utf-8"
    )
    print(f"wrote {args.out}: {answer}")


def _judged(job, prompt: str, answer: str) -> bool:
    try:
        return job.check(prompt, answer)
    except ValueError:  # not a request of this job
        return False


if __name__ == "__main__":
    main()
