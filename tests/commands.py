"""The console in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULE = (sys.executable, "-m", "modeling_diffusiongemma")


def process(*command, environment=(), **kwargs):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **dict(environment)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False, **kwargs)
