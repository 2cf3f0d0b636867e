"""`diffusiongemma train`: examples of a file, Trainer, and what came of it: a checkpoint or an adapter, losses, a curve and a table.

In `--out` there is a model when it is whole, and before that Trainer's checkpoints alone, from which `--resume` goes on.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback

from ..layers.adapter_targets import lora_targets
from ..training.answers import Answering, asked
from ..training.by_noise import NAMES
from ..training.collator import BlockDiffusionCollator
from ..training.objective import Objective
from ..training.trainer import BlockDiffusionTrainer
from ..weights.saving import replacing
from .arguments import UsageError, json_line, say
from .examples import BEGUN, read_examples, refuse, unread_keys
from .placement import checked_device, loading_arguments
from .session import load_model, load_tokenizer, read_config

LOG, CURVE = "training.json", "curve.png"
COUNTED = (  # of the command line: what makes another run of it
    "model", "lora", "rank", "experts", "epochs", "steps", "batch_size", "lr", "canvas_length", "seed", "gradient_checkpointing", "dtype",
    "quantize",
)  # fmt: skip
LEARNING_RATES = {True: 1.5e-4, False: 5e-5}  # of LoRA: google-deepmind/gemma's Sudoku example; of all weights: TrainingArguments'
RANK = 8  # PEFT's default
WARM_UP = 0.1  # of the steps
KEPT = 2  # checkpoints
PLOTTED = "pip install 'modeling-diffusiongemma[train]'"
TITLES = {"exact_match": "exact match", "loss": "loss", "tokens_per_forward": "tokens per forward", "steps_per_canvas": "steps a canvas"}


class Lines(TrainerCallback):
    """A line of what is logged in training, on standard error; below it goes on the bar."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        from tqdm import tqdm  # which transformers requires

        if "loss" in (logs or {}):
            bins = " ".join(f"{logs[name]:.3f}" if name in logs else "-" for name in NAMES)
            where = f"step {state.global_step} of {state.max_steps}"
            tqdm.write(f"{where}  loss {logs['loss']:.4f}  by noise {bins}  lr {logs['learning_rate']:.2e}", file=sys.stderr)
        elif "eval_loss" in (logs or {}):
            told = "  ".join(f"{title} {logs[f'eval_{name}']:.4g}" for name, title in TITLES.items() if f"eval_{name}" in logs)
            tqdm.write(f"evaluation  {told}", file=sys.stderr)


class Bar(ProgressCallback):
    """Trainer's bar without its lines, which would go to standard output."""

    def on_log(self, *args, **kwargs):
        pass


def refuse_wrong(path: str, places: list[int], examples: list[dict[str, Any]], collator, most: int, image_token_id: int | None) -> None:
    """UsageError for examples that the chat template refuses, with images, which nobody reads here, or of more than `most` tokens."""
    from tqdm import tqdm

    problems = []
    bar = tqdm(examples, unit="example", file=sys.stderr, leave=False, disable=not sys.stderr.isatty())
    for place, example in zip(places, bar, strict=True):
        try:
            ids = collator.read(example).ids
            length = len(ids)
        except Exception as error:  # jinja2's errors have no base class that is a ValueError
            problems.append((place, str(error)))
            continue
        if image_token_id in ids:
            problems.append((place, f"image tokens (id {image_token_id}); expected text alone: `train` reads no images"))
        elif length > most:
            response = len(asked(collator, example)[1])
            problems.append(
                (place, f"{length} tokens, of which its last response takes {response}; expected at most {most} (`--max-length`)")
            )
    refuse(path, problems)


def with_adapter(model, args: argparse.Namespace):
    """The model with a new LoRA adapter around it."""
    from peft import LoraConfig, get_peft_model

    rank, targets = args.rank or RANK, lora_targets(model, experts=args.experts)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, **targets))


