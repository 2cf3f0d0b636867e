"""What is saved is a whole checkpoint, and what is loaded is the checkpoint that was saved: everything else is refused by name.

Each of these was taken without an error, and gave other answers than the model that was saved.
"""

import json
import re

import pytest
import torch
from accelerate import Accelerator, load_checkpoint_in_model
from safetensors.torch import load_file, load_model, save_file, save_model
from small_models import CANVAS, prompts, small_model
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.parametrize import remove_parametrizations
from transformers import DiffusionGemmaForBlockDiffusion

from modeling_diffusiongemma import DiffusionGemmaBlockModel, DiffusionGemmaForMaskedBlockLM, FP8Config, drop_in
from modeling_diffusiongemma.weights.loading import damaged_files

QUERIES = "model.decoder.layers.1.self_attn.q_proj"
IN_PROMPT_PASS = "model.encoder.language_model."


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=prompts(2, 9)[0], decoder_input_ids=prompts(2, CANVAS, seed=1)[0]).logits


class Wrapped(torch.nn.Module):
    """What scripts put around a layer to train less than all of it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.delta = base, torch.nn.Parameter(torch.ones_like(base.weight))

    def forward(self, hidden_states):
        return self.base(hidden_states) + hidden_states @ self.delta.T


def wrap(model):
    model.get_submodule("model.decoder.layers.1.self_attn").q_proj = Wrapped(model.get_submodule(QUERIES))


def compile_layer(model):
    model.model.decoder.layers[1] = torch.compile(model.model.decoder.layers[1], backend="eager")


def adapt(model):
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)


def add_bias(model):
    """Under a name of its own, which nothing reads when it is loaded."""
    head = torch.nn.Linear(32, 100, dtype=torch.float32, device="cpu")
    head.weight = model.lm_head.weight
    model.set_output_embeddings(head)


REWRITTEN = {
    "weight norm": (lambda model: weight_norm(model.get_submodule(QUERIES)), rf"{QUERIES}\.weight"),
    "spectral norm": (lambda model: spectral_norm(model.get_submodule(QUERIES)), rf"{QUERIES}\.weight"),
    "pruned": (lambda model: prune.l1_unstructured(model.get_submodule(QUERIES), "weight", 0.5), rf"{QUERIES}\.weight .*weight_mask"),
    "pruned experts": (lambda model: prune.l1_unstructured(model.model.decoder.layers[0].experts, "down_proj", 0.5), "experts.down_proj"),
    "wrapped": (wrap, rf"lacks {QUERIES}\.weight \(there is {QUERIES}\.base\.weight\)"),
    "compiled layer": (compile_layer, r"model\.decoder\.layers\.1\..* and 20 more"),
    "bias": (add_bias, "lm_head.bias is to be saved, and a model of this config is loaded without it"),
    "unscaled embedding": (
        lambda model: model.set_input_embeddings(torch.nn.Embedding(100, 32)),
        "is a torch.nn.*Embedding, and its weight",
    ),
    "adapters by hand": (adapt, "is wrapped by peft"),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_model_whose_weights_have_other_names_is_not_saved(name, tmp_path):
    """The file loaded, with random numbers in place of what had another name."""
    rewrite, named = REWRITTEN[name]
    model = small_model()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    rewrite(model)
    with pytest.raises(ValueError, match=named):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=named):
        model.push_to_hub("nobody/nothing")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_is_taken_back_is_saved(tmp_path):
    for place, (rewrite, undo) in enumerate(
        (
            (REWRITTEN["weight norm"][0], lambda module: remove_parametrizations(module, "weight")),
            (REWRITTEN["pruned"][0], lambda module: prune.remove(module, "weight")),
        )
    ):
        model = small_model()
        rewrite(model)
        expected = logits(model)
        undo(model.get_submodule(QUERIES))
        model.save_pretrained(tmp_path / str(place))
        assert torch.equal(logits(DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path / str(place))), expected)


def test_adapters_around_quantised_weights_are_not_saved_as_a_model(tmp_path):
    small_model().save_pretrained(tmp_path / "plain")
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path / "plain", quantization_config=FP8Config())
    adapt(model)
    with pytest.raises(ValueError, match="is wrapped by peft"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_state_dict_of_two_weights_for_head_and_embedding_is_refused():
    """The last of the two counted for both, as where the weights of models are averaged and only one of them is told."""
    model, expected = small_model(), logits(small_model())
    one = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    two = {**one, "lm_head.weight": 2 * one["lm_head.weight"]}
    with pytest.raises(ValueError, match=r"lm_head\.weight is not model\.decoder\.embed_tokens\.weight, and the model holds one weight"):
        model.load_state_dict(two)
    assert torch.equal(logits(model), expected)
    model.load_state_dict(two, assign=True)
    assert torch.equal(model.lm_head.weight, 2 * model.model.decoder.embed_tokens.weight)
    other = small_model(1)
    other.load_state_dict(one)
    assert torch.equal(logits(other), expected)


def test_checkpoint_that_accelerate_loads_fills_head_and_embedding(tmp_path):
    """It adds the head that the file lacks from the model itself."""
    small_model().save_pretrained(tmp_path)
    model = small_model(1)
    load_checkpoint_in_model(model, tmp_path)
    assert torch.equal(logits(model), logits(small_model()))


def test_state_dict_that_is_no_whole_model_is_not_saved(tmp_path):
    model = small_model()
    some = {name: tensor for name, tensor in model.state_dict().items() if name != f"{QUERIES}.weight"}
    with pytest.raises(ValueError, match=rf"lacks {QUERIES}\.weight;"):
        model.save_pretrained(tmp_path, state_dict=some)
    del some["lm_head.weight"]  # the embedding's
    with_all = {**some, f"{QUERIES}.weight": model.get_submodule(QUERIES).weight}
    model.save_pretrained(tmp_path, state_dict=with_all)
    assert torch.equal(logits(DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path)), logits(model))


def test_models_of_every_class_are_whole_and_random_numbers_stay(tmp_path):
    """The expected names are those of a model on the meta device, which must draw nothing."""

    class Derived(DiffusionGemmaForMaskedBlockLM):
        def __init__(self, config, size):
            super().__init__(config)
            self.value_head = torch.nn.Linear(config.text_config.hidden_size, size, dtype=torch.float32, device="cpu")

    config = small_model().config
    for place, model in enumerate((drop_in.DiffusionGemmaForBlockDiffusion(config), DiffusionGemmaBlockModel(config), Derived(config, 3))):
        torch.manual_seed(5)
        model.save_pretrained(tmp_path / str(place))
        drawn = torch.rand(1)
        torch.manual_seed(5)
        assert torch.equal(drawn, torch.rand(1))
    assert "value_head.weight" in load_file(tmp_path / "2" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a checkpoint in shards; its tensors; and its model's logits."""
    folder, model = tmp_path_factory.mktemp("whole"), small_model()
    model.save_pretrained(folder, max_shard_size="60KB")
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return folder, tensors, logits(model)


