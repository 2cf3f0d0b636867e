"""The state of a canvas and the one step that changes it."""

from typing import NamedTuple

import torch

from .noise import Noise
from .samplers import EntropyBoundSampler
from .statistics import RowStatistics
from .stopping import StableAndConfident


class CanvasState(NamedTuple):
    """Everything a denoising step may change.

    `canvas` int64 (B, C): what the next canvas pass reads. `argmax` int64 (B, C): the greedy tokens of the last step, which
    are what is committed. `soft_embeds` (B, C, D) or None before the first step. `finished` bool (B,): rows whose canvas is
    done and no longer changes. `history` int64 (T, B, C): earlier argmax canvases. `passes` int64 (B,): canvas passes the row
    needed. `accepted` bool (B, C): positions the last step accepted.
    """

    canvas: torch.Tensor
    argmax: torch.Tensor
    soft_embeds: torch.Tensor | None
    finished: torch.Tensor
    history: torch.Tensor
    passes: torch.Tensor
    accepted: torch.Tensor


def start_canvas(canvas: torch.Tensor, stopping: StableAndConfident) -> CanvasState:
    rows = canvas.new_zeros(canvas.shape[0])
    return CanvasState(canvas, canvas, None, rows.bool(), stopping.empty_history(canvas), rows, torch.zeros_like(canvas).bool())


def denoising_step(
    state: CanvasState,
    statistics: RowStatistics,
    soft_embeds: torch.Tensor,
    sampler: EntropyBoundSampler,
    stopping: StableAndConfident,
    noise: Noise,
    generator: torch.Generator | None = None,
) -> CanvasState:
    """Accepts, renoises and decides which rows are finished; a row that was finished before stays as it is.

    Args:
        statistics, soft_embeds: of this step's canvas pass.
    """
    accepted = sampler.accept(statistics.entropy)
    canvas = torch.where(accepted, statistics.sample, noise.draw(state.canvas.shape, state.canvas.device, generator))
    was_finished = state.finished[:, None]
    canvas = torch.where(was_finished, state.canvas, canvas)
    argmax = torch.where(was_finished, state.argmax, statistics.argmax)
    accepted = torch.where(was_finished, state.accepted, accepted)
    if state.soft_embeds is not None:
        soft_embeds = torch.where(was_finished[..., None], state.soft_embeds, soft_embeds)
    done, history = stopping.check(argmax, statistics.entropy, state.history)
    passes = state.passes + ~state.finished
    return CanvasState(canvas, argmax, soft_embeds, state.finished | done, history, passes, accepted)


__all__ = ["CanvasState", "denoising_step", "start_canvas"]
