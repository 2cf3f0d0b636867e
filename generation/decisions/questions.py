"""Questions and what is said of them: which options there are, how probable each is, and how sure that is. Knows no tokens."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..arguments import shown
from ..constraints.expression import text
from ..constraints.languages import Choice

CHOICE = "choice"  # the type of a question in the plain form
TOGETHER = 0.0201  # from 1: what rounding to two digits leaves, as of seven times 0.14, and more than half precision does


class Asked(NamedTuple):
    """A question: its name, what its answer may say, and its type, by which it is calibrated where its name has no calibration."""

    name: str
    options: tuple[str, ...]
    kind: str = CHOICE


def read_questions(questions: Any) -> list[Asked]:
    """Raises ValueError where `questions` is not a mapping of names to `Choice`s of at least two options each."""
    if not isinstance(questions, Mapping):
        raise ValueError(f"`questions` is {shown(questions)}; expected a mapping of names to `Choice`s")
    if not questions:
        raise ValueError("`questions` is empty; expected at least one, such as {'refund': Choice(['yes', 'no'])}")
    found = []
    for name, choice in questions.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"`questions` has the name {shown(name)}; expected strings that are not empty")
        if not isinstance(choice, Choice):
            raise ValueError(f"`questions` has {shown(choice)} for {name!r}; expected a `Choice`")
        text(name)  # refuses a surrogate
        found.append(checked(Asked(name, choice.options)))
    return found


def checked(asked: Asked) -> Asked:
    """Raises ValueError for fewer than two options, of which one would be certain whatever the model says, and for options that are equal,
    empty or no strings."""
    if len(Choice(asked.options).options) < 2:
        raise ValueError(f"the question {asked.name!r} has {len(asked.options)} option; expected at least 2: one alone is certain")
    return asked


def are_probabilities(values: torch.Tensor) -> bool:
    """Whether `values` are probabilities of options: none below 0, and together 1, but for what rounding leaves."""
    return bool((values >= 0).all()) and abs(float(values.sum()) - 1) < TOGETHER


@dataclass(frozen=True)
class Decision:
    """What is said of one question.

    Args:
        probabilities: of each option, in their order; together 1.
        errors: standard error of each probability over the reads; None where there was one read.
        mass: how probable the model holds it that one of the options is written there at all, mean of the reads: calibrated probabilities
            say which of them, this whether the question made sense to it.
        scores: float64 (reads, options), nats: log-probability of each option as a whole string, as read, before any calibration.
    """

    probabilities: Mapping[str, float]
    errors: Mapping[str, float] | None
    mass: float
    scores: torch.Tensor = field(repr=False, compare=False)

    @property
    def best(self) -> str:
        """The most probable option; of equal ones the first."""
        return max(self.probabilities, key=self.probabilities.get)


def make_decision(options: tuple[str, ...], scores: torch.Tensor, calibrated: torch.Tensor) -> Decision:
    """Of `calibrated` log-probabilities float64 (reads, options), each row's together 1."""
    each, reads = calibrated.exp(), len(calibrated)
    means = dict(zip(options, each.mean(dim=0).tolist(), strict=True))
    spread = each.std(dim=0, unbiased=True) / math.sqrt(reads) if reads > 1 else None
    errors = None if spread is None else dict(zip(options, spread.tolist(), strict=True))
    return Decision(means, errors, float(scores.logsumexp(dim=1).exp().mean()), scores)


@dataclass(frozen=True)
class Decisions(Mapping):
    """The answers to some questions: a mapping of their names to `Decision`s, in the order in which they were asked.

    Args:
        answers: by name.
        reads: how many canvases of other noise were read.
        canvases: on how many canvases the questions stood.
        passes: canvas passes of a row: reads times canvases times steps.
    """

    answers: Mapping[str, Decision]
    reads: int
    canvases: int
    passes: int

    def __getitem__(self, name: str) -> Decision:
        return self.answers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.answers)

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def best(self) -> dict[str, str]:
        """The most probable option of each question."""
        return {name: answer.best for name, answer in self.answers.items()}

    def __str__(self) -> str:
        """A table in Markdown, a row an option."""
        lines = ["| question | option | probability | standard error |", "|---|---|---|---|"]
        for name, answer in self.answers.items():
            for option, probability in answer.probabilities.items():
                error = "" if answer.errors is None else f"{answer.errors[option]:.3f}"
                lines.append(f"| {name} | {option} | {probability:.3f} | {error} |")
        return "\n".join(lines)

    def _repr_markdown_(self) -> str:  # what a notebook shows
        return str(self)


__all__ = ["CHOICE", "Asked", "Decision", "Decisions", "are_probabilities", "checked", "make_decision", "read_questions"]
