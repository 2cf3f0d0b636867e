"""Where Accelerate would put a model in bfloat16, FP8 and NF4 on a machine: from sizes alone, without weights and without the machine.

Precisions are those of a checkpoint, or of `FP8Config` and `FourBitConfig` while one is loaded: NF4's experts are in 4 bits and all else in
bfloat16. GPUs are filled in order, no layer is split, what remains goes to the CPU and then to the disk. Where there is a GPU it computes
everything: what is not on one is copied there in every denoising step, prefill and commit (the vision tower only where there are images).
Where there is none, what is on the disk is read from there each time.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from accelerate import infer_auto_device_map
from torch import nn
from transformers import PreTrainedModel

from ..layers.experts import Experts
from .fits import place_of
from .four_bit import FourBitConfig
from .fp8_layout import default_ignore, is_ignored, prefix_of

PRECISIONS = ("bf16", "FP8", "NF4")
GIB = 2**30
GPU_RESERVE = 2 * GIB  # kept free on every GPU for the prompt, its cache and activations
CPU_RESERVE = 4 * GIB  # of a machine without a GPU: the system and Python, too
LAYERS = "model.decoder.layers"


class Machine(NamedTuple):
    """Bytes of each of its GPUs, and of the CPU's memory."""

    gpus: tuple[int, ...]
    cpu: int

    @classmethod
    def gib(cls, *gpus: float, cpu: float) -> "Machine":
        return cls(tuple(int(size * GIB) for size in gpus), int(cpu * GIB))

    def memory(self, gpu_reserve: int = GPU_RESERVE, cpu_reserve: int = CPU_RESERVE) -> dict[int | str, int]:
        """Bytes that weights may take, as `max_memory`. Beside GPUs the CPU's memory is for weights alone."""
        cpu = self.cpu if self.gpus else max(self.cpu - cpu_reserve, 0)
        return {index: max(size - gpu_reserve, 0) for index, size in enumerate(self.gpus)} | {"cpu": cpu}


MACHINES = (
    *(Machine.gib(cpu=size) for size in (16, 24, 32, 64)),
    *(Machine.gib(size, cpu=64) for size in (16, 24, 48, 80)),
    *(Machine.gib(size, size, cpu=64) for size in (16, 24, 48, 80)),
)


class Plan(NamedTuple):
    """Bytes by place, and of them those that move in every denoising step; and the device map."""

    bytes: dict[int | str, int]
    moved: int
    device_map: dict[str, int | str]


def quantised_bytes(model: nn.Module, precision: str) -> Iterator[tuple[nn.Parameter, int]]:
    """The weights of a plain model that are not bfloat16 in a precision, and their bytes with all scales."""
    if precision == "FP8":
        prefix, ignore = prefix_of(model), default_ignore(model)
        linears = [
            module for name, module in model.named_modules() if isinstance(module, nn.Linear) and not is_ignored(prefix + name, ignore)
        ]
        for weight in [*expert_weights(model), *(linear.weight for linear in linears)]:
            yield weight, weight.numel() + 4 * weight.numel() // weight.shape[-1]
    elif precision == "NF4":
        for weight in expert_weights(model):
            yield weight, weight.numel() // 2 + 4 * -(-weight.numel() // FourBitConfig().block_size)


def expert_weights(model: nn.Module) -> list[nn.Parameter]:
    return [weight for module in model.modules() if isinstance(module, Experts) for weight in (module.gate_up_proj, module.down_proj)]


def sized(config, model_class: type[PreTrainedModel], precision: str) -> PreTrainedModel:
    """The model on the meta device, with a tensor of bytes in place of each weight and buffer, as long as it takes in a precision."""
    with torch.device("meta"):
        model = model_class(config)
    quantised = {id(weight): size for weight, size in quantised_bytes(model, precision)}
    made: dict[int, nn.Parameter | torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    each = torch.bfloat16.itemsize if tensor.is_floating_point() else tensor.itemsize
                    place = torch.empty(quantised.get(id(tensor), each * tensor.numel()), dtype=torch.uint8, device="meta")
                    made[id(tensor)] = nn.Parameter(place, requires_grad=False) if tensors is module._parameters else place
                    made[-id(tensor)] = tensor  # kept, or another tensor may get its id
                tensors[name] = made[id(tensor)]
    return model


def make_plan(model: PreTrainedModel, memory: dict[int | str, int]) -> Plan:
    """Of a model by `sized`."""
    device_map = infer_auto_device_map(model, dict(memory), model._no_split_modules)
    found, moved, away = dict.fromkeys(device_map.values(), 0), 0, {"disk"} if memory.keys() == {"cpu"} else {"cpu", "disk"}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        place = place_of(name, device_map)
        found[place] += tensor.nbytes
        moved += tensor.nbytes if place in away and name.startswith("model.decoder.") else 0
    return Plan({place: size for place, size in found.items() if size}, moved, device_map)


def layers_on(plan: Plan, layers: int) -> dict[int | str, list[int]]:
    """Indices of the layers on each place."""
    found: dict[int | str, list[int]] = {place: [] for place in plan.bytes}
    for index in range(layers):
        found[place_of(f"{LAYERS}.{index}", plan.device_map)].append(index)
    return found


def in_words(plan: Plan) -> str:
    """`GPU 0 19.7 + CPU 28.4; 27.4`: GiB by place, and behind the semicolon what moves in a step."""
    names = {place: f"GPU {place}" if isinstance(place, int) else {"cpu": "CPU"}.get(place, place) for place in plan.bytes}
    places = " + ".join(f"{names[place]} {size / GIB:.1f}" for place, size in plan.bytes.items())
    return f"{places}; {plan.moved / GIB:.1f}"


def machine_in_words(machine: Machine) -> str:
    gpus = " + ".join(f"{size / GIB:g}" for size in machine.gpus)
    return f"GPU {gpus}, CPU {machine.cpu / GIB:g}" if gpus else f"CPU {machine.cpu / GIB:g}"


def table(
    config, model_class: type[PreTrainedModel], machines: Sequence[Machine] = MACHINES, gpu_reserve: int = GPU_RESERVE,
    cpu_reserve: int = CPU_RESERVE,
) -> tuple[list[str], dict[Machine, dict[str, Plan]]]:  # fmt: skip
    """Lines of a Markdown table, and the plans, by machine and precision."""
    models = {precision: sized(config, model_class, precision) for precision in PRECISIONS}
    lines, plans = ["| memory, GiB | " + " | ".join(PRECISIONS) + " |", "|---" * (1 + len(PRECISIONS)) + "|"], {}
    for machine in machines:
        memory = machine.memory(gpu_reserve, cpu_reserve)
        plans[machine] = {precision: make_plan(model, memory) for precision, model in models.items()}
        lines.append(f"| {machine_in_words(machine)} | " + " | ".join(map(in_words, plans[machine].values())) + " |")
    return lines, plans


__all__ = ["CPU_RESERVE", "GIB", "GPU_RESERVE", "MACHINES", "PRECISIONS", "Machine", "Plan", "layers_on", "make_plan", "sized", "table"]
