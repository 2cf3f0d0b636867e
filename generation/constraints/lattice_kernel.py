"""The scans of a lattice as Triton kernels: one launch each instead of some thousand, where `LATTICE_KERNEL` proves them.

A program of the messages advances one row and one of the three messages over all positions; a program of the paths follows one. What a
program wrote at one position it reads at the next, behind a barrier. Nothing waits for the device.
"""

from collections.abc import Callable

import torch

from ..fast.proofs import FastPath, numbers, works
from .scans import NOTHING, TINY, Paths, Scan, begin_messages, end_messages, follow, make_scans, messages

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

STATES, EDGES = 64, 16  # of a tile: states, and edges of each, that are looked up at once


if triton is not None:

    @triton.jit(do_not_specialize=["length", "states", "width", "columns"])
    def _messages_kernel(
        history, weights, source, weight, begin, first, length, states, width, columns,
        nothing: tl.constexpr, some_states: tl.constexpr, some_edges: tl.constexpr,
    ):  # fmt: skip
        way = tl.program_id(1)  # 0: the best behind, 1: the sum behind, 2: the sum before
        low, high = tl.load(first + tl.program_id(0)) + way * states, tl.load(first + tl.program_id(0) + 1) + way * states
        lanes = tl.arange(0, some_edges)[None, :]
        for _ in range(length):
            for base in range(low, high, some_states):
                state = base + tl.arange(0, some_states)
                valid = state < high
                edge = tl.load(begin + state, mask=valid, other=0)
                end = tl.load(begin + state + 1, mask=valid, other=0)
                most = tl.max(end - edge, axis=0)
                top = tl.full((some_states,), nothing, tl.float64)
                for lane in range(0, most, some_edges):
                    at = edge[:, None] + lane + lanes
                    here = at < end[:, None]
                    along = tl.load(history + tl.load(source + at, mask=here, other=0), mask=here, other=-float("inf"))
                    along += tl.load(weights + tl.load(weight + at, mask=here, other=0), mask=here, other=-float("inf"))
                    top = tl.maximum(top, tl.max(along, axis=1))
                if way == 0:
                    message = tl.where(top > nothing, top, -float("inf"))
                else:
                    total = tl.zeros((some_states,), tl.float64)
                    for lane in range(0, most, some_edges):
                        at = edge[:, None] + lane + lanes
                        here = at < end[:, None]
                        along = tl.load(history + tl.load(source + at, mask=here, other=0), mask=here, other=-float("inf"))
                        along += tl.load(weights + tl.load(weight + at, mask=here, other=0), mask=here, other=-float("inf"))
                        total += tl.sum(tl.exp(along - top[:, None]), axis=1)
                    message = tl.where(total == 0, -float("inf"), tl.log(tl.where(total == 0, 1.0, total)) + top)
                tl.store(history + width + state, message, mask=valid)
            tl.debug_barrier()  # what was stored is what the next position loads
            history += width
            weights += columns

    @triton.jit(do_not_specialize=["length", "rows", "last"])
    def _follow_kernel(
        states, ranges, target, best, along, share, taken, ends, length, rows, last,
        nothing: tl.constexpr, tiny: tl.constexpr, most: tl.constexpr,
    ):  # fmt: skip
        path = tl.program_id(0)
        drawn = path >= rows
        lanes = tl.arange(0, most)
        state = tl.load(states + path)
        for place in range(length):
            begin, end = tl.load(ranges + 2 * state), tl.load(ranges + 2 * state + 1)
            edges = begin + lanes
            here = edges < end
            offsets = edges * length + place
            if drawn:
                found = tl.load(along + offsets, mask=here, other=-float("inf"))
            else:
                found = tl.load(best + offsets, mask=here, other=-float("inf"))
            found = tl.where(found == found, found, -float("inf"))  # NaN has no place in an order; such a row is lost
            pick = tl.argmax(found, axis=0).to(tl.int64)
            if drawn:
                mass = tl.cumsum(tl.exp(found - tl.maximum(tl.max(found, axis=0), nothing)), axis=0)
                total = tl.max(mass, axis=0)
                wanted = tl.minimum(tl.maximum(tl.load(share + (path - rows) * length + place) * total, tiny), total)
                pick = tl.sum((mass < wanted).to(tl.int64), axis=0)
            edge = tl.minimum(begin + pick, last)
            tl.store(taken + path * length + place, edge)
            state = tl.load(target + edge)
        tl.store(ends + path, state)


