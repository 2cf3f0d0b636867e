"""From a language and a tokenizer to the automaton over tokens, kept in memory and on disk.

A file is named by all that its automaton depends on: the language, the bytes of every id, the version of this file's format and of Python's
characters. It holds a checksum, and one that does not hold what it must is made again.
"""

import functools
import json
import os
import sys
import tempfile
import unicodedata
import weakref
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .automaton import Automaton, make_automaton
from .blanks import segments_automaton
from .characters import byte_automaton
from .languages import Language, Pins, Template, ToolCalls, described
from .states import too_large
from .tokens import Vocabulary, make_vocabulary, token_automaton, token_bytes

logger = logging.get_logger(__name__)

FORMAT = "1"  # another one whenever the same language may be compiled to another automaton
FOLDER = "DIFFUSIONGEMMA_CACHE"  # environment variable: where compiled constraints are kept, instead of the user's cache
MOST_EDGES = 200_000  # a step looks at all of them for each position of a canvas
KEPT = 32  # automata in memory for each tokenizer
FIELDS = {
    "classes": torch.int32, "source": torch.int32, "kind": torch.int32, "target": torch.int32, "accepting": torch.bool,
    "fewest": torch.int64,
}  # fmt: skip


def compile_constraint(language: Language, tokenizer: PreTrainedTokenizerBase, vocab_size: int, cache: bool = True) -> Automaton:
    """The automaton of all sequences of ids that write a text of `language`.

    Args:
        vocab_size: of the model: ids from there on are none, and ids below that the tokenizer has not write nothing.
        cache: whether to look in memory and in `cache_folder()`, and to keep it there.

    Returns: tensors on the CPU. They are shared with later calls: not to be changed.

    Raises:
        ValueError: `language` is none; it accepts no text, or none that the tokens write, and which character is missing; it needs more
            than 200,000 edges; a pinned id is out of range; `tokenizer` decodes in a way that is not known.
    """
    if not isinstance(language, Language):
        raise ValueError(f"`constraint` is {language!r}; expected a Regex, JsonSchema, Choice, Template, ToolCalls or Pins")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise ValueError(f"`vocab_size` is {vocab_size!r}; expected a positive integer")
    known = kept_for(tokenizer, vocab_size, _Known)
    vocabulary = _marked(known.vocabulary, language, tokenizer) if isinstance(language, ToolCalls) else known.vocabulary
    if not cache:
        return _compile(language, vocabulary)
    versions = (FORMAT, unicodedata.unidata_version, str(sys.version_info[:2]))
    name = sha256("\n".join((*versions, vocabulary.fingerprint, described(language))).encode()).hexdigest()
    if (found := known.automata.get(name)) is None:  # once: another thread may push it out meanwhile
        path = cache_folder() / f"{name}.safetensors"
        found = _read(path, name, vocab_size)
        if found is None:
            found = _compile(language, vocabulary)
            _write(path, name, found)
        for oldest in list(known.automata)[: max(len(known.automata) - KEPT + 1, 0)]:
            known.automata.pop(oldest, None)
        known.automata[name] = found
    return found


def cache_folder() -> Path:
    """Where compiled constraints are kept: `DIFFUSIONGEMMA_CACHE`, or `diffusiongemma/constraints` in the user's cache."""
    if given := os.environ.get(FOLDER):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusiongemma" / "constraints"


class _Known:
    """What is kept for a tokenizer and a size of the vocabulary."""

    def __init__(self, writes: list[bytes | None], vocab_size: int) -> None:
        self.vocabulary = make_vocabulary(writes).of_size(vocab_size)
        self.automata: dict[str, Automaton] = {}


@functools.cache
def _memory() -> weakref.WeakKeyDictionary:
    """The one memo: by tokenizer, then as `kept_for` has it."""
    return weakref.WeakKeyDictionary()


def kept_for(tokenizer: PreTrainedTokenizerBase, vocab_size: int, make: Callable[[list[bytes | None], int], Any]) -> Any:
    """What `make` makes of the bytes that each id writes (`token_bytes`) and of the size of the vocabulary: once, until the tokenizer gets
    further ids, and kept as long as it lives."""
    of_tokenizer = _memory().setdefault(tokenizer, {})
    key = (make, len(tokenizer), tuple(tokenizer.all_special_ids), vocab_size)
    if key not in of_tokenizer:
        of_tokenizer[key] = make(token_bytes(tokenizer), vocab_size)
    return of_tokenizer[key]


