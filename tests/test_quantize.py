"""The command that quantises a checkpoint on disk: same numbers as while loading, in pieces, resumable, checked."""

import json
import os
from pathlib import Path

import programs
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build_oracle
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from modeling_diffusiongemma import FP8Config, default_checkpoint
from modeling_diffusiongemma.quantize import main, quantize_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint in bfloat16, in several shards, with files beside the weights; read only."""
    folder = tmp_path_factory.mktemp("source")
    build_oracle().to(torch.bfloat16).save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
        (folder / name).write_text(name)
    return folder


def stored(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape, name
        assert torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)), name


def test_numbers_are_those_of_quantising_while_loading(source, tmp_path):
    done = quantize_checkpoint(source, tmp_path / "disk")
    AutoModelForCausalLM.from_pretrained(source, quantization_config=FP8Config()).save_pretrained(tmp_path / "memory")
    disk, memory = stored(tmp_path / "disk"), stored(tmp_path / "memory")
    same_bits(disk, memory)
    assert done["tensors"] == len(disk) and done["bytes"] == sum(tensor.nbytes for tensor in disk.values()) and done["kept"] == 0
    index = json.loads((tmp_path / "disk" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == disk.keys() and index["metadata"]["total_size"] == done["bytes"]


def test_result_loads_without_an_argument(source, tmp_path):
    quantize_checkpoint(source, tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = AutoModelForCausalLM.from_pretrained(source, quantization_config=FP8Config())
    same_bits(model.state_dict(), expected.state_dict())


def test_shipped_checkpoint_of_one_file_becomes_one_file(tmp_path):
    done = quantize_checkpoint(default_checkpoint(), tmp_path)
    assert done["files"] == 1 and (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors.index.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_everything_but_weights_and_card_is_copied(source, tmp_path):
    quantize_checkpoint(source, tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "tokenizer.json" and (tmp_path / "chat_template.jinja").is_file()
    assert (tmp_path / "generation_config.json").read_text() == (source / "generation_config.json").read_text()
    assert not (tmp_path / "README.md").exists()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path))
    assert after.pop("quantization_config")["format"] == "float-quantized" and after == before


def test_interrupted_run_goes_on_and_keeps_what_is_complete(source, tmp_path, monkeypatch):
    """Whatever was being written when it stopped has no name yet."""
    folder, writes = tmp_path / "folder", []
    unfinished = folder / ".quantizing"
    replace = os.replace

    def stop_at_the_third(unfinished, destination):
        if len(writes) == 2:
            raise KeyboardInterrupt
        writes.append(destination.name)
        replace(unfinished, destination)

    monkeypatch.setattr(os, "replace", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, folder)
    assert sorted(path.name for path in unfinished.glob("*.safetensors")) == sorted(writes) and list(folder.iterdir()) == [unfinished]
    monkeypatch.undo()
    times = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*.safetensors")}
    done = quantize_checkpoint(source, folder)
    assert done["kept"] == 2
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times
    assert not unfinished.exists() and not list(folder.glob("*.unfinished"))
    quantize_checkpoint(source, tmp_path / "whole")
    same_bits(stored(folder), stored(tmp_path / "whole"))


def test_finished_folder_is_checked_and_left(source, tmp_path):
    first = quantize_checkpoint(source, tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert quantize_checkpoint(source, tmp_path) == first | {"kept": first["files"]}
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")} == times


def test_shards_made_from_other_weights_are_made_anew(source, tmp_path):
    """Same names, types and shapes: only the numbers differ."""
    other, folder = tmp_path / "other", tmp_path / "fp8"
    build_oracle(rms_norm_eps=1e-5).to(torch.bfloat16).save_pretrained(other, max_shard_size="30KB")
    for file in other.glob("*.safetensors"):
        save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    quantize_checkpoint(other, folder)
    assert quantize_checkpoint(source, folder)["kept"] == 0
    quantize_checkpoint(source, tmp_path / "expected")
    same_bits(stored(folder), stored(tmp_path / "expected"))


def test_weights_of_others_are_not_overwritten(source, tmp_path):
    name = next(source.glob("*.safetensors")).name
    save_file({"a": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} was not made by this command"):
        quantize_checkpoint(source, tmp_path)
    (tmp_path / name).rename(tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match=r"`destination` holds adapter\.safetensors"):
        quantize_checkpoint(source, tmp_path)


def changed(source, folder, change):
    """A copy of `source` in which `change(tensors)` edits the shard that holds layer 1's down_proj."""
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weight_map = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    path = folder / weight_map["model.decoder.layers.1.experts.down_proj"]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    return folder


