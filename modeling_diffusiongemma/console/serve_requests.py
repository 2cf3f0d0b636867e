"""What a request must be before transformers' server sees it: its size, its path, the model it names, its chat.

It knows nothing of transformers: `Door` is an ASGI application around another, and `check_chat` reads plain JSON.
"""

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from ..checkpoints import shipped

MAX_BODY = 32 * 2**20  # bytes; a few photographs
MAX_CHARACTERS = 2**18  # of text in a request; cut into tokens within two seconds, in which nobody else is answered
CONTENT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image_url", "input_image")
IMAGE_SOURCES = ("data:image/", "http://", "https://")
NOT_SERVED = {"/v1/audio/transcriptions": "this model reads no audio; expected /v1/chat/completions, /v1/completions or /v1/responses"}
# Fields that transformers' server passes over, some with a line in its log: the values that ask for what happens anyway.
IGNORED = {
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (False, 0), "top_logprobs": (0,), "presence_penalty": (0,),
    "functions": ([],), "function_call": ("auto",), "previous_response_id": (), "background": (False,),
    "modalities": (["text"],), "audio": (), "web_search_options": (), "reasoning_effort": ("none",), "verbosity": ("medium",),
    "include": ([],), "max_tool_calls": (), "truncation": ("disabled",), "reasoning": ({}, {"effort": "none"}), "conversation": (),
    "context_management": ([],), "moderation": (), "background_options": (), "access_programs": (), "image": (),
}  # fmt: skip
RESPONSES = "/v1/responses"
SET_HERE = ("add_generation_prompt", "conversation", "load_audio_from_video", "return_dict", "return_tensors", "tokenize", "tools")
TRACES = ("html", "svg", "safetensors")  # what `trace` of a request may be: how its answer brings along how it came about
TRACED = ("/v1/chat/completions", "/v1/completions")
# Types that transformers' server takes for granted, or makes of whatever it gets.
FORMS = {
    **dict.fromkeys(("chat_template_kwargs", "logit_bias", "stream_options"), (dict, "a JSON object")),
    "tools": (list, "a JSON array"),
    **dict.fromkeys(("stream", "parallel_tool_calls"), (bool, "true or false")),
    **dict.fromkeys(("generation_config", "instructions"), (str, "a string")),
    "stop": (str | list, "a string or a list of them"),
    "tool_choice": (str | dict, "a string or a JSON object"),
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens", "seed"), (int, "an integer")),
    **dict.fromkeys(("temperature", "top_p", "frequency_penalty"), (int | float, "a number")),
}
GONE: ContextVar[threading.Event] = ContextVar("gone")  # of the request that is answered: set when its client has left


class Refused(Exception):
    """A request that gets a status, its reason, and sometimes a code for an answer, in this order."""