def messages_triton(
    scan: Scan, sums: torch.Tensor, tops: torch.Tensor, start: torch.Tensor, may_end: torch.Tensor, before: bool = True
) -> list[torch.Tensor]:
    """`scans.messages` in one launch of a kernel."""
    weights, history = begin_messages(sums, tops, start, may_end, before)
    with torch.cuda.device_of(sums):  # Triton launches on the current device, whatever its arguments lie on
        _messages_kernel[(len(scan.first) - 1, 2 + before)](
            history, weights, scan.source, scan.weight, scan.begin, scan.first, *weights.shape[:1], len(may_end), history.shape[1],
            weights.shape[1], nothing=NOTHING, some_states=STATES, some_edges=EDGES,
        )  # fmt: skip
    return end_messages(history, len(may_end))


def follow_triton(
    paths: Paths, state: torch.Tensor, best: torch.Tensor, along: torch.Tensor | None, share: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scans.follow` in one launch of a kernel."""
    best, along = best.contiguous(), best if share is None else along.contiguous()
    taken, ends = state.new_empty((len(state), best.shape[1])), torch.empty_like(state)
    with torch.cuda.device_of(best):
        _follow_kernel[(len(state),)](
            state, paths.ranges, paths.target, best, along, best if share is None else share.contiguous(), taken, ends, best.shape[1],
            len(state) if share is None else len(share), len(best) - 1,
            nothing=NOTHING, tiny=TINY, most=triton.next_power_of_2(len(paths.lanes)),
        )  # fmt: skip
    return taken, ends


def _no_kernel(device: torch.device, *case) -> str | None:
    if triton is None:
        return "the package `triton` is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and triton.knobs.runtime.interpret):
        return f"it is for CUDA, and the device is {device.type!r}"
    return None


def _prove_kernel(device: torch.device):
    """Two rows of one language, a hub of 19 edges among 3 states, three positions; the second row may end nowhere.

    Of logs of some hundred nats CUDA's exp and log, which are right to a last bit in float64, and a sum of 21 in another order leave 1e-15
    at a position; 1e-12 is far above that, and far below what an edge that is lost or counted twice makes of them.
    """
    kinds, states = 20, 3
    edges = [[0] * 19 + [1, 2], [*range(1, 20), 1, 2], [*(place % 3 for place in range(19)), 0, 1]]
    source, kind, target = torch.tensor(edges, dtype=torch.int64, device="cpu")
    flat = (torch.cat((one, one + more)) for one, more in ((source, states), (kind, kinds), (target, states)))
    scan, paths = make_scans(*flat, [states, states], 2 * kinds)
    scan, paths = Scan(*(value.to(device) for value in scan)), Paths(*(value.to(device) for value in paths))
    sums, tops = (numbers(2 * kinds, 3, seed=seed).double().mul_(300).to(device) for seed in range(2))
    start = torch.tensor([0, 4], dtype=torch.int64, device="cpu").to(device)
    may_end = torch.tensor([True, True, False, False, False, False], dtype=torch.bool, device="cpu").to(device)
    best, along = (numbers(42, 3, seed=seed).double().mul_(9).to(device) for seed in range(2, 4))
    share = 1 - numbers(2, 3, uniform=True).double().to(device)

    def both(message: Callable, path: Callable):
        followed = path(paths, start.repeat(2), best, along, share), path(paths, start, best, None, None)
        return [message(scan, sums, tops, start, may_end, before) for before in (True, False)], followed

    return both(messages_triton, follow_triton), both(messages, follow)


LATTICE_KERNEL = FastPath(
    "lattice kernel", "the scans of a constraint run in plain PyTorch, which is slower", _no_kernel, _prove_kernel, 1e-12
)


def choose_scans(device: torch.device) -> tuple[Callable, Callable]:
    """`messages` and `follow`: the kernels where they are worth it and proven."""
    if device.type == "cuda" and works(LATTICE_KERNEL, device):
        return messages_triton, follow_triton
    return messages, follow


__all__ = ["LATTICE_KERNEL", "choose_scans", "follow_triton", "messages_triton"]
