"""torch's own tools around the model: tensors without numbers, transforms of functions, modes that see every operation."""

import contextlib

import pytest
import torch
from small_models import CANVAS, PAD, prompts, small_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from generation.call.plan import modes_look_on
from generation.checks import readable
from modeling_diffusiongemma.drop_in import DiffusionGemmaForBlockDiffusion

IDS, MASK = prompts(2, 13, padded=3)
CANVAS_IDS = prompts(2, CANVAS, seed=1)[0]
SETTINGS = {"max_new_tokens": CANVAS, "max_denoising_steps": 3, "pad_token_id": PAD, "eos_token_id": None, "seed": 5}


def fake(mode, **tensors):
    return {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}


def test_fake_tensors_go_through_and_leave_nothing_behind():
    """As nnsight's `scan` and estimators of memory run a model: checks read their numbers, and rotary frequencies that have none would have
    been kept for later passes."""
    model = small_model()
    expected = small_model()(IDS, attention_mask=MASK, decoder_input_ids=CANVAS_IDS).logits
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        output = model(**fake(mode, input_ids=IDS, attention_mask=MASK, decoder_input_ids=CANVAS_IDS, labels=CANVAS_IDS))
    assert tuple(output.logits.shape) == tuple(expected.shape) and output.loss.shape == ()
    assert torch.equal(model(IDS, attention_mask=MASK, decoder_input_ids=CANVAS_IDS).logits, expected)


def test_numbers_are_not_read_while_operations_are_traced():
    seen = []

    def look(ids):
        seen.append(readable(ids))
        return ids + 1

    make_fx(look)(IDS)
    assert seen == [False] and readable(IDS)


def test_gradients_of_single_rows_by_vmap_are_those_of_the_rows():
    model = small_model()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights, ids, canvas):
        given = {"decoder_input_ids": canvas[None], "labels": canvas[None]}
        return functional_call(model, weights, (ids[None],), given).loss

    together = vmap(grad(loss), (None, 0, 0), randomness="error")(weights, IDS, CANVAS_IDS)
    for row in range(2):
        alone = grad(loss)(weights, IDS[row], CANVAS_IDS[row])
        for name in ("lm_head.weight", "model.decoder.layers.1.experts.gate_up_proj", "model.decoder.layers.0.self_attn.q_proj.weight"):
            if name in weights:
                torch.testing.assert_close(together[name][row], alone[name], atol=1e-4, rtol=1e-3)


@pytest.fixture
def records(monkeypatch):
    """As on a GPU: steps recorded."""
    monkeypatch.setattr("generation.call.plan.records", lambda device: True)


def test_counter_of_operations_sees_all_steps(records, monkeypatch):
    """A recorded step is computed two more times while it is recorded, and on a GPU the others are replayed unseen."""
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            small_model().generate(IDS[:1], **SETTINGS)
        counts.append(counter.get_total_flops())
        monkeypatch.undo()
    assert counts[0] == counts[1] > 0


class Sees(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_modes_of_the_caller_are_told_from_devices():
    for around, expected in (
        (contextlib.nullcontext(), False), (torch.device("meta"), False), (Sees(), True), (FlopCounterMode(display=False), True),
    ):  # fmt: skip
        with around:
            assert modes_look_on() is expected


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_is_refused_by_name():
    """It ended in a TypeError of `scaled_dot_product_attention`."""
    with pytest.raises(ValueError, match="traced by `torch.jit.trace` .*; expected `torch.export` or `torch.compile`"):
        torch.jit.trace(small_model(), (IDS,), check_trace=False)


CHANGES = {
    "pruned": lambda linear: prune.random_unstructured(linear, "weight", 0.5),
    "normed": lambda linear: nn.utils.weight_norm(linear),
    "parametrised": parametrizations.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("how", CHANGES)
def test_weight_taken_from_one_of_two_stacks_is_named(how):
    """The other one had an AttributeError, "'Linear' object has no attribute 'weight'"; drop-in models have two from the start."""
    for model in (small_model(), DiffusionGemmaForBlockDiffusion(small_model().config)):
        model.model.pull_apart()
        linear = model.model.decoder.layers[1].mlp.up_proj
        CHANGES[how](linear)
        with pytest.raises(ValueError, match="`encoder.language_model.layers.1.mlp.up_proj` has lost its `weight`"):
            model.generate(IDS, **SETTINGS)
        with torch.no_grad():
            if how == "pruned":
                prune.remove(linear, "weight")
            elif how == "normed":
                nn.utils.remove_weight_norm(linear)
            else:
                parametrize.remove_parametrizations(linear, "weight")
        model.generate(IDS, **SETTINGS)
        assert model.model.prompt_stack.layers[1].mlp.up_proj.weight is linear.weight
