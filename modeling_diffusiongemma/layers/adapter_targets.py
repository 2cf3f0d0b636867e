"""What LoRA adapts by default: attention, the dense MLP and the experts of every layer.

Not the router, whose choice an adapter would upset, embedding and head, which hold the same weight, self-conditioning, which is the
canvas pass's alone, and the vision tower. peft keeps defaults for the models that it knows in tables of its own, and offers no way to add
to them (peft 0.21); so these are a function's. Knows modules by their names alone, and no peft.
"""

import re
from typing import Any

from torch import nn

# One stack's are in `decoder.layers`; where each pass has modules of its own, the prompt pass's are in `language_model.layers`.
LINEARS = r".*\b(decoder|language_model)\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")  # stacked weights


def adapted_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that `LINEARS` means, by their names."""
    return {name: module for name, module in model.named_modules() if re.fullmatch(LINEARS, name)}


def lora_targets(model: nn.Module, experts: bool = True) -> dict[str, Any]:
    """Arguments of `peft.LoraConfig` for a model of this package in any precision: `LoraConfig(**lora_targets(model), r=8)`.

    Args:
        model: plain, in FP8 or with experts in 4 bits; or a `PeftModel` over one, which is to get another adapter.
        experts: whether to adapt these, too: in the released model 29.7 million parameters for each rank, where all else has 1.2.

    Returns:
        `target_modules`, a regular expression, and with experts `target_parameters`, a list of stacked weights.

    Raises:
        ValueError: the model has no such modules.
    """
    if not adapted_linears(model):
        raise ValueError(f"`model` is a {type(model).__name__} without layers of attention and MLP; expected a DiffusionGemma")
    return {"target_modules": LINEARS} | ({"target_parameters": list(EXPERTS)} if experts else {})


__all__ = ["EXPERTS", "LINEARS", "adapted_linears", "lora_targets"]
