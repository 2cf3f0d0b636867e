"""What a caller writes, compiled: against `re.fullmatch`, and templates against all cuts of all texts of tiny vocabularies."""

import itertools
import os
import random
import re
import stat
import time

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from generation.constraints import compiled
from generation.constraints.blanks import Blank, segments_automaton
from generation.constraints.compiled import FOLDER, cache_folder, compile_constraint
from generation.constraints.expression import Either, Repeat, chars, text
from generation.constraints.languages import Choice, JsonSchema, Pins, Regex, Template, ToolCalls, described
from generation.constraints.tokens import make_vocabulary, token_automaton
from modeling_diffusiongemma import default_checkpoint


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Nobody's cache is read or written."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "kept"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    compiled._memory().clear()
    return tmp_path / "kept"


def letters_tokenizer(letters="abcdefgh ,.", more=()):
    """An id for each letter, in this order, and then `more`."""
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate([*letters, *more])}, unk_token="?"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


# Templates, by brute force

A_OR_B = chars((97, 98))
PIECES = {  # what judges a piece of fixed text or a field, and the expression that means the same
    "a": text("a"), "b": text("b"), "ab": text("ab"), "é": text("é"), "": text(""),
    "(?:a|ba)": Either((text("a"), text("ba"))), "a*": Repeat(text("a"), 0, None), "[ab]{1,2}": Repeat(A_OR_B, 1, 2),
}  # fmt: skip
TOKENS = [b"a", b"b", b"ab", b"ba", "é".encode(), b"\xc3", b"\xa9", b"bab", "bé".encode(), b"aab", b"b\xc3"]


def fits(tokens, segments):
    """Whether some way to cut the text into the segments gives each blank a number of tokens in its range."""
    data = b"".join(tokens)
    try:
        whole = data.decode()
    except UnicodeDecodeError:
        return False
    places = [len(whole[:index].encode()) for index in range(len(whole) + 1)]  # of characters, in bytes
    ends = list(itertools.accumulate(map(len, tokens), initial=0))

    def rest_fits(index, start):
        if index == len(segments):
            return start == len(whole)
        segment = segments[index]
        for stop in range(start, len(whole) + 1):
            if isinstance(segment, Blank):
                first, last = places[start], places[stop]
                touched = sum(max(first, one) < min(last, other) for one, other in zip(ends, ends[1:], strict=False))
                good = stop > start and segment.least <= touched and (segment.most is None or touched <= segment.most)
            else:
                good = re.fullmatch(segment, whole[start:stop]) is not None
            if good and rest_fits(index + 1, stop):
                return True
        return False

    return rest_fits(0, 0)


@pytest.mark.parametrize("seed", range(150))
def test_template_accepts_what_can_be_cut_so(seed):
    numbers = random.Random(seed)
    segments = []
    for _ in range(numbers.randint(1, 4)):
        if numbers.random() < 0.55:
            least = numbers.randint(1, 3)
            segments.append(Blank(least, numbers.choice((None, least, least, least + 1, least + 2))))
        else:
            segments.append(numbers.choice(list(PIECES)))
    tokens, longest = numbers.sample(TOKENS, 5), 5 if seed < 50 else 4  # five tokens are five times the work
    wanted = {
        ids
        for length in range(longest + 1)
        for ids in itertools.product(range(len(tokens)), repeat=length)
        if fits([tokens[index] for index in ids], segments)
    }
    expressions = [one if isinstance(one, Blank) else PIECES[one] for one in segments]
    try:
        automaton = token_automaton(segments_automaton(expressions), make_vocabulary(tokens))
    except ValueError as error:
        assert "cannot write" in str(error) and not wanted
        return
    found = {ids for length in range(longest + 1) for ids in itertools.product(range(len(tokens)), repeat=length) if automaton.accepts(ids)}
    assert found == wanted, segments


def test_token_that_holds_text_and_blank_counts_for_the_blank():
    tokenizer = letters_tokenizer(more=("a b", "cd", " ,"))
    ids = {token: index for token, index in tokenizer.get_vocab().items()}
    automaton = compile_constraint(Template("a {who:1-2},"), tokenizer, 20)
    accepted = [["a", " ", "b", ","], ["a b", ","], ["a b", "c", ","], ["a", " ", "cd", " ,"], ["a b", "cd", ","]]
    refused = [["a", " ", ","], ["a", " ", "b", "c", "d", ","], ["a b", "c", "d", ","], ["a b"], ["a", " ", "c", "c", " ,"]]
    assert [automaton.accepts([ids[token] for token in tokens]) for tokens in accepted + refused] == [True] * 5 + [False] * 5


