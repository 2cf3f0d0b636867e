"""The mixture of experts: a router that reads the raw residual, and experts stored as two stacked tensors.

The experts go through transformers' experts interface (`experts_implementation=`): `"eager"` is the loop over experts below, the
reference; `"grouped_mm"` and `"batched_mm"` are transformers'; `"dense_mm"`, registered here, computes every expert for every
token as two plain matrix products. Where the caller chooses none, `choose_experts` does, or whoever called `experts_by`.

What an adapter adds to a stacked weight comes as `LowRank` beside the tokens (`deltas`): each expert's projection is then asked for by
itself, `x @ weight[e].T + x @ first[e].T @ second[e].T`, and neither the stacked sum nor the stacked delta is ever written out. Knows
nothing of who made the adapters.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import wraps
from typing import NamedTuple

import torch
from torch import nn
from transformers import DiffusionGemmaTextConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, use_experts_implementation

from generation.checks import readable
from generation.fast.proofs import FastPath, works

from .layers import RMSNorm

# On a CPU, by `python benchmarks/experts.py --cpu-time` (benchmarks/RESULTS.md): elements of `gate_up_proj` up to which "dense_mm" is the
# fastest in bfloat16, and experts up to which "eager" is: what it computes for one expert stays in a cache, but each costs some calls.
DENSE_LIMIT = 2**17
EAGER_LIMIT = 16
RANK_MULTIPLE = 8  # torch's grouped products want rows of a whole number of 16 bytes


class ExpertsFunctions(ExpertsInterface):
    """transformers' functions, or whoever's stand in their places, and those of this very file under their names: another version of it may
    be in the process, as remote code."""

    def __getitem__(self, name: str) -> Callable:
        return self._local_mapping[name] if name in self._local_mapping else ALL_EXPERTS_FUNCTIONS[name]


EXPERTS_FUNCTIONS = ExpertsFunctions()

_asked: ContextVar[str | None] = ContextVar("_asked", default=None)  # what `experts_by` says in this thread


class Router(nn.Module):
    """Chooses `top_k_experts` per token: `softmax(proj(norm(x) * scale / sqrt(D)))`, the k largest renormalised to sum
    to 1, then times `per_expert_scale`. The softmax is in float32."""

    def __init__(self, config: DiffusionGemmaTextConfig):
        super().__init__()
        self.config = config  # asked at every pass how many to choose, as transformers' router asks it
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, with_scale=False)
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scalar_root_size = config.hidden_size**-0.5
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Args: `(N, D)`. Returns the probabilities of all experts, float32 `(N, E)`, and of the chosen ones the weights, `(N, A)`, and
        the ids, int64 `(N, A)`: what transformers' router of this model returns."""
        scores = self.proj(self.norm(hidden_states) * self.scale * self.scalar_root_size)  # (N, E)
        probabilities = scores.softmax(dim=-1, dtype=torch.float32)
        weights, chosen = torch.topk(probabilities, self.config.top_k_experts, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return probabilities, weights * self.per_expert_scale[chosen], chosen


class LowRank(NamedTuple):
    """What adapters add to a stacked weight: `second[e] @ first[e]` to that of expert e."""

    first: torch.Tensor  # (E, R, in)
    second: torch.Tensor  # (E, out, R), scaled


class OneByOne:
    """A stacked weight of which an expert's matrix is made when it is asked for, and never trains."""

    def __init__(self, make: Callable[[int], torch.Tensor]):
        self.make = make

    def __getitem__(self, expert: int) -> torch.Tensor:
        return self.make(expert)


class _MadeProduct(torch.autograd.Function):
    """`inputs @ made[expert].T`, for whose gradient the matrix is made again: kept, all of a layer's would be there at once."""

    @staticmethod
    def forward(ctx, inputs: torch.Tensor, made: OneByOne, expert: int) -> torch.Tensor:
        ctx.made, ctx.expert, ctx.dtype = made, expert, inputs.dtype
        return nn.functional.linear(inputs, made[expert])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return (gradient @ ctx.made[ctx.expert].to(gradient.dtype)).to(ctx.dtype), None, None


def project(stacked: torch.Tensor | tuple | OneByOne, delta: LowRank | None, inputs: torch.Tensor, expert: int) -> torch.Tensor:
    """`inputs @ (stacked[expert] + delta[expert]).T`: `(n, in)` to `(n, out)`; of `delta` the two tensors may be split by expert."""
    if isinstance(stacked, OneByOne) and inputs.requires_grad and torch.is_grad_enabled():
        output = _MadeProduct.apply(inputs, stacked, expert)
    else:
        output = nn.functional.linear(inputs, stacked[expert])
    if delta is None:
        return output
    return output + nn.functional.linear(nn.functional.linear(inputs, delta.first[expert]), delta.second[expert])


def adaptable(experts_class: type[nn.Module]) -> type[nn.Module]:
    """Has `forward` take `deltas`, a `LowRank` by the name of a stacked weight, which none of transformers' implementations knows."""
    implemented = experts_class.forward

    @wraps(implemented)
    def forward(self, hidden_states, chosen, weights, deltas: dict[str, LowRank] | None = None):
        if not deltas:
            return implemented(self, hidden_states, chosen, weights)
        return adapted_experts(self, hidden_states, chosen, weights, deltas)

    experts_class.forward = forward
    return experts_class


@adaptable
@use_experts_implementation(experts_interface=EXPERTS_FUNCTIONS)
class Experts(nn.Module):
    """E gated MLPs in two tensors: `gate_up_proj` (E, 2 * moe_intermediate_size, D) and `down_proj` (E, D, moe_intermediate_size). What
    gates them, `act(gate) * up`, is transformers' `_apply_gate`, in every implementation."""

    def __init__(self, config: DiffusionGemmaTextConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim, self.intermediate_dim = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_activation]

    def forward(self, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Args: `hidden_states` (N, D), `chosen` int64 (N, A), `weights` (N, A). Returns `(N, D)`."""
        return eager_experts(self, hidden_states, chosen, weights)


def split_by_expert(stacked: torch.Tensor | OneByOne) -> torch.Tensor | tuple[torch.Tensor, ...] | OneByOne:
    """What gives an expert's matrix by its index. Indexing a tensor that trains would give each expert a gradient as large as all."""
    trains = isinstance(stacked, torch.Tensor) and stacked.requires_grad and torch.is_grad_enabled()
    return stacked.unbind() if trains else stacked


def eager_experts(
    self: Experts, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, deltas: dict[str, LowRank] | None = None
) -> torch.Tensor:
    """`Experts.forward`, one expert after the other. Waits for the device, to learn how many tokens each expert has. Of experts that make
    their weights at every use, and have `one_by_one` for it, those alone are made that have tokens."""
    stacked = self.one_by_one() if hasattr(self, "one_by_one") else self
    gate_up_proj, down_proj = split_by_expert(stacked.gate_up_proj), split_by_expert(stacked.down_proj)
    deltas = {name: LowRank(*map(split_by_expert, delta)) for name, delta in (deltas or {}).items()}
    order = chosen.flatten().argsort(stable=True)  # expert by expert
    counts = chosen.flatten().bincount(minlength=self.num_experts)[: self.num_experts].tolist()
    token, weight = order // chosen.shape[1], weights.flatten()[order, None]
    dtype = torch.promote_types(hidden_states.dtype, weights.dtype)  # sums in float32 where the router's weights are
    output, end = torch.zeros_like(hidden_states, dtype=dtype), 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        rows, end = token[end : end + count], end + count
        gate_up = project(gate_up_proj, deltas.get("gate_up_proj"), hidden_states.index_select(0, rows), expert)
        partial = project(down_proj, deltas.get("down_proj"), self._apply_gate(gate_up), expert)
        output.index_add_(0, rows, partial.to(dtype).mul_(weight[end - count : end]))
    return output.to(hidden_states.dtype)


def dense_experts(self: Experts, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`Experts.forward` with every expert computed for every token; the experts not chosen get the weight 0. The id E, as in transformers'
    implementations, means an expert that another rank holds."""
    stacked = self.gate_up_proj
    experts, double, _ = stacked.shape
    routing = torch.zeros_like(hidden_states[:, :1]).repeat(1, experts + 1)
    routing = routing.scatter(-1, chosen, weights.to(routing.dtype))[:, :experts]  # (N, E)
    gate_up = nn.functional.linear(hidden_states, stacked.reshape(experts * double, -1))
    weighted = self._apply_gate(gate_up.view(-1, experts, double)) * routing[..., None]  # (N, E, I)
    return weighted.reshape(-1, experts * double // 2) @ self.down_proj.transpose(1, 2).reshape(experts * double // 2, -1)


def by_expert(chosen: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For grouped products: the choices `(N, A)` expert by expert, int64 `(N * A,)`; where each expert's end, int32 `(E,)`; and the places
    of the choices in that order, int64 `(N * A,)`, which puts what was made of them back."""
    ids, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(experts, device=ids.device), right=True).to(torch.int32)
    return order, ends, torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))


