"""The inner loop: one canvas, from noise to what is committed.

Rows that finish leave the batch: the canvas, the masks and the cache are narrowed to the rows that go on, and the finished
ones wait in `done`. With per-row random numbers the tokens are the same as without (tests/test_rows.py).
"""

import copy
from typing import NamedTuple

import torch
from transformers import Cache, DynamicCache
from transformers.generation.streamers import BaseStreamer

from .canvas import CanvasState, condition, denoising_step, start_canvas
from .draws import Draws
from .flags import FlagReader
from .plan import Plan
from .statistics import dense_statistics, check_finite
from .vocabulary import streamed_statistics


class CanvasContext(NamedTuple):
    """What a canvas is denoised over: the cache, and for every slot of cache and canvas whether it is real, bool (B, L + C);
    `committed` int64 (B, L): prompt and finished canvases; `generated`: tokens since the prompt; `number`: of the canvas, from 0."""

    cache: Cache
    real: torch.Tensor
    committed: torch.Tensor
    generated: int
    number: int

    def select(self, rows: torch.Tensor) -> "CanvasContext":
        return self._replace(cache=select_rows(self.cache, rows), real=self.real[rows], committed=self.committed[rows])


def select_rows(cache: Cache, rows: torch.Tensor) -> Cache:
    """A cache of some of the rows; the given one stays as it is."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)
    return selected


def can_select(cache: Cache) -> bool:
    return type(cache) is DynamicCache and not getattr(cache, "offloading", False)


def denoise_canvas(
    model, plan: Plan, first: torch.Tensor, context: CanvasContext, draws: Draws, streamer: BaseStreamer | None = None
) -> tuple[CanvasState, torch.Tensor | None]:
    """Denoises the canvas `first` int64 (B, C) until every row is finished, the steps are used up or the time is.

    Returns:
        The state of all B rows, without soft embeddings; and with `plan.keep_logits` the logits, float32 (B, C, V), of each
        row's last step, nothing applied to them.

    Raises:
        ValueError: logits that are NaN.
    """
    live = torch.arange(first.shape[0], device=first.device)
    state = done = start_canvas(first, plan.stopping)
    view = _view(model, plan, context, first.shape)
    streams = plan.stream_vocabulary and not getattr(streamer, "_takes_logits", False)
    head = model.vocabulary_head() if streams and hasattr(model, "vocabulary_head") else None
    flags, last_logits = FlagReader(plan.late_flags), None
    steps, temperatures = plan.steps(first.device)
    for number in range(plan.max_denoising_steps):
        step, temperature, here = steps[number], temperatures[number], draws.at(context.number, number)
        before, is_last = state.finished, number + 1 == plan.max_denoising_steps
        hidden = model.denoise(state.canvas, soft_embeds=state.soft_embeds, **view).last_hidden_state
        current = state.canvas if plan.sampler.informed else None
        soft_embeds = None
        if head is not None and plan.shaping.only_temperature(context.generated):
            statistics, soft_embeds = streamed_statistics(hidden, head, temperature, here, plan.greedy, current=current)
        else:
            raw = model.compute_logits(hidden)  # (B, C, V)
            guess = None if number == 0 else state.argmax
            remaining = plan.max_denoising_steps - number
            logits = plan.shaping(raw, context.committed, guess, context.generated, temperature, remaining)
            statistics = dense_statistics(logits, here, plan.greedy, current=current)
            if plan.keep_logits:
                last_logits = raw.clone() if last_logits is None else last_logits
                last_logits[live] = torch.where(before[:, None, None], last_logits[live], raw)
        noise = here.noise(plan.noise, state.canvas.shape, state.canvas.device)
        uniform = here.uniforms(*state.canvas.shape, state.canvas.device) if plan.sampler.informed else None
        state = denoising_step(
            state, step, plan.max_denoising_steps, statistics, noise, plan.sampler, plan.stopping, plan.sure_end, plan.patience, uniform
        )
        if streamer is not None:
            _stream(streamer, done.place(live, state), None if soft_embeds is not None else logits)
        known = flags.push(state.finished, statistics.bad)
        if known is not None:
            check_finite(known.bad, live)
        if is_last or plan.out_of_time() or (known is not None and bool(known.finished.all())):
            break
        if soft_embeds is None:
            soft_embeds = model.soft_embed(logits.to(model.dtype))
        state = condition(state, before, soft_embeds)
        if plan.compact and known is not None and bool(known.finished.any()) and can_select(context.cache):
            done = done.place(live, state)
            staying = (~known.finished).nonzero().flatten()
            flags.select(staying)
            rows = staying.to(live.device)
            live, state, context, draws = live[rows], state.select(rows), context.select(rows), draws.select(staying)
            view = _view(model, plan, context, state.canvas.shape)
    if (known := flags.last()) is not None:
        check_finite(known.bad, live)
    return done.place(live, state), last_logits


def _view(model, plan: Plan, context: CanvasContext, shape: tuple[int, int]) -> dict:
    """What holds for every step of the canvas."""
    return {"view": model.prepare_canvas(context.cache, tuple(shape), context.real, plan.positions(context.real, shape[1]))}


def _stream(streamer: BaseStreamer, state: CanvasState, logits: torch.Tensor | None) -> None:
    """Hands a step to a streamer that takes states, drafts or logits."""
    if hasattr(streamer, "put_state"):
        streamer.put_state(state)
    if hasattr(streamer, "put_draft"):
        wants_logits = getattr(streamer, "_takes_logits", False)
        streamer.put_draft(**({"logits": logits.cpu()} if wants_logits else {"value": state.argmax.cpu()}))


__all__ = ["CanvasContext", "can_select", "denoise_canvas", "select_rows"]
