"""From expressions to automata over bytes and over tokens, against `re.fullmatch` and against all sequences of tiny vocabularies."""

import itertools
import random
import re

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from generation.constraints.characters import MOST_BYTE_STATES, byte_automaton
from generation.constraints.expression import (
    ANY,
    EMPTY,
    NOTHING,
    Both,
    Either,
    Except,
    Expression,
    Join,
    Repeat,
    chars,
    outside,
    text,
)
from generation.constraints.tokens import make_vocabulary, token_automaton, token_bytes
from modeling_diffusiongemma import default_checkpoint

LETTERS = "abé€😀"


def some_expression(numbers: random.Random, depth: int = 3) -> tuple[str, Expression]:
    """A random pattern, and the expression that means the same."""
    kind = numbers.choice(("chars", "chars", "outside", "join", "either", "repeat") if depth else ("chars", "outside"))
    if kind in ("chars", "outside"):
        some = numbers.sample(LETTERS, numbers.randint(1, 3))
        ranges = chars(*((ord(one), ord(one)) for one in some))
        return (f"[{''.join(some)}]", ranges) if kind == "chars" else (f"[^{''.join(some)}]", outside(ranges))
    if kind == "repeat":
        pattern, body = some_expression(numbers, depth - 1)
        least = numbers.randint(0, 2)
        most = numbers.choice((None, least, least + 1, least + 3))
        return f"(?:{pattern}){{{least},{'' if most is None else most}}}", Repeat(body, least, most)
    patterns, bodies = zip(*(some_expression(numbers, depth - 1) for _ in range(numbers.randint(1, 3))), strict=True)
    if kind == "join":
        return "".join(f"(?:{one})" for one in patterns), Join(bodies)
    return f"(?:{'|'.join(patterns)})", Either(bodies)


def strings(letters: str, longest: int):
    for length in range(longest + 1):
        yield from map("".join, itertools.product(letters, repeat=length))


@pytest.mark.parametrize("seed", range(150))
def test_random_expression_accepts_what_the_pattern_does(seed):
    """As DOTALL: an expression's complement of characters has the line feed among it, as a pattern's has."""
    pattern, expression = some_expression(random.Random(seed))
    automaton = byte_automaton(expression)
    for string in strings(LETTERS + "z", 3):
        assert automaton.accepts(string.encode()) == bool(re.fullmatch(pattern, string)), (pattern, string)


@pytest.mark.parametrize("seed", range(40))
def test_both_and_except_are_what_sets_are(seed):
    numbers = random.Random(seed)
    (one, left), (other, right) = some_expression(numbers), some_expression(numbers)
    for kind, wanted in ((Both, lambda a, b: a and b), (Except, lambda a, b: a and not b)):
        found = [string for string in strings(LETTERS, 3) if wanted(re.fullmatch(one, string), re.fullmatch(other, string))]
        try:
            automaton = byte_automaton(Join((text("<"), Repeat(kind(left, right), 1, 1), text(">"))))
        except ValueError as error:
            assert "accepts no text" in str(error) and not found
            continue
        assert [string for string in strings(LETTERS, 3) if automaton.accepts(f"<{string}>".encode())] == found


def test_every_character_and_nothing_else_is_one():
    """Every code point but surrogates; no overlong form, nothing above U+10FFFF, no half of a character."""
    automaton = byte_automaton(ANY)
    assert all(automaton.accepts(chr(point).encode()) for point in [*range(0xD800), *range(0xE000, 0x110000, 7), 0x10FFFF])
    wrong = (b"", b"\xc0\x80", b"\xc1\xbf", b"\xe0\x9f\xbf", b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xf0\x8f\xbf\xbf", b"\xf4\x90\x80\x80",
             b"\x80", b"\xff", b"\xe2\x82", b"ab")  # fmt: skip
    assert not any(automaton.accepts(data) for data in wrong)


@pytest.mark.parametrize(
    "point", [0, 0x7E, 0x7F, 0x80, 0x7FF, 0x800, 0xFFF, 0x1000, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x3FFFF, 0x40000, 0x10FFFF]
)
def test_single_code_point_is_cut_out_exactly(point):
    alone, others = byte_automaton(chars((point, point))), byte_automaton(outside(chars((point, point))))
    for other in {max(point - 1, 0), point, min(point + 1, 0x10FFFF), point ^ 0x40, (point ^ 0x1000) % 0x110000} - set(
        range(0xD800, 0xE000)
    ):
        assert alone.accepts(chr(other).encode()) == (other == point)
        assert others.accepts(chr(other).encode()) == (other != point)


