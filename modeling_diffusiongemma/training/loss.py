"""The training objective: denoise corrupted canvases, and predict the responses causally.

All responses of a row are cut into canvases (`canvases`), which go through one canvas pass side by side (as in NeMo AutoModel; of each row
one at random, as google-deepmind/gemma does it, is there too). For each canvas a noise proportion t ~ U(1e-4, 1 - 1e-4) is drawn, each of
its tokens is replaced by noise with probability t, and the loss is the plain cross-entropy of the clean tokens over all canvas positions,
the fill behind a response included. A canvas sees what stands before it in its conversation: prompt, earlier turns and strictly earlier
canvases, clean. In half of the rows a first canvas pass without gradient gives the self-conditioning of the second. The next-token loss of
the prompt pass on the responses is added 1:1, which keeps that pass usable as an autoregressive model.
Sources: google-deepmind/gemma `gemma/diffusion`, TRL's example for this model, NeMo AutoModel's block-causal mask.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from transformers import DynamicCache

from generation.checks import check_mask, check_shape, check_tensors
from generation.rules.noise import Noise, UniformNoise

from ..layers.checks import only_images
from ..layers.outputs import PassOutput
from ..layers.view import View
from .canvases import IGNORED, check_labels, choose_canvases, conversations, cut_canvases, training_view
from .pieces import expected_embeddings, token_losses
from .ranks import check_gathering, gathering_groups, same_draws

NOISE_MARGIN = 1e-4  # t stays this far from 0 and 1: google-deepmind/gemma
SELF_CONDITIONING_PROBABILITY = 0.5  # per row: the same source


def noise_proportions(count: int, device: torch.device) -> torch.Tensor:
    """t of so many canvases, float32 `(count,)`, uniform in `[1e-4, 1 - 1e-4]`; stratified, so that a batch covers the whole range."""
    strata = torch.randperm(count, device=device) + torch.rand(count, dtype=torch.float32, device=device)
    return NOISE_MARGIN + (1 - 2 * NOISE_MARGIN) * strata / count


def corrupt(clean: torch.Tensor, proportion: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Replaces each token of `clean` (..., C) by noise with its canvas's probability `proportion` (...)."""
    noised = torch.rand(clean.shape, dtype=torch.float32, device=clean.device) < proportion[..., None]
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
    """What the objective puts out.

    Attributes:
        logits: float32 `(B, K * C, V)` of the canvas pass, K canvases a row side by side; None where they were not asked for.
        diffusion, causal: the two losses, scalars, nats; the second None where it was left out.
        prefilled, denoised: what the prompt pass and the canvas pass put out.
        canvas_losses: float32 `(canvases,)`, nats, the mean over each canvas, without gradient; row by row, those that are there.
        canvas_rows: int64 `(canvases,)`, which row of the batch each is of.
        noise_proportions: float32 `(canvases,)`, t of each; None where the canvases were given.
        balancing: the balancing loss, a scalar, where it was asked for.
    """

    logits: torch.Tensor | None
    diffusion: torch.Tensor
    causal: torch.Tensor | None
    prefilled: PassOutput
    denoised: PassOutput
    canvas_losses: torch.Tensor
    canvas_rows: torch.Tensor
    noise_proportions: torch.Tensor | None = None
    balancing: torch.Tensor | None = None


