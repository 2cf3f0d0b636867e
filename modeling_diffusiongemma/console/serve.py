"""`diffusiongemma serve` and `python -m modeling_diffusiongemma.serve`, whose docstring says what is served: transformers' server, into
which what is ours is put while it is built. So is its command line."""

import argparse
import base64
import contextlib
import functools
import inspect
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from transformers import AutoModelForMultimodalLM, GenerationConfig, PreTrainedTokenizerBase
from transformers.cli.serve import Serve
from transformers.cli.serving.utils import Modality

from generation.asking import check_read, template_variables
from generation.call.configuration import DiffusionGenerationConfig
from generation.watch.animation import draw_animation
from generation.watch.pictures import trace_page
from generation.watch.trace import Trace
from generation.watch.watcher import Watcher

from ..checkpoints import shipped
from ..model.head import DiffusionGemmaForMaskedBlockLM
from .arguments import PROGRAM, UsageError, checkpoint_name, integer
from .placement import add_placement, loading_arguments
from .serve_answers import REFUSED, Answer, ToTheEnd, UpToStop, amend, begun, in_form
from .serve_forms import CHAT, COMPLETION, RESPONSE, take_form
from .serve_requests import GONE, MAX_CHARACTERS, Door, check_chat, error_body
from .tools import check_told, take_apart

NEEDED = ("fastapi", "jinja2", "openai", "pydantic", "rich", "uvicorn")
SAMPLING = ("top_k", "min_p", "repetition_penalty")  # fields of vLLM's requests that are generation settings of the same name
INSTALL = 'transformers\' server is not installed; expected: pip install -e ".[serve]" in a checkout of this project'
OUR_OPTIONS = """
Of this package: --allow NAME, a folder or Hub repository that may be asked for (repeatable; by default the shipped
checkpoints, or FORCE_MODEL alone); --max-characters N, of text in a request (default: {max_characters}).

How they are loaded: --quantize fp8 or 4bit; --max-memory SIZES, such as 12GB or 0=20GB,cpu=40GB; --offload-folder FOLDER, for
weights that fit into no memory. `diffusiongemma generate --help` says more of them.

For clients you trust: there is neither a key nor a quota.
"""


class Ending(Watcher):
    """Writes into a request's settings why its answer has ended, and ends it where nobody waits for it. transformers' server reads it from
    there: `length` where an answer has `max_new_tokens` tokens, whether or not the last of them ends it, and `stop` where it has fewer,
    though its time was over."""

    def __init__(self, settings: GenerationConfig, answer: Answer):
        self.settings, self.answer = settings, answer

    def step(self, canvas_index, step, places, state, prediction) -> None:
        self.answer.go_on()

    def commit(self, tokens, lengths, finish_reasons) -> None:
        self.answer.go_on()
        self.answer.ended = finish_reasons[0]
        if finish_reasons[0] is not None:
            self.settings.max_new_tokens = None if finish_reasons[0] == "stop" else 0


class Body(dict):
    """The body of a request, of which is taken out what transformers' server does not know: `trace`, how its answer brings along the
    way it came about (`made`, where that has been made), `constraint`, the language that the answer has, and those of `SAMPLING`. `names`:
    the fields that were there; `template`: what the chat template is given, by the server or the request. What is null there is unset
    here."""

    def __init__(self, body: dict[str, Any], form_fields: Collection[str], template: Mapping[str, Any]):
        super().__init__((name, value) for name, value in body.items() if value is not None)
        self.setdefault("stream", False)  # transformers streams a response that does not say
        if "max_completion_tokens" in self:
            self["max_tokens"] = self["max_completion_tokens"]  # the one name that transformers 5.17 reads
        if not self.get("logit_bias", True):
            self.pop("logit_bias")
        if "repetition_penalty" in self and "frequency_penalty" in self:
            raise ValueError("`repetition_penalty` and `frequency_penalty` are both given; expected one of them")
        self.sampling = {name: self.pop(name) for name in SAMPLING if name in self}
        stop = self.get("stop", [])
        self.answer = Answer([stop] if isinstance(stop, str) else stop, GONE.get())
        self.seed = None
        if self.get("tool_choice") == "none":
            self.pop("tools", None), self.pop("tool_choice")
        self.trace, self.made = self.pop("trace", None), None
        self.template = {**template, **self.get("chat_template_kwargs", {})}
        field, self.constraint = take_form(self, form_fields, self.template) or (None, None)
        self.names = [name for name, value in (("trace", self.trace), (field, self.constraint)) if value is not None]

    def make(self, trace: Trace, tokenizer) -> None:
        if self.trace == "safetensors":
            self.made = base64.b64encode(trace.to_bytes()).decode("ascii")
        else:
            self.made = {"html": trace_page, "svg": draw_animation}[self.trace](trace, tokenizer, self.title())

    def title(self) -> str:
        """What was asked last."""
        content = self["messages"][-1].get("content") if "messages" in self else self.get("prompt")
        return content if isinstance(content, str) else " ".join(piece["text"] for piece in content or () if "text" in piece)


