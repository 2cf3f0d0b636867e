"""What wants to be called wherever the model computes: hooks on modules that nothing calls, another `forward` of a class, wrappers, and
libraries that put their own `forward` around every module. It counts, or is refused by name."""

import functools

import pytest
import torch
from small_models import CANVAS, PAD, prompts, small_model, small_pair
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from modeling_diffusiongemma import BlockDiffusionCollator, DiffusionGemmaBlockModel, DiffusionGemmaForMaskedBlockLM
from modeling_diffusiongemma.drop_in import DiffusionGemmaForBlockDiffusion
from modeling_diffusiongemma.model import block_model, head, plain
from modeling_diffusiongemma.model.plain import looked_into
from modeling_diffusiongemma.model.stack import BlockLayer

IDS = prompts(1, 13)[0]
CANVAS_IDS = prompts(1, CANVAS, seed=1)[0]
SETTINGS = {"max_new_tokens": CANVAS, "max_denoising_steps": 3, "pad_token_id": PAD, "eos_token_id": None, "seed": 5}
BATCH = BlockDiffusionCollator(pad_token_id=PAD)([([5, 6, 7], [8] * 4 + [9] * 9), ([11, 12], [13, 14])])


def generate(model):
    with torch.no_grad():
        output = model.generate(IDS, **SETTINGS)
    return output if isinstance(output, torch.Tensor) else output.sequences


DOORS = {
    "forward": lambda model: model(IDS, decoder_input_ids=CANVAS_IDS),
    "generate": generate,
    "loss": lambda model: model(**BATCH),
    "score": lambda model: model.score(**BATCH, mode="autoregressive"),
    "causal_logits": lambda model: model.causal_logits(IDS),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["model", "model.encoder", "model.encoder.language_model"])
def test_hook_that_a_door_does_not_call_is_refused_there(name, door):
    """Those on `encoder`, and in training and scoring those on `model`, were never called, silently."""
    model, seen = small_model(), []
    model.get_submodule(name).register_forward_hook(lambda *call: seen.append(1))
    if (name, door) == ("model", "forward"):
        DOORS[door](model)
        assert seen == [1]
        return
    with pytest.raises(ValueError, match=f"`{name}` has a forward hook, and .* does not call it; expected hooks and the like on `decoder`"):
        DOORS[door](model)


BACKWARD = ("register_full_backward_hook", "register_full_backward_pre_hook", "register_backward_hook")


@pytest.mark.parametrize("register", BACKWARD)
@pytest.mark.parametrize("door", ["forward", "loss", "causal_logits"])
@pytest.mark.parametrize("name", ["model", "model.encoder", "model.encoder.language_model"])
def test_backward_hook_that_a_door_does_not_call_is_refused_where_there_are_gradients(name, door, register):
    """It was never called, silently, where one on transformers' class is, or torch warns that it cannot be."""
    model = small_model()
    getattr(model.get_submodule(name), register)(lambda *call: None)
    if (name, door) != ("model", "forward"):
        with pytest.raises(ValueError, match=f"`{name}` has a backward hook, and .* does not call it"):
            DOORS[door](model)
    generate(model)
    with torch.no_grad():
        DOORS[door](model)


