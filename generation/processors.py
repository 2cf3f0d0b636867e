"""The arguments of `GenerationConfig` that change a distribution, carried over to a canvas with transformers' own processors.

`Shaping.before` runs on the raw logits, `Shaping.after` behind the temperature, as in autoregressive generation:

- processors that need only the distribution (top_k, top_p, min_p, ..., suppress_tokens) see every position as a row;
- processors that need the tokens before a position (repetition_penalty, no_repeat_ngram_size, bad_words_ids, sequence_bias)
  see, for position j, everything committed and then the previous step's argmax canvas up to j, as if it were being written
  from left to right. They run position by position: exact, and slow;
- min_new_tokens hides the end-of-sequence ids at the positions it concerns.

`Shaping.streamable` is the same for a pass over pieces of the vocabulary, where that can be.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .configuration import DiffusionGenerationConfig
from .filters import MOST_TOP_K, Filters


@contextlib.contextmanager
def float32_made() -> Iterator[None]:
    """For the length of the block: torch's default dtype, which transformers' processors give to biases and cutoffs, is float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Shaping:
    """Turns raw logits into the shaped ones that are sampled, measured and fed back.

    Args:
        own: the caller's processors, first of all.
        before, after: of single positions, around the temperature.
        contextual: of a position and what stands before it.
        eos: end-of-sequence ids, int64 (n,).
        min_new_tokens: generated tokens before which `eos` is hidden.
        filters: the same as `before` and `after`, for a pass over pieces of the vocabulary; None where only whole logits will do.
    """

    own: LogitsProcessorList
    before: LogitsProcessorList
    contextual: LogitsProcessorList
    after: LogitsProcessorList
    eos: torch.Tensor
    min_new_tokens: int
    filters: Filters | None

    def __call__(
        self,
        logits: torch.Tensor,
        committed: torch.Tensor,
        guess: torch.Tensor | None,
        generated: int,
        temperature: float | torch.Tensor,
        remaining: int,
    ) -> torch.Tensor:
        """Args: `logits` float32 (B, C, V); `committed` int64 (B, L), prompt and finished canvases; `guess` int64 (B, C), the last
        argmax canvas, None at the first step; `generated`: tokens before this canvas; `remaining`: steps left, this one
        included. Returns float32 (B, C, V)."""
        if self.own:
            logits = self.own(committed, logits, cur_step=remaining)
        if self.before:
            logits = self._each(self.before, logits)
        if self.contextual:
            logits = self._in_context(logits, committed, guess)
        if len(self.eos) and generated < self.min_new_tokens:
            early = torch.arange(generated, generated + logits.shape[1], device=logits.device) < self.min_new_tokens
            hidden = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device).scatter(0, self.eos, True)
            logits = logits.masked_fill(early[:, None] & hidden, -float("inf"))
        logits = logits / temperature
        return self._each(self.after, logits) if self.after else logits

    def streamable(self, generated: int) -> Filters | None:
        """What `__call__` does besides the temperature to a canvas that begins behind `generated` tokens, for `streamed_statistics`; None
        where a processor needs whole logits: the caller's own, those of a context, typical_p, epsilon_cutoff and eta_cutoff."""
        if self.own or self.contextual or self.filters is None:
            return None
        return replace(self.filters, hidden_before=max(self.min_new_tokens - generated, 0))

    @staticmethod
    def _each(processors: LogitsProcessorList, logits: torch.Tensor) -> torch.Tensor:
        flat = logits.flatten(0, 1)
        return processors(flat.new_zeros((flat.shape[0], 0), dtype=torch.int64), flat).view_as(logits)

    def _in_context(self, logits: torch.Tensor, committed: torch.Tensor, guess: torch.Tensor | None) -> torch.Tensor:
        shaped = []
        with float32_made():
            for place in range(logits.shape[1]):
                context = committed if guess is None else torch.cat((committed, guess[:, :place]), dim=1)
                shaped.append(self.contextual(context, logits[:, place].clone()))
        return torch.stack(shaped, dim=1)


def build_shaping(
    config: DiffusionGenerationConfig, own: LogitsProcessorList | None, eos: torch.Tensor, prompt_length: int, vocab_size: int
) -> Shaping:
    """The processors that `config` asks for.

    Raises:
        ValueError: a value out of range (transformers' processors say which), a token id outside the vocabulary.
    """
    device = eos.device
    before, contextual, after = LogitsProcessorList(), LogitsProcessorList(), LogitsProcessorList()
    if config.suppress_tokens:
        before.append(SuppressTokensLogitsProcessor(_ids("suppress_tokens", config.suppress_tokens, vocab_size), device=device))
    if config.sequence_bias is not None:
        bias = config.sequence_bias
        if isinstance(bias, dict):  # JSON has whole numbers, as OpenAI's logit_bias does; the processor takes floats alone
            bias = {ids: float(value) if isinstance(value, int) else value for ids, value in bias.items()}
        contextual.append(SequenceBiasLogitsProcessor(sequence_bias=bias))
    if config.repetition_penalty not in (None, 1.0):
        contextual.append(RepetitionPenaltyLogitsProcessor(penalty=config.repetition_penalty))
    if config.no_repeat_ngram_size not in (None, 0):
        contextual.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.bad_words_ids is not None:
        for words in config.bad_words_ids:
            _ids("bad_words_ids", words, vocab_size)
        contextual.append(NoBadWordsLogitsProcessor(config.bad_words_ids, eos_token_id=eos if len(eos) else None))
    warpers = {
        "top_k": (TopKLogitsWarper, 0), "top_p": (TopPLogitsWarper, 1.0), "min_p": (MinPLogitsWarper, 0.0),
        "typical_p": (TypicalLogitsWarper, 1.0), "epsilon_cutoff": (EpsilonLogitsWarper, 0.0),
    }  # fmt: skip
    active = {name: getattr(config, name) for name, (_, off) in warpers.items() if getattr(config, name) not in (None, off)}
    for name, value in active.items():
        after.append(warpers[name][0](value))
    filters = None
    if config.eta_cutoff not in (None, 0.0):
        with float32_made():
            after.append(EtaLogitsWarper(config.eta_cutoff, device=str(device)))
    elif active.keys() <= {"top_k", "top_p", "min_p"} and min(active.get("top_k", 0), vocab_size) <= MOST_TOP_K:
        allowed = None
        if config.suppress_tokens:
            suppressed = torch.tensor(config.suppress_tokens, dtype=torch.int64, device=device)
            allowed = torch.ones(vocab_size, dtype=torch.bool, device=device).index_fill(0, suppressed, False)
        filters = Filters(allowed, hidden=eos if len(eos) else None, **active)
    least = max(config.min_new_tokens or 0, (config.min_length or 0) - prompt_length)
    return Shaping(LogitsProcessorList() if own is None else own, before, contextual, after, eos, least, filters)


def _ids(name: str, ids: list[int], vocab_size: int) -> list[int]:
    if bad := [token for token in ids if not 0 <= token < vocab_size]:
        raise ValueError(f"`{name}` holds {bad}; expected token ids from 0 to {vocab_size - 1}")
    return ids


__all__ = ["Shaping", "build_shaping"]
