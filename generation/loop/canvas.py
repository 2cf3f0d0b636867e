"""The inner loop: one canvas, from noise to what is committed.

Rows that finish leave the batch: whatever belongs to rows is narrowed to those that go on, and the finished ones wait in `done`.
With per-row random numbers the tokens are the same as without (tests/test_rows.py).
"""

from collections.abc import Sequence
from functools import partial

import torch

from ..call.plan import Plan
from ..call.progress import count_possible
from ..fast.flags import FlagReader
from ..fast.recording import Recording
from ..rules.prediction import check_finite
from ..rules.state import CanvasState, start_canvas
from ..watch.watcher import Watcher, watch
from .predict import step_inputs, take_step
from .rows import Rows


def denoise_canvas(
    model, plan: Plan, rows: Rows, state: CanvasState, canvas_index: int, watchers: Sequence[Watcher] = (),
    recording: Recording | None = None, first_step: int = 0,
) -> CanvasState:  # fmt: skip
    """Denoises a canvas, as `begin_canvas` makes it, until every row is finished, the steps are used up or the time is.

    Args:
        recording: of `take_step`, for this canvas and the next ones.
        first_step: the step to begin with; behind the last one a canvas stands as it is, but in rows whose constraint refuses it, which
            take the last step.

    Returns:
        The state of all B rows.

    Raises:
        ValueError: logits that are NaN.
    """
    rows = rows.on_canvas(plan)
    last_step = plan.rules.max_denoising_steps - 1
    if first_step > last_step:
        state, first_step = state._replace(finished=rows.accept(state.canvas)), last_step
        if bool(state.finished.all()):
            return state
    everyone, done, flags, clock = rows, state, FlagReader(plan.execution.late_flags), plan.steps(state.canvas.device)
    view = rows.view(model, plan.lengths.canvas, plan.slots)
    records = recording is not None and rows.filters.hidden_before == 0  # what changes from canvas to canvas is not recorded
    if rows.progress is not None:
        records = records and rows.progress.everywhere and rows.left(plan) >= plan.lengths.canvas
    step_once = recording.on(view) if records else partial(take_step, model, plan)
    counts = everyone.progress is not None and any(watcher.needs_possible for watcher in watchers)
    for step in range(first_step, last_step + 1):
        inputs = step_inputs(plan, rows, state, clock, canvas_index, step, None if step == first_step else state.argmax)
        prediction, state = step_once(view, inputs)  # 1. predict, 2. advance
        # 3. watch
        if counts:
            state = state._replace(possible=(count_possible(rows.progress, state.argmax, rows.left(plan), plan.lengths.vocab_size),))
        state = watch(watchers, canvas_index, step, rows.places, state, prediction)._replace(possible=())
        # 4. over?
        known = flags.push(state.finished, prediction.bad)
        if known is not None:
            check_finite(known.bad, rows.places, rows.progress is not None)
        if step == last_step or plan.out_of_time() or (known is not None and bool(known.finished.all())):
            break
        # 5. rows leave
        if plan.execution.compact and known is not None and bool(known.finished.any()) and rows.can_leave():
            done = done.place(rows.within(everyone), state)
            staying = (~known.finished).nonzero().flatten()
            flags.select(staying)
            rows, state = rows.select(staying), state.select(staying.to(state.canvas.device))
            view = rows.view(model, plan.lengths.canvas, plan.slots)
    if (known := flags.last()) is not None:
        check_finite(known.bad, rows.places, rows.progress is not None)
    return done.place(rows.within(everyone), state)


def begin_canvas(
    plan: Plan, rows: Rows, hidden: torch.Tensor, canvas_index: int, given: torch.Tensor | None = None,
    conditioning: torch.Tensor | None = None,
) -> CanvasState:  # fmt: skip
    """The state of a canvas of noise, or of the canvas `given` int64 (B, C) to all rows of the batch. `hidden` `(b, n, D)`: what `prefill`
    gave for what comes before; soft embeddings are of its size and dtype: zero, or `conditioning` `(b, C, D)`."""
    shape = (len(rows.places), plan.lengths.canvas)
    noise = rows.draws.at(canvas_index, -1).noise(plan.rules.noise, shape, hidden.device)  # drawn in any case, as transformers does
    soft_embeds = hidden.new_zeros((*shape, hidden.shape[-1])) if conditioning is None else conditioning.to(hidden)
    logits = (hidden.new_zeros((*shape, plan.lengths.vocab_size), dtype=torch.float32),) if plan.execution.keep_logits else ()
    return start_canvas(noise if given is None else given[rows.places], soft_embeds, plan.rules.stopping, logits)


__all__ = ["begin_canvas", "denoise_canvas"]
