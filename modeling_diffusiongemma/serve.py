"""transformers' own OpenAI-compatible server with this package's model.

    diffusiongemma serve                      # the shipped checkpoints, loaded when a request names one
    diffusiongemma serve FOLDER --port 8001   # loads one and serves it alone; `tools` and the like are the shipped ones
    diffusiongemma serve --allow FOLDER --allow OWNER/NAME
    diffusiongemma serve FOLDER --quantize 4bit --max-memory 0=20GB,cpu=12GB

Options and endpoints are those of `transformers serve`. That command never imports this package, and so serves transformers'
class; here the Auto classes are registered first. Added are: images where the checkpoint has a processor; models that are
served by name and no others; FP8, 4 bit and placement (`--quantize`, `--max-memory`, `--offload-folder`), as in the console; limits
on the size of a request (status 413, `--max-characters`); a reason, in OpenAI's form and with status 400, 404 or 501, for what is
not answered; and a chat that the model cannot read is refused instead of read in part.

`model` of a request is a name in `/v1/models`, or that of a shipped checkpoint that is served: `"text"`. An adapter is served merged into
its base (`diffusiongemma train --lora --merge`, or `merge_and_unload` and `save_pretrained`).

**For clients you trust, on this machine or a network of your own.** There is neither a key nor a quota: one request is generated
at a time, a client may ask for as many tokens as it likes, may unload the models (`/reset`), and may have the server fetch an
image from any address that the server reaches. While a model is loaded, or a prompt is cut into tokens, nobody else is answered.
Put a proxy with authentication and time limits in front of it before you open it to others, or use vLLM.

An answer ends by `stop` (an end of turn, a stop string, which is no part of its text) or `length` (its tokens are used up, or its
`max_time`: OpenAI has no third word); a response is then `incomplete`. A request that nobody waits for any more is given up at its next
denoising step. What is wrong with one is said with a status, streamed or not, unless its stream has begun.

Sampling: OpenAI's fields, and vLLM's `top_k`, `min_p` and `repetition_penalty`; everything else in `generation_config`, JSON of generation
settings in a string. An OpenAI client sends these in `extra_body`:

    client.chat.completions.create(..., extra_body={"generation_config": json.dumps({"max_denoising_steps": 12})})

A request that says no `max_tokens` gets up to 1,024 or what the checkpoint allows, whichever is more, so a checkpoint without an end of its
own, as "sudoku", needs it said (81). Errors name the settings of `generate`: `max_new_tokens` is `max_tokens`.

Fields that only say who asks and why (`user`, `metadata`, `store`, `name` of a message and the like) change nothing.

The form of an answer: `response_format` (chat completions and completions) and `text` (`/v1/responses`) as OpenAI has them, with
a JSON schema or any JSON object, and vLLM's `structured_outputs`: one of `json`, `regex`, `choice`, `json_object`, and of our own
`template`. Every answer fits, streamed ones too, by `generate`'s `constraint`; what a schema may hold: docs/constraints.md. `suffix` of a
completion is what its text ends with, and is written towards. A form leaves no room for a thought or a call: not with `tools`, nor
with `enable_thinking`, of the request or of `--reasoning on`.

`trace` of a request, which may be "html", "svg" or "safetensors", brings along how the answer came about, as `trace` of the answer: the
page or the picture as text, or the file in base64, for `generation.Trace.load`. An OpenAI client sends it in `extra_body`. Not with
`stream`, nor to `/v1/responses`.

`seed` of a request is `generate`'s: its answer is its own, whatever else is asked at the same time.
"""

import sys
from collections.abc import Sequence

from .console.serve import make_server

PROGRAM = "python -m modeling_diffusiongemma.serve"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the server with the command line's arguments, as `diffusiongemma serve` does."""
    try:
        make_server(sys.argv[1:] if arguments is None else arguments, PROGRAM)()
    except (ImportError, OSError, ValueError) as error:  # the last two: the checkpoint that was to be loaded first
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()

__all__ = ["main"]
