"""Snippets of a page: its Python blocks, what it says they print, and running them as one program."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Page:
    """`text`; `blocks`, its Python; `expected`, what stands behind a `print(...)` as a comment."""

    def __init__(self, name: str):
        self.name, self.text = name, (ROOT / name).read_text(encoding="utf-8")
        self.blocks = re.findall(r"```python\n(.*?)```", self.text, re.DOTALL)
        self.expected = re.findall(r"^ *print\(.*\)  # (.*)$", "\n".join(self.blocks), re.MULTILINE)

    def commands(self) -> list[str]:
        """The lines of its one block of commands."""
        (block,) = re.findall(r"```sh\n(.*?)```", self.text, re.DOTALL)
        return block.splitlines()

    def run(self) -> None:
        """All blocks one after the other, in the working directory."""
        exec(compile("\n".join(self.blocks), self.name, "exec"), {"__name__": "page"})


__all__ = ["Page"]
