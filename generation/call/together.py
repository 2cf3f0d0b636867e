"""Which arguments of `generate` go together: all that is said of two or more of them, and of one and the model or the prompt's length.

What each may be by itself stands in `arguments`; shapes of tensors are checked where tensors are read (`checks`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..rules.constraint import is_constraint
from ..rules.samplers import PredictorCorrectorSampler
from ..watch.watcher import candidates_of


def is_greedy(config) -> bool:
    """Whether the most probable tokens are taken, and no sample."""
    return config.do_sample is False or config.temperature == 0


def check_fields(config, whole: bool = False) -> None:
    """Fields of a `DiffusionGenerationConfig` with one another. `whole`: of one call, in which what is None is said nowhere else.

    Raises:
        ValueError: two that contradict each other.
    """
    if config.t_min is not None and config.t_max is not None and config.t_min > config.t_max:
        raise ValueError(f"`t_min` is {config.t_min}; expected at most `t_max`, {config.t_max}")
    if is_greedy(config) and (config.num_return_sequences or 1) > 1:
        greedy = "do_sample=False" if config.do_sample is False else "temperature=0"
        raise ValueError(f"`num_return_sequences` is {config.num_return_sequences}; expected 1 with `{greedy}`")
    if not whole:
        return
    if config.decoding == "verified" and not is_greedy(config):
        raise ValueError(f"`do_sample` is {config.do_sample!r}; expected False with `decoding='verified'`, which verifies greedy tokens")
    if config.decoding != "diffusion" and config.backend == "reference":
        raise ValueError(f"`decoding` is {config.decoding!r}; expected 'diffusion' with the reference backend")
    if config.decoding != "diffusion" and config.cache_implementation not in (None, "dynamic"):
        got = f"`cache_implementation` is {config.cache_implementation!r}"
        raise ValueError(f"{got}; expected 'dynamic' with `decoding={config.decoding!r}`, which makes no other cache")
    if config.noise == "mask" and config.mask_token_id is None:
        raise ValueError("`mask_token_id` is None; expected a token id, since `noise` is 'mask'")
    corrects = isinstance(config.sampler, PredictorCorrectorSampler) or config.sampler == "predictor_corrector"
    if config.noise == "mask" and corrects:
        raise ValueError("`noise` is 'mask'; expected 'uniform' with `sampler='predictor_corrector'`, which reverses uniform noise")
    for name in ("output_logits", "output_scores"):
        if getattr(config, name) and not config.return_dict_in_generate:
            raise ValueError(f"`{name}` is True; expected `return_dict_in_generate=True` with it, or they have nowhere to go")
    if config.cache_config is not None and config.cache_implementation != "quantized":
        raise ValueError(f"`cache_config` is {config.cache_config!r}; expected None unless `cache_implementation` is 'quantized'")


def check_seeds(seed: Any, generator: Any) -> None:
    """Raises ValueError where random numbers would come from both."""
    if seed is not None and generator is not None:
        raise ValueError("`seed` and `generator` are both given; expected one of them")


def check_arguments(model, config, given: Mapping[str, Any]) -> None:
    """The arguments `given` to `generate`, None for those that are not, with one another, with the fields of `config`, which are all set,
    and with the model.

    Raises:
        ValueError: arguments that do not go together.
    """
    prompts = [name for name in ("inputs", "input_ids", "inputs_embeds") if given[name] is not None]
    if len(prompts) != 1:
        found = f"{len(prompts)} are given" if prompts else "the prompt is empty: none is given"
        raise ValueError(f"`generate` takes the prompt as `inputs`, `input_ids` or `inputs_embeds`; {found}; expected exactly one of them")
    if given["inputs_embeds"] is not None and given["pixel_values"] is not None:
        raise ValueError("`pixel_values` needs `input_ids`, which say where the images stand; got `inputs_embeds`")
    check_seeds(given["seed"], given["generator"])
    cache, canvas, copies = given["cache"], given["decoder_input_ids"], config.num_return_sequences or 1
    if cache is not None and config.cache_implementation is not None:
        raise ValueError(f"`cache_implementation` is {config.cache_implementation!r}; expected None, since `cache` is given")
    alone = [name for name in ("cache", "decoder_input_ids", "self_conditioning_logits") if given[name] is not None]
    if config.decoding != "diffusion" and alone:
        raise ValueError(f"`decoding` is {config.decoding!r}; it does not go with `{alone[0]}`: expected 'diffusion'")
    of_steps = [name for name in ("callback_on_step_end", "stopping") if given[name] is not None]
    if config.decoding == "autoregressive" and of_steps:
        raise ValueError(f"`decoding` is 'autoregressive', which has no steps; expected another with `{of_steps[0]}`")
    for watcher in given["watcher"] or ():
        if config.decoding == "autoregressive" and watcher.needs_steps:
            name = type(watcher).__name__
            raise ValueError(f"`watcher` is a {name}, and `decoding` is 'autoregressive', which has no denoising steps; expected another")
    if copies > 1 and (cache is not None or given["pixel_values"] is not None):
        raise ValueError(f"`num_return_sequences` is {copies}; expected 1 together with `cache` or images")
    if config.compile_config is not None and not hasattr(model, "compiling"):
        raise ValueError(f"`compile_config` is given, and {type(model).__name__} has no method `compiling`; expected None")
    if config.stop_strings is not None and given["tokenizer"] is None:
        raise ValueError("`tokenizer` is None; expected the tokenizer, since `stop_strings` are set")
    if config.backend == "reference" and (given["seed"] is not None or isinstance(given["generator"], Sequence)):
        name = "generator" if given["seed"] is None else "seed"
        why = "`backend` is 'reference', which draws for the whole batch"
        raise ValueError(f"`{name}` is {given[name]!r}; expected one `generator`, or `torch.manual_seed`: {why}")
    if is_constraint(given["constraint"]) and candidates_of(given["watcher"] or ()):
        raise ValueError(
            "`constraint` sees predictions, and a `watcher` reads the most probable ids, such as a Trace with `alternatives`: behind that "
            "one they are not what a step chooses from; expected one of them"
        )
    if given["constraint"] is not None and config.backend == "reference":
        raise ValueError("`constraint` is given, and `backend` is 'reference', which does as transformers' class does; expected another")
    if is_constraint(given["constraint"]):
        if not hasattr(model, "get_input_embeddings"):
            raise ValueError(f"`constraint` is given, and {type(model).__name__} has no method `get_input_embeddings`; expected None")
        if config.decoding != "diffusion":
            raise ValueError(f"`decoding` is {config.decoding!r}; expected 'diffusion' with a `constraint` that sees predictions")
    first_step, steps = given["first_step"] or 0, config.max_denoising_steps
    first_steps = first_step if isinstance(first_step, list) else [first_step]
    if any(first_steps) and (canvas is None or max(first_steps) > steps):
        expected = f"a step up to `max_denoising_steps`, {steps}, at which a canvas stands as it is, and a canvas as `decoder_input_ids`"
        raise ValueError(f"`first_step` is {first_step}; expected {expected}")
    conditioned = given["self_conditioning_logits"] is not None
    read_of_steps = {"self_conditioning_logits": conditioned, "output_scores": config.output_scores, "output_logits": config.output_logits}
    if steps in first_steps and any(read_of_steps.values()):
        name = next(name for name, asked in read_of_steps.items() if asked)
        raise ValueError(f"`first_step` is {first_step}, and `{name}` is given; expected it unset: a canvas that stands takes no step")
    if config.decoding == "verified":
        rows = copies * len(given[prompts[0]])
        alone = [name for name in ("streamer", "watcher", "callback_on_step_end", "pixel_values") if given[name] is not None]
        if rows > 1 and alone:
            raise ValueError(f"`decoding='verified'` got {rows} rows; expected one together with {' and '.join(map('`{}`'.format, alone))}")


def allowed_tokens(config, use_max_length: bool, prompt_length: int) -> int:
    """How many new tokens a row may get behind `prompt_length` ones, cached tokens included.

    Raises:
        ValueError: a `max_length` that leaves none.
    """
    if not use_max_length:
        return config.max_new_tokens
    if config.max_length <= prompt_length:
        raise ValueError(f"`max_length` is {config.max_length}; expected more than the prompt's {prompt_length} tokens")
    return config.max_length - prompt_length


__all__ = ["allowed_tokens", "check_arguments", "check_fields", "check_seeds", "is_greedy"]
