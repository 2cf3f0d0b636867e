"""From what a caller of `generate` hands in to what the loop needs: configuration, prompt, lengths, cache."""

from typing import Any, NamedTuple

import torch
from transformers import Cache, DynamicCache, GenerationConfig, StaticCache

from .configuration import RELEASED_DEFAULTS, DiffusionGenerationConfig

# Arguments of GenerationMixin.generate that mean nothing here: refused by name unless they are None or False.
FOREIGN_ARGUMENTS = (
    "assistant_model", "custom_generate", "negative_prompt_attention_mask", "negative_prompt_ids", "prefix_allowed_tokens_fn",
    "synced_gpus", "tokenizer", "use_model_defaults",
)  # fmt: skip


class Lengths(NamedTuple):
    """`new_tokens` a row may get, and the `canvases` that takes."""

    new_tokens: int
    canvases: int


def resolve_config(
    given: GenerationConfig | None, model_default: GenerationConfig, kwargs: dict[str, Any]
) -> tuple[DiffusionGenerationConfig, bool]:
    """The configuration of one call: keyword arguments, over the given config, over the model's, over the released values.

    Returns:
        The config, with nothing of the diffusion fields unset, and whether `max_length` counts: it does where the caller set
        it and did not set `max_new_tokens`.

    Raises:
        ValueError: an argument that is unknown, out of range or not honoured, by name.
    """
    for name in FOREIGN_ARGUMENTS:
        if (value := kwargs.pop(name, None)) not in (None, False):
            raise ValueError(f"`{name}` is {value!r}; expected None: block diffusion gives it no meaning")
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    callers = DiffusionGenerationConfig() if given is None else _as_diffusion(given)
    if unknown := sorted(name for name in kwargs if name != "sampler_config" and not hasattr(callers, name)):
        raise ValueError(f"`generate` got the unknown arguments {unknown}; expected model inputs or fields of DiffusionGenerationConfig")
    callers = DiffusionGenerationConfig.from_generation_config(callers)
    callers.update(**kwargs)
    use_max_length = callers.max_length is not None and (callers.max_new_tokens is None or "max_new_tokens" not in kwargs and "max_length" in kwargs)
    if "max_length" in kwargs and "max_new_tokens" in kwargs:
        raise ValueError(f"`max_length` ({kwargs['max_length']}) and `max_new_tokens` ({kwargs['max_new_tokens']}) are both set; expected one")
    config = callers
    config.update(defaults_only=True, **{n: v for n, v in _as_diffusion(model_default).__dict__.items() if v is not None and n[0] != "_"})
    config.update(defaults_only=True, **RELEASED_DEFAULTS)
    if refused := config.refused():
        raise ValueError(f"block diffusion does not support {', '.join(refused)}; expected these arguments unset")
    if config.noise == "mask" and config.mask_token_id is None:
        raise ValueError("`mask_token_id` is None; expected a token id, since `noise` is 'mask'")
    return config, use_max_length


def _as_diffusion(config: GenerationConfig) -> DiffusionGenerationConfig:
    return config if isinstance(config, DiffusionGenerationConfig) else DiffusionGenerationConfig.from_generation_config(config)


def resolve_lengths(config: DiffusionGenerationConfig, use_max_length: bool, prompt_length: int, canvas_length: int) -> Lengths:
    """Args: `prompt_length` counts cached tokens too."""
    new_tokens = config.max_length - prompt_length if use_max_length else config.max_new_tokens
    if new_tokens <= 0:
        raise ValueError(f"`max_length` is {config.max_length}; expected more than the prompt's {prompt_length} tokens")
    return Lengths(new_tokens, -(-new_tokens // canvas_length))


def check_prompt(input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, seen: int) -> torch.Tensor:
    """Checks shapes and padding. Returns the mask over cached and new tokens, bool `(B, seen + P)`."""
    if input_ids is None:
        raise ValueError("`input_ids` is None; expected the prompt's token ids of shape (batch, length)")
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        got = f"{input_ids.dtype} {tuple(input_ids.shape)}" if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"`input_ids` is {got}; expected an integer tensor of shape (batch, length)")
    if input_ids.numel() == 0:
        raise ValueError(f"the prompt is empty: `input_ids` has shape {tuple(input_ids.shape)}; expected at least one token")
    shape = (input_ids.shape[0], seen + input_ids.shape[1])
    if attention_mask is None:
        return torch.ones(shape, dtype=torch.bool, device=input_ids.device)
    if tuple(attention_mask.shape) != shape:
        raise ValueError(f"`attention_mask` has shape {tuple(attention_mask.shape)}; expected {shape}, cached tokens included")
    real = attention_mask.to(input_ids.device).bool()
    if not bool(real[:, -1].all()):
        raise ValueError("`attention_mask` ends in padding; expected padding on the left (`tokenizer.padding_side = 'left'`)")
    return real


def check_images(input_ids: torch.Tensor | None, pixel_values: torch.Tensor | None, image_token_id: int | None) -> None:
    """Raises ValueError for image tokens in a prompt that comes without its images."""
    if input_ids is not None and pixel_values is None and image_token_id is not None and bool((input_ids == image_token_id).any()):
        raise ValueError(
            f"`input_ids` holds image tokens (id {image_token_id}) but `pixel_values` is None; "
            "expected the images: let the processor return a dict and pass all of it"
        )


def make_cache(config: DiffusionGenerationConfig, model_config, max_length: int) -> Cache:
    """A fresh cache for `max_length` tokens."""
    if config.cache_implementation == "static":
        return StaticCache(config=model_config, max_cache_len=max_length)
    return DynamicCache(config=model_config)


__all__ = ["Lengths", "check_images", "check_prompt", "make_cache", "resolve_config", "resolve_lengths"]
