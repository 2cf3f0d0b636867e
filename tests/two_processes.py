"""Starts two processes that are the ranks of one job, on a CPU; or as many as the environment variable `RANKS` says."""

import os
import time

import programs
import torch
from ports import port
from programs import ROOT

WORLD, PATIENCE = int(os.environ.get("RANKS", 2)), 300  # seconds until a rank that waits for a pass the other does not do is ended


def run_together(command, variables, folder):
    """Python's command line `command` once for each of the `variables`; fails with what they said where one of them failed."""
    logs = [folder / f"{rank}.log" for rank in range(len(variables))]
    ranks = [programs.start(*command, environment=more, stdout=log, stderr=log) for more, log in zip(variables, logs, strict=True)]
    end = time.monotonic() + PATIENCE
    for rank in ranks:
        rank.join(max(0, end - time.monotonic()))
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
            rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * len(ranks), "\n".join(log.read_text()[-3000:] for log in logs)


def run_ranks(script, way, folder):
    """What each rank of `script WAY FOLDER` wrote to FOLDER/RANK.pt, with the variables that torchrun sets."""
    with port() as meeting:
        shared = {"WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": meeting}
        run_together((f"tests/{script}", way, folder), [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(WORLD)], folder)
    return results(folder)


def launch(settings, script, way, folder, *options):
    """As `run_ranks`, by `accelerate launch` with the config file `settings`."""
    command = ["-m", "accelerate.commands.launch", "--config_file", settings, "--num_processes", WORLD]
    with port() as meeting:
        command += ["--main_process_port", meeting, *options, f"tests/{script}", way, folder]
        done = programs.run(*command, environment={"ACCELERATE_TORCH_DEVICE": "cpu"}, timeout=PATIENCE)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return results(folder)


def results(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


__all__ = ["ROOT", "WORLD", "launch", "run_ranks", "run_together"]