def error_body(status: int, reason: str, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": reason, "type": kind, "param": None, "code": code}}


class Door:
    """ASGI middleware before `app` that answers what must not get in, and hands everything else on.

    A request may give one of `models` as its `model`, which it may leave out where this is `pinned`; all its strings but images have
    `max_characters` at most. A repository on the Hub may be named with its revision or without, and a shipped checkpoint as the console
    names it: what is handed on is the name in `models`.
    """

    def __init__(self, app, models: Sequence[str], pinned: bool = False, max_characters: int = MAX_CHARACTERS):
        self.app, self.models, self.pinned, self.max_characters = app, tuple(models), pinned, max_characters
        self.served = {revised(name): name for name in reversed(self.models)}  # of two the first
        self.served |= {name: path for name, path in shipped().items() if path in self.models}

    async def __call__(self, scope, receive, send) -> None:
        from starlette.responses import JSONResponse

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            if scope["path"] in NOT_SERVED:
                raise Refused(501, NOT_SERVED[scope["path"]])
            if (scope["method"], scope["path"]) == ("GET", "/v1/models"):
                models = [{"id": name, "object": "model", "created": 0, "owned_by": "local"} for name in self.models]
                return await JSONResponse({"object": "list", "data": models})(scope, receive, send)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                body = await self.read(receive)
                if scope["path"] != "/reset":  # the one path without a body
                    body = self.check(body, scope["path"])
                    check_type(dict(scope["headers"]).get(b"content-type", b"").decode("latin-1"))
                return await self.attend(body, scope, receive, send)
        except Refused as refusal:
            return await JSONResponse(error_body(*refusal.args), refusal.args[0])(scope, receive, send)
        await self.app(scope, receive, send)

    async def attend(self, body: bytes, scope, receive, send) -> None:
        """Hands on a request whose body has been read, and sets `GONE` when its client leaves."""
        GONE.set(gone := threading.Event())

        async def look() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        looking = asyncio.create_task(look())
        try:
            await self.app(scope, again(body, receive), send)
        finally:
            looking.cancel()

    async def read(self, receive) -> bytes:
        """The body. One that is too long is received and dropped, up to a limit: many clients look for no answer before they have
        sent all of it."""
        chunks, size, more = [], 0, True
        while more and size <= 4 * MAX_BODY:
            message = await receive()
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            chunks.append(chunk if size <= MAX_BODY else b"")
        if size > MAX_BODY:
            raise Refused(413, f"the request's body is longer than {MAX_BODY:,} bytes; expected a shorter one")
        return b"".join(chunks)

    def check(self, body: bytes, path: str) -> bytes:
        """The body, with its model as in `models`; raises Refused."""
        try:
            request = json.loads(body)
        except (RecursionError, ValueError) as error:
            raise Refused(400, f"the request's body is no JSON ({error}); expected a JSON object") from None
        if not isinstance(request, dict):
            raise Refused(400, f"the request's body is {type(request).__name__}; expected a JSON object")
        if (length := sum(map(len, texts(request)))) > self.max_characters:
            raise Refused(413, f"the request holds {length:,} characters of text; expected at most {self.max_characters:,}")
        try:
            "".join(texts(request)).encode()
        except UnicodeEncodeError as error:
            raise Refused(400, f"the request holds {error.object[error.start]!r}, half of a surrogate pair; expected characters") from None
        model = request.get("model")
        if not (isinstance(model, str) or self.pinned and model is None):
            raise Refused(400, f"`model` is {model!r}; expected one of {list(self.models)}")
        served = None if model is None else self.served.get(model) or self.served.get(revised(model))
        if served is None and model is not None:
            raise Refused(404, f"`model` is {model!r}, which is not served here; expected one of {list(self.models)}", "model_not_found")
        check_fields(request, path)
        if path == RESPONSES:
            check_input(request)
        return body if served == model else json.dumps({**request, "model": served}).encode()


def revised(name: str) -> str:
    """A model's name with its revision, as answers give it: `main` where a repository's name has none. A folder has no revision."""
    return name if "@" in name or os.path.exists(name) else f"{name}@main"


def check_type(header: str) -> None:
    """Raises Refused for a body of another type than JSON, as `curl -d` sends it where it is not told."""
    kind = header.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise Refused(415, f"the request's `Content-Type` is {header!r}; expected application/json")


def check_fields(request: dict[str, Any], path: str) -> None:
    """Raises Refused for fields that the server would pass over, take for something else, or fail on."""
    if (trace := request.get("trace")) is not None:
        if trace not in TRACES or path not in TRACED:
            raise Refused(400, f"`trace` is {trace!r} in a request to {path}; expected one of {TRACES}, to one of {TRACED}")
        if request.get("stream"):
            raise Refused(400, f"`trace` is {trace!r}, and `stream` is set; expected one of them: a trace is whole when its answer is")
    for name, value in request.items():
        if isinstance(value, dict):
            value = {key: item for key, item in value.items() if item is not None or name == "logit_bias"}
        if value is not None and name in IGNORED and value not in IGNORED[name]:
            raise Refused(400, f"`{name}` is {value!r}, which this server does not honour; expected it unset")
        kind, expected = FORMS.get(name, (object, ""))
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool) and kind not in (bool, object)):
            raise Refused(400, f"`{name}` is {value!r}; expected {expected}")
    if "chat_template" in (template := request.get("chat_template_kwargs") or {}):
        raise Refused(400, "`chat_template_kwargs` holds a `chat_template`; expected none: a template is a program")
    if taken := sorted(set(template) & set(SET_HERE)):
        raise Refused(400, f"`chat_template_kwargs` holds {taken}; expected none of {SET_HERE}, which the server sets")
    if wrong := [key for key in request.get("logit_bias") or {} if not key.isdecimal()]:
        raise Refused(400, f"`logit_bias` has {wrong}; expected token ids")
    given = request.get("generation_config")
    try:
        settings = json.loads(given) if given is not None else {}
    except (RecursionError, ValueError) as error:
        raise Refused(400, f"`generation_config` is {given[:60]!r}, no JSON ({error}); expected a JSON object in a string") from None
    if not isinstance(settings, dict):
        raise Refused(400, f"`generation_config` is {given[:60]!r}; expected a JSON object in a string")


