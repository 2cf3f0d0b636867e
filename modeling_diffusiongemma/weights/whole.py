"""Whether a model saves a whole checkpoint: every weight that a model of its config is loaded with, under the name it is loaded by.

A module that was wrapped (peft's adapters put in by hand, layers of a caller's, `torch.compile`), parametrised or pruned holds its weight
under another name. What is saved so loads without an error: a weight whose name is missing is random, and only a log says so.
"""

import copy
from collections.abc import Iterable

import torch
from torch import nn

from ..layers.layers import ScaledEmbedding

UNDO = (
    "`merge_and_unload` or `unload` of peft, `torch.nn.utils.parametrize.remove_parametrizations`, `torch.nn.utils.prune.remove`, and "
    "`module.compile()` instead of `torch.compile(module)`"
)


def saved_names(model: nn.Module) -> set[str]:
    """Names of what a state dict of `model` holds, without making one: sharded weights stay where they are."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules(remove_duplicate=False):
        kept = (name for name in module._buffers if name not in module._non_persistent_buffers_set)
        names.update(f"{prefix}.{name}".removeprefix(".") for name in kept)
    return names


def expected_names(model: nn.Module, built: type[nn.Module]) -> set[str]:
    """The weights that a `built`, which is a class, of the model's config has."""
    with torch.device("meta"):
        return set(built(copy.deepcopy(model.config)).state_dict())


def check_whole(model: nn.Module, built: type[nn.Module], given: Iterable[str] | None, left_out: set[str]) -> None:
    """ValueError where a checkpoint of `model` would lack a weight. Of a quantised model, whose names are its quantiser's, adapters alone
    are noticed.

    Args:
        built: the class whose `config` and names a checkpoint has.
        given: names of a state dict to be saved instead of the model's.
        left_out: names that are not saved, since another stands for them.
    """
    if (wrapper := next((name for name, each in model.named_modules() if hasattr(each, "adapter_layer_names")), None)) is not None:
        raise ValueError(f"`{wrapper}` is wrapped by peft, and is saved under other names; expected `save_pretrained` of the PeftModel for "
                         "the adapters alone, or of what `merge_and_unload` or `unload` returns for the whole model")  # fmt: skip
    if getattr(model, "hf_quantizer", None) is not None:
        return
    for name, weight in model.named_parameters() if given is None else ():
        if str(type(weight).__module__).startswith("torchao."):
            raise ValueError(f"{name} is a {type(weight).__name__} of torchao, made by `quantize_`, and no file of weights takes it; "
                             "expected plain weights, or `from_pretrained(..., quantization_config=TorchAoConfig(...))`")  # fmt: skip
    names, expected = saved_names(model) if given is None else set(given), expected_names(model, built)
    if missing := sorted(expected - names - left_out):
        module = missing[0].rpartition(".")[0]
        found = sorted(name for name in names if name.startswith(f"{module}."))
        instead = f" (there is {found[0]})" if found else ""
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"what is to be saved lacks {missing[0]}{more}{instead}; expected a whole model of its config. What wraps or "
                         f"rewrites a module is taken back by {UNDO}")  # fmt: skip
    modules = {name.rpartition(".")[0] for name in expected}
    if more := sorted(name for name in names - expected - left_out if name.rpartition(".")[0] in modules):
        raise ValueError(f"{more[0]} is to be saved, and a model of this config is loaded without it; expected the weights of its config, "
                         "or a `state_dict` without what need not come back")  # fmt: skip
    kind = next(type(each) for name, each in model.named_modules() if name.endswith("decoder.embed_tokens"))
    if given is None and not issubclass(kind, ScaledEmbedding):
        scaled = "its weight would be loaded into a ScaledEmbedding, which multiplies rows by the root of their size; expected one of these"
        raise ValueError(f"`embed_tokens` is a {kind.__module__}.{kind.__qualname__}, and {scaled}")


__all__ = ["check_whole"]
