"""Adapters as peft's users write them: `get_peft_model` and `add_adapter`, a loss and its gradients, generation, saving, merging."""

import contextlib

import pytest
import torch
from small_models import prompts, small_config, small_model
from tiny import needs_bitsandbytes
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, FourBitConfig, FP8Config
from modeling_diffusiongemma.weights.fp8 import FP8Experts

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of tied weights, of which the tests are about

CPU = torch.device("cpu")
ATTENTION = r"model\.decoder\.layers.*(q_proj|o_proj)"
LORA = {"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6, "init_lora_weights": False}
ADAPTERS = {
    "attention": lambda: peft.LoraConfig(target_modules=ATTENTION, **LORA),
    "experts": lambda: peft.LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"], **LORA),
    "embedding": lambda: peft.LoraConfig(target_modules=["embed_tokens"], **LORA),
    "embedding with DoRA": lambda: peft.LoraConfig(target_modules=["embed_tokens"], use_dora=True, **LORA),
    "head": lambda: peft.LoraConfig(target_modules=["lm_head"], **LORA),
    "head and embedding": lambda: peft.LoraConfig(target_modules=["lm_head", "embed_tokens"], **LORA),
    "tied embedding": lambda: peft.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, **LORA),
    "saved embedding": lambda: peft.LoraConfig(target_modules=ATTENTION, modules_to_save=["embed_tokens"], **LORA),
    "saved head": lambda: peft.LoraConfig(target_modules=ATTENTION, modules_to_save=["lm_head"], **LORA),
    "saved both": lambda: peft.LoraConfig(target_modules=ATTENTION, modules_to_save=["lm_head", "embed_tokens"], **LORA),
    "saved tied": lambda: peft.LoraConfig(target_modules=ATTENTION, modules_to_save=["embed_tokens"], ensure_weight_tying=True, **LORA),
    "tokens": lambda: peft.LoraConfig(target_modules=ATTENTION, trainable_token_indices=[5, 20, 21], **LORA),
    "tokens alone": lambda: peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[5, 20, 21]),
    "IA3": lambda: peft.IA3Config(task_type="CAUSAL_LM", target_modules=ATTENTION, feedforward_modules=[]),
}
WALKED = ("attention", "experts", "IA3")  # head and embedding are as they were built
VIRTUAL = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}
GREEDY = {"do_sample": False, "max_new_tokens": 20, "max_denoising_steps": 2, "eos_token_id": None, "pad_token_id": 0}


def built(seed=0, tied=True):
    """A new model; untied, head and embedding differ."""
    if tied:
        return small_model(seed)
    config = small_config()
    config.tie_word_embeddings = False
    torch.manual_seed(seed)
    return DiffusionGemmaForMaskedBlockLM(config).eval()


def batch():
    ids = prompts(2, 13)[0]
    return {"input_ids": ids, "labels": torch.where(torch.arange(13) > 6, ids, -100)}


