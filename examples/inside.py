"""Looks into the model while it writes: what each layer would say at each step, a canvas steered, and who of the experts works when.

python examples/inside.py --out inside.svg

Three answers, each from hooks alone (docs/inside.md says what a hook sees):
  a picture, a logit lens (nostalgebraist 2020): every layer's state read by the last norm and the head, at every step of a canvas;
  the canvas steered by a vector that is added in the canvas pass alone, so that the prompt's cache keeps every bit;
  a table, which experts are chosen in the prompt pass and at every step.
"""

import argparse
import contextlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from generation import Watcher
from modeling_diffusiongemma import default_checkpoint

LENS = "Sort in ascending order: 31, 7, 56, 24"
STEERED, TOWARDS, LAYER = "Write 648 in words.", "Write 348 in words.", 4  # the fifth of six layers: earlier ones do not decide it
CELL, ROW, LEFT, SIZE = 60, 21, 128, 13  # width and height of a cell, of the labels on the left, and of the letters, in pixels
WRITTEN, OTHER = "#15803d", "#b45309"


class Step(NamedTuple):
    """What a denoising step read, `(C,)` token ids, and what each layer would write, ids and probabilities `(layers, C)`."""

    canvas: torch.Tensor
    read: torch.Tensor
    probabilities: torch.Tensor


class Canvases(Watcher):
    """Keeps the canvases that the steps read: the first, and what each step leaves."""

    def __init__(self, first: torch.Tensor):
        self.seen = [first[0]]

    def step(self, canvas_index, step, places, state, prediction) -> None:
        self.seen.append(state.canvas[0])


@contextlib.contextmanager
def in_canvas_pass(layers, hook) -> Iterator[None]:
    """Calls `hook(layer_idx, states)` behind each layer of the canvas pass; what it returns, if anything, takes the states' place."""

    def each(layer_idx):
        def call(layer, args, kwargs, output):
            if kwargs["is_causal"]:  # the prompt pass, which runs through the same layers
                return None
            changed = hook(layer_idx, output[0])
            return None if changed is None else (changed, *output[1:])

        return call

    handles = [layer.register_forward_hook(each(layer_idx), with_kwargs=True) for layer_idx, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ask(model, tokenizer, prompt: str, seed: int):
    """The answer's ids, the canvases of its steps, and the prompt's cache."""
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    noise, size = torch.Generator().manual_seed(seed), (1, model.config.canvas_length)
    first = torch.randint(model.config.text_config.vocab_size, size, generator=noise, dtype=torch.int64)
    canvases = Canvases(first)
    output = model.generate(**inputs, decoder_input_ids=first, seed=seed, watcher=canvases, return_dict_in_generate=True)
    return output.sequences[0, inputs["input_ids"].shape[1] :], canvases.seen, output.cache


def look_through(model, tokenizer, prompt: str, seed: int) -> tuple[torch.Tensor, list[Step]]:
    """The answer's ids, and the lens at every step of its canvas."""
    states, layers = [], model.config.text_config.num_hidden_layers
    with in_canvas_pass(model.model.decoder.layers, lambda layer_idx, state: states.append(state[0])):
        answer, canvases, _ = ask(model, tokenizer, prompt, seed)
    with torch.no_grad():
        logits = model.compute_logits(model.model.decoder.norm(torch.stack(states)))  # (steps * layers, C, V)
    probabilities, read = logits.softmax(dim=-1).max(dim=-1)
    return answer, [Step(*step) for step in zip(canvases[:-1], read.split(layers), probabilities.split(layers), strict=True)]


def draw(prompt: str, answer: torch.Tensor, steps: list[Step], tokenizer) -> str:
    """The SVG: of each step a row of what it read and a row for each layer, a column for each token of the answer."""

    def cell(x: float, y: float, token: int, colour: str, strength: float) -> str:
        letters = tokenizer.decode([token]).replace(" ", "\u2423").replace("\ufffd", "\u00b7")
        text = "".join(letter if letter.isprintable() else "\u00b7" for letter in letters)
        text = text if len(text) <= 7 else f"{text[:6]}\u2026"
        box = f'<rect x="{x}" y="{y - ROW + 6}" width="{CELL - 2}" height="{ROW - 2}" fill="{colour}" fill-opacity="{strength:.2f}"/>'
        ink = "#ffffff" if strength > 0.6 else "#111827"
        return f'{box}<text x="{x + CELL / 2 - 1}" y="{y}" text-anchor="middle" fill="{ink}">{escape(text)}</text>'

    def label(text: str, x: float, y: float, style: str = 'fill="#6b7280"') -> str:
        return f'<text x="{x}" y="{y}" {style}>{escape(text)}</text>'

    heading = 'font-weight="bold" fill="#111827"'
    lines, y = [label(prompt, 12, 26, heading)], 34
    for number, step in enumerate(steps, start=1):
        y += ROW + 8
        lines += [label(f"step {number}", 12, y, heading), label("reads", LEFT - 10, y, 'text-anchor="end" fill="#6b7280"')]
        lines += [cell(LEFT + CELL * place, y, int(token), "#9ca3af", 0.25) for place, token in enumerate(step.canvas[: len(answer)])]
        for layer_idx, (read, probabilities) in enumerate(zip(step.read, step.probabilities, strict=True)):
            y += ROW
            lines.append(label(f"layer {layer_idx}", LEFT - 10, y, 'text-anchor="end" fill="#6b7280"'))
            for place, written in enumerate(answer.tolist()):
                token = int(read[place])
                colour = WRITTEN if token == written else OTHER
                lines.append(cell(LEFT + CELL * place, y, token, colour, float(probabilities[place])))
    y += 2 * ROW
    lines += [label("what is written in the end", LEFT, y, f'fill="{WRITTEN}"'), label("something else", LEFT + 230, y, f'fill="{OTHER}"')]
    lines.append(label("the stronger, the more probable", LEFT + 370, y))
    width, height = max(LEFT + CELL * len(answer) + 12, LEFT + 640), y + ROW
    body = "\n".join(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="{SIZE}">\n'
        f'<rect width="100%" height="100%" fill="#fafaf9"/>\n{body}\n</svg>\n'
    )


def last_states(model, tokenizer, prompt: str, seed: int) -> torch.Tensor:
    """What layer `LAYER` puts out at the last step, `(1, C, D)`."""
    kept = {}
    with in_canvas_pass(model.model.decoder.layers, kept.__setitem__):
        ask(model, tokenizer, prompt, seed)
    return kept[LAYER]


def steer(model, tokenizer, seed: int) -> tuple[str, str, bool]:
    """The answer to `STEERED`, and with the difference to `TOWARDS` added in the canvas pass; whether the prompt's cache is the same."""
    vector = last_states(model, tokenizer, TOWARDS, seed) - last_states(model, tokenizer, STEERED, seed)  # (1, C, D)
    plain, _, untouched = ask(model, tokenizer, STEERED, seed)
    with in_canvas_pass(model.model.decoder.layers, lambda layer_idx, state: state + vector if layer_idx == LAYER else None):
        steered, _, touched = ask(model, tokenizer, STEERED, seed)
    pairs = zip(untouched.layers, touched.layers, strict=True)
    same = all(torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values) for one, other in pairs)
    return *(tokenizer.decode(ids, skip_special_tokens=True) for ids in (plain, steered)), same


