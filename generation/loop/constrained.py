"""A prediction under a constraint on the text: sums by class, what a lattice makes of them, and the draw inside the classes.

The two ways of `predict` have each their like here; rows without a constraint are predicted as ever, beside those that have one.
"""

from dataclasses import replace

import torch
from transformers import LogitsProcessorList

from ..call.plan import Plan
from ..call.progress import Progress
from ..constraints.lattice import Solution
from ..rules.draws import DrawnStep, Draws
from ..rules.prediction import Prediction
from ..vocabulary.classes import CHANCES, CHANCES_WITH_CURRENT, Chosen, ClassSums, ClassWalk, possible_shares
from ..vocabulary.dense_classes import dense_draw, dense_sums
from ..vocabulary.sums import counts_rows


def solve(progress: Progress, sums: ClassSums, chance: torch.Tensor | None, posterior: bool = False) -> Solution:
    """The lattice of one step, of b rows that all have a constraint. `chance` (`float32 (b, C, 4 or 6)`): uniform numbers in [0, 1), the
    first two of them the lattice's; None: the best string."""
    count, behind, _ = progress.reach
    states, numbers = progress.states, None if chance is None else chance[:, :count, :2]
    return progress.lattice.solve(sums.log_mass, sums.best, states, behind.expand(len(states)), numbers, posterior)


def lost(solution: Solution) -> torch.Tensor:
    """Rows of which no canvas is accepted, bool (b,); NaN, too."""
    return ~(solution.log_partition > -float("inf"))


def chosen(sums: ClassSums, solution: Solution, possible: torch.Tensor) -> Chosen:
    """What is drawn and what is best are exact: strings of the language, by their joint probability. What is measured and fed back are the
    model's probabilities at each position, of the classes that can stand there in some text that is accepted.

    The posterior is not taken for that: positions that are unsure of the same thing, such as where a number begins, would each count as
    evidence for it, and a canvas would be sure of what the model is not. Of 200 held-out notes the shipped checkpoint wrote 134 right as
    JSON by the posterior, and 158 in this way (`python benchmarks/constraints.py notes`).
    """
    return Chosen(possible_shares(sums.log_mass, possible), solution.sample, solution.best, lost(solution), summed=True)


def draw_chance(plan: Plan, draws: Draws | DrawnStep, canvas: torch.Tensor) -> torch.Tensor | None:
    """The uniform numbers of a step under constraints, for a canvas (b, C); None where it draws none."""
    if plan.rules.greedy:
        return None
    count = CHANCES_WITH_CURRENT if plan.rules.sampler.informed else CHANCES
    return draws.uniforms((*canvas.shape, count), canvas.device)


def constrained_streamed(model, plan: Plan, hidden: torch.Tensor, current: torch.Tensor | None, inputs) -> Prediction:
    """As `predict.predict_streamed`."""
    progress, chance = inputs.progress, draw_chance(plan, inputs.draws, inputs.state.canvas)
    possible = None if plan.execution.wanted.candidates else progress.reach.possible  # what is the second walk's needs no mixing before
    with model.vocabulary_head() as head:
        given = (progress.orders, progress.reach.count, inputs.filters, current, possible, inputs.state.argmax)
        walk = ClassWalk(hidden, head, inputs.temperature, *given)
        sums = walk.sums()
        solution = solve(progress, sums, chance)
        rows = lost(solution) if walk.needs_thresholds else None  # those that thresholds have left nothing: the constraint outranks them
        if rows is not None and (not counts_rows(rows.device) or bool(rows.any())):
            loose = walk.loose_sums()
            sums, solution = walk.lift(sums, loose, rows), solution.where(rows, solve(progress, loose, chance))
        return walk.draw(sums, chosen(sums, solution, progress.reach.possible), chance, plan.rules.pad, plan.execution.wanted)


def constrained_dense(model, plan: Plan, hidden: torch.Tensor, current: torch.Tensor | None, inputs) -> Prediction:
    """As `predict.predict_dense`."""
    raw, rules, progress = model.compute_logits(hidden), plan.rules, inputs.progress  # (B, C, V)
    chance, count = draw_chance(plan, inputs.draws, inputs.state.canvas), progress.reach.count
    given = (inputs.committed, inputs.guess, inputs.temperature, inputs.remaining)
    shaped = rules.shaping(raw, inputs.filters, *given)
    sums = dense_sums(shaped, progress.orders, count)
    solution = solve(progress, sums, chance)
    thresholds = inputs.filters.need_threshold() or bool(rules.shaping.after)
    if thresholds and bool((rows := lost(solution)).any()):
        loose = replace(rules.shaping, after=LogitsProcessorList())
        shaped = torch.where(rows[:, None, None], loose(raw, inputs.filters.without_thresholds(), *given), shaped)
        sums = dense_sums(shaped, progress.orders, count)
        solution = solve(progress, sums, chance)
    given = (chosen(sums, solution, progress.reach.possible), progress.orders, chance, rules.pad, current, plan.execution.wanted)
    prediction = dense_draw(shaped, sums, *given)
    return prediction._replace(soft_embeds=model.soft_embed(prediction.shaped.to(model.dtype)), raw=raw)


__all__ = ["constrained_dense", "constrained_streamed", "draw_chance"]
