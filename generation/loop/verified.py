"""Decoding by drafts of the canvas that the causal pass verifies: the text of greedy autoregression, in fewer passes."""

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from ..call.plan import Plan
from ..call.prompt import Prompt
from ..watch.watcher import Watcher
from .autoregressive import next_logits, token_scores
from .canvas import begin_canvas, denoise_canvas
from .rows import Rows
from .transcript import Transcript


def decode_verified(model, plan: Plan, prompt: Prompt, rows: Rows, transcript: Transcript, watchers: Sequence[Watcher]) -> None:
    """One row after the other, since rows keep different numbers of tokens."""
    for row in range(len(rows.places)):
        alone = rows.select(torch.tensor([row], dtype=torch.int64, device="cpu"))
        decode_row(model, plan, prompt.inputs_of(row), alone, transcript, watchers)


def decode_row(model, plan: Plan, inputs: dict[str, torch.Tensor], rows: Rows, transcript: Transcript, watchers: Sequence[Watcher]) -> None:
    """Drafts a canvas by diffusion and keeps its longest prefix that greedy autoregression would have written.

    The first token of every draft is replaced by the one the causal pass chose, so each round yields at least one token. The
    commit pass over the draft gives the causal pass's choice behind each of its tokens; the cache is cut back behind the
    last token kept.

    Speculative decoding with the model as its own draft: Leviathan et al. 2023 (arXiv 2211.17192), greedy case.
    """
    rows = rows._replace(cache=DynamicCache())  # which can be cut back behind the window
    hidden = rows.prefill(model, inputs, rows.real.shape[1], last_states=1)
    shaped, before = next_logits(model, plan, rows, hidden)
    chosen = shaped.argmax(dim=-1)  # (1, 1)
    passes, round_index = torch.ones_like(rows.places), 0
    while not bool(transcript.ended[rows.places]):
        state = begin_canvas(plan, rows, hidden, round_index)
        state = denoise_canvas(model, plan, rows, state, round_index, watchers)
        draft = torch.cat((chosen, state.argmax[:, 1:]), dim=1)
        drafted = rows.commit(draft)
        raw = model.compute_logits(drafted.prefill(model, {"input_ids": draft}, draft.shape[1]))  # (1, C, V), behind each
        behind = rows.commit(chosen)
        possible = raw if rows.progress is None else rows.progress.restrict_along(raw, draft, rows.left(plan) - 2)
        shapes = plan.rules.shaping(possible, behind.filters, behind.committed, draft[:, 1:], plan.rules.temperature, 1)
        choices = shapes.argmax(dim=-1)
        kept = 1 + int((choices[:, :-1] == draft[:, 1:]).long().cumprod(dim=1).sum())
        if kept < draft.shape[1]:
            rows.cache.crop(-(draft.shape[1] - kept))
        logits = torch.cat((before, raw[:, : kept - 1]), dim=1) if plan.execution.keep_logits else None
        scores = None
        if plan.execution.keep_scores:
            scores = token_scores(torch.cat((shaped, shapes[:, : kept - 1]), dim=1), draft[:, :kept])
        tokens = transcript.add(rows, draft[:, :kept], passes + state.passes, scores, logits)
        rows = rows.commit(tokens, transcript.ended[rows.places])
        chosen, before, shaped = (each[:, kept - 1 : kept] for each in (choices, raw, shapes))
        passes = torch.ones_like(passes)
        round_index += 1


__all__ = ["decode_verified"]
