"""What a user puts in the place of torch's and transformers' functions, or changes in a built model's config, counts as in transformers'
class, or is refused by name."""

import copy

import pytest
import torch
from tiny import close, ours, pad_rows, pair, rows_of, tiny_config, tokens
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, flash_attention_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import eager_attention_forward

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM
from modeling_diffusiongemma.drop_in import DiffusionGemmaForBlockDiffusion
from modeling_diffusiongemma.model import head

IDS, MASK = pad_rows(rows_of((12, 9)), "left")
CANVAS = tokens(2, 5, 7)
CALLS = 8  # of four layers in two passes


def logits(model):
    return model(tokens(2, 11), decoder_input_ids=CANVAS).logits


def padded(model):
    return model(IDS, attention_mask=MASK, decoder_input_ids=CANVAS).logits


def counted(function, calls, **changed):
    def replaced(*args, **kwargs):
        calls.append(1)
        return function(*args, **{**kwargs, **changed})

    return replaced


@pytest.fixture
def names(monkeypatch):
    """The names of this test in transformers' tables are no longer there behind it."""
    for table in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(table, "_global_mapping", dict(table._global_mapping))


def test_attention_in_the_place_of_sdpa_counts(monkeypatch):
    """It was never called, silently: `"sdpa"` was always the function of this package."""
    oracle, model = pair()
    plain, calls = logits(model), []
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", counted(sdpa_attention_forward, calls, scaling=0.3))
    got = logits(model)
    assert len(calls) == CALLS
    close(got, logits(oracle))
    assert (got - plain).abs().max() > 0.01


def test_function_in_the_place_of_torchs_attention_counts(monkeypatch):
    """As libraries of attention kernels say one should: it was taken from torch while the package was imported."""
    oracle, model = pair()
    plain, calls = logits(model), []
    given = counted(torch.nn.functional.scaled_dot_product_attention, calls, scale=0.3)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", given)
    got = logits(model)
    assert len(calls) == CALLS
    close(got, logits(oracle))
    assert (got - plain).abs().max() > 0.01


@pytest.mark.parametrize(
    ("attention", "mask"), [(eager_attention_forward, eager_mask), (sdpa_attention_forward, sdpa_mask), (sdpa_attention_forward, None)]
)
def test_registered_attention_gets_the_mask_that_is_registered_with_it(names, attention, mask):
    """It got a boolean one in any case, which eager attention adds to its scores, silently."""
    AttentionInterface.register("mine", attention)
    if mask is not None:
        AttentionMaskInterface.register("mine", mask)
    model = copy.deepcopy(ours())
    model.set_attn_implementation("mine")
    close(logits(model), logits(ours()))
    close(padded(model), padded(ours()))


def test_mask_of_another_form_is_refused(names):
    AttentionInterface.register("mine", sdpa_attention_forward)
    model = copy.deepcopy(ours())
    for mask in (flash_attention_mask, lambda **kwargs: None):
        AttentionMaskInterface.register("mine", mask)
        assert ALL_MASK_ATTENTION_FUNCTIONS["mine"] is mask
        model.set_attn_implementation("mine")
        with pytest.raises(ValueError, match="`AttentionMaskInterface` has .* for the `attn_implementation` 'mine'; expected one of"):
            logits(model)


def test_experts_in_the_place_of_transformers_count(monkeypatch):
    model, calls = copy.deepcopy(ours()), []
    model.set_experts_implementation("grouped_mm")
    plain = logits(model)
    given = counted(ALL_EXPERTS_FUNCTIONS["grouped_mm"], calls)
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "grouped_mm", given)
    close(logits(model), plain)
    assert len(calls) == CALLS


def test_number_of_chosen_experts_is_the_configs_at_every_pass():
    """It was that of the config the model was built from, silently."""
    oracle, model = copy.deepcopy(pair())
    plain = logits(model)
    for each in (oracle, model):
        each.config.text_config.top_k_experts = 1
    close(logits(model), logits(oracle))
    assert (logits(model) - plain).abs().max() > 0.1


