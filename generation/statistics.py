"""What a denoising step needs to know of each position's distribution over the vocabulary: the dense reference."""

from typing import NamedTuple

import torch

from .draws import Draws


class RowStatistics(NamedTuple):
    """Per position `(B, C)`: `sample` and `argmax`, int64; `entropy` of the distribution, nats, and `log_probs`, nats, of the
    argmax under it, float32."""

    sample: torch.Tensor
    argmax: torch.Tensor
    entropy: torch.Tensor
    log_probs: torch.Tensor


def dense_statistics(logits: torch.Tensor, draws: Draws, greedy: bool = False) -> RowStatistics:
    """Statistics of softmax(logits), float32 `(B, C, V)`. Draws one number a position, as `torch.multinomial` does; `greedy`
    draws none and samples the argmax.

    The order and kind of the operations are transformers', so that equal seeds give equal tokens.

    Raises:
        ValueError: a logit is NaN, or a whole distribution is -inf.
    """
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    argmax = logits.argmax(dim=-1)
    top = probabilities.gather(-1, argmax[..., None]).squeeze(-1)
    check_finite(top)
    sample = argmax if greedy else draws.tokens(probabilities)
    entropy = torch.distributions.Categorical(logits=logits, validate_args=False).entropy()
    return RowStatistics(sample, argmax, entropy, top.log())


def check_finite(values: torch.Tensor) -> None:
    """Raises ValueError where a value of `(B, C)` that every logit went into is NaN."""
    if bool(values.isnan().any()):
        rows = values.isnan().any(dim=-1).nonzero().flatten().tolist()
        raise ValueError(f"the model's logits are NaN, or -inf for every token, in batch rows {rows}; expected finite logits")


__all__ = ["RowStatistics", "check_finite", "dense_statistics"]
