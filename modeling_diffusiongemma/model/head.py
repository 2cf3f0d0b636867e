"""`DiffusionGemmaForMaskedBlockLM`: the model with its tied head, its training loss and its generation."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import Cache, CompileConfig
from transformers.utils import logging

from generation.cache_names import FIELD, takes_cache
from generation.call.configuration import FURTHER_FILE, DiffusionGenerationConfig
from generation.checks import check_ids, check_images, check_shape, check_tensors, plain_mask, readable
from generation.mixin import DiffusionGenerationMixin
from generation.vocabulary.walk import VocabularyHead

from ..layers.checks import refuses_unknown
from ..layers.configuration import DiffusionGemmaConfig, routing_settings, softcap
from ..layers.layers import ScaledEmbedding
from ..layers.outputs import BlockModelOutput, MaskedBlockOutput
from ..layers.view import View
from ..training.canvases import IGNORED
from ..training.fused_head import refuse_fused_head
from ..training.loss import balancing_loss, block_diffusion_loss
from ..training.objective import Objective
from ..training.ranks import in_step
from ..training.score import Score, score_responses
from ..weights.stored import second_head_in
from .adapters import take_in
from .block_model import DiffusionGemmaBlockModel
from .compiling import compiled_layers
from .plain import attached, brought_in, check_called, conditioning, expected_embedding, looked_into, passed_by, runs_on, why_not_plain
from .pretrained import DiffusionGemmaBlockPreTrainedModel

logger = logging.get_logger(__name__)


class DiffusionGemmaForMaskedBlockLM(DiffusionGemmaBlockPreTrainedModel, DiffusionGenerationMixin):
    """DiffusionGemma with its language-model head.

    What is masked are the noised positions of a block (the canvas): the model sees the canvas with some of its tokens
    replaced by noise and predicts the clean token of every position. The released model's noise is a random token.

    For generation it offers what `generation` asks of any model: `check_prompt`, `prefill`, `prepare_canvas` and `denoise` of
    `DiffusionGemmaBlockModel`, `compute_logits`, `soft_embed`.
    """

    saved_architecture = "DiffusionGemmaForBlockDiffusion"
    generation_config_class = DiffusionGenerationConfig  # PreTrainedModel's own would come first otherwise
    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    objective = Objective()  # what `labels` of whole examples mean; set another on a model

    def __init__(self, config: DiffusionGemmaConfig):
        super().__init__(config)
        self.model = DiffusionGemmaBlockModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @property
    def base_model(self) -> nn.Module:
        """As in transformers; ValueError where TRL's trainers would take its states for the next token's (`fused_head`)."""
        refuse_fused_head(self)
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def held_twice(self) -> dict[str, str]:
        """`DiffusionGemmaBlockModel.held_twice`."""
        return self.model.held_twice("model.")

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *args) -> None:
        """As in torch, adapters from elsewhere included (`take_in`).

        Raises:
            ValueError: head and embedding differ and are one weight here; with `assign=True` they are two from then on.
        """
        take_in(self, state_dict, prefix)
        weights = [vars(module)["_parameters"].get("weight") for module in (self.lm_head, self.model.decoder.embed_tokens)]
        if weights[0] is weights[1] is not None and not local_metadata.get("assign_to_params_buffers"):
            second_head_in(state_dict, f"{prefix}lm_head.weight", f"{prefix}model.decoder.embed_tokens.weight", weights[0])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def prefill(self, *args, **kwargs):
        """`DiffusionGemmaBlockModel.prefill`."""
        return self.model.prefill(*args, **kwargs)

    def check_prompt(self, *args, **kwargs) -> None:
        """`DiffusionGemmaBlockModel.check_prompt`."""
        if (what := attached(self)) is not None:
            instead = "hooks on its layers, a `watcher`, or `prefill`, `denoise` or `compute_logits` of a subclass"
            raise ValueError(f"the model has {what}, and generation does not call it; expected {instead}")
        self.check_called("generation")
        for name, module, kind in (
            ("lm_head", self.lm_head, nn.Linear),
            ("embed_tokens", self.model.decoder.embed_tokens, ScaledEmbedding),
        ):
            if why_not_plain(module, kind) is not None:
                continue
            if (ids := module.weight.shape[0]) != (known := self.config.text_config.vocab_size):
                expected = "expected as many, which `resize_token_embeddings` makes of all three"
                raise ValueError(f"`{name}` has {ids} ids, and `vocab_size` of the text config is {known}; {expected}")
            if runs_on(module).type == "meta":  # of which torch makes numbers without a word
                why = "expected `tie_weights()` before weights are loaded by hand, such as by `load_checkpoint_and_dispatch`"
                raise ValueError(f"the weight of `{name}` was never loaded, and is on the meta device; {why}")
        for name, module in {"": self, "model": self.model, **self.model.containers()}.items():
            if (what := passed_by(module)) is not None:
                called = f"`{name}`" if name else "the model"
                logger.warning_once(f"Generation calls the layers of the model and not {called} as a function, which is {what}.")
        softcap(self.config.text_config)  # now, not behind a prompt pass
        self.model.check_prompt(*args, **kwargs)

    def check_called(self, caller: str) -> None:
        """Raises ValueError where something is attached to `model`, for a `caller` that runs its passes and does not call it."""
        check_called(caller, {"model": self.model})

    def denoise(self, *args, **kwargs):
        """`DiffusionGemmaBlockModel.denoise`."""
        return self.model.denoise(*args, **kwargs)

    def prepare_canvas(self, *args, **kwargs) -> View:
        """`DiffusionGemmaBlockModel.prepare_canvas`."""
        return self.model.prepare_canvas(*args, **kwargs)

    @property
    def final_logit_softcapping(self) -> float:
        """The config's; set, it is set there."""
        return self.config.text_config.final_logit_softcapping

    @final_logit_softcapping.setter
    def final_logit_softcapping(self, cap: float) -> None:
        self.config.text_config.final_logit_softcapping = cap

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Soft-capped logits, float32 `(..., V)`: `cap * tanh(head(x) / cap)`."""
        cap = softcap(self.config.text_config)
        return torch.tanh(self.lm_head(hidden_states).float() / cap) * cap

    @takes_cache
    @refuses_unknown
    def causal_logits(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_position_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        last_states: int | None = None,
    ) -> torch.Tensor:
        """Next-token logits of the prompt pass, soft-capped, float32 `(B, P, V)`: at each token of the token behind it.

        Args:
            last_states (*optional*): of so many last tokens only, `(B, last_states, V)`; at 262,144 ids a token's are a megabyte.
            The others are those of `DiffusionGemmaBlockModel.prefill`. To a `cache` the tokens are appended.
        """
        self.check_called("`causal_logits`")
        prefilled = self.model.prefill(
            input_ids, attention_mask, position_ids, cache, inputs_embeds,
            pixel_values, image_position_ids, mm_token_type_ids, last_states=last_states,
        )  # fmt: skip
        return self.compute_logits(prefilled.last_hidden_state)

    def soft_embed(self, logits: torch.Tensor) -> torch.Tensor:
        """Expected embedding `(B, C, D)` under softmax(logits) `(B, C, V)`: the self-conditioning of the next step."""
        return expected_embedding(self.model.decoder.embed_tokens, logits.softmax(dim=-1, dtype=torch.float32))

    def why_dense(self, device: torch.device) -> str | None:
        """What keeps generation from walking the vocabulary in pieces on `device`; None where nothing does, since head and embedding are
        the plain matrices they were built as."""
        for name, built in WALKED.items():
            if getattr(getattr(self, name), "__func__", None) is not built:
                return f"`{name}` is overridden"
        head, embedding = self.lm_head, self.model.decoder.embed_tokens
        for name, module, kind in (("lm_head", head, nn.Linear), ("embed_tokens", embedding, ScaledEmbedding)):
            if (why := why_not_plain(module, kind)) is not None:
                return f"`{name}` {why}"
            if runs_on(module) != device:
                return f"`{name}` runs on {runs_on(module)}, and the prompt is on {device}"
        if head.weight.shape != embedding.weight.shape or head.weight.dtype != embedding.weight.dtype:
            return "`lm_head` and `embed_tokens` differ in shape or dtype"
        return None

    def why_not_recorded(self) -> str | None:
        """What keeps generation from recording a denoising step as a CUDA graph; None where nothing does."""
        if any(hasattr(module, "_hf_hook") for module in self.modules()):
            return "Accelerate moves weights, which no graph holds"
        what = looked_into(self)
        return None if what is None else f"{what}, which no graph calls"

    @contextlib.contextmanager
    def vocabulary_head(self) -> Iterator[VocabularyHead]:
        """Head and embedding as matrices, for generation that walks the vocabulary in pieces; offloaded ones are there for the length of
        the block."""
        embedding = self.model.decoder.embed_tokens
        with brought_in(self.lm_head) as weight, brought_in(embedding) as rows:
            scale = torch.full((), embedding.scales[rows.dtype], dtype=rows.dtype, device=rows.device)  # no copy from the host
            yield VocabularyHead(weight, softcap(self.config.text_config), scale, rows)

    def compiling(self, compile_config: CompileConfig) -> contextlib.AbstractContextManager[None]:
        """A context in which both passes run their layers compiled: `compiling.compiled_layers`."""
        stacks = {self.model.decoder, self.model.prompt_stack}
        return compiled_layers([layer for stack in stacks for layer in stack.layers], compile_config)

    def in_step(self) -> contextlib.AbstractContextManager[None]:
        """A context in which ranks that share the weights do the same passes, whatever each of them generates: `ranks.in_step`."""
        stacks = {self.model.decoder, self.model.prompt_stack}
        return in_step(self, list(stacks), lambda: self.causal_logits(torch.zeros(1, 1, dtype=torch.int64, device=self.device)))

    def score(self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs) -> Score:
        """How likely a response is, prompts with images included: `score.score_responses`."""
        return score_responses(self, input_ids, labels, attention_mask, **kwargs)

    def save_pretrained(self, save_directory, *args, remote_code: bool | None = None, **kwargs):
        """`LoadingMixin.save_pretrained`; generation_config.json says every diffusion field, since vLLM takes them from there alone."""
        given = self.generation_config
        if isinstance(given, DiffusionGenerationConfig):
            given.validate()
            self.generation_config = given.filled()
        try:
            super().save_pretrained(save_directory, *args, remote_code=remote_code, **kwargs)
            if isinstance(given, DiffusionGenerationConfig) and not self.generation_config.published_and_further()[1]:
                # Of a checkpoint that stood here before: files of names that are not written stay.
                (Path(save_directory) / f"{FURTHER_FILE}generation_config.json").unlink(missing_ok=True)
        finally:
            self.generation_config = given

    def _save_config_and_code(self, folder, *args) -> None:
        """As `LoadingMixin`; with what the checkpoint says of decisions."""
        super()._save_config_and_code(folder, *args)
        self.save_decisions(folder)

    @takes_cache
    @refuses_unknown
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        self_conditioning_logits: torch.Tensor | None = None,
        self_conditioning_mask: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_position_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        skip_logits: bool | None = None,
        output_router_logits: bool | None = None,
    ) -> MaskedBlockOutput | tuple:
        """One prompt pass over `input_ids` (if given) and one canvas pass; or, with `labels`, the training loss.

        `torch.compile(model, fullgraph=True)` takes all of it but the whole training objective, which breaks the graph. `torch.export`
        takes it with `use_cache=False`, prompts of any length with an `attention_mask`; a cache that goes in or out needs a pytree
        registered for it. What is traced checks shapes and no values: no ids, image tokens, or the side of the padding.

        Args:
            input_ids, attention_mask, cache, position_ids, inputs_embeds, pixel_values, image_position_ids, mm_token_type_ids: the prompt,
                as `DiffusionGemmaBlockModel.prefill` takes it. For training `input_ids` are prompt and response, and `position_ids` begin
                at 0 again where a row holds a further conversation.
            decoder_input_ids (`int64 (B, C)`, *optional*): the canvas. Default: `canvas_length` uniform random tokens.
            decoder_attention_mask (`(B, L + P + C)`, *optional*): 0 at padding. Default: `attention_mask`, canvas unpadded.
            decoder_position_ids (`(B or 1, C)`, *optional*): default: on from each row's real tokens.
            self_conditioning_logits (`(B, C, V)`, or `(C, V)` for every row, *optional*): the previous step's shaped logits.
            self_conditioning_mask (`bool (B,)`, *optional*): rows that are self-conditioned. With `labels` alone it says
                which rows get the extra pass; default there: each with probability 0.5.
            labels (`int64`, *optional*): `(B, P)`, the responses' ids and -100 elsewhere: the whole training objective as `objective`
                says, with canvases and noise drawn here. Or, together with `decoder_input_ids`, `(B, C)`: the clean canvas, -100 where
                a position does not count; the loss is then the canvas's alone.
            output_hidden_states, output_attentions, return_dict (*optional*): as in transformers, where they are the config's if unset;
                the first takes indices, too.
            use_cache (*optional*): the canvas reads the prompt from a cache in any case; False: one made here is not returned.
            skip_logits (*optional*): leave `.logits` out beside a loss. Default: in training on whole examples, whose logits would be
                most of the memory.
            output_router_logits (*optional*): give both passes' `router_logits` and the `aux_loss`, which a loss takes in, times
                `router_aux_loss_coef` of the config. Default: the config's (`configuration.routing_settings`).

        Returns:
            `MaskedBlockOutput`; `.logits` float32 `(B, C, V)`, of whole examples `(B, K * C, V)`, K canvases a row.

        Raises:
            ValueError: ids out of range, empty prompts, masks or labels of the wrong shape, images without image tokens.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        kept, coefficient = routing_settings(self.config)
        keep_routing = kept if output_router_logits is None else bool(output_router_logits)
        images = {"pixel_values": pixel_values, "image_position_ids": image_position_ids, "mm_token_type_ids": mm_token_type_ids}
        check_tensors(
            input_ids=input_ids, decoder_input_ids=decoder_input_ids, inputs_embeds=inputs_embeds, labels=labels,
            self_conditioning_logits=self_conditioning_logits, **images,
        )  # fmt: skip
        check_images(input_ids, pixel_values, self.config.image_token_id)
        if labels is not None and decoder_input_ids is None:
            unused = {"cache": cache, "inputs_embeds": inputs_embeds,
                      "decoder_attention_mask": decoder_attention_mask, "decoder_position_ids": decoder_position_ids,
                      "self_conditioning_logits": self_conditioning_logits, "output_hidden_states": output_hidden_states or None,
                      "output_attentions": output_attentions or None}  # fmt: skip
            skip_logits = self.training and torch.is_grad_enabled() if skip_logits is None else bool(skip_logits)
            given = {"self_conditioning_mask": self_conditioning_mask, "position_ids": position_ids}
            given |= {"output_router_logits": keep_routing, "keep_logits": not skip_logits}
            output = self._learn_examples(input_ids, labels, attention_mask, images | given, unused)
            return output if return_dict else output.to_tuple()
        if labels is None and decoder_input_ids is None and not torch.compiler.is_compiling():
            behind = "the logits are of a canvas of noise behind the prompt, not of the next tokens, which `causal_logits` gives"
            logger.warning_once(f"`decoder_input_ids` is None: {behind}.")
        batch = next((ids for ids in (decoder_input_ids, input_ids, inputs_embeds) if ids is not None), None)
        if batch is not None:
            size = (batch.shape[0], self.config.canvas_length if decoder_input_ids is None else batch.shape[1])
            check_shape("labels", labels, size)
            each = (size[1], self.config.text_config.vocab_size)
            check_shape("self_conditioning_logits", self_conditioning_logits, (size[0], *each), each)
            check_shape("self_conditioning_mask", self_conditioning_mask, size[:1])
        soft_embeds = None
        if self_conditioning_logits is not None:
            rows = (self_conditioning_logits if batch is None else batch).shape[0]
            soft_embeds = conditioning(self.soft_embed, self_conditioning_logits, rows, self_conditioning_mask)
        denoised = self.model(
            input_ids, attention_mask, cache, position_ids, decoder_input_ids, soft_embeds,
            decoder_attention_mask, decoder_position_ids, **images, inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions, use_cache=use_cache,
            output_router_logits=keep_routing, return_dict=True,
        )  # fmt: skip
        logits = self.compute_logits(denoised.last_hidden_state)  # (B, C, V)
        learned = None if labels is None else self._learn_canvas(logits, labels)
        aux_loss = self._balance(denoised, attention_mask, decoder_attention_mask, size) if keep_routing else None
        loss = learned if learned is None or aux_loss is None else learned + coefficient * aux_loss.to(learned.device)
        output = MaskedBlockOutput(
            loss=loss, logits=None if skip_logits and loss is not None else logits, **{FIELD: denoised.cache},
            hidden_states=denoised.hidden_states, attentions=denoised.attentions,
            encoder_last_hidden_state=denoised.encoder_last_hidden_state, diffusion_loss=learned,
            aux_loss=aux_loss, router_logits=denoised.router_logits, encoder_router_logits=denoised.encoder_router_logits,
        )  # fmt: skip
        return output if return_dict else output.to_tuple()

    def _learn_examples(self, input_ids, labels, attention_mask, given, unused) -> MaskedBlockOutput:
        """`labels` `(B, P)` of whole examples: the training objective, canvases and noise drawn there. None of `unused` goes with it."""
        if refused := [name for name, value in unused.items() if value is not None]:
            virtual = {"cache", "inputs_embeds"}.intersection(refused)
            hint = " Virtual tokens (prompt tuning, prefix tuning, p-tuning) come so: train adapters of weights instead, such as LoRA"
            raise ValueError(
                f"`labels` without `decoder_input_ids` draws its own canvas; it does not go with {refused}.{hint if virtual else ''}"
            )
        if input_ids is None:
            raise ValueError("`input_ids` is None, and `labels` are given; expected prompt and response in one row, to which they belong")
        attention_mask = plain_mask("attention_mask", attention_mask)
        objective = self.objective
        trained = block_diffusion_loss(
            self, input_ids, labels, attention_mask, canvases=objective.canvases, canvas_length=objective.canvas_length, **given
        )
        loss = trained.diffusion + trained.causal
        if trained.balancing is not None:
            loss = loss + routing_settings(self.config)[1] * trained.balancing.to(loss.device)
        # In evaluation Trainer gathers whatever is put out from all ranks, which have other numbers of canvases.
        names = ("canvas_losses", "canvas_rows", "noise_proportions") if self.training else ()
        by_canvas = {name: getattr(trained, name) for name in names}
        return MaskedBlockOutput(
            loss=loss, logits=trained.logits, **by_canvas,
            encoder_last_hidden_state=trained.prefilled.last_hidden_state,
            diffusion_loss=trained.diffusion, causal_loss=trained.causal, aux_loss=trained.balancing,
            router_logits=trained.denoised.router_logits, encoder_router_logits=trained.prefilled.router_logits,
        )  # fmt: skip

    def _balance(self, denoised: BlockModelOutput, attention_mask, decoder_attention_mask, size: tuple[int, int]) -> torch.Tensor:
        """The balancing loss of both passes of a call with a canvas of `size` (B, C); what the masks hide does not count."""
        passes = []
        for router_logits, mask in (
            (denoised.encoder_router_logits, plain_mask("attention_mask", attention_mask)),
            (denoised.router_logits, plain_mask("decoder_attention_mask", decoder_attention_mask)),
        ):
            if router_logits is not None:
                length = len(router_logits[0]) // size[0]
                passes.append((router_logits, None if mask is None else mask[:, -length:].bool()))
        return balancing_loss(passes, self.config.text_config.top_k_experts)

    @staticmethod
    def _learn_canvas(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """`labels` `(B, C)` of a given canvas: the mean cross-entropy over the positions that count.

        Raises:
            ValueError: no position counts, whose mean would be NaN; or ids that there are not.
        """
        counted = labels != IGNORED
        if readable(labels) and not bool(counted.any()):
            raise ValueError(f"`labels` is {IGNORED} everywhere; expected at least one position that counts")
        check_ids("labels", labels.masked_fill(~counted, 0), logits.shape[-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten().long(), ignore_index=IGNORED)


# What a walk over the vocabulary does without calling them: as they are written here, before anybody overrides one.
WALKED = {name: vars(DiffusionGemmaForMaskedBlockLM)[name] for name in ("compute_logits", "soft_embed")}


__all__ = ["DiffusionGemmaForMaskedBlockLM"]