def test_many_counted_blanks_stay_small():
    """Of cuts that all have enough tokens only the one with the fewest is followed: without that, sets of counts would double the states
    with each token of a blank. What is left are the counts themselves, of three blanks."""
    automaton = segments_automaton([Blank(1, 12), text(", "), Blank(1, 12), text("; "), Blank(1, 12), text(".")])
    assert len(automaton.table) < 12**3 * 12


# Languages


def test_regex_and_schema_mean_what_their_readers_say():
    regex = pytest.importorskip("generation.constraints.regex")
    tokenizer = letters_tokenizer(more=("ab", "a.b"))
    automaton = compile_constraint(Regex(r"a[bc]*\.b?"), tokenizer, 13)
    names = dict(enumerate(tokenizer.convert_ids_to_tokens(range(13))))
    for ids in itertools.product(range(13), repeat=4):
        assert automaton.accepts(ids) == bool(re.fullmatch(r"a[bc]*\.b?", "".join(names[index] for index in ids)))
    with pytest.raises(ValueError, match="`pattern`"):
        Regex("(a")
    assert Regex("a").expression() == regex.parse_regex("a", "pattern")
    with pytest.raises(ValueError, match="`schema`"):
        JsonSchema("{")
    one = JsonSchema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, whitespace="compact")
    assert described(one) != described(JsonSchema(one.schema)) and hash(one) is not None
    automaton = compile_constraint(one, letters_tokenizer('{}":a0123-'), 10)
    assert automaton.accepts([0, 2, 4, 2, 3, 9, 6, 5, 1]) and not automaton.accepts([0, 2, 4, 2, 3, 9, 1])


@pytest.mark.parametrize(
    "pattern",
    [
        r"[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]",
        r"[a-z.]+@[a-z]{2,9}\.(com|org|é)",
        r"(Dear|Hello) [A-Z]\w{0,9},\n(?:- .{0,30}\n){1,3}",
        r"[^a-z]{3,8}",
    ],
)
def test_walks_of_a_shipped_tokenizer_decode_to_what_the_pattern_accepts(pattern):
    """Texts by uniform choices among edges: cuts that no tokenizer would make, half characters included."""
    pytest.importorskip("generation.constraints.regex")
    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint("text"))
    automaton = compile_constraint(Regex(pattern), tokenizer, len(tokenizer))
    numbers = random.Random(1)
    members = [(automaton.classes == kind).nonzero().flatten().tolist() for kind in range(automaton.kinds)]
    edges = [(automaton.source == state).nonzero().flatten().tolist() for state in range(automaton.states)]
    for _ in range(100):
        ids, state = [], 0
        while not (automaton.accepting[state] and (not edges[state] or len(ids) >= 60 or numbers.random() < 0.3)):
            closer = [edge for edge in edges[state] if len(ids) < 60 or automaton.fewest[automaton.target[edge]] < automaton.fewest[state]]
            edge = numbers.choice(closer)
            ids.append(numbers.choice(members[automaton.kind[edge]]))
            state = int(automaton.target[edge])
        assert automaton.accepts(ids) and re.fullmatch(pattern, tokenizer.decode(ids)), tokenizer.decode(ids)


def test_choice_is_one_of_its_options_in_any_cut():
    tokenizer = letters_tokenizer(more=("abc", "de"))
    automaton = compile_constraint(Choice(["abc", "ab", "cde"]), tokenizer, 13)
    found = [ids for length in range(1, 5) for ids in itertools.product(range(13), repeat=length) if automaton.accepts(ids)]
    assert sorted(found) == sorted([(0, 1, 2), (11,), (0, 1), (2, 3, 4), (2, 12)])
    assert Choice(["a", "b"]) == Choice(("a", "b"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "`options` is empty"),
        ("abc", "`options` is 'abc'"),
        (None, "`options` is None"),
        (["a", ""], "`options` holds '' at 1"),
        (["a", 3], "`options` holds 3 at 1"),
        (["a", "b", "a"], "`options` holds 'a' twice"),
        (["\ud800"], "surrogate"),
    ],
)
def test_wrong_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        Choice(options)


