"""The page on training runs as it stands, its commands too, and the example learns."""

import json
import re
import shlex
from pathlib import Path

import pytest

from modeling_diffusiongemma.console.main import main

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def test_snippets_of_the_page_run_and_print_what_it_says(capsys, monkeypatch, tmp_path):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    expected = re.findall(r"^print\(.*\)  # (.*)$", "\n".join(blocks), re.MULTILINE)
    assert len(blocks) >= 3 and len(expected) >= 2
    exec(compile("\n".join(blocks), "docs/training.md", "exec"), {"__name__": "page"})
    printed = [line for line in capsys.readouterr().out.splitlines() if not re.match(r"\{'\w+': ", line)]  # lines of Trainer's
    assert printed == expected
    assert (tmp_path / "runs/lora/adapter/adapter_model.safetensors").is_file()


def test_commands_of_the_page_run(capsys, monkeypatch, tmp_path):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    for name, days in (("tickets", range(1, 21)), ("unseen", range(21, 25))):
        asked = [(f"Ticket: by {day} March 1998 send forty-two lamps", f'{{"ship": "1998-03-{day:02d}"}}') for day in days]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"prompt": a, "response": b}) for a, b in asked))
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines():
        assert main([*shlex.split(line)[1:], "--device", "cpu"]) == 0, capsys.readouterr().err
    assert "| exact match |" in capsys.readouterr().out


def test_example_learns_from_its_first_steps(here, tmp_path):
    printed, left = here("finetune.py", "--out", str(tmp_path / "out"), "--steps", "2", "--unseen", "3")
    assert left is None and re.search(r"exact_match +0\.00 before +\d\.\d+ after 2 steps", printed)
    assert (tmp_path / "out" / "model.safetensors").is_file()
