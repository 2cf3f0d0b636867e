"""Adapters of experts: peft's wrappers for `target_parameters`, computed one expert at a time.

peft adapts a stacked weight by a parametrisation, which writes the weight with its delta out in every pass: a gigabyte a layer at the
released sizes, kept for the gradient. Where a wrapper holds plain LoRA its `forward` here hands the low-rank matrices to the experts
instead (`layers/experts.py`), to the same numbers but for rounding; where it does not, peft's `forward` runs. What lies in few bits is
never written into: merging is refused by name.

Knows peft's wrapper by what it holds (peft 0.21), and imports peft where there is one.
"""

from types import MethodType

import torch
from torch import nn

from ..layers.experts import Experts, LowRank
from ..weights.four_bit_experts import FourBitExperts
from ..weights.fp8 import FP8Experts, FP8Linear
from ..weights.fp8_math import E4M3

FEW_BITS = (FP8Linear, FP8Experts, FourBitExperts)


def why_general(wrapper: nn.Module) -> str | None:
    """What a wrapper holds, or has around it, that is more than plain LoRA of a stacked weight; None where it holds nothing else."""
    try:
        from peft.tuners.lora.layer import ParamWrapper
    except ImportError:
        return "this version of peft has no such wrapper"
    if any(getattr(type(wrapper), name, None) is not getattr(ParamWrapper, name) for name in ("forward", "get_delta_weight", "get_param")):
        return f"it is a {type(wrapper).__name__}"
    if any(wrapper.lora_bias.values()) or any(wrapper.use_dora.values()) or wrapper.lora_variant:
        return "it holds a bias, or a variant of LoRA"
    if any(type(each) is not nn.Identity for each in wrapper.lora_dropout.values()):
        return "it has a dropout"
    return None if wrapper._did_swap_in_out_features else "it takes the stacked weight to be transposed"


def has_hooks(wrapper: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "_hf_hook" in vars(wrapper) or any(getattr(wrapper, name) for name in hooks)


def low_rank(wrapper: nn.Module, like: torch.Tensor) -> LowRank | None:
    """What the active adapters of a wrapper add together, in the dtype and on the device of `like`; None where there are none, since they
    are disabled or merged. The sum of low-rank deltas is one: their matrices stand side by side."""
    if wrapper.disable_adapters or wrapper.merged:
        return None
    first, second = [], []
    for name in wrapper.active_adapters:
        if name in wrapper.lora_A:
            rows, columns = (each[name].weight.to(device=like.device, dtype=like.dtype) for each in (wrapper.lora_A, wrapper.lora_B))
            # peft's layout: of `lora_A` an expert's rows lie together, of `lora_B` the experts' columns are interleaved.
            first.append(rows.reshape(wrapper.num_experts, -1, rows.shape[1]))
            second.append(columns.reshape(len(columns), -1, wrapper.num_experts).permute(2, 0, 1) * wrapper.scaling[name])
    return LowRank(torch.cat(first, dim=1), torch.cat(second, dim=2)) if first else None


def forward(self: nn.Module, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """Stands for `forward` of the outermost wrapper around experts.

    Raises:
        ValueError: the experts are in 4 bits, and a wrapper is more than plain LoRA: there is no stacked weight that peft could adapt.
    """
    self._check_forward_args(hidden_states, *args, **kwargs)
    kwargs.pop("adapter_names", None)
    wrapper, deltas, why = self, {}, None
    while hasattr(wrapper, "parameter_name"):
        why = why or why_general(wrapper) or ("hooks look on inside of it" if wrapper is not self and has_hooks(wrapper) else None)
        why = why or ("adapters are merged and disabled" if wrapper.disable_adapters and wrapper.merged else None)
        if why is None and (delta := low_rank(wrapper, hidden_states)) is not None:
            deltas[wrapper.parameter_name] = delta
        wrapper = wrapper.base_layer
    if why is None:
        return wrapper(hidden_states, *args, deltas) if deltas else wrapper(hidden_states, *args)
    if isinstance(wrapper, FourBitExperts):
        raise ValueError(f"an adapter of experts in 4 bits cannot be computed, since {why}; expected LoRA as `lora_targets` names it")
    return type(self).forward(self, hidden_states, *args, **kwargs)


def in_few_bits(module: nn.Module) -> bool:
    """Whether a module is a wrapper around weights that nothing can be added to."""
    return hasattr(module, "get_base_layer") and isinstance(module.get_base_layer(), FEW_BITS)


def refuse_to_merge(self: nn.Module, *args, **kwargs) -> None:
    """Stands for `merge` of every adapter in a model of which some are of weights in few bits: peft would merge those before it first."""
    raise ValueError(
        "`merge_adapter` or `merge_and_unload` would write into weights in FP8 or 4 bits; expected an adapter that stays apart, or a model "
        "without `quantization_config`: load that, then the adapter, merge, and save it; then quantise what was saved"
    )


def fit(module: nn.Module, may_merge: bool = True) -> None:
    """Gives peft's wrapper around experts, or around what lies in few bits, what it needs here; leaves any other module alone. Adapters,
    which peft makes in the weights' dtype, are not left in FP8, where an adapter that is loaded would be rounded. Where it may not merge
    its `merge` refuses to.
    """
    if not hasattr(module, "get_base_layer"):
        return
    base = module.get_base_layer()
    if isinstance(base, Experts | FP8Experts) and hasattr(module, "parameter_name") and "forward" not in vars(module):
        module.forward = MethodType(forward, module)
    if not may_merge and hasattr(module, "merge"):
        module.merge = MethodType(refuse_to_merge, module)
    if isinstance(base, FP8Linear | FP8Experts):
        held = (getattr(module, name, None) for name in module.adapter_layer_names)
        for parameter in [parameter for each in held if isinstance(each, nn.Module) for parameter in each.parameters()]:
            if parameter.dtype == E4M3:
                parameter.data = parameter.data.float()


__all__ = ["fit", "forward", "in_few_bits", "low_rank"]
