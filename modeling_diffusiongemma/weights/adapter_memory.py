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


def tuning_table(config, model_class: type[PreTrainedModel], rank: int) -> tuple[list[str], dict[tuple[str, bool], TuningMemory]]:
    """Lines of a Markdown table in GiB, and what they are made of, by precision of the frozen weights and whether experts are adapted.

    Raises:
        ValueError: `rank` is not positive.
    """
    if rank < 1:
        raise ValueError(f"`rank` is {rank!r}; expected a positive number")
    counts, found = {experts: count_adapters(config, model_class, rank, experts) for experts in (True, False)}, {}
    for precision in PRECISIONS:
        model = sized(config, model_class, precision)
        weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        for experts, count in counts.items():
            adapters = torch.float32.itemsize * count
            found[precision, experts] = TuningMemory(weights, adapters, adapters, 2 * adapters)
    columns = ["adapted", "weights", "weights, GiB", "adapter", "gradients", "AdamW", "together"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for (precision, experts), memory in found.items():
        cells = " | ".join(f"{size / GIB:.2f}" for size in (*memory, memory.total))
        lines.append(f"| attention, MLP{', experts' if experts else ''} | {precision} | {cells} |")
    return lines, found


__all__ = ["TuningMemory", "count_adapters", "tuning_table"]
