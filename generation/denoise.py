"""The inner loop: one canvas, from noise to what is committed.

Rows that finish leave the batch: the canvas, the masks and the cache are narrowed to the rows that go on, and the finished
ones wait in `done`. With per-row random numbers the tokens are the same as without (tests/test_rows.py).
"""

import copy
from functools import partial
from typing import NamedTuple

import torch
from transformers import Cache, DynamicCache
from transformers.generation.streamers import BaseStreamer

from .canvas import CanvasState, condition, denoising_step, start_canvas
from .capture import Recording
from .draws import Draws
from .filters import Filters
from .flags import FlagReader
from .plan import Plan
from .statistics import RowStatistics, check_finite, dense_statistics
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
    model, plan: Plan, first: torch.Tensor, context: CanvasContext, draws: Draws, streamer: BaseStreamer | None = None,
    recording: Recording | None = None,
) -> tuple[CanvasState, torch.Tensor | None]:  # fmt: skip
    """Denoises the canvas `first` int64 (B, C) until every row is finished, the steps are used up or the time is.

    Args:
        recording: where the step of one canvas is recorded for the next ones.

    Returns:
        The state of all B rows, without soft embeddings; and with `plan.keep_logits` the logits, float32 (B, C, V), of each
        row's last step, nothing applied to them.

    Raises:
        ValueError: logits that are NaN.
    """
    live = torch.arange(first.shape[0], device=first.device)
    state = done = start_canvas(first, plan.stopping)
    view = _view(model, plan, context, first.shape)
    filters = _streamed_by(plan, context, streamer)
    stream = None if filters is None else partial(streamed_step, model, plan, filters)
    if recording is not None and filters is not None and filters.hidden_before == 0:  # what changes from canvas to canvas is not recorded
        stream = recording.of(stream, view)
        with model.vocabulary_head() as head:
            state = state._replace(soft_embeds=head.weight.new_zeros((*first.shape, head.weight.shape[1])))
    flags, last_logits = FlagReader(plan.late_flags), None
    steps, temperatures = plan.steps(first.device)
    for number in range(plan.max_denoising_steps):
        step, temperature, here = steps[number], temperatures[number], draws.at(context.number, number)
        before, is_last, logits = state.finished, number + 1 == plan.max_denoising_steps, None
        if stream is not None:
            state, bad = stream(view, (state, step, temperature), here)
        else:
            hidden = model.denoise(state.canvas, soft_embeds=state.soft_embeds, view=view).last_hidden_state
            raw = model.compute_logits(hidden)  # (B, C, V)
            guess = None if number == 0 else state.argmax
            remaining = plan.max_denoising_steps - number
            logits = plan.shaping(raw, context.committed, guess, context.generated, temperature, remaining)
            statistics = dense_statistics(logits, here, plan.greedy, current=state.canvas if plan.sampler.informed else None)
            state, bad = _advance(plan, state, step, statistics, here), statistics.bad
            if plan.keep_logits:
                last_logits = raw.clone() if last_logits is None else last_logits
                last_logits[live] = torch.where(before[:, None, None], last_logits[live], raw)
        if streamer is not None:
            _stream(streamer, done.place(live, state), logits)
        known = flags.push(state.finished, bad)
        if known is not None:
            check_finite(known.bad, live)
        if is_last or plan.out_of_time() or (known is not None and bool(known.finished.all())):
            break
        if logits is not None:
            state = condition(state, before, model.soft_embed(logits.to(model.dtype)))
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


def streamed_step(
    model, plan: Plan, filters: Filters, view, inputs: tuple[CanvasState, torch.Tensor, torch.Tensor], draws: Draws
) -> tuple[CanvasState, torch.Tensor]:
    """One whole step in pieces of the vocabulary: canvas pass, statistics, next canvas. On CUDA it reads nothing back from the
    device (tests/test_capture.py).

    Args:
        view: what `prepare_canvas` made.
        inputs: the state, the step's number, int64 (), and its temperature, float32 ().

    Returns:
        The next state; and bool (b,), rows whose logits are NaN.
    """
    state, step, temperature = inputs
    hidden = model.denoise(state.canvas, soft_embeds=state.soft_embeds, view=view).last_hidden_state
    current = state.canvas if plan.sampler.informed else None
    with model.vocabulary_head() as head:
        statistics, soft_embeds = streamed_statistics(hidden, head, temperature, draws, plan.greedy, current, filters)
    return condition(_advance(plan, state, step, statistics, draws), state.finished, soft_embeds), statistics.bad


def _advance(plan: Plan, state: CanvasState, step: torch.Tensor, statistics: RowStatistics, draws: Draws) -> CanvasState:
    noise = draws.noise(plan.noise, state.canvas.shape, state.canvas.device)
    uniform = draws.uniforms(state.canvas.shape[0], state.canvas.shape[1:], state.canvas.device) if plan.sampler.informed else None
    return denoising_step(
        state, step, plan.max_denoising_steps, statistics, noise, plan.sampler, plan.stopping, plan.sure_end, plan.patience, uniform
    )


def _streamed_by(plan: Plan, context: CanvasContext, streamer) -> Filters | None:
    """The filters to walk the vocabulary with; None where only whole logits will do."""
    if not plan.stream_vocabulary or getattr(streamer, "_takes_logits", False):
        return None
    return plan.shaping.streamable(context.generated)


def _view(model, plan: Plan, context: CanvasContext, shape: tuple[int, int]):
    """What holds for every step of the canvas."""
    positions = plan.positions(context.real, shape[1])
    return model.prepare_canvas(context.cache, tuple(shape), context.real, positions, slots=plan.slots)


def _stream(streamer: BaseStreamer, state: CanvasState, logits: torch.Tensor | None) -> None:
    """Hands a step to a streamer that takes states, drafts or logits."""
    if hasattr(streamer, "put_state"):
        streamer.put_state(state)
    if hasattr(streamer, "put_draft"):
        wants_logits = getattr(streamer, "_takes_logits", False)
        streamer.put_draft(**({"logits": logits.cpu()} if wants_logits else {"value": state.argmax.cpu()}))


__all__ = ["CanvasContext", "can_select", "denoise_canvas", "select_rows", "streamed_step"]
