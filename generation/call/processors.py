"""The arguments of `GenerationConfig` that change a distribution, carried over to a canvas with transformers' own processors.

- processors that need the tokens before a position (repetition_penalty, no_repeat_ngram_size, bad_words_ids, sequence_bias)
  see, for position j, everything committed and then the previous step's argmax canvas up to j, as if it were being written
  from left to right. They run position by position on the raw logits: exact, and slow;
- behind the temperature, what needs only the distribution sees every position as a row: `Filters` (suppress_tokens, top_k, top_p,
  min_p, and min_new_tokens, which hides the end-of-sequence ids at the positions it concerns), then typical_p, epsilon_cutoff and
  eta_cutoff.

The caller's processors come first of all (`CallersProcessor`): transformers' classes in the same ways, those of libraries that follow a
text token by token one token at a time where there is one, all others with whole canvases.
`Shaping.why_dense` says what no pass over pieces of the vocabulary can do.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TypicalLogitsWarper,
)

from ..arguments import shown
from ..vocabulary.filters import MOST_TOP_K, Filters
from .configuration import DiffusionGenerationConfig

# transformers' classes for `(rows, V)` by what they look at: the distribution alone; how many tokens come before, too; which ones. Those of
# arguments that `generate` refuses are refused as the arguments are, and so are those that keep a state from token to token.
DISTRIBUTION, LENGTH, TOKENS = "distribution", "length", "tokens"
LOOKS_AT = {
    **dict.fromkeys(
        ("EpsilonLogitsWarper", "EtaLogitsWarper", "InfNanRemoveLogitsProcessor", "LogitNormalization", "MinPLogitsWarper",
         "SuppressTokensLogitsProcessor", "TemperatureLogitsWarper", "TopHLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper",
         "TypicalLogitsWarper"),
        DISTRIBUTION,
    ),
    **dict.fromkeys(("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor"), LENGTH),
    **dict.fromkeys(
        ("NoBadWordsLogitsProcessor", "NoRepeatNGramLogitsProcessor", "RepetitionPenaltyLogitsProcessor", "SequenceBiasLogitsProcessor"),
        TOKENS,
    ),
}  # fmt: skip
# Packages whose processors remember what they were shown, and want each token once and in order: outlines 1.3, xgrammar 0.2.
FOLLOWING = ("outlines", "xgrammar")
FOLLOWS = "follows"  # one that does
CANVAS_CLASSES = "transformers.models.diffusion_gemma."  # modules of classes that are written for `(B, C, V)`


@dataclass(frozen=True)
class CallersProcessor:
    """A processor of the caller's.

    Args:
        function: `(input_ids, scores) -> scores`.
        looks_at: what it looks at if it takes `(rows, V)`, or `FOLLOWS`; None: it takes whole canvases `(B, C, V)`.
        takes_step: whether it takes `cur_step`, too.
    """

    function: Callable
    looks_at: str | None
    takes_step: bool

    @classmethod
    def of(cls, function: Callable, decoding: str = "diffusion") -> "CallersProcessor":
        """Tells transformers' classes, and what is derived from them, from processors written for a canvas, which may take `cur_step`.

        Raises:
            ValueError: one of transformers' that has no meaning here, one with arguments that nobody gives it, or one that follows a text
                token by token where it is written otherwise.
        """
        if any(base.__module__.partition(".")[0] in FOLLOWING for base in type(function).__mro__):
            if decoding != "autoregressive":
                raise ValueError(
                    f"`logits_processor` holds {type(function).__name__} of {type(function).__module__}, which follows a text token by "
                    "token, and a canvas is written all at once; expected `constraint=` with a Regex, JsonSchema or Choice of `generation` "
                    "instead of it, or `decoding='autoregressive'`"
                )
            return cls(function, FOLLOWS, False)
        call = function if inspect.isroutine(function) else type(function).__call__
        try:
            parameters = list(inspect.signature(call).parameters.values())
        except ValueError:  # a builtin that does not say
            parameters = []
        if call is not function:
            parameters = parameters[1:]  # self
        takes_step = any(parameter.name == "cur_step" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters[2:])
        unknown = [
            parameter.name
            for parameter in parameters[2:]
            if parameter.name != "cur_step" and parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        ]  # fmt: skip
        if unknown:
            raise ValueError(
                f"`logits_processor` holds {shown(function)}, which takes {unknown}; expected at most `cur_step` beside the logits"
            )
        theirs = [base for base in type(function).__mro__ if base.__module__.startswith("transformers.") and base is not LogitsProcessor]
        if not theirs or takes_step or theirs[0].__module__.startswith(CANVAS_CLASSES):
            return cls(function, None, takes_step)
        name = theirs[0].__name__
        if name not in LOOKS_AT or isinstance(getattr(function, "prompt_ignore_length", None), torch.Tensor):
            raise ValueError(
                f"`logits_processor` holds a {name}; expected one of {sorted(LOOKS_AT)}, with settings that are the same for all rows, "
                "or a processor for logits of shape (batch, canvas_length, vocab_size)"
            )
        return cls(function, LOOKS_AT[name], False)

    def __call__(self, logits: torch.Tensor, committed: torch.Tensor, guess: torch.Tensor | None, remaining: int) -> torch.Tensor:
        """As `Shaping.__call__`."""
        if self.looks_at == DISTRIBUTION:
            return _each(self._checked, logits)
        if self.looks_at == FOLLOWS:
            return self._checked(committed, logits[:, 0])[:, None]
        if self.looks_at == LENGTH and guess is None:
            guess = committed.new_zeros(logits.shape[:2])  # only how many they are is looked at
        if self.looks_at is not None:
            return _left_to_right(self._checked, logits, committed, guess)
        given = logits.clone() if guess is None else None
        found = self._checked(committed, logits, **({"cur_step": remaining} if self.takes_step else {}))
        if given is not None and (place := changed_alike(given, found)) is not None:
            raise ValueError(
                f"`logits_processor` holds {shown(self.function)}, which changed all ids of position {place} alike, and so none: logits of "
                "a canvas are (batch, canvas_length, vocab_size), of which `scores[:, ids]` are positions; expected `scores[..., ids]`"
            )
        return found

    def _checked(self, input_ids: torch.Tensor, scores: torch.Tensor, **step: int) -> torch.Tensor:
        shape = tuple(scores.shape)
        try:
            found = self.function(input_ids, scores, **step)
        except Exception as error:
            error.add_note(
                f"raised by {shown(self.function)} of `logits_processor`, which was given logits of shape {shape}"
                + (": a canvas is written all at once, and `constraint=` says what its text must be" if len(shape) == 3 else "")
            )
            raise
        if not isinstance(found, torch.Tensor) or tuple(found.shape) != shape:
            raise ValueError(
                f"`logits_processor` holds {shown(self.function)}, which returned {shown(found)}; expected logits of shape {shape}"
            )
        return found


def changed_alike(given: torch.Tensor, found: torch.Tensor) -> int | None:
    """The first position at which some row's logits `(B, C, V)` were all banned, or all moved by a number by which others of its positions
    were not; None where there is none. Such a change says nothing of the ids, and who makes it takes positions for ids."""
    change = found - given
    size, spread = change.abs().amax(dim=-1), change.amax(dim=-1) - change.amin(dim=-1)
    moved = (spread <= 1e-4 * size) & spread.isfinite() & (size > 0)  # (B, C)
    moved &= ~moved.all(dim=1, keepdim=True)
    numbers = change[..., 0][moved]
    if len(numbers) and float(numbers.max() - numbers.min()) > 1e-4 * float(numbers.abs().max()):
        moved = torch.zeros_like(moved)  # each by another number, as a normalisation does
    moved |= (found.amax(dim=-1) == -float("inf")) & (given.amax(dim=-1) > -float("inf"))
    return int(moved.any(dim=0).int().argmax()) if bool(moved.any()) else None


@contextlib.contextmanager
def float32_made() -> Iterator[None]:
    """For the length of the block: torch's default dtype, which transformers' processors give to biases and cutoffs, is float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _each(processor: Callable, logits: torch.Tensor) -> torch.Tensor:
    """Every position as a row of its own."""
    flat = logits.flatten(0, 1)
    return processor(flat.new_zeros((flat.shape[0], 0), dtype=torch.int64), flat).view_as(logits)


