"""Answers of a model in training, and whether they are right: what a loss does not say.

Every example is asked as `generate` would be: its last response is taken away, and what the model writes in its place is compared with it.
Knows nothing of optimizers, of Trainer, or of how an example becomes tokens: that is the collator's.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy
import torch
from transformers import set_seed


class Answer(NamedTuple):
    """One example's: `prompt` (its text, its messages before the response, or its token ids), what the model wrote, the `response` that
    it was to write, and whether that is `right`. Text without special tokens where the collator has a tokenizer, else token ids without
    the end. `tokens` were written, the end included, in `steps` denoising steps over `canvases` canvases."""

    prompt: Any
    answer: str | list[int]
    response: str | list[int]
    right: bool
    tokens: int
    steps: int
    canvases: int


@dataclass(frozen=True)
class Answering:
    """How a model is asked.

    Args:
        settings: arguments of `generate`, such as `max_denoising_steps`. `max_new_tokens` is by default the longest response's length.
        batch_size: prompts at a time.
        seed: of the first example; the second has the next one, and so on. An answer depends on its prompt and its seed alone.
        check (*optional*): `check(prompt, answer, response)` says whether an answer is right. Default: it is the response, token by token
            of its text, special tokens such as those of a tool call included.
        limit (*optional*): only so many examples, from the beginning.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 16
    seed: int = 0
    check: Callable[[Any, Any, Any], bool] | None = None
    limit: int | None = None

    def __post_init__(self):
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if (value is not None or name == "batch_size") and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` is {value!r}; expected a positive integer")
        if taken := {"seed", "generator", "return_dict_in_generate", "num_return_sequences"}.intersection(self.settings):
            raise ValueError(f"`settings` holds {sorted(taken)}; expected none of them: an example has one answer, of its seed")


@contextlib.contextmanager
def apart(seed: int) -> Iterator[None]:
    """A context in which Python, numpy and torch draw from `seed`; behind it they go on as if nothing had been drawn."""
    states = random.getstate(), numpy.random.get_state()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    forked = {} if device is None else {"devices": range(torch.accelerator.device_count()), "device_type": device.type}
    try:
        with torch.random.fork_rng(**forked):
            set_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def asked(collator, example: tuple | Mapping) -> tuple[list[int], list[int]]:
    """Ids of an example in front of its last response, and those of that response."""
    ids, targets = collator.read(example)
    end = len(targets) - targets[::-1].index(True)
    begin = next(place for place in range(end - 1, -1, -1) if not targets[place - 1])
    return ids[:begin], ids[begin:end]


def prompt_of(example: tuple | Mapping, ids: list[int]) -> Any:
    """As a checker is shown it."""
    if not isinstance(example, Mapping):
        return example[0]
    if example.get("messages") is None:
        return example.get("prompt", ids)
    turns = list(example["messages"])
    last = max(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
    return turns[:last]


@torch.no_grad()
def answer_examples(model, collator, examples: Sequence[tuple | Mapping], answering: Answering, places: Sequence[int] | None = None):
    """Asks for the examples and judges what comes: a list of `Answer`.

    Args:
        model: `DiffusionGemmaForMaskedBlockLM`, or a PEFT model around one. It generates in evaluation mode, and is in its mode again.
        collator: `BlockDiffusionCollator`, which says what an example is.
        places (*optional*): the places of `examples` among all there are, which their seeds follow. Default: 0, 1, ...
    """
    rows = [asked(collator, example) for example in examples]
    places = range(len(rows)) if places is None else places
    settings = dict(answering.settings)
    settings.setdefault("max_new_tokens", max((len(response) for _, response in rows), default=1))
    canvas_length = settings.get("canvas_length") or model.generation_config.canvas_length or model.config.canvas_length
    ends = settings.get("eos_token_id", model.generation_config.eos_token_id)
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    ends |= set() if (last := getattr(collator.tokenizer, "eos_token_id", None)) is None else {last}
    found, mode = [], model.training
    model.eval()
    try:
        for begin in range(0, len(rows), answering.batch_size):
            chosen = slice(begin, begin + answering.batch_size)
            inputs = left_padded([prompt for prompt, _ in rows[chosen]], collator.pad_token_id, model.device)
            seeds = [answering.seed + place for place in places[chosen]]
            output = model.generate(**inputs, **settings, seed=seeds, num_return_sequences=1, return_dict_in_generate=True)
            written = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
            counts = zip(written, output.lengths.tolist(), output.denoising_steps.tolist(), strict=True)
            for (prompt, wanted), example, (ids, tokens, steps) in zip(rows[chosen], examples[chosen], counts, strict=True):
                texts = [as_text(collator.tokenizer, until_end(of, ends)) for of in (ids[:tokens], wanted)]
                (answer, whole), (response, whole_response) = texts
                shown = prompt_of(example, prompt)
                right = whole == whole_response if answering.check is None else bool(answering.check(shown, answer, response))
                found.append(Answer(shown, answer, response, right, tokens, steps, max(1, -(-tokens // canvas_length))))
    finally:
        model.train(mode)
    return found


def left_padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Prompts as `generate` takes them, int64 `(B, longest)`."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    tensors = (torch.tensor(value, dtype=torch.int64, device=device) for value in (ids, mask))
    return dict(zip(("input_ids", "attention_mask"), tensors, strict=True))


def until_end(ids: list[int], ends: set[int]) -> list[int]:
    """The ids in front of the first that ends a sequence."""
    return ids[: next((place for place, one in enumerate(ids) if one in ends), len(ids))]


def as_text(tokenizer, ids: list[int]) -> tuple[Any, Any]:
    """As it is shown, without special tokens, and whole; the ids themselves where there is no tokenizer."""
    if tokenizer is None:
        return ids, ids
    return tuple(tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, False))


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """`exact_match`, the share that is right; `tokens_per_forward`, the mean over answers of tokens by canvas passes; and
    `steps_per_canvas`, denoising steps by canvases. Empty where there is no answer."""
    if not answers:
        return {}
    return {
        "exact_match": sum(one.right for one in answers) / len(answers),
        "tokens_per_forward": sum(one.tokens / one.steps for one in answers) / len(answers),
        "steps_per_canvas": sum(one.steps for one in answers) / sum(one.canvases for one in answers),
    }


__all__ = ["Answer", "Answering", "answer_examples", "apart", "asked", "summary"]
