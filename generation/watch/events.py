"""Generation as an iterator: of events, step by step, or of the committed text.

`generate` runs in a thread of its own, under the autocast of whoever asks for the first event, and hands over what happens. Closing the
iterator (leaving the loop, an exception in the consumer) stops it at the next step; an exception of `generate` is raised in the consumer.
"""

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..rules.prediction import Prediction
from ..rules.state import CanvasState
from .watcher import WholeCanvas


class StepEvent(NamedTuple):
    """A denoising step: `canvas` and `step` count up from 0; `argmax` int64, `accepted` bool and `entropy` float32 nats, each (B, C).
    `possible` int64 (B, C): how many ids could stand at a position, the rest of the argmax canvas being as it is; None where no row has a
    constraint on its text."""

    canvas: int
    step: int
    argmax: torch.Tensor
    accepted: torch.Tensor
    entropy: torch.Tensor
    possible: torch.Tensor | None = None


class CommitEvent(NamedTuple):
    """A finished canvas: `canvas` counts up from 0; `tokens` (B, n), padded behind the end of a row; `lengths` int64 (B,): how many of
    them each row keeps; `finish_reasons`: why each row has ended, as in `DiffusionGenerationOutput`, None for rows that go on."""

    canvas: int
    tokens: torch.Tensor
    lengths: torch.Tensor
    finish_reasons: tuple[str | None, ...]


class Closed(Exception):
    """Raised inside `generate` when nobody listens any more."""


class _Relay(WholeCanvas):
    """Puts events into a queue."""

    def __init__(self, needs_possible: bool):
        self.needs_possible = needs_possible
        self.events: queue.Queue = queue.Queue()
        self.closed, self.commits = threading.Event(), 0

    def show(self, canvas_index: int, step: int, state: CanvasState, prediction: Prediction) -> None:
        possible = next((value.cpu() for value in state.possible), None)
        self._send(StepEvent(canvas_index, step, state.argmax.cpu(), state.accepted.cpu(), state.entropy.cpu(), possible))

    def commit(self, tokens: torch.Tensor, lengths: torch.Tensor, finish_reasons: tuple[str | None, ...]) -> None:
        self._send(CommitEvent(self.commits, tokens.cpu(), lengths.cpu(), finish_reasons))
        self.commits += 1

    def _send(self, event: StepEvent | CommitEvent) -> None:
        if self.closed.is_set():
            raise Closed
        self.events.put(event)


def autocasts() -> list[torch.autocast]:
    """Autocast as it is in this thread, for another to enter."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    return [torch.autocast(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]


def stream_events(model, *args, **kwargs) -> Iterator[StepEvent | CommitEvent]:
    """Yields what happens in `model.generate(*args, **kwargs)`, as it happens.

    Raises:
        ValueError: `streamer` or `watcher` is given; and whatever `generate` raises.
    """
    return _events(_Relay(needs_possible=True), model, args, kwargs)


def _events(relay: _Relay, model, args: tuple, kwargs: dict) -> Iterator[StepEvent | CommitEvent]:
    for name in ("streamer", "watcher"):
        if name in kwargs:
            raise ValueError(f"`{name}` is given; expected none: the events are the stream")
    return _relayed(relay, model, args, kwargs)


def _relayed(relay: _Relay, model, args: tuple, kwargs: dict) -> Iterator[StepEvent | CommitEvent]:
    end = object()
    failure: list[BaseException] = []
    casts = autocasts()  # which each thread has for itself

    def run() -> None:
        try:
            with contextlib.ExitStack() as stack:
                for cast in casts:
                    stack.enter_context(cast)
                model.generate(*args, watcher=relay, **kwargs)
        except Closed:
            pass
        except BaseException as error:
            failure.append(error)
        finally:
            relay.events.put(end)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (event := relay.events.get()) is not end:
            yield event
        if failure:
            raise failure[0]
    finally:
        relay.closed.set()
        thread.join()


def stream_text(model, tokenizer, *args, **kwargs) -> Iterator[str]:
    """Yields the committed text of one prompt, canvas by canvas, without special tokens and never half a character. `generate` gets the
    tokenizer, too."""
    text = TextAssembler(tokenizer)
    for event in _events(_Relay(needs_possible=False), model, args, {**kwargs, "tokenizer": tokenizer}):
        if isinstance(event, CommitEvent):
            if event.tokens.shape[0] != 1:
                raise ValueError(f"`stream_text` got {event.tokens.shape[0]} rows; expected one prompt")
            if new := text.add(event.tokens[0].tolist()):
                yield new
    if new := text.rest():
        yield new


class TextAssembler:
    """Turns tokens into text bit by bit; holds back the end while it may be the first bytes of a longer character.

    Not by `tokenizers.decoders.DecodeStream`: with a vocabulary that falls back to bytes, as Gemma's does, it fails for good where a
    lone byte follows a character of several, which a model may write (tests/test_events.py); it never hands out an end that stays
    incomplete; and it wants a tokenizer with a backend in Rust.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.given = tokenizer, [], 0

    def add(self, ids: list[int]) -> str:
        self.ids += ids
        return self._new(held="\ufffd")

    def rest(self) -> str:
        """What is still held back."""
        return self._new(held="")

    def _new(self, held: str) -> str:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True).rstrip(held)
        new, self.given = text[self.given :], max(self.given, len(text))
        return new


__all__ = ["CommitEvent", "StepEvent", "TextAssembler", "stream_events", "stream_text"]
