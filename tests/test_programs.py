"""A program in a fork is told what one that starts is told, and ends as it does."""

import os
import subprocess
import sys

import programs
import pytest

TOLD = """
import json, os, sys
print(json.dumps([__name__, sys.argv, sys.orig_argv[1:], sys.path, os.getcwd(), os.environ.get("OF_THE_TEST"), sys.stdin.read()]))
print("beside", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("kind", ["code", "file", "module"])
def test_program_is_told_what_one_that_starts_is_told(kind, tmp_path):
    (tmp_path / "told.py").write_text(TOLD)
    command = {"code": ["-c", TOLD], "file": ["told.py"], "module": ["-m", "told"]}[kind] + ["a", "--b"]
    more = {"PYTHONPATH": str(programs.ROOT), "OF_THE_TEST": "é"}
    found = programs.run(*command, cwd=tmp_path, environment=more, input="one\ntwo")
    started = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env={**os.environ, **more}, input="one\ntwo", capture_output=True, text=True
    )
    assert (found.returncode, found.stdout, found.stderr) == (started.returncode, started.stdout, started.stderr)


@pytest.mark.parametrize(
    ("code", "ended"), [("raise ValueError('mine')", 1), ("import sys; sys.exit('mine')", 1), ("import os; os.kill(os.getpid(), 9)", -9)]
)
def test_program_ends_as_one_that_starts(code, ended):
    found = programs.run("-c", code)
    assert found.returncode == ended and ("mine" in found.stderr) == (ended == 1)


def test_package_is_imported_anew_and_transformers_is_there():
    code = "import sys; print('transformers.modeling_utils' in sys.modules, {'generation', 'modeling_diffusiongemma'} & {*sys.modules})"
    assert programs.run("-c", code).stdout == f"{programs.FORKS} set()\n"


def test_variable_that_is_read_at_the_start_is_refused():
    found = programs.run("-c", "print('run')", environment={"PYTHONIOENCODING": "ascii"})
    assert found.returncode == 1 and not found.stdout and "`environment` changes ['PYTHONIOENCODING']" in found.stderr


def test_variable_that_a_library_set_meanwhile_is_none_of_these(monkeypatch):
    """`import lm_eval` sets this one."""
    programs.run("-c", "")
    monkeypatch.setenv("HF_XET_HIGH_PERFORMANCE", "7")
    found = programs.run("-c", "import os; print(os.environ['HF_XET_HIGH_PERFORMANCE'])")
    assert (found.returncode, found.stdout) == (0, "7\n")


def test_program_that_takes_too_long_is_ended():
    with pytest.raises(subprocess.TimeoutExpired):
        programs.run("-c", "import time; time.sleep(60)", timeout=1)
