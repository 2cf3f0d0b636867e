"""Adapters with a delta for each pass, as they are made on a model of two stacks, beside those with one delta for both, made here.

An adapter's keys and settings say which it is (`who_made`). One with a delta for each pass pulls the passes apart (`apart`) where it is
loaded, so that each pass gets its delta and all else is peft's: `take_in` does so between peft's wrapping and its loading of weights,
`AdapterMixin.load_adapter` before both. A key that finds no place is refused, and so is merging two deltas into the one weight that both
passes hold. `save_for_two_stacks` writes an adapter so that a model of two stacks loads it.

Imports peft where there is an adapter.
"""

import os
from collections.abc import Iterable, Iterator

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging

from generation.call.configuration import DOWNLOAD

from ..layers.configuration import DiffusionGemmaConfig
from ..weights.saving import finish, replacing
from .adapted_experts import fit, in_few_bits
from .adapter_names import (
    CANVAS,
    PROMPT,
    SAVED,
    Passes,
    as_saved,
    as_treated,
    block_of,
    explicit,
    for_both,
    in_place,
    is_wrapper,
    outermost,
    shown,
    who_made,
)
from .divided import is_planned, learns_apart

logger = logging.get_logger(__name__)
WITHOUT = ". The model is without it again; what peft froze stays frozen"


def tell(adapter: str, made: str | None, passes: Passes) -> None:
    """Says how an adapter counts here, where that is not as its maker had it, or not known. Before anything is changed."""
    if made == "one" and passes.is_apart and passes.canvas:
        logger.warning(f"adapter {adapter!r} was made where one delta counts in both passes: both of this model's get it.")
    elif made == "two" and not passes.is_apart and (passes.prompt or passes.canvas):
        without = "canvas" if passes.prompt else "prompt"
        which = "a delta for each pass" if passes.prompt and passes.canvas else f"no delta for the {without} pass"
        logger.warning(f"adapter {adapter!r} has {which}: from here on each pass has modules of its own, over the same weights.")
    elif made is None:
        where = shown(passes.names(CANVAS, passes.canvas))
        counts = "both passes. Call `pull_apart()` before loading it if the canvas pass alone is meant"
        if passes.is_apart:
            counts = "the canvas pass alone. Save it by `save_for_two_stacks` from a model of one stack if both are meant"
        logger.warning(f"adapter {adapter!r} names modules of the canvas pass ({where}), not what it was made on: it counts in {counts}.")


def wrap(model: nn.Module, adapter: str, config, names: Iterable[str]) -> None:
    """Has peft wrap the modules of these names for an adapter, as its settings treat them, or its canvas pass's modules."""
    try:
        from peft import inject_adapter_in_model
    except ImportError:
        return
    if not (known := as_treated(config, model, names)):
        return
    before = dict(model.peft_config)
    try:
        inject_adapter_in_model(explicit(config, known), model, adapter)
    finally:
        model.peft_config.update(before)


def wrapped(module: nn.Module, adapter: str) -> set[str]:
    """Names of the wrappers in `module` that hold an adapter."""
    return {name for name, each in nn.Module.named_modules(module) if is_wrapper(each) and adapter in each._get_available_adapters()}


def withdraw(module: nn.Module, adapter: str, names: Iterable[str]) -> None:
    """Takes an adapter out of wrappers. Which are active stays, and means the others."""
    for name in names:
        wrapper = module.get_submodule(name)
        active, wrapper._active_adapter = wrapper._active_adapter, []
        wrapper.delete_adapter(adapter, *([None] if hasattr(wrapper, "original_module") else ()))
        wrapper._active_adapter = active


def unwrap(model: nn.Module, adapter: str) -> None:
    """Takes an adapter out of the model, and peft's wrappers off what holds no other."""
    withdraw(model, adapter, wrapped(model, adapter))
    found = ((name, each) for name, each in nn.Module.named_modules(model) if is_wrapper(each))
    empty = [(name, each) for name, each in found if not each._get_available_adapters()]
    for name, wrapper in reversed(empty):  # of those around each other the inner ones first
        outer, _, place = name.rpartition(".")
        inside = filter(None, map(wrapper._modules.get, ("base_layer", "original_module", "token_adapter")))
        setattr(model.get_submodule(outer), place, next(inside))
    configs = getattr(model, "peft_config", {})
    configs.pop(adapter, None)
    if "peft_config" in vars(model) and not configs:
        del model.peft_config


