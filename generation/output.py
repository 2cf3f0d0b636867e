"""What `generate` returns with `return_dict_in_generate=True`."""

from typing import NamedTuple

import torch
from transformers import Cache

from .cache_names import CacheOutput, cache_output


class TokenScores(NamedTuple):
    """Of every new token, each `(B, N)`: `log_probs` and `entropy`, float32 nats, of the token under the distribution that
    committed it; `step` int64, the denoising step since which it stood; `revisions` int64, how often it had changed before.
    Positions behind the end of a row hold 0."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    step: torch.Tensor
    revisions: torch.Tensor


@cache_output
class DiffusionGenerationOutput(CacheOutput):
    """Output of `DiffusionGenerationMixin.generate`.

    Args:
        sequences (`int64 (B, P + N)`): prompt and new tokens; N is the longest row's, shorter rows end in pad.
        tokens_per_forward (`float32 (B,)`): new tokens, padding excluded, per canvas pass of that row.
        denoising_steps (`int64 (B,)`): canvas passes of that row, over all its canvases.
        cache: the cache, for another turn. It holds the prompt and every canvas but the last. None where rows of a
            batch left it early; pass a cache of your own, or a batch of one, to keep it.
        scores: `TokenScores`, with `output_scores`.
        logits (`float32 (B, N, V)`): with `output_logits`, the model's logits, nothing applied to them, from the pass that committed
            each token; 0 behind the end of a row. As large as it says: 1 MB a token at 262,144 ids.
    """

    sequences: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    denoising_steps: torch.Tensor | None = None
    cache: Cache | None = None
    scores: TokenScores | None = None
    logits: torch.Tensor | None = None


def join_rows(rows: list, pad: int):
    """One output of several that `generate` returned for one prompt each, all prompts equally long: token ids `(1, P + n)` padded to
    the longest with `pad`, or `DiffusionGenerationOutput`, the rest of which is padded with 0."""

    def stack(parts: list[torch.Tensor], fill: int = 0) -> torch.Tensor:
        longest = max(part.shape[1] for part in parts)
        shape = (1, longest, *parts[0].shape[2:])
        return torch.cat([part.new_full(shape, fill).slice_scatter(part, 1, 0, part.shape[1]) for part in parts])

    if isinstance(rows[0], torch.Tensor):
        return stack(rows, pad)
    scores = None if rows[0].scores is None else TokenScores(*map(stack, zip(*(row.scores for row in rows), strict=True)))
    return DiffusionGenerationOutput(
        sequences=stack([row.sequences for row in rows], pad),
        tokens_per_forward=torch.cat([row.tokens_per_forward for row in rows]),
        denoising_steps=torch.cat([row.denoising_steps for row in rows]),
        scores=scores,
        logits=None if rows[0].logits is None else stack([row.logits for row in rows]),
    )


__all__ = ["DiffusionGenerationOutput", "TokenScores", "join_rows"]
