"""What the two model classes and their passes return."""

from dataclasses import dataclass

import torch
from transformers import Cache

from generation.cache_names import CacheOutput, cache_output


@cache_output
class PassOutput(CacheOutput):
    """Output of `prefill` and `denoise`: `last_hidden_state` `(B, L, D)`, the normed output of the pass; the prompt's cache; and on request
    `hidden_states`, `attentions` and `router_logits` of every layer, as in `BlockModelOutput`."""

    last_hidden_state: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class BlockModelOutput(PassOutput):
    """Output of `DiffusionGemmaBlockModel`.

    Args:
        last_hidden_state, cache: of the canvas pass, as in `PassOutput`.
        hidden_states (*optional*): `num_hidden_layers + 1` tensors `(B, C, D)` of the canvas pass; None for those not asked for.
        attentions (*optional*): `num_hidden_layers` tensors `(B, H, C, slots + C)` of the canvas pass, eager attention.
        router_logits (*optional*): `num_hidden_layers` tensors float32 `(B * C, E)` of the canvas pass: log-probabilities of the experts,
            logits whose softmax is what the routers choose by. (transformers' class gives the probabilities themselves by this name.)
        encoder_last_hidden_state (`(B, P, D)`, *optional*): normed output of the prompt pass, if there was one.
        encoder_router_logits (*optional*): `num_hidden_layers` tensors float32 `(B * P, E)`, `router_logits` of the prompt pass.
    """

    encoder_last_hidden_state: torch.Tensor | None = None
    encoder_router_logits: tuple[torch.Tensor, ...] | None = None


@cache_output
class MaskedBlockOutput(CacheOutput):
    """Output of `DiffusionGemmaForMaskedBlockLM`.

    Args:
        loss (scalar float32, *optional*): nats; `diffusion_loss + causal_loss`, or the former alone where a canvas was given; with router
            logits `router_aux_loss_coef * aux_loss` on top.
        logits (`float32 (B, C, V)`, *optional*): of the canvas pass, soft-capped.
        cache: the prompt's cache.
        hidden_states, attentions, encoder_last_hidden_state, router_logits, encoder_router_logits: as in `BlockModelOutput`.
        diffusion_loss (scalar float32, *optional*): nats, mean cross-entropy over every canvas position.
        causal_loss (scalar float32, *optional*): nats, mean next-token cross-entropy of the prompt pass over the response.
        aux_loss (scalar float32, *optional*): `loss.balancing_loss` of both passes' router logits, padding left out; `top_k_experts` where
            experts are used equally, more where choices and probability gather on the same ones.
        canvas_losses, noise_proportions (float32 `(canvases,)`, *optional*), canvas_rows (`int64 (canvases,)`, *optional*): of the training
            objective, as in `loss.TrainingLoss`; in training alone.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    diffusion_loss: torch.Tensor | None = None
    causal_loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    encoder_router_logits: tuple[torch.Tensor, ...] | None = None
    canvas_losses: torch.Tensor | None = None
    canvas_rows: torch.Tensor | None = None
    noise_proportions: torch.Tensor | None = None


__all__ = ["BlockModelOutput", "MaskedBlockOutput", "PassOutput"]
