"""`transformers.Trainer` for this model: what it trains with is Trainer's, and stays so. Added is what no causal model needs.

- The loss by noise proportion is logged beside the loss, to every tracker.
- A loss or a gradient that is not finite ends the run before it changes a weight, and says which rows it came from.
- Evaluation generates answers and logs how many are right, how many tokens a pass gave, and how many steps a canvas took.
- Evaluation draws its random numbers apart: training goes on as if it had not been.
- A run goes on from a checkpoint that is whole and its kind, or says what differs.

They are methods, not callbacks: a `TrainerCallback` is not shown what the model returned, and what it adds to a log comes after the
trackers have had it.
"""

import contextlib
from dataclasses import replace
from typing import Any

import torch
from transformers import Trainer

from .answers import Answer, Answering, answer_examples, apart, asked, summary
from .by_noise import LossByNoise
from .finite import refuse_gradients, refuse_loss
from .fused_head import take_off
from .ranks import gathering_groups
from .resuming import last_checkpoint, record_of, refuse_other, write_record

COLUMNS = ("prompt", "response", "completion", "messages", "tools")  # of examples; Trainer takes columns for unused that no model has
# Settings, of Trainer or of TRL, that can ask for another loss, and what they are where they do not.
USUAL_LOSS = {"label_smoothing_factor": 0.0, "loss_type": "nll"}
# What TRL's collator adds for kernels that take no mask, where several examples lie in a row: `position_ids` say the same.
OF_KERNELS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def refuse_cut(name: str, dataset, longest: int | None) -> None:
    """Raises ValueError where TRL made token ids of a `datasets.Dataset`, and one is as long as `longest`, to which TRL cuts: behind a
    response that was cut the model would learn to end."""
    columns = getattr(dataset, "column_names", None) or ()
    if longest is None or "labels" not in columns or not hasattr(dataset, "with_format"):
        return
    for table in dataset.with_format("arrow").iter(10_000):
        if "seq_lengths" in columns:  # of what is packed in a row
            lengths = [length for row in table["seq_lengths"].to_pylist() for length in row]
        else:
            lengths = table["input_ids"].combine_chunks().value_lengths().to_pylist()
        if max(lengths, default=0) >= longest:
            raise ValueError(
                f"`max_length` is {longest}, and `{name}` holds examples as long, which may have been cut; expected more, or None"
            )


