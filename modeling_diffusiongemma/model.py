"""`DiffusionGemmaBlockModel`: one stack of layers that prefills a cache from the prompt and denoises a canvas over it.

Parameter names are the released checkpoint's, so its files load and save unchanged. "encoder" and "decoder" in them are
the two passes; here both are the stack in `decoder`, and `encoder` holds only what the prompt pass has of its own: the
vision tower, its projection, and one `layer_scalar` a layer.
"""

import torch
from torch import nn
from transformers import AutoModel, Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.gemma4.modeling_gemma4 import Gemma4MultimodalEmbedder

from generation.inputs import check_ids

from .checks import check_cache, check_mask, check_shape
from .configuration import DiffusionGemmaConfig, check_config
from .masks import cached_slots, canvas_mask, for_attention, image_numbers, prompt_mask, slot_tokens
from .outputs import BlockModelOutput
from .pretrained import DiffusionGemmaBlockPreTrainedModel
from .stack import BlockStack


class PromptScalars(nn.Module):
    """The prompt pass's `layer_scalar` of one layer. Published checkpoints hold the canvas pass's value; never assume it."""

    def __init__(self):
        super().__init__()
        self.layer_scalar = nn.Buffer(torch.ones(1))

    def forward(self) -> torch.Tensor:
        """A call, and no look at the buffer, so that Accelerate fetches it where buffers are offloaded."""
        return self.layer_scalar


class PromptSide(nn.Module):
    """What the prompt pass has beyond the stack: images, and its layer scalars."""

    def __init__(self, config: DiffusionGemmaConfig):
        super().__init__()
        self.language_model = nn.Module()
        self.language_model.layers = nn.ModuleList(PromptScalars() for _ in range(config.text_config.num_hidden_layers))
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.embed_vision = Gemma4MultimodalEmbedder(config.vision_config, config.text_config)


