"""Experts in 4 bits, everything else and every activation as it was: for GPUs of 24 GB without FP8 units, and for CPUs with 24 GB.

Experts are 88 % of the released model's bytes; in 4 bits the model takes 18.8 GB instead of 51.6. The numbers and the kernels are
those of bitsandbytes (NF4: Dettmers et al. 2023, arXiv 2305.14314), whose functions take stacked experts of any shape. torchao
0.18's do not: `IntxWeightOnlyConfig` refuses three dimensions and `Int4WeightOnlyConfig` needs a package of kernels. transformers
5.23's quantiser for bitsandbytes looks at `nn.Linear` and does not reach the experts; its quantiser for torchao can be told their
names, and then fails for the reasons above.

Experts are dequantised when they are used: on a CPU, and wherever a gradient goes through them, one at a time, those alone that have
tokens; else by the grouped product, one projection of all of them. `experts_implementation="eager"` has it one at a time everywhere. This
is slower than the plain model wherever that fits. How such a model is made, loaded and saved: `four_bit`.
"""

import copy
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn

from ..layers.experts import Experts, LowRank, OneByOne
from .fp8 import FixedDtypes, frozen
from .registry import stack_experts

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
PACKED = {"gate_up_proj": "gate_up_packed", "down_proj": "down_packed"}
AT_ONCE = 2**20  # numbers that are quantised together on a CPU, for which 20 bytes each are taken: a multiple of every block size

_looked_at: ContextVar["FourBitExperts | None"] = ContextVar("_looked_at", default=None)  # by who walks over modules in this thread


def kernels():
    """bitsandbytes' functions, imported at first use; ImportError where it is not installed."""
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ImportError("FourBitConfig needs bitsandbytes: pip install bitsandbytes") from error
    return functional


