"""`BlockDiffusionTraining` in front of a trainer of causal models, as TRL's `SFTTrainer` is one; and those trainers by themselves.

Through the seam that they use: a `forward` put on the model, which shifts the states of the model's base by a token. TRL itself is tried in
tests/test_trl.py.
"""

import functools
import types

import pytest
import torch
from small_models import CANVAS, PAD, small_model
from train_and_be_killed import examples
from transformers import Trainer, TrainingArguments

from modeling_diffusiongemma import BlockDiffusionCollator
from modeling_diffusiongemma.training.trainer import BlockDiffusionTraining, refuse_cut


def fuse(model):
    """What TRL's `add_fused_lm_head` does."""
    plain = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return plain(*args, labels=labels, **kwargs)
        return self.base_model(*args, use_cache=False, **kwargs).last_hidden_state[:, :-1]

    model.forward = types.MethodType(forward, model)
    return model


class Fused(Trainer):
    """A trainer of causal models."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        fuse(self.model)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return model(**inputs, fused_lm_head=True).square().mean()


class Training(BlockDiffusionTraining, Fused):
    pass


def built(kind, folder, model=None, collator=None, **switches):
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
                "remove_unused_columns": False, "save_strategy": "no", "logging_steps": 1}  # fmt: skip
    return kind(
        model=small_model(seed=3) if model is None else model, args=TrainingArguments(str(folder), **settings, **switches),
        data_collator=BlockDiffusionCollator(pad_token_id=PAD, pad_to_multiple_of=CANVAS) if collator is None else collator,
        train_dataset=examples(8), eval_dataset=examples(4),
    )  # fmt: skip


@pytest.mark.parametrize("switches", [{}, {"bf16": True}], ids=str)
def test_states_of_noise_are_no_next_tokens(switches, tmp_path):
    """Rows as long as a canvas: it trained and evaluated without a word."""
    with pytest.raises(ValueError, match="TRL's fused head.*BlockDiffusionTraining"):
        built(Fused, tmp_path, **switches).train()
    with pytest.raises(ValueError, match="TRL's fused head"):
        built(Fused, tmp_path, **switches).evaluate()


def test_in_front_of_it_the_model_is_trained_as_without(tmp_path):
    class Plain(BlockDiffusionTraining, Trainer):
        pass

    runs = []
    for kind in (Training, Plain):
        runs.append(built(kind, tmp_path))
        runs[-1].train()
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in runs]
    assert losses[0] == losses[1] and runs[0].evaluate()["eval_loss"] == runs[1].evaluate()["eval_loss"]
    assert "forward" not in vars(runs[0].model)
    runs[0].model.eval().generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, seed=0)


def flattened(examples):
    """Several examples in a row, as TRL's collator lays them, with what kernels without masks are told."""
    batch = BlockDiffusionCollator(pad_token_id=PAD, packing=True, max_length=200)(examples)
    batch.pop("attention_mask")
    batch["labels"][batch["position_ids"] == 0] = -100
    return dict(batch) | {"cu_seq_lens_q": torch.tensor([0, 7]), "max_length_q": 7, "seq_idx": torch.tensor([[0]])}


def test_what_kernels_are_told_beside_positions_is_left_out(tmp_path):
    run = built(Training, tmp_path, collator=flattened)
    run.train()
    assert run.evaluate()["eval_loss"] > 0


def test_other_losses_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="`label_smoothing_factor` is 0.1; expected 0.0"):
        built(Training, tmp_path, label_smoothing_factor=0.1)

    class Weighted(TrainingArguments):
        loss_type = "dft"

    with pytest.raises(ValueError, match="`loss_type` is 'dft'; expected 'nll'"):
        Training(model=small_model(), args=Weighted(str(tmp_path), use_cpu=True), train_dataset=examples(8), data_collator=flattened)
    with pytest.raises(ValueError, match="`compute_loss_func` is .*; expected None"):
        Training(
            model=small_model(), args=TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=examples(8), data_collator=flattened,
            compute_loss_func=lambda *args, **kwargs: 0.0,
        )  # fmt: skip


def test_another_model_is_refused_by_its_class(tmp_path):
    with pytest.raises(ValueError, match="`model` is a torch.nn.modules.linear.Linear; expected DiffusionGemmaForMaskedBlockLM"):
        built(type("Bare", (BlockDiffusionTraining, Trainer), {}), tmp_path, model=torch.nn.Linear(3, 3))


def test_answers_need_a_collator_that_reads_prompts(tmp_path):
    from modeling_diffusiongemma.training.answers import Answering

    class Asking(Training):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, answering=Answering(), **kwargs)

    with pytest.raises(ValueError, match="`answering` is given, and `data_collator` is a function"):
        built(Asking, tmp_path, collator=flattened)


def test_examples_that_may_have_been_cut_are_refused():
    datasets = pytest.importorskip("datasets")
    rows = {"input_ids": [[5, 6, 7], [5, 6, 7, 8, 9]], "labels": [[-100, 6, 7], [-100, 6, 7, 8, 9]]}
    made = datasets.Dataset.from_dict(rows)
    packed = datasets.Dataset.from_dict(rows | {"seq_lengths": [[3], [2, 3]]})
    refuse_cut("train_dataset", made, 6)
    refuse_cut("train_dataset", packed, 4)
    refuse_cut("train_dataset", made, None)
    refuse_cut("train_dataset", datasets.Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}), 1)
    refuse_cut("train_dataset", [(1, 2)], 1)
    for dataset, longest in ((made, 5), (packed, 3)):
        with pytest.raises(ValueError, match=f"`max_length` is {longest}, and `train_dataset` holds examples as long"):
            refuse_cut("train_dataset", dataset, longest)
