"""Text to an object: the canvas obeys the JSON schema of a pydantic model at every step, so whatever is written becomes one of its objects.

python examples/extract.py                                  unseen notes, read and judged
python examples/extract.py --free --steps 2                 the same in two denoising steps, and what the model writes without the schema
python examples/extract.py --note "On 12 May 2024 Anna paid $4.50 for 3 blue mugs."

That an answer is an object is certain, that it is right is not: the schema knows nothing of the note, and a checker that reads only the
note and the answer says which are. The shipped checkpoint was trained to write such JSON, so with the released settings it needs the schema
now and then; hurried, often.
"""

import argparse
import datetime
import random
import sys
from collections.abc import Sequence

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from generation import JsonSchema
from jobs import TEXT_JOBS
from modeling_diffusiongemma import default_checkpoint

try:
    from pydantic import BaseModel, Field, ValidationError
except ImportError:
    sys.exit("error: this example makes objects of pydantic, which is not installed: pip install pydantic")

CANVAS = 64  # tokens, enough for a note with everything
JOB = TEXT_JOBS["note_to_json"]
REQUEST = "To JSON: "


class Note(BaseModel):
    """What a note may state. The order is that in which the model learnt to write it."""

    name: str | None = None
    quantity: int | None = Field(default=None, ge=1)
    item: str | None = None
    price: float | None = Field(default=None, ge=0)
    date: datetime.date | None = None


def ask(model, tokenizer: PreTrainedTokenizerBase, notes: Sequence[str], constraint: JsonSchema | None, settings: dict) -> list[str]:
    """The answers to all notes, in one batch."""
    chats = [[{"role": "user", "content": note}] for note in notes]
    inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True)
    settings = {"max_new_tokens": CANVAS, "canvas_length": CANVAS, **settings}
    sequences = model.generate(**inputs, constraint=constraint, tokenizer=tokenizer, **settings)
    return tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def read(answer: str) -> Note | None:
    """None where it is no note."""
    try:
        return Note.model_validate_json(answer)
    except ValidationError:
        return None


def judge(note: str, answer: str) -> str:
    try:
        return "right" if JOB.check(note, answer) else "WRONG"
    except ValueError:  # worded as no note of the job is
        return "not checked"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--note", help="a note of your own instead of unseen ones")
    parser.add_argument("--notes", type=int, default=12, help="how many unseen notes (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="denoising steps at most (default: as released)")
    parser.add_argument("--whitespace", choices=["compact", "spaced", "any"], help="of the JSON (default: one space or none)")
    parser.add_argument("--free", action="store_true", help="show what the model writes without the schema, too")
    parser.add_argument("--seed", type=int, default=0, help="which notes, and the noise (default: %(default)s)")
    args = parser.parse_args()
    if args.notes < 1:
        raise ValueError(f"`--notes` is {args.notes}; expected an integer >= 1")
    source = random.Random(args.seed)
    notes = [JOB.sample(source, "test")[0] for _ in range(args.notes)]
    if args.note is not None:
        notes = [args.note if ": " in args.note else REQUEST + args.note]
    path = default_checkpoint()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path, padding_side="left")
    settings = {"seed": args.seed} | ({} if args.steps is None else {"max_denoising_steps": args.steps})
    ways = {"schema": JsonSchema(Note, whitespace=args.whitespace)} | ({"free": None} if args.free else {})
    answers = {way: ask(model, tokenizer, notes, constraint, settings) for way, constraint in ways.items()}
    for place, note in enumerate(notes):
        print(note)
        for way in ways:
            answer = answers[way][place]
            found = read(answer)
            print(f"  {way:6}  {judge(note, answer):5}  {found!r}" if found else f"  {way:6}  no note: {answer}")
    print()
    for way in ways:
        objects = sum(read(answer) is not None for answer in answers[way])
        right = sum(judge(*pair) == "right" for pair in zip(notes, answers[way], strict=True))
        print(f"{way:6}  {objects} of {len(notes)} are notes, {right} are right")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
