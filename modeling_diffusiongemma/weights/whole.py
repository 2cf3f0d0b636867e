"""Whether a model saves a whole checkpoint: every weight that a model of its config is loaded with, under the name it is loaded by.

A module that was wrapped (peft's adapters put in by hand, layers of a caller's, `torch.compile`), parametrised or pruned holds its weight
under another name. What is saved so loads without an error: a weight whose name is missing is random, and only a log says so.
"""

import copy
from collections.abc import Iterable

import torch
from torch import nn

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


def missing_names(model: nn.Module, built: type[nn.Module], names: Iterable[str]) -> list[str]:
    """The weights that a `built`, which is a class, of the model's config has and `names` lack."""
    with torch.device("meta"):
        expected = built(copy.deepcopy(model.config)).state_dict()
    return sorted(expected.keys() - set(names))


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
    names = saved_names(model) if given is None else set(given)
    if missing := [name for name in missing_names(model, built, names) if name not in left_out]:
        module = missing[0].rpartition(".")[0]
        found = sorted(name for name in names if name.startswith(f"{module}."))
        instead = f" (there is {found[0]})" if found else ""
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"what is to be saved lacks {missing[0]}{more}{instead}; expected a whole model of its config. What wraps or "
                         f"rewrites a module is taken back by {UNDO}")  # fmt: skip


__all__ = ["check_whole"]
