"""Experts in 4 bits through bitsandbytes."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import prompts, small_model
from tiny import needs_bitsandbytes, ours, tokens
from transformers import AutoModel, AutoModelForCausalLM, DiffusionGemmaForBlockDiffusion, DiffusionGemmaTextConfig

from modeling_diffusiongemma import FourBitConfig, FP8Config, drop_in
from modeling_diffusiongemma.layers.experts import Experts, choose_experts, eager_experts
from modeling_diffusiongemma.weights import four_bit_experts
from modeling_diffusiongemma.weights.four_bit_experts import BLOCK_SIZES, FourBitExperts, kernels

PLACES = ("gate_up_proj", "down_proj")


def load(folder, kind=AutoModelForCausalLM, config=None, **settings):
    return kind.from_pretrained(folder, quantization_config=config or FourBitConfig(), **settings)


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, FourBitExperts)]


def same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    small_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(checkpoint, tmp_path_factory):
    """A checkpoint in 4 bits."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("saved")
    load(checkpoint, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fp8(checkpoint, tmp_path_factory):
    """An FP8 copy, one of whose layers has plain experts."""
    folder = tmp_path_factory.mktemp("fp8")
    kept = [r"re:model\.decoder\.layers\.1\.experts\.", r"re:.*(router|self_conditioning|vision).*", "lm_head"]
    load(checkpoint, config=FP8Config(ignore=kept), dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def stacked(block_size, dtype=torch.bfloat16, experts=5, hidden=42, size=11):
    """Experts of odd sizes, and their plain weights."""
    config = DiffusionGemmaTextConfig(hidden_size=hidden, moe_intermediate_size=size, num_experts=experts, top_k_experts=2)
    config._experts_implementation = "auto"
    plain = Experts(config).to(dtype).requires_grad_(False)
    torch.manual_seed(0)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    plain.gate_up_proj[0].zero_()
    packed = FourBitExperts(plain, dtype, block_size)
    for name in PLACES:
        numbers, scale = packed.quantized(getattr(plain, name))
        place = four_bit_experts.PACKED[name]
        packed.register_parameter(place, torch.nn.Parameter(numbers, requires_grad=False))
        packed.register_parameter(f"{place}_scale", torch.nn.Parameter(scale, requires_grad=False))
    return packed, plain


def routed(module, dtype=torch.bfloat16, chosen=(0, 3)):
    hidden = torch.randn(7, module.hidden_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    return hidden, torch.tensor([chosen]).repeat(7, 1), torch.full((7, len(chosen)), 0.5)


class Asked(list):
    """What was dequantised: names, first numbers and counts."""

    def __init__(self, monkeypatch):
        numbers = FourBitExperts.numbers
        monkeypatch.setattr(FourBitExperts, "numbers", lambda *asked: self.append(asked[1:]) or numbers(*asked))


# The numbers


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_numbers_are_bitsandbytes_to_the_last_bit(block_size, dtype, monkeypatch):
    """However a weight is cut: whole, by experts that end inside of a block, in few rows at a time."""
    monkeypatch.setattr(four_bit_experts, "AT_ONCE", 4096)
    packed, plain = stacked(block_size, dtype, experts=9)
    for name in PLACES:
        weight = getattr(plain, name)
        expected, state = kernels().quantize_4bit(weight.flatten(), blocksize=block_size, quant_type="nf4")
        for pieces in ([weight], weight, weight.flatten(0, 1).split(5)):
            numbers, scale = packed.quantized(pieces)
            assert torch.equal(numbers, expected) and torch.equal(scale, state.absmax)
        code = kernels().get_4bit_type("nf4", device="cpu")
        indices = torch.stack([expected >> 4, expected & 15], dim=1).flatten()[: weight.numel()].int()
        values = code[indices] * state.absmax.repeat_interleave(block_size)[: weight.numel()]
        whole = getattr(packed, name)
        assert torch.equal(whole, values.to(dtype).view(weight.shape))
        for expert in range(9):
            assert torch.equal(getattr(packed.one_by_one(), name)[expert], whole[expert])


@needs_bitsandbytes
@pytest.mark.parametrize(("hidden", "size", "experts"), [(7, 5, 3), (2, 1, 1), (64, 32, 2)])
def test_any_sizes_come_back(hidden, size, experts):
    """Also an odd count of numbers, and fewer than a block."""
    packed, _ = stacked(64, torch.float32, experts, hidden, size)
    for name in PLACES:
        assert torch.equal(torch.stack([getattr(packed.one_by_one(), name)[expert] for expert in range(experts)]), getattr(packed, name))


@needs_bitsandbytes
@pytest.mark.parametrize("block_size", [64, 4096])
@pytest.mark.parametrize("way", ["auto", "eager"])
def test_experts_with_tokens_alone_are_dequantised_each_by_itself(way, block_size, monkeypatch):
    """And computed as the whole stack would be, to the last bit. The choice of the way looks at no number."""
    packed, plain = stacked(block_size)
    for name in PLACES:
        getattr(plain, name).copy_(getattr(packed, name))
    packed.config._experts_implementation = way
    inputs, asked = routed(packed), Asked(monkeypatch)
    assert choose_experts(packed) == "eager" and asked == []
    found = packed(*inputs)
    counts = {name: plain.get_parameter(name)[0].numel() for name in PLACES}
    assert asked == [(name, expert * counts[name], counts[name]) for expert in (0, 3) for name in PLACES]
    assert torch.equal(found, eager_experts(plain, *inputs))


@needs_bitsandbytes
def test_elsewhere_than_on_a_cpu_the_choice_looks_at_no_number_either(monkeypatch):
    asked = Asked(monkeypatch)
    assert choose_experts(stacked(64)[0].to("meta")) == "grouped_mm" and asked == []


@needs_bitsandbytes
def test_hidden_states_get_their_gradients():
    packed, plain = stacked(64, torch.float32)
    for name in PLACES:
        getattr(plain, name).copy_(getattr(packed, name))
    gradients = []
    for module in (packed, plain, copy.copy(packed), copy.deepcopy(packed)):
        hidden, chosen, weights = routed(module, torch.float32)
        hidden.requires_grad_(), weights.requires_grad_()
        module.config._experts_implementation = "eager"
        module(hidden, chosen, weights).square().sum().backward()
        gradients.append((hidden.grad, weights.grad))
    for found in gradients[1:]:
        assert all(map(torch.equal, found, gradients[0]))


@needs_bitsandbytes
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "dense_mm"])
def test_every_experts_implementation_runs_on_them(oracle_checkpoint, implementation):
    model = load(oracle_checkpoint)
    model.set_experts_implementation(implementation)
    layer = model.model.decoder.layers[0].experts
    assert isinstance(layer, FourBitExperts)
    hidden, chosen, weights = routed(layer, torch.float32)
    expected = torch.zeros(7, 32)
    for expert in (0, 3):
        gate, up = (hidden @ layer.gate_up_proj[expert].T).chunk(2, dim=-1)
        expected += 0.5 * (layer.act_fn(gate) * up) @ layer.down_proj[expert].T
    with torch.no_grad():
        torch.testing.assert_close(layer(hidden, chosen, weights), expected, atol=1e-4, rtol=1e-4)
        assert model(tokens(1, 9), decoder_input_ids=tokens(1, 5)).logits.isfinite().all()


@needs_bitsandbytes
def test_compiled_they_are_one_graph(tmp_path):
    """The grouped product then. 1e-4: other sums."""
    packed, _ = stacked(64, torch.float32)
    inputs = routed(packed, torch.float32)
    torch.testing.assert_close(torch.compile(packed, fullgraph=True)(*inputs), packed(*inputs), atol=1e-4, rtol=1e-4)


# Quantised while loading


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_alone_are_in_four_bits(oracle_checkpoint, dtype):
    model = load(oracle_checkpoint, dtype=dtype)
    plain = ours().state_dict()
    experts = {name for name in plain if ".experts." in name}
    for name, tensor in model.state_dict().items():
        if ".experts." not in name:
            assert torch.equal(tensor, plain[name].to(dtype)), name
    assert {tensor.dtype for name, tensor in model.state_dict().items() if ".experts." in name} == {torch.uint8, torch.float32}
    for name in experts:
        module, _, weight = name.rpartition(".")
        got = getattr(model.get_submodule(module), weight)
        assert got.dtype == dtype and got.shape == plain[name].shape
        error = (got.float() - plain[name]).norm() / plain[name].norm()
        assert 0.02 < error < 0.12  # NF4 on normal numbers: 0.09


@needs_bitsandbytes
@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel, drop_in.DiffusionGemmaForBlockDiffusion])
@pytest.mark.parametrize("block_size", [64, 4096])
def test_from_fp8_it_is_what_the_dequantised_copy_gives(fp8, tmp_path, kind, block_size):
    """To the last bit, and saved it is the same checkpoint."""
    plain = kind.from_pretrained(fp8).dequantize()
    for module in plain.modules():
        if isinstance(module, Experts):  # those that the copy has unquantised lie matrix by matrix
            for name in PLACES:
                setattr(module, name, torch.nn.Parameter(torch.stack([weight.detach() for weight in getattr(module, name)])))
    plain.save_pretrained(tmp_path / "plain")
    config = FourBitConfig(block_size=block_size)
    expected, found = load(tmp_path / "plain", kind, config), load(fp8, kind, config)
    same_state(found, expected)
    assert len(experts_of(found)) == len(experts_of(expected)) and found.config.quantization_config.to_dict() == config.to_dict()
    for name, model in (("expected", expected), ("found", found)):
        model.save_pretrained(tmp_path / name)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "found"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@needs_bitsandbytes
