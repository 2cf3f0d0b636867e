"""What console and server know of chat templates: whether a model is told of tools and of whatever else a template is given, and how its
answers are taken apart."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from transformers.utils.chat_template_utils import _get_template_variables

from generation.constraints.calls import MARKS, RESPONSE_TEMPLATE

# Variables of chat templates that whoever asks does not choose.
GIVEN = {"add_generation_prompt", "bos_token", "eos_token", "messages", "raise_exception", "strftime_now", "tools"}


def templates_of(processor) -> Iterable[str]:
    """The chat templates of a tokenizer or processor."""
    found = processor.chat_template or ""
    return found.values() if isinstance(found, dict) else [found]


def check_read(processor, given: Mapping[str, Any]) -> None:
    """Raises ValueError where no chat template reads one of the variables that are `given` to it: the answer would be as without it. Those
    that `apply_chat_template` itself takes are let through, and so is `enable_thinking` that is false, as it is without it."""
    variables = set().union(*map(_get_template_variables, templates_of(processor)))
    read = variables | set(inspect.signature(processor.apply_chat_template).parameters) - {"documents"}
    if unread := sorted(name for name, value in given.items() if name not in read and (value or name != "enable_thinking")):
        raise ValueError(
            f"`chat_template_kwargs` (or the server's `--reasoning`) has {unread}, which the chat template of this model does not read; "
            f"expected some of {sorted(variables - GIVEN)}"
        )


def check_told(tokenizer) -> None:
    """Raises ValueError where a chat template tells the model of no tools: it would answer as if there were none."""
    if not any("tools" in template for template in templates_of(tokenizer)):
        raise ValueError(
            "`tools` are given, and the chat template of this model tells it of none; expected a model that was taught to call"
        )


def take_apart(tokenizer) -> None:
    """Lets answers be taken apart into text, thought and calls, where the tokenizer has marks for these and does not say how itself:
    transformers' server knows how for other models' types."""
    if getattr(tokenizer, "response_template", None) is None:
        if all(tokenizer.convert_tokens_to_ids(mark) not in (None, tokenizer.unk_token_id) for mark in MARKS):
            tokenizer.response_template = RESPONSE_TEMPLATE


def read_answer(tokenizer, ids: list[int]) -> dict[str, Any]:
    """An answer's `text`, its `tool_calls` (each a `name` with its `arguments`), and `reasoning_content` where there is a thought."""
    template = getattr(tokenizer, "response_template", None) or RESPONSE_TEMPLATE
    message = tokenizer.parse_response(tokenizer.decode(ids), template, prefix="")
    found = {"text": message.get("content", ""), "tool_calls": [call["function"] for call in message.get("tool_calls", ())]}
    return found | ({"reasoning_content": message["reasoning_content"]} if "reasoning_content" in message else {})


__all__ = ["check_read", "check_told", "read_answer", "take_apart"]
