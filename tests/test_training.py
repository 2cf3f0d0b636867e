"""Training: a model learns, the collator, `transformers.Trainer`, and the training script as a user runs it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import PAD, VOCAB, small_model
from transformers import Trainer, TrainingArguments

from modeling_diffusiongemma import BlockDiffusionCollator, DiffusionGemmaForMaskedBlockLM

ROOT = Path(__file__).parents[1]
IGNORED = -100


def examples(count=8, seed=0):
    """Prompts of 3 to 6 tokens and responses of 4 to 14: one canvas or two."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 11, (count,), generator=generator).tolist()
    drawn = torch.randint(5, 90, (count, 20), generator=generator).tolist()
    return [{"prompt": row[: 3 + n % 4], "response": row[6 : 10 + n]} for row, n in zip(drawn, lengths, strict=True)]


@pytest.fixture(scope="module")
def tokenizer():
    sys.path.insert(0, str(ROOT / "examples"))
    from jobs.tokenizer import build_tokenizer

    return build_tokenizer()


# Learning


def test_loss_falls_on_a_few_fixed_examples():
    """Eight examples can be learned by heart: both losses fall by more than half in 60 steps, from about ln(100) nats."""
    model = small_model(initializer_range=0.05).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = BlockDiffusionCollator(pad_token_id=PAD)(examples())
    history = []
    torch.manual_seed(0)
    for _ in range(60):
        output = model(**batch)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append((output.diffusion_loss.item(), output.causal_loss.item()))
    first, last = (torch.tensor(part).mean(dim=0) for part in (history[:5], history[-10:]))
    assert torch.tensor(history).isfinite().all()
    assert bool((last < 0.5 * first).all()), f"diffusion and causal loss go from {first.tolist()} to {last.tolist()} nats"


# The collator


def test_collator_pads_ids_on_the_right():
    batch = BlockDiffusionCollator(pad_token_id=7)([([1, 2, 3], [4, 5]), {"prompt": [6], "response": [8]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 8, 7, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED] * 3 + [4, 5], [IGNORED, 8] + [IGNORED] * 3]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (5, 5), (8, 8), (3, 6)])
def test_collator_rounds_lengths_up(multiple, width):
    batch = BlockDiffusionCollator(pad_token_id=0, pad_to_multiple_of=multiple)([([1, 2, 3], [4, 5])])
    assert batch["input_ids"].shape == (1, width) and int(batch["attention_mask"].sum()) == 5


def test_collator_writes_text_as_a_chat(tokenizer):
    """The prompt is what `generate` will see, and the response ends with the token that stops it."""
    batch = BlockDiffusionCollator(tokenizer)([("Sort 3, 1", "1, 3"), ("one", "1")])
    turn = [{"role": "user", "content": "Sort 3, 1"}]
    head = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert ids[: len(head)] == head and labels[: len(head)] == [IGNORED] * len(head)
    assert labels[len(head) :] == ids[len(head) :] and tokenizer.decode(labels[len(head) :]) == "1, 3<turn|>"
    short = [label for label in batch["labels"][1].tolist() if label != IGNORED]
    assert tokenizer.decode(short) == "1<turn|>" and batch["input_ids"][1, -1] == tokenizer.pad_token_id
    assert int(batch["attention_mask"][1].sum()) < len(ids)


class NoPad:
    pad_token_id = None


COLLATOR_ERRORS = {
    "no pad token": (lambda t: BlockDiffusionCollator(), "pad_token_id"),
    "tokenizer without one": (lambda t: BlockDiffusionCollator(NoPad()), "pad_token_id"),
    "multiple of 0": (lambda t: BlockDiffusionCollator(pad_token_id=0, pad_to_multiple_of=0), "pad_to_multiple_of"),
    "text without tokenizer": (lambda t: BlockDiffusionCollator(pad_token_id=0)([("a", "b")]), "tokenizer"),
    "mixed kinds": (lambda t: BlockDiffusionCollator(t)([("a", [1, 2])]), "different kinds"),
    "empty response": (lambda t: BlockDiffusionCollator(pad_token_id=0)([([1], [2]), ([1], [])]), "example 1"),
    "empty prompt": (lambda t: BlockDiffusionCollator(pad_token_id=0)([([], [2])]), "example 0"),
    "no examples": (lambda t: BlockDiffusionCollator(pad_token_id=0)([]), "examples"),
    "no response": (lambda t: BlockDiffusionCollator(pad_token_id=0)([{"prompt": [1]}]), "response"),
}  # fmt: skip


