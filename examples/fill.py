"""Blanks of a text, filled in from what stands on both of their sides: the canvas holds the whole text from the first step on.

python examples/fill.py             some texts, each judged
python examples/fill.py --watch     and their canvases, step by step
python examples/fill.py "{year}-{month:1-2}-03" --prompt "Write 3 March 1998 as an ISO date."

It shows blanks of counted tokens, blanks whose length the model finds, fields with languages of their own, JSON of which some values are
given, and tokens erased from an answer (`Pins`). All of them are answers of jobs that this small checkpoint has learnt. Of a pair of a
number in digits and in words the prompt says nothing: what is filled in is read off the other side, to the right of the blank or to the
left. Of the others it says what is wanted: text on the right tells where a blank ends and what is left to write, but does not argue with
the prompt ("{amount} g", where 250 g are asked for in kg, becomes "0.25 g"). In a text unlike its answers ("The date is {date}.") it fills
in a date, as the template demands, and a wrong one. `diffusiongemma fill` does the same in a console.
"""

import argparse
import sys
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from generation import CanvasStreamer, Choice, Pins, Regex, Template
from modeling_diffusiongemma import default_checkpoint

CANVAS = 64  # tokens
PAIR = "Any number in digits and in words."  # neither number below was in the checkpoint's training, in any form
DATE = Regex(r"(19|20)\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])")


class Case(NamedTuple):
    """`right`: the whole text as it should be; None: nobody knows."""

    prompt: str | None
    template: Template | None
    right: str | None


CASES = [
    Case(PAIR, Template("{digits:4} = five thousand two hundred and sixty"), "5260 = five thousand two hundred and sixty"),
    Case(PAIR, Template("2648 = {words}"), "2648 = two thousand six hundred and forty-eight"),
    Case("Write 3 March 1998 as an ISO date.", Template("{year}-{month:1-2}-03"), "1998-03-03"),
    Case("Sort in ascending order: 31, 7, 56, 24", Template("{below}, 24, {above}"), "7, 24, 31, 56"),
    Case("Write 648 in words.", Template("{hundreds} hundred and {tens}-eight"), "six hundred and forty-eight"),
    Case("What is 250 g in kg?", Template("{amount} {unit}", amount=Regex(r"\d+(\.\d+)?"), unit=Choice(["g", "kg", "mg"])), "0.25 kg"),
    Case(
        "Write as JSON: Edwin, 17 Oct 2039: 37 bulbs at $59.21.",
        Template(
            '{{"name": "Edwin", "quantity": {quantity}, "item": "{item}", "price": 59.21, "date": "{date}"}}',
            quantity=Regex(r"\d+"), item=Regex("[a-z]+( [a-z]+)?"), date=DATE,
        ),
        '{"name": "Edwin", "quantity": 37, "item": "bulbs", "price": 59.21, "date": "2039-10-17"}',
    ),
]  # fmt: skip
ERASED = Case("Write 648 in words.", None, "six hundred and forty-eight")


def erase(ids: list[int]) -> Pins:
    """Every second token of a text is pinned, the first one and every other second are to be found."""
    return Pins(torch.tensor(ids, dtype=torch.int64), torch.arange(len(ids)) % 2 == 1)


def fill_in_erased(model, tokenizer: PreTrainedTokenizerBase, case: Case, settings: dict) -> tuple[str, str]:
    """What was left of the answer, and what the model made of it."""
    chat = [{"role": "user", "content": case.prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = tokenizer(case.right, add_special_tokens=False)["input_ids"]
    pins = erase(ids)
    left = "".join(tokenizer.decode([token]) if kept else "_" for token, kept in zip(ids, pins.mask.tolist(), strict=True))
    sequences = model.generate(**inputs, constraint=pins, tokenizer=tokenizer, **settings)
    return left, tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("template", nargs="?", help="a text of your own, with blanks: {name}, {name:3} or {name:1-8}, counted in tokens")
    parser.add_argument("--prompt", help="what is asked, for a template of your own; without one the text stands alone")
    parser.add_argument("--watch", action="store_true", help="show the canvas at every step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.prompt is not None and args.template is None:
        raise ValueError(f"`--prompt` is {args.prompt!r} without a template; expected both")
    path = default_checkpoint()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    stops = {0, *model.generation_config.eos_token_id}
    settings = {"seed": args.seed, "max_new_tokens": CANVAS, "canvas_length": CANVAS}
    settings |= {"streamer": CanvasStreamer(tokenizer, stop_ids=stops)} if args.watch else {}
    cases = CASES if args.template is None else [Case(args.prompt, Template(args.template), None)]
    for prompt, template, right in cases:
        print(f"{prompt or '(no prompt)'}\n  {template.text}")
        chat = None if prompt is None else [{"role": "user", "content": prompt}]
        found = model.fill(template, tokenizer, chat, **settings)
        verdict = "" if right is None else f"{'right' if found.text == right else 'WRONG'}: "
        print(f"  {verdict}{found.text}\n  {found.values}\n")
    if args.template is None:
        left, text = fill_in_erased(model, tokenizer, ERASED, settings)
        print(f"{ERASED.prompt}\n  {left}\n  {'right' if text == ERASED.right else 'WRONG'}: {text}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