def test_nan_is_named_with_its_file(source, copy, tmp_path):
    def change(tensors):
        tensors["model.decoder.layers.1.experts.down_proj"][2, 5, 1] = float("nan")

    path = changed(source, copy, change)
    match = rf"layers\.1\.experts\.2\.down_proj\.weight_scale in .*{path.name} is nan in row 5"
    with pytest.raises(ValueError, match=match):
        quantize_checkpoint(copy, tmp_path / "fp8")
    assert not (tmp_path / "fp8" / path.name).exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda t: t.pop("model.decoder.layers.1.experts.down_proj"),
            r"lacks 1 tensors, the first model\.decoder\.layers\.1\.experts\.down",
        ),
        (lambda t: t.update(extra=torch.zeros(2)), "holds extra and 0 more"),
        (lambda t: t.update({"model.decoder.layers.1.experts.down_proj": torch.zeros(4, 32, 23)}), r"is F32 \(4, 32, 23\); expected"),
    ],
)
def test_source_that_is_not_the_models_is_refused_before_anything_is_written(source, copy, tmp_path, change, match):
    changed(source, copy, change)
    with pytest.raises(ValueError, match=match):
        quantize_checkpoint(copy, tmp_path / "fp8")
    assert not (tmp_path / "fp8").exists()


def test_half_written_source_shard_is_an_oserror_that_names_it(source, copy, tmp_path):
    path = changed(source, copy, lambda tensors: None)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(OSError, match=rf"{path.name} has \d+ bytes where its header says"):
        quantize_checkpoint(copy, tmp_path / "fp8")
    path.unlink()
    with pytest.raises(OSError, match=path.name):
        quantize_checkpoint(copy, tmp_path / "fp8")


def test_what_is_no_plain_checkpoint_is_refused(source, tmp_path):
    with pytest.raises(OSError, match=r"has no config\.json"):
        quantize_checkpoint(tmp_path, tmp_path / "fp8")
    with pytest.raises(ValueError, match="`destination` is .*, the source itself"):
        quantize_checkpoint(source, source)
    quantize_checkpoint(source, tmp_path / "fp8")
    with pytest.raises(ValueError, match="has a `quantization_config`; expected a checkpoint that is not quantised"):
        quantize_checkpoint(tmp_path / "fp8", tmp_path / "twice")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="a 'bert' model; expected 'diffusion_gemma'"):
        quantize_checkpoint(tmp_path / "bert", tmp_path / "other")


def test_ignored_layers_are_copied(source, tmp_path):
    """Names go as far as linear layers; experts are what the command is for."""
    kept = "model.decoder.layers.0.mlp.up_proj"
    ignore = ["re:.*router", "re:model.encoder", "re:.*self_conditioning", kept]
    quantize_checkpoint(source, tmp_path / "fp8", ignore=ignore)
    tensors = stored(tmp_path / "fp8")
    assert torch.equal(tensors[f"{kept}.weight"], stored(source)[f"{kept}.weight"]) and f"{kept}.weight_scale" not in tensors
    AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    with pytest.raises(ValueError, match="`ignore` names the experts of .*; expected them to be quantised"):
        quantize_checkpoint(source, tmp_path / "other", ignore=[*ignore, "re:.*experts"])


def test_command_line_says_what_it_did(source, tmp_path):
    run = programs.run("-m", "modeling_diffusiongemma.quantize", source, tmp_path / "fp8")
    assert run.returncode == 0 and "228 tensors" in run.stdout and run.stdout.endswith("(0 kept); checked\n"), run.stderr
    assert (tmp_path / "fp8" / "config.json").is_file()


def test_command_line_reports_errors_in_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^error: `source` is .* which has no config\.json"):
        main([str(tmp_path), str(tmp_path / "fp8")])
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "run the same command again" in shown and "from_pretrained" in shown
