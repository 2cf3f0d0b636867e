"""FP8 models on more than one device, offloaded, compiled, and under adapters: the same numbers as one plain model."""

import pytest
import torch
from accelerate import cpu_offload
from make_fp8_checkpoint import write_fp8_checkpoint
from safetensors.torch import load_file
from tiny import build_oracle, tokens

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM
from modeling_diffusiongemma.weights.fp8_layout import fp8_modules
from modeling_diffusiongemma.weights.fp8_math import E4M3

PARTS = ("model.decoder.embed_tokens", "model.decoder.norm", "model.decoder.self_conditioning", "model.encoder", "lm_head")


def load(folder, **settings):
    return DiffusionGemmaForMaskedBlockLM.from_pretrained(folder, dtype=torch.float32, **settings)


@torch.no_grad()
def logits(model):
    return model(tokens(2, 13), decoder_input_ids=tokens(2, 10, seed=1)).logits


@pytest.fixture(scope="module")
def expected(published):
    return logits(load(published))


def placed(layers):
    return dict.fromkeys(PARTS, "cpu") | {f"model.decoder.layers.{layer}": place for layer, place in enumerate(layers)}


@pytest.mark.parametrize("layers", [("cpu", "disk", "disk", "cpu"), ("disk",) * 4])
def test_two_places_give_the_numbers_of_one(published, expected, tmp_path, layers):
    """A CPU has no second device; what moves weights between devices is the same hooks that fetch them from a disk."""
    model = load(published, device_map=placed(layers), offload_folder=tmp_path)
    places = [layer.experts.gate_up_proj.device.type for layer in model.model.decoder.layers]
    assert places == ["meta" if place == "disk" else "cpu" for place in layers]
    assert torch.equal(logits(model), expected)


def test_automatic_device_map_counts_fp8_as_one_byte(published, expected, tmp_path):
    """60 kB hold the embedding and some; in bfloat16 sizes everything but it would move."""
    model = load(published, device_map="auto", max_memory={"cpu": 60_000}, offload_folder=tmp_path)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(logits(model), expected)


def test_offloading_layer_by_layer_gives_the_same_numbers(published, expected):
    model = load(published)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.decoder.layers[0].experts.gate_up_proj.is_meta
    assert torch.equal(logits(model), expected)


def test_offloaded_model_saves_the_published_layout(published, tmp_path):
    model = load(published, device_map=placed(("cpu", "disk", "disk", "cpu")), offload_folder=tmp_path / "offload")
    model.save_pretrained(tmp_path / "saved")
    got, stored = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", published))
    assert got.keys() == stored.keys()
    assert all(torch.equal(got[name].view(torch.uint8), stored[name].view(torch.uint8)) for name in stored if stored[name].dtype == E4M3)


@pytest.mark.slow
def test_compiled_canvas_pass_gives_the_same_numbers(tmp_path):
    write_fp8_checkpoint(build_oracle(num_hidden_layers=1, layer_types=["full_attention"]), tmp_path)
    model, canvas = load(tmp_path), tokens(2, 10, seed=1)
    with torch.no_grad():
        cache = model.prefill(tokens(2, 13)).past_key_values
        expected = model.denoise(canvas, cache).last_hidden_state
        # Captured and run as graphs; what inductor makes of them takes minutes on two cores and differs by 4e-7.
        got = torch.compile(model.denoise, backend="eager")(canvas, cache).last_hidden_state
    assert torch.equal(got, expected)


def test_gradients_reach_the_inputs_and_never_the_weights(published):
    model = load(published).train()
    for module in fp8_modules(model).values():
        assert not any(parameter.requires_grad for parameter in module.parameters())
    ids = tokens(2, 13)
    torch.manual_seed(0)
    model(input_ids=ids, labels=torch.where(torch.arange(13) > 6, ids, -100)).loss.backward()
    assert model.model.decoder.embed_tokens.weight.grad.isfinite().all()
    assert model.model.decoder.layers[0].input_layernorm.weight.grad.abs().sum() > 0  # through four layers of FP8


def test_adapters_train_on_top_of_frozen_fp8_weights(published, tmp_path):
    peft = pytest.importorskip("peft")
    base = load(published)
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "gate_proj", "down_proj"], exclude_modules=".*encoder.*")
    torch.manual_seed(0)
    model = peft.get_peft_model(base, settings).train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name and parameter.dtype == torch.float32 for name, parameter in trained.items())
    optimizer = torch.optim.Adam(trained.values(), lr=1e-2)
    ids, losses = tokens(4, 13), []
    for _ in range(12):
        torch.manual_seed(0)  # the same noise every time
        loss = model(input_ids=ids, labels=torch.where(torch.arange(13) > 6, ids, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.get_base_model().state_dict().items() if "lora_" not in name}
    assert all(torch.equal(after[name].view(torch.uint8), frozen[name].view(torch.uint8)) for name in frozen if frozen[name].dim())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(published), tmp_path)
    assert torch.equal(logits(again.eval()), logits(model.eval()))
