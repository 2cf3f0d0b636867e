"""Teaches the shipped text checkpoint a JSON job it does not know, from 200 examples, with transformers' Trainer.

    python examples/finetune.py --out runs/tickets

Prints, after two minutes of training on one busy CPU core:

    Ticket: by 1971/03/01 send four hundred and nine lamps
      before  1quantity319
      after   {"ship": "1971-03-01", "units": 409, "of": "lamps"}
    exact_match           0.00 before   1.00 after 80 steps
    steps_per_canvas     26.46 before   2.92 after 80 steps
    tokens_per_forward    0.80 before  11.11 after 80 steps

No date and no number of the 50 unseen tickets is among the 200. The checkpoint that is written loads like any other.
"""

import argparse
import json
import random
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from jobs.dates import FORMS as DATE_FORMS
from jobs.dates import draw_date, write_date
from jobs.job import is_held_out
from jobs.number_words import content_of_number, spell
from modeling_diffusiongemma import BlockDiffusionCollator, default_checkpoint
from modeling_diffusiongemma.training.answers import Answering
from modeling_diffusiongemma.training.objective import Objective
from modeling_diffusiongemma.training.trainer import BlockDiffusionTrainer

GOODS = ("boxes", "books", "mugs", "lamps")
FORMS = ("Ticket: {count} {goods}, due {date}", "Ticket: by {date} send {count} {goods}")
CANVAS = 32  # tokens, as long as the answers, where the checkpoint's is 256


def ticket(rng: random.Random, split: str) -> dict[str, str]:
    """A date and a number in words, which the checkpoint can read, in sentences that it does not know, under keys that it does not know.
    No date and no number of one split is in the other."""
    held_out = split == "test"
    date, goods = draw_date(rng, held_out), rng.choice(GOODS)
    count = rng.choice([number for number in range(2, 1000) if is_held_out(content_of_number(number)) == held_out])
    request = rng.choice(FORMS).format(count=spell(count), goods=goods, date=write_date(date, rng.choice(DATE_FORMS)))
    return {"prompt": request, "response": json.dumps({"ship": date.isoformat(), "units": count, "of": goods})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for the new checkpoint")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--unseen", type=int, default=50, help="tickets that are not trained on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_seed(args.seed)
    rng = random.Random(args.seed)
    path = default_checkpoint()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    model.objective = Objective(canvas_length=CANVAS)
    trainer = BlockDiffusionTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.out, max_steps=args.steps, per_device_train_batch_size=16, learning_rate=1e-3, lr_scheduler_type="cosine",
            warmup_steps=10, logging_steps=10, save_strategy="no", report_to="none", use_cpu=not torch.cuda.is_available(), seed=args.seed,
        ),
        train_dataset=[ticket(rng, "train") for _ in range(200)],
        eval_dataset=[ticket(rng, "test") for _ in range(args.unseen)],
        data_collator=BlockDiffusionCollator(tokenizer),
        answering=Answering({"canvas_length": CANVAS}, batch_size=args.unseen),
    )  # fmt: skip
    print("measuring on unseen tickets, then training; the first steps are the slowest", file=sys.stderr, flush=True)
    started = time.perf_counter()
    before, seen = trainer.evaluate(), trainer.answers[0]
    trainer.train()
    after, learned = trainer.evaluate(), trainer.answers[0]
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{seen.prompt}\n  before  {seen.answer}\n  after   {learned.answer}")
    for name in ("exact_match", "steps_per_canvas", "tokens_per_forward"):
        print(f"{name:19s} {before['eval_' + name]:6.2f} before {after['eval_' + name]:6.2f} after {args.steps} steps")
    print(f"{time.perf_counter() - started:.0f} s; saved to {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
