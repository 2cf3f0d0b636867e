"""FP8 in transformers' `from_pretrained` and `save_pretrained`: reads the published FP8 layout, quantises any other checkpoint
on the way in, and writes the published layout.

The quantiser is registered with transformers under this file's name, so that compressed-tensors, which claims the published
`quant_method`, stays in charge of every other model. Our model classes swap the names while they load (`loading.py`);
config.json always has the published one.
"""

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .experts import Experts
from .fp8 import FP8Experts, FP8Linear, scale_name
from .fp8_layout import (
    PROJECTIONS,
    check_files,
    check_quantization,
    default_ignore,
    fp8_modules,
    make_fp8,
    prefix_of,
    published_quantization,
)
from .fp8_math import E4M3, quantize_weight
from .quantizer_registry import register

METHOD = f"{__name__}"  # a copy of this file that came as remote code registers under its own name


class FP8Config(QuantizationConfigMixin):
    """FP8 weights (e4m3, one scale an output channel) and activations (e4m3, one scale a token), for
    `from_pretrained(..., quantization_config=FP8Config())` on a checkpoint in bfloat16 or float32. A checkpoint that is FP8
    already needs no argument.

    Args:
        ignore: names of linear layers to leave alone, as the released model has them (`"model.decoder.layers.0.mlp.up_proj"`;
            one expert: `"model.decoder.layers.0.experts.7.up_proj"`), or regular expressions behind `re:`. They replace the
            default, which is that of the published copy: all but attention, dense MLP and experts.

    Raises:
        ValueError: `ignore` is no list of strings.
    """

    quant_method = METHOD

    def __init__(self, ignore: list[str] | None = None):
        if ignore is not None and (not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore)):
            raise ValueError(f"`ignore` is {ignore!r}; expected a list of module names, or None")
        self.ignore = ignore

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs):
        """From the `quantization_config` of a config.json.

        Raises:
            ValueError: it is not the published scheme.
        """
        check_quantization(config_dict)
        config = cls(config_dict["ignore"])
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict:
        """The `quantization_config` of a config.json, in the published words; without `ignore` while that is the default."""
        quantization = published_quantization(self.ignore or [])
        if self.ignore is None:
            del quantization["ignore"]
        return quantization

    @classmethod
    def from_argument(cls, given: dict) -> "FP8Config":
        """From what `to_dict` gave, as an argument of `from_pretrained`.

        Raises:
            ValueError: it is not the published scheme.
        """
        check_quantization({"ignore": [], **given})
        return cls(given.get("ignore"))

    def __iter__(self):
        yield from self.to_dict().items()


class MergeExperts(ConversionOps):
    """Experts stored one by one, `(rows, K)` each, into a stacked tensor `(E, rows of all parts, K)`, allocated once.

    Scales become float32, which the scaled products take.
    """

    def __init__(self, parts: int, scales: bool):
        self.parts, self.scales = parts, scales

    @torch.no_grad()
    def convert(self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], **kwargs) -> dict:
        parts = [input_dict.pop(pattern) for pattern in source_patterns]
        rows = [part[0].shape[0] for part in parts]
        first = parts[0][0]
        dtype = torch.float32 if self.scales else first.dtype
        stacked = torch.empty(len(parts[0]), sum(rows), *first.shape[1:], dtype=dtype, device=first.device)
        start = 0
        for part, height in zip(parts, rows, strict=True):
            for expert in range(len(part)):
                stacked[expert, start : start + height] = part[expert]
                part[expert] = None  # freed one by one: the stack and its parts are never there twice
            start += height
        return {target_patterns[0]: stacked}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitExperts(self.parts, self.scales)


class SplitExperts(ConversionOps):
    """`MergeExperts` backwards, without copying weights."""

    def __init__(self, parts: int, scales: bool):
        self.parts, self.scales = parts, scales

    @torch.no_grad()
    def convert(self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], **kwargs) -> dict:
        (stacked,) = next(iter(input_dict.values()))
        return {
            pattern.replace("*", str(expert)): stored_scale(rows) if self.scales else separately_stored(rows)
            for expert, one in enumerate(stacked)
            for pattern, rows in zip(target_patterns, one.chunk(self.parts), strict=True)
        }

    @property
    def reverse_op(self) -> ConversionOps:
        return MergeExperts(self.parts, self.scales)


class LoadScale(ConversionOps):
    """A linear layer's scales: float32 in the model."""

    def convert(self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], **kwargs) -> dict:
        (scale,) = next(iter(input_dict.values()))
        return {target_patterns[0]: scale.float()}

    @property
    def reverse_op(self) -> ConversionOps:
        return StoreScale()


class StoreScale(ConversionOps):
    """A linear layer's scales: bfloat16 in a file."""

    def convert(self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], **kwargs) -> dict:
        (scale,) = next(iter(input_dict.values()))
        return {target_patterns[0]: stored_scale(scale)}

    @property
    def reverse_op(self) -> ConversionOps:
        return LoadScale()


