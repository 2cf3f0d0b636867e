"""`DiffusionGenerationConfig`: transformers' `GenerationConfig` with the fields of block diffusion.

It reads the released generation_config.json and writes a file which transformers' own class for this model reads in turn. That
class refuses fields it does not know, so these go to a second file beside it (`FURTHER_FILE` before its name), written only where there are
any.
"""

import copy
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CompileConfig, GenerationConfig
from transformers.utils import cached_file

from ..arguments import FIELDS, read, shown, unknown
from .presets import PRESETS
from .together import check_fields

DIFFUSION_FIELDS = {  # field: its value in the released checkpoint
    "max_denoising_steps": 48,
    "entropy_bound": 0.1,
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
}
FURTHER_FIELDS = {  # fields no released file holds: default
    "sampler": "entropy_bound",
    "confidence": 0.9,
    "corrector_steps": 1,
    "corrector_positions": 8,
    "decoding": "diffusion",
    "canvas_length": None,
    "joint_threshold": None,
    "patience": None,
    "self_conditioning_steps": None,
    "ignore_after_eos": None,
    "noise": "uniform",
    "mask_token_id": None,
    "backend": "auto",
}
RELEASED_DEFAULTS = {"max_new_tokens": 256, **DIFFUSION_FIELDS, **FURTHER_FIELDS}
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
SAMPLER_NAME = "EntropyBoundSamplerConfig"  # the name in the released file
PUBLISHED = frozenset(  # what transformers' class for this model reads, and it refuses all else
    {
        *DIFFUSION_FIELDS, *SPECIAL_TOKENS, "max_new_tokens", "max_length", "return_dict_in_generate", "cache_implementation",
        "cache_config", "disable_compile", "transformers_version",
    }
)  # fmt: skip
FURTHER_FILE = "diffusion_"  # diffusion_generation_config.json
DOWNLOAD = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")