def parameters(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter, bool]]:
    """Where each parameter of a model stands, and whether it learns."""
    found = ((module, key, each) for module in model.modules() for key, each in module._parameters.items() if each is not None)
    return [(module, key, each, each.requires_grad) for module, key, each in found]


def put_back(model: nn.Module, language_model: nn.Module) -> None:
    """Has the prompt pass enter as it did before an adapter that is refused."""
    block_of(model)[0].encoder.language_model = language_model
    for module in model.modules():
        if is_wrapper(module):
            vars(module).pop("merge", None)  # `guard`


def refuse(model: nn.Module, adapter: str, lost: Iterable[str]) -> None:
    """Takes an adapter out of the model and raises: keys of it have no place, or another shape than it."""
    unwrap(model, adapter)
    expected = "keys of modules that it wraps in this model, in their shapes"
    raise ValueError(f"adapter {adapter!r} holds {shown(lost)}; expected {expected}{WITHOUT}")


def held(model: nn.Module) -> dict[str, torch.Size]:
    """Names of everything that a state dict of `model` can load into, and its shape."""
    found = (model.named_parameters, model.named_buffers)
    return {name: value.shape for each in found for name, value in each(remove_duplicate=False)}


def take_in(model: nn.Module, state_dict: dict, prefix: str) -> None:
    """Makes places for an adapter whose weights are about to be loaded by `load_state_dict`; peft has wrapped modules as its settings say.

    In `state_dict` the keys of places made here get the adapter's name, which peft gave to the others alone. Deltas that count in both
    passes are added for the prompt pass where it has modules of its own.

    Raises:
        ValueError: a key that finds no place, or one of another shape. The adapter is out of the model again.
    """
    keys, places = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}, None
    for adapter, config in reversed(list((getattr(model, "peft_config", None) or {}).items())):
        named = {key for key in keys if f".{adapter}." in f"{key}."}
        places = held(model) if places is None else places
        marks = (f".{config.peft_type.value.lower()}_", ".modules_to_save.", ".token_adapter.")
        unnamed = {key for key in keys - places.keys() if any(mark in key for mark in marks) or key.startswith(block_of(model)[1] + PROMPT)}
        if not named and not unnamed:
            continue
        passes = Passes(model, named | unnamed)
        made, was_apart, entered = who_made(config, passes), passes.is_apart, passes.block.encoder.language_model
        tell(adapter, made, passes)
        if made == "two" and (passes.prompt or passes.canvas):
            passes.block.pull_apart()
        if passes.is_apart and made is not None:
            _fit_prompt_pass(model, adapter, config, passes, passes.prompt if made == "two" else passes.canvas, fresh=not was_apart)
        places = held(model)
        by_saved_name = {as_saved(place, adapter): place for place in places if f".{adapter}." in f"{place}."}
        for key in unnamed & by_saved_name.keys():
            state_dict[prefix + by_saved_name[key]] = state_dict.pop(prefix + key)
        if made == "one" and passes.is_apart:
            moved = {passes.moved(key): state_dict[prefix + key] for key in named if passes.moved(key) in places.keys() - {key}}
            state_dict.update({prefix + key: value.clone() for key, value in moved.items()})
        lost = {key for key in named | unnamed if key not in places and key not in by_saved_name}
        shapes = {key: tuple(state_dict[prefix + key].shape) for key in named if key in places}
        lost |= {f"{key} of shape {shape}, not {tuple(places[key])}" for key, shape in shapes.items() if shape != places[key]}
        if lost:
            put_back(model, entered)
            refuse(model, adapter, lost)
        keys -= named | unnamed


def _fit_prompt_pass(model: nn.Module, adapter: str, config, passes: Passes, expected: set[str], fresh: bool) -> None:
    """Has the prompt pass's own modules wrapped for an adapter where they are `expected` to be; where they are copies of the canvas
    pass's (`fresh`), those alone, each as the settings treat it."""
    stack = passes.block.prompt_stack
    there = {name: outermost(name) for name in wrapped(stack, adapter)}
    if fresh:
        withdraw(stack, adapter, [name for name, outer in there.items() if outer not in expected])
    differ = fresh and (getattr(config, "rank_pattern", None) or getattr(config, "alpha_pattern", None))
    missing = (expected if differ else expected.difference(there.values())).intersection(name for name, _ in stack.named_modules())
    if missing:
        wrap(model, adapter, config, passes.names(PROMPT, missing))


