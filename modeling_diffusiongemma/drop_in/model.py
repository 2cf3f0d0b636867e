"""`DiffusionGemmaForBlockDiffusion`: our model in the place of transformers' class of that name, with its manners.

The computation is our model's. Its passes are pulled apart (`model.apart`), so that a hook on a module of one stack counts in one pass, as
there; the modules are dressed (`modules`); and what Diffusers and hand-written loops call, `model.model.encoder` and `model.model.decoder`,
can be called. This file is also what a repository with remote code loads, so it holds every class that an Auto class gives.
"""

import contextlib
import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

import torch
from torch import nn
from transformers import PreTrainedModel  # noqa: F401  by which Diffusers loads a saved pipeline's model

from generation.cache_names import takes_cache
from generation.call.caches import dynamic_cache
from generation.checks import check_shape

from ..layers.outputs import PassOutput
from ..model.block_model import DiffusionGemmaBlockModel, PromptSide
from ..model.head import DiffusionGemmaForMaskedBlockLM
from ..model.plain import conditioning, expected_embedding, looked_into
from ..model.stack import BlockStack
from .generation import OVERRIDES, BatchStreamer, DiffusionGemmaGenerationConfig, as_theirs
from .modules import DRESSED, OF_THE_PROMPT_PASS, DressedStack, check_unpatched, dress

_loading: ContextVar[bool] = ContextVar("_loading", default=False)
PREFILL = [name for name in inspect.signature(DiffusionGemmaBlockModel.prefill).parameters if name != "self"]


@contextlib.contextmanager
def undressed() -> Iterator[None]:
    """A context in which models are built as our own: they are loaded, quantised and placed so, and dressed afterwards."""
    token = _loading.set(True)
    try:
        yield
    finally:
        _loading.reset(token)


class Shown:
    """A module that runs passes of the model it belongs to, which is held weakly, so that deleting it frees it at once, and left out of
    copies and pickles: the copied model shows itself. Shallow copies of a model share this module, and any of them that is left serves."""

    def show(self, model: DiffusionGemmaBlockModel) -> None:
        """Says whose passes these are."""
        self.shown = [*(one for one in getattr(self, "shown", ()) if one() is not None), weakref.ref(model)]

    @property
    def model_shown(self) -> DiffusionGemmaBlockModel:
        return next(model for one in self.shown if (model := one()) is not None)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "shown"}


def with_probabilities(output: PassOutput) -> PassOutput:
    """`router_logits` as transformers' two stacks give them when they are called: the probabilities themselves."""
    if output.router_logits is not None:
        output.router_logits = tuple(each.exp() for each in output.router_logits)
    return output


class DiffusionGemmaEncoderTextModel(Shown, DressedStack):
    """The prompt pass without images; called with ids, it is `DiffusionGemmaBlockModel.prefill`."""

    @takes_cache
    def run_pass(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None, **options) -> PassOutput:
        return with_probabilities(DiffusionGemmaBlockModel.prefill(
            self.model_shown, input_ids, attention_mask, position_ids, cache, inputs_embeds, **options
        ))  # fmt: skip


class DiffusionGemmaDecoderModel(Shown, DressedStack):
    """The canvas pass."""

    @takes_cache
    def run_pass(
        self, decoder_input_ids=None, cache=None, self_conditioning_logits=None, self_conditioning_mask=None, decoder_attention_mask=None,
        decoder_position_ids=None, **options,
    ) -> PassOutput:  # fmt: skip
        """`DiffusionGemmaBlockModel.denoise`, with the self-conditioning as logits `(B, C, V)` or `(C, V)` and rows that get it."""
        soft_embeds = None
        if self_conditioning_logits is not None:
            if self_conditioning_mask is not None:
                check_shape("self_conditioning_mask", self_conditioning_mask, decoder_input_ids.shape[:1])

            def soft_embed(logits: torch.Tensor) -> torch.Tensor:
                return expected_embedding(self.embed_tokens, logits.softmax(dim=-1, dtype=torch.float32))

            soft_embeds = conditioning(soft_embed, self_conditioning_logits, decoder_input_ids.shape[0], self_conditioning_mask)
        return with_probabilities(self.model_shown.denoise(
            decoder_input_ids, cache, soft_embeds, decoder_attention_mask, decoder_position_ids, **options
        ))  # fmt: skip

    @staticmethod
    @takes_cache
    def create_diffusion_decoder_attention_mask(config=None, inputs_embeds=None, cache=None, decoder_attention_mask=None):
        """What the model takes as `decoder_attention_mask`: the 2-D mask `(B, L + C)` itself, from which it builds every layer's."""
        return decoder_attention_mask


class DiffusionGemmaEncoderModel(Shown, PromptSide):
    """The prompt pass. Image tokens attend to each other inside their image; in transformers' model, called without masks that say so, they
    attend causally."""

    @takes_cache
    def forward(
        self, input_ids=None, pixel_values=None, attention_mask=None, position_ids=None, cache=None, mm_token_type_ids=None,
        inputs_embeds=None, image_position_ids=None, **options,
    ) -> PassOutput:  # fmt: skip
        """`DiffusionGemmaBlockModel.prefill`, arguments in the order of transformers' class."""
        images = {"pixel_values": pixel_values, "image_position_ids": image_position_ids, "mm_token_type_ids": mm_token_type_ids}
        return DiffusionGemmaBlockModel.prefill(
            self.model_shown, input_ids, attention_mask, position_ids, cache, inputs_embeds, **images, **options
        )  # fmt: skip

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    @staticmethod
    @takes_cache
    def create_masks_for_generate(
        config=None, inputs_embeds=None, attention_mask=None, cache=None, position_ids=None, mm_token_type_ids=None
    ):  # fmt: skip
        """What the prompt pass takes as `attention_mask`: the mask `(B, L + P)` itself, from which it builds every layer's. Which tokens
        are an image's the pass is told by `mm_token_type_ids`."""
        return attention_mask


