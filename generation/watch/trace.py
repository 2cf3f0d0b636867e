"""A recording of how answers came about: what every denoising step made of every canvas, numbers from it, and a file to keep it in.

Knows nothing of tokenizers; `pictures` draws it.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..rules.prediction import Prediction
from ..rules.schedule import TemperatureSchedule
from ..rules.state import CanvasState
from .packing import fill_forward, pack_bits, unpack_bits
from .watcher import Watcher

KIND, VERSION = "diffusiongemma.trace", 1
WHOLE = ("temperature", "seconds", "tokens", "lengths")  # saved as they are
NAMES = ("taken", "accepted", "forced", "entropy", "argmax_changed", "argmax_ids", "canvas_differs", "canvas_ids", *WHOLE)
OF_STATE = ("canvas", "argmax", "accepted", "entropy", "forced")
OTHERS = ("alternatives", "alternative_log_probs")  # where they were asked for


@dataclass(frozen=True, eq=False)
class CanvasTrace:
    """A canvas of C positions, of all B rows of the batch, over T denoising steps; tensors on the host.

    `first_step`: the step of the schedule that the first is. `taken` bool (T, B): which steps a row took: none of them where it had ended
    before, and none after it finished. As each step left them, each (T, B, C), and after a row's last step as that left them: `canvas`
    int32, what the next step reads, accepted tokens and noise; `argmax` int32, what would be committed; `accepted` bool, by this step;
    `entropy` float16 nats; `forced` bool, where a constraint on the text leaves one token, the rest of the argmax being as it is.
    `temperature` float32 (T,). `seconds` float32 (T,): since the step before; of the first, since the prompt was read or the last canvas
    committed, so that the prompt pass or the commit is in it.
    `tokens` int32 (B, n): what was committed, pad behind a row's end; `lengths` int64 (B,): how many of them each row keeps.
    `alternatives` int32 (T, B, C, k), None where none were asked for: the most probable ids beside the argmax, falling, and
    `alternative_log_probs` float16 nats; -inf where no other id can stand.
    """

    first_step: int
    taken: torch.Tensor
    canvas: torch.Tensor
    argmax: torch.Tensor
    accepted: torch.Tensor
    entropy: torch.Tensor
    forced: torch.Tensor
    temperature: torch.Tensor
    seconds: torch.Tensor
    tokens: torch.Tensor
    lengths: torch.Tensor
    alternatives: torch.Tensor | None = None
    alternative_log_probs: torch.Tensor | None = None

    def of_row(self, row: int) -> "RowCanvas":
        """What one row saw of it."""
        taken = self.taken[:, row]
        return RowCanvas(
            self.first_step + taken.nonzero().flatten(), *(getattr(self, name)[taken, row] for name in OF_STATE),
            self.temperature[taken], self.seconds[taken], self.tokens[row, : int(self.lengths[row])],
            *(None if (value := getattr(self, name)) is None else value[taken, row] for name in OTHERS),
        )  # fmt: skip


class RowCanvas(NamedTuple):
    """A canvas of one row, over the t steps that the row took: `steps` int64 (t,), counted as the schedule counts them; of (t, C), (t,) and
    in their dtypes as in `CanvasTrace`; `tokens` int32 (n,), what the row keeps of it; alternatives (t, C, k), or None."""

    steps: torch.Tensor
    canvas: torch.Tensor
    argmax: torch.Tensor
    accepted: torch.Tensor
    entropy: torch.Tensor
    forced: torch.Tensor
    temperature: torch.Tensor
    seconds: torch.Tensor
    tokens: torch.Tensor
    alternatives: torch.Tensor | None = None
    alternative_log_probs: torch.Tensor | None = None

    def revisions(self) -> torch.Tensor:
        """Int64 (n,): how often each kept token's argmax changed after the position was first accepted."""
        return self.revised().sum(dim=0)

    def revised(self) -> torch.Tensor:
        """Bool (t, n): the steps that changed the argmax of a kept position after it had been accepted."""
        argmax, accepted = self.argmax[:, : len(self.tokens)], self.accepted[:, : len(self.tokens)]
        found = torch.zeros_like(accepted)
        found[1:] = (argmax[1:] != argmax[:-1]) & (accepted.cumsum(dim=0)[:-1] > 0)
        return found

    def stood_at(self) -> torch.Tensor:
        """Int64 (n,): the step, counted up from 0 inside the canvas, since which each kept token's argmax is the last one."""
        wrong = self.argmax[:, : len(self.tokens)] != self.argmax[-1:, : len(self.tokens)]
        return torch.where(wrong, torch.arange(1, len(wrong) + 1, device=wrong.device)[:, None], 0).amax(dim=0)

    def order(self) -> float | None:
        """Spearman's rank correlation of `stood_at` and position: 1 from left to right, -1 from right to left, 0 neither. None where all
        tokens stood at once."""
        return rank_correlation(self.stood_at())

    def wasted(self) -> int:
        """How many steps were taken after the one at which the last kept token stood; all of them where none is kept."""
        stood_at = self.stood_at()
        return len(self.steps) - 1 - int(stood_at.max()) if len(stood_at) else len(self.steps)


