"""What bytes each id of a tokenizer writes, and from an automaton over bytes to the automaton over tokens.

A token is a function from states to states: where its bytes lead from each. Ids of one function are one class, and so are all beginnings of
tokens of one function, whatever their length: they are met a byte at a time, all tokens at once, and each function is made once. A schema
of 20 fields has some hundred functions for 262,144 ids, and the table of states and ids never exists.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .automaton import Automaton, make_automaton
from .characters import FIRST_MARK, ByteAutomaton
from .states import merged, spans, too_large

MOST_PLACES = 20_000_000  # states that functions lead from, all together: a third of a GB
AT_ONCE = 4_000_000  # of them looked at at a time
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """`data` uint8, the bytes of all ids behind each other; `starts` int64 (V + 1,), where those of each begin. An id of no bytes writes
    no text: it is special, or not the tokenizer's."""

    data: np.ndarray
    starts: np.ndarray

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same bytes of the same ids."""
        return sha256(self.starts.tobytes() + self.data.tobytes()).hexdigest()

    def of_size(self, vocab_size: int) -> "Vocabulary":
        """The ids below `vocab_size`: further ones write nothing, and those above are left out."""
        starts = self.starts[: vocab_size + 1]
        starts = np.concatenate((starts, np.full(vocab_size + 1 - len(starts), starts[-1], dtype=np.int64)))
        return Vocabulary(self.data[: starts[-1]], starts)

    def marked(self, marks: Mapping[int, int]) -> "Vocabulary":
        """With some ids, whose places among a language's marks are given, written as the bytes of these; no other id is."""
        held = np.concatenate(([0], (self.data >= FIRST_MARK).cumsum()))
        stripped = held[self.starts[1:]] > held[self.starts[:-1]]  # ids that write no text by themselves, in any way
        stripped[list(marks)] = True
        lengths = np.where(stripped, 0, self.starts[1:] - self.starts[:-1])
        kept = np.repeat(~stripped, self.starts[1:] - self.starts[:-1])
        lengths[list(marks)] = 1
        starts = np.concatenate(([0], lengths.cumsum()))
        data = np.zeros(starts[-1], dtype=np.uint8)
        of_mark = starts[list(marks)]
        text = np.ones(len(data), dtype=bool)
        text[of_mark] = False
        data[text], data[of_mark] = self.data[kept], FIRST_MARK + np.array([*marks.values()])
        return Vocabulary(data, starts)


