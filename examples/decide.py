"""Decisions: how probable each answer is, of several questions at once, from one canvas pass.

python examples/decide.py                                   an unseen number of seats: what the model says, and what is true
python examples/decide.py --about amounts --seed 4          of which the small checkpoint knows little, and says so
python examples/decide.py --state "A bag holds 3 red and 7 blue marbles."

The first prints this:

    48 of 59 seats are taken.
    full: How full is it? A. little, B. some, C. more, D. most
    half: Is it at least half full? Y or N
    Answer as JSON.

    question  option                    said   error    true
    full      A: little                0.020   0.003   0.000
    full      B: some                  0.032   0.002   0.000
    full      C: more                  0.119   0.004   0.000
    full      D: most                  0.829   0.008   1.000
    half      Y: yes                   0.878   0.007   1.000
    half      N: no                    0.122   0.007   0.000

    4 canvas passes on 1 canvas, 4 reads

All questions stand on one canvas, a JSON object of which everything is pinned but the answers. A read is a canvas of other noise at these;
probabilities are means over the reads. The checkpoint's `decision.json` holds what was fitted on held-out requests to make
them as often right as they say (docs/decisions.md).
"""

import argparse
import random
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from generation import Choice
from jobs import DECISION_JOBS
from jobs.decisions import COLOURS, draw_request, labels, options, read_bag, render, truth
from modeling_diffusiongemma import default_checkpoint


def request_of(state: str) -> dict:
    """Two questions about a bag."""
    bag = read_bag(state)
    if not bag or not set(bag) <= set(COLOURS):
        sys.exit(f"error: `--state` is {state!r}; expected a bag, such as 'A bag holds 3 red and 7 blue marbles.'")
    first = next(iter(bag))
    return {
        "state": state,
        "questions": {
            "colour": {"type": "choice", "instructions": "Which colour is drawn?", "criteria": dict.fromkeys(bag)},
            first: {"type": "noul", "instructions": f"Is it {first}?"},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", help="a bag of marbles (default: an unseen request)")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="instead of the shipped one of decisions")
    parser.add_argument("--reads", type=int, default=4, help="canvases of other noise (default: 4)")
    parser.add_argument("--about", choices=list(DECISION_JOBS), default="seats", help="what the request is about (default: seats)")
    parser.add_argument("--seed", type=int, default=0, help="of the request (default: 0)")
    args = parser.parse_args()
    request = draw_request(random.Random(args.seed), "test", args.about) if args.state is None else request_of(args.state)
    path = args.checkpoint or default_checkpoint("decisions")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path, padding_side="left")
    asked = {name: Choice(labels(question, False)) for name, question in request["questions"].items()}
    chat = [{"role": "user", "content": render(request)}]
    found = model.decide(chat, asked, tokenizer, reads=args.reads)
    print(render(request), "", sep="\n")
    print(f"{'question':10}{'option':22}{'said':>8}{'error':>8}{'true':>8}")
    for name, true in truth(request).items():
        answer = found[name]
        for label, option, probability in zip(answer.probabilities, options(request["questions"][name]), true, strict=True):
            error = "" if answer.errors is None else f"{answer.errors[label]:.3f}"
            print(f"{name:10}{label + ': ' + option:22}{answer.probabilities[label]:8.3f}{error:>8}{probability:8.3f}")
    print(f"\n{found.passes} canvas passes on {found.canvases} {'canvas' if found.canvases == 1 else 'canvases'}, {found.reads} reads")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
