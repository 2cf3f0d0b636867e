"""The page on training runs as it stands, its commands too, and the example learns."""

import re
import shlex

import pytest
from pages import Page

from modeling_diffusiongemma.console.main import main

PAGE = Page("docs/training.md")


def test_snippets_of_the_page_run_and_print_what_it_says(capsys, monkeypatch, tmp_path):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    assert len(PAGE.blocks) >= 3 and len(PAGE.expected) >= 2
    PAGE.run()
    printed = [line for line in capsys.readouterr().out.splitlines() if not re.match(r"\{'\w+': ", line)]  # lines of Trainer's
    assert printed == PAGE.expected
    assert (tmp_path / "runs/lora/adapter/adapter_model.safetensors").is_file()


def test_commands_of_the_page_run(capsys, monkeypatch, tmp_path):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    exec(PAGE.blocks[0], {})
    for line in PAGE.commands():
        assert main([*shlex.split(line)[1:], "--device", "cpu"]) == 0, capsys.readouterr().err
    assert "| exact match |" in capsys.readouterr().out


def test_example_learns_from_its_first_steps(here, tmp_path):
    printed, left = here("finetune.py", "--out", str(tmp_path / "out"), "--steps", "2", "--unseen", "3")
    assert left is None and re.search(r"exact_match +0\.00 before +\d\.\d+ after 2 steps", printed)
    assert (tmp_path / "out" / "model.safetensors").is_file()
