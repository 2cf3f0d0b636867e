"""Teaches the shipped text checkpoint a job it does not know, with transformers' Trainer: dates in another style.

    python examples/finetune.py --out runs/european

A minute or two on two CPU cores. The checkpoint it writes loads like any other.
"""

import argparse
import datetime
import random
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from jobs.dates import DATE
from modeling_diffusiongemma import BlockDiffusionCollator, default_checkpoint


def example(rng: random.Random, split: str) -> dict[str, str]:
    """A date in one of the written forms the checkpoint knows, and the same day as DD/MM/YYYY, which it does not."""
    request, iso = DATE.sample(rng, split)
    day = datetime.date.fromisoformat(iso)
    return {"prompt": f"European: {request}", "response": f"{day:%d/%m/%Y}"}


def accuracy(model, tokenizer, examples: list[dict[str, str]]) -> float:
    chats = [[{"role": "user", "content": one["prompt"]}] for one in examples]
    inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt")
    sequences = model.eval().generate(**inputs, canvas_length=16, max_new_tokens=16, seed=0)
    answers = tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(answer == one["response"] for answer, one in zip(answers, examples, strict=True)) / len(examples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for the new checkpoint")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_seed(args.seed)
    rng = random.Random(args.seed)
    path = default_checkpoint()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    model.config.canvas_length = 16  # train on a canvas as short as the answers, then go back
    print("measuring on 50 unseen dates, then training; the first steps are the slowest", file=sys.stderr, flush=True)
    unseen = [example(rng, "test") for _ in range(50)]
    before = accuracy(model, tokenizer, unseen)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.out, max_steps=args.steps, per_device_train_batch_size=32, learning_rate=1e-3, lr_scheduler_type="cosine",
            warmup_steps=10, logging_steps=10, save_strategy="no", report_to="none", remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(), seed=args.seed,
        ),
        train_dataset=Dataset.from_list([example(rng, "train") for _ in range(32 * args.steps)]),
        data_collator=BlockDiffusionCollator(tokenizer),
    )  # fmt: skip
    trainer.train()
    model.config.canvas_length = 256
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    after = accuracy(model, tokenizer, unseen)
    print(f"exact on 50 unseen dates: {before:.0%} before, {after:.0%} after {args.steps} steps; saved to {args.out}")


if __name__ == "__main__":
    main()
