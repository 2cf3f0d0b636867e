"""The statistics of a denoising step in one pass over the vocabulary, without any tensor of the vocabulary's size.

From the last hidden states and the tied embedding, piece by piece with running sums: argmax, a sample, the entropy, the
argmax's log-probability, and the soft embedding for self-conditioning. The dense way writes and reads about ten float32
tensors of `(canvas, vocabulary)` a step; here the largest is `(canvas, PIECE)`. `statistics.dense_statistics` followed by
`soft_embed` is the reference (tests/test_vocabulary.py).

Running sums as in online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867). The sample is a reservoir over pieces: a
piece's candidate replaces the one before with the probability of its share of the mass so far, and only then is it drawn.
"""

from typing import NamedTuple

import torch

from .draws import Draws
from .statistics import RowStatistics, check_finite

PIECE = 4096  # ids; 256 positions of float32 are 4 MiB, which stays in a CPU's caches


class VocabularyHead(NamedTuple):
    """A tied head: `weight` (V, D), the soft cap of its logits, and the scale (in the weight's dtype) of an embedding."""

    weight: torch.Tensor
    softcap: float
    embed_scale: torch.Tensor


def streamed_statistics(
    hidden: torch.Tensor, head: VocabularyHead, temperature: float | torch.Tensor, draws: Draws, greedy: bool = False, piece: int = PIECE
) -> tuple[RowStatistics, torch.Tensor]:
    """Statistics of softmax(logits / temperature), and the soft embedding under it.

    Args:
        hidden (`(B, C, D)`): normed output of the canvas pass.
        head: the tied head.
        temperature: divides the soft-capped logits.
        draws: two uniform numbers a position and piece; none if `greedy`, which samples the argmax.
        piece: ids at a time.

    Returns:
        `RowStatistics` (B, C), and the soft embedding `(B, C, D)` in the weight's dtype.

    Raises:
        ValueError: a logit is NaN.
    """
    batch_size, length, size = hidden.shape
    rows, vocab_size = hidden.reshape(-1, size), head.weight.shape[0]  # (N, D)
    count, pieces = rows.shape[0], -(-vocab_size // piece)
    top = rows.new_full((count,), -float("inf"), dtype=torch.float32)  # running maximum
    mass, weighted = torch.zeros_like(top), torch.zeros_like(top)  # sums of e^(l - top) and of e^(l - top) * l
    soft = rows.new_zeros((count, size), dtype=torch.float32)
    argmax = torch.zeros(count, dtype=torch.int64, device=rows.device)
    sample = torch.zeros_like(argmax)
    chance = None if greedy else draws.uniforms(batch_size, (length, pieces, 2), rows.device).view(count, pieces, 2)
    for number, weight in enumerate(head.weight.split(piece)):
        logits = torch.tanh(torch.nn.functional.linear(rows, weight).float() / head.softcap) * head.softcap / temperature  # (N, piece)
        piece_top, place = logits.max(dim=-1)
        argmax = torch.where(piece_top > top, place + number * piece, argmax)
        new_top = torch.maximum(top, piece_top)
        shrink = torch.exp(top - new_top)
        exponentials = torch.exp(logits - new_top[:, None])
        piece_mass = exponentials.sum(dim=-1)
        mass = mass * shrink + piece_mass
        weighted = weighted * shrink + torch.linalg.vecdot(exponentials, logits)
        soft = soft * shrink[:, None] + (exponentials.to(weight.dtype) @ weight).float()
        top = new_top
        if chance is not None:
            replaced = (chance[:, number, 0] * mass < piece_mass).nonzero().flatten()
            cumulative = exponentials[replaced].cumsum(dim=-1)
            wanted = (1 - chance[replaced, number, 1:]) * cumulative[:, -1:]  # in (0, total], so an id of no mass is never hit
            sample[replaced] = torch.searchsorted(cumulative, wanted).squeeze(-1) + number * piece
    check_finite(mass.view(batch_size, length))
    entropy = top + mass.log() - weighted / mass
    shape = (batch_size, length)
    statistics = RowStatistics(
        sample=(argmax if greedy else sample).view(shape), argmax=argmax.view(shape), entropy=entropy.view(shape).clamp(min=0),
        log_probs=-mass.log().view(shape),
    )  # fmt: skip
    soft = (soft / mass[:, None]).to(head.weight.dtype) * head.embed_scale
    return statistics, soft.view(batch_size, length, size)


__all__ = ["PIECE", "VocabularyHead", "streamed_statistics"]