def _left_to_right(processor: Callable, logits: torch.Tensor, committed: torch.Tensor, guess: torch.Tensor | None) -> torch.Tensor:
    """Position by position, each behind what is committed and the guess before it."""
    shaped = []
    with float32_made():
        for place in range(logits.shape[1]):
            before = committed if guess is None else torch.cat((committed, guess[:, :place]), dim=1)
            shaped.append(processor(before, logits[:, place].clone()))
    return torch.stack(shaped, dim=1)


@dataclass(frozen=True)
class Shaping:
    """Turns raw logits into the shaped ones that are sampled, measured and fed back.

    Args:
        callers: the caller's processors, first of all.
        contextual: of a position and what stands before it.
        filters: of single positions, behind the temperature; those of a row may say more.
        after: of single positions, last of all.
    """

    callers: tuple[CallersProcessor, ...]
    contextual: LogitsProcessorList
    filters: Filters
    after: LogitsProcessorList

    def __call__(
        self,
        logits: torch.Tensor,
        filters: Filters,
        committed: torch.Tensor,
        guess: torch.Tensor | None,
        temperature: float | torch.Tensor,
        remaining: int,
    ) -> torch.Tensor:
        """Args: `logits` float32 (B, C, V); `filters` of these rows and this canvas; `committed` int64 (B, L), prompt and finished
        canvases; `guess` int64 (B, C), the last argmax canvas, None at the first step; `remaining`: steps left, this one
        included. Returns float32 (B, C, V)."""
        if self.callers:
            logits = logits.clone()  # the model's are not theirs to change
        for processor in self.callers:
            logits = processor(logits, committed, guess, remaining)
        if self.contextual:
            logits = _left_to_right(self.contextual, logits, committed, guess)
        logits = filters.apply(logits / temperature)
        return _each(self.after, logits) if self.after else logits

    def why_dense(self) -> str | None:
        """What of it needs whole logits; None where nothing does."""
        if (self.filters.top_k or 0) > MOST_TOP_K:
            return f"`top_k` is more than {MOST_TOP_K}"
        needed = [shown(processor.function) for processor in self.callers]
        needed += [type(processor).__name__ for processor in (*self.contextual, *self.after)]
        return f"{' and '.join(needed)} take whole logits" if needed else None


