"""The prompt of one call of `generate`, as the loops take it: read from what the caller hands in, checked, and changed no more."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from transformers import Cache
from transformers.utils import logging

from ..checks import check_images, check_prompt, embed_conditioning, split_canvases
from .configuration import DiffusionGenerationConfig

logger = logging.get_logger(__name__)

IMAGES = ("pixel_values", "image_position_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class Prompt:
    """Of B rows.

    Args:
        ids: int64 (B, P), without columns where the prompt comes as embeddings.
        real: bool (B, L + P), cached tokens included.
        inputs: what `prefill` takes for it: `input_ids` or `inputs_embeds`, and images.
        cache: the caller's, or None.
        canvases: what the first canvases begin with, int64 (B, C) each; those behind them are noise.
        first_steps: of each of these the step from which it is denoised; the number of steps there are for one that stands as it is.
        soft_embeds: what conditions the first step of the first canvas, `(B, C, D)`, or None.
        copies: how many rows, side by side, each prompt has.
    """

    ids: torch.Tensor
    real: torch.Tensor
    inputs: dict[str, torch.Tensor]
    cache: Cache | None
    canvases: tuple[torch.Tensor, ...] = ()
    first_steps: tuple[int, ...] = ()
    soft_embeds: torch.Tensor | None = None
    copies: int = 1

    def repeat(self, copies: int) -> "Prompt":
        """Every row `copies` times, side by side (`num_return_sequences`)."""
        if copies == 1:
            return self

        def repeated(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.repeat_interleave(copies, dim=0)

        return replace(
            self, ids=repeated(self.ids), real=repeated(self.real), inputs={name: repeated(value) for name, value in self.inputs.items()},
            canvases=tuple(map(repeated, self.canvases)), soft_embeds=repeated(self.soft_embeds), copies=copies,
        )  # fmt: skip

    def canvas(self, index: int) -> tuple[torch.Tensor | None, int]:
        """What a canvas begins with, of all rows, None for noise; and its first step."""
        return (self.canvases[index], self.first_steps[index]) if index < len(self.canvases) else (None, 0)

    def inputs_of(self, row: int) -> dict[str, torch.Tensor]:
        """`inputs` of one row; of a batch of one all, since images are no rows."""
        return self.inputs if len(self.ids) == 1 else {name: value[row : row + 1] for name, value in self.inputs.items()}


def read_prompt(model, config: DiffusionGenerationConfig, given: Mapping[str, torch.Tensor | Cache | int | None]) -> Prompt:
    """The prompt among the arguments of `generate`, of which there is one.

    Raises:
        ValueError: an empty prompt, a mask of another shape or padding on the right, embeddings of another size, images without their
            tokens or tokens without images, canvases of another shape or with ids that there are not, or another number of them than of
            first steps, logits of another shape or with NaN; and whatever `check_prompt` of the model raises.
    """
    cache, mask, text_config = given["cache"], given["attention_mask"], model.config.get_text_config()
    seen = 0 if cache is None else int(cache.get_seq_length())
    inputs = {name: given[name] for name in IMAGES if given[name] is not None}
    if given["inputs_embeds"] is None:
        ids = given["inputs"] if given["input_ids"] is None else given["input_ids"]
        real = check_prompt("input_ids", ids, infer_mask(ids, config, seen) if mask is None else mask, seen)
        check_images(ids, given["pixel_values"], getattr(model.config, "image_token_id", None))
        inputs = {"input_ids": ids, **inputs}
    else:
        embeds, size = given["inputs_embeds"], text_config.hidden_size
        if embeds.shape[-1] != size:
            raise ValueError(f"`inputs_embeds` has shape {tuple(embeds.shape)}; expected (batch, length, {size})")
        real = check_prompt("inputs_embeds", embeds, mask, seen)
        ids = torch.zeros((embeds.shape[0], 0), dtype=torch.int64, device=embeds.device)
        inputs = {"inputs_embeds": embeds, **inputs}
    soft_embeds, canvases, first_steps = None, (), given["first_step"] or 0
    shape = (len(ids), config.canvas_length or model.config.canvas_length)
    if given["decoder_input_ids"] is not None:
        canvases = split_canvases(given["decoder_input_ids"], shape, text_config.vocab_size)
    first_steps = [first_steps] * len(canvases) if isinstance(first_steps, int) else first_steps
    if len(first_steps) != len(canvases):
        raise ValueError(f"`first_step` is {first_steps}; expected one for each of the {len(canvases)} canvases of `decoder_input_ids`")
    if given["self_conditioning_logits"] is not None:
        soft_embeds = embed_conditioning(model, given["self_conditioning_logits"], (*shape, text_config.vocab_size))
    prompt = Prompt(ids, real, inputs, cache, canvases, tuple(first_steps), soft_embeds).repeat(config.num_return_sequences or 1)
    if hasattr(model, "check_prompt"):
        model.check_prompt(**prompt.inputs, attention_mask=prompt.real, cache=cache)
    return prompt


def infer_mask(input_ids: torch.Tensor, config: DiffusionGenerationConfig, seen: int) -> torch.Tensor | None:
    """The mask of a batch that comes without one: `pad_token_id` at the beginning of a row is padding. None where there is none.

    With a warning, once, what may be padding stays text: where the pad token is an end of sequence too, which a prompt may hold; behind
    cached tokens; at the end of a row; and with the reference backend, which does as transformers' class does.
    """
    pad, ends = config.pad_token_id, config.eos_token_id
    if pad is None or input_ids.numel() == 0:
        return None
    padding = input_ids == pad
    first, last = padding[:, 0].any().item(), padding[:, -1].any().item()
    clear = pad not in (ends if isinstance(ends, list) else [ends]) and seen == 0 and config.backend != "reference"
    if last or (first and not clear):
        logger.warning_once(
            f"`input_ids` holds `pad_token_id` ({pad}) at the {'end' if last else 'beginning'} of a row and `attention_mask` is None: "
            "it is read as text. Pad on the left and pass `attention_mask`."
        )
    if not first or not clear:
        return None
    real = ~padding.long().cumprod(dim=1).bool()
    return real | ~real.any(dim=1, keepdim=True)  # of a row of nothing else all is text


__all__ = ["Prompt", "infer_mask", "read_prompt"]