def test_fp8_files_are_checked_before_anything_is_loaded(fp8, tmp_path):
    copied(fp8, tmp_path, lambda held: held.pop("model.decoder.layers.0.experts.2.up_proj.weight_scale"))
    with pytest.raises(ValueError, match=r"without model\.decoder\.layers\.0\.experts\.2\.up_proj\.weight_scale"):
        load(tmp_path)


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda held, name: held.update({name: held[name].T.contiguous()}),
            r"comes in 8 tensors of \(24, 32\) and \(32, 24\), expected 8 of \(24, 32\)",
        ),
        (lambda held, name: held.pop(name), r"gate_up_proj comes in 7 tensors of \(24, 32\), expected 8 of \(24, 32\)"),
        (lambda held, name: held[name].fill_(float("inf")), "gate_up_proj holds NaN or infinity"),
    ],
)
def test_plain_experts_of_an_fp8_copy_are_checked_too(fp8, tmp_path, change, match):
    copied(fp8, tmp_path, lambda held: change(held, "model.decoder.layers.1.experts.2.up_proj.weight"))
    with pytest.raises(ValueError, match=match):
        load(tmp_path)


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda held, name: held.update({name: held[name][:, :-1].clone()}),
            r"gate_up_proj comes in 1 tensors of \(4, 47, 32\), expected 1 of \(4, 48, 32\)",
        ),
        (lambda held, name: held[name].view(-1)[5:6].fill_(float("nan")), "gate_up_proj holds NaN or infinity, expected finite"),
        (lambda held, name: held.pop(name), "the checkpoint has no model.decoder.layers.1.experts.gate_up_proj"),
    ],
)
def test_weights_that_cannot_be_quantised_are_named(checkpoint, tmp_path, change, match):
    copied(checkpoint, tmp_path, lambda held: change(held, "model.decoder.layers.1.experts.gate_up_proj"))
    with pytest.raises(ValueError, match=match):
        load(tmp_path)


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("quantization", "match"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "is quantised by 'bitsandbytes'; expected none, or FP8: load it without"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "is quantised by 'compressed-tensors'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "is quantised by 'modelopt'"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "`quantization_config.*` is None; expected"),
    ],
)
def test_what_cannot_become_four_bits_is_refused(checkpoint, tmp_path, quantization, match):
    copied(checkpoint, tmp_path, config=lambda config: config.update(quantization_config=quantization))
    with pytest.raises(ValueError, match=match):
        load(tmp_path)


