"""The modules with FP8 weights: a linear layer and the experts. They stand in for `nn.Linear` and `Experts`.

Weights are e4m3 with one float32 scale an output channel and never train; gradients flow through to the inputs, so that
adapters can be trained on top. What is computed: `fp8_math`. How the modules get into a model: `fp8_quantizer`.
"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..layers.experts import Experts, eager_experts
from .fp8_math import E4M3, dequantize, fp8_grouped_product, fp8_product
from .registry import stack_experts


def frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def scale_name(weight: str) -> str:
    """Name of the scales of a weight's name: `q_proj.weight_scale`, `experts.gate_up_scale`.

    The latter holds no `gate_up_proj`: transformers before 5.23 would take it for the weight.
    """
    return f"{weight}_scale" if weight.endswith("weight") else f"{weight.removesuffix('_proj')}_scale"


class FixedDtypes:
    """Moves with its model, but keeps its dtypes: `model.to(torch.bfloat16)` must cast neither FP8 weights nor their scales."""

    def _apply(self, fn, recurse: bool = True):
        def moved(tensor):
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(moved, recurse)


class FP8Linear(FixedDtypes, nn.Linear):
    """`x @ weight.T` in FP8, with `weight` e4m3 (out, in) and `weight_scale` float32 (out, 1); no bias.

    Args:
        in_features, out_features: as `nn.Linear`.
        dtype: of `weight` until the real one is set, while a checkpoint in another dtype is being quantised.
    """

    WEIGHTS = ("weight",)

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype = E4M3):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight = frozen(out_features, in_features, dtype=dtype)
        self.weight_scale = frozen(out_features, 1, dtype=torch.float32)
        self.register_parameter("bias", None)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Args: floating `(..., in)`. Returns `(..., out)` in the same dtype."""
        output = fp8_product(inputs.reshape(-1, self.in_features), self.weight, self.weight_scale)
        return output.view(*inputs.shape[:-1], self.out_features)

    def dequantized(self, dtype: torch.dtype) -> nn.Linear:
        """The same layer as an `nn.Linear` in `dtype`."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(dequantize(self.weight, self.weight_scale, dtype))
        return linear


class FP8Experts(FixedDtypes, nn.Module):
    """`Experts` in FP8: `gate_up_proj` e4m3 (E, 2 * I, D) and `down_proj` e4m3 (E, D, I), with float32
    `gate_up_scale` and `down_scale` (E, rows, 1). Rows are sorted by expert and go through one grouped product a projection.

    A parametrisation of a weight, as peft puts one there for `target_parameters`, acts on the numbers that the weight stands for: they
    are dequantised in front of it, and the experts computed in the hidden states' dtype.

    Args:
        experts: whose sizes and activation to take; its weights are not read.
        dtype: as in `FP8Linear`.
    """

    WEIGHTS = ("gate_up_proj", "down_proj")

    def __init__(self, experts: Experts, dtype: torch.dtype = E4M3):
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = experts.num_experts, experts.hidden_dim, experts.intermediate_dim
        self.act_fn = experts.act_fn
        for name in self.WEIGHTS:
            shape = getattr(experts, name).shape
            self.register_parameter(name, frozen(*shape, dtype=dtype))
            self.register_parameter(scale_name(name), frozen(*shape[:-1], 1, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Args: `hidden_states` (N, D), `chosen` int64 (N, A), `weights` (N, A). Returns `(N, D)`."""
        if is_parametrized(self):
            dtype = hidden_states.dtype
            # One after the other: indexing would give each expert a gradient as large as all of them.
            plain = {name: self._parametrized(name).to(dtype).unbind() for name in self.WEIGHTS}
            return eager_experts(SimpleNamespace(num_experts=self.num_experts, act_fn=self.act_fn, **plain), hidden_states, chosen, weights)
        tokens, active = chosen.shape
        experts, order = chosen.flatten().sort(stable=True)  # (N * A)
        ends = torch.searchsorted(experts, torch.arange(self.num_experts, device=experts.device), right=True).to(torch.int32)
        gate_up = fp8_grouped_product(hidden_states, order // active, self.gate_up_proj, self.gate_up_scale, ends)
        gate, up = gate_up.chunk(2, dim=-1)
        places = torch.arange(tokens * active, device=order.device)
        partial = fp8_grouped_product(self.act_fn(gate) * up, places, self.down_proj, self.down_scale, ends)
        partial = partial[torch.empty_like(order).scatter(0, order, places)].view(tokens, active, -1)
        return torch.bmm(weights.to(partial.dtype).unsqueeze(1), partial).squeeze(1)

    def _parametrized(self, name: str) -> torch.Tensor:
        """A stacked weight in float32, its parametrisations applied."""
        steps = self.parametrizations[name] if is_parametrized(self, name) else ()
        weight = dequantize(steps.original if steps else getattr(self, name), getattr(self, scale_name(name)), torch.float32)
        for step in steps:
            weight = step(weight)
        return weight

    def dequantized(self, dtype: torch.dtype, like: Experts) -> Experts:
        """`like` with these weights in `dtype`, dequantised expert by expert."""
        for name in self.WEIGHTS:
            stored = list(zip(getattr(self, name), getattr(self, scale_name(name)), strict=True))
            plain = stack_experts(self.num_experts, [stored], lambda pairs, expert: dequantize(*pairs[expert], dtype))
            setattr(like, name, nn.Parameter(plain))
        return like


__all__ = ["FP8Experts", "FP8Linear", "FixedDtypes", "frozen", "scale_name"]
