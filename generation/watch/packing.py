"""Flags as bits, and values of rows that leave a batch put back into it."""

import numpy
import torch


def pack_bits(flags: torch.Tensor) -> torch.Tensor:
    """Bool, any shape, as uint8 (n,), eight in a byte."""
    return torch.from_numpy(numpy.packbits(flags.numpy()))


def unpack_bits(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Bool of `shape`, that was packed.

    Raises:
        IndexError: there are more bytes, or fewer.
    """
    count = int(numpy.prod(shape))
    if packed.shape != (-(-count // 8),):
        raise IndexError(f"{len(packed)} bytes for {count} flags")
    return torch.from_numpy(numpy.unpackbits(packed.numpy(), count=count).astype(bool)).view(shape)


def fill_forward(batch_size: int, pieces: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Values (T, batch_size, ...) of steps that follow each other, from pieces: rows int64 (b,) and their values (t, b, ...). Rows that a
    step lacks stay as the step before left them, and are zero before the first."""
    last, whole = None, []
    for rows, values in pieces:
        for value in values:
            last = value.new_zeros((batch_size, *value.shape[1:])) if last is None else last
            last = last.index_copy(0, rows, value)
            whole.append(last)
    return torch.stack(whole)


__all__ = ["fill_forward", "pack_bits", "unpack_bits"]
