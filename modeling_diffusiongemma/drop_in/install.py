"""Ours in the place of transformers' class, where scripts import it from."""

import importlib
from collections.abc import Callable

from .model import DiffusionGemmaForBlockDiffusion, DiffusionGemmaModel

PACKAGE = "transformers.models.diffusion_gemma"
# Where a class is imported from. `DiffusionGemmaModel` stays in the module that builds transformers' own models of it.
PLACES = {
    DiffusionGemmaForBlockDiffusion: ("transformers", PACKAGE, f"{PACKAGE}.modeling_diffusion_gemma"),
    DiffusionGemmaModel: ("transformers", PACKAGE),
}


def install() -> Callable[[], None]:
    """Puts our `DiffusionGemmaForBlockDiffusion` and `DiffusionGemmaModel` in the place of transformers', for whoever imports them from now
    on; what was imported before stays what it was.

    Returns:
        A function that undoes it, which may be called more than once.
    """
    before = []
    for ours, places in PLACES.items():
        for place in places:
            module = importlib.import_module(place)
            before.append((module, ours, getattr(module, ours.__name__)))
            setattr(module, ours.__name__, ours)

    def undo() -> None:
        for module, ours, theirs in before:
            if getattr(module, ours.__name__) is ours:  # or somebody else's by now
                setattr(module, ours.__name__, theirs)

    return undo


__all__ = ["install"]
