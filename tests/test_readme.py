"""The README: its snippets run as they stand, its table of doors has a snippet for each, and its links lead somewhere."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import programs
import pytest
from ports import port
from servers import running

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?:<!-- door: ([\w ]+) -->\n)?```(python|sh)\n(.*?)```", README, re.DOTALL)  # door or "", language, code
MODULES = {
    "Server": ("fastapi", "openai", "uvicorn"),
    "Diffusers": ("diffusers",),
    "Evaluation": ("lm_eval",),
}


def blocks(door):
    """A door's snippets: the one behind its mark, and those that follow without a mark of their own."""
    places = [place for place, block in enumerate(BLOCKS) if block[0] == door]
    assert len(places) == 1, f"README has {len(places)} snippets marked `door: {door}`"
    end = next((place for place in range(places[0] + 1, len(BLOCKS)) if BLOCKS[place][0]), len(BLOCKS))
    return [(language, code) for _, language, code in BLOCKS[places[0] : end]]


def python(door):
    return "\n".join(code for language, code in blocks(door) if language == "python")


def shell(door):
    return "\n".join(code for language, code in blocks(door) if language == "sh")


FIRST = blocks("Auto classes")[0][1]  # loads what the other doors' snippets use


def needs(door):
    """Skips where an extra of the door is not installed."""
    absent = [name for name in MODULES.get(door, ()) if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"the door {door} needs {', '.join(absent)}")


def run(folder, *command, **kwargs):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False, **kwargs)


def test_every_row_of_the_table_has_a_snippet_and_every_snippet_a_row():
    section = README.split("## Every door")[1].split("\n## ")[0]
    rows = [re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", row) for row in re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)]
    assert rows[0] == "door" and set(rows[1:]) == {door for door, _, _ in BLOCKS if door}
    extras = re.findall(r'^        "([\w-]+)": ', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"`\[([\w-]+)\]`", section)
    assert len(named) >= 4 and set(named) <= set(extras)


def test_snippets_without_extras_run_one_after_the_other(tmp_path):
    """All Python of the README but that of doors which are tested below; the folder is empty, the package on the path alone."""
    apart, door, parts = {*MODULES, "Remote code"}, "", []
    for mark, language, code in BLOCKS:
        door = mark or door
        if language == "python" and door not in apart:
            parts.append(code)
    assert len(parts) >= 5
    done = programs.run("-c", "\n".join(parts), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [day in done.stdout for day in ("1998-03-03", "1998-03-04", "1998-03-05")] == [True] * 3


def test_remote_code_snippet_runs(tmp_path):
    done = programs.run("-c", f"{FIRST}\n{python('Remote code')}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    script = "import sys; sys.modules['modeling_diffusiongemma'] = sys.modules['generation'] = None\n"
    script += "from transformers import AutoModelForCausalLM\n"
    done = programs.run("-c", script + python("Remote code").splitlines()[-1], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_diffusers_snippet_runs(tmp_path):
    needs("Diffusers")
    done = programs.run("-c", f"{FIRST}\n{python('Diffusers')}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1998-03-03") == 2


def test_evaluation_snippet_runs():
    needs("Evaluation")
    python, *command = shlex.split(shell("Evaluation"))
    assert python == "python"
    done = programs.run(*command)
    assert done.returncode == 0, done.stderr
    assert re.search(r"numbers_in_words.*exact_match.*\|\s*1\s*\|", done.stdout), done.stdout


def test_server_snippet_answers(tmp_path):
    needs("Server")
    command, client = shell("Server").split("#")[0].split(), python("Server")
    written = command[command.index("--port") + 1]
    assert f":{written}/v1" in client
    with port() as free:  # in place of the README's
        command[command.index("--port") + 1], client = free, client.replace(f":{written}/", f":{free}/")
        with running(tmp_path, free, "-m", "modeling_diffusiongemma", *command[1:]):
            done = programs.run("-c", f"{FIRST}\n{client}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1998-03-03") == 2


def test_console_snippet_runs(tmp_path):
    """`diffusiongemma` stands for the installed script, which a checkout may lack."""
    function = f'set -eo pipefail; diffusiongemma() {{ "{sys.executable}" -m modeling_diffusiongemma "$@"; }}\n'
    done = run(tmp_path, "bash", "-c", function + shell("Console"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1998-03-03") == 2 and '"finish_reason": "stop"' in done.stdout and "step  1" in done.stderr


def test_commands_of_the_first_screen_are_targets_of_the_makefile():
    commands = re.findall(r"^make (\S+)", README.split("## Use it")[0], re.MULTILINE)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert commands == ["demo", "test"] and set(commands) <= set(targets)


def test_readme_is_short():
    assert len(README.splitlines()) <= 230


def test_files_named_in_the_documents_exist():
    pages = (str(path.relative_to(ROOT)) for folder in ("model_cards", "docs") for path in (ROOT / folder).glob("*.md"))
    names = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *pages)
    for name in names:
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
            if "://" not in target:
                assert ((ROOT / name).parent / target).exists(), f"{name} links to {target}"
