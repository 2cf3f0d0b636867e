"""Checks of what a caller hands in: each raises a ValueError that names the argument, what it got and what it expects."""

from collections.abc import Iterable, Mapping

import torch
from transformers import Cache

from generation.arguments import ARGUMENTS, Kind, floats, integers, read, shown

TENSORS: dict[str, Kind] = {
    **{name: kind for name, kind in ARGUMENTS.items() if name.endswith("_ids") or name in ("inputs_embeds", "pixel_values")},
    **dict.fromkeys(("canvas_ids", "labels", "position_ids", "decoder_position_ids"), integers("(batch, length)", 2)),
    "soft_embeds": floats("(batch, length, hidden_size)", 3),
    "self_conditioning_logits": floats("(batch, length, vocab_size)", 3),
}


def check_tensors(**tensors: torch.Tensor | None) -> None:
    """Each must be a tensor of its kind: type and number of dimensions."""
    if not torch.compiler.is_compiling():
        for name, value in tensors.items():
            read(name, value, TENSORS[name])


def check_patches(config, input_ids: torch.Tensor | None, pixel_values: torch.Tensor | None, places: torch.Tensor | None) -> None:
    """Patches and their `image_position_ids` must fit the vision tower, and each other, and the image tokens among `input_ids`."""
    if (pixel_values is None) != (places is None):
        missing, given = ("pixel_values", "image_position_ids") if pixel_values is None else ("image_position_ids", "pixel_values")
        raise ValueError(f"`{missing}` is None and `{given}` is not; expected both, as the image processor makes them")
    if pixel_values is None or torch.compiler.is_compiling():
        return
    check_tensors(pixel_values=pixel_values, image_position_ids=places)
    vision = config.vision_config
    values, pooled = 3 * vision.patch_size**2, vision.pooling_kernel_size**2
    images, patches = pixel_values.shape[:2]
    if pixel_values.shape[2] != values or pixel_values.numel() == 0 or patches % pooled:
        raise ValueError(
            f"`pixel_values` has shape {tuple(pixel_values.shape)}; expected (images, patches, {values}), with a number of patches "
            f"that {pooled} divides"
        )
    check_shape("image_position_ids", places, (images, patches, 2))
    low, high = (int(value) for value in places.aminmax())
    # The tower averages patches in cells, which it counts off row by row.
    cells = places.clamp(min=0) // vision.pooling_kernel_size
    cells = cells[..., 0] + (places[..., :1].clamp(min=0).amax(dim=1) + 1) // vision.pooling_kernel_size * cells[..., 1]
    if low < -1 or high >= vision.position_embedding_size or int(cells.max()) >= patches // pooled:
        raise ValueError(
            f"`image_position_ids` holds places from {low} to {high}; expected from -1, padding, to {vision.position_embedding_size - 1}, "
            f"on a grid of at most {patches} patches"
        )
    if pooled > 1:
        seen = torch.zeros((images, patches // pooled), dtype=torch.int64, device=cells.device)
        soft = int(seen.scatter(1, cells, 1).sum())
        if input_ids is not None and (found := int((input_ids == config.image_token_id).sum())) != soft:
            raise ValueError(
                f"`input_ids` holds {found} image tokens (id {config.image_token_id}) and `pixel_values` gives {soft} soft tokens; "
                "expected as many image tokens as soft tokens"
            )


def plain_mask(name: str, mask: torch.Tensor | Mapping | None) -> torch.Tensor | None:
    """`mask`, or None for a mapping that holds None for every layer type, which is how transformers' class says that nothing is hidden."""
    if not isinstance(mask, Mapping):
        return mask
    if given := [layer_type for layer_type, value in mask.items() if value is not None]:
        raise ValueError(f"`{name}` holds a mask for {given}; expected one 2-D mask, from which every layer's is made, or None for each")
    return None


def check_mask(name: str, mask: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor | None:
    """Returns a 2-D mask as booleans, or None where it hides nothing. While a graph is traced a mask counts as one that hides something:
    what it holds is not known then."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or tuple(mask.shape) != tuple(shape):
        got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"`{name}` has shape {got}; expected {tuple(shape)}: one column a token, cached tokens included")
    if mask.dtype != torch.bool and not torch.compiler.is_compiling():
        read(name, mask, ARGUMENTS["attention_mask"])  # numbers other than 0 and 1 say neither
    mask = mask.bool()
    return mask if torch.compiler.is_compiling() or not bool(mask.all()) else None


def check_shape(name: str, tensor: torch.Tensor | None, *shapes: tuple[int, ...]) -> None:
    """`tensor`, where there is one, must have one of `shapes`."""
    if tensor is not None and (not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) not in shapes):
        got = f"has shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else f"is {shown(tensor)}"
        raise ValueError(f"`{name}` {got}; expected {' or '.join(map(str, dict.fromkeys(shapes)))}")


def chosen_states(chosen: bool | int | Iterable[int] | None, count: int) -> frozenset[int]:
    """Which of `count` hidden states `output_hidden_states` asks for: all, none, or those with the given indices, negative ones from the
    end, as in transformers.

    Raises:
        ValueError: what is no index of them.
    """
    if chosen is None or chosen is True or (isinstance(chosen, int) and not chosen):
        return frozenset(range(count) if chosen else ())
    indices = (chosen,) if isinstance(chosen, int) else tuple(chosen) if isinstance(chosen, Iterable) else (chosen,)
    if wrong := [index for index in indices if isinstance(index, bool) or not isinstance(index, int) or not -count <= index < count]:
        raise ValueError(f"`output_hidden_states` holds {wrong}; expected a bool, or indices from {-count} to {count - 1}")
    return frozenset(index % count for index in indices)


def check_cache(cache: Cache, batch_size: int, seen: int, length: int) -> None:
    """`cache`, which holds `seen` tokens, must hold rows for `batch_size` and have room for `length` more tokens; sliding layers
    always have room."""
    for layer in cache.layers:
        stored = getattr(layer, "keys", None)
        if stored is not None and stored.dim() == 4 and stored.shape[0] != batch_size:
            raise ValueError(f"`cache` holds {stored.shape[0]} rows; expected {batch_size}, the rows of the new tokens")
        limit = -1 if layer.is_sliding else layer.get_max_length()
        if 0 <= limit < seen + length:
            raise ValueError(
                f"`cache` holds {seen} of at most {limit} tokens and is to take {length} more; "
                "expected room for all of them: make it with a larger `max_cache_len`"
            )


def check_cached_shapes(cache: Cache, config) -> None:
    """What `cache` holds must be of a model with this text config."""
    if len(cache.layers) > config.num_hidden_layers:
        raise ValueError(f"`cache` has {len(cache.layers)} layers; expected at most {config.num_hidden_layers}, the model's")
    for layer_idx, layer in enumerate(cache.layers):
        keys, own = getattr(layer, "keys", None), config.per_layer_config[layer_idx]
        if keys is None or keys.dim() != 4:
            continue
        found, expected = (keys.shape[1], keys.shape[3]), (own.num_key_value_heads, own.head_dim)
        if found != expected:
            raise ValueError(f"`cache` holds {found[0]} heads of {found[1]} in layer {layer_idx}; expected {expected[0]} of {expected[1]}")


__all__ = [
    "check_cache", "check_cached_shapes", "check_mask", "check_patches", "check_shape", "check_tensors", "chosen_states", "plain_mask",
]  # fmt: skip
