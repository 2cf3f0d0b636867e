"""What new tokens see of a cache and of each other, and where they stand: made once a chunk of a prompt, and once a canvas.

The two passes differ in the rule by which they see (`masks`), in nothing else. `stack` is the `BlockStack` whose layers look: its
config, rotary tables, dtype and device count here, and none of its weights.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import Cache

from generation.checks import check_mask, check_shape, plain_mask

from .attention import implementation
from .caches import LayerCache, StoredLayers, cached_length
from .configuration import check_built
from .masks import canvas_mask, prompt_mask, slot_tokens


class View(NamedTuple):
    """What new tokens see, and where they stand. Holds for every denoising step of one canvas."""

    shape: tuple[int, int]  # (B, L), how many rows and new tokens
    masks: dict  # per layer type, in the form that its attention takes, or None
    rotary: dict[str, tuple[torch.Tensor, torch.Tensor]]  # per layer type, cos and sin, each `(B or 1, L, 1, head_dim)`
    cached: tuple[LayerCache | None, ...] | StoredLayers  # per layer, what is stored of the tokens before


def positions(real: torch.Tensor | None, seen: int, length: int, device: torch.device) -> torch.Tensor:
    """Positions of the last `length` of `seen + length` tokens: how many real tokens of the row come before each."""
    if real is None:
        return torch.arange(seen, seen + length, device=device)[None]
    return (real.cumsum(dim=1) - 1).clamp(min=0)[:, -length:].to(device)


def make_view(stack, cache: Cache, seen: int, shape, position_ids, dtype, rule: Callable, padded: bool, later=False, least=0) -> View:
    """The view by a `rule`: of the slots before the new tokens and the window of a layer, what is visible; None where no mask is needed.

    Sliding layers are read no further back than the window reaches. It counts real tokens: where rows are `padded` in a cache that
    keeps all, it may reach further back. The window of a canvas that stands before the last cached token (`later`) does too.
    """
    config, windows, masks = stack.config, [], {}
    if torch.jit.is_tracing():
        why = "it would keep for good which experts these tokens choose; expected `torch.export` or `torch.compile`"
        raise ValueError(f"the model is traced by `torch.jit.trace` (or an exporter that is built on it), and {why}")
    if len(stack.layers) != config.num_hidden_layers:
        held = f"the config says {config.num_hidden_layers} as `num_hidden_layers`, and the model has {len(stack.layers)} layers"
        raise ValueError(f"{held}; expected as many: all of a model's layers run, and one of fewer is built from a config of its own")
    if len(config.layer_types) != config.num_hidden_layers:
        held = f"`layer_types` in the config names {len(config.layer_types)} layers, and `num_hidden_layers` is {config.num_hidden_layers}"
        raise ValueError(f"{held}; expected as many")
    if not torch.compiler.is_compiling():
        check_built(config, stack.built)
    if seen and len(cache.layers) < config.num_hidden_layers and not torch.compiler.is_compiling():
        held = f"{seen} tokens in layers 0 to {len(cache.layers) - 1} and none behind them"
        raise ValueError(f"`cache` holds {held}; expected as many in every layer: all layers see the same tokens")
    for layer_idx, layer_type in enumerate(config.layer_types):
        forgets = layer_idx < len(cache.layers) and cache.layers[layer_idx].is_sliding
        narrow = layer_type == "sliding_attention" and not later and (forgets or not padded)
        windows.append(config.sliding_window - 1 if narrow else None)
    stored = StoredLayers(cache, seen, tuple(windows))
    slots = stored.laid_out(least)
    for layer_type in sorted(set(config.layer_types)):
        window = config.sliding_window if layer_type == "sliding_attention" else None
        visible = rule(slots[config.layer_types.index(layer_type)], window)
        masks[layer_type] = None if visible is None else implementation(config._attn_implementation).form(visible, *shape, dtype)
    return View(shape, masks, stack.rotary(position_ids, dtype), stored)


def prompt_view(stack, cache: Cache, seen: int, embeds: torch.Tensor, position_ids: torch.Tensor, real, images, documents=None) -> View:
    """What a prompt pass over `embeds` `(B, L, D)` sees behind `seen` cached tokens; `real`, `images` and `documents` as in
    `masks.prompt_mask`."""
    device, shape = embeds.device, tuple(embeds.shape[:2])
    query = torch.arange(seen, seen + shape[1], device=device)
    plain = seen == 0 and real is None and images is None and documents is None
    causal = plain and implementation(stack.config._attn_implementation).causal_without

    def rule(before, window):
        if causal and (window is None or shape[1] <= window):
            return None
        return prompt_mask(slot_tokens(before, seen, shape[1], device), query, window, real, images, documents)

    return make_view(stack, cache, seen, shape, position_ids.to(device), embeds.dtype, rule, real is not None)


def canvas_view(
    stack, cache: Cache, shape: tuple[int, int], attention_mask=None, position_ids=None, prefix_length=None, slots=0, documents=None
) -> View:
    """What a canvas of `shape` (B, C) sees, without room for it: every layer is read from the cache when it is its turn.
    Args as `DiffusionGemmaBlockModel.prepare_canvas`."""
    seen, (batch_size, length) = cached_length(cache), shape
    attention_mask = plain_mask("decoder_attention_mask", attention_mask)
    real = check_mask("decoder_attention_mask", attention_mask, (batch_size, seen + length))
    check_shape("decoder_position_ids", position_ids, (batch_size, length), (1, length))
    filled = next((layer for layer in cache.layers if layer.is_initialized), None)
    device = stack.norm.weight.device if filled is None else filled.device
    dtype = stack.embed_dtype if filled is None else filled.keys.dtype
    real = None if real is None else real.to(device)
    position_ids = positions(real, seen, length, device) if position_ids is None else position_ids.to(device)
    prefix = torch.full((1, 1), seen, dtype=torch.int64, device=device) if prefix_length is None else prefix_length.to(device)
    documents = None if documents is None else documents.to(device)
    everything = slots == 0 and real is None and prefix_length is None

    def rule(before, window):
        return None if everything else canvas_mask(slot_tokens(before, seen, length, device), length, prefix, window, real, documents)

    return make_view(stack, cache, seen, shape, position_ids, dtype, rule, real is not None, prefix_length is not None, slots)


__all__ = ["View", "canvas_view", "positions", "prompt_view"]
