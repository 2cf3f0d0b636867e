"""A streamer that shows a canvas while it is denoised, in a terminal or in a plain log.

At every step each position is in one of four states, told apart by colour and, without colours, by a mark below:
accepted by this step; corrected, which is accepted and not the token accepted there before; renoised, where the model's
best guess is shown; and, for a layout that knows them, given from outside the canvas.

Under a constraint on the text each position is besides pinned, constrained or free, told apart by style and by another mark: pinned where
no other token could stand, the rest of the canvas being as it is; free where half of the tokenizer's tokens could, or more, as in a blank
of a template, inside a string of JSON, or for `.*`; constrained otherwise, as a digit. Without a constraint all of it is free, and drawn as
ever.
"""

import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple, TextIO

import torch
from transformers.generation.streamers import BaseStreamer

from ..rules.state import CanvasState

COLOURS = {
    "free": {"accepted": "\033[1;32m", "corrected": "\033[1;35m", "renoised": "\033[2;33m", "given": "\033[1m", "plain": ""},
    "constrained": {"accepted": "\033[1;4;32m", "corrected": "\033[1;4;35m", "renoised": "\033[2;4;33m"},
    "pinned": {"accepted": "\033[1m", "corrected": "\033[1m", "renoised": "\033[2m"},
}
MARKS = {
    "free": {"accepted": "^", "corrected": "*", "renoised": ".", "given": " ", "plain": " "},
    "constrained": {"accepted": "+", "corrected": "#", "renoised": ":"},
    "pinned": {"accepted": "=", "corrected": "=", "renoised": "-"},
}
FREE = 0.5  # of the tokenizer's tokens: from so many on that could stand there a position is free
RESET = "\033[0m"


class Cell(NamedTuple):
    """What is drawn of one canvas position: its text, its state, and "free", "constrained" or "pinned", each as `COLOURS` has them."""

    text: str
    state: str
    freedom: str = "free"


def one_line(cells: Sequence[Cell], paint: Callable[[Cell], str]) -> str:
    """The default layout: the canvas as running text."""
    return "".join(paint(cell) for cell in cells)


def wrapped(columns: int, lines: int) -> Callable[[Sequence[Cell], Callable[[Cell], str]], str]:
    """Layout of a terminal: no line is longer than `columns`, and of more than `lines` the last are drawn, so that redrawing
    in place finds the first one again."""

    def layout(cells: Sequence[Cell], paint: Callable[[Cell], str]) -> str:
        drawn, used = [""], 0
        for cell in cells:
            width = sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in cell.text)
            if used and used + width > columns:
                drawn.append("")
                used = 0
            drawn[-1] += paint(cell)
            used += width
        return "\n".join(drawn[-lines:])

    return layout


class CanvasStreamer(BaseStreamer):
    """Draws each denoising step of a batch of one; pass it to `generate` as `streamer`.

    Args:
        tokenizer: decodes single tokens.
        layout: `(cells, paint) -> str` arranges the cells of the canvas; default: running text, wrapped to a terminal's size.
        stop_ids: what lies from the first of these on is not drawn (end of turn, pad).
        file: default standard output.
        colour: ANSI colours and redrawing in place; default: where `file` is a terminal. Without, each step is printed below
            the last, with its marks: `^` accepted, `*` corrected, `.` renoised; where a constraint leaves some tokens `+`, `#`, `:`, and
            where it leaves one `=`, `-` if renoised. In colour the former are underlined, and the latter have none.
        delay: seconds to wait after each step.
    """

    needs_possible = True

    def __init__(
        self, tokenizer, layout=None, stop_ids: Sequence[int] = (), file: TextIO | None = None, colour: bool | None = None,
        delay: float = 0.0,
    ):  # fmt: skip
        self.tokenizer, self.stop_ids, self.delay = tokenizer, frozenset(stop_ids), delay
        self.file = sys.stdout if file is None else file
        self.colour = self.file.isatty() if colour is None else colour
        size = shutil.get_terminal_size()
        self.layout = layout or (wrapped(size.columns, max(size.lines - 2, 1)) if self.colour else one_line)
        self.step, self._height, self._accepted_ids = 0, 0, None

    def put(self, value: torch.Tensor) -> None:
        """Prompt and finished canvases: nothing is drawn, the next canvas starts below."""
        self.step, self._height, self._accepted_ids = 0, 0, None

    def put_state(self, state: CanvasState) -> None:
        if state.canvas.shape[0] != 1:
            raise ValueError(f"CanvasStreamer got a batch of {state.canvas.shape[0]}; expected 1")
        self.step += 1
        cells = self.cells(state)
        drawn = self.layout(cells, self.paint if self.colour else lambda cell: cell.text)
        if self.colour:
            if self._height:
                self.file.write(f"\033[{self._height}A\033[J")
            text = f"  step {self.step}\n{drawn}\n"
            self._height = text.count("\n")
        else:
            marks = self.layout(cells, lambda cell: MARKS[cell.freedom][cell.state] * len(cell.text))
            text = self._log(drawn.splitlines() or [""], marks.splitlines() or [""])
        self.file.write(text)
        self.file.flush()
        time.sleep(self.delay)

    def _log(self, lines: list[str], marks: list[str]) -> str:
        """A step without colours: marks below a canvas of one line, beside one of several."""
        head = f"  step {self.step:2d}  "
        if len(lines) == 1:
            return f"{head}{lines[0]}\n{' ' * len(head)}{marks[0]}\n"
        width = max(map(len, lines))
        sides = zip(lines, marks, strict=True)
        return "".join(f"{head if place == 0 else ' ' * len(head)}{line:{width}s}{mark}\n" for place, (line, mark) in enumerate(sides))

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

    @staticmethod
    def paint(cell: Cell) -> str:
        return f"{COLOURS[cell.freedom][cell.state]}{cell.text}{RESET}"

    def end(self) -> None:
        self.file.flush()


__all__ = ["CanvasStreamer", "Cell", "one_line", "wrapped"]
