"""A tokenizer in the form of Gemma's, of any size and always the same: special ids, bytes, spaces, digits, punctuation, words and pieces of
several scripts, most of them behind a space."""

import random

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from generation.constraints.calls import MARKS

LEAST = 4_000  # ids that hold bytes and punctuation
SPECIAL = 6_000
MARKED = dict(zip((48, 49, 52, 100, 101), MARKS, strict=True))  # ids as Gemma 4 has them
SCRIPTS = ((0x400, 0x4FF), (0x3B1, 0x3C9), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x905, 0x939), (0xE0, 0x17F), (0x621, 0x64A),
           (0x1F300, 0x1F64F), (0x3041, 0x30FF))  # fmt: skip


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
    found = list(tokens)[:count]
    for place, mark in MARKED.items():
        found[place] = mark
    return found


def made_up_tokenizer(count: int) -> PreTrainedTokenizerBase:
    """A tokenizer of `count` ids, in the form of Gemma's."""
    tokens = made_up_tokens(count)
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [token for token in tokens if token.startswith("<unused") or token in MARKS]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend)
