"""One rank of tests/test_ranks.py: `ranks_worker.py all FOLDER`, with torchrun's variables. Writes what it found to FOLDER/RANK.pt."""

import os
import sys

import torch
from small_models import PAD, small_model
from torch import distributed
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.torch_version import TorchVersion
from transformers import Trainer, TrainingArguments

from modeling_diffusiongemma import BlockDiffusionCollator, block_diffusion_loss
from modeling_diffusiongemma.training.answers import Answering
from modeling_diffusiongemma.training.ranks import check_gathering
from modeling_diffusiongemma.training.trainer import BlockDiffusionTrainer

STEPS, LEARNING_RATE = 4, 1e-2
QUICK = {"max_denoising_steps": 2, "do_sample": False, "eos_token_id": []}
CHUNKS = 2100  # prompt tokens: more than go through at once in evaluation


def batch(rank, step, evaluation=False):
    """One row, of another length on each rank and step; in evaluation rank 0's goes through in chunks, and takes more canvases."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    prompt = 3 + 4 * rank + step if not evaluation else CHUNKS if rank == 0 else 5
    response = (4 + 11 * rank + 3 * step) if not evaluation else 23 if rank == 0 else 6
    ids = torch.randint(5, 90, (prompt + response,), generator=generator).tolist()
    return BlockDiffusionCollator(pad_token_id=PAD)([(ids[:prompt], ids[prompt:])])


def drawn_rows(rank, step):
    """The seed of a step: rank and step decide which rows are conditioned, so that ranks differ."""
    torch.manual_seed(100 * step + rank)


def evaluate(model, rank):
    model.eval()
    found = {}
    with torch.no_grad():
        inputs = batch(rank, 9, evaluation=True)
        drawn_rows(rank, 9)
        found["eval loss"] = model(**inputs).loss
        for mode, how in (("diffusion", {"samples": 2}), ("autoregressive", {})):
            drawn_rows(rank, 8)
            found[f"score {mode}"] = model.score(**inputs, mode=mode, **how).log_prob
    return found


def sharded(model):
    for layer in model.model.decoder.layers:
        fully_shard(layer)
    fully_shard(model)
    register_fsdp_forward_method(model, "score")
    register_fsdp_forward_method(model, "diffusion_alone")
    return model


def diffusion_alone(model):
    """The loss without its causal part, whose prompt pass is as long as the canvases chosen demand."""
    return lambda inputs: block_diffusion_loss(model, **inputs, causal=False).diffusion


def fsdp(rank):
    model = small_model().train()
    model.diffusion_alone = diffusion_alone(model)
    sharded(model)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), []
    for step in range(STEPS):
        drawn_rows(rank, step)
        inputs = batch(rank, step)
        loss = model(**inputs).loss if step % 2 == 0 else model.diffusion_alone(inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    weights = {name: p.full_tensor() for name, p in model.state_dict().items() if hasattr(p, "full_tensor")}
    return {"losses": torch.stack(losses), "weights": weights, **evaluate(model, rank)}


def trainer(rank):
    """The Trainer with a copy of the model on each rank, evaluating rows of different lengths while it trains."""
    rows = [([7] * CHUNKS, [8] * 25), *(([5, 6] * n, [9] * (3 * n)) for n in range(1, 6))]
    arguments = TrainingArguments(
        output_dir=sys.argv[2], max_steps=2, per_device_train_batch_size=1, per_device_eval_batch_size=1, logging_steps=1,
        eval_strategy="steps", eval_steps=1, save_strategy="no", use_cpu=True, ddp_backend="gloo", report_to="none", disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    collator = BlockDiffusionCollator(pad_token_id=PAD)
    run = Trainer(
        model=small_model(), args=arguments, data_collator=collator, train_dataset=rows, eval_dataset=rows,
        compute_metrics=lambda prediction: {"shape": prediction.predictions[0].shape},
    )  # fmt: skip
    run.train()
    log = run.state.log_history
    found = [entry[name] for name in ("loss", "eval_loss") for entry in log if name in entry]
    shapes = [tuple(entry["eval_shape"]) for entry in log if "eval_shape" in entry]
    return {"losses": torch.tensor(found), "shapes": shapes, **answered(run.model, arguments, rank)}


def questions():
    """Of responses whose longest is in the second process's share."""
    return [([5, 6, 7 + place], [9] * (3 + 5 * (place == 3))) for place in range(5)]


def answered(model, arguments, rank):
    """What the processes answer together, how many examples this one asked for, and what both are told where the second fails."""
    judged = []

    def check(prompt, answer, response):
        judged.append(prompt)
        return len(answer) > 3

    def failing(prompt, answer, response):
        if rank == 1:
            raise ZeroDivisionError("a checker's")

    run = BlockDiffusionTrainer(
        model=model, args=arguments, data_collator=BlockDiffusionCollator(pad_token_id=PAD), eval_dataset=questions(),
        answering=Answering(QUICK, check=check),
    )  # fmt: skip
    metrics, told = run.evaluate(), ""
    answers = [[answer.prompt, answer.answer, answer.right] for answer in run.answers]
    run.answering = Answering(QUICK, check=failing)
    try:
        run.evaluate()
    except (RuntimeError, ZeroDivisionError) as error:
        told = f"{type(error).__name__}: {error}"
    return {"answers": answers, "right": metrics["eval_exact_match"], "asked": len(judged), "told": told}


def older_torch():
    """What is said where FSDP2 gathers head and embedding together, as it is, and as a torch before 2.13 would be told."""
    model, found = small_model(), []
    fully_shard([model.get_input_embeddings(), model.get_output_embeddings()])
    for version in (torch.__version__, TorchVersion("2.12.1")):
        torch.__version__, kept = version, torch.__version__
        try:
            check_gathering(model)
            found.append("")
        except ValueError as error:
            found.append(str(error))
        torch.__version__ = kept
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    torch.save({"fsdp": fsdp(rank), "trainer": trainer(rank), "older torch": older_torch()}, f"{sys.argv[2]}/{rank}.pt")
    distributed.destroy_process_group()
