"""Layers that run compiled for the length of a block.

One layer is compiled, not the stack: layers of a type share a graph, so that it takes as long for thirty of them as for two. What
torch compiled stays in its own cache, so entering again with the same settings costs nothing. Knows nothing of generation.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from transformers import CompileConfig

# Layer types, passes, one row or several, and sizes first taken as fixed: a dozen graphs. torch gives up after 8 and runs uncompiled.
GRAPHS = 64
# Modes that record CUDA graphs of their own; `generate` records the whole step.
WITHOUT_GRAPHS = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}


def compile_settings(config: CompileConfig) -> dict[str, Any]:
    """Arguments of `torch.compile`. Modes with CUDA graphs become the same without; ValueError for what torch does not know."""
    settings = config.to_dict()
    backends = torch.compiler.list_backends(exclude_tags=())
    if isinstance(config.backend, str) and config.backend not in backends:
        raise ValueError(f"`compile_config.backend` is {config.backend!r}; expected one of {backends}, or a callable")
    modes = [*WITHOUT_GRAPHS, "default", "max-autotune-no-cudagraphs", None]
    if config.mode not in modes:
        raise ValueError(f"`compile_config.mode` is {config.mode!r}; expected one of {modes}")
    settings["mode"] = WITHOUT_GRAPHS.get(config.mode, config.mode)
    if config.options is not None and settings["mode"] is not None:
        raise ValueError(f"`compile_config` has both the mode {config.mode!r} and options; torch.compile takes one of them")
    return settings


class Calls:
    """How layers are asked to run. `calls`, of each: how it ran before, then what each block made of it, the last of which is in force."""

    def __init__(self):
        self.lock, self.calls = threading.Lock(), weakref.WeakKeyDictionary()

    def enter(self, layer: torch.nn.Module, call: Callable) -> None:
        self.calls.setdefault(layer, [layer._compiled_call_impl]).append(call)
        layer._compiled_call_impl = call

    def leave(self, layer: torch.nn.Module, call: Callable) -> None:
        calls = self.calls[layer]
        calls.remove(call)
        layer._compiled_call_impl = calls[-1]
        if len(calls) == 1:
            del self.calls[layer]


@functools.cache
def _calls() -> Calls:
    """The one of this process: blocks of several threads may share layers, and end in any order."""
    return Calls()


@contextlib.contextmanager
def compiled_layers(layers: Iterable[torch.nn.Module], config: CompileConfig) -> Iterator[None]:
    """Runs `layers` compiled as `config` says; behind the last such block, of whatever thread, they run as before the first."""
    call = torch.compile(torch.nn.Module._call_impl, **compile_settings(config))  # what `Module.compile` compiles, once for all layers
    entered, of_process = [(layer, functools.partial(call, layer)) for layer in layers], _calls()
    with torch._dynamo.config.patch(recompile_limit=GRAPHS):
        with of_process.lock:
            for layer, compiled in entered:
                of_process.enter(layer, compiled)
        try:
            yield
        finally:
            with of_process.lock:
                for layer, compiled in entered:
                    of_process.leave(layer, compiled)


__all__ = ["compile_settings", "compiled_layers"]
