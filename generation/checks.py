"""Checks of what a caller hands in: each raises a ValueError that names the argument, what it got and what it expects.

Of both packages: what `generate` asks of a prompt, and what a model asks of a pass. Knows no model's config.
"""

from collections.abc import Iterable, Mapping

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from transformers import Cache

from .arguments import ARGUMENTS, Kind, floats, integers, read, shown
from .rules.prediction import narrowed

TENSORS: dict[str, Kind] = {
    **{name: kind for name, kind in ARGUMENTS.items() if name.endswith("_ids") or name in ("inputs_embeds", "pixel_values")},
    **dict.fromkeys(("canvas_ids", "labels", "position_ids", "decoder_position_ids"), integers("(batch, length)", 2)),
    "soft_embeds": floats("(batch, length, hidden_size)", 3),
    "self_conditioning_logits": floats("(batch, length, vocab_size), or (length, vocab_size) for every row", 2, 3),
}


def readable(*tensors: torch.Tensor | None) -> bool:
    """Whether the numbers that tensors hold can be read: not while a graph is traced, of fake tensors and those on `meta`, or inside
    the transforms of `torch.func`."""
    if torch.compiler.is_compiling() or get_proxy_mode() is not None:
        return False
    given = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return not any(each.is_meta or isinstance(each, FakeTensor) or is_functorch_wrapped_tensor(each) for each in given)


def check_tensors(**tensors: torch.Tensor | None) -> None:
    """Each must be a tensor of its kind: type and number of dimensions."""
    if not torch.compiler.is_compiling():
        for name, value in tensors.items():
            read(name, value, TENSORS[name])


def check_ids(name: str, ids: torch.Tensor, vocab_size: int) -> None:
    """`ids` must be integers `(B, L)` in `[0, vocab_size)`. The range is read back from the device, so not in a hot loop."""
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"`{name}` is {shown(ids)}; expected ids of shape (batch, length), int64 or int32")
    if ids.numel() == 0 or not readable(ids):
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"`{name}` holds ids from {low} to {high}; expected ids from 0 to {vocab_size - 1} (vocab_size - 1)")


def check_shape(name: str, tensor: torch.Tensor | None, *shapes: tuple[int, ...]) -> None:
    """`tensor`, where there is one, must have one of `shapes`."""
    if tensor is not None and (not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) not in shapes):
        got = f"has shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else f"is {shown(tensor)}"
        raise ValueError(f"`{name}` {got}; expected {' or '.join(map(str, dict.fromkeys(shapes)))}")


def plain_mask(name: str, mask: torch.Tensor | Mapping | None) -> torch.Tensor | None:
    """`mask`, or None for a mapping that holds None for every layer type, which is how transformers' class says that nothing is hidden."""
    if not isinstance(mask, Mapping):
        return mask
    if given := [layer_type for layer_type, value in mask.items() if value is not None]:
        raise ValueError(f"`{name}` holds a mask for {given}; expected one 2-D mask, from which every layer's is made, or None for each")
    return None


def check_mask(name: str, mask: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor | None:
    """Returns a 2-D mask as booleans, or None where it hides nothing. One that is not `readable` counts as one that hides something."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or tuple(mask.shape) != tuple(shape):
        got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"`{name}` has shape {got}; expected {tuple(shape)}: one column a token, cached tokens included")
    if mask.dtype != torch.bool and readable(mask):
        read(name, mask, ARGUMENTS["attention_mask"])  # numbers other than 0 and 1 say neither
    mask = mask.bool()
    return mask if not readable(mask) or not bool(mask.all()) else None


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


def check_prompt(name: str, prompt: torch.Tensor, attention_mask: torch.Tensor | None, seen: int) -> torch.Tensor:
    """Checks a prompt, ids `(B, P)` or embeddings `(B, P, D)`, and its padding. Returns the mask over cached and new tokens, bool
    `(B, seen + P)`."""
    shape = (prompt.shape[0], seen + prompt.shape[1])
    if prompt.numel() == 0:
        raise ValueError(f"the prompt is empty: `{name}` has shape {tuple(prompt.shape)}; expected at least one token")
    if attention_mask is None:
        return torch.ones(shape, dtype=torch.bool, device=prompt.device)
    if tuple(attention_mask.shape) != shape:
        got = tuple(attention_mask.shape)
        raise ValueError(f"`attention_mask` has shape {got}; expected a tensor of shape {shape}, cached tokens included")
    real = attention_mask.to(prompt.device).bool()
    if not bool(real[:, -1].all()):
        raise ValueError("`attention_mask` ends in padding; expected padding on the left (`tokenizer.padding_side = 'left'`)")
    return real


def check_images(input_ids: torch.Tensor | None, pixel_values: torch.Tensor | None, image_token_id: int | None) -> None:
    """Raises ValueError for image tokens in a prompt that comes without its images. Reads values back, where they are `readable`."""
    if input_ids is None or pixel_values is not None or image_token_id is None or not readable(input_ids):
        return
    if bool((input_ids == image_token_id).any()):
        raise ValueError(
            f"`input_ids` holds image tokens (id {image_token_id}) but `pixel_values` is None; "
            "expected the images: let the processor return a dict and pass all of it"
        )


def split_canvases(given: torch.Tensor, shape: tuple[int, int], vocab_size: int) -> tuple[torch.Tensor, ...]:
    """A caller's first canvases, each of `shape` (B, C), which must be ids of the vocabulary, one or several canvases a row."""
    check_ids("decoder_input_ids", given, vocab_size)
    rows, length = shape
    if len(given) != rows or not given.shape[1] or given.shape[1] % length:
        raise ValueError(
            f"`decoder_input_ids` has shape {tuple(given.shape)}; expected {shape}, one canvas a row, or several canvases of this length"
        )
    return given.split(length, dim=1)


def embed_conditioning(model, logits: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """The soft embeddings `(B, C, D)` of `self_conditioning_logits`, of `shape` (B, C, V), or `(C, V)` for every row; rounded first, as
    those of a step are.

    Raises:
        ValueError: another shape, or logits that say nothing of a position.
    """
    check_shape("self_conditioning_logits", logits, shape, shape[1:])
    soft_embeds = model.soft_embed(narrowed(logits if logits.dim() == 3 else logits[None], model.dtype))
    if bool(soft_embeds.isnan().any()):
        raise ValueError("`self_conditioning_logits` holds NaN, inf, or -inf for every id of a position; expected finite logits")
    return soft_embeds.expand(shape[0], -1, -1)


__all__ = [
    "check_cache", "check_ids", "check_images", "check_mask", "check_prompt", "check_shape",
    "check_tensors", "chosen_states", "embed_conditioning", "plain_mask", "readable",
]  # fmt: skip