def guard(stack: nn.Module, other: nn.Module) -> None:
    """Keeps peft from merging adapters of two stacks over the same weights: both passes would get what is merged in one of them."""
    found = [dict(each.named_modules()) for each in (stack, other)]
    for modules, others in (found, found[::-1]):
        for name, module in modules.items():
            if is_wrapper(module) and hasattr(module, "merge") and outermost(name) in others:
                module.merge = refuse_to_merge


def refuse_to_merge(*args, **kwargs) -> None:
    """Stands for `merge` of an adapter of one pass."""
    raise ValueError(
        "`merge_adapter` or `merge_and_unload` would add the deltas of both passes to the weights that they share; expected an adapter "
        "with one delta for both, in a model whose passes were not pulled apart. Unmerged, all count as they should"
    )


def refuse_divided(what: str, behind: str = "") -> None:
    """For adapters in a model that `is_planned`."""
    raise ValueError(
        f"`{what}` puts an adapter into a model whose matrices a plan for tensor or expert parallelism divides; expected whole weights, or "
        f"such as FSDP2 shards: an adapter's delta would be added to each process's piece as if it were all{behind}"
    )


class AdapterMixin:
    """`load_adapter` of both model classes, and what peft may merge."""

    def named_modules(self, *args, **kwargs) -> Iterator[tuple[str, nn.Module]]:
        """As in torch; peft, which walks over a model after it has wrapped modules and before it merges, then finds wrappers that are
        `fit`; and that refuse to merge, where two stacks hold the same weights, or some lie in few bits.

        Raises:
            ValueError: there are wrappers, and a plan divides the weights between processes: a delta would be added to a piece of them. Or
                they were put into a sharded model to be trained: each process would train its own.
        """
        may_merge, divided, configs = True, is_planned(self), getattr(self, "peft_config", None) or {}
        trained = any(not config.inference_mode for config in configs.values())
        if configs:
            if (block := block_of(self)[0]).prompt_stack is not block.decoder:
                guard(block.decoder, block.prompt_stack)
            may_merge = not any(in_few_bits(module) for _, module in super().named_modules())
        for name, module in super().named_modules(*args, **kwargs):
            if is_wrapper(module):
                if divided:
                    for adapter in module._get_available_adapters():
                        unwrap(self, adapter)
                    refuse_divided(name, WITHOUT)
                if trained and learns_apart(module):
                    unwrap(self, [*configs][-1])
                    raise ValueError(
                        f"`{name}` puts an adapter to be trained into a model that is sharded already; expected one that was put in before "
                        "`fully_shard` or `accelerator.prepare`, which shard it too: here every process would train its own" + WITHOUT
                    )
                fit(module, may_merge)
            yield name, module

    def load_adapter(self, peft_model_id=None, adapter_name=None, peft_config=None, adapter_state_dict=None, *args, **kwargs):
        """As in transformers. An adapter with a delta for each pass pulls the passes apart, and a line says so.

        Raises:
            ValueError: a key that finds no place, or one of another shape. The model is as it was then.
        """
        if is_planned(self):
            refuse_divided("load_adapter")
        if peft_model_id is not None and os.path.isdir(peft_model_id):
            finish(peft_model_id)
        name = "default" if adapter_name is None else adapter_name
        adapters, before = set(getattr(self, "peft_config", None) or ()), parameters(self)
        if hasattr(self, "pull_apart") or hasattr(getattr(self, "model", None), "pull_apart"):
            peft_config, adapter_state_dict = self._read_adapter(peft_model_id, peft_config, adapter_state_dict, kwargs)
        if not adapter_state_dict:
            return super().load_adapter(peft_model_id, adapter_name, peft_config, adapter_state_dict, *args, **kwargs)
        adapter_state_dict = {in_place(key, name, peft_config): value for key, value in adapter_state_dict.items()}
        given = {key.removeprefix(SAVED): key for key in adapter_state_dict}
        passes = Passes(self, given)
        made, entered = who_made(peft_config, passes), passes.block.encoder.language_model
        tell(name, made, passes)
        if made == "two" and (passes.prompt or passes.canvas):
            passes.block.pull_apart()
        elif made == "one" and passes.is_apart:
            names = for_both(given, passes)
            adapter_state_dict = {SAVED + new: adapter_state_dict[given[old]].clone() for new, old in names.items()}
            peft_config = explicit(peft_config, as_treated(peft_config, self, names))
        try:
            info = super().load_adapter(peft_model_id, adapter_name, peft_config, adapter_state_dict, *args, **kwargs)
            if info.unexpected_keys:
                refuse(self, name, info.unexpected_keys)
        except BaseException:
            put_back(self, entered)
            if name not in adapters:
                unwrap(self, name)
            for module, key, parameter, learns in before:
                module._parameters[key] = parameter.requires_grad_(learns)
            self._hf_peft_config_loaded = bool(getattr(self, "peft_config", None))
            raise
        return info

    @staticmethod
    def _read_adapter(folder, config, weights, kwargs) -> tuple:
        """Settings and weights of an adapter: those given, or from its folder or repository, or None for both."""
        try:
            from peft import PeftConfig
            from peft.utils.save_and_load import load_peft_weights
        except ImportError:
            return config, weights
        loading = getattr(kwargs.get("load_config"), "download_kwargs", None) or {}
        download = {**loading, **{key: kwargs[key] for key in DOWNLOAD if key in kwargs}, **(kwargs.get("adapter_kwargs") or {})}
        download = {key: value for key, value in download.items() if key in DOWNLOAD and value is not None}
        if folder is not None and config is None:
            config = PeftConfig.from_pretrained(folder, **download)
        if folder is not None and weights is None:
            weights = load_peft_weights(folder, device="cpu", **download)
        return config, weights


