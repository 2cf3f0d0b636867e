"""What the host must know of a denoising step: which rows are finished, and which have logits that are no numbers.

Reading a flag makes the host wait for the device. Read late, the flags of one step are looked at while the next one runs: the
device always has work, at the price of one step that changes no finished row (tests/test_rows.py).
"""

from typing import NamedTuple

import torch

from .proofs import FastPath, needs_cuda


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
        self._pending = send(flags)
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


def send(flags: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Flags on their way to the host, and the event after which they are there; None: they are."""
    if not flags.is_cuda:
        return flags.clone(), None
    host = torch.empty(flags.shape, dtype=torch.bool, device="cpu", pin_memory=True)
    host.copy_(flags, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(flags.device))  # an event's own default is the stream of the current device
    return host, event


def _prove_late_flags(device: torch.device):
    """Behind work that lasts longer than the host takes to look: what is read too early is not what was sent."""
    work = torch.ones(1024, 1024, dtype=torch.float32, device=device)
    finished, got, expected = torch.zeros(3, dtype=torch.bool, device=device), [], []
    reader = FlagReader(late=True)
    for step in range(4):
        for _ in range(8):
            work = (work @ work).clamp_(max=1.0)
        finished = finished | (torch.arange(3, device=device) * work[0, 0] < step)
        got.append(reader.push(finished, ~finished))
        on_host = torch.arange(3, device="cpu")
        expected.append((on_host < step, on_host >= step))
    return (*got[1:], reader.last()), tuple(StepFlags(*flags) for flags in expected)


LATE_FLAGS = FastPath("late flags", "the host waits for each denoising step before it starts the next", needs_cuda, _prove_late_flags)


__all__ = ["LATE_FLAGS", "FlagReader", "StepFlags", "send"]
