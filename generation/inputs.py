"""From what a caller of `generate` hands in to what the loop needs: configuration, prompt, lengths, cache."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig, StaticCache, cache_utils
from transformers.utils import logging

from .arguments import ARGUMENTS, read, shown
from .configuration import RELEASED_DEFAULTS, WHY_REFUSED, DiffusionGenerationConfig, refusals

logger = logging.get_logger(__name__)

# Arguments of GenerationMixin.generate that mean nothing here: refused by name unless they are None or False.
FOREIGN_ARGUMENTS = (
    "assistant_model", "assistant_tokenizer", "custom_generate", "negative_prompt_attention_mask", "negative_prompt_ids",
    "prefix_allowed_tokens_fn", "synced_gpus", "use_model_defaults",
)  # fmt: skip


def resolve_config(
    given: GenerationConfig | Mapping[str, Any] | None, model_default: GenerationConfig, kwargs: dict[str, Any]
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
            raise ValueError(f"`{name}` is {shown(value)}; expected None: {why}")
    if "eos_token_id" in kwargs and kwargs["eos_token_id"] is None:
        kwargs["eos_token_id"] = []  # None asks for no end, and must not fall back on the model's
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    config = DiffusionGenerationConfig.from_generation_config(GenerationConfig() if given is None else given)
    if unknown := sorted(name for name in kwargs if name != "sampler_config" and (name[0] == "_" or name not in config.__dict__)):
        raise ValueError(f"`generate` got the unknown arguments {unknown}; expected model inputs or fields of DiffusionGenerationConfig")
    _refuse(refusals({name: value for name, value in kwargs.items() if name != "sampler_config"}))
    both = "max_length" in kwargs and "max_new_tokens" in kwargs
    if both:  # a pipeline hands the tokenizer's `max_length` on to here
        logger.warning_once("`max_new_tokens` and `max_length` are both set; `max_new_tokens` counts, as elsewhere in transformers.")
    config.update(**kwargs)
    use_max_length = config.max_length is not None and (config.max_new_tokens is None or ("max_length" in kwargs and not both))
    model_default = read("generation_config", model_default, ARGUMENTS["generation_config"])  # whatever was assigned to the model
    models = {} if model_default is None else DiffusionGenerationConfig.from_generation_config(model_default).__dict__
    config.update(defaults_only=True, **{name: value for name, value in models.items() if value is not None and name[0] != "_"})
    use_max_length = use_max_length or (config.max_new_tokens is None and config.max_length is not None)
    config.update(defaults_only=True, **RELEASED_DEFAULTS)
    _refuse(config.refused())
    if config.decoding == "verified" and not (config.do_sample is False or config.temperature == 0):
        raise ValueError(f"`do_sample` is {config.do_sample!r}; expected False with `decoding='verified'`, which verifies greedy tokens")
    if config.decoding != "diffusion" and config.backend == "reference":
        raise ValueError(f"`decoding` is {config.decoding!r}; expected 'diffusion' with the reference backend")
    if config.noise == "mask" and config.mask_token_id is None:
        raise ValueError("`mask_token_id` is None; expected a token id, since `noise` is 'mask'")
    if config.noise == "mask" and config.sampler == "predictor_corrector":
        raise ValueError("`noise` is 'mask'; expected 'uniform' with `sampler='predictor_corrector'`, which reverses uniform noise")
    if config.output_logits and not config.return_dict_in_generate:
        raise ValueError("`output_logits` is True; expected `return_dict_in_generate=True` with it, or they have nowhere to go")
    if config.cache_config is not None and config.cache_implementation != "quantized":
        raise ValueError(f"`cache_config` is {config.cache_config!r}; expected None unless `cache_implementation` is 'quantized'")
    return config, use_max_length


def _refuse(refused: list[str]) -> None:
    if refused:
        raise ValueError(f"block diffusion does not support {', '.join(refused)}; expected these arguments unset")


def infer_mask(input_ids: torch.Tensor, config: DiffusionGenerationConfig, seen: int) -> torch.Tensor | None:
    """The mask of a batch that comes without one: `pad_token_id` at the beginning of a row is padding. None where there is none.

    With a warning, once, what may be padding stays text: where the pad token is an end of sequence too, which a prompt may hold; behind
    cached tokens; at the end of a row; and with the reference backend, which does as transformers' class does.
    """
    pad, ends = config.pad_token_id, config.eos_token_id
    if pad is None or input_ids.numel() == 0:
        return None
    padding = input_ids == pad
    first, last = padding[:, 0].any().item(), padding[:, -1].any().item()
    clear = pad not in (ends if isinstance(ends, list) else [ends]) and seen == 0 and config.backend != "reference"
    if last or (first and not clear):
        logger.warning_once(
            f"`input_ids` holds `pad_token_id` ({pad}) at the {'end' if last else 'beginning'} of a row and `attention_mask` is None: "
            "it is read as text. Pad on the left and pass `attention_mask`."
        )
    if not first or not clear:
        return None
    real = ~padding.long().cumprod(dim=1).bool()
    return real | ~real.any(dim=1, keepdim=True)  # of a row of nothing else all is text


def repeat_rows(
    copies: int, ids: torch.Tensor, real: torch.Tensor, canvas: torch.Tensor | None, prompt: dict[str, torch.Tensor], cache: Cache | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
    """Every prompt `copies` times, side by side (`num_return_sequences`); `prompt` is what `prefill` takes for it."""
    if copies == 1:
        return ids, real, canvas, prompt
    if cache is not None or "pixel_values" in prompt:
        raise ValueError(f"`num_return_sequences` is {copies}; expected 1 together with `cache` or images")
    canvas = None if canvas is None else canvas.repeat_interleave(copies, dim=0)
    prompt = {name: value.repeat_interleave(copies, dim=0) for name, value in prompt.items()}
    return ids.repeat_interleave(copies, dim=0), real.repeat_interleave(copies, dim=0), canvas, prompt


def quantized_cache(model_config, backend: str = "fp8", **kwargs) -> Cache:
    """A cache whose full-attention layers hold quantized keys and values. Sliding layers, which never grow beyond the window, stay
    as they are (transformers' own `QuantizedCache` refuses models that have any).

    Args:
        backend: `"fp8"` (torch alone), `"quanto"` or `"hqq"` (libraries of these names).
        kwargs: of quanto and hqq: `nbits`, `axis_key`, `axis_value`, `q_group_size`, `residual_length`.

    Raises:
        ValueError: an unknown backend or argument, or one this transformers has not.
        ImportError: the backend's library is not installed.
    """
    backends = {"fp8": "Fp8QuantizedLayer", "quanto": "QuantoQuantizedLayer", "hqq": "HQQQuantizedLayer"}
    found = {name: getattr(cache_utils, layer) for name, layer in backends.items() if hasattr(cache_utils, layer)}
    if backend not in found:
        raise ValueError(
            f"`cache_implementation` is 'quantized' and `cache_config` names the backend {backend!r}, 'fp8' where it names none; expected "
            f"one that this transformers has, of {sorted(found)}"
        )
    cache = DynamicCache(config=model_config)
    try:
        for place, layer_type in enumerate(model_config.layer_types):
            if layer_type == "full_attention":
                cache.layers[place] = found[backend](**kwargs)
    except TypeError as error:
        raise ValueError(f"`cache_config` holds {kwargs}, which {found[backend].__name__} does not take: {error}") from error
    return Cache(layers=cache.layers)


def on_host() -> contextlib.AbstractContextManager:
    """A context in which what transformers makes without a word of where begins on the host, whatever torch's default device is. What is
    traced cannot enter one."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.device("cpu")


def dynamic_cache(model_config, **kwargs) -> DynamicCache:
    with on_host():
        return DynamicCache(config=model_config, **kwargs)


def make_cache(config: DiffusionGenerationConfig, model_config, max_length: int, device: torch.device) -> Cache:
    """A fresh cache for `max_length` tokens.

    Raises:
        ValueError: offloading without CUDA; as `quantized_cache`.
        ImportError: as `quantized_cache`.
    """
    kind = config.cache_implementation or "dynamic"
    if kind.startswith("offloaded") and device.type != "cuda":
        raise ValueError(f"`cache_implementation` is {kind!r} and the prompt is on {device}; expected a CUDA device to offload from")
    if kind in ("dynamic", "offloaded"):
        return dynamic_cache(model_config, offloading=kind == "offloaded")
    with on_host():
        if kind == "quantized":
            return quantized_cache(model_config, **(config.cache_config or {}))
        return StaticCache(config=model_config, max_cache_len=max_length, offloading=kind.startswith("offloaded"))


__all__ = ["dynamic_cache", "infer_mask", "make_cache", "on_host", "quantized_cache", "repeat_rows", "resolve_config"]
