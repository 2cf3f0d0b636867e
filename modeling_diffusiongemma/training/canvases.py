"""Canvases cut out of the responses of whole examples, and what each may see.

A row holds one conversation or several, one behind the other (packed); a conversation holds one response or several (turns). Each response
is cut into canvases of its own, the last of which is filled behind the response. A canvas sees what stands before it in its conversation,
strictly: `Canvases.start` is the first token it must not see. Knows nothing of noise and losses.
"""

from typing import NamedTuple

import torch
from transformers import Cache

from generation.checks import check_shape

from ..layers.view import View

IGNORED = -100  # transformers' label for "no target"
WAYS = ("all", "one")  # how many canvases of a row are learned at once


class Canvases(NamedTuple):
    """K canvases of C tokens for each row: `ids` int64 (B, K, C); `start` int64 (B, K), the index of its first token; `inside` bool
    (B, K, C), False at the fill behind a response; `there` bool (B, K), False where a row has fewer canvases, whose places repeat its first
    one."""

    ids: torch.Tensor
    start: torch.Tensor
    inside: torch.Tensor
    there: torch.Tensor

    def pick(self, index: torch.Tensor) -> "Canvases":
        """One canvas a row: K = 1. Args: int64 `(B,)`."""
        return Canvases(*(tensor[torch.arange(len(index), device=index.device), index].unsqueeze(1) for tensor in self))


