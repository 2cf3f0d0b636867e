"""Which ids of a position may be predicted: of whole logits, by transformers' own warpers, and piece by piece of the vocabulary.

`Filters.apply` is the one truth: transformers' `TopKLogitsWarper`, `TopPLogitsWarper` and `MinPLogitsWarper`, one after the other, behind
what hidden and allowed ids leave. A walk over the vocabulary has no whole logits: hidden and allowed ids need nothing but the piece at hand
(`listed`), and `top_k`, `top_p` and `min_p` keep the most probable ids of a position, so each is a threshold on its logits, which passes
over the pieces find before the one that uses it (`find_threshold`); no `(N, V)` tensor exists.

N: positions (B * C), W: ids of a piece.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.utils import _pytree as pytree
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .sums import MASKED, counts_rows

BINS = 4096  # of a histogram of logits; two of them, one inside a bin of the other, tell logits apart that differ by span / BINS^2
MOST_TOP_K = 1024  # so many logits a position are kept while the pieces pass; a greater top_k takes the dense way


@dataclass(frozen=True)
class Filters:
    """What narrows a distribution besides the temperature.

    `allowed`: bool `(V,)` or `(B, V)`, True where an id may be predicted. `allowed_ids`: int64 `(B, C, K)`, the only ids of a position,
    padded with -1; a position of -1 alone is free. `hidden`: int64 `(n,)`, ids that the first `hidden_before` positions may not
    have. `top_k`, `top_p`, `min_p`: as in `GenerationConfig`. None: not in use.

    Raises:
        ValueError: a value out of range, or a mask of another dtype.
    """

    allowed: torch.Tensor | None = None
    allowed_ids: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    hidden_before: int = 0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k > 0):
            raise ValueError(f"`top_k` is {self.top_k!r}; expected a positive integer")
        if self.top_p is not None and not 0 <= self.top_p < 1:
            raise ValueError(f"`top_p` is {self.top_p!r}; expected a share from 0 to below 1, or None to leave it out")
        if self.min_p is not None and not 0 < self.min_p <= 1:
            raise ValueError(f"`min_p` is {self.min_p!r}; expected a share above 0, at most 1, or None to leave it out")
        for name, dtype in (("allowed", torch.bool), ("allowed_ids", torch.int64), ("hidden", torch.int64)):
            if (value := getattr(self, name)) is not None and value.dtype != dtype:
                raise ValueError(f"`{name}` has dtype {value.dtype}; expected {dtype}")

    def select(self, rows: slice | torch.Tensor) -> "Filters":
        """The filters of some of the rows."""
        by_row = self.allowed is not None and self.allowed.dim() == 2
        allowed = self.allowed[rows] if by_row else self.allowed
        return replace(self, allowed=allowed, allowed_ids=None if self.allowed_ids is None else self.allowed_ids[rows])

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits float32 `(B, C, V)`, divided by the temperature, with -inf where an id may not be predicted."""
        kept = listed(self, 0, logits.shape[-1], *logits.shape[:2])
        flat = logits.flatten(0, 1)
        if kept is not None:
            flat = flat.masked_fill(~kept, -float("inf"))
        kinds = {TopKLogitsWarper: self.top_k, TopPLogitsWarper: self.top_p, MinPLogitsWarper: self.min_p}
        warpers = LogitsProcessorList(kind(value) for kind, value in kinds.items() if value is not None)
        return warpers(None, flat).view_as(logits)

    def without_thresholds(self) -> "Filters":
        """What hidden and allowed ids leave, alone."""
        return replace(self, top_k=None, top_p=None, min_p=None)

    def narrow(self) -> bool:
        """Whether an id of any position may be left out."""
        given = self.allowed is not None or self.allowed_ids is not None or (self.hidden is not None and self.hidden_before > 0)
        return given or self.need_threshold()

    def need_threshold(self) -> bool:
        """Whether passes over the pieces must come before the one that uses the filters."""
        return self.top_k is not None or self.top_p is not None or self.min_p is not None


pytree.register_dataclass(Filters)  # its tensors go into a recorded step as inputs


