"""TRL's trainers: `SFTTrainer` behind `BlockDiffusionTraining` trains this model's objective, and by themselves all are refused."""

import datasets
import pytest
import torch
import trl

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, Objective, default_checkpoint, drop_in, lora_targets
from modeling_diffusiongemma.training.trainer import BlockDiffusionTraining

ROWS = [{"prompt": f"European: {day} March 1998", "completion": f"{day:02d}/03/1998"} for day in range(1, 9)]
TURNS = [{"prompt": [{"role": "user", "content": row["prompt"]}],
          "completion": [{"role": "assistant", "content": row["completion"]}]} for row in ROWS]  # fmt: skip
CHATS = [{"messages": [*row["prompt"], *row["completion"]]} for row in TURNS]


@pytest.fixture(scope="module")
def training():
    class Training(BlockDiffusionTraining, trl.SFTTrainer):
        pass

    return Training


def fit(kind, tokenizer, folder, rows, model=None, peft_config=None, **switches):
    if model is None:
        model = DiffusionGemmaForMaskedBlockLM.from_pretrained(default_checkpoint())
    if hasattr(model, "objective"):
        model.objective = Objective(canvas_length=16)
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False, "report_to": "none",
                "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}  # fmt: skip
    data = datasets.Dataset.from_list(rows)
    return kind(
        model=model, args=trl.SFTConfig(str(folder), **settings | switches), train_dataset=data, eval_dataset=data,
        processing_class=tokenizer, peft_config=peft_config,
    )  # fmt: skip


WAYS = {
    "turns": (TURNS, {}),
    "texts": (ROWS, {}),
    "chats": (CHATS, {"assistant_only_loss": True}),
    "packed": (TURNS, {"packing": True, "max_length": 96}),
    "one row": (TURNS, {"padding_free": True, "max_length": None}),
}


@pytest.mark.parametrize("name", WAYS)
def test_data_of_every_form_is_learned_as_canvases(name, training, tokenizer, tmp_path):
    rows, switches = WAYS[name]
    run = fit(training, tokenizer, tmp_path, rows, **switches)
    run.train()
    logged = next(entry for entry in run.state.log_history if "loss" in entry)
    assert any(key.startswith("loss_noise_") for key in logged) and run.evaluate()["eval_loss"] > 0
    prompt = tokenizer(ROWS[0]["prompt"], return_tensors="pt").input_ids
    assert run.model.eval().generate(prompt, max_new_tokens=3, max_denoising_steps=2, seed=0).shape[0] == 1


def test_drop_in_class_and_adapters_are_trained(training, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    model = drop_in.DiffusionGemmaForBlockDiffusion.from_pretrained(default_checkpoint())
    config = peft.LoraConfig(r=3, **lora_targets(model, experts=False))
    run = fit(training, tokenizer, tmp_path, TURNS, model, config, save_strategy="steps", save_steps=1)
    run.train()
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").is_file()


def test_sft_trainer_alone_is_refused(tokenizer, tmp_path):
    """Rows padded to a canvas's length, where it trained on a canvas of noise and said nothing."""
    for bf16 in (False, True):
        run = fit(trl.SFTTrainer, tokenizer, tmp_path, TURNS, pad_to_multiple_of=256, bf16=bf16)
        with pytest.raises(ValueError, match="TRL's fused head"):
            run.train()
        with pytest.raises(ValueError, match="TRL's fused head"):
            run.evaluate()


def test_preferences_are_refused(tokenizer, tmp_path):
    data = datasets.Dataset.from_list([{**row, "chosen": row["completion"], "rejected": row["prompt"]} for row in ROWS])
    arguments = trl.DPOConfig(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, pad_to_multiple_of=256, max_steps=1)
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(default_checkpoint())
    with pytest.raises(ValueError, match="TRL's fused head"):
        trl.DPOTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer).train()


def test_settings_that_would_be_passed_over_are_refused(training, tokenizer, tmp_path):
    for name, switches in {"loss_type": {"loss_type": "dft"}, "max_length": {"max_length": 34}}.items():
        with pytest.raises(ValueError, match=f"`{name}`"):
            fit(training, tokenizer, tmp_path, TURNS, **switches)
    with pytest.raises(ValueError, match="`model` is a transformers"):
        fit(training, tokenizer, tmp_path, TURNS, model=str(default_checkpoint()))
    with pytest.raises(ValueError, match="begins with a target"):
        fit(training, tokenizer, tmp_path, CHATS).train()


def test_gradients_are_of_the_objective(training, tokenizer, tmp_path):
    """The loss that is logged is that of the model on the batch."""
    run = fit(training, tokenizer, tmp_path, TURNS, max_steps=1, learning_rate=0.0)
    batch = next(iter(run.get_train_dataloader()))
    torch.manual_seed(0)
    expected = run.model.train()(**batch).loss
    torch.manual_seed(0)
    assert torch.equal(run.compute_loss(run.model, dict(batch)), expected)
