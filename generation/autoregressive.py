"""Two other ways to decode with the same weights: by the causal pass alone, and by drafts that the causal pass verifies."""

import torch
from transformers import DynamicCache

from .denoise import CanvasContext, denoise_canvas
from .draws import Draws
from .plan import Plan
from .statistics import check_finite, dense_statistics
from .written import SCORE_FIELDS, Written


def _next_logits(model, plan: Plan, written: Written, hidden: torch.Tensor) -> torch.Tensor:
    """Shaped logits of the next token, (b, 1, V). There is no schedule here: `temperature` means what it always does."""
    return plan.shaping(model.compute_logits(hidden[:, -1:]), written.context, None, written.generated, plan.temperature, 1)


def decode_autoregressively(model, plan: Plan, written: Written, real: torch.Tensor, draws: Draws, images: dict) -> None:
    """One token a pass, by the causal pass: what "n times faster than autoregressive" is measured against."""
    cache = DynamicCache(config=model.config.get_text_config())
    pending = written.prompt
    while not bool(written.ended.all()) and not plan.out_of_time():
        positions = plan.positions(real, pending.shape[1])
        hidden = model.prefill(pending, attention_mask=real, position_ids=positions, past_key_values=cache, **images).last_hidden_state
        images = {}
        statistics = dense_statistics(_next_logits(model, plan, written, hidden), draws, plan.greedy)
        check_finite(statistics.bad)
        zeros = torch.zeros_like(statistics.sample)
        scores = dict(zip(SCORE_FIELDS, (statistics.log_probs, statistics.entropy, zeros, zeros), strict=True))
        pending = written.add_tokens(statistics.sample, (~written.ended).long(), scores)
        real = torch.cat((real, real.new_ones((real.shape[0], 1))), dim=1)


def decode_verified(model, plan: Plan, written: Written, real: torch.Tensor, draws: Draws, images: dict) -> None:
    """Drafts a canvas by diffusion and keeps its longest prefix that greedy autoregression would have written.

    The first token of every draft is replaced by the one the causal pass chose, so each round yields at least one token. The
    commit pass over the draft gives the causal pass's choice behind each of its tokens; the cache is cut back behind the
    last token kept. One row at a time: rows keep different numbers of tokens.

    Speculative decoding with the model as its own draft: Leviathan et al. 2023 (arXiv 2211.17192), greedy case.
    """
    if written.prompt.shape[0] != 1:
        raise ValueError(f"`decoding='verified'` got {written.prompt.shape[0]} rows; expected one prompt a call")
    cache = DynamicCache()  # keeps every token, so that it can be cut back behind the sliding window
    positions = plan.positions(real, real.shape[1])
    prefilled = model.prefill(written.prompt, attention_mask=real, position_ids=positions, past_key_values=cache, **images)
    chosen = _next_logits(model, plan, written, prefilled.last_hidden_state).argmax(dim=-1)  # (1, 1)
    one = written.passes.new_ones(1)
    passes = one
    while not bool(written.ended.all()) and not plan.out_of_time():
        canvas_real = torch.cat((real, real.new_ones((1, plan.canvas_length))), dim=1)
        noise = draws.noise(plan.noise, (1, plan.canvas_length), real.device)
        context = CanvasContext(cache, canvas_real, written.context, written.generated)
        state = denoise_canvas(model, plan, noise, context, draws, written.streamer)
        draft = torch.cat((chosen, state.argmax[:, 1:]), dim=1)
        positions = plan.positions(canvas_real, draft.shape[1])
        committed = model.prefill(draft, attention_mask=canvas_real, position_ids=positions, past_key_values=cache)
        logits = model.compute_logits(committed.last_hidden_state)  # (1, C, V), behind each token of the draft
        context_ids = torch.cat((written.context, chosen), dim=1)
        choices = plan.shaping(logits, context_ids, draft[:, 1:], written.generated + 1, plan.temperature, 1).argmax(dim=-1)
        agrees = (choices[:, :-1] == draft[:, 1:]).long().cumprod(dim=1)
        kept = 1 + int(agrees.sum())
        if kept < draft.shape[1]:
            cache.crop(-(draft.shape[1] - kept))
        written.add_tokens(draft[:, :kept], passes + state.passes)
        real, chosen, passes = canvas_real[:, : real.shape[1] + kept], choices[:, kept - 1 : kept], one


__all__ = ["decode_autoregressively", "decode_verified"]
