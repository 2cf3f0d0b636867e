"""What a denoising step needs to know of each position's distribution over the vocabulary: the dense reference."""

from typing import NamedTuple

import torch

from .draws import Draws


class RowStatistics(NamedTuple):
    """Per position `(B, C)`: `sample` and `argmax`, int64; `entropy` of the distribution, nats, and `log_probs`, nats, of the
    argmax under it, float32.

    `bad` bool (B,): rows with a NaN logit or a distribution without any token, whose other values mean nothing; `check_finite`
    raises for them. Reading it waits for the device, so it is left to the caller when.

    With the canvas's current tokens given, also `current_log_probs` float32 (B, C), nats, of the current token, -inf where it is
    filtered out; and `other` int64 (B, C), a sample of the distribution without the current token: the leave-one-out draw.
    Where no other token has any mass, `other` is the current token itself. It need not be independent of `sample`.
    """

    sample: torch.Tensor
    argmax: torch.Tensor
    entropy: torch.Tensor
    log_probs: torch.Tensor
    bad: torch.Tensor | None = None
    current_log_probs: torch.Tensor | None = None
    other: torch.Tensor | None = None


def dense_statistics(logits: torch.Tensor, draws: Draws, greedy: bool = False, current: torch.Tensor | None = None) -> RowStatistics:
    """Statistics of softmax(logits), float32 `(B, C, V)`.

    Draws one number a position, as `torch.multinomial` does, and with `current` int64 `(B, C)` one more; `greedy` draws none and
    takes the most probable tokens. The order and kind of the operations are transformers', so that equal seeds give equal tokens.
    """
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    argmax = logits.argmax(dim=-1)
    top = probabilities.gather(-1, argmax[..., None])  # NaN as soon as one logit is, or all are -inf
    lost = top.isnan()
    probabilities.masked_fill_(lost, 1.0)  # multinomial refuses NaN with an error of its own
    sample = argmax if greedy else draws.tokens(probabilities)
    entropy = torch.distributions.Categorical(logits=logits, validate_args=False).entropy()
    current_log_probs = other = None
    if current is not None:
        place = current[..., None]
        current_log_probs = (logits.gather(-1, place) - logits.logsumexp(dim=-1, keepdim=True)).squeeze(-1)
        probabilities.scatter_(-1, place, 0.0)
        alone = probabilities.sum(dim=-1, keepdim=True) <= 0
        probabilities.scatter_(-1, place, alone.float())
        other = probabilities.argmax(dim=-1) if greedy else draws.tokens(probabilities)
    return RowStatistics(sample, argmax, entropy, top.squeeze(-1).log(), lost.flatten(1).any(dim=-1), current_log_probs, other)


def check_finite(bad: torch.Tensor, numbers: torch.Tensor | None = None) -> None:
    """Raises ValueError for the rows that `RowStatistics.bad` bool (B,) marks; `numbers` int64 (B,) are the rows' in the batch, where
    some have left it. Waits for the device."""
    if rows := bad.nonzero().flatten().tolist():
        rows = rows if numbers is None else numbers[rows].tolist()
        raise ValueError(f"the model's logits are NaN, or -inf for every token, in batch rows {rows}; expected finite logits")


__all__ = ["RowStatistics", "check_finite", "dense_statistics"]
