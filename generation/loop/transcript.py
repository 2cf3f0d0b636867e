"""What has been written so far: the tokens of every row, which rows have ended, where, and why."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import Cache
from transformers.generation.stopping_criteria import (
    ConfidenceCriteria,
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

from ..arguments import shown
from ..cache_names import FIELD
from ..call.configuration import DiffusionGenerationConfig
from ..call.plan import Plan
from ..output import DiffusionGenerationOutput, TokenScores
from ..rules.state import CanvasState
from ..watch.watcher import Watcher
from .rows import Rows

SCORE_FIELDS = ("log_probs", "entropy", "changed_at", "revisions")
GOING, STOP, LENGTH, TIME = range(4)
REASONS = (None, "stop", "length", "time")
PLACES = EosTokenCriteria | MaxLengthCriteria | StopStringCriteria  # transformers' criteria that look for a place in a text


@dataclass(frozen=True)
class AfterCanvas:
    """A stopping criterion that is asked after each canvas, not after each of its tokens: what it ends keeps the whole canvas.

    Args:
        criterion: `(input_ids, scores) -> bool (rows,)`, as `stopping_criteria` takes it.
    """

    criterion: Callable

    def __call__(self, input_ids: torch.Tensor, scores: None) -> bool | torch.Tensor:
        return self.criterion(input_ids, scores)


class Criteria(NamedTuple):
    """Stopping criteria: those asked after each canvas, and those asked after each token."""

    canvas: tuple[Callable, ...] = ()
    token: tuple[Callable, ...] = ()

    @classmethod
    def of(cls, criteria: Sequence[Callable] | None, config: DiffusionGenerationConfig, rows: int) -> "Criteria":
        """Each is asked after every token, as it is where tokens come one by one, but those of time and `AfterCanvas`; with the reference
        backend after every canvas, as by transformers' class for this model, but those of transformers that look for a place.

        Raises:
            ValueError: a criterion that reads the scores of single tokens; or that may remember rows, of which verified decoding shows one.
        """
        criteria, reference = criteria or (), config.backend == "reference"
        if confident := [shown(one) for one in criteria if isinstance(one, ConfidenceCriteria)]:
            raise ValueError(f"`stopping_criteria` holds {confident[0]}, which reads scores; expected criteria of `input_ids` alone")
        whole = [isinstance(one, MaxTimeCriteria | AfterCanvas) or (reference and not isinstance(one, PLACES)) for one in criteria]
        pairs = list(zip(criteria, whole, strict=True))
        found = cls(tuple(one for one, each in pairs if each), tuple(one for one, each in pairs if not each))
        if config.decoding == "verified" and rows > 1 and (callers := found.of_callers()):
            raise ValueError(
                f"`decoding='verified'` got {rows} rows, which it writes one after the other, and `stopping_criteria` {shown(callers[0])}; "
                "expected one row, or criteria of transformers alone"
            )
        return found

    def of_callers(self) -> list[Callable]:
        """Those of no class of transformers: each may remember what it was shown of a row."""
        return [one for one in (*self.canvas, *self.token) if not isinstance(one, PLACES | MaxTimeCriteria)]


def reason_of(criterion: Callable) -> int:
    """Why a row has ended that a criterion ends."""
    return LENGTH if isinstance(criterion, MaxLengthCriteria) else TIME if isinstance(criterion, MaxTimeCriteria) else STOP


def answer(criterion: Callable, input_ids: torch.Tensor) -> torch.Tensor:
    """Which rows a criterion ends, bool (b,)."""
    found = criterion(input_ids, None)
    ends = torch.tensor(found, dtype=torch.bool, device=input_ids.device) if isinstance(found, bool) else found
    if not isinstance(ends, torch.Tensor) or ends.dtype != torch.bool or tuple(ends.shape) not in ((), (len(input_ids),)):
        raise ValueError(
            f"`stopping_criteria` holds {shown(criterion)}, which returned {shown(found)}; expected bool of shape ({len(input_ids)},)"
        )
    return ends.to(input_ids.device).expand(len(input_ids))


class Transcript:
    """Collects what one call of `generate` writes, of all B rows of the batch. Which of them are still computed `Rows` knows.

    `reasons` int64 (B,): why each row has ended, `GOING` where it goes on. `passes` int64 (B,): canvas passes of each;
    `canvas_passes`: those of each canvas that diffusion alone wrote.
    """

    def __init__(
        self, plan: Plan, prompt: torch.Tensor, stop_strings: str | Sequence[str] | None, tokenizer, criteria: Criteria,
        watchers: Sequence[Watcher],
    ):  # fmt: skip
        self.plan, self.prompt, self.watchers = plan, prompt, watchers
        self.stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or [])
        self.tokenizer, self.criteria = tokenizer, criteria
        self.reasons, self.passes, self.lengths = (prompt.new_zeros(prompt.shape[0]) for _ in range(3))
        self.canvas_passes: list[torch.Tensor] = []
        # By name of what is collected: the rows' places, the first token's, and the values (b, n, ...) themselves.
        self._values: dict[str, list[tuple[torch.Tensor, int, torch.Tensor]]] = {}
        for watcher in watchers:
            watcher.begin(plan.rules.schedule)
            watcher.start(prompt)

    @property
    def ended(self) -> torch.Tensor:
        """Bool (B,)."""
        return self.reasons != GOING

    def add_canvas(self, rows: Rows, state: CanvasState) -> torch.Tensor:
        """Takes in a denoised canvas. Returns the tokens to commit, padded behind a row's end."""
        values = {name: getattr(state, name) for name in SCORE_FIELDS}
        passes = torch.where(self.ended[rows.places], 0, state.passes)
        self.canvas_passes.append(torch.zeros_like(self.passes).index_copy(0, rows.places, passes))
        return self.add(rows, state.argmax, passes, values, *state.logits)

    def add(
        self, rows: Rows, tokens: torch.Tensor, passes: torch.Tensor, scores: dict[str, torch.Tensor] | None = None,
        logits: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Takes in the next tokens `(b, n)` of the rows still computed, however they were made; with their scores `(b, n)` and
        logits `(b, n, V)` where there are any. Returns them, padded behind a row's end."""
        plan, places, width = self.plan, rows.places, tokens.shape[1]
        ended, allowed = self.ended[places], plan.lengths.new_tokens - rows.generated
        kept, reasons = self._ends(rows, tokens, torch.where(ended, 0, width + 1), min(allowed, width))
        reasons = torch.where(kept > allowed, LENGTH, reasons)
        kept = torch.where(ended, 0, kept.clamp(max=min(allowed, width)))
        tokens = tokens.masked_fill(torch.arange(width, device=tokens.device) >= kept[:, None], plan.rules.pad)
        logits = {"logits": logits} if plan.execution.keep_logits else {}
        for name, value in {"tokens": tokens, **(scores or {}), **logits}.items():
            self._values.setdefault(name, []).append((places, rows.generated, value))
        self.passes[places] += passes
        self.lengths[places] += kept
        late = torch.full_like(ended, plan.out_of_time())
        for criterion in self.criteria.canvas:
            ends, reason = answer(criterion, torch.cat((rows.committed, tokens), dim=1)), reason_of(criterion)
            if reason == TIME:
                late = late | ends
            else:
                reasons = torch.where((reasons == GOING) & ends, reason, reasons)
        if width >= allowed:
            reasons = torch.where(reasons == GOING, LENGTH, reasons)
        reasons = torch.where((reasons == GOING) & late, TIME, reasons)
        self.reasons[places] = torch.where(ended, self.reasons[places], reasons)
        if self.watchers:
            self._tell(places, tokens[:, : int(kept.max())], kept)
        return tokens

    def finish_reasons(self) -> list[str | None]:
        return [REASONS[reason] for reason in self.reasons.tolist()]

    def _tell(self, places: torch.Tensor, tokens: torch.Tensor, kept: torch.Tensor) -> None:
        batch_size = len(self.reasons)
        whole = tokens.new_full((batch_size, tokens.shape[1]), self.plan.rules.pad).index_copy(0, places, tokens)
        lengths = kept.new_zeros(batch_size).index_copy(0, places, kept)
        reasons = tuple(self.finish_reasons())
        for watcher in self.watchers:
            watcher.commit(whole, lengths, reasons)

    def _ends(self, rows: Rows, tokens: torch.Tensor, kept: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """How many of the new tokens each row keeps, and why no more, int64 (b,) each; more than it has, and `GOING`, where nothing
        ends it. `kept` int64 (b,): how many it keeps in any case; `most`: how many a row may keep."""
        is_eos = torch.isin(tokens, self.plan.rules.eos)
        found = [torch.where(is_eos.any(dim=1), is_eos.int().argmax(dim=1) + 1, kept)]
        if self.stop_strings:
            found.append(self._stop_places(rows, tokens))
        reasons = torch.zeros_like(kept)
        for until in found:
            reasons = torch.where(until < kept, STOP, reasons)
            kept = torch.minimum(kept, until)
        return self._ask(rows, tokens, kept, reasons, most)

    def _ask(
        self, rows: Rows, tokens: torch.Tensor, kept: torch.Tensor, reasons: torch.Tensor, most: int
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """As `_ends`, of the criteria asked after each token: in the order in which they would be written, once each, every row in its
        place and padded behind its end, until all rows have ended. A criterion may count, or remember, what it is shown."""
        before, places = rows.committed.shape[1], torch.arange(tokens.shape[1], device=tokens.device)
        for count in range(1, most + 1 if self.criteria.token else 1):
            if bool((kept < count).all()):
                break
            text = torch.cat((rows.committed, tokens.masked_fill(places >= kept[:, None], self.plan.rules.pad)), dim=1)[:, : before + count]
            for criterion in self.criteria.token:
                ends = answer(criterion, text) & (kept > count)
                reasons, kept = torch.where(ends, reason_of(criterion), reasons), torch.where(ends, count, kept)
        return kept, reasons

    def _stop_places(self, rows: Rows, tokens: torch.Tensor) -> torch.Tensor:
        """How many of the new tokens a row keeps for its first stop string to be whole, int64 (b,); more than it has: none found."""
        before = rows.committed[:, rows.committed.shape[1] - rows.generated :]
        places = []
        for earlier, new in zip(before.tolist(), tokens.tolist(), strict=True):
            found = len(new) + 1
            if self._holds_stop(earlier + new):
                found = next(count for count in range(len(new) + 1) if self._holds_stop(earlier + new[:count]))
            places.append(found)
        return torch.tensor(places, dtype=torch.int64, device=tokens.device)

    def _holds_stop(self, ids: list[int]) -> bool:
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        return any(stop in text for stop in self.stop_strings)

    def sequences(self) -> torch.Tensor:
        """Prompt and new tokens of all rows, `(B, P + N)`, padded to the longest."""
        return torch.cat((self.prompt, self._joined("tokens", self.plan.rules.pad)), dim=1)

    def output(self, cache: Cache | None) -> DiffusionGenerationOutput:
        """All of it; `cache`: for another turn."""
        execution = self.plan.execution
        return DiffusionGenerationOutput(
            sequences=self.sequences(), lengths=self.lengths, finish_reasons=self.finish_reasons(),
            tokens_per_forward=self.lengths.float() / self.passes.clamp(min=1), denoising_steps=self.passes,
            canvas_steps=torch.stack(self.canvas_passes, dim=1) if self.canvas_passes else None, **{FIELD: cache},
            scores=TokenScores(*map(self._joined, SCORE_FIELDS)) if execution.keep_scores else None,
            logits=self._joined("logits") if execution.keep_logits else None,
        )  # fmt: skip

    def _joined(self, name: str, blank: int = 0) -> torch.Tensor:
        """What belongs to the new tokens, `(B, N, ...)`, `blank` behind the end of a row."""
        found, longest = self._values[name], int(self.lengths.max())
        joined = found[0][2].new_full((len(self.reasons), longest, *found[0][2].shape[2:]), blank)
        for places, start, value in found:
            if start < longest:
                joined[places, start : start + value.shape[1]] = value[:, : longest - start]
        outside = torch.arange(longest, device=joined.device) >= self.lengths[:, None]
        return joined.masked_fill(outside.view(*outside.shape, *[1] * (joined.dim() - 2)), blank)


__all__ = ["SCORE_FIELDS", "AfterCanvas", "Criteria", "Transcript"]