def grouped_with_deltas(
    self: Experts, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, deltas: dict[str, LowRank]
) -> torch.Tensor:
    """`eager_experts` with `deltas` in three grouped products a projection, and no wait for the device."""
    tokens, active = chosen.shape
    order, ends, back = by_expert(chosen, self.num_experts)

    def product(inputs: torch.Tensor, stacked: torch.Tensor) -> torch.Tensor:
        return nn.functional.grouped_mm(inputs, stacked.transpose(1, 2), offs=ends)

    def projected(inputs: torch.Tensor, name: str) -> torch.Tensor:
        output = product(inputs, getattr(self, name))
        if name not in deltas:
            return output
        lacking = -deltas[name].first.shape[1] % RANK_MULTIPLE
        first, second = nn.functional.pad(deltas[name].first, (0, 0, 0, lacking)), nn.functional.pad(deltas[name].second, (0, lacking))
        return output + product(product(inputs, first), second)

    gated = self._apply_gate(projected(hidden_states[order // active], "gate_up_proj"))
    partial = projected(gated, "down_proj")[back].view(tokens, active, -1)
    return (partial * weights[..., None]).sum(dim=1).to(hidden_states.dtype)


@torch.compiler.disable  # how many tokens each expert has is for no graph
def adapted_experts(
    self: Experts, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, deltas: dict[str, LowRank]
) -> torch.Tensor:
    """`Experts.forward` with what adapters add: by grouped products where the experts are computed by them elsewhere than on a CPU and
    they are proven, and else one expert after the other."""
    device, dtype = arithmetic(self)
    way = self.config._experts_implementation
    way = (_asked.get() or choose_experts(self)) if way == "auto" else way
    plain = way == "grouped_mm" and not hasattr(self, "one_by_one") and not getattr(self, "_is_expert_parallel", False)
    if plain and device.type not in ("cpu", "meta") and hidden_states.dtype == dtype and not torch.is_autocast_enabled(device.type):
        if works(GROUPED_ADAPTERS, device, dtype, self.hidden_dim, self.intermediate_dim):
            return grouped_with_deltas(self, hidden_states, chosen, weights, deltas)
    return eager_experts(self, hidden_states, chosen, weights, deltas)


def _three_experts(device: torch.device, dtype: torch.dtype, hidden_size: int, size: int) -> tuple[Experts, tuple, dict[str, LowRank]]:
    """Three experts of the model's own sizes, which decide whether a kernel takes them; one of them chosen by nobody. With tokens, and
    deltas of rank 3."""

    def waves(*shape: int) -> torch.Tensor:  # made on the device: the released model's experts are large
        return torch.arange(math.prod(shape), dtype=torch.float32, device=device).mul_(0.7).sin_().view(shape)

    config = DiffusionGemmaTextConfig(hidden_size=hidden_size, moe_intermediate_size=size, num_experts=3, top_k_experts=2)
    with torch.device("meta"):
        experts = Experts(config)
    for name, weight in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter((waves(*weight.shape) / weight.shape[-1] ** 0.5).to(dtype)))
    hidden = waves(7, hidden_size).to(dtype)
    chosen = torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0], [2, 0], [0, 2], [2, 0]], dtype=torch.int64, device=device)
    deltas = {
        name: LowRank(waves(3, 3, weight.shape[2]).to(dtype) / weight.shape[2] ** 0.5, waves(3, weight.shape[1], 3).to(dtype))
        for name, weight in experts.named_parameters()
    }
    return experts, (hidden, chosen, waves(7, 2).abs()), deltas


