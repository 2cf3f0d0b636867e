"""What every argument of `generate` may be: one table of kinds, and one function that asks it.

A kind reads a value: it gives back what is used (numpy and 0-d numbers as Python's, tuples as lists, ids as int64), or says that the
value is not of this kind. Relations between arguments, and to the model, are checked where both are known.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Cache, CompileConfig, EncoderDecoderCache, GenerationConfig

from .rules.prediction import Wanted
from .rules.samplers import SAMPLERS

LARGEST = 2**63 - 1  # of an int64
DECODINGS = ("diffusion", "autoregressive", "verified")
NOISES = ("uniform", "mask")
BACKENDS = ("auto", "reference")
CACHES = ("dynamic", "static", "offloaded", "offloaded_static", "quantized")
INTEGERS = {getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}
INFINITY = float("inf")


class Unfit(Exception):
    """A value is not of a kind."""


class Kind(NamedTuple):
    """`expected` completes "expected ..."; `read` gives the value as it is used, or raises `Unfit`."""

    expected: str
    read: Callable[[Any], Any]


def shown(value: Any) -> str:
    """A value in an error message: short, and never the numbers of a tensor."""
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim > 0:
        return f"{type(value).__name__} {value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, torch.nn.Module):  # which would be shown with all its layers
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({type(value).__name__})"


def _plain(value: Any) -> Any:
    """A number of numpy's, or in a tensor without dimensions, as Python's."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def _items(value: Any) -> list:
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 1:
        return value.tolist()
    _demand(isinstance(value, list | tuple))
    return list(value)


def _demand(holds: bool) -> None:
    if not holds:
        raise Unfit


def _integer(value: Any, low: int, high: int) -> int:
    value = _plain(value)
    _demand(isinstance(value, int) and not isinstance(value, bool) and low <= value <= high)
    return value


def _number(value: Any, low: float, high: float, above: bool) -> float | int:
    value = _plain(value)
    _demand(isinstance(value, int | float) and not isinstance(value, bool))
    if isinstance(value, int) and abs(value) > LARGEST:  # more than a tensor is compared with
        _demand(abs(value) < 10**300)
        value = float(value)
    _demand(low <= value <= high and not (above and value == low))
    return value


def integer(low: int, high: int = LARGEST) -> Kind:
    expected = {(0, LARGEST): "an integer >= 0", (1, LARGEST): "a positive integer"}.get((low, high), f"an integer from {low} to {high:,}")
    return Kind(expected, lambda value: _integer(value, low, high))


def number(expected: str, low: float, high: float = INFINITY, above: bool = False) -> Kind:
    """From `low`, or `above` it, to `high`."""
    return Kind(expected, lambda value: _number(value, low, high, above))


def one_of(*choices: str) -> Kind:
    def read(value: Any) -> str:
        _demand(isinstance(value, str) and value in choices)
        return value

    return Kind(f"one of {choices}", read)


def _flag(value: Any) -> bool:
    value = _plain(value)
    _demand(isinstance(value, bool))
    return value


def _id(value: Any) -> int:
    return _integer(value, 0, LARGEST)


def _ids(value: Any) -> list[int]:
    return [_id(item) for item in _items(value)]


def _one_or_more(read: Callable[[Any], Any], value: Any) -> Any:
    try:
        return read(value)
    except Unfit:
        return [read(item) for item in _items(value)]


def _words(value: Any) -> list[list[int]]:
    words = [_ids(word) for word in _items(value)]
    _demand(len(words) > 0 and all(words))
    return words


def _strings(value: Any) -> str | list[str]:
    for string in [value] if isinstance(value, str) else _items(value):
        _demand(isinstance(string, str) and string != "")
    return value if isinstance(value, str) else _items(value)


def _bias(value: Any) -> list:
    """As JSON has it, `[[ids, bias], ...]`, and with biases that transformers' processor takes."""
    pairs = list(value.items()) if isinstance(value, Mapping) else [tuple(_items(pair)) for pair in _items(value)]
    _demand(len(pairs) > 0 and all(len(pair) == 2 for pair in pairs))
    read = [[_ids(ids), float(_number(bias, -INFINITY, 1e9, False))] for ids, bias in pairs]
    _demand(all(ids and (bias >= -1e9 or bias == -INFINITY) for ids, bias in read))
    return read