class DiffusionGemmaBlockModel(DiffusionGemmaBlockPreTrainedModel):
    """The model without its head: `prefill`, `denoise`, and both in one call."""

    saved_architecture = "DiffusionGemmaModel"

    def __init__(self, config: DiffusionGemmaConfig):
        check_config(config)
        super().__init__(config)
        self.decoder = BlockStack(config.text_config)
        self.encoder = PromptSide(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.embed_tokens = value

    def get_image_features(self, pixel_values: torch.Tensor, image_position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Soft tokens of the images, `(number of soft tokens, D)`, from patches as the Gemma 4 image processor makes them."""
        vision = self.encoder.vision_tower(pixel_values=pixel_values, pixel_position_ids=image_position_ids)
        return self.encoder.embed_vision(vision.last_hidden_state)

    def embed_prompt(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, image_position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Embeddings of the prompt, `(B, P, D)`, with the images' soft tokens in the places of `image_token_id`."""
        embeds = self.decoder.embed_tokens(input_ids)
        if pixel_values is None:
            return embeds
        places = input_ids == self.config.image_token_id
        features = self.get_image_features(pixel_values, image_position_ids).to(embeds)
        if int(places.sum()) != features.shape[0]:
            raise ValueError(
                f"`input_ids` holds {int(places.sum())} image tokens (id {self.config.image_token_id}) and `pixel_values` "
                f"gives {features.shape[0]} soft tokens; expected as many image tokens as soft tokens"
            )
        return embeds.masked_scatter(places[..., None], features)

    def prefill(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_position_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BaseModelOutputWithPast:
        """Runs new tokens causally and appends them to the cache. With a finished canvas as input this is the commit.

        Args:
            input_ids (`int64 (B, P)`): tokens not yet in the cache; or `inputs_embeds` `(B, P, D)` instead.
            attention_mask (`(B, L + P)`, *optional*): 0 at padding, cached tokens included. Rows may be padded on either
                side; right padding of prompts longer than the sliding window needs a cache that keeps everything, which
                is what is made here when `past_key_values` is None.
            position_ids (`int64 (B or 1, P)`, *optional*): default: each row's real tokens counted from 0.
            past_key_values (*optional*): any cache of transformers, appended to. Default: a new `DynamicCache`.
            pixel_values, image_position_ids (*optional*): patches and their coordinates, from the image processor.
            mm_token_type_ids (`(B, P)`, *optional*): 1 where a token belongs to an image, which is attended to
                bidirectionally inside itself. Default: where `input_ids` is `image_token_id`.

        Returns:
            `last_hidden_state` `(B, P, D)`, `past_key_values`, `hidden_states` and `attentions` on request.

        Raises:
            ValueError: ids out of range, an empty prompt, a mask of the wrong shape, images that do not fit the tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("prefill takes exactly one of `input_ids` and `inputs_embeds`")
        if input_ids is not None:
            check_ids("input_ids", input_ids, self.config.text_config.vocab_size)
        new = input_ids if inputs_embeds is None else inputs_embeds
        batch_size, length = new.shape[:2]
        if length == 0:
            raise ValueError(f"the prompt is empty: got shape {tuple(new.shape)}; expected at least one token")
        check_shape("position_ids", position_ids, (batch_size, length), (1, length))
        if past_key_values is not None:
            check_cache(past_key_values, batch_size, length)
        seen = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        padding = check_mask("attention_mask", attention_mask, (batch_size, seen + length))
        if padding is not None:
            padding = padding.to(new.device)
            padded_left = bool((padding.int().diff(dim=1) >= 0).all())
            if past_key_values is None and not padded_left:
                past_key_values = DynamicCache()
            elif not padded_left and any(past_key_values.is_sliding) and seen + length >= self.config.text_config.sliding_window:
                raise ValueError(
                    f"`attention_mask` pads {seen + length} tokens on the right and `past_key_values` keeps only the last of "
                    f"sliding_window={self.config.text_config.sliding_window} tokens; pad on the left, or pass `DynamicCache()`"
                )
        if past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        if inputs_embeds is None:
            inputs_embeds = self.embed_prompt(input_ids, pixel_values, image_position_ids)
        elif pixel_values is not None:
            raise ValueError("`pixel_values` needs `input_ids`, which say where the images stand; got `inputs_embeds`")
        if mm_token_type_ids is None and pixel_values is not None:
            mm_token_type_ids = (input_ids == self.config.image_token_id).long()
        if position_ids is None:
            position_ids = self._positions(padding, seen, length, inputs_embeds.device)

        masks = self._prompt_masks(past_key_values, seen, inputs_embeds, padding, mm_token_type_ids)
        scalars = [layer() for layer in self.encoder.language_model.layers]
        hidden_states, states, weights = self.decoder(
            inputs_embeds, position_ids, masks, past_key_values, True, scalars, output_hidden_states, output_attentions
        )
        return BaseModelOutputWithPast(hidden_states, past_key_values, states, weights)

    def denoise(
        self,
        canvas_ids: torch.Tensor,
        past_key_values: Cache,
        soft_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BaseModelOutputWithPast:
        """Runs a canvas bidirectionally over itself and the cache, which is read and not written.

        Args:
            canvas_ids (`int64 (B, C)`): the canvas, of any length.
            past_key_values: the prompt's cache, from `prefill`.
            soft_embeds (`(B, C, D)`, *optional*): soft embedding of the previous step's distribution, from
                `embed_tokens(probabilities)`. Default: zero, as at the first step.
            attention_mask (*optional*): `(B, L + C)` with 0 at padding, or what `canvas_masks` made (once a canvas).
            position_ids (`int64 (B or 1, C)`, *optional*): default: on from each row's real tokens.

        Returns:
            `last_hidden_state` `(B, C, D)`, the cache as it was given, `hidden_states` and `attentions` on request.
        """
        embeds = self.decoder.embed_tokens(canvas_ids)
        embeds = self.decoder.self_conditioning(embeds, torch.zeros_like(embeds) if soft_embeds is None else soft_embeds.to(embeds.dtype))
        seen = int(past_key_values.get_seq_length())
        if position_ids is None:
            padding = attention_mask.bool() if isinstance(attention_mask, torch.Tensor) else None
            position_ids = self._positions(padding, seen, canvas_ids.shape[1], embeds.device)
        if not isinstance(attention_mask, dict):
            attention_mask = self.canvas_masks(past_key_values, canvas_ids.shape, attention_mask)
        hidden_states, states, weights = self.decoder(
            embeds, position_ids, attention_mask, past_key_values, False, None, output_hidden_states, output_attentions
        )
        return BaseModelOutputWithPast(hidden_states, past_key_values, states, weights)

    def canvas_masks(
        self,
        past_key_values: Cache,
        canvas_shape: tuple[int, int],
        attention_mask: torch.Tensor | None = None,
        prefix_length: torch.Tensor | None = None,
    ) -> dict:
        """The canvas pass's masks, per layer type, for `denoise`; they hold for every step of one canvas.

        Args:
            past_key_values: the prompt's cache.
            canvas_shape: (B, C).
            attention_mask (`(B, L + C)`, *optional*): 0 at padding.
            prefix_length (`int64 (B,)`, *optional*): how many cached tokens come before each row's canvas; later ones stay
                unseen. Default: all.
        """
        config, (batch_size, length) = self.config.text_config, canvas_shape
        seen = int(past_key_values.get_seq_length())
        padding = check_mask("decoder_attention_mask", attention_mask, (batch_size, seen + length))
        masks = {}
        for layer_type in sorted(set(config.layer_types)):
            window = config.sliding_window if layer_type == "sliding_attention" else None
            layer_idx = config.layer_types.index(layer_type)
            slots = cached_slots(past_key_values, layer_idx)
            stored_exactly = slots == (seen if window is None else min(seen, window - 1))
            if padding is None and prefix_length is None and stored_exactly:
                masks[layer_type] = None  # every stored token is visible
                continue
            # Not a weight's device: it is "meta" while the weight is offloaded.
            given = next((tensor for tensor in (padding, prefix_length) if tensor is not None), None)
            device = (past_key_values.layers[layer_idx].keys if given is None else given).device
            prefix = torch.full((1,), seen, device=device) if prefix_length is None else prefix_length.to(device)
            visible = canvas_mask(slot_tokens(slots, seen, length, device), length, prefix, window, padding)
            masks[layer_type] = for_attention(visible, length, batch_size, config._attn_implementation, self.dtype)
        return masks

    def _prompt_masks(self, cache, seen, embeds, padding, mm_token_type_ids) -> dict:
        config, (batch_size, length) = self.config.text_config, embeds.shape[:2]
        images = None
        if config.use_bidirectional_attention == "vision" and mm_token_type_ids is not None:
            check_mask("mm_token_type_ids", mm_token_type_ids, (batch_size, length))
            images = image_numbers(mm_token_type_ids.to(embeds.device))
        query = torch.arange(seen, seen + length, device=embeds.device)
        plain = padding is None and images is None and seen == 0 and config._attn_implementation == "sdpa"
        masks = {}
        for layer_type in sorted(set(config.layer_types)):
            window = config.sliding_window if layer_type == "sliding_attention" else None
            if plain and (window is None or length <= window):
                masks[layer_type] = None  # sdpa's own causal mask
                continue
            slots = cached_slots(cache, config.layer_types.index(layer_type))
            visible = prompt_mask(slot_tokens(slots, seen, length, embeds.device), query, window, padding, images)
            masks[layer_type] = for_attention(visible, length, batch_size, config._attn_implementation, embeds.dtype)
        return masks

    @staticmethod
    def _positions(padding: torch.Tensor | None, seen: int, length: int, device: torch.device) -> torch.Tensor:
        """Positions of the last `length` of `seen + length` tokens: how many real tokens of the row come before each."""
        if padding is None:
            return torch.arange(seen, seen + length, device=device)[None]
        return (padding.cumsum(dim=1) - 1).clamp(min=0)[:, -length:].to(device)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        soft_embeds: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | dict | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_position_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BlockModelOutput | tuple:
        """`prefill` on the prompt, if one is given, then `denoise` on the canvas. Arguments as there.

        Without `decoder_input_ids` the canvas is `canvas_length` uniform random tokens. `decoder_attention_mask` defaults
        to `attention_mask` followed by an unpadded canvas.
        """
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_weights = self.config.output_attentions if output_attentions is None else output_attentions
        prompt, prompt_states = input_ids if inputs_embeds is None else inputs_embeds, None
        # A refused call changes nothing: the canvas is checked before the prompt reaches the cache.
        decoder_input_ids, decoder_attention_mask = self._prepare_canvas(
            prompt, attention_mask, past_key_values, decoder_input_ids, decoder_attention_mask, decoder_position_ids, soft_embeds
        )
        if prompt is not None:
            prefilled = self.prefill(
                input_ids, attention_mask, position_ids, past_key_values, inputs_embeds,
                pixel_values, image_position_ids, mm_token_type_ids,
            )  # fmt: skip
            past_key_values, prompt_states = prefilled.past_key_values, prefilled.last_hidden_state
        denoised = self.denoise(
            decoder_input_ids,
            past_key_values,
            soft_embeds,
            decoder_attention_mask,
            decoder_position_ids,
            keep_states,
            keep_weights,
        )
        output = BlockModelOutput(
            last_hidden_state=denoised.last_hidden_state,
            past_key_values=past_key_values,
            hidden_states=denoised.hidden_states,
            attentions=denoised.attentions,
            encoder_last_hidden_state=prompt_states,
        )
        return output.to_tuple() if return_dict is False else output

    def _prepare_canvas(self, prompt, attention_mask, cache, canvas_ids, canvas_attention_mask, canvas_position_ids, soft_embeds):
        """Checks what `forward` got for the canvas and fills in what it did not. Returns the canvas and its mask."""
        config, seen = self.config, 0 if cache is None else int(cache.get_seq_length())
        if prompt is None and seen == 0:
            raise ValueError("the model needs a prompt: pass `input_ids`, `inputs_embeds`, or a filled `past_key_values`")
        if canvas_ids is None:
            if prompt is None:
                raise ValueError("`decoder_input_ids` is missing; expected a canvas, since there is no prompt to take its batch size from")
            size = (prompt.shape[0], config.canvas_length)
            canvas_ids = torch.randint(config.text_config.vocab_size, size, device=prompt.device)
        check_ids("decoder_input_ids", canvas_ids, config.text_config.vocab_size)
        rows, length = canvas_ids.shape
        if length == 0 or (prompt is not None and prompt.dim() > 1 and prompt.shape[0] != rows):
            expected = "at least one position" if length == 0 else f"{prompt.shape[0]} rows, as the prompt has"
            raise ValueError(f"`decoder_input_ids` has shape {(rows, length)}; expected {expected}")
        total = seen + (0 if prompt is None or prompt.dim() < 2 else prompt.shape[1])
        if prompt is None:
            check_cache(cache, rows, 0)
        if canvas_attention_mask is None and attention_mask is not None:
            check_mask("attention_mask", attention_mask, (rows, total))
            canvas_attention_mask = torch.cat((attention_mask.bool(), torch.ones_like(canvas_ids, dtype=torch.bool)), dim=1)
        if not isinstance(canvas_attention_mask, dict):
            check_mask("decoder_attention_mask", canvas_attention_mask, (rows, total + length))
        check_shape("decoder_position_ids", canvas_position_ids, (rows, length), (1, length))
        check_shape("soft_embeds", soft_embeds, (rows, length, config.text_config.hidden_size))
        return canvas_ids, canvas_attention_mask


__all__ = ["DiffusionGemmaBlockModel"]
