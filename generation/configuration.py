"""`DiffusionGenerationConfig`: transformers' `GenerationConfig` with the fields of block diffusion.

It reads the released generation_config.json and, as long as only fields that transformers' own class for this model
knows are set, writes a file which that class reads in turn.
"""

import copy
from typing import Any

import torch
from transformers import GenerationConfig

from .presets import PRESETS

DIFFUSION_FIELDS = {  # field: its value in the released checkpoint
    "max_denoising_steps": 48,
    "entropy_bound": 0.1,
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
}
OWN_FIELDS = {  # fields no released file holds: default
    "sampler": "entropy_bound",
    "confidence": 0.9,
    "corrector_steps": 1,
    "corrector_positions": 8,
    "decoding": "diffusion",
    "canvas_length": None,
    "patience": None,
    "ignore_after_eos": None,
    "noise": "uniform",
    "mask_token_id": None,
    "backend": "auto",
}
RELEASED_DEFAULTS = {"max_new_tokens": 256, **DIFFUSION_FIELDS, **OWN_FIELDS}
BACKENDS = ("auto", "reference")
SAMPLERS = ("entropy_bound", "confidence", "fixed_steps", "predictor_corrector")
DECODINGS = ("diffusion", "autoregressive", "verified")
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
NOISES = ("uniform", "mask")
CACHES = ("dynamic", "static", "offloaded", "offloaded_static", "quantized")
SAMPLER_NAME = "EntropyBoundSamplerConfig"  # the name in the released file

# Fields of GenerationConfig that `generate` honours beyond those above; what they mean here stands in generation/README.md.
HONOURED = frozenset(
    {
        *RELEASED_DEFAULTS, *SPECIAL_TOKENS, "max_length", "min_length", "min_new_tokens", "max_time", "stop_strings", "do_sample",
        "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
        "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "sequence_bias", "num_return_sequences", "cache_implementation",
        "cache_config", "output_scores", "output_logits", "return_dict_in_generate", "compile_config", "disable_compile",
        "transformers_version",
    }
)  # fmt: skip
# Values of refused fields that ask for what happens anyway.
NEUTRAL: dict[str, tuple] = {
    "num_beams": (1,), "use_cache": (True,), "output_attentions": (False,), "output_hidden_states": (False,),
    "num_beam_groups": (1,), "length_penalty": (1.0,), "early_stopping": (False,), "diversity_penalty": (0.0,),
    "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1.0,), "renormalize_logits": (False,),
    "remove_invalid_values": (False,), "token_healing": (False,), "is_assistant": (False,), "use_mtp": (False,), "low_memory": (False,),
    "guidance_scale": (1.0,),
}  # fmt: skip
WHY_REFUSED = {
    "num_beams": "a canvas has no beams", "num_beam_groups": "a canvas has no beams", "use_cache": "the canvas reads the prompt's cache",
    "assistant_model": "the canvas is its own draft; see decoding='verified'", "guidance_scale": "the model was not trained for it",
    "forced_bos_token_id": "positions are not written in order", "output_attentions": "call the model for them",
    "output_hidden_states": "call the model for them",
    "synced_gpus": "ranks would have to agree on every pass, see generation/README.md",
    "watermarking_config": "it marks tokens by their left neighbour, which changes while a canvas is denoised",
}  # fmt: skip


