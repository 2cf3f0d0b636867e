"""Every way in which a head or an embedding can be changed, and every way of decoding: all agree, and with transformers' class.

What walks the vocabulary reads weights and calls no module. It may only where that gives what the modules give.
"""

import contextlib
import copy
import functools
from typing import NamedTuple

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from small_models import CANVAS, prompts, small_model, small_pair
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, parametrize, prune

from modeling_diffusiongemma import DiffusionGemmaForMaskedBlockLM, Rollout, block_diffusion_loss
from modeling_diffusiongemma.layers.layers import ScaledEmbedding
from modeling_diffusiongemma.model.plain import expected_embedding

CPU = torch.device("cpu")


class Change(NamedTuple):
    """What a user does to a model; `make` may return a context to leave. `plain`: the vocabulary is still walked; `theirs`:
    transformers' class takes it, too; `silent`: nothing changes by it."""

    make: object
    plain: bool
    theirs: bool
    silent: bool


CHANGES: dict[str, Change] = {}


def change(plain=False, theirs=True, silent=False):
    def keep(function):
        CHANGES[function.__name__] = Change(function, plain, theirs, silent)
        return function

    return keep


def noise(*shape, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(7))


def tilt(output):
    return output + noise(output.shape[-1])


def embeddings(model):
    """Where token ids are embedded: in transformers' class once for each pass."""
    language_model = getattr(model.model.encoder, "language_model", None)
    return [model.model.decoder.embed_tokens, *([language_model.embed_tokens] if hasattr(language_model, "embed_tokens") else [])]


def override(module, name, changed=tilt):
    before = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: changed(before(*args, **kwargs)))


class Halved(nn.Module):
    def forward(self, weight):
        return 0.5 * weight


class AddMore(ModelHook):
    def post_forward(self, module, output):
        return tilt(output)


# The head


@change()
def head_bias(model):
    model.lm_head.bias = nn.Parameter(noise(model.lm_head.out_features))


@change()
def head_hook(model):
    model.lm_head.register_forward_hook(lambda module, inputs, output: tilt(output))


@change()
def head_hook_with_keywords(model):
    model.lm_head.register_forward_hook(lambda module, inputs, named, output: tilt(output), with_kwargs=True, always_call=True)


@change()
def head_hook_in_place(model):
    """Returns nothing, as hooks of lenses do that write into what they see."""

    def hook(module, inputs, output):
        output.mul_(1.5)

    model.lm_head.register_forward_hook(hook)


@change()
def head_hook_in_front(model):
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (1.5 * inputs[0],))


@change()
def hook_of_all_modules(model):
    head = model.lm_head
    return register_module_forward_hook(lambda module, inputs, output: tilt(output) if module is head else None)


@change()
def hook_in_front_of_all_modules(model):
    head = model.lm_head
    return register_module_forward_pre_hook(lambda module, inputs: (1.5 * inputs[0],) if module is head else None)


@change(plain=True, silent=True)
def head_hook_taken_off(model):
    model.lm_head.register_forward_hook(lambda module, inputs, output: tilt(output)).remove()


@change(plain=True, silent=True)
def head_hooks_of_gradients(model):
    model.lm_head.register_full_backward_hook(lambda module, inputs, outputs: None)
    model.lm_head.weight.register_hook(lambda gradient: 2 * gradient)


@change()
def head_forward(model):
    override(model.lm_head, "forward")


@change()
def head_forward_then_accelerate(model):
    override(model.lm_head, "forward")
    add_hook_to_module(model.lm_head, AlignDevicesHook(CPU))


@change()
def accelerate_then_head_forward(model):
    add_hook_to_module(model.lm_head, AlignDevicesHook(CPU))
    override(model.lm_head, "forward")


@change()
def accelerate_then_wrapped_head_forward(model):
    add_hook_to_module(model.lm_head, AlignDevicesHook(CPU))
    before = model.lm_head.forward
    model.lm_head.forward = functools.wraps(before)(lambda inputs: tilt(before(inputs)))


@change(plain=True, silent=True)
def head_with_accelerate(model):
    add_hook_to_module(model.lm_head, AlignDevicesHook(CPU, io_same_device=True))


@change(plain=True, silent=True)
def head_offloaded(model):
    add_hook_to_module(model.lm_head, AlignDevicesHook(CPU, offload=True))


@change(plain=True, silent=True)
def head_without_accelerate_again(model):
    remove_hook_from_module(add_hook_to_module(model.lm_head, AlignDevicesHook(CPU)))


@change()
def head_with_a_hook_of_accelerates_kind(model):
    add_hook_to_module(model.lm_head, AddMore())


@change()
def head_with_two_hooks_of_accelerates_kind(model):
    add_hook_to_module(model.lm_head, SequentialHook(AlignDevicesHook(CPU), AddMore()))


