"""The page on adapters runs as it stands, and its numbers are those that the console prints."""

import json
import re
import warnings
from pathlib import Path

import pytest
from pages import Page

from modeling_diffusiongemma import DiffusionGemmaConfig, DiffusionGemmaForMaskedBlockLM
from modeling_diffusiongemma.weights.adapter_memory import count_adapters, tuning_table
from modeling_diffusiongemma.weights.plans import GIB, PRECISIONS

ROOT = Path(__file__).parents[1]
PAGE = Page("docs/adapters.md")
RELEASED = ROOT / "tests" / "data" / "released"
MODEL = DiffusionGemmaForMaskedBlockLM


@pytest.fixture(scope="module")
def released():
    return DiffusionGemmaConfig.from_pretrained(RELEASED)


def test_snippets_of_the_page_run_one_after_the_other(monkeypatch, tmp_path):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    assert len(PAGE.blocks) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PAGE.run()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_table_says_what_tuning_the_released_model_takes(released):
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\| attention, MLP.*$", PAGE.text, re.MULTILINE)]
    assert len(rows) == 2 * len(PRECISIONS)
    by_rank = [tuning_table(released, MODEL, rank)[1] for rank in (8, 16)]
    for adapted, precision, *cells in rows:
        found = [memory[precision, "experts" in adapted] for memory in by_rank]
        expected = [*found[0], found[0].total, found[1].total]
        assert cells == [f"{size / GIB:.2f}" for size in expected]
    assert all(f"{count_adapters(released, MODEL, 8, experts):,}" in PAGE.text for experts in (True, False))


def test_counted_adapters_are_those_that_peft_makes():
    peft = pytest.importorskip("peft")
    from small_models import small_model

    from modeling_diffusiongemma import lora_targets

    for experts in (True, False):
        model = small_model()
        count = count_adapters(model.config, MODEL, 3, experts)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**lora_targets(model, experts=experts), r=3))
        assert sum(each.numel() for each in adapted.parameters() if each.requires_grad) == count


def test_console_says_what_tuning_takes(released, console, tmp_path):
    released.save_pretrained(tmp_path)
    code, out, _ = console("info", "--model", str(tmp_path), "--adapters", "8")
    lines, found = tuning_table(released, MODEL, 8)
    assert code == 0 and out.startswith("\n".join(lines)) and "247,188,480" in out
    code, out, _ = console("info", "--model", str(tmp_path), "--adapters", "8", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(rows) == 6
    for row in rows:
        memory = found[row["precision"], row["experts"]]
        assert row["rank"] == 8 and memory._asdict() == {name: row[name] for name in memory._fields} and memory.total == row["total"]


@pytest.mark.parametrize("wrong", [("--adapters", "0"), ("--adapters", "8", "--plan"), ("--adapters", "8", "--device", "cpu")])
def test_wrong_usage_is_refused(console, wrong):
    code, _, err = console("info", *wrong)
    assert code == 2 and "--adapters" in err


def test_what_nobody_has_is_refused(released):
    with pytest.raises(ValueError, match="`rank` is 0"):
        tuning_table(released, MODEL, 0)
