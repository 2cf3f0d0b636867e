"""The modules of transformers' two-stack model, as ours, dressed: under its class names, and with the outputs that its hooks see.

Nothing is computed here. `__call__` of a dressed module takes and returns what our stack knows; inside, `forward` and whatever is hooked to
it see what transformers' module of that name would take and return. Keys, values and attention weights, which it does not return, go
past the hooks in `Aside`. Where ours is also an instance of transformers' class, `isinstance` finds it; no code of that class runs.
"""

from collections.abc import Iterator
from inspect import isfunction

import torch
from transformers.models.diffusion_gemma import generation_diffusion_gemma as their_generation
from transformers.models.diffusion_gemma import modeling_diffusion_gemma as theirs
from transformers.models.gemma4.modeling_gemma4 import Gemma4MultimodalEmbedder

from ..layers.attention import Attention
from ..layers.experts import Experts, Router
from ..layers.layers import GatedMLP, RMSNorm, RotaryPositions, ScaledEmbedding, SelfConditioning
from ..layers.outputs import PassOutput
from ..layers.view import View
from ..model.stack import BlockLayer, BlockStack


class Aside:
    """What a module makes beside its output. No list: Accelerate would hand on a copy."""

    new = weights = probabilities = None


class DiffusionGemmaRMSNorm(RMSNorm, theirs.DiffusionGemmaRMSNorm):
    pass


class DiffusionGemmaText4MLP(GatedMLP, theirs.DiffusionGemmaText4MLP):
    pass


class DiffusionGemmaSelfConditioning(SelfConditioning, theirs.DiffusionGemmaSelfConditioning):
    pass


class DiffusionGemmaTextScaledWordEmbedding(ScaledEmbedding):
    pass


class DiffusionGemmaMultimodalEmbedder(Gemma4MultimodalEmbedder):
    pass


class DiffusionGemmaTextExperts(Experts, theirs.DiffusionGemmaTextExperts):
    pass


class DiffusionGemmaTextRouter(Router, theirs.DiffusionGemmaTextRouter):
    pass


class DiffusionGemmaTextRotaryEmbedding(RotaryPositions):
    def __call__(self, *args):
        """As the stack calls it; or as transformers' is called, with hidden states, `position_ids` and a layer type: cos and sin, each
        `(B or 1, L, head_dim)`."""
        if len(args) < 3:
            return super().__call__(*args)
        hidden_states, position_ids, layer_type = args
        return tuple(each.squeeze(2) for each in super().__call__(position_ids, hidden_states.dtype)[layer_type])


class DressedAttention(Attention):
    def __call__(self, hidden_states, rotary, mask, cached, is_causal):
        aside = Aside()
        output, weights = super().__call__(
            hidden_states=hidden_states, position_embeddings=rotary, attention_mask=mask, cached=cached, is_causal=is_causal, aside=aside
        )
        return output, aside.new, weights

    def forward(self, hidden_states, position_embeddings, attention_mask, cached, is_causal, aside) -> tuple:
        """The output `(B, L, D)` and the attention weights, or None."""
        output, aside.new, weights = super().forward(hidden_states, position_embeddings, attention_mask, cached, is_causal)
        return output, weights


class DressedLayer(BlockLayer):
    def __call__(self, hidden_states, rotary, mask, cached, is_causal):
        aside = Aside()
        output = super().__call__(
            hidden_states, position_embeddings=rotary, attention_mask=mask, cached=cached, is_causal=is_causal, aside=aside
        )
        return output, aside.new, aside.weights, aside.probabilities

    def forward(self, hidden_states, position_embeddings, attention_mask, cached, is_causal, aside) -> torch.Tensor:
        """The output alone, `(B, L, D)`."""
        output, aside.new, aside.weights, aside.probabilities = super().forward(
            hidden_states, position_embeddings, attention_mask, cached, is_causal
        )
        return output


class DiffusionGemmaEncoderTextAttention(DressedAttention, theirs.DiffusionGemmaEncoderTextAttention):
    pass


class DiffusionGemmaDecoderTextAttention(DressedAttention, theirs.DiffusionGemmaDecoderTextAttention):
    pass


class DiffusionGemmaEncoderTextLayer(DressedLayer, theirs.DiffusionGemmaEncoderTextLayer):
    pass


