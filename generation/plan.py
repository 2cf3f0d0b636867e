"""Everything that is fixed for one call of `generate`: the rules, built once from the configuration."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .capture import RECORDED_STEP
from .configuration import DiffusionGenerationConfig
from .flags import LATE_FLAGS
from .noise import MaskNoise, Noise, UniformNoise
from .processors import Shaping, build_shaping
from .proofs import works
from .samplers import ConfidenceSampler, EntropyBoundSampler, FixedStepsSampler, PredictorCorrectorSampler, Sampler
from .schedule import TemperatureSchedule
from .stopping import StableAndConfident


@dataclass(frozen=True)
class Plan:
    """The rules of one call.

    `new_tokens`: how many a row may get. `temperature`: the caller's, which the schedule already holds. `greedy`: take the
    argmax, not a sample. `compact`: let finished rows leave the batch. `count_padding`: positions count padding, as
    transformers' do. `sure_end`, `patience`: as `denoising_step` takes them. `deadline`: seconds on `time.perf_counter`.
    `prompt_length`: cached tokens included. `stream_vocabulary`: walk the vocabulary in pieces where `shaping` can. `keep_logits`: hand
    out the logits of what is committed. `late_flags`: look one step late at which rows are finished, so that the device never
    waits for the host. `record`: record the denoising step once and replay it.
    """

    canvas_length: int
    new_tokens: int
    max_denoising_steps: int
    schedule: TemperatureSchedule
    temperature: float
    sampler: Sampler
    stopping: StableAndConfident
    noise: Noise
    shaping: Shaping
    eos: torch.Tensor
    pad: int
    greedy: bool
    compact: bool
    count_padding: bool
    sure_end: torch.Tensor | None
    patience: int | None
    deadline: float | None
    stream_vocabulary: bool
    keep_logits: bool
    late_flags: bool
    record: bool
    prompt_length: int

    @property
    def canvases(self) -> int:
        return -(-self.new_tokens // self.canvas_length)

    @property
    def cache_length(self) -> int:
        """Tokens before the last canvas, which is never committed."""
        return self.prompt_length + (self.canvases - 1) * self.canvas_length

    @property
    def slots(self) -> int:
        """Slots for cached tokens that every canvas's view has at least: a recorded step takes views of one shape."""
        return self.cache_length if self.record else 0

    def steps(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The steps' numbers, int64, and their temperatures, float32, each `(max_denoising_steps,)`."""
        return torch.arange(self.max_denoising_steps, device=device), self.schedule.temperatures().to(device)

    def out_of_time(self) -> bool:
        return self.deadline is not None and time.perf_counter() >= self.deadline

    def positions(self, real: torch.Tensor, length: int) -> torch.Tensor:
        """Positions of the last `length` tokens of `real` (B, L): each row's real tokens counted from 0. Rotary attention sees
        only differences, so counting padding too, for the reference backend, changes rounding alone."""
        if self.count_padding:
            return torch.arange(real.shape[1] - length, real.shape[1], device=real.device)[None]
        return (real.cumsum(dim=1) - 1).clamp(min=0)[:, -length:]


def reads_late(device: torch.device) -> bool:
    """Whether waiting for the device's flags would leave it without work, and need not be."""
    return device.type == "cuda" and works(LATE_FLAGS, device)


def records(device: torch.device) -> bool:
    """Whether launching a step costs the host more than replaying it."""
    return device.type == "cuda" and works(RECORDED_STEP, device)


def make_plan(
    config: DiffusionGenerationConfig, use_max_length: bool, model_config, prompt_length: int, device: torch.device,
    logits_processor: Sequence[Callable] | None, rows: int, owns_cache: bool, walks: bool = True,
) -> Plan:  # fmt: skip
    """Args: `prompt_length` counts cached tokens; `rows`: of the batch; `owns_cache`: nobody else counts on its rows, so they may leave it;
    `walks`: the vocabulary is walked in pieces, which gives no logits and not the reference's random numbers.

    Raises:
        ValueError: lengths that leave no room, or arguments that do not go together.
    """
    reference = config.backend == "reference"
    new_tokens = config.max_length - prompt_length if use_max_length else config.max_new_tokens
    if new_tokens <= 0:
        raise ValueError(f"`max_length` is {config.max_length}; expected more than the prompt's {prompt_length} tokens")
    vocab_size = model_config.get_text_config().vocab_size
    if config.noise == "mask" and config.mask_token_id >= vocab_size:
        raise ValueError(f"`mask_token_id` is {config.mask_token_id}; expected a token id from 0 to {vocab_size - 1}")
    if config.pad_token_id is not None and config.pad_token_id >= vocab_size:
        raise ValueError(f"`pad_token_id` is {config.pad_token_id}; expected a token id from 0 to {vocab_size - 1}")
    eos = torch.tensor([] if config.eos_token_id is None else config.eos_token_id, dtype=torch.int64, device="cpu").flatten()
    eos = eos[eos < vocab_size].to(device)  # the released ids, on a small vocabulary: others are never predicted
    scale = 1.0 if config.temperature in (None, 0) else config.temperature
    sampler = {
        "entropy_bound": lambda: EntropyBoundSampler(config.entropy_bound),
        "confidence": lambda: ConfidenceSampler(config.confidence),
        "fixed_steps": FixedStepsSampler,
        "predictor_corrector": lambda: PredictorCorrectorSampler(vocab_size, config.corrector_steps, config.corrector_positions),
    }[config.sampler]()
    stays = config.cache_implementation not in (None, "dynamic") or not owns_cache  # rows cannot leave such a cache
    record = walks and (stays or rows == 1) and not config.disable_compile and config.decoding == "diffusion" and records(device)
    return Plan(
        canvas_length=config.canvas_length or model_config.canvas_length,
        new_tokens=new_tokens,
        max_denoising_steps=config.max_denoising_steps,
        temperature=scale,
        schedule=TemperatureSchedule(config.t_min * scale, config.t_max * scale, config.max_denoising_steps),
        sampler=sampler,
        # As many steps as there are equal none: a longer history would only take memory.
        stopping=StableAndConfident(min(config.stability_threshold, config.max_denoising_steps), config.confidence_threshold),
        noise=MaskNoise(config.mask_token_id) if config.noise == "mask" else UniformNoise(vocab_size),
        shaping=build_shaping(config, logits_processor, eos, prompt_length, vocab_size),
        eos=eos,
        pad=config.pad_token_id if config.pad_token_id is not None else int(eos[0]) if len(eos) else 0,
        greedy=config.do_sample is False or config.temperature == 0,
        compact=not reference and not stays,
        count_padding=reference,
        sure_end=eos if config.ignore_after_eos or (config.ignore_after_eos is None and not reference) else None,
        patience=config.patience,
        stream_vocabulary=walks,
        keep_logits=bool(config.output_logits),
        late_flags=reads_late(device),
        record=record,
        prompt_length=prompt_length,
        deadline=None if config.max_time is None else time.perf_counter() + config.max_time,
    )


__all__ = ["Plan", "make_plan"]