def shake(model):
    """Gives every adapter a value that matters."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapted(name, tied=True):
    torch.manual_seed(1)
    model = peft.get_peft_model(built(tied=tied), ADAPTERS[name]())
    shake(model)
    return model.eval()


@torch.no_grad()
def logits(model):
    """Of a canvas pass with self-conditioning."""
    ids = prompts(2, 13)[0]
    believed = 3 * torch.randn(2, 9, 100, generator=torch.Generator().manual_seed(2))
    return model(input_ids=ids, decoder_input_ids=ids[:, :9], self_conditioning_logits=believed).logits


def close(got, expected, atol=1e-3):
    """1e-3: three layers of random weights, and sums of two products instead of one."""
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)


@contextlib.contextmanager
def dense(model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(type(model.get_base_model()), "why_dense", lambda self, device: "it is told so")
        yield


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_train(name):
    """Every adapter gets a gradient, with self-conditioning in every row, and the loss falls on a batch that is learned by heart."""
    model = adapted(name).train()
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer, losses = torch.optim.Adam(trained.values(), lr=3e-2), []
    for _ in range(8):
        torch.manual_seed(0)
        loss = model(**batch(), self_conditioning_mask=torch.tensor([True, True])).loss
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained.values())
        assert sum(parameter.grad.abs().sum() for parameter in trained.values()) > 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ADAPTERS)
def test_all_ways_of_decoding_see_adapters(name, monkeypatch):
    model, (ids, mask) = adapted(name), prompts(2, 9, padded=3)
    assert (model.why_dense(CPU) is None) == (name in WALKED)
    settings = {"input_ids": ids, "attention_mask": mask, "return_dict_in_generate": True, "output_scores": True, **GREEDY}
    default = model.generate(**settings)
    with dense(model, monkeypatch):
        expected = model.generate(**settings)
    for got in (default, model.generate(cache_implementation="static", **settings)):
        assert torch.equal(got.sequences, expected.sequences)
        close(got.scores.entropy, expected.scores.entropy)
    with model.disable_adapter():
        without = model.generate(**settings)
    assert torch.equal(without.sequences, built().generate(**settings).sequences)
    assert not torch.allclose(without.scores.entropy, default.scores.entropy, atol=1e-3)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_saved_loads_again(name, tied, tmp_path):
    """The adapter beside its base model; and merged, as a checkpoint of its own, whose head is walked. Soft embeddings are those of the
    adapted rows, or the merged model would differ."""
    if not tied and name in ("tied embedding", "saved tied"):
        pytest.skip("there is nothing tied")
    model = adapted(name, tied)
    expected = logits(model)
    assert not torch.allclose(expected, logits(built(tied=tied)), atol=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    close(logits(peft.PeftModel.from_pretrained(built(tied=tied), tmp_path / "adapter").eval()), expected, atol=1e-5)
    merged = model.merge_and_unload()
    if tied and name in ("head", "embedding", "embedding with DoRA", "head and embedding", "tied embedding"):
        # As peft warns: what is merged into one is in both; and with `ensure_weight_tying` twice, in any model (peft 0.21).
        assert merged.lm_head.weight is merged.model.decoder.embed_tokens.weight
    else:
        close(logits(merged), expected)
    assert merged.why_dense(CPU) is None
    merged.save_pretrained(tmp_path / "merged")
    again = DiffusionGemmaForMaskedBlockLM.from_pretrained(tmp_path / "merged").eval()
    close(logits(again), logits(merged), atol=1e-4)
    settings = {"inputs": prompts(1, 9)[0], **GREEDY}
    assert torch.equal(again.generate(**settings), merged.generate(**settings))


def test_several_adapters_are_used_as_they_are_set():
    """One, another, both at once, and one of several merged."""
    torch.manual_seed(1)
    model = peft.get_peft_model(built(tied=False), ADAPTERS["head and embedding"](), adapter_name="first")
    model.add_adapter("second", ADAPTERS["head and embedding"]())
    model.eval()
    found = {}
    for names in (["first"], ["second"], ["first", "second"]):
        model.base_model.set_adapter(names)
        found[len(found)] = (logits(model), model.generate(input_ids=prompts(1, 9)[0], **GREEDY))
    assert not torch.allclose(found[0][0], found[1][0], atol=1e-2) and not torch.allclose(found[1][0], found[2][0], atol=1e-2)
    model.merge_adapter()  # both, in place: the layers stay
    close(logits(model), found[2][0])
    assert torch.equal(model.generate(input_ids=prompts(1, 9)[0], **GREEDY), found[2][1])
    model.unmerge_adapter()
    close(logits(model), found[2][0])
    close(logits(model.merge_and_unload(adapter_names=["second"])), found[1][0])


@pytest.mark.parametrize("name", ["attention", "embedding", "head"])
def test_each_row_of_a_batch_has_the_adapter_it_names(name):
    """Rows that end at different steps stay in the batch, since adapters are told by their places in it."""
    torch.manual_seed(1)
    model = peft.get_peft_model(built(), ADAPTERS[name]())
    model.add_adapter("other", ADAPTERS[name]())
    model.eval()
    ids, names = prompts(4, 9)[0], ["default", "other", "__base__", "other"]
    # Of rows that stop when they are sure to three nats on average, at steps of their own.
    settings = {"max_new_tokens": 20, "max_denoising_steps": 6, "confidence_threshold": 2.3, "stability_threshold": 0, "eos_token_id": None}
    together = model.generate(input_ids=ids, adapter_names=names, seed=[1, 2, 3, 4], return_dict_in_generate=True, **settings)
    assert len(set(together.denoising_steps.tolist())) > 1
    for row, adapter in enumerate(names):
        with model.disable_adapter() if adapter == "__base__" else contextlib.nullcontext():
            if adapter != "__base__":
                model.set_adapter(adapter)
            alone = model.generate(input_ids=ids[row : row + 1], seed=row + 1, **settings)
        assert torch.equal(alone[0], together.sequences[row])


def test_activated_lora_is_refused():
    model = peft.get_peft_model(built(), peft.LoraConfig(target_modules=ATTENTION, alora_invocation_tokens=[8, 9], **LORA)).eval()
    ids = torch.tensor([[11, 12, 8, 9, 13]])
    with pytest.raises(ValueError, match="alora_invocation_tokens"):
        model.generate(input_ids=ids, **GREEDY)


def test_adapter_of_transformers_own_interface(tmp_path):
    """`add_adapter` of the model itself, two of them; transformers names the peft it needs."""
    model = built()
    try:
        model.add_adapter(ADAPTERS["embedding"](), adapter_name="first")
    except (ImportError, ValueError) as error:
        if "not compatible" not in str(error):
            raise
        pytest.skip(str(error))
    model.add_adapter(peft.LoraConfig(target_modules=["embed_tokens"], **LORA | {"r": 5}), adapter_name="second")
    found = []
    for name in ("first", "second"):
        model.set_adapter(name)
        model.train()
        model(**batch()).loss.backward()
        assert any(parameter.grad is not None for key, parameter in model.named_parameters() if f"lora_embedding_A.{name}" in key)
        found.append((logits(model.eval()), model.generate(prompts(1, 9)[0], **GREEDY)))
    assert not torch.allclose(found[0][0], found[1][0], atol=1e-2)
    model.save_pretrained(tmp_path)
    again = built()
    again.load_adapter(str(tmp_path))
    close(logits(again.eval()), found[1][0], atol=1e-5)
    model.disable_adapters()
    close(logits(model), logits(built()), atol=1e-4)


# Virtual tokens


@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens_are_refused_by_name(name):
    model = peft.get_peft_model(built(), VIRTUAL[name]())
    with pytest.raises(ValueError, match="prepare_inputs_for_generation.*PeftModelForCausalLM.*LoRA"):
        model.eval().generate(input_ids=prompts(1, 9)[0], **GREEDY)
    with pytest.raises(ValueError, match="`labels`.*Virtual tokens.*LoRA"):
        model.train()(**batch())
    base = model.get_base_model()  # which peft leaves as it found it
    assert torch.equal(base.eval().generate(prompts(1, 9)[0], **GREEDY), built().generate(prompts(1, 9)[0], **GREEDY))


@pytest.mark.parametrize("name", ["prompt tuning", "p-tuning"])
def test_logits_behind_virtual_tokens_are_those_behind_their_embeddings(name):
    model = peft.get_peft_model(built(), VIRTUAL[name]()).eval()
    ids, canvas = prompts(2, 9)[0], prompts(2, 5, seed=3)[0]
    with torch.no_grad():
        virtual = model.get_prompt(batch_size=2)
        embeds = torch.cat((virtual, model.get_base_model().get_input_embeddings()(ids)), dim=1)
        close(model(input_ids=ids, decoder_input_ids=canvas).logits, built()(inputs_embeds=embeds, decoder_input_ids=canvas).logits)


def test_inputs_prepared_by_a_subclass_are_refused():
    class Prepared(DiffusionGemmaForMaskedBlockLM):
        def prepare_inputs_for_generation(self, input_ids, **kwargs):
            return {"input_ids": input_ids + 1}

    model = built()
    model.__class__ = Prepared
    with pytest.raises(ValueError, match="prepare_inputs_for_generation"):
        model.generate(prompts(1, 9)[0], **GREEDY)


# Quantised base models


QUANTIZED = [pytest.param(FourBitConfig, marks=needs_bitsandbytes), FP8Config]


def load(small_checkpoint, kind, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(small_checkpoint, quantization_config=kind(), dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_model_prepared_for_training_in_few_bits_trains(kind, dtype, small_checkpoint):
    """peft makes float32 of whatever else was in half precision; what is quantised computes as before."""
    model = peft.prepare_model_for_kbit_training(load(small_checkpoint, kind, dtype))
    model = peft.get_peft_model(model, ADAPTERS["attention"]()).train()
    model(**batch()).loss.backward()
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert adapters and all(parameter.grad.isfinite().all() for parameter in adapters)
    tokens = model.eval().generate(input_ids=prompts(2, 9)[0], **GREEDY)
    assert tokens.shape == (2, 29)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_in_four_bits_keep_their_numbers_when_the_model_is_cast(dtype, small_checkpoint):
    pytest.importorskip("bitsandbytes")
    model = load(small_checkpoint, FourBitConfig)
    before = model.model.decoder.layers[0].experts.gate_up_proj
    model.to(dtype)
    assert model.model.decoder.layers[0].experts.gate_up_packed_scale.dtype == torch.float32
    assert torch.equal(model.model.decoder.layers[0].experts.gate_up_proj, before)
    assert logits(model).isfinite().all()


def dequantized(model):
    """The same model with its FP8 experts in float32; they alone are in FP8."""
    plain = small_model()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if ".experts." not in key}, strict=False)
    for ours, theirs in zip(plain.model.decoder.layers, model.model.decoder.layers, strict=True):
        theirs.experts.dequantized(torch.float32, ours.experts)
    return plain.eval()


@pytest.fixture
def experts_in_fp8():
    model = small_model()
    for layer in model.model.decoder.layers:
        quantized = FP8Experts(layer.experts)
        for name, scale in (("gate_up_proj", "gate_up_scale"), ("down_proj", "down_scale")):
            weight = getattr(layer.experts, name).detach()
            scales = weight.abs().amax(dim=-1, keepdim=True) / 448
            setattr(quantized, name, nn.Parameter((weight / scales).to(torch.float8_e4m3fn), requires_grad=False))
            setattr(quantized, scale, nn.Parameter(scales, requires_grad=False))
        layer.experts = quantized
    return model


@pytest.mark.parametrize("parameters", [["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"], ["experts.gate_up_proj"]])
def test_lora_on_fp8_experts_is_lora_on_what_they_stand_for(parameters, experts_in_fp8):
    """Adapters of the same seed on the dequantised experts give the same logits and, in training, the same gradients."""
    found = []
    for base in (experts_in_fp8, dequantized(experts_in_fp8)):
        model = peft.get_peft_model(base, peft.LoraConfig(target_parameters=parameters, **LORA))
        with torch.no_grad():
            for key, parameter in sorted(model.named_parameters()):
                if "lora_" in key:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key))))
        adapters = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert adapters and all(parameter.dtype == torch.float32 for parameter in adapters.values())
        torch.manual_seed(0)
        model.train()(**batch()).loss.backward()
        found.append((logits(model.eval()), {key: parameter.grad for key, parameter in adapters.items()}))
    close(found[0][0], found[1][0])
    for key, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][key], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_of_fp8_experts_generate_and_load_again(dtype, small_checkpoint, tmp_path):
    settings = peft.LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"], **LORA)
    model = peft.get_peft_model(load(small_checkpoint, FP8Config, dtype), settings).eval()
    without = logits(load(small_checkpoint, FP8Config, dtype))
    expected = logits(model)
    assert not torch.allclose(expected, without, atol=1e-2)
    assert model.generate(input_ids=prompts(2, 9)[0], **GREEDY).shape == (2, 29)
    with model.disable_adapter():
        assert torch.equal(logits(model), without)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(load(small_checkpoint, FP8Config, dtype), tmp_path).eval()), expected)
