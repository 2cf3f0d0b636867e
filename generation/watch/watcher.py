"""Who is told what happens while `generate` runs, and may change it: one protocol, and transformers' streamers as one of its kind."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..rules.prediction import Prediction
from ..rules.schedule import TemperatureSchedule
from ..rules.state import CanvasState


class Watcher:
    """Does nothing; derive from it and pass an instance to `generate` as `watcher`.

    `wants_logits`: whether `step` reads whole logits (`Prediction.shaped`), which costs the walk over the vocabulary.
    `candidates`: how many of the most probable ids of a position it reads (`Prediction.candidates`, which may hold more); not together with
    a `constraint` that sees predictions. `needs_steps`: whether it is of no use where there are no denoising steps. `needs_possible`:
    whether it reads `CanvasState.possible`, which under a constraint on the text is counted at every step, on the host.
    """

    wants_logits, candidates, needs_steps, needs_possible = False, 0, False, False

    def begin(self, schedule: TemperatureSchedule) -> None:
        """Generation begins, before `start`; `schedule` has the temperature of every denoising step."""

    def start(self, prompt: torch.Tensor) -> None:
        """`prompt` int64 (B, P)."""

    def step(
        self, canvas_index: int, step: int, places: torch.Tensor, state: CanvasState, prediction: Prediction
    ) -> CanvasState | None:  # fmt: skip
        """A denoising step has been taken, of canvas `canvas_index`; both count up from 0.

        Args: `places` int64 (b,), those of the b rows still computed among the B of the batch; `state` and `prediction` are theirs.
        Returns: None, or the state to go on with: `state._replace(...)` with another `canvas`, `argmax`, `soft_embeds` or `finished`.
        """

    def commit(self, tokens: torch.Tensor, lengths: torch.Tensor, finish_reasons: Sequence[str | None]) -> None:
        """New tokens, int64 (B, n), pad behind a row's end; how many of them each row keeps, int64 (B,); and why a row has ended, as in
        `DiffusionGenerationOutput`, None where it goes on."""

    def end(self) -> None:
        """Generation has come to its end; not called after a failure."""


class WholeCanvas(Watcher):
    """A watcher that is shown the state of all rows the canvas began with, those that have left it as they were, by `show`."""

    canvas_index = -1

    def begin(self, schedule: TemperatureSchedule) -> None:
        self.canvas_index = -1  # what is shown is never of a call before

    def step(self, canvas_index, step, places, state, prediction) -> None:
        if canvas_index != self.canvas_index:
            self.canvas_index, self.places, self.whole = canvas_index, places, state
        self.whole = self.whole.place(torch.searchsorted(self.places, places), state)
        self.show(canvas_index, step, self.whole, prediction)

    def show(self, canvas_index: int, step: int, state: CanvasState, prediction: Prediction) -> None:
        """A denoising step has been taken; `prediction` is of the rows still computed."""
        raise NotImplementedError


class StreamerWatcher(WholeCanvas):
    """A streamer of transformers: gets the prompt and what is committed by `put`, and by `put_state`, where it has one, each step's state,
    or by `put_draft` its argmax canvas (or its logits, where it asks for them). A streamer may have `needs_possible`, as a watcher has."""

    def __init__(self, streamer: Any):
        self.streamer, self.wants_logits = streamer, bool(getattr(streamer, "_takes_logits", False))
        self.needs_possible = bool(getattr(streamer, "needs_possible", False))

    def start(self, prompt: torch.Tensor) -> None:
        self.streamer.put(prompt.cpu())

    def show(self, canvas_index, step, state, prediction) -> None:
        if hasattr(self.streamer, "put_state"):
            self.streamer.put_state(state)
        if hasattr(self.streamer, "put_draft"):
            draft = {"logits": prediction.shaped.cpu()} if self.wants_logits else {"value": state.argmax.cpu()}
            self.streamer.put_draft(**draft)

    def commit(self, tokens, lengths, finish_reasons) -> None:
        tokens = tokens.cpu()
        self.streamer.put(tokens[0] if len(tokens) == 1 else tokens)  # one row as single tokens: who counts them counts right

    def end(self) -> None:
        self.streamer.end()


def candidates_of(watchers: Sequence[Watcher]) -> int:
    """How many of a position's most probable ids predictions must hold for them."""
    return max((watcher.candidates for watcher in watchers), default=0)


def watch(watchers: Sequence[Watcher], canvas_index: int, step: int, places: torch.Tensor, state: CanvasState, prediction: Prediction):
    """Tells all of them of a step. Returns the state to go on with.

    Raises:
        ValueError: a watcher returned what is no state of these rows.
    """
    for watcher in watchers:
        changed = watcher.step(canvas_index, step, places, state, prediction)
        if changed is None:
            continue
        (before, form), (after, got) = pytree.tree_flatten(state), pytree.tree_flatten(changed)
        fits = form == got and all(isinstance(new, torch.Tensor) for new in after)
        if not fits or any(new.shape != old.shape or new.dtype != old.dtype for old, new in zip(before, after, strict=True)):
            raise ValueError(
                f"`watcher` is a {type(watcher).__name__}, whose `step` returned a {type(changed).__name__}; expected None, or "
                "`state._replace(...)` with tensors of the same shapes and dtypes"
            )
        state = changed
    return state


__all__ = ["StreamerWatcher", "Watcher", "WholeCanvas", "candidates_of", "watch"]
