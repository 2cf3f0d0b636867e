"""A denoising step recorded once and replayed: on CUDA as one graph, which costs the host one launch instead of thousands.

A graph reads and writes fixed memory. So everything a step reads is held in buffers that are refilled before each replay: the
canvas's view (once a canvas), and the step's inputs, its random numbers among them, which are drawn outside and thus are the same as
without a graph. Nothing of the configuration is frozen into a recording: it lives for one call of `generate`.

Knows nothing of models or samplers: it is handed a function of tensors.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import logging

from .proofs import FastPath, difference, needs_cuda, numbers, one_line

logger = logging.get_logger(__name__)

INDEXING = (torch.ops.aten.index.Tensor,)  # counts flags, but not ids
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
CLOSE = 1e-2  # of the largest number: a recorded step computes the same by the same kernels, at most summed in another order


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


class NeverWaits(TorchDispatchMode):
    """A block in which an operation that makes the host wait for `device` raises `RuntimeError`: one that gives numbers, or sizes that
    depend on values, and copies to and from other devices.

    Recording one would fail as well, and leave torch's allocator in a state it has no way out of. Of this thread alone, unlike
    `torch.cuda.set_sync_debug_mode`.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled layers stay compiled

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = _tensors((args, kwargs))
        if any(tensor.device == self.device for tensor in inputs):
            counts = any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1])) if func in INDEXING else True
            if torch.Tag.data_dependent_output in func.tags or (torch.Tag.dynamic_output_shape in func.tags and counts):
                raise RuntimeError(f"{func} waits for the device")
        result = func(*args, **(kwargs or {}))
        seen = [tensor for tensor in (*inputs, *_tensors(result)) if tensor.dim() > 0 or func in COPIES]  # a lone number may lie anywhere
        if len({tensor.device for tensor in seen}) > 1:
            raise RuntimeError(f"{func} copies between devices")
        return result


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class Recording:
    """The recording of one call of `generate`: made at the first step of its first canvas, replayed at all others.

    The first step runs plainly, and the first replay must give the same floating numbers.

    Args:
        function: `(view, inputs) -> outputs`, of structures of tensors, without reading back from the device. Where it cannot be recorded
            it runs as it is, with a warning that says why.
        record: takes a function without arguments that returns tensors, and the device; returns a function that does its work again into
            the same tensors, and those. Default: a CUDA graph on CUDA, else the plain run that a graph must equal.
    """

    def __init__(self, function: Callable[[Any, Any], Any], record: Callable[[Callable, torch.device], tuple[Callable, Any]] | None = None):
        self._function, self._record = function, record
        self._view = self._inputs = self._replay = self._outputs = None
        self._why_not: str | None = None

    def on(self, view: Any) -> Callable[[Any, Any], Any]:
        """The function, for a canvas with this view: recorded, or as it is."""
        try:
            if self._why_not is None and self._view is None:
                self._view = Held(view)
            elif self._why_not is None:
                self._view.fill(view)
        except ValueError as error:
            self._give_up(str(error))
        return self._function if self._why_not else self._step

    def _step(self, view: Any, inputs: Any) -> Any:
        if self._why_not:
            return self._function(view, inputs)
        if self._replay is None:
            return self._first_step(view, inputs)
        self._inputs.fill(inputs)
        self._replay()
        return pytree.tree_map_only(torch.Tensor, torch.clone, self._outputs)

    def _first_step(self, view: Any, inputs: Any) -> Any:
        self._inputs, first = Held(inputs), None
        device = _tensors(inputs)[0].device
        record = self._record or (record_graph if device.type == "cuda" else record_plainly)
        try:
            with NeverWaits(device) if device.type == "cuda" else contextlib.nullcontext():
                first = pytree.tree_map_only(torch.Tensor, torch.clone, self._run())  # which also lets libraries set themselves up
            replay, outputs = record(self._run, device)
            replay()
            why_not = difference(_floating(outputs), _floating(first), CLOSE)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers of kernels have errors of their own, and a fault of the function's own comes up again below
            why_not = one_line(error)
        if why_not is None:
            self._replay, self._outputs = replay, outputs
        else:
            self._give_up(why_not)
        return self._function(view, inputs) if first is None else first

    def _run(self) -> Any:
        return self._function(self._view.value, self._inputs.value)

    def _give_up(self, why_not: str) -> None:
        self._why_not, self._view, self._inputs = why_not, None, None
        logger.warning_once(f"The denoising step is not recorded but launched anew each time, which is slower: {why_not}")


def _floating(value: Any) -> list[torch.Tensor]:
    """Not the tokens, of which one drawn at the edge between two may be the other."""
    return [tensor for tensor in _tensors(value) if tensor.is_floating_point()]


def record_graph(run: Callable, device: torch.device) -> tuple[Callable, Any]:
    """Records `run`, which has run before, as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):  # the stream that is recorded is one of the current device
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may use the device meanwhile
                outputs = run()
        except Exception:
            generator = torch.cuda.default_generators[device.index]  # left as if it were still recorded: draws from it would raise
            generator.graphsafe_set_state(generator.clone_state())
            raise
    return graph.replay, outputs


def record_plainly(run: Callable, device: torch.device) -> tuple[Callable, Any]:
    """The reference of `record_graph`: does the work again, and copies what comes out to the same places."""
    held = Held(run())
    return lambda: held.fill(run()), held.value


def _prove_recording(device: torch.device):
    """Three steps of products, random numbers and choices, each replayed with new inputs, against the function itself."""

    def step(view, inputs, uniforms):
        state, factor = inputs
        scores = torch.tanh(state @ view / 4) * factor + uniforms
        chosen = scores.argsort(dim=-1, descending=True)[:, :4]
        return torch.where(uniforms < 0.5, scores, state), chosen, view[chosen].sum(dim=1)

    view, state = (numbers(16, 16, seed=seed).to(device) for seed in range(2))
    uniforms, steps = numbers(3, 16, 16, uniform=True).to(device), torch.arange(1, 4, device=device)
    held = Held((view, (state, steps[0]), uniforms[0]))
    first = step(*held.value)
    replay, outputs = (record_graph if device.type == "cuda" else record_plainly)(lambda: step(*held.value), device)
    got, expected, recorded = [], [], state
    for factor, uniform in zip(steps, uniforms, strict=True):
        held.fill((view, (recorded, factor), uniform))
        replay()
        expected.append(step(view, (recorded, factor), uniform))
        got.append(pytree.tree_map_only(torch.Tensor, torch.clone, outputs))
        recorded = got[-1][0]
    return (first, got), (expected[0], expected)


RECORDED_STEP = FastPath(
    "recorded step", "every denoising step is launched anew, which is slower", needs_cuda, _prove_recording, tolerance=1e-5
)


__all__ = ["RECORDED_STEP", "Held", "NeverWaits", "Recording", "record_graph", "record_plainly"]
