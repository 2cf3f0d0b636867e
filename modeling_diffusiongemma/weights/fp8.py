"""The modules with FP8 weights: a linear layer and the experts. They stand in for `nn.Linear` and `Experts`.

Weights are e4m3 with one float32 scale an output channel and never train; gradients flow through to the inputs, so that
adapters can be trained on top. What is computed: `fp8_math`. How the modules get into a model: `fp8_quantizer`.
"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.utils import logging

from ..layers.experts import Experts, LowRank, OneByOne, by_expert, eager_experts
from .fp8_apart import MatricesApart
from .fp8_math import E4M3, dequantize, fp8_grouped_product, fp8_product
from .registry import stack_experts

logger = logging.get_logger(__name__)


def frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def scale_name(weight: str) -> str:
    """Name of the scales of a weight's name: `q_proj.weight_scale`, `experts.gate_up_scale`.

    The latter holds no `gate_up_proj`: transformers before 5.23 would take it for the weight.
    """
    return f"{weight}_scale" if weight.endswith("weight") else f"{weight.removesuffix('_proj')}_scale"


def stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """No numbers, of a tensor's dtype and on its device."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device)


class FixedDtypes:
    """Moves with its model, but keeps its dtypes: `model.to(torch.bfloat16)` must cast neither FP8 weights nor their scales."""

    def _apply(self, fn, recurse: bool = True):
        def moved(tensor):
            small = stand_in(tensor)  # whose cast costs nothing
            changed = fn(small)
            return fn(tensor) if changed.dtype == small.dtype else tensor.to(changed.device)

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

    With adapters, peft's for `target_parameters`, experts are computed in the hidden states' dtype by the numbers that the weights stand
    for: one at a time, dequantised when it is asked for, with its `deltas` beside it. A parametrisation of a weight acts on those numbers,
    too, on all of them at once.

    Args:
        experts: whose sizes and activation to take; its weights are not read.
        dtype: as in `FP8Linear`.
    """

    WEIGHTS = ("gate_up_proj", "down_proj")
    _apply_gate = Experts._apply_gate

    def __init__(self, experts: Experts, dtype: torch.dtype = E4M3):
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = experts.num_experts, experts.hidden_dim, experts.intermediate_dim
        self.act_fn = experts.act_fn
        for name in self.WEIGHTS:
            shape = getattr(experts, name).shape
            self.register_parameter(name, frozen(*shape, dtype=dtype))
            self.register_parameter(scale_name(name), frozen(*shape[:-1], 1, dtype=torch.float32))

    def forward(
        self, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, deltas: dict[str, LowRank] | None = None
    ) -> torch.Tensor:
        """Args: `hidden_states` (N, D), `chosen` int64 (N, A), `weights` (N, A); `deltas`: by a weight's name what adapters add, in the
        dtype of the hidden states. Returns `(N, D)`."""
        if deltas or is_parametrized(self):
            made = {name: self._one_by_one(name, hidden_states.dtype) for name in self.WEIGHTS}
            return eager_experts(
                SimpleNamespace(num_experts=self.num_experts, _apply_gate=self._apply_gate, **made), hidden_states, chosen, weights, deltas
            )
        return self._routed(hidden_states, chosen, weights, self.gate_up_proj, self.down_proj)

    def _routed(
        self, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor
    ) -> torch.Tensor:
        tokens, active = chosen.shape
        order, ends, back = by_expert(chosen, self.num_experts)
        gate_up = fp8_grouped_product(hidden_states, order // active, gate_up_proj, self.gate_up_scale, ends)
        places = torch.arange(tokens * active, device=order.device)
        partial = fp8_grouped_product(self._apply_gate(gate_up), places, down_proj, self.down_scale, ends)[back].view(tokens, active, -1)
        return torch.bmm(weights.to(partial.dtype).unsqueeze(1), partial).squeeze(1)

    def _one_by_one(self, name: str, dtype: torch.dtype) -> OneByOne | tuple[torch.Tensor, ...]:
        """The numbers that a stacked weight stands for, by expert; with a parametrisation made of all of them in float32."""
        scale = getattr(self, scale_name(name))
        if not is_parametrized(self, name):
            weight = self._parameters[name]
            return OneByOne(lambda expert: dequantize(weight[expert], scale[expert], dtype))
        steps = self.parametrizations[name]
        weight = dequantize(steps.original, scale, torch.float32)
        for step in steps:
            weight = step(weight)
        return weight.to(dtype).unbind()  # indexing would give each expert a gradient as large as all of them

    def stack(self) -> None:
        """Puts weights that lie in a checkpoint's files into memory, stacked: there are none here (see `CheckpointFP8Experts`)."""

    def dequantized(self, dtype: torch.dtype, like: Experts) -> Experts:
        """`like` with these weights in `dtype`, dequantised expert by expert."""
        for name in self.WEIGHTS:
            weight = self._parameters[name] if name in self._parameters else getattr(self, name)
            pair = (weight, getattr(self, scale_name(name)))
            plain = stack_experts(self.num_experts, [pair], lambda pair, expert: dequantize(*(one[expert] for one in pair), dtype))
            setattr(like, name, nn.Parameter(plain))
        return like


