"""Infilling in one call: the blanks of a text, filled in from both sides."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .arguments import shown
from .asking import prompt_ids
from .constraints.languages import Template


class Filled(NamedTuple):
    """`text`, without special tokens; `values`, the text of each field by its name; `tokens` int64 (n,), the end included."""

    text: str
    values: dict[str, str]
    tokens: torch.Tensor


def fill(
    model, template: str | Template, tokenizer, prompt: str | Sequence[dict[str, Any]] | None = None, **settings
) -> Filled:  # fmt: skip
    """The template with its blanks filled in; see `DiffusionGenerationMixin.fill`."""
    template = Template(template) if isinstance(template, str) else template
    if not isinstance(template, Template):
        raise ValueError(f"`template` is {shown(template)}; expected a string with blanks, such as 'Dear {{name:1-8}},', or a `Template`")
    for name in ("inputs", "input_ids", "inputs_embeds", "constraint", "return_dict_in_generate", "num_return_sequences"):
        if settings.get(name) is not None:
            raise ValueError(f"`{name}` is given to `fill`; expected None: `generate(constraint=Template(...))` takes it")
    ids = prompt_ids(prompt, tokenizer, model.device)
    output = model.generate(ids, constraint=template, tokenizer=tokenizer, return_dict_in_generate=True, **settings)
    if (copies := len(output.sequences)) > 1:
        raise ValueError(f"`num_return_sequences` of the generation config is {copies}; expected 1: a template is filled in once")
    tokens = output.sequences[0, ids.shape[1] :][: int(output.lengths[0])]
    if output.finish_reasons[0] == "time":
        raise ValueError(f"`max_time` is {settings.get('max_time')}, which was over before the text was whole; expected more")
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    return Filled(text, template.values(text), tokens)


__all__ = ["Filled", "fill"]