def test_fewer_layers_than_the_config_says_are_refused():
    """transformers' class runs as many as it says; all ran, silently. A list of fewer modules ended in an error of `zip`."""
    model = copy.deepcopy(ours())
    model.config.text_config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="says 2 as `num_hidden_layers`, and the model has 4 layers"):
        logits(model)
    model = copy.deepcopy(ours())
    model.model.decoder.layers = model.model.decoder.layers[:2]
    with pytest.raises(ValueError, match="says 4 as `num_hidden_layers`, and the model has 2 layers"):
        model.generate(IDS, attention_mask=MASK, max_new_tokens=4)
    model.config.text_config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="`layer_types` in the config names 4 layers, and `num_hidden_layers` is 2"):
        logits(model)
    model.config.text_config.layer_types = model.config.text_config.layer_types[:2]
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("module, expected", [(".layers.1", 4), (".layers.1.self_attn", 3), (".layers.1.router", 3), ("", 4)])
def test_tensor_in_the_place_of_a_tuple_is_refused(module, expected):
    """Of as many rows as there were outputs, it was taken apart into its rows: in the canvas pass the first stood for all, silently."""
    model = copy.deepcopy(ours())
    canvas, prompt = tokens(expected, 5), tokens(expected, 11)
    called = model.get_submodule(f"model.decoder{module}")
    called.register_forward_hook(lambda module, args, output: output[0])
    for run in (lambda: model(prompt, decoder_input_ids=canvas), lambda: model.causal_logits(prompt)):
        with pytest.raises(ValueError, match=rf"gives a Tensor; expected a tuple of {expected} .*`\(changed, \*output\[1:\]\)`"):
            run()


def test_attributes_of_transformers_modules_count():
    """Scale of the attention and cap of the head, which transformers' modules hold; here they were set on nothing."""
    oracle, model = copy.deepcopy(pair())
    plain = logits(model)
    for each in (oracle, model):
        each.final_logit_softcapping *= 0.5
        for layer in each.model.decoder.layers:
            layer.self_attn.scaling *= 0.5
    for layer in oracle.model.encoder.language_model.layers:
        layer.self_attn.scaling *= 0.5
    close(logits(model), logits(oracle))
    assert (logits(model) - plain).abs().max() > 0.1 and model.config.text_config.final_logit_softcapping == 15.0


ATTRIBUTES = {
    "router": lambda layer: setattr(layer.router, "scalar_root_size", 0.5),
    "norm": lambda layer: setattr(layer.input_layernorm, "with_scale", False),
    "eps": lambda layer: setattr(layer.self_attn.q_norm, "eps", 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_of_transformers_modules_that_scripts_set_count(name):
    """Two of them were set on nothing, silently."""
    oracle, model = copy.deepcopy(pair())
    plain = logits(model)
    for each in (oracle.model.encoder.language_model, oracle.model.decoder, model.model.decoder):
        for layer in each.layers:
            ATTRIBUTES[name](layer)
    close(logits(model), logits(oracle))
    assert (logits(model) - plain).abs().max() > 0.01


def test_attributes_that_a_pass_does_not_read_are_refused():
    """Set on transformers' modules they change its logits; here they changed nothing, silently."""
    for model in (ours(), DiffusionGemmaForBlockDiffusion(tiny_config())):
        stack = model.model.decoder
        with pytest.raises(ValueError, match="`is_causal` of the attention in layer 1 is set to True; expected it as it is"):
            stack.layers[1].self_attn.is_causal = True
        for name in ("full_attention_inv_freq", "sliding_attention_attention_scaling"):
            with pytest.raises(ValueError, match=f"`{name}` is set on the rotary positions, .*; expected `rope_parameters`"):
                setattr(stack.rotary, name, torch.ones(8))


def test_dropout_set_on_the_attention_counts_as_the_configs():
    found = []
    for change in (lambda stack: None, lambda stack: setattr(stack.config, "attention_dropout", 0.5),
                   lambda stack: [setattr(layer.self_attn, "attention_dropout", 0.5) for layer in stack.layers]):  # fmt: skip
        model = copy.deepcopy(ours()).train()
        change(model.model.decoder)
        torch.manual_seed(1)
        found.append(logits(model))
    assert torch.equal(found[1], found[2]) and (found[1] - found[0]).abs().max() > 0.1


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "dense_mm"])
def test_gate_of_the_experts_counts_whatever_computes_them(experts):
    """As a model with another one overrides it, in the class or on a module: but for grouped products it was passed by, silently."""
    model = copy.deepcopy(ours())
    model.set_experts_implementation(experts)
    plain = logits(model)
    for layer in model.model.decoder.layers:
        layer.experts._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[1]
    assert (logits(model) - plain).abs().max() > 0.1


