"""Files of examples to train on, a JSON object a line, checked whole. It imports neither torch nor transformers."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from .arguments import UsageError

BEGUN = "begun.json"  # in the folder of a run: what it began as
SHOWN = 5  # lines that are told of
RESPONSES = ("response", "completion")  # the second as TRL has it
READ = {"prompt", *RESPONSES, "messages", "tools", "chat_template_kwargs"}  # keys of a line; others, such as an id, are not learned from
FORMS = 'expected {"prompt": ..., "response": ...} or {"messages": [...]}'


def filled(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip())


def problem(example: Any) -> str | None:
    """What is wrong with an example; None where nothing is."""
    if not isinstance(example, Mapping):
        return f"a {type(example).__name__}; {FORMS}"
    if "messages" in example:
        if also := sorted({"prompt", *RESPONSES}.intersection(example)):
            return f"`messages` and {also}; {FORMS}"
        return problem_of_messages(example["messages"])
    given = [name for name in RESPONSES if name in example]
    if "prompt" not in example or len(given) != 1:
        return f"the keys {sorted(example)}; {FORMS}"
    if all(isinstance(example[name], list) for name in ("prompt", *given)):  # messages, as TRL allows
        return problem_of_messages(example["prompt"] + example[given[0]])
    for name in ("prompt", *given):
        if not filled(example[name]):
            return f"`{name}` is {example[name]!r}; expected text"
    return None


def problem_of_messages(messages: Any) -> str | None:
    turns = messages if isinstance(messages, list) else []
    if not turns or not all(isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in turns):
        return '`messages` is no conversation; expected a list of {"role": ..., "content": ...}'
    for place, turn in enumerate(turns, 1):
        content = turn.get("content")
        if content is None and not any(name.startswith("tool") for name in turn):  # a template may write these instead
            return f"the turn {place} has the keys {sorted(turn)} and no `content`; expected one: a template writes nothing for it"
        if content is not None and not isinstance(content, str | list):
            return f"the `content` of turn {place} is {content!r}; expected text"
    answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        return f"the conversation has no assistant turn, only {sorted({turn['role'] for turn in turns})}; expected one to learn"
    if answers[0] == 0:
        return "the conversation begins with the assistant; expected a turn before it"
    for place in answers:
        if not filled(turns[place].get("content")) and not turns[place].get("tool_calls"):
            return f"the assistant's turn {place + 1} is empty; expected text or `tool_calls`"
    return None


def lines_of(path: str) -> Iterator[tuple[int, str]]:
    """The lines that hold something, from 1."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from ((place, line) for place, line in enumerate(file, 1) if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path!r} cannot be read: {error}; expected a file of JSON lines in UTF-8") from error


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that it has twice, of which JSON readers forget the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return found


def refuse(path: str, problems: list[tuple[int, str]]) -> None:
    """UsageError that tells of the first lines something is wrong with, where there are any."""
    if problems:
        told = "\n".join(f"  line {place}: {what}" for place, what in problems[:SHOWN])
        more = f"\n  and {len(problems) - SHOWN} more lines" if len(problems) > SHOWN else ""
        raise UsageError(f"{path} is wrong in {len(problems)} of its lines:\n{told}{more}")


def read_examples(path: str) -> tuple[list[int], list[dict[str, Any]]]:
    """The lines of a file's examples, from 1, and the examples; UsageError for a file that cannot be read, holds none, or holds something
    else."""
    places, examples, problems = [], [], []
    for place, line in lines_of(path):
        try:
            example = json.loads(line, object_pairs_hook=once)
            json.dumps(example, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            letter = error.object[error.start]
            problems.append((place, f"the lone surrogate {letter!r}, which no tokenizer can read; expected text that UTF-8 can write"))
            continue
        except (RecursionError, ValueError) as error:
            problems.append((place, f"no JSON ({error}); {FORMS}"))
            continue
        if (what := problem(example)) is not None:
            problems.append((place, what))
        places.append(place)
        examples.append(example)
    refuse(path, problems)
    if not examples:
        raise UsageError(f"{path} holds no example; {FORMS} a line")
    return places, examples


def unread_keys(examples: list[dict[str, Any]]) -> list[str]:
    """Keys of examples that nothing is learned from."""
    return sorted({key for example in examples for key in example} - READ)


__all__ = ["BEGUN", "read_examples", "refuse", "unread_keys"]