def build_shaping(
    config: DiffusionGenerationConfig, given: Sequence[Callable] | None, eos: torch.Tensor, prompt_length: int, vocab_size: int
) -> Shaping:
    """The processors that `config` asks for, behind those `given`.

    Raises:
        ValueError: a token id outside the vocabulary, no id left, a processor of the caller's that has no meaning here.
    """
    device = eos.device
    allowed, contextual, after = None, LogitsProcessorList(), LogitsProcessorList()
    if config.suppress_tokens:
        suppressed = torch.tensor(_ids("suppress_tokens", config.suppress_tokens, vocab_size), dtype=torch.int64, device=device)
        if len(set(config.suppress_tokens)) == vocab_size:
            raise ValueError(f"`suppress_tokens` holds all of {vocab_size} token ids; expected one that is left at least")
        allowed = torch.ones(vocab_size, dtype=torch.bool, device=device).index_fill(0, suppressed, False)
    if config.sequence_bias is not None:
        for ids, _ in config.sequence_bias:
            _ids("sequence_bias", ids, vocab_size)
        contextual.append(SequenceBiasLogitsProcessor(sequence_bias=config.sequence_bias))
    if config.repetition_penalty not in (None, 1.0):
        contextual.append(RepetitionPenaltyLogitsProcessor(penalty=config.repetition_penalty))
    if config.no_repeat_ngram_size not in (None, 0):
        contextual.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.bad_words_ids is not None:
        for words in config.bad_words_ids:
            _ids("bad_words_ids", words, vocab_size)
        if any(len(words) > 1 or words[0] not in eos.tolist() for words in config.bad_words_ids):  # an end of sequence is no word
            contextual.append(NoBadWordsLogitsProcessor(config.bad_words_ids, eos_token_id=eos if len(eos) else None))
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    thresholds = {name: getattr(config, name) for name, value in off.items() if getattr(config, name) not in (None, value)}
    if "top_k" in thresholds:
        thresholds["top_k"] = min(thresholds["top_k"], vocab_size)
    least = max(config.min_new_tokens or 0, (config.min_length or 0) - prompt_length, 0)
    filters = Filters(allowed, hidden=eos if len(eos) else None, hidden_before=least, **thresholds)
    if config.typical_p not in (None, 1.0):
        after.append(TypicalLogitsWarper(config.typical_p))
    if config.epsilon_cutoff not in (None, 0.0):
        after.append(EpsilonLogitsWarper(config.epsilon_cutoff))
    if config.eta_cutoff not in (None, 0.0):
        with float32_made():
            after.append(EtaLogitsWarper(config.eta_cutoff, device=str(device)))
    callers = tuple(CallersProcessor.of(each, config.decoding) for each in given or ())
    return Shaping(callers, contextual, filters, after)


def _ids(name: str, ids: list[int], vocab_size: int) -> list[int]:
    if bad := [token for token in ids if not 0 <= token < vocab_size]:
        raise ValueError(f"`{name}` holds {bad}; expected token ids from 0 to {vocab_size - 1}")
    return ids


__all__ = ["CallersProcessor", "Shaping", "build_shaping"]
