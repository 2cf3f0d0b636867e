"""The inner loop: one canvas, from noise to what is committed.

Rows that finish leave the batch: whatever belongs to rows is narrowed to those that go on, and the finished ones wait in `done`.
With per-row random numbers the tokens are the same as without (tests/test_rows.py).
"""

from collections.abc import Sequence
from functools import partial

import torch

from .flags import FlagReader
from .plan import Plan
from .predict import StepInputs, draw_step, take_step
from .prediction import check_finite
from .recording import Recording
from .rows import Rows
from .state import CanvasState, start_canvas
from .watcher import Watcher, watch


def denoise_canvas(
    model, plan: Plan, rows: Rows, state: CanvasState, canvas_index: int, watchers: Sequence[Watcher] = (),
    recording: Recording | None = None, first_step: int = 0,
) -> tuple[CanvasState, torch.Tensor | None]:  # fmt: skip
    """Denoises a canvas, as `begin_canvas` makes it, until every row is finished, the steps are used up or the time is.

    Args:
        recording: of `take_step`, for this canvas and the next ones.
        first_step: the step to begin with.

    Returns:
        The state of all B rows; and with `plan.execution.keep_logits` the logits, float32 (B, C, V), of each row's last step, nothing
        applied to them.

    Raises:
        ValueError: logits that are NaN.
    """
    rules, execution = plan.rules, plan.execution
    everyone, done, kept_logits, flags = rows, state, None, FlagReader(execution.late_flags)
    view = view_canvas(model, plan, rows)
    records = recording is not None and rows.filters.hidden_before == 0  # what changes from canvas to canvas is not recorded
    step_once = recording.on(view) if records else partial(take_step, model, plan)
    steps, temperatures = plan.steps(state.canvas.device)
    for step in range(first_step, rules.max_denoising_steps):
        draws = rows.draws.at(canvas_index, step)
        inputs = StepInputs(state, steps[step], temperatures[step], draws, rows.filters, rows.constraint)
        if execution.why_dense is None:
            inputs = inputs._replace(draws=draw_step(plan, draws, state, rows.filters))
        else:
            guess = None if step == first_step else state.argmax
            inputs = inputs._replace(committed=rows.committed, guess=guess, remaining=rules.max_denoising_steps - step)
        # 1, 2. Predict, and advance by what was predicted.
        prediction, state = step_once(view, inputs)
        if execution.keep_logits:
            kept_logits = prediction.raw.clone() if kept_logits is None else kept_logits
            live = rows.within(everyone)
            kept_logits[live] = torch.where(inputs.state.finished[:, None, None], kept_logits[live], prediction.raw)
        # 3. Watch.
        state = watch(watchers, canvas_index, step, rows.places, state, prediction)
        # 4. Over?
        known = flags.push(state.finished, prediction.bad)
        if known is not None:
            check_finite(known.bad, rows.places)
        all_finished = known is not None and bool(known.finished.all())
        if all_finished or step + 1 == rules.max_denoising_steps or plan.out_of_time():
            break
        # 5. Rows leave.
        if execution.compact and known is not None and bool(known.finished.any()) and rows.can_leave():
            done = done.place(rows.within(everyone), state)
            staying = (~known.finished).nonzero().flatten()
            flags.select(staying)
            rows, state = rows.select(staying), state.select(staying.to(state.canvas.device))
            view = view_canvas(model, plan, rows)
    if (known := flags.last()) is not None:
        check_finite(known.bad, rows.places)
    return done.place(rows.within(everyone), state), kept_logits


def begin_canvas(plan: Plan, rows: Rows, hidden: torch.Tensor, canvas_index: int, given: torch.Tensor | None = None) -> CanvasState:
    """The state of a canvas of noise, or of the canvas `given` int64 (B, C). `hidden` `(B, n, D)`: what `prefill` gave for what comes
    before; soft embeddings are of its size and dtype."""
    shape = (len(rows.places), plan.lengths.canvas)
    noise = rows.draws.at(canvas_index, -1).noise(plan.rules.noise, shape, hidden.device)  # drawn in any case, as transformers does
    soft_embeds = hidden.new_zeros((*shape, hidden.shape[-1]))
    return start_canvas(noise if given is None else given, soft_embeds, plan.rules.stopping)


def view_canvas(model, plan: Plan, rows: Rows):
    """What holds for every step of the canvas."""
    return rows.view(model, plan.lengths.canvas, plan.execution.count_padding, plan.slots)


__all__ = ["begin_canvas", "denoise_canvas"]
