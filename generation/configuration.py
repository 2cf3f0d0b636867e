"""`DiffusionGenerationConfig`: transformers' `GenerationConfig` with the fields of block diffusion.

It reads the released generation_config.json and, as long as only fields that transformers' own class for this model
knows are set, writes a file which that class reads in turn.
"""

from typing import Any

from transformers import GenerationConfig

DIFFUSION_FIELDS = {  # field: its value in the released checkpoint
    "max_denoising_steps": 48,
    "entropy_bound": 0.1,
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
}
OWN_FIELDS = {  # fields no released file holds: default
    "noise": "uniform",
    "mask_token_id": None,
    "backend": "auto",
}
RELEASED_DEFAULTS = {"max_new_tokens": 256, **DIFFUSION_FIELDS, **OWN_FIELDS}
BACKENDS = ("auto", "reference")
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
NOISES = ("uniform", "mask")
CACHES = ("dynamic", "static")
SAMPLER_NAME = "EntropyBoundSamplerConfig"  # the name in the released file

HONOURED = frozenset(
    {
        *RELEASED_DEFAULTS, "max_length", "cache_implementation", "eos_token_id", "pad_token_id", "bos_token_id",
        "return_dict_in_generate", "disable_compile", "transformers_version",
    }
)  # fmt: skip
# Values of other fields that ask for what happens anyway.
NEUTRAL: dict[str, tuple] = {
    "do_sample": (True,), "num_beams": (1,), "use_cache": (True,), "temperature": (1.0,), "top_p": (1.0,), "num_return_sequences": (1,),
    "repetition_penalty": (1.0,), "min_length": (0,), "output_attentions": (False,), "output_hidden_states": (False,),
    "output_scores": (False,), "output_logits": (False,), "num_beam_groups": (1,), "length_penalty": (1.0,), "early_stopping": (False,),
    "diversity_penalty": (0.0,), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,), "encoder_repetition_penalty": (1.0,), "renormalize_logits": (False,),
    "remove_invalid_values": (False,), "token_healing": (False,), "is_assistant": (False,), "use_mtp": (False,), "low_memory": (False,),
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
        noise (`str`): `"uniform"` random tokens (released) or `"mask"`, the token `mask_token_id`.
        backend (`str`): `"reference"` draws random numbers exactly as transformers does: same seed, same tokens. `"auto"`
            may choose a faster way to the same distribution.
        cache_implementation (`str`): "dynamic" (default) or "static".
        eos_token_id, pad_token_id, return_dict_in_generate: as in `GenerationConfig`.
        kwargs: any other field of `GenerationConfig`; `generate` refuses by name what it does not honour.

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
        super().validate(*args, **kwargs)
        for name in ("max_new_tokens", "max_length", "max_denoising_steps"):
            _expect(name, getattr(self, name), lambda v: _is_int(v) and v > 0, "a positive integer")
        _expect("stability_threshold", self.stability_threshold, lambda v: _is_int(v) and v >= 0, "an integer >= 0")
        for name in ("entropy_bound", "confidence_threshold"):
            _expect(name, getattr(self, name), lambda v: _is_number(v) and v > 0, "a number > 0, in nats")
        for name in ("t_min", "t_max"):
            _expect(name, getattr(self, name), lambda v: _is_number(v) and v > 0, "a temperature > 0")
        if self.t_min is not None and self.t_max is not None and self.t_min > self.t_max:
            raise ValueError(f"`t_min` is {self.t_min}; expected at most `t_max`, {self.t_max}")
        _expect("noise", self.noise, NOISES.__contains__, f"one of {NOISES}")
        _expect("backend", self.backend, BACKENDS.__contains__, f"one of {BACKENDS}")
        _expect("cache_implementation", self.cache_implementation, CACHES.__contains__, f"one of {CACHES}")
        _expect("mask_token_id", self.mask_token_id, lambda v: _is_int(v) and v >= 0, "a token id")

    def refused(self) -> list[str]:
        """Names and values of the fields that are set and that `generate` does not honour."""
        return [
            f"{name}={value!r}"
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
        if "entropy_bound" in fields:
            fields["sampler_config"] = {"_cls_name": SAMPLER_NAME, "entropy_bound": float(fields.pop("entropy_bound"))}
        return fields

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
    fields = dict(sampler) if isinstance(sampler, dict) else {"_cls_name": type(sampler).__name__, **vars(sampler)}
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


def _expect(name: str, value: Any, holds, expectation: str) -> None:
    if value is not None and not holds(value):
        raise ValueError(f"`{name}` is {value!r}; expected {expectation}")


__all__ = ["BACKENDS", "DIFFUSION_FIELDS", "HONOURED", "RELEASED_DEFAULTS", "DiffusionGenerationConfig"]
