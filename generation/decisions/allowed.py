"""All canvases that a layout allows, as an automaton over the whole vocabulary: the constraint of the steps before the one that is read."""

import torch

from ..asking import Ends
from ..constraints.automaton import Automaton, make_automaton
from .layout import Field, Layout
from .spelling import Edge, Spelling


def canvas_automaton(layout: Layout, spelling: Spelling, ends: Ends, vocab_size: int) -> Automaton:
    """What may stand up to the end of the turn: what is pinned in its place, and in each field one of its options, in just as many tokens
    as it has positions; a field with the end in it holds one in any number of them."""
    fields, ids = {field.begin: field for field in layout.fields}, layout.ids.tolist()
    edges: list[Edge] = []
    place, state, states, accepting = 0, 0, 1, []
    while (field := fields.get(place)) or ids[place] != ends.turn:
        if field is None:
            edges.append((state, states, ids[place]))
            place, state, states = place + 1, states, states + 1
            continue
        found, last, states = _field_edges(field, spelling, state, states)
        edges += found
        if field.ends:
            accepting = last
            break
        place, (state,) = place + field.width, last
    source, target, token = torch.tensor(edges, dtype=torch.int64, device="cpu").unbind(dim=1)
    used, kind = token.unique(return_inverse=True)
    classes = torch.zeros(vocab_size, dtype=torch.int64, device="cpu")
    classes[used] = torch.arange(1, len(used) + 1, dtype=torch.int64, device="cpu")
    whole = torch.zeros(states, dtype=torch.bool, device="cpu")
    whole[accepting or [state]] = True
    return make_automaton(classes, source, kind + 1, target, whole)


def _field_edges(field: Field, spelling: Spelling, start: int, states: int) -> tuple[list[Edge], list[int], int]:
    """Edges of a field from the state `start` on, the states behind its options, and how many states there are then. A state is what has
    been written and, where that counts, in how many tokens: options that begin alike share states, and an id leads to one of them alone."""
    names: dict[tuple[int, bytes], int] = {(0, b""): start}
    after = states  # behind every option of a field without the end
    states += not field.ends
    edges = set()
    for step in range(1 if field.ends else field.width):
        for text in field.texts:
            for begin, stop, token in spelling.edges(text):
                source, target = (step, text[:begin]), (0 if field.ends else step + 1, text[:stop])
                if not field.ends and target[0] == field.width:
                    if stop < len(text):
                        continue
                    names[target] = after
                for each in (source, target):
                    if each not in names:
                        names[each] = states
                        states += 1
                edges.add((names[source], names[target], token))
    last = [names[0, text] for text in field.texts] if field.ends else [after]
    return sorted(edges), last, states


__all__ = ["canvas_automaton"]
