"""What belongs to the rows of a batch that are still computed, with one owner: rows leave in one place."""

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import Cache, DynamicCache

from ..call.plan import Plan
from ..call.progress import Progress
from ..rules.constraint import Constraint
from ..rules.draws import BatchDraws, Draws
from ..vocabulary.filters import Filters


class Rows(NamedTuple):
    """Of b rows, in the order of the batch.

    Args:
        places: their places in the batch, int64 (b,).
        cache: keys and values of their tokens, or None before there are any.
        real: bool (b, L), which of the tokens so far are no padding.
        committed: int64 (b, P + N), prompt and what is written, without what is only in the cache or given as embeddings.
        generated: N, how many tokens of each row are written.
        draws: where their random numbers come from.
        filters: which ids they may get; `hidden_before` counts from the next token.
        constraint: the caller's, which sees their predictions.
        progress: what they must write, and how far they are.
        count_padding: whether positions count padding, as transformers' do; or each row's real tokens alone.
    """

    places: torch.Tensor
    cache: Cache | None
    real: torch.Tensor
    committed: torch.Tensor
    generated: int
    draws: Draws
    filters: Filters
    constraint: Constraint | None = None
    progress: Progress | None = None
    count_padding: bool = False

    def select(self, rows: torch.Tensor) -> "Rows":
        """Those of `rows`, int64 on the host; these rows, their cache and their constraint stay as they are."""
        here = rows.to(self.places.device)
        return self._replace(
            places=self.places[here], cache=None if self.cache is None else select_cache(self.cache, here), real=self.real[here],
            committed=self.committed[here], draws=self.draws.select(rows), filters=self.filters.select(here),
            constraint=None if self.constraint is None else self.constraint.select(here),
            progress=None if self.progress is None else self.progress.select(here),
        )  # fmt: skip

    def left(self, plan: Plan) -> int:
        """How many tokens each may still get."""
        return plan.lengths.new_tokens - self.generated

    def on_canvas(self, plan: Plan) -> "Rows":
        """These, with what their constraints leave possible on the canvas that they begin."""
        return self if self.progress is None else self._replace(progress=self.progress.on(plan.lengths.canvas, self.left(plan)))

    def accept(self, canvas: torch.Tensor) -> torch.Tensor:
        """Bool (b,): whether a row may write `canvas` int64 (b, C), as it is, on the one that it begins."""
        return torch.ones_like(self.places, dtype=torch.bool) if self.progress is None else self.progress.accept(canvas)

    def can_leave(self) -> bool:
        """Whether the cache can be narrowed to some of the rows."""
        return type(self.cache) is DynamicCache and not getattr(self.cache, "offloading", False)

    def within(self, earlier: "Rows") -> torch.Tensor:
        """Where these rows stand among `earlier` ones, of which they are some: int64 (b,)."""
        return torch.searchsorted(earlier.places, self.places)

    def commit(self, tokens: torch.Tensor, ended: torch.Tensor | None = None) -> "Rows":
        """With new tokens int64 (b, n) behind those so far. `ended` bool (b,): rows that write nothing more; None: the tokens may still be
        others, and no constraint takes them for written."""
        progress = self.progress if self.progress is None or ended is None else self.progress.commit(tokens, ended)
        hidden_before = max(self.filters.hidden_before - tokens.shape[1], 0)
        return self._replace(
            filters=replace(self.filters, hidden_before=hidden_before),
            real=torch.cat((self.real, torch.ones_like(tokens, dtype=torch.bool)), dim=1),
            committed=torch.cat((self.committed, tokens), dim=1), generated=self.generated + tokens.shape[1], progress=progress,
        )  # fmt: skip

    def positions(self, length: int) -> torch.Tensor:
        """Positions of the last `length` tokens, int64 (b or 1, length), counted from 0. Rotary attention sees only differences, so
        `count_padding`, for the reference backend, changes rounding alone."""
        if self.count_padding:
            return torch.arange(self.real.shape[1] - length, self.real.shape[1], device=self.real.device)[None]
        return (self.real.cumsum(dim=1) - 1).clamp(min=0)[:, -length:]

    def prefill(self, model, inputs: dict[str, torch.Tensor], length: int, **options: int) -> torch.Tensor:
        """Runs the last `length` tokens causally into the cache. `inputs`: `input_ids` or `inputs_embeds`, and images; `options` as
        `prefill` takes them. Returns the last hidden states `(b, n, D)`."""
        given = {**inputs, "attention_mask": self.real, "position_ids": self.positions(length), "cache": self.cache, **options}
        return model.prefill(**given).last_hidden_state

    def view(self, model, length: int, slots: int = 0) -> Any:
        """What a canvas of `length` behind these rows sees: it holds for every denoising step."""
        over = self.commit(self.places.new_zeros(len(self.places), length))
        return model.prepare_canvas(self.cache, (len(self.places), length), over.real, over.positions(length), slots=slots)


def plain_rows(ids: torch.Tensor, cache: Cache) -> Rows:
    """Rows that are read and not written: ids int64 (b, P) behind those in the cache, all of them text."""
    real = torch.ones((len(ids), int(cache.get_seq_length()) + ids.shape[1]), dtype=torch.bool, device=ids.device)
    return Rows(torch.arange(len(ids), device=ids.device), cache, real, ids, 0, BatchDraws(), Filters())


def select_cache(cache: Cache, rows: torch.Tensor) -> Cache:
    """A cache of some of the rows; the given one stays as it is."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)
    return selected


__all__ = ["Rows", "plain_rows", "select_cache"]
