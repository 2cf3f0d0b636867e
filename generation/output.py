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
        lengths (`int64 (B,)`): new tokens of that row, its end included, padding excluded.
        finish_reasons: why that row has ended. "stop": an end of sequence, a stop string or a stopping criterion; "length": it got the
            tokens that it was allowed, `MaxLengthCriteria` included, and the last of them is no end; "time": `max_time` was over, or
            `MaxTimeCriteria`'s.
        tokens_per_forward (`float32 (B,)`): new tokens, padding excluded, per canvas pass of that row.
        denoising_steps (`int64 (B,)`): canvas passes of that row, over all its canvases.
        canvas_steps (`int64 (B, canvases)`): those of each canvas, 0 where a row had ended or took the canvas as it was given; None with
            another `decoding` than diffusion.
        cache: the cache, for another turn. It holds the prompt and every canvas but the last. None where rows of a
            batch left it early (pass a cache of your own, or a batch of one, to keep it), and with another `decoding` than diffusion.
        scores: `TokenScores`, with `output_scores`.
        logits (`float32 (B, N, V)`): with `output_logits`, the model's logits, nothing applied to them, from the pass that committed
            each token; 0 behind the end of a row. As large as it says: 1 MB a token at 262,144 ids.
        hidden_states, attentions: None. Others read these names of every output; `generate` refuses to be asked for them, the model gives
            them.
    """

    sequences: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    finish_reasons: list[str] | None = None
    tokens_per_forward: torch.Tensor | None = None
    denoising_steps: torch.Tensor | None = None
    canvas_steps: torch.Tensor | None = None
    cache: Cache | None = None
    scores: TokenScores | None = None
    logits: torch.Tensor | None = None
    hidden_states: None = None
    attentions: None = None


__all__ = ["DiffusionGenerationOutput", "TokenScores"]
