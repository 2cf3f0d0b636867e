"""`BlockDiffusionTrainer`: what it logs, what it refuses, how it evaluates, and that a killed run goes on bit for bit."""

import json
import math
import shutil
from pathlib import Path

import programs
import pytest
import torch
from small_models import CANVAS, PAD, VOCAB, small_model
from train_and_be_killed import built, examples, losses, trainer
from transformers import Trainer, TrainerCallback

from modeling_diffusiongemma import BlockDiffusionCollator
from modeling_diffusiongemma.training.answers import Answering, answer_examples, asked, summary
from modeling_diffusiongemma.training.by_noise import NAMES, LossByNoise
from modeling_diffusiongemma.training.callbacks import GrowingCanvas
from modeling_diffusiongemma.training.finite import NotFinite, conversations, places_in
from modeling_diffusiongemma.training.resuming import RECORD, last_checkpoint

ROOT = Path(__file__).parents[1]
QUICK = {"max_denoising_steps": 2, "eos_token_id": None}


# Losses by noise proportion


def test_losses_fall_into_bins_of_their_noise_proportion():
    bins = LossByNoise()
    bins.add(torch.tensor([1.0, 2.0, 8.0]), torch.tensor([0.1, 0.2, 0.99]))
    bins.add(torch.tensor([3.0, 5.0]), torch.tensor([0.0, 0.25]))
    assert bins.take() == {NAMES[0]: 2.0, NAMES[1]: 5.0, NAMES[3]: 8.0} and bins.take() == {}


def test_losses_by_noise_are_logged_with_the_loss_and_average_to_it(tmp_path):
    """Where every tracker sees them: in what the callbacks are shown, the first of which are the trackers."""
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            seen.append(dict(logs))

    run = trainer(small_model(seed=3), tmp_path, [Tracker()], max_steps=3, per_device_train_batch_size=8, logging_steps=3)
    run.train()
    logged = next(logs for logs in seen if "loss" in logs)
    assert set(NAMES) <= set(logged) and all(math.isfinite(logged[name]) for name in NAMES)
    assert any(NAMES[0] in entry for entry in run.state.log_history)
    assert logged["loss_noise_75_100"] > logged["loss_noise_0_25"], "much noise is harder than little"


# What is not finite


def poisoned(model, row):
    """A hook by which a row of every canvas pass is NaN."""

    def spoil(module, inputs, output):
        spoiled = output.clone()
        spoiled[row] = float("nan")
        return spoiled

    return model.get_submodule("model.decoder.norm").register_forward_hook(spoil)


def test_nan_names_step_batch_rows_and_examples_and_leaves_the_weights(tmp_path):
    model, held = small_model(seed=3), {}

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                poisoned(model, row=1)
                held.update({name: value.clone() for name, value in model.state_dict().items()})

    run = trainer(model, tmp_path, [Poison()], gradient_accumulation_steps=2, train_sampling_strategy="sequential")
    with pytest.raises(NotFinite, match=r"loss of step 3 is nan in batch 1 of it") as told:
        run.train()
    assert (told.value.step, told.value.rows, told.value.examples) == (3, [1], [1]), "two steps of four examples are an epoch"
    assert "rows [1] of 2, examples [1] of the data" in str(told.value)
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
    assert sorted(losses(run)) == [1, 2]


def test_rows_of_a_packed_batch_are_found_in_the_data():
    """Two conversations lie in the row, and neither is its neighbour's; ids of text that is not there match nothing."""
    collator, data = BlockDiffusionCollator(pad_token_id=PAD, packing=True, max_length=24), examples(8)
    batch = collator(data[2:6])
    lying = set().union(*(conversations(batch, row) for row in range(len(batch["input_ids"]))))
    wanted = sorted(place for place, one in enumerate(data) if tuple(one["prompt"] + one["response"]) in lying)
    assert len(batch["input_ids"]) < 4 and places_in(data, collator, lying) == wanted == [2, 3, 4, 5]
    assert places_in(iter(data), collator, lying) == [] and places_in(data, collator, {(1, 2)}) == []


def test_nan_of_weights_names_the_weights(tmp_path):
    model = small_model(seed=3)
    name = "model.decoder.layers.1.self_attn.q_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = float("inf")
    with pytest.raises(NotFinite, match=f"rows \\[0, 1\\] of 2. weights were not finite before: {name}"):
        trainer(model, tmp_path).train()


