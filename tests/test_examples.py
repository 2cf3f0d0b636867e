"""The examples run as they stand, on the shipped checkpoints."""

import json
import re
import sys

import programs
import pytest

import race


def test_demo_solves_one_unseen_input_of_every_job_and_judges_it():
    done = programs.run("examples/demo.py", "--seed", "3")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w+) +(right|WRONG) +(\d+) +[\d.]+ +[\d.]+$", done.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == [
        "date", "number_to_words", "words_to_number", "units", "sort", "note_to_json", "number_pair", "days", "sudoku",
    ]  # fmt: skip
    assert sum(row[1] == "right" for row in rows) >= 4 and all(1 <= int(row[2]) <= 48 for row in rows)
    assert "step  1" in done.stdout and "^" in done.stdout and f"{sum(row[1] == 'right' for row in rows)} of 9 right" in done.stdout
    assert raced(done.stdout, 5)


def test_demo_takes_your_own_request_and_your_own_puzzle(here):
    printed, error = here("demo.py", "--prompt", "Write October 2, 2052 as an ISO date.")
    assert error is None and "2052-10-02" in printed
    printed, error = here("demo.py", "--sudoku", "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79")
    assert error is None and "sudoku" in printed


@pytest.mark.parametrize("puzzle, reason", [("123", "81"), ("55" + "." * 79, "5"), ("." * 81, "exactly one")])
def test_demo_says_what_is_wrong_with_a_puzzle(here, puzzle, reason):
    assert reason in here("demo.py", "--sudoku", puzzle)[1]


def test_evaluate_shows_its_progress_and_writes_what_it_prints(tmp_path):
    done = programs.run("examples/evaluate.py", "text", "--cases", "2", "--set", "canvas_length=64", "--json", str(tmp_path / "r.json"))
    assert done.returncode == 0 and "note_to_json" in done.stdout and (tmp_path / "r.json").is_file(), done.stderr
    assert "evaluating:   0%" in done.stderr and "20/20" in done.stderr


@pytest.mark.parametrize(
    "line, reason", [("--set canvas_length", "expected NAME=VALUE"), ("--cases 0", "integer >= 1"), ("--json nowhere/r.json", "`--json`")]
)
def test_evaluate_names_what_is_wrong_before_it_measures(here, line, reason):
    error = here("evaluate.py", "text", "--cases", "2", *line.split())[1]
    assert reason in error and "evaluating" not in error


@pytest.mark.parametrize(
    "script, line, reason",
    [
        ("trace.py", "--canvas-length 0", "`canvas_length` is 0"),
        ("inside.py", "--out nowhere/a.svg", "nowhere/a.svg"),
        ("decide.py", "--checkpoint nowhere/at/all", "nowhere/at/all"),
        ("train.py", "sudoku --out OUT --data nowhere.npz", "`data` is 'nowhere.npz'"),
        ("train.py", "text --out OUT --data a.npz", "`--data` is 'a.npz' for the recipe 'text'"),
        ("train.py", "text-further --out OUT --layers 2", "`--hidden-size` or `--layers` is given"),
        ("train.py", "text --out OUT --batch-size 0", "integer >= 1"),
        ("train.py", "text --out OUT --device tpu9", "expected a device of torch's"),
    ],
)
def test_examples_name_what_is_wrong_in_one_line(here, tmp_path, script, line, reason):
    """Some ended in a traceback, or passed over an option."""
    error = here(script, *line.replace("OUT", str(tmp_path)).split())[1]
    assert reason in error and "Traceback" not in error


def test_steps_are_changed_as_each_way_says(here):
    printed, error = here("change_a_step.py", "--seed", "0")
    ways = re.split(r"\n(?=\S)", printed)[1:]
    steps = [int(re.search(r"^  (\d+) steps: ", way, re.MULTILINE).group(1)) for way in ways]
    assert error is None and [way.count("noise") for way in ways] == steps and steps[3:] == [12, 3] and steps[2] <= steps[0]
    answers = [way.rpartition("steps: ")[2].strip() for way in ways]
    assert all('{"name": "Edwin", "quantity": 73' in line for line in ways[1].splitlines()[1:])
    assert all(json.loads(answer)["quantity"] == 37 for place, answer in enumerate(answers) if place != 1)
    assert ways[3].count("noise 0.75") == ways[4].count("noise 0.75") == 1, "a run that ends at step 3 keeps the schedule of 12"


def test_trace_prints_what_its_docstring_shows(here):
    printed, error = here("trace.py")
    steps = re.findall(r"^  step +(\d+)  +(\d+) stand  +(\d+) accepted", printed, re.MULTILINE)
    stand = [int(count) for _, count, _ in steps]
    assert error is None and [int(step) for step, _, _ in steps] == [*range(1, len(steps) + 1)]
    assert stand == sorted(stand) and f", {stand[-1]} tokens;" in printed and '"quantity": 71' in printed


def raced(printed, answers):
    """Whether these are the three lines of a race over so many answers."""
    way = rf"  (?:denoising|one token at a time) +\d+ passes, +[\d,]+ tokens/s, \d of {answers} right\n"
    first = rf"^\d+ tokens of {answers} long answers, same weights: [\d.]+ times as fast by denoising\n"
    return re.search(f"{first}(?:{way}){{2}}$", printed, re.MULTILINE)


def test_race_measures_both_ways_over_the_same_answers(monkeypatch, capsys):
    """The whole of it ends the demo, above."""
    monkeypatch.setattr(race, "RACED", 1)
    monkeypatch.setattr(sys, "argv", ["race.py", "--seed", "3"])
    race.main()
    assert raced(capsys.readouterr().out, 1)