# Saved and loaded again


def copied(source, folder, change=lambda held: None, config=lambda config: None):
    """A copy of the checkpoint `source` with its tensors, or its config, changed."""
    held = load_file(source / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    told = json.loads((source / "config.json").read_text())
    config(told)
    (folder / "config.json").write_text(json.dumps(told))


@needs_bitsandbytes
@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel, drop_in.DiffusionGemmaForBlockDiffusion])
@pytest.mark.parametrize("settings", [{}, {"max_shard_size": "20KB"}, {"save_original_format": False}], ids=str)
def test_saved_it_loads_again_and_is_the_same(checkpoint, tmp_path, kind, settings, monkeypatch):
    """Nothing is quantised then, or dequantised. Twice round, and loaded with the config that it has anyway."""
    model = load(checkpoint, kind, FourBitConfig(block_size=128), dtype=torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "first", **settings)
    asked = Asked(monkeypatch)
    monkeypatch.setattr(four_bit_experts, "quantize", None)
    again = kind.from_pretrained(tmp_path / "first").eval()
    same_state(again, model)
    again.save_pretrained(tmp_path / "second", **settings)
    for config in (FourBitConfig(block_size=128), FourBitConfig(block_size=128).to_dict()):
        third = load(tmp_path / "second", kind, config, dtype="auto").eval()
        same_state(third, model)
    assert asked == [] and third.dtype == torch.bfloat16 and third.config.quantization_config.block_size == 128
    for first in (tmp_path / "first").iterdir():
        assert first.read_bytes() == (tmp_path / "second" / first.name).read_bytes(), first.name
    if kind is AutoModelForCausalLM:
        inputs = prompts(1, 9)[0]
        assert torch.equal(again(inputs, decoder_input_ids=inputs).logits, model(inputs, decoder_input_ids=inputs).logits)