def test_gradient_that_is_not_finite_is_refused_though_the_loss_is(tmp_path):
    model = small_model(seed=3)
    weight = model.get_parameter("model.decoder.layers.0.self_attn.q_proj.weight")
    weight.register_hook(lambda gradient: gradient * float("inf"))
    held = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NotFinite, match="gradients of step 1 .*layers.0.self_attn.q_proj.weight"):
        trainer(model, tmp_path).train()
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())


def test_transformers_own_trainer_takes_the_step_and_logs_no_nan(tmp_path):
    """What `NotFinite` is for. Should this fail, Trainer has learned to stop."""
    model = small_model(seed=3)
    poisoned(model, row=1)
    run = trainer(model, tmp_path, kind=Trainer, max_steps=1, remove_unused_columns=False)
    run.train()
    assert losses(run) == {1: 0.0} and not all(bool(value.isfinite().all()) for value in model.parameters())


# Evaluation by generation


def learned(folder, **switches):
    """A model that knows its four examples by heart."""
    few = [{"prompt": [5 + place, 7], "response": [20 + place, 30, 40 + place, 1]} for place in range(4)]
    run = trainer(
        small_model(seed=3, initializer_range=0.05), folder, train_dataset=few, eval_dataset=few, max_steps=150, learning_rate=1e-2,
        per_device_train_batch_size=4, logging_steps=150, **switches,
    )  # fmt: skip
    run.train()
    return run


def test_evaluation_generates_and_logs_what_is_right(tmp_path):
    answering = Answering(settings={"max_denoising_steps": 8, "eos_token_id": 1}, batch_size=3)
    run = learned(tmp_path, answering=answering)
    run.model.train()
    metrics = run.evaluate()
    assert metrics["eval_exact_match"] >= 0.75 and run.model.training
    assert 1 <= metrics["eval_steps_per_canvas"] <= 8 and metrics["eval_tokens_per_forward"] <= 4
    assert run.state.log_history[-1]["eval_exact_match"] == metrics["eval_exact_match"]
    assert [one.response for one in run.answers] == [[20 + place, 30, 40 + place] for place in range(4)]
    assert sum(one.answer == one.response for one in run.answers) == sum(one.right for one in run.answers) >= 3
    one = next(one for one in run.answers if one.right)
    assert one.prompt[1] == 7 and (one.tokens, one.canvases) == (4, 1), "the end is among what was written"
    wrong = answer_examples(run.model, run.data_collator, run.eval_dataset, Answering(answering.settings, check=lambda *_: False))
    assert summary(wrong)["exact_match"] == 0.0 and [one.answer for one in wrong] == [one.answer for one in run.answers]


def test_answer_depends_on_its_prompt_and_its_seed_alone():
    model, collator, data = small_model(seed=3), BlockDiffusionCollator(pad_token_id=PAD), examples(5)
    whole = answer_examples(model, collator, data, Answering(QUICK, batch_size=5))
    one = answer_examples(model, collator, data[3:], Answering(QUICK | {"max_new_tokens": max(a.tokens for a in whole)}), [3, 4])
    assert [a.answer for a in one] == [a.answer for a in whole[3:]]
    assert whole[0].canvases == -(-whole[0].tokens // CANVAS)


def test_only_the_last_response_is_asked_for(tokenizer):
    collator = BlockDiffusionCollator(tokenizer)
    prompt, response = asked(collator, ("Sort 3, 1", "1, 3"))
    turn = [{"role": "user", "content": "Sort 3, 1"}]
    assert prompt == tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(response) == "1, 3<turn|>"


def test_checker_is_shown_texts(trained, tokenizer):
    shown = []

    def check(prompt, answer, response):
        shown.append((prompt, answer, response))
        return answer.startswith("1998")

    data = [{"prompt": "Write 3 March 1998 as an ISO date.", "response": "03.03.98"}]
    settings = {"canvas_length": 16, "max_new_tokens": 16}
    answers = answer_examples(trained, BlockDiffusionCollator(tokenizer), data, Answering(settings, check=check))
    assert shown == [(data[0]["prompt"], "1998-03-03", "03.03.98")] and answers[0].right
    assert not answer_examples(trained, BlockDiffusionCollator(tokenizer), data, Answering(settings))[0].right


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_training_goes_on_as_if_it_had_not_been_evaluated(kind, tmp_path):
    """Bit for bit: neither the noise of the evaluation's loss nor its answers draw from what training draws from."""
    if kind == "lora":
        pytest.importorskip("peft")
    without = trainer(built(kind), tmp_path)
    without.train()
    switches = {"eval_strategy": "steps", "eval_steps": 2, "gradient_checkpointing": True}
    plain = trainer(built(kind), tmp_path, answering=Answering(QUICK), **(switches | {"gradient_checkpointing": False}))
    plain.train()
    assert losses(plain) == losses(without)
    evaluated = [entry for entry in plain.state.log_history if "eval_loss" in entry]
    assert len(evaluated) >= 3 and all("eval_exact_match" in entry for entry in evaluated)
    saving = trainer(built(kind), tmp_path, answering=Answering(QUICK), **switches)
    saving.train()
    assert losses(saving) == pytest.approx(losses(without), abs=1e-4), "layers computed twice, in the same arithmetic"


def test_evaluation_draws_the_same_noise_every_time(tmp_path):
    run = trainer(small_model(seed=3), tmp_path)
    assert run.evaluate()["eval_loss"] == run.evaluate()["eval_loss"]


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": None}, "batch_size"),
        ({"limit": True}, "limit"),
        ({"limit": -1}, "limit"),
        ({"settings": {"seed": 3}}, "seed"),
    ],
)
def test_answering_names_what_is_wrong(settings, named):
    with pytest.raises(ValueError, match=named):
        Answering(**settings)


