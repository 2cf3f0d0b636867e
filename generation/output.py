"""What `generate` returns with `return_dict_in_generate=True`."""

from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.utils import ModelOutput


@dataclass
class DiffusionGenerationOutput(ModelOutput):
    """Output of `DiffusionGenerationMixin.generate`.

    Args:
        sequences (`int64 (B, P + N)`): prompt and new tokens; N is the longest row's, shorter rows end in pad.
        tokens_per_forward (`float32 (B,)`): new tokens, padding excluded, per canvas pass of that row.
        denoising_steps (`int64 (B,)`): canvas passes of that row, over all its canvases.
        past_key_values: the cache, for another turn. It holds the prompt and every canvas but the last.
    """

    sequences: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    denoising_steps: torch.Tensor | None = None
    past_key_values: Cache | None = None


__all__ = ["DiffusionGenerationOutput"]
