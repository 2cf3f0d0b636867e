"""The benchmarks run, at small sizes on a CPU, and report what they promise. No timing is judged."""

import json
import math
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import programs
import pytest
import torch
from transformers import DynamicCache

import gpu
import measure
import random_checkpoint
import random_model
import scaling
import stages
from jobs.tokenizer import build_tokenizer
from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM
from recipes import small_config

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
SIDES = ("ours", "transformers")
CPU = torch.device("cpu")


def run(script, *arguments):
    done = programs.run(BENCHMARKS / script, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    options = ["--quick", "--threads", "1", "--vocab-size", "1000", "--batch", "2", "--prompt", "70"]
    printed = run("against_transformers.py", *options, "--checkpoint", checkpoint, "--json", file)
    report = json.loads(file.read_text())
    assert {"cpu", "threads", "torch", "transformers"} <= set(report["machine"])
    assert [result["workload"] for result in report["results"]] == ["default", "large"]
    for result in report["results"]:
        assert f"### {result['workload']}" in printed
        assert result["identical_tokens"]
        assert len(result["prompt_tokens"]) == 2 and max(result["prompt_tokens"]) <= 70
        (taken,) = result["rounds"]
        for side in SIDES:
            assert taken[side]["tokens_per_second"] > 0 and taken[side]["tokens_per_forward"] > 0
            assert 0 < taken[side]["first_text_seconds"]
            assert math.isfinite(taken[side]["ms_per_step"])
            assert 0 <= taken[side]["peak_above_model_mib"] < taken[side]["peak_mib"]
        assert set(result["ratios"]) == {"ms_per_step", "tokens_per_second", "first_text_seconds", "peak_above_model_mib"}
    assert printed.count("| not judged") == 4  # of a quick run


@pytest.fixture(scope="module")
def scaling_report(tmp_path_factory):
    file = tmp_path_factory.mktemp("scaling") / "report.json"
    options = ["--context", "16", "--batch", "1", "--canvases", "2", "--vocab-size", "1000", "--threads", "1"]
    printed = run("scaling.py", "--quick", *options, "--no-plot", "--json", file)
    assert "### scaling" in printed
    return json.loads(file.read_text())


@pytest.mark.slow
def test_scaling_measures_both_sides(scaling_report):
    (result,) = scaling_report["results"]
    assert result["point"] == {"context": 16, "batch": 1, "canvases": 2}
    (taken,) = result["rounds"]
    for side in SIDES:
        assert math.isfinite(taken[side]["ms_per_step"])
        assert taken[side]["prefill_ms"] > 0
        assert taken[side]["peak_above_model_mib"] >= 0


@pytest.mark.slow
def test_scaling_draws_its_report(scaling_report, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    written, plot = tmp_path / "report.json", tmp_path / "plot.png"
    written.write_text(json.dumps(scaling_report))
    scaling.main(["--draw", str(written), "--plot", str(plot)])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_scaling_says_what_to_install_before_it_measures(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        scaling.main(["--quick"])
    assert capsys.readouterr().out == ""


def test_scaling_measures_each_point_once():
    args = scaling.parse(["--context", "8", "16", "--batch", "1", "4", "--canvases", "2", "--no-plot"])
    expected = [(8, 1, 2), (16, 1, 2), (8, 4, 2)]
    assert [tuple(point.values()) for point in scaling.points(args)] == expected


def test_gpu_runs_shrunk_on_a_cpu(capsys):
    """... and leaves the package as it was: the stage clock wraps functions of `generation`."""
    import generation.loop.predict

    before = dict(vars(generation.loop.predict))
    options = ["--batch", "2", "--cache", "static", "dynamic", "--steps", "2", "--rounds", "1", "--against", "transformers"]
    gpu.main(["--device", "cpu", "--shrink", *options])
    printed = capsys.readouterr().out
    for side, cache in (("ours", "static"), ("ours", "dynamic"), ("transformers", "dynamic")):
        assert f"| 2 | {side} | {cache} |" in printed
    for stage in (*stages.STAGES, "sum"):
        assert f"| {stage} |" in printed
    assert re.search("8 experts of which a pass reads [78] a layer", printed)
    assert {name: value for name, value in vars(generation.loop.predict).items() if before[name] is not value} == {}


def test_gpu_runs_in_fp8(capsys):
    gpu.main(["--device", "cpu", "--shrink", "--batch", "1", "--cache", "dynamic", "--steps", "2", "--rounds", "1", "--dtype", "fp8"])
    assert "### a shrunk architecture, random weights, fp8" in capsys.readouterr().out
    model = random_model.build(random_model.full_size_config(shrink=True), CPU, torch.bfloat16, fp8=True)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    weights = {weight.dtype for layer in model.model.decoder.layers for weight in layer.experts.parameters() if weight.shape[-1] > 1}
    assert weights == {torch.float8_e4m3fn}


@pytest.fixture(scope="module")
def shrunk():
    return random_model.build(random_model.full_size_config(shrink=True), CPU, torch.float32)


def test_gpu_judges_the_fastest_of_ours_at_batch_1():
    slow, fast = ([{"ms_per_pass": value} for value in values] for values in ([20.0, 15.0, 16.0], [14.0, 99.0, 14.5]))
    results = {(1, "ours", "dynamic"): slow, (1, "ours", "static"): fast, (1, "transformers", "dynamic"): [{"ms_per_pass": 1.0}]}
    assert gpu.goal(results, "bf16").endswith("reached 14.5: met.")
    assert gpu.goal(results | {(1, "ours", "static"): None}, "bf16").endswith("reached 16.0: MISSED.")  # out of memory
    assert gpu.goal({(2, "ours", "dynamic"): slow}, "bf16") is None


def test_transformers_gets_the_very_same_weights(shrunk):
    theirs = random_model.share(shrunk, torch.float32)
    assert {parameter.data_ptr() for parameter in theirs.parameters()} == {parameter.data_ptr() for parameter in shrunk.parameters()}
    ids = torch.randint(128, 8192, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, expected = (model(input_ids=ids, decoder_input_ids=ids[:, :9]).logits for model in (shrunk, theirs))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_bytes_of_a_pass_are_every_weight_once_and_the_embedding_twice(shrunk):
    images = [shrunk.model.encoder.vision_tower, shrunk.model.encoder.embed_vision]
    weights = sum(parameter.nbytes for parameter in shrunk.parameters())
    weights -= sum(parameter.nbytes for module in images for parameter in module.parameters())
    scalars = 4 * len(shrunk.model.decoder.layers)
    embedding = shrunk.model.decoder.embed_tokens.weight.nbytes
    cache = random_model.cache_bytes(shrunk.config, 3, 40, 4) + random_model.cache_bytes(shrunk.config, 3, 72, 4)
    needed = random_model.bytes_per_pass(shrunk, 3, 40, 2)
    assert sum(needed.values()) == weights + scalars + embedding + cache / 2
    assert set(needed) | {"sampling"} == set(stages.STAGES)


@pytest.mark.parametrize("context", [21, 100])  # on both sides of the sliding window of 64
def test_cache_bytes_are_those_of_a_cache(shrunk, context):
    cache = DynamicCache(config=shrunk.config.text_config)
    with torch.no_grad():
        shrunk.model.prefill(torch.randint(128, 8192, (2, context)), past_key_values=cache)
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert random_model.cache_bytes(shrunk.config, 2, context, 4) == stored


def test_shrunk_architecture_keeps_the_released_form():
    full, small = random_model.full_size_config(), random_model.full_size_config(shrink=True)
    assert full.text_config.num_hidden_layers == 30 and full.text_config.vocab_size == 262_144
    assert set(small.text_config.layer_types) == set(full.text_config.layer_types)
    assert small.text_config.use_bidirectional_attention == full.text_config.use_bidirectional_attention


def test_stages_count_time_once_in_the_innermost():
    clock = stages.StageClock(CPU)
    inner = clock.around(lambda: time.sleep(0.03), "inner")

    def body():
        time.sleep(0.01)
        inner()

    start = time.perf_counter()
    clock.mark()
    clock.around(body, "outer")()
    clock.around(lambda: inner(), stages.PREFILL)()
    spent = clock.take()
    total = 1000 * (time.perf_counter() - start)
    assert spent["inner"] >= 30 and spent["outer"] >= 10 and spent[stages.PREFILL] >= 30
    assert sum(spent.values()) <= total


def test_a_stage_that_the_clock_no_longer_sees_is_reported(shrunk, monkeypatch):
    monkeypatch.setattr(stages, "OF_FILE", {})
    batch = {"input_ids": torch.full((1, 9), 200)}
    with pytest.raises(RuntimeError, match="vocabulary pass"):
        stages.stage_times(shrunk, "ours", batch, measure.fixed_steps(2, endless=True), rounds=1)


def test_ratios_are_taken_pair_by_pair():
    assert measure.ratios([(1, 2), (2, 2), (1, 8)], more_is_better=False) == {"median": 2, "min": 1, "max": 8}
    assert measure.ratios([(1, 2)], more_is_better=True) == {"median": 0.5, "min": 0.5, "max": 0.5}
    assert measure.ratios([], more_is_better=True) is None
    assert measure.ratios([(-1.0, 2.0)], more_is_better=False) is None  # lost in noise


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_outgrowing_free_memory_is_an_error_and_recognised():
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import measure\n"
        "measure.MEMORY_SHARE = 0\n"
        "measure.limit_memory()\n"
        "try: torch.ones(2**28)\n"
        "except RuntimeError as error: print(measure.is_out_of_memory(error), measure.is_out_of_memory(RuntimeError('other')))"
    )
    done = subprocess.run([sys.executable, "-c", code, BENCHMARKS], capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["True", "False"], done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        ("against_transformers", ["--checkpoint", "no/such/folder"], "--checkpoint"),
        ("against_transformers", ["--only", "large", "--steps", "1"], "--steps"),
        ("against_transformers", ["--only", "large", "--checkpoint", "somewhere"], "--checkpoint"),
        ("against_transformers", ["--only", "large", "--experts-implementation", "dense_mm"], "--experts-implementation"),
        ("against_transformers", ["--only", "default", "--prompt", "20", "--batch", "1"], "--prompt"),
        ("gpu", ["--device", "cpu"], "--device"),
        ("gpu", ["--device", "cpu", "--shrink", "--new-tokens", "33"], "--new-tokens"),
        ("gpu", ["--device", "cpu", "--shrink", "--dtype", "fp8", "--against", "transformers"], "--against"),
        ("scaling", ["--batch", "0"], "--batch"),
        ("scaling", ["--draw", "no/such/file"], "--draw"),
    ],
)
def test_a_wrong_argument_is_named(script, arguments, named, capsys):
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(BENCHMARKS / f"{script}.py"))["parse"](arguments)
    assert f"error: `{named}`" in capsys.readouterr().err


def test_random_checkpoints_have_the_published_sizes():
    """Names and shapes of both layouts are held against the published ones in tests/test_checkpoint.py and tests/test_fp8.py."""
    for fp8, tensors, size in ((False, 1_047, 51_647_562_456), (True, 24_232, 27_197_665_496)):
        _, weights = random_checkpoint.layout_of(random_model.stored_config(), fp8)
        assert len(weights) == tensors
        assert sum(shape.numel() * dtype.itemsize for shape, dtype in weights.values()) == size


@pytest.mark.slow
def test_full_size_makes_checkpoints_and_runs_every_way(tmp_path):
    """All ways but 4 bit, which tests/test_four_bit.py holds; `theirs` reads what was written for ours."""
    options = ["--shrink", "--folder", tmp_path, "--passes", "2", "--long", "80", "--check", "--least-free", "0.1"]
    printed = run("full_size.py", *options, "--ways", "bf16", "theirs", "fp8")
    assert {file.name for file in tmp_path.iterdir()} == {"bf16-6", "fp8-6"}
    lines = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")}
    header = lines["| way"]
    for way in ("bf16", "theirs", "fp8"):
        found = dict(zip(header, lines[f"| {way}"], strict=True))
        assert found["saved bytes equal"] == "yes" and re.fullmatch("[0-9a-f]{8}", found["logits"])
        assert all(float(found[name]) >= 0 for name in header if name.endswith(", s"))


def test_a_measurement_that_takes_the_last_memory_is_stopped(tmp_path):
    options = ["--shrink", "--folder", tmp_path, "--ways", "bf16", "--least-free", "1000000"]
    assert "| bf16 | stopped: less than 1000000.0 GiB were left |" in run("full_size.py", *options)


@pytest.mark.parametrize(
    ("table", "rows"), [("canvases", ["| one | 2 |", "| all | 16 |"]), ("packing", ["| padded | 8x"]), ("head", ["| pieces | 4 |"])]
)
def test_objective_measures_its_ways(table, rows):
    printed = run("objective.py", table, "--quick", "--rounds", "1", "--threads", "1")
    assert all(row in printed for row in rows), printed


@pytest.mark.parametrize("recipe, only, lines", [("sudoku", "greedy", ["greedy"]), ("text", "autoregressive", ["autoregressive, greedy"])])
def test_presets_measure_the_lines_that_a_checkpoint_can_write(recipe, only, lines):
    """Sudoku learned no causal loss: nothing is written there from left to right."""
    printed = run("presets.py", recipe, "--cases", "1", "--only", only, "--threads", "1")
    assert re.findall(r"^\| (?!setting|-)(.*?) \|", printed, re.MULTILINE) == lines
    assert "nan" not in printed and ("tokens equal" in printed) == (recipe == "text")


def test_long_answers_are_timed_in_both_ways():
    printed = run("long_answers.py", "--cases", "2", "--single", "1", "--batches", "1", "2", "--threads", "1")
    assert [line.split(" | ")[:2] for line in printed.splitlines() if "iffusion | " in line or "autoreg" in line] == [
        ["| 1", "diffusion"], ["| 1", "autoregressive"], ["| 2", "diffusion"], ["| 2", "autoregressive"],
    ]  # fmt: skip
