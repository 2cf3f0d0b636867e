"""Checks of what a caller hands in: each raises a ValueError that names the argument, what it got and what it expects."""

from collections.abc import Iterable, Mapping

import torch
from transformers import Cache


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
    mask = mask.bool()
    return mask if torch.compiler.is_compiling() or not bool(mask.all()) else None


def check_shape(name: str, tensor: torch.Tensor | None, *shapes: tuple[int, ...]) -> None:
    """`tensor`, where there is one, must have one of `shapes`."""
    if tensor is not None and tuple(tensor.shape) not in shapes:
        raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}; expected {' or '.join(map(str, dict.fromkeys(shapes)))}")


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


__all__ = ["check_cache", "check_mask", "check_shape", "chosen_states", "plain_mask"]