def training_arguments(args: argparse.Namespace, examples: int, device: str) -> TrainingArguments:
    each = -(-examples // args.batch_size)
    steps = args.steps or each * args.epochs
    fields = TrainingArguments.__dataclass_fields__
    less_memory = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"  # new in 5.24: its name
    switched = {less_memory: True} if args.gradient_checkpointing else {}
    return TrainingArguments(
        output_dir=args.out, max_steps=steps, per_device_train_batch_size=args.batch_size, per_device_eval_batch_size=args.batch_size,
        learning_rate=LEARNING_RATES[args.lora] if args.lr is None else args.lr, lr_scheduler_type="cosine",
        warmup_steps=int(WARM_UP * steps), logging_steps=max(1, min(10, steps // 10)), save_steps=args.save_every or max(1, steps // 5),
        save_total_limit=KEPT, eval_strategy="steps" if args.eval_every else "no", eval_steps=args.eval_every,
        use_cpu=device == "cpu", dataloader_pin_memory=device != "cpu",
        report_to=args.report_to or "none", seed=args.seed, disable_tqdm=not sys.stderr.isatty(), **switched,
    )  # fmt: skip


def measures(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[f"eval_{name}"] for name in TITLES if f"eval_{name}" in metrics}


def draw(history: list[dict[str, Any]], path: Path) -> None:
    """The curve: losses over steps, one line for each quarter of noise; and what evaluations found right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    names = {"loss": "canvas and next token", "eval_loss": "the same, unseen"}
    names |= {name: f"noise {name[11:].replace('_', ' to ')} %" for name in NAMES}
    for name, title in names.items():
        found = [(entry["step"], entry[name]) for entry in history if name in entry]
        if found:
            axis.plot(*zip(*found, strict=True), label=title, linewidth=2 if name in ("loss", "eval_loss") else 1)
    axis.set(xlabel="step", ylabel="nats", yscale="log")
    if right := [(entry["step"], entry["eval_exact_match"]) for entry in history if "eval_exact_match" in entry]:
        other = axis.twinx()
        other.plot(*zip(*right, strict=True), "k.--", label="exact match")
        other.set(ylabel="exact match", ylim=(0, 1.02))
        other.legend(loc="upper right")
    axis.legend(loc="lower left")
    figure.savefig(path, dpi=120)


def begin(args: argparse.Namespace) -> dict[str, Any]:
    """What a run is, of its command line and the bytes of its data. UsageError where it is to go on, and began as another."""
    asked_for = {name: getattr(args, name) for name in COUNTED} | {"model": args.model.path}
    asked_for["data"] = hashlib.sha256(Path(args.data).read_bytes()).hexdigest()
    if not args.resume:
        return {"settings": asked_for}
    path = Path(args.out, BEGUN)
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        settings = dict(begun["settings"])
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise UsageError(
            f"`--resume` is given, and {path} cannot be read ({error}); expected what a run of this command wrote there"
        ) from error
    for name, value in asked_for.items():
        if (was := settings.get(name)) != value:
            option = f"--{name.replace('_', '-')}" if name != "data" else "FILE"
            raise UsageError(
                f"`{option}` is {value!r}, and was {was!r} when the run in {args.out!r} began; expected the same, or a new run"
            )
    return begun


def save(model, tokenizer, args: argparse.Namespace, result: dict[str, Any], plotted: bool) -> None:
    """All of it takes its place in `--out` as one."""
    with replacing(args.out) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        (fresh / LOG).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if plotted:
            draw(result["log"], fresh / CURVE)


def tell(result: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json:
        print(json_line({name: value for name, value in result.items() if name != "log"}))
        return
    if args.eval:
        print("| measure | before | after |\n|---|---|---|")
        for name, title in TITLES.items():
            before, after = (result[when].get(name) for when in ("before", "after"))
            print(f"| {title} | {'unknown' if before is None else f'{before:.4g}'} | {after:.4g} |")
        print()
    print(f"{result['steps']} steps, loss {result['loss']:.4f}, {result['seconds']:.0f} s; {result['holds']} in {args.out}")


def run(args: argparse.Namespace) -> int:
    places, examples = read_examples(args.data)
    if unread := unread_keys(examples):
        say(f"nothing is learned from the keys {unread} of {args.data}")
    unseen_places, unseen = read_examples(args.eval) if args.eval else ([], None)
    begun = begin(args)
    device, plotted = checked_device(args.device), importlib.util.find_spec("matplotlib") is not None
    if args.lora and importlib.util.find_spec("peft") is None:
        raise ImportError("peft is not installed, which `--lora` needs; expected it: pip install peft")
    if unknown := sorted(set(args.report_to or ()) - set(get_available_reporting_integrations())):
        raise UsageError(f"`--report-to` is {unknown}, which is not installed; expected some of {get_available_reporting_integrations()}")
    if not plotted:
        say(f"matplotlib is not installed: there will be no {CURVE}, the losses are in {LOG}; for the curve: {PLOTTED}")
    started = time.perf_counter()
    config, tokenizer = read_config(args.model.path), load_tokenizer(args.model.path)
    collator = BlockDiffusionCollator(tokenizer)
    most = args.max_length or config.get_text_config().max_position_embeddings
    image = getattr(config, "image_token_id", None)
    refuse_wrong(args.data, places, examples, collator, most, image)
    if unseen is not None:
        refuse_wrong(args.eval, unseen_places, unseen, collator, most, image)

    set_seed(args.seed)  # what a new adapter begins with
    model = load_model(args.model.path, **loading_arguments(device, args.dtype, args.quantize))
    model.objective = Objective(canvas_length=args.canvas_length)
    trained = with_adapter(model, args) if args.lora else model
    arguments = training_arguments(args, len(examples), device)
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process, one GPU: Trainer would copy the model to all that there are
    settings = {"canvas_length": args.canvas_length} if args.canvas_length else {}
    trainer = BlockDiffusionTrainer(
        model=trained, args=arguments, data_collator=collator, train_dataset=examples, eval_dataset=unseen, processing_class=tokenizer,
        callbacks=[Lines()], answering=Answering(settings, args.batch_size, args.seed) if args.eval else None,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Bar())
    if args.eval and not args.resume:
        begun["before"] = measures(trainer.evaluate())
    Path(args.out).mkdir(parents=True, exist_ok=True)
    Path(args.out, BEGUN).write_text(json.dumps(begun), encoding="utf-8")
    trainer.train(resume_from_checkpoint=args.resume or None)
    result = {
        "data": args.data, "model": args.model.given, "holds": "an adapter" if args.lora and not args.merge else "a checkpoint",
        "steps": trainer.state.global_step, "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1],
        "before": begun.get("before", {}), "after": measures(trainer.evaluate()) if args.eval else {},
        "seconds": time.perf_counter() - started, "settings": begun["settings"],
    }  # fmt: skip
    start = [{"step": 0, **{f"eval_{name}": value for name, value in result["before"].items()}}] if result["before"] else []
    result["log"] = start + trainer.state.log_history
    save(trained.merge_and_unload() if args.merge else trained, tokenizer, args, result, plotted)
    tell(result, args)
    return 0


__all__ = ["run"]
