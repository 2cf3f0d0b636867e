"""The caches that `generate` makes."""

import contextlib

import torch
from transformers import Cache, DynamicCache, StaticCache, cache_utils

from .configuration import DiffusionGenerationConfig


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


__all__ = ["dynamic_cache", "make_cache", "on_host", "quantized_cache"]
