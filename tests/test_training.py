"""Training: a model learns, the collator, `transformers.Trainer`, and the training script as a user runs it."""

import json
import math
import sys
from pathlib import Path

import programs
import pytest
import torch
from small_models import PAD, VOCAB, small_model
from train_and_be_killed import examples, losses
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_diffusiongemma import BlockDiffusionCollator, DiffusionGemmaForMaskedBlockLM

ROOT = Path(__file__).parents[1]
IGNORED = -100


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


# Its own switches


def mean_logits(prediction):
    """A metric: it makes Trainer gather what the model returns."""
    logits, states, diffusion, causal = prediction.predictions
    return {"shapes": [logits.shape, prediction.label_ids.shape], "losses": [float(diffusion.mean()), float(causal.mean())]}


def switched(folder, model=None, callbacks=None, compute_loss_func=None, metrics=None, **switches):
    """A real Trainer of two steps and an evaluation, on a list of examples."""
    settings = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1,
        "use_cpu": True, "report_to": "none", "remove_unused_columns": False, "disable_tqdm": True, "dataloader_pin_memory": False,
        "save_strategy": "no", "lr_scheduler_type": "constant",
    }  # fmt: skip
    return Trainer(
        model=small_model(seed=3, initializer_range=0.05) if model is None else model,
        args=TrainingArguments(**{**settings, **switches}),
        data_collator=BlockDiffusionCollator(pad_token_id=PAD),
        train_dataset=examples(8), eval_dataset=examples(6), callbacks=callbacks, compute_loss_func=compute_loss_func,
        compute_metrics=metrics,
    )  # fmt: skip


def trained_and_evaluated(folder, **switches):
    """The losses of two steps, and the evaluation's."""
    run = switched(folder, **switches)
    run.train()
    return [losses(run)[1], losses(run)[2], run.evaluate()["eval_loss"]]


@pytest.fixture(scope="module")
def plainly(tmp_path_factory):
    return trained_and_evaluated(tmp_path_factory.mktemp("plain"))


EQUAL = {  # switches that leave the arithmetic alone
    "average_tokens_across_devices": {"average_tokens_across_devices": True},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": "non_padding"},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "dataloader_drop_last": {"dataloader_drop_last": True},
    "dataloader_num_workers": {"dataloader_num_workers": 1},
    "prediction_loss_only": {"prediction_loss_only": True},
    "label_names": {"label_names": ["labels"]},
    "metrics": {"metrics": mean_logits},
    "split_batches": {"accelerator_config": {"split_batches": True}},
    "dispatch_batches": {"accelerator_config": {"dispatch_batches": True}},
    "debug": {"debug": "underflow_overflow"},
}  # fmt: skip


@pytest.mark.parametrize("name", EQUAL)
def test_switch_of_trainer_changes_no_loss(name, plainly, tmp_path):
    got = trained_and_evaluated(tmp_path, **EQUAL[name], **({"per_device_eval_batch_size": 6} if name == "dataloader_drop_last" else {}))
    assert got == pytest.approx(plainly, abs=1e-5)


@pytest.mark.slow
def test_compiled_training_changes_no_loss(tmp_path):
    """A layer of each kind: each is traced anew for every step and mode that differs."""
    few = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    plain, compiled = (
        trained_and_evaluated(tmp_path, model=small_model(seed=3, initializer_range=0.05, **few), **switches)
        for switches in ({}, {"torch_compile": True, "torch_compile_backend": "eager"})
    )
    assert compiled == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("switches", [{"bf16": True}, {"bf16_full_eval": True}, {"fp16_full_eval": True}], ids=str)
def test_switch_of_trainer_computes_in_fewer_bits(switches, plainly, tmp_path):
    assert trained_and_evaluated(tmp_path, **switches) == pytest.approx(plainly, abs=0.05)