class CheckpointFP8Experts(FP8Experts):
    """`FP8Experts` on a CPU whose weights are `MatricesApart`: the matrices of a checkpoint, one by one, which stay in its mapped files
    until they are read. Names, shapes, dtypes and results are those of `FP8Experts`.

    It becomes `FP8Experts`, with stacked weights in memory of their own, by `stack()`; and by itself when it is moved to another device,
    when a state dict is loaded into it, and when somebody reads its `gate_up_proj` or `down_proj`, as peft does for `target_parameters`:
    what is then done to them lasts. Reading makes a warning, since it takes as much memory as the weights have bytes.
    """

    def stack(self) -> None:
        """Makes `FP8Experts` of this, in place."""
        for name, weight in self._apart().items():
            self._parameters[name] = nn.Parameter(weight.stacked(), requires_grad=False)
        if type(self) is CheckpointFP8Experts:  # and no class that torch made of it for parametrisations
            self.__class__ = FP8Experts

    def _apart(self) -> dict[str, MatricesApart]:
        return {name: weight for name, weight in self._parameters.items() if isinstance(weight, MatricesApart)}

    def __getattr__(self, name: str):
        if name in self.WEIGHTS and name in self._apart():
            logger.warning_once(
                f"`{name}` of FP8 experts was read, so the experts of its layer, which lay in the checkpoint's files, are now in memory."
            )
            self.stack()
        return FP8Experts.__getattr__(self, name)

    def _apply(self, fn, recurse: bool = True):
        if not (apart := self._apart()) or not self._stays(fn, stand_in(next(iter(apart.values())))):
            self.stack()
            return FP8Experts._apply(self, fn, recurse)
        order = list(self._parameters)
        for name in apart:
            del self._parameters[name]
        super()._apply(fn, recurse)
        others = dict(self._parameters)
        self._parameters.clear()
        self._parameters.update({name: (others | apart)[name] for name in order})
        return self

    @staticmethod
    def _stays(fn, small: torch.Tensor) -> bool:
        """Whether `fn` of `_apply` leaves e4m3 weights where they are: it casts, or does nothing."""
        changed = fn(small)
        cast = changed.device == small.device and changed.dtype != small.dtype
        return cast or changed is small and not changed.is_shared()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *args) -> None:
        if not local_metadata.get("assign_to_params_buffers") and any(prefix + name in state_dict for name in self.WEIGHTS):
            self.stack()
        FP8Experts._load_from_state_dict(self, state_dict, prefix, local_metadata, *args)

    @torch.compiler.disable  # nothing of this is for a graph: a loop over files
    def forward(
        self, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, deltas: dict[str, LowRank] | None = None
    ) -> torch.Tensor:
        """As `FP8Experts.forward`."""
        if deltas or is_parametrized(self):
            return super().forward(hidden_states, chosen, weights, deltas)
        return self._routed(hidden_states, chosen, weights, *(self._parameters[name] for name in self.WEIGHTS))


__all__ = ["CheckpointFP8Experts", "FP8Experts", "FP8Linear", "FixedDtypes", "frozen", "scale_name"]
