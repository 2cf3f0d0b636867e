"""NVFP4 checkpoints, read as bfloat16: every matrix is dequantised while it is loaded, expert by expert.

NVFP4: 4-bit floating-point numbers (1, 2, 1 bits of sign, exponent, mantissa), two a byte with the first in the low half, an e4m3
scale for every 16 of a row, and a float32 scale for the matrix. Two producers store it under different names:

| | numbers | scales of 16 | scale of the matrix | value |
|---|---|---|---|---|
| compressed-tensors, `nvfp4-pack-quantized` | `weight_packed` | `weight_scale` | `weight_global_scale` | code * scale / global |
| NVIDIA ModelOpt, `quant_algo: NVFP4` | `weight` | `weight_scale` | `weight_scale_2` | code * scale * global |

The scales of activations that both store are not used: activations stay in the model's dtype. What is loaded is a plain model; it
saves as one. Registered like `fp8_quantizer`, under a name of its own.
"""

import os

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..layers.experts import Experts
from .fp8_layout import PROJECTIONS, expert_shapes, prefix_of
from .fp8_numbers import widen
from .registry import BlockQuantizer, register, stack_experts
from .safetensors_files import published_tensors, read_tensors

GROUP = 16  # numbers a scale
CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the three low bits
NAMES = {  # of a matrix, its scales and its global scale, by producer
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_global_scale"),
    "modelopt": ("weight", "weight_scale", "weight_scale_2"),
}
UNUSED = (r"input_global_scale$", r"input_scale$", r"k_scale$", r"v_scale$")


