"""Headers of safetensors files: what a file holds, without reading it."""

import json
import os
import struct
from pathlib import Path
from typing import NamedTuple


class StoredTensor(NamedTuple):
    """One entry of a header."""

    file: Path
    dtype: str  # in safetensors' words: "BF16", "F8_E4M3"
    shape: tuple[int, ...]
    size: int  # bytes


def read_header(path: str | os.PathLike) -> dict:
    """The header of a safetensors file: `{name: {"dtype", "shape", "data_offsets"}}`, and `"__metadata__"` where it has one.

    Raises:
        OSError: the file is missing, is no safetensors file, or is not as long as its header says.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= size - 8:
            raise OSError(f"{path} has no safetensors header ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise OSError(f"{path} has a damaged safetensors header") from error
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise OSError(f"{path} has {size} bytes where its header says {expected}")
    return header


def stored_tensors(files: list[str | os.PathLike]) -> dict[str, StoredTensor]:
    """Every tensor of the files by name, from their headers alone.

    Raises:
        OSError: a file is damaged.
        ValueError: two files hold the same tensor.
    """
    found: dict[str, StoredTensor] = {}
    for path in map(Path, files):
        for name, entry in read_header(path).items():
            if name == "__metadata__":
                continue
            if name in found:
                raise ValueError(f"{path} and {found[name].file} both hold {name}; expected every tensor once")
            start, end = entry["data_offsets"]
            found[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), end - start)
    return found


__all__ = ["StoredTensor", "read_header", "stored_tensors"]
