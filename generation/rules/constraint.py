"""What a canvas must become, beyond the rules of `DiffusionGenerationConfig`: the seam between a prediction and the step it leads to."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from .prediction import Prediction, Wanted
from .state import CanvasState


class Constraint(Protocol):
    """Sees every prediction before anything is accepted, measured or fed back; pass one to `generate` as `constraint`.

    `wanted`: what predictions must hold beside the rest, such as each position's most probable candidates.
    """

    wanted: Wanted

    def constrain(self, prediction: Prediction, state: CanvasState, embed: Callable[[torch.Tensor], torch.Tensor]) -> Prediction:
        """The prediction that counts, for the b rows still computed: `prediction._replace(...)` with another `sample`, `argmax`, `entropy`,
        `log_probs` or `soft_embeds`, of the same shapes.

        Args:
            state: of the canvas that the prediction is about.
            embed: gives ids int64 (b, C) as the model's input embeddings `(b, C, D)`, for another `soft_embeds`.
        """
        ...

    def select(self, rows: torch.Tensor) -> "Constraint":
        """The constraint of some of the rows, int64, once others have left; the constraint itself stays as it is."""
        ...


def is_constraint(given: Any) -> bool:
    """Whether it is one of the caller's, which sees predictions."""
    return not isinstance(given, type) and all(callable(getattr(given, name, None)) for name in ("constrain", "select"))


def check_constrained(constraint: Constraint, found: Any, given: Prediction) -> Prediction:
    """What a constraint makes of a prediction must be one that holds the same, each tensor in its shape and dtype. Returns it. Ids are not
    read."""
    if isinstance(found, Prediction):
        pairs = list(zip(found, given, strict=True))
        if all(isinstance(new, torch.Tensor) if old is not None else new is None for new, old in pairs):
            if all(new.shape == old.shape and new.dtype == old.dtype for new, old in pairs if old is not None):
                return found
    raise ValueError(
        f"`constraint` is a {type(constraint).__name__}, whose `constrain` returned a {type(found).__name__}; expected "
        "`prediction._replace(...)` with tensors of the same shapes and dtypes"
    )


__all__ = ["Constraint", "check_constrained", "is_constraint"]
