"""transformers' own OpenAI-compatible server with this package's model.

    python -m modeling_diffusiongemma.serve                      # loads the model a request names
    python -m modeling_diffusiongemma.serve FOLDER --port 8001   # loads one and serves it alone

Options and endpoints are those of `transformers serve`. That command never imports this package, and so serves transformers'
class; here the Auto classes are registered first. Three things are added: bad requests are answered with status 400 and the
reason, a chat that the model cannot read is refused instead of read in part, and images work where the checkpoint has a processor.

`seed` of a request seeds torch for the whole process when the request arrives (transformers does it so): with several requests
at once only `temperature=0` is reproducible.
"""

import sys
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from .head import DiffusionGemmaForMaskedBlockLM

INSTALL = 'transformers\' server is not installed; expected: pip install "modeling-diffusiongemma[serve]"'
CONTENT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image_url", "input_image")


def check_chat(messages, images: bool) -> None:
    """Raises ValueError, by place, for a chat that the server would drop parts of or fail on.

    Args:
        messages: of a request, in the form of OpenAI's chat completions.
        images: whether the checkpoint reads images.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`messages` is {messages!r}; expected a list of at least one message")
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"`messages[{place}]` is {message!r}; expected a mapping with `role` and `content`")
        content = message.get("content")
        if content is None and "tool_calls" not in message:
            raise ValueError(f"`messages[{place}]` has no `content`; expected a string or a list of parts")
        if not isinstance(content, list):
            if not isinstance(content, str | None):
                raise ValueError(f"`content` of `messages[{place}]` is {content!r}; expected a string or a list of parts")
            continue
        known = (*CONTENT_PARTS, *IMAGE_PARTS) if images else CONTENT_PARTS
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in IMAGE_PARTS and not images:
                raise ValueError(f"`messages[{place}]` holds an image; expected text alone: this checkpoint has no image processor")
            if kind not in known:
                raise ValueError(f"`messages[{place}]` holds a part of type {kind!r}; expected one of {known}")


def reason(error: Exception) -> str:
    """What an error says about the request."""
    return f"the request has no {error}" if isinstance(error, KeyError) else str(error)


def make_server(arguments: Sequence[str]):
    """A function that runs the server until it is stopped.

    Raises:
        ImportError: the extra `serve` is missing.
    """
    try:
        import typer
        from fastapi.responses import JSONResponse
        from jinja2 import TemplateError
        from transformers.cli.serve import Serve
        from transformers.cli.serving.utils import Modality
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        raise ImportError(INSTALL) from error
    if not is_serve_available():
        raise ImportError(INSTALL)

    async def refuse(_request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": {"message": reason(error), "type": "invalid_request_error"}}, status_code=400)

    class Server(Serve):
        __doc__ = Serve.__doc__

        def start_server(self) -> None:
            """Called with everything built and nothing running (`--non-blocking`): completes it, and blocks until it is stopped."""
            manager = self._model_manager
            modality_of = manager.get_model_modality

            def get_model_modality(model, processor=None):
                if isinstance(model, DiffusionGemmaForMaskedBlockLM) and not isinstance(processor, PreTrainedTokenizerBase):
                    return Modality.VLM
                return modality_of(model, processor=processor)

            manager.get_model_modality = get_model_modality
            for handler in (self._chat_handler, self._completion_handler, self._response_handler):
                _guard(handler, pinned=manager.force_model is not None)
            for kind in (ValueError, KeyError, TypeError, OSError, TemplateError):
                self.server.config.app.add_exception_handler(kind, refuse)
            self.server.run()

    def _guard(handler, pinned: bool) -> None:
        """Puts our checks before the handler's."""
        validate, read = handler._validate_request, handler.get_processor_inputs_from_messages

        def validate_checked(body):
            if not isinstance(body.get("model"), str) and not (pinned and body.get("model") is None):
                raise ValueError(f"`model` is {body.get('model')!r}; expected a folder or Hub repository")
            validate(body)

        def read_checked(messages, modality):
            check_chat(messages, images=modality != Modality.LLM)
            return read(messages, modality)

        handler._validate_request, handler.get_processor_inputs_from_messages = validate_checked, read_checked

    command = typer.Typer(add_completion=False)
    command.command()(Server)
    return lambda: command(args=[*arguments, "--non-blocking"], prog_name="python -m modeling_diffusiongemma.serve")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the server with the command line's arguments."""
    try:
        run = make_server(sys.argv[1:] if arguments is None else arguments)
    except ImportError as error:
        raise SystemExit(f"error: {error}") from error
    run()


if __name__ == "__main__":
    main()

__all__ = ["check_chat", "main", "make_server"]
