"""The published FP8 layout: what of a model is FP8, under which names it is stored, and what a checkpoint in it must hold.

compressed-tensors' "float-quantized" format as `RedHatAI/diffusiongemma-26B-A4B-it-FP8-dynamic` has it: every `nn.Linear` that
`ignore` does not name is stored as `NAME.weight` (e4m3) and `NAME.weight_scale` (bfloat16, one a row), and the experts, which a
model holds stacked, one by one: `experts.E.{gate,up,down}_proj.{weight,weight_scale}`. Names are always those of the model with
its head, `model.decoder.layers...`.
"""

import copy
import os
import re

import torch
from torch import nn

from ..layers.experts import Experts
from .fp8 import CheckpointFP8Experts, FP8Experts, FP8Linear
from .fp8_math import E4M3
from .safetensors_files import StoredTensor, published_tensors, read_tensors

QUANTIZATION = {  # quantization_config of the published copy, without its list `ignore`
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True},
            "output_activations": None,
        }
    },
    "kv_cache_scheme": None,
}
PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # stacked, and as stored
QUANTIZED = re.compile(r"model\.decoder\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")
SCALE_DTYPES = ("BF16", "F16", "F32")


def check_quantization(quantization: dict) -> None:
    """Raises ValueError unless `quantization` (of a config.json) is the published scheme; names what differs."""

    def check(place, got, expected):
        if isinstance(expected, dict) and isinstance(got, dict):
            for key, value in expected.items():
                check(f"{place}[{key!r}]", got.get(key), value)
        elif got != expected:
            raise ValueError(f"`quantization_config{place}` is {got!r}; expected {expected!r}")

    check("", quantization, {name: QUANTIZATION[name] for name in ("format", "quantization_status", "kv_cache_scheme")})
    groups = quantization.get("config_groups") or {}
    if len(groups) != 1:
        raise ValueError(f"`quantization_config['config_groups']` holds {sorted(groups)}; expected one group")
    ((name, group),) = groups.items()
    check(f"['config_groups'][{name!r}]", group, QUANTIZATION["config_groups"]["group_0"])
    ignore = quantization.get("ignore")
    if not isinstance(ignore, list) or not all(isinstance(entry, str) for entry in ignore):
        raise ValueError(f"`quantization_config['ignore']` is {ignore!r}; expected a list of module names")


def published_quantization(ignore: list[str]) -> dict:
    """`quantization_config` of a config.json, with these modules left out."""
    return {**copy.deepcopy(QUANTIZATION), "ignore": list(ignore)}


def prefix_of(model: nn.Module) -> str:
    """What the names of `model` lack of the published ones: `"model."` where it is the model without its head."""
    return "" if hasattr(model, "model") else "model."


