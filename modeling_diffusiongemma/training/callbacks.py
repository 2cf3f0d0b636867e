"""Callbacks for `transformers.Trainer`. What needs more of it than a callback is shown stands in `trainer`."""

from collections.abc import Sequence
from dataclasses import replace

from transformers import TrainerCallback

from generation.arguments import FIELDS, read


class GrowingCanvas(TrainerCallback):
    """Trains on canvases of one length after the other, each for an equal share of the steps: narrow ones, which are cheap, first.

    Args:
        lengths: of canvases, in tokens, such as `(32, 64, 128, 256)`. The last is the one to generate with.

    Raises:
        ValueError: no lengths, or one that is no positive integer.
    """

    def __init__(self, lengths: Sequence[int]):
        if not lengths:
            raise ValueError(f"`lengths` is {lengths!r}; expected at least one canvas length")
        self.lengths = tuple(read("lengths", length, FIELDS["canvas_length"]) for length in lengths)

    def on_step_begin(self, args, state, control, model, **kwargs):
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        place = len(self.lengths) * state.global_step // state.max_steps
        model.objective = replace(model.objective, canvas_length=self.lengths[place])


__all__ = ["GrowingCanvas"]
