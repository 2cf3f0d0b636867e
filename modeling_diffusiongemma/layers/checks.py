"""Checks that need the model's config: of images, and of what a cache holds; and of the names of arguments. As in `generation.checks`, each
raises a ValueError that names the argument, what it got and what it expects."""

import functools
import inspect
from collections.abc import Callable, Iterable

import torch
from transformers import Cache

from generation.arguments import unknown
from generation.call.prompt import IMAGES
from generation.checks import check_shape, check_tensors, readable


def refuses_unknown(function: Callable) -> Callable:
    """Has a function name the arguments that it does not know, with the one that was perhaps meant."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def refusing(*args, **kwargs):
        if strange := [name for name in kwargs if name not in known]:
            raise ValueError(f"`{function.__name__}` got the unknown arguments {unknown(strange, known)}; expected some of {known}")
        return function(*args, **kwargs)

    return refusing


def only_images(caller: str, given: Iterable[str]) -> None:
    """Raises ValueError for further arguments of `caller` that are no images: it hands them on to a prompt pass."""
    if strange := sorted(set(given).difference(IMAGES)):
        packed = "; rows are read one conversation each, and not packed" if "position_ids" in strange else ""
        raise ValueError(f"`{caller}` got the arguments {strange}; expected none beside its own but {list(IMAGES)}{packed}")


def check_patches(config, input_ids: torch.Tensor | None, pixel_values: torch.Tensor | None, places: torch.Tensor | None) -> None:
    """Patches and their `image_position_ids` must fit the vision tower, and each other, and the image tokens among `input_ids`."""
    if (pixel_values is None) != (places is None):
        missing, given = ("pixel_values", "image_position_ids") if pixel_values is None else ("image_position_ids", "pixel_values")
        raise ValueError(f"`{missing}` is None and `{given}` is not; expected both, as the image processor makes them")
    if pixel_values is not None and input_ids is None:
        raise ValueError("`pixel_values` needs `input_ids`, which say where the images stand; got `inputs_embeds`")
    if pixel_values is None or not readable(input_ids, pixel_values, places):
        return
    check_tensors(pixel_values=pixel_values, image_position_ids=places)
    vision = config.vision_config
    values, pooled = 3 * vision.patch_size**2, vision.pooling_kernel_size**2
    images, patches = pixel_values.shape[:2]
    if pixel_values.shape[2] != values or pixel_values.numel() == 0 or patches % pooled:
        expected = f"(images, patches, {values}), with a number of patches that {pooled} divides"
        raise ValueError(f"`pixel_values` has shape {tuple(pixel_values.shape)}; expected {expected}")
    check_shape("image_position_ids", places, (images, patches, 2))
    low, high = (int(value) for value in places.aminmax())
    # The tower averages patches in cells, which it counts off row by row.
    cells = places.clamp(min=0) // vision.pooling_kernel_size
    cells = cells[..., 0] + (places[..., :1].clamp(min=0).amax(dim=1) + 1) // vision.pooling_kernel_size * cells[..., 1]
    if low < -1 or high >= vision.position_embedding_size or int(cells.max()) >= patches // pooled:
        expected = f"from -1, padding, to {vision.position_embedding_size - 1}, on a grid of at most {patches} patches"
        raise ValueError(f"`image_position_ids` holds places from {low} to {high}; expected {expected}")
    if pooled > 1:
        seen = torch.zeros((images, patches // pooled), dtype=torch.int64, device=cells.device)
        soft = int(seen.scatter(1, cells, 1).sum())
        if (found := int((input_ids == config.image_token_id).sum())) != soft:
            got = f"`input_ids` holds {found} image tokens (id {config.image_token_id}) and `pixel_values` gives {soft} soft tokens"
            raise ValueError(f"{got}; expected as many image tokens as soft tokens")


def check_outputs(outputs, module: str, expected: tuple[str, ...]):
    """The `outputs` of a `module` that gives a tuple, so many as `expected` names; ValueError for anything else that a hook or another
    `forward` made of them: a tensor would be taken for its rows."""
    if not isinstance(outputs, tuple | list) or len(outputs) != len(expected):
        got = f"{type(outputs).__name__} of {len(outputs)}" if isinstance(outputs, tuple | list) else type(outputs).__name__
        how = "a hook or `forward` that changes the first returns `(changed, *output[1:])`"
        raise ValueError(f"`{module}` gives a {got}; expected a tuple of {len(expected)} ({', '.join(expected)}): {how}")
    return outputs


def check_cached_shapes(cache: Cache, config) -> None:
    """What `cache` holds must be of a model with this text config."""
    if len(cache.layers) > config.num_hidden_layers:
        raise ValueError(f"`cache` has {len(cache.layers)} layers; expected at most {config.num_hidden_layers}, the model's")
    for layer_idx, layer in enumerate(cache.layers):
        keys, sizes = getattr(layer, "keys", None), config.per_layer_config[layer_idx]
        if keys is None or keys.dim() != 4:
            continue
        found, expected = (keys.shape[1], keys.shape[3]), (sizes.num_key_value_heads, sizes.head_dim)
        if found != expected:
            raise ValueError(f"`cache` holds {found[0]} heads of {found[1]} in layer {layer_idx}; expected {expected[0]} of {expected[1]}")


__all__ = ["check_cached_shapes", "check_outputs", "check_patches", "only_images", "refuses_unknown"]
