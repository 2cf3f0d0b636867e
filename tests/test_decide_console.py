"""`diffusiongemma decide`, examples/decide.py and benchmarks/decisions.py, on the shipped text checkpoint; no answer of it is expected."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from generation import Calibration
from modeling_diffusiongemma import default_checkpoint

ROOT = Path(__file__).parents[1]
QUESTIONS = ("--question", "refund=Y,N", "--question", "tone=A,B,C", "--canvas-length", "48", "--reads", "2", "--seed", "0")


def test_decide_prints_a_table(console):
    code, printed, error = console("decide", "I was charged twice.", *QUESTIONS)
    assert code == 0, error
    lines = printed.splitlines()
    assert lines[0] == "| question | option | probability | standard error |" and len(lines) == 2 + 5
    assert sum(float(line.split("|")[3]) for line in lines[2:4]) == pytest.approx(1, abs=0.002)


def test_decide_gives_json(answers):
    (found,) = answers("decide", "I was charged twice.", "--raw", *QUESTIONS)
    assert (found["reads"], found["canvases"], found["passes"], found["seed"]) == (2, 1, 2, 0)
    assert sum(found["answers"]["tone"]["probabilities"].values()) == pytest.approx(1) and found["answers"]["refund"]["best"] in "YN"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((), "--question"), (("--question", "refund"), "expected NAME=OPTION,OPTION"), (("--question", "refund=yes"), "expected NAME=OPTION"),
     (("--question", "refund=yes,yes"), "twice"), (("--question", "a=Y,N", "--question", "a=A,B"), "names 'a' twice"),
     (("--question", "a=Y,N", "--reads", "0"), "integer >= 1"), (("--question", "a=Y,N", "--max-new-tokens", "3"), "unrecognized")],
)  # fmt: skip
def test_decide_names_what_is_wrong(console, arguments, said):
    code, _, error = console("decide", "Is it red?", *arguments)
    assert code == 2 and said in error


def test_example_shows_what_is_said_and_what_is_true(here):
    printed, error = here(
        "decide.py", "--checkpoint", default_checkpoint(), "--state", "A bag holds 3 red and 7 blue marbles.", "--reads", "1"
    )
    assert error is None and "A. red, B. blue" in printed and "1 canvas passes on 1 canvas" in printed
    assert [line.split()[-1] for line in printed.splitlines() if line.startswith(("colour ", "red "))] == ["0.300", "0.700"] * 2
    assert "expected a bag" in here("decide.py", "--state", "nothing")[1]


def test_benchmark_judges_every_way_and_saves_the_calibration(tmp_path, monkeypatch, capsys, tokenizer, trained):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    trained.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arguments = ["--quick", "--save", "--checkpoint", str(tmp_path), "--canvas-length", "48"]
    monkeypatch.setattr(sys, "argv", ["decisions.py", *arguments])
    runpy.run_path(str(ROOT / "benchmarks" / "decisions.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in printed.splitlines() if " | no | " in line] == [
        "| 1 read, 1 step", "| 2 reads, 1 step", "| 4 reads, 1 step", "| 8 reads, 1 step", "| 4 reads, 2 steps", "| causal",
    ]  # fmt: skip
    assert Calibration.from_pretrained(tmp_path).temperature.keys() == json.loads((tmp_path / "decision.json").read_text())["bias"].keys()
