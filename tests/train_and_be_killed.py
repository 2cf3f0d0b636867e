"""Trains a small model for seven steps, with a checkpoint every few, and prints the loss of each as JSON.

    python tests/train_and_be_killed.py FOLDER KIND EVERY [--killed STEP | --resumed]

Kind: full or lora. Killed: the process ends itself with SIGKILL at the end of that step, before a checkpoint of it is saved. Resumed: from
the last checkpoint in the folder.
"""

import argparse
import json
import os
import signal

import torch
from small_models import PAD, small_model
from transformers import TrainerCallback, TrainingArguments

from modeling_diffusiongemma import BlockDiffusionCollator
from modeling_diffusiongemma.training.trainer import BlockDiffusionTrainer

TARGETS = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}


def examples(count=8, seed=0):
    """Prompts of 3 to 6 tokens and responses of 4 to 14: one canvas or two."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 11, (count,), generator=generator).tolist()
    drawn = torch.randint(5, 90, (count, 20), generator=generator).tolist()
    return [{"prompt": row[: 3 + n % 4], "response": row[6 : 10 + n]} for row, n in zip(drawn, lengths, strict=True)]


def built(kind, seed=3, rank=3):
    model = small_model(seed, initializer_range=0.05)
    if kind == "full":
        return model
    import peft

    torch.manual_seed(seed)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=6, **TARGETS))


def trainer(model, folder, callbacks=None, kind=BlockDiffusionTrainer, train_dataset=None, eval_dataset=None, **switches):
    """A real Trainer of seven steps on eight examples, two a step."""
    settings = {
        "output_dir": str(folder), "max_steps": 7, "per_device_train_batch_size": 2, "learning_rate": 3e-3, "logging_steps": 1,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "no",
    }  # fmt: skip
    arguments = {name: switches.pop(name) for name in ("answering",) if name in switches}
    return kind(
        model=model, args=TrainingArguments(**{**settings, **switches}), data_collator=BlockDiffusionCollator(pad_token_id=PAD),
        train_dataset=examples() if train_dataset is None else train_dataset,
        eval_dataset=examples(5, seed=1) if eval_dataset is None else eval_dataset, callbacks=callbacks, **arguments,
    )  # fmt: skip


def losses(run):
    """Of every step, bit for bit."""
    return {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}


class Killed(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("kind", choices=("full", "lora"))
    parser.add_argument("every", type=int)
    parser.add_argument("--killed", type=int)
    parser.add_argument("--resumed", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # A resumed process builds another model: whatever counts comes from the checkpoint, but for the weights that an adapter leaves alone.
    model = built(args.kind, seed=4 if args.resumed and args.kind == "full" else 3)
    callbacks = [] if args.killed is None else [Killed(args.killed)]
    run = trainer(model, args.folder, callbacks, save_strategy="steps", save_steps=args.every)
    run.train(resume_from_checkpoint=args.resumed or None)
    print(json.dumps(losses(run)))


if __name__ == "__main__":
    main()
