"""A streamer that shows a canvas while it is denoised: on `screens`, in a terminal, a notebook or a plain log."""

import sys
import time
from collections.abc import Sequence
from typing import TextIO

import torch
from transformers.generation.streamers import BaseStreamer

from ..rules.state import CanvasState
from .screens import Cell, Layout, Log, Notebook, Terminal, in_notebook

FREE = 0.5  # of the tokenizer's tokens: from so many on that could stand there a position is free


class CanvasStreamer(BaseStreamer):
    """Draws each denoising step of a batch of one; pass it to `generate` as `streamer`. `screens` says how what is drawn.

    Args:
        tokenizer: decodes single tokens.
        layout: `(cells, paint) -> str` arranges the cells of the canvas; default: running text, wrapped to a terminal's size.
        stop_ids: what lies from the first of these on is not drawn (end of turn, pad).
        file: default standard output, or the output of the cell where this runs in a notebook.
        colour: ANSI colours and redrawing in place; default: where `file` is a terminal. Without, each step is printed below
            the last, with its marks: `^` accepted, `*` corrected, `.` renoised; where a constraint leaves some tokens `+`, `#`, `:`, and
            where it leaves one `=`, `-` if renoised. In colour the former are underlined, and the latter have none.
        delay: seconds to wait after each step.
    """

    needs_possible = True
    terminal = Terminal  # what is drawn on in colours

    def __init__(
        self, tokenizer, layout: Layout | None = None, stop_ids: Sequence[int] = (), file: TextIO | None = None,
        colour: bool | None = None, delay: float = 0.0,
    ):  # fmt: skip
        self.tokenizer, self.stop_ids, self.delay = tokenizer, frozenset(stop_ids), delay
        if file is None and colour is None and in_notebook():
            self.screen = Notebook(layout)
        else:
            file = sys.stdout if file is None else file
            colour = file.isatty() if colour is None else colour
            self.screen = (self.terminal if colour else Log)(file, layout)
        self.step, self._accepted_ids = 0, None

    def put(self, value: torch.Tensor) -> None:
        """Prompt and finished canvases: nothing is drawn, the next canvas starts below."""
        self.step, self._accepted_ids = 0, None
        self.screen.below()

    def put_state(self, state: CanvasState) -> None:
        if state.canvas.shape[0] != 1:
            raise ValueError(f"CanvasStreamer got a batch of {state.canvas.shape[0]}; expected 1")
        self.step += 1
        self.screen.draw(self.step, self.cells(state))
        time.sleep(self.delay)

    def cells(self, state: CanvasState) -> list[Cell]:
        """The canvas of a step as cells: accepted tokens where accepted, the argmax elsewhere."""
        accepted = state.accepted[0].tolist()
        ids = torch.where(state.accepted, state.canvas, state.argmax)[0].tolist()
        before = self._accepted_ids or [None] * len(ids)
        self._accepted_ids = [new if kept else old for new, kept, old in zip(ids, accepted, before, strict=True)]
        cells, freedoms = [], self.freedoms(state)
        for token, kept, old, freedom in zip(ids, accepted, before, freedoms, strict=True):
            if token in self.stop_ids:
                break
            changed = old is not None and old != token
            status = "renoised" if not kept else "corrected" if changed else "accepted"
            cells.append(Cell(self.tokenizer.decode([token]).replace("\n", " "), status, freedom))
        return cells

    def freedoms(self, state: CanvasState) -> list[str]:
        """Of each position: "free", "constrained" or "pinned"."""
        if not state.possible:
            return ["free"] * state.canvas.shape[1]
        enough = FREE * len(self.tokenizer)
        return ["pinned" if count == 1 else "constrained" if count < enough else "free" for count in state.possible[0][0].tolist()]

    def end(self) -> None:
        """Every step is drawn already."""


__all__ = ["CanvasStreamer"]