# Switches of Trainer


def test_columns_of_examples_are_used_without_a_switch(tmp_path):
    """`remove_unused_columns` is True by default, and takes every column for unused that is no argument of the model."""
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{**one, "note": "aside"} for one in examples()])
    found = []
    for given in (data, examples()):
        run = trainer(small_model(seed=3), tmp_path, train_dataset=given, max_steps=2)
        run.train()
        found.append(losses(run))
    assert run.args.remove_unused_columns and found[0] == found[1]


def test_examples_are_grouped_by_a_column_of_lengths(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{**one, "length": len(one["prompt"]) + len(one["response"])} for one in examples(40)])
    padded = {}
    for strategy in ("sequential", "group_by_length"):
        run = trainer(small_model(seed=3), tmp_path, train_dataset=data, train_sampling_strategy=strategy, max_steps=4)
        padded[strategy] = sum(int((batch["attention_mask"] == 0).sum()) for batch in run.get_train_dataloader())
    run.train()
    assert sorted(losses(run)) == [1, 2, 3, 4] and padded["group_by_length"] < padded["sequential"]


def test_best_checkpoint_is_chosen_by_the_answers(tmp_path):
    few = [{"prompt": [5 + place, 7], "response": [20 + place, 30, 40 + place, 1]} for place in range(4)]
    run = trainer(
        small_model(seed=3, initializer_range=0.05), tmp_path, train_dataset=few, eval_dataset=few, max_steps=60, learning_rate=1e-2,
        per_device_train_batch_size=4, logging_steps=60, eval_strategy="steps", eval_steps=30, save_steps=30, save_strategy="steps",
        load_best_model_at_end=True, metric_for_best_model="exact_match", greater_is_better=True,
        answering=Answering({"max_denoising_steps": 8, "eos_token_id": 1}),
    )  # fmt: skip
    run.train()
    scores = {entry["step"]: entry["eval_exact_match"] for entry in run.state.log_history if "eval_exact_match" in entry}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert run.state.best_metric == max(scores.values()) and run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")