HONOURED = frozenset(FIELDS)  # what each means here stands in generation/README.md
# Values of refused fields that ask for what happens anyway.
NEUTRAL: dict[str, tuple] = {
    "num_beams": (1,), "use_cache": (True,), "output_attentions": (False,), "output_hidden_states": (False,),
    "num_beam_groups": (1,), "length_penalty": (1.0,), "early_stopping": (False,), "diversity_penalty": (0.0,),
    "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1.0,), "renormalize_logits": (False, True),
    "remove_invalid_values": (False,), "token_healing": (False,), "is_assistant": (False,), "use_mtp": (False,), "low_memory": (False,),
    "guidance_scale": (1.0,),
}  # fmt: skip
WHY_REFUSED = {
    "num_beams": "a canvas has no beams", "num_beam_groups": "a canvas has no beams", "use_cache": "the canvas reads the prompt's cache",
    "assistant_model": "the canvas is its own draft; see decoding='verified'", "guidance_scale": "the model was not trained for it",
    "forced_bos_token_id": "positions are not written in order", "output_attentions": "call the model for them",
    "output_hidden_states": "call the model for them", "prompt_lookup_num_tokens": "the canvas is its own draft; see decoding='verified'",
    "prefix_allowed_tokens_fn": "a canvas is not written from left to right; `constraint` says what its text must be",
    "custom_generate": "`sampler`, `stopping`, `watcher` and `callback_on_step_end` change the loop",
    "constraints": "`constraint` takes a language: `Regex`, `JsonSchema`, `Choice`, `Template` or `Pins`",
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
            `corrector_positions` (8) tokens that fit least (generation/rules/samplers.py). Or an instance of one's own,
            `generation.Sampler`, which cannot be saved.
        decoding (`str`): `"diffusion"`; `"autoregressive"`, one token a pass by the causal pass alone; or `"verified"`, which
            drafts by diffusion and keeps what the causal pass agrees with: greedy output equals autoregressive output.
        canvas_length (`int`): tokens of a canvas; default the checkpoint's. A narrower one is cheaper for short answers.
        joint_threshold (`float`): nats; a row stops, too, as soon as the entropies of its positions come to less than this together,
            whatever has changed; 0.1, the released entropy bound, saves a seventh to a third of them on text. Default: None, never.
        patience (`int`): a row gives up on a canvas whose mean entropy has reached no new minimum for so many steps. Default: never.
        self_conditioning_steps (`int`): each step is conditioned on the one before it, but after so many steps of a canvas one begins
            anew with nothing, and so on: a way out of what steps confirm to one another. Default, and with `max_denoising_steps`: never.
        ignore_after_eos (`bool`): do not wait for positions behind an end of sequence the canvas is sure of. Default: True, but
            False with the reference backend.
        noise (`str`): `"uniform"` random tokens (released) or `"mask"`, the token `mask_token_id`.
        backend (`str`): `"reference"` draws random numbers exactly as transformers does and computes experts as it does, unless an
            implementation was named: same seed, same tokens. `"auto"` may choose a faster way to the same distribution.
        cache_implementation (`str`): "dynamic" (default), "static", "offloaded" or "offloaded_static" (the keys and values of
            a layer are on the device while it runs, in host memory otherwise; needs CUDA), or "quantized" (full-attention
            layers in FP8, or as `cache_config` says: `generation.call.caches.quantized_cache`).
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
        for name in (*DIFFUSION_FIELDS, *FURTHER_FIELDS):
            setattr(self, name, kwargs.pop(name, None))
        known = set(GenerationConfig().__dict__) | {"_commit_hash", "_from_model_config", "generation_kwargs"}
        if not kwargs.get("_from_model_config") and (others := set(kwargs) - known):
            expected = f"fields of GenerationConfig or {sorted(RELEASED_DEFAULTS)}"
            raise ValueError(f"unknown generation arguments {unknown(others, FIELDS)}; expected {expected}")
        marking = kwargs.pop("watermarking_config", None)  # refused in `generate`, and no error before
        super().__init__(**kwargs)
        self.watermarking_config = marking

    def validate(self, *args, **kwargs) -> None:
        """Reads every field as its kind in `FIELDS` says. transformers' own checks are about decoding token by token."""
        for name, kind in FIELDS.items():
            setattr(self, name, read(name, getattr(self, name), kind))
        check_fields(self)

    def named(self) -> "DiffusionGenerationConfig":
        """Itself; where the sampler is an instance, a copy in which it is what `repr` says."""
        if self.sampler is None or isinstance(self.sampler, str):
            return self
        shallow = copy.copy(self)
        shallow.sampler = repr(self.sampler)
        return shallow

    def __repr__(self) -> str:
        return GenerationConfig.__repr__(self.named())

    def __eq__(self, other: Any) -> bool:
        other = other.named() if isinstance(other, DiffusionGenerationConfig) else other
        return GenerationConfig.__eq__(self.named(), other)

    def __hash__(self) -> int:
        return GenerationConfig.__hash__(self.named())

    def to_json_string(self, *args, **kwargs) -> str:
        """Raises ValueError for a sampler that is an instance."""
        if self.named() is not self:
            raise ValueError(f"`sampler` is {shown(self.sampler)}; expected the name of one, since JSON cannot hold an instance")
        return super().to_json_string(*args, **kwargs)

    def to_json_file(self, *args, **kwargs) -> None:
        """As `to_json_string`, and before there is a file."""
        self.to_json_string()
        super().to_json_file(*args, **kwargs)

    def refused(self) -> list[str]:
        """Names, values and reasons of the fields that are set and that `generate` does not honour."""
        return refusals(self.__dict__)

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        if (sampler := kwargs.pop("sampler_config", None)) is not None:
            kwargs["entropy_bound"] = _entropy_bound(sampler, kwargs.get("entropy_bound"))
        before = dict(self.__dict__)
        try:
            return super().update(defaults_only, allow_custom_entries, **kwargs)
        except Exception:
            self.__dict__ = before  # a refused value changes nothing
            raise

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that are set, with the entropy bound in the released file's form."""
        fields = {name: value for name, value in self.to_dict().items() if value is not None and name[0] != "_"}
        if isinstance(self.compile_config, CompileConfig):
            fields["compile_config"] = self.compile_config.to_dict()
        if "entropy_bound" in fields:
            fields["sampler_config"] = {"_cls_name": SAMPLER_NAME, "entropy_bound": float(fields.pop("entropy_bound"))}
        return fields

    def published_and_further(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The contents of the two files.

        Raises:
            ValueError: a field that JSON cannot hold.
        """
        fields = self.to_diff_dict()
        for name, value in fields.items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise ValueError(f"`{name}` is {shown(value)}; expected a value that JSON can hold: {error}") from error
        published = {name: value for name, value in fields.items() if name in {*PUBLISHED, "sampler_config"}}
        further = {name: value for name, value in fields.items() if name not in published}
        # transformers' class wants a float here, and t_max above t_min.
        if "confidence_threshold" in published:
            published["confidence_threshold"] = float(published["confidence_threshold"])
        if "t_max" in published and published["t_max"] == published.get("t_min"):
            further["t_max"] = published["t_max"]
            published["t_max"] = math.nextafter(published["t_max"], math.inf)
        return published, further

    def save_pretrained(
        self, save_directory: str | os.PathLike, config_file_name: str | None = None, push_to_hub: bool = False, **kwargs
    ) -> None:
        """Writes the file that transformers' class reads, and beside it, where there are any, the fields which that class does not know.

        Raises:
            ValueError: a field out of range, or one that JSON cannot hold; `push_to_hub=True`. Nothing is written then.
        """
        if push_to_hub or kwargs:
            raise ValueError(
                f"`push_to_hub` is {push_to_hub!r}, with {sorted(kwargs)}; expected False: call `push_to_hub(repo_id)` instead"
            )
        if os.path.isfile(save_directory):
            raise ValueError(f"`save_directory` is the file {save_directory}; expected a folder")
        self.validate()
        published, further = self.published_and_further()
        folder, name = Path(save_directory), config_file_name or "generation_config.json"
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / name, published)
        _replace((folder / name).with_name(f"{FURTHER_FILE}{Path(name).name}"), further)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str | os.PathLike, config_file_name: str | None = None, **kwargs: Any
    ) -> "DiffusionGenerationConfig":
        """As transformers does, and with the fields of the second file."""
        name = Path(config_file_name or "generation_config.json")
        download = {argument: kwargs[argument] for argument in DOWNLOAD if kwargs.get(argument) is not None}
        file = cached_file(
            pretrained_model_name, str(name.with_name(f"{FURTHER_FILE}{name.name}")), **download, _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        further = {}
        if file is not None:
            try:
                further = json.loads(Path(file).read_text(encoding="utf-8"))
                if not isinstance(further, dict):
                    raise TypeError(f"it holds {further!r}")
            except (ValueError, TypeError) as error:
                raise OSError(f"the config file at {file!r} is not a valid JSON file: {error}") from error
        return super().from_pretrained(pretrained_model_name, config_file_name, **{**further, **kwargs})

    def filled(self) -> "DiffusionGenerationConfig":
        """A copy whose six diffusion fields hold the released values where they were unset, and without the temperature that loading
        sets: what a checkpoint's file should say."""
        whole = copy.deepcopy(self)
        whole.temperature = None if whole.temperature == 1.0 else whole.temperature
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
    def from_generation_config(cls, config: GenerationConfig | Mapping[str, Any]) -> "DiffusionGenerationConfig":
        """A copy of a plain `GenerationConfig`, of transformers' own config for this model, or of a mapping of fields."""
        fields = config if isinstance(config, Mapping) else config.__dict__
        return cls(**{name: value for name, value in fields.items() if value is not None and not name.startswith("_")})


def _entropy_bound(sampler: Any, given: float | None) -> float:
    given_fields = getattr(sampler, "__dict__", {})
    fields = dict(sampler) if isinstance(sampler, dict) else {"_cls_name": type(sampler).__name__, **given_fields}
    name = fields.pop("_cls_name", SAMPLER_NAME)
    if name != SAMPLER_NAME or set(fields) != {"entropy_bound"}:
        raise ValueError(f"`sampler_config` is {sampler!r}; expected {{'_cls_name': {SAMPLER_NAME!r}, 'entropy_bound': nats}}")
    if given is not None and given != fields["entropy_bound"]:
        raise ValueError(f"`entropy_bound` is {given} and `sampler_config` says {fields['entropy_bound']}; expected one of them")
    return fields["entropy_bound"]


def refusals(fields: Mapping[str, Any]) -> list[str]:
    """Names, values and reasons of fields of `GenerationConfig` that are set and that `generate` does not honour."""
    return [
        f"{name}={shown(value)}" + (f" ({WHY_REFUSED[name]})" if name in WHY_REFUSED else "")
        for name, value in fields.items()
        if name not in HONOURED and not name.startswith("_") and value is not None
        and not (isinstance(value, int | float | str) and value in NEUTRAL.get(name, ()))
    ]  # fmt: skip


def _replace(path: Path, fields: dict[str, Any]) -> None:
    """Writes a JSON file at once, in the place of what was there; without fields it leaves none."""
    if not fields:
        path.unlink(missing_ok=True)
        return
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    unfinished.replace(path)


__all__ = ["DIFFUSION_FIELDS", "DOWNLOAD", "HONOURED", "NEUTRAL", "PRESETS", "RELEASED_DEFAULTS", "DiffusionGenerationConfig"]
