"""Times how constraints are compiled for a vocabulary of the released size, from nothing and from the cache, and counts what they become.

    python benchmarks/constraints_compile.py                         # 262,144 ids
    python benchmarks/constraints_compile.py --vocab-size 30000 --only "ISO date"

The vocabulary is made up in the form of Gemma's: special ids, bytes, spaces, digits, punctuation, words and pieces of several scripts, most
of them behind a space. Where outlines-core 0.2 is installed, its `Index` is built of the same language and vocabulary: its time, and by how
much ours is shorter; its regular expression of a schema differs in details, so its states do, too.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from generation.constraints import compiled
from generation.constraints.compiled import FOLDER, compile_constraint
from generation.constraints.languages import Choice, JsonSchema, Language, Regex, Template
from generation.constraints.tokens import token_bytes
from measure import heading, machine, markdown, number

SPECIAL = 6_000
SCRIPTS = ((0x400, 0x4FF), (0x3B1, 0x3C9), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x905, 0x939), (0xE0, 0x17F), (0x621, 0x64A),
           (0x1F300, 0x1F64F), (0x3041, 0x30FF))  # fmt: skip
NAMES = ("name", "age", "price", "active", "colour", "title", "year", "weight", "hidden", "size", "city", "count", "rating", "open", "kind",
         "author", "pages", "width", "new", "state")  # fmt: skip
KINDS = ({"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"enum": ["red", "green", "blue"]})
DATE, MAIL = r"[0-9]{4}-[0-9]{2}-[0-9]{2}", r"[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,4}"


def record(properties: dict) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


LANGUAGES: dict[str, Language] = {
    "ISO date": Regex(DATE),
    "mail address": Regex(MAIL),
    "word of at most 100 letters": Regex(r"[A-Za-z]{1,100}"),
    "object of 20 fields": JsonSchema(record({name: KINDS[place % 5] for place, name in enumerate(NAMES)}), whitespace="spaced"),
    "array of objects of 2 fields": JsonSchema({"type": "array", "items": record(dict(zip(NAMES, KINDS[:2], strict=False)))}, "spaced"),
    "5 strings of at most 20": JsonSchema(record({name: {"type": "string", "maxLength": 20} for name in NAMES[:5]}), "spaced"),
    "choice of 100": Choice([f"{name} {place}" for name in NAMES for place in range(5)]),
    "template of 2 blanks and a date": Template("Dear {who:1-8}, your order {what:1-6} of {day} is sent.", day=Regex(DATE)),
}  # fmt: skip


def made_up_tokens(count: int) -> list[str]:
    """The first `count` of a vocabulary, always the same."""
    numbers = random.Random(0)
    tokens = dict.fromkeys([f"<unused{index}>" for index in range(min(SPECIAL, count // 8))] + [f"<0x{byte:02X}>" for byte in range(256)])
    signs = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
    tokens |= dict.fromkeys(sign * length for sign in "▁\n\t-=*" for length in range(1, 32))
    tokens |= dict.fromkeys([*"0123456789", *signs, *(before + one + other for before in ("", "▁") for one in signs for other in signs)])
    while len(tokens) < count:
        if numbers.random() < 0.7:
            syllables = ("bcdfghjklmnpqrstvwxyz", "aeiou", "bdglmnprstxy")
            word = "".join(numbers.choice(letters) for _ in range(numbers.randint(1, 4)) for letters in syllables[: numbers.randint(2, 3)])
            word = numbers.choice((word, word, word, word.capitalize(), word.upper()))
        else:
            first, last = numbers.choice(SCRIPTS)
            word = "".join(chr(numbers.randint(first, last)) for _ in range(numbers.randint(1, 5)))
        tokens["▁" * (numbers.random() < 0.6) + word] = None
    return list(tokens)[:count]


def made_up_tokenizer(count: int) -> PreTrainedTokenizerBase:
    """A tokenizer of `count` ids, in the form of Gemma's."""
    tokens = made_up_tokens(count)
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, special=True) for token in tokens if token.startswith("<unused")])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def theirs(tokens: list[bytes | None]) -> Callable[[Language], float] | None:
    """What gives the seconds that outlines-core takes for a language; None where it is not installed."""
    try:
        from outlines_core import Index, Vocabulary
        from outlines_core.json_schema import build_regex_from_schema
    except ImportError:
        return None
    ids: dict[bytes, list[int]] = {}
    for index, token in enumerate(tokens):
        if token:
            ids.setdefault(token, []).append(index)
    vocabulary = Vocabulary(0, ids)

    def seconds(language: Language) -> float:
        start = time.perf_counter()
        pattern = language.pattern if isinstance(language, Regex) else build_regex_from_schema(json.dumps(language.schema), "[ ]")
        Index(pattern, vocabulary)
        return time.perf_counter() - start

    return seconds


def timed(language: Language, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> float:
    """Milliseconds; nothing is in memory but the bytes of the vocabulary."""
    for known in compiled._memory()[tokenizer].values():
        known.automata.clear()
    start = time.perf_counter()
    compile_constraint(language, tokenizer, vocab_size)
    return 1000 * (time.perf_counter() - start)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=262_144, help="(262144)")
    parser.add_argument("--only", nargs="+", choices=list(LANGUAGES), default=list(LANGUAGES), help="(all)")
    args = parser.parse_args(arguments)
    if args.vocab_size < 4_000:
        parser.error(f"`--vocab-size` is {args.vocab_size}; expected at least 4000, which hold bytes and punctuation")
    torch.set_num_threads(1)
    print(f"{heading(__file__, arguments, machine('cpu'))}\n")
    tokenizer = made_up_tokenizer(args.vocab_size)
    start = time.perf_counter()
    tokens = token_bytes(tokenizer)
    print(f"The bytes of all ids, once for a tokenizer and a process: {1000 * (time.perf_counter() - start):.0f} ms.\n")
    other, rows = theirs(tokens), []
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        compile_constraint(Choice(["warms up"]), tokenizer, args.vocab_size)
        for name in args.only:
            language = LANGUAGES[name]
            first, again = (timed(language, tokenizer, args.vocab_size) for _ in range(2))
            made = compile_constraint(language, tokenizer, args.vocab_size)
            row = [name, *(f"{count:,}" for count in (made.states, made.kinds, len(made.source))), number(first), number(again)]
            if other and isinstance(language, Regex | JsonSchema):
                seconds = other(language)
                row += [number(1000 * seconds), f"{1000 * seconds / first:.0f}x"]
            rows.append(row + ["", ""] * (other is not None and len(row) == 6))
    header = ["language", "states", "classes", "edges by class", "compiled, ms", "from the cache, ms"]
    print(markdown(header + ["outlines-core's index, ms", "as long"] * (other is not None), rows))


if __name__ == "__main__":
    main(sys.argv[1:])