@pytest.mark.parametrize("name", COLLATOR_ERRORS)
def test_collator_refuses_what_it_cannot_batch(tokenizer, name):
    call, match = COLLATOR_ERRORS[name]
    with pytest.raises(ValueError, match=match):
        call(tokenizer)


def test_collated_batch_trains(tokenizer):
    """Collator and loss agree on what a batch is."""
    model = small_model(vocab_size=640).train()
    batch = BlockDiffusionCollator(tokenizer, pad_to_multiple_of=16)([("Sort 3, 1", "1, 3"), ("one", "1")])
    loss = model(**batch).loss
    loss.backward()
    assert bool(loss.isfinite())


# transformers.Trainer


def trainer(model, folder, steps):
    datasets = pytest.importorskip("datasets", reason="the Trainer test reads its examples from a datasets.Dataset")
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1, save_steps=2,
        use_cpu=True, report_to="none", remove_unused_columns=False, disable_tqdm=True, dataloader_pin_memory=False,
        lr_scheduler_type="constant",
    )  # fmt: skip
    data = datasets.Dataset.from_list(examples())
    return Trainer(model=model, args=arguments, data_collator=BlockDiffusionCollator(pad_token_id=PAD), train_dataset=data)


def losses(run):
    return {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}


def test_trainer_trains_logs_saves_and_resumes(tmp_path):
    """`accepts_loss_kwargs`: without it the Trainer would divide the mean loss by the number of labels."""
    model = small_model(seed=3, initializer_range=0.05)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = trainer(model, tmp_path, 2)
    first.train()
    assert sorted(losses(first)) == [1, 2]
    # Two losses near ln(100) = 4.6 nats each at the start: neither divided nor summed over anything.
    assert all(0.7 * 2 * math.log(VOCAB) < loss < 1.5 * 2 * math.log(VOCAB) for loss in losses(first).values())
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())

    saved = tmp_path / "checkpoint-2"
    loaded = DiffusionGemmaForMaskedBlockLM.from_pretrained(saved)
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in model.named_parameters())

    again = trainer(small_model(seed=4, initializer_range=0.05), tmp_path, 5)
    again.train(resume_from_checkpoint=str(saved))
    assert again.state.global_step == 5 and sorted(losses(again)) == [1, 2, 3, 4, 5]
    assert losses(again)[1] == losses(first)[1], "steps 1 and 2 are those of the first run"
    straight = trainer(small_model(seed=3, initializer_range=0.05), tmp_path / "straight", 5)
    straight.train()
    assert losses(again)[5] == pytest.approx(losses(straight)[5], abs=1e-3), "resumed and uninterrupted training agree"


def test_trainer_evaluates(tmp_path):
    run = trainer(small_model(initializer_range=0.05), tmp_path, 1)
    run.label_names = ["labels"]
    metrics = run.evaluate(run.train_dataset)
    assert math.isfinite(metrics["eval_loss"])


# The script


def train_script(out, steps):
    command = [
        sys.executable, "examples/train.py", "text", "--steps", str(steps), "--batch-size", "4", "--hidden-size", "32",
        "--layers", "2", "--no-compile", "--eval-cases", "1", "--log-every", "1", "--device", "cpu", "--out", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_training_script_resumes_and_writes_its_results(tmp_path):
    """The command of the README: interrupted and run again, it goes on at the saved step."""
    out = train_script(tmp_path, 3)
    assert "continuing" not in out
    results = tmp_path / "results.json"
    results.unlink()
    out = train_script(tmp_path, 5)
    assert f"continuing {tmp_path} at step 3" in out
    steps = [json.loads(line)["step"] for line in out.splitlines() if line.startswith("{")]
    assert steps == [4, 5]
    state = torch.load(tmp_path / "checkpoint" / "state.pt", weights_only=False)
    assert state["step"] == 5 and [entry["step"] for entry in state["log"]] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(value) for entry in state["log"] for value in entry.values())
    written = json.loads(results.read_text())
    assert len(written) == 6 and all(result["cases"] == 1 and 0 <= result["exact"] <= 1 for result in written.values())
    assert isinstance(DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path / "checkpoint"), DiffusionGemmaForMaskedBlockLM)
    assert not list(tmp_path.glob("checkpoint.*")), "no half-written state is left"