def gradients(model, loss, checkpointing):
    """Norms of what full backward hooks see, of every module that has been called."""
    found = {}

    def note(name, module, *given):
        found.setdefault(name, []).append([each.float().norm() for some in given for each in some if each is not None])

    for name, module in model.named_modules():
        module.register_full_backward_hook(functools.partial(note, name))
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss(model).backward()
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:For backward hooks to be called")
def test_backward_hooks_see_what_those_on_transformers_class_see(checkpointing):
    oracle, single = small_pair()
    dressed = DiffusionGemmaForBlockDiffusion(single.config)
    dressed.load_state_dict(single.state_dict())
    dressed.set_experts_implementation("grouped_mm")  # as there: the activation is called once for all experts
    expected, got = (
        gradients(model, lambda model: model(IDS, decoder_input_ids=CANVAS_IDS).logits.square().mean(), checkpointing)
        for model in (oracle, dressed)
    )
    assert got.keys() == expected.keys() > {"model.decoder.layers.0", "model.encoder.language_model.layers.0.mlp", "lm_head"}
    for name, norms in expected.items():
        torch.testing.assert_close(got[name], norms, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:For backward hooks to be called")
def test_backward_hooks_fire_in_both_passes_of_the_objective(checkpointing):
    model = small_model()
    for name in ("model.encoder", "model.encoder.language_model", "model"):
        model.get_submodule(name).register_full_backward_hook = lambda hook: None  # of these they are refused
    found = gradients(model, lambda model: model(**BATCH).loss, checkpointing)
    twice = {name for name, _ in model.model.decoder.named_modules() if not name.startswith(("self_conditioning", "rotary"))}
    for name in twice - {"layers"} | {""}:
        if "act_fn" not in name:
            assert len(found[f"model.decoder.{name}".rstrip(".")]) == 2, name
    assert len(found["model.decoder.self_conditioning"]) == len(found["model.encoder.language_model.layers.0"]) == 1


def shifted(forward):
    @functools.wraps(forward)  # which carries the name and the module of what it stands around
    def changed(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.last_hidden_state, output.logits = None, None
        return output

    return changed


@pytest.mark.parametrize("how", ["subclass", "class", "decorated"])
@pytest.mark.parametrize("kind", [DiffusionGemmaForMaskedBlockLM, DiffusionGemmaForBlockDiffusion, DiffusionGemmaBlockModel])
def test_forward_of_another_class_is_refused_by_generation(kind, how, monkeypatch):
    """It was passed by, silently; that of an instance was refused."""
    whole = kind if kind is DiffusionGemmaForBlockDiffusion else DiffusionGemmaForMaskedBlockLM
    model = whole(small_model().config).eval()
    module = model.model if kind is DiffusionGemmaBlockModel else model
    changed = shifted(kind.forward)
    if how == "class":
        monkeypatch.setattr(kind, "forward", changed)
    else:
        module.__class__ = type("Changed", (kind,), {"forward": torch.no_grad()(changed) if how == "decorated" else changed})
    with pytest.raises(ValueError, match="has the `forward` of .*, and generation does not call it"):
        generate(model)


class Wrapper(nn.Module):
    """As users write one: what it does not have is its module's."""

    def __init__(self, module):
        super().__init__()
        self.module, self.seen = module, []

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, *args, **kwargs):
        self.seen.append(args[0].shape[1])
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("door", ["generate", "loss", "score"])
def test_wrapper_around_what_a_door_does_not_call_is_refused(door):
    """Its methods were its module's, so that it was passed by, silently."""
    model = small_model()
    model.model = Wrapper(model.model)
    with pytest.raises(ValueError, match="`model` has the `forward` of .*Wrapper, and .* does not call it"):
        DOORS[door](model)


def patched(model):
    layer = model.model.decoder.layers[1]
    layer.forward = functools.partial(BlockLayer.forward, layer)  # ours, and so the same at every call
    return layer


def test_plain_model_is_looked_into_by_nobody():
    model = small_model()
    assert looked_into(model) is None and model.why_not_recorded() is None
    patched(model)
    assert looked_into(model) is None
    assert DiffusionGemmaForBlockDiffusion(model.config).why_not_recorded() is None


def test_adapters_are_recorded():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(small_model(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert model.base_model.model.why_not_recorded() is None


def wrapped(model):
    model.model.decoder.layers[1] = Wrapper(model.model.decoder.layers[1])


def replaced(model):
    layer = model.model.decoder.layers[1]
    before = layer.forward

    @functools.wraps(before)
    def forward(*args, **kwargs):
        return before(*args, **kwargs)

    layer.forward = forward


@pytest.mark.parametrize("change", [wrapped, replaced])
def test_layer_with_a_forward_of_the_callers_is_not_recorded(change):
    """A graph would have called it while it was recorded, and never again: what it keeps or counts was of the first steps, silently."""
    model = small_model()
    change(model)
    assert "`model.decoder.layers.1` has a `forward` of test_looked_into, which no graph calls" in model.why_not_recorded()


def test_wrapped_layer_sees_a_long_prompt_whole(monkeypatch):
    """As hooks do; it got pieces, in which places count from 0 again."""
    monkeypatch.setattr(block_model, "CHUNK", 5)
    model = small_model()
    wrapped(model)
    with torch.no_grad():
        model.prefill(IDS)
    assert model.model.decoder.layers[1].seen == [13]


class Controller:
    """The way in which nnsight (0.8) stands around the `forward` of every module: an object under the names of what it runs, which does
    nothing outside of a trace, and says itself what a trace waited for in vain."""

    def __init__(self, module):
        functools.update_wrapper(self, type(module).forward)
        self.module, self.state, self.shapes = module, type("State", (), {"original": type(module).forward}), []

    def __call__(self, *args, **kwargs):
        self.shapes.append(tuple(args[0].shape) if args else ())
        return self.state.original(self.module, *args, **kwargs)


@pytest.fixture
def controlled(monkeypatch):
    monkeypatch.setattr(Controller, "__module__", "nnsight.intervention.source")
    model = small_model()
    for module in list(model.modules()):
        vars(module)["forward"] = Controller(module)
    return model


def test_model_wrapped_by_nnsight_generates_what_it_did(controlled):
    """It was refused, outside of traces, too: for a `forward` of the caller's on the model."""
    assert torch.equal(generate(controlled), generate(small_model()))
    assert "has a `forward` of nnsight" in controlled.why_not_recorded()
    assert controlled.why_dense(torch.device("cpu")) == "`lm_head` is traced by nnsight"


def test_model_wrapped_by_nnsight_embeds_prompt_and_canvases_alone(controlled):
    """As hooks do: soft embeddings are no call of the embedding. They were, with the rows of all ids."""
    generate(controlled)
    assert vars(controlled.model.decoder.embed_tokens)["forward"].shapes == [(1, 13), (1, CANVAS), (1, CANVAS), (1, CANVAS)]


def test_embedding_replaced_before_nnsight_wraps_it_counts(controlled):
    found = []
    for model in (small_model(), controlled):
        embedding = model.model.decoder.embed_tokens

        def forward(self, ids):
            return type(self).forward(self, ids) * 2

        if "forward" in vars(embedding):
            vars(embedding)["forward"].state.original = forward
        else:
            embedding.forward = forward.__get__(embedding)
        found.append(generate(model))
    assert torch.equal(*found)


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hook_on_all_modules_is_told_what_it_does_not_see(register, monkeypatch):
    """In training it saw the layers and no `model.model`, silently."""
    said, seen, inner = [], [], small_model()
    monkeypatch.setattr(plain.logger, "warning_once", said.append)
    handle = register(lambda module, *call: seen.append(module))
    try:
        inner.train()(**BATCH)
    finally:
        handle.remove()
    assert inner.model.decoder.layers[1] in seen and inner.model not in seen
    assert "does not see `model`: the training loss calls what is inside" in said[0]


def test_forward_without_a_canvas_says_what_its_logits_are_of(monkeypatch):
    """Libraries for causal models read the last of them as the next token's."""
    said = []
    monkeypatch.setattr(head.logger, "warning_once", said.append)
    model = small_model()
    model(IDS, decoder_input_ids=CANVAS_IDS)
    assert said == []
    model(IDS)
    assert "a canvas of noise behind the prompt, not of the next tokens, which `causal_logits` gives" in said[0]
