"""How good probabilities are, against answers or probabilities that are known; and that as a picture. Knows no model.

Expected calibration error and the diagram: Guo et al. 2017, arXiv 1706.04599. Of the best option of every question, how probable it is said
to be, and how often it is right: where the true probability is known, that instead of a 0 or 1, which is the same without the chance.
"""

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import torch

from ..arguments import shown
from .questions import are_probabilities

BINS = 10


class Judged(NamedTuple):
    """Means over questions: `accuracy`, how often the best option is right; `log_likelihood`, nats, of what is right; `brier`, the squared
    distance of the probabilities from it; `distance`, the mean absolute one, of an option; `error`, expected calibration error."""

    accuracy: float
    log_likelihood: float
    brier: float
    distance: float
    error: float


def confidences(probabilities: Sequence[torch.Tensor], truths: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each question's best option how probable it is said to be, and how probable it is: float64 (questions,) each."""
    best = [int(one.argmax()) for one in probabilities]
    said = [float(one[place]) for one, place in zip(probabilities, best, strict=True)]
    true = [float(one[place]) for one, place in zip(truths, best, strict=True)]
    return tuple(torch.tensor(values, dtype=torch.float64, device="cpu") for values in (said, true))


def reliability(said: torch.Tensor, true: torch.Tensor, bins: int = BINS) -> list[tuple[float, float, int]]:
    """Of each bin of equal width of what is said that is not empty: mean said, mean true, and how many. A bin holds its upper end."""
    place = (said * bins).ceil().sub(1).clamp(0, bins - 1).long()
    chosen = [place == each for each in range(bins)]
    return [(float(said[one].mean()), float(true[one].mean()), int(one.sum())) for one in chosen if bool(one.any())]


def expected_calibration_error(said: torch.Tensor, true: torch.Tensor, bins: int = BINS) -> float:
    """Mean distance of what is said from what is true in each bin, weighed by how many are in it; arguments float64 (questions,)."""
    return sum(count * abs(one - other) for one, other, count in reliability(said, true, bins)) / len(said)


def check_probabilities(name: str, place: int, given: Any) -> None:
    """Raises ValueError for what are no probabilities of options: of another shape, not from 0 to 1, or not 1 together."""
    if not isinstance(given, torch.Tensor) or given.dim() != 1 or not given.is_floating_point():
        raise ValueError(f"`{name}` holds {shown(given)} at {place}; expected a tensor of shape (options,), floating point")
    if not are_probabilities(given):
        raise ValueError(f"`{name}` holds {given.tolist()} at {place}; expected probabilities, from 0 to 1 and together 1")


def judge(probabilities: Sequence[torch.Tensor], truths: Sequence[torch.Tensor]) -> Judged:
    """Args: of each question, float64 (options,) each: what is said of its options, and what is true of them.

    Raises:
        ValueError: no questions, or not as many of both; what are no probabilities; another number of options there than here.
    """
    if not len(probabilities) or len(probabilities) != len(truths):
        raise ValueError(f"`probabilities` has {len(probabilities)} questions, `truths` {len(truths)}; expected as many, and at least one")
    for name, given in (("probabilities", probabilities), ("truths", truths)):
        for place, one in enumerate(given):
            check_probabilities(name, place, one)
    for place, (one, wanted) in enumerate(zip(probabilities, truths, strict=True)):
        if one.shape != wanted.shape:
            raise ValueError(f"`truths` has {len(wanted)} options at {place}, `probabilities` {len(one)}; expected as many")
    said, true = confidences(probabilities, truths)
    pairs = list(zip(probabilities, truths, strict=True))
    likelihood = [float(torch.where(wanted > 0, wanted * one.log(), 0.0).sum()) for one, wanted in pairs]
    brier = [float(((one - wanted) ** 2).sum()) for one, wanted in pairs]
    distance = [float((one - wanted).abs().mean()) for one, wanted in pairs]
    means = (math.fsum(values) / len(pairs) for values in (likelihood, brier, distance))
    return Judged(float(true.mean()), *means, expected_calibration_error(said, true))


def draw_reliability(
    judged: Mapping[str, tuple[torch.Tensor, torch.Tensor]], path: str | PathLike, bins: int = BINS
) -> None:  # fmt: skip
    """Writes a reliability diagram as a PNG, side by side for each name, such as "before" and "after".

    Args: `judged`: by name, what `confidences` gives.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "matplotlib is not installed, which draws a diagram; expected it: pip install 'modeling-diffusiongemma[bench]'"
        ) from error
    if not judged:
        raise ValueError("`judged` is empty; expected a name with what is said and what is true")
    figure = Figure(figsize=(3.6 * len(judged), 4), layout="constrained", dpi=120)
    axes = figure.subplots(1, len(judged), squeeze=False, sharey=True)[0]
    for axis, (name, (said, true)) in zip(axes, judged.items(), strict=True):
        found = reliability(said, true, bins)
        most = max(count for _, _, count in found)
        axis.plot([0, 1], [0, 1], color="#888888", linewidth=1)
        axis.vlines([one for one, _, _ in found], *zip(*[sorted(each[:2]) for each in found], strict=True), color="#d97706", linewidth=1.5)
        sizes = [20 + 180 * count / most for _, _, count in found]
        axis.scatter([one for one, _, _ in found], [other for _, other, _ in found], s=sizes, color="#1d4ed8", zorder=3)
        axis.set_title(f"{name}: error {expected_calibration_error(said, true, bins):.3f}", fontsize=10, loc="left")
        axis.set_xlim(0, 1.02)
        axis.set_ylim(0, 1.02)
        axis.set_aspect("equal")
        axis.set_xlabel("said")
    axes[0].set_ylabel("true")
    figure.supxlabel("best options by how probable they are said to be; a larger dot: more of them", fontsize=8)
    figure.savefig(path, format="png")


__all__ = ["BINS", "Judged", "confidences", "draw_reliability", "expected_calibration_error", "judge", "reliability"]
