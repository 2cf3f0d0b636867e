"""How an example becomes token ids, and which of them the model is to learn to write.

A response is what the chat template writes for an assistant's turn behind the generation prompt, up to the token that ends the turn: what
`generate` is to write. It is found by rendering the chat up to the turn and with it, so that templates need no `{% generation %}` (the
released model's has none). Knows nothing of tensors.
"""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

from generation.arguments import shown
from generation.asking import check_read, template_variables

KEYS = (("prompt", "response"), ("prompt", "completion"), ("messages",))


class Example(NamedTuple):
    """Token `ids`, and for each whether it is a target."""

    ids: list[int]
    targets: list[bool]


def read_example(example: tuple | Mapping, tokenizer, template_kwargs: Mapping, name: str) -> Example:
    """An example in any of the forms that `BlockDiffusionCollator` takes; ValueError, beginning with `name`, where it is none."""
    tools, further = None, {}
    if isinstance(example, Mapping):
        keys = next((keys for keys in KEYS if all(example.get(key) is not None for key in keys)), None)
        if keys is None:
            missing = "`prompt` and `response`, or `messages`, which Trainer drops unless `remove_unused_columns` is False"
            raise ValueError(f"{name} has the keys {sorted(map(str, example))}; expected {missing}")
        further = example.get("chat_template_kwargs") or {}
        if not isinstance(further, Mapping):
            raise ValueError(f"{name} has {further!r} as `chat_template_kwargs`; expected a mapping")
        template_kwargs = {**template_kwargs, **further}
        tools, example = example.get("tools"), tuple(example[key] for key in keys)
    elif not isinstance(example, tuple | list) or len(example) != 2:
        raise ValueError(f"{name} is {example!r}; expected a pair of prompt and response, or a mapping")
    if len(example) == 1:
        return read_chat(example[0], tokenizer, tools, template_kwargs, name)
    (kind, prompt), (other, response) = (_kind(side, name) for side in example)
    if kind != other:
        raise ValueError(f"{name}: prompt and response are of different kinds; expected both as text, as messages or as token ids")
    if kind == "ids":
        if further or tools:
            given = "`chat_template_kwargs`" if further else "`tools`"
            raise ValueError(f"{name} has {given}, and is token ids, which no chat template makes; expected text or messages")
        if not prompt or not response:
            raise ValueError(f"{name} has {len(prompt)} prompt and {len(response)} response tokens; expected some of both")
        return Example(prompt + response, [False] * len(prompt) + [True] * len(response))
    if kind == "text":
        prompt, response = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": response}]
    return read_chat([*prompt, *response], tokenizer, tools, template_kwargs, name, since=len(prompt))


def _kind(value: Any, name: str) -> tuple[str, Any]:
    """What a prompt or a response is given as, and itself as a string or a list."""
    if isinstance(value, str):
        return "text", value
    items = _items(value)
    if items and all(isinstance(item, Mapping) for item in items):
        return "messages", items
    if items is None or not all(isinstance(item, Integral) and not isinstance(item, bool) and item >= 0 for item in items):
        raise ValueError(f"{name} holds {shown(value)}; expected prompt and response as text, as messages or as token ids")
    return "ids", [int(item) for item in items]


def _items(value: Any) -> list | None:
    """Those of a sequence, of a tensor or of an array; None of anything else."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else None


def read_chat(messages: Sequence[Mapping], tokenizer, tools, template_kwargs: Mapping, name: str, since: int = 0) -> Example:
    """Ids of a chat, of which the assistant's turns are targets, those before the message `since` left out."""
    if tokenizer is None:
        raise ValueError(f"{name} is text and `tokenizer` is None; expected a tokenizer with a chat template")
    given = _items(messages)
    if given is None or not all(isinstance(turn, Mapping) for turn in given):
        raise ValueError(f"{name} has {shown(messages)} as messages; expected a list of mappings, each with a `role`")
    messages = [dict(turn) for turn in given]
    templates, chosen = tokenizer.chat_template, template_kwargs.get("chat_template")
    if chosen is not None:  # the name of one, or one itself
        templates = templates.get(chosen, chosen) if isinstance(templates, Mapping) else chosen
    variables = template_variables(templates)
    check_read(f"{name}: `template_kwargs` of the collator or `chat_template_kwargs`", template_kwargs, variables, {"chat_template"})
    if tools and "tools" not in variables:
        raise ValueError(f"{name} has `tools`, and the chat template tells the model of none; expected a template that reads them")
    turns = [place for place, message in enumerate(messages) if message.get("role") == "assistant" and place >= since]
    if not turns:
        roles = [message.get("role") for message in messages]
        raise ValueError(f"{name} has messages of {roles}; expected an assistant's turn among them, to be learned")

    def render(until: int, add_generation_prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            messages[:until], tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **template_kwargs
        )

    text = render(len(messages))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    targets = [False] * len(encoded["input_ids"])
    for turn in turns:
        before, behind = render(turn, add_generation_prompt=True), render(turn + 1)
        if not (text.startswith(before) and text.startswith(behind) and len(behind) > len(before)):
            raise ValueError(
                f"{name}: the chat template writes message {turn} otherwise once others follow it, so that what the model is to write "
                "cannot be told; expected a chat that ends with it"
            )
        start, end = len(before), len(before) + len(behind[len(before) :].rstrip())
        for place, (first, last) in enumerate(encoded["offset_mapping"]):
            targets[place] |= start <= first and last <= end and last > first
    if not any(targets) or all(targets):
        raise ValueError(f"{name} has {sum(targets)} target tokens of {len(targets)}; expected some of a prompt and some of a response")
    end = len(targets) - targets[::-1].index(True)  # behind the last target there is nothing to learn
    return Example(encoded["input_ids"][:end], targets[:end])


__all__ = ["Example", "read_chat", "read_example"]
