"""The two products of a pass over the vocabulary: hidden states with a piece of the head, and what weighs its ids with that piece.

`torch.mm` takes MKL in float32, which is tuned for Intel's CPUs: on an AMD EPYC oneDNN, which torch carries too, needs half the time
for both (benchmarks/RESULTS.md). It is reached by the operator that torch's own compiler uses, where that is proven.

N: positions, W: ids of a piece, D: hidden size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..fast.proofs import FastPath, numbers, works


class Products(NamedTuple):
    """`scores(rows, weight, out, squash)` (N, W) of (N, D) and (W, D), in `out`, and through a sigmoid with `squash`;
    `mix(shares, weight)` (N, D) of (N, W) and (W, D)."""

    scores: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]
    mix: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def onednn(left: torch.Tensor, right: torch.Tensor, squash: bool = False) -> torch.Tensor:
    """`left @ right.T`, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "sigmoid" if squash else "none", [], "")


def _onednn_scores(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, squash: bool) -> torch.Tensor:
    """Copied at once, so that the next piece gets the same memory: kept any longer, it is fresh each time, which costs ten times more."""
    return out.copy_(onednn(rows, weight, squash))


def _scores(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, squash: bool) -> torch.Tensor:
    torch.mm(rows, weight.t(), out=out)
    return out.sigmoid_() if squash else out


PLAIN = Products(_scores, torch.mm)
ONEDNN = Products(_onednn_scores, lambda shares, weight: onednn(shares, weight.t()))


def _no_onednn(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it is for CPUs, and the device is {device.type!r}"
    if not torch.backends.mkldnn.is_available():
        return f"torch {torch.__version__} carries no oneDNN"
    return None


def _prove_onednn(device: torch.device):
    rows, weight, shares = numbers(37, 24), numbers(203, 24, seed=1), numbers(37, 203, uniform=True)

    def all_of(way: Products) -> list[torch.Tensor]:
        return [*(way.scores(rows, weight, rows.new_empty(37, 203), squash) for squash in (False, True)), way.mix(shares, weight)]

    return all_of(ONEDNN), all_of(PLAIN)


ONEDNN_PRODUCTS = FastPath(
    "oneDNN products", "the pass over the vocabulary multiplies by torch.mm, which is slower on this CPU", _no_onednn, _prove_onednn, 1e-5
)


def prefers_onednn(device: torch.device) -> bool:
    """Whether float32 products on `device` are faster by oneDNN than by MKL: on AMD's CPUs."""
    if device.type != "cpu" or not torch.backends.mkldnn.enabled:
        return False
    return "AMD" in str(getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name"))  # older ones of torch do not tell


def choose_products(device: torch.device, dtype: torch.dtype) -> Products:
    """`ONEDNN` where it is faster and proven, else `PLAIN`, which in half precision is oneDNN's by itself."""
    return ONEDNN if dtype == torch.float32 and prefers_onednn(device) and works(ONEDNN_PRODUCTS, device) else PLAIN


__all__ = ["ONEDNN", "ONEDNN_PRODUCTS", "PLAIN", "Products", "choose_products", "prefers_onednn"]