@needs_bitsandbytes
def test_the_config_says_what_it_is_and_transformers_refuses_it(saved):
    """Its class passes over a quantisation that it does not know; experts would be made up if their names were not its."""
    told = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert told == {"quant_method": "diffusiongemma-nf4", "block_size": 64}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        DiffusionGemmaForBlockDiffusion.from_pretrained(saved)


LOADS = """
import sys
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
held = load_file(sys.argv[1] + "/model.safetensors")
packed = model.get_parameter("model.decoder.layers.1.experts.gate_up_packed")
assert packed.equal(held["model.decoder.layers.1.experts.gate_up_proj"]) and "modeling_diffusiongemma" not in sys.modules
print(type(model.hf_quantizer).__module__)
"""


@needs_bitsandbytes
def test_a_repository_with_its_code_loads_without_the_package(saved, tmp_path):
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(tmp_path / "code", remote_code=True)
    command = [sys.executable, "-c", LOADS, str(tmp_path / "code")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("transformers_modules.") and done.stdout.strip().endswith("modeling_weights_four_bit")


@needs_bitsandbytes
def test_another_block_size_and_another_quantisation_are_refused(saved):
    for config, told in ((FourBitConfig(block_size=256), "FourBitConfig of `block_size` 256"), (FP8Config(), "FP8Config")):
        with pytest.raises(
            ValueError, match=f"is {told}, and the checkpoint's experts are in 4 bits already, in blocks of 64; expected none"
        ):
            load(saved, config=config)


NAME = "model.decoder.layers.1.experts.gate_up"


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("change", "config", "match"),
    [
        (lambda held: held.pop(f"{NAME}_scale"), {}, rf"holds {NAME}_scale; expected all experts in 4 bits"),
        (lambda held: held.pop(f"{NAME}_proj"), {}, rf"holds {NAME}_proj; expected all experts in 4 bits"),
        (lambda held: held.update({f"{NAME}_proj": held[f"{NAME}_proj"][1:].clone()}), {}, r"U8 \(3071, 1\); expected U8 \(3072, 1\)"),
        (lambda held: held.update({f"{NAME}_scale": held[f"{NAME}_scale"].half()}), {}, r"is F16 \(96,\); expected F32 \(96,\)"),
        (lambda held: held[f"{NAME}_scale"][3:4].fill_(float("inf")), {}, "gate_up_packed_scale holds NaN or infinity"),
        (lambda held: None, {"block_size": 128}, r"is F32 \(96,\); expected F32 \(48,\), in blocks of 128 \(`block_size`\)"),
        (lambda held: None, {"block_size": 63}, "`block_size` is 63; expected one of"),
        (lambda held: None, {"block_size": None}, "`block_size` is None; expected one of"),
    ],
)  # fmt: skip
def test_bad_files_are_named(saved, tmp_path, change, config, match):
    copied(saved, tmp_path, change, lambda told: told["quantization_config"].update(config))
    with pytest.raises(ValueError, match=match):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@needs_bitsandbytes