def expert_use(model, tokenizer, prompt: str, seed: int) -> dict[str, list[torch.Tensor]]:
    """Of each pass, and each layer of it, the share of the choices that each expert gets, `(E,)`."""
    model.model.pull_apart()  # modules of its own for the prompt pass: a hook on a router counts in one pass alone
    chosen, experts = defaultdict(list), model.config.text_config.num_experts
    passes = {"prompt": model.model.encoder.language_model.layers, "canvas": model.model.decoder.layers}
    handles = [
        layer.router.register_forward_hook(lambda router, args, output, place=(name, layer_idx): chosen[place].append(output[2]))
        for name, layers in passes.items()
        for layer_idx, layer in enumerate(layers)
    ]
    ask(model, tokenizer, prompt, seed)
    for handle in handles:
        handle.remove()
    use = defaultdict(list)
    for (name, _), passed in chosen.items():
        for step, ids in enumerate(passed, start=1):
            shares = ids.flatten().bincount(minlength=experts) / ids.numel()
            use[name if name == "prompt" else f"step {step}"].append(shares)
    return dict(use)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the picture goes, an SVG")
    parser.add_argument("--prompt", default=LENS, help="what the picture and the table are of")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    path = default_checkpoint()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)

    answer, steps = look_through(model, tokenizer, args.prompt, args.seed)
    args.out.write_text(draw(args.prompt, answer, steps, tokenizer), encoding="utf-8")
    print(f"wrote {args.out}: {tokenizer.decode(answer, skip_special_tokens=True)!r} in {len(steps)} steps\n")

    plain, steered, same = steer(model, tokenizer, args.seed)
    print(f"{STEERED!r}: {plain!r}; steered behind layer {LAYER} towards {TOWARDS!r}: {steered!r}")
    print(f"the prompt's cache is {'the same, bit for bit' if same else 'ANOTHER'}\n")

    print("how often each expert is chosen, in %, of the tokens of a pass")
    use = expert_use(model, tokenizer, args.prompt, args.seed)
    print("layer   " + "   ".join(f"{name:<15}" for name in use))
    for layer_idx, shares in enumerate(zip(*use.values(), strict=True)):
        print(f"{layer_idx:<8}" + "   ".join(" ".join(f"{100 * float(share):3.0f}" for share in each) for each in shares))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
