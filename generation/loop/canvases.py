"""The outer loop, autoregressive over canvases: prefill, denoise a canvas, commit it (a causal pass over it), denoise the next."""

from collections.abc import Sequence
from functools import partial

from transformers import Cache

from ..call.plan import Plan
from ..call.prompt import Prompt
from ..fast.recording import Recording
from ..watch.watcher import Watcher
from .canvas import begin_canvas, denoise_canvas
from .predict import take_step
from .rows import Rows
from .transcript import Transcript


def decode_canvases(model, plan: Plan, prompt: Prompt, rows: Rows, transcript: Transcript, watchers: Sequence[Watcher]) -> Cache | None:
    """Block diffusion. Returns the cache, or None once rows have left it."""
    recording = Recording(partial(take_step, model, plan)) if plan.execution.record else None
    pending, length, whole = prompt.inputs, rows.real.shape[1] - int(rows.cache.get_seq_length()), True
    for canvas_index in range(plan.lengths.canvases):
        hidden = rows.prefill(model, pending, length, last_states=1)
        given, first_step = prompt.canvas(canvas_index)
        state = begin_canvas(plan, rows, hidden, canvas_index, given, prompt.soft_embeds if canvas_index == 0 else None)
        state = denoise_canvas(model, plan, rows, state, canvas_index, watchers, recording, first_step)
        tokens = transcript.add_canvas(rows, state)
        ended = transcript.ended[rows.places]
        rows = rows.commit(tokens, ended)
        if bool(ended.all()):
            break
        if plan.execution.compact and rows.can_leave() and bool(ended.any()):
            staying = (~ended).nonzero().flatten().cpu()
            rows, tokens, whole = rows.select(staying), tokens[staying.to(tokens.device)], False
        pending, length = {"input_ids": tokens}, tokens.shape[1]
    return rows.cache if whole else None


__all__ = ["decode_canvases"]
