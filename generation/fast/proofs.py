"""Fast ways that only some machines take, each proven on the machine before it is used.

A `FastPath` stands beside a slow reference that runs everywhere. The first time a process wants it on a device, it runs on a few
values, and so does the reference. Where it raises or gives something else, the reference is used for the rest of the process, and one
warning says what failed. `diffusiongemma info --device` proves all of them.

Knows no path; each is defined beside its reference. `verdict` keeps what was found: the one memo, by path, device and case.
"""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from transformers.utils import logging

logger = logging.get_logger(__name__)

WITHOUT = "DIFFUSIONGEMMA_WITHOUT"  # environment variable: names of paths that are not to be used, with commas between


@dataclass(frozen=True, eq=False)
class FastPath:
    """
    Args:
        name: as users see it and as `WITHOUT` takes it.
        instead: what the reference does, to stand behind "Instead, ...".
        missing: of a device and a case: why the path is not for them, None where it is.
        prove: of a device and a case: what the path gives on a few values, and what the reference does; structures of tensors. Takes
            well under a second, compiling aside, and no random numbers from anybody's generator.
        tolerance: how far floating numbers may lie apart, as a share of the largest that is expected in their tensor.
        cases: what a report proves; a case is what changes which kernel runs, such as dtypes.
    """

    name: str
    instead: str
    missing: Callable[..., str | None]
    prove: Callable[..., tuple[Any, Any]]
    tolerance: float = 0.0
    cases: tuple[tuple, ...] = ((),)


class Verdict(NamedTuple):
    """`applies`: the path is for this device and case; `works`: it was proven. `detail`: why not. `seconds`: what the proof took."""

    applies: bool
    works: bool
    detail: str | None
    seconds: float


class UnusableDevice(RuntimeError):
    """A path left the device in an error that stays: nothing else runs there in this process."""


class _Captured(Exception):
    """Nothing can be proven while a graph is captured; raised so that the memo keeps nothing."""


def needs_cuda(device: torch.device, *case: Any) -> str | None:
    """`FastPath.missing` of what runs on CUDA alone."""
    return None if device.type == "cuda" else f"it is for CUDA, and the device is {device.type!r}"


def works(path: FastPath, device: torch.device, *case: Any) -> bool:
    """Whether `path` may be used; where not, one warning a process says why. While a graph is captured or something traced, a path that
    is not proven yet may not be.

    Raises:
        UnusableDevice: the proof broke the device.
    """
    try:
        found = verdict(path, device, *case)
    except _Captured as reason:
        found = Verdict(True, False, str(reason), 0.0)
    if not found.works:
        failed = "failed its proof" if found.applies else "is not used"
        logger.warning_once(f"The {path.name} {failed} on {device}: {found.detail}. Instead, {path.instead}.")
    return found.works


@functools.cache
def verdict(path: FastPath, device: torch.device, *case: Any) -> Verdict:
    """Proves `path`, once a process.

    Raises:
        UnusableDevice: the proof broke the device.
        torch.OutOfMemoryError: there is no room left for a few numbers.
    """
    if path.name in (name.strip() for name in os.environ.get(WITHOUT, "").split(",")):
        return Verdict(False, False, f"{WITHOUT} names it", 0.0)
    if (reason := path.missing(device, *case)) is not None:
        return Verdict(False, False, reason, 0.0)
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise _Captured("it was not proven before a graph was captured")
    start, detail = time.perf_counter(), None
    # Not as whoever calls may have it: traced, with gradients, in other dtypes or on another default device.
    with _disable_current_modes(), torch.no_grad(), torch.autocast(device.type, enabled=False), torch.device("cpu"):
        try:
            detail = difference(*path.prove(device, *case), path.tolerance)
        except (torch.OutOfMemoryError, UnusableDevice):
            raise
        except Exception as error:  # what compilers of kernels raise has no base class of its own
            detail = one_line(error)
            _check_usable(path, device, detail)
    return Verdict(True, detail is None, detail, time.perf_counter() - start)


def _check_usable(path: FastPath, device: torch.device, detail: str) -> None:
    try:
        torch.ones(1, dtype=torch.float32, device=device).add(1).cpu()
    except Exception as error:
        raise UnusableDevice(
            f"the {path.name} broke {device} ({detail}), which now answers {one_line(error)!r}. That lasts until the process ends; start "
            f"another with {WITHOUT}={path.name!r} in its environment to go without"
        ) from error


def numbers(*shape: int, seed: int = 0, uniform: bool = False) -> torch.Tensor:
    """Float32 numbers on the CPU, the same each time: normal ones, or uniform in [0, 1)."""
    draw = torch.rand if uniform else torch.randn
    return draw(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


def one_line(error: BaseException) -> str:
    """Kind and message of an error, to be put into a sentence."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words if len(words) <= 300 else f'{words[:300]}...'}" if words else type(error).__name__


def difference(got: Any, expected: Any, tolerance: float = 0.0) -> str | None:
    """Where two structures of tensors differ, None where they do not. Waits for the device.

    Whole numbers and flags must be equal; of floating ones NaN equals NaN, and `tolerance` is a share of the largest in the expected
    tensor. Dtypes may differ.
    """
    pairs = list(zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True))
    for index, (value, wanted) in enumerate(pairs):
        if wanted is None or value is None:
            if value is not wanted:
                return f"value {index} of {len(pairs)} is {value}, expected {wanted}"
            continue
        value, wanted = (torch.as_tensor(one).detach().cpu() for one in (value, wanted))
        if value.shape != wanted.shape:
            return f"value {index} of {len(pairs)} has shape {tuple(value.shape)}, expected {tuple(wanted.shape)}"
        if wanted.is_floating_point():
            value, wanted = value.double(), wanted.double()
            largest = wanted.nan_to_num(0.0, 0.0, 0.0).abs().flatten()
            margin = tolerance * float(largest.max()) if len(largest) else 0.0
            same = torch.isclose(value, wanted, rtol=0.0, atol=margin, equal_nan=True)
        else:
            same = value == wanted
        if not bool(same.all()):
            place = int((~same).flatten().nonzero()[0])
            one, other = value.flatten()[place].item(), wanted.flatten()[place].item()
            return f"{int((~same).sum())} of {same.numel()} numbers in value {index} are others, the first {one}, expected {other}"
    return None


__all__ = ["WITHOUT", "FastPath", "UnusableDevice", "Verdict", "difference", "needs_cuda", "numbers", "one_line", "verdict", "works"]