def settings_of(build: Callable, body: Body, model_settings: GenerationConfig, *args, **kwargs) -> GenerationConfig:
    """As a handler's reading of settings, `build`; they carry what else is asked for to where it is answered, in another thread."""
    ours = isinstance(model_settings, DiffusionGenerationConfig)
    if ours:  # transformers seeds torch with it, for whoever is answered next as well
        body.seed = body.pop("seed", None)
    settings = build(body, model_settings, *args, **kwargs)
    for name, value in body.sampling.items():
        setattr(settings, name, value)
    if "logit_bias" in body:  # which transformers reads in chats alone
        settings.sequence_bias = {(int(token),): bias for token, bias in body["logit_bias"].items()}
    if (settings.num_return_sequences or 1) != 1 or settings.return_dict_in_generate:
        raise ValueError(
            f"`generation_config` has num_return_sequences={settings.num_return_sequences} and "
            f"return_dict_in_generate={settings.return_dict_in_generate}; expected 1 and false: a request has one answer, its text"
        )
    if ours:
        settings.asked = body
    elif body.names:
        raise ValueError(f"`model` is {body['model']!r}, which denoises no canvas of ours; expected none of {body.names}")
    else:
        body.answer.stops = ()  # they stay in its text, streamed or not
    return settings


def resolve_checked(resolve: Callable, body: Body):
    """As a handler's loading of the model that a request names, `resolve`, behind our check of what that model's chat template is given."""
    found = resolve(body)
    if body.template:
        processor = found[2]
        taken = inspect.signature(processor.apply_chat_template).parameters.keys() - {"documents"}
        name = "`chat_template_kwargs` (or the server's `--reasoning`)"
        check_read(name, body.template, template_variables(processor.chat_template), taken)
    return found


async def answer_asked(answer: Callable, form_fields: Collection[str], template: Mapping, body: dict[str, Any], request_id: str):
    """As a handler's `answer`, in the form that is asked for, and with `trace` in it where that is."""
    from fastapi.responses import JSONResponse

    response = await answer(asked := Body(body, form_fields, template), request_id)
    if asked["stream"]:
        pieces, announced = response.body_iterator, form_fields is not COMPLETION  # which begins with text
        response.body_iterator = in_form(await begun(pieces, asked.answer, announced), pieces, asked.answer, form_fields is RESPONSE)
        return response
    found = amend(json.loads(response.body), asked.answer)
    return JSONResponse(found if asked.trace is None else {**found, "trace": asked.made}, response.status_code)


def generate_asked(model: DiffusionGemmaForMaskedBlockLM, generation_config: GenerationConfig, **kwargs):
    """`generate` for one request, in our manners: a tensor, and rows of single tokens for the streamer."""
    asked = generation_config.__dict__.pop("asked")
    watchers, draws = [Ending(generation_config, asked.answer)], {"seed": asked.seed}
    if asked.trace is not None:
        watchers.append(trace := Trace(alternatives=3 if asked.trace == "html" else 0))
    if (streamer := kwargs.get("streamer")) is not None:
        if asked.answer.stops:
            streamer._enqueue = UpToStop(streamer._enqueue, asked.answer.stops)
        ToTheEnd(streamer)
    if asked.seed is not None and getattr(generation_config, "backend", None) == "reference":  # which has no seeds of rows
        draws = {"generator": torch.Generator(model.device).manual_seed(asked.seed)}
    try:
        asked.answer.go_on()
        if asked.get("tools"):
            check_told(kwargs["tokenizer"])
        output = DiffusionGemmaForMaskedBlockLM.generate(
            model, generation_config=generation_config, watcher=watchers, constraint=asked.constraint, **draws, **kwargs
        )
    except Exception as error:
        asked.answer.error = error
        raise
    if asked.trace is not None:
        asked.make(trace, kwargs["tokenizer"])
    return output


def modality_of(theirs: Callable, model, processor=None) -> Modality:
    """As the model manager's, which is asked before every answer; a model of ours gets to tell why that answer has ended."""
    if isinstance(model, DiffusionGemmaForMaskedBlockLM):
        model.generate = MethodType(generate_asked, model)
        take_apart(getattr(processor, "tokenizer", processor))
        if not isinstance(processor, PreTrainedTokenizerBase):
            return Modality.VLM
    return theirs(model, processor=processor)


def read_checked(read: Callable, messages, modality: Modality):
    """As a handler's reading of a chat, `read`, behind our check of it."""
    check_chat(messages, images=modality != Modality.LLM)
    # transformers before 5.24 iterates over `tool_calls: null`, and drops the content beside an empty list; all of them, beside any list.
    found = read([{k: v for k, v in message.items() if k != "tool_calls" or v} for message in messages], modality)
    for message, parsed in zip(messages, found, strict=True):
        if message.get("tool_calls") and message.get("content"):
            (said,) = read([{k: v for k, v in message.items() if k != "tool_calls"}], modality)
            parsed["content"] = said["content"]
    return found


