"""FP8 experts that stay in their checkpoint's files on a CPU: the numbers of stacked ones, whatever is done with them."""

import copy
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from make_fp8_checkpoint import write_fp8_checkpoint
from safetensors.torch import load_file, save_file
from tiny import build_oracle, tokens
from transformers import AutoModelForMultimodalLM

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, FP8Config, drop_in
from modeling_diffusiongemma.weights.fp8 import CheckpointFP8Experts, FP8Experts
from modeling_diffusiongemma.weights.fp8_apart import MatricesApart, matrices_of
from modeling_diffusiongemma.weights.fp8_math import E4M3
from modeling_diffusiongemma.weights.safetensors_files import read_tensors, stored_tensors

WEIGHTS = FP8Experts.WEIGHTS


def load(folder, **settings):
    return DiffusionGemmaForMaskedBlockLM.from_pretrained(folder, **settings)


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, FP8Experts)]


def lie_apart(model):
    """Of each layer, whether both weights lie apart."""
    return [all(isinstance(module._parameters[name], MatricesApart) for name in WEIGHTS) for module in experts_of(model)]


@pytest.fixture(scope="module")
def stacked(published):
    """The same model as every device but a CPU has it; not to be changed."""
    model = load(published)
    for module in experts_of(model):
        module.stack()
    assert lie_apart(model) == [False] * 4 and all(type(module) is FP8Experts for module in experts_of(model))
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens(2, 13), decoder_input_ids=tokens(2, 10, seed=1)).logits


def state_bits(model):
    state = {name: tensor.stacked() if isinstance(tensor, MatricesApart) else tensor for name, tensor in model.state_dict().items()}
    return {name: (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8)) for name, tensor in state.items()}


def same_state(one, other):
    one, other = state_bits(one), state_bits(other)
    assert list(one) == list(other)
    assert all(one[name][:2] == other[name][:2] and torch.equal(one[name][2], other[name][2]) for name in one)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}, {"": torch.device("cpu")}], ids=str)
def test_experts_on_a_cpu_are_views_of_the_files(stacked, tmp_path, device_map, shards):
    write_fp8_checkpoint(build_oracle(), tmp_path, shards)
    model, info = load(tmp_path, device_map=device_map, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert lie_apart(model) == [True] * 4
    assert torch.equal(logits(model), logits(stacked)) and lie_apart(model) == [True] * 4
    same_state(model, stacked)
    if sys.platform == "linux":
        lines = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
        mapped = [range(*(int(address, 16) for address in line.split("-"))) for line in lines]
        for matrix in matrices_of(experts_of(model)[2]._parameters["gate_up_proj"], 3):
            assert any(matrix.data_ptr() in addresses for addresses in mapped)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with an accelerator a computed map uses it")
@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_a_computed_map_without_a_gpu_leaves_experts_in_their_files(published, stacked, device_map):
    """Accelerate counts what stays in the files as memory, and would send what it takes for too much to the disk, in another form."""
    model = load(published, device_map=device_map)
    assert lie_apart(model) == [True] * 4 and set(getattr(model, "hf_device_map", {"": "cpu"}).values()) == {"cpu"}
    assert torch.equal(logits(model), logits(stacked))


def test_tensors_lie_at_the_bytes_where_they_are_read_ahead(tmp_path):
    """Reading other bytes ahead would be slow, and nothing else would tell."""
    write_fp8_checkpoint(build_oracle(), tmp_path, 3)
    entries = stored_tensors(sorted(tmp_path.glob("*.safetensors")))
    for name, tensor in read_tensors(entries):
        entry = entries[name]
        stored = entry.file.read_bytes()[entry.start : entry.start + entry.size]
        assert stored == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_models_of_other_checkpoints_and_places_are_stacked(published, oracle_checkpoint, tmp_path):
    model = load(oracle_checkpoint, quantization_config=FP8Config())
    assert all(type(module) is FP8Experts for module in experts_of(model))
    model = load(published, device_map="auto", max_memory={"cpu": 60_000}, offload_folder=tmp_path)
    assert all(type(module) is FP8Experts for module in experts_of(model))


@pytest.mark.parametrize("shard_size", ["50GB", "15KB"])
def test_saved_files_are_those_of_stacked_experts(published, stacked, tmp_path, shard_size):
    model = load(published)
    for folder, each in (("apart", model), ("stacked", stacked)):
        each.save_pretrained(tmp_path / folder, max_shard_size=shard_size)
    assert lie_apart(model) == [True] * 4
    names = sorted(file.name for file in (tmp_path / "apart").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "stacked").iterdir()) and len(names) > 2
    for name in names:
        one, other = ((tmp_path / folder / name).read_bytes() for folder in ("apart", "stacked"))
        if name == "config.json":
            one, other = ({**json.loads(text), "_name_or_path": None} for text in (one, other))
        assert one == other, name
    assert torch.equal(logits(load(tmp_path / "apart")), logits(model))


