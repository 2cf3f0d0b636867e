"""e4m3 numbers as the floating-point numbers they stand for: torch's conversion, and on a CPU a lookup with the same bits.

torch converts e4m3 on a CPU with 0.2 to 0.8 G numbers a second, which is most of what a product of dequantised weights takes. A table of
all pairs of bytes, each beside the two numbers it stands for, gives 3 to 4 G (`benchmarks/fp8.py cpu`). It is a copy of what torch's
conversion gives for every byte, so nothing about it is approximate: NaN, minus zero and subnormal numbers included.

Knows nothing of scales.
"""

import functools

import torch
from torch import nn

from generation.fast.proofs import FastPath, works

E4M3 = torch.float8_e4m3fn
ENTRIES = {torch.bfloat16: torch.int32, torch.float16: torch.int32, torch.float32: torch.int64}  # what holds two numbers
LOOKED_UP = 2**18  # pairs at a time: the numbers to look them up by, twice as many bytes, stay in a cache


def widen(quantized: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """`quantized.to(dtype)`, by the fastest way the device has.

    Args: e4m3 of any shape; a floating dtype; a tensor of this shape and dtype, to be written to and returned in place of a new one: on a
    CPU the pages of a large new tensor take as long as the numbers.
    """
    if has_table(quantized, dtype) and (out is None or out.is_contiguous() and out.storage_offset() % 2 == 0):
        return looked_up(quantized, dtype, out)
    return quantized.to(dtype) if out is None else out.copy_(quantized)


def has_table(quantized: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `looked_up` is proven and takes this tensor: plain, without gradient, in one piece that pairs of bytes divide."""
    if torch.compiler.is_compiling() or type(quantized) not in (torch.Tensor, nn.Parameter):
        return False
    if quantized.device.type != "cpu" or quantized.dtype != E4M3 or dtype not in ENTRIES or quantized.requires_grad:
        return False
    pairs = quantized.is_contiguous() and quantized.numel() % 2 == 0 and quantized.storage_offset() % 2 == 0
    return pairs and works(E4M3_TABLE, quantized.device, dtype)


def looked_up(quantized: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """`widen` for what `has_table` lets through."""
    output = torch.empty(quantized.shape, dtype=dtype, device="cpu") if out is None else out
    pairs = quantized.detach().view(-1).view(torch.uint16)
    for entries, codes in zip(output.view(-1).view(ENTRIES[dtype]).split(LOOKED_UP), pairs.split(LOOKED_UP), strict=True):
        torch.index_select(_table(dtype), 0, codes.to(torch.int32), out=entries)
    return output


def _every_pair() -> torch.Tensor:
    """e4m3 `(2**17,)`: all pairs of bytes, in the order of the numbers that two bytes make on this machine."""
    return torch.arange(2**16, dtype=torch.int32, device="cpu").to(torch.uint16).view(E4M3)


@functools.cache
def _table(dtype: torch.dtype) -> torch.Tensor:
    """`(2**16,)`, each entry the two numbers in `dtype` of a pair; made while it is proven, and so outside anybody's modes."""
    return _every_pair().to(dtype).view(ENTRIES[dtype])


def _prove_table(device: torch.device, dtype: torch.dtype):
    """Every pair, bit for bit."""
    got, expected = (way(_every_pair(), dtype).view(ENTRIES[dtype]) for way in (looked_up, torch.Tensor.to))
    return got, expected


E4M3_TABLE = FastPath(
    "e4m3 table", "FP8 numbers are converted by torch, which is slower",
    lambda device, *case: None if device.type == "cpu" else f"it is for CPUs, and the device is {device.type!r}",
    _prove_table, cases=tuple((dtype,) for dtype in ENTRIES),
)  # fmt: skip


__all__ = ["E4M3", "E4M3_TABLE", "ENTRIES", "has_table", "looked_up", "widen"]
