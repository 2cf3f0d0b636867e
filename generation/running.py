"""The running sums of one pass over the vocabulary, and what a piece of it adds to them: in PyTorch, and as a Triton kernel.

Running sums as in online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867). The sample is a reservoir over parts: a part's
candidate replaces the one before with the probability of its share of the mass so far, and only then is it drawn.

`absorb` is the reference of `absorb_triton`, which does the same in one launch, where `KERNEL` proves it: two sweeps over a piece's
logits, which the second finds in the L2 cache, instead of some twenty operations. Both products with the weights stay with the matrix
library: at 256 positions they are bound by its rate of multiplication, not by memory, and reading the weights twice is what the soft
embedding needs anyway, since its factors are known only when a piece's logits are.

Knows nothing of weights: it is handed a piece's logits. N: positions, W: ids of a piece.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from .proofs import FastPath, numbers, works

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MASKED = -1e30  # the logit of an id that cannot be: exp gives 0 beside any real logit, and 0 * MASKED is 0, where -inf gives NaN
TINY = torch.finfo(torch.float32).tiny  # of what is above 0 also where denormal numbers are flushed
TILE = 2048  # ids of a part in the kernel
WARPS = 8
OPTIONS = ("filtered", "greedy", "with current", "ragged")  # each has its own binary; ragged: a vocabulary that is no multiple of 16


class Running(NamedTuple):
    """What is known after some pieces, `(N,)` each.

    In bits, as `Shape.bits` gives them: `top`, the highest b; `mass` and `spread`, the sums of 2^(b - top) and of 2^(b - top) * (b - top),
    float32; `argmax` and `sample`, int64. Of the current tokens, if they are given: `current` int64, and its bits `own`; and of all ids
    but that one `other_top`, `other_mass` and the draw `other`.
    """

    top: torch.Tensor
    mass: torch.Tensor
    spread: torch.Tensor
    argmax: torch.Tensor
    sample: torch.Tensor
    current: torch.Tensor | None
    own: torch.Tensor | None
    other_top: torch.Tensor | None
    other_mass: torch.Tensor | None
    other: torch.Tensor | None


class Shape(NamedTuple):
    """How a head's products x become logits: `l = softcap * tanh(x / softcap) / temperature`; `squashed`: what the products are is
    sigmoid(2 * x / softcap).

    By `tanh(y) = 2 * sigmoid(2 * y) - 1`: on a CPU that takes a ninth of tanh's time, and is as exact as 1e-7 of the soft cap. Likewise
    powers of 2 take a quarter of exp's, so sums are kept in bits.
    """

    softcap: float
    temperature: float | torch.Tensor
    squashed: bool = False

    def bits(self, products: torch.Tensor, kept: torch.Tensor | None, out: torch.Tensor | None = None) -> torch.Tensor:
        """`(l + softcap / temperature) / log(2)`, float32 (N, W), from products (N, W) of any dtype; `MASKED` where `kept`, bool
        (N or 1, W), is False. In `out` float32 (N, W), if given; those that are squashed, which are float32, then in their own place."""
        if out is None:
            bits = products.to(torch.float32, copy=True)
        else:
            bits = products if self.squashed else out.copy_(products)
        if not self.squashed:
            bits.mul_(2 / self.softcap).sigmoid_()
        bits.mul_(2 / math.log(2) * self.softcap / self.temperature)
        return bits if kept is None else bits.masked_fill_(~kept, MASKED)

    def logits(self, products: torch.Tensor, kept: torch.Tensor | None, out: torch.Tensor | None = None) -> torch.Tensor:
        """`l` itself, with arguments and result as of `bits`."""
        logits = self.bits(products, None, out).mul_(math.log(2)).sub_(self.softcap / self.temperature)
        return logits if kept is None else logits.masked_fill_(~kept, MASKED)


class Room(NamedTuple):
    """Where pieces are computed, one after the other, each `(N, W)`: `products` in the weights' dtype; for `absorb` also `logits` and
    `exponentials`, float32; for its kernel `exponentials` in the weights' dtype, and no logits.

    On a CPU a new tensor of this size is fresh memory, which costs more to get than the arithmetic that fills it.
    """

    products: torch.Tensor
    logits: torch.Tensor | None
    exponentials: torch.Tensor

    def narrow(self, count: int, width: int) -> "Room":
        """The room of a smaller piece."""
        return Room(*(None if tensor is None else tensor[:count, :width] for tensor in self))


def make_room(count: int, width: int, dtype: torch.dtype, device: torch.device, for_kernel: bool = False) -> Room:
    """Room for `count` positions and `width` ids. In float32 the products become the logits in place."""

    def empty(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((count, width), dtype=dtype, device=device)

    products = empty(dtype)
    if for_kernel:
        return Room(products, None, empty(dtype))
    return Room(products, products if dtype == torch.float32 else empty(torch.float32), empty(torch.float32))


def start_running(count: int, device: torch.device, current: torch.Tensor | None) -> Running:
    """Before the first piece; `current` int64 (N,) or None."""

    def filled(value: float) -> torch.Tensor:
        return torch.full((count,), value, dtype=torch.float32, device=device)

    first = (filled(MASKED), filled(0.0), filled(0.0), filled(0).long(), filled(0).long())
    return Running(*first, *((None,) * 5 if current is None else (current, filled(MASKED), filled(MASKED), filled(0.0), current.clone())))


def absorb(
    running: Running, room: Room, start: int, shape: Shape, kept: torch.Tensor | None, chance: torch.Tensor | None
) -> tuple[Running, torch.Tensor, torch.Tensor]:
    """Adds a piece.

    Args:
        running: used up; go on with what is returned.
        room: its `products` are those of hidden states and weights, (N, W); used up.
        start: the first id of the piece.
        shape: makes them logits.
        kept: bool (N or 1, W), ids that can be; None: all.
        chance: uniform numbers in [0, 1), (N, parts, 2), or (N, parts, 4) with current tokens; None takes the most probable tokens. One
            part here; in `absorb_triton` one for every `TILE` ids.

    Returns:
        The sums; 2^(b - top), (N, W) in the dtype of the products, in the room; and the factor float32 (N,) that brings earlier sums to
        the new `top`.
    """
    logits = shape.bits(room.products, kept, out=room.logits)
    piece_top = logits.amax(dim=-1)
    argmax = _update(running.argmax, piece_top > running.top, lambda rows: logits[rows].argmax(dim=-1) + start)
    top = torch.maximum(running.top, piece_top)
    rise = running.top - top
    shrink = torch.exp2(rise)
    own, other_top, other_mass, other = running.own, running.other_top, running.other_mass, running.other
    if running.current is not None:
        place = (running.current - start).clamp(0, logits.shape[1] - 1)[:, None]
        inside = (running.current - start)[:, None] == place
        here = logits.gather(1, place)
        own = torch.where(inside, here, own[:, None]).squeeze(1)
        if chance is None:
            best = logits.scatter_(1, place, torch.where(inside, MASKED, here)).amax(dim=-1)
            other = _update(other, best > other_top, lambda rows: logits[rows].argmax(dim=-1) + start)
            other_top = torch.maximum(other_top, best)
            logits.scatter_(1, place, here)
    logits.sub_(top[:, None])
    exponentials = torch.exp2(logits, out=room.exponentials)
    piece_mass = exponentials.sum(dim=-1)
    mass = running.mass * shrink + piece_mass
    spread = (running.spread + rise * running.mass) * shrink + logits.mul_(exponentials).sum(dim=-1)
    sample = argmax if chance is None else _draw(exponentials, mass, piece_mass, chance[:, 0, :2], start, running.sample)
    if running.current is not None and chance is not None:
        here = exponentials.gather(1, place)
        exponentials.scatter_(1, place, torch.where(inside, 0.0, here))
        piece_mass = exponentials.sum(dim=-1)
        other_mass = other_mass * shrink + piece_mass
        other = _draw(exponentials, other_mass, piece_mass, chance[:, 0, 2:], start, other)
        other = torch.where(other_mass > 0, other, running.current)  # a piece that was all masked may have left one of its ids
        exponentials.scatter_(1, place, here)
    running = Running(top, mass, spread, argmax, sample, running.current, own, other_top, other_mass, other)
    same = exponentials.dtype == room.products.dtype
    return running, exponentials if same else room.products.copy_(exponentials), shrink


def counts_rows(device: torch.device) -> bool:
    """Whether few rows are looked up and computed alone; elsewhere all are, since to count some is to wait for the device."""
    return device.type == "cpu"


def _update(values: torch.Tensor, chosen: torch.Tensor, compute: Callable[[torch.Tensor | slice], torch.Tensor]) -> torch.Tensor:
    """`values` (N,), and `compute(rows)` where `chosen`."""
    if not counts_rows(values.device):
        return torch.where(chosen, compute(slice(None)), values)
    rows = chosen.nonzero().flatten()
    if len(rows) == len(values):  # as at the first piece
        return compute(slice(None))
    return values.index_copy(0, rows, compute(rows)) if len(rows) else values


def _draw(
    exponentials: torch.Tensor, mass: torch.Tensor, piece_mass: torch.Tensor, chance: torch.Tensor, start: int, sample: torch.Tensor
) -> torch.Tensor:
    """The sample (N,) after a piece: drawn from it with the probability `piece_mass / mass`, else the one before."""

    def pick(rows: torch.Tensor | slice) -> torch.Tensor:
        cumulative = exponentials[rows].cumsum(dim=-1)
        wanted = ((1 - chance[rows, 1:]) * cumulative[:, -1:]).clamp(min=TINY)  # above 0, so that an id of no mass is never hit
        return torch.searchsorted(cumulative, torch.minimum(wanted, cumulative[:, -1:])).squeeze(-1) + start

    return _update(sample, chance[:, 0] * mass < piece_mass, pick)


if triton is not None:

    @triton.jit
    def _bits(products, kept, offsets, valid, squeeze, stretch, masked: tl.constexpr, filtered: tl.constexpr):
        scaled = tl.load(products + offsets, mask=valid, other=0.0).to(tl.float32) * squeeze
        bits = stretch / (1.0 + tl.exp2(scaled))
        if filtered:
            valid = valid & (tl.load(kept + offsets, mask=valid, other=0) != 0)
        return tl.where(valid, bits, masked)

    @triton.jit(do_not_specialize=["start", "parts"])  # numbers that change from piece to piece; one binary for all of them
    def _absorb_kernel(
        products, exponentials, kept, kept_stride, chance, stretch, squeeze, start, width, parts,
        top_at, mass_at, spread_at, argmax_at, sample_at, current_at, own_at, other_top_at, other_mass_at, other_at, shrink_at,
        masked: tl.constexpr, tile: tl.constexpr, filtered: tl.constexpr, greedy: tl.constexpr, with_current: tl.constexpr,
    ):  # fmt: skip
        """One program a position: it alone reads and writes the position's sums."""
        row = tl.program_id(0).to(tl.int64)
        products += row * width
        exponentials += row * width
        kept += row * kept_stride
        chance += row * parts * (4 if with_current else 2)
        stretch = tl.load(stretch)
        lanes = tl.arange(0, tile)
        old_top, old_mass = tl.load(top_at + row), tl.load(mass_at + row)
        top, argmax = old_top, tl.load(argmax_at + row)
        place = -1
        if with_current:
            place = tl.load(current_at + row) - start
            own, other_top, other = tl.load(own_at + row), tl.load(other_top_at + row), tl.load(other_at + row)
            other_mass = tl.load(other_mass_at + row)
        for first in range(0, width, tile):
            offsets = first + lanes
            logits = _bits(products, kept, offsets, offsets < width, squeeze, stretch, masked, filtered)
            logits = tl.where(logits == logits, logits, masked)  # NaN has no place in an order; the sums below keep and report it
            best = tl.max(logits, axis=0)
            argmax = tl.where(best > top, start + first + tl.argmax(logits, axis=0), argmax)
            top = tl.maximum(top, best)
            if with_current:
                here = offsets == place
                inside = (place >= first) & (place < first + tile) & (place < width)
                own = tl.where(inside, tl.sum(tl.where(here, logits, 0.0), axis=0), own)
                if greedy:
                    logits = tl.where(here, masked, logits)
                    best = tl.max(logits, axis=0)
                    other = tl.where(best > other_top, start + first + tl.argmax(logits, axis=0), other)
                    other_top = tl.maximum(other_top, best)
        rise = old_top - top
        shrink = tl.exp2(rise)
        mass = old_mass * shrink
        spread = (tl.load(spread_at + row) + rise * old_mass) * shrink
        sample = argmax if greedy else tl.load(sample_at + row)
        if with_current:
            other_mass *= shrink
        for first in range(0, width, tile):
            offsets = first + lanes
            valid = offsets < width
            depth = _bits(products, kept, offsets, valid, squeeze, stretch, masked, filtered) - top
            part = tl.where(valid, tl.exp2(depth), 0.0)
            tl.store(exponentials + offsets, part.to(exponentials.dtype.element_ty), mask=valid)
            part_mass = tl.sum(part, axis=0)
            mass += part_mass
            spread += tl.sum(part * depth, axis=0)
            if not greedy:
                if tl.load(chance) * mass < part_mass:
                    sample = start + first + _pick(part, tl.load(chance + 1))
                if with_current:
                    part = tl.where(offsets == place, 0.0, part)
                    part_mass = tl.sum(part, axis=0)
                    other_mass += part_mass
                    if tl.load(chance + 2) * other_mass < part_mass:
                        other = start + first + _pick(part, tl.load(chance + 3))
                chance += 4 if with_current else 2
        tl.store(top_at + row, top)
        tl.store(mass_at + row, mass)
        tl.store(spread_at + row, spread)
        tl.store(argmax_at + row, argmax)
        tl.store(sample_at + row, sample)
        tl.store(shrink_at + row, shrink)
        if with_current:
            if not greedy:
                other = tl.where(other_mass > 0, other, place + start)
            tl.store(own_at + row, own)
            tl.store(other_top_at + row, other_top)
            tl.store(other_mass_at + row, other_mass)
            tl.store(other_at + row, other)

    @triton.jit
    def _pick(part, chance):
        """The first place at which the running sum of `part` reaches the share `1 - chance` of it: of no mass never."""
        cumulative = tl.cumsum(part, axis=0)
        wanted = tl.maximum((1.0 - chance) * tl.max(cumulative, axis=0), 1e-37)
        return tl.sum((cumulative < wanted).to(tl.int64), axis=0)