def test_automaton_is_as_small_as_it_can_be():
    """A few known by hand; states are the dead one, and those inside of characters too."""
    a = text("a")
    assert len(byte_automaton(Repeat(a, 0, None)).table) == 2
    assert len(byte_automaton(Either((Repeat(a, 0, None), Join((a, a, Repeat(a, 0, None)))))).table) == 2
    assert len(byte_automaton(Repeat(Repeat(a, 0, 3), 0, 5)).table) == 17
    assert len(byte_automaton(Either((text("xaz"), text("yaz")))).table) == 5
    assert len(byte_automaton(Join((text("é"), EMPTY))).table) == 4
    assert len(byte_automaton(Repeat(ANY, 0, None)).table) == 9  # E0, ED, F0 and F4 have rules of their own


@pytest.mark.parametrize("expression", [NOTHING, Join((text("a"), NOTHING)), Both(text("a"), text("b")), Except(text("a"), ANY), chars()])
def test_empty_language_is_refused(expression):
    with pytest.raises(ValueError, match="accepts no text"):
        byte_automaton(expression)


def test_too_large_language_is_refused_with_what_to_lower():
    a_or_b = chars((97, 98))
    for large in (
        Join((Repeat(a_or_b, 0, None), text("a"), Repeat(a_or_b, 17, 17))),
        Repeat(text("ab"), 30_000, 30_000),
        Repeat(Repeat(a_or_b, 0, 100), 0, 300),
    ):
        with pytest.raises(ValueError, match=r"the constraint needs [\d,]+ or more .* of at most [\d,]+; lower its counts"):
            byte_automaton(large)
    assert len(byte_automaton(Repeat(ANY, 0, 2000)).table) < MOST_BYTE_STATES


# Tokens

TOKENS = [b"a", b"b", b"ab", b"ba", b"\xc3", b"\xa9", "é".encode(), b"a\xc3", None, b"aaa", "€".encode(), b""]


def accepted_sequences(automaton, count, longest):
    """By brute force, from the edges alone."""
    return {ids for length in range(longest + 1) for ids in itertools.product(range(count), repeat=length) if automaton.accepts(ids)}


def wanted_sequences(tokens, fits, longest):
    found = set()
    for length in range(longest + 1):
        for ids in itertools.product(range(len(tokens)), repeat=length):
            if all(tokens[index] for index in ids):
                try:
                    whole = b"".join(tokens[index] for index in ids).decode()
                except UnicodeDecodeError:
                    continue
                if fits(whole):
                    found.add(ids)
    return found


@pytest.mark.parametrize("seed", range(60))
def test_all_sequences_of_a_tiny_vocabulary(seed):
    numbers = random.Random(seed)
    pattern, expression = some_expression(numbers)
    tokens = numbers.sample(TOKENS, 8)
    wanted = wanted_sequences(tokens, lambda whole: re.fullmatch(pattern, whole), 4)
    try:
        automaton = token_automaton(byte_automaton(expression), make_vocabulary(tokens))
    except ValueError as error:
        assert "cannot write" in str(error) and not wanted
        return
    assert accepted_sequences(automaton, len(tokens), 4) == wanted
    check_form(automaton)


def check_form(automaton):
    """Edges in order, no two classes with the same edges, no two states that accept the same, fewest tokens as a search finds them."""
    rows = torch.stack((automaton.source, automaton.kind), dim=1).tolist()
    assert rows == sorted(rows) and len({tuple(row) for row in rows}) == len(rows)
    columns = {}
    for source, kind, target in zip(automaton.source.tolist(), automaton.kind.tolist(), automaton.target.tolist(), strict=True):
        columns.setdefault(kind, []).append((source, target))
    assert len({tuple(column) for column in columns.values()}) == len(columns) == automaton.kinds - 1
    assert set(columns) == set(range(1, automaton.kinds))
    blocks = [0] * automaton.states  # the states that accept the same, the slow way
    for _ in range(automaton.states + 1):
        names = [(blocks[state], bool(automaton.accepting[state])) for state in range(automaton.states)]
        for source, kind, target in zip(automaton.source.tolist(), automaton.kind.tolist(), automaton.target.tolist(), strict=True):
            names[source] += (kind, blocks[target])
        blocks = [names.index(name) for name in names]
    assert len(set(blocks)) == automaton.states
    for state in range(automaton.states):
        states, steps = {state}, 0
        while not any(automaton.accepting[one] for one in states):
            states = set(automaton.target[torch.isin(automaton.source, torch.tensor(sorted(states)))].tolist())
            steps += 1
        assert automaton.fewest[state] == steps


def test_ids_that_write_nothing_are_in_class_0():
    tokens = [b"a", None, b"", b"b", b"aa"]
    automaton = token_automaton(byte_automaton(Repeat(text("a"), 0, None)), make_vocabulary(tokens))
    assert automaton.classes.tolist() == [1, 0, 0, 0, 1] and automaton.states == 1


