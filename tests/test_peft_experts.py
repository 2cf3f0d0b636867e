"""Adapters of experts, one expert at a time: equal to peft's way, which writes out the stacked weight, on weights of every precision."""

import copy
import itertools

import pytest
import tiny
import torch
from tiny import needs_bitsandbytes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_diffusiongemma import DiffusionGemmaForBlockDiffusion, DiffusionGemmaForMaskedBlockLM, lora_targets
from modeling_diffusiongemma.layers.experts import Experts, LowRank, eager_experts, grouped_with_deltas
from modeling_diffusiongemma.model.adapted_experts import fit
from modeling_diffusiongemma.weights.four_bit_experts import PACKED, FourBitExperts
from modeling_diffusiongemma.weights.fp8 import FP8Experts, scale_name
from modeling_diffusiongemma.weights.fp8_math import quantize_weight

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of tied weights, of which the tests are about

NAMES = ("gate_up_proj", "down_proj")
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
COUNT, HIDDEN, SIZE = 9, 64, 48  # experts, whose stacked weights are 9 times as large as one of them
KINDS = ["plain", "FP8", pytest.param("4 bits", marks=needs_bitsandbytes)]


class Holder(nn.Module):
    """No model of ours: peft's wrappers in it are as peft made them."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts


def plain_experts(dtype=torch.float32):
    module = Experts(tiny.tiny_config(num_experts=COUNT, hidden_size=HIDDEN, moe_intermediate_size=SIZE).text_config).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return module


def made(kind, dtype=torch.float32):
    """Experts of a kind, and plain ones with the numbers that they stand for."""
    plain = plain_experts(dtype)
    if kind == "plain":
        return plain_experts(dtype), plain
    if kind == "FP8":
        experts = FP8Experts(plain)
        for name in NAMES:
            weight, scale = quantize_weight(getattr(plain, name).detach())
            setattr(experts, name, nn.Parameter(weight, requires_grad=False))
            setattr(experts, scale_name(name), nn.Parameter(scale, requires_grad=False))
        return experts, experts.dequantized(dtype, plain)
    experts = FourBitExperts(plain, dtype, 64)
    for name, packed in PACKED.items():
        numbers, scale = experts.quantized([getattr(plain, name).detach()])
        setattr(experts, packed, nn.Parameter(numbers, requires_grad=False))
        setattr(experts, f"{packed}_scale", nn.Parameter(scale, requires_grad=False))
    return experts, experts.plain(dtype, plain)


def adapt(experts, *settings, targets=TARGETS, fitted=False):
    """The wrapper that peft puts around experts, with an adapter of each settings; `fitted` as in a model of ours."""
    holder = Holder(experts)
    for name, each in zip("abc", settings, strict=False):
        config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "init_lora_weights": False, "target_parameters": targets, **each})
        peft.inject_adapter_in_model(config, holder, adapter_name=name)
    for module in list(holder.modules()) if fitted else ():
        fit(module)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in sorted(adapters_of(holder).items()):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return holder.experts


def adapters_of(module):
    return {name.removeprefix("experts."): each for name, each in module.named_parameters() if ".lora_" in f".{name}"}


def routed(dtype=torch.float32, tokens=11):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    weights, chosen = torch.randn(tokens, COUNT - 2, generator=generator).softmax(dim=-1).topk(2)  # two experts get no token
    return hidden, chosen, weights


def run(module):
    """The output, and the gradients of adapters, hidden states and shares."""
    hidden, chosen, weights = routed()
    hidden.requires_grad_(), weights.requires_grad_()
    output = module(hidden, chosen, weights)
    output.square().sum().backward()
    return output.detach(), {name: each.grad for name, each in adapters_of(module).items()} | {
        "hidden": hidden.grad,
        "shares": weights.grad,
    }


def layers(module):
    while hasattr(module, "base_layer"):
        yield module
        module = module.base_layer


def set_active(names, enabled=True):
    def change(module):
        for layer in layers(module):
            layer.set_adapter(names)
            layer.enable_adapters(enabled)

    return change


SCENES = {
    "one": ([{}], set_active(["a"])),
    "of two the second": ([{}, {}], set_active(["b"])),
    "two of different ranks together": ([{}, {"r": 5}], set_active(["a", "b"])),
    "scaled by the root of the rank": ([{"use_rslora": True}], set_active(["a"])),
}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_pefts_parametrisation(kind, scene):
    """1e-4 in float32: sums of two products instead of one."""
    settings, change = SCENES[scene]
    experts, plain = made(kind)
    found = []
    for module in (adapt(experts, *settings, fitted=True), adapt(plain, *settings)):
        change(module)
        found.append(run(module))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-4)
    for name, gradient in found[1][1].items():
        if gradient is None:  # of an adapter that is not active
            assert found[0][1][name] is None, name
        else:
            torch.testing.assert_close(found[0][1][name], gradient, atol=1e-4 * gradient.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("change", [set_active([]), set_active(["a"], enabled=False)], ids=["none active", "disabled"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_active_adapters_experts_are_as_they_were(kind, change):
    module = adapt(made(kind)[0], {}, fitted=True)
    adapted = module(*routed())
    change(module)
    expected = made(kind)[0](*routed())
    assert torch.equal(module(*routed()), expected) and not torch.allclose(adapted, expected, atol=0.1)


@pytest.mark.parametrize("targets", [TARGETS[:1], TARGETS[1:]])
@pytest.mark.parametrize("kind", KINDS)
def test_one_projection_may_be_adapted_alone(kind, targets):
    experts, plain = made(kind)
    got, expected = run(adapt(experts, {}, targets=targets, fitted=True)), run(adapt(plain, {}, targets=targets))
    torch.testing.assert_close(got[0], expected[0], atol=1e-4, rtol=1e-4)
    assert got[1].keys() == expected[1].keys() and all(each.any() for each in got[1].values())


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that was made, views aside."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        if not any(argument.alias_info for argument in function._schema.arguments):
            for each in [output] if isinstance(output, torch.Tensor) else output if isinstance(output, tuple | list) else []:
                self.size = max(self.size, each.numel() if isinstance(each, torch.Tensor) else 0)
        return output


@pytest.mark.parametrize("kind", KINDS)
def test_neither_a_stacked_weight_nor_a_stacked_delta_is_written_out(kind):
    """Not for the gradient either; and what is kept for it holds no weight that was made."""
    experts, plain = made(kind)
    matrix, stack = 2 * SIZE * HIDDEN, COUNT * SIZE * HIDDEN
    kept = []
    module = adapt(experts, {}, fitted=True)
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        run(module)
    assert largest.size < stack
    storages = {weight.untyped_storage().data_ptr() for weight in experts.parameters()}
    held = [each for each in kept if each.numel() >= matrix // 2 and each.untyped_storage().data_ptr() not in storages]
    assert all(each.shape[-2:] not in {(2 * SIZE, HIDDEN), (HIDDEN, SIZE)} for each in held)
    with Largest() as largest:
        run(adapt(plain, {}))
    assert largest.size >= stack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_are_the_loop(dtype):
    """The way that a GPU takes, here by torch's fallback for a CPU; of a rank that is no multiple of what kernels want."""
    experts = plain_experts(dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    deltas = {
        name: LowRank(
            *(0.2 * torch.randn(shape, generator=generator) for shape in ((COUNT, 3, weight.shape[2]), (COUNT, weight.shape[1], 3)))
        )
        for name, weight in experts.named_parameters()
    }
    found = []
    for way in (eager_experts, grouped_with_deltas):
        inputs = [each.clone().to(dtype).requires_grad_() for delta in deltas.values() for each in delta]
        hidden, chosen, weights = routed(dtype)
        given = dict(zip(NAMES, map(LowRank._make, zip(inputs[::2], inputs[1::2], strict=True)), strict=True))
        output = way(experts, hidden.requires_grad_(), chosen, weights, given)
        output.float().square().sum().backward()
        found.append([output.detach(), hidden.grad, *(each.grad for each in inputs)])
    for got, expected in zip(*found, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, atol=scale * (1e-5 if dtype == torch.float32 else 0.03), rtol=0.0)


def test_half_precision_is_within_its_rounding_of_pefts():
    experts, plain = made("plain", torch.bfloat16)
    inputs = routed(torch.bfloat16)
    with torch.no_grad():
        got, expected = adapt(experts, {}, fitted=True)(*inputs), adapt(plain, {})(*inputs)
    torch.testing.assert_close(got, expected, atol=0.02 * expected.abs().max().item(), rtol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_see_the_wrapper_and_change_what_comes_out(kind):
    module = adapt(made(kind)[0], {}, fitted=True)
    seen = []
    before = module(*routed())
    module.register_forward_hook(lambda module, inputs, output: seen.append(inputs) or 2 * output)
    torch.testing.assert_close(module(*routed()), 2 * before)
    assert torch.equal(seen[0][0], routed()[0])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_more_than_plain_lora_goes_pefts_way_or_is_refused(kind):
    """A hook on the wrapper inside of the other one: only peft's way calls it."""
    experts, plain = made(kind)
    module, calls = adapt(experts, {}, fitted=True), []
    module.base_layer.register_forward_hook(lambda *given: calls.append(1))
    if kind == "4 bits":
        with pytest.raises(ValueError, match=r"experts in 4 bits.*hooks look on.*`lora_targets`"):
            module(*routed())
        return
    torch.testing.assert_close(module(*routed()), adapt(plain, {})(*routed()), atol=1e-4, rtol=1e-4)
    assert calls == [1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}])
