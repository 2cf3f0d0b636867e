"""A loss or a gradient that is not finite, told before it reaches the weights.

Trainer by itself logs the mean of the last losses in place of a NaN (`logging_nan_inf_filter`), takes the step, and every weight is NaN.
Float16's loss scaling is another matter: there gradients overflow now and then, and its scaler passes over the step.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

SEARCHED = 100_000  # examples of the data, at most, that a row is looked for among; each is collated
SHOWN = 5  # names of weights in a message


class NotFinite(ValueError):
    """`step`: the optimizer step that was not taken; `rows` of the batch, and `examples`, their places in the training data, as far as
    they are known."""

    def __init__(self, message: str, step: int, rows: list[int], examples: list[int]):
        super().__init__(message)
        self.step, self.rows, self.examples = step, rows, examples


def infinite_weights(named: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    return [name for name, value in named if value.is_floating_point() and not bool(value.detach().isfinite().all())]


def conversations(inputs: Mapping[str, torch.Tensor], row: int) -> set[tuple[int, ...]]:
    """The ids of each conversation of a row of the batch: one, or those that are packed into it, whose positions begin at 0 again."""
    ids, mask, positions = (inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    real = torch.ones_like(ids[row], dtype=torch.bool) if mask is None else mask[row].bool()
    kept = ids[row][real].tolist()
    starts = [0] if positions is None else (positions[row][real] == 0).nonzero().flatten().tolist()
    return {tuple(kept[begin:end]) for begin, end in zip(starts, [*starts[1:], len(kept)], strict=True)}


def places_in(dataset, collator, wanted: set[tuple[int, ...]]) -> list[int]:
    """The places of the examples that become one of the conversations `wanted`; none where the data can only be read once through, or
    the collator is not `BlockDiffusionCollator`."""
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and hasattr(collator, "read")):
        return []
    found = []
    for place in range(min(len(dataset), SEARCHED)):
        if tuple(collator.read(dataset[place]).ids) in wanted:
            found.append(place)
    return found


def refuse_loss(loss: torch.Tensor, output, inputs: Mapping[str, torch.Tensor], model: nn.Module, step: int, batch: int, dataset, collator):
    """Raises NotFinite for a loss that is not finite, and says where it comes from as far as can be found out.

    Args:
        output: the model's, with `canvas_losses` and `canvas_rows`; inputs: what it got.
        model: `DiffusionGemmaForMaskedBlockLM`, or a PEFT model around one.
        step, batch: the optimizer step, and the batch of those that make it, both from 1.
        dataset, collator: where the rows are looked for.
    """
    rows = output.canvas_rows[~output.canvas_losses.isfinite()].unique().tolist()
    weights = infinite_weights(model.named_parameters())
    count = inputs["input_ids"].shape[0]
    wanted = set().union(*(conversations(inputs, row) for row in rows)) if rows and not weights else set()
    examples = places_in(dataset, collator, wanted) if wanted else []
    told = [f"the loss of step {step} is {loss.item()} in batch {batch} of it; expected a finite one, and no weight has been changed by it"]
    if rows:
        told.append(f"not finite are the canvases of rows {rows} of {count}" + (f", examples {examples} of the data" if examples else ""))
    else:
        told.append("every canvas's loss is finite, and the next-token loss of the prompt pass is not")
    if weights:
        told.append(f"weights were not finite before: {named(weights)}")
    raise NotFinite(". ".join(told), step, rows, examples)


def refuse_gradients(model: nn.Module, step: int) -> None:
    """Raises NotFinite where a gradient is not finite, though the loss was: the optimizer would put it into the weights."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not gradients:
        return
    norm = torch.nn.utils.get_total_norm(gradients)
    if not bool((norm.full_tensor() if hasattr(norm, "full_tensor") else norm).isfinite()):
        names = infinite_weights((name, each.grad) for name, each in model.named_parameters() if each.grad is not None)
        where = named(names) if names else "their norm alone is too large for its dtype"
        raise NotFinite(
            f"gradients of step {step} are not finite, and its loss is; expected finite ones, and no weight has been changed: {where}",
            step, [], [],
        )  # fmt: skip


def named(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


__all__ = ["NotFinite", "places_in", "refuse_gradients", "refuse_loss"]
