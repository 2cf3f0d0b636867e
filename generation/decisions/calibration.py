"""Calibration: by how much probabilities must be flattened, and options be preferred, for them to be as often right as they say.

    p = softmax(scores / temperature + bias)

A temperature, and a bias for each place among the options, of every type of question or of single questions: temperature scaling and its
vector form, with one temperature (Guo et al. 2017, arXiv 1706.04599). Fitted on questions whose answers, or whose answers' probabilities,
are known, by the least negative log-likelihood of what `decide` says: the mean over the reads. Kept beside the checkpoint in
`decision.json`, the temperature where transformers' `DecisionConfig` has it and reads it too.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers.utils import cached_file

from ..arguments import shown
from .questions import CHOICE, are_probabilities

FILE = "decision.json"
SMALLEST = 1e-9  # temperature; below 1e-300 scores divided by it are infinite, and their probabilities NaN
PULL = 1e-3  # of log temperature and biases towards 0, squared: what a few or perfectly separate answers leave open stays as it is


@dataclass(frozen=True)
class Calibration:
    """Without anything, probabilities stay as they are read.

    Args:
        temperature: by a question's name or type, from 1e-9 to 1e9; 1 where there is none.
        bias: by a question's name or type, nats for each place among the options; 0 where there is none. A name goes before a type, and the
            type of a question in the plain form is "choice".

    Raises:
        ValueError: a temperature out of this range, beyond which probabilities are NaN, or what is no number.
    """

    temperature: Mapping[str, float] = field(default_factory=dict)
    bias: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in (("temperature", self.temperature), ("bias", self.bias)):
            if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
                raise ValueError(f"`{name}` is {shown(values)}; expected a mapping of names or types of questions")
        for key, value in self.temperature.items():
            if not _is_finite(value) or not SMALLEST <= value <= 1 / SMALLEST:
                raise ValueError(f"`temperature` of {key!r} is {shown(value)}; expected a positive number, from 1e-9 to 1e9")
        for key, values in self.bias.items():
            if isinstance(values, str) or not isinstance(values, Sequence) or not all(map(_is_finite, values)):
                raise ValueError(f"`bias` of {key!r} is {shown(values)}; expected a list of numbers, one for each place among the options")

    def apply(self, scores: torch.Tensor, name: str, kind: str = CHOICE) -> torch.Tensor:
        """Log-probabilities of the options, float64 (..., options), of `scores` as read."""
        temperature = self.temperature.get(name, self.temperature.get(kind, 1.0))
        given = list(self.bias.get(name, self.bias.get(kind, ())))[: scores.shape[-1]]
        bias = scores.new_tensor(given + [0.0] * (scores.shape[-1] - len(given)))
        return torch.log_softmax(scores / temperature + bias, dim=-1)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes it into `decision.json` of a folder, beside what else that file says."""
        path = Path(folder) / FILE
        said = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        said |= {"temperature": dict(self.temperature), "bias": {key: list(values) for key, values in self.bias.items()}}
        path.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, **download: Any) -> "Calibration":
        """Of a checkpoint, a folder or a name on the Hub; without anything where it has none.

        Args: `download`: as `cached_file` of transformers takes them.

        Raises:
            ValueError: its `decision.json` is no JSON object, or holds what a calibration may not.
        """
        path = find_files(name, FILE, **download)[FILE]
        return cls() if path is None else cls.from_file(path)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "Calibration":
        """Of a `decision.json`; raises as `from_pretrained`."""
        try:
            said = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        if not isinstance(said, dict):
            raise ValueError(f"{path} holds {shown(said)}; expected a JSON object")
        return cls(said.get("temperature", {}), said.get("bias", {}))


def find_files(name: str | os.PathLike, *files: str, **download: Any) -> dict[str, str | None]:
    """Where files of a checkpoint are, a folder or a name on the Hub; None for one that it has not, or that cannot be had now."""
    kinds = ("missing_entries", "connection_errors", "gated_repo")
    lenient = {f"_raise_exceptions_for_{kind}": False for kind in kinds}
    return {file: cached_file(str(name), file, **download, **lenient) for file in files}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_numbers(values: Any) -> bool:
    """Of a list, a tuple, a tensor or an array of one dimension."""
    if isinstance(values, torch.Tensor | numpy.ndarray):
        values = values.tolist() if values.ndim == 1 else None
    return isinstance(values, list | tuple) and all(map(_is_finite, values))


