"""The two ways to make a prediction, of one signature; the plan says which, once a call, and why (`Execution.why_dense`).

`predict_dense` computes whole logits, which processors and the caller may see; `predict_streamed` walks the vocabulary in pieces and never
has any. A step is either of them, a constraint, and `state.advance`: the loop and its recording run `take_step`, and nothing else does.
"""

from typing import Any, NamedTuple

import torch

from ..call.plan import Plan
from ..call.progress import Progress
from ..rules.constraint import Constraint, check_constrained
from ..rules.draws import DrawnStep, Draws
from ..rules.prediction import Prediction, dense_prediction, narrowed
from ..rules.state import CanvasState, advance
from ..vocabulary.filters import Filters
from ..vocabulary.walk import choose_way, streamed_prediction
from .constrained import constrained_dense, constrained_streamed, draw_chance
from .rows import Rows


class StepInputs(NamedTuple):
    """What a step reads beside the canvas's view.

    `step` int64 (), counted up from 0, and its `temperature` float32 (). `draws`: those of this step. `progress`: what the rows must write,
    how far they are, and how far they reach on this canvas. For whole logits only: `committed` int64 (B, L); `guess` int64 (B, C), the last
    argmax canvas, None at the first step; `remaining`, steps left with this one. Without these and a `Constraint`, and with a `DrawnStep`,
    all of it are tensors, but for what of `progress` stays.
    """

    state: CanvasState
    step: torch.Tensor
    temperature: torch.Tensor
    draws: Draws | DrawnStep
    filters: Filters
    constraint: Constraint | None = None
    progress: Progress | None = None
    committed: torch.Tensor | None = None
    guess: torch.Tensor | None = None
    remaining: int | None = None

    def of(self, rows: torch.Tensor) -> "StepInputs":
        """Those of some of the rows, int64, whose numbers are drawn in the step."""
        by_row = ((name, getattr(self, name)) for name in ("committed", "guess"))
        progress = None if self.progress is None else self.progress.select(rows)
        return self._replace(
            state=self.state.select(rows), draws=self.draws.select(rows), filters=self.filters.select(rows), progress=progress,
            **{name: None if value is None else value[rows] for name, value in by_row},
        )  # fmt: skip


def take_step(model, plan: Plan, view: Any, inputs: StepInputs) -> tuple[Prediction, CanvasState]:
    """One denoising step: what the model predicts, what a constraint makes of it, and the next state. With `predict_streamed` nothing is
    read back from the device (tests/test_recording.py)."""
    rules, state, draws = plan.rules, inputs.state, inputs.draws
    hidden = model.denoise(state.canvas, soft_embeds=state.soft_embeds, view=view).last_hidden_state
    prediction = predict(model, plan, hidden, state.canvas if rules.sampler.informed else None, inputs)
    if inputs.constraint is not None:
        found = inputs.constraint.constrain(prediction, state, model.get_input_embeddings())
        prediction = check_constrained(inputs.constraint, found, prediction)
    noise = draws.noise(rules.noise, state.canvas.shape, state.canvas.device)
    uniform = draws.uniforms(state.canvas.shape, state.canvas.device, "acceptance") if rules.sampler.informed else None
    return prediction, advance(
        state, prediction, inputs.step, rules.max_denoising_steps, noise, rules.sampler, rules.stopping, rules.sure_end, uniform,
        rules.conditioning_steps,
    )  # fmt: skip


def predict(model, plan: Plan, hidden: torch.Tensor, current: torch.Tensor | None, inputs: StepInputs) -> Prediction:
    """Of every row, in the plan's way, with or without a constraint. Args as `predict_dense`."""
    dense, progress = plan.execution.why_dense is not None, inputs.progress
    free, bound = (predict_dense, constrained_dense) if dense else (predict_streamed, constrained_streamed)
    if progress is None or progress.everywhere:
        return (free if progress is None else bound)(model, plan, hidden, current, inputs)
    whole: list[torch.Tensor | None] = [None] * len(Prediction._fields)
    for way, rows in ((free, progress.others()), (bound, progress.rows)):
        found = way(model, plan, hidden[rows], None if current is None else current[rows], inputs.of(rows))
        for place, value in enumerate(found):
            if value is not None:
                base = value.new_zeros((len(hidden), *value.shape[1:])) if whole[place] is None else whole[place]
                whole[place] = base.index_copy(0, rows, value)
    return Prediction(*whole)


