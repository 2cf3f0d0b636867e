"""Experts in 4 bits, everything else and every activation as it was: for GPUs of 24 GB without FP8 units.

Experts are 88 % of the released model's bytes; in 4 bits the model takes 18.8 GB instead of 51.6. The numbers and the kernels are
those of bitsandbytes (NF4: Dettmers et al. 2023, arXiv 2305.14314), whose functions take stacked experts of any shape. torchao
0.18's do not: `IntxWeightOnlyConfig` refuses three dimensions and `Int4WeightOnlyConfig` needs a package of kernels. transformers
5.23's quantiser for bitsandbytes looks at `nn.Linear` and does not reach the experts; its quantiser for torchao can be told their
names, and then fails for the reasons above.

A layer's experts are dequantised when they are used, one projection at a time, and go through whatever experts implementation is
set. This is slower than the plain model wherever that fits. Such a model is made while loading and is not saved.
"""

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightRenaming
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..layers.experts import Experts
from .fp8 import FixedDtypes, frozen
from .registry import BlockQuantizer, only, register

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
PACKED = {"gate_up_proj": "gate_up_packed", "down_proj": "down_packed"}


def kernels():
    """bitsandbytes' functions, imported at first use; ImportError where it is not installed."""
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ImportError("FourBitConfig needs bitsandbytes: pip install bitsandbytes") from error
    return functional


class FourBitConfig(QuantizationConfigMixin):
    """Experts in NF4, for `from_pretrained(..., quantization_config=FourBitConfig())`. Needs bitsandbytes.

    Args:
        block_size: numbers that share a float32 scale (64: QLoRA's), one of `BLOCK_SIZES`, which are bitsandbytes', or ValueError. An
            expert's weight takes 0.5 + 4 / block_size bytes.
    """

    quant_method = f"{__name__}"

    def __init__(self, block_size: int = 64):
        if block_size not in BLOCK_SIZES:
            raise ValueError(f"`block_size` is {block_size!r}; expected one of {BLOCK_SIZES}")
        self.block_size = block_size

    @classmethod
    def from_dict(cls, config_dict: dict, *args, **kwargs):
        return super().from_dict({name: value for name, value in config_dict.items() if name == "block_size"}, *args, **kwargs)

    def to_dict(self) -> dict:
        return {"quant_method": self.quant_method, "block_size": self.block_size}


class FourBitExperts(FixedDtypes, Experts):
    """`Experts` whose two tensors are dequantised at every use; each is a uint8 parameter and a float32 one of its scales.

    Args:
        experts: whose sizes and activation to take; its weights are not read.
        dtype: of the parameters until they are quantised, of what they are dequantised to, and of the arithmetic, in whatever dtype
            the hidden states come (peft's `prepare_model_for_kbit_training` makes all else float32).
        block_size: as `FourBitConfig`.
    """

    WEIGHTS = tuple(PACKED.values())

    def __init__(self, experts: Experts, dtype: torch.dtype, block_size: int):
        nn.Module.__init__(self)
        # Sizes, and what transformers' experts interface keeps beside them; none of the registries of tensors and modules.
        self.__dict__.update({name: value for name, value in vars(experts).items() if name not in vars(self)})
        self.act_fn = experts.act_fn
        self.block_size, self.dtype = block_size, dtype
        self.shapes = {name: getattr(experts, name).shape for name in PACKED}
        for name, packed in PACKED.items():
            blocks = -(-self.shapes[name].numel() // block_size)
            self.register_parameter(packed, frozen(*self.shapes[name], dtype=dtype))
            self.register_parameter(f"{packed}_scale", frozen(blocks, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Args and Returns as `Experts.forward`."""
        return super().forward(hidden_states.to(self.dtype), chosen, weights).to(hidden_states.dtype)

    def quantized(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 `(numbers / 2, 1)` and float32 scales `(blocks,)` of a stacked weight."""
        packed, state = kernels().quantize_4bit(weight.flatten(), blocksize=self.block_size, quant_type="nf4")
        return packed, state.absmax

    def dequantized(self, name: str) -> torch.Tensor:
        """The stacked weight `name` in the model's dtype."""
        packed, shape, functional = getattr(self, PACKED[name]), self.shapes[name], kernels()
        # Flat: on a CPU bitsandbytes 0.50 takes wrong scales where rows are no whole number of blocks.
        state = functional.QuantState(
            absmax=getattr(self, f"{PACKED[name]}_scale"), shape=torch.Size((shape.numel(),)), dtype=self.dtype, blocksize=self.block_size,
            code=functional.get_4bit_type("nf4", device=packed.device), quant_type="nf4",
        )  # fmt: skip
        return functional.dequantize_4bit(packed, state).view(shape)

    gate_up_proj = property(lambda self: self.dequantized("gate_up_proj"))
    down_proj = property(lambda self: self.dequantized("down_proj"))


class PackExperts(ConversionOps):
    """A layer's stacked weight into its packed numbers and their scales, on the device it is for."""

    @torch.no_grad()
    def convert(self, input_dict: dict, full_layer_name: str, model: nn.Module, **kwargs) -> dict:
        packed, scale = model.get_submodule(full_layer_name.rpartition(".")[0]).quantized(only(input_dict))
        return {full_layer_name: packed, f"{full_layer_name}_scale": scale}


class FourBitQuantizer(BlockQuantizer):
    """What transformers asks of a quantiser while loading."""

    quantization_config: FourBitConfig
    element_size = 0.5
    serializable = False

    def validate_environment(self, *args, **kwargs) -> None:
        kernels()

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
        if not layers:
            raise ValueError(f"`quantization_config` is FourBitConfig and the model {type(model).__name__}; expected a DiffusionGemma")
        for name, module in layers.items():
            with torch.device("meta"):
                model.set_submodule(name, FourBitExperts(module, model.config.dtype, self.quantization_config.block_size))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> None:
        for name, module in model.named_modules():
            if isinstance(module, FourBitExperts):
                for weight, packed in PACKED.items():
                    if getattr(module, packed).dtype != torch.uint8 and not getattr(module, packed).is_meta:
                        raise ValueError(f"the checkpoint has no {name}.{weight}; expected one: weights are not made up")
                    if not getattr(module, f"{packed}_scale").isfinite().all():
                        raise ValueError(f"{name}.{weight} holds NaN or infinity; expected finite numbers to quantise")
                module.requires_grad_(False)

    def get_quantize_ops(self) -> ConversionOps:
        return PackExperts()

    def get_weight_conversions(self) -> list[WeightRenaming]:
        return [WeightRenaming(f"experts.{name}", f"experts.{packed}") for name, packed in PACKED.items()]


register(FourBitConfig, FourBitQuantizer)


__all__ = ["FourBitConfig", "FourBitExperts", "FourBitQuantizer"]