def rank_correlation(values: torch.Tensor) -> float | None:
    """Spearman's correlation of `values` (n,) with 0 .. n - 1, ties at their mean rank; None where all are equal."""
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    if len(counts) < 2:
        return None
    ranks = (counts.cumsum(dim=0) - (counts + 1) / 2)[places].double()
    ranks, index = ranks - ranks.mean(), torch.arange(len(values), dtype=torch.float64, device=values.device)
    index = index - index.mean()
    return float((ranks * index).sum() / (ranks.norm() * index.norm()))


class Trace(Watcher):
    """Records what `generate(watcher=trace)` does; a second call begins it anew.

    Until a canvas is committed it keeps 11 bytes of each row, position and step where the canvas is, 0.1 MB for 48 steps of 256 positions,
    and on the host from then on. On a GPU a step costs four small kernels and an event for the time, and the host waits for the device
    where a canvas is committed alone; but under a constraint on the text `generate` waits at every step, to count what could stand at a
    position. Without a trace nothing of it exists.

    `alternatives`: how many ids beside the best are kept of each position and step, with their probabilities, 6 bytes each; a step then
    looks for them among all ids. Under a constraint on the text they are of what can stand there; not with one that sees predictions.

    `prompt` int32 (B, P), empty where it was given as embeddings; `canvases`: a `CanvasTrace` for each; `finish_reasons`: as in
    `DiffusionGenerationOutput`.
    """

    needs_steps = needs_possible = True

    def __init__(self, alternatives: int = 0):
        """Raises ValueError for a number that is none, or below 0."""
        if not isinstance(alternatives, int) or isinstance(alternatives, bool) or alternatives < 0:
            raise ValueError(f"`alternatives` is {alternatives!r}; expected 0, or how many ids beside the best are kept of a position")
        self.candidates = alternatives + 1 if alternatives else 0
        self.prompt = torch.zeros(0, 0, dtype=torch.int32, device="cpu")
        self.canvases: list[CanvasTrace] = []
        self.finish_reasons: list[str | None] = []
        self._schedule: TemperatureSchedule | None = None
        self._pieces: list[tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]]] = []  # rows, and what they were at each step
        self._ticks, self._first_step = [], 0

    def begin(self, schedule: TemperatureSchedule) -> None:
        self._schedule = schedule

    def start(self, prompt: torch.Tensor) -> None:
        self.prompt, self.canvases = prompt.to("cpu", torch.int32), []
        self.finish_reasons = [None] * len(prompt)
        self._pieces, self._ticks = [], [tick(prompt.device)]

    def step(self, canvas_index: int, step: int, places: torch.Tensor, state: CanvasState, prediction: Prediction) -> None:
        if not self._pieces:
            self._first_step = step
        if not self._pieces or self._pieces[-1][0] is not places:
            self._pieces.append((places, []))
        forced = state.possible[0] == 1 if state.possible else torch.zeros_like(state.accepted)
        self._pieces[-1][1].append((
            state.passes, state.canvas.to(torch.int32), state.argmax.to(torch.int32), state.accepted,
            state.entropy.to(torch.float16), forced, *(others(prediction, state.argmax) if self.candidates else ()),
        ))  # fmt: skip
        self._ticks.append(tick(state.canvas.device))

    def commit(self, tokens: torch.Tensor, lengths: torch.Tensor, finish_reasons: Sequence[str | None]) -> None:
        if self._pieces:  # or the canvas was taken as it was given, and there is nothing to tell of it
            self.canvases.append(self._canvas(tokens, lengths))
        self.finish_reasons = list(finish_reasons)
        self._pieces, self._ticks = [], [tick(tokens.device)]

    def _canvas(self, tokens: torch.Tensor, lengths: torch.Tensor) -> CanvasTrace:
        ended = torch.tensor([reason is not None for reason in self.finish_reasons], dtype=torch.bool, device="cpu")
        passes, *values = (fill_forward(len(ended), pieces) for pieces in self._on_host())
        taken = torch.diff(passes, dim=0, prepend=torch.zeros_like(passes[:1])) > 0
        temperatures = self._schedule.temperatures().cpu()[self._first_step :][: len(taken)]
        return CanvasTrace(
            self._first_step, taken & ~ended, *values[: len(OF_STATE)], temperatures, seconds_between(self._ticks),
            tokens.to("cpu", torch.int32), lengths.cpu(), *values[len(OF_STATE) :],
        )  # fmt: skip

    def _on_host(self):
        """Of each thing recorded: rows and values (t, b, ...) of the steps with the same rows, in their order."""
        hosted = [(places.cpu(), [torch.stack(value).cpu() for value in zip(*steps, strict=True)]) for places, steps in self._pieces]
        for index in range(len(hosted[0][1])):
            yield [(places, values[index]) for places, values in hosted]

    def row(self, row: int = 0) -> list[RowCanvas]:
        """The canvases of a row, those that it took a step of.

        Raises:
            ValueError: there is no such row.
        """
        if not self.canvases:
            raise ValueError("the trace is empty; expected one that `generate(watcher=trace)` has recorded")
        if not 0 <= row < len(self.finish_reasons):
            raise ValueError(f"`row` is {row}; expected 0 to {len(self.finish_reasons) - 1}, the rows of the batch")
        return [canvas.of_row(row) for canvas in self.canvases if bool(canvas.taken[:, row].any())]

    def kept(self, row: int) -> list[RowCanvas]:
        """The canvases of a row of which it keeps a token; ValueError as `row`, and where there is none."""
        if canvases := [canvas for canvas in self.row(row) if len(canvas.tokens)]:
            return canvases
        raise ValueError(f"`row` is {row}, which keeps no token; expected one with an answer to draw")

    def revisions(self, row: int = 0) -> torch.Tensor:
        """Int64 (n,), of the row's new tokens: how often each one's argmax changed after its position was first accepted."""
        return torch.cat([canvas.revisions() for canvas in self.row(row)])

    def stood_at(self, row: int = 0) -> torch.Tensor:
        """Int64 (n,), of the row's new tokens: the step of its canvas, counted up from 0, since which each one's argmax is the last."""
        return torch.cat([canvas.stood_at() for canvas in self.row(row)])

    def summary(self, row: int = 0) -> dict[str, int | float | list]:
        """Of a row, in numbers: `tokens`; `steps`, `order` and `wasted` of each canvas, as `RowCanvas` has them; `revisions` in all,
        `revised` tokens, and `seconds`."""
        canvases, revisions = self.row(row), self.revisions(row)
        return {
            "tokens": len(revisions), "steps": [len(canvas.steps) for canvas in canvases], "revisions": int(revisions.sum()),
            "revised": int((revisions > 0).sum()), "order": [canvas.order() for canvas in canvases],
            "wasted": [canvas.wasted() for canvas in canvases], "seconds": float(sum(canvas.seconds.sum() for canvas in canvases)),
        }  # fmt: skip

    def save(self, path: str | PathLike) -> None:
        """Writes a safetensors file, for `load`."""
        Path(path).write_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """What `save` writes: what changed from step to step, flags as bits, nothing after a row's last step.

        A row of 256 positions takes under 100 kB for 48 steps, noise that cannot be made smaller being half of it.
        """
        tensors = {"prompt": self.prompt}
        for index, canvas in enumerate(self.canvases):
            tensors |= {f"{index}.{name}": value.contiguous() for name, value in packed(canvas).items()}
        about = {
            "finish_reasons": self.finish_reasons,
            "canvases": [[canvas.first_step, *canvas.canvas.shape] for canvas in self.canvases],
            "alternatives": max(0, self.candidates - 1),
        }
        return save(tensors, metadata={"kind": KIND, "version": str(VERSION), "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | PathLike) -> "Trace":
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is something else, of another version, or incomplete; its name is in the message.
        """
        expected = f"expected a trace of version {VERSION}, as `Trace.save` writes it"
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                if metadata.get("kind") != KIND:
                    raise ValueError(f"`path` is {str(path)!r}, which is a safetensors file of something else; {expected}")
                if metadata.get("version") != str(VERSION):
                    raise ValueError(f"`path` is {str(path)!r}, a trace of version {metadata.get('version')!r}; {expected}")
                about = json.loads(metadata["about"])
                trace = cls(about["alternatives"])
                names = NAMES + OTHERS if trace.candidates else NAMES
                trace.prompt, trace.finish_reasons = file.get_tensor("prompt"), list(about["finish_reasons"])
                for index, (first_step, *shape) in enumerate(about["canvases"]):
                    read = {name: file.get_tensor(f"{index}.{name}") for name in names}
                    trace.canvases.append(unpacked(first_step, tuple(shape), read))
                check_whole(trace, about["finish_reasons"])
                return trace
        except (json.JSONDecodeError, IndexError, KeyError, RuntimeError, SafetensorError, TypeError) as error:
            raise ValueError(f"`path` is {str(path)!r}, which cannot be read ({error}); {expected}") from error


def check_whole(trace: Trace, finish_reasons: object) -> None:
    """Raises IndexError for a trace whose tensors are not those of one call: what is kept of it would be of other rows or steps."""
    rows = len(trace.finish_reasons)
    if not isinstance(finish_reasons, list) or trace.prompt.dim() != 2 or (trace.canvases and len(trace.prompt) not in (0, rows)):
        raise IndexError(f"a prompt of shape {tuple(trace.prompt.shape)} and finish reasons {finish_reasons}")
    for index, canvas in enumerate(trace.canvases):
        steps, batch_size, _ = canvas.canvas.shape
        shapes = [tuple(getattr(canvas, name).shape) for name in WHOLE]
        expected = [(steps,), (steps,), (rows, canvas.tokens.shape[-1] if canvas.tokens.dim() else 0), (rows,)]
        if not isinstance(canvas.first_step, int) or batch_size != rows or shapes != expected:
            raise IndexError(f"canvas {index} of {rows} rows from step {canvas.first_step} has {dict(zip(WHOLE, shapes, strict=True))}")
        if not bool(((canvas.lengths >= 0) & (canvas.lengths <= canvas.tokens.shape[1])).all()):
            raise IndexError(f"canvas {index} keeps {canvas.lengths.tolist()} of {canvas.tokens.shape[1]} tokens")


def others(prediction: Prediction, argmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidates but `argmax` int64 (B, C), int32 (B, C, k), and their log-probabilities, float16; without the last where it is not
    among them."""
    is_best = prediction.candidates == argmax[..., None]
    order = is_best.int().sort(dim=-1, stable=True).indices[..., :-1]
    found = prediction.candidate_log_probs.gather(-1, order)
    return prediction.candidates.gather(-1, order).to(torch.int32), found.to(torch.float16)


def tick(device: torch.device) -> "float | torch.cuda.Event":
    """Now: on CUDA when the device comes to it, which the host does not wait for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(ticks: list) -> torch.Tensor:
    """Float32 (t - 1,), between t ticks. On CUDA it waits for the last."""
    pairs = zip(ticks[:-1], ticks[1:], strict=True)
    if isinstance(ticks[-1], float):
        found = [after - before for before, after in pairs]
    else:
        ticks[-1].synchronize()
        found = [before.elapsed_time(after) / 1000 for before, after in pairs]
    return torch.tensor(found, dtype=torch.float32, device="cpu")


def packed(canvas: CanvasTrace) -> dict[str, torch.Tensor]:
    """What a file holds of a canvas, of the steps that rows took alone: argmax ids where they are others than a step before, and the
    canvas's where they are not the argmax."""
    taken, argmax = canvas.taken, canvas.argmax
    changed = torch.cat((torch.ones_like(argmax[:1], dtype=torch.bool), argmax[1:] != argmax[:-1]))[taken]
    differs = (canvas.canvas != argmax)[taken]
    return {
        "taken": pack_bits(taken), "accepted": pack_bits(canvas.accepted[taken]), "forced": pack_bits(canvas.forced[taken]),
        "entropy": canvas.entropy[taken], "argmax_changed": pack_bits(changed), "argmax_ids": argmax[taken][changed],
        "canvas_differs": pack_bits(differs), "canvas_ids": canvas.canvas[taken][differs],
        **{name: getattr(canvas, name) for name in WHOLE},
        **{name: value[taken] for name in OTHERS if (value := getattr(canvas, name)) is not None},
    }  # fmt: skip


def unpacked(first_step: int, shape: tuple[int, int, int], read: dict[str, torch.Tensor]) -> CanvasTrace:
    """The canvas that was `packed`, of `shape` (T, B, C)."""
    taken = unpack_bits(read["taken"], shape[:2])
    small = (int(taken.sum()), shape[2])
    accepted, forced, changed, differs = (
        unpack_bits(read[name], small) for name in ("accepted", "forced", "argmax_changed", "canvas_differs")
    )
    steps, rows = taken.nonzero(as_tuple=True)
    argmax, last = torch.zeros(small, dtype=torch.int32, device="cpu"), torch.zeros(shape[1:], dtype=torch.int32, device="cpu")
    argmax[changed] = read["argmax_ids"]
    for place, row in enumerate(rows.tolist()):
        last[row] = argmax[place] = torch.where(changed[place], argmax[place], last[row])
    canvas = argmax.clone()
    canvas[differs] = read["canvas_ids"]
    values = [canvas, argmax, accepted, read["entropy"].view(small), forced]
    values += [read[name].view(*small, -1) for name in OTHERS if name in read]
    whole = []
    for value in values:
        pieces = [(rows[steps == step], value[steps == step][None]) for step in range(shape[0])]
        whole.append(fill_forward(shape[1], pieces))
    count = len(OF_STATE)
    return CanvasTrace(first_step, taken, *whole[:count], *(read[name] for name in WHOLE), *whole[count:])


__all__ = ["CanvasTrace", "RowCanvas", "Trace"]
