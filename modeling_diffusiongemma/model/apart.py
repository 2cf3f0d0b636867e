"""The two passes pulled apart: a second tree of modules for the prompt pass, over the same weights.

In one stack a hook, a wrapper or an adapter on a module belongs to both passes. Where one shall belong to one pass alone, the prompt pass
gets a tree of its own: of every module of the stack a twin, which holds the very dictionary of parameters that its original holds. So every
weight still exists once, wherever it is moved, offloaded or loaded to; what stands around the weights exists twice. Checkpoints hold a
weight once, under its original's name. Knows nothing of passes.
"""

import copy
from collections.abc import Iterator
from functools import partial, update_wrapper
from types import MethodType
from typing import Any

from torch import nn

from .adapter_names import is_wrapper
from .stack import BlockStack

CALLED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # with the module, its inputs and outputs
WRAPPED = ("base_layer", "original_module")  # what peft's wrappers stand around


class Following:
    """A hook of one module as another has it: for as long as the first one has it, so that its handle removes both."""

    def __init__(self, hooks: dict, key: int):
        self.hooks, self.key = hooks, key

    def __call__(self, *args, **kwargs) -> Any:
        hook = self.hooks.get(self.key)
        return None if hook is None else hook(*args, **kwargs)


def followed(hooks: dict) -> dict:
    return type(hooks)((key, Following(hooks, key)) for key in hooks)


def _inside(wrapper: nn.Module) -> Iterator[nn.Module]:
    """What peft's wrappers, of which one may stand around another, stand around."""
    for name, child in wrapper._modules.items():
        if child is not None and name in WRAPPED and is_wrapper(wrapper) and not is_wrapper(child):
            yield child
        elif child is not None:
            yield from _inside(child)


def twin(module: nn.Module) -> nn.Module:
    """A module like `module` that holds the same dictionaries of parameters and buffers, and all else anew: hooks, which do the same;
    submodules, which are twins; and adapters, which are copies."""
    if is_wrapper(module):
        return copy.deepcopy(module, {id(each): twin(each) for each in _inside(module)})
    other = copy.copy(module)
    for name, value in vars(module).items():
        if name in CALLED:
            vars(other)[name] = followed(value)
        else:  # "_hooks" are others, or say of those above how they are called
            vars(other)[name] = copy.copy(value) if "_hooks" in name else _rebound(value, module, other)
    other._modules = {name: None if child is None else twin(child) for name, child in module._modules.items()}
    return other


def _rebound(value: Any, module: nn.Module, other: nn.Module) -> Any:
    """An attribute of `module` as `other` has it: methods that were set on the module, and Accelerate's wrapper of its `forward`."""
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, other)
    if isinstance(value, partial) and value.args[:1] == (module,):
        again = partial(value.func, other, *value.args[1:], **value.keywords)
        return update_wrapper(again, _rebound(value.__wrapped__, module, other)) if hasattr(value, "__wrapped__") else again
    return value


def pull_apart(stack: BlockStack, prompt_layers: nn.ModuleList) -> BlockStack:
    """A second stack for the prompt pass, which so far entered the layers of `stack` by `prompt_layers`: their scalars and hooks go to its
    layers."""
    other = twin(stack)
    del other.self_conditioning  # the canvas pass's alone
    for layer, entry in zip(other.layers, prompt_layers, strict=True):
        layer._buffers = layer._buffers | {"layer_scalar": entry.layer_scalar}
        if hasattr(entry, "_hf_hook"):  # where Accelerate finds a layer's scalar, the one tensor that it holds itself
            layer._hf_hook = copy.copy(layer._hf_hook)
            layer._hf_hook.weights_map = entry._hf_hook.weights_map
        for name, hooks in vars(entry).items():
            if "_hooks" in name and isinstance(hooks, dict):
                getattr(layer, name).update(followed(hooks) if name in CALLED else hooks)
    return other


def held_twice(stack: BlockStack, other: BlockStack) -> dict[str, str]:
    """Names in `other`, pulled apart from `stack`, of what both hold: to its name in `stack`."""
    held = {id(each): path for path, module in stack.named_modules() for each in (module._parameters, module._buffers)}
    return {
        _joined(path, name): _joined(held[id(each)], name)
        for path, module in other.named_modules()
        for each in (module._parameters, module._buffers)
        if id(each) in held
        for name in each
    }


def check_whole(stack: BlockStack, other: BlockStack) -> None:
    """Raises ValueError where a module of `stack` was given something in the place of a weight, which its twin in `other` then lacks."""
    modules = dict(stack.named_modules())
    for path, module in other.named_modules():
        original = modules.get(path)
        if original is None or module._parameters is not original._parameters:
            continue
        for name in ("weight", *original._parameters):
            if hasattr(original, name) and not hasattr(module, name):
                what = f"`encoder.language_model.{path}` has lost its `{name}`, which stands behind something else in `decoder.{path}`"
                permanent = "`prune.remove`, `parametrize.remove_parametrizations`"
                raise ValueError(f"{what} (pruned, normed, parametrised); expected it before `pull_apart`, or for good: {permanent}")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


__all__ = ["check_whole", "held_twice", "pull_apart", "twin"]
