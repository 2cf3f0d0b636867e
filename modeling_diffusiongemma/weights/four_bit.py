"""Experts in 4 bits in transformers' `from_pretrained` and `save_pretrained`: quantised on the way in, from a checkpoint in bfloat16 or
float32 or from an FP8 copy, expert by expert; saved, and loaded again, as they are.

Saved, a layer's experts are `experts.gate_up_proj`, uint8 `(bytes, 1)`, two numbers a byte with the first in the high half, and
`experts.gate_up_scale`, float32 `(blocks,)`, a scale for each block of the stacked numbers; and the same of `down`. config.json says
`{"quant_method": "diffusiongemma-nf4", "block_size": 64}`. No other runtime reads this. The names are those of the plain model because
transformers passes over a method that it does not know, with a warning, and would make up experts of which it finds none; these are none of
the shapes that it expects, which it refuses.

Registered with transformers like `fp8_quantizer`, under this file's name. What the modules compute: `four_bit_experts`.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..layers.experts import Experts
from .four_bit_experts import BLOCK_SIZES, PACKED, FourBitExperts, kernels
from .fp8_layout import PROJECTIONS, check_files, make_fp8, prefix_of
from .fp8_math import dequantize
from .fp8_quantizer import FP8Config
from .registry import BlockQuantizer, only, register
from .safetensors_files import published_tensors

PUBLISHED = "diffusiongemma-nf4"  # `quant_method` of a config.json
STORED = {name: stored for weight, packed in PACKED.items() for name, stored in (  # in a file, of what the model calls otherwise
    (packed, weight), (f"{packed}_scale", f"{weight.removesuffix('_proj')}_scale"),
)}  # fmt: skip


class FourBitConfig(QuantizationConfigMixin):
    """Experts in NF4, for `from_pretrained(..., quantization_config=FourBitConfig())` on a checkpoint in bfloat16, float32 or FP8, of which
    all else that is in FP8 is dequantised. A checkpoint that is in 4 bits already needs no argument. Needs bitsandbytes.

    Args:
        block_size: numbers that share a float32 scale (64: QLoRA's), one of `BLOCK_SIZES`, which are bitsandbytes', or ValueError. An
            expert's weight takes 0.5 + 4 / block_size bytes.
    """

    quant_method = f"{__name__}"
    stored: FP8Config | None = None  # how the checkpoint is quantised that these are loaded from, where it is not in 4 bits

    def __init__(self, block_size: int = 64):
        if block_size not in BLOCK_SIZES:
            raise ValueError(f"`block_size` is {block_size!r}; expected one of {BLOCK_SIZES}")
        self.block_size = block_size

    @classmethod
    def from_dict(cls, config_dict: dict, *args, **kwargs):
        """From the `quantization_config` of a config.json, or of `in_four_bits`; ValueError where that is not this layout, or not FP8."""
        if "block_size" not in config_dict:
            raise ValueError(f"`quantization_config` is {config_dict}; expected a 'block_size', one of {BLOCK_SIZES}")
        found = super().from_dict({"block_size": config_dict["block_size"]}, *args, **kwargs)
        if "stored" in config_dict:
            (found[0] if isinstance(found, tuple) else found).stored = FP8Config.from_dict(config_dict["stored"])
        return found

    def to_dict(self) -> dict:
        """The `quantization_config` of a config.json."""
        return {"quant_method": PUBLISHED, "block_size": self.block_size}


def in_four_bits(stored: dict, asked: object) -> dict | None:
    """What transformers is to take for the `quantization_config` of a checkpoint, to load it in 4 bits; None where that is not wanted.

    Args:
        stored: the checkpoint's.
        asked: the argument of `from_pretrained`.

    Raises:
        ValueError: the checkpoint is in 4 bits, and something else is asked for, another block size too; or it is quantised in a way
            from which 4 bits, which are asked for, are not made.
    """
    method, size = stored.get("quant_method"), getattr(asked, "block_size", None)
    if method == PUBLISHED:
        if asked is not None and not (isinstance(asked, FourBitConfig) and size == stored.get("block_size")):
            what = f"FourBitConfig of `block_size` {size}" if isinstance(asked, FourBitConfig) else type(asked).__name__
            found = f"the checkpoint's experts are in 4 bits already, in blocks of {stored.get('block_size')}"
            raise ValueError(f"`quantization_config` is {what}, and {found}; expected none")
        return stored | {"quant_method": FourBitConfig.quant_method}
    if not isinstance(asked, FourBitConfig):
        return None
    if method == "compressed-tensors" and not str(stored.get("format")).startswith("nvfp4"):
        return {"quant_method": FourBitConfig.quant_method, "block_size": size, "stored": stored}
    how = "load it without, and save it as a plain model first"
    raise ValueError(f"`quantization_config` is FourBitConfig, and the checkpoint is quantised by {method!r}; expected none, or FP8: {how}")


class Telling(ConversionOps):
    """A conversion that tells its quantiser what is wrong."""

    def __init__(self, quantizer: "FourBitQuantizer"):
        self.quantizer = quantizer

    def __deepcopy__(self, memo: dict) -> "Telling":  # transformers copies conversions for every tensor; there is one quantiser
        return self


class PackExperts(Telling):
    """A layer's stacked weight into its packed numbers and their scales, on the device it is for."""

    def convert(self, input_dict: dict, full_layer_name: str, model: nn.Module, **kwargs) -> dict:
        weight = only(input_dict)
        return self.quantizer.packed(model, full_layer_name, weight, [tuple(weight.shape)], 0)


class PassOn(ConversionOps):
    """What has been packed. Where weights go to disk transformers writes what a converter made, and takes for all else the checkpoint's."""

    def convert(self, input_dict: dict, **kwargs) -> dict:
        return input_dict


class PackStoredExperts(Telling):
    """A layer's matrices, stored one by one, with their scales or without, into the packed numbers and scales of the stacked weight."""

    def convert(self, input_dict: dict, source_patterns: list[str], full_layer_name: str, model: nn.Module, **kwargs) -> dict:
        stored = [input_dict.pop(pattern, None) for pattern in source_patterns]

        def matrices() -> Iterator[torch.Tensor]:  # each is freed when the next one comes
            for expert in range(len(stored[1])):
                for scales, weights in zip(stored[::2], stored[1::2], strict=True):
                    yield plain(weights[expert], None if scales is None else scales[expert], self.quantizer.dtype)
                    weights[expert] = None

        shapes = [tuple(weight.shape) for weights in stored[1::2] for weight in weights or ()]
        return self.quantizer.packed(model, full_layer_name, matrices(), shapes, len(stored) // 2)


class DequantizeFP8(Telling):
    """A linear layer's FP8 weight, with its scales, into a plain one; whatever has no scales is passed on."""

    def convert(self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], **kwargs) -> dict:
        scale, weight = (only({pattern: input_dict[pattern]}) if pattern in input_dict else None for pattern in source_patterns)
        return {target_patterns[0]: plain(weight, scale, self.quantizer.dtype)}


def plain(weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) if scale is None else dequantize(weight, scale.float(), dtype)


def check_packed_files(model: nn.Module, files: list[str | os.PathLike]) -> None:
    """Checks a checkpoint in 4 bits, of a `model` whose `FourBitExperts` stand in place, before anything of it is loaded.

    Raises:
        OSError: a file is damaged or half-written.
        ValueError: packed numbers or scales are missing, or of another type or shape, as those of another block size are; names tensor
            and file.
    """
    stored, prefix = published_tensors(files), prefix_of(model)
    for layer, module in four_bit_modules(model).items():
        for name, packed in PACKED.items():
            size, blocks = module.sizes(name)
            for tensor, expected in ((packed, ("U8", (size, 1))), (f"{packed}_scale", ("F32", (blocks,)))):
                place = f"{prefix}{layer}.{STORED[tensor]}"
                # Under the model's name where `save_original_format=False` had them saved.
                entry = stored.get(place, stored.get(f"{prefix}{layer}.{tensor}"))
                if entry is None:
                    raise ValueError(f"none of {len(files)} files holds {place}; expected all experts in 4 bits")
                if (entry.dtype, entry.shape) != expected:
                    what = f"{entry.name} in {entry.file} is {entry.dtype} {entry.shape}"
                    raise ValueError(f"{what}; expected {expected[0]} {expected[1]}, in blocks of {module.block_size} (`block_size`)")


def renamings() -> list[WeightRenaming]:
    """From the stored names to the model's."""
    # Scales last, and so first where this is reversed: for transformers before 5.23 their names match the numbers' patterns too.
    ordered = sorted(STORED.items(), key=lambda names: names[0].endswith("_scale"))
    return [WeightRenaming(f"experts.{stored}", f"experts.{name}") for name, stored in ordered]


def four_bit_modules(model: nn.Module) -> dict[str, FourBitExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FourBitExperts)}


