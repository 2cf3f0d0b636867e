"""What the host must know of a denoising step: which rows are finished, and which have logits that are no numbers.

Reading a flag makes the host wait for the device. Read late, the flags of one step are looked at while the next one runs: the
device always has work, at the price of one step that changes no finished row (tests/test_rows.py).
"""

from typing import NamedTuple

import torch


class StepFlags(NamedTuple):
    """On the host, bool `(b,)` each, of the b rows computed."""

    finished: torch.Tensor
    bad: torch.Tensor


class FlagReader:
    """Args: `late`: give the flags of the step before the one that is pushed."""

    def __init__(self, late: bool):
        self.late = late
        self._pending: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
        self._rows: torch.Tensor | None = None

    def push(self, finished: torch.Tensor, bad: torch.Tensor) -> StepFlags | None:
        """Takes in the flags of a step, bool (b,) each. Returns what is known on the host: None after the first step if late."""
        flags = torch.stack((finished, bad))
        if not self.late:
            return StepFlags(*flags.cpu())
        known = self.last()
        if flags.is_cuda:
            host = torch.empty(flags.shape, dtype=torch.bool, device="cpu", pin_memory=True)
            host.copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            host, event = flags.clone(), None
        self._pending = host, event
        return known

    def last(self) -> StepFlags | None:
        """The flags still on their way, waited for; None if there are none."""
        if self._pending is None:
            return None
        (host, event), rows = self._pending, self._rows
        self._pending = self._rows = None
        if event is not None:
            event.synchronize()
        return StepFlags(*(host if rows is None else host[:, rows]))

    def select(self, rows: torch.Tensor) -> None:
        """Only `rows` (on the host) of the step pushed last are still computed."""
        self._rows = rows


__all__ = ["FlagReader", "StepFlags"]