def save_for_two_stacks(model: nn.Module, folder: str | os.PathLike, adapter_name: str | None = None) -> None:
    """Saves an adapter so that peft loads it into transformers' class, or any other with modules for each pass, and it counts as here.

    Its keys and settings name every module of either pass in full. No `task_type`: with one, peft does not take transformers' class.

    Args:
        model: a `PeftModel` over a model of this package, or such a model with adapters of its own.
        folder: gets `adapter_model.safetensors` and `adapter_config.json`.
        adapter_name: default: the only one.

    Raises:
        ValueError: no such adapter, or several and none named; or one that no other model takes as it is here.
    """
    try:
        from peft import get_peft_model_state_dict
    except ImportError as error:
        raise ImportError("`save_for_two_stacks` needs peft") from error
    configs, base = getattr(model, "peft_config", None) or {}, model.get_base_model() if hasattr(model, "get_base_model") else model
    if adapter_name not in configs if adapter_name is not None else len(configs) != 1:
        raise ValueError(f"`adapter_name` is {adapter_name!r}; expected one of {sorted(configs)}")
    adapter_name = next(iter(configs)) if adapter_name is None else adapter_name
    config = configs[adapter_name]
    for field in ("ensure_weight_tying", "layer_replication", "alora_invocation_tokens", "token_indices"):  # bound to one embedding or head
        if getattr(config, field, None):
            raise ValueError(f"`{field}` is {getattr(config, field)!r} in adapter {adapter_name!r}; expected an adapter without it")
    weights = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    weights = {key.removeprefix(SAVED): value for key, value in weights.items()}
    passes = Passes(base, weights)
    names = {key: key for key in weights} if passes.is_apart else for_both(weights, passes)
    weights = {f"{SAVED}{new}": weights[old].detach().cpu().clone().contiguous() for new, old in names.items()}
    saved = explicit(config, as_treated(config, base, names))
    saved.task_type, saved.inference_mode = None, True
    saved.base_model_name_or_path = saved.base_model_name_or_path or base.name_or_path or None
    library = DiffusionGemmaConfig.__module__.replace("configuration", "modeling")
    made_on = {"base_model_class": base.saved_architecture, "parent_library": library}
    with replacing(folder) as staged:
        save_file(weights, staged / "adapter_model.safetensors", metadata={"format": "pt"})
        saved.save_pretrained(staged, auto_mapping_dict=made_on)


__all__ = ["AdapterMixin", "guard", "save_for_two_stacks", "take_in"]