class DiffusionGemmaDecoderTextLayer(DressedLayer, theirs.DiffusionGemmaDecoderTextLayer):
    pass


class DressedStack(BlockStack):
    """Called by our model, a `BlockStack`; called with ids, what transformers' module of this name is."""

    def __call__(self, *args, **kwargs):
        if not isinstance(args[1] if len(args) > 1 else None, View):
            return self.run_pass(*args, **kwargs)
        output = super().__call__(*args, **kwargs)
        return output.last_hidden_state, output.hidden_states, output.attentions, output.router_logits

    def forward(self, hidden_states, view, entry=None, cache=None, *args, **kwargs) -> PassOutput:
        output, states, weights, routing = super().forward(hidden_states, view, entry, cache, *args, **kwargs)
        return PassOutput(output, cache, states, weights, routing)

    @property
    def rotary(self) -> RotaryPositions:
        return self.rotary_emb

    @property
    def text_config(self):
        return self.config


DRESSED = {
    RMSNorm: DiffusionGemmaRMSNorm, GatedMLP: DiffusionGemmaText4MLP, SelfConditioning: DiffusionGemmaSelfConditioning,
    ScaledEmbedding: DiffusionGemmaTextScaledWordEmbedding, Gemma4MultimodalEmbedder: DiffusionGemmaMultimodalEmbedder,
    Experts: DiffusionGemmaTextExperts, Router: DiffusionGemmaTextRouter, RotaryPositions: DiffusionGemmaTextRotaryEmbedding,
    Attention: DiffusionGemmaDecoderTextAttention, BlockLayer: DiffusionGemmaDecoderTextLayer,
}  # fmt: skip
OF_THE_PROMPT_PASS = {Attention: DiffusionGemmaEncoderTextAttention, BlockLayer: DiffusionGemmaEncoderTextLayer}


THEIR_MODULES = (theirs, their_generation)
FUNCTIONS = {
    module: {name for name, value in vars(module).items() if isfunction(value) and value.__module__ == module.__name__}
    for module in THEIR_MODULES
}
THEIR_CLASSES = [value for module in THEIR_MODULES for value in vars(module).values()
                 if isinstance(value, type) and value.__module__ == module.__name__]  # fmt: skip


def _functions() -> Iterator[tuple[tuple[object, str], object]]:
    """Methods and functions of transformers' two modules for this model, each with where it stands."""
    for module, names in FUNCTIONS.items():
        yield from (((module, name), vars(module).get(name)) for name in names)
    for cls in THEIR_CLASSES:
        yield from (((cls, name), member) for name, member in vars(cls).items() if callable(member) or hasattr(member, "__func__"))


THEIRS = dict(_functions())  # before anybody replaces one: nothing here would call what is put there


def check_unpatched(encoder: torch.nn.Module, decoder: torch.nn.Module) -> None:
    """Raises ValueError where a function of transformers for this model was replaced, in its classes or modules, or one that makes masks
    on the model's own modules: nothing here would call it."""
    found = dict(_functions())
    for holder, name in THEIRS | found:
        if found.get((holder, name)) is not THEIRS.get((holder, name)):
            ours = "the modules of `modeling_diffusiongemma.drop_in` are classes of their own, and docs/drop_in.md says what to use instead"
            raise ValueError(f"`{holder.__name__}.{name}` of transformers was replaced, which nothing here calls: {ours}")
    for module, name in ((encoder, "create_masks_for_generate"), (decoder, "create_diffusion_decoder_attention_mask")):
        if name in vars(module):
            raise ValueError(f"`{name}` is replaced on the model, and generation calls no such method; instead, pass `attention_mask`")


def dress(tree: torch.nn.Module, classes: dict[type, type]) -> None:
    """Gives every module of `tree` that is exactly of a class in `classes` the class that stands there; quantised ones keep theirs."""
    for module in tree.modules():
        if (dressed := classes.get(type(module))) is not None:
            module.__class__ = dressed
            if hasattr(module, "_hf_hook"):  # Accelerate's, which holds `forward` as it was
                module._old_forward = module.forward.__wrapped__ = dressed.forward.__get__(module)


__all__ = ["DRESSED", "OF_THE_PROMPT_PASS", "DressedStack", "check_unpatched", "dress"]
