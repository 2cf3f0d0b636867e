r"""A right-looking answer with two wrong fields, mended: a tenth of its tokens, those that fit least, become noise and are denoised back.

python examples/revise.py
python examples/revise.py --keep 51          # this one may not change
python examples/revise.py --noise 0.5 --where random

The first prints this; ^ stands below what became noise, and * below what changed:

    To JSON: Order from Quinn: 54 paper mirrors, due 4 December 2026.
      before  {"name": "Quint", "quantity": 51, "item": "paper mirrors", "date": "2026-12-04"}
                            ^                ^                  ^^ ^^
                            *                *
      after   {"name": "Quinn", "quantity": 54, "item": "paper mirrors", "date": "2026-12-04"}
      2 denoising steps; 4 of 38 tokens became noise
"""

import argparse
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_diffusiongemma import default_checkpoint

PROMPT = "To JSON: Order from Quinn: 54 paper mirrors, due 4 December 2026."
WRONG = '{"name": "Quint", "quantity": 51, "item": "paper mirrors", "date": "2026-12-04"}'
CANVAS = 64  # tokens


def marks(tokens: list[str], flags: list[bool], mark: str) -> str:
    """A line with a mark below each letter of the tokens that are meant."""
    return "".join((mark if flag else " ") * len(token) for token, flag in zip(tokens, flags, strict=True)).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=WRONG, help="what is to be mended")
    parser.add_argument("--prompt", default=PROMPT, help="what it should answer")
    parser.add_argument("--noise", type=float, default=0.1, help="the share of its tokens that become noise")
    parser.add_argument("--where", choices=("random", "uncertain"), default="uncertain")
    parser.add_argument("--keep", nargs="*", metavar="TEXT", help="pieces of the text that stay as they are")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    path = default_checkpoint()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    revised = model.revise(
        args.text, tokenizer, [{"role": "user", "content": args.prompt}], args.noise, args.keep, args.where, seed=args.seed,
        canvas_length=CANVAS, max_new_tokens=CANVAS,
    )  # fmt: skip
    tokens = [tokenizer.decode([token]) for token in tokenizer(args.text, add_special_tokens=False)["input_ids"]]
    print(args.prompt)
    print(f"  before  {args.text}")
    print(f"          {marks(tokens, revised.renoised.tolist(), '^')}")
    print(f"          {marks(tokens, revised.changed.tolist(), '*')}")
    print(f"  after   {revised.text}")
    print(f"  {sum(revised.steps)} denoising steps; {int(revised.renoised.sum())} of {len(tokens)} tokens became noise")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
