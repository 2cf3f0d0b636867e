"""How probable each option is, from what the model says of the positions where it may stand.

Given the canvas, a canvas pass says of every position independently which token is there, so the log-probability of an option is that of
its whole string: the sum over all ways to write it in the tokens of its field, by the exact program of `constraints.lattice`.

An example, a field of two positions and the option "ab", of tokens "a", "b" and "ab": only a, b writes it in two, and its log-probability
is log p1(a) + log p2(b). With the end open behind it, three positions, a, b, end and ab, end, pad both write it.

Only the ids that some option may write are asked for, beside the sum over all: no tensor of positions and vocabulary exists.

Legend: R canvases that are read, n positions of a field, m named ids, O options.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..asking import Ends
from ..constraints.automaton import Automaton
from ..constraints.lattice import make_lattice
from ..rules.draws import BatchDraws
from ..rules.prediction import Wanted, check_finite
from ..vocabulary.walk import streamed_prediction
from .layout import Layout
from .spelling import Spelling, text_automaton


class Named(NamedTuple):
    """What is asked of the positions of a canvas: `ids` int64 (m,), and of each of its fields the options' automata over them."""

    ids: torch.Tensor
    automata: tuple[tuple[Automaton, ...], ...]


def name_ids(layout: Layout, spelling: Spelling, ends: Ends) -> Named:
    """The ids that the options of a canvas may write, and how."""
    made = [[field.edges(text, spelling, ends) for text in field.texts] for field in layout.fields]
    ids = sorted({token for options in made for edges, _, _ in options for _, _, token in edges})
    places = {token: place for place, token in enumerate(ids)}
    automata = tuple(tuple(text_automaton(edges, states, last, places) for edges, states, last in options) for options in made)
    return Named(torch.tensor(ids, dtype=torch.int64, device="cpu"), automata)


def named_log_probs(model, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of some ids among all: float64 (R, n, m), nats, on the CPU; at temperature 1 and without any filter.

    Args:
        hidden (`(R, n, D)`): what the canvas pass gave for the positions.
        ids (`int64 (m,)`): on their device.

    Raises:
        ValueError: logits that are NaN, or -inf for every id.
    """
    if not hasattr(model, "vocabulary_head") or model.why_dense(hidden.device) is not None:
        logits = model.compute_logits(hidden)
        log_mass = logits.double().logsumexp(dim=-1, keepdim=True)
        check_finite(~log_mass.isfinite().flatten(1).all(dim=-1))
        return (logits[..., ids].double() - log_mass).cpu()
    current = ids[0].expand(hidden.shape[:2])
    with model.vocabulary_head() as head:
        prediction = streamed_prediction(hidden, head, 1.0, BatchDraws(), True, current, wanted=Wanted(named=ids))
    check_finite(prediction.bad)
    logits = prediction.named_logits.double()
    log_mass = logits[..., 0] - prediction.current_log_probs.double()  # of one id both are known
    return (logits - log_mass[..., None]).cpu()


def option_scores(log_probs: torch.Tensor, automata: Sequence[Automaton]) -> torch.Tensor:
    """Log-probabilities of the options of a field as whole strings: float64 (R, O), nats.

    Args:
        log_probs (`float64 (R, n, m)`): of the named ids at the field's positions.
        automata: of each option, over these ids.
    """
    reads, length, _ = log_probs.shape
    lattice = make_lattice([automaton for _ in range(reads) for automaton in automata], log_probs.device)
    mass = log_probs.new_full((reads, len(automata), length, lattice.kinds), -float("inf"))
    for place, automaton in enumerate(automata):
        used = automaton.classes > 0
        mass[:, place, :, automaton.classes[used]] = log_probs[..., used]
    mass = mass.flatten(0, 1)
    state = torch.zeros(len(mass), dtype=torch.int64, device=log_probs.device)
    return lattice.solve(mass, mass, state, 0).log_partition.view(reads, len(automata))


__all__ = ["Named", "name_ids", "named_log_probs", "option_scores"]
