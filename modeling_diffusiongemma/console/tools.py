"""What console and server know of answers that call tools: whether a model is told of these, and how its answers are taken apart."""

from typing import Any

from generation.asking import template_variables
from generation.constraints.calls import MARKS, RESPONSE_TEMPLATE


def check_told(tokenizer) -> None:
    """Raises ValueError where a chat template tells the model of no tools: it would answer as if there were none."""
    if "tools" not in template_variables(tokenizer.chat_template):
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


__all__ = ["check_told", "read_answer", "take_apart"]
