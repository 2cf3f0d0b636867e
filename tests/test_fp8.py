"""FP8 modules, and FP8 checkpoints: loading the published layout, quantising on the way in, saving, and what is refused."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from make_fp8_checkpoint import write_fp8_checkpoint
from safetensors.torch import load_file, save_file
from tiny import build_oracle, ours, tokens
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertConfig, BertModel, core_model_loading
from transformers.quantizers import auto

from modeling_diffusiongemma import DiffusionGemmaBlockModel, DiffusionGemmaForMaskedBlockLM, FP8Config
from modeling_diffusiongemma.layers.experts import Experts
from modeling_diffusiongemma.weights.fp8 import FP8Experts, FP8Linear, scale_name
from modeling_diffusiongemma.weights.fp8_layout import default_ignore, fp8_modules, fp8_shapes, make_fp8, published_layout
from modeling_diffusiongemma.weights.fp8_math import E4M3, quantize_weight, reference_product

RELEASED = Path(__file__).parent / "data" / "released"
EXPERT = "model.decoder.layers.1.experts.2.up_proj"
LINEAR = "model.decoder.layers.3.self_attn.k_proj"


pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture(scope="module")
def model(published):
    """Loaded from it; not to be changed."""
    return DiffusionGemmaForMaskedBlockLM.from_pretrained(published)


def same_bits(one, other):
    """Equal names, dtypes and bits: NaN and minus zero included."""
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape, name
        assert torch.equal(one[name].contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8)), name


def logits(model):
    return model(tokens(2, 13), decoder_input_ids=tokens(2, 10, seed=1)).logits


def random_experts(experts=5, hidden=20, intermediate=12):
    config = AutoConfig.from_pretrained(RELEASED).text_config
    config.num_experts, config.hidden_size, config.moe_intermediate_size = experts, hidden, intermediate
    plain = Experts(config)
    generator = torch.Generator().manual_seed(0)
    for weight in plain.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    quantized = FP8Experts(plain)
    for name in ("gate_up_proj", "down_proj"):
        weight, scale = quantize_weight(getattr(plain, name))
        getattr(quantized, name).copy_(weight)
        getattr(quantized, scale_name(name)).copy_(scale)
    return plain, quantized


def routed(kind, tokens, experts=5, active=2):
    """Chosen experts `(N, A)`: none but the first two, the last for one token, all for all."""
    generator = torch.Generator().manual_seed(1)
    if kind == "two":
        return torch.tensor([0, 1]).repeat(tokens, 1)
    if kind == "one token":
        chosen = torch.tensor([1, 2]).repeat(tokens, 1)
        chosen[tokens // 2, 0] = experts - 1
        return chosen
    return torch.rand(tokens, experts, generator=generator).topk(active).indices


def test_gate_that_is_put_in_counts():
    """As in other implementations; it was passed by, silently."""
    _, experts = random_experts()
    hidden, chosen, weights = torch.ones(7, 20), routed("random", 7), torch.full((7, 2), 0.5)
    plain = experts(hidden, chosen, weights)
    experts._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[1]
    assert (experts(hidden, chosen, weights) - plain).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["two", "one token", "random"])
@pytest.mark.parametrize("tokens", [1, 7, 256])
def test_experts_equal_the_reference_expert_by_expert(kind, tokens):
    _, experts = random_experts()
    hidden = torch.randn(tokens, 20, generator=torch.Generator().manual_seed(2))
    hidden[0] = 0
    chosen = routed(kind, tokens)
    weights = torch.rand(tokens, 2, generator=torch.Generator().manual_seed(3))
    expected = torch.zeros_like(hidden)
    for token in range(tokens):
        for slot in range(2):
            expert = chosen[token, slot]
            both = reference_product(hidden[None, token], experts.gate_up_proj[expert], experts.gate_up_scale[expert])
            gate, up = both.chunk(2, dim=-1)
            inner = experts.act_fn(gate) * up
            partial = reference_product(inner, experts.down_proj[expert], experts.down_scale[expert])
            expected[token] += partial[0] * weights[token, slot]
    got = experts(hidden, chosen, weights)
    # The second product rounds what the first one sums: where a sum falls between two e4m3 numbers, its last bit decides.
    off = ((got - expected).abs() > 1e-3 * expected.abs().max()).float().mean()
    assert off < 0.02 and (got - expected).norm() <= 0.01 * expected.norm()


def test_experts_stay_close_to_those_in_float32():
    plain, experts = random_experts(hidden=64, intermediate=48)
    hidden = torch.randn(100, 64, generator=torch.Generator().manual_seed(2))
    chosen, weights = routed("random", 100), torch.full((100, 2), 0.5)
    expected = plain(hidden, chosen, weights)
    assert (experts(hidden, chosen, weights) - expected).norm() < 0.08 * expected.norm()


def test_linear_layer_takes_any_number_of_dimensions():
    layer = FP8Linear(20, 12)
    weight, scale = quantize_weight(torch.randn(12, 20, generator=torch.Generator().manual_seed(0)))
    layer.weight.copy_(weight)
    layer.weight_scale.copy_(scale)
    inputs = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(1))
    expected = reference_product(inputs.view(6, 20), weight, scale).view(2, 3, 12)
    torch.testing.assert_close(layer(inputs), expected)
    assert layer(inputs[:0]).shape == (0, 3, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_model_leaves_fp8_weights_and_scales(published, dtype):
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(published).to(dtype)
    layer = model.model.decoder.layers[0]
    assert layer.input_layernorm.weight.dtype == dtype
    assert layer.experts.gate_up_proj.dtype == layer.self_attn.q_proj.weight.dtype == E4M3
    assert layer.experts.down_scale.dtype == layer.self_attn.q_proj.weight_scale.dtype == torch.float32
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("shards", [1, 3])
def test_published_layout_loads_bit_for_bit(shards, tmp_path):
    """Experts of one layer lie in several files."""
    write_fp8_checkpoint(build_oracle(), tmp_path, shards)
    model, info = DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    stored = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    state = model.state_dict()
    for layer in range(4):
        for expert in range(4):
            prefix = f"model.decoder.layers.{layer}.experts"
            for part, rows in (("gate", slice(0, 24)), ("up", slice(24, 48))):
                weight, scale = (stored[f"{prefix}.{expert}.{part}_proj.{suffix}"] for suffix in ("weight", "weight_scale"))
                assert torch.equal(state[f"{prefix}.gate_up_proj"][expert, rows].view(torch.uint8), weight.view(torch.uint8))
                assert torch.equal(state[f"{prefix}.gate_up_scale"][expert, rows], scale.float())
            down = stored[f"{prefix}.{expert}.down_proj.weight"]
            assert torch.equal(state[f"{prefix}.down_proj"][expert].view(torch.uint8), down.view(torch.uint8))
    assert torch.equal(state[f"{LINEAR}.weight"].view(torch.uint8), stored[f"{LINEAR}.weight"].view(torch.uint8))


def test_attention_dense_mlp_and_experts_are_fp8_and_nothing_else(model):
    kinds = {name.split(".", 4)[-1] for name in fp8_modules(model)}
    attention = {f"self_attn.{part}_proj" for part in "qkvo"}
    assert kinds == attention | {f"mlp.{part}_proj" for part in ("gate", "up", "down")} | {"experts"}
    eight_bits = {name for name, parameter in model.named_parameters() if parameter.dtype == E4M3}
    assert len(eight_bits) == 4 * (6 + 2) + 2  # v_proj on the two sliding layers
    plain = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert {name for name in plain if "decoder.layers" in name} == {f"model.decoder.layers.{i}.router.proj" for i in range(4)}


def test_auto_class_loads_without_an_argument(published, model):
    loaded = AutoModelForCausalLM.from_pretrained(published)
    assert type(loaded) is DiffusionGemmaForMaskedBlockLM and torch.equal(logits(loaded), logits(model))
    assert isinstance(AutoModel.from_pretrained(published), DiffusionGemmaBlockModel)


def test_fields_of_the_config_are_still_arguments(published):
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(published, canvas_length=6, attn_implementation="eager")
    assert model.config.canvas_length == 6 and model.config._attn_implementation == "eager"
    nested = DiffusionGemmaForMaskedBlockLM.from_pretrained(published, text_config={"sliding_window": 5}).config.text_config
    assert nested.sliding_window == 5 and nested.hidden_size == model.config.text_config.hidden_size
    config = AutoConfig.from_pretrained(published)
    DiffusionGemmaForMaskedBlockLM.from_pretrained(published, config=config)
    assert config.quantization_config["quant_method"] == "compressed-tensors"  # the caller's own is left alone


def test_logits_follow_those_of_the_dequantised_model(published):
    """Rounding the activations is all that differs: with experts chosen alike, a few per cent."""
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(published, dtype=torch.float32)
    layer = model.model.decoder.layers[0]
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    got = [layer.mlp(hidden), layer.self_attn.q_proj(hidden)]
    plain = DiffusionGemmaForMaskedBlockLM.from_pretrained(published, dtype=torch.float32).dequantize()
    assert fp8_modules(plain) == {} and not hasattr(plain, "hf_quantizer")
    layer = plain.model.decoder.layers[0]
    for one, expected in zip(got, [layer.mlp(hidden), layer.self_attn.q_proj(hidden)], strict=True):
        assert 0 < (one - expected).norm() < 0.08 * expected.norm()


def test_dequantised_model_saves_the_released_layout(published, tmp_path):
    DiffusionGemmaForMaskedBlockLM.from_pretrained(published).dequantize().save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert load_file(tmp_path / "model.safetensors").keys() == {n for n in ours().state_dict() if n != "lm_head.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_on_the_way_in_makes_the_published_layout(dtype, tmp_path):
    """Bit for bit what the script writes that shares no code with the package."""
    oracle = build_oracle().to(dtype)
    oracle.save_pretrained(tmp_path / "plain")
    write_fp8_checkpoint(oracle, tmp_path / "expected")
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path / "plain", quantization_config=FP8Config())
    model.save_pretrained(tmp_path / "fp8")
    expected, got = (load_file(tmp_path / folder / "model.safetensors") for folder in ("expected", "fp8"))
    same_bits({name: t if t.dtype == E4M3 else t.to(torch.bfloat16) for name, t in got.items()}, expected)
    expected, got = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("expected", "fp8"))
    for config in (expected, got):
        config["quantization_config"]["ignore"].sort()
    assert got["quantization_config"] == expected["quantization_config"]
    assert got["architectures"] == ["DiffusionGemmaForBlockDiffusion"]


@pytest.mark.parametrize(
    "config", [FP8Config(), FP8Config(ignore=[]), FP8Config(ignore=["lm_head"])], ids=lambda config: str(config.ignore)
)
def test_config_as_a_mapping_quantises_as_the_config(config, oracle_checkpoint):
    """The mapping has the published name of the method, for which transformers asks for compressed-tensors."""
    models = [
        DiffusionGemmaForMaskedBlockLM.from_pretrained(oracle_checkpoint, quantization_config=given)
        for given in (FP8Config(config.ignore), FP8Config(config.ignore).to_dict())
    ]
    expected, got = (model.config.quantization_config.to_dict() for model in models)
    assert got == expected and [type(module) for module in models[1].modules()] == [type(module) for module in models[0].modules()]
    with pytest.raises(ValueError, match="kv_cache_scheme"):
        wrong = {**FP8Config().to_dict(), "kv_cache_scheme": "x"}
        DiffusionGemmaForMaskedBlockLM.from_pretrained(oracle_checkpoint, quantization_config=wrong)


@pytest.mark.parametrize("shard_size", ["50GB", "15KB"])
def test_saving_round_trips_bit_for_bit(shard_size, published, tmp_path):
    DiffusionGemmaForMaskedBlockLM.from_pretrained(published).save_pretrained(tmp_path, max_shard_size=shard_size)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (shard_size == "50GB")
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    same_bits(stored, load_file(published / "model.safetensors"))
    if len(files) > 1:
        assert max(file.stat().st_size for file in files) < 30_000  # header included: no layer's experts all in one file
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert torch.equal(
        logits(DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path)),
        logits(DiffusionGemmaForMaskedBlockLM.from_pretrained(published)),
    )


def test_model_without_its_head_round_trips_too(published, tmp_path):
    DiffusionGemmaBlockModel.from_pretrained(published).save_pretrained(tmp_path)
    model, info = DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(model), logits(DiffusionGemmaForMaskedBlockLM.from_pretrained(published)))


def test_generation_runs_in_fp8(model):
    output = model.generate(tokens(2, 9), max_new_tokens=8, max_denoising_steps=3, seed=0)
    assert output.shape == (2, 17) and torch.equal(output, model.generate(tokens(2, 9), max_new_tokens=8, max_denoising_steps=3, seed=0))


def released_on_meta():
    with torch.device("meta"):
        model = DiffusionGemmaForMaskedBlockLM(AutoConfig.from_pretrained(RELEASED)).to(torch.bfloat16)
    ignore = default_ignore(model)
    make_fp8(model, ignore)
    return model, ignore


def test_released_architecture_has_the_published_counts():
    """The facts of RedHatAI's copy: 255 names left out, 24,232 tensors, 27,197,665,496 bytes; 51.6 GB in bfloat16."""
    model, ignore = released_on_meta()
    assert len(ignore) == len(set(ignore)) == 255
    layout = published_layout(model)
    assert len(layout) == 24_232
    sizes = {None: 2, "BF16": 2, "F8_E4M3": 1}
    total = 0
    for dtype, shape in layout.values():
        total += sizes[dtype] * torch.Size(shape).numel()
    assert total == 27_197_665_496
    assert layout["model.decoder.layers.29.experts.127.down_proj.weight"] == ("F8_E4M3", (2816, 704))
    assert layout["model.decoder.layers.0.experts.0.gate_proj.weight_scale"] == ("BF16", (704, 1))
    assert layout["model.decoder.layers.5.self_attn.o_proj.weight_scale"] == ("BF16", (2816, 1))
    assert all(rows % 16 == columns % 16 == 0 for rows, columns in fp8_shapes(model).values())  # what torch's kernels need


