"""benchmarks/against_transformers.py runs, on a small random checkpoint, and reports what it promises. No timing is judged."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from jobs.tokenizer import build_tokenizer  # noqa: E402
from recipes import small_config  # noqa: E402

POSITIVE = {"ms_per_step", "tokens_per_second", "tokens_per_forward", "peak_mib"}


SCRIPT = ROOT / "benchmarks" / "against_transformers.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = small_config(640, 64, 2, 16, 10_000.0, image_token_id=107, boi_token_id=108, eoi_token_id=109)
    model = DiffusionGemmaForMaskedBlockLM(config)
    model.generation_config.update(eos_token_id=[1, 106, 50], pad_token_id=0)
    model.save_pretrained(folder)
    build_tokenizer(640).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_both_workloads_report_every_measure(checkpoint, tmp_path):
    file = tmp_path / "report.json"
    options = ["--quick", "--threads", "1", "--vocab-size", "1000", "--batch-size", "3"]
    command = [sys.executable, SCRIPT, *options, "--checkpoint", checkpoint, "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert set(report) == {"command", "machine", "results"}
    assert {"cpu", "threads", "torch", "transformers"} <= set(report["machine"])
    assert set(report["results"]) == {"default", "large"}
    for name, result in report["results"].items():
        assert f"### {name}" in done.stdout
        assert result["identical_tokens"], result["equal_tokens"]
        for side in ("ours", "transformers"):
            assert all(result[side][key] > 0 for key in POSITIVE)
            assert result[side]["peak_above_model_mib"] >= 0
            assert len(result[side]["rounds"]) == 1
        assert set(result["ratios"]) == POSITIVE | {"peak_above_model_mib"}
        assert all(result["ratios"][key]["min"] > 0 for key in POSITIVE)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--checkpoint", "no/such/folder"], "--checkpoint"),
        (["--only", "large", "--steps", "0"], "--steps"),
        (["--only", "large", "--checkpoint", "somewhere"], "--checkpoint"),
        (["--only", "large", "--experts-implementation", "dense_mm"], "--experts-implementation"),
    ],
)
def test_a_wrong_argument_is_named(arguments, named, capsys):
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT))["parse"](arguments)
    assert f"error: `{named}`" in capsys.readouterr().err
