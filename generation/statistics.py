"""What a denoising step needs to know of each position's distribution over the vocabulary: the dense reference."""

from typing import NamedTuple

import torch


class RowStatistics(NamedTuple):
    """Per position: a `sample` and the `argmax`, int64 (B, C), and the `entropy` in nats, float32 (B, C)."""

    sample: torch.Tensor
    argmax: torch.Tensor
    entropy: torch.Tensor


def dense_statistics(logits: torch.Tensor, generator: torch.Generator | None = None) -> RowStatistics:
    """Statistics of softmax(logits), float32 `(B, C, V)`. Draws one number a position, as `torch.multinomial` does.

    The order and kind of the operations are transformers', so that equal seeds give equal tokens.
    """
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    sample = torch.multinomial(probabilities.view(-1, logits.shape[-1]), num_samples=1, generator=generator)
    entropy = torch.distributions.Categorical(logits=logits, validate_args=False).entropy()
    return RowStatistics(sample.view(logits.shape[:-1]), logits.argmax(dim=-1), entropy)


__all__ = ["RowStatistics", "dense_statistics"]
