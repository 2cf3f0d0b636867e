"""Programs as a user starts them, without the six seconds that torch and transformers take to import: each runs in a fork of a process that
has imported those and nothing else. This package is imported anew by every program.

What a process reads as it starts (switches of Python, variables of Python, of torch, of the Hub) needs `subprocess`. Where forks are not
safe, off Linux or once CUDA is there, every program imports everything.
"""

import functools
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
FORKS = sys.platform == "linux" and not torch.cuda.is_available()
AT_THE_START = ("ATEN_", "HF_", "MKL_", "OMP_", "ONEDNN_", "PYTHON", "TRITON_")  # begin names of variables that are read then

processes = multiprocessing.get_context("forkserver" if FORKS else "spawn")
if FORKS:  # what the package and its doors import; an extra that is absent is passed over
    names = ("modeling_utils", "pipelines", "trainer", "cli.serve")
    processes.set_forkserver_preload([*(f"transformers.{name}" for name in names), "peft"])


@functools.cache
def _places():
    """`sys.path` of a program, without its own folder and PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


def _become(arguments, folder, environment, asked, places, streams):
    """In the new process: what Python makes of its command line. `asked`: the variables of `environment` that the caller names; what a test
    imported may have set others meanwhile."""
    late = sorted(name for name in asked if name.startswith(AT_THE_START) and os.environ.get(name) != environment.get(name))
    for number, file in enumerate(streams):
        opened = os.open(file, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (open(number, "r" if number == 0 else "w", closefd=False) for number in range(3))
    if late:
        raise ValueError(f"`environment` changes {late}, which a process reads as it starts; expected `subprocess` to start one")
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.orig_argv = [sys.executable, *arguments]
    kind, sys.argv = arguments[0], list(arguments)
    first = "" if kind == "-c" else os.getcwd() if kind == "-m" else str(Path(kind).resolve().parent)
    sys.path[:] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *places]
    if kind == "-m":
        del sys.argv[1]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        del sys.argv[1]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), vars(main))
    else:
        runpy.run_path(kind, run_name="__main__")


def start(*arguments, cwd=ROOT, environment=(), stdin=os.devnull, stdout=os.devnull, stderr=os.devnull):
    """A process that runs Python's command line `arguments`, the package on its path. A variable of `environment` that is None is not set;
    the streams are files, written at their end."""
    variables, asked = {**os.environ, "PYTHONPATH": str(ROOT), **dict(environment)}, {*dict(environment)} - {"PYTHONPATH"}
    variables = {name: str(value) for name, value in variables.items() if value is not None}
    streams = [str(stdin), str(stdout), str(stderr)]
    process = processes.Process(target=_become, args=([str(one) for one in arguments], str(cwd), variables, asked, _places(), streams))
    process.start()
    return process


def run(*arguments, cwd=ROOT, environment=(), input="", timeout=300):
    """As `subprocess.run` with all output captured as text."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        for file, text in zip(files, (input, "", ""), strict=True):
            file.write_text(text, encoding="utf-8")
        process = start(*arguments, cwd=cwd, environment=environment, stdin=files[0], stdout=files[1], stderr=files[2])
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout, *(file.read_text(encoding="utf-8") for file in files[1:]))
        return subprocess.CompletedProcess(arguments, process.exitcode, *(file.read_text(encoding="utf-8") for file in files[1:]))


__all__ = ["FORKS", "ROOT", "run", "start"]