class Threshold(NamedTuple):
    """What is kept, `(N,)` each: logits of at least `floor` float32; and, with top_p, those whose `depth` below `top` float32 is less than
    `edge` int64, and the first `ties` int64 ids of just that depth. `scale`: depths a nat."""

    top: torch.Tensor
    floor: torch.Tensor
    edge: torch.Tensor | None
    ties: torch.Tensor | None
    scale: float

    def depth(self, logits: torch.Tensor) -> torch.Tensor:
        """How far logits (N, W) lie below the highest, int64, from 0 to BINS^2 - 1. NaN lies at 0, where it is kept, and found."""
        return ((self.top[:, None] - logits) * self.scale).nan_to_num_(nan=0.0).clamp_(0, BINS**2 - 1).long()

    def keep(self, logits: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What of a piece (N, W) is kept, bool (N, W). `seen` int64 (N,): how many ids of depth `edge` lay in the pieces before; the second
        value is the new one. NaN is kept, and found out later."""
        kept = ~(logits < self.floor[:, None])
        if self.edge is not None:
            depth, edge = self.depth(logits), self.edge[:, None]
            tied = (depth == edge) & kept  # where logits are all but equal, ids below the floor are as deep
            rank = tied.cumsum(dim=-1) + seen
            kept &= (depth < edge) | (tied & (rank <= self.ties[:, None]))
            seen = rank[:, -1:]
        return kept, seen


def listed(filters: Filters, start: int, width: int, batch_size: int, length: int) -> torch.Tensor | None:
    """What hidden and allowed ids leave of the piece of `width` ids from `start` on: bool `(B * C, W)`, `(1, W)` where all positions are
    alike, or None where all ids are left."""
    kept = None
    if filters.allowed is not None:
        kept = filters.allowed[..., start : start + width]
        kept = kept[None, None] if kept.dim() == 1 else kept[:, None]  # (B or 1, 1, W)
    if filters.allowed_ids is not None:
        place = filters.allowed_ids - start
        place = torch.where((place >= 0) & (place < width), place, width)
        given = torch.zeros((batch_size, length, width + 1), dtype=torch.bool, device=place.device).scatter_(-1, place, True)[..., :width]
        given |= (filters.allowed_ids < 0).all(dim=-1, keepdim=True)
        kept = given if kept is None else kept & given
    if filters.hidden is not None and filters.hidden_before > 0:
        ids, places = (torch.arange(count, device=filters.hidden.device) for count in (width, length))
        hidden = (ids[:, None] + start == filters.hidden).any(dim=-1)
        shown = (places[:, None] >= filters.hidden_before) | ~hidden
        kept = shown[None] if kept is None else kept & shown
    if kept is None or kept.shape[:2] == (1, 1):
        return None if kept is None else kept[0]
    return kept.expand(batch_size, length, width).flatten(0, 1)


def find_threshold(filters: Filters, walk: Callable[[], Iterable[torch.Tensor]], vocab_size: int) -> Threshold:
    """The threshold of `top_k`, then `top_p`, then `min_p`. One pass over the pieces; with `top_p` two more.

    `top_k` and `min_p` are exact. `top_p` is exact but for two things: shares of the mass are sums of other rounding (here float64),
    and logits that differ by less than `(log(V / (1 - top_p)) + 1) / BINS^2`, about 1e-6 nats and so less than the rounding of a
    logit, count as equal. Of equal logits at the threshold as many are kept as in transformers, the first ids; its sort leaves open which.

    Args:
        walk: called, goes over the pieces' shaped logits, float32 `(N, W)`, masked ids at `MASKED`; they may be overwritten.
    """
    highest = None
    for logits in walk():
        best = _highest(logits, filters.top_k)
        highest = best if highest is None else _highest(torch.cat((highest, best), dim=-1), filters.top_k)  # (N, top_k or 1)
    top, floor = highest[:, 0], torch.full_like(highest[:, 0], MASKED / 2)  # above what is masked
    if filters.top_k is not None:
        floor = torch.maximum(floor, highest[:, -1])
    if filters.top_p is None:
        edge, ties, scale = None, None, 0.0
    else:
        # Ids deeper than log(V / (1 - top_p)) have less than 1 - top_p of the mass in all. One nat more keeps the edge off the last depth.
        scale = BINS**2 / (math.log(vocab_size) - math.log1p(-filters.top_p) + 1)
        edge, ties = _nucleus(Threshold(top, floor, None, None, scale), filters.top_p, walk)
    if filters.min_p is not None:
        floor = torch.maximum(floor, top + math.log(filters.min_p))
    return Threshold(top, floor, edge, ties, scale)


def _nucleus(threshold: Threshold, top_p: float, walk: Callable[[], Iterable[torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Edge and ties of the smallest set of the most probable ids above `floor` that has at least `top_p` of their mass."""
    above = coarse = None
    for level in range(2):
        mass = threshold.top.new_zeros((len(threshold.top), BINS), dtype=torch.float64)
        count = None if level == 0 else torch.zeros_like(mass, dtype=torch.int32)
        for logits in walk():
            depth, counted = threshold.depth(logits), logits >= threshold.floor[:, None]
            if level == 0:
                _pile(mass, depth // BINS, torch.where(counted, torch.exp(logits - threshold.top[:, None]), 0.0))
                continue
            counted &= depth // BINS == coarse
            if counts_rows(counted.device):  # few are left: only they are looked at
                rows, columns = counted.nonzero(as_tuple=True)
                place, logits, top = (
                    (rows * BINS + depth[rows, columns] % BINS)[None],
                    logits[rows, columns][None],
                    threshold.top[rows][None],
                )
                _pile(mass.view(1, -1), place, torch.exp(logits - top))
                _pile(count.view(1, -1), place, torch.ones_like(place))
            else:
                _pile(mass, depth % BINS, torch.where(counted, torch.exp(logits - threshold.top[:, None]), 0.0))
                _pile(count, depth % BINS, counted)
        if level == 0:
            wanted, above = top_p * mass.sum(dim=-1, keepdim=True), torch.zeros_like(mass[:, :1])
        before = mass.cumsum(dim=-1).sub_(mass).add_(above)
        place = ((before < wanted).sum(dim=-1, keepdim=True) - 1).clamp(min=0)  # the bin that reaches `wanted`
        above = before.gather(1, place)
        coarse = place if level == 0 else coarse
    each = mass.gather(1, place) / count.gather(1, place)
    ties = ((wanted - above) / each).nan_to_num_(nan=1.0).ceil_().clamp_(1, 2**31).long()
    return (coarse * BINS + place).squeeze(1), ties.squeeze(1)


def _highest(logits: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """The `top_k` highest of (N, W) in falling order, all where there are fewer; None: the highest, `(N, 1)`."""
    if top_k is None:
        return logits.amax(dim=-1, keepdim=True)
    return logits.topk(min(top_k, logits.shape[1]), dim=-1).values


def _pile(bins: torch.Tensor, place: torch.Tensor, values: torch.Tensor) -> None:
    bins.scatter_add_(1, place, values.to(bins.dtype))


__all__ = ["MOST_TOP_K", "Filters", "Threshold", "find_threshold", "listed"]
