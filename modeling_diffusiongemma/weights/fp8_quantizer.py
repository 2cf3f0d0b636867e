"""FP8 in transformers' `from_pretrained` and `save_pretrained`: reads the published FP8 layout, quantises any other checkpoint
on the way in, and writes the published layout.

The quantiser is registered with transformers under this file's name, so that compressed-tensors, which claims the published
`quant_method`, stays in charge of every other model. Our model classes swap the names while they load (`loading.py`);
config.json always has the published one.
"""

import copy

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..layers.experts import Experts
from .fp8 import FP8Experts, FP8Linear, scale_name
from .fp8_apart import MatricesApart
from .fp8_layout import PROJECTIONS, check_files, check_quantization, default_ignore, fp8_modules, make_fp8, published_quantization
from .fp8_math import E4M3, quantize_weight
from .registry import BlockQuantizer, only, register, stack_experts


class FP8Config(QuantizationConfigMixin):
    """FP8 weights (e4m3, one scale an output channel) and activations (e4m3, one scale a token), for
    `from_pretrained(..., quantization_config=FP8Config())` on a checkpoint in bfloat16 or float32. A checkpoint that is FP8
    already needs no argument.

    Args:
        ignore: names of linear layers to leave alone, as the released model has them (`"model.decoder.layers.0.mlp.up_proj"`;
            one expert: `"model.decoder.layers.0.experts.7.up_proj"`), or regular expressions behind `re:`. They replace the
            default, which is that of the published copy: all but attention, dense MLP and experts. ValueError: no list of strings.
    """

    quant_method = f"{__name__}"  # a copy of this file that came as remote code registers under its own name

    def __init__(self, ignore: list[str] | None = None):
        if ignore is not None and (not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore)):
            raise ValueError(f"`ignore` is {ignore!r}; expected a list of module names, or None")
        self.ignore = ignore

    @classmethod
    def from_dict(cls, config_dict: dict, *args, **kwargs):
        """From the `quantization_config` of a config.json; ValueError where that is not the published scheme."""
        check_quantization(config_dict)
        return super().from_dict({"ignore": config_dict["ignore"]}, *args, **kwargs)

    def to_dict(self) -> dict:
        """The `quantization_config` of a config.json, in the published words; without `ignore` while that is the default."""
        words = published_quantization(self.ignore or [])
        return {name: value for name, value in words.items() if name != "ignore" or self.ignore is not None}

    @classmethod
    def from_argument(cls, given: dict) -> "FP8Config":
        """From what `to_dict` gave, as an argument of `from_pretrained`; ValueError where that is not the published scheme."""
        check_quantization({"ignore": [], **given})
        return cls(given.get("ignore"))

    def __iter__(self):
        yield from self.to_dict().items()


class StoredExperts(ConversionOps):
    """Experts stored one by one, `(rows, K)` each, into a stacked tensor `(E, rows of all parts, K)`; scales become float32, which the
    scaled products take. `apart`: weights become `MatricesApart`. `storing`: backwards, without copying weights."""

    def __init__(self, parts: int, scales: bool, apart: bool = False, storing: bool = False):
        self.parts, self.scales, self.apart, self.storing = parts, scales, apart, storing

    @torch.no_grad()
    def convert(self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], **kwargs) -> dict:
        if self.storing:
            stacked = only(input_dict)
            experts = stacked.experts if isinstance(stacked, MatricesApart) else [one.chunk(self.parts) for one in stacked]
            return {
                pattern.replace("*", str(expert)): stored_scale(rows) if self.scales else separately_stored(rows)
                for expert, matrices in enumerate(experts)
                for pattern, rows in zip(target_patterns, matrices, strict=True)
            }

        def matrix(part, expert):  # each is freed: the stack and its parts are never there twice
            rows, part[expert] = part[expert], None
            return rows.float() if self.scales else rows

        parts = [input_dict.pop(pattern) for pattern in source_patterns]
        if self.apart and all(type(matrix) is torch.Tensor and matrix.device.type == "cpu" for part in parts for matrix in part):
            return {target_patterns[0]: MatricesApart([list(matrices) for matrices in zip(*parts, strict=True)])}
        return {target_patterns[0]: stack_experts(len(parts[0]), parts, matrix)}

    @property
    def reverse_op(self) -> ConversionOps:
        return StoredExperts(self.parts, self.scales, self.apart, not self.storing)


class ConvertScale(ConversionOps):
    """A linear layer's scales: float32 in the model, bfloat16 in a file."""

    def __init__(self, storing: bool = False):
        self.storing = storing

    def convert(self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], **kwargs) -> dict:
        scale = only(input_dict)
        return {target_patterns[0]: stored_scale(scale) if self.storing else scale.float()}

    @property
    def reverse_op(self) -> ConversionOps:
        return ConvertScale(not self.storing)


