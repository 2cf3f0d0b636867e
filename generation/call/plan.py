"""Everything that is fixed for one call of `generate`: how long, by which rules, and how it is run."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch._C import _len_torch_dispatch_stack
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from transformers.utils import logging

from ..fast.flags import LATE_FLAGS
from ..fast.proofs import works
from ..fast.recording import RECORDED_STEP
from ..rules.constraint import Constraint
from ..rules.noise import Noise, make_noise
from ..rules.prediction import Wanted
from ..rules.samplers import SAMPLERS, PredictorCorrectorSampler, Sampler
from ..rules.schedule import TemperatureSchedule
from ..rules.stopping import AnyOf, Patience, Settled, StableAndConfident, StoppingRule
from ..watch.watcher import Watcher, candidates_of
from .configuration import DiffusionGenerationConfig
from .processors import Shaping, build_shaping
from .prompt import Prompt
from .settings import pad_id, stop_ids
from .together import is_greedy

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Lengths:
    """In tokens. `prompt`: cached ones included; `new_tokens`: how many a row may get; `vocab_size`: ids there are."""

    prompt: int
    new_tokens: int
    canvas: int
    vocab_size: int

    @property
    def canvases(self) -> int:
        return -(-self.new_tokens // self.canvas)

    @property
    def cache(self) -> int:
        """Tokens before the last canvas, which is never committed."""
        return self.prompt + (self.canvases - 1) * self.canvas


@dataclass(frozen=True)
class Rules:
    """What a step does. `temperature`: the caller's, which the schedule already holds. `greedy`: take the argmax, not a sample.
    `sure_end`, `conditioning_steps`: as `state.advance` takes them. `eos` int64 (n,)."""

    max_denoising_steps: int
    temperature: float
    schedule: TemperatureSchedule
    sampler: Sampler
    stopping: StoppingRule
    sure_end: tuple[torch.Tensor, float] | None
    conditioning_steps: int | None
    noise: Noise
    shaping: Shaping
    eos: torch.Tensor
    pad: int
    greedy: bool


@dataclass(frozen=True)
class Execution:
    """How it is run. `why_dense`: what needs whole logits, None where the vocabulary is walked in pieces. `wanted`: what predictions
    hold. `compact`: let finished rows leave the batch. `keep_scores` and `keep_logits`: hand out scores and logits of what is committed; a
    canvas has its scores in any case. `late_flags`: look one step late at which rows are finished, so that the device never waits for the
    host. `record`: record the denoising step once and replay it. `deadline`: seconds on `time.perf_counter`."""

    why_dense: str | None
    wanted: Wanted
    compact: bool
    keep_scores: bool
    keep_logits: bool
    late_flags: bool
    record: bool
    deadline: float | None


@dataclass(frozen=True)
class Plan:
    lengths: Lengths
    rules: Rules
    execution: Execution

    @property
    def slots(self) -> int:
        """Slots for cached tokens that every canvas's view has at least: a recorded step takes views of one shape."""
        return self.lengths.cache if self.execution.record else 0

    def steps(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The steps, counted up from 0, int64, and their temperatures, float32, each `(max_denoising_steps,)`."""
        return torch.arange(self.rules.max_denoising_steps, device=device), self.rules.schedule.temperatures().to(device)

    def out_of_time(self) -> bool:
        return self.execution.deadline is not None and time.perf_counter() >= self.execution.deadline


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


def reads_late(device: torch.device) -> bool:
    """Whether waiting for the device's flags would leave it without work, and need not be."""
    return device.type == "cuda" and works(LATE_FLAGS, device)


def modes_look_on() -> bool:
    """Whether dispatch or function modes of the caller, such as a counter of operations, want to see every one: no graph tells them."""
    functions = (mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext))
    return _len_torch_dispatch_stack() > 0 or any(functions)


def records(device: torch.device) -> bool:
    """Whether launching a step costs the host more than replaying it."""
    return device.type == "cuda" and works(RECORDED_STEP, device)


def may_be_recorded(model) -> bool:
    """Whether nothing looks on that a graph would not call. Walks over all modules."""
    return not modes_look_on() and (not hasattr(model, "why_not_recorded") or model.why_not_recorded() is None)


def why_dense(model, config: DiffusionGenerationConfig, shaping: Shaping, watchers: Sequence[Watcher], device: torch.device) -> str | None:
    """What needs whole logits; None where nothing does. What the model's head does so is told once, since nobody asked for it."""
    if config.decoding == "autoregressive":
        return "`decoding` is 'autoregressive'"
    if config.backend == "reference":
        return "`backend` is 'reference', whose random numbers are drawn from them"
    if config.output_logits:
        return "`output_logits` is True"
    if any(watcher.wants_logits for watcher in watchers):
        return "a streamer, watcher or callback reads them"
    if (why := shaping.why_dense()) is not None:
        return why
    if not hasattr(model, "vocabulary_head"):
        return f"{type(model).__name__} has no `vocabulary_head`"
    if (why := model.why_dense(device)) is not None:
        logger.warning_once(f"Denoising steps compute whole logits, which is slower than walking the vocabulary in pieces: {why}.")
    return why


