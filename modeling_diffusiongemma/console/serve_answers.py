"""What becomes of an answer of transformers' server on its way out: where its text ends, and what form its stream has.

It knows nothing of models: `Answer` is what generation and the server tell each other of one request.

Sources: OpenAI's `stop`, `incomplete_details` and server-sent events (platform.openai.com/docs/api-reference).
"""

import json
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from transformers.cli.serving.utils import response_events_to_chunks

from .serve_requests import error_body

CUT_SHORT = ("length", "time")  # why an answer is not whole
REFUSED = (ValueError, KeyError, TypeError, OSError)  # what the caller got wrong


@dataclass
class Answer:
    """What is known of an answer while it is written: `stops`, strings of which the first one ends it and is no part of it; `gone`, set
    where nobody waits for it any more; why it has `ended`, and the `error` that it failed with."""

    stops: Sequence[str]
    gone: threading.Event
    ended: str | None = field(default=None)
    error: Exception | None = field(default=None)

    def go_on(self) -> None:
        """Raises ConnectionAbortedError where nobody waits for the answer."""
        if self.gone.is_set():
            raise ConnectionAbortedError("whoever asked has left")


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops`; all of it where it holds none."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


class UpToStop:
    """`hand_on` for the pieces of a stream, strings and whatever else is in it, without what stands from the first of `stops` on. The end
    of a piece waits for the next one as long as a stop string may begin there."""

    def __init__(self, hand_on: Callable[[Any], None], stops: Sequence[str]):
        self.hand_on, self.stops, self.waiting, self.stopped = hand_on, stops, "", False

    def __call__(self, piece: Any) -> None:
        if type(piece) is not str:  # a thought, a call, or None at the end
            self.give(self.waiting)
            self.waiting = ""
            return self.hand_on(piece)
        text = before_stop(whole := self.waiting + piece, self.stops)
        begun = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        if text == whole:
            self.give(text[: len(text) - begun])
            self.waiting = text[len(text) - begun :]
        else:
            self.give(text)
            self.waiting, self.stopped = "", True

    def give(self, text: str) -> None:
        if text and not self.stopped:
            self.hand_on(text)


class ToTheEnd:
    """The decode stream and the end of transformers' `streamer`, which leaves out the last bytes of an answer where they are no whole
    character: they become what they are in an answer that is no stream, replacement characters."""

    def __init__(self, streamer):
        self.streamer, self.stream, self.finish, self.waiting = streamer, streamer._decode_stream, streamer.end, []
        streamer._decode_stream, streamer.end = self, self.end

    def step(self, tokenizer, token: int) -> str | None:
        self.waiting.append(token)
        if (piece := self.stream.step(tokenizer, token)) is not None:
            self.waiting.clear()
        return piece

    def end(self) -> None:
        parser = self.streamer._parser
        left = self.streamer._tokenizer.decode(self.waiting, skip_special_tokens=parser is None)
        for piece in response_events_to_chunks(parser.feed(left)) if parser is not None else [left] if left else ():
            self.streamer._enqueue(piece)
        self.finish()


def amend(body: dict[str, Any], answer: Answer) -> dict[str, Any]:
    """The body of an answer that is no stream, without its stop string, and called incomplete where it is."""
    for choice in body.get("choices", ()):
        holder, name = (choice["message"], "content") if "message" in choice else (choice, "text")
        if holder.get(name):
            holder[name] = before_stop(holder[name], answer.stops)
    return _incomplete(body) if body.get("object") == "response" and answer.ended in CUT_SHORT else body


def _incomplete(response: dict[str, Any]) -> dict[str, Any]:
    """A response as OpenAI tells that its tokens were used up."""
    messages = [item | {"status": "incomplete"} if item["type"] == "message" else item for item in response["output"]]
    return response | {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}, "output": messages}


async def begun(pieces: AsyncGenerator[str, None], answer: Answer, announced: int) -> list[str]:
    """The first pieces of a stream, up to one that says something of the answer; `announced`: how many come before it.

    Raises:
        Exception: what the answer failed with before it said anything, so that it is refused like any other.
    """
    head = [await anext(pieces) for _ in range(announced + 1)]
    if answer.error is not None:
        await pieces.aclose()
        raise answer.error
    return head


async def in_form(head: Sequence[str], pieces: AsyncGenerator[str, None], answer: Answer, response: bool) -> AsyncGenerator[str, None]:
    """A stream that has `begun`, as OpenAI's clients expect it; `response`: one of /v1/responses, which says itself where it ends."""
    for piece in head:
        yield _piece_in_form(piece, answer)
    async with aclosing(pieces):
        async for piece in pieces:
            yield _piece_in_form(piece, answer)
    if not response:
        yield "data: [DONE]\n\n"


def _piece_in_form(piece: str, answer: Answer) -> str:
    """transformers' server writes an error between quotes whatever it holds, and calls every response completed."""
    if answer.error is not None:
        status = 400 if isinstance(answer.error, REFUSED) else 500
        form = f"data: {json.dumps(error_body(status, str(answer.error)))}\n\n"
        return piece.replace(f'data: {{"error": "{answer.error}"}}\n\n', form)
    if answer.ended in CUT_SHORT and piece.endswith('"type":"response.completed"}\n\n'):
        event = json.loads(piece.removeprefix("data: "))
        event |= {"type": "response.incomplete", "response": _incomplete(event["response"])}
        return f"data: {json.dumps(event)}\n\n"
    return piece


__all__ = ["REFUSED", "Answer", "ToTheEnd", "UpToStop", "amend", "before_stop", "begun", "in_form"]
