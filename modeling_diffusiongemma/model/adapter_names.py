"""What the keys and the settings of an adapter mean, on a model of one stack and on one with modules for each pass.

In the names of the latter the prompt pass's modules stand in `encoder.language_model`, the canvas pass's in `decoder`; here both passes may
run through those in `decoder`. Knows peft's settings by their fields, and its wrappers by what they have.
"""

import copy
import re
from collections.abc import Iterable

from torch import nn

PROMPT, CANVAS = "encoder.language_model.", "decoder."  # where each pass's modules stand in the names of a model of two stacks
TWO_STACKS = ("DiffusionGemmaForBlockDiffusion", "DiffusionGemmaModel")  # classes with modules for each pass
ONE_STACK = ("DiffusionGemmaForMaskedBlockLM", "DiffusionGemmaBlockModel")
SAVED = "base_model.model."  # what peft puts before the names in its files
SHOWN = 3  # keys in a message


def shown(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module is one that peft put around another."""
    return hasattr(module, "adapter_layer_names")


def block_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The model without its head, and what its modules' names begin with in `model`."""
    return (model, "") if hasattr(model, "pull_apart") else (model.model, "model.")


class Passes:
    """Which modules of each pass an adapter's keys name, by their names in the stack. What the canvas pass alone has is left out."""

    def __init__(self, model: nn.Module, keys: Iterable[str]):
        self.model, (self.block, root) = model, block_of(model)
        self.starts = {PROMPT: root + PROMPT, CANVAS: root + CANVAS}
        found = {PROMPT: set(), CANVAS: set()}
        for key in keys:
            for which, start in self.starts.items():
                if key.startswith(start) and not key.startswith(f"{start}self_conditioning."):
                    found[which].add(self.owner(key).removeprefix(start))
        self.prompt, self.canvas = found[PROMPT], found[CANVAS]

    @property
    def is_apart(self) -> bool:
        return self.block.prompt_stack is not self.block.decoder

    def owner(self, key: str) -> str:
        """Name of the module that an adapter's key belongs to: the first wrapper in it, or else the last module."""
        start = self.starts[PROMPT]
        names, module = key.split("."), self.model
        if key.startswith(start):  # the same modules, also where the prompt pass has none of its own
            start, module = start.removesuffix("."), self.block.decoder
            names = [start, *key.removeprefix(f"{start}.").split(".")]
        for place, name in enumerate(names):
            if name == start:
                continue
            child = module._modules.get(name)
            if is_wrapper(module) or child is None:
                return ".".join(names[:place])
            module = child
        return key

    def names(self, which: str, modules: Iterable[str]) -> set[str]:
        return {f"{self.starts[which]}{name}" for name in modules}

    def moved(self, key: str) -> str:
        """A name of a canvas pass's module, or something in it, as the prompt pass has it; any other as it is."""
        start = self.starts[CANVAS]
        other = key.startswith(start) and not key.startswith(f"{start}self_conditioning.")
        return self.starts[PROMPT] + key.removeprefix(start) if other else key


def targets(config, name: str) -> bool:
    """Whether an adapter's settings mean the module of this name, or a parameter of it."""
    return bool(_targets_module(config, name) or parameters_of(config, name))


def _targets_module(config, name: str) -> bool:
    tokens = getattr(config, "trainable_token_indices", None)
    tokens = [*tokens] if isinstance(tokens, dict) else ["embed_tokens"] if tokens else []
    if any(name.endswith(each) for each in [*(getattr(config, "modules_to_save", None) or ()), *tokens]):
        return True
    modules = getattr(config, "target_modules", None)
    if modules is None:  # of an adapter of tokens: the embedding
        return name.endswith("embed_tokens") and not getattr(config, "target_parameters", None)
    try:
        from peft.tuners.tuners_utils import check_target_module_exists
    except ImportError:
        return False
    return bool(check_target_module_exists(config, name))


def named_by(modules: str | Iterable[str] | None, name: str) -> bool:
    return bool(re.fullmatch(modules, name)) if isinstance(modules, str) else any(f".{name}".endswith(f".{each}") for each in modules or ())


def parameters_of(config, name: str) -> list[str]:
    """Full names of the parameters of the module `name` that an adapter's settings mean as such."""
    meant = getattr(config, "target_parameters", None) or ()
    whole = {f"{name}.{each.rpartition('.')[2]}": each for each in meant}
    return [full for full, each in whole.items() if f".{full}".endswith(f".{each}")]


def who_made(config, passes: Passes) -> str | None:
    """What an adapter was made on: "two" stacks, with modules for each pass, or "one", where a delta counts in both; None: nothing says."""
    made_on = (getattr(config, "auto_mapping", None) or {}).get("base_model_class")
    if passes.prompt or made_on in TWO_STACKS:
        return "two"
    # On two stacks these settings would have meant the prompt pass's modules, too, and the file would hold their keys.
    meant = not passes.canvas or any(targets(config, name) for name in passes.names(PROMPT, passes.canvas))
    return "one" if meant or made_on in ONE_STACK else None


def outermost(name: str) -> str:
    """Name of the wrapper that a wrapper stands in, or its own."""
    return re.split(r"\.(?:base_layer|token_adapter)(?:\.|$)", name)[0]


def as_saved(name: str, adapter: str) -> str:
    """What something of an adapter in a model is called in the adapter's file."""
    return re.sub(rf"(\.modules_to_save)?\.{re.escape(adapter)}(?=(?:\.[^.]+)?$)", "", name)


def in_place(key: str, adapter: str = "", config=None) -> str:
    """A key of an adapter's file as transformers finds its place: DoRA's magnitudes, modules that are saved whole, and the embedding that
    both passes share."""
    if key.endswith(".lora_magnitude_vector"):
        return f"{key}.weight"
    names = key.split(".")
    for place in range(1, len(names)):
        module = ".".join(names[:place])
        if any(module.endswith(each) for each in getattr(config, "modules_to_save", None) or ()):
            return ".".join([module, "modules_to_save", adapter, *names[place:]])  # transformers 5.17 leaves this out
    return key.replace(PROMPT, CANVAS, 1) if key.endswith(f"{PROMPT}embed_tokens.base_layer.weight") else key


def for_both(keys: Iterable[str], passes: Passes) -> dict[str, str]:
    """What each key of an adapter with one delta for both passes is called where either has its own, and what it is called now."""
    return {new: key for key in keys for new in (key, in_place(passes.moved(key)))}


def as_treated(config, model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """The modules that these keys name, and each one's name that an adapter's settings mean: its own, or the canvas pass's. Not those that
    they mean by neither, such as a head tied to what is meant."""
    passes = Passes(model, keys)
    names = {passes.owner(key) for key in keys}
    back = {passes.moved(name): name for name in names | passes.names(CANVAS, passes.prompt) if passes.moved(name) != name}
    known = {name: name if targets(config, name) else back.get(name, name) for name in names}
    return {name: old for name, old in known.items() if targets(config, old)}


def explicit(config, names: dict[str, str]) -> object:
    """An adapter's settings that mean the modules of these names and no others, each as they treat the module whose name it maps to."""
    here = copy.copy(config)
    saved = {new for new, old in names.items() if any(old.endswith(each) for each in getattr(config, "modules_to_save", None) or ())}
    parameters = {f"{new}.{full.rpartition('.')[2]}": full for new, old in names.items() for full in parameters_of(config, old)}
    with_parameters = {full.rpartition(".")[0] for full in parameters}
    tokens = getattr(config, "trainable_token_indices", None)
    tokens = {} if tokens is None else tokens if isinstance(tokens, dict) else {"embed_tokens": tokens}
    with_tokens = {new: ids for new, old in names.items() for end, ids in tokens.items() if old.endswith(end)}
    changed = {
        "target_modules": {*names} - saved - with_parameters - {*with_tokens} or None,
        "feedforward_modules": {new for new, old in names.items() if named_by(getattr(config, "feedforward_modules", None), old)},
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": sorted(saved) or None,
        "trainable_token_indices": with_tokens or None,
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
    }
    for field in ("rank_pattern", "alpha_pattern"):
        values = {}
        for new, old in {**names, **parameters}.items():
            for pattern, value in (getattr(config, field, None) or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", old):
                    values.setdefault(re.escape(new), value)
        changed[field] = values
    for field, value in changed.items():
        if hasattr(here, field):
            setattr(here, field, value)
    return here


__all__ = [
    "CANVAS", "PROMPT", "SAVED", "Passes", "as_saved", "as_treated", "block_of", "explicit", "for_both", "in_place", "is_wrapper",
    "outermost", "shown", "who_made",
]  # fmt: skip
