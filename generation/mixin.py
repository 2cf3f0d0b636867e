"""Block-diffusion generation for any model that offers five methods:

    prefill(input_ids, attention_mask=, position_ids=, cache=, last_states=, **images) -> output with `last_hidden_state`,
        of the last `last_states` tokens where it is given
    prepare_canvas(cache, (B, C), attention_mask, position_ids, slots=) -> a view, good for every step of one canvas
    denoise(canvas_ids, soft_embeds=, view=) -> output with `last_hidden_state`
    compute_logits(hidden_states) -> float32 (B, C, V)
    soft_embed(logits) -> (B, C, D)

and may offer more: where its head is one tied matrix that can be walked in pieces, `can_walk_head(device) -> bool` and the context
`vocabulary_head() -> VocabularyHead`; `compiling(compile_config)`, a context in which it runs compiled; `reference_arithmetic()`, one in
which it rounds as the model does whose tokens `backend="reference"` promises; and `check_prompt`, with arguments of `prefill`, which
raises what `prefill` would, before anything is drawn, streamed or cached.

The outer loop is autoregressive over canvases: prefill, denoise a canvas, commit it (a causal pass over it), denoise the
next. The inner loop, one canvas, is `denoise.denoise_canvas`. Nothing here knows how the model works inside.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .arguments import reads_arguments, shown
from .autoregressive import decode_autoregressively, decode_verified
from .cache_names import FIELD, takes_cache
from .capture import Recording
from .checks import check_canvas, check_embeds, check_images, check_prompt
from .configuration import DiffusionGenerationConfig
from .denoise import CanvasContext, can_select, denoise_canvas
from .draws import BatchDraws, row_draws
from .inputs import infer_mask, make_cache, repeat_rows, resolve_config
from .output import DiffusionGenerationOutput, TokenScores, join_rows
from .plan import make_plan
from .written import Criteria, Written

logger = logging.get_logger(__name__)


def mixes_adapters(module: torch.nn.Module) -> bool:
    """Whether peft has been told an adapter for each row of the batch (`adapter_names`): rows then stay where they are.

    Raises:
        ValueError: activated LoRA, which begins at a token of the prompt and is told so by its distance from the end of a pass.
    """
    hooks = (hook for each in module.modules() for hook in each._forward_pre_hooks.values())
    told = {name for hook in hooks for name in getattr(hook, "keywords", ())}
    if "alora_offsets" in told:
        raise ValueError("`alora_invocation_tokens` are set in an adapter; expected plain LoRA: a canvas has no place at which one begins")
    return "adapter_names" in told


def check_preparation(model: GenerationMixin) -> None:
    """Refuses a `prepare_inputs_for_generation` that is not transformers' own, since no pass here calls it. It is how peft gives virtual
    tokens to a model that generates."""
    method = model.prepare_inputs_for_generation
    if getattr(method, "__func__", None) is not GenerationMixin.prepare_inputs_for_generation:
        owner = type(getattr(method, "__self__", model)).__name__
        raise ValueError(
            f"`prepare_inputs_for_generation` is that of {owner}, and block diffusion does not call it; expected the model's own. Prompt "
            "tuning, prefix tuning and p-tuning need it: train adapters of weights instead, such as LoRA"
        )


class DiffusionGenerationMixin(GenerationMixin):
    """Gives a model `generate` by block diffusion."""

    def adjust_generation_fn(
        self, generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, cache_dir, force_download,
        proxies, local_files_only, token, revision, subfolder, trust_remote_code, **kwargs,
    ) -> None:  # fmt: skip
        """Called by `from_pretrained`: takes the given generation config, or reads the checkpoint's generation_config.json."""
        self._load_generation_config(
            generation_config, pretrained_model_name_or_path, cache_dir=cache_dir, force_download=force_download, proxies=proxies,
            local_files_only=local_files_only, token=token, revision=revision, subfolder=subfolder,
            _from_auto=from_auto_class, _from_pipeline=from_pipeline, **kwargs,
        )  # fmt: skip
        if self.generation_config.temperature is None:
            self.generation_config.temperature = 1.0  # or a pipeline's own default of 0.7 would scale the released schedule

    def _load_generation_config(self, generation_config: GenerationConfig | None, name, **kwargs) -> None:
        if generation_config is not None:
            self.generation_config = DiffusionGenerationConfig.from_generation_config(generation_config)
            return
        if name is None:  # a state dict was given instead of a checkpoint
            return
        try:
            self.generation_config = DiffusionGenerationConfig.from_pretrained(name, **kwargs)
        except OSError:  # no such file: the released defaults apply in `generate`
            return

    @torch.no_grad()
    @takes_cache
    @reads_arguments
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        logits_processor: Sequence[Callable] | None = None,
        stopping_criteria: Sequence[Callable] | None = None,
        streamer: BaseStreamer | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        tokenizer=None,
        pixel_values: torch.Tensor | None = None,
        image_position_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor | DiffusionGenerationOutput:
        """Continues every prompt, one canvas after another.

        Args:
            inputs, input_ids (`int64 (B, P)`): the prompts, padded on the left; the two names mean the same. With
                `cache`: the tokens that are not in the cache yet.
            generation_config (*optional*): a `DiffusionGenerationConfig`, any `GenerationConfig`, or a mapping of fields. Default: the
                model's.
            logits_processor (*optional*): a list, applied to the raw logits `(B, C, V)`, first of all. Processors with a `cur_step`
                argument get the remaining steps, as transformers' model gives them. transformers' own classes, written for
                `(rows, V)`, are applied position by position, or refused by name (generation/README.md).
            stopping_criteria (*optional*): a list, asked after each canvas, with everything committed so far of the rows that are still
                written; a row that has ended is no longer among them.
            streamer (*optional*): gets the prompt `(B, P)` and finished canvases, `(n,)` of one row and `(B, n)` of several, by
                `put`, the argmax canvas of each step by `put_draft` and the whole `CanvasState` by `put_state`, where it has these.
                It is ended where generation is: as elsewhere in transformers, a failure does not read as a finished answer.
            attention_mask (`(B, L + P)`, *optional*): 0 at padding, cached tokens included. Default: `pad_token_id` at the beginning of a
                row is padding, where that is no end of sequence too.
            inputs_embeds (`(B, P, D)`, *optional*): embeddings of the prompts instead of their ids, scaled as `get_input_embeddings()`
                scales them. The sequences that are returned then hold the new tokens alone.
            cache (*optional*): a cache of an earlier turn, or an empty one to be filled and kept.
            decoder_input_ids (`int64 (B, C)`, *optional*): the first canvas. Default: noise.
            seed (*optional*): one for every row, or one a prompt. A row's tokens depend on its prompt and its seed alone.
            generator (*optional*): source of the rows' seeds, or one generator a row. Default: torch's global one.
            tokenizer (*optional*): needed for `stop_strings`.
            pixel_values, image_position_ids, mm_token_type_ids (*optional*): images, from the processor.
            kwargs: any field of `DiffusionGenerationConfig`.

        Returns:
            Token ids `(B * num_return_sequences, P + N)`, N new ones, trimmed to the allowed length and cut after the first
            end-of-sequence token of each row (then padded); or `DiffusionGenerationOutput` if `return_dict_in_generate`.

        Raises:
            ValueError: an argument that is unknown, out of range, or not honoured, by name; virtual tokens of peft; NaN logits.
        """
        check_preparation(self)
        config, use_max_length = resolve_config(generation_config, self.generation_config, kwargs)
        if (given := sum(value is not None for value in (inputs, input_ids, inputs_embeds))) != 1:
            found = "the prompt is empty: none is given" if given == 0 else f"{given} are given"
            raise ValueError(
                f"`generate` takes the prompt as `inputs`, `input_ids` or `inputs_embeds`; {found}; expected exactly one of them"
            )
        if cache is not None and config.cache_implementation is not None:
            raise ValueError(f"`cache_implementation` is {config.cache_implementation!r}; expected None, since `cache` is given")
        if config.decoding != "diffusion" and (cache is not None or decoder_input_ids is not None):
            raise ValueError(f"`decoding` is {config.decoding!r}; it goes with neither `cache` nor `decoder_input_ids`")
        if config.compile_config is not None and not hasattr(self, "compiling"):
            raise ValueError(f"`compile_config` is given, and {type(self).__name__} has no method `compiling`; expected None")
        if config.stop_strings is not None and tokenizer is None:
            raise ValueError("`tokenizer` is None; expected the tokenizer, since `stop_strings` are set")
        seen = 0 if cache is None else int(cache.get_seq_length())
        if inputs_embeds is None:
            ids = inputs if input_ids is None else input_ids
            attention_mask = infer_mask(ids, config, seen) if attention_mask is None else attention_mask
            real = check_prompt(ids, attention_mask, seen)  # (B, tokens so far), False at padding
            check_images(ids, pixel_values, getattr(self.config, "image_token_id", None))
            prompt = {"input_ids": ids}
        else:
            real = check_embeds(inputs_embeds, attention_mask, seen, self.config.get_text_config().hidden_size, pixel_values)
            ids = torch.zeros((inputs_embeds.shape[0], 0), dtype=torch.int64, device=inputs_embeds.device)
            prompt = {"inputs_embeds": inputs_embeds}
        prompts, device, copies = ids.shape[0], ids.device, config.num_return_sequences or 1
        whole = config.backend == "reference" or config.output_logits or not hasattr(self, "vocabulary_head")
        stays = cache is not None or (hasattr(self, "peft_config") and mixes_adapters(self))
        plan = make_plan(
            config, use_max_length, self.config, real.shape[1], device, logits_processor, prompts * copies,
            owns_cache=not stays, walks=not whole and self._walks(device),
        )  # fmt: skip
        images = {"pixel_values": pixel_values, "image_position_ids": image_position_ids, "mm_token_type_ids": mm_token_type_ids}
        prompt |= {name: value for name, value in images.items() if value is not None}
        ids, real, decoder_input_ids, prompt = repeat_rows(copies, ids, real, decoder_input_ids, prompt, cache)
        criteria, shape = Criteria.of(stopping_criteria), (ids.shape[0], plan.canvas_length)
        check_canvas(decoder_input_ids, shape, self.config.get_text_config().vocab_size)
        if hasattr(self, "check_prompt"):
            self.check_prompt(**prompt, attention_mask=real, cache=cache)
        if config.decoding == "diffusion" and cache is None:
            cache = make_cache(config, self.config.get_text_config(), plan.cache_length, device)
        if config.backend == "reference":
            if seed is not None or isinstance(generator, Sequence):
                raise ValueError("the reference backend draws for the whole batch; expected one `generator`, or `torch.manual_seed`")
            draws = BatchDraws(generator)
        else:
            draws = row_draws(0 if plan.greedy and seed is None and generator is None else seed, generator, prompts, copies)
        if config.decoding == "verified" and shape[0] > 1:
            if streamer is not None or pixel_values is not None:
                raise ValueError(f"`decoding='verified'` got {shape[0]} rows; expected one together with a streamer or images")
            config.update(max_new_tokens=plan.new_tokens, max_length=None, num_return_sequences=None)
            rules = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria, "tokenizer": tokenizer}
            rows = []
            for row, own_seed in enumerate(draws.seeds):
                own = {"attention_mask": real[row : row + 1]} | {name: value[row : row + 1] for name, value in prompt.items()}
                rows.append(self.generate(generation_config=config, seed=own_seed, **rules, **own))
            return join_rows(rows, plan.pad)
        written = Written(plan, ids, config.stop_strings, tokenizer, criteria, streamer)
        compiles = config.compile_config is not None and not config.disable_compile
        with contextlib.ExitStack() as stack:
            if compiles:
                stack.enter_context(self.compiling(config.compile_config))
            if config.backend == "reference" and hasattr(self, "reference_arithmetic"):
                stack.enter_context(self.reference_arithmetic())
            if config.decoding == "diffusion":
                cache = self._write_canvases(plan, written, real, cache, draws, decoder_input_ids, prompt)
            else:
                decode = decode_verified if config.decoding == "verified" else decode_autoregressively
                decode(self, plan, written, real, draws, prompt)
        if streamer is not None:
            streamer.end()

        sequences, counts = written.sequences()
        if not config.return_dict_in_generate:
            return sequences
        return DiffusionGenerationOutput(
            sequences=sequences,
            tokens_per_forward=counts.float() / written.passes.clamp(min=1),
            denoising_steps=written.passes,
            **{FIELD: cache},
            scores=written.scores() if config.output_scores else None,
            logits=written.logits(),
        )

    def compute_transition_scores(
        self, sequences: torch.Tensor, scores, beam_indices: torch.Tensor | None = None, normalize_logits: bool = False
    ) -> torch.Tensor:
        """Log-probabilities of the new tokens, `(B, N)`, from the `scores` of an output, which hold them already.

        Raises:
            ValueError: `scores` of another kind, beams, or `normalize_logits=False`: what is kept is normalised.
        """
        if not isinstance(scores, TokenScores):
            raise ValueError(f"`scores` is {shown(scores)}; expected the `scores` of an output with `output_scores=True`")
        if beam_indices is not None:
            raise ValueError(f"`beam_indices` is {shown(beam_indices)}; expected None: a canvas has no beams")
        if not normalize_logits:
            raise ValueError(f"`normalize_logits` is {normalize_logits!r}; expected True: log-probabilities are kept, not logits")
        return scores.log_probs

    def _walks(self, device: torch.device) -> bool:
        """Whether nothing keeps the vocabulary from being walked in pieces; what does is told, once."""
        if (why := self.why_dense(device)) is not None:
            logger.warning_once(f"Denoising steps compute whole logits, which is slower than walking the vocabulary in pieces: {why}.")
        return why is None

    @property
    def init_continuous_batching(self):
        """Absent: transformers' server asks for it, and without it calls `generate`."""
        raise AttributeError("init_continuous_batching")

    def generate_batch(self, *args, **kwargs):
        """Refused: transformers' continuous batching schedules single tokens."""
        raise ValueError("`generate_batch` schedules single tokens, and a canvas is written as a whole; expected a call of `generate`")

    def _write_canvases(self, plan, written: Written, real, cache: Cache, draws, first, prompt: dict) -> Cache | None:
        """The outer loop. `prompt`: what `prefill` takes for it. Returns the cache, or None once rows have left it."""
        length = plan.canvas_length
        pending, new, whole = prompt, real.shape[1] - int(cache.get_seq_length()), True
        # Not where Accelerate moves weights, which no graph holds.
        records = plan.record and not any(hasattr(module, "_hf_hook") for module in self.modules())
        recording = Recording() if records else None
        for number in range(plan.canvases):
            self.prefill(**pending, attention_mask=real, position_ids=plan.positions(real, new), cache=cache, last_states=1)
            shape = (real.shape[0], length)
            noise = draws.at(number, -1).noise(plan.noise, shape, real.device)  # drawn also where a canvas is given, as transformers does
            real = torch.cat((real, real.new_ones(shape)), dim=1)
            context = CanvasContext(cache, real, written.context, written.generated, number)
            state, logits = denoise_canvas(self, plan, noise if first is None else first, context, draws, written.streamer, recording)
            tokens, new, first = written.add(state, logits), length, None
            if bool(written.ended.all()) or plan.out_of_time():
                break
            if plan.compact and can_select(cache) and bool(written.ended.any()):
                rows = (~written.ended).nonzero().flatten()
                cache.batch_select_indices(rows)
                written.drop_ended()
                tokens, real, draws, whole = tokens[rows], real[rows], draws.select(rows), False
            pending = {"input_ids": tokens}
        return cache if whole else None


__all__ = ["DiffusionGenerationMixin"]