def test_saving_over_the_folder_that_was_loaded(published, tmp_path):
    load(published).save_pretrained(tmp_path)
    model = load(tmp_path)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), expected) and torch.equal(logits(load(tmp_path)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_casting_leaves_them_where_they_are(published, dtype):
    model = load(published, dtype=torch.float32).to(dtype)
    assert lie_apart(model) == [True] * 4
    layer = model.model.decoder.layers[0]
    assert layer.input_layernorm.weight.dtype == dtype and layer.experts._parameters["down_proj"].dtype == E4M3
    assert layer.experts.down_scale.dtype == torch.float32
    assert list(layer.experts._parameters) == ["gate_up_proj", "gate_up_scale", "down_proj", "down_scale"]
    expected = load(published, dtype=torch.float32)
    for module in experts_of(expected):
        module.stack()
    assert torch.equal(logits(model), logits(expected.to(dtype)))
    assert lie_apart(model.to("cpu")) == [True] * 4


def test_moving_stacks_them(published):
    model = load(published).to("meta")
    assert all(type(module) is FP8Experts and module.gate_up_proj.is_meta for module in experts_of(model))
    model = load(published)
    model.model.decoder.layers[0].to_empty(device="cpu")
    assert lie_apart(model) == [False, True, True, True]


def test_reading_a_weight_stacks_its_layer_and_says_so(published, stacked, monkeypatch):
    said = []
    monkeypatch.setattr("modeling_diffusiongemma.weights.fp8.logger.warning_once", said.append)
    model = load(published)
    expected = logits(model)
    layer = model.model.decoder.layers[1].experts
    weight = layer.gate_up_proj
    assert type(weight) is torch.nn.Parameter and layer.gate_up_proj is weight and type(layer) is FP8Experts
    assert lie_apart(model) == [False if place == 1 else True for place in range(4)] and len(said) == 1 and "gate_up_proj" in said[0]
    assert torch.equal(logits(model), expected)
    weight.view(torch.uint8)[:] = 0  # what is written there lasts
    assert not torch.equal(logits(model), expected)
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing


def test_copies_are_whole_and_independent(published, stacked):
    model = load(published)
    twin = copy.deepcopy(model)
    same_state(twin, model)
    for matrices in model.model.decoder.layers[0].experts._parameters["down_proj"].experts:
        for matrix in matrices:
            matrix.view(torch.uint8).zero_()
    assert torch.equal(logits(twin), logits(stacked)) and not torch.equal(logits(model), logits(stacked))
    assert torch.equal(logits(load(published)), logits(stacked))  # the file has not changed


def test_pickled_model_needs_no_checkpoint(published, stacked, tmp_path):
    model, buffer = load(published), io.BytesIO()
    torch.save(model, buffer)
    again = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert lie_apart(again) == [False] * 4 and lie_apart(model) == [True] * 4
    with torch.nn.utils.parametrize.cached():
        layer = copy.deepcopy(again).model.decoder.layers[0].experts
        torch.nn.utils.parametrize.register_parametrization(layer, "down_proj", torch.nn.Identity())
        assert "Parametrized" in type(layer.to(torch.bfloat16)).__name__
    assert torch.equal(logits(again), logits(stacked)) and not any(module.gate_up_proj.requires_grad for module in experts_of(again))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    assert state.keys() == stacked.state_dict().keys()


def test_state_dict_is_loaded_into_them(published, stacked):
    for source in (stacked, load(published)):
        model = load(published)
        model.load_state_dict(source.state_dict())
        same_state(model, stacked)
        model = load(published)
        model.load_state_dict(source.state_dict(), assign=True)
        same_state(model, stacked)


def test_dequantised_model_is_that_of_stacked_experts(published):
    model, other = load(published), load(published)
    for module in experts_of(other):
        module.stack()
    assert torch.equal(logits(model.dequantize()), logits(other.dequantize())) and not experts_of(model)


def test_gradients_are_those_of_stacked_experts(published):
    gradients = []
    for stack in (False, True):
        model = load(published, dtype=torch.float32).train()
        for module in experts_of(model) if stack else ():
            module.stack()
        torch.manual_seed(0)
        ids = tokens(2, 13)
        model(input_ids=ids, labels=torch.where(torch.arange(13) > 6, ids, -100)).loss.backward()
        assert lie_apart(model) == [not stack] * 4
        gradients.append(model.model.decoder.embed_tokens.weight.grad)
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


def test_drop_in_shares_them_between_its_passes(published):
    model = AutoModelForMultimodalLM.from_pretrained(published)
    assert len(lie_apart(model)) >= 4 and all(lie_apart(model))
    settings = {"max_new_tokens": 8, "seed": 0, "max_denoising_steps": 3}
    expected = load(published).generate(tokens(1, 9), **settings)
    got = model.generate(tokens(1, 9), **settings)
    assert torch.equal(getattr(got, "sequences", got), expected)
    twice = copy.deepcopy(model)
    assert torch.equal(getattr(twice.generate(tokens(1, 9), **settings), "sequences", got), expected)
    assert all(type(module) is FP8Experts for module in experts_of(model.to("meta")))


def test_adapters_of_experts_stack_them(published, stacked):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_parameters=["experts.gate_up_proj"], lora_dropout=0.0)
    model = peft.get_peft_model(load(published, dtype=torch.float32), settings).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.01)
    base = load(published, dtype=torch.float32)
    for module in experts_of(base):
        module.stack()
    torch.manual_seed(0)
    other = peft.get_peft_model(base, settings).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(other)) and not any(type(m) is CheckpointFP8Experts for m in model.modules())