def test_template_reads_fields_blanks_and_braces():
    inner = Template("<{x}>", x=Choice(["b"]))
    template = Template("{{a}} {who:1-8}, {exact:3}{rest} {kind} {inner}.", kind=Choice(["c", "d"]), inner=inner)
    assert [piece for name, piece in template.pieces if name is None] == ["{a} ", ", ", " ", " ", "."]
    blanks = {name: piece for name, piece in template.pieces if isinstance(piece, Blank)}
    assert blanks == {"who": Blank(1, 8), "exact": Blank(3, 3), "rest": Blank(1, None)}
    assert len(template.segments()) == 12
    assert Template("{text} {self}", text=Choice(["a"]), self=Choice(["b"])).values("a b") == {"text": "a", "self": "b"}
    assert hash(template) == hash(Template(template.text, inner=inner, kind=Choice(["c", "d"])))
    assert described(Template("{a}")) != described(Template("{a}", a=Choice(["x"])))


@pytest.mark.parametrize(
    ("written", "fields", "named"),
    [
        ("a { b", {}, "single '{' at 2"),
        ("a } b", {}, "single '}' at 2"),
        ("{a", {}, "single '{' at 0"),
        ("{}", {}, r"the field \{\}"),
        ("{1a}", {}, r"the field \{1a\}"),
        ("{a:}", {}, r"the field \{a:\}"),
        ("{a:x}", {}, r"the field \{a:x\}"),
        ("{a:1-}", {}, r"the field \{a:1-\}"),
        ("{a:0}", {}, r"the field \{a:0\}; expected a count of tokens from 1 on"),
        ("{a:3-2}", {}, r"the field \{a:3-2\}; expected a count"),
        ("{a}{a:3}", {}, "field 'a' twice"),
        ("{a:3}", {"a": Choice(["x"])}, r"counts the tokens of \{a:3\}"),
        ("{a}", {"b": Choice(["x"]), "c": Choice(["x"])}, r"no fields \['b', 'c'\]"),
        ("{a}", {"a": "x"}, "`a` is 'x'"),
        ("{a}", {"a": Pins(torch.tensor([1]), torch.tensor([True]))}, "`a` is Pins"),
        ("\udcff{a}", {}, "surrogate"),
        (3, {}, "`text` is 3"),
    ],
)
def test_wrong_templates_are_named(written, fields, named):
    with pytest.raises(ValueError, match=named):
        Template(written, **fields)


def test_values_read_a_template_back():
    template = Template("Dear {who:1-8}, on {day}: {rest}", day=Choice(["May", "May 1", "June"]))
    assert template.values("Dear Ann, Bo, on May 1: x: y") == {"who": "Ann, Bo", "day": "May 1", "rest": "x: y"}
    assert Template("{a}{b}").values("héé") == {"a": "h", "b": "éé"}  # the first blank is as short as it can be
    assert Template("{a} {b}", b=Template("{x}!")).values("u v w!") == {"a": "u", "b": "v w!"}
    day_or_night = Template("{a}{b}", a=Choice(["a", "ab"]))
    assert day_or_night.values("abc") == {"a": "ab", "b": "c"} and day_or_night.values("ab") == {"a": "a", "b": "b"}
    for wrong in ("Dear , on May: x", "dear A, on May: x", "Dear A, on July: x", "Dear A, on May: ", ""):
        with pytest.raises(ValueError, match="`text` is .*does not fit the template"):
            template.values(wrong)
    assert Template("a").values("a") == {}


@pytest.mark.parametrize("seed", range(30))
def test_values_are_what_a_regular_expression_finds(seed):
    numbers = random.Random(seed)
    written, pattern = "", ""
    for place in range(numbers.randint(1, 4)):
        literal = numbers.choice(("", ".", "a", "+b"))
        written, pattern = f"{written}{literal}{{f{place}}}", f"{pattern}{re.escape(literal)}(?P<f{place}>(?s:.+?))"
    template = Template(written)
    for _ in range(50):
        string = "".join(numbers.choices(".a+b\n", k=numbers.randint(0, 9)))
        match = re.fullmatch(pattern, string)
        if match:
            assert template.values(string) == match.groupdict()
        else:
            with pytest.raises(ValueError, match="does not fit"):
                template.values(string)


def test_pins_hold_their_positions_and_leave_others_to_text():
    tokenizer = letters_tokenizer("abcd")
    tokenizer.add_special_tokens({"eos_token": "<eos>"})  # id 4; a vocabulary of 6 has an id that is no token's
    pins = Pins(torch.tensor([2, 0, 4, 2, 1]), torch.tensor([True, False, True, False, True]))
    automaton = compile_constraint(pins, tokenizer, 6)
    found = {ids for ids in itertools.product(range(6), repeat=5) if automaton.accepts(ids)}
    assert found == {(2, one, 4, other, 1) for one in range(4) for other in range(4)}
    assert not any(automaton.accepts(ids) for ids in itertools.product(range(6), repeat=4))
    free = compile_constraint(Pins(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)), tokenizer, 6)
    assert {ids for ids in itertools.product(range(6), repeat=2) if free.accepts(ids)} == set(itertools.product(range(4), repeat=2))
    only = compile_constraint(Pins(torch.tensor([5, 5]), torch.ones(2, dtype=torch.bool)), tokenizer, 6)
    assert [ids for ids in itertools.product(range(6), repeat=2) if only.accepts(ids)] == [(5, 5)]
    with pytest.raises(ValueError, match="`ids` pins 6; expected ids below"):
        compile_constraint(Pins(torch.tensor([6]), torch.tensor([True])), tokenizer, 6)


