"""What tuning with LoRA keeps in memory: weights, adapters, their gradients and AdamW's two moments. From sizes alone, without weights.

Adapters are those of `lora_targets`, in float32, as `peft.get_peft_model` makes them in every precision. What a pass computes comes on top,
and depends on the length of the texts and on gradient checkpointing; nothing is said of it here.
"""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..layers.adapter_targets import adapted_linears
from .plans import GIB, PRECISIONS, expert_weights, sized


class TuningMemory(NamedTuple):
    """Bytes."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return sum(self)


def count_adapters(config, model_class: type[PreTrainedModel], rank: int, experts: bool = True) -> int:
    """Parameters of one adapter: `rank * (in + out)` of every matrix, an expert's included."""
    with torch.device("meta"):
        model = model_class(config)
    sides = sum(module.in_features + module.out_features for module in adapted_linears(model).values())
    return rank * (sides + sum(len(weight) * sum(weight.shape[1:]) for weight in expert_weights(model)) * experts)


def tuning_memory(config, model_class: type[PreTrainedModel], precision: str, rank: int, experts: bool = True) -> TuningMemory:
    """Bytes that one adapter takes to be trained.

    Args:
        config: the model's.
        precision: of the frozen weights, one of `PRECISIONS`.
        rank: of the adapter.
        experts: whether these are adapted.

    Raises:
        ValueError: `precision` is none of them, or `rank` is not positive.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` is {precision!r}; expected one of {PRECISIONS}")
    if rank < 1:
        raise ValueError(f"`rank` is {rank!r}; expected a positive number")
    return _with_adapters(_weights(config, model_class, precision), count_adapters(config, model_class, rank, experts))


def _weights(config, model_class: type[PreTrainedModel], precision: str) -> int:
    model = sized(config, model_class, precision)
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def _with_adapters(weights: int, count: int) -> TuningMemory:
    adapters = torch.float32.itemsize * count
    return TuningMemory(weights, adapters, adapters, 2 * adapters)


def tuning_table(config, model_class: type[PreTrainedModel], rank: int) -> tuple[list[str], dict[tuple[str, bool], TuningMemory]]:
    """Lines of a Markdown table in GiB, and what they are made of, by precision and whether experts are adapted."""
    weights = {precision: _weights(config, model_class, precision) for precision in PRECISIONS}  # each builds the model once
    counts = {experts: count_adapters(config, model_class, rank, experts) for experts in (True, False)}
    found = {(precision, experts): _with_adapters(size, count) for precision, size in weights.items() for experts, count in counts.items()}
    columns = ["adapted", "weights", "weights, GiB", "adapter", "gradients", "AdamW", "together"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for (precision, experts), memory in found.items():
        cells = " | ".join(f"{size / GIB:.2f}" for size in (*memory, memory.total))
        lines.append(f"| attention, MLP{', experts' if experts else ''} | {precision} | {cells} |")
    return lines, found


__all__ = ["TuningMemory", "count_adapters", "tuning_memory", "tuning_table"]
