"""What a job is, and which of its content is held out.

A job is a small task with one right answer: a prompt in a few written forms, a canonical response, and a checker that reads the prompt
itself. The split is by content, never by prompt: `is_held_out` hashes the thing a prompt is about (a number, a date, a set of numbers, a
value with its units), so another phrasing of held-out content is held out too. A tenth of all content goes to the "test" split.
blake2b rather than crc32: a CRC is linear in the bits of its input, so one residue of it would cut a structured slice out of the numbers.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar

SPLITS = ("train", "test")
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One task: how to draw an example, how to judge an answer, and what an example is about.

    Attributes:
        name: key of the job in `TEXT_JOBS`.
        draw: `(rng, held_out) -> (prompt, response)`; called through `sample`.
        check: `(prompt, answer) -> bool`. Parses the prompt and decides whether the answer is right; knows nothing about the stored
            response. Strict about spacing. ValueError where the prompt holds nothing to judge by.
        content: `(prompt, response) -> frozenset of str`, the contents the split is made of. In a "test" example every one is held out,
            in a "train" example none is; so the two splits share no content.
        many_answers: whether another example's response may be right as well.
    """

    name: str
    draw: Callable[[random.Random, bool], tuple[str, str]]
    check: Callable[[str, str], bool]
    content: Callable[[str, str], frozenset[str]]
    many_answers: bool = False

    def sample(self, rng: random.Random, split: str) -> tuple[str, str]:
        """Draws one prompt with its canonical response; the only randomness is `rng`.

        Raises:
            ValueError: `split` is neither "train" nor "test".
        """
        if split not in SPLITS:
            raise ValueError(f"`split` is {split!r}, expected one of {SPLITS}")
        return self.draw(rng, split == "test")


def is_held_out(content: str) -> bool:
    """Whether `content` belongs to the test split: blake2b(content) mod 10 == 0, the same on every machine and in every run."""
    return int.from_bytes(blake2b(content.encode(), digest_size=8).digest(), "big") % 10 == 0


def partition(values: Iterable[T], content: Callable[[T], str]) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """Splits a finite list into (train, test); index it with `held_out`."""
    parts: tuple[list[T], list[T]] = ([], [])
    for value in values:
        parts[is_held_out(content(value))].append(value)
    return tuple(parts[0]), tuple(parts[1])


def draw_until(draw: Callable[[], T], content: Callable[[T], str], held_out: bool) -> T:
    """Draws until the content lies on the wanted side: about 1.1 draws for training, 10 for test."""
    while True:
        value = draw()
        if is_held_out(content(value)) == held_out:
            return value


def unparsable(job: str, prompt: str) -> ValueError:
    """The error of a checker that was handed a prompt of another kind."""
    return ValueError(f"`prompt` is {prompt!r}, expected a prompt of the job {job!r}")


__all__ = ["SPLITS", "Job", "draw_until", "is_held_out", "partition", "unparsable"]