def absorb_triton(
    running: Running, room: Room, start: int, shape: Shape, kept: torch.Tensor | None, chance: torch.Tensor | None
) -> tuple[Running, torch.Tensor, torch.Tensor]:
    """`absorb` in one launch of a kernel. Nothing waits for the device; a captured graph rereads a temperature that is a tensor."""
    products, shrink = room.products.contiguous(), torch.empty_like(running.top)
    exponentials = room.exponentials if room.exponentials.is_contiguous() else torch.empty_like(products)
    stretch = 2 / math.log(2) * shape.softcap / shape.temperature
    if not isinstance(stretch, torch.Tensor):
        stretch = torch.full((1,), stretch, dtype=torch.float32, device=products.device)
    unused = running.top
    kept = None if kept is None else kept.contiguous().view(torch.uint8)
    with_current = running.current is not None
    with torch.cuda.device_of(products):  # Triton launches on the current device, whatever its arguments lie on
        _absorb_kernel[(products.shape[0],)](
            products, exponentials, unused if kept is None else kept, 0 if kept is None or len(kept) == 1 else kept.stride(0),
            unused if chance is None else chance.contiguous(), stretch.float(), -2 / math.log(2) / shape.softcap, start, products.shape[1],
            0 if chance is None else chance.shape[1], *(unused if value is None else value for value in running), shrink,
            masked=MASKED, tile=TILE, filtered=kept is not None, greedy=chance is None, with_current=with_current, num_warps=WARPS,
        )  # fmt: skip
    return running, exponentials, shrink


