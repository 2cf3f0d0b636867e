"""The checkpoints that ship with the package."""

from pathlib import Path

FOLDER = Path(__file__).parent / "checkpoints"


def default_checkpoint(name: str = "text") -> str:
    """Path of a shipped checkpoint, for `from_pretrained`.

    Args:
        name: `"text"`, small exact text jobs in chat form, with tokenizer and chat template; or `"sudoku"`.

    Raises:
        ValueError: no such checkpoint.
    """
    shipped = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))
    if name not in shipped:
        raise ValueError(f"`name` is {name!r}; expected one of the shipped checkpoints, {shipped}")
    return str(FOLDER / name)


__all__ = ["default_checkpoint"]
