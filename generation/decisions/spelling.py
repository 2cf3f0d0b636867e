"""All ways in which tokens write one text, as an automaton of as many states as the text has bytes.

A language of one text needs no more than this, so an option is not compiled (`constraints.compiled`) over the whole vocabulary: a state is
a place in its bytes, an edge an id that writes what lies between two of them. tests/test_decisions_scores.py holds both alike.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ..constraints.automaton import Automaton, make_automaton
from ..constraints.compiled import kept_for

Edge = tuple[int, int, int]  # from a state, to a state, by an id


@dataclass(frozen=True, eq=False)
class Spelling:
    """`writes`: the bytes of every id below the size of the vocabulary, None where it writes no text; `ids`: by bytes, those that write
    them; `longest`: bytes of an id."""

    writes: list[bytes | None]
    ids: Mapping[bytes, list[int]]
    longest: int

    def read(self, ids: Sequence[int]) -> bytes | None:
        """What ids write; None where one of them writes no text."""
        found = [self.writes[token] if 0 <= token < len(self.writes) else None for token in ids]
        return None if None in found else b"".join(found)

    def edges(self, text: bytes) -> list[Edge]:
        """From place to place of a text by every id that writes what is between them."""
        return [
            (begin, stop, token)
            for begin in range(len(text))
            for stop in range(begin + 1, min(begin + self.longest, len(text)) + 1)
            for token in self.ids.get(text[begin:stop], ())
        ]


def spelling_of(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Spelling:
    """The spelling of a tokenizer for a model of `vocab_size` ids; kept as long as the tokenizer lives.

    Raises:
        ValueError: `tokenizer` decodes in a way that is not known (`constraints.tokens.token_bytes`).
    """
    return kept_for(tokenizer, vocab_size, _make_spelling)


def _make_spelling(writes: list[bytes | None], vocab_size: int) -> Spelling:
    ids: dict[bytes, list[int]] = {}
    for token, text in enumerate(writes[:vocab_size]):
        if text:
            ids.setdefault(text, []).append(token)
    return Spelling(writes[:vocab_size], ids, max(map(len, ids), default=0))


def text_automaton(edges: Iterable[Edge], states: int, accepting: int, named: Mapping[int, int]) -> Automaton:
    """The automaton of these edges, which sees `named` ids alone: an id's place there is its place in `Automaton.classes`, and no two of
    them share a class.

    Args:
        edges: as of `Spelling.edges`, state 0 being the start.
        accepting: the one state that accepts.

    Raises:
        ValueError: nothing is accepted.
    """
    source, target, token = torch.tensor(list(edges), dtype=torch.int64, device="cpu").reshape(-1, 3).unbind(dim=1)
    kind = torch.tensor([named[each] + 1 for each in token.tolist()], dtype=torch.int64, device="cpu")
    whole = torch.zeros(states, dtype=torch.bool, device="cpu")
    whole[accepting] = True
    classes = torch.arange(1, len(named) + 1, dtype=torch.int64, device="cpu")
    return make_automaton(classes, source, kind, target, whole)


__all__ = ["Edge", "Spelling", "spelling_of", "text_automaton"]