def test_trainer_accumulates_gradients_to_their_mean(tmp_path):
    """The loss is a mean over canvas positions: over the parts of a step it is averaged, and not summed."""
    got = trained_and_evaluated(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    assert all(0.7 * 2 * math.log(VOCAB) < loss < 1.5 * 2 * math.log(VOCAB) for loss in got)


def test_trainer_makes_training_deterministic(plainly, tmp_path):
    try:
        assert trained_and_evaluated(tmp_path, full_determinism=True) == pytest.approx(plainly, abs=1e-5)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("switches", [{}, {"eval_accumulation_steps": 1}, {"eval_use_gather_object": True}], ids=str)
def test_trainer_gathers_what_evaluation_finds(switches, tmp_path):
    """Batches of different lengths; the cache, which no gathering takes, is not among what a loss comes with."""
    metrics = switched(tmp_path, metrics=mean_logits, per_device_eval_batch_size=2, **switches).evaluate()
    assert metrics["eval_shapes"][0] == (6, 20, VOCAB) and metrics["eval_shapes"][1][0] == 6
    assert sum(metrics["eval_losses"]) == pytest.approx(metrics["eval_loss"], abs=1e-4)


def test_neftune_adds_noise_in_training_alone(plainly, tmp_path):
    """Its hook on the embedding sees prompt and canvas; while it hangs there, and afterwards, generation is as without."""
    model, prompt, seen = small_model(seed=3, initializer_range=0.05), torch.tensor([[5, 6, 7]]), []

    class Generate(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            embed = model.get_input_embeddings()
            hooked, training = bool(embed._forward_hooks), model.training
            model.eval()
            seen.append((hooked, torch.equal(embed(prompt), torch.nn.functional.embedding(prompt, embed.weight) * 32**0.5)))
            model.generate(prompt, max_new_tokens=3, seed=0)
            model.train(training)

    run = switched(tmp_path, model=model, callbacks=[Generate()], neftune_noise_alpha=5.0)
    run.train()
    assert seen == [(True, True)] * 2 and not model.get_input_embeddings()._forward_hooks
    assert losses(run)[1] != pytest.approx(plainly[0], abs=1e-5)


REFUSED = {
    "label_smoothing_factor": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    "compute_loss_func": ({"compute_loss_func": lambda outputs, *_, **kwargs: outputs.logits.mean()}, "compute_loss_func"),
    "remove_unused_columns": ({"remove_unused_columns": True}, "remove_unused_columns"),
    "reentrant": ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_switch_of_trainer_is_refused_by_name(name, tmp_path):
    """Label smoothing took the labels away and compared them with the logits of another canvas: a riddle, or nonsense in silence."""
    switches, named = REFUSED[name]
    run = switched(tmp_path, **switches)
    with pytest.raises(ValueError, match=named):
        run.train()
    if name != "reentrant":
        with pytest.raises(ValueError, match=named):
            run.evaluate()


def test_canvas_of_noise_is_no_training():
    """Whose collator it is the model does not see: labels taken away, it was asked to learn what a canvas of noise says. So it was by
    trainers of causal models, which call the model with a prompt alone."""
    model, prompt = small_model().train(), torch.tensor([[5, 6, 7]])
    for called in (model, model.model):
        with pytest.raises(ValueError, match="`decoder_input_ids` is None in training.*label_smoothing_factor"):
            called(prompt)
        with torch.no_grad():
            called(prompt)
        called(prompt, decoder_input_ids=prompt)
    model.eval()(prompt)


def test_batch_keeps_its_labels():
    batch = BlockDiffusionCollator(pad_token_id=PAD)([([1, 2], [3])])
    assert type(batch)(batch) == batch and batch["labels"].tolist() == [[IGNORED, IGNORED, 3]]
    batch.pop("attention_mask")
    assert batch.pop("missing", 1) == 1 and dict(batch).pop("labels") is not None
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        batch.pop("labels")


def test_logits_may_be_left_out_beside_a_loss():
    """As Trainer asks in evaluation with `use_liger_kernel`."""
    model, batch = small_model(), BlockDiffusionCollator(pad_token_id=PAD)(examples(2))
    output = model(**batch, skip_logits=True)
    assert output.logits is None and bool(output.loss.isfinite())
    assert model(torch.tensor([[5, 6]]), skip_logits=True).logits is not None


# The script


def train_script(out, steps):
    command = [
        "examples/train.py", "text", "--steps", str(steps), "--batch-size", "4", "--hidden-size", "32",
        "--layers", "2", "--no-compile", "--eval-cases", "1", "--log-every", "1", "--device", "cpu", "--out", str(out),
    ]  # fmt: skip
    done = programs.run(*command)
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
    from jobs import TEXT_JOBS

    written = json.loads(results.read_text())
    assert len(written) == len(TEXT_JOBS) + 2 and all(result["cases"] == 1 and 0 <= result["exact"] <= 1 for result in written.values())
    assert isinstance(DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path / "checkpoint"), DiffusionGemmaForMaskedBlockLM)
    assert not list(tmp_path.glob("checkpoint.*")), "no half-written state is left"