def stopping_of(config: DiffusionGenerationConfig) -> StoppingRule:
    """As many steps as there are equal none: a longer memory would only take space."""
    stopping = StableAndConfident(min(config.stability_threshold, config.max_denoising_steps), config.confidence_threshold)
    further = {Settled: config.joint_threshold, Patience: config.patience}
    further = [kind(value) for kind, value in further.items() if value is not None]
    return AnyOf((stopping, *further)) if further else stopping


def make_rules(
    config: DiffusionGenerationConfig, vocab_size: int, prompt_length: int, device: torch.device, given: Sequence[Callable] | None,
    stopping: StoppingRule | None = None,
) -> Rules:  # fmt: skip
    """Args: `given`: the caller's `logits_processor`; `stopping`: instead of the rules of `config`.

    Raises:
        ValueError: a token id outside the vocabulary, a processor that has no meaning here, a sampler of another vocabulary.
    """
    stops = stop_ids(config, vocab_size)
    eos = torch.tensor(stops, dtype=torch.int64, device=device)
    sampler = SAMPLERS[config.sampler].of(config, vocab_size) if isinstance(config.sampler, str) else config.sampler
    if isinstance(sampler, PredictorCorrectorSampler) and sampler.vocab_size != vocab_size:
        raise ValueError(f"`sampler` has a `vocab_size` of {sampler.vocab_size}; expected the model's, {vocab_size}")
    scale = 1.0 if config.temperature in (None, 0) else config.temperature
    ignores = config.ignore_after_eos or (config.ignore_after_eos is None and config.backend != "reference")
    return Rules(
        max_denoising_steps=config.max_denoising_steps,
        temperature=scale,
        schedule=TemperatureSchedule(config.t_min * scale, config.t_max * scale, config.max_denoising_steps),
        sampler=sampler,
        stopping=stopping_of(config) if stopping is None else stopping,
        sure_end=(eos, config.confidence_threshold) if ignores else None,
        conditioning_steps=config.self_conditioning_steps,
        noise=make_noise(config.noise, vocab_size, config.mask_token_id),
        shaping=build_shaping(config, given, eos, prompt_length, vocab_size),
        eos=eos,
        pad=pad_id(config, stops, vocab_size),
        greedy=is_greedy(config),
    )


def make_plan(
    model, config: DiffusionGenerationConfig, prompt: Prompt, new_tokens: int, logits_processor: Sequence[Callable] | None = None,
    watchers: Sequence[Watcher] = (), constraint: Constraint | None = None, stopping: StoppingRule | None = None, counted: bool = False,
) -> Plan:  # fmt: skip
    """The plan for a prompt, of which each row may get `new_tokens`. `counted`: somebody outside knows the rows by their places.

    Raises:
        ValueError: as `make_rules`; more canvases given than rows may get.
    """
    model_config, reference = model.config, config.backend == "reference"
    (rows, prompt_length), device = prompt.real.shape, prompt.real.device
    vocab_size = model_config.get_text_config().vocab_size
    lengths = Lengths(prompt_length, new_tokens, config.canvas_length or model_config.canvas_length, vocab_size)
    if len(prompt.canvases) > lengths.canvases:
        got = f"`decoder_input_ids` holds {len(prompt.canvases)} canvases of {lengths.canvas} tokens"
        raise ValueError(f"{got}; expected at most {lengths.canvases}, as `max_new_tokens` or `max_length` allow {new_tokens} tokens")
    rules = make_rules(config, vocab_size, prompt_length, device, logits_processor, stopping)
    why = why_dense(model, config, rules.shaping, watchers, device)
    # Rows stay where somebody else counts on them: a caller's cache, processors and criteria, adapters, a cache of fixed rows.
    stays = counted or any(processor.looks_at is None for processor in rules.shaping.callers)
    stays = stays or prompt.cache is not None or config.cache_implementation not in (None, "dynamic")
    stays = stays or (hasattr(model, "peft_config") and mixes_adapters(model))
    return Plan(
        lengths,
        rules,
        Execution(
            why_dense=why,
            wanted=Wanted(candidates_of(watchers)) if constraint is None else constraint.wanted,
            compact=not reference and not stays,
            keep_scores=bool(config.output_scores),
            keep_logits=bool(config.output_logits),
            late_flags=reads_late(device),
            record=why is None and constraint is None and (stays or rows == 1) and not config.disable_compile
            and config.decoding == "diffusion" and records(device) and may_be_recorded(model),
            deadline=None if config.max_time is None else time.perf_counter() + config.max_time,
        ),
    )  # fmt: skip


__all__ = ["Execution", "Lengths", "Plan", "Rules", "make_plan", "make_rules", "mixes_adapters", "why_dense"]
