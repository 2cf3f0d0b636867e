"""Where a canvas is drawn while it is denoised: in place in a terminal or a notebook, or a step below the other in a plain log.

Each position is in one of four states, told apart by colour and, without colours, by a mark below: accepted by the step; corrected, which
is accepted and not the token accepted there before; renoised, where the model's best guess is shown; and, for a layout that knows them,
given from outside the canvas.

Under a constraint on the text each position is besides pinned, constrained or free, told apart by style and by another mark: pinned where
no other token could stand, the rest of the canvas being as it is; free where half of the tokenizer's tokens could, or more, as in a blank
of a template, inside a string of JSON, or for `.*`; constrained otherwise, as a digit. Without a constraint all of it is free, and drawn as
ever. Knows no tokenizer.
"""

import html
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple, TextIO

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
RESET = "\033[0m"
# Of a notebook, whose paper may be white or black. A state alone; `BOUND` is put behind it.
STYLES = {
    "accepted": "color:#16a34a;font-weight:600",
    "corrected": "color:#c026d3;font-weight:600",
    "renoised": "color:#d97706;font-style:italic",
    "given": "font-weight:600",
    "plain": "",
}
BOUND = {"free": "", "constrained": ";text-decoration:underline", "pinned": ";color:inherit"}
LEGEND = {"accepted": "accepted by the step", "corrected": "accepted, and other than before", "renoised": "renoised; the best guess"}
HOLE = "\ufdd0{}\ufdd1"  # stands for a painted cell in a text that is still to be escaped: no text holds these two


class Cell(NamedTuple):
    """What is drawn of one canvas position: its text, its state, and "free", "constrained" or "pinned", each as `COLOURS` has them."""

    text: str
    state: str
    freedom: str = "free"


Layout = Callable[[Sequence[Cell], Callable[[Cell], str]], str]  # arranges cells, each drawn by the function


def one_line(cells: Sequence[Cell], paint: Callable[[Cell], str]) -> str:
    """The canvas as running text."""
    return "".join(paint(cell) for cell in cells)


def wrapped(columns: int, lines: int) -> Layout:
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


class Terminal:
    """Draws in place, in colours."""

    def __init__(self, file: TextIO, layout: Layout | None):
        size = shutil.get_terminal_size()
        self.file, self.layout = file, layout or wrapped(size.columns, max(size.lines - 2, 1))
        self._height = 0  # of what the next drawing is put over

    def draw(self, step: int, cells: Sequence[Cell]) -> None:
        text = f"  step {step}\n{self.layout(cells, self.paint)}\n"
        self._put(text)
        self._height = text.count("\n")

    def wipe(self) -> None:
        """Nothing is left of what was drawn last."""
        self._put("")
        self._height = 0

    def _put(self, text: str) -> None:
        self.file.write((f"\033[{self._height}A\033[J" if self._height else "") + text)
        self.file.flush()

    def below(self) -> None:
        """What comes next is drawn below what is there."""
        self._height = 0

    @staticmethod
    def paint(cell: Cell) -> str:
        return f"{COLOURS[cell.freedom][cell.state]}{cell.text}{RESET}"


class Log:
    """Prints a step below the other, with marks: below a canvas of one line, beside one of several."""

    def __init__(self, file: TextIO, layout: Layout | None):
        self.file, self.layout = file, layout or one_line

    def draw(self, step: int, cells: Sequence[Cell]) -> None:
        lines = self.layout(cells, lambda cell: cell.text).splitlines() or [""]
        marks = self.layout(cells, lambda cell: MARKS[cell.freedom][cell.state] * len(cell.text)).splitlines() or [""]
        head = f"  step {step:2d}  "
        indent = " " * len(head)
        if len(lines) == 1:
            self.file.write(f"{head}{lines[0]}\n{indent}{marks[0]}\n")
        else:
            width = max(map(len, lines))
            for place, (line, mark) in enumerate(zip(lines, marks, strict=True)):
                self.file.write(f"{indent if place else head}{line:{width}s}{mark}\n")
        self.file.flush()

    def below(self) -> None:
        """It always is."""


class Notebook:
    """Draws in place in the output of a notebook's cell, as HTML, with a legend."""

    def __init__(self, layout: Layout | None):
        self.layout, self._display = layout or one_line, None

    def draw(self, step: int, cells: Sequence[Cell]) -> None:
        from IPython.display import display

        drawn = {"text/html": self.page(step, cells), "text/plain": self.layout(cells, lambda cell: cell.text)}
        if self._display is None:
            self._display = display(drawn, raw=True, display_id=True)
        else:
            self._display.update(drawn, raw=True)

    def page(self, step: int, cells: Sequence[Cell]) -> str:
        painted = []

        def paint(cell: Cell) -> str:
            painted.append(f'<span style="{STYLES[cell.state]}{BOUND[cell.freedom]}">{html.escape(cell.text)}</span>')
            return HOLE.format(len(painted) - 1)

        text = html.escape(self.layout(cells, paint))
        text = re.sub(HOLE.format("([0-9]+)"), lambda hole: painted[int(hole[1])], text)
        legend = [f'<span style="{STYLES[state]}">{words}</span>' for state, words in LEGEND.items()]
        if any(cell.freedom != "free" for cell in cells):
            legend += ["underlined: constrained", "without colour: pinned"]
        return (
            f'<div><small>step {step}</small><pre style="white-space:pre-wrap;margin:0;line-height:1.5">{text}</pre>'
            f"<small>{' &middot; '.join(legend)}</small></div>"
        )

    def below(self) -> None:
        """What comes next is drawn below what is there."""
        self._display = None


def in_notebook() -> bool:
    """Whether what a cell displays can be drawn anew: this process is the kernel of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


__all__ = ["MARKS", "Cell", "Layout", "Log", "Notebook", "Terminal", "in_notebook", "one_line", "wrapped"]