def stored_scale(scale: torch.Tensor) -> torch.Tensor:
    """In bfloat16, as published, unless another producer's scales would change by it."""
    rounded = scale.to(torch.bfloat16)
    return rounded if torch.equal(rounded.float(), scale) else scale.clone()


def separately_stored(view: torch.Tensor) -> torch.Tensor:
    """The same memory behind a storage of its own: shards are cut by storages, and all experts of a layer would count as one."""
    return torch.from_dlpack(view.view(torch.uint8)).view(view.dtype)


def conversions() -> list[WeightConverter]:
    """From the stored names to the model's."""
    converters = []
    for stacked, parts in PROJECTIONS.items():
        # Scales first: for transformers before 5.23 their names match the weights' patterns too.
        for suffix, target in (("weight_scale", scale_name(f"experts.{stacked}")), ("weight", f"experts.{stacked}")):
            sources = [f"experts.*.{part}.{suffix}" for part in parts]
            converters.append(WeightConverter(sources, target, [MergeExperts(len(parts), suffix == "weight_scale")]))
    return [*converters, WeightConverter("weight_scale", "weight_scale", [LoadScale()])]


class QuantizeWeight(ConversionOps):
    """A weight as a checkpoint has it into e4m3 and scales, on the device it is for."""

    def __init__(self, quantizer: "FP8Quantizer"):
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict, full_layer_name: str, **kwargs) -> dict:
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        expected = kwargs["model"].get_parameter(full_layer_name).shape
        if weight.shape != expected:
            self.quantizer.unquantizable.append(f"{full_layer_name} has shape {tuple(weight.shape)}, expected {tuple(expected)}")
        quantized, scale = quantize_weight(weight)
        if not scale.isfinite().all():
            self.quantizer.unquantizable.append(f"{full_layer_name} holds NaN or infinity, expected finite numbers")
        return {full_layer_name: quantized, scale_name(full_layer_name): scale}


class FP8Quantizer(HfQuantizer):
    """What transformers asks of a quantiser while loading and saving; the work is in `fp8_layout` and `fp8_math`."""

    requires_calibration = False
    quantization_config: FP8Config

    def __init__(self, quantization_config: FP8Config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.unquantizable: list[str] = []  # and why; an exception during a conversion would be swallowed

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        # dtype="auto" finds the dtype of the first weight in a config.json that names none
        return torch.bfloat16 if dtype == E4M3 else dtype

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs) -> bool:
        module, _, name = param_name.rpartition(".")
        owner = model.get_submodule(module)
        return (isinstance(owner, FP8Linear) and name == "weight") or (isinstance(owner, FP8Experts) and name in PROJECTIONS)

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        return 1 if self.param_needs_quantization(model, param_name) else param.element_size()

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files=None, **kwargs) -> None:
        if not any(isinstance(module, Experts) for module in model.modules()):
            raise ValueError(f"`quantization_config` is FP8Config and the model {type(model).__name__}; expected a DiffusionGemma")
        if self.quantization_config.ignore is None:
            self.quantization_config.ignore = default_ignore(model)
        # Until it is quantised a weight keeps the dtype it is loaded in, or it would be cast to e4m3 without a scale.
        make_fp8(model, self.quantization_config.ignore, E4M3 if self.pre_quantized else model.config.dtype)
        if self.pre_quantized and checkpoint_files:
            check_files(model, checkpoint_files)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> None:
        if self.unquantizable:
            raise ValueError(f"cannot quantise {model.name_or_path}: {'; '.join(sorted(self.unquantizable))}")
        for name, module in fp8_modules(model).items():
            for projection in PROJECTIONS if isinstance(module, FP8Experts) else ("weight",):
                weight = getattr(module, projection)
                if weight.dtype != E4M3 and not weight.is_meta:
                    raise ValueError(f"the checkpoint has no {name}.{projection}; expected one: FP8 weights are not made up")
            module.requires_grad_(False)
        if not self.pre_quantized:
            model._weight_conversions = [*model._weight_conversions, *conversions()]

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeWeight(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        return conversions() if self.pre_quantized else []

    def _dequantize(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        prefix = prefix_of(model)
        for name, module in fp8_modules(model).items():
            if isinstance(module, FP8Linear):
                plain = module.dequantized(dtype)
            else:
                with torch.device("meta"):
                    plain = module.dequantized(dtype, Experts(model.config.get_text_config()))
            model.set_submodule(name.removeprefix(prefix), plain.train(module.training))
        model._weight_conversions = []
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top

    @property
    def is_compileable(self) -> bool:
        return True


register(METHOD, FP8Config, FP8Quantizer)


__all__ = ["METHOD", "FP8Config", "FP8Quantizer"]