def default_ignore(model: nn.Module) -> list[str]:
    """The linear layers that stay as they are, as in the published copy: the head, the routers (under the names of both
    passes), self-conditioning, and everything of the images. 255 names for the released architecture."""
    prefix = prefix_of(model)
    linears = [prefix + name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kept = [name for name in linears if not QUANTIZED.fullmatch(name) and name != "lm_head"]
    routers = [name.replace("model.decoder.", "model.encoder.language_model.") for name in kept if name.endswith(".router.proj")]
    return ["lm_head", *kept, *routers]


def is_ignored(name: str, ignore: list[str]) -> bool:
    """compressed-tensors' rule: a name of the list, or a match of one that begins with `re:`."""
    return any(re.match(entry[3:], name) if entry.startswith("re:") else entry == name for entry in ignore)


def expert_names(experts: str, count: int, projection: str) -> list[str]:
    """Stored names of a stacked projection, without `.weight`: expert by expert, gate before up."""
    return [f"{experts}.{expert}.{name}" for expert in range(count) for name in PROJECTIONS[projection]]


def expert_shapes(experts: str, projection: str, stacked: torch.Size) -> dict[str, tuple[int, int]]:
    """`expert_names` of a stacked projection of shape `stacked`, (E, rows of all parts, K), and the shape of each."""
    count, rows, columns = stacked
    return dict.fromkeys(expert_names(experts, count, projection), (rows // len(PROJECTIONS[projection]), columns))


def make_fp8(model: nn.Module, ignore: list[str], dtype: torch.dtype = E4M3, apart: bool = False) -> list[str]:
    """Puts FP8 modules into `model`, with or without its head, in place, on the meta device.

    Args:
        ignore: published names, or patterns `re:...`, of linear layers to leave alone.
        dtype: of the weights until they are loaded.
        apart: experts are for `CheckpointFP8Experts` weights, else for stacked ones.

    Returns:
        The published names of what was replaced. ValueError: a layer with a bias, which the format does not know; an `ignore` that
        splits a layer's experts.
    """
    prefix, replaced = prefix_of(model), {}
    for name, module in model.named_modules():
        published = prefix + name
        with torch.device("meta"):
            if isinstance(module, Experts):
                names = [entry for projection in PROJECTIONS for entry in expert_names(published, module.num_experts, projection)]
                left = [entry for entry in names if is_ignored(entry, ignore)]
                if left and left != names:
                    raise ValueError(f"`ignore` names {left[0]} and not every expert of its layer; expected all of a layer or none")
                if not left:
                    replaced[name] = (CheckpointFP8Experts if apart else FP8Experts)(module, dtype)
            elif isinstance(module, nn.Linear) and not is_ignored(published, ignore) and published != "lm_head":
                if module.bias is not None:
                    raise ValueError(f"{published} has a bias; expected it among `ignore`: FP8 layers have none")
                replaced[name] = FP8Linear(module.in_features, module.out_features, dtype)
    for name, module in replaced.items():
        model.set_submodule(name, module)
    return [prefix + name for name in replaced]


def fp8_modules(model: nn.Module) -> dict[str, FP8Linear | FP8Experts]:
    """The FP8 modules of a model, by published name."""
    prefix = prefix_of(model)
    return {prefix + name: module for name, module in model.named_modules() if isinstance(module, FP8Linear | FP8Experts)}


def fp8_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The matrices that a checkpoint stores as `NAME.weight` in e4m3, with a `NAME.weight_scale`: name and shape."""
    shapes = {}
    for name, module in fp8_modules(model).items():
        if isinstance(module, FP8Linear):
            shapes[name] = tuple(module.weight.shape)
        else:
            for projection in PROJECTIONS:
                shapes |= expert_shapes(name, projection, module._parameters[projection].shape)
    return shapes


def published_layout(model: nn.Module) -> dict[str, tuple[str | None, tuple[int, ...]]]:
    """Every tensor of a checkpoint of `model`, whose FP8 modules stand in place: name, shape, and safetensors' dtype where the
    format prescribes it (None: the checkpoint's own, bfloat16 where published). Experts that stay as they are go one by one
    as well."""
    prefix, modules, layout = prefix_of(model), fp8_modules(model), {}
    for name, tensor in model.state_dict().items():
        owner, _, last = f"{prefix}{name}".rpartition(".")
        if name == "lm_head.weight" or owner in modules:
            continue
        if owner.endswith(".experts"):
            layout |= {f"{entry}.weight": (None, shape) for entry, shape in expert_shapes(owner, last, tensor.shape).items()}
        else:
            layout[prefix + name] = (None, tuple(tensor.shape))
    for name, shape in fp8_shapes(model).items():
        layout[f"{name}.weight"] = ("F8_E4M3", shape)
        layout[f"{name}.weight_scale"] = ("BF16", (shape[0], 1))
    return layout


def check_files(model: nn.Module, files: list[str | os.PathLike]) -> None:
    """Checks the FP8 tensors of a checkpoint, of a `model` whose FP8 modules stand in place, before anything of it is loaded.

    Raises:
        OSError: a file is damaged or half-written.
        ValueError: a weight or a scale is missing, has the wrong type or shape, is 0, negative, NaN or infinite, or is stored as
            FP8 though `ignore` names it. The message names tensor and file.
    """
    if wrong := [str(path) for path in files if not str(path).endswith(".safetensors")]:
        raise ValueError(f"FP8 weights are in {wrong[0]}; expected safetensors files")
    stored = published_tensors(files)

    def find(name: str, beside: str | None = None) -> StoredTensor:
        if name not in stored:
            where = f"{stored[beside].file} holds {beside} without" if beside in stored else f"none of {len(files)} files holds"
            raise ValueError(f"{where} {name}; expected a weight and its scale for every FP8 layer")
        return stored[name]

    shapes, scales = fp8_shapes(model), {}
    for layer, shape in shapes.items():
        weight, scale = find(f"{layer}.weight"), find(f"{layer}.weight_scale", f"{layer}.weight")
        if (weight.dtype, weight.shape) != ("F8_E4M3", shape):
            raise ValueError(f"{layer}.weight in {weight.file} is {weight.dtype} {weight.shape}; expected F8_E4M3 {shape}")
        if scale.dtype not in SCALE_DTYPES or scale.shape != (shape[0], 1):
            expected = f"{'/'.join(SCALE_DTYPES)} {(shape[0], 1)}"
            raise ValueError(f"{layer}.weight_scale in {scale.file} is {scale.dtype} {scale.shape}; expected {expected}")
        scales[f"{layer}.weight_scale"] = scale
    for name, entry in stored.items():
        if entry.dtype.startswith("F8") and name.removesuffix(".weight") not in shapes:
            raise ValueError(f"{name} in {entry.file} is {entry.dtype}; expected bfloat16, since `ignore` names it or no layer has it")
    for name, scale in read_tensors(scales):
        check_scale(scale, name, stored[name].file)


def check_scale(scale: torch.Tensor, name: str, file: str | os.PathLike) -> None:
    """Every number of `scale` must be positive and finite; ValueError names the tensor, the file and the first that is not."""
    valid = (scale > 0) & scale.isfinite()
    if not valid.all():
        row = int((~valid).flatten().int().argmax())
        raise ValueError(f"{name} in {file} is {scale.flatten()[row].item()} in row {row}; expected positive finite scales")


__all__ = [
    "PROJECTIONS", "check_files", "check_quantization", "check_scale", "default_ignore", "expert_names", "expert_shapes", "fp8_modules",
    "fp8_shapes", "make_fp8", "prefix_of", "published_layout", "published_quantization",
]  # fmt: skip
