"""The two scans of a lattice over the positions of a canvas: messages between them, and paths through them. The reference of
`lattice_kernel`; knows nothing of rows' automata beyond flat lists of states and edges.

Legend: B rows, n positions, K classes, S states and E edges of all rows.
"""

from typing import NamedTuple

import torch

NOTHING = -1e300  # stands for the highest log of an empty sum: finite, so that -inf less it is -inf, not NaN
TINY = torch.finfo(torch.float64).tiny


class Scan(NamedTuple):
    """One step of three messages at once, side by side: the sum of what lies behind a position, the sum of what lies before one, and the
    best of what lies behind. What lies before is the same step with every edge turned round, from the other end of the canvas.

    `source` int64 (3E,), the message an edge continues, in 3 S; `kind` int64 (3E,), its weight's place in 3 B K; `target` int64 (2E,), the
    message it goes into, in rising order; `counts` int64 (3S,), how many edges go into each, and `begin` int64 (3S + 1,), the first of
    them. `first` int64 (B + 1,): where each row's states begin in S.
    """

    source: torch.Tensor
    kind: torch.Tensor
    target: torch.Tensor
    counts: torch.Tensor
    begin: torch.Tensor
    first: torch.Tensor


class Paths(NamedTuple):
    """`ranges` int64 (S, 2): a state's edges are those from the first to before the second; `target` int64 (E,): where they lead. `lanes`
    int64 (most,): counts up to the most edges of a state."""

    ranges: torch.Tensor
    target: torch.Tensor
    lanes: torch.Tensor


def make_scans(source: torch.Tensor, kind: torch.Tensor, target: torch.Tensor, sizes: list[int], kinds: int) -> tuple[Scan, Paths]:
    """Of edges in rising order of source, int64 (E,) each on the CPU: flat states, and flat classes, B * K of which there are `kinds`;
    `sizes`: how many states each row has."""
    first = torch.tensor([0, *sizes], dtype=torch.int64, device="cpu").cumsum(dim=0)
    states, by_target = sum(sizes), torch.argsort(target, stable=True)
    out, into = torch.bincount(source, minlength=states), torch.bincount(target, minlength=states)
    counts = torch.cat((out, into, out))
    scan = Scan(
        source=torch.cat((target, source[by_target] + states, target + 2 * states)),
        kind=torch.cat((kind, kind[by_target] + kinds, kind + 2 * kinds)),
        target=torch.cat((source, target[by_target] + states)),
        counts=counts, begin=torch.cat((counts.new_zeros(1), counts.cumsum(dim=0))), first=first,
    )  # fmt: skip
    leaving = scan.begin[: states + 1]
    lanes = torch.arange(int(out.max()), dtype=torch.int64, device="cpu")
    return scan, Paths(torch.stack((leaving[:-1], leaving[1:]), dim=1), target, lanes)


def messages(
    scan: Scan, sums: torch.Tensor, tops: torch.Tensor, start: torch.Tensor, may_end: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What lies behind the first i positions, what before, and the best that lies behind: logs, each float64 (S, n + 1).

    Args: `sums`, `tops` float64 (B * K, n), logs of the classes' mass and of their best id; `start` int64 (B,), the first states;
    `may_end` bool (S,).
    """
    weights, history = begin_messages(sums, tops, start, may_end)
    edges, both = len(scan.target), 2 * len(may_end)
    for step, weight in enumerate(weights):
        along = history[step].index_select(0, scan.source).add_(weight.index_select(0, scan.kind))
        history[step + 1] = tops = torch.segment_reduce(along, "max", lengths=scan.counts, axis=0, unsafe=True)
        highest = tops[:both].clamp_(min=NOTHING)
        along = along[:edges].sub_(highest.index_select(0, scan.target)).exp_()
        total = torch.segment_reduce(along, "sum", lengths=scan.counts[:both], axis=0, unsafe=True)
        torch.add(total.log_(), highest, out=history[step + 1, :both])
    return end_messages(history)


def begin_messages(sums: torch.Tensor, tops: torch.Tensor, start: torch.Tensor, may_end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of every step, float64 (n, 3 B K), and the messages (n + 1, 3S), of which the first are there."""
    weights = torch.cat((sums.flip(1), sums, tops.flip(1))).t().contiguous()
    history = sums.new_empty((len(weights) + 1, 3 * len(may_end)))
    behind, before, best = history[0].chunk(3)
    behind.zero_().masked_fill_(~may_end, -float("inf"))
    before.fill_(-float("inf")).index_fill_(0, start, 0.0)
    best.copy_(behind)
    return weights, history


def end_messages(history: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The messages (n + 1, 3S) as positions are counted, each (S, n + 1)."""
    behind, before, best = history.t().chunk(3)
    return behind.flip(1), before.contiguous(), best.flip(1)


def follow(
    paths: Paths, state: torch.Tensor, best: torch.Tensor, along: torch.Tensor, share: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Follows the best path of every row, and with `share` a second one that is drawn.

    Args:
        state (`int64 (B,)` or `(2B,)`): where they stand, the best ones first.
        best, along (`float64 (E, m)`): logs of the best, and of the sum, of all that comes once an edge is taken.
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
            found = found[rows:]
            mass = found.sub_(found.amax(dim=-1, keepdim=True).clamp_(min=NOTHING)).exp_().cumsum(dim=-1)
            total = mass[:, -1:]  # an edge of no mass is never hit by what is above 0
            wanted = torch.minimum((share[:, place, None] * total).clamp_(min=TINY), total)
            pick = torch.cat((pick, torch.searchsorted(mass, wanted)))
        edge = pick.add_(begin).clamp_(max=last).squeeze(1)
        taken.append(edge)
        state = paths.target.index_select(0, edge)
    return torch.stack(taken, dim=1), state


__all__ = ["NOTHING", "TINY", "Paths", "Scan", "begin_messages", "end_messages", "follow", "make_scans", "messages"]
