"""What does not fit is refused before a weight is read. The weights of the giant here are zeros that take no room on the disk: sparse files
with real headers, which whoever read them would read for a while."""

import json
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tokens

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, FourBitConfig, FP8Config
from modeling_diffusiongemma.weights.fits import check_folder, free_memory


@pytest.fixture(scope="module")
def giant(tmp_path_factory):
    """A checkpoint in bfloat16 five times as large as the memory that is free, a file a weight: one that is larger than all of the memory
    cannot be mapped."""
    if (free := free_memory("cpu")) is None:
        pytest.skip("nobody tells how much memory is free")
    folder, config = tmp_path_factory.mktemp("giant"), tiny_config()
    text = config.text_config
    matrices = 3 * text.num_hidden_layers * text.num_experts
    text.moe_intermediate_size = 5 * free // (2 * matrices * text.hidden_size)
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = DiffusionGemmaForMaskedBlockLM(config).state_dict()
    del state["lm_head.weight"]
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {name: file_of(name) for name in state}})
    )
    try:
        for name, tensor in state.items():
            write_zeros(folder / file_of(name), name, tensor)
    except OSError:
        pytest.skip("this file system has no sparse files")
    return folder


def file_of(name):
    return f"{name}.safetensors"


def write_zeros(file, name, tensor):
    size = 2 * tensor.numel()
    header = json.dumps(
        {"__metadata__": {"format": "pt"}, name: {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": [0, size]}}
    ).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(header)) + header)
        opened.truncate(8 + len(header) + size)


def load(folder, **settings):
    return DiffusionGemmaForMaskedBlockLM.from_pretrained(folder, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": torch.float32}, {"quantization_config": FP8Config()}, {"quantization_config": FourBitConfig()},
        {"quantization_config": FP8Config(), "device_map": {"": "cpu"}}, {"dtype": torch.float32, "device_map": "cpu"},
        {"disable_mmap": True},
    ],
)  # fmt: skip
def test_weights_that_the_memory_does_not_hold_are_refused(giant, settings):
    if "FourBit" in str(settings.get("quantization_config")):
        pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match=r"weights take [\d,.]+ GB of the CPU's memory, where .* are free; expected the disk for the rest"):
        load(giant, **settings)


@pytest.mark.parametrize("settings", [{}, {"device_map": "auto"}, {"device_map": {"": "disk"}}])
def test_weights_that_stay_in_their_file_need_no_memory(giant, settings):
    """They are mapped, or fetched from there layer by layer."""
    experts = load(giant, **settings).model.decoder.layers[0].experts
    assert experts.down_proj.nbytes > 0.2 * free_memory("cpu") or experts.down_proj.is_meta


@pytest.mark.skipif(sys.platform != "linux", reason="other systems map what they are asked for")
def test_file_that_the_system_does_not_map_is_named(giant, tmp_path):
    """Larger than all of the memory and the swap, as a Linux with its usual settings has it."""
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() != "0":
        pytest.skip("this Linux has other settings")
    shutil.copytree(giant, tmp_path / "one", ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    largest = torch.empty(2**42, dtype=torch.bfloat16, device="meta")
    write_zeros(tmp_path / "one" / "model.safetensors", "model.decoder.norm.weight", largest)
    with pytest.raises(OSError, match=r"model.safetensors: its .* cannot be mapped into memory; expected shards"):
        load(tmp_path / "one")


def test_weights_that_would_be_quantised_onto_the_disk_are_refused(giant):
    with pytest.raises(ValueError, match=r"quantised while they are loaded would go to the disk; expected memory .*`max_memory=`"):
        load(giant, quantization_config=FP8Config(), device_map="auto")


def test_converted_weights_need_a_folder(published):
    """It used to be asked for when half of them had been read."""
    with pytest.raises(ValueError, match="`offload_folder` is None, and .* another form than the checkpoint's; expected a folder"):
        load(published, device_map="auto", max_memory={"cpu": 60_000})


def test_folder_must_be_one_that_can_be_written(published, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`offload_folder` is .*/file/new'.*Not a directory.*; expected one that can be written"):
        load(published, device_map="auto", max_memory={"cpu": 60_000}, offload_folder=tmp_path / "file" / "new")


def test_folder_must_have_room_for_what_is_written(published, tmp_path):
    with pytest.raises(ValueError, match=r"`offload_folder` is .*/new', 1,000,000,000.0 GB of weights .*, and .* are free there; expected"):
        check_folder(tmp_path / "new", 10**18, "cannot load it")
    assert not (tmp_path / "new").exists()
    model = load(published, dtype=torch.float32, device_map="auto", max_memory={"cpu": 60_000}, offload_folder=tmp_path / "new")
    assert torch.equal(
        model.prefill(tokens(1, 5)).last_hidden_state, load(published, dtype=torch.float32).prefill(tokens(1, 5)).last_hidden_state
    )


def test_inputs_go_where_offloaded_weights_are_fetched_to(published, tmp_path):
    """With all of them on the disk it was the meta device."""
    assert load(published, device_map={"": "disk"}, offload_folder=tmp_path).device == torch.device("cpu")
