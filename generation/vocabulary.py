"""The statistics of a denoising step from a walk over the vocabulary, without any tensor of the vocabulary's size.

From the last hidden states, the head and the embedding, which are mostly one matrix, piece by piece with running sums: argmax, a
sample, the entropy, the argmax's log-probability, and the soft embedding for self-conditioning. The dense way writes and reads about
ten float32 tensors of `(canvas, vocabulary)` a step; here the largest is `(canvas, PIECE)`. `statistics.dense_statistics` followed by
`soft_embed` is the reference (tests/test_vocabulary.py, tests/test_filters.py).

One walk gives all of it; filters that are thresholds need walks before (`filters.find_threshold`). What a piece adds is
`running.absorb`, or its kernel. Nothing here waits for the device. `torch.compile` is not used: over the operations of a
piece it saved a fifth of the CPU time in float32 and none in bf16, before pieces were computed in one `Room`, and took a minute
to begin (256 positions, 262,144 ids, one thread of an Intel Xeon, torch 2.13).

Under autocast both products are in its dtype, as those of the dense way are.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .draws import Draws
from .filters import Filters, find_threshold, listed
from .products import choose_products
from .running import MASKED, TILE, Room, Running, Shape, absorb_triton, choose_absorb, make_room, start_running
from .statistics import RowStatistics

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


def streamed_statistics(
    hidden: torch.Tensor, head: VocabularyHead, temperature: float | torch.Tensor, draws: Draws, greedy: bool = False,
    current: torch.Tensor | None = None, filters: Filters | None = None, piece: int | None = None,
) -> tuple[RowStatistics, torch.Tensor]:  # fmt: skip
    """Statistics of softmax(logits / temperature), and the soft embedding under it.

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

    Returns:
        `RowStatistics` (B, C), and the soft embedding `(B, C, D)` in the weight's dtype.

    Raises:
        ValueError: a piece the kernel cannot take.
    """
    kind, (batch_size, length, _) = hidden.device.type, hidden.shape
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if casts and head.weight.dtype != torch.float64:  # which autocast leaves alone
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    filtered, group = filters is not None and filters.narrow(), batch_size
    absorb = choose_absorb(hidden.device, hidden.dtype, filtered, greedy, current is not None, len(head.weight) % 16 != 0)
    if absorb is absorb_triton:
        piece = max(NUMBERS // (batch_size * length) // TILE, 1) * TILE if piece is None else piece
        if piece % TILE:
            raise ValueError(f"`piece` is {piece}; expected a multiple of {TILE} on CUDA")
        part = TILE
    else:
        part = piece = PIECE if piece is None else piece
    if kind == "cpu":
        group = max(POSITIONS // length, 1)  # rows at a time, so that a row is computed alike in any batch
    chance = None
    if not greedy:
        parts = -(-head.weight.shape[0] // part)
        chance = draws.uniforms(batch_size, (length, parts, 2 if current is None else 4), hidden.device)
    positions, for_kernel = min(group, batch_size) * length, absorb is absorb_triton
    squashed = hidden.dtype == torch.float32 and not for_kernel  # with the product; in fewer bits it would round twice
    shape, found = Shape(head.softcap, temperature, squashed), []
    room = make_room(positions, min(piece, len(head.weight)), hidden.dtype, hidden.device, for_kernel)
    for rows in (slice(first, first + group) for first in range(0, batch_size, group)):
        narrowed = None if filters is None else filters.select(rows)
        given = (None if value is None else value[rows].flatten(0, 1) for value in (current, chance))
        found.append(_one_pass(hidden[rows], head, shape, narrowed, *given, absorb, piece, part, room))
    if len(found) == 1:
        return found[0]
    fields = zip(*(statistics for statistics, _ in found), strict=True)
    statistics = RowStatistics(*(None if field[0] is None else torch.cat(field) for field in fields))
    with torch.autocast(kind, enabled=False):  # which joins nothing but float32 and its own dtype
        return statistics, torch.cat([soft for _, soft in found])


def _one_pass(
    hidden: torch.Tensor, head: VocabularyHead, shape: Shape, filters: Filters | None, current: torch.Tensor | None,
    chance: torch.Tensor | None, absorb: Callable, piece: int, part: int, room: Room,
) -> tuple[RowStatistics, torch.Tensor]:  # fmt: skip
    """`streamed_statistics` of rows that are computed together: `current` (N,), `chance` (N, parts, 2 or 4), `part` ids for each; in `room`
    for them and a piece, or more."""
    batch_size, length, size = hidden.shape
    table = head.weight if head.embedding is None else head.embedding
    rows = hidden.reshape(-1, size)  # (N, D)
    if shape.squashed:
        rows = rows * (2 / head.softcap)
    scores, mix = choose_products(rows.device, rows.dtype)

    def walk() -> Iterator[tuple[int, torch.Tensor, Room, torch.Tensor | None]]:
        """The pieces: first id, embedding (W, D), room with the products of weights and hidden states (N, W), and which ids are left."""
        pieces = zip(head.weight.split(piece), table.split(piece), strict=True)
        for number, (weight, embedded) in enumerate(pieces):
            kept = None if filters is None else listed(filters, number * piece, len(weight), batch_size, length)
            used = room.narrow(len(rows), len(weight))
            scores(rows, weight.to(rows.dtype), used.products, shape.squashed)
            yield number * piece, embedded, used, kept

    threshold = None
    if filters is not None and filters.need_threshold():

        def logits() -> Iterator[torch.Tensor]:
            return (shape.logits(used.products, kept, out=used.logits) for _, _, used, kept in walk())

        threshold = find_threshold(filters, logits, len(head.weight))
    running = start_running(len(rows), hidden.device, current)
    soft, seen = hidden.new_zeros((len(rows), size), dtype=torch.float32), 0
    for start, embedded, used, kept in walk():
        if threshold is not None:
            kept, seen = threshold.keep(shape.logits(used.products, kept), seen)
        numbers = None if chance is None else chance[:, start // part : -(-(start + len(embedded)) // part)]
        running, exponentials, shrink = absorb(running, used, start, shape, kept, numbers)
        soft.mul_(shrink[:, None]).add_(mix(exponentials, embedded))
    soft = (soft / running.mass[:, None]).to(head.weight.dtype) * head.embed_scale
    return _summary(running, (batch_size, length)), soft.view(batch_size, length, size)


def _summary(running: Running, shape: tuple[int, int]) -> RowStatistics:
    log_mass, nat = running.mass.log(), math.log(2)  # of bits
    current_log_probs = other = None
    if running.current is not None:
        own = torch.where(running.own > MASKED / 2, (running.own - running.top) * nat - log_mass, -float("inf"))
        current_log_probs, other = own.view(shape), running.other.view(shape)
    return RowStatistics(
        sample=running.sample.view(shape), argmax=running.argmax.view(shape), log_probs=-log_mass.view(shape),
        entropy=(log_mass - running.spread / running.mass * nat).view(shape).clamp(min=0),
        bad=(running.mass.isnan() | (running.top <= MASKED / 2)).view(shape).any(dim=-1),
        current_log_probs=current_log_probs, other=other,
    )  # fmt: skip


__all__ = ["PIECE", "VocabularyHead", "streamed_statistics"]
