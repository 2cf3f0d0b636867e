"""A prompt as a caller has it, a text or a chat, as ids; the id that ends an answer to it; and what a chat template reads."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _get_template_variables

from .arguments import shown

# Variables of chat templates that whoever asks does not choose.
GIVEN = {"add_generation_prompt", "bos_token", "eos_token", "messages", "raise_exception", "strftime_now", "tools"}


class Ends(NamedTuple):
    """How an answer ends: `turn`, the id that is written; `stops`, all that end a text; `pad`, what stands behind it."""

    turn: int
    stops: tuple[int, ...]
    pad: int


def check_text(name: str, value: Any) -> None:
    """Raises ValueError for a lone surrogate in a text, or in any text of a chat: no tokenizer can read it."""
    for text in _texts(value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            letter = text[error.start]
            raise ValueError(
                f"`{name}` holds the lone surrogate {letter!r}, in {shown(text)}; expected text that UTF-8 can write"
            ) from error


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def prompt_ids(prompt: str | Sequence[Mapping[str, Any]] | None, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> torch.Tensor:
    """Int64 (1, P): a text as it stands, a chat by the tokenizer's template, or for None what begins a sequence.

    Raises:
        ValueError: no tokenizer; a prompt that is neither, holds a lone surrogate, or has no tokens; nothing to begin a sequence with.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        inside = ", which it has as `.tokenizer`" if isinstance(getattr(tokenizer, "tokenizer", None), PreTrainedTokenizerBase) else ""
        raise ValueError(f"`tokenizer` is {shown(tokenizer)}; expected the model's tokenizer{inside}")
    check_text("prompt", prompt)
    if prompt is None:
        if tokenizer.bos_token_id is None:
            raise ValueError("`prompt` is None, and the tokenizer has no `bos_token_id` to begin with; expected a prompt")
        ids = [tokenizer.bos_token_id]
    elif isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif isinstance(prompt, Sequence) and prompt and all(isinstance(message, Mapping) for message in prompt):
        ids = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        raise ValueError(f"`prompt` is {shown(prompt)}; expected a text or a list of messages")
    if not ids:
        raise ValueError(f"`prompt` is {shown(prompt)}, which has no tokens; expected at least one")
    return torch.tensor([ids], dtype=torch.int64, device=device)


def end_of_turn(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> int:
    """Of the ids that end a text the one that ends the assistant's turn in the chat template; without a template the tokenizer's end of
    sequence, where it is among them, and else the first."""
    if tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        asked = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        answered = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"][len(asked) :]
        if found := [token for token in answered if token in stops]:
            return found[0]
    return tokenizer.eos_token_id if tokenizer.eos_token_id in stops else stops[0]


def template_variables(templates: str | Mapping[str, str] | None) -> set[str]:
    """Names that a chat template reads, or any of several."""
    return set().union(*map(_get_template_variables, templates.values() if isinstance(templates, Mapping) else [templates]))


def check_read(name: str, given: Mapping[str, Any], variables: Collection[str], taken: Collection[str] = ()) -> None:
    """Raises ValueError where something `given` to a chat template as `name` is none of the `variables` that the template reads, and is not
    `taken` in another way: what is written would be as without it. `enable_thinking` that is false is let through, as it is without it."""
    if unread := sorted(each for each, value in given.items() if each not in {*variables, *taken} and (value or each != "enable_thinking")):
        raise ValueError(
            f"{name} has {unread}, which the chat template of this model does not read; expected some of {sorted({*variables} - GIVEN)}"
        )


__all__ = ["Ends", "check_read", "check_text", "end_of_turn", "prompt_ids", "template_variables"]