def walk_numbers(plan: Plan, dtype: torch.dtype, canvas: torch.Tensor, filters: Filters) -> tuple[tuple[int, ...], int]:
    """The shape of the numbers that a walk draws for hidden states of a `dtype` and a canvas (B, C), and how many ids share them."""
    informed, vocab_size = plan.rules.sampler.informed, plan.lengths.vocab_size
    way = choose_way(dtype, canvas.device, vocab_size, filters.narrow(), plan.rules.greedy, informed)
    return way.chance_shape(*canvas.shape, vocab_size, informed), way.tile


def predict_dense(model, plan: Plan, hidden: torch.Tensor, current: torch.Tensor | None, inputs: StepInputs) -> Prediction:
    """By whole logits; its tokens are those that `predict_streamed` draws, or transformers' (`Draws.of_walk`).

    Args: `hidden` `(B, C, D)`, what the canvas pass gave; `current` int64 (B, C), as `dense_prediction` takes it."""
    raw = model.compute_logits(hidden)  # (B, C, V)
    rules, draws = plan.rules, inputs.draws
    shaped = rules.shaping(raw, inputs.filters, inputs.committed, inputs.guess, inputs.temperature, inputs.remaining)
    if not rules.greedy:
        draws = draws.of_walk(*walk_numbers(plan, hidden.dtype, inputs.state.canvas, inputs.filters), hidden.device)
    prediction = dense_prediction(shaped, draws, rules.greedy, current, plan.execution.wanted)
    return prediction._replace(soft_embeds=model.soft_embed(narrowed(shaped, model.dtype)), raw=raw)


def predict_streamed(model, plan: Plan, hidden: torch.Tensor, current: torch.Tensor | None, inputs: StepInputs) -> Prediction:
    """In pieces of the vocabulary. Args as `predict_dense`."""
    with model.vocabulary_head() as head:
        return streamed_prediction(
            hidden, head, inputs.temperature, inputs.draws, plan.rules.greedy, current, inputs.filters, wanted=plan.execution.wanted
        )


def draw_step(plan: Plan, draws: Draws, state: CanvasState, filters: Filters, constrained: bool = False) -> DrawnStep:
    """The random numbers of a streamed step; `constrained`: of rows that all must write a text of a language."""
    rules, (batch_size, length), device = plan.rules, state.canvas.shape, state.canvas.device
    walk = None
    if constrained:
        walk = draw_chance(plan, draws, state.canvas)
    elif not rules.greedy:
        walk = draws.uniforms(walk_numbers(plan, state.soft_embeds.dtype, state.canvas, filters)[0], device)
    acceptance = draws.uniforms((batch_size, length), device, "acceptance") if rules.sampler.informed else None
    return DrawnStep(walk, draws.noise(rules.noise, (batch_size, length), device), acceptance)


def step_inputs(
    plan: Plan, rows: Rows, state: CanvasState, clock: tuple[torch.Tensor, torch.Tensor], canvas_index: int, step: int,
    guess: torch.Tensor | None,
) -> StepInputs:  # fmt: skip
    """What step `step` of a canvas reads; `clock`: of `Plan.steps`."""
    draws, (steps, temperatures) = rows.draws.at(canvas_index, step), clock
    progress = rows.progress
    inputs = StepInputs(state, steps[step], temperatures[step], draws, rows.filters, rows.constraint, progress)
    if plan.execution.why_dense is not None:
        return inputs._replace(committed=rows.committed, guess=guess, remaining=plan.rules.max_denoising_steps - step)
    if progress is not None and not progress.everywhere:  # rows with and without one draw other numbers, each in the step
        return inputs
    return inputs._replace(draws=draw_step(plan, draws, state, rows.filters, progress is not None))


__all__ = ["StepInputs", "draw_step", "predict_dense", "predict_streamed", "step_inputs", "take_step"]