def make_vocabulary(tokens: Iterable[bytes | None]) -> Vocabulary:
    """Of the bytes of each id; None: it writes nothing."""
    written = [token or b"" for token in tokens]
    lengths = np.fromiter(map(len, written), dtype=np.int64, count=len(written))
    return Vocabulary(np.frombuffer(b"".join(written), dtype=np.uint8), np.concatenate(([0], lengths.cumsum())))


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes that each id writes in a text, in the order of ids; None for special ids and those that write nothing.

    Read from the decoder of the `tokenizers` library: byte-level (GPT-2), replacements with bytes as tokens (SentencePiece, as Gemma has
    it), and plain tokens. Some texts are decoded to see that it is so.

    Raises:
        ValueError: `tokenizer` has no such decoder, or decodes to something else.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"`tokenizer` is a {type(tokenizer).__name__} without a `tokenizers` backend; expected a fast tokenizer")
    if getattr(tokenizer, "clean_up_tokenization_spaces", False):
        raise ValueError("`tokenizer.clean_up_tokenization_spaces` is True, which changes a text after it is decoded; expected False")
    writes = _writer(tokenizer, _steps(backend.decoder))
    special = set(tokenizer.all_special_ids) | {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    found: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        if index not in special:
            found[index] = writes(token) or None
    _check_decoding(tokenizer, found)
    return found


def _steps(decoder: Any) -> list[dict]:
    """The steps of a decoder, one behind the other, as the library's JSON has them."""
    if decoder is None:
        return [{"type": "none at all, which puts spaces between tokens"}]
    waiting, found = [json.loads(decoder.__getstate__())], []
    while waiting:
        step = waiting.pop(0)
        if step["type"] == "Sequence":
            waiting = step["decoders"] + waiting
        else:
            found.append(step)
    return found


def _writer(tokenizer: PreTrainedTokenizerBase, steps: list[dict]):
    """What gives the bytes of a token. Raises ValueError for steps that are not known, or not in this order."""
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        alphabet = _byte_alphabet()

        def writes(token: str) -> bytes:
            known = all(character in alphabet for character in token)
            return bytes(alphabet[character] for character in token) if known else token.encode()

        return writes
    before = kinds[: kinds.index("Fuse")] if "Fuse" in kinds else kinds
    plain = [step for step in steps if step["type"] == "Replace" and "String" in step["pattern"]]
    if kinds not in (before, [*before, "Fuse"]) or len(plain) + before.count("ByteFallback") != len(before) or not kinds:
        raise ValueError(
            f"`tokenizer` ({tokenizer.name_or_path or type(tokenizer).__name__}) decodes by {', '.join(kinds)}; expected ByteLevel, or "
            "replacements of plain strings, ByteFallback and then Fuse"
        )
    if "Fuse" not in kinds and "ByteFallback" not in kinds:
        raise ValueError(f"`tokenizer` decodes by {', '.join(kinds)}; expected Fuse or ByteFallback among it")
    replaced = [(step["pattern"]["String"], step["content"]) for step in plain]
    in_bytes = "ByteFallback" in kinds

    def writes(token: str) -> bytes:
        for old, new in replaced:
            token = token.replace(old, new)
        if in_bytes and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes((int(byte[1], 16),))
        return token.encode()

    return writes


def _byte_alphabet() -> dict[str, int]:
    """The byte of each character of byte-level tokens (GPT-2): itself where it is printable, and otherwise one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _check_decoding(tokenizer: PreTrainedTokenizerBase, found: list[bytes | None]) -> None:
    def is_text(token: bytes | None) -> bool:
        try:
            return bool(token and token.decode())
        except UnicodeDecodeError:
            return False

    numbers = np.random.default_rng(0)
    whole = [index for index in numbers.permutation(len(found))[:4096].tolist() if is_text(found[index])]
    for ids in (whole[start : start + 16] for start in range(0, min(len(whole), 512), 16)):
        expected, decoded = b"".join(found[index] or b"" for index in ids).decode(), tokenizer.decode(ids)
        if decoded != expected:
            raise ValueError(f"`tokenizer` decodes the ids {ids} to {decoded!r}; expected {expected!r}, what its decoder says")


def token_automaton(automaton: ByteAutomaton, vocabulary: Vocabulary) -> Automaton:
    """The automaton of all sequences of ids whose bytes, joined, `automaton` accepts, in whatever way a text is cut into tokens.

    Returns: tensors on the CPU; as few states and classes as there can be.

    Raises:
        ValueError: no sequence of ids is accepted, and which character none of them writes; or too much to hold.
    """
    functions = _Functions(automaton)
    kinds = _kinds(functions, automaton.byte_class, vocabulary)
    used = np.unique(kinds)
    used = used[used > 0]
    bounds = functions.bounds
    places = spans(bounds[used], bounds[used + 1])
    source, target = functions.origins[places], functions.targets[places]
    kind = np.repeat(used, bounds[used + 1] - bounds[used])
    if automaton.border is not None:
        target = automaton.border[target]
        kept = target > 0
        source, kind, target = source[kept], kind[kept], target[kept]
    edges = (torch.from_numpy(one.astype(np.int64)) for one in (source - 1, kind, target - 1))
    try:
        made = make_automaton(torch.from_numpy(kinds), *edges, torch.from_numpy(automaton.accepting[1:]))
    except ValueError as error:
        missing = _missing_character(automaton, vocabulary)
        reason = "no sequence of them joins to such a text" if missing is None else f"none of them writes {missing}"
        raise ValueError(f"the tokens of `tokenizer` cannot write what the constraint demands: {reason}") from error
    return reduced(made)


class _Functions:
    """The functions from states to states that have been met: function k leads from `origins[bounds[k] : bounds[k + 1]]` to `targets`, and
    from all other states nowhere. 0 leads nowhere at all, 1 is what no byte does. `steps` int32 (functions, K): the function that a byte of
    a class makes of one, -1 where that was not asked yet."""

    def __init__(self, automaton: ByteAutomaton) -> None:
        self.table = automaton.table
        states = np.arange(1, len(self.table), dtype=np.int32)
        self.origins, self.targets, self.bounds = states, states, np.array([0, 0, len(states)])
        self.steps = np.full((2, self.table.shape[1]), -1, dtype=np.int32)
        self.steps[0] = 0
        self.names = {b"": 0, self._pairs(states, states).tobytes(): 1}

    @staticmethod
    def _pairs(origins: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return np.stack((origins, targets), axis=1)

    def step(self, keys: np.ndarray) -> np.ndarray:
        """The functions of `keys`, each a function times K plus a class of bytes."""
        found = self.steps.reshape(-1)[keys]
        if len(unknown := keys[found < 0]):
            asked = np.zeros(self.steps.size, dtype=bool)
            asked[unknown] = True
            self._make(asked.nonzero()[0])
            found = self.steps.reshape(-1)[keys]
        return found

    def _make(self, keys: np.ndarray) -> None:
        before, byte = keys // self.steps.shape[1], keys % self.steps.shape[1]
        lengths = self.bounds[before + 1] - self.bounds[before]
        ends = lengths.cumsum()
        first, results, origins, targets, sizes = 0, [], [], [], []
        while first < len(keys):
            done = ends[first - 1] if first else 0
            last = max(int(np.searchsorted(ends, done + AT_ONCE, side="right")), first + 1)
            some = slice(first, last)
            places = spans(self.bounds[before[some]], self.bounds[before[some] + 1])
            reached = self.table[self.targets[places], np.repeat(byte[some], lengths[some])]
            alive = reached > 0
            came, went = self.origins[places][alive], reached[alive]
            counts = np.concatenate(([0], alive.cumsum()))
            stops = counts[ends[some] - done].tolist()
            pairs, start = memoryview(self._pairs(came, went).tobytes()), 0
            for stop in stops:
                name = bytes(pairs[8 * start : 8 * stop])
                if name not in self.names:
                    self.names[name] = len(self.names)
                    origins.append(came[start:stop])
                    targets.append(went[start:stop])
                    sizes.append(stop - start)
                results.append(self.names[name])
                start = stop
            first = last
        if sizes:
            self.origins = np.concatenate((self.origins, *origins))
            self.targets = np.concatenate((self.targets, *targets))
            self.bounds = np.concatenate((self.bounds, self.bounds[-1] + np.cumsum(sizes)))
            self.steps = np.concatenate((self.steps, np.full((len(sizes), self.steps.shape[1]), -1, dtype=np.int32)))
            if len(self.origins) > MOST_PLACES:
                raise too_large("places in the functions of its tokens", len(self.origins), MOST_PLACES)
        self.steps.reshape(-1)[keys] = results


def _kinds(functions: _Functions, byte_class: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """int64 (V,): the function of each id's bytes; 0 for ids that write nothing."""
    starts, stops = vocabulary.starts[:-1], vocabulary.starts[1:]
    kinds = np.where(stops > starts, 1, 0)
    classes = byte_class[vocabulary.data].astype(np.int64)
    active = kinds.nonzero()[0]
    place, stop = starts[active], stops[active]
    while len(active):
        now = functions.step(kinds[active] * functions.steps.shape[1] + classes[place])
        kinds[active] = now
        place = place + 1
        kept = (now > 0) & (place < stop)
        active, place, stop = active[kept], place[kept], stop[kept]
    return kinds


def reduced(automaton: Automaton) -> Automaton:
    """The same language with as few states and classes of ids as there can be."""
    source, kind, target = (one.numpy() for one in (automaton.source, automaton.kind, automaton.target))
    blocks = merged(source, kind, target, automaton.accepting.numpy(), automaton.states)
    first = np.unique(blocks, return_index=True)[1]
    order = np.argsort(first)  # the start, which is state 0, stays the first
    renamed = np.empty_like(order)
    renamed[order] = np.arange(len(order))
    kept = np.isin(source, first)
    source, kind, target = renamed[blocks[source[kept]]], kind[kept], renamed[blocks[target[kept]]]
    by_kind = np.lexsort((source, kind))
    pairs = np.stack((source, target), axis=1)[by_kind]
    bounds = np.searchsorted(kind[by_kind], np.arange(automaton.kinds + 1))
    names: dict[bytes, int] = {b"": 0}
    kinds = np.array([names.setdefault(pairs[one:other].tobytes(), len(names)) for one, other in zip(bounds, bounds[1:], strict=False)])
    once = np.isin(kind, np.unique(kinds, return_index=True)[1])
    edges = (torch.from_numpy(one[once]) for one in (source, kinds[kind], target))
    return make_automaton(torch.from_numpy(kinds)[automaton.classes], *edges, automaton.accepting[torch.from_numpy(first[order])])


def _missing_character(automaton: ByteAutomaton, vocabulary: Vocabulary) -> str | None:
    """A character of a text with the fewest bytes that no token holds, shown as it is; None where there is a text without any."""
    held = np.zeros(256, dtype=bool)
    held[vocabulary.data] = True
    sample = np.zeros(automaton.table.shape[1], dtype=np.int64)
    for byte in [*np.flatnonzero(~held), *np.flatnonzero(held)]:  # of each class a byte, one that is held where there is one
        sample[automaton.byte_class[byte]] = byte
    cost, came, waiting = {1: 0}, {}, [[1]]
    for level, states in enumerate(waiting):  # level by level of missing bytes
        for state in states:
            if cost[state] < level:
                continue
            if automaton.accepting[state]:
                return None if not level else _shown(came, state, held)
            for kind in automaton.table[state].nonzero()[0].tolist():
                target, price = int(automaton.table[state, kind]), level + int(not held[sample[kind]])
                if price < cost.get(target, len(automaton.table) + 1):
                    cost[target], came[target] = price, (state, int(sample[kind]))
                    while len(waiting) <= price:
                        waiting.append([])
                    waiting[price].append(target)
    return None


def _shown(came: dict[int, tuple[int, int]], state: int, held: np.ndarray) -> str:
    path = []
    while state in came:
        state, byte = came[state]
        if byte < FIRST_MARK:  # a mark is no character
            path.append(byte)
    path.reverse()
    place = next(index for index, byte in enumerate(path) if not held[byte])
    character = bytes(path).decode()[len(bytes(path[:place]).decode(errors="ignore"))]
    return f"{character!r} (U+{ord(character):04X})"


__all__ = ["Vocabulary", "make_vocabulary", "reduced", "token_automaton", "token_bytes"]