@pytest.mark.parametrize(
    ("ids", "mask", "named"),
    [
        ([1], torch.tensor([True]), r"`ids` is \[1\]"),
        (torch.tensor([1.0]), torch.tensor([True]), r"`ids` is torch.float32 \(1,\)"),
        (torch.tensor([[1]]), torch.tensor([True]), r"`ids` is torch.int64 \(1, 1\)"),
        (torch.tensor([1]), torch.tensor([1]), "`mask` is torch.int64"),
        (torch.tensor([1, 2]), torch.tensor([True]), "`mask` has 1 positions and `ids` 2"),
        (torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.bool), r"`ids` is torch.int64 \(0,\)"),
        (torch.tensor([3, -1]), torch.tensor([False, True]), "`ids` holds -1"),
    ],
)
def test_wrong_pins_are_named(ids, mask, named):
    with pytest.raises(ValueError, match=named):
        Pins(ids, mask)


# Compiling and keeping


def same(left, right):
    return all(torch.equal(getattr(left, name), getattr(right, name)) and getattr(left, name).dtype == getattr(right, name).dtype
               for name in ("classes", "source", "kind", "target", "accepting", "fewest"))  # fmt: skip


def test_compiled_automaton_is_kept_in_memory_and_on_disk(folder):
    tokenizer, language = letters_tokenizer(), Template("a{x:1-3}b")
    made = compile_constraint(language, tokenizer, 20)
    assert compile_constraint(language, tokenizer, 20) is made
    assert len(list(folder.iterdir())) == 1
    again = compile_constraint(language, letters_tokenizer(), 20)  # another object with the same bytes
    assert again is not made and same(again, made) and len(list(folder.iterdir())) == 1
    fresh = compile_constraint(language, tokenizer, 20, cache=False)
    assert fresh is not made and same(fresh, made)
    for other in ((Template("a{x:1-4}b"), tokenizer, 20), (language, tokenizer, 21), (language, letters_tokenizer("abcdefgh .,"), 20)):
        compile_constraint(*other)
    assert len(list(folder.iterdir())) == 4


def test_a_language_stays_what_it_was_made_of():
    """A mapping or a tensor that a caller goes on to change, as in a loop, changed the languages made of it before."""
    schema, ids, mask = {"type": "string", "pattern": "a"}, torch.tensor([3, 4]), torch.tensor([True, False])
    tools = [{"name": "close", "parameters": {"properties": {"by": schema}}}]
    made = JsonSchema(schema), ToolCalls(tools), Pins(ids, mask)
    before = list(map(described, made))
    schema["pattern"], ids[0], mask[1] = "b", 5, True
    assert list(map(described, made)) == before


def test_what_a_schema_notes_may_be_anything(folder):
    """It ended in a TypeError of `json`, behind the language."""
    compile_constraint(JsonSchema({"enum": ["a"], "examples": {1, 2}}), letters_tokenizer('"ab'), 20)


