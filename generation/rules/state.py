"""The state of a canvas and the one step that changes it.

Every tensor of a state has a row of the batch in its first dimension, those in the memory of the stopping rules included: rows are
chosen, put back and kept by one function, whatever a rule remembers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from .prediction import Prediction
from .samplers import Sampler, check_proposal
from .stopping import StoppingRule, before_sure_end, check_memory, check_update


def by_row(function: Callable[..., torch.Tensor], *values: Any) -> Any:
    """`function` of the tensors in the same place of equal structures (tuples, named tuples, dicts)."""
    return pytree.tree_map(function, *values)


class CanvasState(NamedTuple):
    """Everything a denoising step may change, for B rows.

    What the next canvas pass reads: `canvas` int64 (B, C) and `soft_embeds` (B, C, D), zero before the first step.
    What is committed in the end: `argmax` int64 (B, C), the greedy tokens; with `log_probs` and `entropy` float32 (B, C) in nats,
    `changed_at` int64 (B, C), the step since which the argmax stands, and `revisions` int64 (B, C), how often it changed.
    What this step did: `accepted` bool (B, C). What decides the end: `finished` bool (B,), rows that no longer change, and `memory` of
    the stopping rules. `passes` int64 (B,): canvas passes the row needed. `logits`: empty, or one float32 (B, C, V), the model's of the
    row's last step, where they are asked for.

    What watchers are shown beside it: `possible`, empty unless a row has a constraint on its text and one of them `needs_possible`, or one
    int64 (B, C): how many ids could stand at each position, the rest of the argmax canvas being as it is. 1 is pinned; rows without a
    constraint have all of the vocabulary. It is put there for them, and no step has it.
    """

    canvas: torch.Tensor
    soft_embeds: torch.Tensor
    argmax: torch.Tensor
    log_probs: torch.Tensor
    entropy: torch.Tensor
    changed_at: torch.Tensor
    revisions: torch.Tensor
    accepted: torch.Tensor
    finished: torch.Tensor
    passes: torch.Tensor
    memory: Any
    logits: tuple[torch.Tensor, ...] = ()
    possible: tuple[torch.Tensor, ...] = ()

    def select(self, rows: torch.Tensor) -> "CanvasState":
        """The state of some of the rows."""
        return by_row(lambda tensor: tensor[rows], self)

    def place(self, rows: torch.Tensor, some: "CanvasState") -> "CanvasState":
        """This state with `some` in the places of `rows`; where those are all rows, in their order, it is `some`."""
        if len(rows) == len(self.canvas):
            return some
        return by_row(lambda whole, placed: whole.index_copy(0, rows, placed), self, some)


def start_canvas(
    canvas: torch.Tensor, soft_embeds: torch.Tensor, stopping: StoppingRule, logits: tuple[torch.Tensor, ...] = ()
) -> CanvasState:
    """The state before the first step, `soft_embeds` `(B, C, D)` and `logits`, where there are any, being zero."""
    zeros, of_rows = torch.zeros_like(canvas), canvas.new_zeros(canvas.shape[0])
    memory = check_memory(stopping, stopping.start(canvas), canvas)
    return CanvasState(
        canvas=canvas, soft_embeds=soft_embeds, argmax=canvas, log_probs=zeros.float(), entropy=zeros.float(), changed_at=zeros,
        revisions=zeros, accepted=zeros.bool(), finished=of_rows.bool(), passes=of_rows, memory=memory, logits=logits,
    )  # fmt: skip


def advance(
    state: CanvasState,
    prediction: Prediction,
    step: int | torch.Tensor,
    max_denoising_steps: int,
    noise: torch.Tensor,
    sampler: Sampler,
    stopping: StoppingRule,
    sure_end: tuple[torch.Tensor, float] | None = None,
    uniform: torch.Tensor | None = None,
    conditioning_steps: int | None = None,
) -> CanvasState:
    """Makes the next canvas and decides which rows are finished; a row that was finished before stays as it is.

    Args:
        prediction: of this step's canvas pass, `soft_embeds` included.
        step: counts up from 0; an int, or an int64 tensor without dimensions.
        noise: int64 (B, C), what positions that are not accepted become.
        sure_end: end-of-sequence ids and nats: what lies behind such an end the canvas is sure of does not delay the row's
            (`stopping.before_sure_end`).
        uniform: float32 (B, C) in [0, 1), for samplers that are `informed`.
        conditioning_steps: after so many passes of a row its next one is conditioned on nothing, and so on.
    """
    proposal = check_proposal(sampler, sampler.propose(state.canvas, prediction, noise, uniform, step, max_denoising_steps), state.canvas)
    counted = None if sure_end is None else before_sure_end(prediction, *sure_end)
    done, memory = check_update(stopping, stopping.update(state.memory, prediction, counted), state.memory, state.canvas)
    changed = (prediction.argmax != state.argmax) & (state.passes > 0)[:, None]
    soft_embeds = prediction.soft_embeds
    if conditioning_steps is not None:
        soft_embeds = soft_embeds.masked_fill(((state.passes + 1) % conditioning_steps == 0)[:, None, None], 0)
    fresh = CanvasState(
        canvas=proposal.canvas, soft_embeds=soft_embeds, argmax=prediction.argmax, log_probs=prediction.log_probs,
        entropy=prediction.entropy, changed_at=torch.where(changed, step, state.changed_at), revisions=state.revisions + changed,
        accepted=proposal.accepted, finished=done, passes=state.passes + 1, memory=memory,
        logits=(prediction.raw,) if state.logits else (),
    )  # fmt: skip
    return keep_rows(state.finished, state, fresh)


def keep_rows(kept: torch.Tensor, before: CanvasState, after: CanvasState) -> CanvasState:
    """`after`, and `before` in the rows of `kept` bool (B,)."""
    return by_row(lambda old, new: torch.where(kept.view(-1, *[1] * (new.dim() - 1)), old, new), before, after)


__all__ = ["CanvasState", "advance", "by_row", "keep_rows", "start_canvas"]