def _cache_settings(value: Any) -> dict:
    _demand(isinstance(value, Mapping))
    settings = {name: _plain(setting) for name, setting in value.items()}
    _demand(all(isinstance(name, str) and isinstance(setting, str | int | float | None) for name, setting in settings.items()))
    return settings


def _compile_config(value: Any) -> CompileConfig:
    try:
        return value if isinstance(value, CompileConfig) else CompileConfig(**value)
    except TypeError as error:
        raise Unfit from error


def _tensor(value: Any, dims: tuple[int, ...], dtypes: Callable[[torch.dtype], bool]) -> torch.Tensor:
    _demand(isinstance(value, torch.Tensor) and value.layout == torch.strided and value.dim() in dims and dtypes(value.dtype))
    return value


def integers(shape: str, *dims: int) -> Kind:
    """Ids of any integer type, read as int64."""
    return Kind(f"an integer tensor of shape {shape}", lambda value: _tensor(value, dims, INTEGERS.__contains__).long())


def floats(shape: str, *dims: int) -> Kind:
    return Kind(f"a floating tensor of shape {shape}", lambda value: _tensor(value, dims, lambda dtype: dtype.is_floating_point))


def _mask(value: Any) -> torch.Tensor:
    _tensor(value, (2,), lambda dtype: dtype.is_floating_point or dtype in INTEGERS or dtype == torch.bool)
    _demand(value.dtype == torch.bool or bool(((value == 0) | (value == 1)).all()))
    return value


def _marks(value: Any) -> torch.Tensor:
    return _tensor(value, (2,), lambda dtype: dtype in INTEGERS or dtype == torch.bool)


def _callables(value: Any) -> list:
    """One, or a list of them, in a plain list; a class in the place of its instance is none."""
    found = list(value) if isinstance(value, list | tuple) else [value]
    _demand(all(callable(each) and not isinstance(each, type) for each in found))
    return found


def _function(value: Any) -> Callable:
    _demand(callable(value) and not isinstance(value, type))
    return value


def _names(value: Any) -> list[str]:
    names = _items(value)
    _demand(all(isinstance(name, str) for name in names))
    return names


def _with_methods(*names: str) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        _demand(not isinstance(value, type) and all(callable(getattr(value, name, None)) for name in names))
        return value

    return read


def _watchers(value: Any) -> list:
    """A list, also of one. What is derived from `watch.watcher.Watcher` has all of this."""

    def read(one: Any) -> Any:
        _demand(all(hasattr(one, name) for name in ("wants_logits", "candidates", "needs_steps", "needs_possible")))
        return _with_methods("begin", "start", "step", "commit", "end")(one)

    watchers = _one_or_more(read, value)
    watchers = watchers if isinstance(watchers, list) else [watchers]
    _demand(len(set(map(id, watchers))) == len(watchers))
    return watchers


def _constraint(value: Any) -> Any:
    """One of the caller's that sees predictions, or a language: which ones there are `call.constrained` knows."""
    _demand(not isinstance(value, str | bytes | int | float | type | dict))
    _demand(not hasattr(value, "constrain") or isinstance(getattr(value, "wanted", None), Wanted))
    return value


def _sampler(value: Any) -> Any:
    """A name, or one of the caller's: as `rules.samplers.Sampler` has it."""
    if isinstance(value, str):
        _demand(value in SAMPLERS)
        return value
    _demand(all(isinstance(getattr(value, name, None), bool) for name in ("informed", "counts_steps")))
    return _with_methods("propose")(value)


def _instance(value: Any, kinds: type | tuple[type, ...]) -> Any:
    _demand(isinstance(value, kinds))
    return value


def _cache(value: Any) -> Cache:
    _demand(isinstance(value, Cache) and not isinstance(value, EncoderDecoderCache))
    return value


def _config(value: Any) -> GenerationConfig | dict:
    _demand(isinstance(value, GenerationConfig) or (isinstance(value, Mapping) and all(isinstance(name, str) for name in value)))
    return value


