"""Block-diffusion generation for any model that offers five methods:

    prefill(input_ids, attention_mask=, position_ids=, past_key_values=, **images) -> output with `past_key_values`
    canvas_masks(past_key_values, (B, C), attention_mask) -> what `denoise` takes as its mask, good for one canvas
    denoise(canvas_ids, past_key_values=, soft_embeds=, attention_mask=, position_ids=) -> output with `last_hidden_state`
    compute_logits(hidden_states) -> float32 (B, C, V)
    soft_embed(logits) -> (B, C, D)

The outer loop is autoregressive over canvases: prefill, denoise a canvas, commit it (a causal pass over it), denoise the
next. The inner loop denoises one canvas. Nothing here knows how the model works inside.
"""

import torch
from transformers import Cache, GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .canvas import CanvasState, denoising_step, start_canvas
from .configuration import DiffusionGenerationConfig
from .inputs import check_images, check_prompt, make_cache, resolve_config, resolve_lengths
from .noise import MaskNoise, Noise, UniformNoise
from .output import DiffusionGenerationOutput
from .samplers import EntropyBoundSampler
from .schedule import TemperatureSchedule
from .statistics import dense_statistics
from .stopping import StableAndConfident


class DiffusionGenerationMixin(GenerationMixin):
    """Gives a model `generate` by block diffusion."""

    def adjust_generation_fn(
        self, generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, cache_dir, force_download,
        proxies, local_files_only, token, revision, subfolder, trust_remote_code, **kwargs,
    ) -> None:  # fmt: skip
        """Called by `from_pretrained`: takes the given generation config, or reads the checkpoint's generation_config.json."""
        if generation_config is not None:
            self.generation_config = DiffusionGenerationConfig.from_generation_config(generation_config)
            return
        try:
            self.generation_config = DiffusionGenerationConfig.from_pretrained(
                pretrained_model_name_or_path, cache_dir=cache_dir, force_download=force_download, proxies=proxies,
                local_files_only=local_files_only, token=token, revision=revision, subfolder=subfolder,
                _from_auto=from_auto_class, _from_pipeline=from_pipeline, **kwargs,
            )  # fmt: skip
        except OSError:  # no such file: the released defaults apply in `generate`
            return

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: BaseStreamer | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        pixel_values: torch.Tensor | None = None,
        image_position_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor | DiffusionGenerationOutput:
        """Continues every prompt, one canvas after another.

        Args:
            inputs, input_ids (`int64 (B, P)`): the prompts, padded on the left; the two names mean the same. With
                `past_key_values`: the tokens that are not in the cache yet.
            generation_config (*optional*): a `DiffusionGenerationConfig`, or any `GenerationConfig`. Default: the model's.
            logits_processor (*optional*): applied to the logits `(B, C, V)` before the temperature. Processors with a
                `cur_step` argument get the remaining steps, as transformers' model gives them.
            stopping_criteria (*optional*): asked after each canvas, with everything committed so far.
            streamer (*optional*): gets prompt and finished canvases by `put`, the argmax canvas of each step by `put_draft` and
                the whole `CanvasState` by `put_state`, where it has these.
            attention_mask (`(B, L + P)`, *optional*): 0 at padding, cached tokens included.
            past_key_values (*optional*): a cache of an earlier turn.
            decoder_input_ids (`int64 (B, C)`, *optional*): the first canvas. Default: noise.
            generator (*optional*): source of every random number. Default: torch's global one.
            pixel_values, image_position_ids, mm_token_type_ids (*optional*): images, from the processor.
            kwargs: any field of `DiffusionGenerationConfig`.

        Returns:
            Token ids `(B, P + N)`, trimmed to the allowed length and cut after the first end-of-sequence token of each row
            (then padded); or `DiffusionGenerationOutput` if `return_dict_in_generate`.

        Raises:
            ValueError: an argument that is unknown, out of range, or not honoured, by name.
        """
        config, use_max_length = resolve_config(generation_config, self.generation_config, kwargs)
        if (inputs is None) == (input_ids is None):
            raise ValueError("`generate` takes the prompt as `inputs` or as `input_ids`, expected exactly one of them")
        prompt = inputs if input_ids is None else input_ids
        if past_key_values is not None and config.cache_implementation is not None:
            raise ValueError(f"`cache_implementation` is {config.cache_implementation!r}; expected None, since `past_key_values` is given")
        seen = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        real = check_prompt(prompt, attention_mask, seen)  # (B, tokens so far), False at padding
        check_images(prompt, pixel_values, getattr(self.config, "image_token_id", None))
        canvas_length = self.config.canvas_length
        lengths = resolve_lengths(config, use_max_length, real.shape[1], canvas_length)
        shape = (prompt.shape[0], canvas_length)
        if decoder_input_ids is not None and tuple(decoder_input_ids.shape) != shape:
            raise ValueError(f"`decoder_input_ids` has shape {tuple(decoder_input_ids.shape)}; expected {shape}, one canvas a row")
        text_config = self.config.get_text_config()
        if past_key_values is None:
            past_key_values = make_cache(config, text_config, real.shape[1] + (lengths.canvases - 1) * canvas_length)
        noise = MaskNoise(config.mask_token_id) if config.noise == "mask" else UniformNoise(text_config.vocab_size)
        eos = torch.tensor([] if config.eos_token_id is None else config.eos_token_id, device=prompt.device).flatten()
        pad = config.pad_token_id if config.pad_token_id is not None else int(eos[0]) if len(eos) else 0
        if streamer is not None:
            streamer.put(prompt.cpu())

        images = {"pixel_values": pixel_values, "image_position_ids": image_position_ids, "mm_token_type_ids": mm_token_type_ids}
        pending, committed = prompt, []  # what the next prefill reads; the finished canvases
        ended = torch.zeros(shape[0], dtype=torch.bool, device=prompt.device)
        passes = torch.zeros(shape[0], dtype=torch.int64, device=prompt.device)
        for index in range(lengths.canvases):
            positions = self._positions(real, pending.shape[1], config.backend)
            self.prefill(pending, attention_mask=real, position_ids=positions, past_key_values=past_key_values, **images)
            images = {}
            drawn = noise.draw(shape, prompt.device, generator)  # drawn in any case, as transformers does
            first = decoder_input_ids if index == 0 and decoder_input_ids is not None else drawn
            real = torch.cat((real, real.new_ones(shape)), dim=1)
            so_far = torch.cat((prompt, *committed), dim=1)
            state = self._denoise_canvas(first, so_far, real, past_key_values, config, noise, logits_processor, streamer, generator)
            passes = passes + torch.where(ended, 0, state.passes)
            canvas, ended_now = _cut(state.argmax, ended, eos, pad)
            committed.append(canvas)
            ended = ended | ended_now
            if streamer is not None:
                self._stream(streamer, committed, eos, lengths.new_tokens)
            if stopping_criteria is not None:
                ended = ended | stopping_criteria(torch.cat((so_far, canvas), dim=1), None).to(ended.device)
            if bool(ended.all()):
                break
            pending = canvas
        if streamer is not None:
            streamer.end()

        new = torch.cat(committed, dim=1)[:, : lengths.new_tokens]
        counts = _token_counts(new, eos)
        new = new[:, : int(counts.max())]
        sequences = torch.cat((prompt, new.masked_fill(torch.arange(new.shape[1], device=new.device) >= counts[:, None], pad)), dim=1)
        if not config.return_dict_in_generate:
            return sequences
        return DiffusionGenerationOutput(sequences, counts / passes, passes, past_key_values)

    def _denoise_canvas(
        self,
        canvas: torch.Tensor,
        input_ids: torch.Tensor,
        real: torch.Tensor,
        cache: Cache,
        config: DiffusionGenerationConfig,
        noise: Noise,
        logits_processor: LogitsProcessorList | None,
        streamer: BaseStreamer | None,
        generator: torch.Generator | None,
    ) -> CanvasState:
        """Denoises one canvas `(B, C)` until every row is finished or the steps are used up."""
        schedule = TemperatureSchedule(config.t_min, config.t_max, config.max_denoising_steps)
        sampler = EntropyBoundSampler(config.entropy_bound)
        stopping = StableAndConfident(config.stability_threshold, config.confidence_threshold)
        masks = self.canvas_masks(cache, canvas.shape, real)
        positions = self._positions(real, canvas.shape[1], config.backend)
        state = start_canvas(canvas, stopping)
        for step in range(config.max_denoising_steps):
            hidden = self.denoise(
                state.canvas, past_key_values=cache, soft_embeds=state.soft_embeds, attention_mask=masks, position_ids=positions
            ).last_hidden_state
            logits = self.compute_logits(hidden)  # (B, C, V)
            if logits_processor is not None:
                logits = logits_processor(input_ids, logits, cur_step=config.max_denoising_steps - step)
            logits = logits / schedule.temperature(step)
            statistics = dense_statistics(logits, generator)
            state = denoising_step(state, statistics, self.soft_embed(logits.to(self.dtype)), sampler, stopping, noise, generator)
            if hasattr(streamer, "put_state"):
                streamer.put_state(state)
            if hasattr(streamer, "put_draft"):
                wants_logits = getattr(streamer, "_takes_logits", False)
                streamer.put_draft(**({"logits": logits.cpu()} if wants_logits else {"value": state.argmax.cpu()}))
            if bool(state.finished.all()):
                break
        return state

    @staticmethod
    def _positions(real: torch.Tensor, length: int, backend: str) -> torch.Tensor:
        """Positions of the last `length` tokens: each row's real tokens counted from 0. The reference backend counts padding
        too, as transformers does; rotary attention sees only differences, so this changes rounding alone."""
        if backend == "reference":
            return torch.arange(real.shape[1] - length, real.shape[1], device=real.device)[None]
        return (real.cumsum(dim=1) - 1).clamp(min=0)[:, -length:]

    @staticmethod
    def _stream(streamer: BaseStreamer, committed: list[torch.Tensor], eos: torch.Tensor, new_tokens: int) -> None:
        """Hands the last canvas to a streamer, without what lies behind the end of the sequence or the allowed length."""
        new = torch.cat(committed, dim=1)[:, :new_tokens]
        before = sum(canvas.shape[1] for canvas in committed[:-1])
        streamer.put(new[:, before : int(_token_counts(new, eos).max())].cpu())


def _cut(canvas: torch.Tensor, ended: torch.Tensor, eos: torch.Tensor, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces by `pad` what follows a row's first end-of-sequence token, and all of a row that had ended before."""
    is_eos = torch.isin(canvas, eos)
    behind = (is_eos.cumsum(dim=1) - is_eos.long() > 0) | ended[:, None]
    return canvas.masked_fill(behind, pad), is_eos.any(dim=1)


def _token_counts(new: torch.Tensor, eos: torch.Tensor) -> torch.Tensor:
    """Tokens of each row up to its first end-of-sequence token, that one included, int64 `(B,)`."""
    is_eos = torch.isin(new, eos)
    return torch.where(is_eos.any(dim=1), is_eos.int().argmax(dim=1) + 1, new.shape[1])


__all__ = ["DiffusionGenerationMixin"]
