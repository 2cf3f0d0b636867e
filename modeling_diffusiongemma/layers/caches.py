"""What a pass reads from a cache: the filled slots of each layer, and room behind them for a canvas.

While a canvas is denoised the cache does not change. So its keys and values are laid out once a canvas with as many free
slots behind them as the canvas has tokens, and every step writes those of its canvas there, instead of copying the whole cache in
every layer of every step. Nothing is stored twice where the cache allows it: a dynamic layer's tensors are replaced by the
filled part of the new ones, which holds the same values. (A sliding layer then keeps its window alone; what transformers stores
after a prompt is a view of the whole prompt's keys.) A static cache keeps its tensors, and its filled slots are stored twice.

Knows the caches of transformers (dynamic, static, sliding, offloaded, quantized), and nothing of masks or attention.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import Cache, DiffusionGemmaTextConfig, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from generation.fast.proofs import FastPath, needs_cuda, numbers, works


class LayerCache(NamedTuple):
    """Keys and values of one layer, each `(B, K, slots + room, head_dim)`; the last `room` slots are free."""

    keys: torch.Tensor
    values: torch.Tensor
    room: int = 0


def join(cached: LayerCache | None, new: LayerCache) -> LayerCache:
    """Cached keys and values followed by the new ones; written into the free slots where there are any.

    With gradients they are always concatenated: what a step wrote must still be there in the backward pass.
    """
    if cached is None:
        return new
    if cached.room == 0 or torch.is_grad_enabled():
        slots = cached.keys.shape[2] - cached.room
        return LayerCache(*(torch.cat((old[:, :, :slots], fresh), dim=2) for old, fresh in zip(cached[:2], new[:2], strict=True)))
    for whole, fresh in zip(cached[:2], new[:2], strict=True):
        whole[:, :, -cached.room :] = fresh
    return cached


def cached_length(cache: Cache | None, waits: bool = False) -> int:
    """How many tokens the cache has seen: as many in every layer. Static full-attention layers count on the device, the others on the host.

    Args:
        waits: read those counted on a device as well, all at once, and compare them; False: only where nothing else tells the length.

    Raises:
        ValueError: no cache with layers, or a cache to some of whose layers somebody appended keys and values.
    """
    if cache is not None and (not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache)):
        raise ValueError(f"`cache` is a {type(cache).__name__}; expected a `Cache` of transformers with layers, such as `DynamicCache()`")
    lengths = [] if cache is None else [layer.get_seq_length() for layer in cache.layers]
    on_host = {place: length for place, length in enumerate(lengths) if not isinstance(length, torch.Tensor)}
    on_device = {place: length for place, length in enumerate(lengths) if isinstance(length, torch.Tensor)}
    if torch.compiler.is_compiling():  # symbols, which would all be guarded if they were compared
        return next(iter(on_host.values())) if on_host else int(lengths[0]) if lengths else 0
    if on_device and (waits or not on_host or all(length.device.type == "cpu" for length in on_device.values())):
        device = next(iter(on_device.values())).device
        counts = torch.stack([length.to(device) for length in on_device.values()]).tolist()
        on_host = dict(sorted({**on_host, **dict(zip(on_device, counts, strict=True))}.items()))
    seen = next(iter(on_host.values()), 0)
    for layer_idx, length in on_host.items():
        if length != seen:
            held = f"{seen} tokens in layer {next(iter(on_host))} and {length} in layer {layer_idx}"
            raise ValueError(f"`cache` holds {held}; expected as many in every layer: all layers see the same tokens")
        _check_stored(layer_idx, cache.layers[layer_idx], length)
    return seen


def _check_stored(layer_idx: int, layer, length: int) -> None:
    """A sliding layer counts beside what it stores: keys that somebody set by hand are more than it would keep of `length` tokens. (So
    are those that a dynamic layer keeps as zeros when older transformers reset it, and would put before all that follow.)"""
    if isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized:
        keeps_all = layer.sliding_window == 1 or getattr(layer, "record_past", False)
        most = length if keeps_all else min(length, layer.sliding_window - 1)
        if (stored := layer.keys.shape[2]) > most:
            expected = f"at most {most} of the {length} tokens that it counted (`cache.update` counts)"
            raise ValueError(f"`cache` stores {stored} keys in layer {layer_idx}; expected {expected}")


def check_update(cache: Cache) -> None:
    """ValueError where somebody else's `update` takes keys and values in: a pass sees new ones as they are, beside those that the layers
    hold, and not what `update` returns."""
    for each in (cache, *cache.layers, getattr(cache, "layer_class_to_replicate", None)):
        update = getattr(each, "update", None)
        whose = getattr(getattr(update, "__func__", update), "__globals__", {}).get("__name__", "no module")
        if update is not None and not whose.startswith("transformers."):
            name = each.__name__ if isinstance(each, type) else type(each).__name__
            held = "what it returns would not be seen; expected `update` of transformers, and layers that hold what they are given"
            raise ValueError(f"`cache` is a {type(cache).__name__}, and {name} has an `update` of {whose}: {held}")


@dataclass(frozen=True)
class StoredLayers:
    """The layers of a cache, each read when it is its turn: what a pass appended to a layer before shows."""

    cache: Cache
    seen: int  # how many tokens it holds, from `cached_length`; given, since static layers count on the device
    windows: tuple[int | None, ...]  # for each layer how many of the last tokens the pass can see at most; None: all

    def slots(self, layer_idx: int) -> int:
        """How many of the last tokens are stored and read; 0 while nothing is stored, also where it is allocated."""
        if self.seen == 0 or layer_idx >= len(self.cache.layers):
            return 0
        layer, window = self.cache.layers[layer_idx], self.windows[layer_idx]
        stored = self.seen if _is_quantized(layer) else min(self.seen, layer.keys.shape[2])
        return stored if window is None else min(stored, window)

    def laid_out(self, least: int = 0) -> tuple[int, ...]:
        """For each layer how many slots a view lays out: those stored, and at least `least` or, if fewer, the window."""
        windows = (least if window is None else min(least, window) for window in self.windows)
        return tuple(max(self.slots(layer_idx), window) for layer_idx, window in enumerate(windows))

    def read(self, layer_idx: int) -> LayerCache | None:
        """The last `slots(layer_idx)` tokens of a layer, on the device it computes on."""
        slots = self.slots(layer_idx)
        if slots == 0:
            return None
        layer = self.cache.layers[layer_idx]
        if self.cache.offloading:
            if works(OFFLOADED_CACHE, layer.device):
                _await_streams(self.cache, layer)
            else:
                torch.cuda.synchronize(layer.device)
        keys, values = _dequantize(layer) if _is_quantized(layer) else (layer.keys, layer.values)
        filled = slice(max(min(self.seen, keys.shape[2]) - slots, 0), min(self.seen, keys.shape[2]))
        return LayerCache(*(states[:, :, filled].to(layer.device) for states in (keys, values)))

    def __iter__(self) -> Iterator[LayerCache | None]:
        return (self.read(layer_idx) for layer_idx in range(len(self.windows)))

    def with_room(self, room: int, least: int) -> "tuple[LayerCache | None, ...] | StoredLayers":
        """The layers with `room` free slots behind the cached ones that `laid_out(least)` counts, those not filled being zero.

        An offloaded cache stays as it is: all of its layers at once would not fit.
        """
        if self.cache.offloading:
            return self
        layers: list[LayerCache | None] = []
        for layer_idx, (cached, wanted) in enumerate(zip(self, self.laid_out(least), strict=True)):
            layers.append(cached)
            if cached is None:
                continue
            layer, slots = self.cache.layers[layer_idx], cached.keys.shape[2]
            free = max(wanted - slots, 0) + room
            layers[-1] = LayerCache(*(torch.nn.functional.pad(states, (0, 0, 0, free)) for states in cached[:2]), room)
            owns_tensors = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and not layer.keys.requires_grad
            if owns_tensors and layer.keys.shape[2] == slots:
                layer.keys, layer.values = (states[:, :, :slots] for states in layers[-1][:2])
        return tuple(layers)


def _await_streams(cache: Cache, layer) -> None:
    """Waits until a layer of an offloaded cache holds what was written to it: transformers fetches layers on a stream of its own, and
    brings them to the host without waiting, where slicing one would read what is not there yet."""
    stream = torch.cuda.current_stream(layer.device)
    stream.wait_stream(cache.prefetch_stream)
    if layer.keys.device != layer.device:
        stream.synchronize()


def _prove_offloaded(device: torch.device):
    """Three layers of two canvases each, read as a canvas reads them, behind enough work that a copy is late."""
    config = DiffusionGemmaTextConfig(num_hidden_layers=3, layer_types=["full_attention"] * 3)
    caches = [StaticCache(config=config, max_cache_len=600, offloading=True), DynamicCache(config=config, offloading=True)]
    values, got = numbers(2, 1, 2, 256, 64).to(device), []
    work = torch.ones(1024, 1024, dtype=torch.float32, device=device)
    for cache in caches:
        for canvas in values:
            for place in range(3):
                work = (work @ work).clamp_(max=1.0)
                cache.update(canvas * work[0, 0] + place, -canvas, place)
        for layer in cache.layers:
            _await_streams(cache, layer)
            got.append([states[:, :, :512].to(device) for states in (layer.keys, layer.values)])
    both = torch.cat(tuple(values), dim=2)
    return got, [[both + place, -both] for _ in caches for place in range(3)]


OFFLOADED_CACHE = FastPath(
    "offloaded cache", "the host waits for all the device has to do before it reads a layer of the cache", needs_cuda, _prove_offloaded
)


def _is_quantized(layer) -> bool:
    return getattr(layer, "_quantized_keys", None) is not None


def _dequantize(layer) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a quantized layer: the quantized ones, then those it keeps as they are until there are enough."""
    stored = []
    for quantized, residual in ((layer._quantized_keys, layer.keys), (layer._quantized_values, layer.values)):
        states = layer._dequantize(quantized)
        stored.append(torch.cat((states, residual), dim=2) if residual.dim() == 4 else states)
    return stored[0], stored[1]


__all__ = ["OFFLOADED_CACHE", "LayerCache", "StoredLayers", "cached_length", "check_update", "join"]