TOKEN, FLAG = Kind("a token id", _id), Kind("True or False", _flag)
NATS = number("a number > 0, in nats", 0, above=True)
TEMPERATURE = number("a temperature from 1e-9 to 1e9", 1e-9, 1e9)  # beyond, logits divided by it overflow or vanish
CUTOFF = number("a probability from 0, below 1", 0, 1 - 1e-9)

# Fields of `DiffusionGenerationConfig`. The bounds of what is allocated are far beyond use.
FIELDS: dict[str, Kind] = {
    **dict.fromkeys(("max_new_tokens", "max_length", "patience", "corrector_positions", "self_conditioning_steps"), integer(1)),
    **dict.fromkeys(
        ("stability_threshold", "corrector_steps", "min_new_tokens", "min_length", "no_repeat_ngram_size", "top_k"), integer(0)
    ),
    **dict.fromkeys(("max_denoising_steps", "canvas_length", "num_return_sequences"), integer(1, 2**20)),
    **dict.fromkeys(("entropy_bound", "confidence_threshold", "joint_threshold"), NATS),
    **dict.fromkeys(("t_min", "t_max"), TEMPERATURE),
    "temperature": Kind("0, or a factor from 1e-9 to 1e9", lambda value: 0 if _plain(value) == 0 and _number(value, 0, 0, False) == 0
                        else TEMPERATURE.read(value)),
    "repetition_penalty": Kind("a number from 1e-9 to 1e9", lambda value: float(_number(value, 1e-9, 1e9, False))),
    "max_time": number("seconds > 0", 0, above=True),
    "confidence": number("a probability above 0, at most 1", 0, 1, above=True),
    "typical_p": number("a probability above 0, at most 1", 0, 1, above=True),
    **dict.fromkeys(("top_p", "min_p"), number("a probability from 0 to 1", 0, 1)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), CUTOFF),
    **dict.fromkeys(
        ("ignore_after_eos", "do_sample", "output_scores", "output_logits", "return_dict_in_generate", "disable_compile"), FLAG
    ),
    "sampler": Kind(f"one of {tuple(SAMPLERS)}, or an instance with the method `propose` and the flags `informed` and `counts_steps`",
                    _sampler),
    "decoding": one_of(*DECODINGS), "noise": one_of(*NOISES), "backend": one_of(*BACKENDS),
    "cache_implementation": one_of(*CACHES),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "mask_token_id"), TOKEN),
    "eos_token_id": Kind("a token id, or a list of them", functools.partial(_one_or_more, _id)),
    "suppress_tokens": Kind("a list of token ids", _ids),
    "bad_words_ids": Kind("a list of lists of token ids, none of them empty", _words),
    "sequence_bias": Kind("token ids and a bias of at most 1e9 for each, `{(1, 2): 3.0}` or `[[[1, 2], 3.0]]`", _bias),
    "stop_strings": Kind("a string that is not empty, or a list of them", _strings),
    "cache_config": Kind("a mapping of names to numbers or strings", _cache_settings),
    "compile_config": Kind("a `CompileConfig`, or a mapping of its fields", _compile_config),
    "transformers_version": Kind("a string", lambda value: _instance(value, str)),
}  # fmt: skip