def fit_calibration(
    scores: Mapping[str, Sequence[torch.Tensor]], truths: Mapping[str, Sequence[int | Sequence[float]]], bias: bool = True
) -> Calibration:
    """The calibration under which known answers are most probable.

    Args:
        scores: by name or type, of each question the `Decision.scores`, float64 (reads, options).
        truths: under the same keys, of each question the place of the right option, or the probability of each.
        bias: whether places among the options get a bias, of which the mean is 0; else a temperature alone.

    Raises:
        ValueError: keys or lengths that differ, nothing under a key, or what are no scores and no truth.
    """
    for name, given in (("scores", scores), ("truths", truths)):
        if not isinstance(given, Mapping):
            raise ValueError(f"`{name}` is {shown(given)}; expected a mapping of names or types of questions")
    if not scores or scores.keys() != truths.keys():
        raise ValueError(f"`scores` has the keys {[*scores]}, `truths` {[*truths]}; expected the same, and at least one")
    temperatures, biases = {}, {}
    for key, read in scores.items():
        if not len(read) or len(read) != len(truths[key]):
            raise ValueError(f"`truths` has {len(truths[key])} of {key!r}, `scores` {len(read)}; expected as many, and at least one")
        for one in read:
            check_scores(key, one)
        wanted = [true_probabilities(truth, one.shape[-1]) for one, truth in zip(read, truths[key], strict=True)]
        temperatures[key], biases[key] = _fit(list(read), wanted, bias)
    return Calibration(temperatures, biases if bias else {})


def check_scores(key: str, scores: Any) -> None:
    """Raises ValueError for what are no `Decision.scores`."""
    if not isinstance(scores, torch.Tensor) or scores.dim() != 2 or not scores.numel() or not scores.is_floating_point():
        raise ValueError(f"`scores` of {key!r} holds {shown(scores)}; expected `Decision.scores`, a tensor of shape (reads, options)")
    if not bool(scores.isfinite().all()):
        raise ValueError(f"`scores` of {key!r} holds NaN or infinity; expected finite log-probabilities, as `decide` reads them")


def true_probabilities(truth: int | Sequence[float], options: int) -> torch.Tensor:
    """A truth as probabilities, float64 (options,). Raises ValueError for what is none."""
    place = truth.item() if getattr(truth, "shape", None) == () else truth  # of a tensor or an array
    if isinstance(place, int) and not isinstance(place, bool) and 0 <= place < options:
        return torch.eye(options, dtype=torch.float64, device="cpu")[place]
    if _are_numbers(place) and len(place) == options:
        found = torch.as_tensor(truth, dtype=torch.float64, device="cpu")
        if are_probabilities(found):
            return found
    raise ValueError(f"`truths` holds {shown(truth)}; expected the place of the right one of {options} options, or a probability of each")


def _fit(scores: list[torch.Tensor], truths: list[torch.Tensor], with_bias: bool) -> tuple[float, list[float]]:
    """Temperature and biases of one key; questions of as many options and reads are computed at once."""
    groups: dict[tuple[int, int], list[int]] = {}
    for place, one in enumerate(scores):
        groups.setdefault(tuple(one.shape), []).append(place)
    stacked = [
        (torch.stack([scores[place].double().cpu() for place in places]), torch.stack([truths[place] for place in places]))
        for places in groups.values()
    ]
    most = max(one.shape[-1] for one in scores)
    log_temperature = torch.zeros((), dtype=torch.float64, device="cpu", requires_grad=True)
    bias = torch.zeros(most, dtype=torch.float64, device="cpu", requires_grad=True)
    search = torch.optim.LBFGS(
        [log_temperature, bias] if with_bias else [log_temperature], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> torch.Tensor:
        search.zero_grad()
        total = PULL * (log_temperature**2 + (bias**2).sum())
        for read, wanted in stacked:
            each = torch.log_softmax(read / log_temperature.exp() + bias[: read.shape[-1]], dim=-1)  # (questions, reads, options)
            said = each.logsumexp(dim=1) - math.log(each.shape[1])
            total = total - (wanted * said).sum() / len(scores)
        total.backward()
        return total

    with torch.inference_mode(False), torch.enable_grad():
        search.step(loss)
    found = bias.detach()
    return float(log_temperature.detach().exp()), (found - found.mean()).tolist() if with_bias else []


__all__ = ["FILE", "Calibration", "find_files", "fit_calibration", "true_probabilities"]