@pytest.mark.parametrize("switches", [{"bf16": True}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}], ids=str)
def test_switches_of_trainer_train(switches, tmp_path):
    run = trainer(small_model(seed=3, initializer_range=0.05), tmp_path, max_steps=2, answering=Answering(QUICK), **switches)
    run.train()
    assert all(0.7 * 2 * math.log(VOCAB) < loss < 1.5 * 2 * math.log(VOCAB) for loss in losses(run).values())
    assert math.isfinite(run.evaluate()["eval_loss"])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_canvases_grow_by_the_progress_of_training_and_go_on_growing(kind, tmp_path):
    """A resumed run begins with the first objective, and is at the length of its step."""
    if kind == "lora":
        pytest.importorskip("peft")
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append(model.objective.canvas_length)

    straight = trainer(built(kind), tmp_path, [GrowingCanvas((3, 5, 10)), Watch()], max_steps=6, save_strategy="steps", save_steps=4)
    straight.train()
    assert seen == [3, 3, 5, 5, 10, 10]
    resumed = trainer(built(kind), tmp_path, [GrowingCanvas((3, 5, 10)), Watch()], max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert seen[6:] == [10, 10] and losses(resumed) == losses(straight)
    with pytest.raises(ValueError, match="lengths"):
        GrowingCanvas((3, 0))


# Resuming


def process(*arguments):
    return programs.run("tests/train_and_be_killed.py", *arguments)


@pytest.mark.parametrize("kind, every", [("full", 3), ("full", 4), ("lora", 3)], ids=["full", "at the end of an epoch", "lora"])
def test_killed_run_goes_on_bit_for_bit(kind, every, tmp_path):
    """SIGKILL two steps behind the checkpoint; the process that goes on has drawn other numbers, and built another model."""
    if kind == "lora":
        pytest.importorskip("peft")
    straight = trainer(built(kind), tmp_path / "straight")
    straight.train()
    killed = process(tmp_path / "killed", kind, every, "--killed", every + 2)
    assert killed.returncode == -9, killed.stderr
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == [f"checkpoint-{every}"]
    resumed = process(tmp_path / "killed", kind, every, "--resumed")
    assert resumed.returncode == 0, resumed.stderr
    assert {int(step): loss for step, loss in json.loads(resumed.stdout.splitlines()[-1]).items()} == losses(straight)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of each kind with `checkpoint-2`; read only."""

    def run(kind):
        folder = tmp_path_factory.mktemp(kind)
        trainer(built(kind), folder, max_steps=2, save_strategy="steps", save_steps=2).train()
        return folder

    return {"full": run("full"), **({"lora": run("lora")} if pytest.importorskip("peft") else {})}


def other(name, folder):
    """A run that is not the saved one."""
    if name == "rank":
        return trainer(built("lora", rank=5), folder)
    if name == "data":
        return trainer(built("full"), folder, train_dataset=examples(9))
    if name == "batch":
        return trainer(built("full"), folder, per_device_train_batch_size=4)
    changes = {"canvas": {"canvas_length": 7}, "size": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}}
    return trainer(small_model(3, initializer_range=0.05, **changes[name]), folder)


@pytest.mark.parametrize(
    "name, kind, told",
    [
        ("canvas", "full", "`config.canvas_length` is 7, and was 10"),
        ("size", "full", "`config.text_config.num_hidden_layers` is 2, and was 3"),
        ("rank", "lora", "`adapter default.r` is 5, and was 3"),
        ("data", "full", "`examples` is 9, and was 8"),
        ("batch", "full", "`batch size` is 4, and was 2"),
    ],
)
def test_resuming_another_run_is_refused_by_what_differs(name, kind, told, saved):
    with pytest.raises(ValueError, match=told):
        other(name, saved[kind]).train(resume_from_checkpoint=True)


def test_full_tuning_does_not_go_on_from_an_adapter(saved):
    with pytest.raises(ValueError, match="`adapter default.r` is 'absent', and was 3"):
        trainer(built("full"), saved["lora"]).train(resume_from_checkpoint=str(saved["lora"] / "checkpoint-2"))


def test_checkpoint_that_is_not_whole_is_passed_over_or_refused(saved, tmp_path):
    """Trainer writes its state last; without it, it would begin at step 0 with the weights of step 2."""
    shutil.copytree(saved["full"], tmp_path, dirs_exist_ok=True)
    for step, text in ((4, None), (6, '{"epoch": 1.0, "glo')):
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / f"checkpoint-{step}")
        state = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        state.unlink() if text is None else state.write_text(text)
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    for step in (4, 6):
        with pytest.raises(ValueError, match="missing or not whole"):
            trainer(built("full"), tmp_path).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    run = trainer(built("full"), tmp_path, max_steps=3)
    run.train(resume_from_checkpoint=True)
    assert sorted(losses(run)) == [1, 2, 3]
    (tmp_path / "checkpoint-2" / RECORD).unlink()
    with pytest.raises(ValueError, match=RECORD):
        trainer(built("full"), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="no whole checkpoint"):
        trainer(built("full"), tmp_path / "nowhere").train(resume_from_checkpoint=True)


def test_checkpoint_without_an_optimizers_state_is_refused(tmp_path):
    """Trainer goes on from it with a new optimizer and schedule, and says nothing."""
    run = trainer(built("full"), tmp_path, max_steps=2, save_strategy="steps", save_steps=1, save_only_model=True)
    run.train()
    with pytest.raises(ValueError, match="holds no optimizer's state, as `save_only_model` leaves it out"):
        trainer(built("full"), tmp_path).train(resume_from_checkpoint=True)
