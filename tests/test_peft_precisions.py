"""One adapter of attention, MLP and experts in a model of each precision: used by both passes, switched, stacked, merged, saved, and loaded
into the models of the other precisions."""

import pytest
import torch
from small_models import prompts, small_config
from tiny import needs_bitsandbytes
from transformers import AutoModelForCausalLM

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, FourBitConfig, FP8Config, lora_targets

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of tied weights, of which the tests are about

KINDS = {"plain": lambda: None, "FP8": FP8Config, "4 bits": FourBitConfig}
EVERY = ["plain", "FP8", pytest.param("4 bits", marks=needs_bitsandbytes)]
FEW_BITS = EVERY[1:]
GREEDY = {"do_sample": False, "max_new_tokens": 20, "max_denoising_steps": 2, "eos_token_id": None, "pad_token_id": 0}


def load(small_checkpoint, kind, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(small_checkpoint, quantization_config=KINDS[kind](), dtype=dtype).eval()


def settings(model, **more):
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6, **lora_targets(model), **more})


def shake(model, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(small_checkpoint, kind, **more):
    model = load(small_checkpoint, kind)
    return shake(peft.get_peft_model(model, settings(model, **more))).eval()


@torch.no_grad()
def logits(model):
    """Of a canvas pass, and of a prompt pass."""
    base, ids = model.get_base_model() if hasattr(model, "get_base_model") else model, prompts(2, 13)[0]
    return model(input_ids=ids, decoder_input_ids=ids[:, :9]).logits, base.causal_logits(ids)


def close(got, expected, tolerance=1e-3):
    """1e-3: three layers of random weights, and sums of two products instead of one."""
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


def differ(got, expected):
    return all((one - other).abs().max() > 0.1 for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"rank_pattern": {"experts.gate_up_proj": 2}}], ids=str)
@pytest.mark.parametrize("kind", EVERY)
def test_one_adapter_serves_both_passes_and_can_be_switched_off(kind, more, small_checkpoint):
    model, before = adapted(small_checkpoint, kind, **more), logits(load(small_checkpoint, kind))
    assert differ(logits(model), before)
    ids = prompts(2, 9)[0]
    tokens = model.generate(input_ids=ids, **GREEDY)
    with model.disable_adapter():
        assert all(map(torch.equal, logits(model), before))
        without = model.generate(input_ids=ids, **GREEDY)
    assert tokens.shape == without.shape and not torch.equal(tokens, without)


@pytest.mark.parametrize("kind", EVERY)
def test_adapters_are_stacked_and_switched_from_call_to_call(kind, small_checkpoint):
    model = adapted(small_checkpoint, kind)
    model.add_adapter("other", settings(model.get_base_model(), r=2))
    shake(model, seed=6).eval()
    found = {}
    for names in ("default", "other", ["default", "other"], "default"):
        model.base_model.set_adapter(names)
        found.setdefault(str(names), []).append(logits(model))
    assert all(map(torch.equal, *found["default"]))
    assert differ(found["default"][0], found["other"][0]) and differ(found["['default', 'other']"][0], found["other"][0])
    with pytest.raises(ValueError, match="mixed adapter batches"):
        model(input_ids=prompts(2, 13)[0], decoder_input_ids=prompts(2, 9)[0], adapter_names=["default", "other"])


@pytest.mark.parametrize("to", EVERY)
@pytest.mark.parametrize("kind", EVERY)
def test_an_adapter_loads_onto_every_precision(kind, to, small_checkpoint, tmp_path):
    """Its weights to the last bit; and it does to a model what it does when its weights are copied there."""
    model = adapted(small_checkpoint, kind)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(load(small_checkpoint, to), tmp_path).eval()
    saved, found = (peft.get_peft_model_state_dict(each) for each in (model, loaded))
    assert saved.keys() == found.keys() and all(torch.equal(saved[key], found[key]) for key in saved)
    assert all(map(torch.equal, logits(loaded), logits(adapted(small_checkpoint, to))))


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}])
def test_merged_and_unmerged_are_equal(more, small_checkpoint, tmp_path):
    model = adapted(small_checkpoint, "plain", **more)
    expected = logits(model)
    model.merge_adapter()
    close(logits(model), expected)
    model.unmerge_adapter()
    close(logits(model), expected)
    merged = model.merge_and_unload()
    close(logits(merged), expected)
    merged.save_pretrained(tmp_path)
    close(logits(load(tmp_path, "plain")), expected)