def placed(manager, ours: argparse.Namespace) -> dict[str, Any]:
    """The server's options and ours as arguments of `from_pretrained`."""
    if ours.quantize is not None and manager.quantization is not None:
        raise UsageError(f"`--quantize` is {ours.quantize!r} and `--quantization` {manager.quantization!r}; expected one of them")
    device = f"cuda:{manager.device}" if isinstance(manager.device, int) else manager.device
    found = loading_arguments(device, manager.dtype, ours.quantize, ours.max_memory, ours.offload_folder)
    if manager.quantization is not None:
        found["quantization_config"] = manager.get_quantization_config()
    return found


@contextlib.contextmanager
def loading_as(ours: argparse.Namespace) -> Iterator[None]:
    """A context in which transformers' model managers, which have no such options, load what they are asked for by `placed`. One loads its
    first model while it is made."""
    from transformers.cli.serving.model_manager import ModelManager

    theirs = ModelManager._load_model

    def load(manager, name, tqdm_class=None, progress_callback=None, gguf_file=None):
        if gguf_file is not None:
            raise ValueError(f"the model is the GGUF file {gguf_file!r}; expected safetensors, which can be quantised and placed")
        path, _, revision = (name, "", None) if os.path.exists(name) else name.rpartition("@")
        settings = {"attn_implementation": manager.attn_implementation, "trust_remote_code": manager.trust_remote_code}
        settings |= {"tqdm_class": tqdm_class, **placed(manager, ours)}
        return AutoModelForMultimodalLM.from_pretrained(path, revision=revision, **settings)

    if (ours.quantize, ours.max_memory, ours.offload_folder) != (None, None, None):
        ModelManager._load_model = load
    try:
        yield
    finally:
        ModelManager._load_model = theirs


def complete(server: Serve, ours: argparse.Namespace) -> None:
    """Puts what is ours into a server that is built and does not run yet."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware

    refused = (*REFUSED, TemplateError, RequestValidationError, HTTPException)

    async def refuse(_request, error: Exception) -> JSONResponse:
        status = getattr(error, "status_code", 400 if isinstance(error, refused) else 500)
        reason = f"the request has no {error}" if isinstance(error, KeyError) else str(getattr(error, "detail", None) or error)
        return JSONResponse(error_body(status, reason), status_code=status)

    app, manager = server.server.config.app, server._model_manager
    placed(manager, ours)  # refused now, not when a request comes
    for kind in (*refused, Exception):
        app.add_exception_handler(kind, refuse)
    manager.get_model_modality = functools.partial(modality_of, manager.get_model_modality)
    handlers = ((server._chat_handler, CHAT), (server._completion_handler, COMPLETION), (server._response_handler, RESPONSE))
    for handler, form_fields in handlers:
        handler.get_processor_inputs_from_messages = functools.partial(read_checked, handler.get_processor_inputs_from_messages)
        handler.handle_request = functools.partial(answer_asked, handler.handle_request, form_fields, handler.chat_template_kwargs)
        handler._resolve_model = functools.partial(resolve_checked, handler._resolve_model)
        handler._build_generation_config = functools.partial(settings_of, handler._build_generation_config)
    pinned = manager.force_model
    models = [pinned] if pinned is not None else [name.path for name in ours.allow] or [*shipped().values()]
    door = Middleware(Door, models=models, pinned=pinned is not None, max_characters=ours.max_characters)
    app.user_middleware.append(door)  # behind those that add headers to every answer


def named(given: str | None) -> str | None:
    """What FORCE_MODEL means: as `--model` of the other commands, or what transformers' server takes beside that: another model's folder,
    a repository with its revision, a GGUF file."""
    if given is None or given not in shipped() and ("@" in given or ":" in given or os.path.isfile(os.path.join(given, "config.json"))):
        return given
    try:
        return checkpoint_name(given).path
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"FORCE_MODEL: {error}") from None


def make_server(arguments: Sequence[str], program: str) -> Callable[[], None]:
    """A function that runs the server until it is stopped; ImportError where the extra `serve` is missing. `program`: its name in help."""
    import typer  # which transformers requires

    if not all(map(find_spec, NEEDED)):
        raise ImportError(INSTALL)
    parser = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument("--allow", type=checkpoint_name, action="append", default=[])
    parser.add_argument("--max-characters", type=integer(1), default=MAX_CHARACTERS)
    add_placement(parser)
    ours, rest = parser.parse_known_args(arguments)

    class Server(Serve):
        __doc__ = Serve.__doc__ + OUR_OPTIONS.format(max_characters=f"{MAX_CHARACTERS:,}")

        @functools.wraps(Serve.__init__)  # typer reads the options there
        def __init__(self, force_model=None, **options):
            super().__init__(named(force_model), **options)

        def start_server(self) -> None:
            """Called with everything built and nothing running (`--non-blocking`)."""
            complete(self, ours)
            self.server.run()

    command = typer.Typer(add_completion=False)
    command.command()(Server)

    def run() -> None:
        with loading_as(ours):
            command(args=[*rest, "--non-blocking"], prog_name=program)

    return run


def run(args: argparse.Namespace) -> int:
    make_server(args.rest, f"{PROGRAM} serve")()
    return 0


__all__ = ["loading_as", "make_server", "run"]