def conversations(position_ids: torch.Tensor | None, input_ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor | None:
    """Which conversation of its row each token belongs to, int64 `(B, P)`; None where every row holds one.

    Args:
        position_ids: int64 `(B, P)`; packed rows count on from 0 again at each conversation, as transformers' collators write them.
        real: bool `(B, P)`, False at padding, where any position will do.

    Raises:
        ValueError: positions that neither count on nor begin at 0 again.
    """
    if position_ids is None:
        return None
    check_shape("position_ids", position_ids, tuple(input_ids.shape))
    begins = (position_ids == 0) & real
    first = real & (real.cumsum(dim=1) == 1)
    counts_on = torch.nn.functional.pad(position_ids[:, 1:] == position_ids[:, :-1] + 1, (1, 0))
    counts_on[:, 1:] &= real[:, :-1]
    if bool((real & ~begins & ~counts_on).any() | (first & ~begins).any()):
        raise ValueError(
            "`position_ids` neither count on nor begin at 0 again somewhere; expected 0, 1, 2, ... for each conversation of a row"
        )
    numbers = begins.cumsum(dim=1)
    return None if bool((numbers <= 1).all()) else numbers


def first_tokens(real: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
    """Bool `(B, P)`: tokens before which nothing stands in their conversation. Args: as in `training_view`."""
    before = torch.nn.functional.pad(real[:, :-1], (1, 0))
    if documents is not None:
        before[:, 1:] &= documents[:, 1:] == documents[:, :-1]
    return ~before


def check_labels(
    input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None, documents: torch.Tensor | None = None
) -> None:
    """`labels` must be `input_ids` on each response, and -100 elsewhere; a response begins behind a token of its conversation."""
    if labels.shape != input_ids.shape:
        raise ValueError(f"`labels` has shape {tuple(labels.shape)}; expected {tuple(input_ids.shape)}, the shape of `input_ids`")
    target = labels != IGNORED
    if not bool(target.any(dim=1).all()):
        rows = (~target.any(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"`labels` is -100 everywhere in rows {rows}; expected a response in every row")
    if bool((labels[target] != input_ids[target]).any()):
        raise ValueError("`labels` differs from `input_ids` at a target; expected equal ids there and -100 elsewhere")
    real = torch.ones_like(target) if attention_mask is None else attention_mask.bool()
    if bool((target & ~real).any()):
        raise ValueError("`labels` and `attention_mask` disagree; expected every target to be a real token")
    if bool((target & first_tokens(real, documents)).any()):
        raise ValueError("`labels` begins with a target; expected at least one prompt token before the response")


def cut_canvases(input_ids: torch.Tensor, labels: torch.Tensor, canvas_length: int, fill: int | None) -> Canvases:
    """Cuts every response of every row into canvases; what lies behind a response is `fill` (the pad token)."""
    if fill is None:
        raise ValueError("`pad_token_id` of the text config is None; expected the id that fills a canvas behind its response")
    target, length = labels != IGNORED, labels.shape[1]
    place = torch.arange(length, device=labels.device).expand_as(labels)
    before = torch.nn.functional.pad(target[:, :-1], (1, 0))
    begin = torch.where(target & ~before, place, 0).cummax(dim=1).values  # of the response that a target belongs to
    end = torch.where(target, length, place).flip(1).cummin(dim=1).values.flip(1)  # the first token behind it
    starts = target & ((place - begin) % canvas_length == 0)
    rank, counts = starts.cumsum(dim=1) - 1, starts.sum(dim=1)
    rows, places = starts.nonzero(as_tuple=True)
    start = starts.int().argmax(dim=1, keepdim=True).repeat(1, int(counts.max()))  # (B, K)
    start[rows, rank[rows, places]] = places
    there = torch.arange(start.shape[1], device=start.device) < counts[:, None]
    index = start[..., None] + torch.arange(canvas_length, device=start.device)  # (B, K, C)
    inside = index < end.gather(1, start)[..., None]
    ids = input_ids.gather(1, index.clamp(max=length - 1).flatten(1)).view_as(index)
    return Canvases(torch.where(inside, ids, fill), start, inside, there)


def random_canvas(canvases: Canvases) -> torch.Tensor:
    """The index of one canvas a row, int64 `(B,)`, all of a row's being equally likely."""
    counts = canvases.there.sum(dim=1)
    return (torch.rand(counts.shape, dtype=torch.float32, device=counts.device) * counts).long().clamp(max=counts - 1)


def choose_canvases(canvases: Canvases, which: str | torch.Tensor) -> Canvases:
    """Those to learn from: `"all"`, `"one"` of each row at random, or the one that int64 `(B,)` says."""
    if isinstance(which, torch.Tensor):
        counts = canvases.there.sum(dim=1)
        check_shape("canvases", which, tuple(counts.shape))
        if bool(((which < 0) | (which >= counts)).any()):
            raise ValueError(f"`canvases` is {which.tolist()}; expected less than each row has: {counts.tolist()}")
        return canvases.pick(which)
    if which not in WAYS:
        raise ValueError(f"`canvases` is {which!r}; expected one of {WAYS}, or which one of each row as int64 (B,)")
    return canvases if which == "all" else canvases.pick(random_canvas(canvases))


def training_view(model, cache: Cache, canvases: Canvases, real: torch.Tensor, documents: torch.Tensor | None = None) -> View:
    """The view by which each canvas sees its conversation up to its start, itself, and nothing clean of itself. `cache` holds the tokens of
    `real`, bool (B, L), of the conversations `documents`, int64 (B, L)."""
    rows, count, length = canvases.ids.shape
    before = real.cumsum(dim=1)  # real tokens up to and with each
    if documents is not None:
        before = before - torch.where(first_tokens(real, documents) & real, before - 1, 0).cummax(dim=1).values
    before = before.gather(1, canvases.start - 1)  # (B, K), of its conversation
    positions = (before[..., None] + torch.arange(length, device=before.device)).flatten(1)
    real = torch.cat((real, real.new_ones(rows, count * length)), dim=1)
    return model.prepare_canvas(cache, (rows, count * length), real, positions, prefix_length=canvases.start, documents=documents)


__all__ = [
    "IGNORED", "WAYS", "Canvases", "check_labels", "choose_canvases", "conversations", "cut_canvases", "random_canvas", "training_view",
]  # fmt: skip