def dequantize_nvfp4(packed: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`code * scale * global_scale`, in `dtype`; the products are taken in float32.

    Args: uint8 `(rows, K / 2)`, e4m3 `(rows, K / 16)`, float32 `()`. Returns `(rows, K)`.
    """
    table = torch.tensor([*CODES, *(-code for code in CODES)], dtype=torch.float32, device=packed.device)
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)  # (rows, K)
    scales = (widen(scale, torch.float32) * global_scale.float().reshape(())).repeat_interleave(GROUP, dim=-1)
    return (table[codes.int()] * scales).to(dtype)


class StoredNVFP4Config(QuantizationConfigMixin):
    """How an NVFP4 checkpoint is stored, by `producer`; made from its config.json. transformers' `NVFP4Config` asks for a plain one to
    become NVFP4."""

    quant_method = f"{__name__}"
    dequantize = True  # for transformers: what is loaded is not quantised

    def __init__(self, producer: str):
        if producer not in NAMES:
            raise ValueError(f"`producer` is {producer!r}; expected one of {sorted(NAMES)}")
        self.producer = producer

    @classmethod
    def from_dict(cls, config_dict: dict, *args, **kwargs):
        """From the `quantization_config` of a config.json; ValueError where that is not NVFP4."""
        if "format" in config_dict and "quant_algo" not in config_dict:
            if config_dict["format"] != "nvfp4-pack-quantized":
                raise ValueError(f"`quantization_config['format']` is {config_dict['format']!r}; expected 'nvfp4-pack-quantized'")
            for name, group in (config_dict.get("config_groups") or {}).items():
                weights = group.get("weights") or {}
                if (weights.get("num_bits"), weights.get("type"), weights.get("group_size")) != (4, "float", GROUP):
                    place = f"`quantization_config['config_groups'][{name!r}]['weights']`"
                    raise ValueError(f"{place} is {weights}; expected 4-bit float in groups of {GROUP}")
            producer = "compressed-tensors"
        else:
            algorithm = config_dict.get("quant_algo", (config_dict.get("quantization") or {}).get("quant_algo"))
            if algorithm != "NVFP4":
                raise ValueError(f"`quantization_config['quant_algo']` is {algorithm!r}; expected 'NVFP4'")
            producer = "modelopt"
        return super().from_dict({"producer": producer}, *args, **kwargs)


class DequantizeNVFP4(ConversionOps):
    """Global scales, scales and packed matrices (in this order of `source_patterns`) into one plain matrix, or those of all
    experts into a stacked one. A matrix that comes without scales is passed on."""

    def __init__(self, producer: str, dtype: torch.dtype):
        self.producer, self.dtype = producer, dtype

    @torch.no_grad()
    def convert(self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], **kwargs) -> dict:
        parts = [source_patterns[first : first + 3] for first in range(0, len(source_patterns), 3)]
        parts = [[input_dict.pop(pattern, None) for pattern in reversed(part)] for part in parts]
        if target_patterns[0].startswith("experts."):
            return {target_patterns[0]: stack_experts(len(parts[0][0]), parts, self.matrix)}
        return {target_patterns[0]: self.matrix(parts[0], 0)}

    def matrix(self, part: list[list[torch.Tensor] | None], expert: int) -> torch.Tensor:
        numbers, scale, global_scale = (tensors and tensors[expert] for tensors in part)
        if scale is None:
            return numbers.to(self.dtype)
        if self.producer == "compressed-tensors":
            global_scale = 1 / global_scale.float()
        return dequantize_nvfp4(numbers, scale, global_scale, self.dtype)


def check_nvfp4_files(model: nn.Module, files: list[str | os.PathLike], producer: str) -> None:
    """Checks an NVFP4 checkpoint before anything of it is loaded: every matrix of the model there, packed ones with scales.

    Raises:
        OSError: a file is damaged or half-written.
        ValueError: a matrix or a scale is missing, of the wrong type or shape, NaN, infinite or no positive number; names tensor and file.
    """
    prefix, (numbers, block, matrix) = prefix_of(model), NAMES[producer]
    stored, shapes, scales = published_tensors(files), {}, {}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            for projection in PROJECTIONS:
                if f"{prefix}{name}.{projection}" not in stored:
                    shapes |= expert_shapes(prefix + name, projection, getattr(module, projection).shape)
        elif isinstance(module, nn.Linear) and prefix + name != "lm_head":
            shapes[prefix + name] = tuple(module.weight.shape)
    for name, (rows, columns) in shapes.items():
        packed = stored.get(f"{name}.{numbers}")
        if packed is None or packed.dtype != "U8":
            if f"{name}.weight" not in stored:
                raise ValueError(f"none of {len(files)} files holds {name}.{numbers} or {name}.weight; expected every matrix of the model")
            continue
        expected = {numbers: ("U8", (rows, columns // 2)), block: ("F8_E4M3", (rows, columns // GROUP)), matrix: ("F32", None)}
        for suffix, (dtype, shape) in expected.items():
            entry = stored.get(f"{name}.{suffix}")
            if entry is None:
                raise ValueError(f"{packed.file} holds {name}.{numbers} without {name}.{suffix}; expected both scales of each matrix")
            if entry.dtype != dtype or entry.shape not in ([(), (1,)] if shape is None else [shape]):
                raise ValueError(f"{name}.{suffix} in {entry.file} is {entry.dtype} {entry.shape}; expected {dtype} {shape or '()'}")
        scales |= {f"{name}.{suffix}": stored[f"{name}.{suffix}"] for suffix in (matrix, block)}
    for name, scale in read_tensors(scales):
        scale = scale.float()
        if not (scale.isfinite().all() and (scale >= 0 if name.endswith(block) else scale > 0).all()):
            held = scale.flatten().tolist()[:4]
            raise ValueError(f"{name} in {stored[name].file} holds {held}...; expected positive finite scales")


class NVFP4Quantizer(BlockQuantizer):
    """What transformers asks of a quantiser while loading; nothing is left of it afterwards."""

    quantization_config: StoredNVFP4Config

    def get_new_dtype(self, converter, param, dtype: torch.dtype | None) -> torch.dtype | None:
        # A matrix's float32 scale must not be rounded on its way in.
        return None if isinstance(converter, WeightConverter) else super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files=None, **kwargs) -> None:
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *UNUSED}
        if checkpoint_files:
            check_nvfp4_files(model, checkpoint_files, self.quantization_config.producer)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> None:
        model._weight_conversions = []  # saved as what it is now

    def get_weight_conversions(self) -> list[WeightConverter]:
        producer = self.quantization_config.producer
        # Longest first: transformers before 5.23 takes the first pattern that a name begins with.
        names = NAMES[producer][::-1]
        experts = ((f"experts.{stacked}", [f"experts.*.{part}." for part in parts]) for stacked, parts in PROJECTIONS.items())
        return [
            WeightConverter([start + name for start in starts for name in names], target, [DequantizeNVFP4(producer, self.dtype)])
            for target, starts in (*experts, (".weight", ["."]))
        ]


register(StoredNVFP4Config, NVFP4Quantizer)


__all__ = ["NVFP4Quantizer", "StoredNVFP4Config", "check_nvfp4_files", "dequantize_nvfp4"]
