"""Random schemas, regular expressions, choices and templates: whatever a random model or the shipped checkpoint writes under them, by
random settings, fits. `python benchmarks/constraints.py many --count 2000` does the same at length; the judges stand in
`benchmarks/random_languages.py` and know nothing of how a constraint is made."""

import re

import pytest

from random_languages import load_models, random_texts, wrong_cut, wrong_json

CALLS = 6  # of a test, of up to three texts


@pytest.fixture(scope="module")
def models():
    return load_models()


def check(first, models):
    random, tokenizer, trained = models
    for seed in range(first, first + CALLS):
        written, _ = random_texts(seed, random, tokenizer, trained)
        assert written
        for one in written:
            assert one.wrong is None, f"seed {seed}, row {one.row}: {one.wrong}: {one.text!r} of {one.case.language!r} with {one.settings}"


@pytest.mark.parametrize("first", range(0, 36, CALLS))
def test_what_is_written_fits(first, models):
    check(first, models)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(36, 156, CALLS))
def test_what_is_written_fits_at_length(first, models):
    check(first, models)


NOTE = {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 2}}, "additionalProperties": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "whitespace", "message"),
    [
        ('{"a": 1, "b": "xy"}', None, None),
        ('{"a": 1, "b": "x: y"', None, "does not read"),
        ('{"a": NaN}', None, "NaN is no JSON"),
        ('{"b": "x", "a": 1}', None, "the order of"),
        ('{"a": 1, "b": ": "}', "spaced", None),
        ('{"a":1, "b": "x"}', "spaced", "not spaced"),
        ('{"a": 1}', "compact", "not compact"),
        ('{"a":1,"b":" "}', "compact", None),
    ],
)
def test_the_judge_of_json_sees_what_is_wrong(text, whitespace, message):
    found = wrong_json(text, NOTE, whitespace)
    assert found is None if message is None else message in found


@pytest.mark.parametrize("text", ['{"a": "1"}', '{"b": "xyz"}', '{"c": 1}', "[]"])
def test_the_judge_of_json_asks_jsonschema(text):
    pytest.importorskip("jsonschema", reason="jsonschema is not installed: nobody to judge values by their schema")
    assert "`jsonschema` says" in wrong_json(text, NOTE)


@pytest.mark.parametrize(
    ("text", "widths", "fits"),
    [
        ("a=é, b=12.", [2, 2, 3, 1, 2, 1], True),  # the blank is é alone
        ("a=é, b=12.", [2, 1, 1, 3, 1, 2, 1], True),  # or written by two tokens
        ("a=é, b=12.", [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], True),
        ("a=éé, b=12.", [1] * 13, False),  # four tokens, of at most three
        ("a=éé, b=12.", [1, 5, 1, 1, 1, 1, 1, 1, 1], True),  # one token for both
        ("a=, b=12.", [9], False),
        ("a=x, b=1x.", [10], False),
        ("a=x, b=12", [9], False),
        ("a=x, b=12.", [9], False),  # a token is missing
    ],
)
def test_the_judge_of_templates_counts_tokens_and_cuts_text(text, widths, fits):
    def digits(found, _):
        return None if re.fullmatch(r"\d+", found) else "it has no digits"

    assert (wrong_cut(text, widths, ["a=", (1, 3), ", b=", digits, "."]) is None) == fits
