"""How free a position of a canvas is: how many ids could stand there, all others being as they are.

Of a canvas that is `{"name": "Ida"}` and fits a schema with one string, every id that a string may hold could stand in the place of `Ida`,
and none but `":` behind the name. Asked of all canvases instead, the same place can be almost anything, once what stands before has no
fixed length: what is free then, and what is not, is seen of one canvas alone. Of two choices of several tokens each a canvas holds one, and
each of its tokens is pinned by the others.

Forward along the canvas's states, backward over the states from which the rest of it is accepted. On the host, for who looks on: nothing of
it is part of a step.
"""

from collections.abc import Sequence

import numpy as np

from .automaton import Automaton


def possible_ids(automaton: Automaton, tokens: Sequence[int], state: int = 0, left: int = 0) -> list[int]:
    """For each of `tokens`, which begin in `state`, how many ids could stand in its place; none, where another one is wrong. `left`:
    tokens that may follow behind the last, for acceptance."""
    classes, source, kind, target, fewest = (
        value.cpu().numpy() for value in (automaton.classes, automaton.source, automaton.kind, automaton.target, automaton.fewest)
    )
    sizes, kinds = np.bincount(classes), classes[list(tokens)].tolist()
    first = np.searchsorted(source, np.arange(len(fewest) + 1))  # edges are in the order of their sources
    by_kind = np.argsort(kind, kind="stable")
    begin = np.searchsorted(kind[by_kind], np.arange(len(sizes) + 1))
    edges, here = [], slice(first[state], first[state + 1])  # those that leave each state of the canvas
    for taken in kinds:
        edges.append(here)
        after = target[here][kind[here] == taken]
        here = slice(first[after[0]], first[after[0] + 1]) if len(after) else slice(0)
    accepted, found = fewest <= left, []
    for here, taken in zip(reversed(edges), reversed(kinds), strict=True):
        found.append(int(sizes[kind[here]][accepted[target[here]]].sum()))
        same = by_kind[begin[taken] : begin[taken + 1]]
        before = np.zeros_like(accepted)
        before[source[same]] = accepted[target[same]]
        accepted = before
    return found[::-1]


__all__ = ["possible_ids"]