class BlockDiffusionTraining:
    """The methods, for `Trainer` or a class derived from it, in front of which it is to stand: `SFTTrainer` of TRL, too.

    Args:
        answering (`Answering`, *optional*): how evaluation generates. Default: it gives the loss alone.
        args, kwargs: Trainer's. `data_collator` is a `BlockDiffusionCollator`, or another that gives `labels` of whole examples.

    Raises:
        ValueError: a model of another class, another loss, or `answering` with another collator, which does not say what a prompt is.

    Attributes:
        answers: the last evaluation's, a list of `Answer`.
    """

    def __init__(self, *args, answering: Answering | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.answering = answering
        self.answers: list[Answer] = []
        self.by_noise = LossByNoise()
        self.batches = 0  # of the step under way
        self.begun: dict[str, Any] = {}  # what the run was when it began: callbacks may change the objective
        self._check_arguments()
        self._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, *COLUMNS, self.args.length_column_name]

    def _check_arguments(self) -> None:
        """Raises ValueError: see the class. What TRL's `SFTTrainer` put in front of the model is taken off: its loss is not called."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not hasattr(model, "objective"):
            kind = f"{type(model).__module__}.{type(model).__name__}"
            why = "SFTTrainer loads transformers' class from a path"
            raise ValueError(f"`model` is a {kind}; expected DiffusionGemmaForMaskedBlockLM, as AutoModelForCausalLM loads it: {why}")
        take_off(model)
        given = {"compute_loss_func": self.compute_loss_func}
        given |= {name: getattr(self.args, name, usual) for name, usual in USUAL_LOSS.items()}
        for name, value in given.items():
            if value != (usual := USUAL_LOSS.get(name)):
                raise ValueError(f"`{name}` is {value!r}; expected {usual!r}: the loss is the model's, of whole examples")
        if hasattr(self.data_collator, "read"):
            return
        kind = type(self.data_collator).__name__
        if self.answering is not None:
            raise ValueError(
                f"`answering` is given, and `data_collator` is a {kind}; expected a BlockDiffusionCollator, which reads prompts"
            )
        for name in ("train_dataset", "eval_dataset"):
            refuse_cut(name, getattr(self, name), getattr(self.args, "max_length", None))

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        """As Trainer's own; NotFinite in training where it is none."""
        if inputs.get("position_ids") is not None:
            inputs = {name: value for name, value in inputs.items() if name not in OF_KERNELS}
        loss, output = Trainer.compute_loss(self, model, inputs, return_outputs=True, **kwargs)
        if model.training:
            self.by_noise.add(output.canvas_losses, output.noise_proportions)
            if not bool(loss.detach().isfinite()):
                where = self.state.global_step + 1, self.batches + 1
                refuse_loss(loss, output, inputs, self.model, *where, self.train_dataset, self.data_collator)
        return (loss, output) if return_outputs else loss

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.batches += 1
        if self.accelerator.sync_gradients:
            self.batches = 0
            if self.accelerator.scaler is None:
                refuse_gradients(self.model, self.state.global_step + 1)
        return loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            one_process = self.accelerator.num_processes == 1
            logs = logs | self.by_noise.take(None if one_process else lambda totals: self.accelerator.reduce(totals, "sum"))
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        """As Trainer's; with `answering`, its measures too. The same random numbers every time, and none of training's."""
        mode = self.model.training
        with apart(self.args.seed):
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
            if self.answering is not None:
                self.answers = self.generate_answers(dataloader.dataset)
                output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in summary(self.answers).items()})
        self.model.train(mode)
        return output

    def generate_answers(self, examples) -> list[Answer]:
        """`answer_examples` of a dataset, in its order. Every process asks a share of it; where weights are sharded, all ask together, each
        the same. What one of them raises, all raise."""
        examples = [example for _, example in zip(range(self.answering.limit or 2**62), examples, strict=False)]
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        count, rank = self.accelerator.num_processes, self.accelerator.process_index
        if count == 1 or gathering_groups(self.model):
            return answer_examples(model, self.data_collator, examples, self.answering)
        from accelerate.utils import gather_object

        longest = max((len(asked(self.data_collator, example)[1]) for example in examples), default=1)  # whoever asks for it
        answering = replace(self.answering, settings={"max_new_tokens": longest, **self.answering.settings})
        found, failed, places = [], None, range(len(examples))[rank::count]
        try:
            found = answer_examples(model, self.data_collator, [examples[place] for place in places], answering, places)
        except Exception as error:  # the others would wait for this process's answers
            failed = error
        shares = gather_object([(found, None if failed is None else f"{type(failed).__name__}: {failed}")])
        if failed is not None:
            raise failed
        if others := [f"process {other}: {told}" for other, (_, told) in enumerate(shares) if told is not None]:
            raise RuntimeError(f"evaluation failed in {'; '.join(others)}")
        return [shares[place % count][0][place // count] for place in range(len(examples))]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As Trainer's. True: from the last checkpoint that is whole.

        Raises:
            ValueError: there is no such checkpoint, it is not whole, or it is another run's.
            NotFinite: a loss or a gradient.
        """
        self.batches, self.by_noise, self.begun = 0, LossByNoise(), self.record()
        if resume_from_checkpoint is True:
            found = last_checkpoint(self.args.output_dir)
            if found is None:
                raise ValueError(f"`resume_from_checkpoint` is True, and {self.args.output_dir!r} holds no whole checkpoint; expected one")
            resume_from_checkpoint = str(found)
        if resume_from_checkpoint:
            refuse_other(resume_from_checkpoint, self.begun)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def record(self) -> dict[str, Any]:
        """What a checkpoint says of its run (`resuming.record_of`), as it is now."""
        examples = None
        with contextlib.suppress(TypeError):  # data that is read once through has no length
            examples = len(self.train_dataset)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return record_of(model, self.args, examples)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save:  # a checkpoint, and not the model that is published
            write_record(output_dir, self.begun)


class BlockDiffusionTrainer(BlockDiffusionTraining, Trainer):
    """`transformers.Trainer` with `BlockDiffusionTraining`.

        trainer = BlockDiffusionTrainer(
            model=model, args=arguments, data_collator=BlockDiffusionCollator(tokenizer), train_dataset=data, eval_dataset=unseen,
            answering=Answering(batch_size=32),
        )
        trainer.train()
    """  # fmt: skip


__all__ = ["BlockDiffusionTrainer", "BlockDiffusionTraining"]
