"""The base class of every model class here: what transformers asks about initialisation, placement and implementations."""

import contextlib
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init

from ..layers.configuration import DiffusionGemmaConfig
from ..layers.experts import Experts, Router, experts_by
from ..weights.loading import LoadingMixin
from ..weights.stored import check_unread
from .adapters import AdapterMixin
from .divided import fit_plan


class DiffusionGemmaBlockPreTrainedModel(AdapterMixin, LoadingMixin, PreTrainedModel):
    """Knows nothing of layers or passes."""

    config: DiffusionGemmaConfig
    config_class = DiffusionGemmaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over canvas positions, whatever the number of labels
    _no_split_modules = ["BlockLayer", "Gemma4VisionEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    # transformers looks for these two in the source text of the class's own module; ours stand in other files.
    _can_set_attn_implementation = _can_set_experts_implementation = classmethod(lambda cls: True)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As in transformers; `"auto"` (`experts.choose_experts`) where nothing is requested."""
        return super().get_correct_experts_implementation("auto" if requested_experts is None else requested_experts)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        """As in transformers, without kernels that take no mask, those from the Hub included: images and padding would go unseen."""
        if any(kind in str(attn_implementation) for kind in ("flash", "paged")):
            why = "it takes no mask, and images and padding need one"
            raise ValueError(f"`attn_implementation` is {attn_implementation!r}; expected 'sdpa', 'eager' or 'flex_attention': {why}")
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh):
        """As in transformers, with plans that fit (`divided.fit_plan`)."""
        if mesh is not None:
            fit_plan(model, distributed_config)
        return super().maybe_distribute_model(model, distributed_config, mesh)

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        """As in transformers, which reports what a checkpoint lacks and has too much of. Refused are those that would be another model: of
        `stored.check_unread`; of no tensor that this one has; and of transformers' class, which ties its two stacks by
        `tie_word_embeddings`, too, and without saves two models in one."""
        second = sorted(name for name in loading_info.unexpected_keys if "encoder.language_model." in name)
        if second and not getattr(self.config, "tie_word_embeddings", True):
            held = f"the checkpoint holds a second stack for the prompt pass ({second[0]} and {len(second) - 1} more)"
            raise ValueError(f"{held}, and `tie_word_embeddings` is False in its config; expected one stack, which both passes share")
        if not getattr(self, "_hf_peft_config_loaded", False):
            check_unread(self.state_dict(), loading_info.missing_keys, loading_info.unexpected_keys)
            if all(name in loading_info.missing_keys for name, _ in self.named_parameters()):
                raise ValueError("the checkpoint holds no tensor of this model's; expected one in the released layout, or a `key_mapping`")
        super()._adjust_missing_and_unexpected_keys(loading_info)

    def reference_arithmetic(self) -> contextlib.AbstractContextManager[None]:
        """A context in which experts are computed, and rounded, as transformers' own model does it by default on this machine,
        where nothing is requested. Other threads that use the model meanwhile do not notice."""
        return experts_by(super().get_correct_experts_implementation(None))

    # Under both names that enabling it has in transformers 5.
    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs) -> None:
        """As in transformers, without the reentrant kind, which follows no tensor inside a tuple: keys and values handed on by the layers
        would lose their gradient."""
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError("`use_reentrant` is True in the checkpointing arguments; expected False: it drops gradients here")
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "layer_scalar"):
            init.ones_(module.layer_scalar)
        elif isinstance(module, Router):
            init.ones_(module.scale)
            init.ones_(module.per_expert_scale)
        elif isinstance(module, Experts):
            for weight in module.parameters(recurse=False):  # not by their names, behind which weights may be made at every use
                init.normal_(weight, mean=0.0, std=self.config.initializer_range)


__all__ = ["DiffusionGemmaBlockPreTrainedModel"]
