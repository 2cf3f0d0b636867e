"""The two scans of a lattice over the positions of a canvas: messages between them, and paths through them. The reference of
`lattice_kernel`; knows nothing of rows' automata beyond flat lists of states and edges.

Legend: B rows, n positions, G bundles of the row that has most, S states and E edges of all rows.
"""

from typing import NamedTuple

import torch

NOTHING = -1e300  # stands for the highest log of an empty sum: finite, so that -inf less it is -inf, not NaN
TINY = torch.finfo(torch.float64).tiny


class Scan(NamedTuple):
    """One step of three messages at once, side by side: the best of what lies behind a position, the sum of what lies behind it, and the
    sum of what lies before it, which is the same step with every edge turned round, from the other end of the canvas. The first two
    alone are the first 2E edges and 2S counts.

    `source` int64 (3E,), the message an edge continues, in 3S; `weight` int64 (3E,), its weight's place in 3 B G; `into` int64 (2E,), of
    the sums' edges the message they go into, in 2S, rising; `counts` int64 (3S,), how many edges go into each, and `begin`
    int64 (3S + 1,), the first of them. `first` int64 (B + 1,): where each row's states begin in S.
    """

    source: torch.Tensor
    weight: torch.Tensor
    into: torch.Tensor
    counts: torch.Tensor
    begin: torch.Tensor
    first: torch.Tensor


class Paths(NamedTuple):
    """`ranges` int64 (S, 2): a state's edges are those from the first to before the second; `target` int64 (E,): where they lead. `lanes`
    int64 (most,): counts up to the most edges of a state."""

    ranges: torch.Tensor
    target: torch.Tensor
    lanes: torch.Tensor


def make_scans(source: torch.Tensor, bundle: torch.Tensor, target: torch.Tensor, sizes: list[int], bundles: int) -> tuple[Scan, Paths]:
    """Of edges in rising order of source, int64 (E,) each on the CPU: flat states, and flat bundles, of which there are `bundles`, B * G;
    `sizes`: how many states each row has."""
    first = torch.tensor([0, *sizes], dtype=torch.int64, device="cpu").cumsum(dim=0)
    states, by_target = sum(sizes), torch.argsort(target, stable=True)
    out, into = torch.bincount(source, minlength=states), torch.bincount(target, minlength=states)
    counts = torch.cat((out, out, into))
    scan = Scan(
        source=torch.cat((target, target + states, source[by_target] + 2 * states)),
        weight=torch.cat((bundle, bundle + bundles, bundle[by_target] + 2 * bundles)),
        into=torch.cat((source, target[by_target] + states)),
        counts=counts, begin=torch.cat((counts.new_zeros(1), counts.cumsum(dim=0))), first=first,
    )  # fmt: skip
    leaving = scan.begin[: states + 1]
    lanes = torch.arange(int(out.max()), dtype=torch.int64, device="cpu")
    return scan, Paths(torch.stack((leaving[:-1], leaving[1:]), dim=1), target, lanes)


def messages(
    scan: Scan, sums: torch.Tensor, tops: torch.Tensor, start: torch.Tensor, may_end: torch.Tensor, before: bool = True
) -> list[torch.Tensor]:
    """The best that lies behind the first i positions, the sum that lies behind, and with `before` what lies before: logs, each
    float64 (S, n + 1).

    Args: `sums`, `tops` float64 (B * G, n), logs of the bundles' mass and of their best id; `start` int64 (B,), the first states;
    `may_end` bool (S,).
    """
    weights, history = begin_messages(sums, tops, start, may_end, before)
    ways, states = 2 + before, len(may_end)
    edges = len(scan.source) // 3
    source, weight, into = scan.source[: ways * edges], scan.weight[: ways * edges], scan.into[: (ways - 1) * edges]
    counts, counts_of_sums = scan.counts[: ways * states], scan.counts[states : ways * states]
    for step, here in enumerate(weights):
        along = history[step].index_select(0, source).add_(here.index_select(0, weight))
        history[step + 1] = tops = torch.segment_reduce(along, "max", lengths=counts, axis=0, unsafe=True)
        highest = tops[states:].clamp_(min=NOTHING)
        along = along[edges:].sub_(highest.index_select(0, into)).exp_()
        total = torch.segment_reduce(along, "sum", lengths=counts_of_sums, axis=0, unsafe=True)
        torch.add(total.log_(), highest, out=history[step + 1, states:])
    return end_messages(history, states)


def begin_messages(
    sums: torch.Tensor, tops: torch.Tensor, start: torch.Tensor, may_end: torch.Tensor, before: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of every step, float64 (n, 2 or 3 B G), and the messages (n + 1, 2 or 3 S), of which the first are there."""
    weights = torch.cat((tops.flip(1), sums.flip(1), *([sums] if before else []))).t().contiguous()
    history = sums.new_empty((len(weights) + 1, (2 + before) * len(may_end)))
    best, behind, *others = history[0].split(len(may_end))
    best.zero_().masked_fill_(~may_end, -float("inf"))
    behind.copy_(best)
    for one in others:
        one.fill_(-float("inf")).index_fill_(0, start, 0.0)
    return weights, history


def end_messages(history: torch.Tensor, states: int) -> list[torch.Tensor]:
    """The messages (n + 1, 2 or 3 S) as positions are counted, each (S, n + 1)."""
    best, behind, *others = history.t().split(states)
    return [best.flip(1), behind.flip(1), *(one.contiguous() for one in others)]


def draw(found: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Which of m, whose logs are float64 (..., m) and are overwritten, by uniform numbers (..., 1) above 0, at most 1: int64 (..., 1)."""
    mass = found.sub_(found.amax(dim=-1, keepdim=True).clamp_(min=NOTHING)).exp_().cumsum(dim=-1)
    total = mass[..., -1:]  # what has no mass is never hit by what is above 0
    return torch.searchsorted(mass, torch.minimum((share * total).clamp_(min=TINY), total))


def follow(
    paths: Paths, state: torch.Tensor, best: torch.Tensor, along: torch.Tensor | None, share: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Follows the best path of every row, and with `share` a second one that is drawn.

    Args:
        state (`int64 (B,)` or `(2B,)`): where they stand, the best ones first.
        best (`float64 (E, m)`): logs of the best of all that comes once an edge is taken.
        along (`float64 (E, m)`, *optional*): of the sum of it; together with `share`.
        share (`float64 (B, m)`, *optional*): uniform numbers above 0, at most 1.

    Returns:
        The edges they take, int64 (B or 2B, m), and where they stand then.
    """
    last, rows, taken = len(best) - 1, len(state) if share is None else len(share), []
    columns = (best if share is None else torch.cat((best, along))).t().contiguous()
    shift = torch.zeros_like(state).index_fill_(0, torch.arange(rows, len(state), dtype=torch.int64, device=state.device), len(best))[
        :, None
    ]
    for place, column in enumerate(columns):
        begin, end = paths.ranges.index_select(0, state).split(1, dim=1)
        edges = begin + paths.lanes
        found = column.take(edges.clamp(max=last).add_(shift)).masked_fill_(edges >= end, -float("inf"))
        pick = found[:rows].argmax(dim=-1, keepdim=True)
        if share is not None:
            pick = torch.cat((pick, draw(found[rows:], share[:, place, None])))
        edge = pick.add_(begin).clamp_(max=last).squeeze(1)
        taken.append(edge)
        state = paths.target.index_select(0, edge)
    return torch.stack(taken, dim=1), state


__all__ = ["NOTHING", "TINY", "Paths", "Scan", "begin_messages", "draw", "end_messages", "follow", "make_scans", "messages"]
