"""Names of transformers' two-stack model that other libraries call, as thin views of the one stack. No weights, no state.

Diffusers' `DiffusionGemmaPipeline` (0.42.1) drives `DiffusionGemmaForBlockDiffusion` by hand: it fills the cache by calling
`model.model.encoder`, asks `model.model.decoder` for the canvas's masks, and then calls the model once a denoising step.
"""

import weakref

from torch import nn
from transformers import Cache

from generation.cache_names import takes_cache

from ..layers.outputs import PassOutput


class PromptPassView(nn.Module):
    """Makes a submodule callable as the prompt pass of the model it belongs to.

    The model is held weakly, so that deleting it frees it at once, and left out of copies and pickles: the copied model shows itself.
    Shallow copies of a model share this submodule, and any of them that is left serves.
    """

    def show(self, model) -> None:
        """Says whose prompt pass this is: a `DiffusionGemmaBlockModel`."""
        self.shown = [*(one for one in getattr(self, "shown", ()) if one() is not None), weakref.ref(model)]

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "shown"}

    @takes_cache
    def forward(self, input_ids=None, attention_mask=None, cache: Cache | None = None, position_ids=None, **images) -> PassOutput:
        """`DiffusionGemmaBlockModel.prefill`, arguments and errors as there. Image tokens attend to each other inside their image;
        in transformers' model, called so, they attend causally."""
        model = next(model for one in self.shown if (model := one()) is not None)
        return model.prefill(input_ids, attention_mask, position_ids, cache, **images)


class CanvasMasksView:
    """The canvas pass's masks under transformers' name."""

    @staticmethod
    @takes_cache
    def create_diffusion_decoder_attention_mask(config=None, inputs_embeds=None, cache: Cache | None = None, decoder_attention_mask=None):
        """What the model takes as `decoder_attention_mask`: the 2-D mask `(B, L + C)` itself, from which it builds every layer's."""
        return decoder_attention_mask


__all__ = ["CanvasMasksView", "PromptPassView"]
