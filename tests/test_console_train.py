"""`diffusiongemma train`: files of examples, what a run leaves in its folder, and that a killed one goes on."""

import json
import re
import signal
from pathlib import Path

import programs
import pytest
import torch
from safetensors.torch import load_file

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, default_checkpoint
from modeling_diffusiongemma.console import session, train

ROOT = Path(__file__).parents[1]
QUICK = ["--canvas-length", "16", "--batch-size", "4", "--device", "cpu"]


def pair(place):
    return {"prompt": f"European: Write {1 + place} March 1998 as an ISO date.", "response": f"{1 + place:02d}/03/1998"}


@pytest.fixture
def data(tmp_path):
    """Twelve examples, in all forms a file may hold; none of the questions is among the four of `unseen`."""
    forms = [
        lambda one: one,
        lambda one: {"prompt": one["prompt"], "completion": one["response"]},
        lambda one: {"messages": [{"role": "user", "content": one["prompt"]}, {"role": "assistant", "content": one["response"]}]},
    ]
    text = "\n".join(json.dumps(forms[place % 3](pair(place))) for place in range(12))
    (tmp_path / "data.jsonl").write_text(f"{text}\n\n", encoding="utf-8-sig")
    (tmp_path / "unseen.jsonl").write_text("\n".join(json.dumps(pair(place)) for place in range(12, 16)))
    return str(tmp_path / "data.jsonl")


def unseen(data):
    return data.replace("data.jsonl", "unseen.jsonl")


# What is wrong with a file or a command line


WRONG = {
    '{"prompt": "a"': 'no JSON .*; expected {"prompt"',
    "prompt,response": 'no JSON .*; expected {"prompt"',
    "[1, 2]": "a list; expected",
    '{"prompt": "a"}': r"the keys \['prompt'\]",
    '{"prompt": "a", "response": "b", "completion": "c"}': "the keys",
    '{"prompt": "a", "response": ""}': "`response` is ''; expected text",
    '{"prompt": 3, "response": "b"}': "`prompt` is 3; expected text",
    '{"messages": []}': "no conversation",
    '{"messages": [{"role": "user", "content": "x"}]}': r"no assistant turn, only \['user'\]",
    '{"messages": [{"role": "assistant", "content": "x"}]}': "begins with the assistant",
    '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}': "turn 2 is empty",
    '{"messages": [{"role": "user", "contents": "x"}, {"role": "assistant", "content": "y"}]}': "turn 1 has the keys .* no `content`",
    '{"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "y"}]}': "`content` of turn 1 is 5",
    '{"prompt": "a", "response": "b", "response": "c"}': "the key 'response' stands there twice",
    '{"prompt": "a\\ud800", "response": "b"}': "lone surrogate",
    '{"messages": [], "prompt": "a"}': r"`messages` and \['prompt'\]",
}


@pytest.mark.parametrize("line", WRONG)
def test_line_that_is_no_example_is_named_before_anything_is_loaded(line, data, console, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_tokenizer", lambda path: pytest.fail("loaded"))
    text = Path(data).read_text(encoding="utf-8-sig").splitlines()
    Path(data).write_text("\n".join([*text[:2], line, *text[2:]]))
    code, out, err = console("train", data, "--out", str(tmp_path / "out"))
    assert code == 2 and out == "" and not (tmp_path / "out").exists()
    told = next(row for row in err.splitlines() if row.startswith("  line "))
    assert told.startswith("  line 3: ") and re.search(WRONG[line], told)


def test_many_lines_are_told_of_at_once(console, tmp_path):
    (tmp_path / "bad.jsonl").write_text("oops\n" * 8)
    code, _, err = console("train", str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "out"))
    assert code == 2 and "8 of its lines" in err and err.count("  line ") == 5 and "and 3 more lines" in err
    (tmp_path / "bad.jsonl").write_text("\n\n")
    assert "holds no example" in console("train", str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "out"))[2]
    assert "cannot be read" in console("train", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "out"))[2]


def test_example_with_images_is_named_before_the_model_is_loaded(data, console, tmp_path, monkeypatch):
    """It ended the run at the step that came to it."""
    monkeypatch.setattr(train, "load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    with open(data, "a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "<|image|>", "response": "b"}))
    code, _, err = console("train", data, "--out", str(tmp_path / "out"))
    assert code == 2 and "line 14: image tokens" in err and err.count("  line ") == 1


