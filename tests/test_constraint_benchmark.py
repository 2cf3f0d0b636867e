"""`benchmarks/constraints.py` runs, at small sizes on a CPU, and reports what it promises. No timing is judged."""

import re
from pathlib import Path

import programs
import pytest
import torch

import constraints
from generation.loop import constrained
from made_up_vocabulary import made_up_tokenizer, made_up_tokens

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "constraints.py"


def run(capsys, *arguments):
    """What a part prints, its table as lists of cells."""
    threads = torch.get_num_threads()
    try:
        constraints.main(list(arguments))
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    return printed, [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("|")]


def test_compile_counts_and_times(capsys):
    printed, (header, _, date) = run(capsys, "compile", "--quick")
    assert date[:4] == ["ISO date", "11", "3", "10"] and float(date[4]) > 0
    assert header[4:6] == ["compiled, ms", "from the cache, ms"] and "The bytes of all 4,000 ids" in printed


def test_step_times_both_ways_and_says_what_it_means_at_the_released_sizes(capsys):
    printed, (header, _, *rows) = run(capsys, "step", "--quick", "--cpu-time", "--vocab-size", "4000")
    assert len(rows) == 8 and header[:3] == ["ids", "dtype", "language"]
    for row in rows:
        free, bound, *stages, ratio = row[9:]
        assert float(free) > 0 and sum(map(float, stages)) == pytest.approx(float(bound), rel=0.02)
        assert float(bound) / float(free) == pytest.approx(float(re.match(r"\*\*([\d.]+)x\*\*", ratio)[1]), rel=0.02)
    share = float(re.search(r"the head and the soft embedding are ([\d.]+)%", printed)[1])
    assert 5 < share < 7


def test_a_peaked_canvas_is_a_text_of_the_language():
    automaton = constraints.random_automaton(640, 16, 147)
    weight = torch.randn((640, 64), generator=torch.Generator().manual_seed(0)) * 0.1
    step = constraints.Step(weight, automaton, 2).certain()
    prediction = step.bound(lambda: 0.0)[1]
    assert float(prediction.entropy.mean()) < 0.1
    for row in prediction.argmax.tolist():
        assert automaton.run(row) is not None


def test_notes_are_judged_both_ways(capsys):
    usual = constrained.chosen
    printed, (header, _, *rows) = run(capsys, "notes", "--quick", "--count", "2")
    assert constrained.chosen is usual
    assert [row[:2] for row in rows] == [["2 steps", way] for way in constraints.WAYS]
    assert all(row[3] == "2" for row in rows[1:]) and "2 held-out notes" in printed


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ('{"name": "Ann", "quantity": 2, "price": 4.50, "date": "2024-02-29"}', True), ("{}", True), ('{"price": 4}', True),
        ('{"quantity": 2, "name": "Ann"}', False), ('{"quantity": true}', False), ('{"date": "2023-02-29"}', False), ('{"date": 3}', False),
        ("[]", False), ('{"name": "Ann"', False), ('{"size": 1}', False),
    ],
)  # fmt: skip
def test_a_note_is_valid_by_json_types_and_dates(answer, valid):
    assert constraints.is_note(answer) == valid


def test_many_counts_what_fits(capsys):
    printed, (header, _, *rows) = run(capsys, "many", "--count", "4", "--first", "3")
    assert rows[-1] == ["**all**", "4", "4"] and "Seeds 3 to 4" in printed


def test_many_fails_where_a_text_does_not_fit(capsys, monkeypatch):
    written = constraints.random_texts

    def spoiled(*given):
        found, refused = written(*given)
        return [one._replace(wrong="it is spoiled") for one in found], refused

    monkeypatch.setattr(constraints, "random_texts", spoiled)
    with pytest.raises(SystemExit):
        constraints.main(["many", "--count", "2", "--first", "3"])
    assert "seed 3, row 0: it is spoiled" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile", "--vocab-size", "640"], "expected one of at least 4000"),
        (["step", "--classes", "8"], "expected at least 9 of them"),
        (["step", "--vocab-size", "200"], "at most half as many as ids"),
        (["step", "--cpu-time", "--threads", "2"], "expected --threads 1 or none"),
        (["everything"], "invalid choice: 'everything'"),
    ],
)
def test_wrong_usage_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        constraints.main(arguments)
    assert message in capsys.readouterr().err


def test_the_program_runs_by_itself():
    done = programs.run(SCRIPT, "compile", "--quick")
    assert done.returncode == 0, done.stderr
    assert "| ISO date |" in done.stdout


def test_a_made_up_vocabulary_begins_alike_and_decodes():
    tokens = made_up_tokens(5000)
    assert len(set(tokens)) == 5000 and made_up_tokens(5000) == tokens
    tokenizer = made_up_tokenizer(4000)
    assert len(tokenizer) == 4000
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<0xC3>", "<0xA9>", "▁▁")]
    assert tokenizer.decode(ids) == "é  "