def stored_scale(scale: torch.Tensor) -> torch.Tensor:
    """In bfloat16, as published, unless another producer's scales would change by it."""
    rounded = scale.to(torch.bfloat16)
    return rounded if torch.equal(rounded.float(), scale) else scale.clone()


def separately_stored(view: torch.Tensor) -> torch.Tensor:
    """The same memory behind a storage of its own: shards are cut by storages, and all experts of a layer would count as one."""
    return torch.from_dlpack(view.view(torch.uint8)).view(view.dtype)


def conversions(apart: bool = False) -> list[WeightConverter]:
    """From the stored names to the model's; with `apart` experts' weights become `MatricesApart`."""
    converters = []
    for stacked, parts in PROJECTIONS.items():
        # Scales first: for transformers before 5.23 their names match the weights' patterns too.
        for suffix, target in (("weight_scale", scale_name(f"experts.{stacked}")), ("weight", f"experts.{stacked}")):
            sources, is_scale = [f"experts.*.{part}.{suffix}" for part in parts], suffix == "weight_scale"
            converters.append(WeightConverter(sources, target, [StoredExperts(len(parts), is_scale, apart and not is_scale)]))
    return [*converters, WeightConverter("weight_scale", "weight_scale", [ConvertScale()])]


class QuantizeWeight(ConversionOps):
    """A weight as a checkpoint has it into e4m3 and scales, on the device it is for."""

    def __init__(self, quantizer: "FP8Quantizer"):
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict, full_layer_name: str, **kwargs) -> dict:
        weight = only(input_dict)
        expected = kwargs["model"].get_parameter(full_layer_name).shape
        if weight.shape != expected:
            self.quantizer.unquantizable.append(f"{full_layer_name} has shape {tuple(weight.shape)}, expected {tuple(expected)}")
        quantized, scale = quantize_weight(weight)
        if not scale.isfinite().all():
            self.quantizer.unquantizable.append(f"{full_layer_name} holds NaN or infinity, expected finite numbers")
        return {full_layer_name: quantized, scale_name(full_layer_name): scale}


class FP8Quantizer(BlockQuantizer):
    """What transformers asks of a quantiser while loading and saving; the work is in `fp8_layout` and `fp8_math`."""

    quantization_config: FP8Config
    element_size = 1
    is_compileable = True
    apart = False  # experts stay in the checkpoint's files

    def _process_model_before_weight_loading(self, model: nn.Module, device_map=None, checkpoint_files=None, **kwargs) -> None:
        if not any(isinstance(module, Experts) for module in model.modules()):
            raise ValueError(f"`quantization_config` is FP8Config and the model {type(model).__name__}; expected a DiffusionGemma")
        if self.quantization_config.ignore is None:
            self.quantization_config.ignore = default_ignore(model)
        # Until it is quantised a weight keeps the dtype it is loaded in, or it would be cast to e4m3 without a scale.
        places = device_map.values() if isinstance(device_map, dict) else [device_map or "cpu"]
        self.apart = self.pre_quantized and all(str(place) == "cpu" for place in places)
        make_fp8(model, self.quantization_config.ignore, E4M3 if self.pre_quantized else model.config.dtype, self.apart)
        if self.pre_quantized and checkpoint_files:
            check_files(model, checkpoint_files)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> None:
        super()._process_model_after_weight_loading(model)
        for module in model.modules():
            if isinstance(module, Experts):  # left alone by the copy: read as a whole, which matrices apart are not for
                for name, weight in module._parameters.items():
                    if isinstance(weight, MatricesApart):
                        module._parameters[name] = nn.Parameter(weight.stacked())
        for name, module in fp8_modules(model).items():
            for weight in module.WEIGHTS:
                if module._parameters[weight].dtype != E4M3 and not module._parameters[weight].is_meta:
                    raise ValueError(f"the checkpoint has no {name}.{weight}; expected one: FP8 weights are not made up")
            module.requires_grad_(False)
        if not self.pre_quantized:
            model._weight_conversions = [*model._weight_conversions, *conversions()]

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeWeight(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        return conversions(self.apart) if self.pre_quantized else []

    def _dequantize(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        made: dict[int, nn.Module] = {}  # by the parameters, which a module and its twin share
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if not isinstance(module, FP8Linear | FP8Experts):
                continue
            if (plain := made.get(id(module._parameters))) is not None:
                plain = copy.copy(plain)  # which holds the same dictionary of parameters
            elif isinstance(module, FP8Linear):
                plain = made[id(module._parameters)] = module.dequantized(dtype)
            else:
                with torch.device("meta"):
                    like = Experts(model.config.get_text_config())
                plain = made[id(module._parameters)] = module.dequantized(dtype, like)
            model.set_submodule(name, plain.train(module.training))
        model._weight_conversions = []
        return model


register(FP8Config, FP8Quantizer)


__all__ = ["FP8Config", "FP8Quantizer"]
