"""The console's constraints: `generate --regex`, `--choices`, `--schema`, and `fill`; what is wrong about them is said before a model is
loaded."""

import json
import re

import pytest

from generation.watch.screens import MARKS
from modeling_diffusiongemma.console import session
from modeling_diffusiongemma.console.usage import COMMANDS, build_parser

NARROW = ["--set", "canvas_length=32", "--max-new-tokens", "32", "--seed", "0"]
DATE = "Write 3 March 1998 as an ISO date."
ISO = r"\d{4}-\d\d-\d\d"
SCHEMA = {
    "type": "object", "properties": {"day": {"type": "integer"}, "kind": {"enum": ["date", "word"]}}, "required": ["day", "kind"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture
def schema(tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA), encoding="utf-8-sig")
    return str(tmp_path / "schema.json")


def marks(err):
    """The lines of marks below each step."""
    return [line.strip() for line in err.splitlines() if re.fullmatch(r"\s+[\^*.+#:=-]+", line)]


def test_every_answer_fits(answers, schema):
    """Under heavy noise, where a free answer would fit nothing."""
    noisy = [*NARROW, "--set", "max_denoising_steps=1", "--set", "temperature=3.0"]
    prompts = [DATE, "What is 0.1 g in kg?", "zebra"]
    for row in answers("generate", *prompts, "--batch-size", "2", "--regex", ISO, *noisy):
        assert re.fullmatch(ISO, row["text"])
    for row in answers("generate", *prompts, "--choices", "yes", "no", *noisy):
        assert row["text"] in ("yes", "no")
    for row in answers("generate", "--schema", schema, "--set", "num_return_sequences=2", *noisy, stdin=f"{DATE}\nzebra\n"):
        found = json.loads(row["text"])
        assert list(found) == ["day", "kind"] and type(found["day"]) is int and found["kind"] in ("date", "word")


def test_an_answer_that_fits_anyway_is_the_same(console):
    free = console("generate", DATE, "What is 0.1 g in kg?", *NARROW)
    assert free == console("generate", DATE, "What is 0.1 g in kg?", "--regex", r".+", *NARROW)
    assert free[1].splitlines()[0] == "1998-03-03"


def test_choices_end_at_two_dashes_or_at_the_next_option(answers):
    for line in (["--choices", "yes", "no", "--json", "--seed", "0", DATE], ["--seed", "0", "--choices", "yes", "no", "--", DATE]):
        args = build_parser().parse_args(["generate", *line])
        assert (args.choices, args.prompts) == (["yes", "no"], [DATE])
    assert answers("generate", "--choices", "1998", "1999", *NARROW, stdin=f"{DATE}\n")[0]["prompt"] == DATE


def test_fill_prints_the_text_and_as_json_its_values(console, answers, schema):
    given = ["fill", "{year}-03-{day:1-2}", "--regex", r"year=\d{4}", "--prompt", DATE, *NARROW]
    assert console(*given)[:2] == (0, "1998-03-03\n")
    (row,) = answers(*given)
    assert (row["prompt"], row["text"], row["values"]) == (DATE, "1998-03-03", {"year": "1998", "day": "03"})
    given = ["fill", "{a}, {b}: {c}", "--choices", "a=x|y z", "--schema", f"b={schema}", "--regex", "c=[=|]+", *NARROW]
    (row,) = answers(*given)
    values = row["values"]
    assert row["text"] == f"{values['a']}, {values['b']}: {values['c']}"
    assert values["a"] in ("x", "y z") and [*json.loads(values["b"])] == ["day", "kind"] and set(values["c"]) <= set("=|")


def test_fill_goes_on_from_a_raw_prompt(answers):
    (row,) = answers("fill", "{word:1-3}.", "--prompt", "The day", "--raw", *NARROW)
    assert row["text"] == f"{row['values']['word']}."


def test_watch_tells_pinned_constrained_and_free_apart(console):
    code, out, err = console("generate", DATE, "--regex", ISO, "--watch", *NARROW)
    assert (code, out) == (0, "1998-03-03\n") and set(marks(err)[-1]) <= set("+#:=-") and marks(err)[-1][4] == "="
    code, out, err = console("fill", "{year}-03-03", "--prompt", DATE, "--watch", *NARROW)
    assert code == 0 and out.endswith("-03-03\n") and marks(err)[-1].endswith("=") and set(marks(err)[-1]) & set("^*.")
    assert set("".join(marks(console("generate", DATE, "--watch", *NARROW)[2]))) <= set("^*.")


def test_help_says_what_the_marks_mean():
    for command in COMMANDS:
        if command.name in ("generate", "fill"):
            for freedom, marks_of in MARKS.items():
                (line,) = (line for line in command.examples.splitlines() if line.lstrip().startswith(freedom))
                expected = [marks_of[state] for state in ("accepted", "corrected", "renoised")]
                assert [word for word in line.split() if len(word) == 1] == expected


WRONG = {  # command line: what standard error must say
    ("generate", DATE, "--choices", "yes", "no", "yes"): "`--choices`: `options` holds 'yes' twice",
    ("generate", DATE, "--choices", "yes", ""): "`--choices`: `options` holds '' at 1",
    ("generate", DATE, "--choices"): "argument --choices: expected at least one argument",
    ("generate", "--choices", "yes", "no", DATE): "`--choices` takes all words behind it: write the prompt before it, or `--` between",
    ("generate", DATE, "--choices", "yes\udce9"): "argument --choices: got 'yes\\udce9'; expected text in UTF-8",
    ("generate", DATE, "--regex", "("): "`--regex`: `pattern` is '(', which is no regular expression",
    ("generate", DATE, "--regex", r"(a)\1"): "`--regex`: `pattern` is",
    ("generate", DATE, "--regex", "(?=a)"): "holds a look-around",
    ("generate", DATE, "--regex", "a", "--choices", "b"): "argument --choices: not allowed with argument --regex",
    ("generate", DATE, "--regex", "a", "--schema", "x"): "argument --schema: not allowed with argument --regex",
    ("generate", DATE, "--regex", "a", "--set", "backend=reference"): "the reference knows no constraint",
    ("generate", DATE, "--set", "constraint=a"): "`--set constraint=...` is given; expected it unset",
    ("generate", DATE, "--schema", "{}/nowhere"): "`--schema`: '{}/nowhere' cannot be read ([Errno 2]",
    ("generate", DATE, "--schema", "{}"): "`--schema`: '{}' cannot be read ([Errno 21]",
    ("generate", DATE, "--schema", "{}/no_json"): "expected a file with a JSON schema",
    ("generate", DATE, "--schema", "{}/latin"): "expected a file with a JSON schema",
    ("generate", DATE, "--schema", "{}/deep"): "expected a file with a JSON schema",
    ("generate", DATE, "--schema", "{}/list"): "`--schema`: `schema` is",
    ("generate", DATE, "--schema", "{}/no_type"): "`--schema`: `schema` holds 'nope' at $.type",
    ("generate", DATE, "--schema", "{}/unsupported"): "`--schema`: `schema` holds $.not, which is not supported",
    ("fill",): "TEMPLATE",
    ("fill", ""): "TEMPLATE is '', which has no blank",
    ("fill", "a {{name}}"): "which has no blank; expected one, such as {name:1-8}",
    ("fill", "{name"): "TEMPLATE: `text` holds a single '{' at 0",
    ("fill", "{name:0}"): "TEMPLATE: `text` holds the field {name:0}",
    ("fill", "{name} {name}"): "TEMPLATE: `text` names the field 'name' twice",
    ("fill", "{name}", "--regex", "other=a"): "`text` has no fields ['other']",
    ("fill", "{name:3}", "--regex", "name=a"): "`text` counts the tokens of {name:3}",
    ("fill", "{name}", "--regex", "a"): "argument --regex: got 'a'; expected FIELD=VALUE",
    ("fill", "{name}", "--regex", "name="): "argument --regex: got 'name='; expected FIELD=VALUE",
    ("fill", "{name}", "--regex", "name=("): "`--regex name=...`: `pattern` is '('",
    ("fill", "{name}", "--regex", "name=a", "--choices", "name=a|b"): "`--choices` gives the field 'name' a second language; expected one",
    ("fill", "{name}", "--choices", "name=a|b|a"): "`--choices name=...`: `options` holds 'a' twice",
    ("fill", "{name}", "--schema", "name={}/no_json"): "`--schema name=...`: '{}/no_json' cannot be read",
    ("fill", "{name}", "--set", "num_return_sequences=2"): "`num_return_sequences` is above 1; expected 1",
    ("fill", "{name}", "--set", "backend=reference"): "the reference knows no constraint",
    ("fill", "{name}", "--raw"): "`--raw` is given without `--prompt`",
    **{
        (command, *rest, argument, "x"): f"unrecognized arguments: {argument} x"
        for command, *rest in (["chat"], ["bench"], ["export", "folder"], ["info"])
        for argument in ("--regex", "--choices", "--schema")
    },
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schemas")
    schemas = {"no_json": "{", "list": "[1]", "no_type": '{"type": "nope"}', "unsupported": '{"not": {}}', "deep": "[" * 100_000}
    for name, text in schemas.items():
        (folder / name).write_text(text)
    (folder / "latin").write_bytes(b'{"const": "caf\xe9"}')
    return str(folder)


@pytest.mark.parametrize("line", WRONG, ids=" ".join)
def test_wrong_usage_is_named_before_a_model_is_loaded(line, console, files, monkeypatch):
    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(session, name, lambda *_, **__: pytest.fail("a checkpoint was loaded"))
    code, out, err = console(*(word.replace("{}", files) for word in line))
    assert code == 2 and out == "" and WRONG[line].replace("{}", files) in err and "Traceback" not in err, err


def test_a_text_that_cannot_be_whole_is_refused(console):
    code, out, err = console("generate", DATE, "--regex", r"\d{400}", *NARROW)
    assert (code, out) == (1, "") and "`max_new_tokens` leaves 32 tokens; expected at least 400" in err


def test_time_that_is_over_before_a_template_is_filled_in_is_named(console):
    narrow = ["--set", "canvas_length=16", "--set", "max_time=0.001"]
    code, out, err = console("fill", "{a:20} and {b:20}", "--seed", "0", "--max-new-tokens", "64", *narrow)
    assert (code, out) == (1, "") and "`max_time` is 0.001, which was over before the text was whole" in err
