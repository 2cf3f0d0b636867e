"""One stack of layers, called two ways: over the prompt, causally and with a cache to append to, and over the canvas.

The layers append nothing to the cache; the stack does so after each layer of a prompt pass. With gradients a layer is therefore a pure
function of tensors, which is what gradient checkpointing wants; without, it writes into the free slots that `caches.join` finds.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import Cache, DiffusionGemmaTextConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from generation.checks import chosen_states

from ..layers.attention import Attention
from ..layers.caches import LayerCache
from ..layers.checks import check_outputs
from ..layers.configuration import built_from
from ..layers.experts import Experts, Router
from ..layers.layers import GatedMLP, RMSNorm, RotaryPositions, ScaledEmbedding, SelfConditioning
from ..layers.view import View
from .pretrained import DiffusionGemmaBlockPreTrainedModel

LAYER_OUTPUTS = ("states", "keys and values", "attention weights", "the router's probabilities")


class BlockLayer(GradientCheckpointingLayer):
    """Attention, then a dense gated MLP and a mixture of experts side by side.

    The router reads the raw residual; both branches have their own norm before and after; the sum is normed again,
    added to the residual and multiplied by `layer_scalar`, the one value that the two passes hold apart.
    """

    def __init__(self, config: DiffusionGemmaTextConfig, layer_idx: int):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.layer_idx = layer_idx
        self.self_attn = Attention(config, layer_idx)
        self.mlp = GatedMLP(config)
        self.router = Router(config)
        self.experts = Experts(config)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.pre_feedforward_layernorm = RMSNorm(size, eps)
        self.post_feedforward_layernorm_1 = RMSNorm(size, eps)
        self.pre_feedforward_layernorm_2 = RMSNorm(size, eps)
        self.post_feedforward_layernorm_2 = RMSNorm(size, eps)
        self.post_feedforward_layernorm = RMSNorm(size, eps)
        self.layer_scalar = nn.Buffer(torch.ones(1))  # the canvas pass's

    def forward(
        self, hidden_states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], mask, cached: LayerCache | None, is_causal: bool,
        layer_scalar: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, LayerCache, torch.Tensor | None, torch.Tensor]:  # fmt: skip
        """Args and Returns as `Attention.forward`, for the whole layer, and the router's probabilities, float32 `(N, E)`. `layer_scalar`
        is the prompt pass's, None in the canvas pass."""
        attended = self.self_attn(self.input_layernorm(hidden_states), rotary, mask=mask, cached=cached, is_causal=is_causal)
        attended, new, weights = check_outputs(attended, "self_attn", ("states", "keys and values", "weights"))
        hidden_states = hidden_states + self.post_attention_layernorm(attended)

        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(hidden_states)))
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (N, D)
        probabilities, shares, chosen = check_outputs(self.router(tokens), "router", ("probabilities", "weights", "ids"))
        routed = self.experts(self.pre_feedforward_layernorm_2(tokens), chosen, shares)
        routed = self.post_feedforward_layernorm_2(routed.view_as(hidden_states))
        hidden_states = hidden_states + self.post_feedforward_layernorm(dense + routed)
        layer_scalar = self.layer_scalar if layer_scalar is None else layer_scalar
        # A buffer stays in the weights' dtype where a policy of mixed precision runs the layer in another.
        return hidden_states * layer_scalar.to(hidden_states), new, weights, probabilities


class PromptLayer(nn.Module):
    """Where the prompt pass enters a layer of the stack: a hook here sees what goes in and comes out in that pass alone. Holds the pass's
    `layer_scalar`. Published checkpoints hold the canvas pass's value; never assume it."""

    def __init__(self):
        super().__init__()
        self.layer_scalar = nn.Buffer(torch.ones(1))

    def forward(self, hidden_states: torch.Tensor, run: Callable[..., tuple]) -> tuple:
        """`run`: the layer, with all but the first and the last argument of `BlockLayer.forward`, whose outputs these are."""
        return run(hidden_states, layer_scalar=self.layer_scalar)


class BlockStack(DiffusionGemmaBlockPreTrainedModel):
    """Embedding, self-conditioning, layers, last norm. A `PreTrainedModel` of its own, so that transformers finds the text
    config's attention and experts implementations where it looks for them."""

    config: DiffusionGemmaTextConfig
    config_class = DiffusionGemmaTextConfig
    input_modalities = ("text",)

    def __init__(self, config: DiffusionGemmaTextConfig):
        super().__init__(config)
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.self_conditioning = SelfConditioning(config)
        self.layers = nn.ModuleList(BlockLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryPositions(config)
        self.built = built_from(config)
        self.post_init()

    @property
    def embed_dtype(self) -> torch.dtype:
        """Of the hidden states: also where the other weights are quantized, and whatever wraps the embedding."""
        return next(self.embed_tokens.parameters(), self.norm.weight).dtype

    def forward(
        self,
        hidden_states: torch.Tensor,
        view: View,
        entry: Callable[[int], PromptLayer] | None = None,
        cache: Cache | None = None,
        keep_states: bool | int | list[int] | None = False,
        keep_weights: bool = False,
        keep_routing: bool = False,
    ) -> tuple[torch.Tensor, tuple | None, tuple[torch.Tensor, ...] | None, tuple[torch.Tensor, ...] | None]:
        """Runs the layers over the embeddings `(B, L, D)` of new tokens, which see the `view`.

        Args:
            entry: gives what a layer is entered through, by its index; None: they are called directly. (No list of modules, whose weights
                Accelerate would move as it moves any argument.)
            cache: the new keys and values are appended to it; given for the prompt pass, which is causal, and for it alone.
            keep_states, keep_weights, keep_routing: whether to return what every layer put out; or which of the states, by index.

        Returns:
            The normed output `(B, L, D)`; the layers' inputs and the normed output, None for those not asked for, or None; attention
            weights, or None; the routers' log-probabilities, float32 `(B * L, E)` each, or None.
        """
        states, all_weights, routing = [], [], []
        chosen = chosen_states(keep_states, len(self.layers) + 1)
        for layer_idx, (layer, layer_type, cached) in enumerate(zip(self.layers, self.config.layer_types, view.cached, strict=True)):
            states.append(hidden_states if layer_idx in chosen else None)
            seen = {"rotary": view.rotary[layer_type], "mask": view.masks[layer_type], "cached": cached, "is_causal": cache is not None}
            outputs = layer(hidden_states, **seen) if entry is None else entry(layer_idx)(hidden_states, partial(layer, **seen))
            hidden_states, new, weights, probabilities = check_outputs(outputs, f"layers[{layer_idx}]", LAYER_OUTPUTS)
            if cache is not None:
                cache.update(new.keys, new.values, layer_idx)
            if keep_weights:
                all_weights.append(weights)
            if keep_routing:  # a probability that vanishes has a logarithm, and no gradient
                routing.append(probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log())
        hidden_states = self.norm(hidden_states)
        return (
            hidden_states,
            (*states, hidden_states if len(self.layers) in chosen else None) if chosen else None,
            tuple(all_weights) if keep_weights else None,
            tuple(routing) if keep_routing else None,
        )


__all__ = ["BlockLayer", "BlockStack", "PromptLayer"]