# Arguments of `generate` beside them.
ARGUMENTS: dict[str, Kind] = {
    "inputs": integers("(batch, length), the `input_ids`", 2),
    **dict.fromkeys(("input_ids", "decoder_input_ids"), integers("(batch, length)", 2)),
    "attention_mask": Kind("a tensor of shape (batch, length), 1 at tokens and 0 at padding", _mask),
    "inputs_embeds": floats("(batch, length, hidden_size)", 3),
    "cache": Kind("a `Cache` of transformers, such as `DynamicCache()`, and no `EncoderDecoderCache`", _cache),
    "seed": Kind("an integer, or a list of them, one a prompt",
                 functools.partial(_one_or_more, lambda value: _integer(value, -INFINITY, INFINITY))),
    "generator": Kind("a `torch.Generator`, or a list of them, one a row",
                      functools.partial(_one_or_more, lambda value: _instance(value, torch.Generator))),
    "logits_processor": Kind("a list of functions `(input_ids, scores) -> scores`", _callables),
    "stopping_criteria": Kind("a list of functions `(input_ids, scores) -> bool (rows,)`", _callables),
    "streamer": Kind("an object with the methods `put` and `end`", _with_methods("put", "end")),
    "watcher": Kind("a `generation.watch.watcher.Watcher`, or a list of them, each once", _watchers),
    "constraint": Kind("a `Regex`, `JsonSchema`, `Choice`, `Template` or `Pins` of `generation`, a list with one for each prompt, or a "
                       "`generation.rules.constraint.Constraint` with its `wanted`", _constraint),
    "first_step": Kind("an integer >= 0, or a list of them, one for each canvas of `decoder_input_ids`",
                       functools.partial(_one_or_more, lambda value: _integer(value, 0, LARGEST))),
    "self_conditioning_logits": floats("(batch, canvas_length, vocab_size), or (canvas_length, vocab_size) for every row", 2, 3),
    "stopping": Kind("a `generation.rules.stopping.StoppingRule`, an instance with the methods `start` and `update`",
                     _with_methods("start", "update")),
    "callback_on_step_end": Kind("a function `(model, step, noise_proportion, state) -> dict or None`", _function),
    "callback_on_step_end_tensor_inputs": Kind("a list of names", _names),
    "tokenizer": Kind("a tokenizer, with the method `decode`", _with_methods("decode")),
    "generation_config": Kind("a `GenerationConfig`, or a mapping of its fields", _config),
    "pixel_values": floats("(images, patches, values)", 3),
    "image_position_ids": integers("(images, patches, 2)", 3),
    "mm_token_type_ids": Kind("an integer or boolean tensor of shape (batch, length)", _marks),
}  # fmt: skip


# What other code for such models calls an argument, where its words do not tell.
ELSEWHERE = {
    "gen_length": "max_new_tokens", **dict.fromkeys(("block_length", "block_size", "canvas_size"), "canvas_length"),
    "entropy_threshold": "entropy_bound", "threshold": "confidence", "remasking": "sampler", "callback": "callback_on_step_end",
    **dict.fromkeys(("stop", "stop_words"), "stop_strings"),
}  # fmt: skip


def meant(name: str, known: Iterable[str]) -> str | None:
    """Which of the names `known` somebody meant who wrote `name`: what other code calls so, one that is all but the same, one with the same
    last word (of these with most words of it, and a `max_` before others), or one that is similar; None where none is."""
    known, words = list(known), name.split("_")
    if ELSEWHERE.get(name) in known:
        return ELSEWHERE[name]
    alike = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
    last = [each for each in known if each.split("_")[-1] == words[-1]]
    if alike or not last:
        return next(iter(alike or difflib.get_close_matches(name, known, n=1, cutoff=0.75)), None)
    return max(last, key=lambda each: (len(set(words).intersection(each.split("_"))), each.startswith("max_"),
                                       difflib.SequenceMatcher(None, name, each).ratio()))  # fmt: skip


def unknown(names: Iterable[str], known: Iterable[str]) -> str:
    """Unknown arguments in an error message, each with what was perhaps meant."""
    known, hints = list(known), []
    for name in sorted(names):
        better = meant(name, known)
        hints.append(f"`{name}`" if better is None else f"`{name}` (did you mean `{better}`?)")
    return ", ".join(hints)


def read(name: str, value: Any, kind: Kind) -> Any:
    """`value` as it is used; None stays None.

    Raises:
        ValueError: it is not of this kind.
    """
    if value is None:
        return None
    try:
        return kind.read(value)
    except (Unfit, OverflowError, RuntimeError, TypeError, ValueError):  # or what a stranger's object raises where it is looked at
        raise ValueError(f"`{name}` is {shown(value)}; expected {kind.expected}") from None


def read_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by their names, those that are named in `ARGUMENTS` as they are used.

    Raises:
        ValueError: as `read`.
    """
    return {name: read(name, value, ARGUMENTS[name]) if name in ARGUMENTS else value for name, value in given.items()}


def reads_arguments(function: Callable) -> Callable:
    """Has the arguments of a function that are named in `ARGUMENTS` read before it runs."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def reading(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.arguments |= read_arguments(bound.arguments)
        return function(*bound.args, **bound.kwargs)

    return reading


__all__ = ["ARGUMENTS", "FIELDS", "Kind", "meant", "read", "read_arguments", "reads_arguments", "shown", "unknown"]
