"""TRL's fused head: a `forward` that its trainers put on a model, which takes the model's base for a causal one.

In TRL 1.16 (`add_fused_lm_head`) SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer and RLOOTrainer call the base with a prompt, shift its
states by one token, and multiply them with the head. The base of this model is a prompt pass and a canvas pass: its states are those of
a canvas of noise, and where rows are as long as a canvas nothing in TRL notices.
"""

import inspect

from torch import nn

ARGUMENT = "fused_lm_head"  # by which TRL's `forward` is told
INNER = "_original_forward"  # where Accelerate's mixed precision keeps the `forward` that it calls


def has_fused_head(model: nn.Module) -> bool:
    """Whether TRL's `forward` stands in front of the model's."""
    found = (vars(model).get(name) for name in ("forward", INNER))
    return any(ARGUMENT in inspect.signature(each, follow_wrapped=False).parameters for each in found if each is not None)


def take_off(model: nn.Module) -> None:
    """Before anything wraps it: the model's `forward` is its class's again, which training and generation here call."""
    if has_fused_head(model):
        del model.forward


def refuse_fused_head(model: nn.Module) -> None:
    """Raises ValueError where TRL's `forward` stands in front of the model's, and asks for its base."""
    if has_fused_head(model):
        raise ValueError(
            "`forward` of the model is TRL's fused head, which reads next-token states from the model's base; here they are a canvas's, of "
            "noise. Expected, of TRL's trainers, SFTTrainer with `BlockDiffusionTraining` (`training.trainer`) in front: "
            "`class Training(BlockDiffusionTraining, SFTTrainer): pass`"
        )


__all__ = ["refuse_fused_head", "take_off"]