def _prove_grouped(*case):
    experts, tokens, _ = _three_experts(*case)
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, *tokens), eager_experts(experts, *tokens)


def _prove_adapters(*case):
    experts, tokens, deltas = _three_experts(*case)
    return grouped_with_deltas(experts, *tokens, deltas), eager_experts(experts, *tokens, deltas)


# 3 %: half precision, and TF32 where it is on.
GROUPED_EXPERTS = FastPath(
    "grouped experts", "one expert is computed after another, which is slower", lambda device, *case: None, _prove_grouped, 0.03,
    cases=((torch.bfloat16, 2816, 704), (torch.float32, 64, 48)),
)  # fmt: skip
GROUPED_ADAPTERS = FastPath(
    "grouped adapters of experts", "one expert with its adapters is computed after another, which is slower", lambda device, *case: None,
    _prove_adapters, 0.03, cases=((torch.bfloat16, 2816, 704),),
)  # fmt: skip


@torch.compiler.assume_constant_result
def has_grouped_products(device: torch.device, dtype: torch.dtype, hidden_size: int, size: int) -> bool:
    return works(GROUPED_EXPERTS, device, dtype, hidden_size, size)


def arithmetic(experts: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where experts are computed, and in which dtype. No stacked weight is asked, which may be made at every use: from fewer bits, or by
    adding an adapter to it."""
    weight = next(experts.parameters())
    return weight.device, getattr(experts, "dtype", weight.dtype)


def choose_experts(experts: nn.Module) -> str:
    """The implementation that is used when the caller names none: by the weights' shape, dtype and device, and not by the number of
    tokens, or a row's rounding would depend on its neighbours in the batch. On a CPU `"eager"` is for few experts in float32 a tenth
    faster than `"grouped_mm"` at a canvas's 256 tokens, a fifth at 2,048, and the same but for rounding, which is the CPU's; and so it is
    where each expert's weights are made at every use, of which there then is one at a time."""
    device, dtype = arithmetic(experts)
    count, hidden_size, size = experts.num_experts, experts.hidden_dim, experts.intermediate_dim
    if device.type != "cpu":
        proven = device.type == "meta" or has_grouped_products(device, dtype, hidden_size, size)
        return "grouped_mm" if proven else "eager"
    if hasattr(experts, "one_by_one"):
        return "eager"
    if dtype == torch.bfloat16 and count * 2 * size * hidden_size <= DENSE_LIMIT:
        return "dense_mm"
    return "eager" if count <= EAGER_LIMIT else "grouped_mm"


@contextlib.contextmanager
def experts_by(way: str) -> Iterator[None]:
    """For the length of the block, and in this thread alone, `way` stands for what `choose_experts` names."""
    token = _asked.set(way)
    try:
        yield
    finally:
        _asked.reset(token)


def chosen_experts(self: Experts, *args: torch.Tensor) -> torch.Tensor:
    """`Experts.forward` by the implementation that `experts_by` or else `choose_experts` names; compiled, by the one that is a single
    graph whatever the tokens are, where it works; and by every expert for every token where numbers are not `readable`."""
    way = choose_experts(self)
    if torch.compiler.is_compiling():
        way = "grouped_mm" if arithmetic(self)[0].type == "cpu" else way
    elif not readable(*args):  # which the others do
        way = "dense_mm"
    else:
        way = _asked.get() or way
        if way == "grouped_mm" and hasattr(self, "one_by_one") and args[0].requires_grad and torch.is_grad_enabled():
            way = "eager"  # a grouped product would keep all that was made for it, of every layer, for the gradient
    return EXPERTS_FUNCTIONS.get(way, eager_experts)(self, *args)


for _name, _function in {"dense_mm": dense_experts, "auto": chosen_experts}.items():
    EXPERTS_FUNCTIONS[_name] = _function
    ALL_EXPERTS_FUNCTIONS.register(_name, _function)  # transformers takes the name of a registered function alone


__all__ = [
    "GROUPED_ADAPTERS", "GROUPED_EXPERTS", "Experts", "LowRank", "OneByOne", "Router", "by_expert", "choose_experts", "dense_experts",
    "eager_experts", "experts_by", "grouped_with_deltas",
]  # fmt: skip