class LoudLinear(nn.Linear):
    def forward(self, inputs):
        return 1.5 * super().forward(inputs)


@change()
def head_of_a_subclass(model):
    head = LoudLinear(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head


@change()
def head_given_another_class(model):
    model.lm_head.__class__ = LoudLinear


@change()
def all_linear_layers(model):
    before = nn.Linear.forward
    nn.Linear.forward = lambda self, inputs: 1.5 * before(self, inputs)
    return undo(lambda: setattr(nn.Linear, "forward", before))


@change(silent=True)
def head_in_a_sequence(model):
    model.lm_head = nn.Sequential(model.lm_head)


@change()
def head_in_a_sequence_of_more(model):
    model.lm_head = nn.Sequential(model.lm_head, nn.Softsign())


@change(plain=True)
def head_weight(model):
    """Untied: soft embeddings stay those of the embedding."""
    model.lm_head.weight = nn.Parameter(noise(*model.lm_head.weight.shape, scale=0.3))


@change(plain=True)
def tied_weight_in_place(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(0.7)


@change()
def another_head(model):
    torch.manual_seed(3)
    model.lm_head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features)


class LoudTensor(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return 1.5 * result.as_subclass(torch.Tensor) if function is nn.functional.linear else result


@change()
def head_weight_of_a_tensor_subclass(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(LoudTensor))


@change()
def head_parametrised(model):
    parametrize.register_parametrization(model.lm_head, "weight", Halved())


@change()
def head_weight_norm(model):
    parametrizations.weight_norm(model.lm_head, dim=None).parametrizations.weight.original0.data.mul_(0.5)


@change()
def head_old_weight_norm(model):
    nn.utils.weight_norm(model.lm_head, dim=None).weight_g.data.mul_(0.5)


@change()
def head_spectral_norm(model):
    torch.manual_seed(3)
    parametrizations.spectral_norm(model.lm_head)


@change()
def head_pruned(model):
    prune.l1_unstructured(model.lm_head, "weight", 0.5)


@change(plain=True, theirs=False)
def head_pruned_for_good(model):
    """The pruned tensor is the embedding's too."""
    prune.remove(prune.l1_unstructured(model.lm_head, "weight", 0.5), "weight")


@change()
def head_of_an_integer_matrix(model):
    class Coarse(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = nn.Buffer((weight.detach() * 40).round().to(torch.int8))

        def forward(self, inputs):
            return nn.functional.linear(inputs, self.weight.float() / 40)

    model.lm_head = Coarse(model.lm_head.weight)


# The embedding


@change(plain=True)
def embedding_hook(model):
    """Hooks see token ids alone, in transformers' class as here."""
    for embedding in embeddings(model):
        embedding.register_forward_hook(lambda module, inputs, output: tilt(output))


@change(plain=True)
def embedding_hook_in_front(model):
    for embedding in embeddings(model):
        embedding.register_forward_pre_hook(lambda module, inputs: ((inputs[0] + 1).clamp(max=99),))


@change(plain=True, silent=True)
def embedding_hook_of_gradient_checkpointing(model):
    model.enable_input_require_grads()


@change(plain=True, silent=True, theirs=False)
def embedding_offloaded(model):
    add_hook_to_module(model.model.decoder.embed_tokens, AlignDevicesHook(CPU, offload=True))


@change(plain=True, silent=True, theirs=False)
def both_offloaded(model):
    for module in (model.lm_head, model.model.decoder.embed_tokens):
        add_hook_to_module(module, AlignDevicesHook(CPU, offload=True))


@change(theirs=False)
def embedding_with_a_hook_of_accelerates_kind(model):
    add_hook_to_module(model.model.decoder.embed_tokens, AddMore())


@change(theirs=False)
def embedding_forward(model):
    override(model.model.decoder.embed_tokens, "forward")


@change(theirs=False)
def all_scaled_embeddings(model):
    before = ScaledEmbedding.forward
    ScaledEmbedding.forward = lambda self, input_ids: tilt(before(self, input_ids))
    return undo(lambda: setattr(ScaledEmbedding, "forward", before))


@change(theirs=False)
def embedding_in_a_sequence(model):
    model.model.decoder.embed_tokens = nn.Sequential(model.model.decoder.embed_tokens, nn.Tanh())


@change(theirs=False)
def embedding_set_through_the_model(model):
    plain = nn.Embedding(100, 32)
    plain.weight = model.lm_head.weight
    model.set_input_embeddings(plain)


@change(theirs=False)
def embedding_that_looks_elsewhere(model):
    class Reversed(ScaledEmbedding):
        def forward(self, input_ids):
            return super().forward(self.num_embeddings - 1 - input_ids)

    model.model.decoder.embed_tokens.__class__ = Reversed


@change(plain=True)
def embedding_weight(model):
    """Untied: soft embeddings are those of the embedding."""
    weight = nn.Parameter(noise(*model.lm_head.weight.shape, scale=0.3))
    for embedding in embeddings(model):
        embedding.weight = weight


@change(plain=True)
def embedding_scale(model):
    for embedding in embeddings(model):
        embedding.embed_scale = 3.0 if isinstance(embedding, ScaledEmbedding) else torch.tensor(3.0)


@change(plain=True, silent=True)
def embedding_padding(model):
    """Of the padding's row only the gradient is different."""
    model.model.decoder.embed_tokens.padding_idx = 17


@change()
def embedding_parametrised(model):
    for embedding in embeddings(model):
        parametrize.register_parametrization(embedding, "weight", Halved())


@change()
def embedding_pruned(model):
    for embedding in embeddings(model):
        prune.l1_unstructured(embedding, "weight", 0.5)


@change(theirs=False)
def embedding_of_a_largest_norm(model):
    """Rows are shortened where they lie, as soon as they are looked at: they are the head's, too."""
    model.model.decoder.embed_tokens.max_norm = 1.0
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


@change(theirs=False, silent=True)
def embedding_in_float64(model):
    model.model.decoder.embed_tokens = nn.Sequential(copy.deepcopy(model.model.decoder.embed_tokens).double(), ToFloat32())


class ToFloat32(nn.Module):
    def forward(self, inputs):
        return inputs.float()


@change(plain=True, theirs=False)
def vocabulary_resized(model):
    torch.manual_seed(3)
    model.resize_token_embeddings(131)


# The model's methods and settings


@change(plain=True)
def softcap(model):
    model.config.text_config.final_logit_softcapping = model.final_logit_softcapping = 7.0


@change(theirs=False)
def compute_logits_of_the_instance(model):
    override(model, "compute_logits")


@change(theirs=False)
def soft_embed_of_the_instance(model):
    override(model, "soft_embed")


@change(theirs=False)
def methods_of_a_subclass(model):
    class Loud(DiffusionGemmaForMaskedBlockLM):
        def compute_logits(self, hidden_states):
            return tilt(super().compute_logits(hidden_states))

    model.__class__ = Loud


@change(theirs=False)
def method_of_the_class(model):
    before = DiffusionGemmaForMaskedBlockLM.compute_logits
    DiffusionGemmaForMaskedBlockLM.compute_logits = lambda self, hidden_states: tilt(before(self, hidden_states))
    return undo(lambda: setattr(DiffusionGemmaForMaskedBlockLM, "compute_logits", before))


@change(plain=True, silent=True, theirs=False)
def getters_of_a_subclass(model):
    """Neither says what a pass goes through: `model.lm_head` and `model.model.decoder.embed_tokens` do."""

    class Elsewhere(DiffusionGemmaForMaskedBlockLM):
        def get_output_embeddings(self):
            return None

        def get_input_embeddings(self):
            return nn.Embedding(3, 32)

    model.__class__ = Elsewhere


def undo(function):
    stack = contextlib.ExitStack()
    stack.callback(function)
    return stack


# Over two canvases; few steps, since random weights make small differences grow.
GREEDILY = {
    "attention_mask": prompts(2, 9, padded=3)[1], "do_sample": False, "max_new_tokens": 20, "eos_token_id": None,
    "generation_config": {"max_denoising_steps": 2}, "return_dict_in_generate": True, "output_scores": True,
}  # fmt: skip


@functools.cache
def untouched():
    return small_pair()


@functools.cache
def entropies_of_the_untouched():
    return untouched()[1].generate(prompts(2, 9, padded=3)[0], **GREEDILY).scores.entropy


@contextlib.contextmanager
def changed(name, whose=1):
    """Ours (1), or transformers' (0), after the change."""
    model = copy.deepcopy(untouched()[whose])
    left = CHANGES[name].make(model)
    try:
        yield model
    finally:
        if left is not None:
            left.remove() if hasattr(left, "remove") else left.close()


def logits(model):
    """Of a canvas pass with self-conditioning, which goes through head and embedding."""
    ids, believed = prompts(2, 9)[0], noise(2, 10, model.config.text_config.vocab_size, scale=3.0)
    with torch.no_grad():
        return model(ids, decoder_input_ids=ids.repeat(1, 2)[:, :10], self_conditioning_logits=believed).logits


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_all_ways_of_decoding_agree(name, monkeypatch):
    ids, settings = prompts(2, 9, padded=3)[0], GREEDILY
    with changed(name) as model:
        assert (model.why_dense(CPU) is None) == CHANGES[name].plain, model.why_dense(CPU)
        default = model.generate(ids, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "why_dense", lambda self, device: "it is told so")
            dense = model.generate(ids, **settings)
        static = model.generate(ids, cache_implementation="static", **settings)
        with monkeypatch.context() as patch:
            patch.setattr("generation.call.plan.records", lambda device: True)
            recorded = model.generate(ids, cache_implementation="static", **settings)
        autoregressive, verified = (
            model.generate(ids[1:], **settings | {"attention_mask": None, "decoding": way, "max_new_tokens": CANVAS + 1})
            for way in ("autoregressive", "verified")
        )
    assert torch.equal(autoregressive.sequences, verified.sequences)
    for other in (default, static, recorded):
        assert torch.equal(other.sequences, dense.sequences)
        torch.testing.assert_close(other.scores.entropy, dense.scores.entropy, atol=1e-3, rtol=1e-3)
    assert torch.allclose(default.scores.entropy, entropies_of_the_untouched(), atol=1e-3) == CHANGES[name].silent


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", [name for name, change in CHANGES.items() if change.theirs])
def test_the_change_means_what_it_means_in_transformers(name):
    """1e-3: what three layers of random weights make of other roundings."""
    with changed(name) as model:
        ours = logits(model)
    with changed(name, 0) as model:
        theirs = logits(model)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    assert torch.allclose(ours, logits(untouched()[1]), atol=1e-3) == CHANGES[name].silent


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", [name for name in CHANGES if name != "vocabulary_resized"])
def test_training_rollouts_and_scores_see_the_change(name):
    def found(model):
        ids = prompts(2, 13)[0]
        inputs = {"input_ids": ids, "labels": torch.where(torch.arange(13) > 6, ids, -100)}
        torch.manual_seed(0)
        losses = block_diffusion_loss(model, **inputs, self_conditioning_mask=torch.tensor([True, True]))
        losses.diffusion.backward()
        rollout = Rollout(model, rows=2)
        rollout.batch(lambda count: inputs)
        rollout.advance(losses.logits)
        scores = [model.score(**inputs, mode="autoregressive").log_prob, model.score(**inputs, samples=2).log_prob]
        return torch.cat(
            [losses.diffusion.detach()[None], losses.causal.detach()[None], rollout.state.soft_embeds.flatten().float(), *scores]
        )

    with changed(name) as model:
        got = found(model)
    assert got.isfinite().all()
    assert torch.allclose(got, found(copy.deepcopy(untouched()[1])), atol=1e-3) == CHANGES[name].silent


def test_the_reason_is_told_once_a_call(monkeypatch):
    """What decides is asked once a call, whatever the number of canvases and steps."""
    asked, told = [], []
    monkeypatch.setattr("generation.call.plan.logger.warning_once", told.append)
    with changed("head_bias") as model:
        whole = type(model).why_dense
        monkeypatch.setattr(type(model), "why_dense", lambda self, device: asked.append(device) or whole(self, device))
        model.generate(prompts(1, 5)[0], max_new_tokens=30, max_denoising_steps=3, eos_token_id=None)
    assert asked == [CPU] and len(told) == 1 and "`lm_head` has a bias" in told[0]
    untouched()[1].generate(prompts(1, 5)[0], max_new_tokens=5, max_denoising_steps=1)
    assert asked == [CPU, CPU] and len(told) == 1


def test_soft_embedding_is_the_mean_of_the_rows_that_ids_get(monkeypatch):
    """Rows are asked for a part at a time, and all take their gradient."""
    monkeypatch.setattr("modeling_diffusiongemma.model.plain.ROWS", 33)
    table = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 6))
    probabilities = noise(2, 5, 100).softmax(dim=-1).requires_grad_()
    expected = probabilities @ table(torch.arange(100))
    torch.testing.assert_close(expected_embedding(table, probabilities), expected)
    expected.square().sum().backward()
    want = [probabilities.grad.clone(), *(parameter.grad.clone() for parameter in table.parameters())]
    probabilities.grad = None
    table.zero_grad()
    expected_embedding(table, probabilities).square().sum().backward()
    torch.testing.assert_close([probabilities.grad, *(parameter.grad for parameter in table.parameters())], want)


@pytest.mark.parametrize("which", ["lm_head", "embed_tokens"])
def test_another_number_of_ids_than_the_config_says_is_refused(which):
    """It failed in the middle of a step, in a product of two sizes."""
    model = small_model()
    known, size = model.config.text_config.vocab_size, model.config.text_config.hidden_size
    if which == "lm_head":
        model.set_output_embeddings(nn.Linear(size, known + 3, bias=False))
    else:
        model.set_input_embeddings(ScaledEmbedding(known + 3, size, 0))
    with pytest.raises(ValueError, match=f"`{which}` has {known + 3} ids, and `vocab_size` of the text config is {known}"):
        model.generate(prompts(1, 5)[0], max_new_tokens=CANVAS)
