"""The training objective: denoise a corrupted canvas, and predict the response causally.

For each row, one canvas of its response is chosen at random. A noise proportion t ~ U(1e-4, 1 - 1e-4) is drawn, each
canvas token is replaced by noise with probability t, and the loss is the plain cross-entropy of the clean tokens over
all canvas positions, the fill behind the response included. The canvas sees the prompt and the strictly earlier clean
canvases. In half of the rows a first canvas pass without gradient gives the self-conditioning of the second. The
next-token loss of the prompt pass on the response is added 1:1, which keeps that pass usable as an autoregressive model.
Source: google-deepmind/gemma `gemma/diffusion`, TRL's example for this model, NeMo AutoModel's block-causal mask.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from transformers import Cache, DynamicCache

from generation.checks import check_mask, check_shape
from generation.rules.noise import Noise, UniformNoise

from ..layers.outputs import PassOutput
from ..layers.view import View
from .ranks import gathering_groups

NOISE_MARGIN = 1e-4  # t stays this far from 0 and 1: google-deepmind/gemma
SELF_CONDITIONING_PROBABILITY = 0.5  # per row: the same source
IGNORED = -100  # transformers' label for "no target"


class CleanCanvas(NamedTuple):
    """One canvas per row, cut from the response: `ids` int64 (B, C), `start` int64 (B,), the index of its first token, and `inside`
    bool (B, C), False at the fill behind the response."""

    ids: torch.Tensor
    start: torch.Tensor
    inside: torch.Tensor


def check_labels(input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """`labels` must be `input_ids` on one unbroken response that ends the row's real tokens, and -100 elsewhere."""
    if labels.shape != input_ids.shape:
        raise ValueError(f"`labels` has shape {tuple(labels.shape)}; expected {tuple(input_ids.shape)}, the shape of `input_ids`")
    target = labels != IGNORED
    if not bool(target.any(dim=1).all()):
        rows = (~target.any(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"`labels` is -100 everywhere in rows {rows}; expected a response in every row")
    if bool((target[:, 1:].int().diff(dim=1, prepend=target[:, :1].int()) > 0).sum(dim=1).gt(1).any()):
        raise ValueError("`labels` holds several responses in a row; expected one unbroken run of targets")
    if bool(target[:, 0].any()):
        raise ValueError("`labels` begins with a target; expected at least one prompt token before the response")
    if bool((labels[target] != input_ids[target]).any()):
        raise ValueError("`labels` differs from `input_ids` at a target; expected equal ids there and -100 elsewhere")
    if attention_mask is not None:
        real = attention_mask.bool()
        if bool((target & ~real).any()) or bool((real[:, 1:] & target[:, :-1] & ~target[:, 1:]).any()):
            raise ValueError("`labels` and `attention_mask` disagree; expected the response to end where the real tokens end")


def canvases_in(labels: torch.Tensor, canvas_length: int) -> torch.Tensor:
    """How many canvases each row's response takes, int64 `(B,)`."""
    return ((labels != IGNORED).sum(dim=1) + canvas_length - 1) // canvas_length


def cut_canvas(input_ids: torch.Tensor, labels: torch.Tensor, canvas_index: torch.Tensor, canvas_length: int, fill: int) -> CleanCanvas:
    """Cuts canvas `canvas_index` (B,) out of each row's response; what lies behind the response is filled with `fill` (the pad token)."""
    if fill is None:
        raise ValueError("`pad_token_id` of the text config is None; expected the id that fills a canvas behind its response")
    target = labels != IGNORED
    begin, length = target.int().argmax(dim=1), target.sum(dim=1)  # (B,)
    start = begin + canvas_index * canvas_length
    index = start[:, None] + torch.arange(canvas_length, device=begin.device)  # (B, C)
    inside = index < (begin + length)[:, None]
    ids = input_ids.gather(1, index.clamp(max=input_ids.shape[1] - 1))
    return CleanCanvas(torch.where(inside, ids, fill), start, inside)


def choose_canvas(input_ids: torch.Tensor, labels: torch.Tensor, canvas_length: int, fill: int) -> CleanCanvas:
    """Cuts one canvas out of each row's response, all of its canvases being equally likely."""
    canvases = canvases_in(labels, canvas_length)
    chosen = (torch.rand(canvases.shape, dtype=torch.float32, device=canvases.device) * canvases).long().clamp(max=canvases - 1)
    return cut_canvas(input_ids, labels, chosen, canvas_length, fill)


def training_view(model, cache: Cache, clean: CleanCanvas, real: torch.Tensor) -> View:
    """The view by which a canvas sees the prompt and strictly earlier canvases of its row, and nothing clean of itself. `cache` holds the
    tokens of `real`, bool (B, L)."""
    before = real.cumsum(dim=1).gather(1, clean.start[:, None] - 1)  # (B, 1), real tokens before the canvas
    real = torch.cat((real, torch.ones_like(clean.ids, dtype=torch.bool)), dim=1)
    positions = before + torch.arange(clean.ids.shape[1], device=before.device)
    return model.prepare_canvas(cache, tuple(clean.ids.shape), real, positions, prefix_length=clean.start)


def noise_proportions(batch_size: int, device: torch.device) -> torch.Tensor:
    """t of each row, float32 `(B,)`, uniform in `[1e-4, 1 - 1e-4]`; stratified, so that a batch covers the whole range."""
    strata = torch.randperm(batch_size, device=device) + torch.rand(batch_size, dtype=torch.float32, device=device)
    return NOISE_MARGIN + (1 - 2 * NOISE_MARGIN) * strata / batch_size


def corrupt(clean: torch.Tensor, proportion: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Replaces each token of `clean` (B, C) by noise with its row's probability `proportion` (B,)."""
    noised = torch.rand(clean.shape, dtype=torch.float32, device=clean.device) < proportion[:, None]
    return torch.where(noised, noise.draw(clean.shape, clean.device), clean)


def balancing_loss(passes: Iterable[tuple[tuple[torch.Tensor, ...], torch.Tensor | None]], top_k: int) -> torch.Tensor:
    """How unequally experts are used, a scalar: `E * sum_e f_e * p_e` (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6), where f_e is
    how many of its `top_k` choices a token gives to expert e, and p_e its probability, both as means over all tokens of all layers, as
    transformers' mixture models take them. `top_k` where all experts are used equally, up to E; the gradient comes by p alone.

    Args:
        passes: of each pass the router logits, `(N, E)` a layer, and which of its tokens count, bool `(B, L)`, None: all. Passes share
            their routers, so a token counts the same in either.
    """
    sums = []  # of each pass and layer: tokens, their choices and their probabilities, each `(E,)`
    for router_logits, real in passes:
        for logits in router_logits:
            probabilities = logits.float().softmax(dim=-1)
            chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(top_k, dim=-1).indices, 1.0)
            three = torch.stack((torch.ones_like(chosen), chosen, probabilities))
            sums.append((three if real is None else three * real.reshape(-1, 1).to(probabilities)).sum(dim=1))
    tokens, chosen, probabilities = torch.stack([each.to(sums[0].device) for each in sums]).sum(dim=0)
    return (chosen / tokens * probabilities / tokens).sum() * len(tokens)


class TrainingLoss(NamedTuple):
    """`logits` float32 (B, C, V) of the canvas pass, the two losses (scalars, nats), what the prompt pass and the canvas pass put out, and
    the balancing loss (scalar) where it was asked for."""

    logits: torch.Tensor
    diffusion: torch.Tensor
    causal: torch.Tensor | None
    prefilled: PassOutput
    denoised: PassOutput
    balancing: torch.Tensor | None = None


def block_diffusion_loss(
    model,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    noise: Noise | None = None,
    self_conditioning_mask: torch.Tensor | None = None,
    causal: bool = True,
    canvas_length: int | None = None,
    noised: torch.Tensor | None = None,
    soft_embeds: torch.Tensor | None = None,
    output_router_logits: bool = False,
    **images: torch.Tensor,
) -> TrainingLoss:
    """Both losses on whole examples (prompt and response in one row).

    Args:
        model: `DiffusionGemmaForMaskedBlockLM`.
        input_ids (`int64 (B, P)`): prompt, response and, on either side, padding.
        labels (`int64 (B, P)`): the response's ids, -100 elsewhere.
        attention_mask (`(B, P)`, *optional*): 0 at padding.
        noise (*optional*): what corrupted tokens become. Default: uniform random ids.
        self_conditioning_mask (`bool (B,)`, *optional*): rows whose canvas is self-conditioned. Default: each with probability 0.5.
        causal: False leaves out the next-token loss, and the prompt pass over what no canvas of the batch can see.
        canvas_length: default: the config's. Narrower canvases train faster and generalise to wider ones trained late.
        noised (`int64 (B, C)`, *optional*): the canvases to learn from, such as a `Rollout`'s, instead of corrupted responses. They stand
            for whole responses, which must fit one canvas.
        soft_embeds (`(B, C, D)`, *optional*): self-conditioning of `noised`, instead of a first pass over it.
        output_router_logits: both passes' outputs hold router logits, and the balancing loss of both is made, padding left out.
        images: as `prefill` takes them.

    Raises:
        ValueError: masks, labels or canvases of the wrong shape, `soft_embeds` without `noised` or beside `self_conditioning_mask`, and
            `noised` where a response takes more than one canvas.
    """
    check_mask("attention_mask", attention_mask, tuple(input_ids.shape))
    check_shape("self_conditioning_mask", self_conditioning_mask, input_ids.shape[:1])
    check_labels(input_ids, labels, attention_mask)
    config, batch_size = model.config.text_config, input_ids.shape[0]
    canvas_length = model.config.canvas_length if canvas_length is None else canvas_length
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if noised is not None:
        check_shape("noised", noised, (batch_size, canvas_length))
        check_shape("soft_embeds", soft_embeds, (batch_size, canvas_length, config.hidden_size))
        if soft_embeds is not None and self_conditioning_mask is not None:
            raise ValueError("`soft_embeds` and `self_conditioning_mask` are both given; expected one of them")
        if int((labels != IGNORED).sum(dim=1).max()) > canvas_length:
            raise ValueError(
                f"`noised` is given, and `labels` holds a response longer than a canvas; expected at most {canvas_length} tokens"
            )
    elif soft_embeds is not None:
        raise ValueError("`soft_embeds` is given without `noised`; expected the canvas that it conditions")
    clean = choose_canvas(input_ids, labels, canvas_length, config.pad_token_id)
    if noised is None:
        noise = UniformNoise(config.vocab_size) if noise is None else noise
        noised = corrupt(clean.ids, noise_proportions(batch_size, clean.ids.device), noise)

    routing = {"output_router_logits": True} if output_router_logits else {}
    together = bool(gathering_groups(model))  # asked before a pass leaves weights gathered
    length = input_ids.shape[1] if causal else int(clean.start.max())
    prefilled = model.prefill(input_ids[:, :length], real[:, :length], cache=DynamicCache(), **images, **routing)
    causal_loss = None
    if causal:
        target = labels[:, 1:] != IGNORED
        next_logits = model.compute_logits(prefilled.last_hidden_state[:, :-1][target])
        causal_loss = torch.nn.functional.cross_entropy(next_logits, labels[:, 1:][target])

    view = training_view(model, prefilled.cache, clean, real[:, :length])
    if self_conditioning_mask is None and soft_embeds is None:
        chance = torch.rand(batch_size, dtype=torch.float32, device=noised.device)
        self_conditioning_mask = chance < SELF_CONDITIONING_PROBABILITY
    # Rows that are not conditioned get zeros, as without this pass: one process may save it, ranks of which others drew a row may not.
    if soft_embeds is None and (together or bool(self_conditioning_mask.any())):
        with torch.no_grad():
            first = model.compute_logits(model.denoise(noised, view=view).last_hidden_state)
            soft_embeds = model.soft_embed(first)
            soft_embeds = soft_embeds * self_conditioning_mask.to(soft_embeds)[:, None, None]
    denoised = model.denoise(noised, soft_embeds=soft_embeds, view=view, **routing)
    logits = model.compute_logits(denoised.last_hidden_state)  # (B, C, V)
    diffusion_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), clean.ids.flatten())
    balancing = None
    if output_router_logits:
        passes = ((prefilled.router_logits, real[:, :length]), (denoised.router_logits, None))
        balancing = balancing_loss(passes, config.top_k_experts)
    return TrainingLoss(logits, diffusion_loss, causal_loss, prefilled, denoised, balancing)


__all__ = [
    "CleanCanvas", "TrainingLoss", "balancing_loss", "block_diffusion_loss", "check_labels", "choose_canvas", "corrupt",
    "noise_proportions",
]  # fmt: skip
