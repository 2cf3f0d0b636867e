"""The state of a canvas and the one step that changes it."""

from typing import NamedTuple

import torch

from .samplers import Sampler
from .statistics import RowStatistics
from .stopping import StableAndConfident, before_sure_end, mean_entropy


class CanvasState(NamedTuple):
    """Everything a denoising step may change, for B rows.

    What the next canvas pass reads: `canvas` int64 (B, C) and `soft_embeds` (B, C, D), None before the first step.
    What is committed in the end: `argmax` int64 (B, C), the greedy tokens; with `log_probs` and `entropy` float32 (B, C) in nats,
    `changed_at` int64 (B, C), the step since which the argmax stands, and `revisions` int64 (B, C), how often it changed.
    What this step did: `accepted` bool (B, C). What decides the end: `finished` bool (B,), rows that no longer change;
    `history` int64 (T, B, C), earlier argmax canvases; `best` float32 (B,), the lowest mean entropy so far in nats, and
    `waited` int64 (B,), the steps since. `passes` int64 (B,): canvas passes the row needed.
    """

    canvas: torch.Tensor
    argmax: torch.Tensor
    soft_embeds: torch.Tensor | None
    log_probs: torch.Tensor
    entropy: torch.Tensor
    changed_at: torch.Tensor
    revisions: torch.Tensor
    accepted: torch.Tensor
    finished: torch.Tensor
    history: torch.Tensor
    best: torch.Tensor
    waited: torch.Tensor
    passes: torch.Tensor

    def select(self, rows: torch.Tensor) -> "CanvasState":
        """The state of some of the rows."""
        fields = {name: value[rows] for name, value in self._asdict().items() if value is not None and name != "history"}
        return self._replace(**fields, history=self.history[:, rows])

    def place(self, rows: torch.Tensor, part: "CanvasState") -> "CanvasState":
        """This state with `part` in the places of `rows`; soft embeddings are left out."""
        placed = {}
        for name in CanvasState._fields:
            if name != "soft_embeds":
                placed[name] = getattr(self, name).index_copy(1 if name == "history" else 0, rows, getattr(part, name))
        return CanvasState(**placed, soft_embeds=None)


def start_canvas(canvas: torch.Tensor, stopping: StableAndConfident) -> CanvasState:
    """The state before the first step."""
    zeros, row_zeros = torch.zeros_like(canvas), canvas.new_zeros(canvas.shape[0])
    return CanvasState(
        canvas=canvas, argmax=canvas, soft_embeds=None, log_probs=zeros.float(), entropy=zeros.float(), changed_at=zeros,
        revisions=zeros, accepted=zeros.bool(), finished=row_zeros.bool(), history=stopping.empty_history(canvas),
        best=torch.full_like(row_zeros, float("inf"), dtype=torch.float32), waited=row_zeros, passes=row_zeros,
    )  # fmt: skip


def denoising_step(
    state: CanvasState,
    step: int | torch.Tensor,
    max_denoising_steps: int,
    statistics: RowStatistics,
    noise: torch.Tensor,
    sampler: Sampler,
    stopping: StableAndConfident,
    sure_end: torch.Tensor | None = None,
    patience: int | None = None,
    uniform: torch.Tensor | None = None,
) -> CanvasState:
    """Makes the next canvas and decides which rows are finished; a row that was finished before stays as it is.

    Args:
        step: counts up from 0; an int, or an int64 tensor without dimensions.
        statistics: of this step's canvas pass.
        noise: int64 (B, C), what positions that are not accepted become.
        uniform: float32 (B, C) in [0, 1), for samplers that are `informed`.
        sure_end: end-of-sequence ids; with them, what lies behind one the canvas is sure of does not delay the end.
        patience: steps after which a row whose mean entropy reaches no new minimum gives up; None: never.
    """
    proposal = sampler.propose(state.canvas, statistics, noise, uniform, step, max_denoising_steps)
    counted = None
    if sure_end is not None:
        counted = before_sure_end(statistics.argmax, statistics.entropy, sure_end, stopping.confidence_threshold)
    done, history = stopping.check(statistics.argmax, statistics.entropy, state.history, counted)
    mean = mean_entropy(statistics.entropy, counted)
    better = mean < state.best
    waited = torch.where(better, 0, state.waited + 1)
    if patience is not None:
        done = done | (waited >= patience)
    changed = (statistics.argmax != state.argmax) & (step > 0)
    fresh = CanvasState(
        canvas=proposal.canvas, argmax=statistics.argmax, soft_embeds=state.soft_embeds,
        log_probs=statistics.log_probs, entropy=statistics.entropy, changed_at=torch.where(changed, step, state.changed_at),
        revisions=state.revisions + changed, accepted=proposal.accepted, finished=done, history=history,
        best=torch.where(better, mean, state.best), waited=waited, passes=state.passes + 1,
    )  # fmt: skip
    return _keep_finished(state, fresh)


def condition(state: CanvasState, finished_before: torch.Tensor, soft_embeds: torch.Tensor) -> CanvasState:
    """Hands the step's soft embedding (B, C, D) to the next one; rows that were finished before the step keep theirs."""
    if state.soft_embeds is not None:
        soft_embeds = torch.where(finished_before[:, None, None], state.soft_embeds, soft_embeds)
    return state._replace(soft_embeds=soft_embeds)


def _keep_finished(state: CanvasState, fresh: CanvasState) -> CanvasState:
    """`fresh`, with the rows that were already finished as they were."""

    def merge(name: str, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        lead = 1 if name == "history" else 0
        finished = state.finished.view(*[1] * lead, -1, *[1] * (new.dim() - lead - 1))
        return torch.where(finished, old, new)

    pairs = zip(CanvasState._fields, state, fresh, strict=True)
    return CanvasState(*(new if name == "soft_embeds" else merge(name, old, new) for name, old, new in pairs))


__all__ = ["CanvasState", "condition", "denoising_step", "start_canvas"]
