"""From what a caller of `generate` hands in to what the loop needs: configuration, prompt, lengths, cache."""

from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig, StaticCache

from .configuration import RELEASED_DEFAULTS, WHY_REFUSED, DiffusionGenerationConfig

# Arguments of GenerationMixin.generate that mean nothing here: refused by name unless they are None or False.
FOREIGN_ARGUMENTS = (
    "assistant_model", "assistant_tokenizer", "custom_generate", "negative_prompt_attention_mask", "negative_prompt_ids",
    "prefix_allowed_tokens_fn", "synced_gpus", "use_model_defaults",
)  # fmt: skip


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
        value = kwargs.pop(name, None)
        if value is not None and value is not False:
            why = WHY_REFUSED.get(name, "block diffusion gives it no meaning")
            raise ValueError(f"`{name}` is {value!r}; expected None: {why}")
    if "eos_token_id" in kwargs and kwargs["eos_token_id"] is None:
        kwargs["eos_token_id"] = []  # None asks for no end, and must not fall back on the model's
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    config = DiffusionGenerationConfig.from_generation_config(GenerationConfig() if given is None else given)
    if unknown := sorted(name for name in kwargs if name != "sampler_config" and name not in config.__dict__):
        raise ValueError(f"`generate` got the unknown arguments {unknown}; expected model inputs or fields of DiffusionGenerationConfig")
    if "max_length" in kwargs and "max_new_tokens" in kwargs:
        raise ValueError(
            f"`max_length` ({kwargs['max_length']}) and `max_new_tokens` ({kwargs['max_new_tokens']}) are both set; expected one"
        )
    config.update(**kwargs)
    use_max_length = config.max_length is not None and (config.max_new_tokens is None or "max_length" in kwargs)
    models = DiffusionGenerationConfig.from_generation_config(model_default).__dict__
    config.update(defaults_only=True, **{name: value for name, value in models.items() if value is not None and name[0] != "_"})
    use_max_length = use_max_length or (config.max_new_tokens is None and config.max_length is not None)
    config.update(defaults_only=True, **RELEASED_DEFAULTS)
    if refused := config.refused():
        raise ValueError(f"block diffusion does not support {', '.join(refused)}; expected these arguments unset")
    if config.decoding == "verified" and not (config.do_sample is False or config.temperature == 0):
        raise ValueError(f"`do_sample` is {config.do_sample!r}; expected False with `decoding='verified'`, which verifies greedy tokens")
    if config.decoding != "diffusion" and config.backend == "reference":
        raise ValueError(f"`decoding` is {config.decoding!r}; expected 'diffusion' with the reference backend")
    if config.noise == "mask" and config.mask_token_id is None:
        raise ValueError("`mask_token_id` is None; expected a token id, since `noise` is 'mask'")
    return config, use_max_length


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
    if not isinstance(attention_mask, torch.Tensor) or tuple(attention_mask.shape) != shape:
        got = tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask).__name__
        raise ValueError(f"`attention_mask` has shape {got}; expected a tensor of shape {shape}, cached tokens included")
    real = attention_mask.to(input_ids.device).bool()
    if not bool(real[:, -1].all()):
        raise ValueError("`attention_mask` ends in padding; expected padding on the left (`tokenizer.padding_side = 'left'`)")
    return real


def check_ids(name: str, ids: torch.Tensor, vocab_size: int) -> None:
    """`ids` must be integers `(B, L)` in `[0, vocab_size)`. The range is read back from the device, so not in a hot loop."""
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"`{name}` is {ids.dtype} of shape {tuple(ids.shape)}; expected integer ids of shape (batch, length)")
    if ids.numel() == 0 or torch.compiler.is_compiling() or ids.is_meta:
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"`{name}` holds ids from {low} to {high}; expected ids from 0 to {vocab_size - 1} (vocab_size - 1)")


def check_canvas(canvas: torch.Tensor | None, shape: tuple[int, int], vocab_size: int) -> None:
    """A caller's first canvas must be integer ids of the vocabulary, one canvas a row."""
    if canvas is None:
        return
    check_ids("decoder_input_ids", canvas, vocab_size)
    if tuple(canvas.shape) != shape:
        raise ValueError(f"`decoder_input_ids` has shape {tuple(canvas.shape)}; expected {shape}, one canvas a row")


def check_images(input_ids: torch.Tensor | None, pixel_values: torch.Tensor | None, image_token_id: int | None) -> None:
    """Raises ValueError for image tokens in a prompt that comes without its images."""
    if input_ids is not None and pixel_values is None and image_token_id is not None and bool((input_ids == image_token_id).any()):
        raise ValueError(
            f"`input_ids` holds image tokens (id {image_token_id}) but `pixel_values` is None; "
            "expected the images: let the processor return a dict and pass all of it"
        )


def repeat_rows(
    copies: int, prompt: torch.Tensor, real: torch.Tensor, canvas: torch.Tensor | None, images: dict, cache: Cache | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict]:
    """Every prompt `copies` times, side by side (`num_return_sequences`)."""
    if copies == 1:
        return prompt, real, canvas, images
    if cache is not None or images["pixel_values"] is not None:
        raise ValueError(f"`num_return_sequences` is {copies}; expected 1 together with `past_key_values` or images")
    canvas = None if canvas is None else canvas.repeat_interleave(copies, dim=0)
    return prompt.repeat_interleave(copies, dim=0), real.repeat_interleave(copies, dim=0), canvas, images


def make_cache(config: DiffusionGenerationConfig, model_config, max_length: int) -> Cache:
    """A fresh cache for `max_length` tokens."""
    if config.cache_implementation == "static":
        return StaticCache(config=model_config, max_cache_len=max_length)
    return DynamicCache(config=model_config)


__all__ = ["check_canvas", "check_ids", "check_images", "check_prompt", "make_cache", "repeat_rows", "resolve_config"]
