"""What a canvas pass says about the canvas: the one currency of a denoising step, and how it is read off whole logits.

Samplers, stopping rules, constraints, watchers and the training rollout take a `Prediction` and nothing else. `dense_prediction` is the
reference of `vocabulary.streamed_prediction`, which makes the same without logits.
"""

from typing import NamedTuple

import torch

from .draws import TokenDraws


class Wanted(NamedTuple):
    """What a prediction holds beside the rest: `candidates`, how many of the most probable ids of a position; `named` int64 (n,), ids whose
    logits are asked for."""

    candidates: int = 0
    named: torch.Tensor | None = None


NOTHING_MORE = Wanted()


class Prediction(NamedTuple):
    """Per position `(B, C)`: `sample` and `argmax`, int64; `entropy` of the distribution, nats, and `log_probs`, nats, of the
    argmax under it, float32. The distribution is the shaped one: filtered, and divided by the temperature.

    `bad` bool (B,): rows with a NaN logit or a distribution without any token, whose other values mean nothing; `check_finite`
    raises for them. Reading it waits for the device, so it is left to the caller when.

    `soft_embeds` `(B, C, D)`: the mean embedding under the distribution, which conditions the next step; None where nobody asked.

    With the canvas's current tokens given: `current_log_probs` float32 (B, C), nats, of the current token, -inf where it is filtered
    out; and `other` int64 (B, C), a sample of the distribution without it: the leave-one-out draw. Where no other token has any mass,
    `other` is the current token itself. It need not be independent of `sample`.

    As `Wanted` says: `candidates` int64 and `candidate_log_probs` float32 nats, each (B, C, k): the most probable ids, falling; of
    those that can be no more than k, the rest has -inf. `named_logits` float32 (B, C, n): shaped logits of the named ids, -inf where
    filtered out.

    From whole logits alone, each float32 (B, C, V): `raw`, as the model gave them, and `shaped`.
    """

    sample: torch.Tensor
    argmax: torch.Tensor
    entropy: torch.Tensor
    log_probs: torch.Tensor
    bad: torch.Tensor | None = None
    soft_embeds: torch.Tensor | None = None
    current_log_probs: torch.Tensor | None = None
    other: torch.Tensor | None = None
    candidates: torch.Tensor | None = None
    candidate_log_probs: torch.Tensor | None = None
    named_logits: torch.Tensor | None = None
    raw: torch.Tensor | None = None
    shaped: torch.Tensor | None = None


def dense_prediction(
    logits: torch.Tensor, draws: TokenDraws, greedy: bool = False, current: torch.Tensor | None = None, wanted: Wanted = NOTHING_MORE
) -> Prediction:
    """What softmax(logits) says, float32 `(B, C, V)`; without `soft_embeds` and `raw`.

    Draws a token a position, and with `current` int64 `(B, C)` one more; `greedy` draws none and takes the most probable tokens. The order
    and kind of the operations are transformers', so that with `BatchDraws` equal seeds give equal tokens.
    """
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    argmax = logits.argmax(dim=-1)
    top = probabilities.gather(-1, argmax[..., None])  # NaN as soon as one logit is, or all are -inf
    lost = top.isnan()
    probabilities.masked_fill_(lost, 1.0)  # multinomial refuses NaN with an error of its own
    prediction = Prediction(
        sample=argmax if greedy else draws.tokens(probabilities), argmax=argmax, log_probs=top.squeeze(-1).log(),
        entropy=torch.distributions.Categorical(logits=logits, validate_args=False).entropy(),
        bad=lost.flatten(1).any(dim=-1), shaped=logits,
    )  # fmt: skip
    log_mass = logits.logsumexp(dim=-1, keepdim=True) if current is not None or wanted.candidates else None
    if current is not None:
        place = current[..., None]
        current_log_probs = (logits.gather(-1, place) - log_mass).squeeze(-1)
        probabilities.scatter_(-1, place, 0.0)
        alone = probabilities.sum(dim=-1, keepdim=True) <= 0
        probabilities.scatter_(-1, place, alone.float())
        other = probabilities.argmax(dim=-1) if greedy else draws.tokens(probabilities, "other tokens")
        prediction = prediction._replace(current_log_probs=current_log_probs, other=other)
    if wanted.candidates:
        best = logits.topk(min(wanted.candidates, logits.shape[-1]), dim=-1)
        prediction = prediction._replace(candidates=best.indices, candidate_log_probs=best.values - log_mass)
    if wanted.named is not None:
        prediction = prediction._replace(named_logits=logits[..., wanted.named])
    return prediction


def narrowed(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits floating (B, C, V) in the model's `dtype`, for its softmax. float16 ends at 65,504, which a cold temperature passes: a
    position whose highest logit lies beyond is shifted to 0 at its highest, which no softmax sees; all others keep their bits."""
    if dtype != torch.float16:
        return logits.to(dtype)
    top = logits.amax(dim=-1, keepdim=True)
    return (logits - torch.where(top.abs() > torch.finfo(dtype).max, top, 0.0)).to(dtype)


def check_finite(bad: torch.Tensor, places: torch.Tensor | None = None, constrained: bool = False) -> None:
    """Raises ValueError for the rows that `Prediction.bad` bool (B,) marks; `places` int64 (B,) are the rows' in the batch, where some have
    left it; `constrained`: some of them must write a text of a language. Waits for the device."""
    if rows := bad.nonzero().flatten().tolist():
        rows = rows if places is None else places[rows].tolist()
        text, expected = (" that `constraint` accepts", ", and bans that leave a text") if constrained else ("", "")
        raise ValueError(
            f"the model's logits are NaN, or -inf for every token{text}, in batch rows {rows}; expected finite logits{expected}"
        )


__all__ = ["NOTHING_MORE", "Prediction", "Wanted", "check_finite", "dense_prediction", "narrowed"]