def write(whole, folder, **changed):
    """A checkpoint in one file, with other tensors; None leaves one out."""
    tensors = {**whole[1], **changed}
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((whole[0] / "config.json").read_bytes())
    return folder


def second_stack(tensors, factor):
    shared = (name for name in tensors if name.startswith("model.decoder.") and "self_conditioning" not in name)
    names = {name: name.replace("model.decoder.", IN_PROMPT_PASS) for name in shared if not name.endswith("layer_scalar")}
    return {name: tensors[original] * factor for original, name in names.items()}


def test_two_stacks_that_are_equal_are_one(whole, tmp_path):
    folder = write(whole, tmp_path, **second_stack(whole[1], 1))
    assert torch.equal(logits(DiffusionGemmaForMaskedBlockLM.from_pretrained(folder)), whole[2])


def test_weights_that_torchao_quantised_in_place_are_refused_by_name(whole, tmp_path):
    """`quantize_` on a loaded model (torchao 0.18): safetensors raised of a storage that is not there."""
    kind = type("Int8Tensor", (torch.Tensor,), {"__module__": "torchao.quantization"})
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(whole[0])
    module = model.get_submodule(QUERIES)
    module._parameters["weight"] = module.weight.detach().as_subclass(kind)
    with pytest.raises(ValueError, match=f"{QUERIES}.weight is a Int8Tensor of torchao.*TorchAoConfig"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def pickle(folder, shards=1):
    """A checkpoint's weights as torch's files, as older tools write them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    files = {f"pytorch_model-{place + 1:05d}-of-{shards:05d}.bin": names[place::shards] for place in range(shards)}
    for file, held in files.items():
        torch.save({name: tensors[name] for name in held}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_are_read_as_others_are(shards, whole, tmp_path):
    folder = pickle(write(whole, tmp_path, **second_stack(whole[1], 1)), shards)
    assert torch.equal(logits(DiffusionGemmaForMaskedBlockLM.from_pretrained(folder)), whole[2])


@pytest.mark.parametrize("form", ["file", "state dict", "pickled", "pickled shards"])
def test_two_stacks_that_differ_are_refused(form, whole, tmp_path):
    """transformers' class computes each pass by its own; here the prompt pass's was left out."""
    folder = write(whole, tmp_path, **second_stack(whole[1], 1.5))
    theirs = logits(DiffusionGemmaForBlockDiffusion.from_pretrained(folder))
    assert float((theirs - whole[2]).abs().max()) > 0.1
    given = [None] if form == "state dict" else [folder]
    settings = {"config": small_model().config, "state_dict": load_file(folder / "model.safetensors")} if form == "state dict" else {}
    if form.startswith("pickled"):
        pickle(folder, 3 if form.endswith("shards") else 1)
    for cls in (DiffusionGemmaForMaskedBlockLM, drop_in.DiffusionGemmaForBlockDiffusion):
        with pytest.raises(ValueError, match="second stack for the prompt pass: model.encoder.language_model.embed_tokens.weight is not"):
            cls.from_pretrained(*given, **settings)


def test_two_stacks_that_differ_are_no_state_dict_of_one(whole):
    """Into modules of either pass over the same weights: the last one counted in both, and nothing was missing."""
    model = DiffusionGemmaForMaskedBlockLM.from_pretrained(whole[0])
    model.model.pull_apart()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    assert torch.equal(logits(model), whole[2])
    name = f"{IN_PROMPT_PASS}layers.1.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=f"second stack for the prompt pass: {name} is not {QUERIES}"):
        model.load_state_dict(state | {name: state[name] * 2})
    assert torch.equal(logits(model), whole[2]), "nothing was loaded"


def test_names_of_a_state_dict_are_mapped_before_they_are_compared(whole):
    moved = second_stack(whole[1], 1.5)
    given = whole[1] | {name.replace("encoder.language_model.", "elsewhere."): tensor for name, tensor in moved.items()}
    with pytest.raises(ValueError, match="second stack for the prompt pass"):
        DiffusionGemmaForMaskedBlockLM.from_pretrained(
            None, config=small_model().config, state_dict=given, key_mapping={r"elsewhere\.": "encoder.language_model."}
        )


def test_stack_under_the_prompt_passes_names_is_refused_with_the_mapping_that_reads_it(whole, tmp_path):
    moved = second_stack(whole[1], 1)
    left_out = dict.fromkeys(name.replace(IN_PROMPT_PASS, "model.decoder.") for name in moved)
    folder = write(whole, tmp_path, **moved, **left_out)
    with pytest.raises(ValueError, match="key_mapping") as refused:
        DiffusionGemmaForMaskedBlockLM.from_pretrained(folder)
    pattern, target = re.search(r'key_mapping={r"(.*)": "(.*)"}', str(refused.value)).groups()
    assert torch.equal(logits(DiffusionGemmaForMaskedBlockLM.from_pretrained(folder, key_mapping={pattern: target})), whole[2])


NUMBERS = {
    "integers": ({f"{QUERIES}.weight": torch.int8}, {}, "as I8"),
    "complex": ({f"{QUERIES}.weight": torch.complex64}, {}, "as C64"),
    "FP8 with scales": ({f"{QUERIES}.weight": torch.float8_e4m3fn}, {f"{QUERIES}.weight_scale": torch.ones(64, 1)}, "weight_scale beside"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_need_a_quantiser_are_refused_without_one(name, whole, tmp_path):
    """They were cast as they are: without its scales an FP8 weight is another one."""
    cast, added, named = NUMBERS[name]
    folder = write(whole, tmp_path, **{each: whole[1][each].to(dtype) for each, dtype in cast.items()}, **added)
    with pytest.raises(ValueError, match=named):
        DiffusionGemmaForMaskedBlockLM.from_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"`state_dict` holds {QUERIES}"):
        DiffusionGemmaForMaskedBlockLM.from_pretrained(None, config=small_model().config, state_dict=state)
    with pytest.raises(ValueError, match=f"pytorch_model.bin holds {QUERIES}"):
        DiffusionGemmaForMaskedBlockLM.from_pretrained(pickle(folder))


def prefixed(tensors, prefix):
    """As state dicts of wrapped models have it."""
    return {name: None for name in tensors} | {prefix + name: tensor for name, tensor in tensors.items()}


SCALED = "model.decoder.layers.1.experts.down_proj"
UNREAD = {
    "of a wrapped model": (lambda tensors: prefixed(tensors, "module."), {}, "lacks (.*), and nothing reads module\\.\\1; expected"),
    "of a compiled model": (lambda tensors: prefixed(tensors, "_orig_mod."), {}, "lacks (.*), and nothing reads _orig_mod\\.\\1; expected"),
    "in another form": (
        lambda tensors: {f"{QUERIES}.weight": None, f"{QUERIES}.qweight": tensors[f"{QUERIES}.weight"].int()}, {},
        f"lacks {QUERIES}.weight, and nothing reads {QUERIES}.qweight",
    ),
    "experts in FP8 by blocks": (
        lambda tensors: {SCALED: tensors[SCALED].to(torch.float8_e4m3fn), f"{SCALED}_scale_inv": torch.ones(4, 1, 1)},
        {"quant_method": "fp8", "weight_block_size": [32, 32]},
        f"{SCALED}_scale_inv, which nothing reads, so that {SCALED} would go without its scale",
    ),
    "of another model": (lambda tensors: {name: None for name in tensors} | {"h.0.weight": torch.ones(3)}, {}, "no tensor of this model's"),
}  # fmt: skip


@pytest.mark.parametrize("cls", [DiffusionGemmaForMaskedBlockLM, drop_in.DiffusionGemmaForBlockDiffusion])
@pytest.mark.parametrize("name", UNREAD)
def test_tensors_that_nothing_reads_in_the_place_of_the_models_are_refused(name, cls, whole, tmp_path):
    """The model was made of random numbers, or of FP8 numbers without their scales (transformers' fine-grained FP8 dequantises no stacked
    experts), and a report in the log was all that said so."""
    change, quantization, said = UNREAD[name]
    changed = change(whole[1])
    folder = write(whole, tmp_path, **changed)
    if quantization:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(ValueError, match=said):
        cls.from_pretrained(folder)


def test_a_prefix_is_mapped_away(whole, tmp_path):
    folder = write(whole, tmp_path, **prefixed(whole[1], "module."))
    assert torch.equal(logits(DiffusionGemmaForMaskedBlockLM.from_pretrained(folder, key_mapping={r"^module\.": ""})), whole[2])


def test_pickled_file_that_was_cut_is_named(whole, tmp_path):
    folder = pickle(write(whole, tmp_path), 3)
    path = sorted(folder.glob("*.bin"))[1]
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(OSError, match=f"cannot load .*{path.name}"):
        DiffusionGemmaForMaskedBlockLM.from_pretrained(folder)


@pytest.mark.parametrize("cls", [DiffusionGemmaForMaskedBlockLM, drop_in.DiffusionGemmaForBlockDiffusion])
def test_safetensors_and_accelerate_save_and_load_a_model_by_themselves(cls, whole, tmp_path):
    """`load_model`, by which accelerate loads its state, asks what a load that is not strict left out: two stacks had left out nothing."""
    model = cls.from_pretrained(whole[0])
    save_model(model, str(tmp_path / "model.safetensors"))
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.save_state(tmp_path / "state")
    for load in (lambda: load_model(model, str(tmp_path / "model.safetensors")), lambda: accelerator.load_state(tmp_path / "state")):
        with torch.no_grad():
            for weight in prepared.parameters():
                weight.zero_()
        load()
        assert torch.equal(logits(model), whole[2])


def copied(whole, folder):
    folder.mkdir(exist_ok=True)
    for path in whole[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_tensor_that_two_shards_hold_is_refused(whole, tmp_path):
    """The one of the last shard counted, and the index was not asked."""
    first, *_, last = sorted(copied(whole, tmp_path).glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(last), name: tensor * 3}, last)
    with pytest.raises(ValueError, match=f"both hold {re.escape(name)}"):
        DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "3", "{}", '{"weight_map": {}}', '{"weight_map": {"lm_head.weight": 3}}'])
@pytest.mark.parametrize("subfolder", ["", "inside"])
def test_broken_index_is_named(text, subfolder, whole, tmp_path):
    folder = copied(whole, tmp_path / subfolder)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(OSError, match="model.safetensors.index.json is no index of weight files"):
        DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path, subfolder=subfolder)
    assert "is no index" in damaged_files(folder)[0]


@pytest.mark.parametrize("name", ["generation_config.json", "diffusion_generation_config.json"])
@pytest.mark.parametrize("text", ["{", "[3]"])
def test_broken_generation_config_is_named(name, text, whole, tmp_path):
    """It counted as one that is not there: ends of sequence and settings were the defaults."""
    (copied(whole, tmp_path) / name).write_text(text)
    with pytest.raises((OSError, TypeError, ValueError)):
        DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path)


def test_missing_generation_config_means_the_defaults(whole, tmp_path):
    (copied(whole, tmp_path) / "generation_config.json").unlink()
    assert json.loads((whole[0] / "generation_config.json").read_text())["max_denoising_steps"] == 48
    assert DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path).generation_config.max_denoising_steps is None
