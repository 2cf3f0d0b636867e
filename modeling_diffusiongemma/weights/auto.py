"""The Auto classes: what is registered, and what it replaces, in one place.

| Auto class | transformers alone | with this package imported |
|---|---|---|
| `AutoModel` | its own `DiffusionGemmaModel` | `drop_in.DiffusionGemmaModel` |
| `AutoModelForCausalLM` | refuses the config | `DiffusionGemmaForMaskedBlockLM` |
| `AutoModelForImageTextToText` | its own `DiffusionGemmaForBlockDiffusion` | `drop_in.DiffusionGemmaForBlockDiffusion` |
| `AutoModelForMultimodalLM` | its own `DiffusionGemmaForBlockDiffusion` | `drop_in.DiffusionGemmaForBlockDiffusion` |

So no script that runs with a class of transformers meets other manners here.
`AutoConfig`, `AutoTokenizer` and `AutoProcessor` stay transformers' own: its config class is used here, and tokenizer and
processor belong to the checkpoint. The same table is the `auto_map` of a repository saved with `remote_code=True`.
"""

import transformers
from transformers import PreTrainedModel

from ..layers.configuration import DiffusionGemmaConfig

REGISTERED = {
    "AutoModel": "DiffusionGemmaModel",
    "AutoModelForCausalLM": "DiffusionGemmaForMaskedBlockLM",
    "AutoModelForImageTextToText": "DiffusionGemmaForBlockDiffusion",
    "AutoModelForMultimodalLM": "DiffusionGemmaForBlockDiffusion",
}


def register(*models: type[PreTrainedModel]) -> None:
    """Makes the Auto classes load ours, `models`, for `DiffusionGemmaConfig`."""
    ours = {model.__name__: model for model in models}
    for auto_name, model_name in REGISTERED.items():
        auto, model = getattr(transformers, auto_name), ours[model_name]
        auto.register(DiffusionGemmaConfig, model, exist_ok=True)
        # transformers before 5.23 passes over registrations for a config class of its own without a word.
        auto._model_mapping._extra_content[DiffusionGemmaConfig] = model


def forget(auto: type, model: type[PreTrainedModel]) -> None:
    """Takes back that the Auto class `auto` loads `model` for `DiffusionGemmaConfig`, where it does."""
    if auto._model_mapping._extra_content.get(DiffusionGemmaConfig) is model:
        del auto._model_mapping._extra_content[DiffusionGemmaConfig]


__all__ = ["REGISTERED", "forget", "register"]