def test_compressed_tensors_reads_what_is_written(published):
    """The library behind the format, and behind vLLM's reader of it."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = DiffusionGemmaForMaskedBlockLM.from_pretrained(published).config.quantization_config.to_dict()
    parsed = quantization.QuantizationConfig.model_validate(config)
    weights = parsed.config_groups["group_0"].weights
    assert parsed.format == "float-quantized" and weights.num_bits == 8 and weights.strategy == "channel"
    assert parsed.ignore == config["ignore"]


def test_ignored_layers_stay_as_they_are(tmp_path, oracle_checkpoint):
    ignore = [r"re:.*layers\.[02]\.experts\..*", "re:.*router", "re:model.encoder", "re:.*self_conditioning", LINEAR]
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(oracle_checkpoint, quantization_config=FP8Config(ignore=ignore))
    layers = model.model.decoder.layers
    assert [type(layer.experts) for layer in layers] == [Experts, FP8Experts, Experts, FP8Experts]
    assert type(layers[3].self_attn.k_proj) is nn.Linear and type(layers[3].self_attn.q_proj) is FP8Linear
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {n: shape for n, (_, shape) in published_layout(model).items()}
    assert stored["model.decoder.layers.0.experts.3.up_proj.weight"].dtype == torch.float32
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_ignoring_one_expert_of_a_layer_is_refused(oracle_checkpoint):
    with pytest.raises(ValueError, match=r"`ignore` names model\.decoder\.layers\.1\.experts\.2\.up_proj and not every expert"):
        DiffusionGemmaForMaskedBlockLM.from_pretrained(oracle_checkpoint, quantization_config=FP8Config(ignore=[EXPERT]))


@pytest.mark.parametrize("ignore", ["lm_head", [1], ("lm_head",)])
def test_ignore_must_be_a_list_of_names(ignore):
    with pytest.raises(ValueError, match="`ignore` is .*; expected a list of module names"):
        FP8Config(ignore=ignore)


def test_other_models_keep_compressed_tensors(tmp_path):
    """Ours answers to a name of its own and only while our classes load."""
    assert auto.AUTO_QUANTIZER_MAPPING["compressed-tensors"].__module__.startswith("transformers.")
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"].__module__.startswith("transformers.")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="FP8Config and the model BertModel; expected a DiffusionGemma"):
        BertModel.from_pretrained(tmp_path, quantization_config=FP8Config())


@pytest.fixture
def damaged(published, tmp_path):
    """A copy of the published checkpoint in which a function changes tensors and configuration."""

    def make(change=lambda tensors: None, configure=lambda quantization: None):
        folder = tmp_path / "damaged"
        shutil.copytree(published, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        configure(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def refused(folder, match, error=ValueError):
    with pytest.raises(error, match=match):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.skipif(
    "param_needs_quantization" not in inspect.getsource(core_model_loading.set_param_for_module),
    reason="this transformers compares no shapes in a quantised checkpoint",
)
def test_checkpoint_is_read_once_also_where_a_shape_does_not_fit(damaged, monkeypatch):
    """transformers names no tensor in its error; once the weights were loaded a second time to learn which they are."""
    model_class, read = DiffusionGemmaForMaskedBlockLM, []

    def count(owner, name):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: read.append(name) or call(*args))

    count(model_class.config_class, "_dict_from_json_file")
    count(model_class, "_load_pretrained_model")
    name = "model.decoder.norm.weight"
    folder = damaged(lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(ValueError, match=rf"cannot load .*damaged: {name} has shape \(31,\), expected \(32,\)$"):
        model_class.from_pretrained(folder)
    assert sorted(read) == ["_dict_from_json_file", "_load_pretrained_model"]
    model, info = model_class.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True)
    assert [one[0] for one in info["mismatched_keys"]] == [name] and model.get_parameter(name).shape == (32,)


@pytest.mark.parametrize("layer", [EXPERT, LINEAR])
def test_missing_scale_is_named_with_its_file(damaged, layer):
    folder = damaged(lambda tensors: tensors.pop(f"{layer}.weight_scale"))
    refused(folder, rf"model\.safetensors holds {layer}\.weight without {layer}\.weight_scale")


@pytest.mark.parametrize("layer", [EXPERT, LINEAR])
def test_missing_weight_is_named(damaged, layer):
    refused(damaged(lambda tensors: tensors.pop(f"{layer}.weight")), rf"none of 1 files holds {layer}\.weight")


@pytest.mark.parametrize("layer", [EXPERT, LINEAR])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_that_is_no_positive_number_is_named(damaged, layer, value):
    def change(tensors):
        tensors[f"{layer}.weight_scale"][3] = value

    refused(damaged(change), rf"{layer}\.weight_scale in .*model\.safetensors is {value} in row 3; expected positive finite")


def test_scale_of_another_shape_is_named(damaged):
    """One scale a tensor is another strategy than the config says."""
    name = f"{EXPERT}.weight_scale"
    refused(damaged(lambda tensors: tensors.update({name: tensors[name][:1]})), rf"{name} in .* is BF16 \(1, 1\); expected .*\(24, 1\)")


def test_weight_that_is_not_fp8_is_named(damaged):
    name = f"{LINEAR}.weight"
    refused(damaged(lambda tensors: tensors.update({name: tensors[name].float()})), rf"{name} in .* is F32 .*; expected F8_E4M3")


def test_fp8_weight_of_an_ignored_layer_is_named(damaged):
    """Loaded into a plain layer it would be numbers without their scales."""
    refused(damaged(configure=lambda quantization: quantization["ignore"].append(LINEAR)), rf"{LINEAR}\.weight in .* is F8_E4M3")


@pytest.mark.parametrize("cut", [1, 4000])
def test_half_written_shard_is_an_oserror_that_names_it(damaged, cut):
    folder = damaged()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    refused(folder, r"model\.safetensors", OSError)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("format", "pack-quantized", r"\['format'\]` is 'pack-quantized'; expected 'float-quantized'"),
        ("quantization_status", "frozen", r"\['quantization_status'\]` is 'frozen'"),
        ("kv_cache_scheme", {"num_bits": 8}, r"\['kv_cache_scheme'\]` is \{'num_bits': 8\}; expected None"),
        ("config_groups", {}, r"\['config_groups'\]` holds \[\]; expected one group"),
        ("ignore", None, r"\['ignore'\]` is None; expected a list"),
    ],
)
def test_unknown_scheme_is_refused_by_name(damaged, field, value, match):
    refused(damaged(configure=lambda quantization: quantization.update({field: value})), match)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [("weights", "strategy", "tensor"), ("weights", "num_bits", 4), ("weights", "type", "int"), ("input_activations", "dynamic", False)],
)
def test_unknown_strategy_is_refused_by_name(damaged, part, field, value):
    def configure(quantization):
        quantization["config_groups"]["group_0"][part][field] = value

    refused(damaged(configure=configure), rf"\['group_0'\]\['{part}'\]\['{field}'\]` is {value!r}; expected")


def test_weight_only_scheme_is_refused(damaged):
    refused(damaged(configure=lambda q: q["config_groups"]["group_0"].update(input_activations=None)), "input_activations'\\]` is None")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_cannot_be_quantised_is_named(oracle_checkpoint, tmp_path, value):
    folder = shutil.copytree(oracle_checkpoint, tmp_path / "plain")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.decoder.layers.1.experts.down_proj"][3, 2, 1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot quantise .*plain: model\.decoder\.layers\.1\.experts\.down_proj holds NaN or infinity"):
        DiffusionGemmaForMaskedBlockLM.from_pretrained(folder, quantization_config=FP8Config())


def test_missing_weight_is_not_made_up_when_quantising(oracle_checkpoint, tmp_path):
    folder = shutil.copytree(oracle_checkpoint, tmp_path / "plain")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.decoder.layers.1.experts.down_proj"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the checkpoint has no model\.decoder\.layers\.1\.experts\.down_proj"):
        DiffusionGemmaForMaskedBlockLM.from_pretrained(folder, quantization_config=FP8Config())
