"""`DiffusionGemmaBlockModel`: one stack of layers that prefills a cache from the prompt and denoises a canvas over it.

Parameter names are the released checkpoint's, so its files load and save unchanged. "encoder" and "decoder" in them are
the two passes; here both are the stack in `decoder`, and `encoder` holds only what the prompt pass has beyond it: the
vision tower, its projection, and one `layer_scalar` a layer.
"""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import nn
from transformers import AutoModel, Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.gemma4.modeling_gemma4 import Gemma4ClippableLinear, Gemma4MultimodalEmbedder
from transformers.utils.generic import can_return_tuple

from generation.cache_names import FIELD, takes_cache
from generation.call.caches import dynamic_cache
from generation.checks import check_cache, check_ids, check_mask, check_shape, check_tensors, chosen_states, plain_mask, readable

from ..layers.caches import cached_length, check_update
from ..layers.checks import check_cached_shapes, check_outputs, check_patches, refuses_unknown
from ..layers.configuration import DiffusionGemmaConfig, check_config, routing_settings
from ..layers.masks import image_numbers
from ..layers.outputs import BlockModelOutput, PassOutput
from ..layers.view import View, canvas_view, positions, prompt_view
from ..training.ranks import gathering_groups
from ..weights.stored import second_stack_in
from .adapters import take_in
from .apart import check_whole, held_twice, pull_apart, twin
from .plain import check_called, looked_into
from .pretrained import DiffusionGemmaBlockPreTrainedModel
from .stack import BlockStack, PromptLayer

LEARNS_NOTHING = (
    "`decoder_input_ids` is None in training: the canvas would be noise, of which there is nothing to learn; expected a canvas, or, of the "
    "model with its head, `labels` of whole examples. Trainer takes `labels` away for `label_smoothing_factor` and `compute_loss_func`; "
    "trainers of causal models, such as TRL's, have losses of their own, and give none"
)
OUTPUTS = ("states", "states of the layers", "attention weights", "router logits")  # of a stack
CHUNK = 2048  # prompt tokens of a row in one pass, where nothing asks for all of them at once


def chunks(length: int, chunk_length: int, images: torch.Tensor | None = None) -> list[tuple[int, int]]:
    """Cuts `length` tokens into chunks of at most `chunk_length`, longer only where an image would be cut.

    Args: `images` int64 (B, length), the image each token belongs to (`image_numbers`). Returns: start and end of each chunk.
    """
    cuts = range(length + 1)
    if images is not None:
        inside = ((images[:, 1:] == images[:, :-1]) & (images[:, 1:] >= 0)).any(dim=0).tolist()  # between j and j + 1
        cuts = [0, *(place + 1 for place, cut in enumerate(inside) if not cut), length]
    ends = [0]
    while ends[-1] < length:
        here = bisect_right(cuts, ends[-1])  # the first place to cut behind the last one
        ends.append(cuts[max(bisect_right(cuts, ends[-1] + chunk_length) - 1, here)])
    return list(pairwise(ends))


class PromptSide(nn.Module):
    """What the prompt pass has beyond the stack: images, and where it enters the layers; or, in `language_model`, a stack of its own."""

    def __init__(self, config: DiffusionGemmaConfig):
        super().__init__()
        self.language_model = nn.Module()
        self.language_model.layers = nn.ModuleList(PromptLayer() for _ in range(config.text_config.num_hidden_layers))
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.embed_vision = Gemma4MultimodalEmbedder(config.vision_config, config.text_config)

    def named_modules(self, *args, **kwargs) -> Iterator[tuple[str, nn.Module]]:
        """Without the vision tower's wrappers of linear layers that clip nothing and so hold nothing themselves. PEFT takes its targets
        by the ends of their names: `q_proj` then means the stack's layers, and no wrapper that it cannot adapt."""
        for name, module in super().named_modules(*args, **kwargs):
            if not isinstance(module, Gemma4ClippableLinear) or module._buffers:
                yield name, module

    def forward(self, *args, **kwargs):
        """Refused: it is no pass by itself."""
        door = "`modeling_diffusiongemma.drop_in.DiffusionGemmaForBlockDiffusion` has an `encoder` that is a pass"
        raise ValueError(f"`encoder` holds what the prompt pass needs and is no pass; expected a call of `prefill`; {door}")

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, image_position_ids: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """The vision tower's output for patches as the Gemma 4 image processor makes them; its `pooler_output` are the images' soft tokens,
        `(number of soft tokens, D)`.

        Args: `kwargs` as the tower takes them, and `return_dict`.
        """
        vision = self.vision_tower(pixel_values=pixel_values, pixel_position_ids=image_position_ids, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=vision.last_hidden_state,
            pooler_output=self.embed_vision(vision.last_hidden_state),
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
        )