def test_vocabulary_of_another_size_is_filled_or_cut():
    vocabulary = make_vocabulary([b"a", None, b"bc"])
    assert np.diff(vocabulary.of_size(5).starts).tolist() == [1, 0, 2, 0, 0] and bytes(vocabulary.of_size(5).data) == b"abc"
    assert np.diff(vocabulary.of_size(2).starts).tolist() == [1, 0] and bytes(vocabulary.of_size(2).data) == b"a"
    assert vocabulary.fingerprint not in (vocabulary.of_size(5).fingerprint, make_vocabulary([b"ab", None, b"c"]).fingerprint)


@pytest.mark.parametrize(
    ("expression", "tokens", "named"),
    [
        (text("axb"), [b"a", b"b"], r"'x' \(U\+0078\)"),
        (Join((Repeat(ANY, 0, None), text("é"))), [b"a", b"\xc3"], r"'é' \(U\+00E9\)"),
        (Either((text("xyb"), text("ab€"))), [b"a", b"b"], r"'€' \(U\+20AC\)|'x' \(U\+0078\)"),
        (text("ab"), [b"a", b"ba"], "no sequence of them"),
    ],
)
def test_character_that_no_token_writes_is_named(expression, tokens, named):
    with pytest.raises(ValueError, match=named):
        token_automaton(byte_automaton(expression), make_vocabulary(tokens))


# Tokenizers


def fast(model, decoder, special=(), plain=()):
    backend = Tokenizer(model)
    backend.decoder = decoder
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if "ByteLevel" in str(decoder) else None
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    backend.add_tokens([AddedToken(token, special=False) for token in plain])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


GEMMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def gemma_like():
    """Spaces as U+2581, bytes as tokens."""
    tokens = ["<pad>", "<eos>", "▁", "▁▁", "▁the", "a", "é", *(f"<0x{byte:02X}>" for byte in range(256)), "\n\n", "<0x4>", "<table>"]
    model = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[], byte_fallback=True)
    return fast(model, decoders.Sequence(GEMMA), special=("<pad>", "<eos>"), plain=("<table>", "<extra▁>"))


def test_gemma_tokens_write_spaces_and_bytes():
    tokenizer = gemma_like()
    found = token_bytes(tokenizer)
    assert found[:7] == [None, None, b" ", b"  ", b" the", b"a", "é".encode()]
    assert found[7 : 7 + 256] == [bytes((byte,)) for byte in range(256)]
    assert found[263:] == [b"\n\n", b"<0x4>", b"<table>", b"<extra >"]
    ids = [4, 7 + 0xE2, 7 + 0x82, 7 + 0xAC, 2, 5]
    assert tokenizer.decode(ids) == b"".join(found[index] for index in ids).decode() == " the€ a"


def test_byte_level_tokens_write_the_bytes_of_their_letters():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<eos>", *alphabet, "Ġthe"])}
    tokenizer = fast(models.BPE(vocab=vocabulary, merges=[]), decoders.ByteLevel(), special=("<eos>",), plain=("日本",))
    found = token_bytes(tokenizer)
    assert found[0] is None and sorted(found[1:257]) == [bytes((byte,)) for byte in range(256)]
    assert found[257:] == [b" the", "日本".encode()]
    ids = tokenizer("é€ the\n", add_special_tokens=False).input_ids
    assert b"".join(found[index] for index in ids).decode() == "é€ the\n"


@pytest.mark.parametrize("name", ["text", "sudoku", "decisions", "tools"])
def test_shipped_tokenizers(name):
    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint(name))
    found = token_bytes(tokenizer)
    assert len(found) == len(tokenizer)
    assert all(found[index] is None for index in tokenizer.all_special_ids)
    numbers = torch.Generator().manual_seed(3)
    whole = [index for index, token in enumerate(found) if token and token.isascii()]
    for _ in range(20):
        ids = [whole[place] for place in torch.randint(len(whole), (30,), generator=numbers).tolist()]
        assert tokenizer.decode(ids) == b"".join(found[index] for index in ids).decode()


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (decoders.WordPiece(), "WordPiece"),
        (decoders.Metaspace(), "Metaspace"),
        (decoders.Sequence([*GEMMA, decoders.Strip(" ", 1, 0)]), "Strip"),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")]), "Fuse, Replace"),
        (decoders.Replace("▁", " "), "Replace"),
        (None, "none at all"),
    ],
)
def test_decoder_that_is_not_understood_is_refused_by_name(decoder, named):
    with pytest.raises(ValueError, match=f"`tokenizer`.* decodes by .*{named}"):
        token_bytes(fast(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"), decoder))


def test_tokenizer_without_a_backend_is_refused():
    with pytest.raises(ValueError, match="`tokenizer` is a str"):
        token_bytes("gemma")


def test_text_that_is_changed_after_decoding_is_refused():
    tokenizer = gemma_like()
    tokenizer.clean_up_tokenization_spaces = True
    with pytest.raises(ValueError, match="clean_up_tokenization_spaces"):
        token_bytes(tokenizer)