def test_a_config_without_block_size_is_refused(saved, tmp_path):
    copied(saved, tmp_path, config=lambda told: told["quantization_config"].pop("block_size"))
    with pytest.raises(ValueError, match="expected a 'block_size'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@needs_bitsandbytes
@pytest.mark.parametrize("source", ["checkpoint", "saved", "fp8"])
def test_offloaded_to_disk_it_computes_the_same(source, request, tmp_path):
    folder = request.getfixturevalue(source)
    settings = {} if source == "saved" else {"quantization_config": FourBitConfig()}
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **settings).eval()
    names = ("embed_tokens", "norm", "self_conditioning", "rotary", "layers.0")
    places = {f"model.decoder.{name}": "cpu" for name in names} | dict.fromkeys(("lm_head", "model.encoder"), "cpu")
    places |= dict.fromkeys(("model.decoder.layers.1", "model.decoder.layers.2"), "disk")
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path, dtype=torch.bfloat16, **settings
    ).eval()
    inputs = prompts(1, 9)[0]
    with torch.no_grad():
        assert torch.equal(model(inputs, decoder_input_ids=inputs).logits, whole(inputs, decoder_input_ids=inputs).logits)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", [AutoModelForCausalLM, drop_in.DiffusionGemmaForBlockDiffusion])
def test_dequantised_it_is_a_plain_model(saved, tmp_path, kind):
    model = kind.from_pretrained(saved).eval()
    weights = [getattr(module, name) for module in experts_of(model) for name in PLACES]
    plain = model.dequantize()
    found = [module for module in plain.modules() if isinstance(module, Experts)]
    assert experts_of(plain) == [] and not plain.is_quantized and not hasattr(plain.config, "quantization_config")
    assert all(torch.equal(getattr(module, name), weights.pop(0)) for module in found for name in PLACES)
    held = {getattr(module, name).data_ptr() for module in found for name in PLACES}
    assert len(held) == 2 * plain.config.text_config.num_hidden_layers  # twins share
    plain.save_pretrained(tmp_path)
    same_state(kind.from_pretrained(tmp_path), plain)
    assert DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_a_missing_library_is_named(oracle_checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="FourBitConfig needs bitsandbytes"):
        load(oracle_checkpoint)


@pytest.mark.parametrize("size", [0, 63, 32, "64"])
def test_block_size_is_one_of_bitsandbytes(size):
    with pytest.raises(ValueError, match="`block_size` is .*; expected one of"):
        FourBitConfig(block_size=size)