CHANGED = {
    "rms_norm_eps": 0.5, "hidden_activation": "relu", "num_attention_heads": 2, "head_dim": 4, "intermediate_size": 12, "num_experts": 2,
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1.0}},
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("ran", [False, True])
def test_value_that_the_model_was_not_built_with_is_refused(name, ran):
    """It changed what is saved, and nothing of what is computed, silently; or ended in an error of torch."""
    model = copy.deepcopy(ours())
    if ran:
        logits(model)
    setattr(model.config.text_config, name, CHANGED[name])
    for run in (lambda: logits(model), lambda: model.generate(IDS, attention_mask=MASK, max_new_tokens=4)):
        with pytest.raises(ValueError, match=f"`{name}` in the config is .*, and the model was built with"):
            run()


def test_config_that_wants_tuples_gets_them(without_gradients):
    """transformers' classes read it, where `return_dict` is not given; here it was passed over."""
    model = copy.deepcopy(ours())
    model.config.return_dict = False
    for module in (model, model.model):
        plain = module(IDS, MASK, decoder_input_ids=IDS, return_dict=True)
        found = module(IDS, MASK, decoder_input_ids=IDS)
        assert type(found) is tuple and torch.equal(found[0], plain[0])
    assert type(model(IDS, labels=torch.where(MASK.cumsum(1) < 3, -100, IDS))) is tuple
    model.generate(IDS, attention_mask=MASK, max_new_tokens=4)


COMPILED = {
    "forward": lambda model: setattr(model, "forward", torch.compile(model.forward, backend="eager")),
    "in place": lambda model: model.compile(backend="eager"),
    "inner": lambda model: setattr(model, "model", torch.compile(model.model, backend="eager")),
    "inner, in place": lambda model: model.model.compile(backend="eager"),
    "encoder, in place": lambda model: model.model.encoder.compile(backend="eager"),
}


@pytest.mark.parametrize("how", COMPILED)
def test_compiled_model_says_that_generation_runs_as_it_is(how, monkeypatch):
    """`forward` was refused as one of the caller's, all others did nothing, silently."""
    model = DiffusionGemmaForMaskedBlockLM(tiny_config()).eval()
    settings = {"max_new_tokens": 4, "max_denoising_steps": 2, "seed": 1}
    expected = model.generate(IDS, attention_mask=MASK, **settings)
    COMPILED[how](model)
    said = []
    monkeypatch.setattr(head.logger, "warning_once", said.append)
    assert torch.equal(model.generate(IDS, attention_mask=MASK, **settings), expected)
    assert "as a function, which is compiled by torch; expected `compile_config=CompileConfig()`" in said[0]


def test_compiled_layers_run_compiled():
    model, graphs = DiffusionGemmaForMaskedBlockLM(tiny_config()).eval(), []
    settings = {"max_new_tokens": 4, "max_denoising_steps": 2, "seed": 1}
    expected = model.generate(IDS, attention_mask=MASK, **settings)
    model.model.decoder.compile(backend=lambda graph, _: graphs.append(1) or graph.forward)
    assert torch.equal(model.generate(IDS, attention_mask=MASK, **settings), expected)
    assert graphs


def test_mixed_precision_of_accelerate_says_that_generation_runs_without(monkeypatch):
    """Where transformers' class denoises in bfloat16, it was float32, silently."""
    accelerate = pytest.importorskip("accelerate")
    monkeypatch.setattr(accelerate.state.AcceleratorState, "_shared_state", {})  # another test of this process may have begun one
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model, seen = accelerator.prepare_model(DiffusionGemmaForMaskedBlockLM(tiny_config()), evaluation_mode=True).eval(), set()
    model.model.decoder.layers[0].mlp.register_forward_hook(lambda module, given, output: seen.add(output.dtype))
    settings = {"max_new_tokens": 4, "max_denoising_steps": 2, "seed": 1}
    said = []
    monkeypatch.setattr(head.logger, "warning_once", said.append)
    model.generate(IDS, attention_mask=MASK, **settings)
    assert seen == {torch.float32}
    assert "in Accelerate's mixed precision; expected `with accelerator.autocast():`" in said[0]
    seen.clear()
    with accelerator.autocast():
        model.generate(IDS, attention_mask=MASK, **settings)
    assert seen == {torch.bfloat16}