def test_what_peft_does_not_do_for_parameters_it_refuses_by_name(kind, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        adapt(made(kind)[0], settings)


@needs_bitsandbytes
def test_experts_in_four_bits_show_their_weights_to_who_walks_over_them_alone():
    """Neither a list of parameters nor the state dict has them, and their numbers are real whenever they are read."""
    experts, plain = made("4 bits")
    holder = Holder(experts)
    packed = {*PACKED.values(), *(f"{name}_scale" for name in PACKED.values())}
    while_walking = {}
    for name, module in holder.named_modules():
        while_walking[name] = [each for each, _ in module.named_parameters(recurse=False)]
        assert {each for each, _ in copy.deepcopy(module).named_parameters(recurse=False)} <= packed
        assert {each for each, _ in holder.named_parameters()} == {f"experts.{each}" for each in packed}
        assert not name.endswith("experts") or torch.equal(module.gate_up_proj, plain.gate_up_proj)
    assert while_walking["experts"][:2] == list(NAMES) and packed < {*while_walking["experts"]}
    assert {name for name, _ in experts.named_parameters(recurse=False)} == packed == {*experts.state_dict()}
    for name, _ in itertools.islice(holder.named_modules(), 2):  # left in the middle
        assert name in ("", "experts")
    assert {name for name, _ in experts.named_parameters(recurse=False)} == packed


# Names


@pytest.mark.parametrize("model_class", [DiffusionGemmaForMaskedBlockLM, DiffusionGemmaForBlockDiffusion])
@pytest.mark.parametrize("experts", [True, False])
def test_default_targets_are_attention_mlp_and_experts(model_class, experts):
    """Nothing of the router, embedding, head, self-conditioning or vision tower; of both passes where each has modules of its own."""
    model = model_class(tiny.tiny_config())
    adapted = peft.get_peft_model(model, peft.LoraConfig(**lora_targets(model, experts=experts), r=2))
    names = {name.split(".lora_")[0] for name, _ in adapted.named_parameters() if ".lora_" in name}
    within = {name.split(".layers.")[1].split(".", 1)[1] for name in names}
    linears = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert within == linears | ({"experts", "experts.base_layer"} if experts else set())
    assert not any("vision" in name for name in names)
    with pytest.raises(ValueError, match="`model` is a Linear"):
        lora_targets(nn.Linear(2, 3))


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"target_modules": ["queries"]}, "queries"), ({"target_parameters": ["experts.nothing"]}, "target_parameters")],
)
def test_targets_that_are_not_there_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        peft.get_peft_model(DiffusionGemmaForMaskedBlockLM(tiny.tiny_config()), peft.LoraConfig(**settings, r=2))
