"""The Auto classes: what is registered, and what it replaces, in one place.

| Auto class | transformers alone | with this package imported |
|---|---|---|
| `AutoModel` | its own `DiffusionGemmaModel` | `DiffusionGemmaBlockModel` |
| `AutoModelForCausalLM` | refuses the config | `DiffusionGemmaForMaskedBlockLM` |
| `AutoModelForImageTextToText` | its own `DiffusionGemmaForBlockDiffusion` | `DiffusionGemmaForMaskedBlockLM` |
| `AutoModelForMultimodalLM` | its own `DiffusionGemmaForBlockDiffusion` | `DiffusionGemmaForMaskedBlockLM` |
"""

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

from .configuration import DiffusionGemmaConfig
from .head import DiffusionGemmaForMaskedBlockLM
from .model import DiffusionGemmaBlockModel

REGISTERED = {
    AutoModel: DiffusionGemmaBlockModel,
    AutoModelForCausalLM: DiffusionGemmaForMaskedBlockLM,
    AutoModelForImageTextToText: DiffusionGemmaForMaskedBlockLM,
    AutoModelForMultimodalLM: DiffusionGemmaForMaskedBlockLM,
}


def register() -> None:
    """Makes the Auto classes load ours for `DiffusionGemmaConfig`."""
    for auto, model in REGISTERED.items():
        auto.register(DiffusionGemmaConfig, model, exist_ok=True)
        # transformers before 5.23 passes over registrations for a config class of its own without a word.
        auto._model_mapping._extra_content[DiffusionGemmaConfig] = model


__all__ = ["REGISTERED", "register"]
