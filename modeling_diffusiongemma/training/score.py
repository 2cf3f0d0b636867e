"""How likely a response is: exactly, under the causal pass, or by Monte Carlo, under the canvas pass."""

from typing import NamedTuple

import torch
from transformers import Cache, DynamicCache

from generation.arguments import FIELDS, integer, read
from generation.checks import check_images, check_mask, check_tensors
from generation.rules.noise import UniformNoise

from ..layers.checks import only_images
from .canvases import IGNORED, Canvases, check_labels, cut_canvases, training_view
from .loss import corrupt, noise_proportions
from .pieces import token_losses, turns
from .ranks import gathering_groups, largest, same_draws

MODES = ("diffusion", "autoregressive")
SAMPLES = 16


class Score(NamedTuple):
    """Of every row, each `(B,)`: `log_prob` float32, nats per response token; its `standard_error`, 0 where it is exact;
    `tokens` int64, how many tokens the response has; and, with `mode="autoregressive"`, `greedy` bool, whether every token is the
    causal pass's most probable one, which is what greedy autoregressive decoding would write."""

    log_prob: torch.Tensor
    standard_error: torch.Tensor
    tokens: torch.Tensor
    greedy: torch.Tensor | None = None


@torch.no_grad()
def score_responses(
    model,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    mode: str = "diffusion",
    samples: int | None = None,
    canvas_length: int | None = None,
    **images: torch.Tensor | None,
) -> Score:
    """Mean log-probability of the responses' tokens given their prompts.

    Args:
        input_ids, labels, attention_mask: whole examples, as the training loss takes them (`BlockDiffusionCollator` makes them).
        mode: `"autoregressive"`: the causal pass's next-token log-probabilities, exact. `"diffusion"`: the training objective's
            term without gradient and without the fill: `E[log p(clean token | canvas noised with t)]`, t uniform, every
            position weighted equally. Random numbers come from torch's global generator.
        samples: draws of t and of the noise, t stratified over them. Default: 16; by diffusion alone.
        canvas_length: default: the config's; by diffusion alone.
        images: as `prefill` takes them.

    Raises:
        ValueError: labels that are no response, an unknown mode, fewer than 2 samples, images that do not fit the tokens, what is no image:
            `position_ids` of packed rows, too.
    """
    only_images("score", images)
    if mode not in MODES:
        raise ValueError(f"`mode` is {mode!r}; expected one of {MODES}")
    samples = read("samples", samples, integer(2, 2**20))  # two at least, for a standard error
    canvas_length = read("canvas_length", canvas_length, FIELDS["canvas_length"])
    for name, value in {"samples": samples, "canvas_length": canvas_length}.items():
        if mode == "autoregressive" and value is not None:
            raise ValueError(f"`{name}` is {value}, and `mode` is 'autoregressive'; expected 'diffusion', which alone reads it")
    model.check_called("`score`")
    check_tensors(input_ids=input_ids, labels=labels)
    input_ids, labels = input_ids.long(), labels.long()
    check_images(input_ids, images.get("pixel_values"), model.config.image_token_id)
    check_mask("attention_mask", attention_mask, tuple(input_ids.shape))
    check_labels(input_ids, labels, attention_mask)
    same_draws(model)
    target = labels != IGNORED
    tokens = target.sum(dim=1)
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    prefilled = model.prefill(input_ids, real, cache=DynamicCache(), **images)
    if mode == "autoregressive":
        return by_tokens(model, prefilled.last_hidden_state, input_ids, target)
    length = canvas_length or model.config.canvas_length
    canvases = cut_canvases(input_ids, labels, length, model.config.text_config.pad_token_id)
    sums = by_draws(model, prefilled.cache, canvases, real, samples or SAMPLES)
    means = sums / tokens
    return Score(means.mean(dim=0), means.std(dim=0) / len(means) ** 0.5, tokens)


def by_tokens(model, hidden: torch.Tensor, input_ids: torch.Tensor, target: torch.Tensor) -> Score:
    """By the causal pass, of the tokens that `target` bool (B, L) marks; `hidden` `(B, L, D)`: its states."""
    rows, places = target[:, 1:].nonzero(as_tuple=True)  # of the response tokens, as they are predicted
    tokens = target.sum(dim=1)
    total = torch.zeros(input_ids.shape[0], dtype=torch.float32, device=input_ids.device)
    greedy = torch.ones_like(tokens, dtype=torch.bool)
    count = turns(model, len(rows), gathering_groups(model), input_ids.device)
    for row, place in zip(rows.tensor_split(count), places.tensor_split(count), strict=True):
        logits = model.compute_logits(hidden[row, place])  # (tokens of a turn, V)
        ids = input_ids[row, place + 1]
        total = total.index_add(0, row, -torch.nn.functional.cross_entropy(logits, ids, reduction="none"))
        greedy[row[logits.argmax(dim=-1) != ids]] = False
    return Score(total / tokens, torch.zeros_like(total), tokens, greedy)


def by_draws(model, cache: Cache, canvases: Canvases, real: torch.Tensor, samples: int) -> torch.Tensor:
    """By canvas passes over noised canvases behind the cached prompts: log-probabilities summed over the responses' tokens, float32
    (samples, B) nats. `real` bool (B, L): what is no padding."""
    (rows, most), device, groups = canvases.ids.shape[:2], real.device, gathering_groups(model)
    noise = UniformNoise(model.config.text_config.vocab_size)
    proportions = torch.stack([noise_proportions(samples, device) for _ in range(rows)], dim=1)  # (samples, B)
    sums = torch.zeros((samples, rows), dtype=torch.float32, device=device)
    for canvas_index in range(largest(most, groups, device)):
        clean = canvases.pick(torch.full((rows,), min(canvas_index, most - 1), dtype=torch.int64, device=device))
        counted = (clean.inside & clean.there[..., None]).squeeze(1) & (canvas_index < most)
        view = training_view(model, cache, clean, real)
        ids = clean.ids.squeeze(1)
        for sample in range(samples):
            noised = corrupt(ids, proportions[sample], noise)
            states = model.denoise(noised, view=view).last_hidden_state
            losses = token_losses(model, states.flatten(0, 1), ids.flatten(), groups).view_as(ids)
            sums[sample] -= losses.masked_fill(~counted, 0).sum(dim=1)
    return sums


__all__ = ["Score", "score_responses"]
