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
    """A structure of tensors (named tuples, tuples, dicts) in buffers of their own.

    Raises:
        ValueError: it holds something that cannot be copied into.
    """

    def __init__(self, value: Any):
        for leaf in pytree.tree_leaves(value):
            if not isinstance(leaf, (torch.Tensor, int, float, str, type(None))):
                raise ValueError(f"a recorded step cannot hold a {type(leaf).__name__}; expected tensors")
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
            elif buffer != tensor:
                raise ValueError(f"a recorded step got {tensor!r}; expected {buffer!r}, as it was recorded")


class Recording:
    """The recording of one call of `generate`: made at the first step of its first canvas, replayed at all others.

    Args:
        record: takes a function without arguments that returns tensors; returns a function that does its work again into the same
            tensors, and those. Default: a CUDA graph on CUDA, else the plain run that a graph must equal.
    """

    def __init__(self, record: Callable[[Callable], tuple[Callable, Any]] | None = None):
        self._record = record
        self._function = self._view = self._inputs = self._draws = self._replay = self._outputs = None
        self._why_not: str | None = None

    def of(self, function: Callable, view: Any) -> Callable:
        """`function(view, inputs, draws) -> outputs`, as it was or recorded, for a canvas with this view.

        Args:
            function: of structures of tensors, without reading back from the device; at every call the same function but for the
                view. Where it cannot be recorded it is returned as it is, with a warning that says why.
        """
        try:
            if self._why_not is None and self._view is None:
                self._function, self._view = function, Held(view)
            elif self._why_not is None:
                self._view.fill(view)
        except ValueError as error:
            self._give_up(error)
        return function if self._why_not else self._step

    def _step(self, view: Any, inputs: Any, draws: Draws) -> Any:
        if self._why_not:
            return self._function(view, inputs, draws)
        if self._replay is None:
            self._inputs, self._draws = Held(inputs), HeldDraws(draws)
            record = self._record or (record_graph if torch.cuda.is_available() else record_plainly)
            try:
                self._replay, self._outputs = record(self._run)
            except RuntimeError as error:
                self._give_up(error)
                return self._function(view, inputs, draws)
        else:
            self._inputs.fill(inputs)
            self._draws.refill(draws)
        self._replay()
        return pytree.tree_map_only(torch.Tensor, torch.clone, self._outputs)

    def _run(self) -> Any:
        self._draws.rewind()
        return self._function(self._view.value, self._inputs.value, self._draws)

    def _give_up(self, error: Exception) -> None:
        self._why_not, self._view, self._inputs, self._draws = str(error) or type(error).__name__, None, None, None
        logger.warning_once(f"The denoising step is not recorded but launched anew each time, which is slower: {self._why_not}")


def record_graph(run: Callable) -> tuple[Callable, Any]:
    """Records `run` as a CUDA graph, after one run that lets libraries set themselves up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may use the device meanwhile
        outputs = run()
    return graph.replay, outputs


def record_plainly(run: Callable) -> tuple[Callable, Any]:
    """The reference of `record_graph`: does the work again, and copies what comes out to the same places."""
    held = Held(run())
    return lambda: held.fill(run()), held.value


__all__ = ["Held", "HeldDraws", "Recording", "record_graph", "record_plainly"]
