"""The loss of canvases by how noisy they were: what a single mean hides.

A canvas of little noise is nearly solved, one of much noise is nearly a guess. Their losses differ tenfold, fall at different times, and
the mean of a few canvases moves with the noise proportions that were drawn for them.
"""

import torch

BINS = 4  # of equal width: a quarter of the noise each
NAMES = tuple(f"loss_noise_{100 * place // BINS}_{100 * (place + 1) // BINS}" for place in range(BINS))  # percent


class LossByNoise:
    """Sums of losses and counts of canvases in bins of the noise proportion. Kept on the device: adding waits for nothing.

    `totals`: float32 `(2, BINS)`, sums in nats and counts; None as long as nothing was added.
    """

    def __init__(self):
        self.totals: torch.Tensor | None = None

    @torch.no_grad()
    def add(self, losses: torch.Tensor, proportions: torch.Tensor) -> None:
        """Takes in canvases: `losses` (N,), nats, and noise `proportions` (N,), in 0 to 1."""
        bins = (proportions * BINS).long().clamp(0, BINS - 1)
        rows = torch.stack((losses.detach(), torch.ones_like(losses)))  # (2, N)
        if self.totals is None:
            self.totals = torch.zeros((2, BINS), dtype=torch.float32, device=rows.device)
        self.totals.index_add_(1, bins, rows.float())

    def take(self, reduce=None) -> dict[str, float]:
        """The mean loss by `NAMES`, of bins that hold a canvas, since the last call. `reduce` adds up the totals of all processes."""
        if self.totals is None:
            return {}
        totals, self.totals = self.totals, None
        sums, counts = (totals if reduce is None else reduce(totals)).tolist()
        return {name: total / count for name, total, count in zip(NAMES, sums, counts, strict=True) if count}


__all__ = ["BINS", "NAMES", "LossByNoise"]