@torch.no_grad()
def first_guess(model, noised: torch.Tensor, view: View, rows: torch.Tensor | None, groups: list) -> torch.Tensor | None:
    """The soft embeddings `(B, K * C, D)` of a first canvas pass, zero but in `rows`, bool `(B,)`, each of them with probability 0.5 where
    None says; or None, which means zero, too."""
    if rows is None:
        rows = torch.rand(len(noised), dtype=torch.float32, device=noised.device) < SELF_CONDITIONING_PROBABILITY
    if not groups and not bool(rows.any()):  # one process may save the pass, ranks of which others drew a row may not
        return None
    soft_embeds = expected_embeddings(model, model.denoise(noised, view=view).last_hidden_state, groups)
    return soft_embeds * rows.to(soft_embeds)[:, None, None]


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
    canvases: str | torch.Tensor = "all",
    position_ids: torch.Tensor | None = None,
    keep_logits: bool = True,
    **images: torch.Tensor,
) -> TrainingLoss:
    """Both losses on whole examples (prompt and response in one row, or several conversations, or several turns).

    Args:
        model: `DiffusionGemmaForMaskedBlockLM`.
        input_ids (`int64 (B, P)`): prompts, responses and, on either side, padding.
        labels (`int64 (B, P)`): the responses' ids, -100 elsewhere.
        attention_mask (`(B, P)`, *optional*): 0 at padding.
        noise (*optional*): what corrupted tokens become. Default: uniform random ids.
        self_conditioning_mask (`bool (B,)`, *optional*): rows whose canvases are self-conditioned. Default: each with probability 0.5.
        causal: False leaves out the next-token loss, and the prompt pass over what no canvas of the batch can see.
        canvas_length: C; default: the config's. Narrower canvases train faster and generalise to wider ones trained late.
        noised (`int64 (B, K * C)`, *optional*): the canvases to learn from, such as a `Rollout`'s, instead of corrupted responses.
        soft_embeds (`(B, K * C, D)`, *optional*): self-conditioning of `noised`, instead of a first pass over it.
        output_router_logits: both passes' outputs hold router logits, and the balancing loss of both is made, padding left out.
        canvases: `"all"`, K being the most a row has; `"one"` of each row, at random; or `int64 (B,)`, which one of each row.
        position_ids (`int64 (B, P)`, *optional*): of packed rows, beginning at 0 again with each conversation.
        keep_logits: False keeps no logits: with a vocabulary of 262,144 those of 1,000 tokens are a gigabyte, and their gradients more.
        images: as `prefill` takes them.

    Raises:
        ValueError: masks, labels, positions or canvases of the wrong shape or kind, `soft_embeds` without `noised` or beside
            `self_conditioning_mask`; what is no image; weights that FSDP2 shards, with a torch before 2.13.
    """
    only_images("block_diffusion_loss", images)
    model.check_called("the training loss")
    check_tensors(input_ids=input_ids, labels=labels)
    input_ids, labels = input_ids.long(), labels.long()
    check_mask("attention_mask", attention_mask, tuple(input_ids.shape))
    check_shape("self_conditioning_mask", self_conditioning_mask, input_ids.shape[:1])
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    documents = conversations(position_ids, input_ids, real)
    check_labels(input_ids, labels, attention_mask, documents)
    groups = gathering_groups(model)  # asked before a pass leaves weights gathered
    if groups:
        check_gathering(model)
    same_draws(model)
    config = model.config.text_config
    canvas_length = model.config.canvas_length if canvas_length is None else canvas_length
    clean = choose_canvases(cut_canvases(input_ids, labels, canvas_length, config.pad_token_id), canvases)
    shape = clean.ids.flatten(1).shape  # (B, K * C)
    check_shape("noised", noised, tuple(shape))
    check_shape("soft_embeds", soft_embeds, (*shape, config.hidden_size))
    if soft_embeds is not None and noised is None:
        raise ValueError("`soft_embeds` is given without `noised`; expected the canvas that it conditions")
    if soft_embeds is not None and self_conditioning_mask is not None:
        raise ValueError("`soft_embeds` and `self_conditioning_mask` are both given; expected one of them")
    proportions = None
    if noised is None:
        proportions = noise_proportions(int(clean.there.sum()), clean.ids.device)
        spread = torch.zeros_like(clean.there, dtype=torch.float32).masked_scatter(clean.there, proportions)  # (B, K)
        noised = corrupt(clean.ids, spread, UniformNoise(config.vocab_size) if noise is None else noise).flatten(1)

    routing = {"output_router_logits": True} if output_router_logits else {}
    length = input_ids.shape[1] if causal else int(clean.start.max())
    places = {} if documents is None else {"position_ids": position_ids[:, :length], "documents": documents[:, :length]}
    prefilled = model.prefill(input_ids[:, :length], real[:, :length], cache=DynamicCache(), **places, **images, **routing)
    causal_loss = None
    if causal:
        target = labels[:, 1:] != IGNORED
        causal_loss = token_losses(model, prefilled.last_hidden_state[:, :-1][target], labels[:, 1:][target], groups).mean()

    view = training_view(model, prefilled.cache, clean, real[:, :length], places.get("documents"))
    if soft_embeds is None:
        soft_embeds = first_guess(model, noised, view, self_conditioning_mask, groups)
    denoised = model.denoise(noised, soft_embeds=soft_embeds, view=view, **routing)
    states = denoised.last_hidden_state
    logits = model.compute_logits(states) if keep_logits else None  # (B, K * C, V)
    there = clean.there.repeat_interleave(canvas_length, dim=1)
    target = clean.ids.flatten(1)[there]
    if logits is None:
        losses = token_losses(model, states[there], target, groups)
    else:
        losses = torch.nn.functional.cross_entropy(logits[there], target, reduction="none")
    balancing = None
    if output_router_logits:
        passes = ((prefilled.router_logits, real[:, :length]), (denoised.router_logits, there))
        balancing = balancing_loss(passes, config.top_k_experts)
    each = losses.detach().view(-1, canvas_length).mean(dim=1)
    rows_of = clean.there.nonzero()[:, 0]
    return TrainingLoss(logits, losses.mean(), causal_loss, prefilled, denoised, each, rows_of, proportions, balancing)


__all__ = ["TrainingLoss", "balancing_loss", "block_diffusion_loss", "corrupt", "noise_proportions"]
