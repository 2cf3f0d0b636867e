"""What `labels` of whole examples mean: how responses are cut into canvases, and how many of them are learned at once."""

from dataclasses import dataclass

from generation.arguments import FIELDS, read

from .canvases import WAYS


@dataclass(frozen=True)
class Objective:
    """Settings of the training objective, for who calls the model with `labels` alone, as `Trainer` does:
    `model.objective = Objective(...)`.

    Args:
        canvases: `"all"` canvases of a row at once (NeMo AutoModel), or `"one"` at random (google-deepmind/gemma): less memory for long
            responses, and a prompt pass for each.
        canvas_length: default: the config's. Narrow canvases train faster and generalise to wide ones trained late
            (`callbacks.GrowingCanvas` does so by the progress of training).

    Raises:
        ValueError: another word, or no positive integer.
    """

    canvases: str = "all"
    canvas_length: int | None = None

    def __post_init__(self):
        if self.canvases not in WAYS:
            raise ValueError(f"`canvases` is {self.canvases!r}; expected one of {WAYS}")
        if self.canvas_length is not None:
            read("canvas_length", self.canvas_length, FIELDS["canvas_length"])


__all__ = ["Objective"]