class FourBitQuantizer(BlockQuantizer):
    """What transformers asks of a quantiser while loading and saving."""

    quantization_config: FourBitConfig
    element_size = 0.5
    conversions: Sequence[WeightConverter | WeightRenaming] = ()

    def validate_environment(self, *args, **kwargs) -> None:
        kernels()

    def get_new_dtype(self, converter, param, dtype: torch.dtype | None) -> torch.dtype | None:
        # What is in FP8 is cast when it is dequantised, one by one.
        return None if isinstance(converter, WeightConverter) else super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files=None, **kwargs) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
        if not layers:
            raise ValueError(f"`quantization_config` is FourBitConfig and the model {type(model).__name__}; expected a DiffusionGemma")
        stored = self.quantization_config.stored
        if stored is not None and checkpoint_files:
            modules, prefix = dict(model.named_modules()), prefix_of(model)
            replaced = [name.removeprefix(prefix) for name in make_fp8(model, stored.ignore)]
            check_files(model, checkpoint_files)
            for name in replaced:
                model.set_submodule(name, modules[name])
        for name, module in layers.items():
            with torch.device("meta"):
                model.set_submodule(name, FourBitExperts(module, model.config.dtype, self.quantization_config.block_size))
        if self.pre_quantized and stored is None and checkpoint_files:
            check_packed_files(model, checkpoint_files)

    def packed(
        self, model: nn.Module, name: str, pieces: Iterable[torch.Tensor], found: list[tuple[int, ...]], matrices: int
    ) -> dict[str, torch.Tensor]:
        """The parameters of the stacked weight that is packed as `name`, of its `pieces`; `found` are the shapes of what these are made
        of: the stacked weight, or so many matrices of each expert."""
        module, _, last = name.rpartition(".")
        experts = model.get_submodule(module)
        weight = next(weight for weight, packed in PACKED.items() if packed == last)
        shape = tuple(experts.shapes[weight])
        expected = [(shape[1] // matrices, shape[2])] * (shape[0] * matrices) if matrices else [shape]
        if found != expected:
            what = f"{module}.{weight} comes in {len(found)} tensors of {' and '.join(map(str, sorted(set(found))))}"
            self.unquantizable.append(f"{what}, expected {len(expected)} of {expected[0]}")
            size, blocks = experts.sizes(weight)
            zeros = partial(torch.zeros, device="cpu")
            return {name: zeros(size, 1, dtype=torch.uint8), f"{name}_scale": zeros(blocks, dtype=torch.float32)}
        numbers, scale = experts.quantized(pieces)
        if not scale.isfinite().all():
            self.unquantizable.append(f"{module}.{weight} holds NaN or infinity, expected finite numbers")
        return {name: numbers, f"{name}_scale": scale}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> None:
        super()._process_model_after_weight_loading(model)
        for name, module in four_bit_modules(model).items():
            for weight, packed in PACKED.items():
                numbers, scale = getattr(module, packed), getattr(module, f"{packed}_scale")
                if numbers.is_meta:  # offloaded to disk, from which it comes as it was quantised
                    size, _ = module.sizes(weight)
                    module.register_parameter(packed, nn.Parameter(numbers.new_empty((size, 1), dtype=torch.uint8), requires_grad=False))
                elif numbers.dtype != torch.uint8:
                    raise ValueError(f"the checkpoint has no {name}.{weight}; expected one: weights are not made up")
                elif not scale.isfinite().all():
                    raise ValueError(f"{name}.{packed}_scale holds NaN or infinity; expected finite scales")
            module.requires_grad_(False)
        others = [each for each in model._weight_conversions if each not in self.conversions]
        model._weight_conversions = [*others, *renamings()]  # by which it is saved

    def get_quantize_ops(self) -> ConversionOps:
        return PassOn()

    def get_weight_conversions(self) -> list[WeightConverter | WeightRenaming]:
        if self.quantization_config.stored is not None:
            # Scales first: for transformers before 5.23 their names match the weights' patterns too.
            self.conversions = [
                WeightConverter(
                    [f"experts.*.{matrix}.{suffix}" for matrix in matrices for suffix in ("weight_scale", "weight")],
                    f"experts.{PACKED[stacked]}", [PackStoredExperts(self)],
                )
                for stacked, matrices in PROJECTIONS.items()
            ]  # fmt: skip
            self.conversions.append(WeightConverter([".weight_scale", ".weight"], ".weight", [DequantizeFP8(self)]))
        elif self.pre_quantized:
            self.conversions = renamings()
        else:
            self.conversions = [
                WeightConverter(f"experts.{name}", f"experts.{packed}", [PackExperts(self)]) for name, packed in PACKED.items()
            ]
        return self.conversions

    def _dequantize(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        made: dict[int, Experts] = {}  # by the parameters, which a module and its twin share
        for name, module in four_bit_modules(model).items():
            with torch.device("meta"):
                like = Experts(module.config)
            if id(module._parameters) in made:
                like._parameters = made[id(module._parameters)]._parameters
            else:
                made[id(module._parameters)] = module.plain(dtype, like)
            model.set_submodule(name, like.train(module.training))
        return model


register(FourBitConfig, FourBitQuantizer)


__all__ = ["PUBLISHED", "FourBitConfig", "FourBitQuantizer", "check_packed_files", "in_four_bits"]
