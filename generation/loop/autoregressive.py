"""Decoding with the same weights by the causal pass alone, one token a pass."""

from collections.abc import Sequence

import torch

from ..call.caches import dynamic_cache
from ..call.plan import Plan
from ..call.prompt import Prompt
from ..rules.prediction import check_finite, dense_prediction
from ..watch.watcher import Watcher
from .rows import Rows
from .transcript import SCORE_FIELDS, Transcript


def next_logits(model, plan: Plan, rows: Rows, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shaped logits of the next token and the model's, (b, 1, V). There is no schedule here: `temperature` means what it always does."""
    raw = model.compute_logits(hidden[:, -1:])
    possible = raw if rows.progress is None else rows.progress.restrict(raw, rows.left(plan) - 1)
    return plan.rules.shaping(possible, rows.filters, rows.committed, None, plan.rules.temperature, 1), raw


def token_scores(shaped: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """By name, `(b, n)` each: what the transcript keeps of `tokens` int64 (b, n), drawn from softmax(shaped) float32 `(b, n, V)`, which are
    written once."""
    log_probs = shaped.gather(-1, tokens[..., None]).squeeze(-1) - shaped.logsumexp(dim=-1)
    entropy = torch.distributions.Categorical(logits=shaped, validate_args=False).entropy()
    zeros = torch.zeros_like(tokens)
    return dict(zip(SCORE_FIELDS, (log_probs, entropy, zeros, zeros), strict=True))


def decode_autoregressively(model, plan: Plan, prompt: Prompt, rows: Rows, transcript: Transcript, watchers: Sequence[Watcher]) -> None:
    """What "n times faster than autoregressive" is measured against."""
    rows = rows._replace(cache=dynamic_cache(model.config.get_text_config()))
    inputs, length = prompt.inputs, rows.real.shape[1]
    while not bool(transcript.ended.all()):
        hidden = rows.prefill(model, inputs, length, last_states=1)
        shaped, raw = next_logits(model, plan, rows, hidden)
        prediction = dense_prediction(shaped, rows.draws.at(rows.generated, 0), plan.rules.greedy)
        check_finite(prediction.bad, rows.places, rows.progress is not None)
        scores = token_scores(shaped, prediction.sample) if plan.execution.keep_scores else None
        tokens = transcript.add(rows, prediction.sample, (~transcript.ended).long(), scores, raw)
        rows, inputs, length = rows.commit(tokens, transcript.ended), {"input_ids": tokens}, 1


__all__ = ["decode_autoregressively", "next_logits", "token_scores"]
