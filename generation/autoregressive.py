"""Two other ways to decode with the same weights: by the causal pass alone, and by drafts that the causal pass verifies."""

import torch
from transformers import DynamicCache

from .denoise import CanvasContext, denoise_canvas
from .draws import Draws
from .inputs import dynamic_cache
from .plan import Plan
from .statistics import check_finite, dense_statistics
from .written import SCORE_FIELDS, Written


def _next_logits(model, plan: Plan, written: Written, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shaped logits of the next token and the model's own, (b, 1, V). There is no schedule here: `temperature` means what it
    always does."""
    raw = model.compute_logits(hidden[:, -1:])
    return plan.shaping(raw, written.context, None, written.generated, plan.temperature, 1), raw


def decode_autoregressively(model, plan: Plan, written: Written, real: torch.Tensor, draws: Draws, prompt: dict) -> None:
    """One token a pass, by the causal pass: what "n times faster than autoregressive" is measured against.

    Args:
        prompt: what `prefill` takes for the prompt: `input_ids` or `inputs_embeds`, and images.
    """
    cache, inputs, length = dynamic_cache(model.config.get_text_config()), prompt, real.shape[1]
    while not bool(written.ended.all()) and not plan.out_of_time():
        positions = plan.positions(real, length)
        prefilled = model.prefill(**inputs, attention_mask=real, position_ids=positions, cache=cache, last_states=1)
        shaped, raw = _next_logits(model, plan, written, prefilled.last_hidden_state)
        statistics = dense_statistics(shaped, draws.at(written.generated, 0), plan.greedy)
        check_finite(statistics.bad, written.rows)
        zeros = torch.zeros_like(statistics.sample)
        scores = dict(zip(SCORE_FIELDS, (statistics.log_probs, statistics.entropy, zeros, zeros), strict=True))
        inputs, length = {"input_ids": written.add_tokens(statistics.sample, (~written.ended).long(), scores, raw)}, 1
        real = torch.cat((real, real.new_ones((real.shape[0], 1))), dim=1)


def decode_verified(model, plan: Plan, written: Written, real: torch.Tensor, draws: Draws, prompt: dict) -> None:
    """Drafts a canvas by diffusion and keeps its longest prefix that greedy autoregression would have written.

    The first token of every draft is replaced by the one the causal pass chose, so each round yields at least one token. The
    commit pass over the draft gives the causal pass's choice behind each of its tokens; the cache is cut back behind the
    last token kept. One row a call: rows keep different numbers of tokens.

    Speculative decoding with the model as its own draft: Leviathan et al. 2023 (arXiv 2211.17192), greedy case.

    Args:
        prompt: as in `decode_autoregressively`.
    """
    cache = DynamicCache()  # keeps every token, so that it can be cut back behind the sliding window
    positions = plan.positions(real, real.shape[1])
    prefilled = model.prefill(**prompt, attention_mask=real, position_ids=positions, cache=cache, last_states=1)
    shaped, before = _next_logits(model, plan, written, prefilled.last_hidden_state)
    chosen = shaped.argmax(dim=-1)  # (1, 1)
    one = written.passes.new_ones(1)
    passes, number = one, 0
    while not bool(written.ended.all()) and not plan.out_of_time():
        canvas_real = torch.cat((real, real.new_ones((1, plan.canvas_length))), dim=1)
        noise = draws.at(number, -1).noise(plan.noise, (1, plan.canvas_length), real.device)
        context = CanvasContext(cache, canvas_real, written.context, written.generated, number)
        state, _ = denoise_canvas(model, plan, noise, context, draws, written.streamer)
        draft = torch.cat((chosen, state.argmax[:, 1:]), dim=1)
        positions = plan.positions(canvas_real, draft.shape[1])
        committed = model.prefill(draft, attention_mask=canvas_real, position_ids=positions, cache=cache)
        raw = model.compute_logits(committed.last_hidden_state)  # (1, C, V), behind each token of the draft
        context_ids = torch.cat((written.context, chosen), dim=1)
        choices = plan.shaping(raw, context_ids, draft[:, 1:], written.generated + 1, plan.temperature, 1).argmax(dim=-1)
        agrees = (choices[:, :-1] == draft[:, 1:]).long().cumprod(dim=1)
        kept = 1 + int(agrees.sum())
        if kept < draft.shape[1]:
            cache.crop(-(draft.shape[1] - kept))
        logits = torch.cat((before, raw[:, : kept - 1]), dim=1) if plan.keep_logits else None
        written.add_tokens(draft[:, :kept], passes + state.passes, logits=logits)
        real, chosen, before, passes = canvas_real[:, : real.shape[1] + kept], choices[:, kept - 1 : kept], raw[:, kept - 1 : kept], one
        number += 1


__all__ = ["decode_autoregressively", "decode_verified"]
