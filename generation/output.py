"""What `generate` returns with `return_dict_in_generate=True`."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import Cache
from transformers.utils import ModelOutput


class TokenScores(NamedTuple):
    """Of every new token, each `(B, N)`: `log_probs` and `entropy`, float32 nats, of the token under the distribution that
    committed it; `step` int64, the denoising step since which it stood; `revisions` int64, how often it had changed before.
    Positions behind the end of a row hold 0."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    step: torch.Tensor
    revisions: torch.Tensor


@dataclass
class DiffusionGenerationOutput(ModelOutput):
    """Output of `DiffusionGenerationMixin.generate`.

    Args:
        sequences (`int64 (B, P + N)`): prompt and new tokens; N is the longest row's, shorter rows end in pad.
        tokens_per_forward (`float32 (B,)`): new tokens, padding excluded, per canvas pass of that row.
        denoising_steps (`int64 (B,)`): canvas passes of that row, over all its canvases.
        past_key_values: the cache, for another turn. It holds the prompt and every canvas but the last. None where rows of a
            batch left it early; pass a cache of your own, or a batch of one, to keep it.
        scores: `TokenScores`, with `output_scores`.
    """

    sequences: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    denoising_steps: torch.Tensor | None = None
    past_key_values: Cache | None = None
    scores: TokenScores | None = None


__all__ = ["DiffusionGenerationOutput", "TokenScores"]
