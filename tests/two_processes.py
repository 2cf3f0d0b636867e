"""Starts two processes that are the ranks of one job, on a CPU; or as many as the environment variable `RANKS` says."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
WORLD, PATIENCE = int(os.environ.get("RANKS", 2)), 300  # seconds until a rank that waits for a pass the other does not do is ended


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in more.items()}}


def finished(processes):
    """Waits for all; fails with what they said where one of them failed."""
    try:
        said = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)[-6000:]


def started(command, variables):
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_ranks(script, way, folder):
    """What each rank of `script WAY FOLDER` wrote to FOLDER/RANK.pt, with the variables that torchrun sets."""
    shared = {"WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, str(ROOT / "tests" / script), way, str(folder)]
    finished([started(command, environment(**shared, RANK=rank, LOCAL_RANK=rank)) for rank in range(WORLD)])
    return results(folder)


def launch(settings, script, way, folder, *options):
    """As `run_ranks`, by `accelerate launch` with the config file `settings`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings), "--num_processes", str(WORLD)]
    command += ["--main_process_port", str(free_port()), *options, str(ROOT / "tests" / script), way, str(folder)]
    finished([started(command, environment(ACCELERATE_TORCH_DEVICE="cpu"))])
    return results(folder)


def results(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


__all__ = ["ROOT", "WORLD", "launch", "run_ranks"]
