"""Placing the model with Accelerate: the same tokens wherever the weights are, and the library's usual errors.

On a CPU "disk" is the device that is not the computing one; `cpu_offload` gives the hooks of a GPU's CPU offload. An offloaded
weight stands on the meta device between the calls of its module.
"""

import copy
import runpy
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from tiny import build_oracle, image_inputs, same_weights, tokens
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, default_checkpoint

ROOT = Path(__file__).parents[1]
RELEASED = ROOT / "tests" / "data" / "released"
CPU = torch.device("cpu")
NARROW = {"canvas_length": 16, "max_new_tokens": 16, "seed": 3}
HALF = {  # every module by name, every second layer of the text checkpoint on disk
    "model.decoder.embed_tokens": "cpu", "lm_head": "cpu", "model.decoder.norm": "cpu", "model.decoder.self_conditioning": "cpu",
    "model.decoder.rotary": "cpu", "model.encoder": "disk",
    **{f"model.decoder.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(6)},
}  # fmt: skip
MAPS = {  # name: arguments of from_pretrained, whether weights are then offloaded
    "auto": ({"device_map": "auto"}, False),
    "one device": ({"device_map": {"": "cpu"}}, False),
    "half on disk": ({"device_map": HALF}, True),
    "all on disk": ({"device_map": {"": "disk"}}, True),
    "auto with little memory": ({"device_map": "auto", "max_memory": {"cpu": "6MB"}}, True),
    "auto with no memory": ({"device_map": "auto", "max_memory": {"cpu": 0}}, True),
}


def offloaded(model):
    return sum(parameter.is_meta for parameter in model.parameters())


def load(**arguments):
    return AutoModelForCausalLM.from_pretrained(default_checkpoint(), **arguments)


@pytest.fixture(scope="module")
def request_and_answer():
    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint())
    chat = [{"role": "user", "content": "Write October 2, 2052 as an ISO date."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = load().generate(**inputs, **NARROW)
    assert "2052-10-02" in tokenizer.decode(answer[0])
    return inputs, answer


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_tokens_do_not_depend_on_the_device_map(name, offload_buffers, request_and_answer, tmp_path):
    """With `offload_buffers` the layer scalars, which the passes hand to the layers, are offloaded too."""
    (inputs, answer), (arguments, is_offloaded) = request_and_answer, MAPS[name]
    model = load(**arguments, offload_folder=tmp_path, offload_buffers=offload_buffers)
    assert bool(offloaded(model)) == is_offloaded
    assert any(buffer.is_meta for buffer in model.buffers()) == (is_offloaded and offload_buffers)
    assert torch.equal(model.generate(**inputs, **NARROW), answer)


def dispatch(model, folder, offload_buffers):
    return accelerate.dispatch_model(model, HALF, offload_dir=folder, offload_buffers=offload_buffers)


def offload_to_disk(model, folder, offload_buffers):
    return accelerate.disk_offload(model, folder, execution_device=CPU, offload_buffers=offload_buffers)


def offload_to_cpu(model, folder, offload_buffers):
    return accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=offload_buffers)


OFFLOADS = [dispatch, offload_to_disk, offload_to_cpu]


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_tokens_do_not_depend_on_hooks_given_later(offload, offload_buffers, request_and_answer, tmp_path):
    inputs, answer = request_and_answer
    model = offload(load(), tmp_path, offload_buffers)
    assert offloaded(model)
    assert torch.equal(model.generate(**inputs, **NARROW), answer)


@pytest.fixture
def tiny_model():
    return same_weights(build_oracle())


@pytest.mark.parametrize("offload", OFFLOADS[1:])
def test_steps_are_not_recorded_where_weights_move(offload, tiny_model, tmp_path):
    """A CUDA graph holds the addresses of weights; Accelerate takes them away again. Without hooks there is no reason."""
    assert tiny_model.why_not_recorded() is None
    assert "Accelerate moves weights" in offload(tiny_model, tmp_path, False).why_not_recorded()
    accelerate.hooks.remove_hook_from_module(tiny_model, recurse=True)
    assert tiny_model.why_not_recorded() is None


@pytest.mark.parametrize("offload", OFFLOADS[1:])
def test_every_way_through_the_model_fetches_its_weights(offload, tiny_model, tmp_path):
    """Padded rows, images, a static cache, scoring, both losses: whatever reads a weight must go through its module."""
    ids, mask, images = image_inputs("one_row_of_two_padded")
    torch.manual_seed(0)
    settings = {"max_new_tokens": 10, "seed": 1, "max_denoising_steps": 3, "eos_token_id": None, "pad_token_id": 0}

    def everything(model):
        found = [model.generate(ids, attention_mask=mask, **images, **settings)]
        found += [model.generate(tokens(1, length), cache_implementation="static", **settings) for length in (5, 12)]
        found.append(model.generate(tokens(1, 5), backend="reference", **settings | {"seed": None}, generator=seeded()))
        found.append(model.generate(tokens(1, 5), decoding="verified", do_sample=False, **settings))
        labels = tokens(1, 14).masked_fill(torch.arange(14) < 4, -100)
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(model(tokens(1, 14), labels=labels).loss)
            found.append(model.score(tokens(1, 14), labels).log_prob)
        return found

    expected = everything(tiny_model)
    got = everything(offload(tiny_model, tmp_path, True))
    assert offloaded(tiny_model)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def seeded():
    return torch.Generator().manual_seed(2)


def test_offloaded_model_saves_its_weights(tmp_path):
    model = load(device_map=HALF, offload_folder=tmp_path / "offload")
    model.save_pretrained(tmp_path / "saved")
    saved, expected = (load_file(Path(folder) / "model.safetensors") for folder in (tmp_path / "saved", default_checkpoint()))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


def test_automatic_map_splits_no_layer_and_keeps_tied_weights_together():
    with torch.device("meta"):
        model = DiffusionGemmaForMaskedBlockLM(AutoConfig.from_pretrained(RELEASED))
    no_split = model._no_split_modules
    assert set(no_split) <= {type(module).__name__ for module in model.modules()}
    memory = {0: "9GB", 1: "9GB", "cpu": "20GB"}  # the last layers go to the disk
    placed = accelerate.infer_auto_device_map(model, memory, no_split, dtype=torch.bfloat16, clean_result=False)
    assert set(placed.values()) == {0, 1, "cpu", "disk"}
    assert placed["lm_head"] == placed["model.decoder.embed_tokens"]
    layers = {id(layer) for name, layer in model.named_modules() if type(layer).__name__ in no_split}
    within = [name for name in placed if any(id(model.get_submodule(part)) in layers for part in parents(name))]
    assert len(layers) > 30 and within == []


def parents(name):
    """The modules a module lies in, the model itself left out."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"device_map": "fastest"}, ValueError, "fastest"),
        ({"device_map": {"": "nowhere"}}, RuntimeError, "nowhere"),
        ({"device_map": "auto", "max_memory": {"cpu": "lots"}}, ValueError, "lots"),
    ],
)
def test_impossible_placement_is_the_usual_error(arguments, error, named):
    with pytest.raises(error, match=named):
        load(**arguments)


def test_dispatching_without_a_folder_for_the_disk_is_the_usual_error():
    with pytest.raises(ValueError, match="offload_dir.*model.decoder.layers.1"):
        accelerate.dispatch_model(load(), HALF)


def test_dispatching_with_a_map_that_leaves_modules_out_is_the_usual_error(tmp_path):
    with pytest.raises(ValueError, match="model.decoder.layers.5"):
        accelerate.dispatch_model(load(), {name: place for name, place in HALF.items() if not name.endswith("5")}, offload_dir=tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_loading_is_measured_in_a_process_of_its_own(oracle_checkpoint):
    loading = runpy.run_path(str(ROOT / "benchmarks" / "loading.py"))
    pair = {side: loading["load_elsewhere"](side, str(oracle_checkpoint), "float32") for side in loading["SIDES"]}
    for found in pair.values():
        assert 0 < found["load"] < found["load_and_read"] and found["peak_mib"] > 0
    rows = loading["table"]([pair, pair]).splitlines()[2:]
    assert len(rows) == 3 and all(" (" in row and "x" in row for row in rows)


def test_head_that_was_never_loaded_is_named(request_and_answer):
    """Weights loaded by hand into a model whose head was not tied: its weight stayed on the meta device, with which torch computes whatever
    lies in memory."""
    inputs, expected = request_and_answer
    path = default_checkpoint()
    with accelerate.init_empty_weights():
        model = DiffusionGemmaForMaskedBlockLM(AutoConfig.from_pretrained(path)).eval()
    model.generation_config = model.generation_config_class.from_pretrained(path)
    tied = accelerate.load_checkpoint_and_dispatch(copy.deepcopy(model), str(path))
    with pytest.raises(ValueError, match="`lm_head` was never loaded.*`tie_weights\\(\\)`"):
        tied.generate(**inputs, **NARROW)
    model.tie_weights()
    model = accelerate.load_checkpoint_and_dispatch(model, str(path))
    assert torch.equal(model.generate(**inputs, **NARROW), expected)
