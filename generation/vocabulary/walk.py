"""What a canvas pass says about the canvas, from a walk over the vocabulary, without any tensor of the vocabulary's size.

From the last hidden states, the head and the embedding, which are mostly one matrix, piece by piece with running sums: argmax, a
sample, the entropy, the argmax's log-probability, and the soft embedding for self-conditioning. The dense way writes and reads about
ten float32 tensors of `(canvas, vocabulary)` a step; here the largest is `(canvas, PIECE)`. `prediction.dense_prediction` followed by
`soft_embed` is the reference (tests/test_vocabulary.py, tests/test_filters.py).

An example, of one position over 6 ids in two pieces of 3, logits in bits and without a cap:

    bits of the piece     top   shrink   mass                    argmax
    1  3  2                3    2^-inf   1/4 + 1 + 1/2 = 1.75    1
    4  0  1                4    2^-1     1.75/2 + 1 + 1/16 + 1/8 = 2.0625    3

The probability of id 3 is 1 / 2.0625. The soft embedding, too, is a sum that shrinks before each piece, and is divided by the mass
at the end.

Legend: N positions (B * C), W ids of a piece, V ids of the vocabulary, D hidden size. A piece is what is computed at a time, a tile what
shares one random draw: in `absorb` they are the same, in the kernel a piece has many tiles.

One walk gives all of it; filters that are thresholds need walks before (`filters.find_threshold`). What a piece adds is
`sums.absorb`, or its kernel. Nothing here waits for the device. `torch.compile` is not used: over the operations of a
piece it saved a fifth of the CPU time in float32 and none in bf16, before pieces were computed in one `Workspace`, and took a minute
to begin (256 positions, 262,144 ids, one thread of an Intel Xeon, torch 2.13).

Under autocast both products are in its dtype, as those of the dense way are.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ..rules.draws import Draws
from ..rules.prediction import NOTHING_MORE, Prediction, Wanted
from .filters import Filters, find_threshold, listed
from .kernel import TILE, absorb_triton, choose_absorb
from .products import choose_products
from .sums import MASKED, Running, Shape, Workspace, make_workspace, start_running

# Sizes of a piece's logits that stay in a cache. CPU: 256 positions times 4,096 ids in float32 are 4 MiB. Measured (CPU seconds a pass,
# median of 8; 256 positions, hidden 256, 262,144 ids, one thread of an Intel Xeon with AMX, torch 2.13) with pieces of
# 2,048 | 4,096 | 8,192 ids: float32 0.63 | 0.64 | 0.66, bf16 0.30 | 0.31 | 0.34.
PIECE, POSITIONS = 4096, 256
NUMBERS = 2**23  # of a piece's logits on a GPU: 16 MiB in bf16, and as much of exponentials, in 50 MB of L2 cache


class VocabularyHead(NamedTuple):
    """A head: `weight` (V, D), the soft cap of its logits, and the scale (in the weight's dtype) of an embedding; `embedding` (V, D) in
    the weight's dtype, None where it is the weight."""

    weight: torch.Tensor
    softcap: float
    embed_scale: torch.Tensor
    embedding: torch.Tensor | None = None


class Way(NamedTuple):
    """How the pieces are absorbed: `absorb` or its kernel, and how many ids share a random draw."""

    absorb: Callable
    tile: int

    def chance_shape(self, batch_size: int, length: int, vocab_size: int, with_current: bool) -> tuple[int, int, int, int]:
        """Of the uniform numbers that a walk draws: two for each position and tile, four where the canvas's tokens count."""
        return (batch_size, length, -(-vocab_size // self.tile), 4 if with_current else 2)


def choose_way(
    dtype: torch.dtype, device: torch.device, vocab_size: int, filtered: bool, greedy: bool, with_current: bool, piece: int | None = None
) -> Way:
    """The way for hidden states of this dtype, which autocast may change."""
    absorb = choose_absorb(device, cast_dtype(dtype, device), filtered, greedy, with_current, vocab_size % 16 != 0)
    return Way(absorb, TILE if absorb is absorb_triton else piece or PIECE)


def cast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What autocast makes of a product's dtype; float64 it leaves alone."""
    casts = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if casts and dtype != torch.float64 else dtype


def streamed_prediction(
    hidden: torch.Tensor, head: VocabularyHead, temperature: float | torch.Tensor, draws: Draws, greedy: bool = False,
    current: torch.Tensor | None = None, filters: Filters | None = None, piece: int | None = None, wanted: Wanted = NOTHING_MORE,
) -> Prediction:  # fmt: skip
    """What softmax(logits / temperature) says, the soft embedding under it included.

    Args:
        hidden (`(B, C, D)`): normed output of the canvas pass.
        head: the head, and the embedding.
        temperature: divides the soft-capped logits.
        draws: two uniform numbers for each position and each `PIECE` ids (with the kernel: `TILE` ids), four with `current`; none if
            `greedy`, which takes the most probable tokens.
        current (`int64 (B, C)`, *optional*): the canvas's tokens; with them, `current_log_probs` and `other` are given.
        filters (*optional*): what narrows the distribution; all that is returned is of what they leave, renormalised. Top_k and min_p
            cost one more pass over the vocabulary, top_p three more.
        piece: ids at a time, instead of `PIECE`; on CUDA a multiple of `TILE`. Changes the numbers drawn.
        wanted: what is given on request.

    Returns:
        `Prediction` (B, C), without whole logits; `soft_embeds` `(B, C, D)` in the weight's dtype.

    Raises:
        ValueError: a piece the kernel cannot take.
    """
    kind, (batch_size, length, _), vocab_size = hidden.device.type, hidden.shape, len(head.weight)
    if head.weight.dtype != torch.float64:
        hidden = hidden.to(cast_dtype(hidden.dtype, hidden.device))
    filtered = filters is not None and filters.narrow()
    way = choose_way(hidden.dtype, hidden.device, vocab_size, filtered, greedy, current is not None, piece)
    for_kernel = way.absorb is absorb_triton
    if for_kernel:
        piece = max(NUMBERS // (batch_size * length) // TILE, 1) * TILE if piece is None else piece
        if piece % TILE:
            raise ValueError(f"`piece` is {piece}; expected a multiple of {TILE} on CUDA")
    else:
        piece = way.tile
    at_once = max(POSITIONS // length, 1) if kind == "cpu" else batch_size  # rows, so that a row is computed alike in any batch
    chance = None if greedy else draws.uniforms(way.chance_shape(batch_size, length, vocab_size, current is not None), hidden.device)
    squashed = hidden.dtype == torch.float32 and not for_kernel  # with the product; in fewer bits it would round twice
    shape, found = Shape(head.softcap, temperature, squashed), []
    positions = min(at_once, batch_size) * length
    workspace = make_workspace(positions, min(piece, vocab_size), hidden.dtype, hidden.device, for_kernel)
    for rows in (slice(first, first + at_once) for first in range(0, batch_size, at_once)):
        narrowed = None if filters is None else filters.select(rows)
        given = (None if value is None else value[rows].flatten(0, 1) for value in (current, chance))
        found.append(_one_pass(hidden[rows], head, shape, narrowed, *given, wanted, way, piece, workspace))
    if len(found) == 1:
        return found[0]
    with torch.autocast(kind, enabled=False):  # which joins nothing but float32 and its own dtype
        return Prediction(*(None if field[0] is None else torch.cat(field) for field in zip(*found, strict=True)))


def _one_pass(
    hidden: torch.Tensor, head: VocabularyHead, shape: Shape, filters: Filters | None, current: torch.Tensor | None,
    chance: torch.Tensor | None, wanted: Wanted, way: Way, piece: int, workspace: Workspace,
) -> Prediction:  # fmt: skip
    """`streamed_prediction` of rows that are computed together: `current` (N,), `chance` (N, tiles, 2 or 4); in a `workspace` for
    them and a piece, or more."""
    batch_size, length, size = hidden.shape
    table = head.weight if head.embedding is None else head.embedding
    rows = hidden.reshape(-1, size)  # (N, D)
    if shape.squashed:
        rows = rows * (2 / head.softcap)
    scores, mix = choose_products(rows.device, rows.dtype)

    def walk() -> Iterator[tuple[int, torch.Tensor, Workspace, torch.Tensor | None]]:
        """The pieces: first id, embedding (W, D), workspace with the products of weights and hidden states (N, W), and the ids left."""
        for index, (weight, embedded) in enumerate(zip(head.weight.split(piece), table.split(piece), strict=True)):
            kept = None if filters is None else listed(filters, index * piece, len(weight), batch_size, length)
            used = workspace.narrow(len(rows), len(weight))
            scores(rows, weight.to(rows.dtype), used.products, shape.squashed)
            yield index * piece, embedded, used, kept

    threshold = None
    if filters is not None and filters.need_threshold():

        def logits() -> Iterator[torch.Tensor]:
            return (shape.logits(used.products, kept, out=used.logits) for _, _, used, kept in walk())

        threshold = find_threshold(filters, logits, len(head.weight))
    running = start_running(len(rows), hidden.device, current)
    soft, seen, gathered = hidden.new_zeros((len(rows), size), dtype=torch.float32), 0, Gathered(wanted)
    for start, embedded, used, kept in walk():
        if threshold is not None:
            kept, seen = threshold.keep(shape.logits(used.products, kept), seen)
        gathered.add(start, used.products, shape, kept)
        numbers = None if chance is None else chance[:, start // way.tile : -(-(start + len(embedded)) // way.tile)]
        running, exponentials, shrink = way.absorb(running, used, start, shape, kept, numbers)
        soft.mul_(shrink[:, None]).add_(mix(exponentials, embedded))
    soft = (soft / running.mass[:, None]).to(head.weight.dtype) * head.embed_scale
    return _summary(running, soft, gathered, shape, (batch_size, length))


def leading(
    known: tuple[torch.Tensor, torch.Tensor] | None, values: torch.Tensor, start: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` highest values of each row with their places, falling, of those `known` and of a piece's `values` (N, W), which begin at
    the place `start`: int64 and floating, (N, count), or less where there are no more."""
    best = values.topk(min(count, values.shape[1]), dim=-1)
    places, found = best.indices + start, best.values
    if known is None:
        return places, found
    places, found = (torch.cat(pair, dim=1) for pair in zip(known, (places, found), strict=True))
    best = found.topk(min(count, found.shape[1]), dim=-1)
    return places.gather(1, best.indices), best.values


class Gathered:
    """What a walk gathers on request, of N positions: the most probable ids with their logits, falling, and the logits of named ids."""

    def __init__(self, wanted: Wanted):
        self.wanted, self.ids, self.logits = wanted, None, None
        self.named: torch.Tensor | None = None

    def add(self, start: int, products: torch.Tensor, shape: Shape, kept: torch.Tensor | None) -> None:
        count, named = self.wanted.candidates, self.wanted.named
        if not count and named is None:
            return
        logits = shape.logits(products, kept)  # (N, W), a copy
        if count:
            known = None if self.ids is None else (self.ids, self.logits)
            self.ids, self.logits = leading(known, logits, start, count)
        if named is not None:
            place = (named - start).clamp(0, logits.shape[1] - 1)
            here = torch.where(place == named - start, logits[:, place], MASKED)
            self.named = here if self.named is None else torch.maximum(self.named, here)


def _summary(running: Running, soft_embeds: torch.Tensor, gathered: Gathered, shape: Shape, size: tuple[int, int]) -> Prediction:
    """The prediction of N positions, as `size` (B, C)."""
    log_mass, nat = running.mass.log(), math.log(2)  # of bits
    given = {}
    if running.current is not None:
        bits = running.current_bits
        current_log_probs = torch.where(bits > MASKED / 2, (bits - running.top) * nat - log_mass, -float("inf"))
        given |= {"current_log_probs": current_log_probs, "other": running.other}
    if gathered.ids is not None:
        top = running.top * nat - shape.softcap / shape.temperature  # of the logits themselves
        log_probs = torch.where(gathered.logits > MASKED / 2, gathered.logits - (top + log_mass)[:, None], -float("inf"))
        given |= {"candidates": gathered.ids, "candidate_log_probs": log_probs}
    if gathered.named is not None:
        given["named_logits"] = gathered.named.masked_fill(gathered.named <= MASKED / 2, -float("inf"))
    given |= {
        "sample": running.sample, "argmax": running.argmax, "log_probs": -log_mass, "soft_embeds": soft_embeds,
        "entropy": (log_mass - running.spread / running.mass * nat).clamp(min=0),
    }  # fmt: skip
    bad = (running.mass.isnan() | (running.top <= MASKED / 2)).view(size).any(dim=-1)
    return Prediction(bad=bad, **{name: value.view(*size, *value.shape[1:]) for name, value in given.items()})


__all__ = ["PIECE", "VocabularyHead", "Way", "choose_way", "leading", "streamed_prediction"]