class DiffusionGenerationConfig(GenerationConfig):
    """How `generate` denoises.

    Args:
        max_new_tokens (`int`): tokens after the prompt, 256 if neither this nor `max_length` is set. Output is trimmed to it.
        max_length (`int`): prompt and new tokens together; `max_new_tokens` has precedence.
        max_denoising_steps (`int`): steps a canvas may take (48: released checkpoint).
        entropy_bound (`float`): nats of joint uncertainty a step may accept (0.1: released checkpoint).
        t_max, t_min (`float`): temperature at the first step and, linearly falling, after the last (0.8, 0.4: released).
        stability_threshold (`int`): steps the argmax canvas must not have changed for a row to stop (1: released).
        confidence_threshold (`float`): nats; a row stops below this mean entropy (0.005: released).
        sampler (`str`): `"entropy_bound"` (released), `"confidence"`, accepting tokens of probability `confidence` (0.9) and more,
            `"fixed_steps"`, accepting the same number more at each of `max_denoising_steps`, or `"predictor_corrector"`, which
            follows the reverse process and after each of its steps resamples, `corrector_steps` (1) times, the
            `corrector_positions` (8) tokens that fit least (generation/samplers.py).
        decoding (`str`): `"diffusion"`; `"autoregressive"`, one token a pass by the causal pass alone; or `"verified"`, which
            drafts by diffusion and keeps what the causal pass agrees with: greedy output equals autoregressive output.
        canvas_length (`int`): tokens of a canvas; default the checkpoint's. A narrower one is cheaper for short answers.
        patience (`int`): a row gives up on a canvas whose mean entropy has reached no new minimum for so many steps. Default: never.
        ignore_after_eos (`bool`): do not wait for positions behind an end of sequence the canvas is sure of. Default: True, but
            False with the reference backend.
        noise (`str`): `"uniform"` random tokens (released) or `"mask"`, the token `mask_token_id`.
        backend (`str`): `"reference"` draws random numbers exactly as transformers does: same seed, same tokens. `"auto"`
            may choose a faster way to the same distribution.
        cache_implementation (`str`): "dynamic" (default), "static", "offloaded" or "offloaded_static" (the keys and values of
            a layer are on the device while it runs, in host memory otherwise; needs CUDA), or "quantized" (full-attention
            layers in FP8, or as `cache_config` says: `generation.inputs.quantized_cache`).
        temperature (`float`): multiplies the schedule; 0 means `do_sample=False`.
        do_sample (`bool`): False takes the most probable token instead of a sample, and always the same noise: deterministic.
        kwargs: any other field of `GenerationConfig`; generation/README.md says which are honoured and what they mean for a
            canvas, and `generate` refuses the others by name.

    Raises:
        ValueError: a field this class does not know, or a value out of range, by name.
    """

    def __init__(self, **kwargs: Any):
        sampler = kwargs.pop("sampler_config", None)
        if sampler is not None:
            kwargs["entropy_bound"] = _entropy_bound(sampler, kwargs.get("entropy_bound"))
        for name in (*DIFFUSION_FIELDS, *OWN_FIELDS):
            setattr(self, name, kwargs.pop(name, None))
        known = set(GenerationConfig().__dict__) | {"_commit_hash", "_from_model_config", "generation_kwargs"}
        if not kwargs.get("_from_model_config") and (unknown := sorted(set(kwargs) - known)):
            raise ValueError(f"unknown generation arguments {unknown}; expected fields of GenerationConfig or {sorted(RELEASED_DEFAULTS)}")
        super().__init__(**kwargs)

    def validate(self, *args, **kwargs) -> None:
        for name in ("max_new_tokens", "max_length", "max_denoising_steps", "canvas_length", "patience", "num_return_sequences",
                     "corrector_positions"):  # fmt: skip
            _expect(name, getattr(self, name), lambda v: _is_int(v) and v > 0, "a positive integer")
        for name in ("stability_threshold", "min_new_tokens", "corrector_steps"):
            _expect(name, getattr(self, name), lambda v: _is_int(v) and v >= 0, "an integer >= 0")
        for name in ("entropy_bound", "confidence_threshold"):
            _expect(name, getattr(self, name), lambda v: _is_number(v) and v > 0, "a number > 0, in nats")
        for name in ("t_min", "t_max"):
            _expect(name, getattr(self, name), lambda v: _is_number(v) and v > 0, "a temperature > 0")
        if self.t_min is not None and self.t_max is not None and self.t_min > self.t_max:
            raise ValueError(f"`t_min` is {self.t_min}; expected at most `t_max`, {self.t_max}")
        _expect("temperature", self.temperature, lambda v: _is_number(v) and v >= 0, "a number >= 0")
        _expect("max_time", self.max_time, lambda v: _is_number(v) and v > 0, "seconds > 0")
        for name in ("bos_token_id", "pad_token_id", "mask_token_id"):
            _expect(name, getattr(self, name), lambda v: _is_int(v) and v >= 0, "a token id")
        _expect("eos_token_id", self.eos_token_id, _are_ids, "a token id, or a list of them")
        _expect("stop_strings", self.stop_strings, _are_strings, "a string that is not empty, or a list of them")
        _expect("confidence", self.confidence, lambda v: _is_number(v) and 0 < v <= 1, "a probability above 0, at most 1")
        _expect("sampler", self.sampler, SAMPLERS.__contains__, f"one of {SAMPLERS}")
        _expect("decoding", self.decoding, DECODINGS.__contains__, f"one of {DECODINGS}")
        for name in ("ignore_after_eos", "do_sample"):
            _expect(name, getattr(self, name), lambda v: isinstance(v, bool), "True or False")
        _expect("noise", self.noise, NOISES.__contains__, f"one of {NOISES}")
        _expect("backend", self.backend, BACKENDS.__contains__, f"one of {BACKENDS}")
        _expect("cache_implementation", self.cache_implementation, CACHES.__contains__, f"one of {CACHES}")
        # GenerationConfig.validate warns of sampling arguments while `do_sample` is unset, which here means sampling.
        unset, self.do_sample = self.do_sample, True if self.do_sample is None else self.do_sample
        try:
            super().validate(*args, **kwargs)
        finally:
            self.do_sample = unset

    def refused(self) -> list[str]:
        """Names, values and reasons of the fields that are set and that `generate` does not honour."""
        return [
            f"{name}={value!r}" + (f" ({WHY_REFUSED[name]})" if name in WHY_REFUSED else "")
            for name, value in self.__dict__.items()
            if name not in HONOURED and not name.startswith("_") and value is not None and value not in NEUTRAL.get(name, ())
        ]

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        if (sampler := kwargs.pop("sampler_config", None)) is not None:
            kwargs["entropy_bound"] = _entropy_bound(sampler, kwargs.get("entropy_bound"))
        return super().update(defaults_only, allow_custom_entries, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved: fields that are set, with the entropy bound in the released file's form."""
        fields = super().to_diff_dict()
        fields = {name: value for name, value in fields.items() if value is not None and value is not False and name[0] != "_"}
        if fields.get("temperature") == 1.0:
            del fields["temperature"]  # what it is anyway
        if "entropy_bound" in fields:
            fields["sampler_config"] = {"_cls_name": SAMPLER_NAME, "entropy_bound": float(fields.pop("entropy_bound"))}
        return fields

    def filled(self) -> "DiffusionGenerationConfig":
        """A copy whose six diffusion fields hold the released values where they were unset: what a checkpoint's file should say."""
        whole = copy.deepcopy(self)
        whole.update(defaults_only=True, **DIFFUSION_FIELDS)
        return whole

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        """Nothing: transformers would fill in autoregressive defaults here; `generate` applies the released ones itself."""
        return {}

    @classmethod
    def preset(cls, name: str, **kwargs: Any) -> "DiffusionGenerationConfig":
        """The settings called `name`: "released", "fast" or "thorough", measured in benchmarks/RESULTS.md; kwargs go over them."""
        if name not in PRESETS:
            raise ValueError(f"`name` is {name!r}; expected one of {sorted(PRESETS)}")
        return cls(**{**DIFFUSION_FIELDS, **PRESETS[name], **kwargs})

    @classmethod
    def from_model_config(cls, model_config) -> "DiffusionGenerationConfig":
        """What a model without a generation_config.json starts from: its special tokens."""
        sources = (model_config, model_config.get_text_config())
        found = {name: [getattr(source, name, None) for source in sources] for name in SPECIAL_TOKENS}
        return cls(**{name: outer if outer is not None else inner for name, (outer, inner) in found.items()})

    @classmethod
    def from_generation_config(cls, config: GenerationConfig) -> "DiffusionGenerationConfig":
        """A copy of a plain `GenerationConfig`, or of transformers' own config for this model."""
        return cls(**{name: value for name, value in config.__dict__.items() if value is not None and not name.startswith("_")})


def _entropy_bound(sampler: Any, given: float | None) -> float:
    own = getattr(sampler, "__dict__", {})
    fields = dict(sampler) if isinstance(sampler, dict) else {"_cls_name": type(sampler).__name__, **own}
    name = fields.pop("_cls_name", SAMPLER_NAME)
    if name != SAMPLER_NAME or set(fields) != {"entropy_bound"}:
        raise ValueError(f"`sampler_config` is {sampler!r}; expected {{'_cls_name': {SAMPLER_NAME!r}, 'entropy_bound': nats}}")
    if given is not None and given != fields["entropy_bound"]:
        raise ValueError(f"`entropy_bound` is {given} and `sampler_config` says {fields['entropy_bound']}; expected one of them")
    return fields["entropy_bound"]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_ids(value: Any) -> bool:
    ids = value.flatten().tolist() if isinstance(value, torch.Tensor) else value if isinstance(value, (list, tuple)) else [value]
    return all(_is_int(token) and token >= 0 for token in ids)


def _are_strings(value: Any) -> bool:
    strings = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(string, str) and string for string in strings)


def _expect(name: str, value: Any, holds, expectation: str) -> None:
    if value is not None and not holds(value):
        raise ValueError(f"`{name}` is {value!r}; expected {expectation}")


__all__ = ["DIFFUSION_FIELDS", "HONOURED", "NEUTRAL", "PRESETS", "RELEASED_DEFAULTS", "DiffusionGenerationConfig"]