def test_an_interrupt_leaves_no_file_behind(folder, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compile_constraint(Choice(["a"]), letters_tokenizer(), 20)
    assert not list(folder.iterdir())


def test_without_cache_nothing_is_written(folder):
    compile_constraint(Choice(["a"]), letters_tokenizer(), 20, cache=False)
    assert not folder.exists()


def test_cache_folder_is_the_users(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "kept"
    monkeypatch.delenv(FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "diffusiongemma" / "constraints"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "diffusiongemma" / "constraints"


def test_added_token_is_seen_after_a_compilation():
    tokenizer = letters_tokenizer("ab")
    assert not compile_constraint(Choice(["aa"]), tokenizer, 3).accepts([2])
    tokenizer.add_tokens(["aa"])
    assert compile_constraint(Choice(["aa"]), tokenizer, 3).accepts([2])


def spoiled(data, tensors, metadata):
    """Name, and what stands in the file instead."""
    moved = tensors | {"target": tensors["target"].flip(0)}
    huge = tensors | {"target": tensors["target"] + 1000}
    yield "empty", b""
    yield "cut", data[: len(data) // 2]
    yield "no safetensors", b"x" * len(data)
    yield "one byte", data[:-3] + bytes((data[-3] ^ 1,)) + data[-2:]
    yield "another's", safetensors.torch.save(tensors, metadata | {"name": "0" * 64})
    yield "no metadata", safetensors.torch.save(tensors)
    yield "other numbers", safetensors.torch.save(moved, metadata)
    yield "out of range", safetensors.torch.save(huge, metadata | {"checksum": compiled._checksum(huge)})
    short = tensors | {"classes": tensors["classes"][:-1]}
    yield "another vocabulary", safetensors.torch.save(short, metadata | {"checksum": compiled._checksum(short)})
    less = {name: tensor for name, tensor in tensors.items() if name != "kind"}
    yield "a tensor less", safetensors.torch.save(less, metadata | {"checksum": compiled._checksum(less)})


def test_file_that_is_broken_or_anothers_is_made_again_with_a_warning(folder, monkeypatch):
    tokenizer, language, warnings = letters_tokenizer(), Choice(["abc", "bad"]), []
    made = compile_constraint(language, tokenizer, 20)
    (path,) = folder.iterdir()
    data = path.read_bytes()
    tensors = safetensors.torch.load(data)  # not `load_file`, which maps the file that is spoiled below
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    monkeypatch.setattr(compiled.logger, "warning", warnings.append)
    for name, content in spoiled(data, tensors, metadata):
        path.write_bytes(content)
        compiled._memory().clear()
        assert same(compile_constraint(language, tokenizer, 20), made), name
        assert len(warnings) == 1 and str(path) in warnings.pop(), name
        compiled._memory().clear()
        assert same(compile_constraint(language, tokenizer, 20), made) and not warnings, name


def test_folder_that_cannot_be_written_warns_and_goes_on(folder, monkeypatch):
    warnings = []
    monkeypatch.setattr(compiled.logger, "warning_once", warnings.append)
    folder.write_text("a file where the folder would be")
    automaton = compile_constraint(Choice(["a"]), letters_tokenizer(), 20)
    assert automaton.accepts([0]) and len(warnings) == 1 and FOLDER in warnings[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_folder_without_the_right_to_write_warns_and_goes_on(folder, monkeypatch):
    warnings = []
    monkeypatch.setattr(compiled.logger, "warning_once", warnings.append)
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert compile_constraint(Choice(["a"]), letters_tokenizer(), 20).accepts([0]) and len(warnings) == 1


@pytest.mark.parametrize(
    ("language", "vocab_size", "named"),
    [
        ("abc", 20, "`constraint` is 'abc'"),
        (Choice(["abc"]), 0, "`vocab_size` is 0"),
        (Choice(["abc"]), 2.5, "`vocab_size` is 2.5"),
        (Choice(["az"]), 20, r"'z' \(U\+007A\)"),
        (Choice(["ac"]), 2, r"'c' \(U\+0063\)"),
    ],
)
def test_what_cannot_be_compiled_is_named(language, vocab_size, named):
    with pytest.raises(ValueError, match=named):
        compile_constraint(language, letters_tokenizer(), vocab_size)


def test_too_many_edges_are_refused_with_their_number():
    every = list(map("".join, itertools.product("abcdefgh", repeat=3)))
    tokenizer = letters_tokenizer("abcdefgh", more=every)
    pins = Pins(torch.arange(400).repeat(2), torch.arange(800) < 400)  # 400 free positions of 401 classes
    assert len(compile_constraint(pins, tokenizer, 520).source) == 400 + 400 * 401
    more = Pins(torch.arange(500).repeat(2), torch.arange(1000) < 500)
    with pytest.raises(ValueError, match=r"251,000 or more edges .* its 1,001 states, of at most 200,000; lower"):
        compile_constraint(more, tokenizer, 520)


def test_shipped_tokenizer_is_constrained_quickly_from_the_cache():
    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint("text"))
    language = Template("On {day}: {what:1-20}.", day=Choice([f"{day} May" for day in range(1, 32)]))
    made = compile_constraint(language, tokenizer, len(tokenizer))
    ids = tokenizer("On 21 May: é 5 things.", add_special_tokens=False).input_ids
    assert made.accepts(ids) and not made.accepts(ids[:-1])
    known = next(iter(compiled._memory()[tokenizer].values()))
    known.automata.clear()
    start = time.thread_time()  # not the clock's: others may have the core
    assert same(compile_constraint(language, tokenizer, len(tokenizer)), made)
    assert time.thread_time() - start < 1  # measured: some milliseconds
