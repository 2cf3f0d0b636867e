"""What `classes.ClassWalk` says, from whole logits: its reference, and the way where processors or callers see all logits.

    sums = dense_sums(shaped, orders, count)                # then a lattice says what the classes are
    prediction = dense_draw(shaped, sums, chosen, orders, chance, pad, current)

N: positions that count of one row, V ids, K classes.
"""

import torch

from ..rules.draws import pick
from ..rules.prediction import NOTHING_MORE, Prediction, Wanted
from .classes import Chosen, ClassSums
from .segments import Order, Orders


def dense_sums(shaped: torch.Tensor, orders: Orders, count: int) -> ClassSums:
    """Sums by class of the first `count` positions; `shaped` floating (B, C, V), divided by the temperature, -inf where filtered out."""
    shape = (len(shaped), count, orders.kinds)
    log_mass, best, entropy = (torch.full(shape, -float("inf"), dtype=torch.float64, device=shaped.device) for _ in range(3))
    for row, order in enumerate(orders.rows):
        logits, classes = shaped[row, :count].double(), order.classes.expand(count, -1)
        logits = logits.masked_fill(classes == 0, -float("inf"))
        logits = logits - logits.logsumexp(dim=-1, keepdim=True).clamp(min=-1e300)
        best[row].scatter_reduce_(1, classes, logits, "amax")
        top = best[row].clamp(min=-1e300)
        mass = torch.zeros_like(top).scatter_add_(1, classes, (logits - top.gather(1, classes)).exp())
        log_mass[row] = mass.log() + top
        inside = logits - log_mass[row].clamp(min=-1e300).gather(1, classes)  # of an id in its class
        entropy[row].zero_().scatter_add_(1, classes, torch.special.entr(inside.exp()))
    return ClassSums(log_mass, best, entropy)


def dense_draw(
    shaped: torch.Tensor, sums: ClassSums, chosen: Chosen, orders: Orders, chance: torch.Tensor | None, pad: int,
    current: torch.Tensor | None = None, wanted: Wanted = NOTHING_MORE,
) -> Prediction:  # fmt: skip
    """The prediction under the constrained marginals, without `soft_embeds` and `raw`. Its `shaped` are their log-probabilities, in
    the dtype of the logits: the soft embedding of these is that of the marginals. Args as of `dense_sums` and `ClassWalk.draw`."""
    count = sums.log_mass.shape[1]
    marginal = torch.full_like(shaped, -float("inf"))  # (B, C, V)
    marginal[:, count:, pad] = 0.0
    size, device = shaped.shape[:2], shaped.device
    sample, argmax, other = (torch.full(size, pad, dtype=torch.int64, device=device) for _ in range(3))
    for row, order in enumerate(orders.rows):
        logits = shaped[row, :count].double()
        rise = torch.where(chosen.shares[row] > -float("inf"), chosen.shares[row] - sums.log_mass[row], -float("inf"))
        alive = logits.masked_fill(order.classes == 0, -float("inf")).logsumexp(dim=-1, keepdim=True)
        log_probs = logits - alive + rise.index_select(1, order.classes)
        marginal[row, :count] = log_probs
        argmax[row, :count] = _of_class(logits, order, chosen.best[row]).argmax(dim=-1)
        sample[row, :count] = argmax[row, :count]
        if chance is not None:
            inside = _of_class(logits, order, chosen.sample[row])
            sample[row, :count] = _drawn((inside - inside.amax(dim=-1, keepdim=True)).exp(), order, chance[row, :count, 2:4])
        if current is not None:
            rest = log_probs.scatter(1, current[row, :count, None], -float("inf"))
            found = rest.argmax(dim=-1) if chance is None else _drawn(rest.exp(), order, chance[row, :count, 4:6])
            other[row, :count] = torch.where(rest.exp().sum(dim=-1) > 0, found, current[row, :count])
    prediction = Prediction(
        sample=sample, argmax=argmax, log_probs=marginal.gather(-1, argmax[..., None]).squeeze(-1).float(),
        entropy=torch.special.entr(marginal.double().exp()).sum(dim=-1).float(),
        bad=chosen.lost | shaped.isnan().flatten(1).any(dim=-1), shaped=marginal,
    )  # fmt: skip
    if wanted.candidates:
        best = marginal.topk(min(wanted.candidates, shaped.shape[-1]), dim=-1)
        prediction = prediction._replace(candidates=best.indices, candidate_log_probs=best.values.float())
    if current is not None:
        current_log_probs = marginal.gather(-1, current[..., None]).squeeze(-1).float()
        prediction = prediction._replace(current_log_probs=current_log_probs, other=other)
    return prediction


def _of_class(logits: torch.Tensor, order: Order, kinds: torch.Tensor) -> torch.Tensor:
    """Logits (N, V), -inf but for the ids of the classes `kinds` int64 (N,)."""
    return logits.masked_fill(order.classes != kinds[:, None], -float("inf"))


def _drawn(weights: torch.Tensor, order: Order, chance: torch.Tensor) -> torch.Tensor:
    """Ids int64 (N,) in proportion to `weights` (N, V), as the walk draws them by `chance` (N, 2): first a segment, then the id in it."""
    weights = weights[:, order.ids[: order.alive]]
    places = torch.arange(order.alive, dtype=torch.int64, device=weights.device)
    segment = torch.searchsorted(order.begin, places, right=True) - 1
    mass = weights.new_zeros((len(weights), len(order.begin))).index_add_(1, segment, weights)
    inside = weights.masked_fill(segment != pick(mass, chance[:, 0])[:, None], 0.0)
    return order.ids[pick(inside, chance[:, 1])]


__all__ = ["dense_draw", "dense_sums"]
