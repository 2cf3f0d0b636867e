"""Safetensors files: which of them a checkpoint consists of, and what each holds, by its header, without reading it."""

import contextlib
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

SINGLE = "model.safetensors"  # a checkpoint in one file
INDEX = "model.safetensors.index.json"  # of a checkpoint in several files
SHARD = r"-\d{5}-of-\d{5}\.safetensors"  # how their names end


class StoredTensor(NamedTuple):
    """One entry of a header."""

    name: str
    file: Path
    dtype: str  # in safetensors' words: "BF16", "F8_E4M3"
    shape: tuple[int, ...]
    size: int  # bytes
    start: int  # its first byte in the file


def weights_names(variant: str | None = None) -> tuple[str, str]:
    """The two files through which weights are found: that of all of them, and the index."""
    return (SINGLE, INDEX) if variant is None else (f"model.{variant}.safetensors", f"model.safetensors.index.{variant}.json")


def indexed_files(folder: Path, variant: str | None = None) -> list[str] | None:
    """Names of the weight files that a folder's index lists; None where it has no index. OSError: it is broken."""
    index = folder / weights_names(variant)[1]
    if not index.is_file():
        return None
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not files or not all(isinstance(name, str) for name in files):
            raise ValueError("no files")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise OSError(f"{index} is no index of weight files ({error}); expected JSON with a `weight_map` of names to files") from error
    return sorted(files)


def finds_weights(name: str) -> bool:
    """Whether it is through the file `name` that weights, or those of adapters, are found: no shard of them."""
    return ".safetensors.index." in name if name.endswith(".json") else name.endswith(".safetensors") and not re.search(SHARD, name)


def weight_files(folder: Path, variant: str | None = None) -> set[str]:
    """Names of the files in `folder` that hold or find weights of `variant`, shards that no index names any more included."""
    single, index = weights_names(variant)
    shard = re.compile(re.escape(single.removesuffix(".safetensors")) + SHARD)
    names = {single, index} | {path.name for path in folder.iterdir() if shard.fullmatch(path.name)}
    with contextlib.suppress(OSError):  # a broken index
        names |= set(indexed_files(folder, variant) or ())
    return {name for name in names if isinstance(name, str) and name == Path(name).name and (folder / name).is_file()}


def inspect_header(path: Path) -> tuple[dict, str | None]:
    """What `read_header` returns, and None; or what is wrong with the file, in words that its name stands before.

    Not by huggingface_hub's `parse_local_safetensors_file_metadata`: it does not say where the header ends, which the check of the
    file's length needs; it drops bytes that are no text, so that a damaged name reads as another one; and JSON that is no header gets
    whatever error Python raises.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= size - 8:
            return {}, f"has no safetensors header ({size} bytes)"
        try:
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (AttributeError, LookupError, TypeError, ValueError):
            return {}, "has a damaged safetensors header"
    expected = 8 + length + end
    return header, None if size == expected else f"has {size} bytes where its header says {expected}"


def read_header(path: str | os.PathLike) -> dict:
    """The header of a safetensors file: `{name: {"dtype", "shape", "data_offsets"}}`, and `"__metadata__"` where it has one. OSError: it is
    missing, no safetensors file, or not as long as its header says."""
    header, wrong = inspect_header(Path(path))
    if wrong:
        raise OSError(f"{path} {wrong}")
    return header


def stored_tensors(files: list[str | os.PathLike]) -> dict[str, StoredTensor]:
    """Every tensor of the files by name, from their headers alone. OSError: one is damaged; ValueError: two hold the same tensor."""
    found: dict[str, StoredTensor] = {}
    for path in map(Path, files):
        header = read_header(path)
        header.pop("__metadata__", None)
        first = path.stat().st_size - max((entry["data_offsets"][1] for entry in header.values()), default=0)  # behind the header
        for name, entry in header.items():
            if name in found:
                raise ValueError(f"{path} and {found[name].file} both hold {name}; expected every tensor once")
            start, end = entry["data_offsets"]
            found[name] = StoredTensor(name, path, entry["dtype"], tuple(entry["shape"]), end - start, first + start)
    return found


def published_tensors(files: list[str | os.PathLike]) -> dict[str, StoredTensor]:
    """`stored_tensors` under the names of the model with its head, which files of the model without it lack `model.` of."""
    stored = stored_tensors(files).items()
    return {name if name.startswith(("model.", "lm_head.")) else f"model.{name}": entry for name, entry in stored}


def touch(file: Path, entries: Iterable[StoredTensor]) -> None:
    """Has the system read some tensors of a file, and nothing else of it, into its cache.

    Through a mapping it reads around each, by megabytes where the disk is set so: for the 11,725 scales of an FP8 copy of 27 GB all of it,
    twice (loading it from the disk took 35 s, and takes 5.5 s; 2 cores of an AMD EPYC, `read_ahead_kb` 8192, 1.3 GB/s).
    """
    if not hasattr(os, "posix_fadvise"):
        return
    with file.open("rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for entry in entries:
            os.pread(opened.fileno(), entry.size, entry.start)


def read_tensors(entries: dict[str, StoredTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each key of `entries` with its tensor, file by file."""
    for file in dict.fromkeys(entry.file for entry in entries.values()):
        here = {name: entry for name, entry in entries.items() if entry.file == file}
        touch(file, here.values())
        with safe_open(file, "pt") as opened:
            yield from ((name, opened.get_tensor(entry.name)) for name, entry in here.items())


__all__ = [
    "INDEX", "SINGLE", "StoredTensor", "finds_weights", "indexed_files", "inspect_header", "published_tensors", "read_header",
    "read_tensors", "stored_tensors", "weight_files", "weights_names",
]  # fmt: skip