@pytest.mark.parametrize("more", [{}, {"target_parameters": None}], ids=["experts", "attention and MLP"])
@pytest.mark.parametrize("kind", FEW_BITS)
def test_merging_into_few_bits_is_refused_by_name(kind, more, small_checkpoint):
    """What peft would write into is a copy in 4 bits, whose change is lost, and FP8 numbers without their scales. Before anything else is
    merged."""
    model = adapted(small_checkpoint, kind, **more)
    expected = logits(model)
    if kind == "4 bits" and more:  # attention and MLP are no fewer bits there
        close(logits(model.merge_and_unload()), expected)
        return
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(ValueError, match="`merge_adapter` or `merge_and_unload`.*without `quantization_config`"):
            merge()
    assert all(map(torch.equal, logits(model), expected))
    model.unload()
    assert all(map(torch.equal, logits(model.get_base_model()), logits(load(small_checkpoint, kind))))


@pytest.mark.parametrize("kind", ["plain", pytest.param("4 bits", marks=needs_bitsandbytes)])
def test_dora_of_attention_and_mlp(kind, small_checkpoint, tmp_path):
    model = adapted(small_checkpoint, kind, target_parameters=None, use_dora=True)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert all(map(torch.equal, logits(peft.PeftModel.from_pretrained(load(small_checkpoint, kind), tmp_path).eval()), expected))
    close(logits(model.merge_and_unload()), expected)


def test_dora_of_weights_in_fp8_has_no_norms(small_checkpoint):
    """peft asks torch to multiply FP8 numbers, which it does not."""
    base = load(small_checkpoint, "FP8")
    with pytest.raises((NotImplementedError, RuntimeError), match="(?i)float8"):
        peft.get_peft_model(base, settings(base, target_parameters=None, use_dora=True))


@pytest.mark.parametrize("kind", EVERY)
def test_it_trains_with_gradient_checkpointing(kind, small_checkpoint):
    """The gradients are those without, and every matrix of the adapter has one."""
    ids, found = prompts(2, 13)[0], []
    for checkpointing in (False, True):
        model = adapted(small_checkpoint, kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model(input_ids=ids, labels=torch.where(torch.arange(13) > 6, ids, -100)).loss.backward()
        found.append({name: each.grad for name, each in model.named_parameters() if each.requires_grad})
    assert all(each is not None and each.any() for each in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize("kind", EVERY)
def test_adapters_that_peft_puts_into_the_model_itself_stay_in_float32(kind, small_checkpoint):
    """As transformers' `add_adapter` has it, where peft makes them in the dtype of the weights: FP8 would round what is loaded."""
    model = load(small_checkpoint, kind)
    peft.inject_adapter_in_model(settings(model), model)
    adapters = {name: each for name, each in model.named_parameters() if ".lora_" in name}
    assert len(adapters) > 40 and {each.dtype for each in adapters.values()} == {torch.float32}


@pytest.mark.parametrize("kind", EVERY)
def test_transformers_loads_what_was_saved(kind, small_checkpoint, tmp_path, adapters_of_transformers):
    saved = adapted(small_checkpoint, "plain")
    saved.save_pretrained(tmp_path)
    model = load(small_checkpoint, kind)
    model.load_adapter(str(tmp_path))
    weights = peft.get_peft_model_state_dict(saved)
    found = {name.replace(".default", ""): each for name, each in model.named_parameters() if ".lora_" in name}
    assert found.keys() == {key.removeprefix("base_model.model.") for key in weights}
    assert all(torch.equal(each, weights[f"base_model.model.{name}"]) for name, each in found.items())
    close(logits(model), logits(adapted(small_checkpoint, kind)), 1e-5)


@pytest.mark.parametrize("kind", EVERY)
def test_experts_that_accelerate_moves_are_adapted_too(kind, small_checkpoint):
    """Weights that are away between passes: peft's way would find none to add to."""
    from accelerate import cpu_offload

    model, expected = adapted(small_checkpoint, kind), None
    expected = logits(model)
    experts = [layer.experts.get_base_layer() for layer in model.get_base_model().model.decoder.layers]
    for each in experts:
        cpu_offload(each, torch.device("cpu"))
    assert all(parameter.is_meta for each in experts for parameter in each.parameters())
    close(logits(model), expected, 1e-5)


def test_an_adapter_of_more_experts_than_are_computed_together(tmp_path):
    """By any implementation that is named: those that know no adapters are not asked."""
    torch.manual_seed(0)
    base = DiffusionGemmaForMaskedBlockLM(small_config(num_experts=19)).eval()
    model = shake(peft.get_peft_model(base, settings(base))).eval()
    found = []
    for way in ("auto", "eager", "grouped_mm", "batched_mm", "dense_mm"):
        base.set_experts_implementation(way)
        found.append(logits(model))
    for each in found[1:]:
        close(each, found[0])


@pytest.mark.parametrize("kind", EVERY)
def test_compiled_layers_have_their_adapters(kind, small_checkpoint):
    model = adapted(small_checkpoint, kind)
    expected = logits(model)
    for layer in model.get_base_model().model.decoder.layers[:2]:  # one of each kind
        layer.forward = torch.compile(layer.forward, backend="eager")
    close(logits(model), expected, 1e-5)
