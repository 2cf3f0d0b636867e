"""benchmarks/fp8.py: the published bytes, and that quantising while loading never holds two copies."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "fp8.py"


@pytest.fixture(scope="module")
def benchmark():
    return runpy.run_path(str(SCRIPT))


def test_bytes_of_the_released_architecture_are_the_published_ones(benchmark):
    plain, fp8, tensors = benchmark["stored_bytes"](AutoConfig.from_pretrained(ROOT / "tests" / "data" / "released"))
    assert (plain.total(), fp8.total(), tensors) == (51_647_562_456, 27_197_665_496, 24_232)
    assert plain["experts"] > 0.88 * plain.total()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from Linux's /proc")
def test_quantising_while_loading_never_holds_two_copies(benchmark, tmp_path):
    """186 MiB in bfloat16, 99 in FP8; above the model there are a few tensors of at most 15 MiB that loader threads have read ahead."""
    torch.manual_seed(0)
    DiffusionGemmaForMaskedBlockLM(benchmark["shrunk_config"]()).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="60MB")
    command = [sys.executable, SCRIPT, "memory", "--load", "quantise", tmp_path, "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["peak"] < measured["weights"] + 64 * 2**20
