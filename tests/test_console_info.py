"""`diffusiongemma info`: what is said of a checkpoint without its weights, of the Hub's too, and of a device."""

import http.server
import json
import os
import re
import struct
import threading
from pathlib import Path

import pytest
import torch
from commands import MODULE, process
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, DiffusionGemmaForBlockDiffusion

from generation.fast.proofs import FastPath, UnusableDevice
from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, default_checkpoint
from modeling_diffusiongemma.console import device_report

RELEASED = Path(__file__).parent / "data" / "released"


def test_info_agrees_with_the_loaded_model(answers):
    (about,) = answers("info")
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(default_checkpoint())
    assert about["parameters"] == model.num_parameters() > about["active_parameters"]
    tensors = load_file(Path(default_checkpoint(), "model.safetensors"))
    assert about["weights"] == {
        "files": 1, "tensors": len(tensors), "bytes": (size := sum(t.nbytes for t in tensors.values())), "bytes_by_dtype": {"F32": size},
    }  # fmt: skip
    assert (
        about["canvas_length"] == 256 and about["special_ids"]["eos_token_id"] == [1, 106, 50] and about["special_ids"]["pad_token_id"] == 0
    )
    assert about["generation"]["max_denoising_steps"] == 48 and about["generation"]["max_new_tokens"] == 256


def test_info_of_a_device_proves_every_path(answers, console):
    (about,) = answers("info", "--device", "cpu")
    assert about["device"] == "cpu" and about["torch"] == torch.__version__ and "triton" in about
    states = {row["path"]: row["state"] for row in about["paths"]}
    assert set(states) == {path.name for path in device_report.PATHS}
    assert states["grouped experts"] == "works" and states["recorded step"] == "not for this device"
    code, out, _ = console("info", "--device", "cpu")
    assert code == 0 and re.search(r"\| grouped experts \| float32, 64, 48 \| works \| [\d.]+ \|", out)
    assert "not for this device: late flags: it is for CUDA, and the device is 'cpu'." in out


def test_info_of_a_device_fails_where_a_path_fails(answers, console, monkeypatch):
    def broken(device):
        raise UnusableDevice("it answers nothing")

    def lying(device):
        return torch.zeros(2), torch.ones(2)

    paths = [FastPath(name, "it is slow", lambda device: None, prove) for name, prove in (("a", lying), ("b", broken), ("c", lying))]
    monkeypatch.setattr(device_report, "PATHS", paths)
    code, out, _ = console("info", "--device", "cpu", "--json")
    rows = json.loads(out)["paths"]
    assert code == 1 and [row["state"] for row in rows] == ["FAILED"] * 3
    assert "numbers in value 0" in rows[0]["detail"] and "answers nothing" in rows[1]["detail"] and "not proven" in rows[2]["detail"]
    assert "FAILED: a: 2 of 2 numbers in value 0 are others, the first 0.0, expected 1.0. Instead, it is slow." in console(
        "info", "--device", "cpu"
    )[1]  # fmt: skip


@pytest.mark.parametrize("name", ["auto", "nowhere", "cuda:99"])
def test_info_of_a_device_that_is_not_there_is_wrong_usage(console, name):
    code, out, err = console("info", "--device", name)
    assert code == 2 and out == "" and f"`--device` is {name!r}" in err and "expected" in err


def test_info_of_the_released_model_reads_no_weight(answers, tmp_path):
    """Its weights as one file with a real header and nothing behind it: whoever read them would wait for 51 GB of zeros."""
    for file in RELEASED.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with torch.device("meta"):
        state = DiffusionGemmaForMaskedBlockLM(AutoConfig.from_pretrained(RELEASED)).state_dict()
    header, end = {}, 0
    for name, tensor in state.items():
        if name != "lm_head.weight":
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end := end + 2 * tensor.numel()]}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (about,) = answers("info", "--model", str(tmp_path))
    assert about["special_ids"]["bos_token_id"] == 2, "its generation config does not say it"
    assert about["parameters"] == 25_823_778_864 and about["weights"]["tensors"] == 1047
    assert about["weights"]["bytes_by_dtype"] == {"BF16": 51_647_562_456} and 3.5e9 < about["active_parameters"] < 4.5e9


def test_info_of_shards_and_fp8(answers, console, tmp_path):
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(default_checkpoint())
    model.save_pretrained(tmp_path, max_shard_size="4MB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    key = next(iter(load_file(shards[1])))
    tensors = load_file(shards[1])
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    save_file(tensors, shards[1])
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (about,) = answers("info", "--model", str(tmp_path))
    assert about["weights"]["files"] == len(shards) > 2 and about["weights"]["tensors"] == 158
    assert about["weights"]["bytes_by_dtype"]["F8_E4M3"] == tensors[key].numel() and about["quantization"] == "compressed-tensors"
    assert f"{about['parameters']:,}" in console("info", "--model", str(tmp_path))[1]
    os.truncate(shards[1], shards[1].stat().st_size - 1)
    code, _, err = console("info", "--model", str(tmp_path))
    assert code == 1 and shards[1].name in err


class Hub(http.server.BaseHTTPRequestHandler):
    """What of the Hub's HTTP interface `info` needs, for the text checkpoint as `owner/name`; keeps how many bytes of weights it gave."""

    given = 0

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, body):
        name = self.path.removeprefix("/owner/name/resolve/main/")
        file = Path(default_checkpoint(), name)
        if "/" in name or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        data, status = file.read_bytes(), 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            data, status = data[int(wanted[1]) : int(wanted[2]) + 1], 206
        if body and name.endswith(".safetensors"):
            Hub.given += len(data)
        self.send_response(status)
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args): ...


def test_info_of_a_hub_repository_fetches_headers_alone(answers, tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        done = process(*MODULE, "info", "--model", "owner/name", "--json", environment=place)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    about, (expected,) = json.loads(done.stdout), answers("info")
    assert about | {"path": expected["path"]} == expected
    assert 0 < Hub.given < 1e6 < expected["weights"]["bytes"]