def quantize(values: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' NF4, to the last bit: `values ~ code[index] * scale`, with `scale = max|block|`, and the index of the nearest code.

    On a CPU whole blocks go another way, which takes a third of the time: that index is how many of the midpoints between codes are less.

    Args: floating `(count,)`. Returns uint8 `(count / 2,)`, two a byte with the first in the high half, and float32 `(blocks,)`.
    """
    if values.device.type != "cpu" or len(values) % block_size:
        packed, state = kernels().quantize_4bit(values, blocksize=block_size, quant_type="nf4")
        return packed.flatten(), state.absmax
    code = kernels().get_4bit_type("nf4", device=values.device)
    midpoints, found = (code[1:, None] + code[:-1, None]) / 2, []
    for some in values.split(AT_ONCE):
        blocks = some.float().view(-1, block_size)
        scale = blocks.abs().amax(dim=1)
        blocks = blocks * (1 / scale.clamp(min=1e-38))[:, None]
        indices = (blocks.view(1, -1) > midpoints).view(torch.uint8).sum(dim=0, dtype=torch.uint8)
        first, second = indices.view(-1, 2).unbind(dim=1)
        found.append((first << 4 | second, scale))
    packed, scales = zip(*found, strict=True)
    return torch.cat(packed), torch.cat(scales)


class FourBitExperts(FixedDtypes, Experts):
    """`Experts` whose two tensors are dequantised at every use; each is a uint8 parameter and a float32 one of its scales.

    Blocks follow each other through the whole stack: where an expert is no whole number of them, two share one.

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
            self.register_parameter(packed, frozen(*self.shapes[name], dtype=dtype))
            self.register_parameter(f"{packed}_scale", frozen(self.sizes(name)[1], dtype=torch.float32))

    def forward(
        self, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, deltas: dict[str, LowRank] | None = None
    ) -> torch.Tensor:
        """Args and Returns as `Experts.forward`; `deltas` in the dtype of the hidden states."""
        deltas = {name: LowRank(*(each.to(self.dtype) for each in delta)) for name, delta in (deltas or {}).items()}
        return super().forward(hidden_states.to(self.dtype), chosen, weights, deltas).to(hidden_states.dtype)

    def named_modules(self, *args, **kwargs) -> Iterator[tuple[str, nn.Module]]:
        """As in torch. While who walks over a model's modules looks at these, they show the names of the weights that they stand for, too:
        so peft finds what `target_parameters` names, in the order of the plain experts, in which it nests its wrappers."""
        if torch.compiler.is_compiling():  # nobody adapts anything then, and no graph holds what a thread looks at
            yield from super().named_modules(*args, **kwargs)
            return
        for name, module in super().named_modules(*args, **kwargs):
            _looked_at.set(self if module is self else None)
            try:
                yield name, module
            finally:
                _looked_at.set(None)

    def named_parameters(self, prefix: str = "", recurse: bool = True, *args, **kwargs) -> Iterator[tuple[str, nn.Parameter]]:
        """As in torch; and see `named_modules`: the weights that these stand for come on the meta device, without numbers."""
        if not recurse and _looked_at.get() is self:
            for name, shape in self.shapes.items():
                yield name, nn.Parameter(torch.empty(shape, dtype=self.dtype, device="meta"), requires_grad=False)
        yield from super().named_parameters(prefix, recurse, *args, **kwargs)

    def sizes(self, name: str) -> tuple[int, int]:
        """Bytes and scales of a stacked weight."""
        numbers = self.shapes[name].numel()
        return -(-numbers // 2), -(-numbers // self.block_size)

    @torch.no_grad()
    def quantized(self, pieces: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 `(bytes, 1)` and float32 scales `(blocks,)` of a stacked weight that comes in pieces, one behind the other: the same
        however it is cut."""
        found, rest = [], None
        for piece in pieces:
            piece = piece.reshape(-1)
            rest = piece if rest is None or not len(rest) else torch.cat([rest, piece])
            whole = len(rest) // self.block_size * self.block_size
            if whole:
                found.append(quantize(rest[:whole], self.block_size))
            rest = rest[whole:]
        if len(rest):
            found.append(quantize(rest, self.block_size))
        packed, scales = zip(*found, strict=True)
        return torch.cat(packed).unsqueeze(1), torch.cat(scales)

    def numbers(self, name: str, start: int, count: int) -> torch.Tensor:
        """`count` numbers of the stacked weight `name`, from `start` on, in the model's dtype."""
        packed, size, functional = getattr(self, PACKED[name]), self.block_size, kernels()
        first, last = start // size, min(-(-(start + count) // size) * size, self.shapes[name].numel())
        # One row: on a CPU bitsandbytes 0.50 takes wrong scales where rows are no whole number of blocks.
        state = functional.QuantState(
            absmax=getattr(self, f"{PACKED[name]}_scale")[first : -(-last // size)], shape=torch.Size((1, last - first * size)),
            dtype=self.dtype, blocksize=size, code=functional.get_4bit_type("nf4", device=packed.device), quant_type="nf4",
        )  # fmt: skip
        values = functional.dequantize_4bit(packed[first * size // 2 : -(-last // 2)], state).view(-1)
        return values[start - first * size : start - first * size + count]

    def dequantized(self, name: str) -> torch.Tensor:
        """The stacked weight `name` in the model's dtype."""
        return self.numbers(name, 0, self.shapes[name].numel()).view(self.shapes[name])

    gate_up_proj = property(lambda self: self.dequantized("gate_up_proj"))
    down_proj = property(lambda self: self.dequantized("down_proj"))

    def one_by_one(self) -> SimpleNamespace:
        """Both stacked weights, to be asked for experts: of the tensors that are in place now, also when that is done for a gradient and
        Accelerate has taken them away again."""
        held = copy.copy(self)
        held._parameters = dict(self._parameters)

        def matrix(name: str, expert: int) -> torch.Tensor:
            shape = self.shapes[name][1:]
            return held.numbers(name, expert * shape.numel(), shape.numel()).view(shape)

        return SimpleNamespace(**{name: OneByOne(partial(matrix, name)) for name in PACKED})

    def plain(self, dtype: torch.dtype, like: Experts) -> Experts:
        """`like` with these weights in `dtype`, dequantised expert by expert."""
        for name, stacked in vars(self.one_by_one()).items():
            weight = stack_experts(self.num_experts, [stacked], lambda stacked, expert: stacked[expert].to(dtype))
            setattr(like, name, nn.Parameter(weight))
        return like


__all__ = ["BLOCK_SIZES", "PACKED", "FourBitExperts", "kernels", "quantize"]
