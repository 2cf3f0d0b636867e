"""`diffusiongemma revise`, examples/revise.py and benchmarks/revising.py; wrong usage is said before a model is loaded."""

import sys
from pathlib import Path

import pytest
from pages import Page

from modeling_diffusiongemma.console import session

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import revising  # noqa: E402

NARROW = ["--set", "canvas_length=33", "--max-new-tokens", "33", "--seed", "0"]
DATE, WRONG_DATE = "Write 3 March 1998 as an ISO date.", "1998-03-30"


def test_the_text_is_printed_and_as_json_what_became_of_it(console, answers):
    given = ["revise", WRONG_DATE, "--prompt", DATE, "--where", "uncertain", "--noise", "0.4", *NARROW]
    (row,) = answers(*given)
    assert row["given"] == WRONG_DATE and row["prompt"] == DATE and row["seed"] == 0 and len(row["renoised"]) == round(0.4 * 10)
    assert console(*given) == (0, f"{row['text']}\n", "")


def test_what_is_kept_stays(answers):
    (row,) = answers("revise", WRONG_DATE, "--prompt", DATE, "--keep", "30", "--keep", "03-", "--noise", "1", *NARROW)
    assert row["text"][5:10] == "03-30" and row["renoised"] == [0, 1, 2, 3, 4]
    (row,) = answers("revise", WRONG_DATE, "--prompt", DATE, "--at", "30", "--keep-others", *NARROW)
    assert row["text"].startswith("1998-03-") and row["renoised"] == [8, 9] and set(row["changed"]) <= {8, 9}


def test_a_constraint_a_raw_prompt_and_none(answers):
    (row,) = answers("revise", WRONG_DATE, "--regex", r"\d{4}-\d\d", "--prompt", "On ", "--raw", *NARROW)
    assert len(row["text"]) == 7
    (row,) = answers("revise", WRONG_DATE, "--set", "noise=mask", "--set", "mask_token_id=4", "--keep-others", *NARROW)
    assert row["prompt"] is None and row["tokens"] == 10


def test_the_canvas_is_shown(console):
    code, out, err = console("revise", WRONG_DATE, "--prompt", DATE, "--watch", *NARROW)
    assert code == 0 and out and "1998" in err


WRONG = {
    ("revise",): "TEXT",
    ("revise", ""): "TEXT is empty",
    ("revise", "a", "--raw"): "`--raw` is given without `--prompt`",
    ("revise", "a", "--noise", "0"): "got '0'; expected a share above 0, at most 1",
    ("revise", "a", "--noise", "1.5"): "got '1.5'; expected a share above 0, at most 1",
    ("revise", "a", "--noise", "x"): "got 'x'; expected a share above 0, at most 1",
    ("revise", "a", "--where", "left"): "invalid choice: 'left'",
    ("revise", "a", "--at", "a", "--noise", "0.5"): "`--at` and `--noise` are both given",
    ("revise", "a", "--at", "a", "--where", "uncertain"): "`--at` and `--where` are both given",
    ("revise", "a", "--keep", "a", "--keep-others"): "`--keep` and `--keep-others` are both given",
    ("revise", "a", "--keep", "b"): "`--keep` is 'b'; expected a piece of TEXT",
    ("revise", "a", "--at", ""): "`--at` is ''; expected a piece of TEXT",
    ("revise", "a", "--regex", "("): "`--regex`: `pattern` is '('",
    ("revise", "a", "--regex", "a", "--set", "backend=reference"): "the reference knows no constraint",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_usage_ends_with_2_before_a_model_is_loaded(console, monkeypatch, line):
    monkeypatch.setattr(session, "load_model", None)
    code, out, err = console(*line)
    assert (code, out) == (2, "") and WRONG[line] in err


def test_what_the_model_finds_wrong_ends_with_1(console):
    code, out, err = console("revise", "ab", "--keep", "ab", *NARROW)
    assert (code, out) == (1, "") and "error: `keep` covers all" in err


def test_the_example_marks_what_became_noise_and_what_changed(here):
    printed, left = here("revise.py")
    assert left is None
    prompt, before, renoised, changed, after, about = printed.splitlines()
    assert before.startswith("  before  {") and after.startswith("  after   {")
    assert set(renoised.strip()) <= {"^", " "} and set(changed.strip()) <= {"*", " "} and renoised.count("^") >= 4
    printed, _ = here("revise.py", "--keep", "51", "--noise", "1", "--where", "random")
    assert '"quantity": 51,' in printed.splitlines()[-2]
    assert "`keep` holds ['52']" in here("revise.py", "--keep", "52")[1]


@pytest.mark.parametrize("job", ["sudoku", "text"])
def test_the_benchmark_counts_what_is_mended_and_harmed(job, capsys, tmp_path):
    drawing = [] if job == "text" else ["--png", str(tmp_path / "revising.png")]
    pytest.importorskip("matplotlib")
    revising.main([job, "--cases", "2", "--counts", "1", "3", "--only", "told", *drawing])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [row[:2] for row in rows] == [[line, count] for line in ("none", "told", "told, others kept") for count in ("1", "3")]
    assert all(row[2:5] == ["0.0%"] * 3 for row in rows[:2])
    assert all(row[3] == "0.0%" for row in rows[4:])  # nothing else may change
    assert not drawing or (tmp_path / "revising.png").stat().st_size > 10_000


def test_wilsons_interval_is_the_published_one():
    """Of 9 in 10: 0.5958 to 0.9821 (Brown, Cai and DasGupta 2001)."""
    assert revising.wilson(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert revising.wilson(0, 10)[0] == 0.0 and revising.wilson(10, 10)[1] == 1.0


def test_snippet_of_the_page_prints_what_it_says(capsys):
    """Behind the first one of the README, whose names it has."""
    page = Page("docs/revising.md")
    page.blocks.insert(0, Page("README.md").blocks[0])
    page.run()
    assert len(page.expected) == 1 and page.expected[0] in capsys.readouterr().out
