"""The statistics of a denoising step in one pass over the vocabulary, without any tensor of the vocabulary's size.

From the last hidden states and the tied embedding, piece by piece with running sums: argmax, a sample, the entropy, the
argmax's log-probability, and the soft embedding for self-conditioning. The dense way writes and reads about ten float32
tensors of `(canvas, vocabulary)` a step; here the largest is `(canvas, PIECE)`. `statistics.dense_statistics` followed by
`soft_embed` is the reference (tests/test_vocabulary.py).
"""

from typing import NamedTuple

import torch

from .draws import Draws
from .running import MASKED, Running, absorb, start_running
from .statistics import RowStatistics

PIECE = 4096  # ids; 256 positions of float32 are 4 MiB, which stays in a CPU's caches


class VocabularyHead(NamedTuple):
    """A tied head: `weight` (V, D), the soft cap of its logits, and the scale (in the weight's dtype) of an embedding."""

    weight: torch.Tensor
    softcap: float
    embed_scale: torch.Tensor


def streamed_statistics(
    hidden: torch.Tensor, head: VocabularyHead, temperature: float | torch.Tensor, draws: Draws, greedy: bool = False,
    current: torch.Tensor | None = None, piece: int = PIECE,
) -> tuple[RowStatistics, torch.Tensor]:  # fmt: skip
    """Statistics of softmax(logits / temperature), and the soft embedding under it.

    Args:
        hidden (`(B, C, D)`): normed output of the canvas pass.
        head: the tied head.
        temperature: divides the soft-capped logits.
        draws: two uniform numbers a position and piece, four with `current`; none if `greedy`, which takes the most probable tokens.
        current (`int64 (B, C)`, *optional*): the canvas's tokens; with them, `current_log_probs` and `other` are given.
        piece: ids at a time.

    Returns:
        `RowStatistics` (B, C), and the soft embedding `(B, C, D)` in the weight's dtype.
    """
    batch_size, length, size = hidden.shape
    rows, vocab_size = hidden.reshape(-1, size), head.weight.shape[0]  # (N, D)
    count, pieces, numbers = rows.shape[0], -(-vocab_size // piece), 2 if current is None else 4
    chance = None if greedy else draws.uniforms(batch_size, (length, pieces, numbers), rows.device).view(count, pieces, numbers)
    running = start_running(count, rows.device, None if current is None else current.flatten())
    soft = rows.new_zeros((count, size), dtype=torch.float32)
    for number, weight in enumerate(head.weight.split(piece)):
        logits = torch.nn.functional.linear(rows, weight).float().div_(head.softcap).tanh_().mul_(head.softcap).div_(temperature)
        running, exponentials, shrink = absorb(running, logits, number * piece, None if chance is None else chance[:, number])
        soft.mul_(shrink[:, None]).add_(exponentials.to(weight.dtype) @ weight)
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
