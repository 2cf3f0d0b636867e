"""What this package's quantisers share: their way into transformers' `from_pretrained`, what they answer there, and stacked experts."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer


class BlockQuantizer(HfQuantizer):
    """Quantises the parameters that a module of ours lists in `WEIGHTS`; adapters can be trained on top."""

    element_size: float  # bytes of a quantised number
    serializable = True
    is_trainable = True

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.unquantizable: list[str] = []  # and why; an exception during a conversion would be swallowed

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> None:
        if self.unquantizable:
            raise ValueError(f"cannot quantise {model.name_or_path}: {'; '.join(sorted(self.unquantizable))}")

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs) -> bool:
        module, _, name = param_name.rpartition(".")
        return name in getattr(model.get_submodule(module), "WEIGHTS", ())

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        return self.element_size if self.param_needs_quantization(model, param_name) else param.element_size()

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        # dtype="auto" finds the dtype of the first weight where config.json names none
        self.dtype = torch.bfloat16 if dtype in (torch.float8_e4m3fn, torch.uint8) else dtype
        return self.dtype

    def is_serializable(self, *args, **kwargs) -> bool:
        return self.serializable


def register(config: type, quantizer: type) -> None:
    """As transformers' `register_quantization_config` and `register_quantizer`, which refuse a name they know, as that of a file of
    remote code that is read anew."""
    method = config.quant_method
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(method, None)
    auto.AUTO_QUANTIZER_MAPPING.pop(method, None)
    auto.register_quantization_config(method)(config)
    auto.register_quantizer(method)(quantizer)


def only(input_dict: dict) -> torch.Tensor:
    """The one tensor that transformers gives a conversion, in a list or not."""
    (tensor,) = input_dict.values()
    return tensor[0] if isinstance(tensor, list) else tensor


def stack_experts(experts: int, projections: list, matrix: Callable[[list, int], torch.Tensor]) -> torch.Tensor:
    """`matrix(projection, expert)`, `(rows, K)`, of all of them as `(E, rows of all projections, K)`, allocated once."""
    stacked = None
    for expert in range(experts):
        matrices = [matrix(projection, expert) for projection in projections]
        if stacked is None:
            stacked = matrices[0].new_empty(experts, sum(map(len, matrices)), *matrices[0].shape[1:])
        for place, rows in zip(stacked[expert].split([len(rows) for rows in matrices]), matrices, strict=True):
            place.copy_(rows)
    return stacked


__all__ = ["BlockQuantizer", "only", "register", "stack_experts"]