def test_keys_that_nothing_is_learned_from_are_told(data, console, tmp_path, monkeypatch):
    """A `system` beside `prompt` was passed over without a word, as an id is."""
    lines = [json.dumps({**pair(0), "id": 7}), json.dumps({**pair(1), "system": "Be brief."}), json.dumps({**pair(2), "tools": None})]
    Path(data).write_text("\n".join([*lines, json.dumps({"prompt": "<|image|>", "response": "b"})]))  # which ends the run
    code, _, err = console("train", data, "--out", str(tmp_path / "out"))
    assert code == 2 and f"nothing is learned from the keys ['id', 'system'] of {data}" in err


@pytest.mark.parametrize("begun", [None, "{", "[]", "{}", '{"settings": 3}'])
def test_run_that_says_not_what_it_began_as_is_not_resumed(begun, data, console, tmp_path):
    """A traceback, or an error of JSON that named no file."""
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    if begun is not None:
        (tmp_path / "out" / "begun.json").write_text(begun)
    code, _, err = console("train", data, "--out", str(tmp_path / "out"), "--resume")
    assert code == 2 and "begun.json cannot be read" in err


def test_example_longer_than_the_limit_is_named_before_the_model_is_loaded(data, console, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    with open(data, "a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "a", "response": "b " * 300}))
    code, _, err = console("train", data, "--out", str(tmp_path / "out"), "--max-length", "100")
    assert code == 2 and "line 14: " in err and "expected at most 100 (`--max-length`)" in err and err.count("  line ") == 1


USAGE = {
    "--rank 4": "without `--lora`",  # was passed over: all weights were trained
    "--experts": "without `--lora`",
    "--merge": "without `--lora`",
    "--quantize fp8": "without `--lora`",
    "--lora --merge --quantize 4bit": "`--merge` and `--quantize`",
    "--eval-every 3": "without `--eval`",
    "--device tpu": "expected cpu or cuda",
    "--resume": "holds no checkpoint",
    "--report-to nowhere": "not installed",
    "--eval none.jsonl": "cannot be read",
}


@pytest.mark.parametrize("line", USAGE)
def test_command_line_that_cannot_be_is_refused(line, data, console, tmp_path):
    code, _, err = console("train", data, "--out", str(tmp_path / "out"), *line.split())
    assert code == 2 and USAGE[line] in err, err


@pytest.mark.parametrize("line", ["--lr 0", "--lr nan", "--steps 0", "--epochs 1 --steps 2", "--rank 0"])
def test_numbers_out_of_range_are_refused(line, data, console, tmp_path):
    assert console("train", data, "--out", str(tmp_path / "out"), *line.split())[0] == 2


def test_folder_that_holds_something_is_refused(data, console, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    assert "not empty" in console("train", data, "--out", str(tmp_path / "full"))[2]
    assert "is a file" in console("train", data, "--out", data)[2]


def test_missing_extras_are_told_before_training(data, console, tmp_path, monkeypatch):
    there = train.importlib.util.find_spec
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None if name in ("peft", "matplotlib") else there(name))
    code, _, err = console("train", data, "--out", str(tmp_path / "out"), "--lora")
    assert code == 1 and "pip install peft" in err
    monkeypatch.setattr(train, "load_tokenizer", lambda path: (_ for _ in ()).throw(ValueError("after that")))
    err = console("train", data, "--out", str(tmp_path / "out"))[2]
    assert err.index("there will be no curve.png") < err.index("after that")


# Runs


def test_full_tuning_leaves_a_checkpoint_a_curve_and_a_table(data, console, tmp_path):
    folder = tmp_path / "out"
    line = ["train", data, "--out", str(folder), "--steps", "4", "--lr", "1e-3", "--eval", unseen(data), "--eval-every", "2", *QUICK]
    code, out, err = console(*line)
    assert code == 0, err
    assert out.startswith("| measure | before | after |") and "| exact match | 0 |" in out and "4 steps, loss " in out
    assert "step 4 of 4  loss " in err and "evaluation  exact match" in err
    kept = json.loads((folder / "training.json").read_text())
    assert [entry["step"] for entry in kept["log"] if "loss" in entry] == [1, 2, 3, 4] and kept["after"]["loss"] < kept["before"]["loss"]
    assert [entry["step"] for entry in kept["log"] if "eval_loss" in entry][:3] == [0, 2, 4]
    if train.importlib.util.find_spec("matplotlib"):
        assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    trained = DiffusionGemmaForMaskedBlockLM.from_pretrained(folder)
    assert trained.config.canvas_length == 256, "it was narrow in training alone"
    code, out, err = console("generate", pair(13)["prompt"], "--model", str(folder), "--max-new-tokens", "16", "--set", "canvas_length=16")
    assert code == 0, err
    again = console(*line)[2]
    assert "not empty" in again and "`--resume`" in again


def test_adapter_is_trained_used_and_merged(data, answers, console, tmp_path):
    pytest.importorskip("peft")
    line = ["--steps", "3", "--lr", "1e-2", "--lora", "--rank", "4", "--experts", *QUICK]
    (result,) = answers("train", data, "--out", str(tmp_path / "adapter"), *line)
    assert result["steps"] == 3 and result["holds"] == "an adapter" and "log" not in result
    assert not (tmp_path / "adapter" / "config.json").exists()
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("experts" in name for name in names) and not any("vision" in name for name in names)
    (merged,) = answers("train", data, "--out", str(tmp_path / "merged"), "--merge", *line)
    assert merged["loss"] == result["loss"] and merged["holds"] == "a checkpoint"
    base, whole = (DiffusionGemmaForMaskedBlockLM.from_pretrained(path).eval() for path in (default_checkpoint(), tmp_path / "merged"))
    ids = torch.tensor([[110, 111, 112, 113]])
    with torch.no_grad():
        without = base.causal_logits(ids)
        found = session.adapted(base, str(tmp_path / "adapter")).causal_logits(ids)
        torch.testing.assert_close(found, whole.causal_logits(ids), atol=1e-3, rtol=0)  # sums of two products instead of one
    assert (found - without).abs().max() > 0.1
    asked = ["generate", pair(13)["prompt"], "--seed", "0", "--max-new-tokens", "16", "--set", "canvas_length=16"]
    assert answers(*asked, "--adapter", str(tmp_path / "adapter"))[0]["tokens"] >= 1
    code, _, err = console(*asked, "--adapter", str(tmp_path / "merged"))
    assert code == 2 and "adapter_config.json" in err


def test_loss_that_is_not_finite_ends_the_run(data, console, tmp_path):
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(default_checkpoint())
    with torch.no_grad():
        model.get_parameter("model.decoder.layers.0.mlp.gate_proj.weight")[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    train.load_tokenizer(default_checkpoint()).save_pretrained(tmp_path / "broken")
    code, _, err = console("train", data, "--out", str(tmp_path / "out"), "--model", str(tmp_path / "broken"), "--steps", "2", *QUICK)
    assert code == 1 and "the loss of step 1 is nan" in err and "layers.0.mlp.gate_proj.weight" in err
    assert not list((tmp_path / "out").glob("*.safetensors"))


KILLED = """
import os, signal, sys
from transformers.trainer_callback import DefaultFlowCallback
from modeling_diffusiongemma.console.main import main
def on_step_begin(self, args, state, control, **kwargs):
    if state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
DefaultFlowCallback.on_step_begin = on_step_begin
sys.exit(main())
"""


def test_killed_run_leaves_no_model_and_goes_on_to_the_same_one(data, console, tmp_path):
    folder = tmp_path / "killed"
    line = ["--steps", "6", "--save-every", "2", "--lr", "1e-3", *QUICK]
    assert console("train", data, "--out", str(tmp_path / "straight"), *line)[0] == 0
    killed = programs.run("-c", KILLED, "train", data, "--out", folder, *line)
    assert killed.returncode == -signal.SIGKILL and (folder / "checkpoint-2" / "trainer_state.json").is_file(), killed.stderr
    assert not list(folder.glob("*.safetensors")) and not (folder / "config.json").exists()
    code, _, err = console("train", data, "--out", str(folder), *line, "--resume", "--lr", "2e-3")
    assert code == 2 and "`--lr` is 0.002, and was 0.001" in err
    code, _, err = console("train", data, "--out", str(folder), *line, "--resume")
    assert code == 0, err
    one, other = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "straight"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
