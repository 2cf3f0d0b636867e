"""The statistics of a denoising step in one pass over the vocabulary, without any tensor of the vocabulary's size.

From the last hidden states and the tied embedding, piece by piece with running sums: argmax, a sample, the entropy, the
argmax's log-probability, and the soft embedding for self-conditioning. The dense way writes and reads about ten float32
tensors of `(canvas, vocabulary)` a step; here the largest is `(canvas, PIECE)`. `statistics.dense_statistics` followed by
`soft_embed` is the reference (tests/test_vocabulary.py).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .draws import Draws
from .filters import Filters, find_threshold, listed
from .running import MASKED, TILE, Running, Shape, absorb_triton, choose_absorb, start_running
from .statistics import RowStatistics

PIECE = 4096  # ids; 256 positions of float32 are 4 MiB, which stays in a CPU's caches


class VocabularyHead(NamedTuple):
    """A tied head: `weight` (V, D), the soft cap of its logits, and the scale (in the weight's dtype) of an embedding."""

    weight: torch.Tensor
    softcap: float
    embed_scale: torch.Tensor


def streamed_statistics(
    hidden: torch.Tensor, head: VocabularyHead, temperature: float | torch.Tensor, draws: Draws, greedy: bool = False,
    current: torch.Tensor | None = None, filters: Filters | None = None, piece: int = PIECE,
) -> tuple[RowStatistics, torch.Tensor]:  # fmt: skip
    """Statistics of softmax(logits / temperature), and the soft embedding under it.

    Args:
        hidden (`(B, C, D)`): normed output of the canvas pass.
        head: the tied head.
        temperature: divides the soft-capped logits.
        draws: two uniform numbers a position and piece, four with `current`; none if `greedy`, which takes the most probable tokens.
        current (`int64 (B, C)`, *optional*): the canvas's tokens; with them, `current_log_probs` and `other` are given.
        filters (*optional*): what narrows the distribution; all that is returned is of what they leave, renormalised. Top_k and min_p
            cost one more pass over the vocabulary, top_p three more.
        piece: ids at a time.

    Returns:
        `RowStatistics` (B, C), and the soft embedding `(B, C, D)` in the weight's dtype.
    """
    batch_size, length, size = hidden.shape
    rows, vocab_size, shape = hidden.reshape(-1, size), head.weight.shape[0], Shape(head.softcap, temperature)  # (N, D)
    absorb = choose_absorb(hidden.device, hidden.dtype)

    def walk() -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """The pieces: first id, weights (W, D), their products with the hidden states (N, W), and which ids are left."""
        for number, weight in enumerate(head.weight.split(piece)):
            kept = None if filters is None else listed(filters, number * piece, len(weight), batch_size, length)
            yield number * piece, weight, torch.nn.functional.linear(rows, weight), kept

    threshold = None
    if filters is not None and filters.need_threshold():
        threshold = find_threshold(filters, lambda: (shape.logits(products, kept) for _, _, products, kept in walk()), vocab_size)
    chance, part = None, TILE if absorb is absorb_triton else piece
    if not greedy:
        chance = draws.uniforms(batch_size, (length, -(-vocab_size // part), 2 if current is None else 4), hidden.device).flatten(0, 1)
    running = start_running(len(rows), hidden.device, None if current is None else current.flatten())
    soft, seen = hidden.new_zeros((len(rows), size), dtype=torch.float32), 0
    for start, weight, products, kept in walk():
        if threshold is not None:
            kept, seen = threshold.keep(shape.logits(products, kept), seen)
        parts = None if chance is None else chance[:, start // part : -(-(start + len(weight)) // part)]
        running, exponentials, shrink = absorb(running, products, start, shape, kept, parts)
        soft.mul_(shrink[:, None]).add_(exponentials @ weight)
    soft = (soft / running.mass[:, None]).to(head.weight.dtype) * head.embed_scale
    return _summary(running, (batch_size, length)), soft.view(batch_size, length, size)


def _summary(running: Running, shape: tuple[int, int]) -> RowStatistics:
    log_mass = running.mass.log()
    current_log_probs = other = None
    if running.current is not None:
        own = torch.where(running.own > MASKED / 2, running.own - running.top - log_mass, -float("inf"))
        current_log_probs, other = own.view(shape), running.other.view(shape)
    return RowStatistics(
        sample=running.sample.view(shape), argmax=running.argmax.view(shape), log_probs=-log_mass.view(shape),
        entropy=(log_mass - running.spread / running.mass).view(shape).clamp(min=0),
        bad=(running.mass.isnan() | (running.top <= MASKED / 2)).view(shape).any(dim=-1),
        current_log_probs=current_log_probs, other=other,
    )  # fmt: skip


__all__ = ["PIECE", "VocabularyHead", "streamed_statistics"]
