"""The checkpoints that ship with the package."""

from pathlib import Path

FOLDER = Path(__file__).parent / "checkpoints"


def shipped() -> dict[str, str]:
    """Names and paths."""
    return {file.parent.name: str(file.parent) for file in sorted(FOLDER.glob("*/config.json"))}


def default_checkpoint(name: str = "text") -> str:
    """Path of a shipped checkpoint, for `from_pretrained`; ValueError where there is none of this name.

    Args:
        name: `"text"`, small exact text jobs in chat form, with tokenizer and chat template; `"sudoku"`; `"decisions"`,
            questions with known probabilities; or `"tools"`, calls of the functions that a prompt declares.
    """
    if name not in shipped():
        raise ValueError(f"`name` is {name!r}; expected one of the shipped checkpoints, {[*shipped()]}")
    return shipped()[name]


__all__ = ["default_checkpoint", "shipped"]
