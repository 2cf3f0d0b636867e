"""How transformers' class for this model speaks of generation: its configuration, its output, its streamers; and the methods that scripts
override there and that nothing here calls. It knows no model."""

from typing import Any

import torch
from transformers.models.diffusion_gemma.generation_diffusion_gemma import DiffusionGemmaGenerationOutput as TheirOutput
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

from generation.cache_names import FIELD, CacheOutput, cache_output
from generation.call.configuration import DiffusionGenerationConfig
from generation.output import DiffusionGenerationOutput

# Methods of transformers' class that scripts override, and what does the same here.
OVERRIDES = {
    "_denoising_step": "`callback_on_step_end` changes a step, `logits_processor` its logits, `constraint` its prediction",
    "_prepare_sampler": "`sampler` takes an instance",
    "_prepare_denoiser_inputs": "`decoder_input_ids`, `first_step` and `self_conditioning_logits` say how a canvas begins",
    "_prepare_encoder_inputs": "`attention_mask`, `inputs_embeds` and `cache` say what the canvas sees",
    "_prepare_diffusion_stopping_criteria": "`stopping` takes an instance; `stability_threshold=None` never stops early",
    "_prepare_logits_processor": "`logits_processor` takes a list",
    "_prepare_ar_stopping_criteria": "`stopping_criteria` takes a list",
    "_prepare_cache_for_generation": "`cache` takes one, `cache_implementation` names one",
    "_finalize_canvas": "a `watcher` is told of every finished canvas",
}


class EntropyBound(EntropyBoundSamplerConfig):
    """A configuration's `entropy_bound` as transformers has it, inside of a `sampler_config`: read and written there."""

    def __init__(self, config: DiffusionGenerationConfig):
        object.__setattr__(self, "_config", config)

    @property
    def entropy_bound(self) -> float:
        return self._config.entropy_bound

    @entropy_bound.setter
    def entropy_bound(self, nats: float) -> None:
        self._config.update(entropy_bound=nats)


class DiffusionGemmaGenerationConfig(DiffusionGenerationConfig):
    """`DiffusionGenerationConfig` in which `sampler_config` is another name of `entropy_bound`."""

    @property
    def sampler_config(self) -> EntropyBound | None:
        return None if self.entropy_bound is None else EntropyBound(self)

    @sampler_config.setter
    def sampler_config(self, value: Any) -> None:
        self.update(sampler_config=value) if value is not None else self.update(entropy_bound=None)


@cache_output
class DiffusionGemmaGenerationOutput(CacheOutput, TheirOutput):
    """`DiffusionGenerationOutput` with the fields of transformers' class first, in its order: of `None` fields the first that follow."""

    sequences: torch.Tensor
    tokens_per_forward: torch.Tensor | None = None
    cache: Any = None
    logits: torch.Tensor | None = None
    scores: Any = None
    hidden_states: None = None
    lengths: torch.Tensor | None = None
    finish_reasons: list[str | None] | None = None
    denoising_steps: torch.Tensor | None = None
    canvas_steps: torch.Tensor | None = None


def as_theirs(output: DiffusionGenerationOutput) -> DiffusionGemmaGenerationOutput:
    names = ("sequences", "tokens_per_forward", "logits", "scores", "lengths", "finish_reasons", "denoising_steps", "canvas_steps")
    return DiffusionGemmaGenerationOutput(**{FIELD: output.cache}, **{name: getattr(output, name) for name in names})


class BatchStreamer:
    """Gives a streamer everything as a batch, `(B, n)`, also one row."""

    def __init__(self, streamer: Any):
        self.streamer = streamer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.streamer, name)

    def put(self, value: torch.Tensor) -> None:
        self.streamer.put(value if value.dim() > 1 else value[None])


__all__ = ["OVERRIDES", "BatchStreamer", "DiffusionGemmaGenerationConfig", "DiffusionGemmaGenerationOutput", "as_theirs"]