def apart(rows=(3, 5), experts=4, columns=6):
    generator = torch.Generator().manual_seed(0)
    shapes = [[(count, columns) for count in rows] for _ in range(experts)]
    return MatricesApart(
        [[torch.randint(0, 120, shape, dtype=torch.uint8, generator=generator).view(E4M3) for shape in each] for each in shapes]
    )


def test_a_weight_apart_reads_as_a_stacked_one():
    weight = apart()
    plain = weight.stacked()
    assert weight.shape == plain.shape == (4, 8, 6) and weight.dtype == E4M3 and weight.numel() == plain.numel()
    assert weight.nbytes == plain.nbytes and weight.is_contiguous() and "(4, 8, 6)" in repr(weight)
    for read in (
        lambda one: one[2], lambda one: one[-1], lambda one: one[1:3], lambda one: one[1, 4:], lambda one: one.unbind()[3],
        lambda one: one.to(torch.float32), lambda one: one.view(torch.uint8), lambda one: one.mT.contiguous(),
        lambda one: torch.cat([one[0], one[3]]), lambda one: one.float().sum(), lambda one: list(one)[2], lambda one: one.chunk(2)[1],
    ):  # fmt: skip
        got, expected = read(weight), read(plain)
        assert type(got) is torch.Tensor and got.dtype == expected.dtype
        assert torch.equal(got.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
    assert weight.view(torch.uint8).tolist() == plain.view(torch.uint8).tolist() and weight.tolist() == plain.tolist()
    assert torch.equal(torch.cat([matrix.float() for matrix in matrices_of(weight, 1)]), weight[1].float())
    with pytest.raises(IndexError):
        weight[4]


def test_what_would_be_lost_is_refused(tmp_path):
    weight = apart()
    before = weight.stacked()
    writes = {
        "copy_": lambda: weight.copy_(before), "zero_": lambda: weight.zero_(), "index": lambda: weight.__setitem__(0, before[0]),
        "out": lambda: torch.neg(before.float(), out=weight), "data": lambda: setattr(weight, "data", before),
        "share": lambda: weight.share_memory_(), "address": lambda: weight.data_ptr(),
        "file": lambda: save_file({"weight": weight}, tmp_path / "file.safetensors"),
    }  # fmt: skip
    for name, write in writes.items():
        with pytest.raises(ValueError, match="stack"):
            write()
            pytest.fail(name)
    assert torch.equal(weight.view(torch.uint8), before.view(torch.uint8)) and not (tmp_path / "file.safetensors").exists()


def test_released_names_are_what_a_file_holds(published, tmp_path):
    load(published).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(published / "model.safetensors").keys()


def test_experts_that_a_copy_leaves_alone_are_plain_and_saved_so(tmp_path):
    """Kept as matrices apart, they could be neither saved nor read as one tensor without a copy."""
    build_oracle().to(torch.bfloat16).save_pretrained(tmp_path / "oracle")
    kept = [r"re:model\.decoder\.layers\.1\.experts\.", r"re:.*(router|self_conditioning|vision).*", "lm_head"]
    load(tmp_path / "oracle", quantization_config=FP8Config(ignore=kept)).save_pretrained(tmp_path / "copy")
    model = load(tmp_path / "copy", dtype=torch.float32)
    assert lie_apart(model) == [True] * 3
    assert not any(isinstance(weight, MatricesApart) for weight in model.model.decoder.layers[1].experts.parameters())
    model.dequantize().save_pretrained(tmp_path / "plain")
    again = load(tmp_path / "plain")
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())


def test_dequantised_modules_of_both_passes_hold_the_same_weights(published):
    model = drop_in.DiffusionGemmaForBlockDiffusion.from_pretrained(published)
    assert torch.equal(logits(model.dequantize()), logits(load(published).dequantize()))
    names = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "experts.down_proj")
    for layer, twin in zip(model.model.decoder.layers, model.model.encoder.language_model.layers, strict=True):
        assert all(layer.get_parameter(name) is twin.get_parameter(name) for name in names)
