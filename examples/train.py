"""Trains a small DiffusionGemma from scratch, on a CPU or a GPU; resumes; shows progress; evaluates held-out exact match.

    python examples/train.py text --out runs/text
    python examples/jobs/sudoku.py make --count 250000 --clues 26-36 --seed 1 --out runs/sudoku.npz
    python examples/train.py sudoku --data runs/sudoku.npz --out runs/sudoku

Running the same command again continues where the last one stopped. `--out` then holds `checkpoint/`, loadable with
`from_pretrained`, with `state.pt`, what training needs to continue.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from evaluate import positive, print_table
from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, Rollout, block_diffusion_loss, default_checkpoint
from modeling_diffusiongemma.weights.saving import finish, replacing
from recipes import RECIPES, progress


def device(given: str) -> torch.device:
    try:
        return torch.device(given)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"got {given!r}; expected a device of torch's, such as cpu or cuda") from None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("--out", required=True, help="folder for the checkpoint and the state of training")
    parser.add_argument("--data", help="sudoku: the puzzles' .npz file")
    parser.add_argument("--init", help="checkpoint to begin with (default: the recipe's; most begin with random weights)")
    parser.add_argument("--steps", type=positive, default=10_000, help="optimizer steps; the learning rate ends at 0 there")
    parser.add_argument("--batch-size", type=positive, help="examples a step (default: the recipe's)")
    parser.add_argument("--hidden-size", type=positive, help="of random weights (default: the recipe's)")
    parser.add_argument("--layers", type=positive, help="of random weights (default: the recipe's)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--muon", action=argparse.BooleanOptionalAction, default=True, help="Muon for the matrices, not AdamW")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile the layers")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast to bfloat16")
    parser.add_argument("--save-every", type=float, default=300, help="seconds between saved states")
    parser.add_argument("--log-every", type=positive, default=50, help="steps between lines of the log")
    parser.add_argument("--eval-cases", type=positive, default=200, help="held-out inputs (a job) to evaluate on at the end")
    return parser.parse_args(arguments)


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Share of the peak: linear warm-up, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


class Optimizers:
    """Muon for the layers' matrices, AdamW for everything else (embedding, router, stacked experts, norms); one interface.

    Muon (Jordan et al. 2024, torch.optim.Muon) with its update scaled to AdamW's, so that one learning rate serves both.
    """

    def __init__(self, model: torch.nn.Module, lr: float, muon: bool):
        trained = {name: p for name, p in model.named_parameters() if "encoder." not in name}
        matrices = [p for name, p in trained.items() if muon and p.dim() == 2 and "embed" not in name and "router" not in name]
        chosen = {id(p) for p in matrices}
        rest = [p for p in trained.values() if id(p) not in chosen]
        groups = [
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": 0.01},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.parts = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)]
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))

    def step(self, lr: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad()

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def save(out: Path, recipe, model, optimizer, step: int, rng: random.Random, seconds: float, log: list) -> None:
    """Replaces checkpoint and state as one, so that an interruption leaves one whole state."""
    with replacing(out / "checkpoint") as fresh:
        model.save_pretrained(fresh)
        recipe.tokenizer.save_pretrained(fresh)
        state = {"optimizer": optimizer.state_dict(), "step": step, "seconds": seconds, "log": log,
                 "rng": rng.getstate(), "torch_rng": torch.get_rng_state()}  # fmt: skip
        torch.save(state, fresh / "state.pt")


def load(args: argparse.Namespace, recipe, checkpoint: Path) -> tuple[DiffusionGemmaForMaskedBlockLM, dict | None]:
    """The model, and where its training stood: as the last run left them in `checkpoint`, or what a new one begins with, and None."""
    finish(checkpoint)
    if (checkpoint / "state.pt").is_file():
        model = DiffusionGemmaForMaskedBlockLM.from_pretrained(checkpoint, dtype=torch.float32)
        return model, torch.load(checkpoint / "state.pt", weights_only=False)
    start = args.init or (recipe.start and default_checkpoint(recipe.start))
    if start and (args.hidden_size or args.layers):
        raise ValueError(f"`--hidden-size` or `--layers` is given, and training begins with the weights of {start}; expected neither")
    if not start:
        sizes = {key: getattr(args, key) or default for key, default in recipe.defaults.items() if key != "batch_size"}
        model = DiffusionGemmaForMaskedBlockLM(recipe.config(**sizes))
        model.generation_config.update(**recipe.generation_config())
        return model, None
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(start, dtype=torch.float32, **recipe.overrides)
    if len(recipe.tokenizer) > model.config.text_config.vocab_size:
        model.resize_token_embeddings(len(recipe.tokenizer))
    return model, None


def prepare(model: DiffusionGemmaForMaskedBlockLM, args: argparse.Namespace) -> None:
    """Measured on CPU for models of this size: every expert as two plain products, attention as batched products."""
    model.to(args.device).train()
    model.set_experts_implementation("dense_mm")
    model.set_attn_implementation("eager")
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # every shape, with and without gradient, is a graph of its own
        for layer in model.model.decoder.layers:
            layer.compile(dynamic=False)


class Log:
    """Means of the losses since the last entry, by what was learned; `entries` are those of runs before, too."""

    def __init__(self, entries: list[dict], seconds: float):
        self.entries, self.before, self.started = entries, seconds, time.time()
        self.examples, self.sums = 0, {}

    @property
    def seconds(self) -> float:
        return self.before + time.time() - self.started

    def add(self, examples: int, losses: dict[str, torch.Tensor]) -> None:
        self.examples += examples
        for name, loss in losses.items():
            self.sums.setdefault(name, []).append(loss.item())

    def write(self, step: int) -> None:
        rate = self.examples / (time.time() - self.started)
        entry = {"step": step, "seconds": round(self.seconds), "examples/s": round(rate, 1)}
        entry |= {name: round(sum(values) / len(values), 4) for name, values in sorted(self.sums.items())}
        self.entries.append(entry)
        self.sums = {}
        tqdm.write(json.dumps(entry))
        sys.stdout.flush()


def train(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.data is not None and not RECIPES[args.recipe].takes_data:
        raise ValueError(f"`--data` is {args.data!r} for the recipe {args.recipe!r}, which draws its own; expected it unset")
    recipe, out, device = RECIPES[args.recipe](args.data), Path(args.out), args.device
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    rng, step = random.Random(args.seed), 0
    model, state = load(args, recipe, out / "checkpoint")
    prepare(model, args)
    optimizer, log = Optimizers(model, args.lr, args.muon), Log([], 0.0)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        step, log = state["step"], Log(state["log"], state["seconds"])
        rng.setstate(state["rng"])
        torch.set_rng_state(state["torch_rng"])
        print(f"continuing {out} at step {step}", flush=True)
    batch_size = args.batch_size or recipe.defaults["batch_size"]
    print(f"{recipe.name}: {model.num_parameters():,} parameters, {args.steps} steps of {batch_size} on {device}", flush=True)

    def draw(count: int) -> tuple[dict[str, torch.Tensor], dict]:
        batch, options = recipe.batch(rng, count, step / args.steps)
        return {key: value.to(device) for key, value in batch.items()}, options

    rollouts_from, rollout_share, depth = recipe.rollouts or (1.0, 0.0, 1)
    rollout, saved = Rollout(model, batch_size, max_steps=depth), time.time()
    if args.compile and step < args.steps:
        print("compiling the layers: the first steps take minutes (--no-compile: none, and slower steps)", file=sys.stderr, flush=True)
    bar = progress(args.steps, "step", "training", initial=step)
    while step < args.steps:
        rolled = step / args.steps >= rollouts_from and rng.random() < rollout_share
        if rolled:
            batch, noised, soft_embeds = rollout.batch(lambda count: draw(count)[0])
            options = {"canvas_length": rollout.canvas_length, "causal": False}
            canvas = {"noised": noised, "soft_embeds": soft_embeds}
        else:
            batch, options = draw(batch_size)
            # Self-conditioning on half of the batches rather than of the rows: the same share, half of the extra passes.
            canvas = {"self_conditioning_mask": torch.full((len(batch["input_ids"]),), rng.random() < 0.5, device=device)}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.bf16):
            losses = block_diffusion_loss(model, **batch, **canvas, **options, keep_logits=rolled)
            loss = losses.diffusion + (losses.causal if options["causal"] else 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(args.lr * learning_rate(step, args.steps, args.warmup))
        if rolled:
            rollout.advance(losses.logits)
        step += 1
        rows, length = batch["input_ids"].shape
        learned = {"rollout" if rolled else f"canvas {options['canvas_length']}, {length}": losses.diffusion}
        log.add(rows, learned | ({"causal": losses.causal} if options["causal"] else {}))
        bar.update()
        if step % args.log_every == 0 or step == args.steps:
            log.write(step)
        if time.time() - saved > args.save_every or step == args.steps:
            save(out, recipe, model, optimizer, step, rng, log.seconds, log.entries)
            saved = time.time()
    bar.close()

    model.eval()
    results = recipe.evaluate(DiffusionGemmaForMaskedBlockLM.from_pretrained(out / "checkpoint"), args.eval_cases)
    with replacing(out) as fresh:
        (fresh / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print_table(results)


if __name__ == "__main__":
    try:
        train(parse())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