def _marked(vocabulary: Vocabulary, language: ToolCalls, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """The vocabulary with the marks of a language, as far as the tokenizer has them."""
    ids = map(tokenizer.backend_tokenizer.token_to_id, language.marks)
    places = {token: place for place, token in enumerate(ids) if token is not None and token < len(vocabulary.starts) - 1}
    if missing := [mark for place, mark in enumerate(language.demanded_marks) if place not in places.values()]:
        raise ValueError(f"`tokenizer` has no tokens {missing}; expected those that a call of a tool is written with")
    return vocabulary.marked(places)


def _compile(language: Language, vocabulary: Vocabulary) -> Automaton:
    match language:
        case Pins():
            found = pinned(language, vocabulary)
        case Template():
            found = token_automaton(segments_automaton(language.segments()), vocabulary)
        case _:
            found = token_automaton(byte_automaton(language.expression()), vocabulary)
    if len(found.source) > MOST_EDGES:
        raise too_large(f"edges by classes of ids between its {found.states:,} states", len(found.source), MOST_EDGES)
    return found


def pinned(pins: Pins, vocabulary: Vocabulary) -> Automaton:
    """The automaton of a sequence of pinned and free positions.

    Raises:
        ValueError: a pinned id is out of range.
    """
    vocab_size = len(vocabulary.starts) - 1
    ids, mask = pins.ids.cpu(), pins.mask.cpu()
    given, place = ids[mask].unique(return_inverse=True)
    if int(given.max(dim=0).values if len(given) else 0) >= vocab_size:
        raise ValueError(f"`ids` pins {int(given.max())}; expected ids below the size of the vocabulary, {vocab_size}")
    writes = torch.from_numpy(vocabulary.starts[1:] > vocabulary.starts[:-1])
    classes = writes.long()
    classes[given] = torch.arange(2, 2 + len(given), dtype=torch.int64, device="cpu")
    free_kinds = torch.cat((torch.ones(1, dtype=torch.int64, device="cpu"), classes[given][writes[given]]))
    kind = torch.zeros(len(ids), dtype=torch.int64, device="cpu")
    kind[mask] = place + 2
    positions = torch.arange(len(ids), dtype=torch.int64, device="cpu")
    free = positions[~mask]
    source = torch.cat((positions[mask], free.repeat_interleave(len(free_kinds))))
    kinds = torch.cat((kind[mask], free_kinds.repeat(len(free))))
    accepting = torch.arange(len(ids) + 1, dtype=torch.int64, device="cpu") == len(ids)
    return make_automaton(classes, source, kinds, source + 1, accepting)


def _read(path: Path, name: str, vocab_size: int) -> Automaton | None:
    """The automaton of a file; None where there is no file, or, with a warning, one that is broken or another's."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning(f"The compiled constraint {path} cannot be read and is made again: {error}")
        return None
    try:
        tensors = safetensors.torch.load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if metadata.get("name") != name or metadata.get("checksum") != _checksum(tensors):
            raise ValueError("it holds something else than its name says")
        _check(tensors, vocab_size)
    except Exception as error:  # whatever a reader of a file that anybody may have written raises
        logger.warning(f"The compiled constraint {path} is not used and made again: {error}")
        return None
    return Automaton(**{field: tensors[field] if dtype == torch.bool else tensors[field].long() for field, dtype in FIELDS.items()})


def _check(tensors: dict[str, torch.Tensor], vocab_size: int) -> None:
    """Raises ValueError where tensors are no automaton."""
    if {field: tensor.dtype for field, tensor in tensors.items()} != FIELDS or any(tensor.dim() != 1 for tensor in tensors.values()):
        raise ValueError("it holds other tensors than an automaton's")
    states, kinds = len(tensors["accepting"]), int(tensors["classes"].max()) + 1
    order = tensors["source"].long() * kinds + tensors["kind"]
    below = (("classes", kinds), ("source", states), ("target", states), ("kind", kinds), ("fewest", 2**40))
    whole = len(tensors["classes"]) == vocab_size and len(tensors["fewest"]) == states > 0
    whole &= len(tensors["source"]) == len(tensors["kind"]) == len(tensors["target"])
    inside = all(not len(tensors[field]) or 0 <= int(tensors[field].min()) <= int(tensors[field].max()) < end for field, end in below)
    if not (whole and inside and bool((order.diff() > 0).all())):
        raise ValueError("its tensors are no automaton")


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    found = sha256()
    for field in sorted(tensors):
        found.update(field.encode() + tensors[field].numpy().tobytes())
    return found.hexdigest()


def _write(path: Path, name: str, automaton: Automaton) -> None:
    """Writes the file at once, or not at all: a reader beside it sees the old one or the new one."""
    tensors = {field: getattr(automaton, field).to(dtype).contiguous() for field, dtype in FIELDS.items()}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".new", delete=False) as file:
            temporary = file.name
            file.write(safetensors.torch.save(tensors, {"name": name, "checksum": _checksum(tensors)}))
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if not isinstance(error, OSError):  # interrupted
            raise
        logger.warning_once(f"Compiled constraints are not kept in {path.parent}, which {FOLDER} may name: {error}")


__all__ = ["FOLDER", "MOST_EDGES", "cache_folder", "compile_constraint", "kept_for", "pinned"]