def check_input(request: dict[str, Any]) -> None:
    """Raises Refused for a request to `RESPONSES` of which the server would drop a part, or on whose items it would fail."""
    given = request.get("input", "")
    items = given if isinstance(given, list) else []
    if not isinstance(given, str | list) or not all(isinstance(item, dict) for item in items):
        raise Refused(400, f"`input` is {str(given)[:60]}; expected a string, or a list of JSON objects")
    if request.get("prompt") is not None:
        raise Refused(400, f"`prompt` is {request['prompt']!r}, which this server does not honour; expected it unset")
    if request.get("instructions") and items and items[0].get("role") == "system":  # which instructions would replace
        raise Refused(400, "`instructions` and a system message at `input[0]` are both given; expected one of them")


def texts(value: Any) -> Iterator[str]:
    """All strings in a JSON value, names of fields too, but images."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value
            waiting += [item for name, item in value.items() if not (name == "image_url" and value.get("type") in IMAGE_PARTS)]


def again(body: bytes, receive):
    """`receive` with a body that has been read already."""
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again():
        return unread.pop() if unread else await receive()

    return receive_again


def check_chat(messages, images: bool) -> None:
    """Raises ValueError, by place, for a chat in the form of OpenAI's chat completions that the server would drop parts of or fail on;
    `images`: whether the checkpoint reads images."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`messages` is {messages!r}; expected a list of at least one message")
    for place, message in enumerate(messages):
        where = f"`messages[{place}]`"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where} is {message!r}; expected a mapping with `role` and `content`")
        content, calls = message.get("content"), message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(call, dict) and _has_arguments(call) for call in calls):
            raise ValueError(f"`tool_calls` of {where} is {calls!r}; expected calls, each of a `function` with `arguments`, an object")
        if not isinstance(content, str | list) and (content is not None or "tool_calls" not in message):
            raise ValueError(f"`content` of {where} is {content!r}; expected a string or a list of parts")
        for part in content if isinstance(content, list) else ():
            _check_part(part, where, images)


def _has_arguments(call: dict) -> bool:
    function = call.get("function") or call
    arguments = function.get("arguments") if isinstance(function, dict) else None
    with contextlib.suppress(ValueError):
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return isinstance(arguments, dict)


def _check_part(part, where: str, images: bool) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in IMAGE_PARTS and not images:
        raise ValueError(f"{where} holds an image; expected text alone: this checkpoint has no image processor")
    known = (*CONTENT_PARTS, *IMAGE_PARTS) if images else CONTENT_PARTS
    if kind not in known:
        raise ValueError(f"{where} holds a part of type {kind!r}; expected one of {known}")
    if kind in CONTENT_PARTS and not isinstance(part.get("text"), str):
        raise ValueError(f"{where} holds a part whose `text` is {part.get('text')!r}; expected a string")
    if kind in IMAGE_PARTS:
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str) or not url.startswith(IMAGE_SOURCES):  # transformers would open a path
            raise ValueError(f"{where} holds an image at {str(url)[:60]!r}; expected a URL that begins with one of {IMAGE_SOURCES}")


__all__ = ["Door", "GONE", "MAX_CHARACTERS", "Refused", "check_chat", "check_type", "error_body"]
