"""Where questions stand on canvases: what is pinned, what is open, and what each option writes there.

An answer is the compact JSON object of the questions' names and options, `{"refund": "yes", "tone": "angry"}`, or the option alone, then
the end of the turn and padding. Options whose canvases differ in one span of the same length are a field of that width. A canvas takes the
questions in their order, up to and including the first whose options differ in length: open is then all from the first difference to the
end of the longest option, the end of the turn in it. So options of one question are always compared over the same positions, and none
is longer than another. The next question begins another canvas.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ..asking import Ends
from .questions import Asked
from .spelling import Edge, Spelling


class Field(NamedTuple):
    """Positions that say the answer to a question: `place`, which one it is of the request; `begin`, the first position; `width`; `texts`,
    what each option writes there; `ends`: whether the end of the turn and padding lie among them."""

    place: int
    begin: int
    width: int
    texts: tuple[bytes, ...]
    ends: bool

    def edges(self, text: bytes, spelling: Spelling, ends: Ends) -> tuple[list[Edge], int, int]:
        """Of the automaton of one option: edges, how many states there are, and which one accepts."""
        edges, last = spelling.edges(text), len(text)
        if not self.ends:
            return edges, last + 1, last
        return [*edges, *((last, last + 1, stop) for stop in ends.stops), (last + 1, last + 1, ends.pad)], last + 2, last + 1


class Layout(NamedTuple):
    """A canvas: `ids` int64 (C,), with the first option of each question; `open` bool (C,), where noise stands; `fields`."""

    ids: torch.Tensor
    open: torch.Tensor
    fields: tuple[Field, ...]


class NoPlace(Exception):
    """Questions do not stand on one canvas together."""


def answer_text(asked: Sequence[Asked], chosen: Sequence[str], as_json: bool) -> str:
    """What is written where these are the answers."""
    if not as_json:
        return chosen[0]
    return json.dumps({each.name: option for each, option in zip(asked, chosen, strict=True)}, ensure_ascii=False)


def lay_out(
    asked: Sequence[Asked], tokenizer: PreTrainedTokenizerBase, spelling: Spelling, length: int, ends: Ends, as_json: bool
) -> list[Layout]:
    """The canvases of `length` positions on which questions stand, each question on one of them; without `as_json` one canvas a question.

    Raises:
        ValueError: an option that the tokenizer cannot write, or that does not fit on a canvas.
    """
    layouts, group, done = [], [], None
    for place in range(len(asked)):
        if done is not None and as_json:
            try:
                done = _lay(asked, [*group, place], tokenizer, spelling, length, ends, as_json)
                group.append(place)
            except NoPlace:
                layouts.append(done)
                done = None
        elif done is not None:
            layouts.append(done)
            done = None
        if done is None:
            group = [place]
            try:
                done = _lay(asked, group, tokenizer, spelling, length, ends, as_json)
            except NoPlace as error:
                raise ValueError(f"the question {asked[place].name!r} does not fit: {error}") from error
        if done.fields[-1].ends:
            layouts.append(done)
            done = None
    return layouts if done is None else [*layouts, done]


def _lay(
    asked: Sequence[Asked], group: Sequence[int], tokenizer, spelling: Spelling, length: int, ends: Ends, as_json: bool
) -> Layout:  # fmt: skip
    """The canvas of the questions `group`. Raises NoPlace where they have none together."""
    here = [asked[place] for place in group]
    base, fields = None, []
    for index, (place, one) in enumerate(zip(group, here, strict=True)):
        chosen = [other.options[0] for other in here]
        texts = [answer_text(here, [*chosen[:index], option, *chosen[index + 1 :]], as_json) for option in one.options]
        written = tokenizer(texts, add_special_tokens=False)["input_ids"]
        for option, text, ids in zip(one.options, texts, written, strict=True):
            if spelling.read(ids) != text.encode():
                raise ValueError(
                    f"the question {one.name!r} has the option {option!r}, which `tokenizer` cannot write as text; expected another"
                )
        rows = [[*ids, ends.turn] for ids in written]
        if (longest := max(map(len, rows))) > length:
            raise NoPlace(f"its answer takes {longest} tokens, of a canvas of {length}; expected shorter options or a longer canvas")
        fields.append(_field(place, rows, spelling))
        base = base or rows[0]
    open_ = torch.zeros(length, dtype=torch.bool, device="cpu")
    for before, field in zip([None, *fields], fields, strict=False):
        if before is not None and (before.ends or before.begin + before.width > field.begin):
            raise NoPlace("questions whose options differ in length share a canvas")
        open_[field.begin : field.begin + field.width] = True
    ids = torch.full((length,), ends.pad, dtype=torch.int64, device="cpu")
    ids[: len(base)] = torch.tensor(base, dtype=torch.int64, device="cpu")
    return Layout(ids, open_, tuple(fields))


def _field(place: int, rows: list[list[int]], spelling: Spelling) -> Field:
    """Where the canvases of a question's options differ; `rows`: their ids, the end of the turn the last."""
    shortest, longest = min(map(len, rows)), max(map(len, rows))
    columns = [len(set(column)) > 1 for column in zip(*rows, strict=False)]
    begin = columns.index(True)  # the end of the turn stands in no text, so no row begins as another one does
    if shortest < longest:
        return Field(place, begin, longest - begin, tuple(spelling.read(row[begin:-1]) for row in rows), True)
    stop = longest - columns[::-1].index(True)
    return Field(place, begin, stop - begin, tuple(spelling.read(row[begin:stop]) for row in rows), False)


__all__ = ["Field", "Layout", "answer_text", "lay_out"]