class DiffusionGemmaModel(DiffusionGemmaBlockModel):
    """`DiffusionGemmaBlockModel`, dressed. Its passes go through `encoder` and `decoder`, whatever stands there or is hooked to them."""

    def __init__(self, config):
        super().__init__(config)
        if not _loading.get():
            dress_model(self)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """`DiffusionGemmaBlockModel.from_pretrained`."""
        return loaded(super().from_pretrained, args, kwargs)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        show(self)

    def prefill(self, *args, **kwargs) -> PassOutput:
        """`DiffusionGemmaBlockModel.prefill`, as a call of `encoder`."""
        kwargs |= dict(zip(PREFILL, args, strict=False))
        if kwargs.get("last_states") is not None and looked_into(self.encoder):  # they see all states
            last = kwargs.pop("last_states")
            output = self.encoder(**kwargs)
            output.last_hidden_state = output.last_hidden_state[:, -last:]
            return output
        return self.encoder(**kwargs)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.encoder if modality is None else super().get_encoder(modality)

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def containers(self) -> dict[str, nn.Module]:
        return {}


class DiffusionGemmaForBlockDiffusion(DiffusionGemmaForMaskedBlockLM):
    """`DiffusionGemmaForMaskedBlockLM` with the manners of transformers' class.

    `generate` returns the output object unless told otherwise, its first fields those of transformers' class; streamers get `(B, n)`;
    `generation_config.sampler_config` reads and writes `entropy_bound`. docs/drop_in.md says what else differs, and what is refused.
    """

    generation_config_class = DiffusionGemmaGenerationConfig

    def __init__(self, config):
        super().__init__(config)
        if not _loading.get():
            dress_model(self.model)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """`DiffusionGemmaForMaskedBlockLM.from_pretrained`."""
        return loaded(super().from_pretrained, args, kwargs)

    @takes_cache
    def generate(
        self, input_ids=None, cache=None, streamer=None, generation_config=None, logits_processor=None, stopping_criteria=None, **kwargs
    ):  # fmt: skip
        """`DiffusionGenerationMixin.generate`, positional arguments in the order of transformers' class.

        Returns:
            `DiffusionGemmaGenerationOutput`, with the cache; token ids where `return_dict_in_generate` is False in `kwargs`, in the
            configuration given or in the model's. Finished rows leave the batch only then, and where no hook looks on.
        """
        check_unpatched(self.model.encoder, self.model.decoder)
        sources = [
            kwargs,
            *(each if isinstance(each, Mapping) else vars(each) for each in (generation_config, self.generation_config) if each),
        ]

        def stated(name: str, default):
            return next((source[name] for source in sources if source.get(name) is not None), default)

        kwargs["return_dict_in_generate"] = whole = stated("return_dict_in_generate", True)
        plain = stated("cache_implementation", None) is None and stated("decoding", "diffusion") == "diffusion"
        looked_at = whole or looked_into(self)
        if looked_at and plain and cache is None and kwargs.get("past_key_values") is None and stated("num_return_sequences", 1) == 1:
            cache = dynamic_cache(self.config.get_text_config())  # in which finished rows stay: hooks see all, and it is handed out
        streamer = streamer if streamer is None else BatchStreamer(streamer)
        result = super().generate(
            generation_config=generation_config, logits_processor=logits_processor, stopping_criteria=stopping_criteria, streamer=streamer,
            input_ids=input_ids, cache=cache, **kwargs,
        )  # fmt: skip
        return result if isinstance(result, torch.Tensor) else as_theirs(result)


for _model in (DiffusionGemmaForMaskedBlockLM, DiffusionGemmaForBlockDiffusion):
    _model.not_called = OVERRIDES  # a script may put either class in the place of transformers'


def loaded(load, args: tuple, kwargs: dict):
    """What `load` gives, dressed; also where it is a model and what was found while loading."""
    with undressed():
        result = load(*args, **kwargs)
    model = result[0] if isinstance(result, tuple) else result
    dress_model(getattr(model, "model", model))
    return result


def dress_model(model: DiffusionGemmaBlockModel) -> None:
    """Makes a `DiffusionGemmaBlockModel` what transformers' `DiffusionGemmaModel` looks like. Again, it changes nothing."""
    model.pull_apart()
    dress(model.prompt_stack, {**DRESSED, **OF_THE_PROMPT_PASS, BlockStack: DiffusionGemmaEncoderTextModel})
    dress(model, {**DRESSED, BlockStack: DiffusionGemmaDecoderModel, PromptSide: DiffusionGemmaEncoderModel,
                  DiffusionGemmaBlockModel: DiffusionGemmaModel})  # fmt: skip
    for stack in (model.prompt_stack, model.decoder):
        if (rotary := stack._modules.pop("rotary", None)) is not None:
            stack.rotary_emb = rotary
    model._modules = {name: model._modules[name] for name in ("encoder", "decoder")}  # a weight has the name of the first that holds it
    show(model)


def show(model: DiffusionGemmaModel) -> None:
    for module in (model.encoder, model.prompt_stack, model.decoder):
        if isinstance(module, Shown):
            module.show(model)


__all__ = [
    "DiffusionGemmaBlockModel", "DiffusionGemmaForBlockDiffusion", "DiffusionGemmaForMaskedBlockLM", "DiffusionGemmaModel", "undressed",
]  # fmt: skip