class DiffusionGemmaBlockModel(DiffusionGemmaBlockPreTrainedModel):
    """The model without its head: `prefill`, `denoise`, and both in one call."""

    saved_architecture = "DiffusionGemmaModel"

    def __init__(self, config: DiffusionGemmaConfig):
        check_config(config)
        super().__init__(config)
        self.decoder = BlockStack(config.text_config)
        self.encoder = PromptSide(config)
        self.post_init()

    @property
    def prompt_stack(self) -> BlockStack:
        """The stack that the prompt pass runs through: the canvas pass's, unless `pull_apart` was called."""
        return self.encoder.language_model if isinstance(self.encoder.language_model, BlockStack) else self.decoder

    def pull_apart(self) -> None:
        """Gives the prompt pass modules of its own, as `encoder.language_model`, over the same weights (`apart`): what is attached to one
        of the two stacks then counts in one pass alone. It lasts; called again it changes nothing.
        """
        if self.prompt_stack is self.decoder:
            self.encoder.language_model = pull_apart(self.decoder, self.encoder.language_model.layers)

    def held_twice(self, prefix: str = "") -> dict[str, str]:
        """Names of what two stacks hold together: its name in the prompt pass's to that in the canvas pass's, by which it is saved."""
        if self.prompt_stack is self.decoder:
            return {}
        names = held_twice(self.decoder, self.prompt_stack)
        return {f"{prefix}encoder.language_model.{name}": f"{prefix}decoder.{original}" for name, original in names.items()}

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """As in torch; a state dict of one stack will do, and one of adapters from elsewhere (`take_in`).

        Raises:
            ValueError: two stacks that differ; of two over the same weights the last would count.
        """
        take_in(self, state_dict, prefix)
        shared = self.held_twice(prefix)
        second_stack_in({name: state_dict[name] for pair in shared.items() if pair[1] in state_dict for name in pair if name in state_dict})
        for name, original in shared.items():
            if original in state_dict:
                state_dict.setdefault(name, state_dict[original])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        if self.prompt_stack is not self.decoder:
            self.prompt_stack.embed_tokens = twin(value)
        self.decoder.embed_tokens = value

    def get_image_features(self, *args, **kwargs) -> BaseModelOutputWithPooling | tuple:
        """`PromptSide.get_image_features`."""
        return self.encoder.get_image_features(*args, **kwargs)

    @takes_cache
    @refuses_unknown
    def prefill(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_position_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] = False,
        output_attentions: bool = False,
        chunk_length: int | None = None,
        last_states: int | None = None,
        output_router_logits: bool = False,
        documents: torch.Tensor | None = None,
    ) -> PassOutput:
        """Runs new tokens causally and appends them to the cache. With a finished canvas as input this is the commit.

        Args:
            input_ids (`int64 (B, P)`): tokens not yet in the cache; or `inputs_embeds` `(B, P, D)` instead.
            attention_mask (`(B, L + P)`, *optional*): 0 at padding, cached tokens included. Rows may be padded on either
                side; right padding of prompts longer than the sliding window needs a cache that keeps everything, which
                is what is made here when `cache` is None.
            position_ids (`int64 (B or 1, P)`, *optional*): default: each row's real tokens counted from 0.
            cache (*optional*): any cache of transformers, appended to. Default: a new `DynamicCache`.
            pixel_values, image_position_ids (*optional*): patches and their coordinates, from the image processor.
            mm_token_type_ids (`(B, P)`, *optional*): 1, or 2 as of a video's frame, where a token belongs to an image, which is attended
                to bidirectionally inside itself. Default: where `input_ids` is `image_token_id`.
            chunk_length (*optional*): without gradients, a longer prompt goes through in chunks of at most so many tokens, which
                bounds the memory and gives the same; an image is never cut. Default: 2,048, and everything at once with gradients or
                where states, attentions or router logits are asked for, hooks look on, or weights are gathered from other ranks.
            last_states (*optional*): return `last_hidden_state` of so many last tokens only. Default: of all.
            documents (`int64 (B, P)`, *optional*): in rows that hold several conversations, which of them each token belongs to; it sees
                tokens of its conversation alone. For an empty cache, and everything at once; `position_ids` count within conversations.

        Raises:
            ValueError: ids out of range, an empty prompt, a mask of the wrong shape, images that do not fit the tokens.
        """
        self._check_call(
            input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids, pixel_values=pixel_values,
            image_position_ids=image_position_ids, mm_token_type_ids=mm_token_type_ids,
        )  # fmt: skip
        new = input_ids if inputs_embeds is None else inputs_embeds
        (batch_size, length), at_once = new.shape[:2], output_hidden_states or output_attentions or output_router_logits
        for name, value in (("chunk_length", chunk_length), ("last_states", last_states)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; expected a positive integer or None")
        if chunk_length is not None and (at_once or torch.is_grad_enabled()):
            asked = "`output_hidden_states`, `output_attentions` or `output_router_logits`"
            why = "with gradients" if torch.is_grad_enabled() else f"together with {asked}"
            raise ValueError(f"`chunk_length` is {chunk_length}; expected None {why}")
        seen = cached_length(cache, waits=True)
        check_shape("documents", documents, (batch_size, length))
        if documents is not None and (seen or position_ids is None):
            raise ValueError("`documents` is given; expected `position_ids` beside it, and an empty `cache`")
        real = check_mask("attention_mask", plain_mask("attention_mask", attention_mask), (batch_size, seen + length))
        real = None if real is None else real.to(new.device)
        cache = self._cache_for(cache, real, batch_size, seen, length)
        if pixel_values is not None:
            inputs_embeds = self.embed_prompt(input_ids, pixel_values, image_position_ids)
            mm_token_type_ids = input_ids == self.config.image_token_id if mm_token_type_ids is None else mm_token_type_ids
        images = None  # which image of its row each token belongs to, int64 (B, P)
        if self.config.text_config.use_bidirectional_attention == "vision" and mm_token_type_ids is not None:
            check_shape("mm_token_type_ids", mm_token_type_ids, (batch_size, length))
            images = image_numbers(mm_token_type_ids.to((new if inputs_embeds is None else inputs_embeds).device))
        position_ids = positions(real, seen, length, new.device) if position_ids is None else position_ids
        first_kept, stack, kept = 0 if last_states is None else max(length - last_states, 0), self.prompt_stack, []
        apart = stack is not self.decoder
        entry = None if apart else self.encoder.language_model.layers.__getitem__
        for start, end in [(0, length)] if at_once or documents is not None else self._cuts(length, chunk_length, images):
            here = slice(start, end)
            embeds = stack.embed_tokens(input_ids[:, here]) if inputs_embeds is None else inputs_embeds[:, here]
            view = prompt_view(
                stack, cache, seen + start, embeds, position_ids[:, here],
                None if real is None else real[:, : seen + end], None if images is None else images[:, here], documents,
            )  # fmt: skip
            outputs = stack(embeds, view, entry, cache, output_hidden_states, output_attentions, bool(output_router_logits))
            hidden_states, states, weights, routing = check_outputs(outputs, "encoder.language_model" if apart else "decoder", OUTPUTS)
            if end > first_kept:
                kept.append(hidden_states[:, max(first_kept - start, 0) :])
        return PassOutput(kept[0] if len(kept) == 1 else torch.cat(kept, dim=1), cache, states, weights, routing)

    def _check_call(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, **tensors: torch.Tensor | None) -> None:
        """Of `prefill`: the tokens of a prompt and what belongs to them, each by itself and with the model."""
        if (input_ids is None) == (inputs_embeds is None):
            got = "are both None" if input_ids is None else "are both given"
            raise ValueError(f"`input_ids` and `inputs_embeds` {got}; expected exactly one of them")
        if not torch.compiler.is_compiling():
            check_called("the prompt pass", self.containers())
            if self.prompt_stack is not self.decoder:
                check_whole(self.decoder, self.prompt_stack)
        check_tensors(input_ids=input_ids, inputs_embeds=inputs_embeds, **tensors)
        new = input_ids if inputs_embeds is None else inputs_embeds
        if input_ids is not None:
            check_ids("input_ids", input_ids, self.config.text_config.vocab_size)
        if new.shape[1] == 0:
            raise ValueError(f"the prompt is empty: got shape {tuple(new.shape)}; expected at least one token")
        check_shape("position_ids", tensors["position_ids"], tuple(new.shape[:2]), (1, new.shape[1]))
        check_patches(self.config, input_ids, tensors["pixel_values"], tensors["image_position_ids"])

    def _cuts(self, length: int, chunk_length: int | None, images: torch.Tensor | None) -> list[tuple[int, int]]:
        """Start and end of the chunks in which a prompt of `length` goes through, where nothing asks for its states: one, unless it is
        long, no gradient is wanted, and it was either asked for or nobody notices."""
        whole = torch.is_grad_enabled() or length <= (chunk_length or CHUNK)
        if not whole and chunk_length is None:
            whole = any(map(looked_into, (self.prompt_stack, self.encoder.language_model))) or bool(gathering_groups(self))
        return [(0, length)] if whole else chunks(length, chunk_length or CHUNK, images)

    def _cache_for(self, cache: Cache | None, real: torch.Tensor | None, rows: int, seen: int, length: int) -> Cache:
        """The cache to append `length` tokens to: the caller's, or a new one, which keeps all where rows may be padded on the right."""
        padded_left, traced = real is None, not readable(real)  # the side is not known then: a cache made here suits both
        if real is not None:
            padded_left = not traced and bool((real.int().diff(dim=1) >= 0).all())
        config = self.config.text_config
        if cache is None:
            return dynamic_cache(config) if padded_left else DynamicCache()
        check_cache(cache, rows, seen, length)
        if not torch.compiler.is_compiling():
            check_update(cache)
        if not (padded_left or traced) and any(cache.is_sliding) and seen + length >= config.sliding_window:
            raise ValueError(
                f"`attention_mask` pads {seen + length} tokens on the right and `cache` keeps only the last of "
                f"sliding_window={config.sliding_window} tokens; pad on the left, or pass `DynamicCache()`"
            )
        return cache

    def embed_prompt(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, image_position_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of a prompt, `(B, P, D)`, with the images' soft tokens in the places of `image_token_id`."""
        embeds, places = self.prompt_stack.embed_tokens(input_ids), input_ids == self.config.image_token_id
        features = self.get_image_features(pixel_values, image_position_ids, return_dict=True).pooler_output.to(embeds)
        if readable(places) and int(places.sum()) != features.shape[0]:
            raise ValueError(
                f"`input_ids` holds {int(places.sum())} image tokens (id {self.config.image_token_id}) and `pixel_values` "
                f"gives {features.shape[0]} soft tokens; expected as many image tokens as soft tokens"
            )
        return embeds.masked_scatter(places[..., None], features)

    def check_prompt(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None, pixel_values: torch.Tensor | None = None,
        image_position_ids: torch.Tensor | None = None, mm_token_type_ids: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Raises what `prefill` would for these, changing nothing."""
        new = input_ids if inputs_embeds is None else inputs_embeds
        if input_ids is not None:
            check_ids("input_ids", input_ids, self.config.text_config.vocab_size)
        elif inputs_embeds.dtype != (expected := self.decoder.embed_dtype):
            raise ValueError(f"`inputs_embeds` is {inputs_embeds.dtype}; expected {expected}, as the model's embeddings are")
        if cache is not None:
            check_cache(cache, new.shape[0], cached_length(cache, waits=True), new.shape[1])
            check_cached_shapes(cache, self.config.text_config)
        check_shape("mm_token_type_ids", mm_token_type_ids, tuple(new.shape[:2]))
        check_patches(self.config, input_ids, pixel_values, image_position_ids)
        check_called("generation", self.containers())

    def containers(self) -> dict[str, nn.Module]:
        """Modules that hold others and that no pass calls, by name."""
        held = {"model.encoder": self.encoder, "model.encoder.language_model": self.encoder.language_model}
        return {name: module for name, module in held.items() if module is not self.prompt_stack}

    @takes_cache
    @refuses_unknown
    def denoise(
        self,
        canvas_ids: torch.Tensor,
        cache: Cache | None = None,
        soft_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        view: View | None = None,
        output_hidden_states: bool | int | list[int] = False,
        output_attentions: bool = False,
        output_router_logits: bool = False,
    ) -> PassOutput:
        """Runs a canvas bidirectionally over itself and the cache, to which nothing is appended.

        Args:
            canvas_ids (`int64 (B, C)`): the canvas, of any length.
            cache (*optional*): the prompt's cache, from `prefill`.
            soft_embeds (`(B, C, D)`, *optional*): soft embedding of the previous step's distribution, as
                `plain.expected_embedding` makes it. Default: zero, as at the first step.
            attention_mask (`(B, L + C)`, *optional*): 0 at padding.
            position_ids (`int64 (B or 1, C)`, *optional*): default: on from each row's real tokens.
            view (*optional*): what `prepare_canvas` made of these three, once for all steps of a canvas. A step with a view
                reads nothing back from the device and copies nothing to it.

        Raises:
            ValueError: neither or both of `cache` and `view`, a view of another canvas, a mask of the wrong shape.
        """
        check_tensors(canvas_ids=canvas_ids, soft_embeds=soft_embeds, position_ids=position_ids)
        if (view is None) == (cache is None):
            raise ValueError("`denoise` takes the cache as `cache` or inside a `view`; expected exactly one of them")
        if view is None:
            view = canvas_view(self.decoder, cache, tuple(canvas_ids.shape), attention_mask, position_ids)
        elif attention_mask is not None or position_ids is not None:
            raise ValueError("`view` holds masks and positions already; expected `attention_mask` and `position_ids` to be None")
        elif tuple(canvas_ids.shape) != view.shape:
            raise ValueError(f"`canvas_ids` has shape {tuple(canvas_ids.shape)}; expected {view.shape}, the shape of the `view`")
        embeds = self.decoder.embed_tokens(canvas_ids)
        embeds = self.decoder.self_conditioning(embeds, torch.zeros_like(embeds) if soft_embeds is None else soft_embeds.to(embeds.dtype))
        outputs = self.decoder(embeds, view, None, None, output_hidden_states, output_attentions, bool(output_router_logits))
        hidden_states, states, weights, routing = check_outputs(outputs, "decoder", OUTPUTS)
        return PassOutput(hidden_states, cache, states, weights, routing)

    @takes_cache
    @refuses_unknown
    def prepare_canvas(
        self,
        cache: Cache,
        canvas_shape: tuple[int, int],
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        prefix_length: torch.Tensor | None = None,
        slots: int = 0,
        documents: torch.Tensor | None = None,
    ) -> View:
        """Masks, rotary tables, and keys and values with room for the canvas: all that the steps of one canvas share.

        The view holds until something is appended to the cache. Made without gradients it passes none to the prompt.

        Args:
            cache: the prompt's cache. The tensors of its dynamic layers are replaced by equal ones that have room
                behind them, so that nothing is stored twice; a static cache's stay, and the view holds a copy of what they hold.
            canvas_shape: (B, C).
            attention_mask, position_ids: as in `denoise`.
            prefix_length (`int64 (B,)` or `(B, K)`, *optional*): how many cached tokens come before each row's canvas; later ones stay
                unseen. Default: all. With K of them the C tokens are K canvases side by side, of which none sees another.
            slots: at least so many slots for cached tokens, those not filled being masked (and a mask also where all are). With the
                length that the cache will reach, the views of all canvases have equal shapes, which a recorded step needs.
            documents (`int64 (B, L)`, *optional*): of packed rows, which conversation each cached token belongs to; a canvas belongs to
                that of the token before its prefix ends.
        """
        if prefix_length is not None and prefix_length.dim() == 1:
            prefix_length = prefix_length[:, None]
        if prefix_length is not None and (len(prefix_length) != canvas_shape[0] or canvas_shape[1] % prefix_length.shape[1]):
            expected = f"(B,) or (B, K) of B = {canvas_shape[0]} rows, whose {canvas_shape[1]} tokens are K equal canvases"
            raise ValueError(f"`prefix_length` has shape {tuple(prefix_length.shape)}; expected {expected}")
        if documents is not None and prefix_length is None:
            raise ValueError("`documents` is given without `prefix_length`; expected where each row's canvas stands")
        view = canvas_view(self.decoder, cache, canvas_shape, attention_mask, position_ids, prefix_length, slots, documents)
        # With gradients steps concatenate: what every one of them wrote is needed.
        return view if torch.is_grad_enabled() else view._replace(cached=view.cached.with_room(canvas_shape[1], slots))

    @takes_cache
    @refuses_unknown
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        soft_embeds: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_position_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        output_router_logits: bool | None = None,
    ) -> BlockModelOutput | tuple:
        """`prefill` on the prompt, if one is given, then `denoise` on the canvas. Arguments as there.

        Without `decoder_input_ids` the canvas is `canvas_length` uniform random tokens, which is refused in training with gradients.
        `decoder_attention_mask` defaults to `attention_mask` followed by an unpadded canvas. `use_cache=False`: a cache that the call
        made itself is not returned.
        """
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_states = chosen_states(keep_states, self.config.text_config.num_hidden_layers + 1)
        keep_weights = self.config.output_attentions if output_attentions is None else output_attentions
        keep_routing = routing_settings(self.config)[0] if output_router_logits is None else output_router_logits
        prompt, prefilled = input_ids if inputs_embeds is None else inputs_embeds, PassOutput()
        check_tensors(
            input_ids=input_ids, inputs_embeds=inputs_embeds, decoder_input_ids=decoder_input_ids, soft_embeds=soft_embeds,
            decoder_position_ids=decoder_position_ids,
        )  # fmt: skip
        # A refused call changes nothing: the canvas is checked before the prompt reaches the cache.
        seen = cached_length(cache)
        if prompt is None and seen == 0:
            raise ValueError("`input_ids` and `inputs_embeds` are None, and no token is cached; expected a prompt, or a filled `cache`")
        decoder_input_ids = self._noise(prompt) if decoder_input_ids is None else decoder_input_ids
        check_ids("decoder_input_ids", decoder_input_ids, self.config.text_config.vocab_size)
        rows, length = decoder_input_ids.shape
        if length == 0 or (prompt is not None and prompt.shape[0] != rows):
            expected = "at least one position" if length == 0 else f"{prompt.shape[0]} rows, as the prompt has"
            raise ValueError(f"`decoder_input_ids` has shape {(rows, length)}; expected {expected}")
        total = seen + (0 if prompt is None else prompt.shape[1])
        if prompt is None:
            check_cache(cache, rows, seen, 0)
        decoder_attention_mask = plain_mask("decoder_attention_mask", decoder_attention_mask)
        attention_mask = plain_mask("attention_mask", attention_mask)
        if decoder_attention_mask is None and (real := check_mask("attention_mask", attention_mask, (rows, total))) is not None:
            canvas = torch.ones_like(decoder_input_ids, dtype=torch.bool)
            decoder_attention_mask = torch.cat((real.to(canvas.device), canvas), dim=1)
        check_mask("decoder_attention_mask", decoder_attention_mask, (rows, total + length))
        check_shape("decoder_position_ids", decoder_position_ids, (rows, length), (1, length))
        check_shape("soft_embeds", soft_embeds, (rows, length, self.config.text_config.hidden_size))
        if prompt is not None:
            prefilled = self.prefill(
                input_ids, attention_mask, position_ids, cache, inputs_embeds,
                pixel_values, image_position_ids, mm_token_type_ids, output_router_logits=keep_routing,
            )  # fmt: skip
        filled = cache if prompt is None else prefilled.cache
        denoised = self.denoise(
            decoder_input_ids, filled, soft_embeds, decoder_attention_mask, decoder_position_ids,
            output_hidden_states=keep_states, output_attentions=keep_weights, output_router_logits=keep_routing,
        )  # fmt: skip
        output = BlockModelOutput(
            last_hidden_state=denoised.last_hidden_state, **{FIELD: cache if use_cache is False else filled},
            hidden_states=denoised.hidden_states, attentions=denoised.attentions, router_logits=denoised.router_logits,
            encoder_last_hidden_state=prefilled.last_hidden_state, encoder_router_logits=prefilled.router_logits,
        )  # fmt: skip
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _noise(self, prompt: torch.Tensor | None) -> torch.Tensor:
        """A canvas of uniform random ids for each row of a prompt."""
        if self.training and torch.is_grad_enabled():
            raise ValueError(LEARNS_NOTHING)
        if prompt is None:
            raise ValueError("`decoder_input_ids` is missing; expected a canvas, since there is no prompt to take its batch size from")
        size = (prompt.shape[0], self.config.canvas_length)
        return torch.randint(self.config.text_config.vocab_size, size, dtype=torch.int64, device=prompt.device)


__all__ = ["DiffusionGemmaBlockModel"]