def _prove_kernel(device: torch.device, dtype: torch.dtype, *chosen: str):
    """Three positions and one with a NaN, over a piece of two tiles and one that the last tile does not fill. The reference goes tile by
    tile, so that both draw from the same parts. Nobody's highest logit is as high as another's, in bfloat16 either."""
    filtered, greedy, with_current, ragged = (option in chosen for option in OPTIONS)
    count, widths = 4, (2 * TILE, TILE + (13 if ragged else 16))
    products = numbers(count, sum(widths))
    for rank, height in enumerate((6.0, 5.5)):
        places = torch.tensor([5 + rank, TILE + rank, 2 * TILE + 9 + rank], dtype=torch.int64, device="cpu")
        products[range(3), places] = height
    current = torch.tensor([5, 7, 2 * TILE + 12, 0], dtype=torch.int64, device="cpu")
    kept = numbers(*products.shape, uniform=True) < 0.9
    kept[0, :TILE], kept[1, TILE : TILE + 2] = False, True
    chance = numbers(count, 4, 4 if with_current else 2, uniform=True)
    products[3, 1] = float("nan")
    columns = 2 + numbers(sum(widths), 1, uniform=True)
    products, current, kept, chance, columns = (tensor.to(device) for tensor in (products, current, kept, chance, columns))

    def walk(absorb: Callable, widths: tuple[int, ...], for_kernel: bool):
        running = start_running(count, device, current if with_current else None)
        start, part, mean = 0, 0, columns.new_zeros(count, 1)
        for width in widths:
            room = make_room(count, width, dtype, device, for_kernel)
            room.products.copy_(products[:, start : start + width])
            parts, ids = slice(part, part - (-width // TILE)), slice(start, start + width)
            running, exponentials, shrink = absorb(
                running, room, start, Shape(30.0, 0.7), kept[:, ids] if filtered else None, None if greedy else chance[:, parts]
            )
            mean = mean * shrink[:, None] + exponentials.float() @ columns[ids]
            start, part = ids.stop, parts.stop
        bad = running.mass.isnan() | (running.top <= MASKED / 2)
        return bad, (mean / running.mass[:, None])[:3], Running(*(None if value is None else value[:3] for value in running))

    tiles = tuple(min(TILE, width - first) for width in widths for first in range(0, width, TILE))
    return walk(absorb_triton, widths, True), walk(absorb, tiles, False)


def _no_kernel(device: torch.device, dtype: torch.dtype, *chosen: str) -> str | None:
    if triton is None:
        return "the package `triton` is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and triton.knobs.runtime.interpret):
        return f"it is for CUDA, and the device is {device.type!r}"
    known = (torch.float32, torch.bfloat16, torch.float16)
    return None if dtype in known else f"it takes float32, bfloat16 and float16, not {dtype}"


# 2^-8: a last bit of bfloat16, which Triton's interpreter cuts off where a GPU rounds.
KERNEL = FastPath(
    "vocabulary kernel", "the pass over the vocabulary runs in plain PyTorch, which is slower", _no_kernel, _prove_kernel, 2**-8,
    cases=tuple((dtype, *chosen) for dtype in (torch.bfloat16, torch.float32)
                for chosen in ((), ("greedy",), ("filtered", "with current"))),
)  # fmt: skip


def has_kernels(device: torch.device) -> bool:
    """Whether one launch instead of many is worth a kernel."""
    return device.type == "cuda"


def choose_absorb(device: torch.device, dtype: torch.dtype, *given: bool) -> Callable:
    """`absorb_triton` where it is worth it and proven, else `absorb`. Args: `given`: which of `OPTIONS` are."""
    chosen = (option for option, use in zip(OPTIONS, given, strict=True) if use)
    return absorb_triton if has_kernels(device) and works(KERNEL, device, dtype, *chosen) else absorb


__all__ = [
    "KERNEL",
    "MASKED",
    "TILE",
    "Room",
    "Running",
    "Shape",
    "absorb",
    "absorb_triton",
    "choose_absorb",
    "counts_rows",
    "has_kernels",
    "make_room",
    "start_running",
]
