"""`sums.absorb` as a Triton kernel: what a piece of the vocabulary adds, in one launch, where `KERNEL` proves it.

Two sweeps over a piece's logits, which the second finds in the L2 cache, instead of some twenty operations. Both products with the
weights stay with the matrix library: at 256 positions they are bound by its rate of multiplication, not by memory, and reading the
weights twice is what the soft embedding needs anyway, since its factors are known only when a piece's logits are.

N: positions, W: ids of a piece.
"""

import math
from collections.abc import Callable

import torch

from ..fast.proofs import FastPath, numbers, works
from .sums import MASKED, Running, Shape, Workspace, absorb, make_workspace, start_running

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

TILE = 2048  # ids that share a draw
WARPS = 8
OPTIONS = ("filtered", "greedy", "with current", "ragged")  # each has its own binary; ragged: a vocabulary that is no multiple of 16


if triton is not None:

    @triton.jit
    def _bits(products, kept, offsets, valid, squeeze, stretch, masked: tl.constexpr, filtered: tl.constexpr):
        scaled = tl.load(products + offsets, mask=valid, other=0.0).to(tl.float32) * squeeze
        bits = stretch / (1.0 + tl.exp2(scaled))
        if filtered:
            valid = valid & (tl.load(kept + offsets, mask=valid, other=0) != 0)
        return tl.where(valid, bits, masked)

    @triton.jit(do_not_specialize=["start", "tiles"])  # numbers that change from piece to piece; one binary for all of them
    def _absorb_kernel(
        products, exponentials, kept, kept_stride, chance, stretch, squeeze, start, width, tiles,
        top_at, mass_at, spread_at, argmax_at, sample_at, current_at, current_bits_at, other_top_at, other_mass_at, other_at, shrink_at,
        masked: tl.constexpr, tile: tl.constexpr, filtered: tl.constexpr, greedy: tl.constexpr, with_current: tl.constexpr,
    ):  # fmt: skip
        """One program a position: it alone reads and writes the position's sums."""
        row = tl.program_id(0).to(tl.int64)
        products += row * width
        exponentials += row * width
        kept += row * kept_stride
        chance += row * tiles * (4 if with_current else 2)
        stretch = tl.load(stretch)
        lanes = tl.arange(0, tile)
        old_top, old_mass = tl.load(top_at + row), tl.load(mass_at + row)
        top, argmax = old_top, tl.load(argmax_at + row)
        place = -1
        if with_current:
            place = tl.load(current_at + row) - start
            current_bits, other_top, other = tl.load(current_bits_at + row), tl.load(other_top_at + row), tl.load(other_at + row)
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
                current_bits = tl.where(inside, tl.sum(tl.where(here, logits, 0.0), axis=0), current_bits)
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
            shares = tl.where(valid, tl.exp2(depth), 0.0)
            tl.store(exponentials + offsets, shares.to(exponentials.dtype.element_ty), mask=valid)
            tile_mass = tl.sum(shares, axis=0)
            mass += tile_mass
            spread += tl.sum(shares * depth, axis=0)
            if not greedy:
                if tl.load(chance) * mass < tile_mass:
                    sample = start + first + _pick(shares, tl.load(chance + 1))
                if with_current:
                    shares = tl.where(offsets == place, 0.0, shares)
                    tile_mass = tl.sum(shares, axis=0)
                    other_mass += tile_mass
                    if tl.load(chance + 2) * other_mass < tile_mass:
                        other = start + first + _pick(shares, tl.load(chance + 3))
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
            tl.store(current_bits_at + row, current_bits)
            tl.store(other_top_at + row, other_top)
            tl.store(other_mass_at + row, other_mass)
            tl.store(other_at + row, other)

    @triton.jit
    def _pick(shares, chance):
        """The first place at which the running sum of `shares` reaches the share `1 - chance` of it: of no mass never."""
        cumulative = tl.cumsum(shares, axis=0)
        wanted = tl.maximum((1.0 - chance) * tl.max(cumulative, axis=0), 1e-37)
        return tl.sum((cumulative < wanted).to(tl.int64), axis=0)


def absorb_triton(
    running: Running, workspace: Workspace, start: int, shape: Shape, kept: torch.Tensor | None, chance: torch.Tensor | None
) -> tuple[Running, torch.Tensor, torch.Tensor]:
    """`absorb` in one launch of a kernel. Nothing waits for the device; a captured graph rereads a temperature that is a tensor."""
    products, shrink = workspace.products.contiguous(), torch.empty_like(running.top)
    exponentials = workspace.exponentials if workspace.exponentials.is_contiguous() else torch.empty_like(products)
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
    tile, so that both draw from the same tiles. Nobody's highest logit is as high as another's, in bfloat16 either."""
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
        start, tile, mean = 0, 0, columns.new_zeros(count, 1)
        for width in widths:
            workspace = make_workspace(count, width, dtype, device, for_kernel)
            workspace.products.copy_(products[:, start : start + width])
            tiles, ids = slice(tile, tile - (-width // TILE)), slice(start, start + width)
            running, exponentials, shrink = absorb(
                running, workspace, start, Shape(30.0, 0.7), kept[:, ids] if filtered else None, None if greedy else chance[:, tiles]
            )
            mean = mean * shrink[:, None] + exponentials.float() @ columns[ids]
            start, tile = ids.stop, tiles.stop
        bad = running.mass.isnan() | (running.top <= MASKED / 2)
        return bad, (mean / running.mass[:, None])[:3], Running(*(None if value is None else value[:3] for value in running))

    one_by_one = tuple(min(TILE, width - first) for width in widths for first in range(0, width, TILE))
    return walk(absorb_triton, widths, True), walk(absorb, one_by_one, False)


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


__all__ = ["KERNEL", "TILE", "absorb_triton", "choose_absorb", "has_kernels"]
