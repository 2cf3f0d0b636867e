"""The canvas on standard error while it is denoised, and its text when it is committed."""

import os
import sys
from collections.abc import Callable, Iterable

import torch

from generation.rules.state import CanvasState
from generation.watch.events import TextAssembler
from generation.watch.screens import Cell, Terminal
from generation.watch.streamer import CanvasStreamer


class OnePlace(Terminal):
    """Draws a canvas over the one before it."""

    def below(self) -> None:
        """Nowhere: the next canvas shows what this one became."""


class Watch(CanvasStreamer):
    """Streamer of one prompt. In a terminal the answer is redrawn in place and wiped at the end: what is committed, then the canvas.
    Elsewhere each step is printed below the last, with marks.

    Args:
        stop_ids: what lies behind the first of these is not drawn.
        draw: False: nothing is drawn.
        on_text: gets each canvas's text as it is committed, never half a character; where the answer is redrawn, all of it at the end.
    """

    terminal = OnePlace

    def __init__(self, tokenizer, stop_ids: Iterable[int], draw: bool = True, on_text: Callable[[str], None] | None = None):
        colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")  # no-color.org
        super().__init__(tokenizer, stop_ids=tuple(stop_ids), file=sys.stderr, colour=colour)
        self.draw, self.needs_possible, self.in_place, self.on_text = draw, draw, draw and colour, on_text
        self._text, self._committed = None, ""

    def cells(self, state: CanvasState) -> list[Cell]:
        before = [Cell(letter, "plain") for letter in self._committed.replace("\n", " ")] if self.in_place else []
        return [*before, *super().cells(state)]

    def put_state(self, state: CanvasState) -> None:
        if self.draw:
            super().put_state(state)

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if self._text is None:  # the prompt
            self._text = TextAssembler(self.tokenizer)
        else:
            self._commit(self._text.add(value.flatten().tolist()))

    def _commit(self, text: str) -> None:
        self._committed += text
        if self.on_text is not None and not self.in_place:
            self.on_text(text)

    def end(self) -> None:
        if self._text is not None:
            self._commit(self._text.rest())
        if self.in_place:
            self.screen.wipe()
            if self.on_text is not None:
                self.on_text(self._committed)
        self._text, self._committed = None, ""


__all__ = ["Watch"]
