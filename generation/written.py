"""What has been written so far: the finished canvases, which rows have ended, and where."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers.generation.stopping_criteria import ConfidenceCriteria, EosTokenCriteria, MaxLengthCriteria, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from .arguments import shown
from .canvas import CanvasState
from .output import TokenScores
from .plan import Plan

SCORE_FIELDS = ("log_probs", "entropy", "changed_at", "revisions")


class Criteria(NamedTuple):
    """Stopping criteria: those asked after each canvas, and those of transformers that look for a place, asked after each token."""

    canvas: tuple[Callable, ...] = ()
    token: tuple[Callable, ...] = ()

    @classmethod
    def of(cls, criteria: Sequence[Callable] | None) -> "Criteria":
        """Raises ValueError for a criterion that reads the scores of single tokens."""
        criteria = criteria or ()
        if confident := [shown(one) for one in criteria if isinstance(one, ConfidenceCriteria)]:
            raise ValueError(f"`stopping_criteria` holds {confident[0]}, which reads scores; expected criteria of `input_ids` alone")
        token = [isinstance(one, EosTokenCriteria | MaxLengthCriteria | StopStringCriteria) for one in criteria]
        pairs = list(zip(criteria, token, strict=True))
        return cls(tuple(one for one, each in pairs if not each), tuple(one for one, each in pairs if each))


class Written:
    """Collects the canvases of one call of `generate`.

    `context` int64 (b, L) and `ended` bool (b,) are of the b rows still computed, whose places in the batch are `rows`;
    `passes` int64 (B,) is of all.
    """

    def __init__(
        self, plan: Plan, prompt: torch.Tensor, stop_strings: str | Sequence[str] | None, tokenizer,
        stopping_criteria: Criteria, streamer: BaseStreamer | None,
    ):  # fmt: skip
        self.plan, self.prompt, self.streamer = plan, prompt, streamer
        self.stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or [])
        self.tokenizer, self.stopping_criteria = tokenizer, stopping_criteria
        batch_size, device = prompt.shape[0], prompt.device
        self.rows = torch.arange(batch_size, device=device)
        self.context, self.generated = prompt, 0
        self.ended = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.passes = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._counts = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._tokens: list[torch.Tensor] = []
        self._values: dict[str, list[torch.Tensor]] = {}
        if streamer is not None:
            streamer.put(prompt.cpu())

    def add(self, state: CanvasState, logits: torch.Tensor | None = None) -> torch.Tensor:
        """Takes in a denoised canvas of the rows still computed. Returns the tokens to commit, padded behind a row's end."""
        values = {name: getattr(state, name) for name in SCORE_FIELDS}
        return self.add_tokens(state.argmax, torch.where(self.ended, 0, state.passes), values, logits)

    def add_tokens(
        self, tokens: torch.Tensor, passes: torch.Tensor, scores: dict[str, torch.Tensor] | None = None, logits: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Takes in the next tokens `(b, n)` of the rows still computed, however they were made; with their scores `(b, n)` and
        logits `(b, n, V)` where there are any."""
        plan, width = self.plan, tokens.shape[1]
        is_eos = torch.isin(tokens, plan.eos)
        kept = torch.where(is_eos.any(dim=1), is_eos.int().argmax(dim=1) + 1, width)  # (b,)
        stopped = is_eos.any(dim=1)
        if self.stop_strings:
            until = self._stop_places(tokens)
            stopped, kept = stopped | (until <= kept), torch.minimum(kept, until)
        for criterion in self.stopping_criteria.token:
            until = self._until(criterion, tokens)
            stopped, kept = stopped | (until <= kept), torch.minimum(kept, until)
        kept = torch.where(self.ended, 0, kept).clamp(max=plan.new_tokens - self.generated)
        tokens = tokens.masked_fill(torch.arange(width, device=tokens.device) >= kept[:, None], plan.pad)
        whole = tokens.new_full((self.passes.shape[0], width), plan.pad)
        self._tokens.append(whole.index_copy(0, self.rows, tokens))
        for name, value in {**(scores or {}), **({"logits": logits} if plan.keep_logits else {})}.items():
            blank = value.new_zeros((self.passes.shape[0], *value.shape[1:]))
            self._values.setdefault(name, []).append(blank.index_copy(0, self.rows, value))
        self.passes[self.rows] += passes
        self._counts[self.rows] += kept
        self.context = torch.cat((self.context, tokens), dim=1)
        self.generated += width
        self.ended = self.ended | stopped
        if self.streamer is not None and int(kept.max()) > 0:
            new = self._tokens[-1][:, : int(kept.max())].cpu()
            self.streamer.put(new[0] if len(new) == 1 else new)  # one row as single tokens: who counts them counts right
        for criterion in self.stopping_criteria.canvas:
            self.ended = self.ended | self._asked(criterion, self.context)
        if self.generated >= plan.new_tokens:
            self.ended = torch.ones_like(self.ended)
        return tokens

    def drop_ended(self) -> None:
        """Rows that have ended leave."""
        going = ~self.ended
        self.rows, self.context, self.ended = self.rows[going], self.context[going], self.ended[going]

    def _until(self, criterion: Callable, tokens: torch.Tensor) -> torch.Tensor:
        """How many of the new tokens a row keeps until `criterion` ends it, int64 (b,); more than it has: it does not."""
        until = torch.full_like(self.ended, tokens.shape[1] + 1, dtype=torch.int64)
        for count in range(tokens.shape[1], 0, -1):
            until = torch.where(self._asked(criterion, torch.cat((self.context, tokens[:, :count]), dim=1)), count, until)
        return until

    @staticmethod
    def _asked(criterion: Callable, input_ids: torch.Tensor) -> torch.Tensor:
        """Which rows a criterion ends, bool (b,)."""
        found = criterion(input_ids, None)
        answer = torch.tensor(found, dtype=torch.bool, device=input_ids.device) if isinstance(found, bool) else found
        if not isinstance(answer, torch.Tensor) or answer.dtype != torch.bool or tuple(answer.shape) not in ((), (len(input_ids),)):
            raise ValueError(
                f"`stopping_criteria` holds {shown(criterion)}, which returned {shown(found)}; expected bool of shape ({len(input_ids)},)"
            )
        return answer.to(input_ids.device).expand(len(input_ids))

    def _stop_places(self, tokens: torch.Tensor) -> torch.Tensor:
        """How many of the new tokens a row keeps for its first stop string to be whole, int64 (b,); more than it has: none found."""
        before = self.context[:, self.prompt.shape[1] :]
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

    def sequences(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt and new tokens of all rows, `(B, P + N)`, padded to the longest; and how many are new, int64 `(B,)`."""
        new = torch.cat(self._tokens, dim=1)[:, : int(self._counts.max())]
        return torch.cat((self.prompt, new), dim=1), self._counts

    def scores(self) -> TokenScores | None:
        """Scores of the new tokens; None where the way of decoding has none."""
        return TokenScores(*(self._joined(name) for name in SCORE_FIELDS)) if SCORE_FIELDS[0] in self._values else None

    def logits(self) -> torch.Tensor | None:
        """Logits of the new tokens, `(B, N, V)`; None unless the plan keeps them."""
        return self._joined("logits") if "logits" in self._values else None

    def _joined(self, name: str) -> torch.Tensor:
        """What belongs to the new tokens, `(B, N, ...)`, 0 behind the end of a row."""
        length = int(self._counts.max())
        outside = torch.arange(length, device=self._counts.device) >= self._counts[:, None]
        joined = torch.cat(self._values[name], dim=1)[:, :length]
        return joined.masked_fill(outside.view(*outside.shape, *[1] * (joined.dim() - 2)), 0)


__all__ = ["Criteria", "Written"]
