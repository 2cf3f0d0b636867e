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
from .plan import Plan
from .statistics import check_finite, dense_statistics
from .vocabulary import streamed_statistics


class CanvasContext(NamedTuple):
    """What a canvas is denoised over: the cache, and for every slot of cache and canvas whether it is real, bool (B, L + C);
    `committed` int64 (B, L): prompt and finished canvases; `generated`: tokens since the prompt."""

    cache: Cache
    real: torch.Tensor
    committed: torch.Tensor
    generated: int

    def select(self, rows: torch.Tensor) -> "CanvasContext":
        return CanvasContext(select_rows(self.cache, rows), self.real[rows], self.committed[rows], self.generated)


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
) -> CanvasState:
    """Denoises the canvas `first` int64 (B, C) until every row is finished, the steps are used up or the time is.

    Returns:
        The state of all B rows, without soft embeddings.
    """
    live = torch.arange(first.shape[0], device=first.device)
    state = done = start_canvas(first, plan.stopping)
    view = _view(model, plan, context, first.shape)
    streams = plan.stream_vocabulary and not getattr(streamer, "_takes_logits", False)
    head = model.vocabulary_head() if streams and hasattr(model, "vocabulary_head") else None
    for step in range(plan.max_denoising_steps):
        hidden = model.denoise(state.canvas, soft_embeds=state.soft_embeds, **view).last_hidden_state
        remaining, temperature = plan.max_denoising_steps - step, plan.schedule.temperature(step)
        guess = None if step == 0 else state.argmax
        soft_embeds = None
        filters = plan.shaping.streamable(context.generated)
        if head is not None and filters is not None:
            statistics, soft_embeds = streamed_statistics(hidden, head, temperature, draws, plan.greedy, filters=filters)
        else:
            logits = model.compute_logits(hidden)  # (B, C, V)
            logits = plan.shaping(logits, context.committed, guess, context.generated, temperature, remaining)
            statistics = dense_statistics(logits, draws, plan.greedy)
        check_finite(statistics.bad)
        finished_before = state.finished
        noise = draws.noise(plan.noise, state.canvas.shape, state.canvas.device)
        state = denoising_step(
            state, step, plan.max_denoising_steps, statistics, noise, plan.sampler, plan.stopping, plan.sure_end, plan.patience
        )
        if streamer is not None:
            _stream(streamer, done.place(live, state), None if soft_embeds is not None else logits)
        finished = state.finished
        if bool(finished.all()) or remaining == 1 or plan.out_of_time():
            break
        if soft_embeds is None:
            soft_embeds = model.soft_embed(logits.to(model.dtype))
        state = condition(state, finished_before, soft_embeds)
        if plan.compact and can_select(context.cache) and bool(finished.any()):
            done = done.place(live, state)
            rows = (~finished).nonzero().flatten()
            live, state, context, draws = live[rows], state.select(rows), context.select(rows), draws.select(rows)
            view = _view(model, plan, context, state.canvas.shape)
    return done.place(live, state)


def _view(model, plan: Plan, context: CanvasContext, shape: tuple[int, int]) -> dict:
    """Masks and positions, which hold for every step of the canvas."""
    return {
        "past_key_values": context.cache,
        "attention_mask": model.canvas_masks(context.cache, shape, context.real),
        "position_ids": plan.positions(context.real, shape[1]),
    }


def _stream(streamer: BaseStreamer, state: CanvasState, logits: torch.Tensor | None) -> None:
    """Hands a step to a streamer that takes states, drafts or logits."""
    if hasattr(streamer, "put_state"):
        streamer.put_state(state)
    if hasattr(streamer, "put_draft"):
        wants_logits = getattr(streamer, "_takes_logits", False)
        streamer.put_draft(**({"logits": logits.cpu()} if wants_logits else {"value": state.argmax.cpu()}))


__all__ = ["CanvasContext", "can_select", "denoise_canvas", "select_rows"]
