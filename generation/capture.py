"""A denoising step recorded once and replayed: on CUDA as one graph, which costs the host one launch instead of thousands.

A graph reads and writes fixed memory. So everything a step reads is held in buffers that are refilled before each replay: the
state, the canvas's view (once a canvas), and the random numbers, which are drawn outside and thus are the same as without a
graph. Nothing of the configuration is frozen into a recording: it lives for one call of `generate`.

Knows nothing of models or samplers: it is handed a function of tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers.utils import logging

from .draws import Draws
from .noise import Noise

logger = logging.get_logger(__name__)


class HeldDraws:
    """Random numbers in buffers: the first step asks for them, `refill` draws the same kinds anew for the next one."""

    def __init__(self, source: Draws):
        self._source, self._held, self._place = source, [], 0

    def uniforms(self, batch_size: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        return self._next("uniforms", (batch_size, shape, device))

    def noise(self, noise: Noise, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
        return self._next("noise", (noise, shape, device))

    def rewind(self) -> None:
        """The next number asked for is the first again."""
        self._place = 0

    def refill(self, source: Draws) -> None:
        for kind, arguments, buffer in self._held:
            buffer.copy_(getattr(source, kind)(*arguments))

    def _next(self, kind: str, arguments: tuple) -> torch.Tensor:
        if self._place == len(self._held):
            self._held.append((kind, arguments, getattr(self._source, kind)(*arguments)))
        self._place += 1
        return self._held[self._place - 1][2]


class Held:
    """A structure of tensors (named tuples, tuples, dicts) in buffers of their own."""

    def __init__(self, value: Any):
        self.value = pytree.tree_map_only(torch.Tensor, torch.clone, value)

    def fill(self, value: Any) -> None:
        """Copies `value`, of the same structure and shapes, into the buffers."""
        new, structure = pytree.tree_flatten(value)
        held, expected = pytree.tree_flatten(self.value)
        if structure != expected:
            raise ValueError(f"a recorded step got inputs of another structure: {structure}; expected {expected}")
        for buffer, tensor in zip(held, new, strict=True):
            if isinstance(buffer, torch.Tensor):
                buffer.copy_(tensor)


class RecordedStep:
    """`function(view, state, draws) -> outputs` on buffers, recorded at its first call and replayed at every later one.

    Args:
        function: of structures of tensors; the same shapes at every call, no reading back from the device.
        record: takes a function without arguments that returns tensors at fixed places; returns a function that does its work
            again, into the same places, and those. Default: a CUDA graph.
    """

    def __init__(self, function: Callable, record: Callable | None = None):
        self._function, self._record = function, record or record_graph
        self._view = self._state = self._draws = self._replay = None

    def hold(self, view: Any) -> None:
        """Takes in another canvas's view."""
        if self._view is None:
            self._view = Held(view)
        else:
            self._view.fill(view)

    def __call__(self, state: Any, draws: Draws) -> Any:
        if self._replay is None:
            self._state, self._draws = Held(state), HeldDraws(draws)
            self._replay, self._outputs = self._record(self._run)
        else:
            self._state.fill(state)
            self._draws.refill(draws)
        self._replay()
        return pytree.tree_map_only(torch.Tensor, torch.clone, self._outputs)

    def _run(self) -> Any:
        self._draws.rewind()
        return self._function(self._view.value, self._state.value, self._draws)


def record_graph(run: Callable) -> tuple[Callable, Any]:
    """Records `run` as a CUDA graph, after one run that lets libraries set themselves up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph.replay, outputs


def record_plainly(run: Callable) -> tuple[Callable, Any]:
    """The reference of `record_graph`: does the work again, and copies what comes out to the same places."""
    held = Held(run())
    return lambda: held.fill(run()), held.value


__all__ = ["Held", "HeldDraws", "RecordedStep", "record_graph", "record_plainly"]
