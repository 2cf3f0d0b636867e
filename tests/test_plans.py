"""Where the released model would go, in bf16, FP8 and NF4, by sizes alone: the benchmark's table, the card's, and the console's."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from make_fp8_checkpoint import write_fp8_checkpoint
from tiny import build_oracle, tiny_config
from transformers import AutoConfig

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, FourBitConfig
from modeling_diffusiongemma.console.main import main
from modeling_diffusiongemma.weights.plans import MACHINES, PRECISIONS, Machine, layers_on, make_plan, sized, table

ROOT = Path(__file__).parents[1]
RELEASED = ROOT / "tests" / "data" / "released"
STORED = {"bf16": 51_647_562_456, "FP8": 27_197_665_496}  # bytes of the published checkpoints


@pytest.fixture(scope="module")
def released():
    return table(AutoConfig.from_pretrained(RELEASED), DiffusionGemmaForMaskedBlockLM)


@pytest.fixture(scope="module")
def placement():
    return runpy.run_path(str(ROOT / "benchmarks" / "placement.py"))


def test_card_and_benchmark_have_the_table(released, placement, capsys):
    placement["main"]([])
    printed, card = capsys.readouterr().out, (ROOT / "model_cards" / "released.md").read_text()
    assert all(line in card and line in printed for line in released[0])


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_plan_holds_every_byte_and_every_layer_once(released, machine, precision):
    plan = released[1][machine][precision]
    assert sum(layers_on(plan, 30).values(), []) == list(range(30))
    if precision in STORED:  # and the vision tower's rotary frequencies; scales are float32, of which bfloat16 is stored
        more = 2 * 30 * 128 * (2 * 704 + 2816) + 4_000_000 if precision == "FP8" else 100
        assert 0 <= sum(plan.bytes.values()) - STORED[precision] < more
    assert all(size <= machine.memory()[place] for place, size in plan.bytes.items() if place != "disk")
    away = {"disk"} if not machine.gpus else {"cpu", "disk"}
    assert plan.moved <= sum(size for place, size in plan.bytes.items() if place in away)
    assert (plan.moved == 0) == away.isdisjoint(plan.bytes)


def test_sizes_are_those_of_loaded_models(tmp_path):
    oracle = build_oracle()
    write_fp8_checkpoint(oracle, tmp_path / "fp8")
    oracle.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    loads = {"bf16": ("bf16", {}), "FP8": ("fp8", {})}
    loads |= {"NF4": ("bf16", {"quantization_config": FourBitConfig()})} if bitsandbytes_is_there() else {}
    for precision, (folder, settings) in loads.items():
        model = DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path / folder, **settings)
        expected = sum(tensor.nbytes for tensor in model.parameters()) + sum(2 * buffer.numel() for buffer in model.buffers())
        by_sizes = sized(tiny_config(), DiffusionGemmaForMaskedBlockLM, precision)
        found = sum(tensor.nbytes for tensor in [*by_sizes.parameters(), *by_sizes.buffers()])
        tolerance = 0.02 if precision == "NF4" else 0  # where its blocks are cut is bitsandbytes' business
        assert abs(found - expected) <= tolerance * expected, precision


def bitsandbytes_is_there():
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return False
    return True


def test_a_cpu_keeps_what_it_needs_and_a_gpu_its_reserve():
    model = sized(tiny_config(), DiffusionGemmaForMaskedBlockLM, "bf16")
    total = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert make_plan(model, Machine((), 2**33).memory()).bytes == {"cpu": total}
    assert make_plan(model, Machine((), 2**31).memory()).bytes == {"disk": total}
    assert make_plan(model, Machine((2**31,), 2**20).memory()).bytes == {"cpu": total}
    assert make_plan(model, Machine((2**32,), 2**20).memory()) == ({0: total}, 0, {"": 0})


def test_plan_of_a_machine_of_ones_own_goes_layer_by_layer(placement, capsys):
    placement["main"](["--gpus", "24", "--cpu", "64", "--map"])
    printed = capsys.readouterr().out
    assert "bf16: GPU 0 layers 0 to 11, cpu layers 12 to 29" in printed
    device_map = json.loads(printed[printed.index("{") : printed.index("}") + 1])
    assert device_map["model.decoder.layers.11"] == 0 and device_map["model.decoder.layers.12"] == "cpu"
    placement["main"](["--cpu", "24"])
    assert "CPU 18.1 + disk 30.0; 28.9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--gpus", "24", "1"], "--gpus"), (["--config", "no/such"], "--config"), (["--map"], "--map"), (["--cpu", "-1"], "--reserve")],
)
def test_wrong_argument_of_the_plan_is_named(arguments, named, placement, capsys):
    with pytest.raises(SystemExit, match="2"):
        placement["parse"](arguments)
    assert f"error: `{named}`" in capsys.readouterr().err


def test_console_plans_any_checkpoint(released, tmp_path, capsys):
    """From its config alone."""
    (tmp_path / "config.json").write_bytes((RELEASED / "config.json").read_bytes())
    assert main(["info", "--plan", "--model", str(tmp_path)]) == 0
    assert set(released[0]) <= set(capsys.readouterr().out.splitlines())
    assert main(["info", "--plan", "--model", str(tmp_path), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == len(MACHINES) * len(PRECISIONS)
    (row,) = (row for row in rows if row["gpus"] == [24 * 2**30] and row["precision"] == "NF4")
    assert list(row["bytes"]) == ["0"] and row["moved"] == 0 and row["cpu"] == 64 * 2**30
    assert main(["info", "--plan", "--device", "cpu"]) == 2
